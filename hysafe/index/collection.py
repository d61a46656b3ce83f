"""The one file that imports LanceDB: a scanned collection on disk.

A row holds all points that the encoder gave an item (as tangent vectors at the origin), what else a
judgement needs, and the judgement: scores and rating. Curvature, hashes and the policy are in the
table's metadata. With them an item can be judged again without its picture or text.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hysafe.errors import CollectionError, ConfigError, InputError, ShapeError
from hysafe.types import ErrorRecord, Modality, Rating, Result

if TYPE_CHECKING:
    from hysafe.geometry import Points
    from hysafe.index.search import Hit, PointIndex

__all__ = [
    *("Collection", "CollectionMeta", "CollectionWriter", "Decision", "EncodedItem", "Row"),
    *("TABLE", "ENCODED", "PointColumn", "decode_rows", "drop_table", "encode_rows", "matrix"),
    *("mend_table", "point_columns", "sync_table", "vector_column"),
]

TABLE, DECISIONS = "items", "decisions"
METADATA_KEY = b"hysafe"
FORMAT = 2
# Characters of an item's own text kept in the table, to be shown and searched; the judgement needs
# none of it.
TEXT_KEPT = 2000
# Rows read at once.
READ_ROWS = 8192
# Of an item's radius that a search takes off its distance; chosen on validation data
# (benchmarks/retrieval.py): risky sentences find most with it, class names with 0.5.
RADIUS_SHARE = 0.75
# A table of more pieces than this, from as many small additions, is put together again.
MAX_FRAGMENTS = 256
# Versions that a power failure may tear: those of the last moments.
MOST_TORN = 3
# An older version of a table is kept this long for those who still read it.
OLD_VERSIONS_KEPT = timedelta(hours=1)
VECTORS = ("vector", "text_vector", "points")
VALID_FIELDS = re.compile(r"\W+valid fields are\b", re.IGNORECASE)
# Columns from which an item can be judged again.
ENCODED = (
    *("id", "source", "modality", "content_hash", "vector", "text_vector", "points", "channels"),
    *("cut", "text", "read_text", "error", "error_message"),
)


@dataclass(frozen=True)
class CollectionMeta:
    """What the vectors of a collection mean.

    Args:
        dim: D. c: curvature magnitude. geometry: lorentz or euclidean.
        model, taxonomy, policy: hashes. model_name: as given by the user.
        nodes: ids of the category scores, in their order.
        policy_name, rules, review: the policy itself, as in its file.
        reading: the model's hash in the results: with the reader of text in pictures, if any.
        reads: text in pictures was read.
        stamp: of this writing of the table; two tables never share one.
    """

    dim: int
    c: float
    geometry: str
    model: str
    taxonomy: str
    policy: str
    model_name: str
    nodes: tuple[str, ...]
    policy_name: str = "default"
    rules: Mapping[str, Any] = field(default_factory=dict)
    review: Mapping[str, float] = field(default_factory=dict)
    reading: str = ""
    reads: bool = False
    stamp: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)
    format: int = FORMAT

    def schema(self) -> pa.Schema:
        """Schema of the table, with these data as its metadata."""
        payload = json.dumps(asdict(self), ensure_ascii=False).encode()
        return _schema(self).with_metadata({METADATA_KEY: payload})

    def same(self, other: CollectionMeta) -> bool:
        """Whether rows of both may stand in one table."""
        one, two = (json.dumps(asdict(replace(m, stamp="")), sort_keys=True) for m in (self, other))
        return one == two


@dataclass(frozen=True)
class EncodedItem:
    """An item as the encoder saw it: with model and policy, all that its judgement depends on.

    Args:
        id, source, modality, content_hash, error: as in :class:`hysafe.types.Item`.
        points: tangent vectors [W, D] by channel (``image``, ``text``, ``ocr``); W > 1 where a
            long text went through several windows.
        cut: channels whose text was not read whole.
        text: the item's own text. read_text: what was read in its picture.
    """

    id: str
    source: str
    modality: Modality
    content_hash: str
    points: Mapping[str, np.ndarray]
    cut: frozenset[str] = frozenset()
    text: str = ""
    read_text: str = ""
    error: ErrorRecord | None = None


@dataclass(frozen=True)
class Row:
    """What a row of the table is written from.

    Args:
        item: the encoded item. result: its judgement.
        vector: tangent vector [D] of the item (the picture's, else the text's).
        text_vector: of the text of an item with a picture, read or given.
        scores: category scores [len(meta.nodes)].
    """

    item: EncodedItem
    result: Result
    vector: np.ndarray | None = None
    text_vector: np.ndarray | None = None
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class Decision:
    """What a person decided on an item.

    Args:
        id: of the item. rating: safe, unsafe or review.
        author: who. time: when, ISO 8601. reason: why, in words.
        content_hash: of what was decided on; a decision does not hold for other content.
    """

    id: str
    rating: Rating
    author: str
    time: str
    reason: str = ""
    content_hash: str = ""

    @property
    def moment(self) -> datetime:
        """The time; one without a zone is UTC."""
        parsed = datetime.fromisoformat(self.time)
        return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)

    @property
    def words(self) -> str:
        """The decision as a line to show."""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.author} decided {self.rating}, {self.time}{why}"


logger = logging.getLogger(__name__)


class Judge(Protocol):
    """What a collection asks of a model; :class:`hysafe.app.pipeline.SafetyModel` is one."""

    def rescore(self, collection: Collection, policy: Any = None, **options: Any) -> Any: ...

    def add(self, collection: Collection, paths: Sequence[str], **options: Any) -> Any: ...


class CollectionWriter:
    """Appends batches of results to a new table; the table is whole after every batch.

    A table that is there stays as an older version.

    Args:
        name: of the table in the folder.
    """

    def __init__(self, folder: Path, meta: CollectionMeta, *, name: str = TABLE) -> None:
        import lancedb

        self.meta = meta
        self._table = lancedb.connect(str(folder)).create_table(
            name, schema=meta.schema(), mode="overwrite"
        )

    @classmethod
    def write(cls, folder: Path, meta: CollectionMeta, batches: Iterable[Sequence[Row]]) -> int:
        """Write a whole table as one new version, which appears at the end or not at all.

        Returns:
            Number of the version.
        """
        encoded = (b for rows in batches for b in encode_rows(rows, meta).to_batches())
        return cls.write_columns(folder, meta, encoded)

    @classmethod
    def write_columns(
        cls, folder: Path, meta: CollectionMeta, batches: Iterable[pa.RecordBatch]
    ) -> int:
        """As :meth:`write`, with batches in the schema of `meta`."""
        return _write(folder, meta.schema(), batches)

    @classmethod
    def copy(cls, folder: Path, source: Collection, *, start: int = 0) -> int:
        """As :meth:`write`, with the rows of another table from place `start` on."""
        schema = replace(source.meta, stamp=uuid.uuid4().hex).schema()
        rows = (
            pa.RecordBatch.from_arrays(batch.columns, schema=schema)
            for batch in source.batches(start=start)
        )
        return _write(folder, schema, rows)

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows.

        Raises:
            ShapeError: an array has the wrong width.
        """
        self._table.add(encode_rows(rows, self.meta))


def _write(folder: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    import lancedb

    table = lancedb.connect(str(folder)).create_table(
        TABLE,
        data=pa.RecordBatchReader.from_batches(schema, batches),
        schema=schema,
        mode="overwrite",
        on_bad_vectors="null",  # an item without a point is no bad vector
    )
    return int(table.version)


def drop_table(folder: Path, name: str) -> None:
    """Remove a table with all its versions; one that is not there is no error."""
    import lancedb

    if (folder / f"{name}.lance").is_dir():
        lancedb.connect(str(folder)).drop_table(name)


def sync_table(folder: Path, name: str = TABLE) -> None:
    """See that the latest version of a table is on the disk, not only on its way there.

    The engine leaves that to the system, which forgets it when the power fails.
    """
    table = folder / f"{name}.lance"
    for part, newest in (("data", 1), ("_transactions", 1), ("_versions", 1)):
        try:
            with os.scandir(table / part) as listing:
                files = sorted(listing, key=lambda f: f.stat().st_mtime_ns)
            for path in (*(f.path for f in files[-newest:]), str(table / part)):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:  # a system that cannot do it for a folder, as Windows
            logger.debug("%s: not synced: %s", table / part, error)


def mend_table(folder: Path, name: str = TABLE) -> None:
    """Go back to the newest version of a table that can be opened, and its last row read.

    A version is torn where the power failed in the moment of its writing.

    Raises:
        CollectionError: none of the last versions can be opened; nothing is changed then.
    """
    import lancedb

    versions = folder / f"{name}.lance" / "_versions"
    torn: list[Path] = []
    while True:
        try:
            table = lancedb.connect(str(folder)).open_table(name)
            if rows := table.count_rows():  # the piece that was written last is whole
                table.take_offsets([rows - 1]).select(["id"]).to_arrow()
        except (OSError, ValueError, RuntimeError) as error:
            found = sorted(versions.glob("*.manifest"), key=lambda f: f.stat().st_mtime_ns)
            if not found and not torn:  # it was never written
                return
            if len(found) < 2 or len(torn) == MOST_TORN:  # this is something else
                for path in torn:
                    path.rename(path.with_suffix(".manifest"))
                detail = " ".join(str(error).split())[:300]
                raise CollectionError(
                    f"{folder}: the table {name} is damaged ({detail}). Move it away, or name "
                    "another folder."
                ) from error
            torn.append(found[-1].rename(found[-1].with_suffix(".torn")))
        else:
            if torn:
                logger.warning("%s: %d torn versions of %s are left out", folder, len(torn), name)
            return


def encode_rows(rows: Sequence[Row], meta: CollectionMeta) -> pa.Table:
    """Rows as a table in the collection's schema."""
    dim, schema = meta.dim, meta.schema()
    results = [r.result for r in rows]
    top = [r.paths[0] if r.paths else None for r in results]
    points = [_all_points(r, dim) for r in rows]
    columns: dict[str, Any] = {
        "id": [r.id for r in results],
        "source": [r.source for r in results],
        "modality": [r.modality for r in results],
        "content_hash": [r.hashes.content for r in results],
        "vector": _vectors([r.vector for r in rows], dim),
        "text_vector": _vectors([r.text_vector for r in rows], dim),
        "points": _lists(points, dim),
        "channels": [
            [name for name, p in r.item.points.items() for _ in range(len(p))] for r in rows
        ],
        "cut": [sorted(r.item.cut) for r in rows],
        "text": [_plain(r.item.text[:TEXT_KEPT]) for r in rows],
        "read_text": [_plain(r.item.read_text) for r in rows],
        "scores": _vectors([r.scores for r in rows], len(meta.nodes)),
        "rating": [r.rating for r in results],
        "p_unsafe": [r.p_unsafe for r in results],
        "node": [t.node if t else None for t in top],
        "novelty_policy": [r.novelty.policy for r in results],
        "novelty_distribution": [r.novelty.distribution for r in results],
        "radius": [r.radius for r in results],
        "error": [r.error.type if r.error else None for r in results],
        "error_message": [_plain(r.error.message) if r.error else None for r in results],
    }
    arrays = [
        v if isinstance(v, pa.Array) else pa.array(v, type=schema.field(k).type)
        for k, v in columns.items()
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


class Collection:
    """A scanned collection: ``Collection.open(DIR)`` on the folder of a scan.

    Attributes:
        meta: hashes, curvature, geometry.
    """

    def __init__(self, folder: Path, table: Any, meta: CollectionMeta) -> None:
        self.folder, self._table, self.meta = folder, table, meta
        self._index: PointIndex | None = None

    @classmethod
    def open(cls, folder: str | Path, *, name: str = TABLE) -> Collection:
        """Open the collection in a scan's output folder.

        Args:
            name: of the table in the folder.

        Raises:
            CollectionError: there is none, or it was not written by hysafe.
        """
        import lancedb

        folder = Path(folder)
        if not (folder / f"{name}.lance").is_dir():
            raise CollectionError(
                f"{folder}: no collection there. Make one: hysafe scan PATH --out DIR"
            )
        try:
            table = lancedb.connect(str(folder)).open_table(name)
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

    @property
    def version(self) -> int:
        """Version of the table; every change makes a new one."""
        return int(self._table.version)

    def to_arrow(self, columns: Iterable[str] | None = None) -> pa.Table:
        """All rows, in the order they were scanned."""
        query = self._table.search()
        if columns is not None:
            query = query.select(list(columns))
        return query.limit(None).to_arrow()

    def batches(
        self,
        columns: Iterable[str] | None = None,
        *,
        size: int | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Rows in batches of at most `size` (8,192), in the order they were scanned.

        Args:
            start, stop: places of the first row and of the one after the last; all rows by default.
        """
        query = self._table.search()
        if columns is not None:
            query = query.select(list(columns))
        place = 0
        for batch in query.limit(None).to_batches(size or READ_ROWS):
            first = max(0, start - place)
            last = batch.num_rows if stop is None else min(batch.num_rows, stop - place)
            place += batch.num_rows
            if first < last:
                yield batch.slice(first, last - first)
            if stop is not None and place >= stop:
                return

    def items(self, *, size: int | None = None) -> Iterator[list[EncodedItem]]:
        """All items as the encoder saw them, in batches."""
        for batch in self.batches(ENCODED, size=size):
            yield decode_rows(batch, self.meta)

    def take(self, rows: Sequence[int]) -> list[EncodedItem]:
        """Items by their place in the scan, in the order of `rows`."""
        table = self.take_table(rows, ENCODED)
        return decode_rows(table, self.meta)

    def take_table(self, rows: Sequence[int], columns: Iterable[str]) -> pa.Table:
        """Columns of some rows, in the order of `rows` (places in the scan)."""
        columns = list(columns)
        places = sorted(set(map(int, rows)))
        if not places:
            return pa.table({c: pa.array([], self._table.schema.field(c).type) for c in columns})
        table = self._table.take_offsets(places).select(columns).to_arrow()
        position = {place: i for i, place in enumerate(places)}
        return table.take([position[int(row)] for row in rows])

    def places(self, where: str | None = None) -> np.ndarray:
        """Places in the scan of the rows that an SQL filter holds for, ascending.

        Raises:
            ConfigError: the filter is not valid SQL, or names a column that is not there.
        """
        if where is None:
            return np.arange(len(self))
        try:
            query = self._table.search().where(where).select(["rating"]).with_row_id(True)
            found = query.limit(None).to_arrow()["_rowid"].to_numpy()
        except (ValueError, RuntimeError, OSError) as error:
            # the engine lists the columns too, with those of its own
            detail = VALID_FIELDS.split(" ".join(str(error).split()))[0][:300].rstrip(".")
            raise ConfigError(
                f"filter {where!r}: {detail}. Columns: {', '.join(self._table.schema.names)}."
            ) from error
        every = self._table.search().select(["rating"]).with_row_id(True).limit(None).to_arrow()
        return np.flatnonzero(np.isin(every["_rowid"].to_numpy(), found))

    def place_of(self, item_id: str) -> int:
        """Place in the scan of an item.

        Raises:
            ConfigError: no item has this id.
        """
        quoted = item_id.replace("'", "''")
        places = self.places(f"id = '{quoted}'")
        if not len(places):
            raise ConfigError(
                f"{self.folder}: no item has the id {item_id!r}. Ids stand in results.jsonl."
            )
        return int(places[0])

    # ------------------------------------------------------------ change

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows, judged by the collection's model under its policy."""
        self._table.add(encode_rows(rows, self.meta))

    def append_batches(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Add rows as :meth:`batches` gives them, of a table of the same kind."""
        schema = self.meta.schema()
        for batch in batches:
            self._table.add(pa.Table.from_arrays(batch.columns, schema=schema))

    def tidy(self, *, replaced: bool = False) -> None:
        """Put many small pieces together and forget old versions; rows and order stay.

        Args:
            replaced: the table has just been written as a whole.
        """
        pieces = self._table.stats()["fragment_stats"]["num_fragments"]
        if replaced or pieces > MAX_FRAGMENTS:
            self._table.optimize(cleanup_older_than=OLD_VERSIONS_KEPT)

    def rescore(self, model: Judge, policy: Any = None, **options: Any) -> Any:
        """Judge all items again under a policy; see :func:`hysafe.app.rescore.rescore`.

        A rescore in place makes a new version of the table: open the collection again to see it.
        """
        return model.rescore(self, policy, **options)

    def add(self, model: Judge, paths: Sequence[str], **options: Any) -> Any:
        """Scan more paths into the collection; see :func:`hysafe.app.scan.add`."""
        return model.add(self, paths, **options)

    # ------------------------------------------------------------ decisions of people

    def decisions(self) -> dict[str, Decision]:
        """The latest decision on each item, by id, as far as it holds for the item's content."""
        latest: dict[str, Decision] = {}
        for decision in self.all_decisions():
            known = latest.get(decision.id)
            if known is None or decision.moment >= known.moment:
                latest[decision.id] = decision
        if not latest:
            return {}
        wanted = pa.array(list(latest), pa.string())
        current: dict[str, str] = {}
        for batch in self.batches(["id", "content_hash"]):
            rows = batch.filter(pc.is_in(batch["id"], wanted))
            current.update(
                zip(rows["id"].to_pylist(), rows["content_hash"].to_pylist(), strict=True)
            )
        return {k: d for k, d in latest.items() if current.get(k) == d.content_hash}

    def all_decisions(self) -> list[Decision]:
        """All decisions, in the order they were imported."""
        import lancedb

        if not (self.folder / f"{DECISIONS}.lance").is_dir():
            return []
        table = lancedb.connect(str(self.folder)).open_table(DECISIONS)
        return [Decision(**row) for row in table.search().limit(None).to_arrow().to_pylist()]

    def decide(self, decisions: Sequence[Decision]) -> int:
        """Keep decisions beside the items; ones that are known already are not doubled.

        Args:
            decisions: their content hash is filled in from the item where it is "".

        Returns:
            How many were new.

        Raises:
            InputError: no item has the id, or the time is no ISO 8601 time. Nothing is kept then.
        """
        import lancedb

        table = self.to_arrow(["id", "content_hash"])
        current = dict(zip(table["id"].to_pylist(), table["content_hash"].to_pylist(), strict=True))
        known = set(self.all_decisions())
        new: dict[Decision, None] = {}
        for decision in decisions:
            if decision.id not in current:
                raise InputError(
                    f"{self.folder}: no item has the id {decision.id!r}. Ids stand in "
                    "results.jsonl."
                )
            try:
                _ = decision.moment
            except ValueError as error:
                raise InputError(
                    f"{decision.id}: time {decision.time!r} is not ISO 8601 ({error}). Write "
                    "2026-03-01T12:00:00Z."
                ) from error
            if not decision.content_hash:
                decision = replace(decision, content_hash=current[decision.id])
            if decision not in known:
                new[decision] = None
        if new:
            schema = pa.schema([pa.field(f.name, pa.string()) for f in fields(Decision)])
            rows = pa.Table.from_pylist([asdict(d) for d in new], schema=schema)
            database = lancedb.connect(str(self.folder))
            database.create_table(DECISIONS, schema=schema, exist_ok=True).add(rows)
        return len(new)

    # ------------------------------------------------------------ search

    @property
    def index(self) -> PointIndex:
        """The index of all points, built where it is missing or stale."""
        from hysafe.index.search import PointIndex

        if self._index is None or not self._index.fits(self):
            self._index = PointIndex.open(self)
        return self._index

    def search(
        self,
        query: Points,
        *,
        model: str,
        k: int = 50,
        where: str | None = None,
        approximate: bool | None = None,
        radius_share: float = RADIUS_SHARE,
        progress: Callable[[float], None] | None = None,
    ) -> list[list[Hit]]:
        """The k items nearest to each query, nearest first.

        Args:
            query: points [Q, D], encoded by the collection's model.
            model: hash of the model that encoded them, ``SafetyModel.hash``.
            where: SQL filter over the columns of the table.
            approximate: read only the part of the index nearest to the query; by default above two
                million points, if the collection has such an index.
            radius_share: of an item's radius is taken off its distance; 0 orders by distance alone.
            progress: called with the share done where an approximate index has to be made first.

        Raises:
            CollectionError: the query comes from another model.
        """
        self.check_model(model)
        near = self.index.ready(self, approximate, progress=progress)
        rows = None if where is None else self.places(where)
        return self.index.search(query, k, rows=rows, approximate=near, radius_share=radius_share)

    def like(
        self,
        item_id: str,
        *,
        k: int = 50,
        where: str | None = None,
        approximate: bool | None = None,
        radius_share: float = RADIUS_SHARE,
        progress: Callable[[float], None] | None = None,
    ) -> list[Hit]:
        """The k items nearest to an item of the collection (to any of its points), nearest first.

        Args:
            where, approximate, radius_share, progress: as in :meth:`search`.

        Raises:
            CollectionError: the item has no point.
        """
        from hysafe.index.search import nearest_of

        place = self.place_of(item_id)
        (item,) = self.take([place])
        if not item.points:
            raise CollectionError(
                f"{item_id}: the item could not be read, so it has no point. Take another one."
            )
        query = self.points(np.concatenate(list(item.points.values())))
        near = self.index.ready(self, approximate, progress=progress)
        rows = None if where is None else self.places(where)
        found = self.index.search(
            query, k + 1, rows=rows, approximate=near, radius_share=radius_share
        )
        # one more, for the item finds itself
        return [hit for hit in nearest_of(found, k + 1) if hit.row != place][:k]

    def points(self, tangents: np.ndarray) -> Points:
        """Points [n, D] of this collection's space from tangent vectors, in float64."""
        import torch

        from hysafe.geometry import Points

        v = torch.from_numpy(np.ascontiguousarray(tangents)).double()
        return Points.from_tangent(v, self.meta.c, self.meta.geometry)

    def check_model(self, model: str) -> None:
        """See that a model hash is that of the collection.

        Raises:
            CollectionError: it is another one: its points mean something else.
        """
        if model != self.meta.model:
            raise CollectionError(
                f"{self.folder}: scanned with the model {self.meta.model_name} "
                f"({self.meta.model}), and this is {model}. Points of two models cannot be "
                "compared: load the model of the scan, or scan again."
            )

    def vectors(self) -> tuple[list[str], np.ndarray]:
        """Ids and tangent vectors [n, D]; NaN rows for items without a point."""
        table = self.to_arrow(["id", "vector"])
        return table["id"].to_pylist(), matrix(table["vector"], self.meta.dim)


def decode_rows(batch: pa.RecordBatch | pa.Table, meta: CollectionMeta) -> list[EncodedItem]:
    """Items of rows with the columns :data:`ENCODED`."""
    data = {name: batch[name].to_pylist() for name in ENCODED if name not in VECTORS}
    vectors, texts = (matrix(batch[name], meta.dim) for name in ("vector", "text_vector"))
    many = batch["points"].to_pylist() if batch["points"].null_count < len(vectors) else None
    items = []
    for k, name in enumerate(data["id"]):
        channels = data["channels"][k]
        if many is not None and many[k] is not None:
            stack = np.array(many[k], dtype=np.float32).reshape(-1, meta.dim)
            points = {
                c: stack[[i for i, other in enumerate(channels) if other == c]]
                for c in dict.fromkeys(channels)
            }
        else:  # views: gathering them takes longer than all else here
            one = (vectors[k : k + 1], texts[k : k + 1])
            points = dict(zip(channels, one, strict=False))
        kind = data["error"][k]
        items.append(
            EncodedItem(
                name,
                data["source"][k],
                cast(Modality, data["modality"][k]),
                data["content_hash"][k],
                points,
                frozenset(data["cut"][k]),
                data["text"][k],
                data["read_text"][k],
                None if kind is None else ErrorRecord(kind, data["error_message"][k]),
            )
        )
    return items


@dataclass(frozen=True)
class PointColumn:
    """All points of one channel in a batch of rows.

    Args:
        row: int [P], ascending: the row that each point belongs to; a long text has several.
        vectors: tangent vectors [P, D], float32.
    """

    row: np.ndarray
    vectors: np.ndarray


def point_columns(batch: pa.RecordBatch, meta: CollectionMeta) -> dict[str, PointColumn]:
    """Points of rows with the columns :data:`ENCODED`, by channel: those of :func:`decode_rows`."""
    rows = batch.num_rows
    channels = batch["channels"]
    size = pc.fill_null(pc.list_value_length(channels), 0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(rows), size)
    if not len(row):
        return {}
    place = np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)
    names = channels.flatten().dictionary_encode()
    codes = names.indices.to_numpy()
    vectors, texts = (matrix(batch[name], meta.dim) for name in ("vector", "text_vector"))
    many = batch["points"].is_valid().to_numpy(zero_copy_only=False)
    stack = batch["points"].flatten().flatten().to_numpy().reshape(-1, meta.dim)
    listed = many[row]  # [P]
    at = np.cumsum(listed) - 1  # place in the stack of each listed point
    columns = {}
    for code, name in enumerate(names.dictionary.to_pylist()):
        chosen = np.flatnonzero(codes == code)
        own = row[chosen]
        if len(own) == rows and not place[chosen].any() and not many.any():
            columns[name] = PointColumn(own, vectors)
            continue
        found = np.where((place[chosen] == 0)[:, None], vectors[own], texts[own])
        part = listed[chosen]
        found[part] = stack[at[chosen][part]]
        columns[name] = PointColumn(own, found)
    return columns


def vector_column(values: np.ndarray, valid: np.ndarray | None = None) -> pa.Array:
    """Vectors [n, width] as a column; null where not `valid`."""
    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    mask = None if valid is None or valid.all() else pa.array(~valid)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=mask)


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
            # all points, where an item has more than these two; the channel of each point
            pa.field("points", pa.list_(vector)),
            pa.field("channels", pa.list_(pa.string())),
            pa.field("cut", pa.list_(pa.string())),
            pa.field("text", pa.string()),
            pa.field("read_text", pa.string()),
            pa.field("scores", pa.list_(pa.float32(), len(meta.nodes))),
            pa.field("rating", pa.string()),
            pa.field("p_unsafe", pa.float32()),
            pa.field("node", pa.string()),
            pa.field("novelty_policy", pa.float32()),
            pa.field("novelty_distribution", pa.float32()),
            pa.field("radius", pa.float32()),
            pa.field("error", pa.string()),
            pa.field("error_message", pa.string()),
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


def _all_points(row: Row, dim: int) -> np.ndarray | None:
    """All points [P, D] of an item that has more of them than `vector` and `text_vector` hold."""
    points = list(row.item.points.values())
    if len(points) <= 2 and all(len(p) == 1 for p in points):
        return None
    stack = np.concatenate(points).astype(np.float32)
    if stack.ndim != 2 or stack.shape[1] != dim:
        raise ShapeError(f"append: got points of shape {stack.shape}, wanted (P, {dim}).")
    return stack


def _lists(values: Sequence[np.ndarray | None], width: int) -> pa.Array:
    """Arrays [P, D] or None -> a column of lists of vectors."""
    sizes = [0 if v is None else len(v) for v in values]
    offsets: list[int | None] = [0]
    for size in sizes:
        offsets.append(int(offsets[-1] or 0) + size)
    ends = [None if v is None else offsets[k] for k, v in enumerate(values)] + offsets[-1:]
    rows = [v.reshape(-1) for v in values if v is not None]
    flat = pa.array(np.concatenate(rows) if rows else np.empty(0, np.float32), type=pa.float32())
    vectors = pa.FixedSizeListArray.from_arrays(flat, width)
    return pa.ListArray.from_arrays(pa.array(ends, type=pa.int32()), vectors)


def _plain(text: str) -> str:
    """Text that Arrow can hold: half surrogate pairs become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
