r"""Lorentz model of hyperbolic space with curvature :math:`-c`, ``c > 0``, on space components.

A point is :math:`(x_t, x_s)` with :math:`x_t = \sqrt{1/c + |x_s|^2}`. Only the space components
``x_s`` are carried, so a point off the manifold cannot be written down. ``c`` is a float or a
scalar tensor everywhere; ``r`` stands for :math:`\sqrt c`.

Distances and angles come from the two legs of the triangle at x, sinh(rd)·cos(phi) along its ray
and sinh(rd)·sin(phi) across (:func:`legs`), each without cancellation for equal, near, collinear
or antipodal points and far out. The chord form :math:`|x_s-y_s|^2-\Delta t^2` loses eight digits
for collinear points at radius 11 even in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hysafe.errors import ShapeError
from hysafe.geometry.numerics import (
    curvature_like,
    in_working_precision,
    output_dtype,
    refine,
    safe_norm,
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

# Where a difference of products is below this share of its terms, a pairwise result lost digits
# and is redone by the element-wise form. The products are float64 (eps 2e-16): float64 input keeps
# 1e-10, float32 input 1e-6.
PAIR_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-8}
# Below this r|v| two terms of the series of sinh(z)/z and asinh(z)/z are exact to float64 rounding.
SERIES_BELOW = 1e-5


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
        Space components [..., D]. They leave float32 (inf) above r|v| = 88.

    Source: Desai et al. 2023 (MERU), eq. 6.
    """
    z = curvature_like(c, v).sqrt() * safe_norm(v, keepdim=True)
    small = z < SERIES_BELOW
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, 1 + z.square() / 6, torch.sinh(safe) / safe) * v


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
    small = z < SERIES_BELOW
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, 1 - z.square() / 6, torch.asinh(safe) / safe) * x


@in_working_precision
def inner(x: Tensor, y: Tensor, c: Tensor | float) -> Tensor:
    r"""Lorentzian inner product :math:`x_s\cdot y_s - x_t y_t`, [..., D] x [..., D] -> [...].

    Computed as :math:`-\cosh(rd)/c` from the legs, so that near points far out keep their digits.
    """
    c = curvature_like(c, x)
    forward, across = legs(x, y, c)
    return -(1 + forward.square() + across.square()).sqrt() / c


@in_working_precision
def pairwise_inner(x: Tensor, y: Tensor, c: Tensor | float) -> Tensor:
    """Lorentzian inner product of all pairs. x: [B1, D], y: [B2, D] -> [B1, B2].

    A plain product: its rounding is relative to x_t·y_t, not to the result.
    """
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

    Source: sinh(rd) is the hypotenuse of its two :func:`legs`.
    """
    return _dist(x, y, curvature_like(c, x))


def pairwise_dist(x: Tensor, y: Tensor, c: Tensor | float) -> Tensor:
    """Geodesic distance of all pairs. x: [B1, D], y: [B2, D] -> [B1, B2].

    One float64 product; pairs so close (for their radius) that it cancels are redone by
    :func:`dist`. No [B1, B2, D] temporary.
    """
    check_pair(x, y)
    return _pairwise_dist(x, y, c, PAIR_TOLERANCE[output_dtype(x, y)])


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
        x: space components [..., D], not the origin (which has no ray and stays where it is).
        radius: geodesic radii [...].
        c: curvature magnitude, > 0.

    Returns:
        Space components [..., D].
    """
    r = curvature_like(c, x).sqrt()
    radius = torch.as_tensor(radius, dtype=x.dtype, device=x.device)
    return unit(x, safe_norm(x)) * (torch.sinh(r * radius) / r)[..., None]


# ---------------------------------------------------------------- shared with the cones


class Legs(NamedTuple):
    """The geodesic from x to y seen at x: hypotenuse sinh(rd), angle phi. Shapes [...]."""

    forward: Tensor  # sinh(rd)·cos(phi), along the ray from the origin through x
    across: Tensor  # sinh(rd)·sin(phi) >= 0


def legs(x: Tensor, y: Tensor, c: Tensor) -> Legs:
    """Legs of the right triangle at x, without cancellation (working precision).

    With y_s = b·u + p, where u is the direction of x_s and p is across it, across = r|p| and
    forward = r(b·cosh(rρ) - |x_s|·cosh(rσ)) for the radii ρ, σ of x, y. For b > 0 that difference
    is multiplied by the sum of its terms, in which the large parts cancel exactly. Where x is the
    origin the ray has no direction: forward is 0 and across is sinh(rσ).
    """
    x, y = torch.broadcast_tensors(x, y)
    r = c.sqrt()
    norm_x, norm_y = safe_norm(x), safe_norm(y)
    sinh_x, sinh_y = r * norm_x, r * norm_y
    cosh_x, cosh_y = (1 + sinh_x.square()).sqrt(), (1 + sinh_y.square()).sqrt()
    u = unit(x, norm_x)
    # through the smaller of y - x and y: the rounding of its product with u is relative to that
    difference = y - x
    near = safe_norm(difference.detach()) < norm_y.detach()
    base = torch.where(near[..., None], difference, y)
    product = (base * u).sum(-1)
    across = r * safe_norm(base - product[..., None] * u)
    along = r * torch.where(near, norm_x + product, product)
    beyond = r * torch.where(near, product, product - norm_x)
    ahead = along > 0
    total = torch.where(ahead, along * cosh_x + sinh_x * cosh_y, torch.ones_like(along))
    squares = beyond * (along + sinh_x) - sinh_x.square() * across.square()
    forward = torch.where(ahead, squares / total, along * cosh_x - sinh_x * cosh_y)
    return Legs(forward, across)


def unit(x: Tensor, norm: Tensor) -> Tensor:
    """Directions [..., D] of vectors with the given norms [...]; 0 where the norm is 0."""
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))[..., None]


def check_pair(x: Tensor, y: Tensor) -> None:
    """Raise ShapeError unless x is [B1, D] and y is [B2, D]."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ShapeError(
            f"pairwise functions expected x [B1, D] and y [B2, D], got {tuple(x.shape)} and "
            f"{tuple(y.shape)}. Add a batch axis (x[None]) or check the dimension D."
        )


def _time(x: Tensor, c: Tensor) -> Tensor:
    return (1 / c + x.square().sum(-1)).sqrt()


def _dist(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    x, y = torch.broadcast_tensors(x, y)
    # seen from the farther point, so that the gradient is right where the other is the origin
    x_first = (safe_norm(x.detach()) >= safe_norm(y.detach()))[..., None]
    forward, across = legs(torch.where(x_first, x, y), torch.where(x_first, y, x), c)
    return torch.asinh(safe_norm(torch.stack((forward, across), dim=-1))) / c.sqrt()


@in_working_precision
def _pairwise_dist(x: Tensor, y: Tensor, c: Tensor | float, tolerance: float) -> Tensor:
    c = curvature_like(c, x)
    scale = c * _time(x, c)[:, None] * _time(y, c)[None, :]
    versine = scale - c * (x @ y.T) - 1  # cosh(rd) - 1
    with torch.no_grad():
        close = ~(versine > tolerance * scale)
    safe = torch.where(close, torch.ones_like(versine), versine)
    result = 2 * torch.asinh((safe / 2).sqrt()) / c.sqrt()
    return refine(result, close, x, y, lambda a, b: _dist(a, b, c))
