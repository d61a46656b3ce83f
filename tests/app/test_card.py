"""The model card's figures: functionalities at a fixed recall, calibration of nodes, plots, pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hysafe.app.card import (
    _judge,
    _Judged,
    _plots,
    _Texts,
    evaluate_card,
    functional_figures,
    node_calibration,
    write_block,
)
from hysafe.app.pipeline import SafetyModel, load
from hysafe.errors import ConfigError, MissingExtraError
from hysafe.geometry import Points
from hysafe.types import Sample


def sentence(name: str, safe: bool) -> Sample:
    extra = {"functionality": name}
    return Sample(f"f-{name}", "contrast", "x", None, ("1.1",), safe, None, extra)


def test_functional_figures_use_the_threshold_of_the_validation_split() -> None:
    risky = torch.arange(100.0)  # 0.85 recall is at evidence 14.85
    texts = _Texts(
        [sentence("homonym", True), sentence("homonym", True), sentence("news_report", True),
         sentence("threat_direct", False)]
    )  # fmt: skip
    figures = functional_figures(risky, risky + 5, torch.tensor([20.0, 3.0, 3.0, 50.0]), texts)
    assert figures["its false alarms, homonyms and figures of speech"] == 0.5
    assert figures["its false alarms, all harmless functionalities"] == pytest.approx(1 / 3)
    assert figures["its recall, risky functionalities"] == 1.0
    assert figures["recall at the threshold of 0.85 validation recall"] == pytest.approx(0.90)
    assert figures["functionalities AUROC"] == 1.0


def test_a_block_is_replaced_and_the_rest_kept(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures: card -->\nold\n<!-- end -->\nafter\n")
    for _ in range(2):
        write_block(page, "| a |", {"commit": "abc"})
    assert page.read_text() == (
        "before\n<!-- figures: card -->\n| a |\n\n- commit: `abc`\n<!-- end -->\nafter\n"
    )


def test_a_page_without_block_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(ConfigError, match=r"page\.md: no block"):
        write_block(page, "| a |", {})


@pytest.fixture(scope="module")
def model() -> SafetyModel:
    """The bundled model's heads."""
    return load("mini", towers=False)


@pytest.fixture(scope="module")
def judged(model: SafetyModel) -> tuple[_Judged, list[str]]:
    """Points around some apexes, and the categories of the risky ones."""
    table, apexes = model.place(model.view())
    nodes = ["6.1", "7.4", "S.6.1", "S.b1"] * 12
    g = torch.Generator().manual_seed(0)
    tangents = apexes.tangent()[[table.index[n] for n in nodes]]
    noise = torch.randn(tangents.shape, generator=g) * tangents.norm(dim=-1, keepdim=True)
    points = Points.from_tangent(tangents + 0.1 * noise, apexes.c, apexes.geometry)
    unsafe = torch.tensor([not n.startswith("S") for n in nodes])
    return _judge(model, points, unsafe, "text"), [n for n in nodes if not n.startswith("S")]


def test_the_calibration_of_nodes_is_that_of_each_against_the_rest(
    model: SafetyModel, judged: tuple[_Judged, list[str]]
) -> None:
    said, categories = judged
    table, _ = model.place(model.view())
    figures = node_calibration(said.scores.nodes, table, categories, said.unsafe)
    true = iter(categories)
    applies = [{n, f"D{n.split('.')[0]}"} if bad else set() for bad in said.unsafe.tolist()
               for n in ([next(true)] if bad else [""])]  # fmt: skip
    pairs: list[tuple[float, bool]] = []
    errors = []
    for node in (n for n in model.taxonomy if n.kind in ("domain", "category")):
        if node.id == "S":
            continue
        column = said.scores.nodes[:, table.index[node.id]].tolist()
        mine = sorted((s, node.id in a) for s, a in zip(column, applies, strict=True))
        pairs += mine
        errors.append(error_of(mine))
    assert figures["node ECE, largest of one node"] == pytest.approx(max(errors), abs=1e-6)
    assert figures["node ECE, domains and categories pooled"] == pytest.approx(
        error_of(sorted(pairs)), abs=1e-4
    )


def error_of(pairs: list[tuple[float, bool]], bins: int = 15) -> float:
    """Calibration error of sorted pairs in bins of equal count, the first ones longer by one."""
    size, more = divmod(len(pairs), bins)
    total, start = 0.0, 0
    for i in range(bins):
        part = pairs[start : start + size + (i < more)]
        start += len(part)
        total += abs(sum(s for s, _ in part) - sum(t for _, t in part))
    return total / len(pairs)


def test_the_plots_of_the_card(
    model: SafetyModel, judged: tuple[_Judged, list[str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    said, _ = judged
    models = {"mini": (model, said, None), "control": (model, said, said)}

    def missing() -> None:
        raise MissingExtraError("plots are left out: pip install")

    with monkeypatch.context() as patch:
        patch.setattr("hysafe.app.card.require_matplotlib", missing)
        assert _plots(tmp_path, models) == []
        assert capsys.readouterr().err == "hysafe: plots are left out: pip install\n"
    pytest.importorskip("matplotlib")
    names = {p.name for p in _plots(tmp_path, models)}
    assert names == {p.name for p in tmp_path.iterdir()}
    assert names == {f"{name}.{form}" for name in ("reliability", "risk_coverage", "radius")
                     for form in ("svg", "png")}  # fmt: skip
    radius = (tmp_path / "radius.svg").read_text()
    assert all(words in radius for words in ("risk nodes", "harmless nodes", "geodesic radius"))
    assert "control, ECE" in (tmp_path / "reliability.svg").read_text()


def test_a_page_without_a_block_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.md: No such file"):
        evaluate_card("no model", pages=[tmp_path / "gone.md"])
    (tmp_path / "plain.md").write_text("# A page\n")
    with pytest.raises(ConfigError, match=r"plain\.md: no block"):
        evaluate_card("no model", pages=[tmp_path / "plain.md"])
