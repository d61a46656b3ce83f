"""Wide convolutions as matrix products: the same values and gradients as torch's own."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from hysafe.encoder.unfolded import UnfoldedConv2d, unfold_convolutions


def pair(channels: int, out: int, side: int, stride: int, padding: int) -> tuple[nn.Module, ...]:
    plain = nn.Sequential(nn.Conv2d(channels, out, side, stride, padding, bias=False))
    other = nn.Sequential(nn.Conv2d(channels, out, side, stride, padding, bias=False))
    other.load_state_dict(plain.state_dict())
    assert unfold_convolutions(other) == 1
    return plain, other


@pytest.mark.parametrize(
    ("side", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (5, 2, 2), (3, 1, 0)]
)
@pytest.mark.parametrize("map_side", [5, 6])
def test_values_and_gradients(side: int, stride: int, padding: int, map_side: int) -> None:
    torch.manual_seed(0)
    plain, other = pair(128, 256, side, stride, padding)
    x = torch.randn(3, 128, map_side, map_side + 1).requires_grad_()
    y = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
    ours, theirs = other(y), plain(x)
    slope = torch.randn_like(theirs)
    ours.backward(slope)
    theirs.backward(slope)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(y.grad, x.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other[0].weight.grad, plain[0].weight.grad, atol=1e-4, rtol=1e-4)


def test_gradients_by_finite_differences() -> None:
    conv = UnfoldedConv2d(2, 3, 3, 2, 1, bias=False).double()
    x = torch.randn(2, 2, 4, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: conv(v), (x,))


def test_autocast_computes_in_bfloat16_and_keeps_float_gradients() -> None:
    plain, other = pair(128, 256, 3, 1, 1)
    x = torch.randn(4, 128, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = other(x), plain(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)
    ours.float().square().sum().backward()
    theirs.float().square().sum().backward()
    grad, wanted = other[0].weight.grad, plain[0].weight.grad
    assert grad.dtype == torch.float32
    assert (grad - wanted).norm() < 0.02 * wanted.norm()


def test_only_wide_convolutions_are_taken_and_weights_keep_their_names() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    names = list(model.state_dict())
    taken = unfold_convolutions(model)
    wide = [m for m in model.modules() if isinstance(m, UnfoldedConv2d)]
    assert taken == len(wide) == 4
    assert min(m.in_channels for m in wide) == 128
    assert list(model.state_dict()) == names
    assert unfold_convolutions(model) == 0


def test_without_gradients_it_is_the_plain_convolution() -> None:
    plain, other = pair(128, 256, 3, 1, 1)
    x = torch.randn(2, 128, 4, 4)
    with torch.no_grad():
        assert torch.equal(other(x), plain(x))
