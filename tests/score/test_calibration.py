"""Platt scaling, temperature, conformal p-values, calibration error, and the file they live in."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hysafe.errors import ModelError, ShapeError
from hysafe.score.calibration import (
    FILE,
    GRID_DIGITS,
    MIN_SLOPE,
    TEMPERATURES,
    Calibration,
    ModalityCalibration,
    conformal_p_values,
    expected_calibration_error,
    fit_platt,
    fit_temperature,
    quantile_grid,
)

laws = settings(max_examples=60, deadline=None, derandomize=True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- Platt


@pytest.mark.parametrize(
    ("slope", "offset", "spread"), [(1.7, -0.6, 2.0), (0.4, 2.0, 5.0), (0.03, -1.0, 80.0)]
)
def test_platt_recovers_the_slope_and_offset_that_made_the_labels(
    slope: float, offset: float, spread: float
) -> None:
    evidence = torch.randn(20_000, generator=generator(1)) * spread
    chance = torch.rand(20_000, generator=generator(2))
    got = fit_platt(evidence, chance < torch.sigmoid(slope * evidence + offset))
    assert got[0] == pytest.approx(slope, rel=0.06)
    assert got[1] == pytest.approx(offset, abs=0.1)


def test_platt_is_the_maximum_of_the_likelihood_with_platts_smoothed_targets() -> None:
    evidence = torch.randn(300, generator=generator(3), dtype=torch.double) * 3
    unsafe = torch.rand(300, generator=generator(4)) < torch.sigmoid(0.8 * evidence - 1)
    slope, offset = fit_platt(evidence, unsafe)
    positives, negatives = int(unsafe.sum()), int((~unsafe).sum())
    target = torch.where(unsafe, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    residual = torch.sigmoid(slope * evidence + offset) - target
    # both derivatives of the log likelihood vanish there, and it is concave
    assert abs(float(residual.mean())) < 1e-5
    assert abs(float((residual * evidence).mean())) < 1e-5


def test_platt_of_separable_labels_is_finite() -> None:
    evidence = torch.tensor([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
    slope, offset = fit_platt(evidence, evidence > 0)
    assert 0.3 < slope < 10
    assert abs(offset) < 1e-3


def test_more_evidence_never_lowers_the_risk() -> None:
    evidence = torch.randn(500, generator=generator(5))
    assert fit_platt(evidence, evidence < 0)[0] == MIN_SLOPE


def test_platt_needs_both_kinds() -> None:
    with pytest.raises(ShapeError, match="safe and unsafe"):
        fit_platt(torch.ones(3), torch.tensor([True] * 3))
    with pytest.raises(ShapeError, match="safe and unsafe"):
        fit_platt(torch.ones(3), torch.tensor([False] * 3))


# ---------------------------------------------------------------- temperature


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_is_recovered(temperature: float) -> None:
    true = torch.randn(8000, 6, generator=generator(6)) * 2
    labels = torch.multinomial(torch.softmax(true, -1), 1, generator=generator(7))[:, 0]
    assert fit_temperature(true * temperature, labels) == pytest.approx(temperature, rel=0.05)


def test_temperature_stays_in_its_range() -> None:
    logits = torch.randn(200, 4, generator=generator(8))
    low, high = TEMPERATURES
    assert fit_temperature(logits, logits.argmax(-1)) == pytest.approx(low, rel=1e-6)
    assert fit_temperature(logits, logits.argmin(-1)) == pytest.approx(high, rel=1e-6)


# ---------------------------------------------------------------- conformal p-values


def exact_p(score: float, calibration: list[float]) -> float:
    return (1 + sum(c >= score for c in calibration)) / (len(calibration) + 1)


scores_lists = st.lists(st.integers(-40, 40).map(lambda i: i / 8), min_size=1, max_size=80)


@laws
@given(scores_lists, st.lists(st.integers(-50, 50).map(lambda i: i / 8), min_size=1, max_size=20))
def test_p_values_are_the_counts_of_the_definition(
    calibration: list[float], scores: list[float]
) -> None:
    grid = quantile_grid(torch.tensor(calibration))
    assert list(grid) == sorted(calibration)
    got = conformal_p_values(torch.tensor(scores, dtype=torch.double), grid, len(calibration))
    expected = [exact_p(s, calibration) for s in scores]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.double))
    assert ((got > 0) & (got <= 1)).all()


@laws
@given(st.integers(0, 9999), st.integers(1, 300), st.integers(1, 60))
def test_a_grid_is_conservative_and_close(seed: int, n: int, size: int) -> None:
    values = torch.randn(n, generator=generator(seed), dtype=torch.double)
    values = (values * 1000).round() / 1000  # with ties, and exact to the digits stored
    grid = quantile_grid(values, size)
    assert len(grid) == min(n, size)
    assert max(grid) == float(values.max())
    scores = torch.cat((values, torch.randn(20, generator=generator(seed + 1)).double()))
    got = conformal_p_values(scores, grid, n)
    exact = torch.tensor([exact_p(s, values.tolist()) for s in scores.tolist()], dtype=torch.double)
    assert (got >= exact - 1e-12).all()
    assert (got - exact <= 1 / len(grid) + 1 / (n + 1)).all()
    full = conformal_p_values(scores, quantile_grid(values, n), n)
    assert (got >= full).all()


@laws
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30))
def test_stored_scores_are_rounded_upwards_only(values: list[float]) -> None:
    exact = sorted(values)
    grid = quantile_grid(torch.tensor(values, dtype=torch.double))
    for stored, value in zip(grid, exact, strict=True):
        assert value <= stored <= value + 10**-GRID_DIGITS * (1 + 1e-6)
        assert len(repr(stored).partition(".")[2].partition("e")[0]) <= GRID_DIGITS


@pytest.mark.parametrize("size", [1000, 50])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_false_alarms_of_exchangeable_items_are_at_most_alpha(alpha: float, size: int) -> None:
    n, tests, repeats = 400, 100, 150
    alarms = 0
    for seed in range(repeats):
        drawn = torch.randn(n + tests, generator=generator(seed)).exp()
        grid = quantile_grid(drawn[:n], size)
        alarms += int((conformal_p_values(drawn[n:], grid, n) <= alpha).sum())
    rate = alarms / (repeats * tests)
    variance = alpha * (1 - alpha)
    error = math.sqrt(variance / (repeats * tests) + variance / ((n + 2) * repeats))
    assert rate <= alpha + 3.5 * error
    # and the test has power: it is not conservative by more than the grid
    assert rate >= alpha - 1 / size - 1 / (n + 1) - 3.5 * error


def test_what_is_novel_has_a_small_p_and_what_is_ordinary_a_large_one() -> None:
    grid = quantile_grid(torch.arange(999.0))
    p = conformal_p_values(torch.tensor([-1.0, 499.0, 998.5, math.inf]), grid, 999)
    torch.testing.assert_close(p, torch.tensor([1.0, 0.501, 0.001, 0.001]))


def test_a_score_that_is_no_number_is_novel() -> None:
    p = conformal_p_values(torch.tensor([math.nan]), quantile_grid(torch.arange(99.0)), 99)
    assert float(p) == pytest.approx(0.01)


def test_without_calibration_scores_there_is_no_p_value() -> None:
    with pytest.raises(ShapeError, match="0 calibration scores.*Fit the calibration"):
        conformal_p_values(torch.zeros(2), (), 0)


# ---------------------------------------------------------------- calibration error


def test_calibration_error_by_hand() -> None:
    p = torch.tensor([0.9, 0.1, 0.9, 0.1])
    truth = torch.tensor([True, False, True, True])
    # bins {0.1, 0.1} with frequency 1/2 and {0.9, 0.9} with frequency 1
    assert expected_calibration_error(p, truth, bins=2) == pytest.approx((2 * 0.4 + 2 * 0.1) / 4)
    assert expected_calibration_error(p, truth, bins=1) == pytest.approx(0.25)
    perfect = torch.tensor([False, False, True, True])
    assert expected_calibration_error(perfect.double(), perfect) == 0


def test_calibration_error_sees_overconfidence() -> None:
    p = torch.rand(20_000, generator=generator(9))
    truth = torch.rand(20_000, generator=generator(10)) < p
    assert expected_calibration_error(p, truth) < 0.02
    assert expected_calibration_error((p > 0.5).double(), truth) > 0.2


# ---------------------------------------------------------------- the file

FITTED = Calibration(
    {
        "text": ModalityCalibration(1.25, -0.1, 0.7, (0.1, 0.25, 3.00001), (-2.5, 0.0), 7),
        "image": ModalityCalibration(0.5, 1e-9, 2.0),
    },
    "a validation split",
)


def test_calibration_survives_the_disk(tmp_path: Path) -> None:
    FITTED.save(tmp_path)
    loaded = Calibration.load(tmp_path)
    assert loaded == FITTED
    assert repr(loaded) == repr(FITTED)  # part of the model's hash
    assert loaded.fitted


def test_a_grid_survives_the_disk_exactly(tmp_path: Path) -> None:
    grid = quantile_grid(torch.randn(3000, generator=generator(11)) * 50)
    Calibration({"text": ModalityCalibration(distribution=grid, policy=grid, n=3000)}).save(
        tmp_path
    )
    assert Calibration.load(tmp_path).channel("text").distribution == grid


def test_no_file_is_the_neutral_calibration(tmp_path: Path) -> None:
    loaded = Calibration.load(tmp_path)
    assert loaded == Calibration()
    assert not loaded.fitted
    assert loaded.channel("text") == ModalityCalibration()


def test_text_read_in_pictures_is_calibrated_as_text() -> None:
    assert FITTED.channel("ocr") == FITTED.channel("text") != FITTED.channel("image")
    assert FITTED.channel("sound") == ModalityCalibration()


def damaged() -> dict[str, str]:
    def without(key: str) -> str:
        return changed(lambda text: text.pop(key))

    def changed(change: Any) -> str:
        data = json.loads(json.dumps({"channels": {"text": {
            "slope": 1.0, "offset": 0.0, "temperature": 1.0, "distribution": [0.1, 0.2],
            "policy": [0.1], "n": 5}}, "fitted_on": "x"}))  # fmt: skip
        change(data["channels"]["text"])
        return json.dumps(data)

    return {
        "empty": "",
        "cut": '{"channels": {"text"',
        "a list": "[1]",
        "no channels": "{}",
        "channels null": '{"channels": null}',
        "channels a list": '{"channels": ["text"]}',
        "a channel null": '{"channels": {"text": null}}',
        **{f"without {k}": without(k) for k in ("slope", "offset", "temperature", "policy", "n")},
        "slope as words": changed(lambda t: t.update(slope="steep")),
        "slope null": changed(lambda t: t.update(slope=None)),
        "slope nan": changed(lambda t: t.update(slope=math.nan)),
        "slope upside down": changed(lambda t: t.update(slope=-1)),
        "temperature 0": changed(lambda t: t.update(temperature=0)),
        "scores not sorted": changed(lambda t: t.update(distribution=[0.2, 0.1])),
        "scores infinite": changed(lambda t: t.update(policy=[math.inf])),
        "more scores than n": changed(lambda t: t.update(n=1)),
        "scores as text": changed(lambda t: t.update(distribution="ab")),
    }


def test_policy_scores_of_an_earlier_format_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    channel = ModalityCalibration(1.5, 0.5, 2.0, (0.0, 1.0), (-1.0, 2.0), 2)
    Calibration({"text": channel}, "x").save(tmp_path)
    assert Calibration.load(tmp_path).channel("text") == channel
    assert not caplog.records
    data = json.loads((tmp_path / FILE).read_text("utf-8"))
    del data["format"]
    (tmp_path / FILE).write_text(json.dumps(data), "utf-8")
    assert Calibration.load(tmp_path).channel("text") == replace(channel, policy=())
    (record,) = caplog.records
    assert "--fit" in record.getMessage()


@pytest.mark.parametrize("case", sorted(damaged()))
def test_a_damaged_file_is_an_error_and_never_the_neutral_calibration(
    case: str, tmp_path: Path
) -> None:
    (tmp_path / FILE).write_text(damaged()[case], "utf-8")
    with pytest.raises(ModelError, match=rf"{FILE}: not a calibration file .* Fit it again\."):
        Calibration.load(tmp_path)


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(np.random.default_rng(0).bytes(64) + b"\xff\xfe")
    with pytest.raises(ModelError, match="not a calibration file"):
        Calibration.load(tmp_path)
