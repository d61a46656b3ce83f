"""Contrastive losses on negative geodesic distance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hysafe.geometry import Space

__all__ = ["contrastive", "prototype_cross_entropy"]


def contrastive(
    a: Tensor,
    b: Tensor,
    c: Tensor | float,
    scale: Tensor | float,
    *,
    space: Space,
    symmetric: bool = True,
) -> Tensor:
    """Symmetric InfoNCE C(A, B) on negative distance.

    Args:
        a, b: space components [B, D]; row i of each belong together.
        c: curvature magnitude, > 0.
        scale: inverse temperature.
        space: the geometry.
        symmetric: the mean of both directions; False: only a finds its b among all b.

    Returns:
        Scalar, >= 0.

    Source: Desai et al. 2023 (MERU), section 3; Radford et al. 2021 for the symmetric form.
    """
    logits = -space.pairwise_dist(a, b, c) * scale
    target = torch.arange(a.shape[0], device=a.device)
    forward = F.cross_entropy(logits, target)
    return (forward + F.cross_entropy(logits.T, target)) / 2 if symmetric else forward


def prototype_cross_entropy(
    points: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    c: Tensor | float,
    scale: Tensor | float,
    *,
    space: Space,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy over negative distances to one text point per class.

    InfoNCE with every class as a negative and no false negatives: the right form where many
    pictures share one text.

    Args:
        points: [B, D]. prototypes: [N, D]. labels: [B] indices into prototypes.
    """
    logits = -space.pairwise_dist(points, prototypes, c) * scale
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
