"""The geometry against 50-digit arithmetic: curvatures, dimensions, radii and degenerate pairs."""

from __future__ import annotations

import functools
import math
from operator import mul
from typing import NamedTuple

import mpmath
import pytest
import torch
from mpmath import mp
from torch import Tensor

from hysafe.geometry import cones, lorentz

CURVATURES = (0.1, 0.5, 1.0, 2.3, 10.0)
DIMENSIONS = (8, 512)
# sqrt(c) * tangent norm
RADII = (1e-8, 1e-4, 0.03, 0.5, 1.0, 2.0, 5.0, 8.0, 11.0)
DIGITS = 50
GUARD_DIGITS = 40  # near pairs at radius 11 lose 25 of them

spaces = pytest.mark.parametrize("c", CURVATURES)
dimensions = pytest.mark.parametrize("dim", DIMENSIONS)


class Reference(NamedTuple):
    """Exact values of one pair."""

    dist: float
    angle: float
    aperture: float


@functools.cache
def generic_pairs(c: float, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tangent vectors in random directions: x, y [P, D] and the larger radius [P]."""
    generator = torch.Generator().manual_seed(dim)
    z = torch.tensor(RADII, dtype=torch.float64)
    zx, zy = z.repeat_interleave(5), torch.stack([z.roll(k) for k in range(5)], 1).flatten()
    x, y = (
        torch.nn.functional.normalize(
            torch.randn(len(zx), dim, generator=generator, dtype=torch.float64), dim=-1
        )
        for _ in range(2)
    )
    scale = 1 / math.sqrt(c)
    return x * zx[:, None] * scale, y * zy[:, None] * scale, torch.maximum(zx, zy)


@functools.cache
def degenerate_pairs(c: float, dim: int) -> tuple[Tensor, Tensor]:
    """Near, collinear, antipodal, identical pairs and pairs with the origin, as coordinates."""
    generator = torch.Generator().manual_seed(dim + 1)
    z = torch.tensor(RADII, dtype=torch.float64)
    u, t = (
        torch.nn.functional.normalize(
            torch.randn(len(z), dim, generator=generator, dtype=torch.float64), dim=-1
        )
        for _ in range(2)
    )
    x = u * (torch.sinh(z) / math.sqrt(c))[:, None]
    length = x.norm(dim=-1, keepdim=True)
    others = [
        x + 1e-1 * length * t,
        x + 1e-3 * length * t,
        x + 1e-6 * length * t,
        x * 1.01,
        x * (1 - 1e-5),
        x * 3.0,
        x * 0.4,
        -x,
        -0.3 * x,
        x.clone(),
        torch.zeros_like(x),
    ]
    return x.repeat(len(others), 1), torch.cat(others)


class Exact(NamedTuple):
    """A vector of doubles as integers times 2**shift, so that its products do not round."""

    integers: list[int]
    shift: int

    @classmethod
    def of(cls, v: list[float]) -> Exact:
        parts = [math.frexp(a) for a in v]
        low = min((e for m, e in parts if m), default=0)
        return cls([int(math.ldexp(m, 53)) << (e - low) if m else 0 for m, e in parts], low - 53)

    def dot(self, other: Exact) -> mpmath.mpf:
        total = sum(map(mul, self.integers, other.integers))
        return mp.ldexp(mp.mpf(total), self.shift + other.shift)


def references(x: Tensor, y: Tensor, c: float, *, tangent: bool = False) -> list[Reference]:
    """Textbook formulas (arcosh, law of cosines) at 50 digits and guard digits."""
    result = []
    with mp.workdps(DIGITS + GUARD_DIGITS):
        for v, w in zip(x.tolist(), y.tolist(), strict=True):
            k, r = mp.mpf(c), mp.sqrt(mp.mpf(c))
            a, b = Exact.of(v), Exact.of(w)
            vv, ww, vw = a.dot(a), b.dot(b), a.dot(b)
            if tangent:
                f, g = (
                    mp.sinh(r * mp.sqrt(s)) / (r * mp.sqrt(s)) if s else mp.mpf(1) for s in (vv, ww)
                )
                vv, ww, vw = f * f * vv, g * g * ww, f * g * vw
            xt, yt, n = mp.sqrt(1 / k + vv), mp.sqrt(1 / k + ww), mp.sqrt(vv)
            beta = mp.mpf(1) if v == w else k * (xt * yt - vw)
            dist = mp.acosh(beta) / r
            if n == 0 or beta == 1:
                angle = mp.nan
            else:
                cosine = (yt - xt * beta) / (n * mp.sqrt(beta * beta - 1))
                angle = mp.acos(max(min(cosine, mp.mpf(1)), mp.mpf(-1)))
            ratio = mp.mpf(0.2) / (r * n) if n else mp.inf
            aperture = mp.pi / 2 if ratio >= 1 else mp.asin(ratio)
            result.append(Reference(float(dist), float(angle), float(aperture)))
    return result


def columns(pairs: list[Reference]) -> tuple[Tensor, Tensor, Tensor]:
    dist, angle, aperture = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return dist, angle, aperture


def relative(got: Tensor, expected: Tensor) -> Tensor:
    same = got.double() == expected
    return torch.where(same, torch.zeros_like(expected), (got.double() - expected).abs() / expected)


@spaces
@dimensions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_and_angles_from_tangent_vectors(c: float, dim: int, dtype: torch.dtype) -> None:
    v, w, z = generic_pairs(c, dim)
    dist, angle, aperture = columns(references(v, w, c, tangent=True))
    x, y = lorentz.exp_map0(v.to(dtype), c), lorentz.exp_map0(w.to(dtype), c)
    if dtype == torch.float32:
        limit, angle_limit = torch.where(z <= 5, 1e-5, 5e-4), 1e-4
    else:
        limit, angle_limit = torch.full_like(z, 1e-10), 1e-10
    pairwise_dist = lorentz.pairwise_dist(x, y, c).diagonal()
    pairwise_angle = cones.pairwise_exterior_angle(x, y, c).diagonal()
    assert (relative(lorentz.dist(x, y, c), dist) <= limit).all()
    assert (relative(pairwise_dist, dist) <= limit).all()
    assert (relative(lorentz.dist0(x, c), v.norm(dim=-1)) <= limit).all()
    assert ((cones.exterior_angle(x, y, c) - angle).abs() <= angle_limit).all()
    assert ((pairwise_angle - angle).abs() <= angle_limit).all()
    assert ((cones.half_aperture(x, c) - aperture).abs() <= angle_limit).all()


@spaces
@dimensions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_pairs_are_exact_to_their_coordinates(
    c: float, dim: int, dtype: torch.dtype
) -> None:
    x, y = (p.to(dtype) for p in degenerate_pairs(c, dim))
    dist, angle, _ = columns(references(x, y, c))
    # nothing but the rounding of the result in float32
    limit = 1e-6 if dtype == torch.float32 else 1e-10
    assert (relative(lorentz.dist(x, y, c), dist) <= limit).all()
    assert (relative(lorentz.pairwise_dist(x, y, c).diagonal(), dist) <= limit).all()
    defined = ~angle.isnan()
    for got in (
        cones.exterior_angle(x, y, c),
        cones.pairwise_exterior_angle(x, y, c).diagonal(),
    ):
        assert ((got - angle)[defined].abs() <= limit).all()
        assert (got[(x == y).all(-1)] == 0).all()
    assert (~defined).sum() == (x == y).all(-1).sum()


@spaces
def test_exponential_and_logarithm_at_the_origin(c: float) -> None:
    v, _, _ = generic_pairs(c, 8)
    with mp.workdps(DIGITS):
        r = mp.sqrt(mp.mpf(c))
        z = [r * mp.sqrt(a.dot(a)) for a in map(Exact.of, v.tolist())]
        sinh = torch.tensor([float(mp.sinh(a) / a) for a in z], dtype=torch.float64)
        asinh = torch.tensor([float(mp.asinh(a) / a) for a in z], dtype=torch.float64)
    torch.testing.assert_close(lorentz.exp_map0(v, c), v * sinh[:, None], rtol=1e-13, atol=0)
    torch.testing.assert_close(lorentz.log_map0(v, c), v * asinh[:, None], rtol=1e-13, atol=0)
    # r|v| itself is rounded to float32, which sinh multiplies by up to 11
    single = lorentz.exp_map0(v.float(), c).double()
    torch.testing.assert_close(single, v * sinh[:, None], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_agrees_with_the_reference(dtype: torch.dtype) -> None:
    for c in (0.1, 2.3):
        x, y = (p.to(dtype) for p in degenerate_pairs(c, 8))
        _, angle, aperture = columns(references(x, y, c))
        got = cones.pairwise_margin(x, y, c, eta=0.7).diagonal()
        expected = 0.7 * aperture - torch.where(angle.isnan(), torch.zeros_like(angle), angle)
        assert ((got - expected).abs() <= (1e-4 if dtype == torch.float32 else 1e-10)).all()


@spaces
def test_the_aperture_near_saturation(c: float) -> None:
    ratio = torch.tensor([0.5, 0.999, 1.001, 1.01, 1.5, 10.0, 1e4], dtype=torch.float64)
    x = torch.zeros(len(ratio), 8, dtype=torch.float64)
    x[:, 3] = 0.2 * ratio / math.sqrt(c)
    _, _, expected = columns(references(x, x, c))
    assert ((cones.half_aperture(x, c) - expected).abs() <= 1e-10).all()
    _, _, expected = columns(references(x.float(), x.float(), c))
    assert ((cones.half_aperture(x.float(), c) - expected).abs() <= 1e-6).all()
    assert cones.half_aperture(x, c, 0.2)[4] == math.pi / 2  # K doubled: 2K/(r|x|) = 4/3
