"""Gradients: right in float64, finite in float32 where the formulas are singular."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hysafe.geometry import cones, euclidean, get_space, lorentz

DIM = 6
Pair = Callable[[Tensor, Tensor, Tensor], Tensor]

PAIR_FUNCTIONS: dict[str, Pair] = {
    "dist": lorentz.dist,
    "inner": lorentz.inner,
    "pairwise_dist": lorentz.pairwise_dist,
    "pairwise_inner": lorentz.pairwise_inner,
    "exterior_angle": cones.exterior_angle,
    "pairwise_exterior_angle": cones.pairwise_exterior_angle,
    "margin": cones.margin,
    "energy": cones.energy,
    "pairwise_margin": cones.pairwise_margin,
    "flat dist": euclidean.dist,
    "flat pairwise_dist": euclidean.pairwise_dist,
    "flat exterior_angle": euclidean.exterior_angle,
    "flat pairwise_margin": euclidean.pairwise_margin,
}
POINT_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exp_map0": lorentz.exp_map0,
    "log_map0": lorentz.log_map0,
    "dist0": lorentz.dist0,
    "time": lorentz.time,
    "half_aperture": cones.half_aperture,
    "flat half_aperture": euclidean.half_aperture,
}


def direction(seed: int) -> Tensor:
    v = torch.randn(DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v / v.norm()


def singular_pairs(c: float) -> tuple[Tensor, Tensor]:
    """Rows where a textbook formula has NaN or infinite gradients, x and y [P, DIM]."""
    r = math.sqrt(c)
    u, t = direction(0), direction(1)
    zero = torch.zeros_like(u)
    rows = [(zero, zero), (zero, u), (u, zero), (1e-30 * u, 1e-30 * t)]
    for z in (1e-8, 1e-4, 0.5, 2.0, 5.0, 11.0, 20.0):
        x = u * math.sinh(z) / r
        rows += [
            (x, x),
            (x, -x),
            (x, -0.1 * x),
            (x, 1.5 * x),
            (x, 0.5 * x),
            (x, x * (1 + 1e-7)),
            (x, x + 1e-6 * x.norm() * t),
            (x, t * math.sinh(11) / r),
        ]
    # at, just inside and just outside the saturation of the aperture
    for share in (1 - 1e-7, 1.0, 1 + 2e-7, 1 + 1e-3):
        rows.append((u * 0.2 * share / r, t))
    x, y = (torch.stack(side) for side in zip(*rows, strict=True))
    return x, y


@pytest.mark.parametrize("c", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", PAIR_FUNCTIONS)
def test_pair_gradients_are_finite_in_float32(name: str, c: float) -> None:
    x, y = (p.float().requires_grad_() for p in singular_pairs(c))
    curvature = torch.tensor(c, requires_grad=True)
    value = PAIR_FUNCTIONS[name](x, y, curvature)
    assert torch.isfinite(value).all()
    gradients = torch.autograd.grad(value.sum(), (x, y, curvature), allow_unused=True)
    flat = name.startswith("flat")
    assert [g is None for g in gradients] == [False, False, flat]
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)


@pytest.mark.parametrize("c", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", POINT_FUNCTIONS)
def test_point_gradients_are_finite_in_float32(name: str, c: float) -> None:
    x, _ = singular_pairs(c)
    if name == "exp_map0":
        x = lorentz.log_map0(x, c)
    x = x.float().requires_grad_()
    curvature = torch.tensor(c, requires_grad=True)
    value = POINT_FUNCTIONS[name](x, curvature)
    assert torch.isfinite(value).all()
    gradient = torch.autograd.grad(value.sum(), x)[0]
    assert torch.isfinite(gradient).all()


def test_identical_points_get_no_gradient() -> None:
    x = direction(0)[None].float().requires_grad_()
    y = x.detach().clone().requires_grad_()
    for function in (lorentz.dist, lorentz.pairwise_dist, cones.exterior_angle):
        for gradient in torch.autograd.grad(function(x, y, 1.0).sum(), (x, y)):
            assert (gradient == 0).all()


@pytest.mark.parametrize("function", [lorentz.dist, lorentz.pairwise_dist])
def test_distance_from_the_origin_pulls_along_the_ray(function: Pair) -> None:
    """At the origin the metric is flat: the gradient is the unit vector away from the other."""
    origin, x = torch.zeros(1, DIM), 2 * direction(0)[None].float()
    for a, b in ((origin, x), (x, origin)):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        at_a, at_b = torch.autograd.grad(function(a, b, torch.tensor(2.0)).sum(), (a, b))
        at_origin = at_a if (a == 0).all() else at_b
        torch.testing.assert_close(at_origin, -direction(0)[None].float())


def test_saturated_apertures_get_no_gradient() -> None:
    rows = [[0.05, 0.05], [0.2, 0.0], [0.3, 0.0]]
    x = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    cones.half_aperture(x, 1.0).sum().backward()
    assert (x.grad[:2] == 0).all()
    assert x.grad[2, 0] < 0


def generic(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("name", PAIR_FUNCTIONS)
def test_pair_gradients_are_right(name: str) -> None:
    function = PAIR_FUNCTIONS[name]
    if name.startswith("flat"):
        assert torch.autograd.gradcheck(function, (generic(3, 0), generic(3, 1)))
        return
    for c in (0.3, 4.0):
        curvature = torch.tensor(c, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, (generic(3, 0), generic(3, 1), curvature))


@pytest.mark.parametrize("name", POINT_FUNCTIONS)
def test_point_gradients_are_right(name: str) -> None:
    curvature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    if name.startswith("flat"):
        assert torch.autograd.gradcheck(POINT_FUNCTIONS[name], (generic(3, 0),))
    else:
        assert torch.autograd.gradcheck(POINT_FUNCTIONS[name], (generic(3, 0), curvature))


@pytest.mark.parametrize("function", [lorentz.exp_map0, lorentz.log_map0])
def test_the_maps_are_the_identity_at_the_origin(
    function: Callable[[Tensor, float], Tensor],
) -> None:
    for scale in (0.0, 1e-9):
        x = torch.full((DIM,), scale, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda v: function(v, 2.0), x)
        torch.testing.assert_close(jacobian, torch.eye(DIM, dtype=torch.float64))


@pytest.mark.parametrize("name", ["dist", "exterior_angle"])
def test_pairwise_gradients_are_those_of_the_pairs(name: str) -> None:
    """Also for the pairs that are redone: near, collinear and identical ones."""
    for space in (get_space("lorentz"), get_space("euclidean")):
        x, y = (p[::3].detach().clone() for p in singular_pairs(1.0))
        weight = torch.rand(len(x), len(y), generator=torch.Generator().manual_seed(0)).double()
        results = []
        for function in (getattr(space, f"pairwise_{name}"), getattr(space, name)):
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            pairwise = function.__name__.startswith("pairwise")
            value = function(a, b, 1.0) if pairwise else function(a[:, None], b[None], 1.0)
            results.append(torch.autograd.grad((value * weight).sum(), (a, b)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
