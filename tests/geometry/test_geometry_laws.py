"""Laws of hyperbolic space and of its cones, on points drawn by Hypothesis."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hysafe.geometry import cones, euclidean, lorentz

DIM = 4
# slack for float64 rounding at the radii drawn here
SLACK = 1e-9

laws = settings(max_examples=40, deadline=None, derandomize=True)
curvatures = st.floats(0.1, 10.0)
seeds = st.integers(0, 2**31)


def directions(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(v, dim=-1)


def points(seed: int, count: int, c: float, largest: float = 6.0) -> Tensor:
    """[count, DIM] at radii from 1e-6 to `largest` (times 1/r), some close to each other."""
    generator = torch.Generator().manual_seed(seed + 1)
    log = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    radius = 1e-6 * (largest / 1e-6) ** log
    return lorentz.exp_map0(directions(seed, count) * radius / math.sqrt(c), c)


def step(x: Tensor, angle: Tensor, length: Tensor, c: float, seed: int) -> Tensor:
    """exp_x: the point at `length` (times 1/r) from x, at `angle` to its outward ray. [B, D]."""
    n = x.norm(dim=-1, keepdim=True)
    u = x / n
    t = directions(seed, len(x))
    t = torch.nn.functional.normalize(t - (t * u).sum(-1, keepdim=True) * u, dim=-1)
    r = math.sqrt(c)
    time = (1 + c * n.square()).sqrt()
    tangent = angle.cos()[:, None] * time * u + angle.sin()[:, None] * t
    return length.cosh()[:, None] * x + length.sinh()[:, None] / r * tangent


@laws
@given(seeds, curvatures)
def test_distance_is_symmetric_and_zero_only_on_the_diagonal(seed: int, c: float) -> None:
    x, y = points(seed, 16, c), points(seed + 2, 16, c)
    forward = lorentz.dist(x, y, c)
    torch.testing.assert_close(forward, lorentz.dist(y, x, c), rtol=1e-12, atol=0)
    assert (forward > 0).all()
    assert (lorentz.dist(x, x, c) == 0).all()


@laws
@given(seeds, curvatures)
def test_triangle_inequality(seed: int, c: float) -> None:
    x = points(seed, 8, c)
    d = lorentz.dist(x[:, None], x[None], c)
    detour = (d[:, :, None] + d[None, :, :]).amin(dim=1)
    assert (d <= detour + SLACK).all()
    radius = lorentz.dist0(x, c)
    assert (d <= radius[:, None] + radius[None] + SLACK).all()
    assert (d >= (radius[:, None] - radius[None]).abs() - SLACK).all()


@laws
@given(seeds, curvatures)
def test_exponential_and_logarithm_are_inverse(seed: int, c: float) -> None:
    x = points(seed, 16, c, largest=11.0)
    v = lorentz.log_map0(x, c)
    torch.testing.assert_close(lorentz.exp_map0(v, c), x, rtol=1e-12, atol=0)
    torch.testing.assert_close(v.norm(dim=-1), lorentz.dist0(x, c), rtol=1e-12, atol=0)
    origin = torch.zeros_like(x)
    torch.testing.assert_close(lorentz.dist(x, origin, c), lorentz.dist0(x, c), rtol=1e-12, atol=0)


@laws
@given(seeds, curvatures, st.floats(0.05, 20.0))
def test_distance_scales_with_the_space_and_angles_stay(seed: int, c: float, s: float) -> None:
    x, y = points(seed, 16, c), points(seed + 2, 16, c)
    to = c / s**2
    torch.testing.assert_close(
        lorentz.dist(s * x, s * y, to), s * lorentz.dist(x, y, c), rtol=1e-11, atol=0
    )
    for function in (cones.exterior_angle, cones.margin, cones.energy):
        torch.testing.assert_close(
            function(s * x, s * y, to), function(x, y, c), rtol=0, atol=SLACK
        )
    torch.testing.assert_close(
        lorentz.exp_map0(s * x / x.norm(), to), s * lorentz.exp_map0(x / x.norm(), c)
    )
    torch.testing.assert_close(
        cones.pairwise_margin((s * x).float(), (s * y).float(), to),
        cones.pairwise_margin(x.float(), y.float(), c),
        rtol=0,
        atol=1e-5,
    )


@laws
@given(seeds, curvatures, st.floats(1e-3, math.pi - 1e-3), st.floats(1e-3, 5.0))
def test_a_step_from_the_apex_is_found_again(
    seed: int, c: float, angle: float, length: float
) -> None:
    """The exponential map at x is not used by the library: distance and angle must undo it."""
    x = points(seed, 16, c)
    phi, d = torch.full((16,), angle).double(), torch.full((16,), length).double()
    y = step(x, phi, d, c, seed + 2)
    torch.testing.assert_close(lorentz.dist(x, y, c), d / math.sqrt(c), rtol=1e-9, atol=0)
    torch.testing.assert_close(cones.exterior_angle(x, y, c), phi, rtol=0, atol=1e-8)


@laws
@given(seeds, curvatures, st.floats(0.3, 1.5), st.floats(0.01, 3.0))
def test_the_margin_is_positive_inside_only(seed: int, c: float, eta: float, length: float) -> None:
    x = points(seed, 16, c, largest=4.0)
    edge = eta * cones.half_aperture(x, c)
    d = torch.full((16,), length).double()
    inside, outside = step(x, edge * 0.99, d, c, seed + 2), step(x, edge * 1.01, d, c, seed + 2)
    assert (cones.margin(x, inside, c, eta=eta) > 0).all()
    assert (cones.margin(x, outside, c, eta=eta) < 0).all()
    assert (cones.energy(x, inside, c, eta=eta) == 0).all()
    torch.testing.assert_close(
        cones.energy(x, outside, c, eta=eta), -cones.margin(x, outside, c, eta=eta)
    )


@laws
@given(seeds, curvatures)
def test_cones_are_nested(seed: int, c: float) -> None:
    """Ganea et al. 2018: what lies in a child's cone lies in the cone of its parent."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(4, 16, generator=generator, dtype=torch.float64)
    # apexes beyond the saturated ball, where the construction holds
    x = directions(seed, 16) * (0.21 + 2 * share[0])[:, None] / math.sqrt(c)
    y = step(x, share[1] * cones.half_aperture(x, c), 3 * share[2], c, seed + 1)
    z = step(y, share[3] * cones.half_aperture(y, c), 3 * share[2], c, seed + 2)
    assert (cones.margin(x, y, c) >= -SLACK).all()
    assert (cones.margin(y, z, c) >= -SLACK).all()
    assert (cones.margin(x, z, c) >= -SLACK).all()


@laws
@given(seeds, curvatures, st.floats(0.0, 8.0))
def test_to_radius_moves_along_the_ray(seed: int, c: float, radius: float) -> None:
    x = points(seed, 16, c)
    target = torch.linspace(0, radius, 16, dtype=torch.float64)
    moved = lorentz.to_radius(x, target, c)
    torch.testing.assert_close(lorentz.dist0(moved, c), target, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        moved.norm(dim=-1), lorentz.space_norm_at_radius(target, c), rtol=1e-12, atol=1e-15
    )
    axis = torch.nn.functional.normalize(x, dim=-1)
    torch.testing.assert_close(moved, axis * moved.norm(dim=-1, keepdim=True))


def test_to_radius_leaves_the_origin_and_its_gradient_finite() -> None:
    x = torch.zeros(3, 4, requires_grad=True)
    moved = lorentz.to_radius(x, torch.ones(3), 1.0)
    assert (moved == 0).all()
    moved.sum().backward()
    assert torch.isfinite(x.grad).all()


@laws
@given(seeds, curvatures)
def test_inner_products_tell_the_distance(seed: int, c: float) -> None:
    x, y = points(seed, 8, c), points(seed + 2, 8, c)
    expected = -torch.cosh(math.sqrt(c) * lorentz.dist(x, y, c)) / c
    torch.testing.assert_close(lorentz.inner(x, y, c), expected, rtol=1e-11, atol=0)
    time = lorentz.time(x, c)
    torch.testing.assert_close(time.square() - x.square().sum(-1), torch.full_like(time, 1 / c))
    # the product rounds relative to its terms
    scale = float((time[:, None] * lorentz.time(y, c)[None]).max())
    product = lorentz.pairwise_inner(x, y, c)
    torch.testing.assert_close(product.diagonal(), expected, rtol=0, atol=1e-13 * scale)


@laws
@given(seeds)
def test_small_hyperbolic_space_is_flat(seed: int) -> None:
    """The Euclidean control is the limit c -> 0, for distances and angles alike."""
    x, y = points(seed, 8, 1.0, largest=2.0), points(seed + 2, 8, 1.0, largest=2.0)
    c = 1e-10
    torch.testing.assert_close(lorentz.dist(x, y, c), euclidean.dist(x, y), rtol=1e-7, atol=0)
    torch.testing.assert_close(
        cones.exterior_angle(x, y, c), euclidean.exterior_angle(x, y), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        lorentz.pairwise_dist(x, y, c), euclidean.pairwise_dist(x, y), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("angle", [0.0, math.pi])
def test_collinear_points_are_on_the_axis(angle: float) -> None:
    x = torch.tensor([[0.3, -0.4, 0.0], [3.0, 1.0, 2.0]], dtype=torch.float64)
    y = x * 2.5 if angle == 0 else x * -0.5
    got = cones.exterior_angle(x, y, 1.0)
    torch.testing.assert_close(got, torch.full_like(got, angle), rtol=0, atol=1e-12)
