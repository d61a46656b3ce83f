"""What a report is made from, where it is stored: lines and vectors that are read when asked for."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hysafe.errors import CollectionError
from hysafe.index import Collection
from hysafe.index.collection import matrix

__all__ = ["ResultLines", "StoredTangents"]

# In lines where a text decided; quotation marks inside a text are escaped.
SPOKE = (b'"decided_by": "ocr"', b'"decided_by": "text"')
COLUMNS = ("vector", "text_vector")


class ResultLines:
    """The rows of a ``results.jsonl``; the place of each line is kept, and nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, spoke = array("q"), bytearray()
        start = 0
        with path.open("rb") as lines:
            for line in lines:
                self._starts.append(start)
                spoke.append(any(s in line for s in SPOKE))
                start += len(line)
        # whether a text, and not the picture, decided about each row
        self.spoke = np.frombuffer(spoke, dtype=bool)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)

    def __getitem__(self, row: int) -> dict[str, Any]:
        with self.path.open("rb") as lines:
            lines.seek(self._starts[row])
            found: dict[str, Any] = json.loads(lines.readline())
        return found


class StoredTangents:
    """Tangent vectors of a collection's items [n, D], in the order of the lines of its results: where
    the channel that decided saw each item, NaN without a point. See
    :class:`hysafe.app.report.Tangents`."""

    def __init__(self, collection: Collection, lines: ResultLines, dim: int) -> None:
        self._collection, self._lines = collection, lines
        self.shape = (len(lines), dim)
        self._places = self._order()

    def _order(self) -> np.ndarray | None:
        """Place in the table of each line, None where both have one order.

        Raises:
            CollectionError: a line's item is not in the table.
        """
        ids = (i for b in self._collection.batches(["id"]) for i in b["id"].to_pylist())
        with self._lines.path.open("rb") as lines:
            same = all(
                line.startswith(b'{"id": ' + json.dumps(name, ensure_ascii=False).encode() + b",")
                for line, name in zip(lines, ids, strict=False)
            )
        if same and len(self._collection) == len(self._lines):
            return None
        table = self._collection.to_arrow(["id"])["id"].to_pylist()
        place = {name: i for i, name in enumerate(table)}
        missing = next((row["id"] for row in self._lines if row["id"] not in place), None)
        if missing is not None:
            raise CollectionError(
                f"{self._lines.path}: {missing} is not in the table beside it. Judge the collection "
                "again: hysafe rescore COLLECTION"
            )
        return np.array([place[row["id"]] for row in self._lines], dtype=np.int64)

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """All rows in order, at most `size` at a time."""
        if self._places is not None:
            for start in range(0, len(self._lines), size):
                yield self.take(range(start, min(len(self._lines), start + size)))
            return
        start = 0
        for batch in self._collection.batches(COLUMNS, size=size):
            spoke = self._lines.spoke[start : start + batch.num_rows]
            start += batch.num_rows
            yield self._decided(batch, spoke)

    def take(self, rows: Sequence[int]) -> np.ndarray:
        """Some rows, in the order asked for."""
        chosen = np.asarray(rows, dtype=np.int64)
        places = chosen if self._places is None else self._places[chosen]
        table = self._collection.take_table(places.tolist(), COLUMNS)
        return self._decided(table, self._lines.spoke[chosen])

    def _decided(self, rows: pa.RecordBatch | pa.Table, spoke: np.ndarray) -> np.ndarray:
        looks, words = (matrix(rows[name], self.shape[1]) for name in COLUMNS)
        use = spoke[:, None] & np.isfinite(words)
        return np.where(use, words, looks)
