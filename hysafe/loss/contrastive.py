"""Contrastive losses on negative geodesic distance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hysafe.geometry import Space

__all__ = ["contrastive", "prototype_cross_entropy", "prototype_retrieval"]


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


def prototype_retrieval(
    points: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    c: Tensor | float,
    scale: Tensor | float,
    *,
    space: Space,
) -> Tensor:
    """The other direction: every class finds its pictures among those of the batch.

    Without it a point near the origin is near to every text, and a text finds such points first,
    whatever they show.

    Args:
        points: [B, D]. prototypes: [N, D]. labels: [B] indices into prototypes.

    Returns:
        Scalar, >= 0: mean over the classes in the batch of -log of the share of the softmax over
        the batch that falls on their own pictures.

    Source: Khosla et al. 2020, "Supervised contrastive learning", with the sum inside the logarithm.
    """
    present = labels.unique()
    logits = -space.pairwise_dist(prototypes[present], points, c) * scale  # [P, B]
    own = labels[None, :] == present[:, None]
    inside = logits.masked_fill(~own, -torch.inf).logsumexp(-1)
    return (logits.logsumexp(-1) - inside).mean()
