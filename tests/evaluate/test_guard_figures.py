"""Figures of the guard's table, by hand."""

from __future__ import annotations

import numpy as np
import torch

from hysafe.evaluate.guard import best_threshold, f1_score, novelty_of_cones, novelty_of_listed
from hysafe.guard.model import Evidence, PolicySpace
from hysafe.guard.protocol import Entry, PromptPolicy


def test_equal_scores_fall_on_one_side_of_the_threshold() -> None:
    scores, true = np.array([1.0, 1.0, 1.0, 0.5]), np.array([True, False, False, True])
    limit = best_threshold(scores, true)
    assert limit == 0.5
    assert f1_score(scores >= limit, true)["f1"] == 2 / 3


def test_risk_that_no_listed_category_takes_is_unlisted() -> None:
    space = PolicySpace(("a", "b", "c"), torch.zeros(3, 2))
    known = np.array([0.25, 0.5, 0.05])
    items = [
        Evidence(("text",), np.zeros((1, 2)), np.array([p]), np.array([0.5]), np.zeros(3), known)
        for p in (0.8, 0.8, 0.8, 0.8, 0.0)
    ]
    lists = (["a", "b", "c"], ["a", "c"], ["b"], [], ["a"])
    policies = [PromptPolicy.of([Entry(n, (n,)) for n in listed]) for listed in lists]
    found = novelty_of_cones(items, policies, space)
    np.testing.assert_allclose(found, [0, 0.5 / 0.8, 0.3 / 0.8, 1, 0], atol=1e-12)
    even = [PromptPolicy.of([Entry(n, (n,)) for n in ("a", "b")])]
    alone = [PromptPolicy.of([Entry("a", ("a",))])]
    third = -(np.log(1 / 3) / 3 + 2 * np.log(2 / 3) / 3)
    np.testing.assert_allclose(novelty_of_listed(items[:1], even, space), [third], atol=1e-6)
    np.testing.assert_allclose(novelty_of_listed(items[:1], alone, space), [0], atol=1e-6)
