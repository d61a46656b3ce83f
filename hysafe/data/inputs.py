"""From paths on the command line to undecoded items, lazily and in a stable order.

What is read:

- a picture file, whatever its suffix: content decides. A file with a picture's suffix is always
  an item; if it is none, decoding makes it an error row;
- a folder, recursively, entries sorted by name. Hidden files are read like all others: a picture
  must not escape moderation behind a dot. Linked folders are entered once, never in a loop;
- Parquet, JSONL (.jsonl, .ndjson) and lines of text (.txt), see :mod:`hysafe.data.tables`, also
  inside folders;
- the same at an address (``s3://bucket/photos``), or what a pattern there matches, see
  :mod:`hysafe.data.remote`;
- ``-``: lines of standard input.

Other files in a folder (.md, .pdf, ...) are passed over and counted; the same file named on the
command line is an error row. What cannot be looked at (permission, dangling link, vanished) may
be a picture and is an error row whatever its name: the scan fails closed. An error row is an
:class:`~hysafe.types.Item` with `error` set, and reading goes on.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

from hysafe.data.files import (
    HEAD_BYTES,
    MAX_FILE_BYTES,
    MAX_TEXT_BYTES,
    FileKind,
    display_path,
    error_record,
    explain,
    kind_of,
    open_file,
    opening_with,
    read_picture,
)
from hysafe.data.images import content_hash
from hysafe.data.remote import (
    SCHEMES,
    TABLE_BUFFER,
    Root,
    ahead,
    is_remote,
    locate,
    opener_beside,
    walk,
)
from hysafe.data.tables import (
    Columns,
    Limits,
    Row,
    check_parquet_columns,
    jsonl_rows,
    line_rows,
    parquet_rows,
)
from hysafe.errors import InputError
from hysafe.types import Item, Modality

__all__ = ["InputReader", "check_paths", "iter_items"]

STDIN = "-"

# Names that end like the id of a row, or like the escape itself, get the escape appended.
ROW_LIKE = re.compile(r"#(\d+|file)$")
# What a file that could not be opened was meant to hold; a table may hold both.
MODALITY_OF: dict[FileKind, Modality] = {
    "lines": "text",
    "jsonl": "image+text",
    "parquet": "image+text",
}
LONGEST_SUFFIX = 12  # longer ones are no suffixes, and would swell the count of skipped files

logger = logging.getLogger(__name__)


def iter_items(
    paths: Sequence[str],
    *,
    text_column: str | None = None,
    image_column: str | None = None,
    stdin: BinaryIO | None = None,
) -> Iterator[Item]:
    """All items under `paths`; :class:`InputReader` when the count of skipped files matters.

    Raises:
        InputError, ConfigError: at once, before the first item, as :func:`check_paths`.
    """
    return iter(InputReader(paths, text_column=text_column, image_column=image_column, stdin=stdin))


def check_paths(
    paths: Sequence[str], *, text_column: str | None = None, image_column: str | None = None
) -> None:
    """See that every path on the command line is there, before anything starts.

    A path that is there and cannot be read passes: it becomes an error row.

    Raises:
        InputError: no path at all, a path that does not exist, or standard input named twice; an
            address of a scheme that is not read, or whose store does not answer.
        MissingExtraError: the driver of an address is not installed.
        ConfigError: a column named by the user is not in a Parquet file among `paths`.
    """
    _checked(paths, Columns(text_column, image_column))


def _checked(paths: Sequence[str], columns: Columns) -> dict[str, Root]:
    """As :func:`check_paths`; the addresses among the paths, looked up."""
    if not paths:
        raise InputError(
            "No input. Name a picture, a folder, a .parquet, .jsonl or .txt file, '-'."
        )
    if list(paths).count(STDIN) > 1:
        raise InputError("Standard input ('-') is named more than once. Name it once.")
    local = [path for path in paths if path != STDIN and not is_remote(path)]
    missing = [path for path in local if not _exists(path)]
    if missing:
        shown = ", ".join(repr(display_path(path)) for path in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise InputError(
            f"No such file or folder: {shown}{more}. Check the spelling; paths start at "
            f"{display_path(os.getcwd())}, and addresses are not fetched but those of "
            f"{', '.join(f'{scheme}://' for scheme in SCHEMES)}."
        )
    remote = {path: locate(path) for path in dict.fromkeys(paths) if is_remote(path)}
    if columns.text or columns.image:
        for path in local:
            if os.path.isfile(path) and _kind(path) == "parquet":
                check_parquet_columns(path, columns)
        for path, root in remote.items():
            if not root.folder and (file := root.found[0].file) is not None:
                with opening_with(lambda _, file=file: file.open()):  # type: ignore[misc]
                    if _kind(path) == "parquet":
                        check_parquet_columns(path, columns)
    return remote


class InputReader:
    """Items under some paths; iterate over it.

    Ids are unique within a scan, stable between scans of the same paths and independent of the
    working directory: the name of the path, the path below it, ``#`` and the row
    (``photos/2024/a.jpg``, ``val.parquet#12``, ``notes.txt#3``, ``-#1``). Where two paths have the
    same name, the second is called ``photos~2``. Lines count from 1, Parquet rows from 0.

    Args:
        paths: files, folders, addresses and ``-``; checked at once by :func:`check_paths`.
        text_column: column or key of the text in Parquet and JSONL; None finds it by name, ""
            leaves texts out.
        image_column: the same for pictures.
        stdin: binary stream read for ``-``; None is the process's own.
        exclude: folders not to be entered, such as the output folder of the scan.
        max_file_bytes: a larger picture is an error row, and is not read.
        max_text_bytes: a longer text is an error row, and is not kept in memory.

    Attributes:
        skipped: files passed over so far, being neither pictures nor texts.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        text_column: str | None = None,
        image_column: str | None = None,
        stdin: BinaryIO | None = None,
        exclude: Sequence[str] = (),
        max_file_bytes: int = MAX_FILE_BYTES,
        max_text_bytes: int = MAX_TEXT_BYTES,
    ) -> None:
        self._columns = Columns(text_column, image_column)
        self._remote = _checked(paths, self._columns)
        self._roots = _labelled(paths, {path: root.label for path, root in self._remote.items()})
        self._stdin = stdin
        self._exclude = frozenset(os.path.realpath(path) for path in exclude)
        self._limits = Limits(max_file_bytes, max_text_bytes)
        self._skipped: Counter[str] = Counter()

    @property
    def skipped(self) -> int:
        return self._skipped.total()

    def __iter__(self) -> Iterator[Item]:
        self._skipped.clear()
        for label, path in self._roots:
            if path == STDIN:
                stream = sys.stdin.buffer if self._stdin is None else self._stdin
                yield from self._rows(line_rows(stream, STDIN, self._limits), STDIN, label, "lines")
            elif path in self._remote:
                yield from self._address(self._remote[path], label)
            elif os.path.isdir(path):
                yield from self._folder(path, label)
            else:
                yield from self._file(path, label, named=True)
        if self._skipped:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self._skipped.most_common(8))
            logger.info("skipped %d files, neither pictures nor texts: %s", self.skipped, kinds)

    def _folder(self, root: str, label: str) -> Iterator[Item]:
        """Depth first, with a stack: folders may be nested deeper than Python recurses."""
        real_root = os.path.realpath(root)
        seen: set[tuple[int, int]] = set()
        stack = [_Entry(root, label, "folder")]
        while stack:
            path, key, kind = stack.pop()
            if kind == "file":
                yield from self._file(path, key, named=False)
            elif kind == "special":
                self._skipped["(device)"] += 1
            elif self._exclude and os.path.realpath(path) in self._exclude:
                logger.debug("excluded: %s", path)
            elif kind == "linked folder" and not _leads_out(path, real_root):
                logger.debug("link not followed, its target is read anyway: %s", path)
            else:
                try:
                    status = os.stat(path)
                    if (status.st_dev, status.st_ino) not in seen:
                        seen.add((status.st_dev, status.st_ino))
                        stack.extend(reversed(_entries(path, key)))
                except OSError as error:
                    yield _error_item(f"{key}/", path, "image", explain(path, error))

    def _address(self, root: Root, label: str) -> Iterator[Item]:
        """A location that is no local path."""
        for found, opened in ahead(walk(root), limit=self._limits.file_bytes):
            key = label + found.key.removeprefix(root.label)
            if found.error is not None or found.file is None:
                error = found.error or InputError(f"{display_path(found.address)} is no file.")
                modality = MODALITY_OF.get(kind_of(found.address, b""), "image")
                yield _error_item(key, found.address, modality, error)
                continue
            beside = opener_beside(found.file, root.folder)
            named = not root.folder
            yield from self._file(found.address, key, named=named, opened=opened, beside=beside)

    def _file(
        self,
        path: str,
        key: str,
        *,
        named: bool,
        opened: Callable[[str], BinaryIO] = open_file,
        beside: Callable[[str], BinaryIO] | None = None,
    ) -> Iterator[Item]:
        """Items of a file.

        Args:
            opened: opens it. beside: opens the files that its rows name, where the system must not.
        """
        key = f"{key}#file" if ROW_LIKE.search(key) else key
        kind = kind_of(path, b"")
        try:
            with opened(path) as stream:
                kind = kind_of(path, stream.read(HEAD_BYTES))
                stream.seek(0)
                if kind == "picture":
                    yield self._picture(stream, path, key)
                elif kind != "other":
                    rows = self._table(stream, path, kind)
                    yield from self._rows(_opening(rows, beside), path, key, kind)
                elif named:
                    raise InputError(
                        f"{display_path(path)} is neither a picture nor a .parquet, .jsonl or .txt "
                        "file. Convert it, or pipe its lines through '-'."
                    )
                else:
                    suffix = os.path.splitext(path)[1].lower()
                    self._skipped[suffix if len(suffix) <= LONGEST_SUFFIX else "(other)"] += 1
        except InputError as error:
            yield _error_item(key, path, MODALITY_OF.get(kind, "image"), error)
        except OSError as error:
            yield _error_item(key, path, MODALITY_OF.get(kind, "image"), explain(path, error))

    def _table(self, stream: BinaryIO, path: str, kind: FileKind) -> Iterator[Row]:
        if isinstance(stream, io.RawIOBase):  # every read is a request
            stream = io.BufferedReader(stream, TABLE_BUFFER)
        if kind == "lines":
            return line_rows(stream, path, self._limits)
        rows = jsonl_rows if kind == "jsonl" else parquet_rows
        return rows(stream, path, self._columns, self._limits)

    def _picture(self, stream: BinaryIO, path: str, key: str) -> Item:
        data = read_picture(stream, path, limit=self._limits.file_bytes)
        return Item(
            id=key,
            source=display_path(path),
            modality="image",
            image=data,
            content_hash=content_hash(data, None),
        )

    def _rows(self, rows: Iterator[Row], path: str, key: str, kind: FileKind) -> Iterator[Item]:
        """Rows of a table as items; where the table cannot be read on, a last row says so."""
        mark = "#row " if kind == "parquet" else ":"
        try:
            for row in rows:
                yield Item(
                    id=f"{key}#{row.number}",
                    source=f"{display_path(path)}{mark}{row.number}",
                    modality=row.modality,
                    text=row.text,
                    image=row.image,
                    content_hash="" if row.error else content_hash(row.image, row.text),
                    error=error_record(row.error) if row.error else None,
                )
        except InputError as error:
            yield _error_item(key, path, MODALITY_OF[kind], error)


def _opening(rows: Iterator[Row], opener: Callable[[str], BinaryIO] | None) -> Iterator[Row]:
    """The rows, while they are made with files opened by `opener`."""
    if opener is None:
        yield from rows
        return
    while True:
        with opening_with(opener):
            row = next(rows, None)
        if row is None:
            return
        yield row


class _Entry(NamedTuple):
    path: str
    key: str
    kind: str  # "file", "folder", "linked folder" or "special"


def _entries(folder: str, key: str) -> list[_Entry]:
    """What a folder holds, sorted by name."""
    found = []
    with os.scandir(folder) as listing:
        for entry in listing:
            kind = "file"  # also links that lead nowhere: opening them tells why
            if entry.is_dir(follow_symlinks=False):
                kind = "folder"
            elif entry.is_symlink():
                kind = "linked folder" if os.path.isdir(entry.path) else "file"
            elif not entry.is_file(follow_symlinks=False):
                kind = "special"
            found.append(_Entry(entry.path, f"{key}/{display_path(entry.name)}", kind))
    return sorted(found)


def _leads_out(link: str, real_root: str) -> bool:
    """Whether a linked folder lies outside the tree, and is not one the tree itself lies in."""
    target = os.path.realpath(link)
    return not (_within(target, real_root) or _within(real_root, target))


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _exists(path: str) -> bool:
    """Whether there is something at `path`, be it a dangling link or out of reach."""
    try:
        os.lstat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _kind(path: str) -> FileKind:
    try:
        with open_file(path) as stream:
            return kind_of(path, stream.read(HEAD_BYTES))
    except (InputError, OSError):
        return "other"


def _labelled(paths: Sequence[str], known: Mapping[str, str]) -> list[tuple[str, str]]:
    """(label, path) with labels that differ: name, name~2, name~3; some names are known."""
    taken: set[str] = set()
    counts: Counter[str] = Counter()
    labelled = []
    for path in paths:
        name = path if path == STDIN else os.path.basename(os.path.abspath(path)) or "root"
        label = name = known.get(path) or display_path(name)
        counts[name] += 1
        while label in taken:
            label = f"{name}~{counts[name]}"
            counts[name] += label in taken
        taken.add(label)
        labelled.append((label, path))
    return labelled


def _error_item(key: str, path: str, modality: Modality, error: InputError) -> Item:
    return Item(id=key, source=display_path(path), modality=modality, error=error_record(error))
