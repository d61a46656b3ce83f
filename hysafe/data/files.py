"""Bytes read with care: regular files only, a size limit, lines of bounded length.

Every failure is an :class:`~hysafe.errors.InputError` whose message names the problem and the
remedy and whose cause is the operating system's error.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import BinaryIO, Literal

from hysafe.errors import InputError
from hysafe.types import ErrorRecord

__all__ = [
    "HEAD_BYTES",
    "MAX_FILE_BYTES",
    "MAX_TEXT_BYTES",
    "PICTURE_SUFFIXES",
    "FileKind",
    "decode_line",
    "display_path",
    "error_record",
    "explain",
    "is_address",
    "kind_of",
    "open_file",
    "opening_with",
    "read_lines",
    "read_picture",
]

MAX_FILE_BYTES = 64 << 20  # an encoded picture
MAX_TEXT_BYTES = 256 << 10  # one text: 256 KiB, some 40,000 words
HEAD_BYTES = 64  # what `kind_of` wants to see

FileKind = Literal["picture", "parquet", "jsonl", "lines", "other"]

# Formats that are decoded, and others that a person would call a picture: those become a row with
# an error and a remedy instead of being passed over.
PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
    | {".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".ico", ".svg", ".psd", ".tga"}
    | {".dng", ".cr2", ".nef", ".arw"}
)
PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
LINES_SUFFIXES = frozenset({".txt", ".text"})

PICTURE_MAGIC = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",  # TIFF, then BigTIFF
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"8BPS\0\1",  # PSD
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"\0\0\0\x0cJXL ",
)
ISO_PICTURE_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"heim", b"hevc", b"mif1"})
BMP_HEADER_SIZES = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
PARQUET_MAGIC = b"PAR1"
# AppleDouble: macOS writes `._photo.jpg` beside photo.jpg in archives; it never holds a picture.
APPLE_DOUBLE_MAGIC = b"\0\5\x16\7"

WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
ADDRESS = re.compile(r"[a-z][a-z0-9+.\-]+://", re.IGNORECASE)
DRAIN_BYTES = 1 << 16
LONGEST_NAME = 300  # characters of a path in a message

# Causes worth naming in the report; every other one is an InputError.
NAMED_CAUSES = (
    *(FileNotFoundError, PermissionError, UnicodeDecodeError, json.JSONDecodeError),
    MemoryError,
)

# What opens files instead of the system, while the rows of a remote table are read.
_opener: ContextVar[Callable[[str], BinaryIO] | None] = ContextVar("opener", default=None)


def open_file(path: str) -> BinaryIO:
    """Open a regular file for reading; never blocks on a pipe or a device.

    Raises:
        InputError: missing, a dangling link, a link loop, no permission, not a regular file.
    """
    opener = _opener.get()
    if opener is not None:
        return opener(path)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise explain(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(
                f"{display_path(path)} is not a regular file. Save it to a file first, "
                "or pipe lines of text through '-'."
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@contextmanager
def opening_with(opener: Callable[[str], BinaryIO]) -> Iterator[None]:
    """While the body runs, :func:`open_file` asks `opener`: paths in a remote table are no local
    ones."""
    token = _opener.set(opener)
    try:
        yield
    finally:
        _opener.reset(token)


def read_picture(stream: BinaryIO, path: str, *, limit: int = MAX_FILE_BYTES) -> bytes:
    """All bytes of an open file, at most `limit`; a file that is too large is not read.

    Raises:
        InputError: empty, larger than `limit`, or it cannot be read.
    """
    try:
        size = _size(stream)
        data = stream.read(size + 1) if size <= limit else b""
        if size < len(data) <= limit:  # it grew since it was measured
            data += stream.read(limit + 1 - len(data))
    except OSError as error:
        raise explain(path, error) from error
    if max(size, len(data)) > limit:
        raise InputError(
            f"{display_path(path)} has {max(size, len(data)):,} bytes, more than the {limit:,} "
            "allowed for a picture. Scale it down, or raise the limit (max_file_bytes)."
        )
    if not data:
        raise InputError(f"{display_path(path)} is empty (0 bytes). Export or fetch it again.")
    return data


def read_lines(stream: BinaryIO, name: str, *, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Lines of a UTF-8 stream in bounded memory.

    Yields:
        (number from 1, line without its end), or (number, None) for a line over `limit` bytes,
        which is passed over without being kept. A byte order mark is removed.

    Raises:
        InputError: the stream cannot be read on, or is UTF-16 or UTF-32.
    """
    number = 0
    while True:
        try:
            line = stream.readline(limit + 2)  # room for \r\n
            long = len(line) == limit + 2 and not line.endswith(b"\n")
            while long and (more := stream.readline(DRAIN_BYTES)):
                if more.endswith(b"\n"):
                    break
        except OSError as error:
            raise explain(name, error) from error
        if not line:
            return
        number += 1
        if number == 1:
            if line.startswith(WIDE_BOMS):
                raise InputError(
                    f"{display_path(name)} is UTF-16 or UTF-32, wanted UTF-8. Convert it: "
                    "iconv -f UTF-16 -t UTF-8 FILE."
                )
            line = line.removeprefix(codecs.BOM_UTF8)
        line = line.rstrip(b"\r\n")
        yield number, None if long or len(line) > limit else line


def decode_line(line: bytes) -> str:
    """A line as text.

    Raises:
        InputError: not UTF-8, or it holds NUL bytes, as binary files and UTF-16 do.
    """
    if b"\0" in line:
        raise InputError(
            "The line holds NUL bytes: the file is binary or UTF-16, wanted UTF-8 text. "
            "Convert it (iconv -f UTF-16 -t UTF-8 FILE) or take it out."
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The line is not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}. "
            "Convert the file, for example iconv -f LATIN1 -t UTF-8 FILE."
        ) from error


def kind_of(path: str, head: bytes) -> FileKind:
    """What a file is: by content where content says so, else by suffix.

    Args:
        path: only its suffix is used.
        head: the first :data:`HEAD_BYTES` bytes.
    """
    suffix = os.path.splitext(path)[1].lower()
    if head.startswith(APPLE_DOUBLE_MAGIC):
        return "other"
    if _looks_like_picture(head) or suffix in PICTURE_SUFFIXES:
        return "picture"
    if head.startswith(PARQUET_MAGIC) or suffix in PARQUET_SUFFIXES:
        return "parquet"
    if suffix in JSONL_SUFFIXES:
        return "jsonl"
    if suffix in LINES_SUFFIXES:
        return "lines"
    return "other"


def is_address(path: str) -> bool:
    """Whether a path is written as ``scheme://...``."""
    return ADDRESS.match(path) is not None


def display_path(path: str) -> str:
    r"""A path that can be written as UTF-8: bytes that are no UTF-8 become ``\udcff``.

    Backslashes are doubled on POSIX, where they may be part of a name, so that two different
    paths never look alike.
    """
    path = path.replace("\\", "/") if os.sep == "\\" else path.replace("\\", "\\\\")
    return _printable(path)


def error_record(error: InputError) -> ErrorRecord:
    """An error as it stands in a result: the type of its cause where that says more."""
    cause = error.__cause__
    kind = type(cause) if isinstance(cause, NAMED_CAUSES) else type(error)
    return ErrorRecord(kind.__name__, _printable(str(error)))


def explain(path: str, error: OSError | ValueError) -> InputError:
    """The operating system's error about `path` as an InputError, which has it as its cause."""
    problem = InputError(_explanation(path, error))
    problem.__cause__ = error
    return problem


def _size(stream: BinaryIO) -> int:
    try:
        return os.fstat(stream.fileno()).st_size
    except io.UnsupportedOperation:  # no file of the system's
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        return size


def _looks_like_picture(head: bytes) -> bool:
    if head.startswith(PICTURE_MAGIC):
        return True
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return True
    if head[4:8] == b"ftyp" and head[8:12] in ISO_PICTURE_BRANDS:
        return True
    # "BM" alone would take a text about a BMW for a bitmap.
    return head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in BMP_HEADER_SIZES


def _explanation(path: str, error: OSError | ValueError) -> str:
    name = display_path(path).replace("\0", "\\0")
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}..."
    if is_address(path):
        return _remote_explanation(name, error)
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            target = display_path(os.readlink(path))
            return (
                f"{name} is a link to {target}, which does not exist. "
                "Restore the target or remove the link."
            )
        return f"{name} does not exist (any more). Restore it, or scan again without."
    if isinstance(error, PermissionError):
        return f"{name} may not be read by this user. Change that: chmod u+r."
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"{name} cannot be read ({reason}). Check the path and the disk."


def _remote_explanation(name: str, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{name} is not there (any more). Restore it, or scan again without."
    if isinstance(error, PermissionError):
        return f"{name} may not be read with these credentials. Allow it, or give others."
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
    return (
        f"{name} cannot be read ({reason}). Check the address, the credentials and the network; "
        "--retry reads it again."
    )


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
