"""Published bases under the training command: tiny random models of their architecture."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from PIL import Image

from hysafe.app import guard_hub_task
from hysafe.app.guard_data import Draw, GuardData
from hysafe.app.guard_hub_task import HubRL, HubSFT, hub_prompt
from hysafe.errors import ConfigError
from hysafe.guard.corpus import Labelled
from hysafe.guard.hub import Lora, PromptSettings

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "guard"
# of every recipe: Lightning's bf16-true stumbles over a batch of ours, and would cast the adapters
PRECISION = "32-true"


@pytest.fixture(scope="module")
def families(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The tiny models of the decoder's own tests."""
    return load_script("tests/guard/test_hub.py")


@pytest.fixture(scope="module")
def data() -> GuardData:
    made = GuardData(
        judged=2, described=0, pictures=0, limit=12, text_sets=[], cache=None, keep_images=True
    )
    made.setup()
    return made


def drawn(data: GuardData) -> Draw:
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize(
    ("task", "options"),
    [(HubSFT, {}), (HubRL, {"group": 2}), (HubRL, {"group": 2, "algorithm": "ppo"})],
)
def test_a_step_trains_the_adapter_alone(
    task: type,
    options: dict[str, Any],
    families: ModuleType,
    data: GuardData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = families.build("qwen")
    decoder = families.with_adapter(family)
    decoder.settings = PromptSettings(max_bullets=0)
    module = task("a base", samples_every=1, **options)
    monkeypatch.setattr(
        guard_hub_task.HubDecoder, "from_pretrained", lambda *args, **options: decoder
    )
    frozen = {n: p.clone() for n, p in decoder.named_parameters() if not p.requires_grad}
    trained = {n: p.clone() for n, p in decoder.named_parameters() if p.requires_grad}
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, precision=PRECISION,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert decoder.training  # or gradient checkpointing would recompute nothing
    now = dict(decoder.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())
    if task is HubSFT:
        assert any(not torch.equal(now[n], p) for n, p in trained.items())
    module.export(tmp_path / "model")
    assert (tmp_path / "model" / "guard.json").is_file()


def test_a_prompt_shows_listed_nodes_only_and_the_picture(data: GuardData) -> None:
    world, batch = data.world, drawn(data)
    item, policy = batch.items[0], batch.episodes[0].policy
    row = hub_prompt(item, policy, world.space)
    assert row.context is not None
    assert set(row.context.margins) <= {e.node for e in policy.entries}
    assert row.context.novelty.policy is None
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    evidence = item.evidence
    pictured = Labelled(
        type(evidence)(**{**vars(evidence), "channels": ("image",)}), image=out.getvalue()
    )
    shown = hub_prompt(pictured, policy, world.space)
    assert shown.text is None
    assert len(shown.images) == 1
    with pytest.raises(ConfigError, match="keep_images"):
        hub_prompt(Labelled(pictured.evidence), policy, world.space)


@pytest.mark.parametrize(
    "name", ["smolvlm_sft", "smolvlm_grpo", "qwen2_5_vl_7b_sft", "qwen2_5_vl_7b_grpo"]
)
def test_recipes_fit_their_tasks(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    options = config["model"]["init_args"]
    options["lora"] = Lora(**options["lora"])
    options["prompt_settings"] = PromptSettings(**options["prompt_settings"])
    task = {"HubSFT": HubSFT, "HubRL": HubRL}[config["model"]["class_path"].split(".")[-1]]
    assert task(**options).base == options["base"]
    assert config["trainer"]["precision"] == PRECISION
    GuardData(**config["data"])
