"""The contrast set written for hysafe: risky sentences beside harmless ones with the same words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources

from hysafe.data.label_map import SAFE
from hysafe.errors import ConfigError
from hysafe.types import Sample

__all__ = ["SPLITS", "contrast_set", "core_set", "long_set"]

SPLITS = ("train", "validation", "test")
EXTRA = ("split", "side", "register", "node", "concept", "functionality", "form")


def contrast_set(split: str | Sequence[str] = SPLITS) -> list[Sample]:
    """Sentences of one split or several.

    Pairs are never split. A benign side has the node of its category's benign sibling
    (``S.6.1``) among its candidates; background sentences and the harmless ones of a functionality may lie in
    any harmless node.

    Raises:
        ConfigError: unknown split.
    """
    wanted = (split,) if isinstance(split, str) else tuple(split)
    unknown = set(wanted) - set(SPLITS)
    if unknown:
        raise ConfigError(f"split {sorted(unknown)}: known are {', '.join(SPLITS)}.")
    samples = []
    path = resources.files("hysafe.assets").joinpath("contrast/contrast.jsonl")
    with path.open("r", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["split"] not in wanted:
                continue
            risky = row["side"] == "risky"
            functional = row.get("functionality")
            if row["node"] is None or (functional and not risky):
                nodes: tuple[str, ...] = (SAFE,)
            else:
                nodes = (row["node"],) if risky else (f"S.{row['node']}",)
            samples.append(
                Sample(
                    row["id"],
                    "contrast",
                    row["text"],
                    None,
                    nodes,
                    not risky,
                    row["pair"],
                    {k: row.get(k) for k in EXTRA},
                )
            )
    return samples


def core_set(split: str | Sequence[str] = SPLITS) -> list[Sample]:
    """Short pairs and background: without the functionalities and the long texts."""
    return [s for s in contrast_set(split) if not (s.extra["functionality"] or s.extra["form"])]


def long_set(split: str | Sequence[str] = SPLITS) -> list[Sample]:
    """Pairs of several sentences: posts, screens of chat, letters."""
    return [s for s in contrast_set(split) if s.extra["form"] == "long"]
