"""A taxonomy file that is not valid: every complaint names the file, the node and the remedy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hysafe.errors import TaxonomyError
from hysafe.taxonomy import Node, Taxonomy, load_taxonomy

VALID: dict[str, Any] = {
    "name": "small",
    "version": "1.0.0",
    "domains": [
        {
            "id": "D1",
            "name": "Hate",
            "definition": "Attacks on groups.",
            "categories": [
                {
                    "id": "1.1",
                    "name": "Symbols",
                    "definition": "Emblems of hate.",
                    "severity": 2,
                    "synonyms": ["hate symbols", "racist flags", "hate tattoos", "coded numbers",
                                 "a hateful emblem"],
                    "should_not": ["praise them"],
                    "can": ["report on them"],
                    "benign": {"name": "History", "definition": "Museums."},
                    "crosswalk": {"mlcommons": ["S10"]},
                    "concepts": [
                        {"id": "1.1.1", "name": "Flag", "definition": "A flag.", "source": "added"}
                    ],
                },
            ],
        },
    ],
    "safe": {
        "name": "Harmless",
        "definition": "Harms nobody.",
        "background": [{"id": "S.b1", "name": "Animals", "definition": "Pets."}],
    },
}  # fmt: skip

Change = Callable[[dict[str, Any]], object]


def domain(t: dict[str, Any]) -> dict[str, Any]:
    return t["domains"][0]


def category(t: dict[str, Any]) -> dict[str, Any]:
    return t["domains"][0]["categories"][0]


def concept(t: dict[str, Any]) -> dict[str, Any]:
    return category(t)["concepts"][0]


def remove(entry: dict[str, Any], key: str) -> None:
    del entry[key]


# name -> (change, node named, part of the problem, part of the remedy)
BROKEN: dict[str, tuple[Change, str, str, str]] = {
    "duplicate id": (
        lambda t: concept(t).update(id="1.1"), "1.1", "id used twice", "new id"),
    "an id that is the safe domain's": (
        lambda t: domain(t).update(id="S"), "S", "id used twice", "new id"),
    "no id": (
        lambda t: remove(category(t), "id"), "Symbols", "has no id", "Add `id:"),
    "empty id": (
        lambda t: category(t).update(id=""), "Symbols", "has no id", "Add `id:"),
    "an id YAML reads as a number": (
        lambda t: category(t).update(id=6.1), "6.1", "the id is no text", "quotes"),
    "missing definition of a domain": (
        lambda t: remove(domain(t), "definition"), "D1", "`definition` is missing", "as text"),
    "missing definition of a category": (
        lambda t: remove(category(t), "definition"), "1.1", "`definition` is missing", "as text"),
    "missing definition of a concept": (
        lambda t: remove(concept(t), "definition"), "1.1.1", "`definition` is missing", "as text"),
    "blank name": (
        lambda t: category(t).update(name="  "), "1.1", "`name` is missing", "as text"),
    "a name that is a number": (
        lambda t: category(t).update(name=5), "1.1", "`name` is missing", "as text"),
    "short bank": (
        lambda t: category(t)["synonyms"].pop(), "1.1", "4 different synonyms", "at least 5"),
    "a bank of repeats": (
        lambda t: category(t).update(synonyms=["hate symbols"] * 9),
        "1.1", "1 different synonyms", "at least 5"),
    "no bank": (
        lambda t: remove(category(t), "synonyms"), "1.1", "0 different synonyms", "at least 5"),
    "synonym of one word": (
        lambda t: category(t)["synonyms"].append("hate"), "1.1", "'hate' has 1 words", "2 to 6"),
    "synonym of seven words": (
        lambda t: category(t)["synonyms"].append("a b c d e f g"),
        "1.1", "has 7 words", "2 to 6"),
    "synonyms that are no list": (
        lambda t: category(t).update(synonyms="hate symbols"), "1.1", "`synonyms` is", "a list"),
    "a synonym that is no text": (
        lambda t: category(t)["synonyms"].append(True), "1.1", "`synonyms` holds True", "text"),
    "severity out of range": (
        lambda t: category(t).update(severity=5), "1.1", "severity 5", "1, 2, 3 or 4"),
    "severity that is a word": (
        lambda t: category(t).update(severity="high"), "1.1", "severity 'high'", "1, 2, 3 or 4"),
    "severity that is a truth value": (
        lambda t: category(t).update(severity=True), "1.1", "severity True", "1, 2, 3 or 4"),
    "unknown modality": (
        lambda t: category(t).update(modality="video"), "1.1", "modality 'video'", "any or text"),
    "unknown key of a category": (
        lambda t: category(t).update(sinonyms=[]), "1.1", "unknown key 'sinonyms'", "synonyms"),
    "unknown key of a domain": (
        lambda t: domain(t).update(severity=2), "D1", "unknown key 'severity'", "Known:"),
    "unknown key of a concept": (
        lambda t: concept(t).update(benign={}), "1.1.1", "unknown key 'benign'", "Known:"),
    "unknown key of a sibling": (
        lambda t: category(t)["benign"].update(id="x"), "S.1.1", "unknown key 'id'", "Known:"),
    "unknown key at the top": (
        lambda t: t.update(domain=[]), "(top)", "unknown key 'domain'", "domains"),
    "unknown key of the safe domain": (
        lambda t: t["safe"].update(id="S"), "S", "unknown key 'id'", "background"),
    "no benign sibling": (
        lambda t: remove(category(t), "benign"), "1.1", "no benign sibling", "Add `benign:"),
    "a sibling that is no mapping": (
        lambda t: category(t).update(benign="history"), "S.1.1", "expected a mapping", "name: ..."),
    "sibling without definition": (
        lambda t: remove(category(t)["benign"], "definition"),
        "S.1.1", "`definition` is missing", "as text"),
    "bullets that are no list": (
        lambda t: category(t).update(can="report"), "1.1", "`can` is 'report'", "a list"),
    "crosswalk that is no mapping": (
        lambda t: category(t).update(crosswalk=["S10"]), "1.1", "`crosswalk` is", "[code, ...]"),
    "codes that are no list": (
        lambda t: category(t).update(crosswalk={"mlcommons": "S10"}),
        "1.1", "`mlcommons` is 'S10'", "a list"),
    "a code YAML reads as a number": (
        lambda t: category(t).update(crosswalk={"mlcommons": [6.1]}),
        "1.1", "`mlcommons` holds 6.1", "quoted"),
    "a source that is no text": (
        lambda t: concept(t).update(source=5), "1.1.1", "`source` is 5", "as text"),
    "categories that are no list": (
        lambda t: domain(t).update(categories={"1.1": {}}), "D1", "`categories` is", "a list"),
    "a category that is no mapping": (
        lambda t: domain(t)["categories"].append("Guns"), "D1", "mapping, got 'Guns'", "name: ..."),
    "a domain that is no mapping": (
        lambda t: t["domains"].append(None), "below domains", "got None", "name: ..."),
    "safe that is a list": (
        lambda t: t.update(safe=[1]), "S", "`safe` is [1]", "a mapping"),
    "background that is no list": (
        lambda t: t["safe"].update(background="animals"), "S", "`background` is", "a list"),
    "background without id": (
        lambda t: remove(t["safe"]["background"][0], "id"), "Animals", "has no id", "Add `id:"),
    "synonyms of the safe domain that are text": (
        lambda t: t["safe"].update(synonyms="harmless"), "S", "`synonyms` is", "a list"),
}  # fmt: skip


def write(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data), "utf-8")
    return path


def test_the_small_file_is_valid(tmp_path: Path) -> None:
    taxonomy = load_taxonomy(write(tmp_path, VALID))
    assert [n.id for n in taxonomy] == ["D1", "1.1", "1.1.1", "S", "S.1.1", "S.b1"]
    assert (taxonomy.name, taxonomy.version) == ("small", "1.0.0")
    assert taxonomy["1.1"].crosswalk == {"mlcommons": ("S10",)}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_a_broken_node_is_named_with_file_and_remedy(case: str, tmp_path: Path) -> None:
    change, node, problem, remedy = BROKEN[case]
    data = copy.deepcopy(VALID)
    change(data)
    path = write(tmp_path, data)
    with pytest.raises(TaxonomyError) as caught:
        load_taxonomy(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: node ")
    assert node in message
    assert problem in message
    assert remedy in message.split(problem, 1)[1]


# name -> (bytes, part of the message, part of the remedy)
NOT_YAML = {
    "unclosed bracket": (b"domains: [", "not valid YAML", "Correct it"),
    "tab": (b"domains:\n\t- id: D1\n", "not valid YAML", "Correct it"),
    "python object": (b"domains: !!python/object/apply:os.getcwd []", "not valid YAML", "Correct"),
    "impossible date": (b"domains: 2024-13-45", "not valid YAML", "quotes"),
    "control character": (b"domains: \x07", "not valid YAML", "Correct it"),
    "a key given twice": (b"domains: []\ndomains: []\n", "'domains' is given twice", "Correct it"),
    "a key that is a list": (b"? [a, b]\n: 1\n", "a key must be text", "Correct it"),
    "nesting without end": (b"[" * 700, "nested too deeply", "Flatten"),
    "not UTF-8": ("domains: [é]".encode("latin-1"), "not UTF-8", "Save it as UTF-8"),
    "binary": (bytes(range(256)), "not UTF-8", "Save it as UTF-8"),
    "empty": (b"", "expected a mapping", "`domains:`"),
    "a list": (b"- id: D1\n", "expected a mapping", "`domains:`"),
    "a word": (b"taxonomy", "expected a mapping", "`domains:`"),
    "no domains": (b"name: x\n", "a list `domains`", "`domains:`"),
    "domains as a mapping": (b"domains: {D1: {}}\n", "a list `domains`", "`domains:`"),
}


@pytest.mark.parametrize("case", sorted(NOT_YAML))
def test_a_file_that_is_no_taxonomy_is_named_with_a_remedy(case: str, tmp_path: Path) -> None:
    content, problem, remedy = NOT_YAML[case]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(TaxonomyError) as caught:
        load_taxonomy(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["absent.yaml", ".", "nul\0.yaml"])
def test_a_path_that_cannot_be_read_is_named_with_a_remedy(name: str, tmp_path: Path) -> None:
    with pytest.raises(TaxonomyError, match=r"cannot be read .* Check the path"):
        load_taxonomy(tmp_path / name)


def test_utf8_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(VALID).encode())
    assert len(load_taxonomy(path)) == 6


def test_an_unknown_parent_is_named_with_the_known_domains() -> None:
    nodes = [Node("D1", "a", "A.", "domain"), Node("2.1", "b", "B.", "category", "D2")]
    with pytest.raises(TaxonomyError, match=r"mine: node 2\.1: parent 'D2' is not.*domains: D1\."):
        Taxonomy(nodes, name="t", version="1", origin="mine")


def test_a_child_before_its_parent_is_an_unknown_parent_so_that_no_cycle_can_be_built() -> None:
    a, b = Node("A", "a", "A.", "domain", "B"), Node("B", "b", "B.", "domain", "A")
    with pytest.raises(TaxonomyError, match="node A: parent 'B'"):
        Taxonomy([a, b], name="t", version="1")


def test_a_node_without_text_is_refused_in_python_too() -> None:
    with pytest.raises(TaxonomyError, match="mine: node A: name or definition is empty"):
        Taxonomy([Node("A", "a", " ", "domain")], name="t", version="1", origin="mine")


def test_text_only_reaches_the_concepts_of_a_category(tmp_path: Path) -> None:
    data = copy.deepcopy(VALID)
    category(data)["modality"] = "text"
    taxonomy = load_taxonomy(write(tmp_path, data))
    assert [n.id for n in taxonomy if n.text_only] == ["1.1", "1.1.1"]
