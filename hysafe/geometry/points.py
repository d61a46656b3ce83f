"""Points: a batch of points of one space, the object every stage after the encoder works on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hysafe.errors import ConfigError, ShapeError
from hysafe.geometry.space import Space, get_space

__all__ = ["Points"]

# Curvatures that differ by no more are the same number in float32 and float64.
SAME_C = 1e-6


@dataclass(frozen=True, eq=False)
class Points:
    """Space components with their curvature.

    Args:
        space: [B, D], float32 or float64.
        c: curvature magnitude, a float or scalar tensor > 0.
        geometry: ``lorentz`` or ``euclidean`` (the control; c is then ignored).
    """

    space: Tensor
    c: Tensor | float
    geometry: str = "lorentz"

    def __post_init__(self) -> None:
        if self.space.ndim != 2:
            raise ShapeError(
                f"Points.space expected [B, D], got {tuple(self.space.shape)}. "
                "Add a batch axis: x[None]."
            )
        if self.space.dtype not in (torch.float32, torch.float64):
            raise ShapeError(
                f"Points.space expected float32 or float64, got {self.space.dtype}. "
                "Leave autocast and call .float() before the lift."
            )
        if isinstance(self.c, Tensor):
            if self.c.ndim != 0:
                raise ShapeError(
                    f"Points.c expected a number or a scalar tensor, got {tuple(self.c.shape)}. "
                    "Index it: c[0]."
                )
        elif not self.c > 0:
            raise ConfigError(f"Points.c expected a curvature magnitude > 0, got {self.c}.")

    @classmethod
    def from_tangent(cls, v: Tensor, c: Tensor | float, geometry: str = "lorentz") -> Points:
        """Points from tangent vectors at the origin [B, D]."""
        return cls(get_space(geometry).exp_map0(v, c), c, geometry)

    @property
    def functions(self) -> Space:
        return get_space(self.geometry)

    def __len__(self) -> int:
        return self.space.shape[0]

    def __getitem__(self, index: slice | Tensor | list[int]) -> Points:
        return Points(self.space[index], self.c, self.geometry)

    def tangent(self) -> Tensor:
        """Tangent vectors at the origin [B, D]: what collections store."""
        return self.functions.log_map0(self.space, self.c)

    def radius(self) -> Tensor:
        """Geodesic distances to the origin [B]."""
        return self.functions.dist0(self.space, self.c)

    def dist(self, other: Points) -> Tensor:
        """All geodesic distances [B1, B2]."""
        self._check_same_space(other)
        return self.functions.pairwise_dist(self.space, other.space, self.c)

    def margin(self, apexes: Points, *, eta: float = 1.0) -> Tensor:
        """Cone margins of these points to the apexes, [B, N] radians, > 0 inside."""
        self._check_same_space(apexes)
        return self.functions.pairwise_margin(apexes.space, self.space, self.c, eta=eta)

    def _check_same_space(self, other: Points) -> None:
        # float(c) waits for the device: asked only where the two are not one object
        flat = self.geometry == "euclidean"
        same_c = flat or self.c is other.c
        same_c = same_c or math.isclose(float(self.c), float(other.c), rel_tol=SAME_C)
        if self.geometry != other.geometry or not same_c:
            raise ShapeError(
                f"points of two spaces: {self.geometry} c={float(self.c):g} and "
                f"{other.geometry} c={float(other.c):g}. Encode both with the same model."
            )
