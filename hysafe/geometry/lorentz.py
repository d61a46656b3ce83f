r"""Lorentz model of hyperbolic space with curvature :math:`-c`, ``c > 0``, on space components.

A point is :math:`(x_t, x_s)` with :math:`x_t = \sqrt{1/c + |x_s|^2}`. Only the space components
``x_s`` are carried, so a point off the manifold cannot be written down. ``c`` is a float or a
scalar tensor everywhere; ``r`` stands for :math:`\sqrt c`.

Distances and angles are computed from the pair (difference of radii, angle at the origin): both
are sums of non-negative terms, so nothing cancels, for equal points, collinear points or points
far out. The chord form :math:`|x_s-y_s|^2-\Delta t^2` loses eight digits for collinear points at
radius 11 even in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hysafe.errors import ShapeError
from hysafe.geometry.numerics import (
    REFINE_ROWS,
    curvature_like,
    in_working_precision,
    safe_norm,
    tiny,
)

__all__ = [
    "dist",
    "dist0",
    "exp_map0",
    "inner",
    "log_map0",
    "pairwise_dist",
    "pairwise_inner",
    "space_norm_at_radius",
    "time",
    "to_radius",
]

# Below these relative sizes a pairwise result lost digits to cancellation and is recomputed by
# the element-wise form: float64 input must keep 1e-10, float32 input 1e-6.
PAIR_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-8}


@in_working_precision
def time(x: Tensor, c: Tensor | float) -> Tensor:
    r"""Time component :math:`\sqrt{1/c + |x|^2}`. x: [..., D] -> [...]."""
    return _time(x, curvature_like(c, x))


@in_working_precision
def exp_map0(v: Tensor, c: Tensor | float) -> Tensor:
    r"""Exponential map at the origin, :math:`\sinh(r|v|)/(r|v|)\,v`.

    Args:
        v: tangent vectors at the origin (space components) [..., D]; |v| is the geodesic radius.
        c: curvature magnitude, > 0.

    Returns:
        Space components [..., D].

    Source: Desai et al. 2023 (MERU), eq. 6.
    """
    z = curvature_like(c, v).sqrt() * safe_norm(v, keepdim=True)
    safe = z.clamp_min(tiny(z.dtype))
    return torch.where(z < SERIES_BELOW, 1 + z.square() / 6, torch.sinh(safe) / safe) * v


@in_working_precision
def log_map0(x: Tensor, c: Tensor | float) -> Tensor:
    r"""Logarithmic map at the origin, :math:`\mathrm{asinh}(r|x|)/(r|x|)\,x`.

    Args:
        x: space components [..., D].
        c: curvature magnitude, > 0.

    Returns:
        Tangent vectors at the origin [..., D]; their norm is the geodesic radius.

    Source: inverse of :func:`exp_map0`.
    """
    z = curvature_like(c, x).sqrt() * safe_norm(x, keepdim=True)
    safe = z.clamp_min(tiny(z.dtype))
    return torch.where(z < SERIES_BELOW, 1 - z.square() / 6, torch.asinh(safe) / safe) * x


# Below this r|v| two terms of the series are exact to float64 rounding.
SERIES_BELOW = 1e-5


@in_working_precision
def inner(x: Tensor, y: Tensor, c: Tensor | float) -> Tensor:
    r"""Lorentzian inner product :math:`x_s\cdot y_s - x_t y_t`, [..., D] x [..., D] -> [...]."""
    c = curvature_like(c, x)
    return (x * y).sum(-1) - _time(x, c) * _time(y, c)


@in_working_precision
def pairwise_inner(x: Tensor, y: Tensor, c: Tensor | float) -> Tensor:
    """Lorentzian inner product of all pairs. x: [B1, D], y: [B2, D] -> [B1, B2]."""
    check_pair(x, y)
    c = curvature_like(c, x)
    return x @ y.T - _time(x, c)[:, None] * _time(y, c)[None, :]


@in_working_precision
def dist(x: Tensor, y: Tensor, c: Tensor | float) -> Tensor:
    """Geodesic distance.

    Args:
        x, y: space components [..., D], broadcastable.
        c: curvature magnitude, > 0.

    Returns:
        Distances [...] >= 0; exactly 0 with gradient 0 where x equals y.

    Source: half-angle form of the hyperbolic law of cosines,
    sinh²(rd/2) = sinh²((ρy-ρx)r/2) + sinh(rρx)·sinh(rρy)·sin²(θ/2).
    """
    return _dist(x, y, curvature_like(c, x))


@in_working_precision
def pairwise_dist(x: Tensor, y: Tensor, c: Tensor | float) -> Tensor:
    """Geodesic distance of all pairs. x: [B1, D], y: [B2, D] -> [B1, B2].

    One float64 product; pairs so close (or so far out) that it cancels are redone by
    :func:`dist`. No [B1, B2, D] temporary.
    """
    check_pair(x, y)
    c = curvature_like(c, x)
    scale = c * _time(x, c)[:, None] * _time(y, c)[None, :]
    versine = scale - c * (x @ y.T) - 1  # cosh(rd) - 1
    close = versine.detach() <= PAIR_TOLERANCE[torch.float64] * scale.detach()
    safe = torch.where(close, torch.ones_like(versine), versine)
    result = 2 * torch.asinh((safe / 2).sqrt()) / c.sqrt()
    return refine(result, close, x, y, lambda a, b: _dist(a, b, c))


@in_working_precision
def dist0(x: Tensor, c: Tensor | float) -> Tensor:
    """Radius: geodesic distance to the origin. x: [..., D] -> [...]."""
    r = curvature_like(c, x).sqrt()
    return torch.asinh(r * safe_norm(x)) / r


@in_working_precision
def space_norm_at_radius(radius: Tensor, c: Tensor | float) -> Tensor:
    r"""Euclidean norm of the space components of a point at geodesic `radius`: sinh(rτ)/r."""
    r = curvature_like(c, radius).sqrt()
    return torch.sinh(r * radius) / r


@in_working_precision
def to_radius(x: Tensor, radius: Tensor, c: Tensor | float) -> Tensor:
    """Move each point along its ray from the origin to a geodesic radius.

    Args:
        x: space components [..., D], not the origin (which stays where it is).
        radius: geodesic radii [...].
        c: curvature magnitude, > 0.

    Returns:
        Space components [..., D].
    """
    r = curvature_like(c, x).sqrt()
    norm = safe_norm(x, keepdim=True)
    return x / norm.clamp_min(tiny(norm.dtype)) * (torch.sinh(r * radius) / r)[..., None]


# ---------------------------------------------------------------- shared with the cones


class Polar(NamedTuple):
    """y seen from the origin along the ray of x; all lengths times r. Shapes [...]."""

    sinh_x: Tensor  # r|x|
    cosh_x: Tensor
    sinh_y: Tensor  # r|y|
    sinh_gap: Tensor  # sinh(r(radius(y) - radius(x)))
    theta: Tensor  # angle between x and y at the origin, [0, pi]; 0 where one is the origin


def polar(x: Tensor, y: Tensor, c: Tensor) -> Polar:
    """Polar coordinates of y relative to x without cancellation (float64 inputs)."""
    x, y = torch.broadcast_tensors(x, y)
    r = c.sqrt()
    floor = tiny(x.dtype)
    nx, ny = safe_norm(x), safe_norm(y)
    sinh_x, sinh_y = r * nx, r * ny
    cosh_x, cosh_y = (1 + sinh_x.square()).sqrt(), (1 + sinh_y.square()).sqrt()
    difference = y - x
    # r²(|y|²-|x|²) / (sinh_y cosh_x + sinh_x cosh_y), through the difference: exact when close
    gap = c * (difference * (x + y)).sum(-1)
    sinh_gap = gap / (sinh_y * cosh_x + sinh_x * cosh_y).clamp_min(floor)
    # component of y across x, through the smaller of (y - x, y): its rounding is relative to that
    unit = x / nx.clamp_min(floor)[..., None]
    along_difference = (difference * unit).sum(-1)
    along_y = (y * unit).sum(-1)
    near = safe_norm(difference.detach()) < ny.detach()
    base = torch.where(near[..., None], difference, y)
    along = torch.where(near, along_difference, along_y)
    across = safe_norm(base - along[..., None] * unit)
    total = torch.where(near, nx + along_difference, along_y)
    defined = (nx > 0) & (ny > 0)
    theta = torch.where(
        defined,
        torch.atan2(across, torch.where(defined, total, torch.ones_like(total))),
        torch.zeros_like(across),
    )
    return Polar(sinh_x, cosh_x, sinh_y, sinh_gap, theta)


def refine(result: Tensor, where: Tensor, x: Tensor, y: Tensor, function) -> Tensor:  # type: ignore[no-untyped-def]
    """`result` [B1, B2] with the pairs in `where` replaced by function(x_i, y_j), in chunks."""
    rows, columns = where.nonzero(as_tuple=True)
    if rows.numel() == 0:
        return result
    parts = [
        function(x[i], y[j])
        for i, j in zip(rows.split(REFINE_ROWS), columns.split(REFINE_ROWS), strict=True)
    ]
    return result.index_put((rows, columns), torch.cat(parts))


def check_pair(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ShapeError(
            f"pairwise functions expected x [B1, D] and y [B2, D], got {tuple(x.shape)} and "
            f"{tuple(y.shape)}. Add a batch axis (x[None]) or check the dimension D."
        )


def _time(x: Tensor, c: Tensor) -> Tensor:
    return (1 / c + x.square().sum(-1)).sqrt()


def _dist(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    p = polar(x, y, c)
    half_gap = torch.sinh(torch.asinh(p.sinh_gap) / 2)
    # where one point is the origin theta is 0 and only the gap counts
    across = (p.sinh_x * p.sinh_y).clamp_min(0)
    # sinh(rd/2) is the length of the vector (half_gap, sqrt(across) sin(theta/2)); safe_norm makes
    # the gradient 0 where both vanish
    root = torch.where(across > 0, across, torch.ones_like(across)).sqrt()
    root = torch.where(across > 0, root, torch.zeros_like(root))
    sinh_half = safe_norm(torch.stack((half_gap, root * torch.sin(p.theta / 2)), dim=-1))
    return 2 * torch.asinh(sinh_half) / c.sqrt()
