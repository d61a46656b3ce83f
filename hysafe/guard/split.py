"""Which categories the guard never sees in training, so that naming the unseen can be measured."""

from __future__ import annotations

from hysafe.taxonomy import Taxonomy

__all__ = ["HIDDEN", "hidden_nodes"]

# 9 of the 45 categories, one or none per domain; fixed before the first training.
HIDDEN = ("1.4", "2.5", "3.3", "6.4", "7.2", "8.3", "9.3", "10.1", "12.1")


def hidden_nodes(taxonomy: Taxonomy) -> frozenset[str]:
    """The hidden categories and all that stands below them."""
    below = (n.id for c in HIDDEN if c in taxonomy for n in taxonomy.descendants(c))
    return frozenset(HIDDEN) | frozenset(below)
