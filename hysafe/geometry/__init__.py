"""Hyperbolic geometry: pure functions on space components, cones, points, curvature."""

from hysafe.geometry import cones, euclidean, lorentz
from hysafe.geometry.curvature import BoundedScalar, Curvature
from hysafe.geometry.points import Points
from hysafe.geometry.space import Space, get_space

__all__ = [
    "BoundedScalar",
    "Curvature",
    "Points",
    "Space",
    "cones",
    "euclidean",
    "get_space",
    "lorentz",
]
