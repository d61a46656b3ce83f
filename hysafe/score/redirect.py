r"""Redirect to safe: move risky points towards the origin until no active risk is near.

The geodesic from a point to the origin is its ray, and the point at radius :math:`\tau` on it has
space components of norm :math:`\sinh(r\tau)/r`: the radius is a geodesic distance, not a norm.

Source: the idea is HySAC's (Poppi et al. 2025); its released code has norms in place of radii and
takes one query at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hysafe.errors import ConfigError
from hysafe.geometry import Points

__all__ = ["Redirected", "at_radius", "redirect"]

# Radii looked at between the point and the origin, and halvings of the step that crosses.
STEPS, HALVINGS = 64, 20


class Redirected(NamedTuple):
    """Points moved along their rays.

    Attributes:
        points: [B, D]. radius, risk: [B], of the moved points.
        reached: bool [B], the risk is below the threshold; else the point of least risk on the way.
        moved: bool [B].
    """

    points: Points
    radius: Tensor
    risk: Tensor
    reached: Tensor
    moved: Tensor


def at_radius(points: Points, radius: Tensor) -> Points:
    """Each point [B, D] moved along its ray from the origin to a geodesic radius [B].

    The origin has no ray and stays where it is.
    """
    tangent = points.tangent()
    norm = torch.linalg.vector_norm(tangent, dim=-1)
    factor = torch.where(
        norm > 0, radius.to(norm) / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0
    )
    return Points.from_tangent(tangent * factor[:, None], points.c, points.geometry)


def redirect(
    points: Points,
    risk: Callable[[Points], Tensor],
    threshold: float,
    *,
    steps: int = STEPS,
    halvings: int = HALVINGS,
) -> Redirected:
    """Move each point towards the origin to the first place where the risk is below the threshold.

    A point that is safe stays. The risk need not fall evenly: the ray is searched from the outside
    in `steps` equal steps, and the crossing is then narrowed down, always keeping the safe side.

    Args:
        points: [B, D].
        risk: points [M, D] -> risks [M]; a risk that is no number is no safe one.
        threshold: risks below it are safe.
        steps, halvings: evaluations per point at most, each a batch.

    Returns:
        The moved points in float64.

    Raises:
        ConfigError: `steps` is below 1.
    """
    if steps < 1:
        raise ConfigError(f"redirect: steps is {steps}. Give at least 1.")
    start = Points(points.space.double(), points.c, points.geometry)
    outer = start.radius()
    best_radius, best_risk = outer.clone(), _known(risk(start))
    first = best_risk < threshold
    safe, risky = best_radius.clone(), outer.clone()  # both sides of the crossing
    pending = (~first).nonzero().squeeze(1)
    crossed = [pending[:0]]
    for step in range(1, steps + 1):
        if not len(pending):
            break
        radius = outer[pending] * (1 - step / steps)
        value = _known(risk(at_radius(start[pending], radius)))
        less = value < best_risk[pending]
        best_risk[pending[less]], best_radius[pending[less]] = value[less], radius[less]
        below = value < threshold
        safe[pending[below]] = radius[below]
        crossed.append(pending[below])
        risky[pending[~below]] = radius[~below]
        pending = pending[~below]
    rows = torch.cat(crossed)
    for _ in range(halvings if len(rows) else 0):
        middle = (safe[rows] + risky[rows]) / 2
        value = _known(risk(at_radius(start[rows], middle)))
        below = value < threshold
        safe[rows] = torch.where(below, middle, safe[rows])
        risky[rows] = torch.where(below, risky[rows], middle)
    reached = first.clone()
    reached[rows] = True
    radius = torch.where(reached, safe, best_radius)
    moved = radius != outer
    made = at_radius(start, radius)
    final = Points(torch.where(moved[:, None], made.space, start.space), points.c, points.geometry)
    last = best_risk.clone()
    if bool(moved.any()):
        last[moved] = _known(risk(final[moved]))
    return Redirected(final, radius, last, reached, moved)


def _known(risk: Tensor) -> Tensor:
    """Risks in float64, infinite where they are no number."""
    return risk.detach().double().nan_to_num(nan=torch.inf)
