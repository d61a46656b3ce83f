"""Convolutions of many channels over few cells, as matrix products: for training on CPUs.

oneDNN's weight gradient (3.x, bfloat16) of a 3x3 convolution with 512 channels over 4x4 cells takes
many times as long as the matrix product that it is, and late blocks of small pictures are all like
that (``benchmarks/tower_speed.py``). Source of the product: Chellapilla et al. 2006, "High
performance convolutional neural networks for document processing".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["UnfoldedConv2d", "unfold_convolutions"]

# Where products win: wide blocks whose unfolded item is at most this many numbers.
MIN_IN, MIN_OUT, MAX_NUMBERS = 128, 256, 80_000


class UnfoldedConv2d(nn.Conv2d):
    """A convolution that trains by matrix products where these are faster; same weights, same result.

    It falls back to torch's own on other devices, without gradients, and for large maps.
    """

    def forward(self, x: Tensor) -> Tensor:
        side, stride = self.kernel_size[0], self.stride[0]
        cells = (x.shape[-2] // stride) * (x.shape[-1] // stride)
        wide = cells * x.shape[1] * side * side <= MAX_NUMBERS
        if not (wide and torch.is_grad_enabled() and x.device.type == "cpu"):
            return super().forward(x)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        return _Product.apply(x, weight, stride, int(self.padding[0]))  # type: ignore[no-any-return,no-untyped-call]


def unfold_convolutions(module: nn.Module) -> int:
    """Let the wide convolutions inside `module`, in place, train by matrix products.

    Returns:
        How many were changed; weights and their names stay.
    """
    count = 0
    for child in module.modules():
        if type(child) is nn.Conv2d and _suits(child):
            child.__class__ = UnfoldedConv2d
            count += 1
    return count


def _suits(conv: nn.Conv2d) -> bool:
    square = conv.kernel_size[0] == conv.kernel_size[1] and conv.stride[0] == conv.stride[1]
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.bias is None
    padded = not isinstance(conv.padding, str) and conv.padding_mode == "zeros"
    wide = conv.in_channels >= MIN_IN and conv.out_channels >= MIN_OUT
    return bool(
        square and plain and padded and wide and conv.kernel_size[0] > 1
        and conv.padding[0] == conv.padding[1]
    )  # fmt: skip


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        side = weight.shape[-1]
        columns, height, width = _unfold(x, side, stride, padding)
        flat = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)  # [O, k k C]
        ctx.save_for_backward(columns, flat)
        ctx.given = (x.shape, weight.shape, stride, padding, height, width)
        out = columns @ flat.T  # [N H W, O]
        return out.view(len(x), height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        columns, flat = ctx.saved_tensors
        (n, channels, h, w), shape, stride, padding, height, width = ctx.given
        grad = grads[0].permute(0, 2, 3, 1).reshape(n * height * width, -1)  # [N H W, O]
        side = shape[-1]
        for_weight = (grad.T @ columns).view(shape[0], side, side, channels).permute(0, 3, 1, 2)
        if not ctx.needs_input_grad[0]:
            return None, for_weight, None, None
        parts = (grad @ flat).view(n, height, width, side, side, channels)
        padded = grad.new_zeros(n, h + 2 * padding, w + 2 * padding, channels)
        for i in range(side):
            for j in range(side):
                rows, cols = i + stride * height, j + stride * width
                padded[:, i:rows:stride, j:cols:stride] += parts[:, :, :, i, j]
        inner = padded[:, padding : padding + h, padding : padding + w]
        return inner.permute(0, 3, 1, 2), for_weight, None, None


def _unfold(x: Tensor, side: int, stride: int, padding: int) -> tuple[Tensor, int, int]:
    """[N, C, H, W] to [N H' W', k k C], and H', W'."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).contiguous()
    n, h, w, c = x.shape
    height, width = (h - side) // stride + 1, (w - side) // stride + 1
    item, row, cell, one = x.stride()
    windows = x.as_strided(
        (n, height, width, side, side, c), (item, row * stride, cell * stride, row, cell, one)
    )
    return windows.reshape(n * height * width, side * side * c), height, width
