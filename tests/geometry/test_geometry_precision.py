"""Dtypes in and out, autocast, and the ways a curvature may be given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hysafe.errors import ConfigError
from hysafe.geometry import cones, euclidean, get_space, lorentz

X = 0.5 * torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
Y = 0.5 * torch.randn(5, 16, generator=torch.Generator().manual_seed(1))

CALLS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "exp_map0": lambda x, y, c: lorentz.exp_map0(x, c),
    "log_map0": lambda x, y, c: lorentz.log_map0(x, c),
    "time": lambda x, y, c: lorentz.time(x, c),
    "dist0": lambda x, y, c: lorentz.dist0(x, c),
    "to_radius": lambda x, y, c: lorentz.to_radius(x, y[..., 0].abs(), c),
    "space_norm_at_radius": lambda x, y, c: lorentz.space_norm_at_radius(x[..., 0], c),
    "inner": lorentz.inner,
    "pairwise_inner": lorentz.pairwise_inner,
    "dist": lorentz.dist,
    "pairwise_dist": lorentz.pairwise_dist,
    "half_aperture": lambda x, y, c: cones.half_aperture(x, c, 0.05),
    "exterior_angle": cones.exterior_angle,
    "pairwise_exterior_angle": cones.pairwise_exterior_angle,
    "margin": cones.margin,
    "energy": cones.energy,
    "pairwise_margin": cones.pairwise_margin,
    "flat exp_map0": lambda x, y, c: euclidean.exp_map0(x, c),
    "flat log_map0": lambda x, y, c: euclidean.log_map0(x, c),
    "flat dist0": lambda x, y, c: euclidean.dist0(x, c),
    "flat dist": euclidean.dist,
    "flat pairwise_dist": euclidean.pairwise_dist,
    "flat half_aperture": lambda x, y, c: euclidean.half_aperture(x, c),
    "flat exterior_angle": euclidean.exterior_angle,
    "flat pairwise_margin": euclidean.pairwise_margin,
}

calls = pytest.mark.parametrize("name", CALLS)


@calls
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_changes_nothing(name: str, grad: bool) -> None:
    x, y = X.clone().requires_grad_(grad), Y.clone().requires_grad_(grad)
    expected = CALLS[name](x, y, 1.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = CALLS[name](x, y, 1.3)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@calls
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_is_float32_or_more(name: str, dtype: torch.dtype) -> None:
    x, y = X.to(dtype), Y.to(dtype)
    got = CALLS[name](x, y, 1.3)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    expected = CALLS[name](x.double(), y.double(), 1.3)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    mixed = CALLS[name](x, y.double(), 1.3)
    assert mixed.dtype in (torch.float32, torch.float64)


@calls
def test_the_curvature_may_be_a_number_or_a_scalar_tensor(name: str) -> None:
    expected = CALLS[name](X, Y, 2.0)
    for c in (2, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64), torch.tensor(2)):
        got = CALLS[name](X, Y, c)
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


def test_arguments_may_be_named() -> None:
    """float64 results of named arguments are as exact as those of positional ones."""
    x, y = X.double(), Y.double()
    for function in (lorentz.dist, cones.exterior_angle, lorentz.pairwise_dist, cones.margin):
        assert torch.equal(function(x=x, y=y, c=1.3), function(x, y, 1.3))
        assert torch.equal(function(x=X, y=Y, c=1.3), function(X, Y, 1.3))


def test_leading_shapes_broadcast() -> None:
    for space in (get_space("lorentz"), get_space("euclidean")):
        x, y = X.reshape(5, 1, 16), Y.reshape(1, 5, 16)
        assert space.dist(x, y, 1.0).shape == (5, 5)
        assert space.exterior_angle(x, y, 1.0).shape == (5, 5)
        assert space.dist(X[0], Y[0], 1.0).shape == ()
        assert space.exp_map0(X.reshape(1, 5, 2, 8), 1.0).shape == (1, 5, 2, 8)
        assert space.half_aperture(X[0], 1.0).shape == ()


@pytest.mark.parametrize("c", [0.0, -1.0, float("nan")])
def test_a_curvature_that_is_not_positive_is_refused(c: float) -> None:
    for function in (lorentz.dist, cones.exterior_angle, cones.pairwise_margin):
        with pytest.raises(ConfigError, match="wanted a number > 0"):
            function(X, Y, c)


def test_inputs_are_left_as_they_were() -> None:
    x, y = X.clone(), Y.clone()
    for call in CALLS.values():
        call(x, y, 1.3)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
