"""Bands of the rating, and risk weighed by thresholds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hysafe.score.leaves import LeafScores, NodeTable
from hysafe.score.triage import TriagePolicy, weighted_risk
from hysafe.taxonomy import Policy, load_taxonomy

TAXONOMY = load_taxonomy()


@pytest.mark.parametrize(
    ("risk", "over", "p", "rating"),
    [
        (0.0, False, None, "safe"),
        (0.29, False, 0.5, "safe"),
        (0.3, False, 0.5, "review"),
        (0.49, False, None, "review"),
        (0.5, False, 0.5, "unsafe"),
        (1.0, False, 0.001, "unsafe"),
        (0.0, True, 0.5, "unsafe"),  # a node over its own threshold
        (0.0, False, 0.011, "safe"),
        (0.0, False, 0.01, "review"),  # unlike anything known
        (math.nan, False, 0.5, "review"),  # fails closed
        (0.0, False, math.nan, "review"),
        (math.nan, True, None, "unsafe"),
    ],
)
def test_bands(risk: float, over: bool, p: float | None, rating: str) -> None:
    got, reason = TriagePolicy().rate(risk, over, p)
    assert got == rating
    assert reason


def test_bands_move_with_the_settings_and_say_why() -> None:
    strict = TriagePolicy(unsafe_from=0.2, review_from=0.1, novelty_level=0.1)
    assert strict.rate(0.2, False, None) == ("unsafe", "risk above the threshold")
    assert strict.rate(0.1, False, None) == ("review", "risk near the threshold")
    assert strict.rate(0.0, False, 0.1) == ("review", "unlike anything the model knows")
    assert strict.rate(0.0, False, 0.2) == ("safe", "no active risk near")
    assert strict.rate(math.nan, False, None) == ("review", "no score")


def test_more_risk_never_lowers_the_rating() -> None:
    rank = {"safe": 0, "review": 1, "unsafe": 2}
    ratings = [rank[TriagePolicy().rate(i / 100, False, 0.5)[0]] for i in range(101)]
    assert ratings == sorted(ratings)
    assert set(ratings) == {0, 1, 2}


# ---------------------------------------------------------------- weighted risk


def table(rules: dict[str, Any]) -> NodeTable:
    return NodeTable(Policy.from_dict({"nodes": rules}).apply(TAXONOMY))


def scored(nodes: NodeTable, *rows: dict[str, float]) -> LeafScores:
    """Scores with these categories or concepts set, and their ancestors at least as high."""
    values = torch.zeros(len(rows), len(nodes.ids))
    for k, row in enumerate(rows):
        for node, score in row.items():
            for above in TAXONOMY.path(node).ids:
                i = nodes.index[above]
                values[k, i] = max(float(values[k, i]), score)
    p = values[:, [nodes.index[c.id] for c in TAXONOMY.categories]].sum(-1)
    return LeafScores(p, values, p, p, p)


def test_with_default_thresholds_the_risk_is_p_unsafe() -> None:
    nodes = table({})
    scores = scored(nodes, {"6.1": 0.2, "1.2": 0.3}, {"6.1": 0.9}, {})
    risk, over = weighted_risk(scores, nodes)
    torch.testing.assert_close(risk, scores.p_unsafe)
    assert not over.any()


def test_a_sensitive_category_counts_double_and_its_threshold_decides() -> None:
    nodes = table({"6.1": {"status": "sensitive"}})
    risk, over = weighted_risk(scored(nodes, {"6.1": 0.2}, {"6.1": 0.25}, {"6.2": 0.3}), nodes)
    torch.testing.assert_close(risk, torch.tensor([0.4, 0.5, 0.3]))
    assert over.tolist() == [False, True, False]


def test_a_lenient_category_counts_less() -> None:
    nodes = table({"6.1": {"threshold": 0.9}})
    risk, over = weighted_risk(scored(nodes, {"6.1": 0.85}, {"6.1": 0.9}, {"6.2": 0.6}), nodes)
    torch.testing.assert_close(risk, torch.tensor([0.85 / 1.8, 0.5, 0.6]))
    assert over.tolist() == [False, True, False]


def test_a_domains_threshold_holds_for_the_domain_and_all_below() -> None:
    nodes = table({"D6": {"threshold": 0.4}})
    risk, over = weighted_risk(scored(nodes, {"6.3": 0.4}, {"6.3": 0.39}, {"1.1": 0.4}), nodes)
    torch.testing.assert_close(risk, torch.tensor([0.5, 0.39 * 1.25, 0.4]))
    assert over.tolist() == [True, False, False]


def test_a_concepts_threshold_holds_for_the_concept_alone() -> None:
    nodes = table({"6.1.2": {"threshold": 0.1}})
    risk, over = weighted_risk(scored(nodes, {"6.1.2": 0.1}, {"6.1.1": 0.3}), nodes)
    torch.testing.assert_close(risk, torch.tensor([0.1, 0.3]))
    assert over.tolist() == [True, False]


def test_nodes_that_are_off_count_nothing_whatever_their_threshold() -> None:
    nodes = table({"6.1": {"status": "non_violating", "threshold": 0.1}})
    risk, over = weighted_risk(scored(nodes, {"6.1": 0.8}), nodes)
    assert float(risk) == 0
    assert not over.any()


def test_the_weighted_risk_stays_in_zero_to_one_and_keeps_nan() -> None:
    nodes = table({"6.1": {"threshold": 0.01}})
    scores = scored(nodes, {"6.1": 1.0})
    assert float(weighted_risk(scores, nodes)[0]) == 1
    scores.nodes[:] = math.nan
    assert math.isnan(float(weighted_risk(scores, nodes)[0]))
