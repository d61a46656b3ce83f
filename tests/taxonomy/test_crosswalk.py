"""Crosswalks to the codes of published systems, both ways."""

from __future__ import annotations

import pytest

from hysafe.errors import TaxonomyError
from hysafe.taxonomy import Taxonomy, crosswalk, load_taxonomy

# Codes that are risks of content. LlavaGuard O1-O9, MLCommons S1-S14.
LLAVAGUARD = {f"O{i}" for i in range(1, 10)}
MLCOMMONS = {f"S{i}" for i in range(1, 15)}


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return load_taxonomy()


def all_codes(taxonomy: Taxonomy, scheme: str) -> set[str]:
    return {code for n in taxonomy for code in n.crosswalk.get(scheme, ())}


def test_every_published_system_is_a_scheme(taxonomy: Taxonomy) -> None:
    assert crosswalk.schemes(taxonomy) == (
        "holisafe", "llavaguard", "mlcommons", "openai_omni", "proguard", "unsafe_concepts",
    )  # fmt: skip


def test_every_code_of_llavaguard_and_mlcommons_has_a_category(taxonomy: Taxonomy) -> None:
    assert all_codes(taxonomy, "llavaguard") == LLAVAGUARD
    assert all_codes(taxonomy, "mlcommons") == MLCOMMONS


def test_all_75_unsafe_concepts_are_concepts_of_ours(taxonomy: Taxonomy) -> None:
    names = all_codes(taxonomy, "unsafe_concepts")
    assert len(names) == 75
    assert [n.id for n in crosswalk.nodes(taxonomy, "unsafe_concepts", "Swastika")] == ["1.1.1"]
    assert "Swastika" in crosswalk.codes(taxonomy, "1.1", "unsafe_concepts")


def test_every_category_maps_to_some_system_but_jailbreaks_which_none_of_them_names(
    taxonomy: Taxonomy,
) -> None:
    systems = [s for s in crosswalk.schemes(taxonomy) if s != "unsafe_concepts"]
    alone = {
        n.id
        for n in taxonomy.categories
        if not any(crosswalk.codes(taxonomy, n.id, s) for s in systems)
    }
    assert alone == {"12.1"}


def test_there_and_back_holds_for_every_node_and_code(taxonomy: Taxonomy) -> None:
    for scheme in crosswalk.schemes(taxonomy):
        for node in taxonomy:
            for code in node.crosswalk.get(scheme, ()):
                assert node in crosswalk.nodes(taxonomy, scheme, code)
                assert code in crosswalk.codes(taxonomy, node.id, scheme)
        for code in all_codes(taxonomy, scheme):
            found = crosswalk.nodes(taxonomy, scheme, code)
            assert found
            for node in found:
                for above in taxonomy.path(node.id).ids:
                    assert code in crosswalk.codes(taxonomy, above, scheme)


def test_a_concept_has_its_categorys_codes_and_a_domain_those_of_all_below(
    taxonomy: Taxonomy,
) -> None:
    for scheme in ("mlcommons", "proguard"):
        for node in taxonomy.concepts:
            above = crosswalk.codes(taxonomy, str(node.parent), scheme)
            assert crosswalk.codes(taxonomy, node.id, scheme) == above
        for domain in taxonomy.domains:
            expected = {
                code for n in taxonomy.children(domain.id) for code in n.crosswalk.get(scheme, ())
            }
            assert set(crosswalk.codes(taxonomy, domain.id, scheme)) == expected


def test_codes_are_not_repeated(taxonomy: Taxonomy) -> None:
    for domain in taxonomy.domains:
        found = crosswalk.codes(taxonomy, domain.id, "llavaguard")
        assert len(found) == len(set(found))


def test_a_code_without_counterpart_has_no_nodes_and_harmless_nodes_have_no_codes(
    taxonomy: Taxonomy,
) -> None:
    assert crosswalk.nodes(taxonomy, "mlcommons", "S99") == ()
    assert crosswalk.codes(taxonomy, "S", "mlcommons") == ()
    assert crosswalk.codes(taxonomy, "S.6.1", "mlcommons") == ()


def test_an_unknown_scheme_or_node_is_named(taxonomy: Taxonomy) -> None:
    with pytest.raises(TaxonomyError, match="no crosswalk to 'mlcommon'.*mlcommons"):
        crosswalk.codes(taxonomy, "6.1", "mlcommon")
    with pytest.raises(TaxonomyError, match="no crosswalk to 'x'"):
        crosswalk.nodes(taxonomy, "x", "S1")
    with pytest.raises(TaxonomyError, match="no node '99'"):
        crosswalk.codes(taxonomy, "99", "mlcommons")
