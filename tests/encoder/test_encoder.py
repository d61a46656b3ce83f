"""The encoder: towers through open_clip, heads, saving, the lift."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hysafe.encoder import HyperbolicEncoder, LorentzHead, NodeHead, mini_architecture
from hysafe.encoder.pretrained import lift_open_clip, load_encoder
from hysafe.encoder.towers import minilm_path
from hysafe.errors import ConfigError, ModelError
from hysafe.geometry import lorentz


@pytest.fixture(scope="module")
def encoder(tiny_folder: Path) -> HyperbolicEncoder:
    return HyperbolicEncoder.load_directory(tiny_folder)


def test_saved_directory_gives_the_same_points_and_hash(
    encoder: HyperbolicEncoder, tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path)
    again = HyperbolicEncoder.from_pretrained(str(tmp_path))
    pixels = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(encoder.encode_image(pixels).space, again.encode_image(pixels).space)
    assert encoder.hash() == again.hash()
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}


def test_hash_changes_with_a_weight(tiny_folder: Path) -> None:
    changed = HyperbolicEncoder.load_directory(tiny_folder)
    before = changed.hash()
    with torch.no_grad():
        changed.heads["text"].linear.weight[0, 0] += 1
    assert changed.hash() != before


def test_saved_config_holds_no_path_of_the_machine(tiny_folder: Path) -> None:
    assert minilm_path() not in (tiny_folder / "config.json").read_text()


def test_folded_adapter_keeps_points_and_hash(tiny_folder: Path) -> None:
    encoder = HyperbolicEncoder.load_directory(tiny_folder)
    for name, p in encoder.named_parameters():
        if "lora_B" in name:  # zero at the start: make the adapter do something
            torch.nn.init.normal_(p, std=0.05)
    plain, before = encoder.hash(), encoder.text_features(["a quiet street", "x"])
    encoder.prepare_inference()
    assert torch.allclose(encoder.text_features(["a quiet street", "x"]), before, atol=1e-4)
    assert encoder.hash() == plain


def test_text_features_do_not_depend_on_the_batch(encoder: HyperbolicEncoder) -> None:
    texts = ["short", "a much longer sentence about the weather in the mountains", "mid size text"]
    together = encoder.text_features(texts)
    alone = torch.cat([encoder.text_features([t]) for t in texts])
    assert torch.allclose(together, alone, atol=1e-5)


def test_text_tower_is_the_wheel_mean_pooled(encoder: HyperbolicEncoder) -> None:
    from transformers import AutoModel, AutoTokenizer

    path = minilm_path()
    reference = AutoModel.from_pretrained(path, local_files_only=True).eval()
    tokens = AutoTokenizer.from_pretrained(path, local_files_only=True)(
        ["how do I kill a Python process"], return_tensors="pt"
    )
    with torch.no_grad():
        expected = reference(**tokens).last_hidden_state.mean(1)
    # the adapter is zero in a fresh model
    assert torch.allclose(
        encoder.text_features(["how do I kill a Python process"]), expected, atol=1e-5
    )


def test_locked_text_tower_stays_in_evaluation_mode(encoder: HyperbolicEncoder) -> None:
    encoder.train()
    try:
        assert not encoder.towers.text_module.training
        assert encoder.towers.model.visual.training
    finally:
        encoder.eval()


def test_only_adapter_heads_and_image_tower_learn(encoder: HyperbolicEncoder) -> None:
    text = [n for n, p in encoder.towers.text_module.named_parameters() if p.requires_grad]
    assert text
    assert all("lora_" in n for n in text)


@pytest.mark.parametrize("space", ["lorentz", "euclidean"])
def test_heads_keep_float32_under_autocast(space: str) -> None:
    head = LorentzHead(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        points = head(torch.randn(5, 8).bfloat16(), torch.tensor(1.0), space)
    assert points.dtype == torch.float32
    assert points.isfinite().all()


def test_head_bounds_far_features() -> None:
    head = LorentzHead(4, 4, normalize="none")
    points = head(torch.full((1, 4), 1e6), torch.tensor(1.0))
    assert points.isfinite().all()
    assert float(lorentz.dist0(points, 1.0)) <= 8.001


def test_nodes_of_a_depth_share_a_radius() -> None:
    head = NodeHead(8, 4)
    for c in (0.5, 2.0):
        points = head.place(torch.randn(6, 8), torch.tensor([1, 1, 2, 2, 3, 7]), torch.tensor(c))
        radius = lorentz.dist0(points, c)
        assert torch.allclose(radius[0], radius[1], atol=1e-5)
        assert torch.allclose(radius[4], radius[5], atol=1e-5)  # deeper than known: the deepest
        assert radius[0] < radius[2] < radius[4]


def test_lift_makes_any_open_clip_weights_hyperbolic(tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(1)
    reference = open_clip.create_model("RN50")
    file = tmp_path / "rn50.pt"
    torch.save(reference.state_dict(), file)
    encoder = load_encoder(f"open_clip:RN50/{file}")
    tokens = encoder.towers.tokenize(["a", "b"])
    with torch.no_grad():
        points = encoder.encode_tokens(tokens)
        expected = torch.nn.functional.normalize(reference.eval().encode_text(tokens), dim=-1)
    direction = torch.nn.functional.normalize(points.space, dim=-1)
    assert torch.allclose(direction, expected, atol=1e-5)
    assert torch.allclose(points.radius(), torch.tensor([1.5, 1.5]), atol=1e-4)


def test_clear_errors_for_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model"):
        load_encoder("./nothing-here")
    with pytest.raises(ConfigError, match="no architecture"):
        lift_open_clip("ViT-Z-99", None)
    with pytest.raises(ConfigError, match="neither a local weights file"):
        lift_open_clip("RN50", "no-such-tag")
    with pytest.raises(ModelError, match=r"no config\.json"):
        HyperbolicEncoder.load_directory(tmp_path)


def test_damaged_weights_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ModelError, match="not readable as safetensors"):
        HyperbolicEncoder.load_directory(tmp_path)
    config = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "surprise": 1}))
    with pytest.raises(ModelError, match="not a hysafe config"):
        HyperbolicEncoder.load_directory(tmp_path)


def test_offsets_move_known_nodes_only() -> None:
    from hysafe.encoder import mini_architecture
    from hysafe.encoder.model import bank_hash

    banks = [("guns for sale", "weapons"), ("a new risk",)]
    encoder = HyperbolicEncoder(
        mini_architecture("resnet10t", image_size=32, lora_rank=0), dim=16,
        known_nodes=[bank_hash(banks[0])],
    )  # fmt: skip
    features, depth = encoder.node_features(banks), torch.tensor([2, 2])
    plain = encoder.place_nodes(features, depth).space
    assert torch.equal(encoder.place_nodes(features, depth, banks).space, plain)
    with torch.no_grad():
        encoder.node_head.offsets.add_(0.5)
    moved = encoder.place_nodes(features, depth, banks)
    assert not torch.allclose(moved.space[0], plain[0], atol=1e-3)
    assert torch.equal(moved.space[1], plain[1])
    radius = moved.radius()
    assert torch.allclose(radius[0], radius[1], atol=1e-5)


def test_saved_text_layers_come_back(tmp_path: Path) -> None:
    from hysafe.encoder import mini_architecture

    encoder = HyperbolicEncoder(
        mini_architecture("resnet10t", image_size=32, lora_rank=0, text_layers=2), dim=16
    )
    learning = {n for n, p in encoder.towers.text_module.named_parameters() if p.requires_grad}
    assert {n.split("layer.")[1][0] for n in learning} == {"4", "5"}
    with torch.no_grad():
        for p in encoder.towers.text_module.parameters():
            if p.requires_grad and p.ndim > 1:
                p.mul_(1.25)  # exact in bf16 it is not; close it is
    encoder.save_directory(tmp_path, tower_dtype=torch.bfloat16)
    again = HyperbolicEncoder.load_directory(tmp_path)
    texts = ["a quiet street", "two"]
    assert torch.allclose(
        again.text_features(texts), encoder.eval().text_features(texts), atol=0.02
    )
    assert (tmp_path / "model.safetensors").stat().st_size < 20e6


def test_towers_are_the_mean_of_several_exports(tmp_path: Path) -> None:
    architecture = mini_architecture("test_resnet", image_size=32, lora_rank=0, text_layers=1)
    folders, weights = [], []
    for number in range(2):
        model = HyperbolicEncoder(architecture, dim=4)
        state = model.towers.own_state()
        name = next(k for k in state if "layer.5.output.dense.weight" in k)
        state[name].fill_(float(number))
        weights.append(state[name].clone())
        model.save_directory(tmp_path / str(number))
        folders.append(tmp_path / str(number))
    fresh = HyperbolicEncoder(architecture, dim=4)
    fresh.towers.take(folders, "text")
    assert torch.equal(fresh.towers.own_state()[name], torch.full_like(weights[0], 0.5))
    fresh.towers.take(folders[1:], "text")
    assert torch.equal(fresh.towers.own_state()[name], weights[1])


def test_the_fine_stem_halves_the_strides() -> None:
    model = HyperbolicEncoder(
        mini_architecture("hysafe_resnet10t_fine", image_size=64, lora_rank=0), dim=4
    )
    seen = {}
    trunk = model.towers.model.visual.trunk
    trunk.layer1.register_forward_hook(lambda *a: seen.update(side=a[2].shape[-1]))
    model.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert seen["side"] == 32
