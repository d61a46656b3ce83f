"""Figures of the guard's table, by hand."""

from __future__ import annotations

import numpy as np

from hysafe.evaluate.guard import best_threshold, f1_score


def test_equal_scores_fall_on_one_side_of_the_threshold() -> None:
    scores, true = np.array([1.0, 1.0, 1.0, 0.5]), np.array([True, False, False, True])
    limit = best_threshold(scores, true)
    assert limit == 0.5
    assert f1_score(scores >= limit, true)["f1"] == 2 / 3
