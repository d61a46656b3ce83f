"""Curves: reliability in adaptive bins, risk against coverage and its area, ROC and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hysafe.errors import ShapeError

__all__ = [
    *("FPR_GRID", "Reliability", "RiskCoverage", "mean_roc", "reliability", "risk_coverage"),
    "roc",
]

BINS = 15
# False-positive rates at which ROC curves are averaged.
FPR_GRID = torch.linspace(0, 1, 101, dtype=torch.double)


class Reliability(NamedTuple):
    """Mean probability and share of true items by bin, [bins] each, and number of its items."""

    confidence: Tensor
    frequency: Tensor
    size: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of the two, weighed by size."""
        gap = (self.confidence - self.frequency).abs() * self.size
        return float(gap.sum() / self.size.sum().clamp_min(1))


def reliability(p: Tensor, truth: Tensor, *, bins: int = BINS) -> Reliability:
    """Reliability of probabilities in bins of equal count (adaptive bins); empty bins are left out.

    Args:
        p: [n] probabilities. truth: bool [n].

    Source: Nguyen and O'Connor 2015; the bins of
    :func:`hysafe.score.calibration.expected_calibration_error`.
    """
    _same("reliability", p, truth)
    order = torch.argsort(p)
    pairs = zip(
        p[order].double().tensor_split(bins), truth[order].double().tensor_split(bins), strict=True
    )
    rows = [(float(a.mean()), float(b.mean()), len(a)) for a, b in pairs if len(a)]
    columns = torch.tensor(rows, dtype=torch.double).reshape(-1, 3).T
    return Reliability(columns[0], columns[1], columns[2].long())


class RiskCoverage(NamedTuple):
    """Error rate on the k most confident items, for k = 1 .. n.

    coverage: [n], k / n, ascending. risk: [n].
    """

    coverage: Tensor
    risk: Tensor

    @property
    def area(self) -> float:
        """AURC: mean of the risk over all coverages; 0 is perfect."""
        return float(self.risk.mean())


def risk_coverage(confidence: Tensor, wrong: Tensor) -> RiskCoverage:
    """Selective risk: what is decided wrongly when the least confident items are left to a person.

    Items of one confidence cannot be told apart: each counts as wrong by the share of wrong ones
    among them, so that their order does not matter.

    Args:
        confidence: [n], higher is surer. wrong: bool [n], the decision on the item is wrong.

    Raises:
        ShapeError: shapes differ, there is no item, or a confidence is no number.

    Source: El-Yaniv and Wiener 2010; Geifman, Uziel and El-Yaniv 2019 (AURC).
    """
    _same("risk_coverage", confidence, wrong)
    values, inverse = torch.unique(confidence.double(), return_inverse=True)
    count = torch.bincount(inverse, minlength=len(values)).double()
    share = torch.bincount(inverse, wrong.double(), minlength=len(values)) / count
    errors = share.repeat_interleave(count.long()).flip(0).cumsum(0)  # surest first
    k = torch.arange(1, len(errors) + 1, dtype=torch.double)
    return RiskCoverage(k / len(errors), errors / k)


def roc(known: Tensor, novel: Tensor) -> tuple[Tensor, Tensor]:
    """Points of the ROC curve, from (0, 0) to (1, 1); novel (or risky) is positive.

    Args:
        known: scores [n] of negatives. novel: [m] of positives, higher = more novel.

    Returns:
        false-positive rates and true-positive rates, [u + 1] each for u distinct scores.
    """
    scores = torch.cat((known, novel)).double()
    if not len(known) or not len(novel) or bool(scores.isnan().any()):
        raise ShapeError(
            f"roc: {len(known)} known and {len(novel)} novel scores, wanted some of each and all of "
            "them numbers."
        )
    _, inverse = torch.unique(scores, return_inverse=True)
    size = int(inverse.max()) + 1
    rates = [
        torch.bincount(part, minlength=size).flip(0).cumsum(0).double() / len(part)
        for part in (inverse[: len(known)], inverse[len(known) :])
    ]
    zero = torch.zeros(1, dtype=torch.double)
    return torch.cat((zero, rates[0])), torch.cat((zero, rates[1]))


def mean_roc(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean true-positive rate of several pairs of samples (known, novel) at :data:`FPR_GRID`.

    Each curve is read between its points on the straight line, at a step from its top.

    Source: vertical averaging, Fawcett 2006.
    """
    return torch.stack([_at_grid(*roc(known, novel)) for known, novel in pairs]).mean(0)


def _at_grid(fpr: Tensor, tpr: Tensor) -> Tensor:
    # last point at or left of each rate: the top of a vertical step
    left = torch.searchsorted(fpr, FPR_GRID, right=True) - 1
    right = (left + 1).clamp_max(len(fpr) - 1)
    width = (fpr[right] - fpr[left]).clamp_min(torch.finfo(torch.double).tiny)
    share = ((FPR_GRID - fpr[left]) / width).clamp(0, 1)
    return tpr[left] + share * (tpr[right] - tpr[left])


def _same(name: str, scores: Tensor, truth: Tensor) -> None:
    if scores.ndim != 1 or scores.shape != truth.shape or not len(scores):
        raise ShapeError(
            f"{name}: got {tuple(scores.shape)} and {tuple(truth.shape)}, wanted two vectors of "
            "one length, at least 1."
        )
    if bool(scores.isnan().any()):
        raise ShapeError(f"{name}: a score is no number. Leave out what could not be judged.")
