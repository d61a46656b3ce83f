"""Rows of a report that are read where they are stored."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hysafe.app.output import RESULTS
from hysafe.app.pipeline import SafetyModel
from hysafe.app.report import ReportData, write_report
from hysafe.app.report_rows import ResultLines, StoredTangents
from hysafe.app.scan import Shown, report_scan, scan
from hysafe.errors import CollectionError
from hysafe.index import Collection
from hysafe.index.collection import matrix

LINES = [f'weather {i} "decided_by": "ocr" 🤐' for i in range(7)]


@pytest.fixture(scope="module")
def scanned(tiny_model: SafetyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, pictures and one that cannot be read."""
    folder = tmp_path_factory.mktemp("scanned")
    (folder / "in").mkdir()
    (folder / "in/a.txt").write_text("\n".join(LINES), "utf-8")
    for name, colour in (("b.png", (10, 200, 30)), ("c.png", (200, 10, 30))):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), colour).save(buffer, "PNG")
        (folder / "in" / name).write_bytes(buffer.getvalue())
    (folder / "in/d.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    scan([str(folder / "in")], folder / "out", tiny_model, report=False)
    return folder / "out"


def test_lines_come_by_their_place(scanned: Path) -> None:
    lines = ResultLines(scanned / RESULTS)
    whole = [json.loads(line) for line in (scanned / RESULTS).read_text("utf-8").splitlines()]
    assert len(lines) == len(whole) == 10
    assert list(lines) == whole
    assert [lines[i] for i in (9, 0, 4)] == [whole[i] for i in (9, 0, 4)]
    decided = [row["channels"].get("decided_by") for row in whole]
    assert lines.spoke.tolist() == [d in ("ocr", "text") for d in decided]
    assert set(decided) >= {"text", "image"}


@pytest.mark.parametrize("size", [1, 4, 100])
def test_vectors_are_those_of_the_channel_that_decided(scanned: Path, size: int) -> None:
    collection, lines = Collection.open(scanned), ResultLines(scanned / RESULTS)
    dim = collection.meta.dim
    stored = StoredTangents(collection, lines, dim)
    table = collection.to_arrow(["vector", "text_vector"])
    words, looks = matrix(table["text_vector"], dim), matrix(table["vector"], dim)
    wanted = np.where(lines.spoke[:, None] & np.isfinite(words), words, looks)
    blocks = list(stored.blocks(size))
    assert max(map(len, blocks)) <= size
    np.testing.assert_array_equal(np.concatenate(blocks), wanted)
    np.testing.assert_array_equal(stored.take([9, 2, 2]), wanted[[9, 2, 2]])
    assert stored.take([]).shape == (0, dim)


def test_a_table_in_another_order_is_put_in_that_of_the_lines(
    scanned: Path, tmp_path: Path
) -> None:
    collection = Collection.open(scanned)
    rows = (scanned / RESULTS).read_text("utf-8").splitlines()
    (tmp_path / RESULTS).write_text("\n".join(reversed(rows)) + "\n", "utf-8")
    straight = StoredTangents(collection, ResultLines(scanned / RESULTS), collection.meta.dim)
    turned = StoredTangents(collection, ResultLines(tmp_path / RESULTS), collection.meta.dim)
    wanted = np.concatenate(list(straight.blocks(3)))[::-1]
    np.testing.assert_array_equal(np.concatenate(list(turned.blocks(3))), wanted)


def test_the_page_is_that_of_rows_in_memory(scanned: Path, tiny_model: SafetyModel) -> None:
    report_scan(scanned, tiny_model, tiny_model.view(), Shown(), "stored")
    collection, lines = Collection.open(scanned), ResultLines(scanned / RESULTS)
    table, apexes = tiny_model.place(tiny_model.view())
    vectors = np.concatenate(
        list(StoredTangents(collection, lines, collection.meta.dim).blocks(99))
    )
    on = [n for n, a in zip(table.ids, table.active.tolist(), strict=True) if a]
    data = ReportData(
        results=list(lines), texts={}, thumbnails={}, tangents=vectors, node_ids=table.ids,
        node_tangents=apexes.tangent().numpy(), c=float(apexes.c), geometry=apexes.geometry,
        taxonomy=tiny_model.taxonomy, active=frozenset(on), title="stored",
        model=tiny_model.name, policy="default",
    )  # fmt: skip
    write_report(scanned / "memory.html", data)
    assert (scanned / "memory.html").read_text() == (scanned / "report.html").read_text()


def test_a_line_without_an_item_is_named(scanned: Path, tmp_path: Path) -> None:
    foreign = '{"id": "foreign"}\n'
    (tmp_path / RESULTS).write_text((scanned / RESULTS).read_text("utf-8") + foreign, "utf-8")
    with pytest.raises(CollectionError, match="foreign is not in the table"):
        StoredTangents(Collection.open(scanned), ResultLines(tmp_path / RESULTS), 16)
