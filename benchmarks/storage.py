"""Narrower storage of the points: a shortlist from bf16 or int8, measured exactly, against float32.

    python benchmarks/storage.py [--items 200000] [--pictures 0.5] [--cache real.npz]

Items and queries are those of ``benchmarks/search.py``. A narrow row holds the direction of the point
in bf16 or int8 (the largest coordinate is 127) and two float32: what its space components are that
direction times, and its time, which would otherwise lose more than the rest. Rows are widened to
float32 block by block, the product ranks them, and the shortlist is measured in float64 from the
float32 tangent vectors on the disk, as an exact search does. *bytes*: of what a query reads, an item.
*time*: median, over that of the exact float32 search in the same run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from search import BATCH, Grown, K, grow, points_of, real_items, recall, rerank, take_turns

from hysafe.geometry import Points
from hysafe.index import search as search_module
from hysafe.index.search import PointIndex

SHORTLISTS = (K, 50, 100, 200)
WIDEST = 127
BUILD_BLOCK = 65536


class Narrow:
    """The rows of an index with directions of fewer bits."""

    def __init__(self, index: PointIndex, dtype: torch.dtype) -> None:
        self.index, dim = index, index.tangents.shape[1]
        self.rows = torch.empty(len(index), dim, dtype=dtype)
        self.length = torch.empty(len(index), 1)
        self.time = torch.from_numpy(index.matrix[:, dim:].copy())
        for low in range(0, len(index), BUILD_BLOCK):
            part = slice(low, low + BUILD_BLOCK)
            space = torch.from_numpy(index.matrix[part, :dim])
            length = space.abs().amax(1, keepdim=True).clamp_min(torch.finfo(space.dtype).tiny)
            if dtype == torch.int8:
                length = length / WIDEST
                self.rows[part] = (space / length).round().to(dtype)
            else:
                self.rows[part] = (space / length).to(dtype)
            self.length[part] = length

    @property
    def item_bytes(self) -> int:
        return self.rows.shape[1] * self.rows.element_size() + 8

    def shortlist(self, queries: Points, size: int) -> np.ndarray:
        """Places [Q, size] of the points with the largest products, best first."""
        weight = torch.from_numpy(self.index._bounding(queries.tangent().double()))
        space, clock = weight[:, :-1].T.contiguous(), weight[:, -1]
        found = search_module._Shortlist(len(queries), size)
        step = min(search_module.MOST_ROWS, max(1, search_module.SCORES // len(queries)))
        wide = torch.empty(step, self.rows.shape[1])
        score = torch.empty(step, len(queries))
        for low in range(0, len(self.rows), step):
            part = self.rows[low : low + step]
            block, out = wide[: len(part)], score[: len(part)]
            torch.mm(block.copy_(part), space, out=out)
            out.mul_(self.length[low : low + step])
            out.addcmul_(self.time[low : low + step], clock)
            found.add(out.numpy(), low)
        return found.sorted()[1]

    def search(self, queries: Points, size: int) -> list[list[Any]]:
        return rerank(self.index, queries, self.shortlist(queries, size))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--pictures", type=float, default=0.5, help="share of the items (0 to 1)")
    parser.add_argument("--cache", type=Path, help="keep the real embeddings here (.npz)")
    parser.add_argument("--queries", type=int, default=200, help="of each kind")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clock: Callable[[], float] = time.process_time if args.clock == "cpu" else time.perf_counter
    real = real_items(args.cache)
    generator = np.random.default_rng(args.seed)
    queries, grown = {}, {}
    for kind, share in (("text", 1 - args.pictures), ("image", args.pictures)):
        if share > 0:
            vectors = real.kinds[kind][generator.permutation(len(real.kinds[kind]))]
            queries[kind] = points_of(vectors[: args.queries], real.c)
            grown[kind] = grow(vectors[args.queries :], round(share * args.items), generator)
    with tempfile.TemporaryDirectory() as folder:
        collection: Any = Grown(Path(folder), grown, real.c)
        index = PointIndex.open(collection)
        sizes = {k: len(v) - args.queries for k, v in real.kinds.items() if k in grown}
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        print(f"{len(index):,} items grown from {sizes}, D={index.tangents.shape[1]}, "
              f"c={real.c:.3f}, {torch.get_num_threads()} threads, {args.clock} time, load {load:.1f}\n",
              flush=True)  # fmt: skip
        print(f"| queries | storage | bytes | shortlist | recall@{K} | time, 1 query | {BATCH} |")
        print("|---|---|---|---|---|---|---|")
        narrow = {"bf16": Narrow(index, torch.bfloat16), "int8": Narrow(index, torch.int8)}
        for kind, asked in queries.items():
            wanted = index.search(asked, K)
            print(f"| {kind} | float32 | {4 * index.matrix.shape[1]} | exact | 1 | 1 | 1 |")
            for name, stored in narrow.items():
                for size in SHORTLISTS:
                    got = recall(stored.search(asked, size), wanted)
                    ratios = [_ratio(index, stored, asked[:n], size, args.repeats, clock)
                              for n in (1, BATCH)]  # fmt: skip
                    print(f"| {kind} | {name} | {stored.item_bytes} | {size} | {got:.4f} | "
                          f"{ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)  # fmt: skip


def _ratio(
    index: PointIndex,
    stored: Narrow,
    queries: Points,
    size: int,
    repeats: int,
    clock: Callable[[], float],
) -> float:
    runs = {
        "exact": lambda: index.search(queries, K),
        "narrow": lambda: stored.search(queries, size),
    }
    times = take_turns(runs, repeats, clock)
    return times["narrow"] / times["exact"]


if __name__ == "__main__":
    main()
