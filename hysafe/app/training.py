"""The training command behind ``train_embed.py``: LightningCLI, a run directory, an export."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from hysafe.app.image_task import ImageTowerTask  # noqa: F401 - subclasses by name
from hysafe.app.tasks import EncoderTask, PresetTask, TaxonomyTask  # noqa: F401
from hysafe.app.text_task import TextTowerTask  # noqa: F401
from hysafe.errors import ConfigError

__all__ = [
    *("ExportModel", "RunConfig", "RunRecord", "StagesCLI"),
    *("embed_main", "trainer_defaults"),
]

log = logging.getLogger(__name__)

# A long run on a shared machine loses at most this much.
CHECKPOINT_MINUTES = 5


class RunRecord(Callback):
    """Writes environment.json into the run directory: commit, versions, machine, seed."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "commit": _commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": L.__version__,
            "threads": torch.get_num_threads(),
            "processes": trainer.world_size,
            "device": str(pl_module.device),
            "machine": platform.machine(),
        }
        (folder / "environment.json").write_text(json.dumps(record, indent=2) + "\n")


class ExportModel(Callback):
    """Writes the encoder as a hysafe directory, ``model/`` in the run directory, when fit ends."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        unfinished = trainer.interrupted or not trainer.is_global_zero
        if not isinstance(pl_module, EncoderTask) or unfinished:
            return
        target = Path(trainer.default_root_dir) / "model"
        pl_module.encoder.save_directory(target, tower_dtype=torch.bfloat16)
        log.info("model written to %s", target)


class RunConfig(SaveConfigCallback):
    """Saves the resolved configuration beside the checkpoints, over an older one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "overwrite": True})


class StagesCLI(LightningCLI):
    """``fit`` that first runs the stages which its configuration starts from."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.set_defaults({"trainer.enable_checkpointing": True})
        parser.add_argument(
            "--before",
            type=dict[str, str],
            default={},
            help="config (or script) of each earlier stage and its export; run first unless that exists",
        )

    def before_instantiate_classes(self) -> None:
        """Run the stages that this one starts from, where they have not been run."""
        settings = self.config[self.subcommand] if self.subcommand else self.config
        for config, needed in settings.before.items():
            if (Path(needed) / "model.safetensors").is_file():
                log.info("%s is there: %s is not run again", needed, config)
                continue
            log.info("first %s, which makes %s", config, needed)
            if config.endswith(".py"):
                _run_script(config, needed, data_dir_of(settings))
            else:
                self.run_stage(config, settings)
        self._set_seed()

    def run_stage(self, config: str, settings: Any) -> None:
        """Run one earlier stage, with what it shares with `settings`, the later one's."""
        raise NotImplementedError


def data_dir_of(settings: Any) -> str | None:
    """The folder of development data that a configuration names."""
    data = settings.get("data") or {}
    found = (data.get("init_args") or data).get("data_dir")
    return None if found is None else str(found)


def _run_script(script: str, export: str, data_dir: str | None) -> None:
    """Run a stage that is a script; it is called with the place of its export."""
    where = {} if data_dir is None else {"HYSAFE_DATA": data_dir}
    done = subprocess.run(
        [sys.executable, script, export], check=False, env={**os.environ, **where}
    )
    if done.returncode:
        raise ConfigError(
            f"{script} ended with exit status {done.returncode}; its last lines say why. Mend that, or make "
            f"{export} by hand."
        )


class EmbedCLI(StagesCLI):
    """Trains towers, heads and cones."""

    def run_stage(self, config: str, settings: Any) -> None:
        data_dir = data_dir_of(settings)
        given = [] if data_dir is None else ["--data.init_args.data_dir", data_dir]
        embed_main(["fit", "--config", config, *given])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        kwargs.setdefault("callbacks", [])
        return super().instantiate_trainer(**kwargs)


def trainer_defaults(export: Callback) -> dict[str, Any]:
    """Checkpoints every few minutes, a run record and what writes the model at the end."""
    checkpoint = ModelCheckpoint(
        save_last=True, save_top_k=0, train_time_interval=timedelta(minutes=CHECKPOINT_MINUTES)
    )
    return {"callbacks": [checkpoint, RunRecord(), export], "num_sanity_val_steps": 0}


def embed_main(args: list[str] | None = None) -> None:
    """Entry point: ``python train_embed.py fit --config configs/embed/NAME.yaml``.

    Resume with ``--ckpt_path RUN/csv/checkpoints/last.ckpt``; any setting can be overridden on the
    command line (``--model.dim 64``).
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")
    torch.set_float32_matmul_precision("high")
    EmbedCLI(
        EncoderTask,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=RunConfig,
        seed_everything_default=0,
        trainer_defaults=trainer_defaults(ExportModel()),
        args=args,
    )


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            capture_output=True, text=True, check=False, timeout=10,
        )  # fmt: skip
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
