"""Flat space with the same functions as the Lorentz model: the control of every experiment.

Cones are the Euclidean entailment cones of Ganea et al. 2018: half-aperture asin(2K/|x|),
exterior angle between x and y - x. `c` is taken and ignored, so that code stays the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hysafe.geometry.lorentz import check_pair
from hysafe.geometry.numerics import in_working_precision, safe_norm

__all__ = [
    "dist",
    "dist0",
    "exp_map0",
    "exterior_angle",
    "half_aperture",
    "log_map0",
    "pairwise_dist",
    "pairwise_exterior_angle",
    "pairwise_margin",
]


def exp_map0(v: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Identity: a flat space is its own tangent space."""
    return v


def log_map0(x: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Identity."""
    return x


@in_working_precision
def dist(x: Tensor, y: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Euclidean distance [..., D] x [..., D] -> [...], gradient 0 where x equals y."""
    return safe_norm(x - y)


@in_working_precision
def pairwise_dist(x: Tensor, y: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Euclidean distance of all pairs, [B1, D] x [B2, D] -> [B1, B2]."""
    check_pair(x, y)
    square = x.square().sum(-1)[:, None] + y.square().sum(-1)[None, :] - 2 * (x @ y.T)
    floor = torch.finfo(x.dtype).eps
    return torch.where(square > floor, square, torch.full_like(square, floor)).sqrt()


@in_working_precision
def dist0(x: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Norm: distance to the origin."""
    return safe_norm(x)


@in_working_precision
def half_aperture(x: Tensor, c: Tensor | float = 1.0, min_radius: float = 0.1) -> Tensor:
    """asin(2K/|x|), pi/2 where |x| <= 2K; radians [...]."""
    n = safe_norm(x)
    open_cone = n > 2 * min_radius
    ratio = 2 * min_radius / torch.where(open_cone, n, torch.full_like(n, 4 * min_radius))
    return torch.where(open_cone, torch.asin(ratio), torch.full_like(n, math.pi / 2))


@in_working_precision
def exterior_angle(x: Tensor, y: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Angle between x and y - x, radians [...] in [0, pi]."""
    x, y = torch.broadcast_tensors(x, y)
    n = safe_norm(x)
    unit = x / torch.where(n > 0, n, torch.ones_like(n))[..., None]
    difference = y - x
    along = (difference * unit).sum(-1)
    across = safe_norm(difference - along[..., None] * unit)
    same = (across == 0) & (along == 0)
    return torch.atan2(across, torch.where(same, torch.ones_like(along), along))


@in_working_precision
def pairwise_exterior_angle(x: Tensor, y: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Exterior angle of all pairs; apexes x: [N, D], points y: [B, D] -> [N, B]."""
    check_pair(x, y)
    n = safe_norm(x)
    unit = x / torch.where(n > 0, n, torch.ones_like(n))[:, None]
    along = unit @ y.T
    across2 = y.square().sum(-1)[None, :] - along.square()
    floor = torch.finfo(x.dtype).eps
    across = torch.where(across2 > floor, across2, torch.full_like(across2, floor)).sqrt()
    return torch.atan2(across, along - n[:, None])


def pairwise_margin(
    apex: Tensor,
    points: Tensor,
    c: Tensor | float = 1.0,
    *,
    eta: float = 1.0,
    min_radius: float = 0.1,
) -> Tensor:
    """Cone margin of every point to every apex, [B, N] radians, > 0 inside."""
    angle = pairwise_exterior_angle(apex, points, c).T
    return eta * half_aperture(apex, c, min_radius)[None, :] - angle
