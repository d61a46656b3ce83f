"""What the guard learns from: phrases for its vocabulary, items for its verdicts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hysafe.data.wordnet import lemma, noun_edges
from hysafe.errors import ConfigError
from hysafe.guard.model import Evidence
from hysafe.guard.naming import Whitening, agreement, borrowed
from hysafe.guard.protocol import (
    Episode,
    PromptPolicy,
    episode,
    split_bank,
    twins,
    write_answer,
)
from hysafe.taxonomy import PolicyView, Taxonomy
from hysafe.types import Sample

__all__ = [
    "Labelled",
    "PhraseIndex",
    "Writer",
    "item_of",
    "node_phrases",
    "seen_policy",
    "wordnet_phrases",
]

# How often a risky item's category is taken out of the policy, and is allowed by it.
HIDE_RATE = 0.4
ALLOW_RATE = 0.1
# How often a name is chosen among the item's nearest phrases, where one fits.
CHOOSE_RATE = 0.85
# Entries of a training policy: from few to all.
SIZES = (6, 12, 20, 36)
# Items compared with all phrases at once.
ROWS = 1024


# ---------------------------------------------------------------- phrases


def node_phrases(taxonomy: Taxonomy, without: Iterable[str] = ()) -> dict[str, tuple[str, ...]]:
    """Training phrases of every node, by its id.

    Args:
        without: nodes left out, with those they stand for: a harmless sibling goes with its
            category.
    """
    hidden = frozenset(without)
    return {
        n.id: split_bank(n).train
        for n in taxonomy
        if n.id not in hidden and n.id.removeprefix("S.") not in hidden
    }


def wordnet_phrases(edges: str | Path) -> list[str]:
    """First lemmas of the nouns in an edge list `child<TAB>parent` of synset names, as words.

    Raises:
        ConfigError: no such file.
    """
    names = {synset for pair in noun_edges(edges) for synset in pair}
    lemmas = (lemma(s) for s in sorted(names))
    return [p for p in dict.fromkeys(lemmas) if re.fullmatch(r"[a-z][a-z' -]{2,39}", p)]


class PhraseIndex:
    """The phrases of a list that may name an item, for prompts.

    Args:
        phrases: P phrases.
        vectors: their tangent vectors [P, D].
        whitening: of each channel, fitted on ordinary items of it; see
            :class:`hysafe.guard.naming.Whitening`.
        meanings: unit vectors [P, E] of what they mean, from a sentence encoder; with them
            :meth:`choose` ranks by agreement, without them by nearness.
    """

    def __init__(
        self,
        phrases: Sequence[str],
        vectors: np.ndarray,
        whitening: Mapping[str, Whitening],
        meanings: np.ndarray | None = None,
    ) -> None:
        if len(phrases) != len(vectors):
            raise ConfigError(f"{len(phrases)} phrases, {len(vectors)} vectors. One per phrase.")
        self.phrases, self.vectors = tuple(phrases), np.asarray(vectors, np.float32)
        self.whitening = dict(whitening)
        self.meanings = None if meanings is None else _bytes(meanings)
        mean = self.vectors.mean(0)
        self._directions = {
            name: w.directions(self.vectors, mean=mean).astype(np.float32)
            for name, w in self.whitening.items()
        }

    def rewhitened(self, channel: str, whitening: Whitening | None) -> PhraseIndex:
        """The same phrases for items of a channel that lie elsewhere; None: it is not named."""
        others = {c: w for c, w in self.whitening.items() if c != channel}
        if whitening is not None:
            others[channel] = whitening
        return PhraseIndex(self.phrases, self.vectors, others, self.meanings)

    def nearest(self, vectors: np.ndarray, channel: str, k: int) -> list[tuple[str, ...]]:
        """k phrases for each of n vectors [n, D] of a channel, nearest first; none for a channel
        without whitening."""
        if channel not in self.whitening:
            return [()] * len(vectors)
        found: list[tuple[str, ...]] = []
        for start in range(0, len(vectors), ROWS):
            seen = self.whitening[channel].directions(vectors[start : start + ROWS])
            close = seen.astype(np.float32) @ self._directions[channel].T
            order = np.argsort(-close, axis=1, kind="stable")[:, :k]
            found += [tuple(self.phrases[c] for c in row) for row in order]
        return found

    def choose(
        self,
        vectors: np.ndarray,
        channel: str,
        k: int,
        *,
        borrow: bool = False,
        without: np.ndarray | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Phrases that may name each of n items, the best first.

        Args:
            vectors: tangent vectors [n, D] of a channel.
            k: so many at most.
            borrow: items that stand close together share what is near to them, see
                :func:`hysafe.guard.naming.borrowed`.
            without: bool [P], phrases that are not to be named.

        Returns:
            For each item the places in the list [k], their agreement with all near phrases [k] and
            their cosines [k]; the cosines twice where the index has no meanings. Nothing for a channel
            without whitening.
        """
        if channel not in self.whitening:
            return [(np.empty(0, np.int64), np.empty(0), np.empty(0))] * len(vectors)
        units = self.whitening[channel].directions(vectors)
        units = borrowed(units) if borrow else units
        found = []
        for start in range(0, len(units), ROWS):
            close = units[start : start + ROWS].astype(np.float32) @ self._directions[channel].T
            if without is not None:
                close[:, without] = -np.inf
            for row in close:
                if self.meanings is None:
                    order = np.argsort(-row, kind="stable")[:k]
                    found.append((order, row[order], row[order]))
                    continue
                order, scores = agreement(row, self.meanings)
                found.append((order[:k], scores[:k], row[order[:k]]))
        return found

    def save(self, folder: str | Path) -> None:
        """Write phrases.txt and phrases.safetensors beside a guard."""
        arrays = {"vectors": torch.from_numpy(self.vectors).half()}
        if self.meanings is not None:
            arrays["meanings"] = torch.from_numpy(
                np.rint(self.meanings * (127 / np.abs(self.meanings).max(1, keepdims=True)))
            ).to(torch.int8)
        for name, w in self.whitening.items():
            arrays[f"{name}.mean"] = torch.from_numpy(w.mean).float()
            arrays[f"{name}.matrix"] = torch.from_numpy(w.matrix).float().contiguous()
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "phrases.txt").write_text("\n".join(self.phrases) + "\n", "utf-8")
        save_file(arrays, Path(folder) / "phrases.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> PhraseIndex:
        """Back from :meth:`save`."""
        path = Path(folder)
        if not (path / "phrases.safetensors").is_file():
            raise ConfigError(f"{path} holds no phrases.safetensors. Make it with train_guard.py.")
        arrays = load_file(path / "phrases.safetensors")
        phrases = (path / "phrases.txt").read_text("utf-8").splitlines()
        channels = {n.split(".")[0] for n in arrays if "." in n}
        return cls(
            phrases,
            arrays["vectors"].float().numpy(),
            {
                c: Whitening(
                    arrays[f"{c}.mean"].double().numpy(), arrays[f"{c}.matrix"].double().numpy()
                )
                for c in sorted(channels)
            },
            arrays["meanings"].numpy() if "meanings" in arrays else None,
        )


def _bytes(meanings: np.ndarray) -> np.ndarray:
    """Unit vectors [P, E] float32, in the 255 steps that a saved index keeps of them."""
    x = np.asarray(meanings, np.float32)
    steps = np.rint(x * (127 / np.abs(x).max(1, keepdims=True)))
    return steps / np.linalg.norm(steps, axis=1, keepdims=True)


# ---------------------------------------------------------------- items


@dataclass(frozen=True)
class Labelled:
    """An item with what is known of it.

    Args:
        evidence: what the encoder says of it.
        node: category that holds it, None for a harmless item.
        concept: concept within the category, where it is known.
        benign_of: category whose harmless sibling it is.
        picture: class of the picture, where it has one that is named.
        image: the encoded picture, where it is kept for a decoder that sees pixels.
    """

    evidence: Evidence
    node: str | None = None
    concept: str | None = None
    benign_of: str | None = None
    picture: str | None = None
    image: bytes | None = None


def item_of(sample: Sample, taxonomy: Taxonomy) -> tuple[str | None, str | None, str | None] | None:
    """(category, concept, benign_of) of a sample; None where its labels do not say.

    A risky sample must lie in one category; a harmless one in none.
    """
    if sample.safe is None or not sample.nodes:
        return None
    if sample.safe:
        sibling = next((n for n in sample.nodes if n.startswith("S.") and n[2:] in taxonomy), None)
        return None, None, sibling.removeprefix("S.") if sibling and sample.pair else None
    if len(sample.nodes) != 1 or sample.nodes[0] not in taxonomy:
        return None
    node = taxonomy[sample.nodes[0]]
    if node.kind == "concept":
        return str(node.parent), node.id, None
    concept = sample.extra.get("concept")
    known = concept in taxonomy and taxonomy[str(concept)].parent == node.id
    return (node.id, concept if known else None, None) if node.kind == "category" else None


def seen_policy(view: PolicyView, hidden: Iterable[str]) -> PromptPolicy:
    """All categories of a view but the hidden ones."""
    gone = frozenset(hidden)
    nodes = [n.id for n in view.taxonomy if n.kind == "category" and n.id not in gone]
    return PromptPolicy.from_view(view, nodes)


class Writer:
    """Episodes and right answers for labelled items; the same seed gives the same.

    Args:
        policy: what episodes draw from.
        taxonomy: the tree of its nodes.
        best: which of an item's nearest phrases names a bank best, None where none does; without it
            names come from the banks alone.
        hide: share of risky items whose category is taken out of the policy.
    """

    def __init__(
        self,
        policy: PromptPolicy,
        taxonomy: Taxonomy,
        best: Callable[[Sequence[str], Sequence[str]], int | None] | None = None,
        *,
        hide: float = HIDE_RATE,
    ) -> None:
        self.hide = hide
        self.policy, self.taxonomy, self.best = policy, taxonomy, best

    def draw(self, item: Labelled, seed: int) -> Episode:
        """A policy for the item: complete or a part, with its category, without it or allowed."""
        rng = random.Random(seed)
        size = rng.choice(SIZES)
        benign_of = item.benign_of if item.benign_of in self.policy else None
        if item.node is None:
            return episode(
                self.policy, self.taxonomy, None, seed=seed, size=size, benign_of=benign_of
            )
        lot = rng.random()
        if lot < ALLOW_RATE:
            # one side alone: with a pair, the rewards would wait for its twin
            _, allowed = twins(
                self.policy, self.taxonomy, item.node, seed=seed, pair="-", size=size
            )
            return replace(allowed, pair=None)
        return episode(
            self.policy, self.taxonomy, item.node, seed=seed, size=size,
            hide=lot < ALLOW_RATE + self.hide,
        )  # fmt: skip

    def answer(self, item: Labelled, drawn: Episode, seed: int) -> str:
        """The right answer, as text."""
        rng = random.Random(seed)
        name = self._name(item, drawn, rng) if drawn.bank else None
        return write_answer(drawn.answer(self._rationale(drawn, rng), name=name), drawn.policy)

    def _name(self, item: Labelled, drawn: Episode, rng: random.Random) -> str:
        near = item.evidence.phrases
        if self.best is not None and near and rng.random() < CHOOSE_RATE:
            chosen = self.best(near, drawn.bank)
            if chosen is not None:
                return near[chosen]
        names = [p for p in drawn.bank if len(p.split()) > 1] or list(drawn.bank)
        if item.concept is not None and rng.random() < 0.5:
            finer = split_bank(self.taxonomy[item.concept]).train
            names = [p for p in finer if 1 < len(p.split()) < 7] or names
        return rng.choice(names)

    def _rationale(self, drawn: Episode, rng: random.Random) -> str:
        if drawn.category is not None:
            said = rng.choice(split_bank(self.taxonomy[drawn.category]).train)
            verb = "forbids" if drawn.rating == "unsafe" else "allows"
            return f"about {said}, which the policy {verb}"
        if drawn.bank:
            where = self.taxonomy[drawn.parent].name if drawn.parent else "no domain"
            return f"risky, and no listed category holds it; nearest to {where}"
        return "no listed category holds it"
