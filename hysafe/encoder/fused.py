"""A convolutional image tower made ready to encode on CPUs: batch norm folded in, oneDNN's own layout.

The weights are reordered once instead of at each call, and maps stay in the layout that oneDNN's
convolutions want: a sixth less time (``benchmarks/tower_speed.py``), the same features but for the
last bits.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from timm.models import ResNet
from torch import Tensor, nn

__all__ = ["fused_trunk"]

# Features of the fused tower may differ by this share of the greatest one.
TOLERANCE = 1e-4


def fused_trunk(trunk: nn.Module, side: int) -> Callable[[Tensor], Tensor] | None:
    """A form of `trunk` for inference in float32 on CPUs; its weights are copied.

    Args:
        trunk: timm's module in evaluation mode, pictures [B, 3, side, side] -> features [B, E].
        side: of its pictures.

    Returns:
        A function that takes and gives what `trunk` does, without gradients; None for towers other
        than timm's ResNets, other devices, and where oneDNN is missing or gives other features.
    """
    first = next(trunk.parameters(), None)
    if not isinstance(trunk, ResNet) or trunk.training or not torch.backends.mkldnn.is_available():
        return None
    if first is None or first.device.type != "cpu" or first.dtype != torch.float32:
        return None
    from torch.fx.experimental.optimization import fuse
    from torch.utils.mkldnn import to_mkldnn

    probe = torch.linspace(-2, 2, 2 * 3 * side * side).sin().reshape(2, 3, side, side)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # both are marked experimental in torch: what they give is looked at before it is used
            fused = to_mkldnn(fuse(copy.deepcopy(trunk)))  # type: ignore[no-untyped-call]

            def run(x: Tensor) -> Tensor:
                found = fused(x.contiguous().to_mkldnn())
                return found.to_dense() if found.is_mkldnn else found  # type: ignore[no-any-return]

            wanted, found = trunk(probe), run(probe)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
            return None
    if wanted.shape != found.shape:
        return None
    off = (wanted - found).abs().max()
    return run if bool(off <= TOLERANCE * wanted.abs().max()) else None
