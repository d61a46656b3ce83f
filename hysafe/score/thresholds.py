"""Thresholds by target precision, recall or cost, and the shares they reach with their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from hysafe.errors import ConfigError, ShapeError

__all__ = ["Counts", "Rate", "Target", "choose_threshold", "count_at", "wilson_interval"]

Kind = Literal["precision", "recall", "cost"]

CONFIDENCE = 0.95
# Most digits of a threshold: beyond them a double has nothing more to say.
DIGITS = 16


@dataclass(frozen=True)
class Target:
    """What a threshold is chosen for.

    Args:
        kind: precision or recall: at least `value`, with as much of the other as can be had; cost:
            the least of `value` for every miss and `alarm` for every false alarm.
    """

    kind: Kind
    value: float
    alarm: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Target:
        """Target from ``precision=0.9``, ``recall=0.85`` or ``cost=5:1`` (miss : false alarm).

        Raises:
            ConfigError: anything else.
        """
        kind, _, value = text.partition("=")
        first, colon, second = value.partition(":")
        try:
            if kind not in get_args(Kind) or bool(colon) != (kind == "cost"):
                raise ValueError
            target = cls(cast(Kind, kind), float(first), float(second) if colon else 1.0)
        except ValueError as error:
            raise ConfigError(
                f"target {text!r}: wanted precision=0.9, recall=0.85 or cost=MISS:FALSE_ALARM, as "
                "in cost=5:1."
            ) from error
        top = math.inf if kind == "cost" else 1.0
        inside = 0 < target.value <= top and target.alarm > 0
        if not inside or math.isinf(target.value + target.alarm):
            raise ConfigError(
                f"target {text!r}: a share lies above 0 and at most at 1, a cost is above 0."
            )
        return target

    def __str__(self) -> str:
        if self.kind == "cost":
            return f"cost={self.value:g}:{self.alarm:g}"
        return f"{self.kind}={self.value:g}"


@dataclass(frozen=True)
class Rate:
    """A share: `hits` of `n`."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """The share; NaN of nothing."""
        return self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Its Wilson interval at 95 %; (0, 1) of nothing."""
        return wilson_interval(self.hits, self.n)


@dataclass(frozen=True)
class Counts:
    """Items by what was said and what is true.

    Args:
        found: called and true. alarms: called and not true. missed: true and not called.
        passed: neither.
    """

    found: int
    alarms: int
    missed: int
    passed: int

    @property
    def precision(self) -> Rate:
        """Share of true ones among those called."""
        return Rate(self.found, self.found + self.alarms)

    @property
    def recall(self) -> Rate:
        """Share of those called among the true ones."""
        return Rate(self.found, self.found + self.missed)

    def cost(self, target: Target) -> float:
        """What misses and false alarms cost under a target."""
        return target.value * self.missed + target.alarm * self.alarms


def wilson_interval(hits: int, n: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    r"""Interval of a binomial share, [0, 1] where n = 0.

    .. math:: \frac{\hat p + z^2/2n \pm z\sqrt{\hat p(1-\hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Source: Wilson 1927.
    """
    if not 0 <= hits <= n:
        raise ShapeError(f"wilson_interval: {hits} of {n}, wanted 0 <= hits <= n.")
    if n == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = hits / n
    middle = share + z2 / (2 * n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    # exact at the ends, where rounding would leave 1e-17
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


def choose_threshold(scores: Tensor, truth: Tensor, target: Target) -> float | None:
    """The threshold that reaches a target on these items: an item is called from it on.

    Precision takes the lowest threshold that has it, recall the highest; of equal costs the lowest
    threshold wins, so that in doubt more is called. It lies between two scores, in few digits.

    Args:
        scores: [n] in [0, 1]. truth: bool [n].

    Returns:
        A number in (0, 1]; None where no threshold reaches the target, or nothing is true.

    Raises:
        ShapeError: shapes differ, or a score lies outside [0, 1].
    """
    _check(scores, truth)
    total = int(truth.sum())
    if not total:
        return None
    values, inverse = torch.unique(scores.double(), return_inverse=True)
    true = torch.bincount(inverse, truth.double(), minlength=len(values)).flip(0).cumsum(0)
    called = torch.bincount(inverse, minlength=len(values)).flip(0).cumsum(0).double()
    values = values.flip(0)  # [u], descending; true and called count from each of them on
    at = _best(true, called - true, total, target)
    if at is None:
        return None
    if at < 0:  # nothing is called
        return _between(float(values[0]), 1.0) if float(values[0]) < 1 else None
    if float(values[at]) <= 0:  # a threshold is above 0
        return None
    lower = float(values[at + 1]) if at + 1 < len(values) else 0.0
    return _between(lower, float(values[at]))


def _best(true: Tensor, alarms: Tensor, total: int, target: Target) -> int | None:
    """Place among descending scores down to which items are called; -1 for none of them."""
    if target.kind == "cost":
        cost = target.value * (total - true) + target.alarm * alarms
        at = len(cost) - 1 - int(cost.flip(0).argmin())
        return -1 if target.value * total < float(cost[at]) else at
    if target.kind == "recall":
        reached = true >= target.value * total - _slack(total)
        return int(reached.int().argmax()) if bool(reached.any()) else None
    reached = true >= target.value * (true + alarms) - _slack(true + alarms)
    places = reached.nonzero()[:, 0]
    return int(places[-1]) if len(places) else None


def _slack(count: Tensor | int) -> Tensor | float:
    """Rounding of a share times a count: 0.9 of 10 are 9."""
    return torch.finfo(torch.double).eps * 4 * count


def _between(lower: float, upper: float) -> float:
    """A short decimal between two scores, near the middle."""
    middle = lower + (upper - lower) / 2
    for digits in range(2, DIGITS):
        short = round(middle, digits)
        if lower < short < upper:
            return short
    return upper


def count_at(scores: Tensor, truth: Tensor, threshold: float) -> Counts:
    """Counts where items are called from a threshold on. scores [n], truth bool [n]."""
    _check(scores, truth)
    called, true = scores.double() >= threshold, truth.bool()
    return Counts(
        int((called & true).sum()),
        int((called & ~true).sum()),
        int((~called & true).sum()),
        int((~called & ~true).sum()),
    )


def _check(scores: Tensor, truth: Tensor) -> None:
    inside = (scores >= 0) & (scores <= 1)  # a score that is no number is outside
    if scores.ndim != 1 or scores.shape != truth.shape or not bool(inside.all()):
        raise ShapeError(
            f"thresholds: got scores {tuple(scores.shape)} and truth {tuple(truth.shape)}, wanted "
            "two vectors of one length, scores in [0, 1] and all of them numbers."
        )
