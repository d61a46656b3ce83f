"""Working precision and safe primitives for the geometry.

The closed forms of hyperbolic geometry cancel badly in float32, so every function works in float64
and returns the dtype that came in (float32 at least). Doubles are also immune to autocast. Devices
without float64 (MPS) work in float32, outside autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from hysafe.errors import ConfigError

__all__ = ["curvature_like", "in_working_precision", "output_dtype", "refine", "safe_norm"]

F = TypeVar("F", bound=Callable[..., Any])

# Elements (pairs x D) handled at once where pairs are redone one by one: 4 MiB of doubles.
REFINE_ELEMENTS = 1 << 19


def output_dtype(*arguments: Any) -> torch.dtype:
    """The widest dtype among the tensors [...] (scalar tensors do not count), float32 at least."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    dtype = torch.float32
    for tensor in [t for t in tensors if t.ndim > 0] or tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def in_working_precision(function: F) -> F:
    """Run `function` on float64 copies of its tensors and cast the result to `output_dtype`.

    Gradients flow through the casts.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        dtype = output_dtype(*args, *kwargs.values())
        cast = [_working(a) for a in args]
        named = {name: _working(a) for name, a in kwargs.items()}
        if any(isinstance(a, Tensor) and a.device.type == "mps" for a in cast):
            with torch.autocast("mps", enabled=False):
                return function(*cast, **named).to(dtype)
        return function(*cast, **named).to(dtype)

    return wrapper  # type: ignore[return-value]


def curvature_like(c: Tensor | float, x: Tensor) -> Tensor:
    """`c` as a scalar tensor in the dtype and on the device of `x`.

    Raises:
        ConfigError: where c is a number that is not > 0. A tensor is trusted (looking at it would
            wait for the device); :class:`hysafe.geometry.Curvature` keeps it positive.
    """
    if isinstance(c, Tensor):
        return c.to(device=x.device, dtype=x.dtype)
    if not c > 0:
        raise ConfigError(f"curvature c: got {c}, wanted a number > 0; the space has curvature -c.")
    return torch.as_tensor(c, device=x.device, dtype=x.dtype)


def safe_norm(x: Tensor, *, keepdim: bool = False) -> Tensor:
    """Euclidean norm over the last axis with gradient 0 (not NaN) at 0."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=keepdim)


def refine(
    result: Tensor,
    where: Tensor,
    x: Tensor,
    y: Tensor,
    function: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`result` [B1, B2] with the pairs in `where` replaced by function(x_i, y_j), in chunks."""
    rows, columns = where.nonzero(as_tuple=True)
    if rows.numel() == 0:
        return result
    pairs = max(1, REFINE_ELEMENTS // max(1, x.shape[1]))
    parts = [
        function(x[i], y[j]) for i, j in zip(rows.split(pairs), columns.split(pairs), strict=True)
    ]
    return result.index_put((rows, columns), torch.cat(parts))


def _working(a: Any) -> Any:
    if not isinstance(a, Tensor):
        return a
    return a.to(torch.float32 if a.device.type == "mps" else torch.float64)
