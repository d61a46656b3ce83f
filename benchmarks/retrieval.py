"""How a search may rank: `python benchmarks/retrieval.py [--split test]`

Each risky sentence of the contrast set asks for the others of its category, among all sentences of the
split and lines of chats that say next to nothing (at most three letters). Geodesic distance is what
`hysafe search` ranks by; the others take the items' radius out of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from hysafe.app.pipeline import load
from hysafe.data.contrast import contrast_set
from hysafe.data.sources import data_root, iter_samples
from hysafe.geometry import Points

BATCH = 128
LETTERS, EMPTY_LINES = 3, 100
FROM = ("convabuse", "davidson")
DEPTH = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    a = parser.parse_args()
    model, taxonomy = load(a.model), load(a.model, towers=False).taxonomy
    texts, labels = [], []
    for s in contrast_set(a.split):
        if s.text and not s.extra["form"]:
            texts.append(s.text)
            labels.append("" if s.safe else taxonomy.path(s.nodes[0]).ids[1])
    root = data_root(a.data) / "text"
    lines = {
        str(s.text) for name in FROM for s in iter_samples(str(root / f"{name}.jsonl"), "hysafe_text")
        if 0 < len(str(s.text).strip()) <= LETTERS
    }  # fmt: skip
    empty = sorted(lines)[:EMPTY_LINES]
    texts, labels = [*texts, *empty], [*labels, *["empty"] * len(empty)]
    parts = [model.encode_text(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
    tangents = torch.cat([p.tangent() for p in parts]).double()
    points = Points.from_tangent(tangents, parts[0].c, parts[0].geometry)
    known = np.array(labels)
    asked = [i for i, name in enumerate(labels) if name not in ("", "empty")]
    radius = points.radius()
    far = points.functions.pairwise_dist(points.space[asked], points.space, points.c)
    print(f"{len(asked)} queries, {len(texts)} texts, {len(empty)} of them next to empty")
    print(f"median radius {radius.median():.2f}, of the empty ones "
          f"{radius[-len(empty) :].median():.2f}\n")  # fmt: skip
    print(
        f"| rank by | precision@{DEPTH} | mean average precision | empty lines in the first {DEPTH} |"
    )
    print("|---|---|---|---|")
    rules: dict[str, Callable[[], torch.Tensor]] = {
        "geodesic distance": lambda: far,
        **{
            f"distance - {w:g} x radius": lambda w=w: far - w * radius for w in (0.25, 0.5, 0.75, 1)
        },
        "angle at the origin": lambda: -directions(tangents, asked, 0.0),
        "angle at the mean": lambda: -directions(tangents, asked, tangents.mean(0)),
    }
    for name, rule in rules.items():
        show(name, rule().numpy(), asked, known)


def directions(
    tangents: torch.Tensor, asked: list[int], centre: torch.Tensor | float
) -> torch.Tensor:
    unit = torch.nn.functional.normalize(tangents - centre, dim=-1)
    return unit[asked] @ unit.T


def show(name: str, scores: np.ndarray, asked: list[int], known: np.ndarray) -> None:
    """Lower scores come first; a query is not its own answer."""
    precision, average, empty = [], [], []
    for row, i in enumerate(asked):
        scores[row, i] = np.inf
        order = np.argsort(scores[row], kind="stable")[:-1]
        right = known[order] == known[i]
        if not right.any():
            continue
        places = np.flatnonzero(right)
        precision.append(right[:DEPTH].mean())
        average.append(((np.arange(len(places)) + 1) / (places + 1)).mean())
        empty.append((known[order[:DEPTH]] == "empty").sum())
    print(f"| {name} | {np.mean(precision):.3f} | {np.mean(average):.3f} | {np.mean(empty):.2f} |")


if __name__ == "__main__":
    main()
