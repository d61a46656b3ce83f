"""One object per geometry, so that a model or a loss names its space and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hysafe.errors import ConfigError
from hysafe.geometry import cones, euclidean, lorentz

__all__ = ["Space", "get_space"]


@dataclass(frozen=True)
class Space:
    """The functions of one geometry; all take space components [..., D] and the curvature c."""

    name: str
    exp_map0: Callable[..., Tensor]
    log_map0: Callable[..., Tensor]
    dist: Callable[..., Tensor]
    pairwise_dist: Callable[..., Tensor]
    dist0: Callable[..., Tensor]
    half_aperture: Callable[..., Tensor]
    exterior_angle: Callable[..., Tensor]
    pairwise_exterior_angle: Callable[..., Tensor]
    pairwise_margin: Callable[..., Tensor]


_SPACES = {
    "lorentz": Space(
        "lorentz",
        lorentz.exp_map0,
        lorentz.log_map0,
        lorentz.dist,
        lorentz.pairwise_dist,
        lorentz.dist0,
        cones.half_aperture,
        cones.exterior_angle,
        cones.pairwise_exterior_angle,
        cones.pairwise_margin,
    ),
    "euclidean": Space(
        "euclidean",
        euclidean.exp_map0,
        euclidean.log_map0,
        euclidean.dist,
        euclidean.pairwise_dist,
        euclidean.dist0,
        euclidean.half_aperture,
        euclidean.exterior_angle,
        euclidean.pairwise_exterior_angle,
        euclidean.pairwise_margin,
    ),
}


def get_space(name: str) -> Space:
    """The geometry called `name`: ``lorentz`` or ``euclidean`` (the control)."""
    if name not in _SPACES:
        raise ConfigError(f"space: got {name!r}, wanted one of {', '.join(sorted(_SPACES))}.")
    return _SPACES[name]
