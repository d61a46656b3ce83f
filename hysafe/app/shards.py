"""Parquet shards: judged rows of a group of items, under a name that follows from the items.

A shard's name is a hash of what its rows depend on: the content, id and source of each item, the
model, the reader of text, the taxonomy and the policy. So a shard that stands need not be made
again, by whomever it was made, and two workers that make the same one write the same. It appears
whole or not at all: on a disk under another name first, in a store by one upload.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hysafe.app.output import result_line
from hysafe.app.pipeline import Judgement
from hysafe.data.remote import check_scheme, is_remote, join, locate, uploading, walk
from hysafe.errors import CollectionError, ConfigError, InputError
from hysafe.index import CollectionMeta
from hysafe.index.collection import encode_rows
from hysafe.types import Item

__all__ = ["LINE", "Shards", "shard_name", "shard_table"]

# Column of the line in results.jsonl, beside those of the table.
LINE = "line"
# Part of every name: raised when a shard holds something else.
VERSION = 1
DIGITS = 32
NAME = re.compile(rf"[0-9a-f]{{{DIGITS}}}\.parquet")
PART = re.compile(rf"\.[0-9a-f]{{{DIGITS}}}\.parquet\.[0-9a-f]+\.part")
# A shard takes no worker so long to write.
LEFT_SECONDS = 3600.0


def shard_name(items: Sequence[Item], meta: CollectionMeta) -> str:
    """Name of the shard that holds the rows of `items`, judged as `meta` says."""
    how = json.dumps(asdict(replace(meta, stamp="")), sort_keys=True)
    digest = hashlib.sha256(f"{VERSION}\n{how}\n".encode())
    for item in items:
        error = None if item.error is None else asdict(item.error)
        row = [item.id, item.source, item.modality, item.content_hash, error]
        digest.update(json.dumps(row).encode() + b"\n")
    return f"{digest.hexdigest()[:DIGITS]}.parquet"


def shard_table(judged: Sequence[Judgement], meta: CollectionMeta) -> pa.Table:
    """The rows of a shard."""
    table = encode_rows([j.row for j in judged], replace(meta, stamp=""))
    return table.append_column(LINE, pa.array([result_line(j.result) for j in judged], pa.string()))


@dataclass(frozen=True)
class Shards:
    """A folder of shards, local or an address.

    Args:
        place: the folder; every machine that works on the scan sees it by this name.
    """

    place: str

    def __post_init__(self) -> None:
        if self.remote and self.place.lower().startswith("memory:"):
            raise ConfigError(
                f"{self.place}: no other process sees it. Name a folder or an address that all do."
            )

    @property
    def remote(self) -> bool:
        return is_remote(self.place)

    def make(self) -> None:
        """Make the folder.

        Raises:
            InputError: it cannot be made, or is an address of a scheme that is not written.
        """
        if "://" in self.place:
            check_scheme(self.place)
            return
        try:
            os.makedirs(self.place, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.place}: cannot be made ({error.strerror}). Name another folder: --shards."
            ) from error

    def names(self) -> frozenset[str]:
        """Names of the shards that stand.

        Raises:
            InputError: the store does not answer.
        """
        if not self.remote:
            return frozenset(filter(NAME.fullmatch, os.listdir(self.place)))
        try:
            root = locate(self.place)
        except InputError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # nothing was written yet
                return frozenset()
            raise
        found = (f.file.name for f in walk(root) if f.file is not None)
        return frozenset(filter(NAME.fullmatch, found))

    def write(self, name: str, table: pa.Table) -> None:
        """Write a shard; one of this name is replaced.

        Raises:
            OSError, InputError: it cannot be written.
        """
        if self.remote:
            with uploading(self.place) as folder:
                pq.write_table(table, folder / name, compression="zstd")
            return
        part = os.path.join(self.place, f".{name}.{uuid.uuid4().hex}.part")
        try:
            with open(part, "wb") as stream:
                pq.write_table(table, stream, compression="zstd")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, os.path.join(self.place, name))
        except BaseException:
            if os.path.exists(part):
                os.remove(part)
            raise

    def read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A shard's rows.

        Raises:
            CollectionError: it is damaged, or gone.
        """
        where = join(self.place, name)
        try:
            if not self.remote:
                return pq.read_table(Path(self.place) / name, columns=columns, partitioning=None)
            file = locate(where).found[0].file
            if file is None:
                raise InputError(f"{where} is a folder.")
            with file.open() as stream:
                return pq.read_table(stream, columns=columns)
        except (OSError, InputError, pa.ArrowInvalid) as error:
            detail = " ".join(str(error).split())[:300]
            raise CollectionError(
                f"{where}: the shard cannot be read ({detail}). Remove it and run the same command "
                "again: it is made again."
            ) from error

    def with_errors(self, names: Sequence[str]) -> Iterator[str]:
        """Those among `names` that hold an item that could not be read."""
        for name in names:
            column = self.read(name, ["error"])["error"]
            if column.null_count < len(column):
                yield name

    def sweep(self) -> None:
        """Remove what killed workers left half written in a local folder, a while ago."""
        if self.remote:
            return
        for name in filter(PART.fullmatch, os.listdir(self.place)):
            with suppress(OSError):  # another scan may have been quicker
                path = Path(self.place, name)
                if time.time() - path.stat().st_mtime > LEFT_SECONDS:
                    path.unlink()
