"""From cone margins to probabilities over the taxonomy: calibrated, children never above parents.

The leaves (categories, benign siblings, background) compete in one softmax over scaled margins. A
policy only changes on which side a leaf counts, so re-scoring needs the margins and nothing else. A
leaf whose concepts are partly switched off counts on both sides, by the concepts' shares.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hysafe.taxonomy import PolicyView

__all__ = [
    *("SPREAD", "LeafScores", "NodeTable", "RiskScores", "score_concepts", "score_leaves"),
    "score_margins",
]

# Power of the shares of the active categories in policy novelty: with 1 only what is switched off would
# count, the greater it is the more an item between several categories does. Chosen on validation.
SPREAD = 1.1
# Logit of something that is not there: far below any scaled margin, and finite, so that log odds
# against it stay finite.
NOTHING = -1e4


class NodeTable:
    """Index of the nodes a policy view scores: which are leaves, which count as risk.

    Attributes:
        ids: node ids [N] in taxonomy order. depth: [N].
        leaves: node indices of the leaves [L]. risk: bool [L], risky and active, itself or with a
            concept of it.
        inactive: bool [L], risky but switched off by the policy with all its concepts.
        below: float [L, N], leaf l is node n or lies below it.
        concepts: node indices [K]. concept_leaf: position in `leaves` of each one's category.
        mixed: bool [L], some of the leaf's concepts are active and some are not (or none is, though
            the category is).
        order: positions of the leaves [L], those at risk first, then the inactive, then the others;
            sizes: how many there are of each.
        split: positions in `concepts` of those of mixed leaves [S].
    """

    def __init__(self, view: PolicyView) -> None:
        taxonomy = view.taxonomy
        self.view = view
        self.ids = tuple(n.id for n in taxonomy)
        index = {n: i for i, n in enumerate(self.ids)}
        self.index = index
        self.depth = torch.tensor([taxonomy.depth(n) for n in self.ids])
        leaf_ids = [n.id for n in taxonomy.of_kind("category", "benign", "background")]
        self.leaf_ids = leaf_ids
        self.leaves = torch.tensor([index[n] for n in leaf_ids])
        risky = torch.tensor([taxonomy[n].risky for n in leaf_ids])
        self.below = torch.zeros(len(leaf_ids), len(self.ids))
        for row, leaf in enumerate(leaf_ids):
            for node in taxonomy.path(leaf).ids:
                self.below[row, index[node]] = 1
        position = {n: i for i, n in enumerate(leaf_ids)}
        concepts = taxonomy.concepts
        self.concepts = torch.tensor([index[n.id] for n in concepts], dtype=torch.long)
        self.concept_leaf = torch.tensor(
            [position[str(n.parent)] for n in concepts], dtype=torch.long
        )
        self.concept_active = torch.tensor([view.active(n.id) for n in concepts], dtype=torch.bool)
        active = torch.tensor([view.active(n) for n in leaf_ids])
        on = torch.zeros(len(leaf_ids), dtype=torch.bool)
        off = torch.zeros(len(leaf_ids), dtype=torch.bool)
        on[self.concept_leaf[self.concept_active]] = True
        off[self.concept_leaf[~self.concept_active]] = True
        self.risk = active | on
        self.inactive = risky & ~self.risk
        self.mixed = self.risk & off
        kinds = (self.risk, self.inactive, ~(self.risk | self.inactive))
        self.order = torch.cat([kind.nonzero().squeeze(1) for kind in kinds])
        self.sizes = tuple(int(kind.sum()) for kind in kinds)
        self.split = self.mixed[self.concept_leaf].nonzero().squeeze(1)
        self.thresholds = torch.tensor([view.threshold(n) for n in self.ids])
        self.active = torch.tensor([view.active(n) for n in self.ids])


@dataclass(frozen=True)
class LeafScores:
    """Scores of a batch.

    Attributes:
        p_unsafe: [B], calibrated probability that an active risk applies.
        nodes: [B, N], score of every node; 0 for inactive and harmless nodes; a child's score is
            at most its parent's and a domain's at most p_unsafe.
        evidence: [B], log odds of risk against the rest before calibration.
        policy_evidence: [B], log of the probability of any risk (active or not) times what no active
            category takes of it: high where it looks risky and no active category holds it.
        energy: [B], -logsumexp of the scaled margins over all leaves: high where nothing known
            holds the item.
    """

    p_unsafe: Tensor
    nodes: Tensor
    evidence: Tensor
    policy_evidence: Tensor
    energy: Tensor


@dataclass(frozen=True)
class RiskScores:
    """Scores of a batch, without those of the nodes above and below the leaves.

    Attributes:
        leaves: [R, B], of the leaves at risk (``table.leaves[table.risk]``).
        p_unsafe, evidence, policy_evidence, energy: [B], as in :class:`LeafScores`.
    """

    leaves: Tensor
    p_unsafe: Tensor
    evidence: Tensor
    policy_evidence: Tensor
    energy: Tensor


def score_margins(
    margins: Tensor,
    table: NodeTable,
    *,
    scale: float,
    slope: float = 1.0,
    offset: float = 0.0,
    temperature: float = 1.0,
) -> LeafScores:
    """Scores from margins.

    Args:
        margins: [B, N] of items to all nodes of the table's view.
        scale: inverse temperature of margins (the encoder's cone scale).
        slope, offset: Platt calibration of the log odds of risk.
        temperature: of the distribution over categories, given risk.

    What no active category takes of the risk is 1 less the sum over these of the SPREAD-th power of the
    share, by the same softmax over all categories, active or not.
    """
    # node by node, so that a choice of nodes is a choice of whole rows
    by_node = margins.T.contiguous()  # [N, B]
    concepts = by_node.index_select(0, table.concepts) * (scale / temperature)  # [K, B]
    found = score_leaves(
        by_node.index_select(0, table.leaves[table.order]) * scale,
        concepts.index_select(0, table.split),
        table, slope=slope, offset=offset, temperature=temperature,
    )  # fmt: skip
    below = table.below[table.risk].T.to(margins.dtype)
    nodes = torch.minimum(below @ found.leaves, found.p_unsafe)  # sums round up
    if len(table.concepts):
        leaf = nodes.index_select(0, table.leaves)  # [L, B]
        shares = _shares(concepts, table.concept_leaf, len(leaf))
        on = shares * table.concept_active[:, None]
        total = _sums(on, table.concept_leaf, len(leaf)).clamp_min(torch.finfo(on.dtype).tiny)
        part = leaf / total  # [L, B]; the share of a concept in its category is at most 1
        nodes[table.concepts] = torch.minimum(
            on * part.index_select(0, table.concept_leaf),
            leaf.index_select(0, table.concept_leaf),
        )
    return LeafScores(
        found.p_unsafe, nodes.T.contiguous(), found.evidence, found.policy_evidence, found.energy
    )


def score_leaves(
    logits: Tensor,
    split: Tensor,
    table: NodeTable,
    *,
    slope: float = 1.0,
    offset: float = 0.0,
    temperature: float = 1.0,
) -> RiskScores:
    """Scores of the leaves alone, which do not depend on concepts but those of mixed leaves.

    Args:
        logits: [L, B], margins of the leaves times the scale, in ``table.order``.
        split: [S, B], margins of the concepts ``table.split`` times scale / temperature.
        slope, offset, temperature: as in :func:`score_margins`.
    """
    risk, inactive, safe = (_weighed(part) for part in logits.split(table.sizes))
    at_risk, active, let_off = risk, None, logits[:0]
    if len(split):
        active, let_off = _gains(logits[: table.sizes[0]], split, table)
        at_risk = _weighed((logits[: table.sizes[0]] + active).clamp_min(NOTHING))
    nothing = risk.mass.new_tensor(NOTHING)

    looks_risky = _either(risk.mass, inactive.mass, nothing) - _either(safe.mass, nothing)
    rest = (inactive.mass, safe.mass, nothing, *((_weighed(let_off).mass,) if len(split) else ()))
    evidence = _either(at_risk.mass, nothing) - _either(*rest)
    if not table.sizes[0]:
        p_unsafe, leaves = torch.zeros_like(evidence), logits[:0]
        held = torch.zeros_like(evidence)
    else:
        p_unsafe = torch.sigmoid(slope * evidence + offset)
        if active is None and temperature == 1:  # at most p_unsafe: the greatest weight is 1
            given = risk
        else:
            gained = logits[: table.sizes[0]] / temperature
            given = _weighed(gained if active is None else gained + active.clamp_min(NOTHING))
        leaves = given.weights * (p_unsafe / given.total)
        held = _held(given, logits, table, temperature, mixed=active is not None)
    unheld = (1 - held).clamp_min(torch.finfo(held.dtype).eps)
    # both must hold: it looks risky, and no active category holds it
    novelty = torch.nn.functional.logsigmoid(slope * looks_risky + offset) + unheld.log()
    energy = -_either(risk.mass, inactive.mass, safe.mass)
    return RiskScores(leaves, p_unsafe, evidence, novelty, energy)


def _held(
    given: _Weighed, logits: Tensor, table: NodeTable, temperature: float, *, mixed: bool
) -> Tensor:
    """Sum [B] of the SPREAD-th powers of what each active category has of any risk.

    Args:
        given: tempered logits of the active categories [R, B].
        logits: [L, B], as :func:`score_leaves` has them.
        mixed: some categories are active in part; `given` has these parts alone.
    """
    held = (given.below * SPREAD).exp_().sum(0) / given.total.pow(SPREAD)
    risk, off = table.sizes[0], table.sizes[1]
    if not off and not mixed:
        return held
    active = given.mass
    every = torch.logsumexp(logits[:risk] / temperature, 0) if mixed else active
    if off:
        every = torch.logaddexp(every, torch.logsumexp(logits[risk : risk + off] / temperature, 0))
    return held * (SPREAD * (active - every)).exp()


def score_concepts(logits: Tensor, active: Tensor, leaf: Tensor) -> Tensor:
    """Scores of the concepts of one category for each of P pairs of an item and a category.

    Args:
        logits: [K, P], margins of the concepts times scale / temperature; -inf where a category has
            fewer than K. active: bool [K, P].
        leaf: [P], scores of the categories.

    Returns:
        [K, P], as :func:`score_margins` gives them.
    """
    on = torch.softmax(logits, dim=0) * active
    part = leaf / on.sum(0).clamp_min(torch.finfo(on.dtype).tiny)
    return torch.minimum(on * part, leaf)


class _Weighed(NamedTuple):
    """How far logits lie below their greatest, the exponentials of that [M, B], their sum, and the
    log of the sum of the exponentials of the logits [B]."""

    below: Tensor
    weights: Tensor
    total: Tensor
    mass: Tensor


def _weighed(logits: Tensor) -> _Weighed:
    if not len(logits):
        none = logits.new_full((logits.shape[1],), -torch.inf)
        return _Weighed(logits, logits, torch.zeros_like(none), none)
    top = logits.amax(0)
    below = logits - top
    weights = below.exp()
    total = weights.sum(0)
    return _Weighed(below, weights, total, total.log() + top)


def _either(*masses: Tensor) -> Tensor:
    """logsumexp [B] of masses, [B] or []."""
    return functools.reduce(torch.logaddexp, masses)


def _shares(logits: Tensor, groups: Tensor, count: int) -> Tensor:
    """Softmax of each category's concepts by their own cones, [K, B]; groups [K] are below
    `count`."""
    peak = logits.new_full((count, logits.shape[1]), -torch.inf)
    peak = peak.scatter_reduce(0, groups[:, None].expand_as(logits), logits.detach(), "amax")
    weight = torch.exp(logits - peak.index_select(0, groups))
    return weight / _sums(weight, groups, count).index_select(0, groups)


def _sums(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sum of concept values [K, B] by category, [count, B]; 0 for leaves without concepts."""
    return values.new_zeros((count, values.shape[1])).index_add(0, groups, values)


def _gains(logits: Tensor, split: Tensor, table: NodeTable) -> tuple[Tensor, Tensor]:
    """What the share of its active concepts adds to the logit of each leaf at risk, [R, B], and the
    logits of the parts of mixed leaves that are let off."""
    mixed = table.mixed[table.risk]  # [R]
    place = torch.cumsum(table.mixed, 0) - 1  # among the mixed leaves
    groups = place.index_select(0, table.concept_leaf.index_select(0, table.split))
    active = table.concept_active.index_select(0, table.split)[:, None]
    shares = _shares(split, groups, int(mixed.sum()))  # [S, B]
    on, rest = (_sums(shares * a, groups, int(mixed.sum())) for a in (active, ~active))
    gain = torch.zeros_like(logits)
    gain[mixed] = on.log()
    return gain, (logits[mixed] + rest.log()).clamp_min(NOTHING)
