"""Texts among the rows of screens and signs, made for training."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hysafe.data import screens
from hysafe.data.label_map import SAFE
from hysafe.data.screens import MISREAD, MOST_WORDS, _filled, _layouts, _misread, screen_texts
from hysafe.errors import ConfigError
from hysafe.types import Sample


@pytest.fixture(autouse=True)
def nouns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        screens, "things", lambda root: {"tool": ["hammer", "tin opener"], "dish": ["soup"]}
    )


def samples() -> list[Sample]:
    """Harmless and risky texts, and one of unknown safety."""
    made = [Sample(f"b{i}", "one", f"fine{i} words", None, ("S.1.1",), True) for i in range(8)]
    made += [Sample(f"r{i}", "one", f"bad{i} words", None, ("6.1",), False) for i in range(8)]
    return [*made, Sample("u", "two", "undecided", None, ("1.2",), None)]


def test_half_of_the_screens_say_something_risky() -> None:
    made = screen_texts(samples(), Path(), 200, seed=3)
    assert [s.safe for s in made] == [n % 2 == 0 for n in range(200)]
    bare = 0
    for s in made:
        text = str(s.text).lower()
        assert "undecided" not in text
        assert "{" not in text
        if s.safe:
            assert set(s.nodes) <= {SAFE, "S.1.1"}
            assert "bad" not in text
            bare += s.nodes == (SAFE,)
        else:
            assert s.nodes == ("6.1",)
    assert 10 < bare < 50  # a quarter of a hundred
    # what is said stays whole but for one misread place in a fifth of the texts
    assert sum("bad" in str(s.text).lower() for s in made if not s.safe) > 85
    assert len({s.text for s in made}) == 200
    assert screen_texts(samples(), Path(), 200, seed=3) == made
    assert screen_texts(samples(), Path(), 200, seed=4) != made


def test_what_goes_where_a_screen_is_too_long() -> None:
    """Other texts first, then rows; never the risky one."""
    long = [Sample(str(i), "one", "word " * 60, None, ("S.b2",), True) for i in range(3)]
    long.append(Sample("r", "one", "bad " * 65, None, ("6.1",), False))
    long.append(
        Sample("t", "one", "raw " * 200, None, ("6.1",), False)
    )  # no screen holds that much
    long.append(Sample("u", "one", "dull " * 200, None, ("S.b2",), True))
    for s in screen_texts(long, Path(), 60):
        words = str(s.text).lower().split()
        assert len(words) <= MOST_WORDS + 1  # a space more where a letter is misread
        if not s.safe:
            assert sum(w == "bad" for w in words) >= 58  # a lost space takes two
            assert "word" not in words
        assert not {"raw", "dull"} & set(words)
        if s.nodes == ("S.b2",):
            assert 55 <= sum(w == "word" for w in words) <= 60


def test_none_are_made_where_one_side_is_missing() -> None:
    assert screen_texts([s for s in samples() if s.safe], Path(), 5) == []


def test_rows_are_whole() -> None:
    rng = random.Random(0)
    rows = [row for rows in _layouts().values() for row in rows]
    assert len(rows) > 400
    for row in rows:
        filled = _filled(row, [["hammer"], ["soup"]], rng)
        assert filled
        assert not set("{}") & set(filled)


def test_misread_texts_differ_by_a_letter_or_a_space() -> None:
    rng = random.Random(1)
    found = {_misread("some words here", rng) for _ in range(60)}
    assert len(found) > 5
    assert "some words here" not in found
    assert _misread("xyz", rng) == "xyz"  # nothing in it looks like something else
    shapes = set("".join(MISREAD.values())) | set("some words here")
    assert all(set(t) <= shapes for t in found)


def test_a_missing_word_list_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="noun_edges"):
        screen_texts(samples(), tmp_path, 4)
