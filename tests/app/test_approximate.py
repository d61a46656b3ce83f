"""Approximate search and its index from the command line and from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hysafe.app.cli import main
from hysafe.app.pipeline import SafetyModel, ScanOptions
from hysafe.app.scan import scan
from hysafe.app.search import search
from hysafe.errors import CollectionError
from hysafe.index import Collection
from hysafe.index import search as search_module
from hysafe.index.search import FOLDER

TEXTS = [f"{word} {thing}" for word in ("selling", "a quiet", "my") for thing in ("pistol", "dog")]


@pytest.fixture(scope="module")
def out(tiny_model: SafetyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("approximate")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "texts.jsonl").write_text("\n".join([*lines, "no JSON"]))
    scan([str(folder / "texts.jsonl")], folder / "out", tiny_model, options=ScanOptions(4, 0),
         report=False)  # fmt: skip
    return folder / "out"


def test_approximate_search_answers_like_exact_search_where_all_is_read(
    out: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []

    def rows(approximate: bool, **query: str) -> list[tuple[str, float | None]]:
        found = search(Collection.open(out), tiny_model, approximate=approximate,
                       progress=shares.append, k=3, **query)  # type: ignore[arg-type]  # fmt: skip
        return [(f.item.text, f.distance) for f in found]

    first = Collection.open(out).to_arrow(["id"])["id"].to_pylist()[0]
    monkeypatch.setattr(search_module.PointIndex, "_read_all", None)  # only cells are read
    near = rows(True, text="a quiet dog")
    assert shares[-1] == 1
    like = rows(True, like=first)
    some = rows(True, text="a quiet dog", where="text LIKE 'my %'")
    monkeypatch.undo()
    assert near == rows(False, text="a quiet dog")
    assert near[0][0] == "a quiet dog"
    assert like == rows(False, like=first)
    assert "selling pistol" not in [text for text, _ in like]
    assert some == rows(False, text="a quiet dog", where="text LIKE 'my %'")
    unread = Collection.open(out)
    broken = unread.take([len(TEXTS)])[0].id
    with pytest.raises(CollectionError, match="so it has no point"):
        search(unread, tiny_model, like=broken, approximate=True)


def test_the_index_from_the_command_line(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (out / FOLDER).glob("*"):
        path.unlink()
    assert main(["index", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "6 points in 5 cells, made in" in printed
    assert "only by: hysafe search --approximate" in printed
    assert main(["index", str(out)]) == 0
    assert "up to date" in capsys.readouterr().out
    assert main(["search", str(out), "my dog", "--approximate", "--json", "-k", "1"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["source"].endswith("texts.jsonl:6")
    assert main(["search", str(out), "--node", "6.1", "--approximate"]) == 2
    assert "Leave out --approximate" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["search", str(out), "x", "--approximate", "--exact"])


@pytest.mark.parametrize(("limit", "argument", "read"), [
    (100, [], "_read_all"), (100, ["--approximate"], "_read_cells"),
    (1, [], "_read_cells"), (1, ["--exact"], "_read_all"),
])  # fmt: skip
def test_small_collections_are_searched_exactly_and_large_ones_not(
    out: Path, monkeypatch: pytest.MonkeyPatch, limit: int, argument: list[str], read: str
) -> None:
    assert main(["index", str(out)]) == 0
    monkeypatch.setattr(search_module, "EXACT_UP_TO", limit)
    used: list[str] = []
    for name in ("_read_all", "_read_cells"):
        kept = getattr(search_module.PointIndex, name)
        monkeypatch.setattr(
            search_module.PointIndex, name,
            lambda *a, name=name, kept=kept: (used.append(name), kept(*a))[1],
        )  # fmt: skip
    assert main(["search", str(out), "my dog", *argument]) == 0
    assert used == [read]


@pytest.mark.parametrize(("limit", "approximate", "read"), [
    (100, None, "_read_all"), (100, True, "_read_cells"),
    (1, None, "_read_cells"), (1, False, "_read_all"),
])  # fmt: skip
def test_a_collection_in_python_follows_the_same_rule(
    out: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch, limit: int,
    approximate: bool | None, read: str,
) -> None:  # fmt: skip
    collection = Collection.open(out)
    collection.index.group(collection)
    monkeypatch.setattr(search_module, "EXACT_UP_TO", limit)
    other = {"_read_all": "_read_cells", "_read_cells": "_read_all"}[read]
    monkeypatch.setattr(search_module.PointIndex, other, None)  # calling it would fail
    query = tiny_model.encode_text(["my dog"])
    (hits,) = collection.search(query, model=tiny_model.hash, k=1, approximate=approximate)
    assert collection.take([hits[0].row])[0].text == "my dog"
    name = collection.take([hits[0].row])[0].id
    near = collection.like(name, k=len(TEXTS), approximate=approximate)
    assert len(near) == len(TEXTS) - 1
    assert hits[0].row not in [h.row for h in near]
    some = collection.like(name, k=2, where="text LIKE 'my %'", approximate=approximate)
    assert [collection.take([h.row])[0].text for h in some] == ["my pistol"]
