"""Crosswalk between the taxonomy's categories and the codes of published systems, both ways."""

from __future__ import annotations

from hysafe.errors import TaxonomyError
from hysafe.taxonomy.tree import Node, Taxonomy

__all__ = ["codes", "nodes", "schemes"]


def schemes(taxonomy: Taxonomy) -> tuple[str, ...]:
    """Names of the systems the taxonomy maps to, e.g. llavaguard, mlcommons, proguard."""
    return tuple(sorted({scheme for n in taxonomy for scheme in n.crosswalk}))


def codes(taxonomy: Taxonomy, node_id: str, scheme: str) -> tuple[str, ...]:
    """Codes of `scheme` for a node; a concept has its category's, a domain all of its children's.

    Raises:
        TaxonomyError: unknown node or scheme.
    """
    _check(taxonomy, scheme)
    node = taxonomy[node_id]
    if node.kind == "concept":
        node = taxonomy[str(node.parent)]
    holders = taxonomy.children(node.id) if node.kind == "domain" else (node,)
    found = (code for holder in holders for code in holder.crosswalk.get(scheme, ()))
    return tuple(dict.fromkeys(found))


def nodes(taxonomy: Taxonomy, scheme: str, code: str) -> tuple[Node, ...]:
    """Categories that carry `code` of `scheme`; () where the code has no counterpart."""
    _check(taxonomy, scheme)
    return tuple(n for n in taxonomy if code in n.crosswalk.get(scheme, ()))


def _check(taxonomy: Taxonomy, scheme: str) -> None:
    if scheme not in schemes(taxonomy):
        raise TaxonomyError(
            f"{taxonomy.origin}: no crosswalk to {scheme!r}. Known: {', '.join(schemes(taxonomy))}."
        )
