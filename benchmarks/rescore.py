"""A rescore, its parts, and the same items encoded again, in one run.

``nice python benchmarks/rescore.py --items 20000 --nodes 300`` prints processor seconds per million
items of each part (other work on the machine hardly changes them), as a ratio to the bare float32
product of as many points with as many nodes. The rows are made from real ones: the pictures and
texts of the demo as the bundled model sees them, with tangent noise; six in ten are pictures, one in
ten is a picture with text read in it, three in ten are texts. Re-encoding is measured on a sample of
the demo's pictures and lines, from bytes to points, without reading text in pictures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hysafe.app.columns import ColumnJudge
from hysafe.app.pipeline import SafetyModel, ScanOptions, load
from hysafe.app.rescore import BATCH, rescore
from hysafe.app.scan import collection_meta
from hysafe.data.inputs import iter_items
from hysafe.index import Collection, CollectionWriter, EncodedItem, Row
from hysafe.index.collection import ENCODED, point_columns
from hysafe.taxonomy import Policy
from hysafe.types import Item

# Share of a point's length that is added as noise.
NOISE = 0.1
KINDS = (("image", 0.6), ("image+ocr", 0.1), ("text", 0.3))
PART = 4096
SAMPLE_PICTURES = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument(
        "--nodes", type=int, default=300, help="at least; more are added if need be"
    )
    parser.add_argument("--sample", type=int, default=40, help="items that are encoded again")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="where the table is made (default: a temporary folder)")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    pa.set_cpu_count(a.threads)
    model = load(a.model)
    rng = np.random.default_rng(0)
    per_million = 1e6 / a.items
    with tempfile.TemporaryDirectory(dir=a.out) as folder:
        seen, encoding = encoded(model, a.sample)
        policy = added_nodes(model, a.nodes)
        view = model.view(policy)
        _, apexes = model.place(view)  # the texts of added nodes are encoded once
        collection = made(model, seen, a.items, Path(folder) / "one", rng)
        size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        print(f"{a.items} items, {len(apexes)} nodes, D={collection.meta.dim}, {a.threads} threads, "
              f"{size * per_million / 1e9:.2f} GB per million")  # fmt: skip
        bare = least(lambda: product(apexes.space.float(), a.items, rng), 3) * per_million
        show("bare float32 product", bare, bare)

        meta = collection_meta(model, view, reading=model.hash, reads=True)
        judge = ColumnJudge(model, view, collection.meta, meta)
        for batch in collection.batches(ENCODED, size=PART, stop=PART):  # what is made once
            judge.lines(batch, judge.judge(batch))
        clock = Clock()
        judged = parts(collection, judge, Path(folder) / "lines", clock)
        CollectionWriter.write_columns(Path(folder) / "two", meta, judged)
        clock("table")
        for name, seconds in clock.parts.items():
            show(name, seconds * per_million, bare)
        show("sum", sum(clock.parts.values()) * per_million, bare)
        start, wall = time.process_time(), time.perf_counter()
        rescore(collection, model, policy, out=Path(folder) / "three", report=False)
        whole = (time.process_time() - start) * per_million
        show("rescore, whole", whole, bare)
        print(
            f"  of it on the clock: {(time.perf_counter() - wall) * per_million:.1f} s per million"
        )
        again = encoding / len(seen) * 1e6
        show(f"encoding again ({len(seen)} items)", again, bare)
        print(f"encoding again takes {again / whole:.0f} times as long as the rescore")


class Clock:
    """Processor seconds of parts that take turns."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.process_time()

    def __call__(self, part: str) -> None:
        """What has passed since the last call was this part."""
        now = time.process_time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now


def parts(
    collection: Collection, judge: ColumnJudge, lines: Path, clock: Clock
) -> Iterator[pa.RecordBatch]:
    """What :func:`hysafe.app.rescore.rescore` does with each batch, timed."""
    with lines.open("wb") as stream:
        for batch in collection.batches([*ENCODED, "rating", "node"], size=BATCH):
            points = point_columns(batch, collection.meta)
            clock("read")
            scored = judge.score(points)
            clock("score")
            found = judge.decide(batch, scored)
            clock("decide")
            stream.write(judge.lines(batch, found))
            clock("lines")
            rows = judge.rows(batch, found)
            clock("rows")
            yield rows
            clock("table")


def encoded(model: SafetyModel, sample: int) -> tuple[list[EncodedItem], float]:
    """Items of the demo as the encoder sees them, and the processor seconds that takes."""
    with resources.as_file(resources.files("hysafe.assets") / "demo") as folder:
        items: list[Item] = list(iter_items([str(folder)]))
    pictures = [i for i in items if i.modality == "image"]
    texts = [i for i in items if i.modality == "text"]
    chosen = pictures[: round(sample * SAMPLE_PICTURES)]
    chosen += texts[: sample - len(chosen)]
    list(model.judge(chosen[:4], options=ScanOptions(workers=0)))
    start = time.process_time()
    judged = list(model.judge(chosen, options=ScanOptions(workers=0)))
    seconds = time.process_time() - start
    return [j.row.item for j in judged if j.row.item.points], seconds


def added_nodes(model: SafetyModel, nodes: int) -> Policy:
    """A policy that switches a domain off, and has the tree grow to so many nodes."""
    domain = next(n.id for n in model.taxonomy if n.kind == "domain")
    rules: dict[str, Any] = {domain: {"status": "non_violating"}}
    for k in range(nodes - len(list(model.taxonomy))):
        rules[f"x.{k}"] = {"parent": domain, "name": f"Offer {k}", "definition": f"Offer {k}.",
                           "synonyms": [f"offer number {k}"]}  # fmt: skip
    return Policy.from_dict({"name": "benchmark", "nodes": rules})


def made(
    model: SafetyModel, seen: list[EncodedItem], count: int, out: Path, rng: np.random.Generator
) -> Collection:
    """A collection of so many rows from real ones."""
    view = model.view(None)
    meta = collection_meta(model, view, reading=model.hash, reads=True)
    pools = {name: [i for i in seen if name in i.points] for name in ("image", "text")}
    kinds = rng.choice([k for k, _ in KINDS], count, p=[p for _, p in KINDS])

    def batches() -> Iterator[list[Row]]:
        for start in range(0, count, PART):
            part = range(start, min(count, start + PART))
            items = [_grown(k, str(kinds[k]), pools, rng) for k in part]
            judged = model.judge_encoded(items, view, reading=model.hash, reads=True)
            yield [j.row for j in judged]

    CollectionWriter.write(out, meta, batches())
    return Collection.open(out)


def _grown(
    k: int, kind: str, pools: dict[str, list[EncodedItem]], rng: np.random.Generator
) -> EncodedItem:
    main, *read = kind.split("+")
    origin = pools[main][rng.integers(len(pools[main]))]
    points = {main: _noisy(origin.points[main][:1], rng)}
    words = pools["text"][rng.integers(len(pools["text"]))]
    if read:
        points["ocr"] = _noisy(words.points["text"][:1], rng)
    return replace(
        origin, id=f"{main}/{k:07d}", source=f"/collection/{main}/{k:07d}",
        content_hash=f"{k:064x}", points=points, cut=frozenset(), error=None,
        read_text=words.text if read else "",
    )  # fmt: skip


def _noisy(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(size=vectors.shape) / np.sqrt(vectors.shape[1])
    return (vectors + NOISE * np.linalg.norm(vectors) * noise).astype(np.float32)


def product(apexes: torch.Tensor, count: int, rng: np.random.Generator) -> None:
    """The bare product of as many points with the nodes."""
    points = torch.from_numpy(rng.standard_normal((PART, apexes.shape[1]), dtype=np.float32))
    into = torch.empty(PART, len(apexes))
    for start in range(0, count, PART):
        rows = min(PART, count - start)
        torch.mm(points[:rows], apexes.T, out=into[:rows])


def least(work: Callable[[], None], repeats: int) -> float:
    """Least processor seconds of some runs."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def show(name: str, seconds: float, bare: float) -> None:
    print(f"{name:>32} {seconds:10.2f} s per million {seconds / bare:8.2f}", flush=True)


if __name__ == "__main__":
    main()
