"""From scores to a rating. Fails closed: what cannot be judged is ``review``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hysafe.score.leaves import LeafScores, NodeTable
from hysafe.taxonomy.policy import DEFAULT_THRESHOLD
from hysafe.types import Rating

__all__ = ["TriagePolicy", "weighted_risk"]


@dataclass(frozen=True)
class TriagePolicy:
    """When an item is unsafe, safe, or for a person to look at.

    Args:
        unsafe_from: weighted risk (see :func:`weighted_risk`) from which an item is unsafe.
        review_from: weighted risk from which it is looked at.
        novelty_level: conformal p-value of the distribution score below which an item is looked
            at: the stated share of ordinary items sent there by mistake.
    """

    unsafe_from: float = DEFAULT_THRESHOLD
    review_from: float = 0.3
    novelty_level: float = 0.01

    def rate(
        self, risk: float, node_over: bool, distribution_p: float | None
    ) -> tuple[Rating, str]:
        """Rating of one channel and the reason in words; a risk that is no number is reviewed."""
        if risk >= self.unsafe_from or node_over:
            return "unsafe", "risk above the threshold"
        if math.isnan(risk):
            return "review", "no score"
        if risk >= self.review_from:
            return "review", "risk near the threshold"
        if distribution_p is not None and not distribution_p > self.novelty_level:
            return "review", "unlike anything the model knows"
        return "safe", "no active risk near"


def weighted_risk(scores: LeafScores, table: NodeTable) -> tuple[Tensor, Tensor]:
    """Risk with every category weighed by its threshold, and nodes over their own threshold.

    With the default threshold everywhere the risk is p_unsafe; a category with threshold 0.25
    counts double, one with 0.9 counts little more than half.

    Returns:
        risk [B] in [0, 1]; over: bool [B], an active node reached a threshold of its own.
    """
    categories = table.leaves[table.risk]
    weight = DEFAULT_THRESHOLD / table.thresholds[categories]
    risk = (scores.nodes[:, categories] * weight).sum(-1).clamp(max=1)
    own = table.active & (table.thresholds != DEFAULT_THRESHOLD)
    over = ((scores.nodes >= table.thresholds) & own).any(-1)
    return risk, over if bool(own.any()) else torch.zeros_like(over)
