"""The image tower that is made ready to encode: same features, and never where it must not be used."""

from __future__ import annotations

import timm
import torch
from torch import nn

from hysafe.app.pipeline import load
from hysafe.encoder.fused import fused_trunk


def small() -> nn.Module:
    torch.manual_seed(0)
    trunk = timm.create_model("resnet10t", num_classes=0)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: nothing is the identity
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return trunk.eval()


def test_gives_the_features_of_the_tower() -> None:
    trunk = small()
    fused = fused_trunk(trunk, 64)
    assert fused is not None
    for count in (1, 3, 17):
        pixels = torch.randn(count, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(fused(pixels), trunk(pixels), rtol=1e-4, atol=1e-4)


def test_leaves_the_tower_as_it_is() -> None:
    trunk = small()
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    fused_trunk(trunk, 64)
    assert before.keys() == trunk.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in trunk.state_dict().items())


def test_is_refused_for_other_towers_and_while_training() -> None:
    assert fused_trunk(timm.create_model("vit_tiny_patch16_224", num_classes=0).eval(), 224) is None
    assert fused_trunk(small().train(), 64) is None
    assert fused_trunk(small().double(), 64) is None


def test_the_bundled_model_encodes_with_it_where_no_gradient_is_asked() -> None:
    towers = load("mini").encoder.towers
    assert towers.fuse()
    pixels = torch.randint(0, 255, (5, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        found = towers.encode_image(pixels)
    calls: list[int] = []
    towers._fused = lambda x: calls.append(len(x)) or x  # type: ignore[func-returns-value]
    plain = towers.encode_image(pixels)  # with gradients
    assert plain.requires_grad
    assert not calls
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        towers.encode_image(pixels)
    assert not calls
    torch.testing.assert_close(found, plain.detach(), rtol=1e-3, atol=1e-4)
