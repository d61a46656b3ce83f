"""How a search may rank: `python benchmarks/retrieval.py [--split test]`

Among all sentences of a split of the contrast set, lines of chats that say next to nothing (at most three
letters) and pictures of Tiny-ImageNet (held-out training pictures; `--split test`: val.parquet), risky
sentences ask for the others of their category, "a photo of a CLASS" and pictures for those of the class.
`hysafe search` ranks by the distance less three quarters of the item's radius.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hysafe.app.pipeline import load
from hysafe.data.contrast import contrast_set
from hysafe.data.datamodule import held_out
from hysafe.data.images import decode
from hysafe.data.sources import data_root, iter_samples
from hysafe.geometry import Points

BATCH = 128
LETTERS, EMPTY_LINES = 3, 100
FROM = ("convabuse", "davidson")
DEPTH = 10
# Pictures that ask, about so many.
PICTURES = 800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    a = parser.parse_args()
    model, root = load(a.model), data_root(a.data)
    texts, labels = sentences(a.split, model.taxonomy)
    empty = empty_lines(root)
    texts, labels = [*texts, *empty], [*labels, *["empty"] * len(empty)]
    name = "val.parquet" if a.split == "test" else "train-*.parquet"
    shown = [
        s
        for s in iter_samples(str(root / "images" / "tiny_imagenet" / name), "tiny_imagenet")
        if a.split == "test" or held_out(s.image or b"")
    ]
    size, encoder = model.encoder.image_size, model.encoder
    images = [decode(s.image, size=size) for s in shown if s.image]
    classes = [str(s.extra["name"]) for s in shown]
    asked_for = sorted(set(classes))
    phrases = [f"a photo of a {n}" for n in asked_for]
    parts = [
        *(model.encode_text(part) for part in batches(texts)),
        *(model.encode_image(part) for part in batches(images)),
        model.encode_text(phrases),
    ]
    tangents = torch.cat([p.tangent() for p in parts]).double()
    known = np.array([*labels, *classes, *asked_for])
    items = len(texts) + len(images)  # the phrases ask and are not found
    radius = Points.from_tangent(tangents, encoder.c, encoder.space).radius()
    middle = (radius[: len(texts)], radius[len(texts) - len(empty) : len(texts)],
              radius[len(texts) : items])  # fmt: skip
    print(f"{len(texts)} texts, {len(empty)} of them next to empty, {len(images)} pictures; median "
          "radius " + ", ".join(f"{r.median():.2f}" for r in middle) + "\n")  # fmt: skip
    print(f"| asked by | rank by | precision@{DEPTH} | mAP | texts in the first {DEPTH} | empty |")
    print("|---|---|---|---|---|---|")
    kinds = {
        "risky sentence": [i for i, name in enumerate(labels) if name not in ("", "empty")],
        "class name": list(range(items, len(tangents))),
        "picture": list(range(len(texts), items))[:: max(1, len(images) // PICTURES)],
    }
    for kind, asked in kinds.items():
        for rule, scores in rules(tangents, asked, items, encoder):
            show(f"{kind} | {rule}", scores.numpy(), asked, known, len(texts))


def sentences(split: str, taxonomy: Any) -> tuple[list[str], list[str]]:
    """Sentences, and the category of the risky ones."""
    texts, labels = [], []
    for s in contrast_set(split):
        if s.text and not s.extra["form"]:
            texts.append(s.text)
            labels.append("" if s.safe else taxonomy.path(s.nodes[0]).ids[1])
    return texts, labels


def empty_lines(root: Any) -> list[str]:
    files = [str(root / "text" / f"{name}.jsonl") for name in FROM]
    texts = {str(s.text) for file in files for s in iter_samples(file, "hysafe_text")}
    return sorted(t for t in texts if 0 < len(t.strip()) <= LETTERS)[:EMPTY_LINES]


def batches(values: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(values), BATCH):
        yield values[start : start + BATCH]


def rules(
    tangents: torch.Tensor, asked: list[int], items: int, encoder: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """What to rank the items by for each query [Q, items], lower first."""
    points = Points.from_tangent(tangents, encoder.c, encoder.space)
    far = points.functions.pairwise_dist(points.space[asked], points.space[:items], points.c)
    radius = points.radius()[:items]
    yield "geodesic distance", far.clone()
    for w in (0.25, 0.5, 0.75, 1):
        yield f"distance - {w:g} x radius", far - w * radius
    for name, centre in (("origin", 0.0), ("mean", tangents[:items].mean(0))):
        unit = torch.nn.functional.normalize(tangents - centre, dim=-1)
        yield f"angle at the {name}", -unit[asked] @ unit[:items].T


def show(name: str, scores: np.ndarray, asked: list[int], known: np.ndarray, texts: int) -> None:
    """A query is not its own answer."""
    precision, average, words, empty = [], [], [], []
    for row, i in enumerate(asked):
        order = np.argsort(scores[row], kind="stable")
        order = order[order != i]
        right = known[order] == known[i]
        if not right.any():
            continue
        places = np.flatnonzero(right)
        precision.append(right[:DEPTH].mean())
        average.append(((np.arange(len(places)) + 1) / (places + 1)).mean())
        words.append((order[:DEPTH] < texts).sum())
        empty.append((known[order[:DEPTH]] == "empty").sum())
    print(f"| {name} | {np.mean(precision):.3f} | {np.mean(average):.3f} | {np.mean(words):.1f} | "
          f"{np.mean(empty):.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
