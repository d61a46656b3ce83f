"""Detection figures against scikit-learn and an explicit loop; novel is the positive class."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from hysafe.errors import ShapeError
from hysafe.evaluate.metrics import Detection, detection, false_positive_rate, mean_detection

# few values: many ties
scores = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=40)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(scores, scores)
def test_figures_are_those_of_scikit_learn(known: list[float], novel: list[float]) -> None:
    truth = [0] * len(known) + [1] * len(novel)
    got = detection(torch.tensor(known), torch.tensor(novel))
    assert got.auroc == pytest.approx(roc_auc_score(truth, known + novel), abs=1e-6)
    assert got.aupr == pytest.approx(average_precision_score(truth, known + novel), abs=1e-6)
    fpr, tpr, _ = roc_curve(truth, known + novel, drop_intermediate=False)
    assert got.fpr == pytest.approx(float(fpr[np.argmax(tpr >= 0.95 - 1e-12)]), abs=1e-9)


def test_figures_depend_on_the_order_of_scores_alone() -> None:
    g = torch.Generator().manual_seed(0)
    known = torch.randn(200, generator=g).double()
    novel = torch.randn(90, generator=g).double() + 1
    plain = detection(known, novel)
    assert detection(known * 1e4 + 5e6, novel * 1e4 + 5e6) == plain  # a sigmoid makes these equal
    assert 0.7 < plain.auroc < 0.85
    flipped = detection(-known, -novel)
    assert flipped.auroc == pytest.approx(1 - plain.auroc, abs=1e-6)


def test_perfect_and_worst_scores() -> None:
    low, high = torch.zeros(30), torch.ones(40)
    assert detection(low, high) == Detection(1.0, 1.0, 0.0)
    assert detection(high, low).auroc == 0
    assert detection(high, low).fpr == 1
    assert (
        false_positive_rate(torch.tensor([0.0, 5.0]), torch.arange(20.0)) == 0.5
    )  # 1 of 20 missed


def test_the_mean_is_of_each_figure() -> None:
    mean = mean_detection([Detection(0.5, 0.2, 1.0), Detection(0.7, 0.4, 0.0)])
    assert mean == pytest.approx((0.6, 0.3, 0.5))


def test_an_empty_side_or_no_number_is_refused() -> None:
    with pytest.raises(ShapeError, match="some of each"):
        detection(torch.zeros(3), torch.zeros(0))
    with pytest.raises(ShapeError, match="numbers"):
        detection(torch.tensor([math.nan]), torch.zeros(2))
