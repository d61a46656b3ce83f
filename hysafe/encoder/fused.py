"""A convolutional image tower made ready to encode on CPUs: batch norm folded in, oneDNN's own layout.

Maps stay in the layout that oneDNN's convolutions want from the first to the last, and a pass over memory for
each norm is saved: a fifth less time (``benchmarks/tower_speed.py``), the same features but for the last bits.
"""

from __future__ import annotations

import copy

import torch
from timm.models import ResNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["FusedTrunk", "fused_trunk"]

# Features of the fused tower may differ by this share of the greatest one.
TOLERANCE = 1e-4


class FusedTrunk:
    """A copy of a tower for inference in float32 on CPUs; see :func:`fused_trunk`."""

    def __init__(self, trunk: nn.Module) -> None:
        self._trunk = trunk
        self._mark = _mark(trunk)
        self._fused = copy.deepcopy(trunk).requires_grad_(False)
        _fold(self._fused)
        _reorder(self._fused)

    def fresh(self) -> bool:
        """Whether the tower is still as it was copied."""
        return _mark(self._trunk) == self._mark

    def __call__(self, x: Tensor) -> Tensor:
        """Features [B, E] of pictures [B, 3, S, S], float32, without gradients."""
        found = self._fused(x.contiguous().to_mkldnn())
        return found.to_dense() if found.is_mkldnn else found  # type: ignore[no-any-return]


def fused_trunk(trunk: nn.Module, side: int) -> FusedTrunk | None:
    """A form of `trunk` for inference in float32 on CPUs; its weights are copied.

    Args:
        trunk: timm's module in evaluation mode, pictures [B, 3, side, side] -> features [B, E].
        side: of its pictures.

    Returns:
        A function that takes and gives what `trunk` does, without gradients; None for towers other
        than timm's ResNets, other devices, and where oneDNN is missing or gives other features.
    """
    if not isinstance(trunk, ResNet) or trunk.training or not torch.backends.mkldnn.is_available():
        return None
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in trunk.parameters()):
        return None
    probe = torch.linspace(-2, 2, 2 * 3 * side * side).sin().reshape(2, 3, side, side)
    with torch.no_grad():
        try:  # not every layer that timm may put into a ResNet has a form in oneDNN
            fused = FusedTrunk(trunk)
            wanted, found = trunk(probe), fused(probe)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
            return None
    if wanted.shape != found.shape:
        return None
    off = (wanted - found).abs().max()
    return fused if bool(off <= TOLERANCE * wanted.abs().max()) else None


def _mark(trunk: nn.Module) -> list[tuple[int, int]]:
    """Changes with every weight that is written or replaced."""
    return [(t.data_ptr(), t._version) for t in (*trunk.parameters(), *trunk.buffers())]


def _fold(module: nn.Module) -> None:
    """Fold each batch norm into the convolution that stands before it, in place."""
    last: tuple[nn.Module, str, nn.Conv2d] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and last is not None:
            owner, place, convolution = last
            setattr(owner, place, fuse_conv_bn_eval(convolution, child))
            setattr(module, name, nn.Identity())
            last = None
        elif isinstance(child, nn.Conv2d):
            last = (module, name, child)
        else:
            _fold(child)
            stem = list(child.named_children()) if isinstance(child, nn.Sequential) else []
            if stem and isinstance(stem[-1][1], nn.Conv2d):
                last = (child, stem[-1][0], stem[-1][1])
            elif not isinstance(child, nn.Identity):
                last = None


def _reorder(module: nn.Module) -> None:
    """Let every convolution hold its weights in oneDNN's layout, in place."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            setattr(module, name, _Convolution(child))
        else:
            _reorder(child)


class _Convolution(nn.Module):
    def __init__(self, of: nn.Conv2d) -> None:
        super().__init__()
        if of.padding_mode != "zeros" or isinstance(of.padding, str):
            raise NotImplementedError(of.padding_mode)
        self.weight = of.weight.detach().to_mkldnn()
        self.bias = None if of.bias is None else of.bias.detach().to_mkldnn()
        self.settings = (of.stride, of.padding, of.dilation, of.groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, *self.settings)  # type: ignore[arg-type]
