"""A rescore, its parts, and the same items encoded again, in one run.

``nice python benchmarks/rescore.py --items 20000 --nodes 300`` prints processor seconds per million
items of each part (other work on the machine hardly changes them), as a ratio to the bare float32
product of as many points with as many nodes; the whole is run on one thread and on two, with the
seconds on the clock, which other work does change. The rows are made from real ones: the pictures and
texts of the demo as the bundled model sees them, with tangent noise; six in ten are pictures, one in
ten is a picture with text read in it, three in ten are texts. Re-encoding is measured on a sample of
the demo's pictures and lines, from bytes to points, without reading text in pictures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hysafe.app.columns import ColumnJudge
from hysafe.app.pipeline import SafetyModel, ScanOptions, load
from hysafe.app.rescore import BATCH, rescore
from hysafe.app.scan import collection_meta
from hysafe.data.inputs import iter_items
from hysafe.index import Collection, CollectionWriter, EncodedItem
from hysafe.index.collection import ENCODED, point_columns, vector_column
from hysafe.taxonomy import Policy
from hysafe.types import Item

# Share of a point's length that is added as noise.
NOISE = 0.1
KINDS = (("image", 0.6), ("image+ocr", 0.1), ("text", 0.3))
PART = 8192
SAMPLE_PICTURES = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument(
        "--nodes", type=int, default=300, help="at least; more are added if need be"
    )
    parser.add_argument("--sample", type=int, default=40, help="items that are encoded again")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--threads", type=int, default=2, help="of the last run")
    parser.add_argument("--out", help="where the table is made (default: a temporary folder)")
    a = parser.parse_args()
    if a.sample < 2:
        parser.error("--sample: the rows are made from these items. Give at least 2.")
    use_threads(1)
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
        print(f"{a.items} items, {len(apexes)} nodes, D={collection.meta.dim}, "
              f"{size * per_million / 1e9:.2f} GB per million")  # fmt: skip
        bare = least(lambda: product(apexes.space.float(), a.items, rng), 3) * per_million
        print("processor seconds per million items, and their ratio to the first line")
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
            if name == "score":
                show("score, its thread alone", clock.alone * per_million, bare)
        whole = sum(clock.parts.values())
        show("sum", whole * per_million, bare)
        print(f"scoring alone is {clock.parts['score'] / whole:.0%} of the sum")
        for threads in dict.fromkeys((1, a.threads)):
            use_threads(threads)
            start, wall = time.process_time(), time.perf_counter()
            rescore(collection, model, policy, out=Path(folder) / "three", report=False)
            seconds, wall = time.process_time() - start, time.perf_counter() - wall
            show(f"rescore, {threads} thread{'s' * (threads > 1)}", seconds * per_million, bare)
            print(f"  of it on the clock: {wall * per_million:.1f} s per million")
        again = encoding / len(seen) * 1e6
        show(f"encoding again ({len(seen)} items)", again, bare)
        print(f"encoding again takes {again / (seconds * per_million):.0f} times as long")


def use_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    pa.set_cpu_count(threads)


class Clock:
    """Processor seconds of parts that take turns, with what other threads do meanwhile (read-ahead)."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.alone = 0.0  # of the thread that scores
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
            began = time.thread_time()
            scored = judge.score(points)
            clock.alone += time.thread_time() - began
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
    judge = ColumnJudge(model, view, meta, meta)
    pools = {name: Pool(name, seen) for name in ("image", "text")}
    kinds = rng.choice([k for k, _ in KINDS], count, p=[p for _, p in KINDS])

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, count, PART):
            batch = _grown(start, kinds[start : start + PART], pools, judge.schema, rng)
            yield judge.rows(batch, judge.judge(batch))

    CollectionWriter.write_columns(out, meta, batches())
    return Collection.open(out)


class Pool:
    """Vectors and texts of the real items that have a channel."""

    def __init__(self, name: str, seen: list[EncodedItem]) -> None:
        own = [i for i in seen if name in i.points]
        self.vectors = np.stack([i.points[name][0] for i in own])
        self.texts = pa.array([i.text for i in own])

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, pa.Array]:
        """Vectors with noise, and their texts."""
        chosen = rng.integers(len(self.vectors), size=count)
        vectors = self.vectors[chosen]
        length = np.linalg.norm(vectors, axis=1, keepdims=True) / np.sqrt(vectors.shape[1])
        noise = rng.standard_normal(vectors.shape, dtype=np.float32)
        return vectors + NOISE * length * noise, self.texts.take(pa.array(chosen))


def _grown(
    start: int, kinds: np.ndarray, pools: dict[str, Pool], schema: pa.Schema,
    rng: np.random.Generator,
) -> pa.RecordBatch:  # fmt: skip
    """Rows with what is stored of items, and nothing yet of their judgement."""
    n = len(kinds)
    (image, _), (text, words) = (pools[name].draw(n, rng) for name in ("image", "text"))
    is_text, reads = kinds == "text", kinds == "image+ocr"
    main = np.where(is_text, "text", "image")
    names = [f"{m}/{start + k:07d}" for k, m in enumerate(main)]
    channels = {"image": ["image"], "text": ["text"], "image+ocr": ["image", "ocr"]}
    columns = {
        "id": names,
        "source": [f"/collection/{name}" for name in names],
        "modality": main,
        "content_hash": [f"{start + k:064x}" for k in range(n)],
        "vector": vector_column(np.where(is_text[:, None], text, image)),
        "text_vector": vector_column(text, reads),
        "channels": [channels[k] for k in kinds.tolist()],
        "cut": [[]] * n,
        "text": pc.if_else(pa.array(is_text), words, ""),
        "read_text": pc.if_else(pa.array(reads), words, ""),
    }
    return pa.RecordBatch.from_arrays(
        [
            pa.nulls(n, f.type) if f.name not in columns else pa.array(columns[f.name], f.type)
            for f in schema
        ],
        schema=schema,
    )


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
