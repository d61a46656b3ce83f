"""The one file that imports geoopt: conversions to its Lorentz manifold and its optimisers.

geoopt's ``Lorentz(k)`` is the hyperboloid <x,x> = -k, so its k is 1/c here, and it carries the
time component first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hysafe.errors import ShapeError
from hysafe.geometry import lorentz

__all__ = ["from_geoopt", "riemannian_adam", "to_geoopt", "to_manifold"]


def to_manifold(c: Tensor | float) -> Any:
    """The geoopt manifold of curvature -c; its k is float64, so that it fits either precision."""
    import geoopt

    return geoopt.Lorentz(k=torch.tensor(1.0 / float(c), dtype=torch.float64))


def to_geoopt(x: Tensor, c: Tensor | float) -> Tensor:
    """Space components [..., D] -> geoopt points [..., D+1], time first."""
    return torch.cat((lorentz.time(x, c)[..., None], x), dim=-1)


def from_geoopt(x: Tensor, c: Tensor | float, *, tolerance: float = 1e-3) -> Tensor:
    """geoopt points [..., D+1], time first -> space components [..., D].

    Raises:
        ShapeError: where the time component is not the one of the manifold (relative error
            above `tolerance`), most often because time was last or k was taken for c.
    """
    space = x[..., 1:]
    expected = lorentz.time(space, c)
    worst = float(((x[..., 0] - expected).abs() / expected).max()) if x.numel() else 0.0
    if not worst <= tolerance:  # NaN too
        raise ShapeError(
            f"points are off the manifold: time component differs by {worst:.2g} relative. "
            "geoopt carries time first and its k is 1/c."
        )
    return space


def riemannian_adam(parameters: Iterable[Any], lr: float, **kwargs: Any) -> torch.optim.Optimizer:
    """geoopt's RiemannianAdam, for points that are parameters (benchmarks on trees)."""
    import geoopt

    return geoopt.optim.RiemannianAdam(parameters, lr=lr, **kwargs)  # type: ignore[no-any-return]
