"""Crosswalk between the taxonomy's nodes and the codes of published systems, both ways."""

from __future__ import annotations

from hysafe.errors import TaxonomyError
from hysafe.taxonomy.tree import Node, Taxonomy

__all__ = ["codes", "nodes", "schemes"]


def schemes(taxonomy: Taxonomy) -> tuple[str, ...]:
    """Names of the systems the taxonomy maps to, e.g. llavaguard, mlcommons, proguard."""
    return tuple(sorted({scheme for n in taxonomy for scheme in n.crosswalk}))


def codes(taxonomy: Taxonomy, node_id: str, scheme: str) -> tuple[str, ...]:
    """Codes of `scheme` for a node and all below it; a concept without its own has its category's.

    Raises:
        TaxonomyError: unknown node or scheme.
    """
    _check(taxonomy, scheme)
    node = taxonomy[node_id]
    if node.kind == "concept" and scheme not in node.crosswalk:
        node = taxonomy[str(node.parent)]
        return tuple(dict.fromkeys(node.crosswalk.get(scheme, ())))
    holders = (node, *taxonomy.descendants(node.id))
    return tuple(dict.fromkeys(c for h in holders for c in h.crosswalk.get(scheme, ())))


def nodes(taxonomy: Taxonomy, scheme: str, code: str) -> tuple[Node, ...]:
    """Nodes that carry `code` of `scheme` themselves; () where the code has no counterpart.

    They are categories, but for ``unsafe_concepts``, whose codes belong to concepts.
    """
    _check(taxonomy, scheme)
    return tuple(n for n in taxonomy if code in n.crosswalk.get(scheme, ()))


def _check(taxonomy: Taxonomy, scheme: str) -> None:
    if scheme not in schemes(taxonomy):
        raise TaxonomyError(
            f"{taxonomy.origin}: no crosswalk to {scheme!r}. Known: {', '.join(schemes(taxonomy))}."
        )
