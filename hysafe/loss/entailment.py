"""Entailment losses: who must lie in whose cone."""

from __future__ import annotations

import torch
from torch import Tensor

from hysafe.geometry import Space

__all__ = ["cone_negatives", "entailment"]

# Ganea et al. 2018: margin of the negatives.
GAMMA = 0.01


def entailment(
    parent: Tensor, child: Tensor, c: Tensor | float, *, space: Space, eta: float = 1.0
) -> Tensor:
    """E_eta(parent, child): mean of max(0, phi(parent, child) - eta * omega(parent)).

    Args:
        parent, child: space components [B, D], row by row "parent entails child".
        c: curvature magnitude, > 0.
        space: the geometry.
        eta: aperture factor (HyCoCLIP: 0.7 across modalities, 1.2 within).

    Returns:
        Scalar in radians, 0 when every child is inside.

    Source: Le et al. 2019, eq. 5; Desai et al. 2023, eq. 11; Pal et al. 2025 for eta.
    """
    angle = space.exterior_angle(parent, child, c)
    return torch.relu(angle - eta * space.half_aperture(parent, c)).mean()


def cone_negatives(
    parent: Tensor, child: Tensor, c: Tensor | float, *, space: Space, gamma: float = GAMMA
) -> Tensor:
    """Mean of max(0, gamma - energy): pushes `child` out of the cone of `parent`.

    Written on the margin (gamma + margin where inside), so that a child deep inside still gets a
    gradient; the energy alone is flat there.

    Source: Ganea et al. 2018, eq. 32, second term.
    """
    angle = space.exterior_angle(parent, child, c)
    return torch.relu(gamma + space.half_aperture(parent, c) - angle).mean()
