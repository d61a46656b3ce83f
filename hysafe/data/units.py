"""The inputs of a scan in units: listed on one machine, read on another.

A :class:`Lister` finds what :class:`~hysafe.data.inputs.InputReader` would read, in its order, and
opens nothing; a :class:`UnitReader` reads a unit, and gives the items that an InputReader gives.
Where a unit ends depends on the names near by, not on the number of files before it: a file that
comes or goes changes the unit that it stands in, and no other.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from hysafe.data.files import kind_of, open_file
from hysafe.data.inputs import STDIN, InputReader
from hysafe.data.remote import Root, walk
from hysafe.errors import ConfigError
from hysafe.types import Item

__all__ = ["UNIT_BYTES", "UNIT_FILES", "Lister", "Unit", "UnitReader", "Unread"]

# Files of a unit on average, and the multiple of it at which a unit ends anyway.
UNIT_FILES, MOST = 1024, 4
# Tables of a unit end it at this size together: ten thousand lines of text, some hundred pictures.
UNIT_BYTES = 1 << 20
TABLES = frozenset({"parquet", "jsonl", "lines"})

T = TypeVar("T")


@dataclass(frozen=True)
class Unread(Item):
    """A file that is not opened yet: `source` opens it, `id` is its item's or begins its rows'.

    Args:
        named: it stands on the command line itself.
    """

    named: bool = False


@dataclass(frozen=True)
class Unit:
    """What one worker reads: local files, or objects of one location.

    Args:
        files: unread ones, and items for what cannot be looked at.
        root: the location, with the objects of this unit only. label: its name in ids.
    """

    files: tuple[Item, ...] = ()
    root: Root | None = None
    label: str = ""


class Lister(InputReader):
    """Lists the files under some paths; arguments as of :class:`InputReader`."""

    def units(self, files: int = UNIT_FILES) -> Iterator[Unit]:
        """Units in the order of a scan, lazily.

        Args:
            files: of a unit, on average.

        Raises:
            ConfigError: standard input is among the paths: no other machine can read it.
        """
        if any(path == STDIN for _, path in self._roots):
            raise ConfigError("'-': standard input is read on one machine only. Save it to a file.")
        local: list[tuple[str, str]] = []
        for label, path in self._roots:
            if path not in self._remote:
                local.append((label, path))
                continue
            yield from self._local(local, files)
            local = []
            root = self._remote[path]
            for part in _cut(walk(root), lambda f: (f.key, _weight_of(f.address, f.file)), files):
                yield Unit(root=root._replace(found=tuple(part)), label=label)
        yield from self._local(local, files)

    def _local(self, roots: list[tuple[str, str]], files: int) -> Iterator[Unit]:
        def found() -> Iterator[Item]:
            for label, path in roots:
                if os.path.isdir(path):
                    yield from self._folder(path, label)
                else:
                    yield from self._file(path, label, named=True)

        for part in _cut(found(), lambda item: (item.id, _weight_of(item.source)), files):
            yield Unit(tuple(part))

    def _file(
        self,
        path: str,
        key: str,
        *,
        named: bool,
        opened: Callable[[str], BinaryIO] = open_file,
        beside: Callable[[str], BinaryIO] | None = None,
    ) -> Iterator[Item]:
        yield Unread(key, path, "image", named=named)


class UnitReader(InputReader):
    """Reads units; arguments as of :class:`InputReader`, which sees that the paths are there."""

    def read(self, unit: Unit) -> Iterator[Item]:
        """The items of a unit. `skipped` counts those of this unit."""
        self._skipped.clear()
        if unit.root is not None:
            yield from self._address(unit.root, unit.label)
        for item in unit.files:
            if isinstance(item, Unread):
                yield from self._file(item.source, item.id, named=item.named)
            else:
                yield item


def _cut(
    entries: Iterable[T], look: Callable[[T], tuple[str, int]], files: int
) -> Iterator[list[T]]:
    """Entries in parts; `look` gives the name of an entry and the bytes of a table."""
    part: list[T] = []
    size = 0
    for entry in entries:
        name, weight = look(entry)
        if part and weight >= UNIT_BYTES:  # a large table stands alone
            yield part
            part, size = [], 0
        part.append(entry)
        size += weight
        ends = zlib.crc32(name.encode("utf-8", "surrogateescape")) % files == 0
        if ends or len(part) >= MOST * files or size >= UNIT_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _weight_of(path: str, file: object | None = None) -> int:
    """Bytes of a table by its name; 0 for what is none."""
    if kind_of(path, b"") not in TABLES:
        return 0
    size = getattr(file, "size", None)
    if size is not None:
        return int(size)
    try:
        return os.path.getsize(path)
    except OSError:  # reading it will tell
        return 0
