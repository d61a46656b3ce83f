"""What a scan writes: a table and its lines, whole at every moment.

A scan appends to ``items.lance`` and ``results.jsonl``, batch by batch, as long as what stands there
is the beginning of what it finds. Where it is not (a picture came or went in between, or the policy
is another one), the scan fills ``next.lance`` and ``next.jsonl`` beside them, which take their place
when it is done. Lines are written before rows: after any end there are at least as many lines as
rows, and what stands beyond the rows, or is torn, is written again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hysafe.app.pipeline import Judgement
from hysafe.errors import CollectionError, HysafeError
from hysafe.index import Collection, CollectionMeta, CollectionWriter
from hysafe.index.collection import TABLE, drop_table, mend_table, sync_table
from hysafe.types import Item, NoveltyScores, Result

__all__ = ["RESULTS", "SAID", "Feed", "Output", "State", "result_line", "writing"]

RESULTS = "results.jsonl"
NEXT, NEXT_RESULTS = "next", "next.jsonl"
STATE = ".scan.json"
LINES = {TABLE: RESULTS, NEXT: NEXT_RESULTS}
# In a line of results.jsonl where a guard was asked; in a text the quotation marks are escaped.
SAID = b'"rationale": '

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The engine gives words only.
FULL_WORDS = ("no space left", "quota exceeded", "file too large", "os error 28", "os error 27")

log = logging.getLogger(__name__)


def result_line(result: Result) -> str:
    """Line of ``results.jsonl``: that of :meth:`hysafe.types.Result.to_dict`, without its copies."""
    return json.dumps(vars(result), default=_plain, ensure_ascii=False) + "\n"


def _plain(record: Any) -> Any:
    return record.to_dict() if isinstance(record, NoveltyScores) else vars(record)


class Feed:
    """Items one by one, of which the last can be given back."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._back: list[Item] = []

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        return self._back.pop() if self._back else next(self._items)

    def give_back(self, item: Item) -> None:
        """Make an item the next one."""
        self._back.append(item)


@dataclass(frozen=True)
class State:
    """What the tables do not say of themselves.

    Args:
        start: place in ``next`` of the first row of the scan that fills it.
    """

    start: int = 0

    @classmethod
    def load(cls, folder: Path) -> State:
        """The state of a folder; the first one where there is none."""
        try:
            data = json.loads((folder / STATE).read_text("utf-8"))
            return cls(int(data["start"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def save(self, folder: Path) -> None:
        """Write it as a whole."""
        temporary = folder / f"{STATE}.part"
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(asdict(self), stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(folder / STATE)


class Output:
    """A table and its lines, to which a scan appends.

    Args:
        collection: the table. name: of the table.
        start: place of the scan's first row.

    Attributes:
        rows: rows from `start` on that hold. size: bytes of their lines.
    """

    def __init__(self, collection: Collection, name: str = TABLE, *, start: int = 0) -> None:
        self.collection, self.name, self.start = collection, name, start
        self.folder = collection.folder
        self.rows = self.size = 0
        path = self.folder / LINES[name]
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        self._lines = os.fdopen(descriptor, "r+b", buffering=0)
        self._disk = ThreadPoolExecutor(1)  # waits for the disk while the scan goes on
        self._waiting: Future[None] | None = None

    @classmethod
    def open(cls, folder: Path, meta: CollectionMeta, *, fresh: bool = False) -> Output:
        """Where a scan goes on, or begins.

        Args:
            fresh: nothing that stands there counts; it stays until the scan is done.

        Raises:
            CollectionError: the table is damaged beyond repair.
        """
        following = None if fresh else _open(folder, NEXT)
        if following is not None and following.meta.same(meta):
            return cls(following, NEXT, start=State.load(folder).start)
        drop_table(folder, NEXT)
        (folder / NEXT_RESULTS).unlink(missing_ok=True)
        stored = _open(folder, TABLE)
        if stored is None:
            (folder / RESULTS).unlink(missing_ok=True)
            State().save(folder)
            CollectionWriter(folder, meta)
            return cls(Collection.open(folder))
        if stored.meta.same(meta) and not fresh:
            return cls(stored)
        return cls._next(folder, meta)

    @classmethod
    def _next(cls, folder: Path, meta: CollectionMeta) -> Output:
        State().save(folder)
        CollectionWriter(folder, meta, name=NEXT)
        return cls(Collection.open(folder, name=NEXT), NEXT)

    # ------------------------------------------------------------ what stands

    @property
    def left(self) -> int:
        """Rows after those that hold."""
        return len(self.collection) - self.start - self.rows

    def match(self, items: Feed, *, retry: bool = False) -> Iterator[tuple[Item, dict[str, Any]]]:
        """Items from the head of `items` that stand here, in the same order, with their lines.

        Args:
            items: the first item that does not is given back.
            retry: an item that could not be decoded or read does not count.
        """
        meta = self.collection.meta
        hashes = {"model": meta.reading, "taxonomy": meta.taxonomy, "policy": meta.policy}
        self._lines.seek(0)
        with open(self._lines.fileno(), "rb", closefd=False) as lines:
            for batch in self.collection.batches(["id", "content_hash"], start=self.start):
                names, contents = (batch[c].to_pylist() for c in ("id", "content_hash"))
                for name, content in zip(names, contents, strict=True):
                    item = next(items, None)
                    if item is None:
                        return
                    data = lines.readline()
                    line = _parsed(data)
                    stands = {"id": name, "hashes": {"content": content, **hashes}}
                    if line is None or not _holds(item, line, stands, retry):
                        items.give_back(item)
                        return
                    self.rows += 1
                    self.size += len(data)
                    yield item, line

    def match_all(self) -> None:
        """Take every row as it stands.

        Raises:
            CollectionError: there are fewer lines.
        """
        self._lines.seek(0)
        wanted = len(self.collection) - self.start
        with open(self._lines.fileno(), "rb", closefd=False) as lines:
            while self.rows < wanted and (data := lines.readline()).endswith(b"\n"):
                self.rows += 1
                self.size += len(data)
        if self.left:
            raise CollectionError(
                f"{self.folder}: {LINES[self.name]} has {self.rows} lines for {wanted} items. "
                "Write both again: hysafe rescore."
            )

    def restart(self) -> Output:
        """An output that begins with the rows that hold here, and ends with them.

        Rows after them stay where they are, to be known again.
        """
        first, last = self.start, self.start + self.rows
        if self.name == NEXT:
            following = Output(self.collection, NEXT, start=len(self.collection))
            State(following.start).save(self.folder)
        else:
            following = Output._next(self.folder, self.collection.meta)
            with (self.folder / LINES[self.name]).open("rb") as source:
                _copy(source, following._lines, self.size)
        following.size = self.size
        self.close()
        if last > first:
            source_rows = Collection.open(self.folder, name=self.name)
            following.collection.append_batches(source_rows.batches(start=first, stop=last))
        following.rows = self.rows
        return following

    # ------------------------------------------------------------ writing

    def cut(self) -> None:
        """Drop lines that have no row."""
        self._lines.truncate(self.size)

    def append(self, judged: Sequence[Judgement]) -> None:
        """Write a batch: its lines, then its rows."""
        data = "".join(result_line(j.result) for j in judged).encode()
        try:
            self._lines.seek(self.size)
            _write(self._lines, data)
            self.collection.append([j.row for j in judged])
        except Exception:
            self._lines.truncate(self.size)
            raise
        self.size += len(data)
        self.rows += len(judged)
        self._wait()
        self._waiting = self._disk.submit(self._sync)

    def finish(self) -> None:
        """Take the place of what stood there before, where this is not it already."""
        self._wait()
        if self.name == NEXT:
            CollectionWriter.copy(self.folder, self.collection, start=self.start)
            sync_table(self.folder)
            self.close()
            (self.folder / NEXT_RESULTS).replace(self.folder / RESULTS)
            drop_table(self.folder, NEXT)
        State().save(self.folder)
        Collection.open(self.folder).tidy(replaced=self.name == NEXT)

    def close(self) -> None:
        self._disk.shutdown()
        self._lines.close()

    def _sync(self) -> None:
        os.fsync(self._lines.fileno())
        sync_table(self.folder, self.name)

    def _wait(self) -> None:
        if self._waiting is not None:
            self._waiting.result()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Give the system's refusal to write its remedy.

    Raises:
        CollectionError: the disk is full, or cannot be written.
    """
    try:
        yield
    except HysafeError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        # the engine's errors are of many types and all say who speaks
        if not isinstance(error, OSError) and "lance" not in str(error).lower():
            raise
        detail = " ".join(str(error).split())[:300]
        if _full(error):
            raise CollectionError(
                f"{folder}: no space is left on the disk ({detail}). What was written is kept. Free "
                "some space, or move the folder to a larger disk, and run the same command again: "
                "it goes on from there."
            ) from error
        raise CollectionError(
            f"{folder}: cannot be written ({detail}). What was written is kept. See that the disk "
            "is there and writable, and run the same command again: it goes on from there."
        ) from error


def _full(error: BaseException) -> bool:
    words = str(error).lower()
    return getattr(error, "errno", None) in FULL or any(w in words for w in FULL_WORDS)


def _open(folder: Path, name: str) -> Collection | None:
    """A table; None where there is none that this version of hysafe reads."""
    if not (folder / f"{name}.lance").is_dir():
        return None
    mend_table(folder, name)
    try:
        return Collection.open(folder, name=name)
    except CollectionError as error:
        log.warning("%s It is replaced.", error)
        return None


def _parsed(data: bytes) -> dict[str, Any] | None:
    """A line; None for one that is torn or missing."""
    try:
        line = json.loads(data) if data.endswith(b"\n") else None
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _holds(item: Item, line: dict[str, Any], stands: dict[str, Any], retry: bool) -> bool:
    """Whether an item's line, and the row that `stands` beside it, are those of the item now."""
    wanted = {"id": item.id, "source": item.source, "modality": item.modality}
    if any(line.get(k) != v for k, v in wanted.items()):
        return False
    if any(line.get(k) != v for k, v in stands.items()):
        return False
    if stands["hashes"]["content"] != item.content_hash:
        return False
    if item.error is not None:
        return bool(line.get("error") == asdict(item.error))
    return not (retry and line.get("error"))


def _copy(source: Any, target: Any, size: int) -> None:
    while size > 0:
        data = source.read(min(size, 1 << 20))
        if not data:
            raise CollectionError("the lines of the scan became shorter while they were copied.")
        _write(target, data)
        size -= len(data)


def _write(stream: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]
