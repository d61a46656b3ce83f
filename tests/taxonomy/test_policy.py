"""Policies: statuses, thresholds, inheritance, new and re-described nodes, and what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hysafe.errors import ConfigError, TaxonomyError
from hysafe.taxonomy import Policy, PolicyView, Taxonomy, load_taxonomy
from hysafe.taxonomy.policy import (
    DEFAULT_THRESHOLD,
    MAX_EXAMPLE_LENGTH,
    MAX_EXAMPLES,
    SENSITIVE_THRESHOLD,
    ReviewBand,
)

ROOT = Path(__file__).resolve().parents[2]

NEW = {"parent": "D6", "name": "Drone parts", "definition": "Parts for armed drones."}


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return load_taxonomy()


def view(taxonomy: Taxonomy, nodes: dict[str, Any]) -> PolicyView:
    return Policy.from_dict({"nodes": nodes}, origin="shop.yaml").apply(taxonomy)


def read(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "shop.yaml"
    path.write_text(text, "utf-8")
    return Policy.load(path)


EXAMPLE = """
name: shop
nodes:
  D1: {status: non_violating}
  "6.1": {status: sensitive, threshold: 0.4}
  "x.1": {parent: D6, name: Drone parts, definition: Parts for armed drones.,
          synonyms: [drone bomb rack, grenade dropper]}
"""


def test_the_example_of_the_documentation_does_what_it_says(
    taxonomy: Taxonomy, tmp_path: Path
) -> None:
    policy = read(tmp_path, EXAMPLE)
    seen = policy.apply(taxonomy)
    assert policy.name == "shop"
    assert not any(seen.active(n.id) for n in taxonomy.descendants("D1"))
    assert not seen.active("D1")
    assert seen.status("6.1") == "sensitive"
    assert seen.threshold("6.1") == 0.4
    new = seen.taxonomy["x.1"]
    assert (new.kind, new.parent, new.name) == ("category", "D6", "Drone parts")
    assert new.synonyms == ("drone bomb rack", "grenade dropper")
    assert seen.active("x.1")
    assert seen.taxonomy.path("x.1").ids == ("D6", "x.1")
    untouched = [n for n in taxonomy if n.risky and n.id.split(".")[0] not in ("D1", "1", "6")]
    for node in untouched:
        assert seen.active(node.id)
        assert seen.threshold(node.id) == DEFAULT_THRESHOLD


def test_the_empty_policy_is_the_taxonomy_as_it_is(taxonomy: Taxonomy) -> None:
    seen = Policy().apply(taxonomy)
    assert seen.taxonomy is taxonomy
    for node in taxonomy:
        assert seen.status(node.id) == "default"
        assert seen.active(node.id) == node.risky
        assert seen.threshold(node.id) == DEFAULT_THRESHOLD


def test_descendants_inherit_and_the_nearest_rule_wins(taxonomy: Taxonomy) -> None:
    seen = view(
        taxonomy,
        {
            "D6": {"status": "non_violating"},
            "6.1": {"status": "sensitive"},
            "6.1.2": {"status": "default"},
        },
    )
    assert {seen.status(n) for n in ("D6", "6.2", "6.3", "6.2.1")} == {"non_violating"}
    assert {seen.status(n) for n in ("6.1", "6.1.1", "6.1.3")} == {"sensitive"}
    assert seen.status("6.1.2") == "default"
    assert seen.active("6.1.2")
    assert not seen.active("6.2.1")


def test_thresholds_are_inherited_and_the_nearest_wins(taxonomy: Taxonomy) -> None:
    seen = view(
        taxonomy,
        {
            "D6": {"threshold": 0.9},
            "6.1": {"status": "sensitive"},
            "6.1.1": {"threshold": 0.1},
            "6.2": {"status": "sensitive", "threshold": 0.3},
            "6.3": {"status": "default"},
        },
    )
    assert seen.threshold("6.4") == 0.9  # from its domain
    assert seen.threshold("6.1") == SENSITIVE_THRESHOLD
    assert seen.threshold("6.1.2") == SENSITIVE_THRESHOLD
    assert seen.threshold("6.1.1") == 0.1
    assert seen.status("6.1.1") == "sensitive"  # a threshold alone leaves the status
    assert seen.threshold("6.2.1") == 0.3
    assert seen.threshold("6.3") == DEFAULT_THRESHOLD  # default is a rule, not a gap
    assert seen.threshold("D7") == DEFAULT_THRESHOLD


def test_a_new_node_below_a_category_is_a_concept(taxonomy: Taxonomy) -> None:
    seen = view(taxonomy, {"x.2": {**NEW, "parent": "6.1"}, "6.1": {"status": "sensitive"}})
    assert seen.taxonomy["x.2"].kind == "concept"
    assert seen.status("x.2") == "sensitive"
    assert seen.taxonomy["x.2"] in seen.taxonomy.concepts
    assert len(taxonomy.concepts) == 194  # the taxonomy itself is untouched


@pytest.mark.parametrize("order", [("x.1", "x.1.1"), ("x.1.1", "x.1")])
def test_a_new_node_may_stand_below_a_new_node_in_any_order(
    taxonomy: Taxonomy, order: tuple[str, str]
) -> None:
    rules = {"x.1": NEW, "x.1.1": {**NEW, "parent": "x.1", "name": "Rotor blades"}}
    seen = view(taxonomy, {k: rules[k] for k in order})
    assert seen.taxonomy.path("x.1.1").ids == ("D6", "x.1", "x.1.1")
    assert [seen.taxonomy[n].kind for n in ("x.1", "x.1.1")] == ["category", "concept"]


def test_a_new_concept_of_a_text_only_category_is_text_only(taxonomy: Taxonomy) -> None:
    seen = view(taxonomy, {"x.1": {**NEW, "parent": "4.5"}, "x.2": {**NEW, "parent": "4.1"}})
    assert seen.taxonomy["x.1"].text_only
    assert not seen.taxonomy["x.2"].text_only


def test_a_known_node_is_described_anew_and_keeps_the_rest(taxonomy: Taxonomy) -> None:
    old = taxonomy["6.1"]
    seen = view(taxonomy, {"6.1": {"definition": "Firearms only.", "threshold": 0.2}})
    new = seen.taxonomy["6.1"]
    assert new.definition == "Firearms only."
    assert (new.name, new.synonyms, new.parent) == (old.name, old.synonyms, old.parent)
    assert (new.crosswalk, new.sibling) == (old.crosswalk, old.sibling)
    assert seen.taxonomy.hash != taxonomy.hash
    assert taxonomy["6.1"] == old
    assert [n.id for n in seen.taxonomy] == [n.id for n in taxonomy]
    named = view(taxonomy, {"6.1": {"name": "Guns", "synonyms": ["gun sales"], "parent": "D6"}})
    assert named.taxonomy["6.1"].name == "Guns"
    assert named.taxonomy["6.1"].synonyms == ("gun sales",)


def test_statuses_alone_leave_the_taxonomy_and_its_hash_alone(taxonomy: Taxonomy) -> None:
    assert view(taxonomy, {"D1": {"status": "non_violating"}}).taxonomy.hash == taxonomy.hash


# ---------------------------------------------------------------- keys as YAML reads them


def test_an_unquoted_id_is_read_as_it_is_written(taxonomy: Taxonomy, tmp_path: Path) -> None:
    # to plain YAML 6.1 is a number and 6.10 the same number
    plain = read(tmp_path, "nodes: {6.1: {status: sensitive}}")
    quoted = read(tmp_path, 'nodes: {"6.1": {status: sensitive}}')
    assert plain.hash == quoted.hash
    assert plain.apply(taxonomy).status("6.1") == "sensitive"
    ten = read(tmp_path, "nodes: {6.10: {parent: D6, name: n, definition: d}, 6.1: {threshold: 1}}")
    assert set(ten.rules) == {"6.10", "6.1"}
    assert ten.apply(taxonomy).taxonomy["6.10"].kind == "category"
    with pytest.raises(TaxonomyError, match=r"shop\.yaml: node 6\.10: not in the taxonomy"):
        read(tmp_path, "nodes: {6.10: {status: sensitive}}").apply(taxonomy)


@pytest.mark.parametrize("key", ["on", "null", "1e3", "2024-01-01", "0x10", "12:30"])
def test_other_words_yaml_would_change_stay_ids(tmp_path: Path, key: str) -> None:
    policy = read(tmp_path, f"nodes: {{{key}: {{parent: D6, name: n, definition: d}}}}")
    assert set(policy.rules) == {key}


def test_a_node_given_twice_is_an_error_and_not_the_last_one(tmp_path: Path) -> None:
    text = 'nodes:\n  6.1: {status: sensitive}\n  "6.1": {status: non_violating}\n'
    with pytest.raises(TaxonomyError, match=r"shop\.yaml: .*'6\.1' is given twice.*line 3"):
        read(tmp_path, text)


def test_yaml_anchors_and_merges_work(taxonomy: Taxonomy, tmp_path: Path) -> None:
    text = (
        "nodes:\n  D1: &strict {status: sensitive, threshold: 0.2}\n"
        "  D2: {<<: *strict, threshold: 0.3}\n  D3: *strict\n"
    )
    seen = read(tmp_path, text).apply(taxonomy)
    assert [seen.threshold(n) for n in ("D1", "D2", "D3")] == [0.2, 0.3, 0.2]
    assert seen.status("D2") == "sensitive"


# ---------------------------------------------------------------- errors

# name -> (rules, node named, problem, remedy); refused when read
BAD_RULES: dict[str, tuple[Any, str, str, str]] = {
    "a rule that is a word": ({"D1": "off"}, "D1", "expected a mapping, got 'off'", "{status:"),
    "an empty rule": ({"D1": None}, "D1", "expected a mapping, got None", "{status:"),
    "unknown key": ({"D1": {"state": "off"}}, "D1", "unknown key state", "Known:"),
    "unknown status": ({"D1": {"status": "off"}}, "D1", "status is 'off'", "non_violating"),
    "a truth value as status": ({"D1": {"status": False}}, "D1", "status is False", "sensitive"),
    "threshold 0": ({"D1": {"threshold": 0}}, "D1", "threshold is 0", "above 0"),
    "threshold above 1": ({"D1": {"threshold": 40}}, "D1", "threshold is 40", "at most 1"),
    "threshold as text": ({"D1": {"threshold": "0.4"}}, "D1", "threshold is '0.4'", "number"),
    "threshold true": ({"D1": {"threshold": True}}, "D1", "threshold is True", "number"),
    "threshold nan": ({"D1": {"threshold": float("nan")}}, "D1", "threshold is nan", "number"),
    "synonyms as text": ({"x": {**NEW, "synonyms": "a b"}}, "x", "`synonyms`", "[phrase"),
    "an empty synonym": ({"x": {**NEW, "synonyms": [" "]}}, "x", "`synonyms`", "[phrase"),
    "parent as a number": ({"x": {**NEW, "parent": 6.1}}, "x", "`parent` is 6.1", "quotes"),
    "blank name": ({"x": {**NEW, "name": " "}}, "x", "`name` is ' '", "as text"),
    "a number as id (from Python)": ({6.1: {"status": "default"}}, "6.1", "no text", "quotes"),
    "an empty id": ({"": {"status": "default"}}, "''", "the id is no text", "quotes"),
}
# name -> the same; refused when applied
BAD_NODES: dict[str, tuple[Any, str, str, str]] = {
    "unknown id": ({"6.99": {"status": "sensitive"}}, "6.99", "not in the taxonomy", "Correct"),
    "new without definition": (
        {"x": {"parent": "D6", "name": "n"}}, "x", "not in the taxonomy", "definition"),
    "new without parent": (
        {"x": {"name": "n", "definition": "d"}}, "x", "not in the taxonomy", "parent"),
    "unknown parent": ({"x": {**NEW, "parent": "D99"}}, "x", "unknown parent 'D99'", "a domain"),
    "new nodes in a circle": (
        {"x": {**NEW, "parent": "y"}, "y": {**NEW, "parent": "x"}},
        "x", "unknown parent 'y'", "a domain"),
    "below a concept": (
        {"x": {**NEW, "parent": "6.1.1"}}, "x", "its parent 6.1.1 is a concept", "(D6)"),
    "below a benign sibling": (
        {"x": {**NEW, "parent": "S.6.1"}}, "x", "its parent S.6.1 is a benign", "(6.1)"),
    "moving a node": ({"6.1": {"parent": "D1"}}, "6.1", "cannot move a node", "add a new one"),
    "a sensitive harmless node": (
        {"S.6.1": {"status": "sensitive"}}, "S.6.1", "harmless node", "risk node beside"),
    "a threshold on a harmless node": (
        {"S": {"threshold": 0.2}}, "S", "harmless node has no threshold", "risk node beside"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD_RULES))
def test_a_rule_that_makes_no_sense_is_named_with_file_and_remedy(case: str) -> None:
    rules, node, problem, remedy = BAD_RULES[case]
    with pytest.raises(TaxonomyError) as caught:
        Policy.from_dict({"nodes": rules}, origin="shop.yaml")
    _complains(str(caught.value), node, problem, remedy)


@pytest.mark.parametrize("case", sorted(BAD_NODES))
def test_a_rule_that_does_not_fit_the_taxonomy_is_named_with_file_and_remedy(
    case: str, taxonomy: Taxonomy
) -> None:
    rules, node, problem, remedy = BAD_NODES[case]
    policy = Policy.from_dict({"nodes": rules}, origin="shop.yaml")
    with pytest.raises(TaxonomyError) as caught:
        policy.apply(taxonomy)
    _complains(str(caught.value), node, problem, remedy)


def _complains(message: str, node: str, problem: str, remedy: str) -> None:
    assert message.startswith(f"shop.yaml: node {node}: ")
    assert problem in message
    assert remedy in message.split(problem, 1)[1]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"nodes: [", "not valid YAML"),
        (b"nodes: {D1: \xff}", "not UTF-8"),
        (b"", "expected a mapping"),
        (b"- D1", "expected a mapping"),
        (b"D1: {status: sensitive}", "unknown key 'D1'.*below `nodes`"),
        (b"nodes: [D1]", "`nodes` is list"),
        (b"nodes: !!python/name:os.system ", "not valid YAML"),
        (b"[" * 700, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_policy_is_named(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "shop.yaml"
    path.write_bytes(content)
    with pytest.raises(TaxonomyError, match=rf"shop\.yaml: .*{problem}"):
        Policy.load(path)


def test_a_missing_policy_file_is_named_and_never_the_empty_policy(tmp_path: Path) -> None:
    with pytest.raises(TaxonomyError, match=r"absent\.yaml: cannot be read .* Check the path"):
        Policy.load(tmp_path / "absent.yaml")


def test_the_file_name_is_the_policy_name_where_none_is_given(tmp_path: Path) -> None:
    assert read(tmp_path, "nodes: {}").name == "shop"
    assert read(tmp_path, "name:\nnodes: {}").name == "shop"
    assert read(tmp_path, "name: strict").name == "strict"


# ---------------------------------------------------------------- hash


def test_hash_depends_on_every_part_of_a_rule_and_not_on_name_or_order(taxonomy: Taxonomy) -> None:
    base = {**NEW, "status": "default", "threshold": 0.5, "synonyms": ["a b"]}
    changes: dict[str, Any] = {
        "status": "sensitive", "threshold": 0.4, "parent": "D7", "name": "m",
        "definition": "e", "synonyms": ["c d"],
    }  # fmt: skip
    assert set(changes) == set(base)
    hashes = {Policy.from_dict({"nodes": {"x": base}}).hash}
    hashes |= {Policy.from_dict({"nodes": {"x": {**base, k: v}}}).hash for k, v in changes.items()}
    hashes |= {Policy.from_dict({"nodes": {"y": base}}).hash, Policy().hash}
    assert len(hashes) == len(changes) + 3
    two = {"D1": {"status": "sensitive"}, "D2": {"threshold": 0.2}}
    swapped = dict(reversed(two.items()))
    a = Policy.from_dict({"name": "a", "nodes": two})
    assert a.hash == Policy.from_dict({"name": "b", "nodes": swapped}).hash


def test_hash_is_the_same_in_another_process_with_another_hash_seed(tmp_path: Path) -> None:
    policy = read(tmp_path, EXAMPLE)
    code = "import sys; from hysafe.taxonomy import *; print(Policy.load(sys.argv[1]).hash)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "shop.yaml")], cwd=ROOT, check=True,
        env={**os.environ, "PYTHONHASHSEED": "99"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == policy.hash


# ---------------------------------------------------------------- example pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, content in {"a.png": b"one", "b.png": b"two", "copy.png": b"one"}.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def with_examples(folder: Path, *files: Any, **settings: Any) -> Policy:
    rule = {**NEW, "examples": list(files), **settings}
    return Policy.from_dict({"nodes": {"x": rule}}, origin="shop.yaml", folder=folder)


def test_examples_are_found_beside_the_policy_file(pictures: Path, taxonomy: Taxonomy) -> None:
    text = "nodes:\n  x: {parent: D6, name: n, definition: d, examples: [a.png, b.png]}\n"
    policy = read(pictures, text)
    assert [e.file for e in policy.rules["x"].examples] == [
        str(pictures / "a.png"), str(pictures / "b.png")
    ]  # fmt: skip
    assert policy.rules["x"].examples[0].sha256 == hashlib.sha256(b"one").hexdigest()
    assert policy.apply(taxonomy).taxonomy["x"].kind == "category"


def test_the_hash_covers_what_examples_show_and_not_where_they_lie(pictures: Path) -> None:
    one = with_examples(pictures, "a.png", "b.png")
    assert one.hash == with_examples(pictures, "b.png", "copy.png", "a.png").hash
    others = {one.hash, with_examples(pictures, "a.png").hash, with_examples(pictures).hash}
    (pictures / "a.png").write_bytes(b"three")
    others.add(with_examples(pictures, "a.png", "b.png").hash)
    assert len(others) == 4
    without = Policy.from_dict({"nodes": {"x": NEW}})
    assert with_examples(pictures).hash == without.hash
    assert without.hash == "46b8b47676b20a67"  # as before policies had examples


def test_a_policy_written_down_knows_its_examples_without_reading_them(pictures: Path) -> None:
    policy = with_examples(pictures, "a.png", "b.png")
    written = policy.to_dict()
    (pictures / "a.png").unlink()
    again = Policy.from_dict(written)
    assert again.rules == policy.rules
    assert again.hash == policy.hash


@pytest.mark.parametrize("name", ["absent.png", ".", "a\0b", os.devnull])
def test_an_example_that_is_no_file_is_named_with_its_node(pictures: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_examples(pictures, "a.png", name)
    assert str(caught.value).startswith(f"shop.yaml: node x: example {name}: cannot be read (")
    assert "Correct the path" in str(caught.value)


@pytest.mark.parametrize(
    ("examples", "problem"),
    [
        ("a.png", "no list of files"),
        ([1], "no list of files"),
        ([{"file": "a.png"}], "no list of files"),
        ([{"file": "a.png", "sha256": "12"}], "no list of files"),
        (["a.png"] * (MAX_EXAMPLES + 1), f"{MAX_EXAMPLES + 1} examples"),
    ],
)
def test_examples_that_are_no_list_of_some_files_are_refused(
    pictures: Path, examples: Any, problem: str
) -> None:
    with pytest.raises(TaxonomyError, match=rf"shop\.yaml: node x: .*{problem}"):
        with_examples(pictures, examples=examples)


def test_only_a_new_node_that_may_be_seen_takes_examples(
    pictures: Path, taxonomy: Taxonomy
) -> None:
    known = {"nodes": {"6.1": {"examples": ["a.png"]}}}
    with pytest.raises(TaxonomyError, match=r"node 6\.1: `examples` are for a node that"):
        Policy.from_dict(known, folder=pictures).apply(taxonomy)
    with pytest.raises(TaxonomyError, match=r"node x: its parent 4\.5 is for text only"):
        with_examples(pictures, "a.png", parent="4.5").apply(taxonomy)


# ---------------------------------------------------------------- example texts


def with_texts(*texts: Any, **settings: Any) -> Policy:
    rule = {**NEW, "example_texts": list(texts), **settings}
    return Policy.from_dict({"nodes": {"x": rule}}, origin="shop.yaml")


def test_example_texts_count_in_any_order_and_once() -> None:
    one = with_texts("a laser", "a lamp")
    assert one.hash == with_texts("a lamp", "a laser", "a lamp").hash
    assert len({one.hash, with_texts("a laser", "a torch").hash, with_texts().hash}) == 3
    assert with_texts().hash == Policy.from_dict({"nodes": {"x": NEW}}).hash


def test_example_texts_are_written_down_and_read_again() -> None:
    policy = with_texts("a laser", "a lamp")
    again = Policy.from_dict(policy.to_dict(), origin="shop.yaml")
    assert again.rules == policy.rules
    assert again.hash == policy.hash


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ("a laser", "`example_texts` is no list"),
        (False, "`example_texts` is no list"),
        ([1], "example text 1 is 1"),
        (["a", " "], "example text 2 is ' '"),
        (["a laser", "A  laser "], "one example text"),
        (["a", "b\ud800"], "example text 2 has half a character"),
        ([f"a {i}" for i in range(MAX_EXAMPLES + 1)], f"{MAX_EXAMPLES + 1} example texts"),
        (["a", "b" * (MAX_EXAMPLE_LENGTH + 1)], "example text 2 has 2,001 characters"),
    ],
)
def test_example_texts_that_are_no_list_of_some_texts_are_refused(texts: Any, problem: str) -> None:
    with pytest.raises(TaxonomyError, match=rf"shop\.yaml: node x: {problem}"):
        with_texts(example_texts=texts)


def test_only_a_new_node_takes_example_texts_and_one_for_text_only_may(taxonomy: Taxonomy) -> None:
    known = {"nodes": {"6.1": {"example_texts": ["a laser", "a lamp"]}}}
    with pytest.raises(TaxonomyError, match=r"node 6\.1: `example_texts` are for a node that"):
        Policy.from_dict(known).apply(taxonomy)
    assert with_texts("a text", "another", parent="4.5").apply(taxonomy).taxonomy["x"].text_only


# ---------------------------------------------------------------- review band


def test_a_review_band_is_read_hashed_and_written_down(tmp_path: Path) -> None:
    both = read(tmp_path, "review: {risk: 0.2, novelty: 0.05}\nnodes: {}")
    assert both.review == ReviewBand(0.2, 0.05)
    assert Policy.from_dict(both.to_dict()).review == both.review
    one = read(tmp_path, "review: {risk: 0.2}")
    other = read(tmp_path, "review: {novelty: 0.2}")
    none = read(tmp_path, "review: {}")
    assert none.review == ReviewBand()
    assert "review" not in none.to_dict()
    assert len({both.hash, one.hash, other.hash, none.hash}) == 4
    assert none.hash == Policy().hash


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("0.3", r"`review` is 0\.3"),
        ("[0.3]", "`review` is"),
        ("{from: 0.3}", "`review` is"),
        ("{risk: yes}", "review: risk is True"),
        ("{risk: 1.1}", r"review: risk is 1\.1"),
        ("{novelty: -0.1}", r"review: novelty is -0\.1"),
        ("{novelty: .nan}", "review: novelty is nan"),
        ("{risk: null}", "review: risk is None"),
    ],
)
def test_a_review_band_that_makes_no_sense_is_named_with_file(
    tmp_path: Path, value: str, problem: str
) -> None:
    with pytest.raises(TaxonomyError, match=rf"shop\.yaml: {problem}.*(Write|Give)"):
        read(tmp_path, f"review: {value}")
