"""Redirect: along the ray, to the first safe place, for whole batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hysafe.errors import ConfigError
from hysafe.geometry import Points
from hysafe.score.redirect import at_radius, redirect

SPACES = [("lorentz", 0.5), ("lorentz", 2.0), ("euclidean", 1.0)]


def points(geometry: str, c: float, count: int = 7) -> Points:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(count, 5, generator=generator, dtype=torch.double)
    return Points.from_tangent(v, c, geometry)


def beyond(limit: float):  # type: ignore[no-untyped-def]
    """A risk that grows with the radius and reaches 0.5 at the limit."""
    return lambda p: torch.sigmoid(p.radius() - limit)


@pytest.mark.parametrize(("geometry", "c"), SPACES)
def test_a_radius_is_a_geodesic_distance_and_the_direction_stays(geometry: str, c: float) -> None:
    x = points(geometry, c)
    radius = torch.linspace(0, 3, len(x), dtype=torch.double)
    moved = at_radius(x, radius)
    torch.testing.assert_close(moved.radius(), radius)
    cosine = torch.cosine_similarity(moved.space[1:], x.space[1:])
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    if geometry == "lorentz":
        norm = torch.sinh(math.sqrt(c) * radius) / math.sqrt(c)
        torch.testing.assert_close(torch.linalg.vector_norm(moved.space, dim=-1), norm)


def test_the_origin_stays() -> None:
    origin = Points(torch.zeros(1, 4, dtype=torch.double), 1.0)
    assert at_radius(origin, torch.ones(1)).space.abs().max() == 0


@pytest.mark.parametrize(("geometry", "c"), SPACES)
def test_risky_points_stop_at_the_border_and_safe_ones_stay(geometry: str, c: float) -> None:
    x = points(geometry, c)
    limit = float(x.radius().median())
    done = redirect(x, beyond(limit), 0.5)
    risky = x.radius() >= limit
    assert risky.any()
    assert not risky.all()
    assert done.reached.all()
    assert done.moved.tolist() == risky.tolist()
    assert done.points.space[~risky].equal(x.space[~risky])
    assert (done.risk < 0.5).all()
    torch.testing.assert_close(
        done.radius[risky], torch.full_like(done.radius[risky], limit), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(done.points.radius(), done.radius)


def test_a_batch_moves_as_its_rows_do() -> None:
    x = points("lorentz", 1.0)
    together = redirect(x, beyond(1.0), 0.5)
    for i in range(len(x)):
        alone = redirect(x[i : i + 1], beyond(1.0), 0.5)
        torch.testing.assert_close(alone.points.space[0], together.points.space[i])


def test_the_first_safe_place_from_outside_counts() -> None:
    x = Points.from_tangent(torch.tensor([[4.0, 0.0]]), 1.0)

    def two_valleys(p: Points) -> Tensor:  # safe in (2, 2.5) and below 1
        r = p.radius()
        return 1.0 - ((r > 2) & (r < 2.5)).double() - (r < 1).double()

    done = redirect(x, two_valleys, 0.5)
    assert float(done.radius) == pytest.approx(2.5, abs=1e-4)


def test_nowhere_safe_is_said_and_ends_where_the_risk_is_least() -> None:
    x = Points.from_tangent(torch.tensor([[4.0, 0.0]]), 1.0)
    done = redirect(x, lambda p: 0.6 + (p.radius() - 1).abs(), 0.5)
    assert not done.reached.any()
    assert float(done.radius) == pytest.approx(1.0, abs=0.1)
    assert float(done.risk) == pytest.approx(0.6, abs=0.1)


def test_a_risk_that_is_no_number_is_not_safe() -> None:
    x = Points.from_tangent(torch.tensor([[4.0, 0.0]]), 1.0)
    done = redirect(x, lambda p: torch.where(p.radius() > 1, torch.nan, 0.9), 0.5)
    assert not done.reached.any()


def test_nothing_to_move_and_wrong_settings() -> None:
    empty = redirect(Points(torch.empty(0, 3), 1.0), beyond(1.0), 0.5)
    assert len(empty.points) == 0
    with pytest.raises(ConfigError, match="steps is 0"):
        redirect(points("lorentz", 1.0), beyond(1.0), 0.5, steps=0)
