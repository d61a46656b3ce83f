"""Exact search: what it finds is what a float64 search over all points finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hysafe.errors import CollectionError, ShapeError
from hysafe.geometry import Points, get_space
from hysafe.index import Collection, CollectionMeta, CollectionWriter, EncodedItem, Row
from hysafe.index import search as search_module
from hysafe.index.search import FOLDER, STATE, PointIndex
from hysafe.types import Hashes, NoveltyScores, Result

C, DIM = 0.7, 8
META = CollectionMeta(
    dim=DIM, c=C, geometry="lorentz", model="m" * 16, taxonomy="t", policy="p", model_name="mini",
    nodes=("1.1",),
)  # fmt: skip


def row(number: int, points: dict[str, np.ndarray]) -> Row:
    name = f"item-{number}"
    hashes = Hashes(f"{number:064x}", "m", "t", "p")
    rating = "unsafe" if number % 2 else "safe"
    result = Result(name, name, "text", rating, 0.5, (), NoveltyScores(None, None), 1.0, {}, None,
                    hashes)  # fmt: skip
    stacks = list(points.values())
    item = EncodedItem(name, name, "text", hashes.content, points)
    first = stacks[0][0] if stacks else None
    second = stacks[1][0] if len(stacks) > 1 else None
    return Row(item, result, first, second, None if first is None else np.zeros(1))


def sample(count: int, seed: int = 0, radius: float = 2.0) -> list[Row]:
    """Items with one, two or (every seventh) many points; every eleventh with none."""
    generator = np.random.default_rng(seed)

    def vectors(n: int) -> np.ndarray:
        v = generator.normal(size=(n, DIM))
        v *= radius * generator.uniform(0.2, 1, (n, 1)) / np.linalg.norm(v, axis=1, keepdims=True)
        return v.astype(np.float32)

    rows = []
    for number in range(count):
        if number % 11 == 10:
            points = {}
        elif number % 7 == 6:
            points = {"text": vectors(4)}
        elif number % 3 == 2:
            points = {"image": vectors(1), "ocr": vectors(1)}
        else:
            points = {"image" if number % 2 else "text": vectors(1)}
        rows.append(row(number, points))
    return rows


def collection_of(folder: Path, rows: list[Row], meta: CollectionMeta = META) -> Collection:
    CollectionWriter(folder, meta).append(rows)
    return Collection.open(folder)


def brute(rows: list[Row], query: torch.Tensor, k: int, meta: CollectionMeta) -> list[tuple]:
    """(row, distance, channel) by float64 distances, one item at a time."""
    space = get_space(meta.geometry)
    found = []
    for number, r in enumerate(rows):
        best = None
        for channel, points in r.item.points.items():
            y = space.exp_map0(torch.from_numpy(points).double(), meta.c)
            d = float(space.dist(query[None], y, meta.c).min())
            best = min(best, (d, channel)) if best else (d, channel)
        if best:
            found.append((number, *best))
    return sorted(found, key=lambda f: (f[1], f[0]))[:k]


@pytest.mark.parametrize("geometry", ["lorentz", "euclidean"])
@pytest.mark.parametrize("radius", [0.05, 2.0, 6.0])
def test_search_finds_what_a_float64_search_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, geometry: str, radius: float
) -> None:
    monkeypatch.setattr(search_module, "POINT_BLOCK", 37)  # several blocks, the last one odd
    monkeypatch.setattr(search_module, "SHORTLIST_LEAST", 3)  # the first shortlist is too short
    monkeypatch.setattr(search_module, "QUERY_BLOCK", 4)
    meta = replace(META, geometry=geometry)
    rows = sample(300, radius=radius)
    collection = collection_of(tmp_path, rows, meta)
    vectors = np.random.default_rng(1).normal(size=(9, DIM)) * radius / 3
    query = Points.from_tangent(torch.from_numpy(vectors), C, geometry)
    found = collection.search(query, model=meta.model, k=12)
    for hits, q in zip(found, query.space, strict=True):
        wanted = brute(rows, q, 12, meta)
        assert [(h.row, h.channel) for h in hits] == [(w[0], w[2]) for w in wanted]
        np.testing.assert_allclose([h.distance for h in hits], [w[1] for w in wanted], rtol=1e-9)


def test_far_out_float32_alone_would_go_wrong(tmp_path: Path) -> None:
    """At radius 8 near points differ by less than a float32 product resolves."""
    generator = np.random.default_rng(2)
    base = generator.normal(size=DIM)
    base *= 8 / np.linalg.norm(base)
    rows = [
        row(n, {"text": (base + 1e-5 * generator.normal(size=(1, DIM))).astype(np.float32)})
        for n in range(200)
    ]
    collection = collection_of(tmp_path, rows)
    query = collection.points(rows[50].vector[None])  # type: ignore[index]
    (hits,) = collection.search(query, model=META.model, k=5)
    wanted = brute(rows, query.space[0], 5, META)
    assert [h.row for h in hits] == [w[0] for w in wanted]
    assert hits[0].row == 50
    index = collection.index
    product = index.matrix[:, :DIM] @ query.space[0].float().numpy()
    time = float((1 / C + query.space.square().sum()).sqrt())
    plain = np.argsort(-(product - index.matrix[:, DIM] * np.float32(time)), kind="stable")[:5]
    assert plain.tolist() != [h.row for h in hits]


def test_k_and_an_empty_collection(tmp_path: Path) -> None:
    rows = sample(12)
    collection = collection_of(tmp_path / "a", rows)
    query = Points.from_tangent(torch.zeros(1, DIM), C)
    assert len(collection.search(query, model=META.model, k=1)[0]) == 1
    assert len(collection.search(query, model=META.model, k=99)[0]) == 11  # one has no point
    empty = collection_of(tmp_path / "b", [])
    assert empty.search(query, model=META.model) == [[]]


def test_copies_are_all_found_in_the_order_of_the_scan(tmp_path: Path) -> None:
    vector = np.full((1, DIM), 0.5, np.float32)
    rows = [row(n, {"text": vector}) for n in range(150)]
    collection = collection_of(tmp_path, rows)
    (hits,) = collection.search(collection.points(vector), model=META.model, k=20)
    assert [h.row for h in hits] == list(range(20))
    assert all(h.distance == 0 for h in hits)


def test_a_filter_leaves_out_rows_before_the_k_are_counted(tmp_path: Path) -> None:
    rows = sample(120)
    collection = collection_of(tmp_path, rows)
    query = Points.from_tangent(torch.ones(1, DIM), C)
    (hits,) = collection.search(query, model=META.model, k=30, where="rating = 'unsafe'")
    wanted = [w for w in brute(rows, query.space[0].double(), 999, META) if w[0] % 2][:30]
    assert [h.row for h in hits] == [w[0] for w in wanted]
    assert collection.search(query, model=META.model, where="rating = 'no such'") == [[]]


def test_like_leaves_out_the_item_itself_and_uses_all_its_points(tmp_path: Path) -> None:
    rows = sample(80)
    collection = collection_of(tmp_path, rows)
    hits = collection.like("item-5", k=10)  # a picture with read text
    assert 5 not in [h.row for h in hits]
    queries = collection.points(np.concatenate(list(rows[5].item.points.values()))).space
    wanted: dict[int, float] = {}
    for q in queries:
        for number, distance, _ in brute(rows, q, 80, META):
            if number != 5:
                wanted[number] = min(distance, wanted.get(number, np.inf))
    assert [h.row for h in hits] == sorted(wanted, key=lambda n: wanted[n])[:10]
    with pytest.raises(CollectionError, match="item-10: the item could not be read"):
        collection.like("item-10")


def test_a_query_of_another_model_or_space_is_refused(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, sample(5))
    query = Points.from_tangent(torch.ones(1, DIM), C)
    with pytest.raises(CollectionError, match=r"scanned with the model mini \(m+\), and this is"):
        collection.search(query, model="another")
    with pytest.raises(ShapeError, match="dimension 3, wanted lorentz, 8"):
        collection.search(Points.from_tangent(torch.ones(1, 3), C), model=META.model)
    with pytest.raises(ShapeError, match="curvature is 1.*the collection's 0.7"):
        collection.search(Points.from_tangent(torch.ones(1, DIM), 1.0), model=META.model)


# ---------------------------------------------------------------- files of the index


def test_the_index_is_kept_and_built_again_when_the_table_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sample(30)
    writer = CollectionWriter(tmp_path, META)
    writer.append(rows[:20])
    query = Points.from_tangent(torch.zeros(1, DIM), C)
    built = []
    build = PointIndex._build.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        PointIndex, "_build", classmethod(lambda cls, *a: built.append(1) or build(cls, *a))
    )

    def count() -> int:
        return len(Collection.open(tmp_path).search(query, model=META.model, k=99)[0])

    assert (count(), count(), len(built)) == (19, 19, 1)
    writer.append(rows[20:])
    assert (count(), count(), len(built)) == (28, 28, 2)
    assert len(list((tmp_path / FOLDER).iterdir())) == 4  # files of the old version are gone
    CollectionWriter(tmp_path, replace(META, stamp="other")).append(rows[:3])
    assert (count(), len(built)) == (3, 3)


def test_a_damaged_or_missing_index_is_never_fatal(tmp_path: Path) -> None:
    collection_of(tmp_path, sample(30))
    query = Points.from_tangent(torch.zeros(1, DIM), C)

    def found() -> list[list[search_module.Hit]]:
        return Collection.open(tmp_path).search(query, model=META.model, k=5)

    first = found()
    matrix = next((tmp_path / FOLDER).glob("matrix*"))
    for damage in (
        lambda: matrix.write_bytes(b"short"),
        lambda: (tmp_path / FOLDER / STATE).write_text("{"),
        lambda: (tmp_path / FOLDER / STATE).unlink(),
        lambda: next((tmp_path / FOLDER).glob("owners*")).unlink(),
    ):
        damage()
        assert found() == first


def test_a_collection_that_cannot_be_written_to_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = collection_of(tmp_path, sample(30))
    (tmp_path / FOLDER).write_text("a file stands where the folder would be")
    query = Points.from_tangent(torch.zeros(1, DIM), C)
    assert len(collection.search(query, model=META.model, k=5)[0]) == 5
