"""The taxonomy objective: candidate sets, cones of items, cones of nodes, and the leaf masks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from hysafe.data.label_map import RISK, SAFE
from hysafe.data.leaves import LeafSpace
from hysafe.errors import TaxonomyError
from hysafe.geometry import get_space
from hysafe.loss import (
    candidate_cross_entropy,
    cone_negatives,
    distillation,
    entailment,
    item_cones,
    node_cones,
)
from hysafe.loss.entailment import GAMMA
from hysafe.taxonomy import Policy, Taxonomy, load_taxonomy


def logits(rows: int = 5, leaves: int = 7) -> torch.Tensor:
    return torch.randn(rows, leaves, generator=torch.Generator().manual_seed(2)) * 3


def test_with_one_candidate_it_is_the_cross_entropy() -> None:
    x, labels = logits(), torch.tensor([0, 3, 6, 2, 2])
    mask = F.one_hot(labels, 7).bool()
    expected = F.cross_entropy(x, labels, reduction="none")
    torch.testing.assert_close(candidate_cross_entropy(x, mask), expected)
    for smoothing in (0.1, 0.5):
        smoothed = F.cross_entropy(x, labels, reduction="none", label_smoothing=smoothing)
        got = candidate_cross_entropy(x, mask, smoothing=smoothing)
        torch.testing.assert_close(got, smoothed)


def test_with_several_candidates_it_is_minus_the_log_of_their_summed_probability() -> None:
    x = logits()
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[:, 0] = True
    p = torch.softmax(x, -1)
    expected = [-math.log(sum(p[i, mask[i]].tolist())) for i in range(len(x))]
    torch.testing.assert_close(candidate_cross_entropy(x, mask), torch.tensor(expected))


def test_distillation_is_the_mean_divergence_and_moves_the_student_alone() -> None:
    student, teacher = (torch.randn(5, 7, requires_grad=True) for _ in range(2))
    found = distillation(student, teacher)
    told, learnt = (torch.distributions.Categorical(logits=x) for x in (teacher, student))
    torch.testing.assert_close(found, torch.distributions.kl_divergence(told, learnt).mean())
    found.backward()
    assert teacher.grad is None
    expected = (student.softmax(-1) - teacher.softmax(-1)) / 5
    torch.testing.assert_close(student.grad, expected.detach())
    assert float(distillation(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_all_leaves_as_candidates_teach_nothing() -> None:
    x = logits().requires_grad_()
    loss = candidate_cross_entropy(x, torch.ones_like(x, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.zeros(5), atol=1e-6, rtol=0)
    loss.sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 1e-6


def test_extreme_logits_stay_finite() -> None:
    x = torch.tensor([[1e4, -1e4, 0.0]]).requires_grad_()
    loss = candidate_cross_entropy(x, torch.tensor([[False, True, False]]))
    assert float(loss.detach()) == pytest.approx(2e4)
    loss.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_item_cones_by_hand() -> None:
    margins = torch.tensor([[0.5, -0.2, -0.004], [-1.0, 0.3, 0.1]])
    inside = torch.tensor([[True, True, False], [True, False, False]])
    outside = torch.tensor([[False, False, True], [False, True, False]])
    pull, push = item_cones(margins, inside, outside)
    assert float(pull) == pytest.approx((0 + 0.2 + 1.0) / 3)
    assert float(push) == pytest.approx(((GAMMA - 0.004) + (GAMMA + 0.3)) / 2)
    _, wide = item_cones(margins, inside, outside, gamma=0.5)
    assert float(wide) == pytest.approx((0.496 + 0.8) / 2)


def test_item_cones_of_nothing_are_zero_and_differentiable() -> None:
    margins = torch.ones(2, 3, requires_grad=True)
    none = torch.zeros(2, 3, dtype=torch.bool)
    pull, push = item_cones(margins, none, none)
    (pull + push).backward()
    assert (float(pull.detach()), float(push.detach())) == (0, 0)
    assert margins.grad is not None
    assert (margins.grad == 0).all()


@pytest.mark.parametrize("name", ["lorentz", "euclidean"])
def test_node_cones_are_entailment_along_edges_and_negatives_between_siblings(name: str) -> None:
    space = get_space(name)
    generator = torch.Generator().manual_seed(5)
    nodes = space.exp_map0(torch.randn(4, 3, generator=generator), 1.0)
    edges, siblings = [(0, 1), (0, 2), (1, 3)], [(1, 2), (2, 1)]
    edge, push = node_cones(nodes, edges, siblings, 1.0, space=space)
    expected = sum(float(entailment(nodes[[a]], nodes[[b]], 1.0, space=space)) for a, b in edges)
    assert float(edge) == pytest.approx(expected / 3, rel=1e-5)
    expected = sum(
        float(cone_negatives(nodes[[a]], nodes[[b]], 1.0, space=space)) for a, b in siblings
    )
    assert float(push) == pytest.approx(expected / 2, rel=1e-5)
    tensors = node_cones(nodes, torch.tensor(edges), torch.tensor(siblings), 1.0, space=space)
    torch.testing.assert_close(tensors, (edge, push))


# ---------------------------------------------------------------- masks over leaves and nodes


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return load_taxonomy()


@pytest.fixture(scope="module")
def space(taxonomy: Taxonomy) -> LeafSpace:
    return LeafSpace(taxonomy)


def named(space: LeafSpace, mask: torch.Tensor) -> set[str]:
    return {space.leaves[i] for i in mask.nonzero()[:, 0].tolist()}


def test_leaves_are_categories_siblings_and_background(
    space: LeafSpace, taxonomy: Taxonomy
) -> None:
    assert len(space.leaves) == 45 + 45 + len(taxonomy.of_kind("background"))
    assert {taxonomy[n].kind for n in space.leaves} == {"category", "benign", "background"}
    assert int(space.risky.sum()) == 45


def test_candidates_stand_for_all_leaves_below_them(space: LeafSpace) -> None:
    risk, safe = space.candidates([RISK]), space.candidates([SAFE])
    assert (risk ^ safe).all()
    assert (risk == space.risky).all()
    assert (space.candidates(["S"]) == safe).all()
    assert named(space, space.candidates(["6.1"])) == {"6.1"}
    assert named(space, space.candidates(["6.1.2"])) == {"6.1"}  # a concept: its category
    assert named(space, space.candidates(["S.6.1", "1.2"])) == {"S.6.1", "1.2"}
    domain = named(space, space.candidates(["D6"]))
    assert domain == {n for n in space.leaves if n.startswith("6.")}
    assert len(domain) > 1


def test_labels_that_allow_no_leaf_are_an_error(space: LeafSpace) -> None:
    with pytest.raises(TaxonomyError, match="allow no leaf"):
        space.candidates([])
    with pytest.raises(TaxonomyError, match="no node '99'"):
        space.candidates(["99"])


def test_cone_masks_by_brute_force(space: LeafSpace, taxonomy: Taxonomy) -> None:
    cases = [["6.1"], ["6.1", "6.2"], ["6.1", "1.2"], ["D6"], [SAFE], [RISK], ["S.6.1", "S.b1"]]
    candidates = torch.stack([space.candidates(c) for c in cases])
    inside, outside = space.cone_masks(candidates)
    for row, mask in enumerate(candidates):
        paths = [set(taxonomy.path(leaf).ids) for leaf in named(space, mask)]
        must = set.intersection(*paths)
        may = set.union(*paths)
        for column, node in enumerate(space.nodes):
            concept = taxonomy[node].kind == "concept"
            assert bool(inside[row, column]) == (node in must and not concept), (cases[row], node)
            assert bool(outside[row, column]) == (node not in may and not concept), node
    assert not (inside & outside).any()


def test_edges_and_siblings_by_brute_force(space: LeafSpace, taxonomy: Taxonomy) -> None:
    edges = {(space.nodes[a], space.nodes[b]) for a, b in space.edges().tolist()}
    assert edges == {(n.parent, n.id) for n in taxonomy if n.parent}
    siblings = [(space.nodes[a], space.nodes[b]) for a, b in space.siblings().tolist()]
    expected = {
        (a.id, b.id)
        for a in taxonomy
        for b in taxonomy
        if a.id != b.id and (a.parent == b.parent or a.sibling == b.id)
    }
    assert set(siblings) == expected
    assert len(siblings) == len(expected)
    assert ("6.1", "S.6.1") in expected
    assert ("D1", "S") in expected


def test_a_leaf_added_by_a_policy_is_a_leaf() -> None:
    rule = {"parent": "D6", "name": "Drone parts", "definition": "Parts for armed drones."}
    view = Policy.from_dict({"nodes": {"x.1": rule}}).apply(load_taxonomy())
    space = LeafSpace(view.taxonomy)
    assert named(space, space.candidates(["x.1"])) == {"x.1"}
    assert "x.1" in named(space, space.candidates(["D6"]))
