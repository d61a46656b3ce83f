"""Search of a stored collection: exact against the bare product, approximate against exact.

    python benchmarks/search.py [--items 1000000] [--cache real.npz] [--engines faiss-hnsw,...]

The items are grown from real embeddings: some thousand texts and pictures of ``HYSAFE_DATA``,
encoded by the bundled model (kept in ``--cache``), and copies of them at random, each moved in the
tangent space by Gaussian noise whose length is half the median distance of a real item of its kind
to its nearest one. Queries are real items left out of that. Contestants take turns in one process;
ratios of medians count. ``--clock cpu`` takes CPU time, for a machine on which others work too (one
thread only: OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hysafe.geometry import Points
from hysafe.index import EncodedItem
from hysafe.index import search as search_module
from hysafe.index.collection import RADIUS_SHARE
from hysafe.index.search import PointIndex

K = 10
BATCH = 100
# Of the median nearest-neighbour distance of real items.
NOISE_SHARE = 0.5
SHORTLIST = 200
# Recall at which nothing slower is tried.
ENOUGH = 0.995
TEXTS_PER_SET, TEXT_LENGTH, PICTURES = 300, 600, 5000


@dataclass
class Real:
    """Tangent vectors of real items by kind, and the curvature."""

    kinds: dict[str, np.ndarray]
    c: float


class Grown:
    """What :class:`PointIndex` asks of a collection, over arrays."""

    def __init__(self, folder: Path, tangents: dict[str, np.ndarray], c: float) -> None:
        self.folder, self.tangents, self.version = folder, tangents, 1
        dim = next(iter(tangents.values())).shape[1]
        self.meta = SimpleNamespace(
            stamp="benchmark", model="mini", dim=dim, c=c, geometry="lorentz"
        )

    def items(self) -> Iterator[list[EncodedItem]]:
        for kind, vectors in self.tangents.items():
            for low in range(0, len(vectors), 8192):
                yield [
                    EncodedItem("", "", kind, "", {kind: v[None]})  # type: ignore[arg-type]
                    for v in vectors[low : low + 8192]
                ]


# ---------------------------------------------------------------- data


def real_items(cache: Path | None, *, seed: int = 0) -> Real:
    """Embeddings of the development data by the bundled model; from the cache if it is there."""
    if cache is None or not cache.exists():
        kinds, c = encode(np.random.default_rng(seed))
        if cache is None:
            return Real(kinds, c)
        np.savez(cache, c=c, **kinds)
    with np.load(cache) as stored:
        return Real({k: stored[k] for k in ("text", "image")}, float(stored["c"]))


def encode(generator: np.random.Generator) -> tuple[dict[str, np.ndarray], float]:
    import pyarrow.parquet as pq

    from hysafe.app.pipeline import load
    from hysafe.data.images import decode

    data = Path(os.environ["HYSAFE_DATA"])
    model = load("mini")
    texts: list[str] = []
    for path in sorted((data / "text").glob("*.jsonl")):
        lines = path.read_text("utf-8").strip().split("\n")  # a text may hold other line ends
        chosen = generator.permutation(len(lines))[:TEXTS_PER_SET]
        texts += [json.loads(lines[i])["text"][:TEXT_LENGTH] for i in chosen]
    texts = sorted({t for t in texts if t.strip()}, key=len)
    table = pq.read_table(data / "images/tiny_imagenet/val.parquet", columns=["image"])
    cells = table["image"].to_pylist()[:PICTURES]
    pictures = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
    points = {
        "text": [model.encode_text(texts[i : i + 64]) for i in range(0, len(texts), 64)],
        "image": [
            model.encode_image([decode(p) for p in pictures[i : i + 64]])
            for i in range(0, len(pictures), 64)
        ],
    }
    vectors = {k: torch.cat([p.tangent() for p in v]).float().numpy() for k, v in points.items()}
    return vectors, float(points["text"][0].c)


def grow(real: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Real tangent vectors and noisy copies of them, `count` in all."""
    some = real[generator.permutation(len(real))[:500]]
    square = (some**2).sum(1)[:, None] + (real**2).sum(1) - 2 * some @ real.T
    nearest = np.sqrt(np.maximum(np.partition(square, 1, axis=1)[:, 1], 0))
    length = NOISE_SHARE * float(np.median(nearest))
    more = max(0, count - len(real))
    noise = generator.standard_normal((more, real.shape[1]), dtype=np.float32)
    noise *= np.float32(length / real.shape[1] ** 0.5)
    noise += real[generator.integers(len(real), size=more)]
    return np.concatenate((real[:count], noise))


# ---------------------------------------------------------------- time


def take_turns(
    runs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each; the first, untimed turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def points_of(tangents: np.ndarray, c: float) -> Points:
    return Points.from_tangent(torch.from_numpy(tangents).double(), c)


# ---------------------------------------------------------------- exact


def exact(index: PointIndex, queries: Points, repeats: int, clock: Callable[[], float]) -> None:
    """Search against products with nothing around them."""
    matrix = index.matrix
    mapped = torch.from_numpy(matrix)
    weight = index._bounding(queries.tangent().double())
    one, many = weight[0], np.ascontiguousarray(weight[:BATCH].T)
    out_one, out = np.empty(len(matrix), np.float32), np.empty((len(matrix), BATCH), np.float32)
    torch_one, torch_many = torch.from_numpy(one), torch.from_numpy(weight[:BATCH])
    torch_out = torch.empty(BATCH, len(matrix))

    singles = take_turns(
        {
            "numpy product": lambda: np.matmul(matrix, one, out=out_one),
            "torch product": lambda: torch.mv(mapped, torch_one),
            "search": lambda: index.search(queries[:1], K),
        },
        repeats,
        clock,
    )
    report(f"one query, top {K} of {len(index):,}", singles, ("numpy product", "torch product"))
    batches = take_turns(
        {
            "numpy product": lambda: np.matmul(matrix, many, out=out),
            "torch product": lambda: torch.mm(torch_many, mapped.T, out=torch_out),
            "torch product, topk": lambda: torch.mm(torch_many, mapped.T, out=torch_out).topk(K),
            "search": lambda: index.search(queries[:BATCH], K),
        },
        max(3, repeats // 3),
        clock,
    )
    report(f"{BATCH} queries", batches, ("numpy product", "torch product"))
    selection = batches["torch product, topk"] - batches["torch product"]
    bare = min(batches["numpy product"], batches["torch product"]) + selection
    print(f"  search / (faster product + topk) = {batches['search'] / bare:.2f}")


def report(title: str, times: dict[str, float], bases: tuple[str, ...]) -> None:
    print(f"{title}:")
    for name, seconds in times.items():
        ratios = "  ".join(f"{seconds / times[b]:6.2f} x {b}" for b in bases)
        print(f"  {name:22}{1e3 * seconds:10.2f} ms  {ratios}")


# ---------------------------------------------------------------- approximate


def recall(found: list[list[Any]], wanted: list[list[Any]]) -> float:
    """Share of the wanted items found."""
    return float(
        np.mean([
            len({h.row for h in f} & {h.row for h in w}) / max(1, len(w))
            for f, w in zip(found, wanted, strict=True)
        ])
    )  # fmt: skip


Ask = Callable[[Points], list[list[Any]]]


def approximate(
    shares: list[float],
    index: PointIndex,
    queries: dict[str, Points],
    repeats: int,
    clock: Callable[[], float],
) -> None:
    """The cells: recall and speed at several shares of the points read."""
    used = search_module.PROBED_SHARE
    for kind, q in queries.items():
        wanted = index.search(q, K)
        for share in shares:
            search_module.PROBED_SHARE = share
            mark = " (in use)" if share == used else ""
            found = contest(
                f"{kind}, {share:.0%} read{mark}", index, q, wanted,
                lambda some: index.search(some, K, approximate=True), repeats, clock,
            )  # fmt: skip
            if found > ENOUGH and share >= used:
                break
        search_module.PROBED_SHARE = used


def engines(
    names: list[str],
    index: PointIndex,
    queries: dict[str, Points],
    repeats: int,
    clock: Callable[[], float],
) -> None:
    """Other engines on the tangent vectors (L2), with the same exact rerank of their shortlist."""
    wanted = {kind: index.search(q, K) for kind, q in queries.items()}
    for name in names:
        start = clock()
        build, settings = ENGINES[name]
        look = build(np.ascontiguousarray(index.tangents))
        print(f"{name}: built in {clock() - start:.0f} s", flush=True)
        for kind, q in queries.items():
            for setting in settings:
                ask = reranked(index, look, setting)
                title = f"{kind}, {setting}"
                if contest(title, index, q, wanted[kind], ask, repeats, clock) > ENOUGH:
                    break


def reranked(index: PointIndex, look: Look, setting: int) -> Ask:
    """A search by an engine's shortlist, measured exactly."""

    def ask(queries: Points) -> list[list[Any]]:
        return rerank(index, queries, look(queries.tangent().float().numpy(), setting))

    return ask


def rerank(index: PointIndex, queries: Points, shortlist: np.ndarray) -> list[list[Any]]:
    """The exact order of a shortlist [Q, S] of points; -1 is none."""
    there = shortlist >= 0
    shortlist = np.where(there, shortlist, 0)
    distance, radius = index._distances(queries.tangent().double(), shortlist, there)
    share = index.search.keywords["radius_share"]  # type: ignore[attr-defined]
    return index._hits(distance, distance - share * radius, shortlist, K)


def contest(
    title: str,
    index: PointIndex,
    queries: Points,
    wanted: list[list[Any]],
    ask: Ask,
    repeats: int,
    clock: Callable[[], float],
) -> float:
    """Recall, and the speed for one query and for a batch against exact search."""
    got = recall(ask(queries), wanted)
    numbers = itertools.cycle(range(len(queries)))

    def single() -> None:
        j = next(numbers)
        ask(queries[j : j + 1])

    one = take_turns(
        {"exact": lambda: index.search(queries[:1], K), **{f"{i}": single for i in range(4)}},
        repeats,
        clock,
    )
    some = float(np.median([seconds for name, seconds in one.items() if name != "exact"]))
    many = take_turns(
        {
            "exact": lambda: index.search(queries[:BATCH], K),
            "approximate": lambda: ask(queries[:BATCH]),
        },
        max(3, repeats // 4),
        clock,
    )
    print(
        f"  {title:24} recall@{K} {got:.4f}  one query {1e3 * some:7.2f} ms, "
        f"{one['exact'] / some:5.1f} x exact;  {min(BATCH, len(queries))} queries "
        f"{1e3 * many['approximate']:8.1f} ms, {many['exact'] / many['approximate']:5.1f} x exact",
        flush=True,
    )
    return got


Look = Callable[[np.ndarray, int], np.ndarray]


def faiss_hnsw(tangents: np.ndarray) -> Look:
    import faiss

    engine = faiss.IndexHNSWFlat(tangents.shape[1], 32)
    engine.hnsw.efConstruction = 100
    engine.add(tangents)

    def look(v: np.ndarray, setting: int) -> np.ndarray:
        engine.hnsw.efSearch = max(setting, SHORTLIST)
        return np.asarray(engine.search(v, SHORTLIST)[1])

    return look


def faiss_ivf(tangents: np.ndarray, kind: str) -> Look:
    import faiss

    cells = int(2 * len(tangents) ** 0.5)
    engine = faiss.index_factory(tangents.shape[1], f"IVF{cells},{kind}")
    sample = np.random.default_rng(0).choice(len(tangents), min(len(tangents), 64 * cells), False)
    engine.train(tangents[sample])
    engine.add(tangents)

    def look(v: np.ndarray, setting: int) -> np.ndarray:
        engine.nprobe = setting
        return np.asarray(engine.search(v, SHORTLIST)[1])

    return look


def usearch_hnsw(tangents: np.ndarray, dtype: str) -> Look:
    from usearch.index import Index

    engine = Index(
        ndim=tangents.shape[1], metric="l2sq", dtype=dtype, connectivity=32, expansion_add=100
    )
    # int8 is for vectors within [-1, 1] per coordinate
    scale = 1 / np.abs(tangents).max() if dtype == "i8" else 1.0
    engine.add(np.arange(len(tangents)), tangents * scale, threads=torch.get_num_threads())

    def look(v: np.ndarray, setting: int) -> np.ndarray:
        engine.expansion_search = setting
        keys = engine.search(v * scale, SHORTLIST, threads=torch.get_num_threads()).keys
        return np.asarray(keys, dtype=np.int64).reshape(len(v), -1)

    return look


def lancedb_ivf(tangents: np.ndarray, kind: str) -> Look:
    import lancedb
    import pyarrow as pa

    folder = tempfile.TemporaryDirectory()
    flat = pa.array(tangents.reshape(-1))
    data = pa.table(
        {
            "point": pa.array(np.arange(len(tangents))),
            "vector": pa.FixedSizeListArray.from_arrays(flat, tangents.shape[1]),
        }
    )
    table = lancedb.connect(folder.name).create_table("points", data)
    table.create_index(
        metric="l2", vector_column_name="vector", index_type=kind,
        num_partitions=int(2 * len(tangents) ** 0.5),
    )  # fmt: skip

    def look(v: np.ndarray, setting: int, keep: object = folder) -> np.ndarray:
        out = np.full((len(v), SHORTLIST), -1)
        for j, one in enumerate(v):
            query = table.search(one, vector_column_name="vector").nprobes(setting)
            found = query.limit(SHORTLIST).select(["point"]).to_arrow()["point"].to_numpy()
            out[j, : len(found)] = found
        return out

    return look


PROBES, EFFORTS = (8, 16, 32, 64, 128, 256), (200, 400, 800, 1600)
ENGINES: dict[str, tuple[Callable[[np.ndarray], Look], tuple[int, ...]]] = {
    "faiss-hnsw": (faiss_hnsw, EFFORTS),
    "faiss-ivf-flat": (lambda t: faiss_ivf(t, "Flat"), PROBES),
    "faiss-ivf-sq8": (lambda t: faiss_ivf(t, "SQ8"), PROBES),
    "usearch": (lambda t: usearch_hnsw(t, "f32"), EFFORTS),
    "usearch-i8": (lambda t: usearch_hnsw(t, "i8"), EFFORTS),
    "usearch-bf16": (lambda t: usearch_hnsw(t, "bf16"), EFFORTS),
    "lancedb-ivf-flat": (lambda t: lancedb_ivf(t, "IVF_FLAT"), PROBES),
    "lancedb-ivf-sq": (lambda t: lancedb_ivf(t, "IVF_SQ"), PROBES),
    "lancedb-ivf-hnsw-sq": (lambda t: lancedb_ivf(t, "IVF_HNSW_SQ"), PROBES),
}


# ---------------------------------------------------------------- memory


class Drawn(Grown):
    """Points drawn when they are read."""

    def __init__(self, folder: Path, items: int, dim: int) -> None:
        super().__init__(folder, {"text": np.empty((0, dim), np.float32)}, 1.0)
        self.count = items

    def items(self) -> Iterator[list[EncodedItem]]:
        generator = np.random.default_rng(0)
        for low in range(0, self.count, 8192):
            shape = (min(8192, self.count - low), 1, self.meta.dim)
            drawn = generator.standard_normal(shape, dtype=np.float32) / shape[2] ** 0.5
            yield [EncodedItem("", "", "text", "", {"text": v}) for v in drawn]  # type: ignore[arg-type]


def memory(args: argparse.Namespace) -> None:
    """Memory that a process holds after it has opened an index and searched it exactly."""
    if args.searched is None:
        with tempfile.TemporaryDirectory() as folder:
            PointIndex.open(Drawn(Path(folder), args.items, args.memory))  # type: ignore[arg-type]
            command = [sys.executable, *sys.argv, "--searched", folder]
            subprocess.run(command, check=True)
        return
    collection: Any = Drawn(args.searched, args.items, args.memory)
    query = points_of(np.random.default_rng(1).standard_normal((100, args.memory)) / 30, 1.0)
    before = resident()
    index = PointIndex.open(collection)
    matrix = index.matrix.nbytes / 2**20
    for queries in (query[:1], query):
        index.search(queries, K)
        own, mapped = (b - a for a, b in zip(before, resident(), strict=True))
        print(
            f"{len(index):,} points, D={args.memory}, {len(queries)} queries: {own:,.0f} MiB of its own, "
            f"{mapped:,.0f} MiB of mapped files; the matrix has {matrix:,.0f} MiB",
            flush=True,
        )


def resident() -> tuple[float, float]:
    """MiB of memory of this process: its own, and pages of files."""
    told = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in told if line.startswith("Rss")}
    return int(sizes["RssAnon"]) / 1024, int(sizes["RssFile"]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--pictures", type=float, default=0.0, help="share of the items (0 to 1)")
    parser.add_argument("--cache", type=Path, help="keep the real embeddings here (.npz)")
    parser.add_argument("--queries", type=int, default=200, help="of each kind")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--engines", default="", help=f"of {', '.join(ENGINES)}")
    parser.add_argument(
        "--shares", type=lambda x: [float(y) for y in x.split(",")],
        default=[0.01, 0.02, 0.04, 0.06, 0.08, 0.12], help="of the points to read, ascending",
    )  # fmt: skip
    parser.add_argument("--no-exact", action="store_true")
    parser.add_argument("--no-cells", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--radius-share", type=float, default=RADIUS_SHARE, help="as of hysafe search")
    parser.add_argument(
        "--memory", type=int, metavar="D", help="only: what a search of D dimensions holds"
    )
    parser.add_argument("--searched", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        memory(args)
        return
    clock = time.process_time if args.clock == "cpu" else time.perf_counter

    real = real_items(args.cache)
    generator = np.random.default_rng(args.seed)
    kinds = {"text": 1 - args.pictures, "image": args.pictures}
    queries, grown = {}, {}
    for kind, share in kinds.items():
        if share > 0:
            vectors = real.kinds[kind][generator.permutation(len(real.kinds[kind]))]
            queries[kind] = points_of(vectors[: args.queries], real.c)
            grown[kind] = grow(vectors[args.queries :], round(share * args.items), generator)
    sizes = {k: len(v) - args.queries for k, v in real.kinds.items() if k in grown}
    with tempfile.TemporaryDirectory() as folder:
        collection: Any = Grown(Path(folder), grown, real.c)
        index = PointIndex.open(collection)
        index.search = partial(index.search, radius_share=args.radius_share)  # type: ignore[method-assign]
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        print(
            f"{len(index):,} items grown from {sizes}, D={index.tangents.shape[1]}, c={real.c:.3f}, "
            f"{torch.get_num_threads()} threads, {args.clock} time, load {load:.1f}",
            flush=True,
        )
        first = next(iter(queries.values()))
        if not args.no_exact:
            exact(index, first, args.repeats, clock)
        if not args.no_cells:
            start = clock()
            index.group(collection)
            cells = len(index.cells.centers) if index.cells else 0
            print(f"{cells} cells made in {clock() - start:.0f} s", flush=True)
            approximate(args.shares, index, queries, args.repeats, clock)
        if args.engines:
            engines(args.engines.split(","), index, queries, args.repeats, clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
