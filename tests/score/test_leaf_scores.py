"""From margins to node scores: sums, bounds along the tree, and what a policy changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hysafe.geometry.cones import ConeBank, pairwise_margin
from hysafe.score.leaves import (
    SPREAD,
    LeafScores,
    NodeTable,
    score_concepts,
    score_leaves,
    score_margins,
)
from hysafe.taxonomy import Policy, Taxonomy, load_taxonomy

SCALE = 6.0
SUM_TOLERANCE = 2e-6  # float32 sums of some hundred terms

TAXONOMY = load_taxonomy()
RISK_IDS = [n.id for n in TAXONOMY if n.risky]

laws = settings(max_examples=25, deadline=None, derandomize=True)
statuses = st.sampled_from(["default", "non_violating", "sensitive"])
policies = st.dictionaries(st.sampled_from(RISK_IDS), statuses, max_size=12)
fits = st.tuples(st.floats(0.2, 3), st.floats(-2, 2), st.floats(0.3, 4))


def table(rules: dict[str, Any]) -> NodeTable:
    return NodeTable(Policy.from_dict({"nodes": rules}).apply(TAXONOMY))


def statuses_only(drawn: dict[str, str]) -> dict[str, Any]:
    return {node: {"status": status} for node, status in drawn.items()}


def margins(nodes: NodeTable, seed: int = 0, rows: int = 6, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, len(nodes.ids), generator=generator) * spread


def column(scores: LeafScores, nodes: NodeTable, node: str) -> torch.Tensor:
    return scores.nodes[:, nodes.index[node]]


DEFAULT = table({})

# ---------------------------------------------------------------- laws, under any policy


@laws
@given(policies, st.integers(0, 999), fits, st.floats(0.1, 20))
def test_scores_are_bounded_along_the_tree(
    drawn: dict[str, str], seed: int, fit: tuple[float, float, float], spread: float
) -> None:
    nodes = table(statuses_only(drawn))
    slope, offset, temperature = fit
    scores = score_margins(
        margins(nodes, seed, spread=spread), nodes, scale=SCALE, slope=slope, offset=offset,
        temperature=temperature,
    )  # fmt: skip
    assert torch.isfinite(scores.nodes).all()
    assert (scores.nodes >= 0).all()
    assert ((scores.p_unsafe >= 0) & (scores.p_unsafe <= 1)).all()
    for node in nodes.view.taxonomy:
        own = column(scores, nodes, node.id)
        above = scores.p_unsafe if node.parent is None else column(scores, nodes, node.parent)
        assert (own <= above).all(), node.id


@laws
@given(policies, st.integers(0, 999))
def test_children_add_up_to_their_parent_and_domains_to_the_risk(
    drawn: dict[str, str], seed: int
) -> None:
    nodes = table(statuses_only(drawn))
    scores = score_margins(margins(nodes, seed), nodes, scale=SCALE, temperature=1.5)
    taxonomy = nodes.view.taxonomy
    total = sum(column(scores, nodes, d.id) for d in taxonomy.domains)
    assert torch.allclose(torch.as_tensor(total), scores.p_unsafe, atol=SUM_TOLERANCE)
    for node in taxonomy.of_kind("domain", "category"):
        children = sum(column(scores, nodes, c.id) for c in taxonomy.children(node.id))
        assert torch.allclose(
            torch.as_tensor(children), column(scores, nodes, node.id), atol=SUM_TOLERANCE
        ), node.id


@laws
@given(policies, st.integers(0, 999))
def test_harmless_nodes_and_nodes_switched_off_with_all_below_score_zero(
    drawn: dict[str, str], seed: int
) -> None:
    nodes = table(statuses_only(drawn))
    scores = score_margins(margins(nodes, seed), nodes, scale=SCALE)
    view = nodes.view
    for node in view.taxonomy:
        below = (node, *view.taxonomy.descendants(node.id))
        if not any(view.active(n.id) for n in below):
            assert (column(scores, nodes, node.id) == 0).all(), node.id


# ---------------------------------------------------------------- against loops


def by_hand(
    nodes: NodeTable, row: list[float], fit: tuple[float, float, float]
) -> dict[str, float]:
    """p_unsafe (under "") and every node's score, written out for one item."""
    slope, offset, temperature = fit
    view, taxonomy = nodes.view, nodes.view.taxonomy
    value = dict(zip(nodes.ids, row, strict=True))
    at_risk: dict[str, float] = {}
    harmless = 0.0
    shares: dict[str, float] = {}
    for leaf in taxonomy.of_kind("category", "benign", "background"):
        mass = math.exp(value[leaf.id] * SCALE)
        if leaf.kind != "category":
            harmless += mass
            continue
        below = taxonomy.children(leaf.id)
        weights = {n.id: math.exp(value[n.id] * SCALE / temperature) for n in below}
        if below:
            on = sum(w for n, w in weights.items() if view.active(n)) / sum(weights.values())
        else:
            on = float(view.active(leaf.id))
        at_risk[leaf.id] = mass * on
        harmless += mass * (1 - on)
        for n, w in weights.items():
            shares[n] = w / sum(weights.values()) / on if on and view.active(n) else 0.0
        at_risk[leaf.id + " tempered"] = math.exp(value[leaf.id] * SCALE / temperature) * on
    odds = math.log(sum(v for k, v in at_risk.items() if " " not in k) / harmless)
    p = 1 / (1 + math.exp(-slope * odds - offset))
    tempered = sum(v for k, v in at_risk.items() if " " in k)
    found = {"": p}
    for leaf in taxonomy.categories:
        found[leaf.id] = p * at_risk[leaf.id + " tempered"] / tempered
        for n in taxonomy.children(leaf.id):
            found[n.id] = found[leaf.id] * shares[n.id]
    for domain in taxonomy.domains:
        found[domain.id] = sum(found[c.id] for c in taxonomy.children(domain.id))
    return found


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"D1": {"status": "non_violating"}, "6.1": {"status": "non_violating"}},
        {"6.1.2": {"status": "non_violating"}, "1.1.7": {"status": "non_violating"}},
        {"D6": {"status": "non_violating"}, "6.1.2": {"status": "sensitive"}},
        {"x.1": {"parent": "D6", "name": "n", "definition": "d"}},
        {"x.1": {"parent": "6.1", "name": "n", "definition": "d"}},
    ],
    ids=["default", "branches off", "concepts off", "one concept on", "new category", "concept"],
)
def test_scores_equal_the_definition_in_loops(rules: dict[str, Any]) -> None:
    nodes, fit = table(rules), (1.3, -0.4, 1.7)
    drawn = margins(nodes, 5, rows=3, spread=0.6)
    scores = score_margins(
        drawn, nodes, scale=SCALE, slope=fit[0], offset=fit[1], temperature=fit[2]
    )
    for row, values in enumerate(drawn.tolist()):
        expected = by_hand(nodes, values, fit)
        assert float(scores.p_unsafe[row]) == pytest.approx(expected[""], rel=1e-4)
        for node in nodes.view.taxonomy:
            got = float(scores.nodes[row, nodes.index[node.id]])
            assert got == pytest.approx(expected.get(node.id, 0.0), rel=1e-3, abs=1e-7), node.id


@laws
@given(policies, st.integers(0, 999), fits)
def test_leaves_alone_and_concepts_alone_score_as_all_nodes_together(
    drawn: dict[str, str], seed: int, fit: tuple[float, float, float]
) -> None:
    nodes, (slope, offset, temperature) = table(statuses_only(drawn)), fit
    values = margins(nodes, seed, spread=0.5).double()
    both = {"slope": slope, "offset": offset, "temperature": temperature}
    every = score_margins(values, nodes, scale=SCALE, **both)
    by_node = values.T
    found = score_leaves(
        by_node[nodes.leaves[nodes.order]] * SCALE,
        by_node[nodes.concepts[nodes.split]] * (SCALE / temperature),
        nodes, **both,
    )  # fmt: skip
    close = {"rtol": 1e-12, "atol": 1e-15}
    for name in ("p_unsafe", "evidence", "policy_evidence", "energy"):
        torch.testing.assert_close(getattr(found, name), getattr(every, name), **close)
    risky = nodes.leaves[nodes.risk]
    torch.testing.assert_close(found.leaves.T, every.nodes[:, risky], **close)
    for place, leaf in zip(nodes.risk.nonzero().squeeze(1), found.leaves, strict=True):
        own = nodes.concepts[nodes.concept_leaf == place]
        logits = torch.full((len(own) + 2, len(values)), -torch.inf, dtype=torch.double)
        logits[: len(own)] = by_node[own] * (SCALE / temperature)
        active = torch.cat((nodes.active[own], torch.zeros(2, dtype=torch.bool)))
        scores = score_concepts(logits, active[:, None], leaf)
        torch.testing.assert_close(scores[: len(own)].T, every.nodes[:, own], **close)
        assert not scores[len(own) :].any()


@pytest.mark.parametrize("c", [0.3, 1.2])
def test_a_bank_of_cones_gives_the_pairwise_margins(c: float) -> None:
    generator = torch.Generator().manual_seed(0)
    apexes = torch.randn(20, 16, generator=generator) * 0.2
    apexes[7] = 0  # at the origin
    points = torch.randn(90, 16, generator=generator).double()
    points[:20] = apexes.double() * 1.5  # on an axis
    points[20:30] = apexes[:10].double() + 1e-9
    points[30], points[31] = 0, torch.nan
    bank, wanted = ConeBank(apexes, c), pairwise_margin(apexes, points, c).T
    close = {"rtol": 0, "atol": 1e-12, "equal_nan": True}
    torch.testing.assert_close(bank.margins(points), wanted, **close)
    groups = torch.randint(0, 5, (90,), generator=generator).sort().values
    members = torch.randint(0, 20, (6, 4), generator=generator)  # nothing is in the last group
    at = members.T[:, groups]
    torch.testing.assert_close(
        bank.margins_of(points, groups, members), wanted.gather(0, at), **close
    )
    torch.testing.assert_close(bank.margins_at(points, at[0]), wanted.gather(0, at[:1])[0], **close)


def test_energy_and_evidence_by_hand() -> None:
    drawn = margins(DEFAULT, 1)
    scores = score_margins(drawn, DEFAULT, scale=SCALE)
    logits = drawn[:, DEFAULT.leaves].double() * SCALE
    torch.testing.assert_close(scores.energy.double(), -logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    risk = DEFAULT.risk
    odds = logits[:, risk].logsumexp(-1) - logits[:, ~risk].logsumexp(-1)
    torch.testing.assert_close(scores.evidence.double(), odds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.p_unsafe, torch.sigmoid(scores.evidence))


def test_the_nearest_cone_wins() -> None:
    for node in ("6.1", "1.2", "12.1", "S.6.1", "S.b1"):
        drawn = torch.zeros(1, len(DEFAULT.ids))
        drawn[0, DEFAULT.index[node]] = 3.0
        scores = score_margins(drawn, DEFAULT, scale=SCALE)
        if TAXONOMY[node].risky:
            assert float(column(scores, DEFAULT, node)) > 0.99
            assert float(column(scores, DEFAULT, str(TAXONOMY[node].parent))) > 0.99
        else:
            assert float(scores.p_unsafe) < 0.01


# ---------------------------------------------------------------- what a policy changes


def test_a_node_switched_off_scores_zero_and_the_rest_share_the_risk() -> None:
    off = table({"6.1": {"status": "non_violating"}})
    drawn = margins(DEFAULT, 3, spread=0.2)
    before = score_margins(drawn, DEFAULT, scale=SCALE, slope=0.8)
    after = score_margins(drawn, off, scale=SCALE, slope=0.8)
    assert (column(after, off, "6.1") == 0).all()
    for concept in TAXONOMY.children("6.1"):
        assert (column(after, off, concept.id) == 0).all()
    assert (after.p_unsafe < before.p_unsafe).all()
    for node in TAXONOMY.categories:
        if node.id != "6.1":
            share_before = column(before, DEFAULT, node.id) / before.p_unsafe
            share_after = column(after, off, node.id) / after.p_unsafe
            assert (share_after > share_before).all(), node.id


def test_switching_off_moves_exactly_its_own_probability_where_nothing_is_recalibrated() -> None:
    off = table({"D6": {"status": "non_violating"}})
    drawn = margins(DEFAULT, 4)
    before = score_margins(drawn, DEFAULT, scale=SCALE)
    after = score_margins(drawn, off, scale=SCALE)
    lost = column(before, DEFAULT, "D6")
    torch.testing.assert_close(after.p_unsafe, before.p_unsafe - lost, rtol=1e-4, atol=1e-6)
    for node in TAXONOMY.categories:
        if node.parent != "D6":
            torch.testing.assert_close(
                column(after, off, node.id), column(before, DEFAULT, node.id), rtol=1e-4, atol=1e-6
            )


def test_a_concept_switched_off_takes_its_share_of_the_risk_with_it() -> None:
    off = table({"6.1.2": {"status": "non_violating"}})
    drawn = torch.full((2, len(DEFAULT.ids)), -1.0)
    drawn[:, DEFAULT.index["6.1"]] = 1.0
    drawn[0, DEFAULT.index["6.1.2"]] = 1.0  # clearly the concept that is allowed here
    drawn[1, DEFAULT.index["6.1.1"]] = 1.0  # clearly another one
    before = score_margins(drawn, DEFAULT, scale=SCALE)
    after = score_margins(drawn, off, scale=SCALE)
    assert (before.p_unsafe > 0.99).all()
    assert float(after.p_unsafe[0]) < 0.05
    assert float(after.p_unsafe[1]) > 0.99
    assert (column(after, off, "6.1.2") == 0).all()
    assert float(column(after, off, "6.1.1")[1]) > 0.9


def test_a_concept_kept_on_in_a_domain_that_is_off_still_counts() -> None:
    on = table({"D6": {"status": "non_violating"}, "6.1.2": {"status": "sensitive"}})
    drawn = torch.full((2, len(on.ids)), -1.0)
    drawn[:, on.index["6.1"]] = 1.0
    drawn[0, on.index["6.1.2"]] = 1.0
    drawn[1, on.index["6.1.1"]] = 1.0
    scores = score_margins(drawn, on, scale=SCALE)
    assert float(scores.p_unsafe[0]) > 0.9
    assert float(column(scores, on, "6.1.2")[0]) > 0.9
    assert float(scores.p_unsafe[1]) < 0.05


def test_with_every_risk_switched_off_nothing_is_a_risk() -> None:
    off = table({d.id: {"status": "non_violating"} for d in TAXONOMY.domains})
    scores = score_margins(margins(off, 6), off, scale=SCALE, slope=2.0, offset=3.0)
    assert (scores.p_unsafe == 0).all()
    assert (scores.nodes == 0).all()


def test_a_new_node_competes_with_the_others() -> None:
    rule = {"parent": "D6", "name": "Drone parts", "definition": "Parts for armed drones."}
    more = table({"x.1": rule})
    assert "x.1" in more.leaf_ids
    drawn = torch.full((1, len(more.ids)), -1.0)
    drawn[0, more.index["6.2"]] = 0.0
    low = score_margins(drawn, more, scale=SCALE)
    drawn[0, more.index["x.1"]] = 1.0
    high = score_margins(drawn, more, scale=SCALE)
    assert float(column(high, more, "x.1")) > 0.9
    assert float(column(high, more, "x.1")) <= float(column(high, more, "D6"))
    assert float(column(high, more, "6.2")) < float(column(low, more, "6.2")) / 10
    assert float(high.p_unsafe) > float(low.p_unsafe)


def test_a_new_node_without_concepts_can_be_switched_off_too() -> None:
    rule = {"parent": "D6", "name": "Drone parts", "definition": "Parts for armed drones."}
    off = table({"x.1": {**rule, "status": "non_violating"}})
    drawn = torch.full((1, len(off.ids)), -1.0)
    drawn[0, off.index["x.1"]] = 1.0
    scores = score_margins(drawn, off, scale=SCALE)
    assert float(column(scores, off, "x.1")) == 0
    assert float(scores.p_unsafe) < 0.01


def test_a_new_concept_competes_within_its_category() -> None:
    rule = {"parent": "6.1", "name": "Drone bombs", "definition": "Bombs on drones."}
    more = table({"x.1": rule})
    drawn = torch.zeros(1, len(more.ids))
    drawn[0, more.index["6.1"]] = 2.0
    drawn[0, more.index["x.1"]] = 1.0
    scores = score_margins(drawn, more, scale=SCALE)
    assert float(column(scores, more, "x.1")) > 0.9
    assert float(column(scores, more, "6.1.1")) < 0.05


def policy_evidence_by_hand(
    nodes: NodeTable, row: list[float], fit: tuple[float, float, float]
) -> float:
    """Written out for one item: log of P(any risk) (1 - the sum of the SPREAD-th powers of what the
    active part of each category has of it)."""
    slope, offset, temperature = fit
    view, taxonomy = nodes.view, nodes.view.taxonomy
    value = dict(zip(nodes.ids, row, strict=True))
    mass = {n.id: math.exp(value[n.id] * SCALE)
            for n in taxonomy.of_kind("category", "benign", "background")}  # fmt: skip
    risk = sum(mass[n.id] for n in taxonomy.categories)
    odds = math.log(risk / (sum(mass.values()) - risk))
    tempered = {n.id: math.exp(value[n.id] * SCALE / temperature) for n in taxonomy.categories}
    held = 0.0
    for node in taxonomy.categories:
        below = [(n.id, math.exp(value[n.id] * SCALE / temperature))
                 for n in taxonomy.children(node.id)]  # fmt: skip
        on = float(view.active(node.id))
        if below:
            on = sum(w for n, w in below if view.active(n)) / sum(w for _, w in below)
        held += (on * tempered[node.id] / sum(tempered.values())) ** SPREAD
    return math.log(1 / (1 + math.exp(-slope * odds - offset))) + math.log(1 - held)


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"D1": {"status": "non_violating"}, "6.1": {"status": "non_violating"}},
        {"6.1.2": {"status": "non_violating"}, "1.1.7": {"status": "non_violating"}},
        {"D6": {"status": "non_violating"}, "6.1.2": {"status": "sensitive"}},
        {f"D{i}": {"status": "non_violating"} for i in range(1, 13)},
        {"x.1": {"parent": "D6", "name": "n", "definition": "d"}},
    ],
    ids=["default", "branches off", "concepts off", "one concept on", "all off", "new category"],
)
@pytest.mark.parametrize("fit", [(1.0, 0.0, 1.0), (1.3, -0.4, 1.7)])
def test_policy_evidence_equals_the_definition_in_loops(
    rules: dict[str, Any], fit: tuple[float, float, float]
) -> None:
    nodes = table(rules)
    drawn = margins(nodes, 5, rows=3, spread=0.6).double()
    slope, offset, temperature = fit
    found = score_margins(
        drawn, nodes, scale=SCALE, slope=slope, offset=offset, temperature=temperature
    ).policy_evidence
    wanted = [policy_evidence_by_hand(nodes, row, fit) for row in drawn.tolist()]
    torch.testing.assert_close(
        found, torch.tensor(wanted, dtype=torch.double), rtol=1e-9, atol=1e-9
    )


def test_policy_evidence_is_high_where_it_looks_risky_and_no_active_category_holds_it() -> None:
    off = table({"6.1": {"status": "non_violating"}})
    drawn = torch.full((4, len(DEFAULT.ids)), -0.5)
    drawn[0, DEFAULT.index["6.1"]] = 0.3  # risky, held by the node that is off
    drawn[1, DEFAULT.index["6.2"]] = 0.3  # risky, held by an active node
    drawn[2, DEFAULT.index["S.b1"]] = 0.3  # harmless
    drawn[3, [DEFAULT.index[n] for n in ("6.2", "7.1", "9.1")]] = 0.3  # risky, and between three
    under_off = score_margins(drawn, off, scale=SCALE).policy_evidence
    assert float(under_off[0]) == float(under_off.max())
    assert float(under_off[3]) > float(under_off[1])
    assert float(under_off[1:3].max()) < float(under_off[0]) - 1.5
    under_default = score_margins(drawn, DEFAULT, scale=SCALE).policy_evidence
    assert float(under_default[3]) == float(under_default.max())
    assert float(under_default[0]) < float(under_off[0]) - 1.5


@laws
@given(policies, st.sampled_from(RISK_IDS), st.integers(0, 999), fits)
def test_what_a_policy_names_less_is_never_less_novel_to_it(
    drawn: dict[str, str], more: str, seed: int, fit: tuple[float, float, float]
) -> None:
    values = margins(DEFAULT, seed, spread=0.5).double()
    slope, offset, temperature = fit
    both = {"scale": SCALE, "slope": slope, "offset": offset, "temperature": temperature}
    rules = {k: "non_violating" for k in drawn}
    before, after = (
        score_margins(values, table(statuses_only(r)), **both).policy_evidence
        for r in (rules, rules | {more: "non_violating"})
    )
    assert (before <= 0).all()
    assert (after >= before - 1e-6).all()  # log of a small difference


def test_a_taxonomy_without_concepts_scores_too() -> None:
    flat = Taxonomy([n for n in TAXONOMY if n.kind != "concept"], name="flat", version="1")
    nodes = NodeTable(Policy().apply(flat))
    scores = score_margins(margins(nodes, 2), nodes, scale=SCALE)
    total = sum(column(scores, nodes, d.id) for d in flat.domains)
    assert torch.allclose(torch.as_tensor(total), scores.p_unsafe, atol=SUM_TOLERANCE)
