"""Texts in another spelling, made for training."""

from __future__ import annotations

import random

import pytest

from hysafe.data.datamodule import EmbedData
from hysafe.data.misspelt import COMMON, MANNERS, misspell, misspelt_texts
from hysafe.types import Sample

TEXT = "They sell stolen passports at the harbour, cash only, without questions."


def samples() -> list[Sample]:
    made = [
        Sample(f"b{i}", "one", f"{TEXT} fine{i}", None, ("S.7.4",), True, f"p{i}") for i in range(8)
    ]
    made += [Sample(f"r{i}", "two", f"{TEXT} bad{i}", None, ("7.4",), False, extra={"concept": "7.4.1"}) for i in range(8)]  # fmt: skip
    made += [Sample("u", "two", "unknown safety", None, ("1.2",), None)]
    return [*made, Sample("long", "two", "lengthy " * 80, None, ("1.2",), False)]


def test_half_are_harmless_and_each_keeps_its_label() -> None:
    made = misspelt_texts(samples(), 80, seed=2)
    assert [s.safe for s in made] == [n % 2 == 0 for n in range(80)]
    originals = {s.text for s in samples()}
    for s in made:
        assert s.source == "misspelt"
        assert s.pair is None
        assert s.nodes == (("S.7.4",) if s.safe else ("7.4",))
        assert s.extra == ({} if s.safe else {"concept": "7.4.1"})
        assert "unknown" not in str(s.text)
        assert "lengthy" not in str(s.text)
    # two like letters may change places
    assert sum(s.text in originals for s in made) <= 4
    assert misspelt_texts(samples(), 80, seed=2) == made
    assert misspelt_texts(samples(), 80, seed=3) != made
    assert misspelt_texts([s for s in samples() if s.safe], 5) == []


@pytest.mark.parametrize("manner", dict.fromkeys(MANNERS), ids=lambda m: m.__name__)
def test_each_manner_changes_the_longer_words(manner) -> None:  # type: ignore[no-untyped-def]
    changed = 0
    for seed in range(60):
        text = manner(TEXT, random.Random(seed))
        changed += text != TEXT
        # short words stay, but where words run together
        assert "at" in text
    assert changed >= 55
    for edge in ("", "ok", "no 12 :)", "ÄÖÜß straße", "🔪🔪"):
        manner(edge, random.Random(0))


def test_common_words_are_changed_less_often() -> None:
    kept = {"They": 0, "sell": 0}
    for seed in range(300):
        text = misspell(TEXT, random.Random(seed))
        for word in kept:
            kept[word] += word.lower() in text.lower()
    assert "they" in COMMON
    assert kept["They"] > 1.1 * kept["sell"]


def test_the_training_data_have_as_many_as_are_asked_for() -> None:
    data = EmbedData(pictures=False, text_sets=[], rendered=4, image_size=16, misspelt=50)
    data.setup()
    sources = [s.source for s in data.train_texts.samples]
    assert sources.count("misspelt") == 50
    share = data.draw_weights[[s == "misspelt" for s in sources]].sum() / data.draw_weights.sum()
    assert 0.2 < float(share) < 0.4
