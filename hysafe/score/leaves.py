"""From cone margins to probabilities over the taxonomy: calibrated, children never above parents.

The leaves (categories, benign siblings, background) compete in one softmax over scaled margins. A
policy only changes on which side a leaf counts, so re-scoring needs the margins and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hysafe.taxonomy import PolicyView

__all__ = ["LeafScores", "NodeTable", "score_margins"]


class NodeTable:
    """Index of the nodes a policy view scores: which are leaves, which count as risk.

    Attributes:
        ids: node ids [N] in taxonomy order. depth: [N].
        leaves: node indices of the leaves [L]. risk: bool [L], risky and active.
        inactive: bool [L], risky but switched off by the policy.
        below: float [L, N], leaf l is node n or lies below it.
        concepts: node indices [K]. concept_leaf: position in `leaves` of each one's category.
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
        self.risk = torch.tensor([view.active(n) for n in leaf_ids])
        self.inactive = torch.tensor([taxonomy[n].risky and not view.active(n) for n in leaf_ids])
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
        self.concept_active = torch.tensor(
            [view.active(n.id) for n in concepts], dtype=torch.bool
        )
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
    logits = margins[:, table.leaves] * scale  # [B, L]
    risk, inactive = table.risk, table.inactive
    safe = ~(risk | inactive)
    floor = torch.full_like(logits[:, :1], -1e4)

    def mass(mask: Tensor) -> Tensor:
        return torch.cat((logits[:, mask], floor), -1).logsumexp(-1)

    rest = mass(~risk)
    evidence = mass(risk) - rest
    p_unsafe = torch.sigmoid(slope * evidence + offset) if bool(risk.any()) else evidence * 0
    within = torch.zeros_like(logits)
    if bool(risk.any()):
        within[:, risk] = torch.softmax(logits[:, risk] / temperature, dim=-1)
    leaf = within * p_unsafe[:, None]
    nodes = leaf @ table.below
    if len(table.concepts):
        _concept_scores(margins, leaf, nodes, table, scale / temperature)
    # both must hold: it looks risky, and no active cone holds it
    looks_risky = mass(risk | inactive) - mass(safe)
    held = torch.cat((logits[:, risk], floor), -1).amax(-1)
    policy_evidence = torch.minimum(looks_risky, -held)
    return LeafScores(p_unsafe, nodes, evidence, policy_evidence, -logits.logsumexp(-1))


def _concept_scores(
    margins: Tensor, leaf: Tensor, nodes: Tensor, table: NodeTable, scale: float
) -> None:
    """Share a category's score among its active concepts by their own cones, in place.

    A concept has at most its category's score: softmax among siblings times the parent.
    """
    logits = (margins[:, table.concepts] * scale).masked_fill(
        ~table.concept_active[None, :], -torch.inf
    )
    groups = table.concept_leaf
    count = leaf.shape[1]
    peak = torch.full((len(logits), count), -torch.inf, dtype=logits.dtype)
    peak.scatter_reduce_(1, groups.expand_as(logits), logits, "amax")
    peak = torch.where(peak.isfinite(), peak, torch.zeros_like(peak))
    weight = torch.exp(logits - peak[:, groups])
    total = torch.zeros_like(peak).scatter_add_(1, groups.expand_as(weight), weight)
    share = weight / total[:, groups].clamp_min(1e-12)
    nodes[:, table.concepts] = leaf[:, groups] * share
