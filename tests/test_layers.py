"""Who may import whom (DESIGN, section 3), read from the source of every file.

Every import counts: at the top, inside functions, under TYPE_CHECKING, relative, and
``import_module`` of a written-out name.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hysafe"

LAYERS = {
    "errors": 0, "types": 0,
    "geometry": 1,
    "taxonomy": 2,
    "encoder": 3, "loss": 3,
    "data": 4,
    "index": 5,
    "score": 6,
    "guard": 7,
    "discover": 8, "evaluate": 8,
    "app": 9,
}  # fmt: skip
SIBLINGS = {frozenset(("encoder", "loss"))}  # of one layer, and neither imports the other
ANYWHERE = {"assets"}  # data files; imported by any layer, imports none
# The package itself hands out names of every layer, so no layer imports from it, but this:
OF_THE_PACKAGE = {"__version__"}

# third-party library -> the only files (or folders, ending in /) that import it
HOMES = {
    "datasets": ("data/sources.py",),
    "fsspec": ("data/remote.py",),
    "geoopt": ("geometry/geoopt_bridge.py",),
    "lancedb": ("index/collection.py",),
    "lightning": ("data/datamodule.py", "app/"),
    "open_clip": ("encoder/towers.py",),
    "pytorch_lightning": (),
    "rapidocr": ("data/ocr.py",),
    "ray": ("app/ray_scan.py",),
}
GROUND_MAY_IMPORT = {"torch"}  # layer 0
NO_SUCH_FOLDERS = {"utils", "util", "common", "helpers", "helper", "misc"}

FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: str, source: str) -> list[tuple[int, str]]:
    """(line, module) of all imports in a file at `path` below the package.

    ``from a import b`` gives ``a.b``, for b may be a module.
    """
    here = ["hysafe", *Path(path).parent.parts]
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{name.name}") for name in node.names]
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else ""
            name = function.id if isinstance(function, ast.Name) else name
            argument = node.args[0]
            text = argument.value if isinstance(argument, ast.Constant) else None
            if name in ("import_module", "__import__") and isinstance(text, str):
                found.append((node.lineno, text))
    return found


def violations(path: str, source: str) -> list[str]:
    """What a file at `path` below the package imports and may not."""
    own = Path(path).parts[0].removesuffix(".py")
    if path == "__init__.py":
        return []
    if own not in LAYERS and own not in ANYWHERE:
        return [f"{path}: {own} has no layer"]
    found = []
    for line, module in imported(path, source):
        top, *rest = module.split(".")
        reason = None
        if top == "hysafe":
            reason = _inside(own, rest[0] if rest else "")
        elif top in HOMES:
            if not any(path == h or (h.endswith("/") and path.startswith(h)) for h in HOMES[top]):
                reason = f"{top} belongs into {' and '.join(HOMES[top]) or 'no file'}"
        elif LAYERS.get(own) == 0 and top not in sys.stdlib_module_names | GROUND_MAY_IMPORT:
            reason = "layer 0 stands on nothing"
        if reason:
            found.append(f"{path}:{line}: imports {module}: {reason}")
    return found


def _inside(own: str, other: str) -> str | None:
    if other in OF_THE_PACKAGE or other == own or other in ANYWHERE:
        return None
    if other not in LAYERS:
        return "no layer imports from the package itself"
    if own in ANYWHERE:
        return "assets import nothing"
    if LAYERS[other] > LAYERS[own]:
        return f"upwards, from layer {LAYERS[own]} to {LAYERS[other]}"
    if frozenset((own, other)) in SIBLINGS:
        return "siblings"
    return None


def test_no_file_imports_upwards_or_a_library_outside_its_file() -> None:
    assert len(FILES) > 30
    found = []
    for file in FILES:
        path = file.relative_to(PACKAGE).as_posix()
        found += violations(path, file.read_text("utf-8"))
    assert not found, "\n".join(found)


def test_there_is_no_folder_for_everything() -> None:
    for path in PACKAGE.rglob("*"):
        if path.is_dir() or path.suffix == ".py":
            assert path.stem not in NO_SUCH_FOLDERS, path


def test_every_folder_with_code_is_a_package() -> None:
    for file in FILES:
        assert (file.parent / "__init__.py").is_file(), file.parent


def test_every_home_of_a_library_exists() -> None:
    for home in (h for homes in HOMES.values() for h in homes):
        assert (PACKAGE / home).exists(), home


# ---------------------------------------------------------------- the reader of imports itself

ALLOWED = [
    ("geometry/a.py", "import torch\nfrom hysafe.errors import ShapeError"),
    ("loss/a.py", "from hysafe.taxonomy import Taxonomy\nfrom hysafe.loss.b import c"),
    ("data/a.py", "from hysafe import __version__\nfrom importlib import resources"),
    ("data/a.py", "from hysafe import assets\nfrom hysafe.geometry import cones"),
    ("data/a.py", "from . import b\nfrom .b import c\nfrom ..types import Sample"),
    ("evaluate/suites/a.py", "from ..b import c\nfrom ...guard import d"),
    ("app/a.py", "import hysafe.guard\nfrom lightning.pytorch import Trainer"),
    ("data/datamodule.py", "import lightning as L"),
    ("index/collection.py", "def f():\n    import lancedb"),
    ("types.py", "from dataclasses import dataclass\nfrom torch import Tensor"),
    ("__init__.py", "from hysafe.app import cli"),
]
REFUSED = [
    ("geometry/a.py", "from hysafe.taxonomy import Taxonomy", "upwards, from layer 1 to 2"),
    ("geometry/a.py", "import hysafe.app.cli", "upwards, from layer 1 to 9"),
    ("score/a.py", "def f():\n    from hysafe.app import cli", "upwards"),
    ("data/a.py", "if TYPE_CHECKING:\n    from hysafe.score import leaves", "upwards"),
    ("data/a.py", "from hysafe import score", "upwards"),
    ("data/a.py", "from .. import score", "upwards"),
    ("data/a.py", "from ..score import leaves", "upwards"),
    ("data/b/a.py", "from ...score.leaves import NodeTable", "upwards"),
    ("data/a.py", "import_module('hysafe.score.leaves')", "upwards"),
    ("data/a.py", "importlib.import_module('hysafe.score')", "upwards"),
    ("data/a.py", "__import__('hysafe.score')", "upwards"),
    ("errors.py", "from hysafe.geometry import Points", "upwards"),
    ("encoder/a.py", "from hysafe.loss import entailment", "siblings"),
    ("loss/a.py", "from hysafe.encoder import head", "siblings"),
    ("score/a.py", "import hysafe", "no layer imports from the package"),
    ("score/a.py", "from hysafe import load", "no layer imports from the package"),
    ("assets/__init__.py", "from hysafe.errors import HysafeError", "assets import nothing"),
    ("server/a.py", "import os", "server has no layer"),
    ("geometry/a.py", "import geoopt", "geoopt belongs into geometry/geoopt_bridge.py"),
    ("app/a.py", "from open_clip.model import CLIP", "open_clip belongs into encoder/towers.py"),
    ("app/a.py", "def f():\n    import datasets", "datasets belongs into data/sources.py"),
    ("app/a.py", "import lancedb as db", "lancedb belongs into index/collection.py"),
    ("app/a.py", "from rapidocr import RapidOCR", "rapidocr belongs into data/ocr.py"),
    ("app/scan.py", "import ray.data", "ray belongs into app/ray_scan.py"),
    ("encoder/a.py", "import lightning.pytorch", "lightning belongs into data/datamodule.py"),
    ("application/a.py", "import lightning", "application has no layer"),
    ("app/a.py", "import pytorch_lightning", "pytorch_lightning belongs into no file"),
    ("types.py", "import numpy", "layer 0 stands on nothing"),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_downward_imports_are_allowed(path: str, source: str) -> None:
    assert violations(path, source) == []


@pytest.mark.parametrize(("path", "source", "reason"), REFUSED)
def test_other_imports_are_found(path: str, source: str, reason: str) -> None:
    (message,) = violations(path, source)
    assert message.startswith(path)
    assert reason in message
