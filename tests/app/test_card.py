"""The model card's figures: functionalities at a fixed recall, blocks of Markdown pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hysafe.app.card import _Texts, functional_figures, write_block
from hysafe.errors import ConfigError
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
