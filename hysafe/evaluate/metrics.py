"""How well a novelty score tells novel items from in-distribution ones. Novel is the positive class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from hysafe.errors import ShapeError

__all__ = ["RECALL", "Detection", "detection", "false_positive_rate", "mean_detection"]

# FPR is read where this share of the novel items is found.
RECALL = 0.95


class Detection(NamedTuple):
    """Figures of one score on one pair of samples.

    auroc, aupr: areas, novel = positive; aupr depends on the share of novel items.
    fpr: share of in-distribution items called novel where 95 % of the novel ones are found.
    """

    auroc: float
    aupr: float
    fpr: float


def detection(known: Tensor, novel: Tensor) -> Detection:
    """Figures of the scores of in-distribution items [n] and novel items [m], higher = more novel.

    Raises:
        ShapeError: one side is empty or holds a score that is no number.
    """
    scores = torch.cat((known, novel)).double()
    if not len(known) or not len(novel) or bool(scores.isnan().any()):
        raise ShapeError(
            f"detection: {len(known)} known and {len(novel)} novel scores, wanted some of each and "
            "all of them numbers."
        )
    truth = torch.cat((torch.zeros(len(known)), torch.ones(len(novel)))).long()
    # ranks instead of scores: torchmetrics squeezes scores outside [0, 1] through a sigmoid, where
    # large ones become equal
    ranks = scores.unique(return_inverse=True)[1].double()
    ranks = ranks / max(1.0, float(ranks.max()))
    return Detection(
        float(binary_auroc(ranks, truth)),
        float(binary_average_precision(ranks, truth)),
        false_positive_rate(known, novel),
    )


def false_positive_rate(known: Tensor, novel: Tensor, recall: float = RECALL) -> float:
    """Share of `known` scores at or above the largest threshold that finds `recall` of `novel`."""
    found = -(-round(recall * 1e9) * len(novel) // 10**9)  # ceil, in integers
    threshold = novel.double().sort(descending=True).values[max(1, found) - 1]
    return float((known.double() >= threshold).double().mean())


def mean_detection(values: list[Detection]) -> Detection:
    """Mean of each figure."""
    return Detection(*(sum(v) / len(v) for v in zip(*values, strict=True)))
