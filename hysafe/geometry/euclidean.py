"""Flat space with the same functions as the Lorentz model: the control of every experiment.

Cones are the Euclidean entailment cones of Ganea et al. 2018: half-aperture asin(2K/|x|),
exterior angle between x and y - x. `c` is taken and ignored, so that code stays the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hysafe.geometry.lorentz import PAIR_TOLERANCE, check_pair, unit
from hysafe.geometry.numerics import in_working_precision, output_dtype, refine, safe_norm

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
    """Identity (float32 at least): a flat space is its own tangent space."""
    return v.to(output_dtype(v))


def log_map0(x: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Identity (float32 at least)."""
    return x.to(output_dtype(x))


@in_working_precision
def dist(x: Tensor, y: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Euclidean distance [..., D] x [..., D] -> [...], gradient 0 where x equals y."""
    return safe_norm(x - y)


def pairwise_dist(x: Tensor, y: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Euclidean distance of all pairs, [B1, D] x [B2, D] -> [B1, B2]."""
    check_pair(x, y)
    return _pairwise_dist(x, y, PAIR_TOLERANCE[output_dtype(x, y)])


@in_working_precision
def dist0(x: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Norm: distance to the origin."""
    return safe_norm(x)


@in_working_precision
def half_aperture(x: Tensor, c: Tensor | float = 1.0, min_radius: float = 0.1) -> Tensor:
    """asin(2K/|x|), pi/2 where |x| <= 2K; radians [...]."""
    n = safe_norm(x)
    saturated = n <= 2 * min_radius
    ratio = 2 * min_radius / torch.where(saturated, torch.full_like(n, 2 * min_radius + 1), n)
    return torch.where(saturated, torch.full_like(n, math.pi / 2), torch.asin(ratio))


@in_working_precision
def exterior_angle(x: Tensor, y: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Angle between x and y - x, radians [...] in [0, pi]; 0 where x equals y."""
    return _exterior_angle(x, y)


def pairwise_exterior_angle(x: Tensor, y: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """Exterior angle of all pairs; apexes x: [N, D], points y: [B, D] -> [N, B]."""
    check_pair(x, y)
    return _pairwise_exterior_angle(x, y, PAIR_TOLERANCE[output_dtype(x, y)])


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


def _exterior_angle(x: Tensor, y: Tensor) -> Tensor:
    x, y = torch.broadcast_tensors(x, y)
    axis = unit(x, safe_norm(x))
    difference = y - x
    along = (difference * axis).sum(-1)
    across = safe_norm(difference - along[..., None] * axis)
    same = (across == 0) & (along == 0)
    return torch.atan2(across, torch.where(same, torch.ones_like(along), along))


@in_working_precision
def _pairwise_dist(x: Tensor, y: Tensor, tolerance: float) -> Tensor:
    scale = x.square().sum(-1)[:, None] + y.square().sum(-1)[None, :]
    square = scale - 2 * (x @ y.T)
    with torch.no_grad():
        close = ~(square > tolerance * scale)
    result = torch.where(close, torch.ones_like(square), square).sqrt()
    return refine(result, close, x, y, lambda a, b: safe_norm(a - b))


@in_working_precision
def _pairwise_exterior_angle(x: Tensor, y: Tensor, tolerance: float) -> Tensor:
    norm = safe_norm(x)
    product = unit(x, norm) @ y.T  # [N, B]
    square_y = y.square().sum(-1)
    across2 = square_y - product.square()
    along = product - norm[:, None]
    with torch.no_grad():
        good = across2 > tolerance * square_y
    across = torch.where(good, across2, torch.ones_like(across2)).sqrt()
    angle = torch.atan2(across, torch.where(good, along, torch.ones_like(along)))
    return refine(angle, ~good, x, y, _exterior_angle)
