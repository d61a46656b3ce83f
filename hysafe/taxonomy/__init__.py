"""The safety taxonomy, policies over it, crosswalks and tree metrics."""

from hysafe.taxonomy import crosswalk, metrics
from hysafe.taxonomy.policy import Policy, PolicyView
from hysafe.taxonomy.tree import Node, Path, Taxonomy, load_taxonomy

__all__ = [
    "Node",
    "Path",
    "Policy",
    "PolicyView",
    "Taxonomy",
    "crosswalk",
    "load_taxonomy",
    "metrics",
]
