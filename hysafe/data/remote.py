"""The one file that imports fsspec: locations such as ``s3://bucket/photos``, read and written.

Only what a user names on the command line is asked for, with the driver's own settings and
credentials. Listings are not kept, so that memory does not grow with them and a second scan sees
what is there by then. A driver's error, of whatever type, is an OSError here, so that it becomes
what a disk's becomes.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from hysafe.data.files import (
    HEAD_BYTES,
    PICTURE_SUFFIXES,
    display_path,
    explain,
    is_address,
    kind_of,
)
from hysafe.errors import InputError, MissingExtraError

__all__ = [
    *("Ahead", "Found", "RemoteFile", "Root", "SCHEMES", "ahead", "check_scheme", "is_remote"),
    *("join", "local_folder", "locate", "make_out", "opener_beside", "uploading", "walk"),
]

# Scheme -> what pip installs for it.
SCHEMES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "memory": "fsspec",
}
# Drivers that can do without remembering what they listed.
FORGETFUL = frozenset({"s3", "s3a", "gs", "gcs"})
GLOB = frozenset("*?[")

# A store answers one request in tens of milliseconds, and many of them at once: so many pictures
# are asked for ahead, while their encoded bytes do not exceed this.
READERS = 16
AHEAD_BYTES = 128 << 20
# Bytes of one request for a table. As much as :mod:`hysafe.data.tables` wants of a column at once.
TABLE_BUFFER = 1 << 20


def is_remote(path: str) -> bool:
    """Whether a path is an address that can be read: one of :data:`SCHEMES`."""
    return is_address(path) and path.partition("://")[0].lower() in SCHEMES


def check_scheme(address: str) -> None:
    """See that an address is of a scheme that is read and written.

    Raises:
        InputError: it is not.
    """
    if not is_remote(address):
        raise InputError(
            f"{display_path(address)}: of addresses, only those of "
            f"{', '.join(f'{scheme}://' for scheme in SCHEMES)} are read and written."
        )


@dataclass(frozen=True)
class RemoteFile:
    """An object that is there.

    Args:
        fs: the driver. path: its name of the object. address: ours. size: in bytes.
    """

    fs: Any
    path: str
    address: str
    size: int

    @property
    def name(self) -> str:
        return posixpath.basename(self.path.rstrip("/"))

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def __str__(self) -> str:
        return display_path(self.address)

    def open(self, mode: str = "rb") -> BinaryIO:
        """A buffered stream, for tables and tars. Only ``rb``."""
        assert mode == "rb", mode
        return io.BufferedReader(RemoteStream(self), TABLE_BUFFER)  # type: ignore[return-value]


class Root(NamedTuple):
    """A location of the command line.

    Args:
        address: as given. label: its name in ids.
        folder: the driver's name of the folder that items are read from; "" for a single object.
        found: a file, a folder, or what a pattern matches; or why it cannot be looked at.
    """

    address: str
    label: str
    folder: str
    found: tuple[Found, ...]


class Found(NamedTuple):
    """An entry of a listing: its id, and a file, a folder (driver and name) or an error."""

    key: str
    address: str
    file: RemoteFile | None = None
    folder: tuple[Any, str] | None = None
    error: InputError | None = None


def locate(address: str) -> Root:
    """What an address is, by one or two requests; a pattern is matched.

    A name that is there counts before a pattern of the same characters.

    Raises:
        InputError: nothing is there, no name after the scheme, or the store does not answer.
        MissingExtraError: the driver is not installed.
    """
    fs, path = _driver(address)
    if not path.strip("/"):
        raise InputError(
            f"{display_path(address)} names no bucket. Write {_scheme(address)}://BUCKET/PATH."
        )
    label = display_path(posixpath.basename(path.rstrip("/")))
    try:
        with _answers():
            info = fs.info(path)
    except FileNotFoundError as error:
        if GLOB & set(path):
            return _matches(address, fs, path)
        raise InputError(
            f"Nothing is at {display_path(address)}. Check the spelling, and that these credentials "
            "may see it."
        ) from error
    except PermissionError as error:  # it may be a picture: a row, as for a local file
        found = Found(label, address, error=explain(address, error))
        return Root(address, label, "", (found,))
    except OSError as error:
        raise explain(address, error) from error
    found = _found(fs, info, label, _scheme(address))
    return Root(address, label, path if found.folder else "", (found,))


def walk(root: Root) -> Iterator[Found]:
    """Files and errors of a location, depth first, entries of a folder sorted by name."""
    stack = list(reversed(root.found))
    scheme = _scheme(root.address)
    while stack:
        found = stack.pop()
        if found.folder is None:
            yield found
            continue
        fs, folder = found.folder
        try:
            stack.extend(reversed(_entries(fs, folder, found.key, scheme)))
        except OSError as error:
            problem = explain(found.address, error)
            yield Found(f"{found.key}/", found.address, error=problem)


class Ahead(NamedTuple):
    """An entry whose bytes are under way."""

    found: Found
    opened: Callable[[str], BinaryIO]  # gives the stream, or raises why there is none


def ahead(entries: Iterable[Found], *, limit: int) -> Iterator[Ahead]:
    """The entries in their order, with what is wanted of each asked for a while before.

    That is all of a picture of at most `limit` bytes, and the head of anything else.
    """
    waiting: deque[tuple[Found, Future[RemoteStream] | None, int]] = deque()
    held = 0
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="hysafe-read")
    try:
        for found in entries:
            future, cost = None, 0
            if found.file is not None:
                cost = found.file.size if found.file.size <= limit else HEAD_BYTES
                future = pool.submit(_prepared, found.file, limit)
            waiting.append((found, future, cost))
            held += cost
            while len(waiting) > READERS or (held > AHEAD_BYTES and len(waiting) > 1):
                done, future, cost = waiting.popleft()
                held -= cost
                yield Ahead(done, _opened(future))
        while waiting:
            done, future, _ = waiting.popleft()
            yield Ahead(done, _opened(future))
    finally:
        pool.shutdown(cancel_futures=True)


def opener_beside(table: RemoteFile, folder: str) -> Callable[[str], BinaryIO]:
    """Opens the pictures that a table's rows name by path: only below `folder`, never a local one.

    Args:
        folder: as in :class:`Root`.
    """
    # as os.path.join made it of the table's folder and the row's path
    here = os.path.dirname(table.address)

    def opened(path: str) -> BinaryIO:
        inner = path.removeprefix(f"{here}/")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(table.path), inner))
        if inner == path or inner.startswith("/") or not folder or not _below(target, folder):
            raise InputError(
                f"{display_path(path)[:300]} does not lie in the location that was given. "
                "A table's rows are followed only inside it: give the folder that holds both, or "
                "put the pictures into the table."
            )
        address = join(here, inner)
        try:
            with _answers():
                info = table.fs.info(target)
        except OSError as error:
            raise explain(address, error) from error
        file = _found(table.fs, info, "", _scheme(table.address)).file
        if file is None:
            raise InputError(f"{display_path(address)} is a folder. Name a picture.")
        return RemoteStream(file)  # type: ignore[return-value]

    return opened


# --------------------------------------------------------------------------- writing


@contextmanager
def uploading(address: str) -> Iterator[Path]:
    """A local folder whose files appear below an address when the body ends without an error.

    Raises:
        InputError: they cannot be written there. MissingExtraError: no driver.
    """
    fs, path = _driver(address)
    with tempfile.TemporaryDirectory(prefix="hysafe-upload-") as folder:
        yield Path(folder)
        for file in sorted(f for f in Path(folder).rglob("*") if f.is_file()):
            inner = file.relative_to(folder).as_posix()
            try:
                with _answers():  # no makedirs: it would make a bucket of a slip of the pen
                    fs.put_file(str(file), join(path, inner))
            except OSError as error:
                raise InputError(
                    f"{display_path(join(address, inner))}: cannot be written "
                    f"({error.strerror or error}). Check the address and the credentials."
                ) from error


def join(address: str, inner: str) -> str:
    """The address, or a driver's name, of something below another one."""
    return f"{address.rstrip('/')}/{inner}"


def make_out(out: Path) -> None:
    """Make the folder that ``--out`` names.

    Raises:
        InputError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {out}: cannot be made ({error.strerror}). Name another folder."
        ) from error


def local_folder(path: str | Path, what: str) -> Path:
    """`path`, which must be a local one.

    Raises:
        InputError: it is an address.
    """
    # pathlib makes s3:/bucket of s3://bucket
    scheme = str(path).partition(":/")
    if is_address(str(path)) or (scheme[1] and scheme[0].lower() in SCHEMES):
        raise InputError(
            f"{what} {path}: a collection is written and searched on a local disk only, for its lines, "
            "lock and index are files that grow and are mapped into memory. Name a local folder, and "
            "copy it there when it is done; `hysafe export` and `hysafe annotate` write to addresses."
        )
    return Path(path)


# --------------------------------------------------------------------------- listing


def _driver(address: str) -> tuple[Any, str]:
    """The driver of an address, and its name of it."""
    scheme = _scheme(address)
    try:
        import fsspec

        kind = fsspec.get_filesystem_class(scheme)
        options = {"use_listings_cache": False} if scheme in FORGETFUL else {}
        with _answers():
            fs = fsspec.filesystem(scheme, **options)
            fs.invalidate_cache()
    except ImportError as error:
        raise MissingExtraError(
            f"{display_path(address)}: {SCHEMES[scheme]} is not installed. "
            "pip install 'hysafe[remote]'"
        ) from error
    except OSError as error:
        raise explain(address, error) from error
    return fs, str(kind._strip_protocol(f"{scheme}://{address.partition('://')[2]}"))


def _matches(address: str, fs: Any, pattern: str) -> Root:
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if GLOB & set(part))
    folder = "/".join(parts[:first])
    label = display_path(posixpath.basename(folder)) or _scheme(address)
    try:
        with _answers():
            matched = fs.glob(pattern, detail=True)
    except OSError as error:
        raise explain(address, error) from error
    found: list[Found] = []
    last = ""
    for name in sorted(matched, key=lambda name: name.split("/")):
        if last and _below(name, last):  # read with its folder
            continue
        key = f"{label}/{display_path(name[len(folder) :].strip('/'))}"
        entry = _found(fs, matched[name], key, _scheme(address))
        last = name.rstrip("/") if entry.folder else last
        found.append(entry)
    if not found:
        raise InputError(
            f"Nothing matches {display_path(address)}. Check the spelling; * stands for a part of "
            "one name, ** for any folders."
        )
    return Root(address, label, folder, tuple(found))


def _entries(fs: Any, folder: str, key: str, scheme: str) -> list[Found]:
    """What a folder holds, sorted by name."""
    with _answers():
        listed = fs.ls(folder, detail=True)
    found = []
    for info in listed:
        name = str(info["name"])
        if name.rstrip("/") != folder.rstrip("/"):
            inner = display_path(posixpath.basename(name.rstrip("/")))
            found.append(_found(fs, info, f"{key}/{inner}", scheme))
        elif info["type"] == "directory":  # bucket/photos//a.jpg: a driver reads another name
            error = InputError(
                f"{display_path(_address(scheme, name))}/ holds names with an empty part, which "
                "cannot be read. Rename them."
            )
            found.append(Found(f"{key}//", _address(scheme, name), error=error))
        elif info["size"]:  # an object of that name: one of 0 bytes only stands for the folder
            found.append(_found(fs, info, f"{key}/", scheme))
    # a file and a folder may have one name
    return sorted(found, key=lambda f: (f.key, f.folder is not None))


def _found(fs: Any, info: dict[str, Any], key: str, scheme: str) -> Found:
    name, size = str(info["name"]), info.get("size")
    address = _address(scheme, name)
    if info["type"] == "directory":
        return Found(key, address, folder=(fs, name.rstrip("/")))
    if not isinstance(size, int):
        error = InputError(f"{display_path(address)}: its size is not known. Copy it first.")
        return Found(key, address, error=error)
    return Found(key, address, file=RemoteFile(fs, name, address, size))


def _address(scheme: str, name: str) -> str:
    return f"{scheme}://{name.lstrip('/')}"


def _scheme(address: str) -> str:
    return address.partition("://")[0].lower()


def _below(name: str, folder: str) -> bool:
    return name.startswith(f"{folder.rstrip('/')}/")


# --------------------------------------------------------------------------- bytes


class RemoteStream(io.RawIOBase):
    """Bytes of an object by ranges: a read of n bytes is one request, and gives n where there are.

    What is preloaded is asked for once.
    """

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file = file
        self._at = 0
        self._start = b""

    def preload(self, size: int) -> bytes:
        """The first bytes, at most `size`."""
        if len(self._start) < (size := min(size, self._file.size)):
            self._start += self._ask(len(self._start), size)
        return self._start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        stop = min(self._at + len(view), self._file.size)
        if stop <= self._at:
            return 0
        data = self._start[self._at : stop]
        if self._at + len(data) < stop:
            data += self._ask(self._at + len(data), stop)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _ask(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        with _answers():
            data = bytes(self._file.fs.cat_file(self._file.path, start=start, end=stop))
        if len(data) != stop - start:  # what is missing must not look like the end
            raise OSError(errno.EIO, f"{len(data)} bytes came of {stop - start}; it has changed")
        return data


def _prepared(file: RemoteFile, limit: int) -> RemoteStream:
    stream = RemoteStream(file)
    name = file.name.lower()
    # one request where the name tells; else the head is looked at first
    by_name = os.path.splitext(name)[1] in PICTURE_SUFFIXES and not name.startswith("._")
    if file.size <= limit and (
        by_name or kind_of(file.path, stream.preload(HEAD_BYTES)) == "picture"
    ):
        stream.preload(file.size)
    else:
        stream.preload(HEAD_BYTES)
    return stream


def _opened(future: Future[RemoteStream] | None) -> Callable[[str], BinaryIO]:
    def opened(path: str) -> BinaryIO:
        assert future is not None
        return future.result()  # type: ignore[return-value]

    return opened


@contextmanager
def _answers() -> Iterator[None]:
    """Give the error of a driver, which is of any type, as an OSError."""
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise OSError(errno.EIO, f"{type(error).__name__}: {lines[0][:200]}") from error
