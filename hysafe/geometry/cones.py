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
from hysafe.geometry.numerics import (
    REFINE_ELEMENTS,
    curvature_like,
    in_working_precision,
    output_dtype,
    refine,
    safe_norm,
)

__all__ = [
    "MIN_RADIUS",
    "ConeBank",
    "energy",
    "exterior_angle",
    "half_aperture",
    "margin",
    "pairwise_exterior_angle",
    "pairwise_margin",
]

# K of Ganea et al. 2018 and MERU: apexes with r|x| <= 2K have the widest cone, a half space.
MIN_RADIUS = 0.1

# Elements per chunk of the inference kernel after its product: 16 MiB of float32. Smaller chunks
# stay in a nearer cache and win 3 % on an idle machine, but wait more where others hold its cores.
CHUNK_ELEMENTS = 1 << 22
# A float32 product of 512 terms is off by up to 5e-7 of |x||y| (measured), and the angle at x by at
# most 6 * 5e-7 / sin²(theta), theta being the angle at the origin: below this sin²(theta) a pair
# is redone.
AXIS_SINE2 = 0.1
# Redone pairs nearer than this, as sinh(rd) / sinh(r radius(y)), take the float64 form: the float32
# residual is off by 1e-6 of |y|, the angle by that over this.
NEAR_SHARE = 0.02
# With more than this share of a chunk to be redone, a float64 product is cheaper than pair by pair.
DENSE_SHARE = 1 / 16


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
    saturated = n <= 2 * min_radius
    safe = torch.where(saturated, torch.full_like(n, 2 * min_radius + 1), n)
    other = ((safe - 2 * min_radius) * (safe + 2 * min_radius)).sqrt()
    angle = torch.atan2(torch.full_like(other, 2 * min_radius), other)
    return torch.where(saturated, torch.full_like(angle, math.pi / 2), angle)


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


def pairwise_exterior_angle(x: Tensor, y: Tensor, c: Tensor | float) -> Tensor:
    """Exterior angle of all pairs; apexes x: [N, D], points y: [B, D] -> [N, B].

    One float64 product; pairs near the apex or on its axis are redone by :func:`exterior_angle`.
    """
    lorentz.check_pair(x, y)
    return _pairwise_exterior_angle(x, y, c, lorentz.PAIR_TOLERANCE[output_dtype(x, y)])


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
        out: optional [B, N] tensor of the result's dtype to write into (inference only; fresh
            memory costs as much as the angles do).

    Returns:
        Margins [B, N] in radians, > 0 inside. Where a gradient is wanted, or for float64 input,
        the exact functions above are used; else one float32 product, finished in place a chunk at
        a time, with the pairs where that form cancels redone. Within 1e-4 rad of :func:`margin`.

    Raises:
        ShapeError: apex, points or `out` do not fit, or `out` is given where a gradient is wanted.
    """
    lorentz.check_pair(apex, points)
    curvature_like(c, points)  # refuses numbers that are not > 0
    dtype = output_dtype(apex, points)
    size = (points.shape[0], apex.shape[0])
    grad = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (apex, points, c)
    )
    if out is not None and (grad or tuple(out.shape) != size or out.dtype != dtype):
        raise ShapeError(
            f"out expected {dtype} {size} and no gradient, got {out.dtype} {tuple(out.shape)}"
            f"{' and a gradient. Call it under torch.no_grad()' if grad else ''}."
        )
    if grad:
        aperture = eta * half_aperture(apex, c, min_radius)
        return aperture - pairwise_exterior_angle(apex, points, c).T
    with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
        if out is None:
            out = torch.empty(size, dtype=dtype, device=points.device)
        if 0 in size:
            return out
        if dtype == torch.float64:
            aperture = eta * half_aperture(apex, c, min_radius)
            rows = max(1, CHUNK_ELEMENTS // size[1])
            for y, b in zip(points.split(rows), out.split(rows), strict=True):
                torch.sub(aperture, pairwise_exterior_angle(apex, y, c).T, out=b)
        else:
            _margin_kernel(apex.float(), points.float(), float(c), eta, min_radius, out)
    return out


class ConeBank:
    """Cones made ready for many points: :func:`pairwise_margin` of float64 points, node by node.

    Inference only. What depends on the cones alone is computed once; the rest is one product and a
    few passes in place, with the pairs where that form cancels redone one by one.

    Args:
        apex: space components of the apexes [N, D].
        c: curvature magnitude, > 0.
        eta: aperture factor.
        min_radius: K of :func:`half_aperture`.
    """

    def __init__(
        self, apex: Tensor, c: Tensor | float, *, eta: float = 1.0, min_radius: float = MIN_RADIUS
    ) -> None:
        with torch.no_grad():
            self._c = curvature_like(c, apex.double())
            self._aperture = (eta * half_aperture(apex, c, min_radius)).double()[:, None]  # [N, 1]
            self._apex = apex.detach().double()
            root, norm = self._c.sqrt(), safe_norm(self._apex)
            sinh = (root * norm)[:, None]
            cosh = (1 + sinh.square()).sqrt()
            self._axis = root * lorentz.unit(self._apex, norm)
            self._scale, self._slope = 1 / cosh, -sinh / cosh
            self._at_origin = sinh == 0

    def __len__(self) -> int:
        return len(self._apex)

    def margins(self, points: Tensor, square: Tensor | None = None) -> Tensor:
        """Margins [N, B] of points [B, D], space components in float64.

        Args:
            points: [B, D].
            square: c|x|² of the points [B], where it is known.

        Raises:
            ShapeError: the points do not fit.
        """
        lorentz.check_pair(self._apex, points)
        with torch.no_grad():
            along = self._axis @ points.T
            parts = (self._scale, self._slope, self._aperture, self._at_origin)
            return self._finished(along, points, square, parts, None)

    def margins_of(
        self, points: Tensor, groups: Tensor, members: Tensor, square: Tensor | None = None
    ) -> Tensor:
        """Margins [K, P] of each point to the cones of its own group.

        Args:
            points: [P, D], float64.
            groups: [P], ascending: the group of each point.
            members: [G, K], the cones of each group.
            square: c|x|² of the points [P], where it is known.

        Raises:
            ShapeError: the points do not fit.
        """
        lorentz.check_pair(self._apex, points)
        with torch.no_grad():
            along = points.new_empty((members.shape[1], len(points)))
            sizes = torch.bincount(groups, minlength=len(members)).tolist()
            start = 0
            for own, size in zip(members, sizes, strict=True):
                if size:
                    part = slice(start, start + size)
                    torch.mm(self._axis[own], points[part].T, out=along[:, part])
                    start += size
            parts = tuple(
                part[members.T, 0].index_select(1, groups)  # [K, P]
                for part in (self._scale, self._slope, self._aperture, self._at_origin)
            )
            return self._finished(along, points, square, parts, members.T[:, groups])

    def margins_at(self, points: Tensor, nodes: Tensor) -> Tensor:
        """Margins [P] of points [P, D] to one cone each; nodes [P]."""
        with torch.no_grad():
            step = max(1, REFINE_ELEMENTS // max(1, points.shape[1]))
            parts = [
                self._aperture[i, 0] - _exterior_angle(self._apex[i], y, self._c)
                for y, i in zip(points.split(step), nodes.split(step), strict=True)
            ]
            return torch.cat(parts)

    def _finished(
        self, along: Tensor, points: Tensor, square: Tensor | None, parts: tuple[Tensor, ...],
        nodes: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Margins from r u·y [M, B], in place; `nodes` [M, B] are the cones, None for all [N]."""
        scale, slope, aperture, at_origin = parts
        if square is None:
            square = self._c * safe_norm(points).square()  # sinh², [B]
        across = torch.addcmul(square, along, along, value=-1)
        limit = lorentz.PAIR_TOLERANCE[torch.float64] * square
        bad = None
        if not bool((across.amin(0) > limit).all()) or bool(at_origin.any()):  # NaN too
            bad = (~(across > limit) | at_origin).nonzero(as_tuple=True)
        across.sqrt_().mul_(scale)
        along.addcmul_((1 + square).sqrt(), slope)
        torch.atan2(across, along, out=along)
        if bad is not None:
            rows, columns = bad
            cones = rows if nodes is None else nodes[rows, columns]
            step = max(1, REFINE_ELEMENTS // max(1, points.shape[1]))
            along[bad] = torch.cat([
                _exterior_angle(self._apex[i], points[j], self._c)
                for i, j in zip(cones.split(step), columns.split(step), strict=True)
            ])  # fmt: skip
        return torch.sub(aperture, along, out=along)


def _exterior_angle(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    forward, across = lorentz.legs(x, y, c)
    at_origin = (x == 0).all(-1) & ~across.isnan()
    same = (forward == 0) & (across == 0)
    undefined = at_origin | same
    angle = torch.atan2(
        torch.where(undefined, torch.zeros_like(across), across),
        torch.where(undefined, torch.ones_like(forward), forward),
    )
    half_pi = torch.full_like(angle, math.pi / 2)
    return torch.where(at_origin & ~same, half_pi, angle)


@in_working_precision
def _pairwise_exterior_angle(x: Tensor, y: Tensor, c: Tensor | float, tolerance: float) -> Tensor:
    c = curvature_like(c, x)
    r = c.sqrt()
    norm_x = safe_norm(x)
    sinh_x = (r * norm_x)[:, None]
    cosh_x = (1 + sinh_x.square()).sqrt()
    sinh_y = r * safe_norm(y)
    cosh_y = (1 + sinh_y.square()).sqrt()
    along = r * (lorentz.unit(x, norm_x) @ y.T)  # [N, B]
    across2 = sinh_y.square() - along.square()
    forward = cosh_x * along - sinh_x * cosh_y
    with torch.no_grad():
        # off the axis the hypotenuse is no small difference either: it is >= theta²/4 of its terms
        bad = ~(across2 > tolerance * sinh_y.square()) | (sinh_x == 0)
    across = torch.where(bad, torch.ones_like(across2), across2).sqrt()
    angle = torch.atan2(across, torch.where(bad, torch.ones_like(forward), forward))
    return refine(angle, bad, x, y, lambda a, b: _exterior_angle(a, b, c))


def _margin_kernel(
    apex: Tensor, points: Tensor, c: float, eta: float, min_radius: float, out: Tensor
) -> None:
    """atan2 of the legs over cosh_x, from the float32 product b = r u·y (u the axis, [N, D])."""
    root = math.sqrt(c)
    exact = apex.double()
    norm = safe_norm(exact)
    sinh_x = root * norm
    cosh_x = (1 + sinh_x.square()).sqrt()
    axis = lorentz.unit(exact, norm).float()
    aperture = eta * half_aperture(apex, c, min_radius)
    scale, slope = (1 / cosh_x).float(), (-sinh_x / cosh_x).float()
    norm_y = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    square_y = c * norm_y.square()  # sinh², [B, 1]
    cosh_y = (1 + square_y).sqrt()
    torch.mm(points, (root * axis).T, out=out)
    rows = max(1, CHUNK_ELEMENTS // out.shape[1])
    buffer = torch.empty_like(out[:rows])
    for start in range(0, out.shape[0], rows):
        chunk = slice(start, start + rows)
        b = out[chunk]
        s = buffer[: b.shape[0]]
        torch.addcmul(square_y[chunk], b, b, value=-1, out=s)  # across²
        pairs = _pairs_below(s, AXIS_SINE2 * square_y[chunk])
        redone = None
        if pairs is not None and pairs[0].numel() <= DENSE_SHARE * b.numel():
            redone = _redo(apex, points[chunk], c, axis, pairs, b[pairs])
        s.sqrt_().mul_(scale)
        b.addcmul_(cosh_y[chunk], slope)
        torch.atan2(s, b, out=b)
        if redone is not None:
            b[pairs] = redone
        elif pairs is not None:
            b.copy_(pairwise_exterior_angle(apex, points[chunk], c).T)
        torch.sub(aperture, b, out=b)


def _pairs_below(s: Tensor, limit: Tensor) -> tuple[Tensor, Tensor] | None:
    """(row, column) of the entries of s [B, N] not above limit [B, 1] (NaN too); None if none."""
    rows = (~(s.amin(dim=1, keepdim=True) > limit)).squeeze(1).nonzero().squeeze(1)
    if rows.numel() == 0:
        return None
    i, j = (~(s[rows] > limit[rows])).nonzero(as_tuple=True)
    return rows[i], j


def _redo(
    apex: Tensor,
    points: Tensor,
    c: float,
    axis: Tensor,
    pairs: tuple[Tensor, Tensor],
    along: Tensor,
) -> Tensor:
    """Exterior angles [P] of pairs near the axis; `along` [P] is r u·y from the float32 product.

    The residual p = y - (u·y)u is exact to float32 rounding of |y| (an error of u·y counts only
    squared), and gives across = r|p| and along = sqrt(sinh_y² - across²). Pairs close to the apex
    are redone by :func:`exterior_angle`.
    """
    root = math.sqrt(c)
    sinh_x = root * safe_norm(apex.double())  # [N]
    cosh_x = (1 + sinh_x.square()).sqrt()
    step = max(1, REFINE_ELEMENTS // max(1, apex.shape[1]))
    parts = []
    for i, j, a in zip(*(t.split(step) for t in (*pairs, along)), strict=True):
        y = points.index_select(0, i)
        sinh_y = root * torch.linalg.vector_norm(y, dim=-1).double()
        y.addcmul_(axis.index_select(0, j), (a / root)[:, None], value=-1)
        across = root * torch.linalg.vector_norm(y, dim=-1).double()
        straight = (sinh_y.square() - across.square()).clamp_min(0).sqrt().copysign(a)
        forward = cosh_x[j] * straight - sinh_x[j] * (1 + sinh_y.square()).sqrt()
        angle = torch.atan2(across, forward).float()
        near = ~(torch.hypot(across, forward) > NEAR_SHARE * sinh_y)
        k = near.nonzero().squeeze(1)
        if k.numel() > 0:
            angle[k] = exterior_angle(apex[j[k]], points[i[k]], c)
        parts.append(angle)
    return torch.cat(parts)
