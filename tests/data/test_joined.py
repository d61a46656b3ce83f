"""Longer texts made of short ones."""

from __future__ import annotations

import pytest
import torch

from hysafe.data.datamodule import _Batches, _mates
from hysafe.data.joined import MOST_WORDS, join_texts
from hysafe.types import Sample


def samples() -> list[Sample]:
    """Two sources, harmless and risky, and one text of unknown safety."""
    made = [Sample(f"b{i}", "one", f"fine{i}", None, ("S.1.1",), True) for i in range(8)]
    made += [Sample(f"r{i}", "one", f"bad{i}", None, ("6.1",), False) for i in range(8)]
    made += [Sample(f"c{i}", "two", f"calm{i}", None, ("S.b2",), True) for i in range(3)]
    return [*made, Sample("u", "two", "unknown", None, ("1.2",), None)]


def test_a_risky_part_makes_the_whole_risky() -> None:
    joined = join_texts(samples(), 60, seed=3)
    assert [s.safe for s in joined] == [n % 2 == 0 for n in range(60)]
    for s in joined:
        text = str(s.text)
        assert "unknown" not in text
        assert ("bad" in text) == (not s.safe)
        assert text.count("bad") <= 1
        assert set(s.nodes) <= ({"S.1.1", "S.b2"} if s.safe else {"6.1"})
    assert join_texts(samples(), 60, seed=3) == joined
    assert join_texts(samples(), 60, seed=4) != joined


def test_joined_texts_stay_short_enough_to_be_read_whole() -> None:
    long = [Sample(str(i), "one", "word " * 50, None, ("S.b2",), i > 0) for i in range(4)]
    # a first part of any length, then others up to the limit; the risky one replaces a part
    assert all(len(str(s.text).split()) <= MOST_WORDS + 12 for s in join_texts(long, 40))


def test_nothing_is_joined_where_one_side_is_missing() -> None:
    assert join_texts([s for s in samples() if s.safe], 5) == []


@pytest.mark.parametrize("batch", [6, 7])
def test_batches_hold_both_sides_of_a_pair(batch: int) -> None:
    texts = [
        Sample("a", "contrast", "x", pair="p1"),
        Sample("b", "contrast", "y", pair="p1"),
        Sample("c", "contrast", "z", pair="p2"),  # its other side was taken out
        Sample("d", "other", "w"),
    ]
    mates = _mates(texts)
    assert mates.tolist() == [1, 0, 2, 3]
    weights = torch.tensor([1.0, 1.0, 1e-9, 1e-9])
    for drawn in _Batches(4, 4, 0, weights, 5, mates):
        first, second = drawn[:2], drawn[2:]
        assert second == [1 - i for i in first]
    assert all(len(b) == min(batch, 4) for b in _Batches(4, batch, 0, weights, 3, mates))
