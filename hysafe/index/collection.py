"""The one file that imports LanceDB: a scanned collection on disk.

A row holds the item's tangent vectors (its own and that of its text, where a picture has both),
its scores and its rating. Curvature and hashes are in the table's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hysafe.errors import CollectionError, ShapeError
from hysafe.types import Result

__all__ = ["Collection", "CollectionMeta", "CollectionWriter"]

TABLE = "items"
METADATA_KEY = b"hysafe"
FORMAT = 1


@dataclass(frozen=True)
class CollectionMeta:
    """What the vectors of a collection mean.

    Args:
        dim: D. c: curvature magnitude. geometry: lorentz or euclidean.
        model, taxonomy, policy: hashes. model_name: as given by the user.
        nodes: ids of the category scores, in their order.
    """

    dim: int
    c: float
    geometry: str
    model: str
    taxonomy: str
    policy: str
    model_name: str
    nodes: tuple[str, ...]
    format: int = FORMAT


class CollectionWriter:
    """Appends batches of results to a new table; the table is whole after every batch."""

    def __init__(self, folder: Path, meta: CollectionMeta) -> None:
        import lancedb

        self.meta = meta
        payload = json.dumps({**meta.__dict__, "nodes": list(meta.nodes)}).encode()
        self.schema = _schema(meta).with_metadata({METADATA_KEY: payload})
        self._table = lancedb.connect(str(folder)).create_table(
            TABLE, schema=self.schema, mode="overwrite"
        )

    def append(
        self,
        results: Sequence[Result],
        vectors: Sequence[np.ndarray | None],
        text_vectors: Sequence[np.ndarray | None],
        scores: Sequence[np.ndarray | None],
    ) -> None:
        """Add rows.

        Args:
            results: n results.
            vectors: tangent vector [D] of each item (the picture's, else the text's).
            text_vectors: of the text of an item with a picture, read or given.
            scores: category scores [len(meta.nodes)].

        Raises:
            ShapeError: the sequences differ in length, or an array in width.
        """
        counts = [len(results), len(vectors), len(text_vectors), len(scores)]
        if len(set(counts)) > 1:
            raise ShapeError(
                f"append: got {counts} results, vectors, text vectors and scores, wanted one of "
                "each for every row. Give None where there is none."
            )
        dim, width = self.meta.dim, len(self.meta.nodes)
        top = [r.paths[0] if r.paths else None for r in results]
        columns: dict[str, Any] = {
            "id": [r.id for r in results],
            "source": [r.source for r in results],
            "modality": [r.modality for r in results],
            "content_hash": [r.hashes.content for r in results],
            "vector": _vectors(vectors, dim),
            "text_vector": _vectors(text_vectors, dim),
            "scores": _vectors(scores, width),
            "rating": [r.rating for r in results],
            "p_unsafe": [r.p_unsafe for r in results],
            "node": [t.node if t else None for t in top],
            "novelty_policy": [r.novelty.policy for r in results],
            "novelty_distribution": [r.novelty.distribution for r in results],
            "radius": [r.radius for r in results],
            "error": [r.error.type if r.error else None for r in results],
        }
        arrays = [
            v if isinstance(v, pa.Array) else pa.array(v, type=self.schema.field(k).type)
            for k, v in columns.items()
        ]
        self._table.add(pa.Table.from_arrays(arrays, schema=self.schema))


class Collection:
    """A scanned collection: ``Collection.open(DIR)`` on the folder of a scan.

    Attributes:
        meta: hashes, curvature, geometry.
    """

    def __init__(self, folder: Path, table: Any, meta: CollectionMeta) -> None:
        self.folder, self._table, self.meta = folder, table, meta

    @classmethod
    def open(cls, folder: str | Path) -> Collection:
        """Open the collection in a scan's output folder.

        Raises:
            CollectionError: there is none, or it was not written by hysafe.
        """
        import lancedb

        folder = Path(folder)
        if not (folder / f"{TABLE}.lance").is_dir():
            raise CollectionError(
                f"{folder}: no collection there. Make one: hysafe scan PATH --out DIR"
            )
        try:
            table = lancedb.connect(str(folder)).open_table(TABLE)
            payload = (table.schema.metadata or {}).get(METADATA_KEY)
        except (OSError, ValueError, RuntimeError) as error:
            detail = " ".join(str(error).split())
            raise CollectionError(
                f"{folder}: the collection cannot be read ({detail}). Scan again."
            ) from error
        if payload is None:
            raise CollectionError(
                f"{folder}: the table was not written by hysafe scan. Give a scan's output folder."
            )
        try:
            data = json.loads(payload)
            meta = CollectionMeta(**{**data, "nodes": tuple(data["nodes"])})
        except (ValueError, KeyError, TypeError) as error:
            raise CollectionError(
                f"{folder}: the table's metadata is not valid ({error}). Scan again."
            ) from error
        if meta.format != FORMAT:
            raise CollectionError(
                f"{folder}: collection format {meta.format}, this version reads {FORMAT}. "
                "Scan again, or use the hysafe that wrote it."
            )
        return cls(folder, table, meta)

    def __len__(self) -> int:
        return int(self._table.count_rows())

    def to_arrow(self, columns: Iterable[str] | None = None) -> pa.Table:
        """All rows, in the order they were scanned."""
        query = self._table.search()
        if columns is not None:
            query = query.select(list(columns))
        return query.limit(None).to_arrow()

    def vectors(self) -> tuple[list[str], np.ndarray]:
        """Ids and tangent vectors [n, D]; NaN rows for items without a point."""
        table = self.to_arrow(["id", "vector"])
        return table["id"].to_pylist(), matrix(table["vector"], self.meta.dim)


def matrix(column: Any, width: int) -> np.ndarray:
    """A fixed-size list column with nulls -> float32 [n, width], NaN where null."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # zero chunks
        return np.empty((0, width), dtype=np.float32)
    out = np.full((len(array), width), np.nan, dtype=np.float32)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    if valid.any():
        out[valid] = array.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return out


def _schema(meta: CollectionMeta) -> pa.Schema:
    vector = pa.list_(pa.float32(), meta.dim)
    return pa.schema(
        [
            pa.field("id", pa.string()),
            pa.field("source", pa.string()),
            pa.field("modality", pa.string()),
            pa.field("content_hash", pa.string()),
            pa.field("vector", vector),
            pa.field("text_vector", vector),
            pa.field("scores", pa.list_(pa.float32(), len(meta.nodes))),
            pa.field("rating", pa.string()),
            pa.field("p_unsafe", pa.float32()),
            pa.field("node", pa.string()),
            pa.field("novelty_policy", pa.float32()),
            pa.field("novelty_distribution", pa.float32()),
            pa.field("radius", pa.float32()),
            pa.field("error", pa.string()),
        ]
    )


def _vectors(values: Sequence[np.ndarray | None], width: int) -> pa.Array:
    for v in values:
        if v is not None and v.shape != (width,):
            raise ShapeError(f"append: got an array of shape {v.shape}, wanted ({width},).")
    rows = [np.zeros(width, np.float32) if v is None else v.astype(np.float32) for v in values]
    flat = pa.array(np.concatenate(rows) if rows else np.empty(0, np.float32), type=pa.float32())
    mask = pa.array([v is None for v in values], type=pa.bool_())
    return pa.FixedSizeListArray.from_arrays(flat, width, mask=mask)
