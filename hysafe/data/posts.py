"""Posts of public sets as readers judged them under the taxonomy.

The sets' own labels answer other questions (*not sexist* is not *harmless*, *offensive language* marks
slang more than harm), so their rows were read again. The package has the readings, by a hash of the
text, and not the texts: those are in the development data.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources

from hysafe.data.label_map import SAFE
from hysafe.data.sources import data_root, load_rows
from hysafe.errors import ConfigError, InputError
from hysafe.types import Sample

__all__ = ["POST_SPLITS", "digest", "find_posts", "read_posts", "was_read"]

POST_SPLITS = ("train", "test")
DIGITS = 16
UNCLEAR = "?"


def read_posts(split: str, data_dir: str | None = None) -> list[Sample]:
    """Posts with the node in which a reader saw them; harmless ones may lie in any harmless node.

    Posts that a careful reader could not judge without context are left out. Test posts were judged
    alike by two readers, training posts by one.

    Args:
        split: ``train`` or ``test``.
        data_dir: development data (``text/``); HYSAFE_DATA when None.

    Raises:
        ConfigError: unknown split, or no data folder.
        InputError: a set that was read is not there.
    """
    if split not in POST_SPLITS:
        raise ConfigError(f"split {split!r}: known are {', '.join(POST_SPLITS)}.")
    return find_posts((row for row in _readings() if row["split"] == split), data_dir)


def find_posts(readings: Iterable[Mapping[str, str]], data_dir: str | None = None) -> list[Sample]:
    """The texts of some readings, without the unclear ones; the name of its set is in a post's `extra`.

    Args:
        readings: rows with ``set``, ``sha256`` (:func:`digest` of the text) and ``node``.
        data_dir: development data (``text/``); HYSAFE_DATA when None.

    Raises:
        ConfigError: no data folder.
        InputError: a set that was read is not there.
    """
    by_set: dict[str, dict[str, str]] = {}
    for row in readings:
        if row["node"] != UNCLEAR:
            by_set.setdefault(row["set"], {})[row["sha256"]] = row["node"]
    samples: list[Sample] = []
    for name, nodes in by_set.items():
        file = data_root(data_dir) / "text" / f"{name}.jsonl"
        if not file.is_file():
            raise InputError(
                f"{file} is missing: its posts were read. Put it there, or set posts: false."
            )
        for row in load_rows(str(file)):
            key = digest(row["text"])
            node = nodes.pop(key, None)
            if node is None:
                continue
            where = node or SAFE
            samples.append(
                Sample(f"post-{key}", "posts", row["text"], None, (where,), where == SAFE, None,
                       {"set": name})
            )  # fmt: skip
    return samples


def was_read() -> frozenset[str]:
    """Digests of all texts that a reader judged or found unclear, of both splits."""
    return frozenset(row["sha256"] for row in _readings())


def digest(text: str) -> str:
    """First hexadecimal digits of the SHA-256 of a text, by which a reading is kept."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


@cache
def _readings() -> tuple[dict[str, str], ...]:
    """Rows ``set, sha256, node, split``; no node: harmless."""
    path = resources.files("hysafe.assets").joinpath("posts/readings.csv")
    return tuple(csv.DictReader(path.read_text("utf-8").splitlines()))
