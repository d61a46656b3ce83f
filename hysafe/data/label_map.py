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
    if source not in _maps():
        raise ConfigError(f"no label map for {source!r}; known: {', '.join(known_sets())}.")
    entry = _maps()[source]
    table = entry.get("labels", {})
    for depth in range(len(labels), 0, -1):
        nodes = table.get("/".join(labels[:depth]))
        if nodes is not None:
            return tuple(nodes), all(n == SAFE or n.startswith("S.") for n in nodes)
    nodes = entry.get("safe", {}).get(safe)
    return (tuple(nodes), safe) if nodes else ((), None)


def picture_nodes(source: str, name: str, hypernyms: Sequence[str]) -> tuple[str, ...]:
    """Nodes any of which may hold pictures of a class with these hypernyms (any order)."""
    entry = _maps()[source]
    if name in entry["names"]:
        return tuple(entry["names"][name])
    for hypernym, nodes in entry["hypernyms"]:
        if hypernym in hypernyms:
            return tuple(nodes)
    raise ConfigError(f"{source}: class {name!r} has no node; add it to label_maps.yaml.")
