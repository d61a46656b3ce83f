"""Items that were encoded before, found again by the hash of their content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hysafe.index import Collection, EncodedItem
from hysafe.types import Item

__all__ = ["Known", "Stored", "groups"]

# Items that are looked up at once, and the bytes of their pictures.
GROUP_ITEMS, GROUP_BYTES = 512, 64 << 20
# Hexadecimal digits of a hash that are kept in memory: 64 bits, 16 MB a million items with the
# places. The whole hash is compared when an item is found.
KEY_DIGITS = 16


class Stored(NamedTuple):
    """A table of which the first `rows` rows count; None for all."""

    collection: Collection
    rows: int | None = None


class Known:
    """Encoded items of some tables, by content.

    Args:
        tables: written by the model, and the reader of text in pictures, that is asked for now.
        retry: items that could not be decoded or read do not count as known.

    Attributes:
        found: items found so far.
    """

    def __init__(self, tables: Sequence[Stored], *, retry: bool = False) -> None:
        self.found = 0
        self._tables = [t.collection for t in tables]
        keys: list[np.ndarray] = [np.empty(0, np.uint64)]
        places: list[np.ndarray] = [np.empty(0, np.int64)]
        owners: list[np.ndarray] = [np.empty(0, np.int16)]
        for k, (collection, rows) in enumerate(tables):
            key, place = _keys(collection, rows, retry)
            keys.append(key)
            places.append(place)
            owners.append(np.full(len(key), k, np.int16))
        key = np.concatenate(keys)
        order = np.argsort(key, kind="stable")
        self._keys = key[order]
        self._places = np.concatenate(places)[order]
        self._owners = np.concatenate(owners)[order]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, items: Sequence[Item]) -> dict[str, EncodedItem]:
        """The known ones among `items`, by id, as the items that they are now."""
        asked = [i for i in items if i.content_hash and i.error is None]
        if not asked or not len(self._keys):
            return {}
        keys = np.array([_key(i.content_hash) for i in asked], np.uint64)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        hit = np.flatnonzero(self._keys[at] == keys)
        known: dict[str, EncodedItem] = {}
        for k, collection in enumerate(self._tables):
            own = [int(n) for n in hit if self._owners[at[n]] == k]
            rows = collection.take([int(self._places[at[n]]) for n in own])
            for n, row in zip(own, rows, strict=True):
                item = asked[n]
                if row.content_hash == item.content_hash:
                    known[item.id] = EncodedItem(
                        item.id, item.source, item.modality, item.content_hash, row.points,
                        row.cut, item.text or "", row.read_text, row.error,
                    )  # fmt: skip
        self.found += len(known)
        return known


def groups(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in groups to be looked up at once."""
    group: list[Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += len(item.image or b"")
        if len(group) >= GROUP_ITEMS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _key(content_hash: str) -> int:
    return int(content_hash[:KEY_DIGITS], 16)


def _keys(collection: Collection, rows: int | None, retry: bool) -> tuple[np.ndarray, np.ndarray]:
    """Keys and places of the rows that may be known again."""
    keys: list[np.ndarray] = [np.empty(0, np.uint64)]
    places: list[np.ndarray] = [np.empty(0, np.int64)]
    first = 0
    for batch in collection.batches(["content_hash", "error"], stop=rows):
        hashes, errors = (batch[c].to_pylist() for c in ("content_hash", "error"))
        usable = [
            k
            for k, (content, error) in enumerate(zip(hashes, errors, strict=True))
            if content and not (retry and error)
        ]
        keys.append(np.array([_key(hashes[k]) for k in usable], np.uint64))
        places.append(np.array(usable, np.int64) + first)
        first += batch.num_rows
    return np.concatenate(keys), np.concatenate(places)
