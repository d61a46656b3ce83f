"""Exact search finds what a float64 search over all points finds; approximate search most of it."""

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
from hysafe.index.cells import Cells, assign, cell_count, fit_centers
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


def brute(
    rows: list[Row], query: torch.Tensor, k: int, meta: CollectionMeta, share: float = 0.0
) -> list[tuple]:
    """(row, distance less a share of the radius, channel), in float64, one item at a time."""
    space = get_space(meta.geometry)
    found = []
    for number, r in enumerate(rows):
        best = None
        for channel, points in r.item.points.items():
            y = space.exp_map0(torch.from_numpy(points).double(), meta.c)
            radius = torch.from_numpy(points).double().norm(dim=1)
            d = float((space.dist(query[None], y, meta.c) - share * radius).min())
            best = min(best, (d, channel)) if best else (d, channel)
        if best:
            found.append((number, *best))
    return sorted(found, key=lambda f: (f[1], f[0]))[:k]


@pytest.mark.parametrize(
    ("geometry", "share"),
    [("lorentz", 0.0), ("euclidean", 0.0), ("lorentz", 0.5), ("lorentz", 1.0), ("lorentz", 0.1)],
)
@pytest.mark.parametrize("radius", [0.05, 2.0, 6.0])
def test_search_finds_what_a_float64_search_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, geometry: str, radius: float, share: float
) -> None:
    monkeypatch.setattr(search_module, "SCORES", 150)  # several blocks, the last one odd
    monkeypatch.setattr(search_module, "SHORTLIST_LEAST", 3)  # the first shortlist is too short
    monkeypatch.setattr(search_module, "SHORTLIST_FACTOR", 1)
    monkeypatch.setattr(search_module, "FEW_SCORES", 0)
    monkeypatch.setattr(search_module, "QUERY_BLOCK", 4)
    meta = replace(META, geometry=geometry)
    rows = sample(300, radius=radius)
    collection = collection_of(tmp_path, rows, meta)
    vectors = np.random.default_rng(1).normal(size=(9, DIM)) * radius / 3
    query = Points.from_tangent(torch.from_numpy(vectors), C, geometry)
    found = collection.search(query, model=meta.model, k=12, radius_share=share)
    for hits, q in zip(found, query.space, strict=True):
        wanted = brute(rows, q, 12, meta, share)
        assert [(h.row, h.channel) for h in hits] == [(w[0], w[2]) for w in wanted]
        np.testing.assert_allclose(
            [h.value for h in hits], [w[1] for w in wanted], rtol=1e-9, atol=1e-9
        )
        if not share:
            assert [h.distance for h in hits] == [h.value for h in hits]


def test_what_says_little_is_not_near_to_everything(tmp_path: Path) -> None:
    """Points near the origin come first by distance, those of the query's direction by value."""
    generator = np.random.default_rng(4)
    empty = generator.normal(size=(50, DIM)) * 0.05
    asked = np.eye(DIM)[0] * 3
    alike = np.eye(DIM)[0] * 3 + generator.normal(size=(5, DIM)) * 0.7
    rows = [row(i, {"text": v[None].astype(np.float32)}) for i, v in enumerate([*empty, *alike])]
    collection = collection_of(tmp_path, rows)
    query = Points.from_tangent(torch.from_numpy(asked[None]), C, "lorentz")
    (by_value,) = collection.search(query, model=META.model, k=5)
    (by_distance,) = collection.search(query, model=META.model, k=5, radius_share=0.0)
    assert {h.row for h in by_value} == set(range(50, 55))
    assert {h.row for h in by_distance} != set(range(50, 55))


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
    (hits,) = collection.search(query, model=META.model, k=5, radius_share=0.0)
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
    (hits,) = collection.search(
        query, model=META.model, k=30, where="rating = 'unsafe'", radius_share=0.0
    )
    wanted = [w for w in brute(rows, query.space[0].double(), 999, META) if w[0] % 2][:30]
    assert [h.row for h in hits] == [w[0] for w in wanted]
    assert collection.search(
        query, model=META.model, where="rating = 'no such'", radius_share=0.0
    ) == [[]]


def test_like_leaves_out_the_item_itself_and_uses_all_its_points(tmp_path: Path) -> None:
    rows = sample(80)
    collection = collection_of(tmp_path, rows)
    hits = collection.like("item-5", k=10, radius_share=0.0)  # a picture with read text
    assert 5 not in [h.row for h in hits]
    queries = collection.points(np.concatenate(list(rows[5].item.points.values()))).space
    wanted: dict[int, float] = {}
    for q in queries:
        for number, distance, _ in brute(rows, q, 80, META):
            if number != 5:
                wanted[number] = min(distance, wanted.get(number, np.inf))
    assert [h.row for h in hits] == sorted(wanted, key=lambda n: wanted[n])[:10]
    with pytest.raises(CollectionError, match="item-10: the item could not be read"):
        collection.like("item-10", radius_share=0.0)


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


# ---------------------------------------------------------------- cells


def test_cells_hold_every_point_once_and_k_means_finds_clusters() -> None:
    generator = np.random.default_rng(0)
    means = 10 * generator.normal(size=(6, DIM))
    truth = generator.integers(6, size=600)
    points = (means[truth] + generator.normal(size=(600, DIM))).astype(np.float32)
    cell = assign(points, fit_centers(points, 6, seed=1))
    for number in range(6):  # a cell holds points of few clusters, k-means being no perfect one
        assert len(set(truth[cell == number].tolist())) <= 2
    np.testing.assert_allclose(fit_centers(points[:50], 1)[0], points[:50].mean(axis=0), rtol=1e-4)
    wanted = [np.linalg.norm(means - p, axis=1).argmin() for p in points]
    assert assign(points, means.astype(np.float32)).tolist() == wanted
    assert cell_count(0) == 0
    assert cell_count(1) == 1
    assert cell_count(10**8) == 4096


def test_the_nearest_cells_hold_as_many_points_as_wanted() -> None:
    cells = Cells(np.zeros((4, 2), np.float32), np.array([0, 5, 5, 8, 20]))
    assert cells.fit(20)
    assert not cells.fit(21)
    assert not Cells(cells.centers, cells.starts[::-1].copy()).fit(20)
    score = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    chosen = [c.tolist() for c in cells.nearest(score, cells.sizes(None), 6)]
    assert chosen == [[0, 2], [3]]  # cell 1 is empty
    allowed = np.zeros(20, dtype=bool)
    allowed[[0, 6, 7, 19]] = True
    assert cells.sizes(allowed).tolist() == [1, 0, 2, 1]
    assert [c.tolist() for c in cells.nearest(score, cells.sizes(allowed), 99)] == [
        [0, 2, 3],
        [3, 2, 0],
    ]


@pytest.fixture
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "PROBED_SHARE", 0.3)
    monkeypatch.setattr(search_module, "PROBED_LEAST", 1)
    monkeypatch.setattr(search_module, "PROBED_PER_ITEM", 1)
    monkeypatch.setattr(search_module, "SHORTLIST_LEAST", 4)


@pytest.mark.parametrize("geometry", ["lorentz", "euclidean"])
@pytest.mark.usefixtures("small_probes")
def test_approximate_search_finds_most_and_measures_exactly(tmp_path: Path, geometry: str) -> None:
    meta = replace(META, geometry=geometry)
    rows = sample(600)
    collection = collection_of(tmp_path, rows, meta)
    exact = collection.index
    # beside items, as real queries are: in the open all points of 8 dimensions are equally far
    near = np.concatenate([r.vector[None] for r in rows[:80] if r.vector is not None])
    query = collection.points(near + 0.05 * np.random.default_rng(3).normal(size=near.shape))
    wanted = exact.search(query, 5)
    exact.group(collection)
    index = Collection.open(tmp_path).index
    assert index.cells is not None
    read = []
    monkey = index._read_cells
    index._read_cells = lambda *a: read.append(1) or monkey(*a)  # type: ignore[method-assign]
    found = index.search(query, 5, approximate=True)
    assert read
    assert index.search(query, 5) == wanted  # exact search over the regrouped points
    both = [
        len({h.row for h in f} & {h.row for h in w}) for f, w in zip(found, wanted, strict=True)
    ]
    assert 0.9 <= np.mean(both) / 5 < 1  # most of them, and not all
    for j in range(9):  # alone as in a batch
        (alone,) = index.search(query[j : j + 1], 5, approximate=True)
        assert [h.row for h in alone] == [h.row for h in found[j]]
    for hits in found:
        assert [h.distance for h in hits] == sorted(h.distance for h in hits)
        assert len({h.row for h in hits}) == 5


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("radius", [1e-3, 2.0, 11.0])
@pytest.mark.parametrize("geometry", ["lorentz", "euclidean"])
def test_reading_every_cell_for_many_queries_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, geometry: str, radius: float, share: float
) -> None:
    # each query takes its limit from its first cell; what the other cells hold must not be lost by it
    monkeypatch.setattr(search_module, "PROBED_SHARE", 1.0)
    monkeypatch.setattr(search_module, "SHORTLIST_LEAST", 4)
    rows = sample(500, radius=radius)
    collection = collection_of(tmp_path, rows, replace(META, geometry=geometry))
    index = collection.index
    near = np.concatenate([r.vector[None] for r in rows[:60] if r.vector is not None])
    near[::2] *= -0.7  # half of them far from everything
    query = collection.points(near)
    allowed = np.arange(0, 500, 3)
    wanted = index.search(query, 5, radius_share=share)
    some = index.search(query, 5, radius_share=share, rows=allowed)
    index.group(collection)
    assert index.search(query, 5, radius_share=share, approximate=True) == wanted
    assert index.search(query, 5, radius_share=share, rows=allowed, approximate=True) == some


@pytest.mark.usefixtures("small_probes")
def test_approximate_search_reads_until_enough_allowed_points_are_seen(tmp_path: Path) -> None:
    rows = sample(400)
    collection = collection_of(tmp_path, rows)
    index = collection.index
    index.group(collection)
    query = collection.points(rows[7].vector[None])  # type: ignore[index]
    few = np.array([3, 4, 250, 399])
    (hits,) = index.search(query, 99, rows=few, approximate=True)
    assert sorted(h.row for h in hits) == few.tolist()
    (hits,) = index.search(query, 3, rows=np.arange(0, 400, 2), approximate=True)
    assert all(h.row % 2 == 0 for h in hits)
    assert len(hits) == 3
    assert index.search(query, 3, rows=np.array([], int), approximate=True) == [[]]


@pytest.mark.usefixtures("small_probes")
def test_a_query_far_out_finds_near_points_of_another_radius(tmp_path: Path) -> None:
    """By L2 of tangent vectors the cells of the query's own radius come first, by distance last."""
    generator = np.random.default_rng(5)

    def around(n: int, radius: float) -> np.ndarray:
        v = generator.normal(size=(n, DIM))
        return (radius * v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)

    # those far out all in one direction, near to the query by L2
    cluster = around(1, 9.0) + 0.5 * around(720, 9.0)
    cluster *= 9 / np.linalg.norm(cluster, axis=1, keepdims=True)
    vectors = np.concatenate((around(300, 1.5), cluster[20:]))
    rows = [row(n, {"text": v[None]}) for n, v in enumerate(vectors)]
    collection = collection_of(tmp_path, rows)
    index = collection.index
    query = collection.points(cluster[:20])
    wanted = index.search(query, 3)
    assert np.mean([h.row < 300 for hits in wanted for h in hits]) > 0.9
    index.group(collection)
    found = index.search(query, 3, approximate=True)
    both = [
        len({h.row for h in f} & {h.row for h in w}) for f, w in zip(found, wanted, strict=True)
    ]
    assert np.mean(both) / 3 > 0.8


def test_cells_are_kept_and_made_again_when_the_table_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sample(60)
    writer = CollectionWriter(tmp_path, META)
    writer.append(rows[:40])
    collection = Collection.open(tmp_path)
    index = collection.index
    assert not index.ready(collection)  # small: exact
    assert not index.ready(collection, False)
    monkeypatch.setattr(search_module, "EXACT_UP_TO", 10)
    for _ in range(2):
        assert not index.ready(collection)  # none was ever made
    assert [r.message for r in caplog.records] == [
        "no approximate index: searched exactly. Make one: hysafe index COLLECTION"
    ]
    shares: list[float] = []
    assert index.ready(collection, True, progress=shares.append)
    assert shares[-1] == 1
    assert shares == sorted(shares)
    files = {p.name for p in (tmp_path / FOLDER).iterdir()}
    assert len(files) == 6
    again = Collection.open(tmp_path)
    assert again.index.ready(again)
    assert {p.name for p in (tmp_path / FOLDER).iterdir()} == files  # nothing was made again
    writer.append(rows[40:])
    grown = Collection.open(tmp_path)
    assert grown.index.cells is None
    assert grown.index.ready(grown)  # cells were wanted before
    assert grown.index.cells is not None
    assert grown.index.cells.starts[-1] == len(grown.index) > len(index)
    assert len(list((tmp_path / FOLDER).iterdir())) == 6
    other = replace(META, stamp="other", model="n" * 16)
    CollectionWriter(tmp_path, other).append(rows[:20])
    rescanned = Collection.open(tmp_path)
    assert rescanned.index.cells is None
    assert rescanned.index.ready(rescanned)


def test_damaged_cells_are_never_fatal(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, sample(60))
    query = collection.points(np.ones((1, DIM), np.float32))
    collection.index.group(collection)
    wanted = collection.index.search(query, 5)
    for name, damage in (
        ("starts", lambda p: p.write_bytes(p.read_bytes()[:-8])),
        ("starts", lambda p: p.write_bytes(bytes(8) + b"\xff" * (p.stat().st_size - 8))),
        ("centers", lambda p: p.write_bytes(b"")),
        ("centers", lambda p: p.write_bytes(b"\xff" * p.stat().st_size)),
        ("centers", lambda p: p.unlink()),
        ("matrix", lambda p: p.unlink()),
    ):
        damage(next((tmp_path / FOLDER).glob(f"{name}*")))
        fresh = Collection.open(tmp_path)
        assert fresh.index.cells is None
        assert fresh.index.search(query, 5, approximate=True) == wanted
        assert fresh.index.ready(fresh, True)
        assert Collection.open(tmp_path).index.search(query, 5, approximate=True) == wanted


def test_where_cells_cannot_be_written_the_search_is_exact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collection = collection_of(tmp_path, sample(30))
    (tmp_path / FOLDER).write_text("a file stands where the folder would be")
    index = collection.index
    assert not index.ready(collection, True)
    query = collection.points(np.zeros((1, DIM), np.float32))
    assert len(index.search(query, 5, approximate=True)[0]) == 5
    assert "no approximate index can be written" in caplog.text
    assert caplog.text.count("searched exactly") == 1
    with pytest.raises(CollectionError, match="no approximate index can be written"):
        index.group(collection)


def test_an_empty_collection_can_be_indexed(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, [])
    assert collection.index.ready(collection, True)
    query = collection.points(np.zeros((1, DIM), np.float32))
    assert Collection.open(tmp_path).index.search(query, 5, approximate=True) == [[]]


def test_a_full_disk_leaves_the_index_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = collection_of(tmp_path, sample(30))
    index = collection.index
    before = {p.name: p.read_bytes() for p in (tmp_path / FOLDER).iterdir()}

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CollectionError, match="No space left"):
        index.group(collection)
    assert {p.name: p.read_bytes() for p in (tmp_path / FOLDER).iterdir()} == before
