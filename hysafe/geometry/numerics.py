"""Working precision and safe primitives for the geometry.

The closed forms of hyperbolic geometry cancel badly in float32, so every element-wise function
works in float64 and returns the dtype that came in (float32 at least). Doubles are also immune to
autocast. Devices without float64 (MPS) work in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["curvature_like", "in_working_precision", "safe_norm", "tiny"]

F = TypeVar("F", bound=Callable[..., Any])

# Rows handled at once by the element-wise refinement of pairwise results; 64k rows x 512 doubles
# are 256 MiB, the largest temporary the geometry makes.
REFINE_ROWS = 65_536


def tiny(dtype: torch.dtype) -> float:
    """Smallest number that is safe as a divisor in `dtype`."""
    return float(torch.finfo(dtype).tiny) ** 0.5


def _working(x: Tensor) -> Tensor:
    if x.device.type == "mps":
        return x.float()
    return x.double()


def in_working_precision(function: F) -> F:
    """Run `function` on float64 copies of its tensors and cast the result back.

    The result has the widest floating dtype among the tensor arguments, float32 at least.
    Gradients flow through the casts.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        vectors = [a for a in args if isinstance(a, Tensor) and a.ndim > 0]
        dtype = torch.float32
        for v in vectors:
            dtype = torch.promote_types(dtype, v.dtype)
        cast = [_working(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        return function(*cast, **kwargs).to(dtype)

    return wrapper  # type: ignore[return-value]


def curvature_like(c: Tensor | float, x: Tensor) -> Tensor:
    """`c` as a scalar tensor in the dtype and on the device of `x`."""
    if isinstance(c, Tensor):
        return c.to(device=x.device, dtype=x.dtype)
    return torch.as_tensor(c, device=x.device, dtype=x.dtype)


def safe_norm(x: Tensor, *, keepdim: bool = False) -> Tensor:
    """Euclidean norm over the last axis with gradient 0 (not NaN) at 0."""
    # scale first, so that neither 1e-160 nor 1e160 leaves the range of the square
    scale = x.detach().abs().amax(dim=-1, keepdim=True)
    zero = scale == 0
    scale = torch.where(zero, torch.ones_like(scale), scale)
    square = (x / scale).square().sum(-1, keepdim=True)
    square = torch.where(zero, torch.ones_like(square), square)
    norm = torch.where(zero, torch.zeros_like(square), square.sqrt() * scale)
    return norm if keepdim else norm.squeeze(-1)
