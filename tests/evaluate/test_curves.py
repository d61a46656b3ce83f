"""Curves against scikit-learn and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from hysafe.errors import ShapeError
from hysafe.evaluate.curves import FPR_GRID, mean_roc, reliability, risk_coverage, roc
from hysafe.evaluate.metrics import detection
from hysafe.score.calibration import expected_calibration_error

laws = settings(max_examples=60, deadline=None, derandomize=True)


def sample(seed: int, n: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(n, generator=g)
    return p, torch.rand(n, generator=g) < p**2


# ---------------------------------------------------------------- reliability


def test_bins_have_equal_counts_and_their_error_is_the_calibration_error() -> None:
    p, truth = sample(0)
    bins = reliability(p, truth, bins=10)
    assert bins.size.tolist() == [50] * 10
    order = np.argsort(p.numpy())
    for i, part in enumerate(np.split(order, 10)):
        assert float(bins.confidence[i]) == pytest.approx(float(p[part].mean()), abs=1e-6)
        assert float(bins.frequency[i]) == pytest.approx(float(truth[part].float().mean()))
    assert bins.error == pytest.approx(expected_calibration_error(p, truth, bins=10))
    assert reliability(p, truth).error == pytest.approx(expected_calibration_error(p, truth))


def test_few_items_have_few_bins() -> None:
    bins = reliability(torch.tensor([0.2, 0.9]), torch.tensor([False, True]))
    assert bins.size.tolist() == [1, 1]
    assert bins.error == pytest.approx(0.15)


# ---------------------------------------------------------------- risk and coverage


@laws
@given(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1, max_size=40,
                unique_by=lambda r: r[0]))  # fmt: skip
def test_risk_is_the_share_of_errors_among_the_surest(rows: list[tuple[int, bool]]) -> None:
    curve = risk_coverage(
        torch.tensor([float(c) for c, _ in rows]), torch.tensor([w for _, w in rows])
    )
    ranked = [w for _, w in sorted(rows, reverse=True)]
    wanted = [sum(ranked[:k]) / k for k in range(1, len(ranked) + 1)]
    assert curve.risk.tolist() == pytest.approx(wanted)
    assert curve.coverage.tolist() == pytest.approx(
        [k / len(rows) for k in range(1, len(rows) + 1)]
    )
    assert curve.area == pytest.approx(sum(wanted) / len(wanted))


def test_the_order_of_equal_confidences_does_not_matter() -> None:
    g = torch.Generator().manual_seed(1)
    confidence = torch.randint(0, 4, (60,), generator=g).float()
    wrong = torch.rand(60, generator=g) < 0.3
    curve = risk_coverage(confidence, wrong)
    shuffled = torch.randperm(60, generator=g)
    other = risk_coverage(confidence[shuffled], wrong[shuffled])
    torch.testing.assert_close(curve.risk, other.risk)
    # it is the mean over all orders, here over many
    areas = []
    for _ in range(400):
        broken = confidence + 0.5 * torch.rand(60, generator=g)
        areas.append(risk_coverage(broken, wrong).area)
    assert curve.area == pytest.approx(np.mean(areas), abs=0.005)


def test_the_best_order_has_the_least_area() -> None:
    wrong = torch.tensor([True, False, False, True, False, False])
    least = risk_coverage((~wrong).float() + torch.arange(6) * 1e-3, wrong).area
    assert least == pytest.approx((0 + 0 + 0 + 0 + 1 / 5 + 2 / 6) / 6)
    assert risk_coverage(wrong.float(), wrong).area > least


# ---------------------------------------------------------------- ROC


@pytest.mark.parametrize("ties", [False, True])
def test_roc_is_that_of_sklearn(ties: bool) -> None:
    g = torch.Generator().manual_seed(2)
    known = torch.randn(80, generator=g, dtype=torch.double)
    novel = torch.randn(50, generator=g, dtype=torch.double) + 1
    if ties:
        known, novel = known.mul(2).round(), novel.mul(2).round()
    truth = np.r_[np.zeros(80), np.ones(50)]
    fpr, tpr, _ = roc_curve(truth, torch.cat((known, novel)).numpy(), drop_intermediate=False)
    ours = roc(known, novel)
    np.testing.assert_allclose(ours[0], fpr)
    np.testing.assert_allclose(ours[1], tpr)
    # read at the grid, at a step from its top: just to the right of the rate
    np.testing.assert_allclose(
        mean_roc([(known, novel)]), np.interp(FPR_GRID + 1e-9, fpr, tpr), atol=1e-6
    )
    area = float(torch.trapezoid(ours[1], ours[0]))
    assert area == pytest.approx(detection(known, novel).auroc, abs=1e-6)


def test_the_mean_roc_is_the_mean_at_each_rate() -> None:
    a = (torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0]))  # perfect
    b = (a[1], a[0])  # the other way round
    assert mean_roc([a])[0] == 1
    np.testing.assert_allclose(mean_roc([b])[:-1], 0)
    np.testing.assert_allclose(mean_roc([a, b])[:-1], 0.5)


def test_what_cannot_be_ranked_is_refused() -> None:
    nothing, one = torch.empty(0), torch.ones(1)
    for call in (
        lambda: reliability(nothing, nothing.bool()),
        lambda: risk_coverage(one * torch.nan, one.bool()),
        lambda: risk_coverage(one, torch.ones(2).bool()),
        lambda: roc(one, nothing),
        lambda: roc(one * torch.nan, one),
    ):
        with pytest.raises(ShapeError):
            call()
