"""Explicit maps from the labels of published sets to taxonomy nodes (``label_maps.yaml``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import yaml

from hysafe.errors import ConfigError

__all__ = ["RISK", "SAFE", "known_sets", "permissive_sets", "picture_nodes", "text_nodes"]

# Stand for "any risk node" and "any harmless node".
RISK, SAFE = "RISK", "SAFE"


@cache
def _maps() -> dict[str, Any]:
    text = resources.files("hysafe.data").joinpath("label_maps.yaml").read_text("utf-8")
    return yaml.safe_load(text)  # type: ignore[no-any-return]


def known_sets() -> tuple[str, ...]:
    """Names of all sets with a map."""
    return tuple(_maps())


def permissive_sets() -> tuple[str, ...]:
    """Text sets whose licence lets shipped weights learn from them."""
    return tuple(k for k, v in _maps().items() if v["licence"] == "permissive")


def text_nodes(
    source: str, labels: Sequence[str], safe: bool | None
) -> tuple[tuple[str, ...], bool | None]:
    """Nodes any of which may hold a row, and whether it is safe.

    Args:
        source: name of the set, e.g. ``catqa``.
        labels: the row's labels, coarse to fine.
        safe: the set's own label.

    Returns:
        (nodes, safe); ((), None) where the map leaves the row out.

    Raises:
        ConfigError: no map for the set.
    """
    entry = _entry(source, "label map")
    table = entry.get("labels", {})
    for depth in range(len(labels), 0, -1):
        nodes = table.get("/".join(labels[:depth]))
        if nodes is not None:
            return tuple(nodes), _safe(nodes)
    nodes = entry.get("safe", {}).get(safe)
    return (tuple(nodes), safe) if nodes else ((), None)


def picture_nodes(source: str, name: str, hypernyms: Sequence[str]) -> tuple[str, ...]:
    """Nodes any of which may hold pictures of a class with these hypernyms (any order).

    Raises:
        ConfigError: no map of picture classes for the set, or none for the class.
    """
    entry = _entry(source, "map of picture classes")
    if "names" not in entry:
        raise ConfigError(f"{source!r} is a set of texts; its rows have labels, not classes.")
    if name in entry["names"]:
        return tuple(entry["names"][name])
    for hypernym, nodes in entry["hypernyms"]:
        if hypernym in hypernyms:
            return tuple(nodes)
    raise ConfigError(f"{source}: class {name!r} has no node; add it to label_maps.yaml.")


def _entry(source: str, what: str) -> dict[str, Any]:
    if source not in _maps():
        raise ConfigError(f"no {what} for {source!r}; known: {', '.join(known_sets())}.")
    return _maps()[source]  # type: ignore[no-any-return]


def _safe(nodes: Sequence[str]) -> bool | None:
    """Whether the nodes are harmless; None where some are and some are not, or there are none."""
    harmless = {n in (SAFE, "S") or n.startswith("S.") for n in nodes}
    return harmless.pop() if len(harmless) == 1 else None
