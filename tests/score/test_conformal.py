"""Conformal p-values hold their level; Benjamini-Hochberg agrees with scipy and bounds the queue."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hysafe.errors import ConfigError, ShapeError
from hysafe.score.conformal import (
    adjusted_p_values,
    benjamini_hochberg,
    mondrian_p_values,
    split_conformal,
)

laws = settings(max_examples=40, deadline=None, derandomize=True)
# A share of n trials strays further than this many standard errors once in 10^5 times.
SIGMAS = 4.5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heavy(n: int, seed: int) -> torch.Tensor:
    """Scores with heavy tails and, after rounding, many ties."""
    g = generator(seed)
    x = torch.randn(n, generator=g, dtype=torch.double)
    return x / torch.randn(n, generator=g, dtype=torch.double).abs().clamp_min(0.05)


def false_alarms(
    seed: int, level: float, *, ties: bool, smoothed: bool, n: int = 200
) -> list[bool]:
    """Whether one fresh exchangeable item is called, for many calibration sets."""
    trials = 150
    calls = []
    for trial in range(trials):
        scores = heavy(n + 1, seed * trials + trial)
        if ties:
            scores = scores.round()
        p = split_conformal(
            scores[:1], scores[1:], smoothed=smoothed, generator=generator(trial + seed)
        )
        calls.append(bool(p <= level))
    return calls


# ---------------------------------------------------------------- the level


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.5]), st.booleans())
def test_false_alarms_of_exchangeable_items_stay_at_the_level(
    seed: int, level: float, ties: bool
) -> None:
    calls = false_alarms(seed, level, ties=ties, smoothed=False)
    assert np.mean(calls) <= level + SIGMAS * math.sqrt(level * (1 - level) / len(calls))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.2, 0.5]), st.booleans())
def test_with_ties_broken_at_random_the_level_is_met_and_not_only_bounded(
    seed: int, level: float, ties: bool
) -> None:
    calls = false_alarms(seed, level, ties=ties, smoothed=True)
    error = SIGMAS * math.sqrt(level * (1 - level) / len(calls))
    assert abs(float(np.mean(calls)) - level) <= error


def test_without_ties_a_deterministic_p_value_is_uniform_on_its_grid() -> None:
    scores = torch.randperm(10, generator=generator(1)).double()
    p = [float(split_conformal(scores[i : i + 1], scores[scores != scores[i]])) for i in range(10)]
    assert sorted(p) == pytest.approx([k / 10 for k in range(1, 11)])


# ---------------------------------------------------------------- the definition


values = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=40)


@laws
@given(values, values)
def test_p_values_count_calibration_scores_as_the_formula_says(
    calibration: list[float], scores: list[float]
) -> None:
    got = split_conformal(torch.tensor(scores), torch.tensor(calibration))
    expected = [(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in scores]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.double))


@laws
@given(values, values, st.integers(0, 99))
def test_a_smoothed_p_value_lies_between_both_ways_to_count_a_tie(
    calibration: list[float], scores: list[float], seed: int
) -> None:
    known, new = torch.tensor(calibration), torch.tensor(scores)
    p = split_conformal(new, known, smoothed=True, generator=generator(seed))
    above = torch.tensor([sum(c > s for c in calibration) for s in scores])
    assert bool((p >= above / (len(known) + 1)).all())
    assert bool((p <= split_conformal(new, known)).all())
    again = split_conformal(new, known, smoothed=True, generator=generator(seed))
    assert torch.equal(p, again)


def test_more_novel_is_a_smaller_p_value_and_no_number_is_the_smallest() -> None:
    known = heavy(500, 3)
    scores = torch.tensor([-1e9, -1.0, 0.0, 1.0, 1e9, math.nan, math.inf])
    p = split_conformal(scores, known)
    assert bool((p[:5].diff() <= 0).all())
    assert p[0] == 1
    assert p[4:].tolist() == pytest.approx([1 / 501] * 3)


def test_nothing_to_calibrate_on_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least one"):
        split_conformal(torch.ones(2), torch.empty(0))
    with pytest.raises(ShapeError, match="numbers"):
        split_conformal(torch.ones(2), torch.tensor([1.0, math.nan]))


def test_p_values_are_those_of_crepes() -> None:
    crepes = pytest.importorskip("crepes")
    known, new = heavy(300, 4).round(decimals=1), heavy(200, 5).round(decimals=1)
    classes = ["a"]
    classifier = crepes.ConformalClassifier().fit(known.numpy())
    theirs = classifier.predict_p(new.numpy()[:, None], all_classes=True, classes=classes,
                                  smoothing=False)  # fmt: skip
    np.testing.assert_allclose(split_conformal(new, known).numpy(), theirs[:, 0], atol=1e-12)
    smoothed = classifier.predict_p(new.numpy()[:, None], all_classes=True, classes=classes,
                                    smoothing=True, seed=1)[:, 0]  # fmt: skip
    ours = split_conformal(new, known, smoothed=True, generator=generator(6)).numpy()
    # the same interval for each item, other draws in it
    widest = (1 + (known[:, None] == new).sum(0).numpy()) / (len(known) + 1)
    assert np.all(np.abs(ours - smoothed) <= widest)


# ---------------------------------------------------------------- within groups


def test_class_conditional_p_values_hold_their_level_in_every_group_where_plain_ones_do_not() -> (
    None
):
    n, level = 4000, 0.1
    groups = torch.arange(2).repeat_interleave(n)
    spread = torch.tensor([1.0, 5.0])[groups]
    calibration = torch.randn(2 * n, generator=generator(7)) * spread
    scores = torch.randn(2 * n, generator=generator(8)) * spread
    plain = split_conformal(scores, calibration) <= level
    within = mondrian_p_values(scores, groups, calibration, groups) <= level
    # both samples are random: the error of the calibration quantile adds to that of the share
    error = SIGMAS * math.sqrt(2 * level * (1 - level) / n)
    for group in (0, 1):
        assert abs(float(within[groups == group].double().mean()) - level) <= error
    assert float(plain[groups == 1].double().mean()) > level + error
    assert float(plain[groups == 0].double().mean()) < level - error


def test_class_conditional_p_values_are_those_of_each_group_alone() -> None:
    groups, known_groups = torch.tensor([2, 0, 2, 7]), torch.tensor([0, 2, 0, 2, 2])
    scores, known = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 0.0, 4.0])
    p = mondrian_p_values(scores, groups, known, known_groups)
    assert p[:1] == split_conformal(scores[:1], known[known_groups == 2])
    assert p[1:2] == split_conformal(scores[1:2], known[known_groups == 0])
    assert p[3] == 1  # nothing is known of group 7
    with pytest.raises(ShapeError, match="one group a score"):
        mondrian_p_values(scores, groups[:2], known, known_groups)


# ---------------------------------------------------------------- a whole collection


@laws
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.01, 0.5))
def test_adjusted_p_values_are_those_of_scipy(p: list[float], level: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    tensor = torch.tensor(p, dtype=torch.double)
    for dependence, method in (("positive", "bh"), ("any", "by")):
        expected = stats.false_discovery_control(p, method=method)
        got = adjusted_p_values(tensor, dependence=dependence)  # type: ignore[arg-type]
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)
        calls = benjamini_hochberg(tensor, level, dependence=dependence)  # type: ignore[arg-type]
        clear = np.abs(expected - level) > 1e-12
        assert np.array_equal(calls.numpy()[clear], (expected <= level)[clear])


@laws
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.01, 0.5))
def test_calls_are_the_largest_set_under_the_line_of_benjamini_and_hochberg(
    p: list[float], level: float
) -> None:
    m = len(p)
    ordered = sorted(p)
    under = [k for k in range(1, m + 1) if ordered[k - 1] * m / k <= level]
    cut = ordered[under[-1] - 1] if under else -1.0
    calls = benjamini_hochberg(torch.tensor(p, dtype=torch.double), level)
    assert calls.tolist() == [x <= cut for x in p]


def test_the_share_of_false_alarms_in_the_queue_is_bounded() -> None:
    level, shares = 0.1, []
    for trial in range(150):
        g = generator(trial)
        known = torch.randn(500, generator=g)
        ordinary = torch.randn(180, generator=g)
        novel = torch.randn(20, generator=g) + 4
        p = split_conformal(torch.cat((ordinary, novel)), known)
        calls = benjamini_hochberg(p, level)
        shares.append(int(calls[:180].sum()) / max(1, int(calls.sum())))
        assert trial < 149 or int(calls[180:].sum()) > 5  # and the queue is of use
    # expected share: at most level times the share of ordinary items
    error = SIGMAS * float(np.std(shares)) / math.sqrt(len(shares))
    assert float(np.mean(shares)) <= level * 0.9 + error
    plain = [(split_conformal(torch.randn(180, generator=generator(t)), torch.randn(500)) <= level)
             for t in range(1)]  # fmt: skip
    assert int(plain[0].sum()) > 5  # a fixed level has no such bound: mostly false alarms


def test_collections_of_any_size_and_wrong_input() -> None:
    assert adjusted_p_values(torch.empty(0)).shape == (0,)
    assert benjamini_hochberg(torch.tensor([0.04]), 0.05).tolist() == [True]
    with pytest.raises(ShapeError, match=r"\[0, 1\]"):
        adjusted_p_values(torch.tensor([0.2, math.nan]))
    with pytest.raises(ConfigError, match="level"):
        benjamini_hochberg(torch.tensor([0.2]), 1.0)
    with pytest.raises(ConfigError, match="dependence"):
        adjusted_p_values(torch.tensor([0.2]), dependence="none")  # type: ignore[arg-type]
