"""The taxonomy in the package: its size, what every category carries, its tree and its hash."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hysafe.errors import TaxonomyError
from hysafe.taxonomy import Node, Taxonomy, load_taxonomy
from hysafe.taxonomy.tree import SAFE_DOMAIN

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return load_taxonomy()


def test_counts_of_the_merged_taxonomy(taxonomy: Taxonomy) -> None:
    assert len(taxonomy.domains) == 12
    assert len(taxonomy.categories) == 45
    assert len(taxonomy.concepts) == 194
    assert {n.kind for n in taxonomy} == {
        "domain", "category", "concept", "safe_domain", "benign", "background",
    }  # fmt: skip


def test_every_category_has_a_bank_of_distinct_short_phrases(taxonomy: Taxonomy) -> None:
    for node in taxonomy.categories:
        assert len({p.casefold() for p in node.synonyms}) >= 5, node.id
        for phrase in node.synonyms:
            assert 2 <= len(phrase.split()) <= 6, (node.id, phrase)


def test_no_phrase_names_two_categories(taxonomy: Taxonomy) -> None:
    owners: dict[str, str] = {}
    for node in taxonomy.categories:
        for phrase in node.synonyms:
            assert owners.setdefault(phrase.casefold(), node.id) == node.id, phrase


def test_every_category_has_bullets_severity_and_a_benign_sibling(taxonomy: Taxonomy) -> None:
    for node in taxonomy.categories:
        assert node.should_not, node.id
        assert node.can, node.id
        assert 1 <= node.severity <= 4, node.id
        sibling = taxonomy[str(node.sibling)]
        assert sibling.kind == "benign"
        assert sibling.parent == SAFE_DOMAIN
        assert sibling.sibling == node.id
        assert not sibling.risky


def test_every_node_has_name_and_definition_and_ids_say_where_it_stands(
    taxonomy: Taxonomy,
) -> None:
    for node in taxonomy:
        assert node.name
        assert node.definition
        if node.kind == "category":
            assert f"D{node.id.split('.')[0]}" == node.parent
        if node.kind == "concept":
            assert node.id.rsplit(".", 1)[0] == node.parent


def test_sexual_exploitation_of_minors_is_text_only_with_all_its_concepts(
    taxonomy: Taxonomy,
) -> None:
    marked = [n for n in taxonomy if n.text_only]
    assert [n.id for n in marked if n.kind == "category"] == ["4.5"]
    assert {n.id for n in marked} == {"4.5", *(n.id for n in taxonomy.children("4.5"))}


def test_the_tree_reads_the_same_from_parents_children_paths_and_descendants(
    taxonomy: Taxonomy,
) -> None:
    for node in taxonomy:
        path = taxonomy.path(node.id)
        assert path.ids[-1] == node.id
        assert taxonomy.parents[path.ids[0]] is None
        assert taxonomy.depth(node.id) == len(path.ids)
        for above, below in zip(path.ids, path.ids[1:], strict=False):
            assert taxonomy.parents[below] == above
            assert below in {n.id for n in taxonomy.children(above)}
        below_it = {n.id for n in taxonomy if node.id in taxonomy.path(n.id).ids} - {node.id}
        assert {n.id for n in taxonomy.descendants(node.id)} == below_it
    assert [n.id for n in taxonomy.children(None)][:2] == ["D1", "D2"]
    assert str(taxonomy.path("6.1.1")).count(" > ") == 2


def test_an_unknown_id_says_what_ids_look_like(taxonomy: Taxonomy) -> None:
    with pytest.raises(TaxonomyError, match=r"taxonomy\.yaml: no node '6\.99'.*6\.1 \(category\)"):
        taxonomy["6.99"]
    assert "6.99" not in taxonomy
    assert "6.1" in taxonomy


def test_hash_is_the_same_in_another_process_with_another_hash_seed(taxonomy: Taxonomy) -> None:
    code = "from hysafe.taxonomy import *; print(load_taxonomy().hash)"
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == taxonomy.hash
    assert len(taxonomy.hash) == 16


CHANGES = {
    "name": "another name",
    "definition": "another definition",
    "kind": "background",
    "synonyms": ("one phrase here",),
    "severity": 4,
    "should_not": ("do this",),
    "can": ("do that",),
    "sibling": "S.2.1",
    "crosswalk": {"mlcommons": ("S99",)},
    "text_only": True,
}


@pytest.mark.parametrize("field", sorted(CHANGES))
def test_hash_changes_with_any_content(taxonomy: Taxonomy, field: str) -> None:
    old = taxonomy["1.1"]
    assert getattr(old, field) != CHANGES[field]
    changed = taxonomy.with_nodes(replace(old, **{field: CHANGES[field]}))
    assert changed.hash != taxonomy.hash
    assert changed.with_nodes(old).hash == taxonomy.hash


def test_every_field_of_a_node_is_among_the_changes_tested() -> None:
    assert set(CHANGES) | {"id", "parent"} == {f.name for f in fields(Node)}


def test_hash_changes_with_the_set_of_nodes_and_their_parents(taxonomy: Taxonomy) -> None:
    more = taxonomy.with_nodes(Node("x.1", "New", "New risk.", "category", "D6"))
    moved = taxonomy.with_nodes(Node("x.1", "New", "New risk.", "category", "D7"))
    renamed = taxonomy.with_nodes(Node("x.2", "New", "New risk.", "category", "D6"))
    assert len({taxonomy.hash, more.hash, moved.hash, renamed.hash}) == 4


def test_hash_does_not_depend_on_the_order_of_nodes() -> None:
    def build(*nodes: Node) -> Taxonomy:
        return Taxonomy(nodes, name="t", version="1")

    a, b = Node("A", "a", "A.", "domain"), Node("B", "b", "B.", "domain")
    assert build(a, b).hash == build(b, a).hash != build(a).hash


def test_phrases_are_name_definition_and_synonyms_without_repeats() -> None:
    node = Node("A", "drug deals", "Selling drugs.", "domain", synonyms=("drug deals", "dealing"))
    assert node.phrases == ("drug deals", "Selling drugs.", "dealing")


def test_bundled_yaml_reads_the_same_with_the_loader_for_files_of_others(
    taxonomy: Taxonomy,
) -> None:
    # libyaml for our own file, pure Python for other people's: one meaning
    copy = load_taxonomy(ROOT / "hysafe" / "taxonomy" / "taxonomy.yaml")
    assert copy.hash == taxonomy.hash
    assert [n.id for n in copy] == [n.id for n in taxonomy]
