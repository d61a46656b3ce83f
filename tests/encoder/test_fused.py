"""The image tower that is made ready to encode: same features, and never where it must not be used."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from hysafe.encoder.fused import FusedTrunk, fused_trunk
from hysafe.encoder.model import HyperbolicEncoder
from hysafe.encoder.pretrained import resolve_folder


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


def test_other_weights_are_not_encoded_with_the_old_ones() -> None:
    trunk = small()
    fused = fused_trunk(trunk, 64)
    assert fused is not None
    assert fused.fresh()
    with torch.no_grad():
        trunk.conv1[0].weight.mul_(2)
    assert not fused.fresh()


def test_the_bundled_model_encodes_with_it_where_no_gradient_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = HyperbolicEncoder.load_directory(resolve_folder("mini"))
    towers = encoder.towers
    assert towers._fused is None
    encoder.prepare_inference()
    assert towers._fused is not None
    calls: list[int] = []
    run = FusedTrunk.__call__
    monkeypatch.setattr(
        FusedTrunk, "__call__", lambda self, x: calls.append(len(x)) or run(self, x)
    )
    pixels = torch.randint(0, 255, (5, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        found = towers.encode_image(pixels)
    assert calls == [5]
    plain = towers.encode_image(pixels)  # with gradients
    assert plain.requires_grad
    torch.testing.assert_close(found, plain.detach(), rtol=1e-3, atol=1e-4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        towers.encode_image(pixels)
    with torch.no_grad():
        towers.train()
        towers.encode_image(pixels)
        towers.eval()
        copies = [copy.deepcopy(towers), pickle.loads(pickle.dumps(towers))]
        for one in copies:
            torch.testing.assert_close(one.encode_image(pixels), towers.model.encode_image(
                (pixels.float() / 255 - towers.mean) / towers.std), rtol=1e-3, atol=1e-4)  # fmt: skip
        copies[0].double().encode_image(pixels)
        towers.model.visual.trunk.conv1[0].weight.mul_(2)
        towers.encode_image(pixels)
    assert calls == [5]
