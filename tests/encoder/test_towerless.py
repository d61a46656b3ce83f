"""A model without its towers is the same model: hash, nodes, scores."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hysafe.encoder import HyperbolicEncoder, mini_architecture
from hysafe.encoder.model import bank_hash
from hysafe.encoder.towerless import TowerlessEncoder
from hysafe.errors import ModelError

BANKS = (("weapons", "sale of weapons"), ("a phrase that training never saw",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half-width towers, a learned curvature, and one node with a learned offset."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("towerless")
    encoder = HyperbolicEncoder(
        mini_architecture("resnet10t", image_size=32), dim=12, known_nodes=[bank_hash(BANKS[0])]
    )
    encoder.curvature.set(2.5)
    encoder.cone_scale.set(33.0)
    with torch.no_grad():
        encoder.node_head.offsets.normal_()
        for radius in encoder.node_head.radii:
            radius.set(radius.low * 1.7)
    encoder.save_directory(path, tower_dtype=torch.bfloat16)
    return path


def test_it_is_the_same_model_and_loads_no_tower(folder: Path) -> None:
    whole, light = HyperbolicEncoder.load_directory(folder), TowerlessEncoder(folder)
    whole.prepare_inference()
    assert light.hash() == whole.hash()
    assert (light.c, light.cone_scale_value) == (whole.c, whole.cone_scale_value)
    assert (light.dim, light.space) == (whole.dim, whole.space)
    features, depth = torch.randn(2, 384), torch.tensor([2, 3])
    for banks in (BANKS, None):
        with torch.no_grad():
            wanted = whole.place_nodes(features, depth, banks)
        assert light.place_nodes(features, depth, banks).space.equal(wanted.space)
    assert not light.towers_loaded
    assert light.text_features(["hello"]).equal(whole.text_features(["hello"]))
    assert light.towers_loaded
    assert light.image_size == whole.image_size == 32


def test_a_folder_without_a_model_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config.json"):
        TowerlessEncoder(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="not readable as safetensors"):
        TowerlessEncoder(tmp_path)


def test_an_image_side_alone_takes_the_rest_from_the_folder_beside_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, own = tmp_path / "base", tmp_path / "own"
    shutil.copytree(folder, base)
    torch.manual_seed(4)
    encoder = HyperbolicEncoder(
        mini_architecture("resnet10t", image_size=48), dim=12, known_nodes=[bank_hash(BANKS[0])]
    )
    with pytest.raises(ModelError, match="not this encoder's"):
        encoder.save_image_side(own, base)
    encoder.take_text_side(base)
    with pytest.raises(ModelError, match="no sibling"):
        encoder.save_image_side(tmp_path / "below" / "own", base)
    encoder.save_directory(tmp_path / "whole", tower_dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="the model itself"):
        encoder.save_image_side(base, base)
    encoder.save_image_side(own, base)
    with pytest.raises(ModelError, match="from 'base'"):
        encoder.save_image_side(tmp_path / "third", own)
    kept = load_file(own / "model.safetensors")
    assert {k.split(".")[0] for k in kept} == {"towers", "heads"}
    assert not any("text" in k for k in kept)

    first, whole, joined = (
        HyperbolicEncoder.load_directory(tmp_path / name) for name in ("base", "whole", "own")
    )
    monkeypatch.chdir(own)
    light = TowerlessEncoder(".")
    assert joined.hash() == whole.hash() == light.hash() != first.hash()
    assert joined.text_hash() == first.text_hash() == light.text_hash()
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    with torch.inference_mode():
        assert joined.encode_image(pixels).space.equal(whole.encode_image(pixels).space)
        assert joined.text_features(["hello"]).equal(first.text_features(["hello"]))

    # its towers may be taken like those of a whole model
    taker = HyperbolicEncoder(mini_architecture("resnet10t", image_size=48), dim=12)
    taker.towers.take([own], "text")
    taker.towers.take([own], "visual")

    # another file than the one that it was made with, or none
    other = HyperbolicEncoder.load_directory(base)
    other.cone_scale.set(20.0)
    other.save_directory(base, tower_dtype=torch.bfloat16)
    for read in (HyperbolicEncoder.load_directory, TowerlessEncoder):
        with pytest.raises(ModelError, match="not the file"):
            read(own)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="has to lie beside it"):
        HyperbolicEncoder.load_directory(own)
    for name in ("..", "", "../whole"):  # a sibling, and nothing else
        said = {"text_side": name, "text_side_sha256": ""}
        save_file(kept, own / "model.safetensors", metadata=said)
        with pytest.raises(ModelError, match="has to lie beside it"):
            HyperbolicEncoder.load_directory(own)
