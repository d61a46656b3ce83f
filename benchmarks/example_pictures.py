"""Pictures of classes that a model has never seen, asked for by name, by example pictures, by both.

``python benchmarks/example_pictures.py --model runs/held_out/model`` adds each held-out class as a node
of a policy, as a user would (name, definition, synonym, examples), and ranks the pictures of
``val.parquet`` by its score. Examples are drawn from the training files of the held-out classes, which
the model has not seen either. Every other class (by name) is there to choose how phrases and examples
are weighed: the best average precision over 1, 5 and 20 examples, and of what comes within 2 % of it
the fewest other pictures that reach the threshold. The rest is measured once, with what
:func:`hysafe.encoder.head.example_direction` has as its defaults.

*hits*, *others*: share of the class's pictures and of all other pictures whose score is at least 0.5.
*texts*: average precision on sentences about the class among those about all classes, if they too were
judged by the cone that pictures are judged by.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hysafe.app.card import reference_points
from hysafe.app.pipeline import SafetyModel, load
from hysafe.app.tasks import class_phrases
from hysafe.data.datamodule import EmbedData
from hysafe.data.images import decode
from hysafe.data.sources import data_root, iter_samples
from hysafe.encoder.head import COMMON_SHARE, PHRASES_COUNT, example_direction
from hysafe.evaluate.metrics import detection
from hysafe.evaluate.novelty_data import read_held_out
from hysafe.geometry import Points
from hysafe.score.calibration import ModalityCalibration
from hysafe.score.leaves import score_margins
from hysafe.score.reference import narrowing
from hysafe.taxonomy import Policy
from hysafe.taxonomy.policy import DEFAULT_THRESHOLD

COUNTS = (1, 5, 20)
PHRASES = (0.0, 1.0, 2.0, 5.0)
SHARES = (0.0, 0.3, 0.4, 0.5, 0.6)
# Rules whose average precision is this close to the best count as equal.
AS_GOOD = 0.98
NODE = "x.1"
SENTENCES = ("two {}s in the garden", "i bought a {} yesterday", "the {} was old",
             "have you seen my {}?")  # fmt: skip


@dataclass
class Items:
    """Points with the class of each."""

    points: Points
    names: list[str]

    def of(self, name: str) -> Tensor:
        return torch.tensor([n == name for n in self.names])


@dataclass(frozen=True)
class Figures:
    """Of one ranking, or means over several."""

    precision: float
    hits: float
    others: float

    @classmethod
    def mean(cls, figures: Iterable[Figures]) -> Figures:
        every = list(figures)
        return cls(*(statistics.fmean(getattr(f, k) for f in every)
                     for k in ("precision", "hits", "others")))  # fmt: skip


class Asked:
    """A class as a node of a policy."""

    def __init__(
        self, model: SafetyModel, name: str, chain: tuple[str, ...], ordinary: Tensor
    ) -> None:
        called, definition, *synonyms = class_phrases(name, chain)
        rule = {"parent": "D6", "name": called, "definition": definition, "synonyms": synonyms}
        view = model.view(Policy.from_dict({"nodes": {NODE: rule}}))
        self.model, self.name = model, name
        self.table, self.apexes = model.place(view)
        self.row = self.table.index[NODE]
        self.phrases = self.apexes.tangent()[self.row]
        self._margins: dict[int, Tensor] = {}
        self.new = torch.tensor([n == NODE for n in self.table.leaf_ids])
        self.ordinary = Points.from_tangent(ordinary, self.apexes.c, self.apexes.geometry)
        self._ordinary = self.ordinary.margin(self.apexes)

    def narrowed(self, apex: Points) -> float:
        """What the product takes off the node's cone, were it to point there."""
        margins = self._ordinary.clone()
        margins[:, self.row] = self.ordinary.margin(apex)[:, 0]
        scale = self.model.encoder.cone_scale_value
        taken = narrowing(margins, self.table, self.new, ModalityCalibration(), scale=scale)
        return float(taken[self.row])

    def figures(self, items: Items, direction: Tensor) -> Figures:
        """Of the ranking of items by the node's score, were its cone to point there."""
        if id(items) not in self._margins:
            self._margins[id(items)] = items.points.margin(self.apexes)
        margins = self._margins[id(items)].clone()
        tangent = (F.normalize(direction, dim=-1) * self.phrases.norm())[None]
        apex = Points.from_tangent(tangent, self.apexes.c, self.apexes.geometry)
        margins[:, self.row] = items.points.margin(apex)[:, 0] - self.narrowed(apex)
        scale = self.model.encoder.cone_scale_value
        score = score_margins(margins, self.table, scale=scale).nodes[:, self.row]
        wanted, over = items.of(self.name), score >= DEFAULT_THRESHOLD
        return Figures(
            detection(score[~wanted], score[wanted]).aupr,
            float(over[wanted].float().mean()),
            float(over[~wanted].float().mean()),
        )


def encoded(model: SafetyModel, files: Sequence[Path], names: set[str] | None) -> tuple[Items, dict[str, tuple[str, ...]]]:  # fmt: skip
    """Pictures of some classes (None: all), and the hypernyms of each class."""
    parts, found, chains = [], [], {}
    for file in files:
        samples = [
            s for s in iter_samples(str(file), "tiny_imagenet")
            if names is None or str(s.extra["name"]) in names
        ]  # fmt: skip
        for i in range(0, len(samples), 256):
            chunk = samples[i : i + 256]
            parts.append(model.encode_image([decode(s.image) for s in chunk]).tangent())
        found += [str(s.extra["name"]) for s in samples]
        chains.update({str(s.extra["name"]): tuple(s.extra["hypernyms"]) for s in samples})
    encoder = model.encoder
    return Items(Points.from_tangent(torch.cat(parts), encoder.c, encoder.space), found), chains


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--held-out", type=Path, help="names, one a line (default: the bundled 17)")
    parser.add_argument("--draws", type=int, default=3, help="of the examples, for each class")
    a = parser.parse_args()
    model, root = load(a.model), data_root(a.data) / "images" / "tiny_imagenet"
    hidden = sorted(read_held_out(a.held_out))
    pictures, chains = encoded(model, [root / "val.parquet"], None)
    pool, _ = encoded(model, sorted(root.glob("train-*.parquet")), set(hidden))
    vectors = pool.points.tangent()
    own, apexes = model.place(model.view())
    common = F.normalize(apexes.tangent()[own.leaves], dim=-1).mean(0)
    about = [(sentence.format(n), n) for n in sorted(chains) for sentence in SENTENCES]
    texts = Items(model.encode_text([t for t, _ in about]), [n for _, n in about])

    def drawn(name: str, count: int) -> Iterable[Tensor]:
        rows = pool.of(name).nonzero()[:, 0]
        for seed in range(a.draws):
            generator = torch.Generator().manual_seed(seed)
            yield vectors[rows[torch.randperm(len(rows), generator=generator)[:count]]]

    def over(asked: Sequence[Asked], items: Items, count: int, **weights: float) -> Figures:
        return Figures.mean(
            one.figures(items, example_direction(one.phrases, examples, common, **weights))
            for one in asked for examples in drawn(one.name, count)
        )  # fmt: skip

    data = EmbedData(a.data, exclude_classes=hidden, image_size=model.encoder.image_size)
    data.setup()
    ordinary = reference_points(model, data)["image"].half().double()
    choosing = [Asked(model, n, chains[n], ordinary) for n in hidden[0::2]]
    print(f"to choose by: {', '.join(hidden[0::2])}\n")
    print("| phrases count as | common taken off | average precision | hits | others |")
    print("|---|---|---|---|---|")
    tried: dict[tuple[float, float], Figures] = {}
    for rule in ((p, s) for p in PHRASES for s in SHARES):
        weights = {"phrases_count": rule[0], "common_share": rule[1]}
        tried[rule] = Figures.mean(over(choosing, pictures, n, **weights) for n in COUNTS)
        f = tried[rule]
        print(f"| {rule[0]:g} | {rule[1]:g} | {f.precision:.4f} | {f.hits:.3f} | {f.others:.3f} |",
              flush=True)  # fmt: skip
    best = max(f.precision for f in tried.values())
    good = [rule for rule, f in tried.items() if f.precision >= AS_GOOD * best]
    chosen = min(good, key=lambda rule: tried[rule].others)
    print(f"\nchosen: phrases count as {chosen[0]:g}, common taken off {chosen[1]:g}; in use: "
          f"{PHRASES_COUNT:g}, {COMMON_SHARE:g}\n")  # fmt: skip

    measured = [Asked(model, n, chains[n], ordinary) for n in hidden[1::2]]
    print(f"measured on: {', '.join(hidden[1::2])}\n")
    print("| asked by | examples | average precision | hits | others | texts |")
    print("|---|---|---|---|---|---|")

    def row(what: str, count: str, seen: Figures, read: Figures) -> None:
        print(f"| {what} | {count} | {seen.precision:.4f} | {seen.hits:.3f} | {seen.others:.3f} | "
              f"{read.precision:.3f} |", flush=True)  # fmt: skip

    name = [
        Figures.mean(one.figures(i, one.phrases) for one in measured) for i in (pictures, texts)
    ]
    row("name", "0", *name)
    kinds: dict[str, dict[str, float]] = {
        "mean of examples": {"phrases_count": 0.0, "common_share": 0.0},
        "examples": {"phrases_count": 0.0},
        "name and examples": {},
    }
    for what, weights in kinds.items():
        for count in COUNTS:
            both = [over(measured, items, count, **weights) for items in (pictures, texts)]
            row(what, str(count), *both)
    share = statistics.fmean(float(pictures.of(one.name).float().mean()) for one in measured)
    print(f"\nchance {share:.4f}; {len(pictures.names):,} pictures, {len(texts.names)} sentences")


if __name__ == "__main__":
    main()
