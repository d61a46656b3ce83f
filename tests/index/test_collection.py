"""The collection on disk: what goes in comes out, in order, and what cannot be read is an error."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from hysafe.errors import CollectionError, ConfigError, ShapeError
from hysafe.index import Collection, CollectionMeta, CollectionWriter, EncodedItem, Row
from hysafe.index.collection import METADATA_KEY, TABLE, matrix
from hysafe.types import ErrorRecord, Hashes, NodeScore, NoveltyScores, Result

META = CollectionMeta(
    dim=4, c=0.73, geometry="lorentz", model="m" * 16, taxonomy="t" * 16, policy="p" * 16,
    model_name="mini é", nodes=("1.1", "6.1", "x.1"),
)  # fmt: skip


def result(number: int) -> Result:
    """Every third item could not be read."""
    broken = number % 3 == 2
    paths = () if broken else (NodeScore("6.1", ("Goods", "Weapons"), 0.25 + number / 64, True),)
    return Result(
        id=f"item {number} ü",
        source=f"folder/{number}.jpg",
        modality="image+text" if number % 2 else "image",
        rating="review" if broken else "unsafe",
        p_unsafe=None if broken else number / 32,
        paths=paths,
        novelty=NoveltyScores(None, None) if broken else NoveltyScores(0.5, 0.25),
        radius=None if broken else 1.5 + number,
        channels={},
        error=ErrorRecord("InputError", "truncated") if broken else None,
        hashes=Hashes("" if broken else f"{number:064x}", "m", "t", "p"),
    )


def row(number: int) -> Row:
    """Broken items have no point; others a picture, and every fifth a long text and a read one."""
    made = result(number)
    points: dict[str, np.ndarray] = {}
    vector = (np.arange(4) + number + 0.5).astype(np.float32)
    if made.error is None:
        points["image"] = vector[None]
        if number % 5 == 0:
            points["text"] = np.stack((vector + 1, vector + 2))
            points["ocr"] = -vector[None]
        elif made.modality == "image+text":
            points["text"] = -vector[None]
    item = EncodedItem(
        made.id, made.source, made.modality, made.hashes.content, points,
        frozenset({"text"} if number == 5 else ()), f"text {number}", "read" if number else "",
        made.error,
    )  # fmt: skip
    if made.error is not None:
        return Row(item, made)
    scores = np.array([0.1, 0.2, 0.3]) * number
    return Row(item, made, vector, -vector if len(points) > 1 else None, scores)


def rows(start: int, count: int) -> list[Row]:
    return [row(number) for number in range(start, start + count)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of 11 rows in three batches, one of them empty."""
    folder = tmp_path_factory.mktemp("collection")
    writer = CollectionWriter(folder, META)
    writer.append(rows(0, 7))
    writer.append([])
    writer.append(rows(7, 4))
    return folder


def test_metadata_come_back_as_they_went_in(written: Path) -> None:
    assert Collection.open(written).meta == META
    assert Collection.open(str(written)).folder == written


def test_rows_come_back_in_order_with_every_field(written: Path) -> None:
    collection = Collection.open(written)
    assert len(collection) == 11
    table = collection.to_arrow().to_pylist()
    for row, written_row in zip(table, rows(0, 11), strict=True):
        item = written_row.result
        assert row["id"] == item.id
        assert row["source"] == item.source
        assert row["modality"] == item.modality
        assert row["content_hash"] == item.hashes.content
        assert row["rating"] == item.rating
        assert row["p_unsafe"] == item.p_unsafe
        assert row["node"] == (item.paths[0].node if item.paths else None)
        assert row["novelty_policy"] == item.novelty.policy
        assert row["novelty_distribution"] == item.novelty.distribution
        assert row["radius"] == item.radius
        assert row["error"] == (item.error.type if item.error else None)
        assert row["text"] == written_row.item.text
        for name in ("vector", "text_vector", "scores"):
            array = getattr(written_row, name)
            if array is None:
                assert row[name] is None, name
            else:
                np.testing.assert_array_equal(row[name], array.astype(np.float32))


def test_vectors_are_nan_where_there_is_no_point(written: Path) -> None:
    ids, vectors = Collection.open(written).vectors()
    assert vectors.dtype == np.float32
    assert vectors.shape == (11, 4)
    for name, got, written_row in zip(ids, vectors, rows(0, 11), strict=True):
        assert name == written_row.result.id
        vector = written_row.vector
        if vector is None:
            assert np.isnan(got).all()
        else:
            np.testing.assert_array_equal(got, vector.astype(np.float32))


def test_columns_can_be_chosen(written: Path) -> None:
    table = Collection.open(written).to_arrow(["id", "rating"])
    assert table.column_names[:2] == ["id", "rating"]
    assert table.num_rows == 11


def test_the_table_is_whole_after_every_batch_and_a_new_writer_starts_afresh(
    tmp_path: Path,
) -> None:
    writer = CollectionWriter(tmp_path, META)
    assert len(Collection.open(tmp_path)) == 0
    assert Collection.open(tmp_path).vectors()[1].shape == (0, 4)
    writer.append(rows(0, 3))
    assert len(Collection.open(tmp_path)) == 3
    writer.append(rows(3, 2))
    assert len(Collection.open(tmp_path)) == 5
    CollectionWriter(tmp_path, replace(META, model="other", nodes=("1.1",)))
    again = Collection.open(tmp_path)
    assert len(again) == 0
    assert again.meta.model == "other"


def test_more_rows_than_a_default_query_returns_all_come_back(tmp_path: Path) -> None:
    writer = CollectionWriter(tmp_path, META)
    writer.append(rows(0, 600))
    assert Collection.open(tmp_path).to_arrow(["id"])["id"].to_pylist() == [
        f"item {k} ü" for k in range(600)
    ]


# ---------------------------------------------------------------- errors


def test_no_collection_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CollectionError, match=r"no collection there\. Make one: hysafe scan"):
            Collection.open(folder)
    assert not (tmp_path / "absent").exists()  # looking does not create


def test_a_table_of_others_is_refused(tmp_path: Path) -> None:
    lancedb.connect(str(tmp_path)).create_table(TABLE, pa.table({"id": ["a"]}))
    with pytest.raises(CollectionError, match=r"not written by hysafe scan\. Give a scan"):
        Collection.open(tmp_path)


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (b"{", "metadata is not valid"),
        (b"[]", "metadata is not valid"),
        (b'{"nodes": []}', "metadata is not valid"),
        (json.dumps({**META.__dict__, "more": 1}).encode(), "metadata is not valid"),
        (json.dumps({**META.__dict__, "format": 99}).encode(), "format 99, this version reads 2"),
    ],
)
def test_metadata_that_cannot_be_read_are_an_error(
    payload: bytes, problem: str, tmp_path: Path
) -> None:
    schema = pa.schema([pa.field("id", pa.string())]).with_metadata({METADATA_KEY: payload})
    lancedb.connect(str(tmp_path)).create_table(TABLE, schema=schema)
    with pytest.raises(CollectionError, match=rf"{problem}.*Scan again"):
        Collection.open(tmp_path)


def test_a_damaged_table_is_an_error_with_a_remedy(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    for manifest in (folder / f"{TABLE}.lance" / "_versions").iterdir():
        manifest.write_bytes(b"damaged")
    with pytest.raises(CollectionError, match=r"cannot be read .* Scan again"):
        Collection.open(folder)


@pytest.mark.parametrize("field", ["vector", "text_vector", "scores"])
def test_an_array_of_the_wrong_width_is_refused_before_it_shifts_the_others(
    field: str, tmp_path: Path
) -> None:
    writer = CollectionWriter(tmp_path, META)
    width = 3 if field == "scores" else 4
    batch = [
        replace(row(0), **{field: np.zeros(width + 1)}),
        replace(row(1), **{field: np.zeros(width - 1)}),
    ]
    with pytest.raises(ShapeError, match=rf"shape \({width + 1},\), wanted \({width},\)"):
        writer.append(batch)
    assert len(Collection.open(tmp_path)) == 0


def test_points_of_the_wrong_width_are_refused(tmp_path: Path) -> None:
    writer = CollectionWriter(tmp_path, META)
    good = row(0)
    bad = replace(good, item=replace(good.item, points={"text": np.zeros((3, 5))}))
    with pytest.raises(ShapeError, match=r"points of shape \(3, 5\)"):
        writer.append([bad])


def same_item(got: EncodedItem, wanted: EncodedItem) -> None:
    assert list(got.points) == list(wanted.points)
    for channel, points in wanted.points.items():
        assert got.points[channel].dtype == np.float32
        np.testing.assert_array_equal(got.points[channel], points)
    assert replace(got, points={}) == replace(wanted, points={})


def test_items_come_back_as_the_encoder_saw_them(written: Path) -> None:
    collection = Collection.open(written)
    for size in (3, 100):
        batches = list(collection.items(size=size))
        assert max(map(len, batches)) <= size
        items = [item for batch in batches for item in batch]
        for got, wanted in zip(items, rows(0, 11), strict=True):
            same_item(got, wanted.item)


def test_rows_are_taken_in_the_order_asked_for(written: Path) -> None:
    collection = Collection.open(written)
    for got, number in zip(collection.take([10, 0, 5, 0]), (10, 0, 5, 0), strict=True):
        same_item(got, row(number).item)
    assert collection.take([]) == []


def test_places_of_a_filter(written: Path) -> None:
    collection = Collection.open(written)
    assert collection.places("rating = 'review'").tolist() == [2, 5, 8]
    assert collection.places("p_unsafe > 0.2 AND modality = 'image'").tolist() == [10]
    assert collection.places().tolist() == list(range(11))
    assert collection.place_of("item 7 ü") == 7
    with pytest.raises(ConfigError, match="filter 'nothing = =':.*Columns: id"):
        collection.places("nothing = =")
    with pytest.raises(ConfigError, match="no_such") as caught:
        collection.places("no_such = 1")
    assert str(caught.value).count("content_hash") == 1
    with pytest.raises(ConfigError, match='no item has the id "it\'s"'):
        collection.place_of("it's")


def test_a_whole_table_is_one_new_version_and_the_old_one_stays(tmp_path: Path) -> None:
    CollectionWriter(tmp_path, META).append(rows(0, 4))
    old = Collection.open(tmp_path)
    other = replace(META, nodes=("1.1",), policy="new")

    def narrower(row: Row) -> Row:
        return replace(row, scores=None if row.scores is None else row.scores[:1])

    version = CollectionWriter.write(
        tmp_path, other, ([narrower(r) for r in rows(k, 2)] for k in (0, 2, 4))
    )
    new = Collection.open(tmp_path)
    assert version == new.version == old.version + 1
    assert len(new) == 6
    assert new.meta == other
    assert new.meta.stamp != META.stamp or other.stamp == META.stamp
    table = lancedb.connect(str(tmp_path)).open_table(TABLE)
    table.checkout(old.version)
    assert table.count_rows() == 4


def test_a_write_that_fails_leaves_the_table_as_it_was(tmp_path: Path) -> None:
    CollectionWriter(tmp_path, META).append(rows(0, 4))

    def broken() -> Iterator[list[Row]]:
        yield rows(0, 2)
        raise ValueError("the disk is full")

    with pytest.raises(Exception, match="the disk is full"):
        CollectionWriter.write(tmp_path, META, broken())
    assert len(Collection.open(tmp_path)) == 4


def test_half_surrogates_do_not_stop_a_scan(tmp_path: Path) -> None:
    writer = CollectionWriter(tmp_path, META)
    good = row(0)
    writer.append([replace(good, item=replace(good.item, text="bad \ud800 text"))])
    assert Collection.open(tmp_path).take([0])[0].text == "bad ? text"


def test_matrix_of_nulls_slices_and_chunks() -> None:
    kind = pa.list_(pa.float32(), 2)
    one = pa.array([[1, 2], None, [3, 4], [5, 6]], type=kind)
    expected = np.array([[1, 2], [math.nan] * 2, [3, 4], [5, 6]], dtype=np.float32)
    np.testing.assert_array_equal(matrix(one, 2), expected)
    np.testing.assert_array_equal(matrix(one.slice(1, 2), 2), expected[1:3])
    np.testing.assert_array_equal(
        matrix(pa.chunked_array([one, one]), 2), np.tile(expected, (2, 1))
    )
    np.testing.assert_array_equal(matrix(pa.array([None, None], type=kind), 2), expected[[1, 1]])
    assert matrix(pa.chunked_array([], type=kind), 2).shape == (0, 2)
