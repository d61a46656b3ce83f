r"""Entailment cones in the Lorentz model.

The cone of an apex x holds every y whose exterior angle :math:`\varphi(x, y)` (the angle at x
between the ray away from the origin and the geodesic to y) is at most the half-aperture
:math:`\omega(x)`. ``margin = eta * omega - phi`` is positive inside, ``energy = relu(-margin)``.

Source: Ganea et al. 2018 (hyperbolic entailment cones), Desai et al. 2023 (Lorentz coordinates).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hysafe.errors import ShapeError
from hysafe.geometry import lorentz
from hysafe.geometry.numerics import curvature_like, in_working_precision, safe_norm

__all__ = [
    "MIN_RADIUS",
    "energy",
    "exterior_angle",
    "half_aperture",
    "margin",
    "pairwise_exterior_angle",
    "pairwise_margin",
]

# K of Ganea et al. 2018 and MERU: apexes with r|x| <= 2K have the widest cone, a half space.
MIN_RADIUS = 0.1

# Rows per chunk of the inference kernel are chosen so that chunk and products stay near the cache.
CHUNK_ELEMENTS = 1 << 19
# The kernel's acos form cancels where cosh(rd)-1 is below this share of cosh(rho_x)cosh(rho_y), or
# on the axis of the cone; those pairs are redone by the stable form.
KERNEL_NEAR = 2e-3


@in_working_precision
def half_aperture(x: Tensor, c: Tensor | float, min_radius: float = MIN_RADIUS) -> Tensor:
    r"""Half-aperture of the entailment cone at each apex.

    .. math:: \omega(x) = \arcsin\frac{2 K}{\sqrt{c}\,\lVert x_{space}\rVert}

    Args:
        x: space components of the apexes [..., D].
        c: curvature magnitude (the space has curvature -c), > 0.
        min_radius: K, dimensionless; apexes with sqrt(c)|x| <= 2K saturate at pi/2 and get no
            gradient.

    Returns:
        Radians [...], in (0, pi/2]. Invariant under rescaling of the space.

    Source: Ganea et al. 2018, eq. 26, in Lorentz coordinates as in Desai et al. 2023.
    """
    n = curvature_like(c, x).sqrt() * safe_norm(x)
    open_cone = n > 2 * min_radius
    safe = torch.where(open_cone, n, torch.full_like(n, 4 * min_radius))
    other = ((safe - 2 * min_radius) * (safe + 2 * min_radius)).sqrt()
    angle = torch.atan2(torch.full_like(other, 2 * min_radius), other)
    return torch.where(open_cone, angle, torch.full_like(angle, math.pi / 2))


@in_working_precision
def exterior_angle(x: Tensor, y: Tensor, c: Tensor | float) -> Tensor:
    """Angle at x between the outward ray and the geodesic to y.

    Args:
        x, y: space components [..., D], broadcastable.
        c: curvature magnitude, > 0.

    Returns:
        Radians [...], in [0, pi]; 0 with gradient 0 where x equals y; pi/2 where x is the origin,
        whose ray has no direction.

    Source: Desai et al. 2023, eq. 10, as atan2 of the legs sinh(rd)sin and sinh(rd)cos.
    """
    return _exterior_angle(x, y, curvature_like(c, x))


@in_working_precision
def pairwise_exterior_angle(x: Tensor, y: Tensor, c: Tensor | float) -> Tensor:
    """Exterior angle of all pairs; apexes x: [N, D], points y: [B, D] -> [N, B].

    One float64 product; pairs near the apex or on its axis are redone by :func:`exterior_angle`.
    """
    lorentz.check_pair(x, y)
    c = curvature_like(c, x)
    r = c.sqrt()
    nx = safe_norm(x)
    sinh_x, cosh_x = r * nx, (1 + c * nx.square()).sqrt()
    y_square = c * y.square().sum(-1)
    cosh_y = (1 + y_square).sqrt()
    unit = x / torch.where(nx > 0, nx, torch.ones_like(nx))[:, None]
    along = r * (unit @ y.T)  # [N, B]
    across2 = y_square[None, :] - along.square()
    forward = cosh_x[:, None] * along - sinh_x[:, None] * cosh_y[None, :]
    tolerance = lorentz.PAIR_TOLERANCE[torch.float64]
    with torch.no_grad():
        bad = across2 <= tolerance * y_square[None, :]
        size = sinh_x[:, None] * cosh_y[None, :]
        bad |= across2 + forward.square() <= (tolerance * size).square()
        bad |= (nx == 0)[:, None]
    across = torch.where(bad, torch.ones_like(across2), across2).sqrt()
    result = torch.atan2(across, torch.where(bad, torch.ones_like(forward), forward))
    return lorentz.refine(result, bad, x, y, lambda a, b: _exterior_angle(a, b, c))


def margin(
    x: Tensor, y: Tensor, c: Tensor | float, *, eta: float = 1.0, min_radius: float = MIN_RADIUS
) -> Tensor:
    """How far inside the cone of x the point y lies: eta * omega(x) - phi(x, y).

    Args:
        x, y: space components [..., D], broadcastable.
        c: curvature magnitude, > 0.
        eta: aperture factor (HyCoCLIP: 0.7 across modalities, 1.2 within).
        min_radius: K of :func:`half_aperture`.

    Returns:
        Radians [...]; > 0 is inside.
    """
    return eta * half_aperture(x, c, min_radius) - exterior_angle(x, y, c)


def energy(
    x: Tensor, y: Tensor, c: Tensor | float, *, eta: float = 1.0, min_radius: float = MIN_RADIUS
) -> Tensor:
    """Entailment energy relu(-margin): 0 inside the cone, radians [...] outside."""
    return torch.relu(-margin(x, y, c, eta=eta, min_radius=min_radius))


def pairwise_margin(
    apex: Tensor,
    points: Tensor,
    c: Tensor | float,
    *,
    eta: float = 1.0,
    min_radius: float = MIN_RADIUS,
    out: Tensor | None = None,
) -> Tensor:
    """Cone margin of every point to every apex.

    Args:
        apex: space components of the apexes [N, D].
        points: space components of the points [B, D].
        c: curvature magnitude, > 0.
        eta: aperture factor.
        min_radius: K of :func:`half_aperture`.
        out: optional [B, N] tensor to write into (inference only).

    Returns:
        Margins [B, N] in radians, > 0 inside. Where a gradient is wanted, or for float64 input,
        the exact functions above are used; else one float32 product a chunk, finished in place,
        with the pairs where that form cancels redone in float64.
    """
    lorentz.check_pair(apex, points)
    grad = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (apex, points, c)
    )
    if grad or apex.dtype == torch.float64 or points.dtype == torch.float64:
        angle = pairwise_exterior_angle(apex, points, c).T
        result = eta * half_aperture(apex, c, min_radius)[None, :] - angle
        return result if out is None else out.copy_(result)
    with torch.no_grad():
        apex, points = apex.float(), points.float()
        size = (points.shape[0], apex.shape[0])
        if out is None:
            out = torch.empty(size, device=points.device)
        elif tuple(out.shape) != size or out.dtype != torch.float32:
            raise ShapeError(f"out expected float32 {size}, got {out.dtype} {tuple(out.shape)}.")
        _margin_kernel(apex, points, float(c), eta, min_radius, out)
    return out


def _exterior_angle(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    p = lorentz.polar(x, y, c)
    sin_half = torch.sin(p.theta / 2)
    forward = p.sinh_gap - 2 * p.cosh_x * p.sinh_y * sin_half.square()
    across = p.sinh_y * torch.sin(p.theta)
    at_origin = p.sinh_x == 0
    same = (forward == 0) & (across == 0)
    undefined = at_origin | same
    angle = torch.atan2(
        torch.where(undefined, torch.zeros_like(across), across),
        torch.where(undefined, torch.ones_like(forward), forward),
    )
    half_pi = torch.full_like(angle, math.pi / 2)
    return torch.where(at_origin & ~same, half_pi, angle)


def _margin_kernel(
    apex: Tensor, points: Tensor, c: float, eta: float, min_radius: float, out: Tensor
) -> None:
    """cos(phi) = (y_t' + b x_t') / (|x|' sqrt(b² - 1)), b = c<x, y>, primes: times r."""
    root = math.sqrt(c)
    scaled_apex = apex * c  # [N, D]
    weight = scaled_apex.T.contiguous()
    norm_x = root * torch.linalg.vector_norm(apex, dim=-1)  # sinh(rho_x)
    cosh_x = (1 + norm_x.square()).sqrt()
    aperture = eta * half_aperture(apex, c, min_radius)
    n = max(1, apex.shape[0])
    rows = max(256, min(16_384, CHUNK_ELEMENTS // n))
    scratch = torch.empty((min(rows, points.shape[0]), apex.shape[0]), device=points.device)
    # cos = (cosh_y - cosh_x * cosh_d) / (sinh_x * sinh_d)
    inverse_norm = 1 / norm_x.clamp_min(tiny_float32())
    slope = (-cosh_x * inverse_norm).contiguous()
    for start in range(0, points.shape[0], rows):
        y = points[start : start + rows]
        b = out[start : start + y.shape[0]]
        s = scratch[: y.shape[0]]
        cosh_y = (1 + c * torch.linalg.vector_norm(y, dim=-1).square()).sqrt()[:, None]
        torch.mm(y, weight, out=b)
        torch.mul(cosh_y, cosh_x, out=s)
        torch.sub(s, b, out=b)  # cosh(rd)
        # near pairs: cosh(rd) - 1 lost its digits
        close = b < s.mul_(KERNEL_NEAR).add_(1)
        torch.mul(b, b, out=s)
        s.sub_(1).clamp_min_(tiny_float32()).rsqrt_()  # 1 / sinh(rd)
        b.mul_(slope).addcmul_(cosh_y, inverse_norm).mul_(s)
        b.clamp_(-1, 1)
        torch.abs(b, out=s)
        close |= s > AXIS_COSINE
        b.acos_().neg_().add_(aperture)
        if bool(close.any()):
            i, j = close.nonzero(as_tuple=True)
            for ii, jj in zip(i.split(65_536), j.split(65_536), strict=True):
                b[ii, jj] = aperture[jj] - exterior_angle(apex[jj], y[ii], c)


# Where |cos phi| is larger, acos in float32 has lost more than 1e-4 rad.
AXIS_COSINE = 1 - 1e-4


def tiny_float32() -> float:
    return float(torch.finfo(torch.float32).tiny)
