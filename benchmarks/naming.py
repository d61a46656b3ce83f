"""How phrases of a list become a name: `python benchmarks/naming.py`

Each seen category plays a hidden one: on the validation split its items are named by a phrase of the
list, and the category's own words may not be said. With `--guard DIR` what the guard finds likely is
added, at several weights. `--split test` has the nine hidden categories, which chose nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from guard import Bench

from hysafe.guard import naming
from hysafe.guard.ask import chosen_names
from hysafe.guard.corpus import Labelled
from hysafe.guard.model import GuardModel
from hysafe.guard.protocol import PromptPolicy
from hysafe.guard.split import HIDDEN

VOTERS = (12, 30, 60, 120)
WEIGHTS = (0.0, 10.0, 20.0, 40.0, 80.0)
DRAWS = 2000
# Phrases beside an item, of which a prompt shows the first.
SHOWN = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--guard", metavar="DIR", help="weigh its log-probabilities, too")
    args = parser.parse_args()
    bench = Bench(argparse.Namespace(limit=None, out=None))
    study = Study(bench, args.split)
    print(f"{len(study.items)} items of {len(set(study.nodes))} categories, {args.split} split")
    nearest = study.scores(lambda row: int(np.argmax(row)))
    show("nearest phrase", nearest, nearest, study.nodes)
    used = naming.VOTERS
    for borrow in (False, True):
        kind = ", borrowing" if borrow else ""
        for voters in VOTERS:
            naming.VOTERS = voters
            found = study.scores(study.agreed, borrow=borrow)
            show(f"agreement of {voters}{kind}", found, nearest, study.nodes)
    naming.VOTERS = used
    if args.guard:
        guard = GuardModel.load(args.guard)
        for borrow in (False, True):
            kind = ", borrowing" if borrow else ""
            for weight in WEIGHTS:
                names = study.by_guard(guard, weight, borrow=borrow)
                label = f"guard + {weight:g} x agreement{kind}"
                show(label, study.judged(names), nearest, study.nodes)


class Study:
    """Items, what may not be said of them, and how near each phrase is."""

    def __init__(self, bench: Bench, split: str) -> None:
        self.bench = bench
        index, tree = bench.world.index, bench.world.model.taxonomy
        every = bench.items(split)
        wanted = [i for i in every if i.node and (i.node in HIDDEN) == (split == "test")]
        self.items: list[Labelled] = wanted
        self.nodes = [str(i.node) for i in wanted]
        self.banks = [[tree[n].name, *tree[n].synonyms] for n in self.nodes]
        assert index.meanings is not None
        self.meanings = index.meanings
        mean = index.vectors.mean(0)
        self.phrases = index.whitening["text"].directions(index.vectors, mean=mean)
        units = index.whitening["text"].directions(
            np.concatenate([i.evidence.vectors for i in every])
        )
        places = {id(i): k for k, i in enumerate(every)}
        rows = [places[id(i)] for i in wanted]
        # items borrow from all items of the split, harmless ones too, as in a scan
        self.units = {False: units[rows], True: naming.borrowed(units)[rows]}
        said = {n: {p.casefold() for p in tree[n].phrases} for n in set(self.nodes)}
        self.banned = {
            n: np.array([p.casefold() in words for p in index.phrases]) for n, words in said.items()
        }

    def rows(self, borrow: bool) -> np.ndarray:
        close = self.units[borrow] @ self.phrases.T
        for row, node in zip(close, self.nodes, strict=True):
            row[self.banned[node]] = -np.inf
        return close

    def agreed(self, row: np.ndarray) -> int:
        return int(naming.agreement(row, self.meanings)[0][0])

    def scores(self, choose: Callable[[np.ndarray], int], *, borrow: bool = False) -> np.ndarray:
        phrases = self.bench.world.index.phrases
        return self.judged([phrases[choose(row)] for row in self.rows(borrow)])

    def judged(self, names: Sequence[str]) -> np.ndarray:
        """Calibrated similarity to the true category's words, 0 to 100, of each name."""
        b = self.bench
        return np.array([
            100 * b.thresholds.score(float(b.similarity([name], bank)[0].max()))
            for name, bank in zip(names, self.banks, strict=True)
        ])  # fmt: skip

    def by_guard(self, guard: GuardModel, weight: float, *, borrow: bool) -> list[str]:
        """Names among the phrases of each prompt, under a policy without the item's category."""
        index, evidence = self.bench.world.index, []
        for item, row in zip(self.items, self.rows(borrow), strict=True):
            places, scores = naming.agreement(row, self.meanings)
            near = places[:SHOWN]
            evidence.append(
                replace(
                    item.evidence,
                    phrases=tuple(index.phrases[p] for p in near),
                    phrase_vectors=index.vectors[near].astype(np.float16),
                    phrase_scores=scores[:SHOWN],
                    phrase_cosines=row[near],
                )
            )
        policies = [
            PromptPolicy.of([e for e in self.bench.policy.entries if e.node != n])
            for n in self.nodes
        ]
        return chosen_names(guard, evidence, policies, self.bench.world.space, agreement=weight)


def show(label: str, found: np.ndarray, baseline: np.ndarray, nodes: Sequence[str]) -> None:
    """Mean, and the gain over the baseline with its 95 % interval over categories (bootstrap)."""
    groups = [np.array([n == node for n in nodes]) for node in sorted(set(nodes))]
    gains = np.array([float((found - baseline)[g].mean()) for g in groups])
    drawn = np.random.default_rng(0).integers(len(gains), size=(DRAWS, len(gains)))
    low, high = np.percentile(gains[drawn].mean(1), [2.5, 97.5])
    print(
        f"{label:42s} {found.mean():5.1f}   gain per category {low:5.1f} to {high:5.1f}", flush=True
    )


if __name__ == "__main__":
    main()
