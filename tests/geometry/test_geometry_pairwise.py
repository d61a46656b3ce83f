"""Pairwise functions equal the element-wise ones, and the cone kernel equals the stable margin."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hysafe.errors import ShapeError
from hysafe.geometry import cones, get_space, lorentz, numerics

DIM = 64
# What DESIGN allows an angle of the kernel, in radians.
KERNEL_LIMIT = 1e-4


def directions(count: int, seed: int, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(v, dim=-1)


def at_radius(v: Tensor, low: float, high: float, c: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    radius = low + (high - low) * torch.rand(len(v), 1, generator=generator, dtype=torch.float64)
    return v * torch.sinh(radius) / math.sqrt(c)


def close_cloud(x: Tensor, seed: int) -> Tensor:
    """Seven points for each apex: itself, within 1e-6, 1e-3 and 1 % of it, and on its axis."""
    t = directions(len(x), seed, x.shape[1]) * x.norm(dim=-1, keepdim=True)
    return torch.cat([x, x + 1e-6 * t, x - 1e-3 * t, 1.01 * x, 3 * x, -0.5 * x, -3 * x])


def hard_points(c: float, count: int = 40) -> tuple[Tensor, Tensor]:
    """Apexes and points in float64: random, near each other, collinear, at the origin, far out."""
    x = torch.cat(
        [
            at_radius(directions(count, 0), 0.3, 1.5, c, 1),
            at_radius(directions(4, 2), 1e-8, 1e-6, c, 3),
            at_radius(directions(4, 4), 5.0, 11.0, c, 5),
            torch.zeros(1, DIM, dtype=torch.float64),
        ]
    )
    y = torch.cat([at_radius(directions(count, 6), 1.0, 3.0, c, 7), x, close_cloud(x, 8)])
    return x, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("geometry", ["lorentz", "euclidean"])
def test_pairwise_equals_element_wise(geometry: str, c: float, dtype: torch.dtype) -> None:
    space = get_space(geometry)
    x, y = (p.to(dtype) for p in hard_points(c))
    limit = 2e-6 if dtype == torch.float32 else 1e-10
    dist = space.dist(x[:, None], y[None], c)
    torch.testing.assert_close(space.pairwise_dist(x, y, c), dist, rtol=limit, atol=0)
    angle = space.exterior_angle(x[:, None], y[None], c)
    torch.testing.assert_close(space.pairwise_exterior_angle(x, y, c), angle, rtol=0, atol=limit)
    expected = 0.7 * space.half_aperture(x, c)[None] - angle.T
    got = space.pairwise_margin(x, y, c, eta=0.7)
    torch.testing.assert_close(got, expected, rtol=0, atol=max(limit, KERNEL_LIMIT / 10))


def test_pairwise_inner_is_the_product_of_all_pairs() -> None:
    x, y = hard_points(1.0)
    expected = lorentz.inner(x[:, None], y[None], 1.0)
    scale = lorentz.time(x, 1.0)[:, None] * lorentz.time(y, 1.0)[None]
    assert ((lorentz.pairwise_inner(x, y, 1.0) - expected).abs() <= 1e-13 * scale).all()


@pytest.mark.parametrize("c", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("apexes", [3, 300])
def test_the_kernel_equals_the_stable_margin(apexes: int, c: float) -> None:
    """Few close pairs among many: the product form with single pairs redone."""
    x = at_radius(directions(apexes, 0, 512), 0.3, 1.5, c, 1)
    y = at_radius(directions(600, 2, 512), 1.0, 3.0, c, 3)
    y = torch.cat([y, close_cloud(x[:12], 4)])
    x, y = x.float(), y.float()
    expected = cones.pairwise_margin(x.double(), y.double(), c, eta=1.2, min_radius=0.05)
    got = cones.pairwise_margin(x, y, c, eta=1.2, min_radius=0.05)
    assert ((got - expected).abs() <= KERNEL_LIMIT).all()
    y, got = y[-200:], got[-200:, :3]  # the close ones once more, pair by pair
    expected = cones.margin(x[None, :3], y[:, None], c, eta=1.2, min_radius=0.05)
    assert ((got - expected).abs() <= KERNEL_LIMIT).all()


@pytest.mark.parametrize("apexes", [3, 300])
def test_the_kernel_is_right_where_everything_is_close(apexes: int) -> None:
    """A collapsed model: all points within 1 % of all apexes, and members deep inside cones."""
    x = at_radius(directions(1, 0), 1.0, 1.0, 1.0, 1)
    x = x * (1 + 0.01 * directions(apexes, 2))
    y = torch.cat([close_cloud(x[:3], 3), x[0] * (2 + 0.001 * directions(50, 4))])
    expected = cones.margin(x.float()[None], y.float()[:, None], 1.0)
    got = cones.pairwise_margin(x.float(), y.float(), 1.0)
    assert ((got - expected).abs() <= KERNEL_LIMIT).all()


def test_the_kernel_at_the_edge_of_the_redone_region() -> None:
    """Angles at the origin from 1e-4 to a right angle, where the product form takes over."""
    u, t = directions(2, 0, 512)
    t = torch.nn.functional.normalize(t - (t @ u) * u, dim=0)
    theta = torch.logspace(-4, math.log10(math.pi / 2), 400, dtype=torch.float64)[:, None]
    others = at_radius(directions(100, 1, 512), 0.3, 1.5, 1.0, 2)
    for rho, sigma in itertools.product((1e-3, 0.3, 1.5, 3.0, 8.0), (1e-3, 0.5, 1.5, 3.0, 8.0)):
        # the axis alone would be redone by the float64 product: other apexes keep the pairs few
        x = torch.cat([math.sinh(rho) * u[None], others]).float()
        y = (math.sinh(sigma) * (theta.cos() * u + theta.sin() * t)).float()
        expected = cones.margin(x[:1], y, 1.0)
        got = cones.pairwise_margin(x, y, 1.0)[:, 0]
        assert ((got - expected).abs() <= KERNEL_LIMIT).all(), (rho, sigma)


def test_the_kernel_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks with single pairs redone by themselves, and one in which most are."""
    x = at_radius(directions(40, 0), 0.3, 1.5, 1.0, 1).float()
    y = torch.cat([at_radius(directions(400, 2), 1.0, 3.0, 1.0, 3).float(), x, 1.001 * x])
    y = torch.cat([y, x[:1] * torch.linspace(1, 3, 40)[:, None]])
    x[1:] = torch.where(torch.arange(39)[:, None] < 10, x[:1] * 1.5, x[1:])
    for dtype in (torch.float32, torch.float64):
        whole = cones.pairwise_margin(x.to(dtype), y.to(dtype), 1.0)
        with monkeypatch.context() as patch:
            patch.setattr(cones, "CHUNK_ELEMENTS", 40 * 33)
            patch.setattr(cones, "REFINE_ELEMENTS", 2 * DIM)
            chunks = cones.pairwise_margin(x.to(dtype), y.to(dtype), 1.0)
        torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-5)


def test_the_kernel_writes_into_out() -> None:
    x, y = (p.float() for p in hard_points(1.0))
    expected = cones.pairwise_margin(x, y, 1.0)
    out = torch.full((len(y), 2 * len(x)), math.nan)[:, ::2]  # not contiguous
    assert cones.pairwise_margin(x, y, 1.0, out=out) is out
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    double = torch.empty(len(y), len(x), dtype=torch.float64)
    cones.pairwise_margin(x.double(), y.double(), 1.0, out=double)
    torch.testing.assert_close(double.float(), expected, rtol=0, atol=KERNEL_LIMIT)


def test_out_that_does_not_fit_is_refused() -> None:
    x, y = torch.randn(3, 4), torch.randn(5, 4)
    for out in (torch.empty(3, 5), torch.empty(5, 3, dtype=torch.float64)):
        with pytest.raises(ShapeError, match="out expected"):
            cones.pairwise_margin(x, y, 1.0, out=out)
    with pytest.raises(ShapeError, match="no_grad"):
        cones.pairwise_margin(x.requires_grad_(), y, 1.0, out=torch.empty(5, 3))


def test_shapes_that_do_not_fit_are_refused() -> None:
    for function in (lorentz.pairwise_dist, cones.pairwise_exterior_angle, cones.pairwise_margin):
        with pytest.raises(ShapeError, match=r"\[B1, D\]"):
            function(torch.zeros(4), torch.zeros(2, 4), 1.0)
        with pytest.raises(ShapeError, match=r"\[B1, D\]"):
            function(torch.zeros(2, 3), torch.zeros(2, 4), 1.0)


@pytest.mark.parametrize(("apexes", "count"), [(0, 4), (4, 0), (0, 0)])
def test_empty_sides_give_empty_results(apexes: int, count: int) -> None:
    x, y = torch.zeros(apexes, 3), torch.zeros(count, 3)
    assert cones.pairwise_margin(x, y, 1.0).shape == (count, apexes)
    assert cones.pairwise_exterior_angle(x, y, 1.0).shape == (apexes, count)
    assert lorentz.pairwise_dist(x, y, 1.0).shape == (apexes, count)


def test_a_broken_point_stays_visible() -> None:
    """NaN in, NaN out, for that point only: never "inside" and never another row's business."""
    x, y = (p.float() for p in hard_points(1.0))
    expected = cones.pairwise_margin(x, y, 1.0)
    broken = y.clone()
    broken[5, 3] = math.nan
    got = cones.pairwise_margin(x, broken, 1.0)
    assert got[5].isnan().all()
    kept = torch.arange(len(y)) != 5
    torch.testing.assert_close(got[kept], expected[kept], rtol=0, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(
    "function",
    [
        cones.pairwise_margin,
        lambda x, y, c: cones.pairwise_margin(x.double(), y.double(), c),
        cones.pairwise_exterior_angle,
        lorentz.pairwise_dist,
    ],
    ids=["kernel", "margin in float64", "angle", "dist"],
)
def test_no_temporary_of_pairs_times_dimension(
    function: Callable[[Tensor, Tensor, float], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest tensor is as large as the points, though more pairs than points are redone."""
    dim, count = 256, 1000
    x = at_radius(directions(50, 0, dim), 0.3, 1.5, 1.0, 1)
    y = at_radius(directions(count, 2, dim), 1.0, 3.0, 1.0, 3)
    x[:5] = x[0] * (1 + 1e-6 * torch.arange(5, dtype=torch.float64))[:, None]
    y[:500] = x[0] * (1 + 1e-5 * directions(500, 4, dim))
    monkeypatch.setattr(cones, "REFINE_ELEMENTS", 20 * dim)
    monkeypatch.setattr(numerics, "REFINE_ELEMENTS", 20 * dim)
    with LargestTensor() as largest:
        function(x.float(), y.float(), 1.0)
    assert largest.elements == count * dim
