"""Names for items that no node names: the interface of a namer, and phrases of a list.

Names are compared with items after both are centred and the spread that all items share is divided
out (:class:`Whitening`). On the risky sentences of the contrast set that finds a phrase of the right
category more often than the distance alone (``benchmarks/discovery_loop.py`` measures it), and it
takes the distance between pictures and texts out of the comparison.

The nearest phrase is often an odd one; what the nearest phrases agree on is the better name
(:func:`agreement`), and items that stand close together share what is near to them
(:func:`borrowed`). docs/results.md has the figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hysafe.errors import ConfigError
from hysafe.geometry import Points
from hysafe.score.novelty import shrunk_covariance
from hysafe.taxonomy import PolicyView

__all__ = [
    *("Namer", "Naming", "PhraseNamer", "Whitening"),
    *("THINGS", "agreement", "borrowed", "bundled_phrases", "restated"),
]

# Share of the covariance that is replaced by its mean eigenvalue: with some hundred ordinary items in
# 128 dimensions 0.6 finds more than 0.1 and 0.3, with thousands as much.
SHRINKAGE = 0.6
# Phrases encoded, and items compared, at once.
BATCH = 256
# Other phrases that the rationale names.
RUNNERS_UP = 2
# Phrases that vote on a name, and how fast the weight of a vote falls with its cosine; items that one
# item borrows from, and how near they must be. Chosen on the validation split by categories that
# play hidden ones.
VOTERS, VOTE_SCALE = 60, 6.0
BORROW, BORROW_FROM = 10, 0.4
# Items compared with all others at once.
ROWS = 1024
# The list of what pictures show.
THINGS = "things.txt"
FUNCTION_WORDS = frozenset((
    "a", "an", "the", "of", "and", "or", "in", "on", "for", "to", "with", "by", "from", "at", "as",
    "into", "about", "against", "over",
))  # fmt: skip


class Naming(NamedTuple):
    """A name for an item, and why."""

    name: str
    rationale: str


class Namer(Protocol):
    """What puts items into words."""

    def name(
        self,
        vectors: np.ndarray,
        modalities: Sequence[str],
        texts: Sequence[str],
        view: PolicyView,
    ) -> list[Naming | None]:
        """A name for each of N items; None where it has none.

        Args:
            vectors: tangent vectors at the origin [N, D].
            modalities: channel of each vector: ``image``, ``text`` or ``ocr``.
            texts: what each item says, "" for a picture without text.
            view: the policy; a name must not restate an active node of it.
        """
        ...


@dataclass(frozen=True)
class Whitening:
    """Centre of some vectors, and the matrix that makes their spread alike in all directions.

    Args:
        mean: [D]. matrix: [D, D].
    """

    mean: np.ndarray
    matrix: np.ndarray

    @classmethod
    def fit(cls, vectors: np.ndarray) -> Whitening:
        """Of tangent vectors [n, D]; of fewer than two, or equal ones, only the centre is known."""
        x = torch.from_numpy(np.ascontiguousarray(vectors)).double()
        n, dim = x.shape
        mean = x.mean(0) if n else torch.zeros(dim, dtype=torch.double)
        centred = x - mean
        if n < 2 or not bool(centred.any()):
            return cls(mean.numpy(), np.eye(dim))
        values, axes = torch.linalg.eigh(shrunk_covariance(centred, SHRINKAGE))
        return cls(mean.numpy(), (axes / values.sqrt()).numpy())

    def directions(self, vectors: np.ndarray, *, mean: np.ndarray | None = None) -> np.ndarray:
        """Unit vectors [n, D] of vectors, seen from the centre; 0 where a vector is the centre.

        Args:
            mean: another centre, for vectors that are not of the kind fitted on.
        """
        seen = (np.asarray(vectors, np.float64) - (self.mean if mean is None else mean)) @ (
            self.matrix
        )
        norms = np.linalg.norm(seen, axis=1, keepdims=True)
        return np.divide(seen, norms, out=np.zeros_like(seen), where=norms > 0)


def agreement(nearness: np.ndarray, meanings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the phrases near to an item say best what the near phrases say together.

    Each of the nearest VOTERS has a vote that falls with its distance; a phrase's score is its mean
    similarity in meaning to them, weighted by their votes: the phrase of least expected loss
    (minimum Bayes risk, Kumar and Byrne 2004), were the item one of the things voted for.

    Args:
        nearness: cosine of the item with each phrase [P]; -inf for phrases that may not be named.
        meanings: unit vectors of the phrases' meanings [P, E].

    Returns:
        Places of the voters [k], best first, and their scores [k].
    """
    k = min(VOTERS, len(nearness))
    top = np.argpartition(-nearness, k - 1)[:k]
    top = top[np.argsort(-nearness[top], kind="stable")]
    top = top[np.isfinite(nearness[top])]
    if not len(top):
        return top, np.empty(0)
    votes = np.exp(VOTE_SCALE * (nearness[top] - nearness[top[0]]))
    scores = meanings[top] @ ((votes / votes.sum()) @ meanings[top])
    order = np.argsort(-scores, kind="stable")
    return top[order], scores[order]


def borrowed(units: np.ndarray) -> np.ndarray:
    """Unit vectors [n, D] of items, each moved towards its nearest among the others.

    The BORROW nearest with a cosine above BORROW_FROM count, by their cosine.
    """
    moved = np.empty_like(units)
    for start in range(0, len(units), ROWS):
        part = slice(start, start + ROWS)
        cosines = units[part] @ units.T
        rows = np.arange(len(cosines))
        cosines[rows, rows + start] = -1.0
        k = min(BORROW, cosines.shape[1])
        near = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        weights = np.take_along_axis(cosines, near, axis=1)
        weights = np.where(weights > BORROW_FROM, weights, 0.0)
        moved[part] = units[part] + np.einsum("nk,nkd->nd", weights, units[near])
    norms = np.linalg.norm(moved, axis=1, keepdims=True)
    return np.divide(moved, norms, out=np.zeros_like(moved), where=norms > 0)


class PhraseNamer:
    """Names an item by a phrase of a list: retrieval, the baseline of a trained namer.

    Args:
        encode: texts -> points of the items' space, as ``SafetyModel.encode_text``.
        phrases: names to choose from; by default the bundled lists, one for texts and one of what pictures show.
        reference: whitening of each channel, fitted on ordinary items of it. A channel without one
            is compared by geodesic distance.
        meaning: texts -> unit vectors of what they mean, as :func:`hysafe.guard.similarity.minilm_embed`:
            of a whitened channel the name is what the near phrases agree on, and items that are named
            together borrow from one another. Without it the nearest phrase is the name.

    Raises:
        ConfigError: there is no phrase.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Points],
        phrases: Sequence[str] | None = None,
        *,
        reference: Mapping[str, Whitening] | None = None,
        meaning: Callable[[Sequence[str]], Tensor] | None = None,
    ) -> None:
        self._encode, self._meaning = encode, meaning
        listed, shown = (
            (bundled_phrases(), bundled_phrases(THINGS)) if phrases is None else (phrases, ())
        )
        said = dict.fromkeys(" ".join(p.split()) for p in listed if p.strip())
        self.phrases = tuple(said | dict.fromkeys(shown))
        self._said = np.array([p in said for p in self.phrases], dtype=bool)
        self._shown = np.array([p in set(shown) for p in self.phrases], dtype=bool)
        if not self.phrases:
            raise ConfigError("the namer has no phrases. Give a list of short noun phrases.")
        self._reference = dict(reference or {})
        self._points: Points | None = None
        self._directions: dict[str, np.ndarray] = {}
        self._meanings: np.ndarray | None = None

    def name(
        self,
        vectors: np.ndarray,
        modalities: Sequence[str],
        texts: Sequence[str],
        view: PolicyView,
    ) -> list[Naming | None]:
        """As :meth:`Namer.name`; the texts play no part."""
        vectors = np.asarray(vectors, np.float64)
        new = ~restated(self.phrases, view)
        named: list[Naming | None] = [None] * len(vectors)
        finite = np.isfinite(vectors).all(1)
        for channel in dict.fromkeys(modalities):
            free = new & self._listed(channel)
            if not free.any():
                continue
            rows = np.flatnonzero(finite & np.array([m == channel for m in modalities]))
            if self._meaning is not None and channel in self._reference:
                self._agreed(vectors, rows, channel, free, named)
                continue
            for part in (rows[i : i + BATCH] for i in range(0, len(rows), BATCH)):
                nearness, unit = self._nearness(vectors[part], channel)
                nearness[:, ~free] = -np.inf
                best = np.argsort(-nearness, axis=1, kind="stable")[:, : 1 + RUNNERS_UP]
                for row, order, values in zip(part, best, nearness, strict=True):
                    named[row] = self._naming([k for k in order if free[k]], values, unit)
        return named

    def _listed(self, channel: str) -> np.ndarray:
        """Whether each phrase [P] may name items of a channel."""
        return self._shown if channel == "image" and self._shown.any() else self._said

    def _agreed(
        self, vectors: np.ndarray, rows: np.ndarray, channel: str, free: np.ndarray,
        named: list[Naming | None],
    ) -> None:  # fmt: skip
        """Name the items in `rows` by what the phrases near to them agree on."""
        assert self._meaning is not None
        if self._meanings is None:
            self._meanings = _double(self._meaning(self.phrases))
        phrases = self._phrase_directions(channel)
        units = borrowed(self._reference[channel].directions(vectors[rows]))
        for row, unit in zip(rows, units, strict=True):
            nearness = np.where(free, phrases @ unit, -np.inf)
            order, scores = agreement(nearness, self._meanings)
            first, *rest = order[: 1 + RUNNERS_UP]
            others = f"; then {', '.join(self.phrases[k] for k in rest)}" if rest else ""
            why = f"what {len(order)} near phrases agree on ({scores[0]:.2f}){others}"
            named[row] = Naming(self.phrases[first], why)

    def _naming(self, order: Sequence[int], nearness: np.ndarray, unit: str) -> Naming:
        first, *rest = order
        others = f"; then {', '.join(self.phrases[k] for k in rest)}" if rest else ""
        value = abs(nearness[first]) if unit == "distance" else nearness[first]
        why = f"nearest of {len(self.phrases):,} phrases ({unit} {value:.2f}){others}"
        return Naming(self.phrases[first], why)

    def _nearness(self, vectors: np.ndarray, channel: str) -> tuple[np.ndarray, str]:
        """Nearness [n, P] of vectors to all phrases, higher is nearer, and what it is."""
        phrases = self._phrase_points()
        whitening = self._reference.get(channel)
        if whitening is None:
            items = Points.from_tangent(torch.from_numpy(vectors), phrases.c, phrases.geometry)
            return -_double(items.dist(phrases)), "distance"
        return whitening.directions(vectors) @ self._phrase_directions(channel).T, "cosine"

    def _phrase_directions(self, channel: str) -> np.ndarray:
        """Unit vectors of the phrases [P, D], whitened as the channel is."""
        if channel not in self._directions:
            tangents = _double(self._phrase_points().tangent())
            self._directions[channel] = self._reference[channel].directions(
                tangents, mean=tangents[self._listed(channel)].mean(0)
            )
        return self._directions[channel]

    def _phrase_points(self) -> Points:
        if self._points is None:
            parts = [
                self._encode(self.phrases[i : i + BATCH])
                for i in range(0, len(self.phrases), BATCH)
            ]
            space = torch.cat([p.space for p in parts]).double()
            self._points = Points(space, parts[0].c, parts[0].geometry)
        return self._points


def bundled_phrases(name: str = "phrases.txt") -> tuple[str, ...]:
    """The phrases that come with the package.

    Args:
        name: of the list; :data:`THINGS` is what pictures show.

    Raises:
        ConfigError: the list is not there.
    """
    path = resources.files("hysafe.assets").joinpath(f"guard/{name}")
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the list of phrases hysafe/assets/guard/{name} cannot be read ({error}). "
            "Install hysafe again, or give phrases of your own."
        ) from error
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def restated(phrases: Sequence[str], view: PolicyView) -> np.ndarray:
    """Whether each phrase [P] says the name or a synonym of an active node in the same words."""
    taken = {
        _key(p)
        for node in view.taxonomy
        if view.active(node.id)
        for p in (node.name, *node.synonyms)
    }
    return np.array([_key(p) in taken for p in phrases], dtype=bool)


def _key(phrase: str) -> frozenset[str]:
    """What a phrase says, without order, case, plural and small words."""
    words = re.findall(r"[^\W_]+", phrase.casefold())
    plain = (w[:-1] if len(w) > 3 and w.endswith("s") and w[-2] != "s" else w for w in words)
    return frozenset(w for w in plain if w not in FUNCTION_WORDS)


def _double(values: Tensor) -> np.ndarray:
    return np.asarray(values.detach().cpu().double().numpy())
