"""``import hysafe`` and ``hysafe --help`` load nothing heavy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hysafe

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "open_clip", "transformers", "lightning", "numpy")

REPORT = """
import json, sys
json.dump(sorted({m.split(".")[0] for m in sys.modules}), open(sys.argv[-1], "w"))
"""
IMPORT = "import hysafe; hysafe.__version__\n"
HELP = """
from hysafe.app.cli import main
try:
    main(%s)
except SystemExit as end:
    assert end.code in (0, None), end.code
"""


def loaded(code: str, out: Path) -> tuple[set[str], str]:
    """Top-level modules a fresh interpreter has loaded after `code`, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code + REPORT, str(out)], cwd=ROOT, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return set(json.loads(out.read_text())), done.stdout


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        (IMPORT, ""),
        (HELP % ["--help"], "scan"),
        (HELP % ["scan", "--help"], "--policy"),
        (HELP % [], "scan"),
    ],
    ids=["import", "--help", "scan --help", "no command"],
)
def test_nothing_heavy_is_loaded(code: str, printed: str, tmp_path: Path) -> None:
    modules, output = loaded(code, tmp_path / "modules.json")
    assert "hysafe" in modules
    assert not modules & set(HEAVY)
    assert printed in output


def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    modules, _ = loaded("import numpy\n" + IMPORT, tmp_path / "modules.json")
    assert "numpy" in modules & set(HEAVY)


def test_every_public_name_is_defined_where_the_package_looks_for_it() -> None:
    assert set(hysafe.__all__) == {*hysafe._HOMES, "__version__"}
    for name, home in hysafe._HOMES.items():
        path = ROOT.joinpath(*home.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        defined = set()
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                defined.add(node.name)
            elif isinstance(node, ast.ImportFrom):
                defined |= {n.asname or n.name for n in node.names}
            elif isinstance(node, ast.Assign):
                defined |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        assert name in defined, f"{home}.{name}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        hysafe.laod  # noqa: B018
    assert not hasattr(hysafe, "__wrapped__")
