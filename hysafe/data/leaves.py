"""Which nodes an item may lie in, as masks over the leaves and nodes of a taxonomy.

Leaves of the objective are the categories, their benign siblings and the background nodes: every
item belongs to at least one. Concepts lie below and refine a category.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hysafe.data.label_map import RISK, SAFE
from hysafe.errors import TaxonomyError
from hysafe.taxonomy import Taxonomy

__all__ = ["LeafSpace"]


class LeafSpace:
    """Index of a taxonomy's leaves and nodes.

    Attributes:
        leaves: ids of the L leaves. nodes: ids of all N nodes. depth: [N].
        below: bool [L, N], leaf l is node n or lies below it.
    """

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self.leaves = tuple(n.id for n in taxonomy.of_kind("category", "benign", "background"))
        self.nodes = tuple(n.id for n in taxonomy)
        self.leaf_index = {n: i for i, n in enumerate(self.leaves)}
        self.node_index = {n: i for i, n in enumerate(self.nodes)}
        self.depth = torch.tensor([taxonomy.depth(n) for n in self.nodes])
        self.below = torch.zeros(len(self.leaves), len(self.nodes), dtype=torch.bool)
        for leaf in self.leaves:
            for node in taxonomy.path(leaf).ids:
                self.below[self.leaf_index[leaf], self.node_index[node]] = True
        self.leaf_nodes = torch.tensor([self.node_index[n] for n in self.leaves])
        self.risky = torch.tensor([taxonomy[n].risky for n in self.leaves])

    def candidates(self, nodes: Sequence[str]) -> Tensor:
        """Bool [L]: leaves that `nodes` allow (RISK, SAFE, domains, leaves or concepts)."""
        mask = torch.zeros(len(self.leaves), dtype=torch.bool)
        for node in nodes:
            if node == RISK:
                mask |= self.risky
            elif node == SAFE:
                mask |= ~self.risky
            else:
                kind = self.taxonomy[node].kind
                name = str(self.taxonomy[node].parent) if kind == "concept" else node
                mask |= self.below[:, self.node_index[name]]
        if not mask.any():
            raise TaxonomyError(f"labels {list(nodes)} allow no leaf of {self.taxonomy!r}.")
        return mask

    def cone_masks(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Cones that must hold an item and cones that must not.

        Args:
            candidates: bool [B, L].

        Returns:
            inside, outside: bool [B, N]. A node must hold the item when all candidates lie below
            it, and must not when none does; concepts are in neither.
        """
        below = self.below.to(candidates.device)
        counts = candidates.float() @ below.float()
        inside = counts == candidates.sum(-1, keepdim=True)
        outside = counts == 0
        outside &= below.any(0)  # concepts hold no leaf: nothing is known of them
        return inside, outside

    def edges(self) -> Tensor:
        """(parent, child) node index pairs [M, 2]."""
        index = self.node_index
        pairs = [(index[n.parent], index[n.id]) for n in self.taxonomy if n.parent]
        return torch.tensor(pairs)

    def siblings(self) -> Tensor:
        """(node, sibling) index pairs [S, 2]: same parent, or a category and its benign sibling."""
        pairs = []
        groups: dict[str | None, list[str]] = {}
        for n in self.taxonomy:
            groups.setdefault(n.parent, []).append(n.id)
        for members in groups.values():
            pairs += [(a, b) for a in members for b in members if a != b]
        for n in self.taxonomy.categories:
            if n.sibling:
                pairs += [(n.id, n.sibling), (n.sibling, n.id)]
        return torch.tensor([(self.node_index[a], self.node_index[b]) for a, b in pairs])
