"""Plots are written as SVG and PNG, the same data give the same SVG, and a missing library is named."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

from hysafe.errors import MissingExtraError
from hysafe.evaluate import plots
from hysafe.evaluate.curves import FPR_GRID, reliability, risk_coverage

P = torch.linspace(0.01, 0.99, 90)
TRUTH = P > 0.4


def draw(folder: Path) -> list[Path]:
    bins = reliability(P, TRUTH)
    curve = risk_coverage((P - 0.5).abs(), (P > 0.5) != TRUTH)
    return [
        *plots.plot_reliability(folder / "a" / "reliability", {"x": {"one": bins, "two": bins}}),
        *plots.plot_risk_coverage(folder / "risk", {k: {"one": curve} for k in "abcd"}),
        *plots.plot_radius(
            folder / "radius", {"risk": [(1, P), (3, P + 1)], "safe": [(1, P)]}, {"texts": P}
        ),
        *plots.plot_roc(folder / "roc", {"near": {"combined": (FPR_GRID.sqrt(), 0.666)}}),
    ]


def test_all_plots_are_written_and_stay_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = draw(tmp_path / "1"), draw(tmp_path / "2")
    assert [p.name for p in first] == [
        f"{name}.{form}" for name in ("reliability", "risk", "radius", "roc")
        for form in ("svg", "png")
    ]  # fmt: skip
    for a, b in zip(first, second, strict=True):
        assert a.stat().st_size > 2000
        if a.suffix == ".svg":
            assert a.read_bytes() == b.read_bytes()
        else:
            assert a.read_bytes()[:4] == b"\x89PNG"
    # words of an SVG are drawn as shapes, with the words beside them as comments
    assert "two, ECE" in first[0].read_text()
    assert "combined, 0.666" in first[6].read_text()


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'hysafe\[plots\]'"):
        draw(tmp_path)
    assert not list(tmp_path.iterdir())
