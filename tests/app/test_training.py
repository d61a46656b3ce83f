"""Training: every config is built, the tiny one runs, a run resumes and exports."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from hysafe.app.image_task import ImageTowerTask, ancestor_cross_entropy, colour_jitter, paste_box
from hysafe.app.tasks import EncoderTask, TaxonomyTask, random_resized_crop_flip
from hysafe.app.text_task import TextTowerTask
from hysafe.app.training import embed_main
from hysafe.data.class_means import ClassMeans
from hysafe.data.datamodule import EmbedData, _Batches
from hysafe.encoder import HyperbolicEncoder
from hysafe.encoder.towerless import TowerlessEncoder
from hysafe.errors import ConfigError, ModelError
from hysafe.evaluate.novelty_data import read_held_out
from hysafe.taxonomy import load_taxonomy

CONFIGS = Path(__file__).parents[2] / "configs" / "embed"


def fit(name: str, folder: Path, *more: str) -> None:
    embed_main(
        ["fit", "--config", str(CONFIGS / f"{name}.yaml"),
         "--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false",
         "--trainer.enable_model_summary", "false", *more]
    )  # fmt: skip


@pytest.mark.parametrize("space", ["lorentz", "euclidean"])
def test_tiny_runs_two_steps_logs_and_exports(space: str, tmp_path: Path) -> None:
    fit("tiny", tmp_path, "--model.init_args.space", space,
        "--trainer.logger.init_args.save_dir", str(tmp_path))  # fmt: skip
    with (tmp_path / "csv/metrics.csv").open() as lines:
        columns = set(next(csv.reader(lines)))
    assert {"train/text_leaf", "train/edge", "radius/depth_1", "aperture/depth_2",
            "monitor/violated_edges", "saturated/curvature", "validation/auroc"} <= columns  # fmt: skip
    encoder = HyperbolicEncoder.load_directory(tmp_path / "model")
    assert encoder.space == space
    assert (tmp_path / "environment.json").is_file()


def test_a_teacher_moves_the_text_head(tmp_path: Path) -> None:
    heads = {}
    for weight in ("0", "4", "40"):
        folder = tmp_path / weight
        fit("tiny", folder, "--model.teacher_weight", weight, "--trainer.logger", "false")
        encoder = HyperbolicEncoder.load_directory(folder / "model")
        heads[weight] = encoder.heads["text"].linear.weight
        (last,) = folder.glob("**/last.ckpt")
        state = torch.load(last, weights_only=True)["state_dict"]
        assert ("teacher.weight" in state) == (weight != "0")
    assert not torch.equal(heads["0"], heads["4"])
    assert not torch.equal(heads["4"], heads["40"])


def test_a_teacher_needs_texts_that_move(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stand still"):
        TaxonomyTask(text_side_from=str(tmp_path), teacher_weight=1.0)
    with pytest.raises(ModelError, match="at least one"):
        TaxonomyTask(text_from=[])


def test_resume_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    fit("tiny", tmp_path, "--trainer.logger", "false")
    (last,) = tmp_path.glob("**/last.ckpt")
    fit("tiny", tmp_path, "--trainer.logger", "false", "--trainer.max_steps", "3",
        "--ckpt_path", str(last))  # fmt: skip
    newest = max(tmp_path.glob("**/last*.ckpt"), key=lambda p: p.stat().st_mtime)
    state = torch.load(newest, weights_only=True)
    assert state["global_step"] == 3


def quadruplets(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def picture(i: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40), (i * 20 % 255, 90, 40)).save(buffer, "JPEG")
        return buffer.getvalue()

    rows = {
        "safe": [f"a calm scene number {i}" for i in range(8)],
        "nsfw": [f"a risky scene number {i}" for i in range(8)],
        "safe_image": [picture(i) for i in range(8)],
        "nsfw_image": [picture(i + 8) for i in range(8)],
        "text": [f"caption {i}" for i in range(8)],
        "image": [picture(i) for i in range(8)],
    }
    pq.write_table(pa.table(rows), path)


@pytest.mark.parametrize("name", ["hysac_vit_l14", "vit_b16"])
def test_published_recipes_train_on_small_towers(name: str, tmp_path: Path) -> None:
    """The config as it is, but for the towers and the data."""
    file = tmp_path / "rows.parquet"
    quadruplets(file)
    fit(name, tmp_path / "run", "--model.init_args.open_clip", "null",
        "--model.init_args.image_tower", "resnet10t", "--model.init_args.image_size", "32",
        "--data.init_args.location", str(file), "--data.init_args.image_size", "32",
        "--data.init_args.batch", "4", "--data.init_args.workers", "0",
        "--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.logger", "false")  # fmt: skip
    assert (tmp_path / "run/model/model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_names_real_settings(path: Path) -> None:
    """Each class and argument exists; building the large towers is not needed for that."""
    import inspect
    from importlib import import_module

    config = yaml.safe_load(path.read_text())
    for part in ("model", "data"):
        module, _, name = config[part]["class_path"].rpartition(".")
        known = inspect.signature(getattr(import_module(module), name)).parameters
        assert set(config[part]["init_args"]) <= set(known)


@pytest.mark.parametrize("name", ["held_out", "held_out_image"])
def test_held_out_configs_leave_out_the_classes_of_the_novelty_suite(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert config["data"]["init_args"]["exclude_classes"] == read_held_out()


def test_crops_keep_range_and_shape() -> None:
    pixels = torch.randint(0, 256, (5, 3, 32, 32)).float()
    out = random_resized_crop_flip(pixels, 24)
    assert out.shape == (5, 3, 24, 24)
    assert out.min() >= 0
    assert out.max() <= 255
    flat = random_resized_crop_flip(torch.full((2, 3, 16, 16), 7.0), 16)
    assert torch.allclose(flat, torch.full_like(flat, 7.0), atol=1e-4)


def test_earlier_stages_run_first_and_once(tmp_path: Path) -> None:
    """A config with `before` trains the towers where their exports are missing, then goes on."""
    tiny = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    tiny["trainer"].pop("logger")
    tiny["trainer"].update(logger=False, enable_progress_bar=False, enable_model_summary=False)
    first = {**tiny, "trainer": {**tiny["trainer"], "default_root_dir": str(tmp_path / "image")}}
    first["model"] = {
        "class_path": "hysafe.app.image_task.ImageTowerTask",
        "init_args": {"image_tower": "resnet10t", "image_size": 32, "dim": 16},
    }
    (tmp_path / "image.yaml").write_text(yaml.safe_dump(first))
    third = {**tiny, "trainer": {**tiny["trainer"], "default_root_dir": str(tmp_path / "text")}}
    third["model"] = {
        "class_path": "hysafe.app.text_task.TextTowerTask",
        "init_args": {"image_tower": "resnet10t", "image_size": 32, "dim": 16, "text_layers": 2},
    }
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(third))
    second = {**tiny, "before": {
        str(tmp_path / f"{stage}.yaml"): str(tmp_path / stage / "model")
        for stage in ("image", "text")
    }}  # fmt: skip
    second["trainer"] = {**tiny["trainer"], "default_root_dir": str(tmp_path / "heads")}
    second["model"] = {**tiny["model"], "init_args": {
        **tiny["model"]["init_args"], "image_from": str(tmp_path / "image/model"),
        "text_from": str(tmp_path / "text/model"),
        "freeze_image": True, "lora_rank": 0, "text_layers": 2, "node_offsets": True,
    }}  # fmt: skip
    (tmp_path / "heads.yaml").write_text(yaml.safe_dump(second))
    for _ in range(2):
        embed_main(["fit", "--config", str(tmp_path / "heads.yaml")])
    image = HyperbolicEncoder.load_directory(tmp_path / "image/model")
    assert len(list(tmp_path.glob("image/**/*.ckpt"))) == 1, "the first stage ran once"
    trained = HyperbolicEncoder.load_directory(tmp_path / "heads/model")
    for name, value in image.towers.model.visual.state_dict().items():
        assert torch.equal(value, trained.towers.model.visual.state_dict()[name]), name
    assert trained.node_head.offsets is not None
    assert trained.node_head.offsets.abs().sum() > 0
    changed = [
        layer
        for layer in range(6)
        if any(
            not torch.equal(v, image.towers.state_dict()[k])
            for k, v in trained.towers.state_dict().items()
            if f"encoder.layer.{layer}.attention.self.query.weight" in k
        )
    ]
    assert changed == [4, 5]


def test_a_stage_may_be_a_script(tmp_path: Path) -> None:
    """`before` calls it with the place of its export; a script that fails ends the training."""
    fit("tiny", tmp_path / "made", "--trainer.logger", "false")
    script, place = tmp_path / "make.py", tmp_path / "copied" / "model"
    script.write_text(
        f"import shutil, sys\nshutil.copytree({str(tmp_path / 'made/model')!r}, sys.argv[1])\n"
    )
    fit("tiny", tmp_path / "heads", "--trainer.logger", "false", "--model.init_from", str(place),
        "--before", yaml.safe_dump({str(script): str(place)}, default_flow_style=True))  # fmt: skip
    assert (place / "model.safetensors").is_file()
    script.write_text("raise SystemExit(3)\n")
    with pytest.raises(ConfigError, match="exit status 3"):
        fit("tiny", tmp_path / "heads", "--trainer.logger", "false",
            "--before", yaml.safe_dump({str(script): str(tmp_path / "no")}, default_flow_style=True))  # fmt: skip


def test_stages_read_the_data_of_the_one_that_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYSAFE_DATA", raising=False)
    data, script = tmp_path / "data", tmp_path / "make.py"
    data.mkdir()
    script.write_text("import os, sys\nopen(sys.argv[1], 'w').write(os.environ['HYSAFE_DATA'])\n")
    stage = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    stage["trainer"].update(logger=False, default_root_dir=str(tmp_path / "first"))
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(stage))
    before = {
        str(tmp_path / "first.yaml"): str(tmp_path / "first/model"),
        str(script): str(tmp_path / "made"),
    }
    fit("tiny", tmp_path / "heads", "--trainer.logger", "false", "--data.data_dir", str(data),
        "--before", yaml.safe_dump(before, default_flow_style=True, width=10_000))  # fmt: skip
    assert (tmp_path / "made").read_text() == str(data)
    used = yaml.safe_load((tmp_path / "first/config.yaml").read_text())
    assert used["data"]["init_args"]["data_dir"] == str(data)


@pytest.mark.parametrize("kind", [ImageTowerTask, TextTowerTask])
def test_class_means_are_refused_where_nothing_would_read_them(
    kind: type[ImageTowerTask | TextTowerTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = kind(image_tower="resnet10t", image_size=32, dim=16)
    data = EmbedData(class_means="means.safetensors")
    monkeypatch.setattr(kind, "trainer", SimpleNamespace(datamodule=data))
    with pytest.raises(ConfigError, match=f"{kind.__name__} has no use for class_means"):
        task.setup("fit")


def test_hypernym_loss_is_zero_inside_and_counts_mass() -> None:
    ancestors = torch.tensor([[True, True], [True, False]])
    logits = torch.zeros(1, 2)
    # class 0: hypernyms with masses 1 and 1/2
    value = ancestor_cross_entropy(logits, torch.tensor([0]), ancestors)
    assert value.item() == pytest.approx(0.5 * math.log(2))
    assert ancestor_cross_entropy(logits, torch.tensor([1]), ancestors).item() == pytest.approx(0)


def test_colour_jitter_keeps_range() -> None:
    pixels = torch.randint(0, 256, (4, 3, 8, 8)).float()
    out = colour_jitter(pixels, 0.4)
    assert out.shape == pixels.shape
    assert out.min() >= 0
    assert out.max() <= 255
    assert torch.equal(colour_jitter(pixels, 0.0), pixels)


def test_pasted_boxes_come_from_the_other_picture_and_are_counted() -> None:
    torch.manual_seed(0)
    for _ in range(30):
        mixed, kept = paste_box(torch.zeros(2, 3, 20, 24), torch.ones(2, 3, 20, 24))
        assert set(mixed.unique().tolist()) <= {0.0, 1.0}
        assert 1 - mixed.mean().item() == pytest.approx(kept)
        assert torch.equal(mixed[0], mixed[1])
    assert 0 <= kept <= 1


def test_features_of_towers_that_stand_still_are_kept(tmp_path: Path) -> None:
    tiny = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    tiny["trainer"].pop("logger")
    tiny["trainer"].update(logger=False, enable_progress_bar=False, enable_model_summary=False)
    tiny["model"]["init_args"].update(
        freeze_image=True, freeze_text=True, lora_rank=0, image_views=1,
        feature_cache=str(tmp_path / "features"),
    )  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))

    def run(name: str, *more: str) -> set[str]:
        embed_main(
            ["fit", "--config", str(tmp_path / "tiny.yaml"),
             "--trainer.default_root_dir", str(tmp_path / name), *more]
        )  # fmt: skip
        return {p.name.split("-")[0] + p.suffix for p in (tmp_path / "features").iterdir()}

    assert run("a") == {"text.safetensors", "visual.safetensors"}
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "features").iterdir()}
    run("b", "--model.init_args.space", "euclidean")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "features").iterdir()} == kept
    run("c", "--model.init_args.crop", "0.9")
    assert len(list((tmp_path / "features").glob("visual-*"))) == 2
    assert len(list((tmp_path / "features").glob("text-*"))) == 1


def test_a_picture_head_on_a_text_side_that_stands_still(tmp_path: Path) -> None:
    """`text_side_from`: only the picture head moves; texts and nodes stay where they are."""
    fit("tiny", tmp_path / "first", "--trainer.logger", "false", "--model.lora_rank", "0")
    tower = {"image_tower": "hysafe_resnet10t_fine", "image_size": 32, "dim": 16}
    config = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    config["trainer"]["logger"] = False
    config["model"] = {"class_path": "hysafe.app.image_task.ImageTowerTask", "init_args": tower}
    (tmp_path / "image.yaml").write_text(yaml.safe_dump(config))
    embed_main(["fit", "--config", str(tmp_path / "image.yaml"),
                "--trainer.default_root_dir", str(tmp_path / "image")])  # fmt: skip
    fit("tiny", tmp_path / "second", "--trainer.logger", "false", "--model.lora_rank", "0",
        "--model.image_tower", tower["image_tower"], "--model.freeze_image", "true",
        "--model.image_from", str(tmp_path / "image/model"), "--model.image_views", "1",
        "--model.text_side_from", str(tmp_path / "first/model"))  # fmt: skip
    first, image, second = (
        HyperbolicEncoder.load_directory(tmp_path / name / "model")
        for name in ("first", "image", "second")
    )
    assert second.text_hash() == first.text_hash()
    assert second.hash() != first.hash()
    assert first.text_hash() != image.text_hash()
    assert TowerlessEncoder(tmp_path / "second/model").text_hash() == first.text_hash()
    second.prepare_inference()
    assert second.text_hash() == first.text_hash()
    for name, value in image.towers.model.visual.state_dict().items():
        assert torch.equal(value, second.towers.model.visual.state_dict()[name]), name
    fresh = image.heads["image"].linear.weight
    assert not torch.equal(second.heads["image"].linear.weight, fresh)
    longer = {**first.config["architecture"], "context_length": 99}
    others = {"dim": 8, "space": "euclidean", "architecture": longer}
    names = ("dim", "space", "architecture.context_length")
    for (key, value), name in zip(others.items(), names, strict=True):
        other = HyperbolicEncoder(**{**first.config, key: value})
        with pytest.raises(ModelError, match=f"its {name} is another"):
            other.take_text_side(tmp_path / "first/model")


FAR_CLASSES = [
    ("assault rifle", ("artifact", "instrumentality", "weapon")),
    ("picture of text", ("artifact",)),
    ("bald eagle", ("animal", "bird")),
]


def test_classes_without_pictures_teach_the_picture_head(tmp_path: Path) -> None:
    """`class_means`: features about the means of such classes come to lie in the cones of their nodes."""
    fit("tiny", tmp_path / "first", "--trainer.logger", "false", "--model.lora_rank", "0")
    first = HyperbolicEncoder.load_directory(tmp_path / "first/model")
    means = torch.randn(3, 384, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "means.safetensors"
    ClassMeans(means, FAR_CLASSES, first.image_tower_hash()).save(file)
    given = {"pictures": False, "text_sets": [], "rendered": 8, "image_size": 16, "class_means": str(file)}  # fmt: skip
    data = EmbedData(**given, risky_described=8.0)
    data.setup()
    # a class that has pictures is passed over
    assert data.world.names == ["picture of text"]
    described = data.described_classes
    assert described is not None
    assert torch.equal(described.means, means[[0, 2]])
    assert (described.candidates & data.leaves.risky).any(-1).tolist() == [True, False]
    assert described.weights.tolist() == [8.0, 1.0]
    with pytest.raises(ConfigError, match="risky_described 0"):
        EmbedData(**given, risky_described=0.0)
    with pytest.raises(ConfigError, match="described 0"):
        EmbedData(**given, described=0)

    more = ("--trainer.logger", "false", "--model.lora_rank", "0", "--model.freeze_image", "true",
            "--model.image_views", "1", "--model.init_from", str(tmp_path / "first/model"),
            "--model.text_side_from", str(tmp_path / "first/model"), "--data.class_means", str(file),
            "--data.described", "16", "--model.head_lr", "0.02", "--trainer.max_steps", "60")  # fmt: skip
    fit("tiny", tmp_path / "second", *more)
    second = HyperbolicEncoder.load_directory(tmp_path / "second/model")
    assert second.text_hash() == first.text_hash()
    phrases = [load_taxonomy()[n].phrases for n in ("6.1", "S.b1")]
    nodes = first.place_nodes(first.node_features(phrases), torch.tensor([2, 2]))
    with torch.no_grad():
        before, after = (x.lift("image", means[[0, 2]]).margin(nodes) for x in (first, second))
    # how much further into its own cone than into the other's: the rifle, the eagle
    gained = (after - before) @ torch.tensor([1.0, -1.0])
    assert gained[0] > 0.1
    assert gained[1] < -0.1


def test_class_means_fit_the_tower_or_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "means.safetensors"
    known = ClassMeans(torch.randn(3, 20), FAR_CLASSES, "another")
    known.save(file)
    read = ClassMeans.load(file)
    assert read.means.equal(known.means)
    assert (read.classes, read.tower) == (FAR_CLASSES, "another")
    frozen = ("--model.freeze_image", "true", "--model.freeze_text", "true", "--model.lora_rank", "0")  # fmt: skip
    given = ("--trainer.logger", "false", "--data.class_means", str(file))
    with pytest.raises(ConfigError, match="one image tower"):
        fit("tiny", tmp_path / "a", *given)
    with pytest.raises(ConfigError, match="another image tower"):
        fit("tiny", tmp_path / "a", *given, *frozen)
    ClassMeans(torch.randn(1, 384), FAR_CLASSES[1:2], "").save(file)
    with pytest.raises(ConfigError, match="every class in it has pictures"):
        fit("tiny", tmp_path / "a", *given, *frozen)
    with pytest.raises(ConfigError, match="no such file"):
        ClassMeans.load(tmp_path / "none")
    (tmp_path / "broken").write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="no class means"):
        ClassMeans.load(tmp_path / "broken")
    ClassMeans(torch.randn(2, 20), FAR_CLASSES, "").save(file)
    with pytest.raises(ConfigError, match="means for 3 classes"):
        ClassMeans.load(file)
    ClassMeans(torch.randn(1, 384), [("thingummy", ("unheard of",))], "").save(file)
    with pytest.raises(ConfigError, match="thingummy"):
        fit("tiny", tmp_path / "a", *given, *frozen)


def test_processes_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = _Batches(10, 5, 0, None, 2)
    whole = list(batches)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *a: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *a, rank=rank: rank)
        parts.append(list(_Batches(10, 5, 0, None, 2)))
    for both, one, other in zip(whole, *parts, strict=True):
        assert sorted(both) == sorted(one + other)
        assert len(one) == 3


def test_features_of_one_precision_are_not_taken_for_those_of_another(tmp_path: Path) -> None:
    def task(precision: str) -> Any:
        towers = SimpleNamespace(architecture={}, own_state=dict)
        return SimpleNamespace(
            trainer=SimpleNamespace(precision=precision),
            device=torch.device("cpu"),
            feature_cache=str(tmp_path),
            encoder=SimpleNamespace(towers=towers),
        )

    made: list[str] = []
    for precision in ("bf16-mixed", "32-true", "bf16-mixed", "32-true"):
        one = task(precision)

        def make(precision: str = precision) -> torch.Tensor:
            made.append(precision)
            return torch.ones(2, 2) @ torch.ones(2, 2)

        with EncoderTask.autocast(one):
            wanted = torch.bfloat16 if precision.startswith("bf16") else torch.float32
            assert TaxonomyTask._kept(one, "text", ["a"], make).dtype == wanted
    assert made == ["bf16-mixed", "32-true"]
