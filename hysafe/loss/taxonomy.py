"""The taxonomy loss: nodes are cones, items lie in the cones of their category and its ancestors.

An item carries a set of candidate leaves, because data sets know different things: one category, a
group of categories ("harmful, not said how") or "any harmless place". Its likelihood is the sum of
the softmax over leaf margins within that set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hysafe.geometry import Space
from hysafe.loss.entailment import GAMMA, cone_negatives, entailment

__all__ = [
    "TaxonomyWeights",
    "candidate_cross_entropy",
    "distillation",
    "item_cones",
    "node_cones",
]


@dataclass(frozen=True)
class TaxonomyWeights:
    """Weights of the terms of the taxonomy objective.

    Args:
        leaf: candidate cross entropy over the leaves.
        inside: items inside the cones of their leaf and its ancestors.
        outside: items outside the cones of other leaves.
        edge: nodes inside the cones of their parents.
        sibling: nodes outside the cones of their siblings.

    Edges weigh much: with 0.2 nearly every child lay outside its parent's cone (docs/results.md).
    """

    leaf: float = 1.0
    inside: float = 0.5
    outside: float = 0.3
    edge: float = 10.0
    sibling: float = 0.5


def candidate_cross_entropy(
    logits: Tensor, candidates: Tensor, *, smoothing: float = 0.0
) -> Tensor:
    """-log of the probability mass inside each item's candidate set.

    Args:
        logits: [B, L] over leaves.
        candidates: bool [B, L], at least one True a row.
        smoothing: share of a uniform target mixed in.

    Returns:
        [B], >= 0; with one candidate a row and no smoothing this is the cross entropy.

    Source: partial-label learning, Jin and Ghahramani 2002.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1)
    inside = log_p.masked_fill(~candidates, -torch.inf).logsumexp(-1)
    return -(1 - smoothing) * inside - smoothing * log_p.mean(-1)


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of a student's softmax from its teacher's, which gets no gradient.

    Args:
        logits, teacher: [B, L] over leaves.

    Returns:
        Mean of KL(teacher || student) over the items, in nats.

    Source: Hinton et al. 2015, "Distilling the knowledge in a neural network", temperature 1.
    """
    student, target = logits.float().log_softmax(-1), teacher.detach().float().log_softmax(-1)
    return F.kl_div(student, target, reduction="batchmean", log_target=True)


def item_cones(
    margins: Tensor, inside: Tensor, outside: Tensor, *, gamma: float = GAMMA
) -> tuple[Tensor, Tensor]:
    """Hinge terms of items and cones.

    Args:
        margins: [B, N] of items to all nodes, > 0 inside.
        inside: bool [B, N], cones that must hold the item.
        outside: bool [B, N], cones that must not.
        gamma: margin of the negatives.

    Returns:
        Mean energy over `inside`, mean of relu(gamma + margin) over `outside`; 0 where empty.
    """
    zero = margins.sum() * 0
    pull = torch.relu(-margins[inside]).mean() if inside.any() else zero
    push = torch.relu(gamma + margins[outside]).mean() if outside.any() else zero
    return pull, push


def node_cones(
    nodes: Tensor,
    edges: Sequence[tuple[int, int]] | Tensor,
    siblings: Sequence[tuple[int, int]] | Tensor,
    c: Tensor | float,
    *,
    space: Space,
) -> tuple[Tensor, Tensor]:
    """Entailment along the edges of the tree and push between siblings.

    Args:
        nodes: apexes [N, D].
        edges: (parent, child) index pairs [M, 2].
        siblings: (node, sibling) index pairs [S, 2].

    Returns:
        Mean edge energy, mean sibling hinge (radians).
    """
    e = torch.as_tensor(edges, device=nodes.device)
    s = torch.as_tensor(siblings, device=nodes.device)
    edge = entailment(nodes[e[:, 0]], nodes[e[:, 1]], c, space=space)
    push = cone_negatives(nodes[s[:, 0]], nodes[s[:, 1]], c, space=space)
    return edge, push
