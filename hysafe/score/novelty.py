"""Novelty scorers behind one contract: fit on in-distribution items, score, higher is more novel.

A scorer sees :class:`Encoded` items: points on the hyperboloid, and, where they are at hand, scaled
cone margins to the active leaves and the tower's features before the head. What it says is a rank,
not a probability; :mod:`hysafe.score.conformal` turns it into a p-value.

Distances are geodesic and exact. Gaussian scorers work on tangent vectors at the origin (or on the
features), with a shrunk covariance.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from hysafe.errors import ConfigError, ModelError, ShapeError
from hysafe.geometry import Points, lorentz

__all__ = [
    "SCORERS",
    "ClassCones",
    "CombinedScorer",
    "ConeEnergy",
    "ConeMargin",
    "DiscriminantClasses",
    "DiscriminantKNN",
    "Encoded",
    "Layer",
    "LorentzKNN",
    "Mahalanobis",
    "NoveltyScorer",
    "Radius",
    "RelativeMahalanobis",
    "StandIns",
    "class_folds",
    "class_means",
    "describe",
    "load_scorer",
    "save_scorer",
    "shrunk_covariance",
    "stand_in_scores",
]

Layer = Literal["points", "features"]

# Pairs of a chunk of neighbours: 32 MiB of doubles for the distances.
CHUNK_PAIRS = 1 << 22
# So many neighbours more are measured than asked for, should the inner product err in their order.
TIES = 4
# Covariances are inverted with at least this share of their mean eigenvalue on the diagonal.
LEAST_SHRINKAGE = 1e-4
# Directions along fewer than two discriminants say nothing.
LEAST_CLASSES = 3
# Weight decay of the combination, per part, on standardised scores: parts that agree share weight.
COMBINATION_DECAY = 1e-2
# A standardised score beyond this says no more: one part must not shout the others down.
COMBINATION_CLIP = 8.0


@dataclass(frozen=True)
class Encoded:
    """A batch as scorers see it.

    Args:
        points: [B, D].
        margins: scaled cone margins to the active leaves [B, L] (margin / temperature, in the
            units of logits), or None.
        features: of the tower, before the head, [B, E], or None.
    """

    points: Points
    margins: Tensor | None = None
    features: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in (("margins", self.margins), ("features", self.features)):
            if value is not None and (value.ndim != 2 or len(value) != len(self.points)):
                raise ShapeError(
                    f"Encoded.{name} expected [{len(self.points)}, ...] like the points, got "
                    f"{tuple(value.shape)}. Encode the same items."
                )

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: slice | Tensor) -> Encoded:
        return Encoded(
            self.points[index],
            None if self.margins is None else self.margins[index],
            None if self.features is None else self.features[index],
        )

    def vectors(self, layer: Layer) -> Tensor:
        """Rows for Gaussian scorers: tangent vectors at the origin, or features; double."""
        if layer == "points":
            return self.points.tangent().double()
        if self.features is None:
            raise ShapeError("the scorer needs the tower's features. Give Encoded(features=...).")
        return self.features.double()


class StandIns(NamedTuple):
    """Validation items of one fold.

    scores: [n, P], of each of P scorers. novel: bool [n], of a class that was left out.
    """

    scores: Tensor
    novel: Tensor


class NoveltyScorer(ABC):
    """Fit on in-distribution items, score others: higher is more novel.

    Subclasses are dataclasses: their init fields are settings, written beside the state.
    """

    name: ClassVar[str]
    #: whether fit needs the class of each item
    needs_labels: ClassVar[bool] = False

    def fit(self, items: Encoded, labels: Tensor | None = None) -> NoveltyScorer:
        """Learn what is ordinary.

        Args:
            items: in-distribution. labels: class of each item, any integers [B].

        Returns:
            The scorer itself.

        Raises:
            ShapeError: no items, or the labels are missing or of another length.
        """
        if not len(items):
            raise ShapeError(f"{self.name}: nothing to fit on. Give in-distribution items.")
        if labels is not None and labels.shape != (len(items),):
            raise ShapeError(
                f"{self.name}: {len(items)} items with labels {tuple(labels.shape)}; wanted one each."
            )
        if self.needs_labels and labels is None:
            raise ShapeError(f"{self.name} compares classes. Give labels [B] to fit.")
        self._fit(items, labels)
        return self

    def score(self, items: Encoded) -> Tensor:
        """Novelty [B] of items, double.

        Raises:
            ModelError: not fitted. ShapeError: the items lack what the scorer looks at.
        """
        return self._score(items).double()

    @abstractmethod
    def _fit(self, items: Encoded, labels: Tensor | None) -> None: ...

    @abstractmethod
    def _score(self, items: Encoded) -> Tensor: ...

    def settings(self) -> dict[str, Any]:
        """The init arguments, plain data."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]

    def state(self) -> dict[str, Tensor]:
        """What was learned; {} for scorers without memory."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what :meth:`state` gave."""
        if state:
            raise ModelError(f"{self.name} keeps nothing, but was given {', '.join(state)}.")

    def _learned(self, value: Any) -> Any:
        if value is None:
            raise ModelError(f"{self.name} was not fitted. Call fit(in-distribution items) first.")
        return value


# ---------------------------------------------------------------- cones and radius: nothing to fit


@dataclass
class ConeMargin(NoveltyScorer):
    """How far outside the best active cone: minus the largest scaled margin."""

    name: ClassVar[str] = "cone margin"

    def _fit(self, items: Encoded, labels: Tensor | None) -> None:
        _margins(items, self.name)

    def _score(self, items: Encoded) -> Tensor:
        return -_margins(items, self.name).amax(-1)


@dataclass
class ConeEnergy(NoveltyScorer):
    """Free energy over all active cones, -logsumexp of the scaled margins.

    Source: Liu et al. 2020, with cone margins for logits.
    """

    name: ClassVar[str] = "cone energy"

    def _fit(self, items: Encoded, labels: Tensor | None) -> None:
        _margins(items, self.name)

    def _score(self, items: Encoded) -> Tensor:
        return -_margins(items, self.name).double().logsumexp(-1)


@dataclass
class Radius(NoveltyScorer):
    """Nearness to the origin: minus the geodesic radius.

    What is general or unclear lies near the origin, what is specific far out (Desai et al. 2023).
    """

    name: ClassVar[str] = "radius"

    def _fit(self, items: Encoded, labels: Tensor | None) -> None:
        pass

    def _score(self, items: Encoded) -> Tensor:
        return -items.points.radius()


# ---------------------------------------------------------------- distances to what was seen


@dataclass
class LorentzKNN(NoveltyScorer):
    """Geodesic distance to the k-th nearest in-distribution item; exact.

    Args:
        k: neighbours; at most as many as there are items.
        layer: ``points``: the items' points. ``features``: the features are put on the hyperboloid
            first, their directions at radius 1.
        whiten: features or tangent vectors are first centred and divided by the covariance within
            classes (needs labels), so that directions in which one class varies count less. Their
            directions are then compared.
        shrinkage: of that covariance towards a multiple of the identity; None estimates it.
    """

    name: ClassVar[str] = "Lorentz k-NN"
    k: int = 10
    layer: Layer = "points"
    whiten: bool = False
    shrinkage: float | None = None
    _bank: Tensor | None = field(default=None, init=False, repr=False)
    _map: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"{self.name}: k={self.k}; wanted at least 1.")
        _check_layer(self.layer)

    def _fit(self, items: Encoded, labels: Tensor | None) -> None:
        if self.whiten:
            if labels is None:
                raise ShapeError(f"{self.name}: whitening is within classes. Give labels to fit.")
            x = items.vectors(self.layer)
            means, index = class_means(x, labels)
            # rows times the factor of the precision: identity covariance within classes
            self._map = (x.mean(0), _precision_factor(x - means[index], self.shrinkage))
        self._bank = self._lifted(items).space

    def _lifted(self, items: Encoded) -> Points:
        if self.layer == "points" and not self.whiten:
            return items.points
        x = items.vectors(self.layer)
        if self._map is not None:
            x = (x - self._map[0]) @ self._map[1]
        unit = F.normalize(x, dim=-1).float()
        return Points.from_tangent(unit, items.points.c, items.points.geometry)

    def _score(self, items: Encoded) -> Tensor:
        bank = self._learned(self._bank)
        points = self._lifted(items)
        known = Points(bank, points.c, points.geometry)
        return _in_chunks(points, known, min(self.k, len(bank)))[0][:, -1]

    def state(self) -> dict[str, Tensor]:
        state = {"bank": self._learned(self._bank)}
        if self._map is not None:
            state["centre"], state["factor"] = self._map
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._bank = state["bank"]
        self._map = (state["centre"], state["factor"]) if "centre" in state else None


@dataclass
class _Discriminant(NoveltyScorer):
    """Directions along the discriminants of the classes, at radius 1 of the hyperboloid."""

    needs_labels: ClassVar[bool] = True
    layer: Layer = "features"
    share: float = 0.7
    shrinkage: float | None = None
    _centre: Tensor | None = field(default=None, init=False, repr=False)
    _factor: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_layer(self.layer)
        if not 0 < self.share <= 1:
            raise ConfigError(f"{self.name}: share {self.share}; wanted above 0, at most 1.")

    def _learn(self, items: Encoded, labels: Tensor) -> Tensor:
        """Learn centre and discriminants; returns the position of each item's class [B]."""
        x = items.vectors(self.layer)
        means, index = class_means(x, labels)
        if len(means) < LEAST_CLASSES:
            raise ShapeError(
                f"{self.name}: {len(means)} classes have {len(means) - 1} discriminants, and directions "
                f"along fewer than two say nothing. Give at least {LEAST_CLASSES} classes."
            )
        self._centre = x.mean(0)
        whiten = _precision_factor(x - means[index], self.shrinkage)
        basis = torch.linalg.svd((means - self._centre) @ whiten, full_matrices=False).Vh
        kept = max(2, round(self.share * min(len(means) - 1, x.shape[1])))
        self._factor = (whiten @ basis[:kept].T).contiguous()
        return index

    def _directions(self, items: Encoded) -> Tensor:
        """Unit rows [B, K]."""
        centre, factor = self._learned(self._centre), self._learned(self._factor)
        return F.normalize((items.vectors(self.layer) - centre) @ factor, dim=-1)

    def _placed(self, directions: Tensor, items: Encoded) -> Points:
        return Points.from_tangent(directions.float(), items.points.c, items.points.geometry)

    def state(self) -> dict[str, Tensor]:
        return {"centre": self._learned(self._centre), "factor": self._learned(self._factor)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._centre, self._factor = state["centre"], state["factor"]


@dataclass
class DiscriminantKNN(_Discriminant):
    r"""Mean geodesic distance to the k nearest in-distribution items, less what is usual there.

    Items are whitened within classes and kept along the leading discriminants of the classes: what
    does not tell known classes apart is noise to them. Their directions lie at radius 1.

    .. math:: \frac{1}{k} \sum_{n \in N_k(x)} \bigl(d(x, n) - \lambda\, r(n)\bigr)

    with r(n) the mean distance of n to its own k nearest: dense and sparse classes are judged alike.

    Args:
        layer: ``points`` (tangent vectors at the origin) or ``features``.
        share: of the discriminants (one fewer than classes, at most D), leading ones first.
        shrinkage: of the covariance within classes; None estimates it.
        k: neighbours; at most one fewer than there are items.
        local: lambda.

    Source: discriminants Rao 1948; the local level as a difference, after Breunig et al. 2000 (LOF).
    """

    name: ClassVar[str] = "discriminant k-NN"
    k: int = 10
    local: float = 0.5
    _bank: Tensor | None = field(default=None, init=False, repr=False)
    _usual: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1 or self.local < 0:
            raise ConfigError(
                f"{self.name}: k={self.k}, local={self.local}; wanted k >= 1, local >= 0."
            )

    def _fit(self, items: Encoded, labels: Tensor | None) -> None:
        assert labels is not None
        if len(items) < 2:
            raise ShapeError(f"{self.name}: one item has no neighbours. Give more items to fit.")
        self._learn(items, labels)
        self._bank = self._directions(items).float()
        bank = self._placed(self._bank, items)
        # the nearest of each is itself
        self._usual = _in_chunks(bank, bank, min(self.k + 1, len(bank)))[0][:, 1:].mean(-1)

    def _score(self, items: Encoded) -> Tensor:
        points = self._placed(self._directions(items), items)
        known = self._placed(self._learned(self._bank), items)
        distances, index = _in_chunks(points, known, min(self.k, len(known) - 1))
        return (distances - self.local * self._learned(self._usual)[index]).mean(-1)

    def state(self) -> dict[str, Tensor]:
        return {
            **super().state(),
            "bank": self._learned(self._bank),
            "usual": self._learned(self._usual),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self._bank, self._usual = state["bank"], state["usual"]


@dataclass
class DiscriminantClasses(_Discriminant):
    """How unsure the nearest class is: minus the greatest softmax share of the classes by distance.

    Items as in :class:`DiscriminantKNN`; of each class the direction of its mean is kept.

    Args:
        layer, share, shrinkage: as in :class:`DiscriminantKNN`.
        temperature: distances are divided by it.

    Source: Hendrycks and Gimpel 2017, with distances to class means for logits.
    """

    name: ClassVar[str] = "discriminant classes"
    temperature: float = 0.1
    _means: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ConfigError(f"{self.name}: temperature {self.temperature} > 0 wanted.")

    def _fit(self, items: Encoded, labels: Tensor | None) -> None:
        assert labels is not None
        index = self._learn(items, labels)
        means, _ = class_means(self._directions(items), index)
        self._means = F.normalize(means, dim=-1).float()

    def _score(self, items: Encoded) -> Tensor:
        points = self._placed(self._directions(items), items)
        means = self._placed(self._learned(self._means), items)
        logits = -points.dist(means).double() / self.temperature
        return -logits.softmax(-1).amax(-1)

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "means": self._learned(self._means)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self._means = state["means"]


@dataclass
class Mahalanobis(NoveltyScorer):
    r"""Squared Mahalanobis distance to the nearest class mean, one shrunk covariance for all.

    .. math:: \min_k (v - \mu_k)^\top \Sigma^{-1} (v - \mu_k)

    Args:
        layer: ``points`` (tangent vectors at the origin) or ``features``.
        shrinkage: of the covariance; None estimates it (Ledoit and Wolf 2004).

    Source: Lee et al. 2018.
    """

    name: ClassVar[str] = "Mahalanobis"
    needs_labels: ClassVar[bool] = True
    layer: Layer = "points"
    shrinkage: float | None = None
    _means: Tensor | None = field(default=None, init=False, repr=False)
    _factor: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_layer(self.layer)

    def _fit(self, items: Encoded, labels: Tensor | None) -> None:
        assert labels is not None
        x = items.vectors(self.layer)
        self._means, index = class_means(x, labels)
        self._factor = _precision_factor(x - self._means[index], self.shrinkage)

    def _score(self, items: Encoded) -> Tensor:
        return self._distances(items).amin(-1)

    def _distances(self, items: Encoded) -> Tensor:
        """Squared distances to every class [B, C]."""
        factor = self._learned(self._factor)
        return _squared(items.vectors(self.layer) @ factor, self._learned(self._means) @ factor)

    def state(self) -> dict[str, Tensor]:
        return {"means": self._learned(self._means), "factor": self._learned(self._factor)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._means, self._factor = state["means"], state["factor"]


@dataclass
class RelativeMahalanobis(Mahalanobis):
    r"""Mahalanobis distance to the nearest class less the one to the data as a whole.

    .. math:: \min_k d_k^2(v) - d_0^2(v)

    where d_0 takes mean and covariance of all items together: what is unusual for every class alike
    does not count.

    Source: Ren et al. 2021.
    """

    name: ClassVar[str] = "relative Mahalanobis"
    _background: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def _fit(self, items: Encoded, labels: Tensor | None) -> None:
        super()._fit(items, labels)
        x = items.vectors(self.layer)
        mean = x.mean(0, keepdim=True)
        self._background = (mean, _precision_factor(x - mean, self.shrinkage))

    def _score(self, items: Encoded) -> Tensor:
        mean, factor = self._learned(self._background)
        whole = _squared(items.vectors(self.layer) @ factor, mean @ factor)[:, 0]
        return super()._score(items) - whole

    def state(self) -> dict[str, Tensor]:
        mean, factor = self._learned(self._background)
        return {**super().state(), "mean": mean, "background": factor}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self._background = (state["mean"], state["background"])


@dataclass
class ClassCones(NoveltyScorer):
    """Energy over one cone a class, fitted to the data, where classes are no nodes of the taxonomy.

    The apex of a class lies on the ray of its mean tangent vector, at a share of the mean's radius;
    its novelty is the free energy of the scaled margins (or, with temperature 0, minus the largest).

    Args:
        share: of the mean's radius at which the apex lies.
        temperature: radians; margins are divided by it.
    """

    name: ClassVar[str] = "class cones"
    needs_labels: ClassVar[bool] = True
    share: float = 0.5
    temperature: float = 0.1
    _apexes: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.share > 0 or self.temperature < 0:
            raise ConfigError(f"{self.name}: share {self.share} > 0, temperature >= 0 wanted.")

    def _fit(self, items: Encoded, labels: Tensor | None) -> None:
        assert labels is not None
        means, _ = class_means(items.vectors("points"), labels)
        self._apexes = Points.from_tangent(
            self.share * means.to(items.points.space), items.points.c, items.points.geometry
        ).space

    def _score(self, items: Encoded) -> Tensor:
        points = items.points
        apexes = Points(self._learned(self._apexes), points.c, points.geometry)
        margins = points.margin(apexes).double()
        if self.temperature == 0:
            return -margins.amax(-1)
        return -(margins / self.temperature).logsumexp(-1)

    def state(self) -> dict[str, Tensor]:
        return {"apexes": self._learned(self._apexes)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._apexes = state["apexes"]


# ---------------------------------------------------------------- one of several


@dataclass
class CombinedScorer(NoveltyScorer):
    """A weighted sum of standardised scores, its weights learned from stand-ins for novelty.

    The stand-ins are classes of the training data: each fold leaves some classes out, fits the parts
    on the rest, and asks which validation items belong to the left-out ones
    (:func:`stand_in_scores`, then :meth:`learn_weights`, then :meth:`fit`). Weights are at least 0,
    so more novelty in a part is never less in the whole. True outliers are never looked at.

    Args:
        parts: the scorers that are combined.
        decay: weight decay of the logistic regression.
    """

    name: ClassVar[str] = "combined"
    needs_labels: ClassVar[bool] = True
    parts: Sequence[NoveltyScorer] = ()
    decay: float = COMBINATION_DECAY
    _weights: Tensor | None = field(default=None, init=False, repr=False)
    _scale: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("combined: no parts. Give at least one scorer.")

    def learn_weights(self, stand_ins: Sequence[StandIns]) -> CombinedScorer:
        """Learn weights and standardisation; :meth:`fit` then fits the parts on all items.

        Args:
            stand_ins: of :func:`stand_in_scores` with the same parts, one a fold.

        Returns:
            The scorer itself.
        """
        usable = [s for s in stand_ins if bool(s.novel.any()) and not bool(s.novel.all())]
        if not usable or usable[0].scores.shape[1] != len(self.parts):
            raise ShapeError(
                f"combined: no fold of {len(stand_ins)} has known and left-out validation items with "
                f"a score of each of the {len(self.parts)} parts. Give more classes or folds."
            )
        scales = [_centre_scale(s.scores[~s.novel]) for s in usable]
        rows = [_standardise(s.scores, scale) for s, scale in zip(usable, scales, strict=True)]
        novel = torch.cat([s.novel for s in usable])
        self._weights = _nonnegative_logistic(torch.cat(rows), novel, self.decay)
        centres, spreads = zip(*scales, strict=True)
        self._scale = (torch.stack(centres).mean(0), torch.stack(spreads).mean(0))
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each part on standardised scores, by name and settings."""
        values = self._learned(self._weights).tolist()
        return {describe(p): w for p, w in zip(self.parts, values, strict=True)}

    def _fit(self, items: Encoded, labels: Tensor | None) -> None:
        """Fit the parts; equal weights, on the items' own scores, where none were learned."""
        for part in self.parts:
            part.fit(items, labels)
        if self._weights is None:
            self._weights = torch.full((len(self.parts),), 1 / len(self.parts)).double()
            self._scale = _centre_scale(self._part_scores(items))

    def _part_scores(self, items: Encoded) -> Tensor:
        return torch.stack([p.score(items) for p in self.parts], -1)

    def _score(self, items: Encoded) -> Tensor:
        scale = self._learned(self._scale)
        return _standardise(self._part_scores(items), scale) @ self._learned(self._weights)

    def settings(self) -> dict[str, Any]:
        parts = [{"scorer": p.name, "settings": p.settings()} for p in self.parts]
        return {"parts": parts, "decay": self.decay}

    def state(self) -> dict[str, Tensor]:
        centre, scale = self._learned(self._scale)
        state = {"weights": self._learned(self._weights), "centre": centre, "scale": scale}
        for i, part in enumerate(self.parts):
            state.update({f"{i}.{key}": value for key, value in part.state().items()})
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._weights, self._scale = state["weights"], (state["centre"], state["scale"])
        for i, part in enumerate(self.parts):
            mark = f"{i}."
            part.load_state(
                {k.removeprefix(mark): v for k, v in state.items() if k.startswith(mark)}
            )


#: scorers by name
SCORERS: Mapping[str, type[NoveltyScorer]] = {
    kind.name: kind
    for kind in (
        ConeMargin, ConeEnergy, Radius, LorentzKNN, DiscriminantKNN, DiscriminantClasses, Mahalanobis,
        RelativeMahalanobis, ClassCones, CombinedScorer,
    )
}  # fmt: skip


def describe(scorer: NoveltyScorer) -> str:
    """Name and settings in one line: ``Lorentz k-NN (k=10, layer=features)``."""
    if isinstance(scorer, CombinedScorer):
        return f"combined of {len(scorer.parts)}"
    told = ", ".join(f"{k}={v}" for k, v in scorer.settings().items() if v is not None)
    return f"{scorer.name} ({told})" if told else scorer.name


def stand_in_scores(
    scorers: Sequence[NoveltyScorer],
    items: Encoded,
    labels: Tensor,
    validation: Encoded,
    validation_labels: Tensor,
    *,
    folds: Sequence[Tensor],
    without: Callable[[Tensor], tuple[Encoded, Encoded]] | None = None,
) -> list[StandIns]:
    """Scores of validation items where some of their classes are unknown, to choose settings by.

    Args:
        scorers: fitted anew for every fold; what they had learned is lost.
        items, labels: in-distribution items to fit on.
        validation, validation_labels: other in-distribution items of the same classes.
        folds: classes to leave out, one tensor a fold (:func:`class_folds`).
        without: classes -> items and validation items as they look with these classes' nodes
            switched off; None where nothing changes.

    Returns:
        One a fold in which both kinds occur.
    """
    out = []
    for left_out in folds:
        seen, held = (items, validation) if without is None else without(left_out)
        keep = ~torch.isin(labels, left_out)
        novel = torch.isin(validation_labels, left_out)
        if not bool(keep.any()) or not bool(novel.any()) or bool(novel.all()):
            continue
        known, classes = seen[keep], labels[keep]
        scores = torch.stack([s.fit(known, classes).score(held) for s in scorers], -1)
        out.append(StandIns(scores, novel))
    return out


def class_folds(labels: Tensor, folds: int, *, generator: torch.Generator) -> list[Tensor]:
    """The classes among `labels`, shuffled and dealt into `folds` tensors (fewer if there are
    fewer classes)."""
    classes = labels.unique()
    order = classes[torch.randperm(len(classes), generator=generator)]
    return [f for f in order.tensor_split(min(folds, len(classes))) if len(f)]


# ---------------------------------------------------------------- saving


def save_scorer(scorer: NoveltyScorer, path: str | Path) -> None:
    """Write a fitted scorer to a safetensors file; its settings are in the header."""
    header = {"scorer": scorer.name, "settings": json.dumps(scorer.settings(), sort_keys=True)}
    state = {k: v.detach().cpu().contiguous().clone() for k, v in scorer.state().items()}
    save_file(state, str(path), metadata=header)


def load_scorer(path: str | Path) -> NoveltyScorer:
    """Read a scorer written by :func:`save_scorer`.

    Raises:
        ModelError: no such file, or not the state of a scorer.
    """
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        scorer = _build(header["scorer"], json.loads(header["settings"]))
        scorer.load_state(state)
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{path}: not a saved novelty scorer ({type(error).__name__}: {error}). Fit it again and "
            "write it with save_scorer."
        ) from error
    return scorer


def _build(name: str, settings: Mapping[str, Any]) -> NoveltyScorer:
    options = dict(settings)
    if name == CombinedScorer.name:
        options["parts"] = [_build(p["scorer"], p["settings"]) for p in options["parts"]]
    return SCORERS[name](**options)


# ---------------------------------------------------------------- statistics


def shrunk_covariance(x: Tensor, shrinkage: float | None = None) -> Tensor:
    r"""Covariance of centred rows, shrunk towards a multiple of the identity.

    .. math:: (1 - \lambda) S + \lambda \frac{\mathrm{tr} S}{D} I

    Args:
        x: centred rows [n, D].
        shrinkage: in [0, 1]; None takes the estimate of Ledoit and Wolf.

    Returns:
        [D, D] double, positive definite unless x is 0 everywhere.

    Source: Ledoit and Wolf 2004, section 3.3.
    """
    x = x.double()
    n, d = x.shape
    s = x.T @ x / n
    mean = s.diagonal().mean()
    if shrinkage is None:
        # spread of the rows' own outer products around S, against the spread of S around its target
        noise = (x.square().T @ x.square()).sum() / n - s.square().sum()
        distance = s.square().sum() - d * mean.square()
        shrinkage = float((noise / n / distance).clamp(0, 1)) if float(distance) > 0 else 1.0
    if not 0 <= shrinkage <= 1:
        raise ConfigError(f"shrinkage {shrinkage}: wanted a share in [0, 1], or None.")
    shrinkage = max(shrinkage, LEAST_SHRINKAGE)
    return (1 - shrinkage) * s + shrinkage * mean * torch.eye(d, dtype=s.dtype, device=s.device)


def _precision_factor(centred: Tensor, shrinkage: float | None) -> Tensor:
    """L with L Lᵀ the inverse of the shrunk covariance: |rows @ L|² is the Mahalanobis form."""
    covariance = shrunk_covariance(centred, shrinkage)
    if not float(covariance.diagonal().amax()) > 0:
        raise ShapeError("covariance: all items of each class are equal. Give items that vary.")
    # row-major, as it is read back: the same layout gives the same bits
    return torch.linalg.cholesky(torch.linalg.inv(covariance)).contiguous()


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances [B, C] of rows in double."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def _nearest(points: Points, known: Points, k: int) -> tuple[Tensor, Tensor]:
    """Geodesic distances [B, k] to the k nearest of `known`, ascending, and which these are [B, k].

    Nearest by inner product (in double: wrong only where distances agree to 1e-7), then measured.
    """
    x, y = points.space.double(), known.space.double()
    if points.geometry == "lorentz":
        near = lorentz.pairwise_inner(x, y, points.c)  # -cosh(rd) / c
    else:
        near = x @ y.T - y.square().sum(-1) / 2
    index = near.topk(min(k + TIES, len(known))).indices  # [B, k + TIES]
    distances = points.functions.dist(x[:, None, :], y[index], points.c)
    found, order = distances.sort(-1)
    return found[:, :k], index.gather(1, order[:, :k])


def _in_chunks(points: Points, known: Points, k: int) -> tuple[Tensor, Tensor]:
    """:func:`_nearest`, so many points at a time that memory stays flat."""
    step = max(1, CHUNK_PAIRS // max(len(known), (k + TIES) * known.space.shape[1]))
    known = Points(known.space.double(), known.c, known.geometry)  # once
    parts = [_nearest(points[i : i + step], known, k) for i in range(0, len(points), step)]
    if not parts:
        return points.space.new_empty((0, k)).double(), torch.empty((0, k), dtype=torch.long)
    return torch.cat([d for d, _ in parts]), torch.cat([i for _, i in parts])


def class_means(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Means [C, D] of the classes present, and each row's position among them [B]."""
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(classes), x.shape[1], dtype=x.dtype, device=x.device)
    return total.index_add_(0, index, x) / counts[:, None], index


def _margins(items: Encoded, name: str) -> Tensor:
    if items.margins is None or not items.margins.shape[1]:
        raise ShapeError(f"{name} needs margins to at least one node. Give Encoded(margins=...).")
    return items.margins


def _check_layer(layer: str) -> None:
    if layer not in ("points", "features"):
        raise ConfigError(f"layer {layer!r}: points or features.")


def _centre_scale(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Median and half the central 68 % of each column: outliers do not move them."""
    low, middle, high = torch.quantile(
        scores, torch.tensor([0.16, 0.5, 0.84], dtype=scores.dtype), dim=0
    )
    spread = (high - low) / 2
    return middle, torch.where(spread > 0, spread, torch.ones_like(spread))


def _standardise(scores: Tensor, centre_scale: tuple[Tensor, Tensor]) -> Tensor:
    centre, scale = centre_scale
    return ((scores - centre) / scale).clamp(-COMBINATION_CLIP, COMBINATION_CLIP)


def _nonnegative_logistic(x: Tensor, novel: Tensor, decay: float) -> Tensor:
    """Weights >= 0 of a logistic regression with both sides weighed alike."""
    weights = torch.full((x.shape[1],), 0.1, dtype=torch.double)
    raw = weights.sqrt().requires_grad_()
    offset = torch.zeros((), dtype=torch.double, requires_grad=True)
    target = novel.double()
    share = target.mean()
    balance = torch.where(novel, 0.5 / share, 0.5 / (1 - share))
    optimizer = torch.optim.LBFGS([raw, offset], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        w = raw.square()
        loss = F.binary_cross_entropy_with_logits(x @ w + offset, target, balance)
        loss = loss + decay * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return raw.detach().square()
