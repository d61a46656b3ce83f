"""Thresholds against torchmetrics and brute force, intervals against scipy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torchmetrics.functional.classification import (
    binary_precision_at_fixed_recall,
    binary_recall_at_fixed_precision,
)

from hysafe.errors import ConfigError, ShapeError
from hysafe.score.thresholds import (
    Counts,
    Rate,
    Target,
    choose_threshold,
    count_at,
    wilson_interval,
)

laws = settings(max_examples=80, deadline=None, derandomize=True)

# few distinct scores, so that ties are common
labelled = st.lists(st.tuples(st.integers(0, 12).map(lambda i: i / 12), st.booleans()), min_size=1,
                    max_size=30)  # fmt: skip


def sample(seed: int, n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    truth = torch.rand(n, generator=g) < 0.3
    scores = torch.sigmoid(torch.randn(n, generator=g, dtype=torch.double) + 1.5 * truth - 1)
    return scores, truth


def split(rows: list[tuple[float, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([s for s, _ in rows]), torch.tensor([t for _, t in rows])


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (1, 1), (3, 10), (50, 50), (17, 1000), (499, 500)])
def test_wilson_is_that_of_scipy(hits: int, n: int) -> None:
    for confidence in (0.95, 0.8):
        wanted = binomtest(hits, n).proportion_ci(confidence, method="wilson")
        assert wilson_interval(hits, n, confidence=confidence) == pytest.approx(tuple(wanted))


def test_nothing_is_known_of_nothing() -> None:
    assert wilson_interval(0, 0) == (0, 1)
    assert math.isnan(Rate(0, 0).value)
    with pytest.raises(ShapeError, match="3 of 2"):
        wilson_interval(3, 2)


# ---------------------------------------------------------------- targets


def test_targets_are_read_and_written() -> None:
    for text in ("precision=0.9", "recall=0.85", "cost=5:1", "cost=0.5:20", "recall=1"):
        assert str(Target.parse(text)) == text
    assert Target.parse("cost=5:2") == Target("cost", 5, 2)


@pytest.mark.parametrize(
    "text",
    ["", "precision", "precision=", "precision=0", "recall=1.1", "recall=nan", "f1=0.5", "cost=5",
     "cost=5:0", "cost=-1:1", "cost=inf:1", "precision=0.9:1", "cost=1:2:3"],
)  # fmt: skip
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"target '.*': "):
        Target.parse(text)


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("level", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_precision_is_had_with_the_recall_that_torchmetrics_finds(level: float, seed: int) -> None:
    scores, truth = sample(seed)
    threshold = choose_threshold(scores, truth, Target("precision", level))
    best, _ = binary_recall_at_fixed_precision(scores, truth.long(), level)
    assert threshold is not None
    counts = count_at(scores, truth, threshold)
    assert counts.precision.value >= level
    assert counts.recall.value == pytest.approx(float(best))


@pytest.mark.parametrize("level", [0.3, 0.85, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_recall_is_had_by_the_highest_threshold(level: float, seed: int) -> None:
    scores, truth = sample(seed)
    threshold = choose_threshold(scores, truth, Target("recall", level))
    assert threshold is not None
    counts = count_at(scores, truth, threshold)
    assert counts.recall.value >= level
    higher = scores[scores >= threshold].min() + 1e-12
    assert count_at(scores, truth, float(higher)).recall.value < level
    # no threshold with this recall is more precise than torchmetrics' best, and ours can be less
    best, _ = binary_precision_at_fixed_recall(scores, truth.long(), level)
    assert counts.precision.value <= float(best) + 1e-6


@laws
@given(labelled, st.sampled_from([0.2, 1.0, 3.0]), st.sampled_from([0.5, 1.0]))
def test_no_threshold_costs_less(rows: list[tuple[float, bool]], miss: float, alarm: float) -> None:
    scores, truth = split(rows)
    target = Target("cost", miss, alarm)
    threshold = choose_threshold(scores, truth, target)
    if threshold is None:
        # the best is to call even scores of 0, or nothing although some score is 1
        assert not bool(truth.any()) or bool((scores == 0).any() | (scores == 1).any())
        return
    cost = count_at(scores, truth, threshold).cost(target)
    for other in [k / 24 for k in range(1, 25)]:
        assert cost <= count_at(scores, truth, other).cost(target) + 1e-9


@laws
@given(labelled, st.sampled_from(["precision", "recall"]), st.sampled_from([0.1, 0.5, 0.8, 1.0]))
def test_a_target_is_reached_or_cannot_be(
    rows: list[tuple[float, bool]], kind: str, level: float
) -> None:
    scores, truth = split(rows)
    threshold = choose_threshold(scores, truth, Target(kind, level))  # type: ignore[arg-type]
    reached = {
        other: getattr(count_at(scores, truth, other), kind).value >= level - 1e-12
        for other in sorted({*scores.tolist()} - {0.0})
        if bool(truth.any())
    }
    if threshold is None:
        # where the last score that reaches it is 0, nothing above 0 may do
        assert not any(reached.values()) or 0.0 in scores.tolist()
    else:
        assert 0 < threshold <= 1
        assert getattr(count_at(scores, truth, threshold), kind).value >= level - 1e-12
        apart = [s for s in scores.tolist() if s != 0]
        called = min(s for s in apart if s >= threshold)
        best = min if kind == "precision" else max
        assert called == best(s for s, good in reached.items() if good)


def test_the_threshold_is_a_short_number_between_two_scores() -> None:
    scores = torch.tensor([0.9, 0.82, 0.412, 0.4107, 0.1], dtype=torch.double)
    truth = torch.tensor([True, True, True, False, False])
    assert choose_threshold(scores, truth, Target("precision", 1.0)) == 0.411
    assert choose_threshold(scores, truth, Target("recall", 0.5)) == 0.62
    assert choose_threshold(scores, truth, Target("cost", 1, 9)) == 0.411


def test_the_threshold_keeps_away_from_both_scores() -> None:
    # stored in float32, a threshold that is a score would call its item or not by rounding
    scores = torch.tensor([0.411, 0.4107], dtype=torch.double)
    threshold = choose_threshold(scores, torch.tensor([True, False]), Target("recall", 1.0))
    assert threshold is not None
    assert 0.4107 < threshold < 0.411


def test_in_doubt_more_is_called() -> None:
    scores, truth = torch.tensor([0.8, 0.6, 0.4]), torch.tensor([True, False, True])
    assert choose_threshold(scores, truth, Target("cost", 1, 1)) == 0.2


def test_without_a_true_item_or_above_reach_there_is_no_threshold() -> None:
    scores = torch.tensor([0.9, 0.2])
    assert choose_threshold(scores, torch.tensor([False, False]), Target("recall", 0.5)) is None
    assert choose_threshold(scores, torch.tensor([False, True]), Target("precision", 0.9)) is None
    zero = torch.tensor([0.9, 0.0])  # a threshold of 0 would call everything
    assert choose_threshold(zero, torch.tensor([False, True]), Target("recall", 0.5)) is None


def test_nothing_is_called_where_every_alarm_costs_more() -> None:
    scores, truth = torch.tensor([0.8, 0.6]), torch.tensor([False, True])
    threshold = choose_threshold(scores, truth, Target("cost", 1, 10))
    assert threshold is not None
    assert 0.8 < threshold < 1


def test_counts() -> None:
    scores = torch.tensor([0.5, 0.5, 0.4, 0.6, 0.1])
    truth = torch.tensor([True, False, True, True, False])
    counts = count_at(scores, truth, 0.5)
    assert counts == Counts(2, 1, 1, 1)
    assert counts.precision == Rate(2, 3)
    assert counts.recall == Rate(2, 3)
    assert counts.cost(Target("cost", 5, 2)) == 7


@pytest.mark.parametrize(
    ("scores", "truth"),
    [([0.5, math.nan], [True, False]), ([1.5], [True]), ([-0.1], [True]), ([0.5], [True, False])],
)
def test_scores_are_probabilities(scores: list[float], truth: list[bool]) -> None:
    with pytest.raises(ShapeError, match="two vectors of one length"):
        choose_threshold(torch.tensor(scores), torch.tensor(truth), Target("recall", 0.5))
