"""Points, Curvature, the registry of spaces and the bridge to geoopt."""

from __future__ import annotations

import math

import pytest
import torch

from hysafe.errors import ConfigError, ShapeError
from hysafe.geometry import BoundedScalar, Curvature, Points, cones, get_space, lorentz
from hysafe.geometry.geoopt_bridge import from_geoopt, riemannian_adam, to_geoopt, to_manifold


def vectors(count: int, seed: int, scale: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, 12, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- Curvature


def test_a_bounded_scalar_starts_where_it_is_told() -> None:
    for init in (0.11, 1.0, 9.5):
        torch.testing.assert_close(Curvature(init)(), torch.tensor(init), rtol=1e-6, atol=0)
    assert not Curvature(1.0).saturated


@pytest.mark.parametrize("raw", [-1e4, -100.0, -3.0, 0.0, 3.0, 100.0, 1e4])
def test_a_bounded_scalar_never_leaves_its_bounds(raw: float) -> None:
    scalar = BoundedScalar(1.0, 0.1, 10.0)
    with torch.no_grad():
        scalar.raw.fill_(raw)
    value = scalar()
    assert torch.tensor(0.1) <= value <= torch.tensor(10.0)
    assert scalar.saturated == (abs(raw) > 5)
    value.backward()
    assert torch.isfinite(scalar.raw.grad)
    if not scalar.saturated:
        assert scalar.raw.grad > 0


def test_a_bounded_scalar_learns_by_gradient_alone() -> None:
    curvature = Curvature(1.0)
    optimizer = torch.optim.Adam(curvature.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (curvature() - 3.0).square().backward()
        optimizer.step()
    assert abs(curvature().item() - 3.0) < 1e-2


def test_a_fixed_scalar_is_a_buffer_and_is_saved() -> None:
    fixed = Curvature(2.0, learnable=False)
    assert list(fixed.parameters()) == []
    other = Curvature(1.0, learnable=False)
    other.load_state_dict(fixed.state_dict())
    assert torch.equal(other(), fixed())
    assert fixed.bfloat16()().dtype == torch.float32


@pytest.mark.parametrize("bounds", [(1.0, 2.0, 3.0), (1.0, 0.0, 2.0), (2.0, 1.0, 2.0)])
def test_bounds_that_do_not_hold_the_start_are_refused(bounds: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="low < init < high"):
        BoundedScalar(*bounds)


# ---------------------------------------------------------------- Points and spaces


@pytest.mark.parametrize("geometry", ["lorentz", "euclidean"])
def test_points_answer_with_the_functions_of_their_space(geometry: str) -> None:
    space = get_space(geometry)
    c = torch.tensor(1.7)
    v, w = vectors(5, 0), vectors(3, 1)
    x, y = Points.from_tangent(v, c, geometry), Points.from_tangent(w, c, geometry)
    assert len(x) == 5
    torch.testing.assert_close(x.tangent(), v)
    torch.testing.assert_close(x.radius(), v.norm(dim=-1))
    assert torch.equal(x.dist(y), space.pairwise_dist(x.space, y.space, c))
    margins = space.pairwise_margin(y.space, x.space, c, eta=0.7)
    assert torch.equal(x.margin(y, eta=0.7), margins)
    assert margins.shape == (5, 3)
    for index in (slice(1, 3), [0, 4], torch.tensor([True, False, True, False, False])):
        part = x[index]
        assert part.geometry == geometry
        assert part.c is c
        assert torch.equal(part.space, x.space[index])


def test_points_that_are_not_points_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[B, D\], got \(512,\)"):
        Points(torch.zeros(512), 1.0)
    with pytest.raises(ShapeError, match="Leave autocast"):
        Points(torch.zeros(2, 4, dtype=torch.bfloat16), 1.0)
    with pytest.raises(ShapeError, match="scalar tensor"):
        Points(torch.zeros(2, 4), torch.ones(1))
    with pytest.raises(ConfigError, match="> 0"):
        Points(torch.zeros(2, 4), -1.0)
    with pytest.raises(ConfigError, match="wanted one of euclidean, lorentz"):
        Points(torch.zeros(2, 4), 1.0, "spherical").radius()


def test_points_of_two_spaces_do_not_mix() -> None:
    x = Points(vectors(2, 0), 1.0)
    assert x.dist(Points(vectors(2, 1), torch.tensor(1.0))).shape == (2, 2)
    for other in (Points(vectors(2, 1), 2.0), Points(vectors(2, 1), 1.0, "euclidean")):
        with pytest.raises(ShapeError, match="two spaces"):
            x.dist(other)
        with pytest.raises(ShapeError, match="two spaces"):
            x.margin(other)
    flat = Points(vectors(2, 0), 1.0, "euclidean")
    assert flat.dist(Points(vectors(2, 1), 2.0, "euclidean")).shape == (2, 2)


# ---------------------------------------------------------------- geoopt, an independent reference


@pytest.mark.parametrize("c", [0.1, 1.0, 2.3, 10.0])
def test_geoopt_agrees_on_distances_and_on_the_exponential_map(c: float) -> None:
    manifold = to_manifold(c)
    v, w = vectors(6, 0) / math.sqrt(c), vectors(6, 1) / math.sqrt(c)
    x, y = lorentz.exp_map0(v, c), lorentz.exp_map0(w, c)
    padded = torch.cat((torch.zeros(6, 1, dtype=torch.float64), v), dim=-1)
    torch.testing.assert_close(to_geoopt(x, c), manifold.expmap0(padded), rtol=1e-7, atol=1e-9)
    assert manifold.check_point_on_manifold(to_geoopt(x, c), explain=False)
    expected = manifold.dist(to_geoopt(x, c), to_geoopt(y, c))
    torch.testing.assert_close(lorentz.dist(x, y, c), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(
        lorentz.pairwise_dist(x, y, c).diagonal(), expected, rtol=1e-7, atol=0
    )
    expected = manifold.dist0(to_geoopt(x, c))
    torch.testing.assert_close(lorentz.dist0(x, c), expected, rtol=1e-7, atol=0)
    log = manifold.logmap0(to_geoopt(x, c))[:, 1:]
    torch.testing.assert_close(lorentz.log_map0(x, c), log, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("c", [0.1, 1.0, 2.3, 10.0])
def test_geoopt_agrees_on_the_exterior_angle(c: float) -> None:
    """The angle between its logarithms at x, to y and away from the origin."""
    manifold = to_manifold(c)
    space = [lorentz.exp_map0(vectors(6, seed) / math.sqrt(c), c) for seed in (0, 1)]
    x, y = (to_geoopt(p, c) for p in space)
    origin = to_geoopt(torch.zeros_like(space[0]), c)
    ray, way = -manifold.logmap(x, origin), manifold.logmap(x, y)
    cosine = manifold.inner(x, ray, way) / (manifold.norm(ray) * manifold.norm(way))
    got = cones.exterior_angle(*space, c)
    torch.testing.assert_close(got.cos(), cosine, rtol=0, atol=1e-6)


def test_the_way_to_geoopt_and_back() -> None:
    x = lorentz.exp_map0(vectors(4, 0), 2.3)
    assert torch.equal(from_geoopt(to_geoopt(x, 2.3), 2.3), x)
    with pytest.raises(ShapeError, match="k is 1/c"):
        from_geoopt(to_geoopt(x, 2.3), 1 / 2.3)
    with pytest.raises(ShapeError, match="time first"):
        from_geoopt(to_geoopt(x, 2.3).flip(-1), 2.3)
    with pytest.raises(ShapeError, match="off the manifold"):
        from_geoopt(torch.full((1, 3), math.nan), 1.0)


def test_riemannian_adam_brings_a_point_to_its_target() -> None:
    import geoopt

    manifold = to_manifold(1.0)
    target = lorentz.exp_map0(vectors(1, 0), 1.0)
    start = to_geoopt(lorentz.exp_map0(vectors(1, 1), 1.0), 1.0)
    point = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    optimizer = riemannian_adam([point], lr=0.05)
    before = float(lorentz.dist(start[:, 1:], target, 1.0))
    for _ in range(60):
        optimizer.zero_grad()
        lorentz.dist(point[:, 1:], target, 1.0).sum().backward()
        optimizer.step()
    after = float(lorentz.dist(from_geoopt(point.detach(), 1.0), target, 1.0))
    assert after < before / 10
