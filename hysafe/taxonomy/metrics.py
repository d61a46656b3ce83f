"""Metrics of a prediction in a tree. A tree is a mapping child -> parent (None: a root).

Several roots are joined under one virtual root, which counts as an edge end but never as an
ancestor in precision and recall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hysafe.errors import ShapeError, TaxonomyError

__all__ = [
    "HierarchicalScores",
    "ancestors",
    "hierarchical_scores",
    "lowest_common_ancestor_height",
    "tree_induced_error",
]

Tree = Mapping[str, str | None]


class HierarchicalScores(NamedTuple):
    """Means over items. error and height: 0 is perfect; precision, recall, f1 in [0, 1]."""

    tree_induced_error: float
    lca_height: float
    precision: float
    recall: float
    f1: float


def ancestors(tree: Tree, node: str) -> tuple[str, ...]:
    """The node and its ancestors, upwards, without the virtual root."""
    chain: list[str] = []
    current: str | None = node
    while current is not None:
        if current not in tree:
            raise TaxonomyError(f"tree: no node {current!r}.")
        if current in chain:
            raise TaxonomyError(f"tree: node {current!r} is its own ancestor.")
        chain.append(current)
        current = tree[current]
    return tuple(chain)


def tree_induced_error(tree: Tree, predicted: str, true: str) -> int:
    """Number of edges between the two nodes (Dekel et al. 2004)."""
    a, b = ancestors(tree, predicted), ancestors(tree, true)
    return len(a) + len(b) - 2 * len(set(a) & set(b))


def lowest_common_ancestor_height(tree: Tree, predicted: str, true: str) -> int:
    """Height (longest way down to a leaf) of the lowest common ancestor; 0 for a right leaf.

    Source: Bertinetto et al. 2020, "Making better mistakes".
    """
    return _lca_height(tree, _heights(tree), predicted, true)


def hierarchical_scores(
    tree: Tree, predicted: Sequence[str], true: Sequence[str]
) -> HierarchicalScores:
    """All tree metrics over items; precision and recall compare ancestor sets.

    Source: Kiritchenko et al. 2005 (micro-averaged over items).

    Raises:
        ShapeError: lengths differ or are 0.
    """
    if len(predicted) != len(true) or not true:
        raise ShapeError(
            f"expected as many predictions as labels, at least 1; got {len(predicted)}, {len(true)}"
        )
    heights = _heights(tree)
    error = height = shared = size_p = size_t = 0
    for p, t in zip(predicted, true, strict=True):
        a, b = set(ancestors(tree, p)), set(ancestors(tree, t))
        common = len(a & b)
        error += len(a) + len(b) - 2 * common
        height += _lca_height(tree, heights, p, t)
        shared, size_p, size_t = shared + common, size_p + len(a), size_t + len(b)
    n = len(true)
    precision, recall = shared / size_p, shared / size_t
    f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
    return HierarchicalScores(error / n, height / n, precision, recall, f1)


VIRTUAL_ROOT = ""


def _heights(tree: Tree) -> dict[str, int]:
    heights = dict.fromkeys(tree, 0)
    heights[VIRTUAL_ROOT] = 0
    for node in tree:
        for steps, ancestor in enumerate(ancestors(tree, node)):
            heights[ancestor] = max(heights[ancestor], steps)
        heights[VIRTUAL_ROOT] = max(heights[VIRTUAL_ROOT], len(ancestors(tree, node)))
    return heights


def _lca_height(tree: Tree, heights: Mapping[str, int], predicted: str, true: str) -> int:
    others = set(ancestors(tree, true))
    common = (a for a in ancestors(tree, predicted) if a in others)
    return heights[next(common, VIRTUAL_ROOT)]
