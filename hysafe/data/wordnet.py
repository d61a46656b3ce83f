"""Nouns of WordNet from an edge list of synset names."""

from __future__ import annotations

import re
from pathlib import Path

from hysafe.errors import ConfigError

__all__ = ["lemma", "noun_edges"]


def noun_edges(path: str | Path) -> list[tuple[str, str]]:
    """Pairs (child, parent) of synset names from lines `child<TAB>parent`.

    Raises:
        ConfigError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no edge list {path}. Point HYSAFE_DATA at the development data.")
    pairs = (line.split("\t") for line in path.read_text("utf-8").splitlines())
    return [(child, parent) for child, parent in pairs]


def lemma(synset: str) -> str:
    """The word or words that name a synset: ``fire_engine.n.01`` is *fire engine*."""
    return re.sub(r"\.[a-z]\.\d+$", "", synset).replace("_", " ")
