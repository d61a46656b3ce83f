"""From cone margins to probabilities over the taxonomy: calibrated, children never above parents.

The leaves (categories, benign siblings, background) compete in one softmax over scaled margins. A
policy only changes on which side a leaf counts, so re-scoring needs the margins and nothing else. A
leaf whose concepts are partly switched off counts on both sides, by the concepts' shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hysafe.taxonomy import PolicyView

__all__ = ["LeafScores", "NodeTable", "score_margins"]

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
        policy_evidence: [B], the lesser of the log odds of any risk (active or not) and the scaled
            distance outside the best active cone: high where it looks risky and no active cone
            holds it.
        energy: [B], -logsumexp of the scaled margins over all leaves: high where nothing known
            holds the item.
    """

    p_unsafe: Tensor
    nodes: Tensor
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
    """
    # node by node, so that a choice of nodes is a choice of whole rows
    by_node = margins.T.contiguous()  # [N, B]
    logits = by_node.index_select(0, table.leaves) * scale  # [L, B]
    risk, inactive = table.risk, table.inactive
    safe = ~(risk | inactive)
    shares = _concept_shares(by_node, table, scale / temperature)  # [K, B]
    at_risk, let_off = _split(logits, shares, table)  # [L, B] each

    looks_risky = _mass(logits[risk | inactive]) - _mass(logits[safe])
    evidence = _mass(at_risk[risk]) - _mass(torch.cat((logits[~risk], let_off[table.mixed])))
    p_unsafe = (
        torch.sigmoid(slope * evidence + offset) if bool(risk.any()) else torch.zeros_like(evidence)
    )
    leaf = torch.zeros_like(logits)
    if bool(risk.any()):
        gain = at_risk[risk] - logits[risk]  # log of the active share
        leaf[risk] = torch.softmax(logits[risk] / temperature + gain, dim=0) * p_unsafe
    nodes = torch.minimum(table.below.T.to(leaf.dtype) @ leaf, p_unsafe)  # sums round up
    if len(table.concepts):
        on = shares * table.concept_active[:, None]
        total = _per_leaf(on, table).clamp_min(torch.finfo(on.dtype).tiny)
        part = leaf / total  # [L, B]; the share of a concept in its category is at most 1
        nodes[table.concepts] = torch.minimum(
            on * part.index_select(0, table.concept_leaf),
            leaf.index_select(0, table.concept_leaf),
        )
    # both must hold: it looks risky, and no active cone holds it
    held = torch.cat((at_risk[risk], torch.full_like(logits[:1], NOTHING))).amax(0)
    policy_evidence = torch.minimum(looks_risky, -held)
    return LeafScores(
        p_unsafe, nodes.T.contiguous(), evidence, policy_evidence, -logits.logsumexp(0)
    )


def _mass(logits: Tensor) -> Tensor:
    """logsumexp [B] of [M, B]; NOTHING where there is none."""
    return torch.cat((logits, logits.new_full((1, logits.shape[1]), NOTHING))).logsumexp(0)


def _concept_shares(margins: Tensor, table: NodeTable, scale: float) -> Tensor:
    """Softmax of each category's concepts by their own cones, [K, B]."""
    logits = margins.index_select(0, table.concepts) * scale
    groups = table.concept_leaf
    peak = logits.new_full((len(table.leaves), logits.shape[1]), -torch.inf)
    peak = peak.scatter_reduce(0, groups[:, None].expand_as(logits), logits.detach(), "amax")
    weight = torch.exp(logits - peak.index_select(0, groups))
    return weight / _per_leaf(weight, table).index_select(0, groups)


def _per_leaf(values: Tensor, table: NodeTable) -> Tensor:
    """Sum of concept values [K, B] by category, [L, B]; 0 for leaves without concepts."""
    total = values.new_zeros((len(table.leaves), values.shape[1]))
    return total.index_add(0, table.concept_leaf, values)


def _split(logits: Tensor, shares: Tensor, table: NodeTable) -> tuple[Tensor, Tensor]:
    """Leaf logits [L, B] split by the share of each leaf's concepts that the policy leaves on.

    Returns:
        logits of the part at risk and of the part let off (NOTHING where all is at risk).
    """
    nothing = torch.full_like(logits, NOTHING)
    if not bool(table.mixed.any()):
        return logits, nothing
    active = _per_leaf(shares * table.concept_active[:, None], table)
    rest = _per_leaf(shares * ~table.concept_active[:, None], table)
    on = (logits + active.log()).clamp_min(NOTHING)
    off = (logits + rest.log()).clamp_min(NOTHING)
    mixed = table.mixed[:, None]
    return torch.where(mixed, on, logits), torch.where(mixed, off, nothing)
