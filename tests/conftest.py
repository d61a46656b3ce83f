"""Fixtures: offline, few threads, one small random model for the whole session."""

from __future__ import annotations

import importlib.util
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of mini's architecture with random image tower and heads."""
    import torch

    from hysafe.encoder import HyperbolicEncoder, mini_architecture

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-model")
    encoder = HyperbolicEncoder(mini_architecture("resnet10t", image_size=32), dim=16)
    encoder.save_directory(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The random model, loaded as a user would."""
    from hysafe.app.pipeline import load

    return load(str(tiny_folder), cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def data_dir() -> Path:
    """Development data; the test is skipped where it is absent."""
    value = os.environ.get("HYSAFE_DATA", "")
    if not value or not Path(value).is_dir():
        pytest.skip("HYSAFE_DATA is not set")
    return Path(value)


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """A file of the repository that is in no package, as a module; its path from the root."""

    def load(path: str) -> ModuleType:
        file = Path(__file__).parents[1] / path
        spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclasses look for it there
        spec.loader.exec_module(module)
        return module

    return load
