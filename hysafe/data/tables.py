"""Rows of text and pictures from line files, JSONL and Parquet, one at a time.

A row that cannot be read is a :class:`Row` with its error; only a file that cannot be read on
raises. Rows are counted as their tools count them: lines from 1, Parquet rows from 0.
pyarrow stays behind this file and is imported when the first Parquet file is read.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from hysafe.data.files import (
    MAX_FILE_BYTES,
    MAX_TEXT_BYTES,
    decode_line,
    display_path,
    open_file,
    read_lines,
    read_picture,
)
from hysafe.errors import ConfigError, InputError
from hysafe.types import Modality

__all__ = [
    "IMAGE_COLUMNS",
    "TEXT_COLUMNS",
    "Columns",
    "Limits",
    "Row",
    "check_parquet_columns",
    "jsonl_rows",
    "line_rows",
    "parquet_rows",
]

# Names looked for, best first, whatever their case. `path` and `url` are left out on purpose: they
# are mostly metadata beside the picture itself, and nothing is ever fetched.
TEXT_COLUMNS = (
    *("text", "caption", "prompt", "content", "sentence", "body", "message", "comment"),
    *("description", "title"),
)
IMAGE_COLUMNS = (
    *("image", "img", "picture", "photo", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp"),
    *("image_path", "file_name"),
)

REMOTE = re.compile(r"[a-z][a-z0-9+.\-]+://", re.IGNORECASE)
DATA_URI = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)

BATCH_ROWS = 64  # Parquet rows held decoded at once; pictures can be large
READ_BUFFER = 1 << 20  # column chunks are streamed through this many bytes
# A damaged Parquet file may claim any number of rows: more lost rows than this are summed up.
MAX_LOST_ROWS = 100_000

logger = logging.getLogger(__name__)


class Columns(NamedTuple):
    """Names asked for by the user: None is found by name, "" leaves that side out."""

    text: str | None = None
    image: str | None = None


class Limits(NamedTuple):
    """Sizes in bytes above which a picture file or a text becomes an error row."""

    file_bytes: int = MAX_FILE_BYTES
    text_bytes: int = MAX_TEXT_BYTES


class Row(NamedTuple):
    """One row: its number, what was read, what it was meant to be, and why it failed."""

    number: int
    modality: Modality
    text: str | None = None
    image: bytes | None = None
    error: InputError | None = None


def line_rows(stream: BinaryIO, name: str, limits: Limits) -> Iterator[Row]:
    """One text per line; lines of white space only are passed over."""
    for number, line in read_lines(stream, name, limit=limits.text_bytes):
        if line is None:
            yield Row(number, "text", error=_too_long(limits.text_bytes))
        elif line.strip():
            try:
                yield Row(number, "text", text=_checked_text(decode_line(line), limits))
            except InputError as error:
                yield Row(number, "text", error=error)


def jsonl_rows(stream: BinaryIO, name: str, columns: Columns, limits: Limits) -> Iterator[Row]:
    """One JSON object per line with a text, a picture or both; blank lines are passed over.

    A picture is a path relative to the file `name`, a base64 data URI, or an object with `path`
    or `bytes` (base64).
    """
    # Base64 takes four bytes for three.
    limit = limits.file_bytes * 4 // 3 + limits.text_bytes
    folder = os.path.dirname(name)
    for number, line in read_lines(stream, name, limit=limit):
        if line is None:
            yield Row(number, "text", error=_too_long(limit))
        elif line.strip():
            try:
                record = _parse(line)
                text, image = _pick(record, columns)
            except InputError as error:
                yield Row(number, "text", error=error)
            else:
                yield _row(number, text, image, folder, limits, void="text")


def parquet_rows(stream: BinaryIO, name: str, columns: Columns, limits: Limits) -> Iterator[Row]:
    """Rows of a Parquet file, in batches, so that memory does not grow with the file.

    Pictures are Hugging Face structs ``{bytes, path}``, binary, or strings as in JSONL.

    Raises:
        InputError: not a Parquet file, or no column for text or pictures.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    damage = (pa.ArrowException, OSError, ValueError)
    try:
        # Without pre-buffering a row group is streamed and not loaded whole.
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=READ_BUFFER)
    except damage as error:
        raise InputError(
            f"{display_path(name)} is no readable Parquet file ({_first_line(error)}). "
            "Write it again, or give it the suffix of what it is."
        ) from error
    try:
        text, image = _parquet_columns(file.schema_arrow, columns)
    except ConfigError as error:
        raise InputError(f"{display_path(name)}: {error}") from error
    if text is None and image is None:
        raise InputError(
            f"{display_path(name)} has no column of text or pictures among "
            f"{_listed(file.schema_arrow.names)}. Name it: --text-column or --image-column."
        )
    logger.info("%s: text from %r, pictures from %r", display_path(name), text, image)
    modality = _modality(text, image)
    folder = os.path.dirname(name)
    wanted = [c for c in (text, image) if c is not None]
    number = 0
    for group in range(file.num_row_groups):
        end = number + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=wanted):
                cells = {c: batch.column(batch.schema.get_field_index(c)) for c in wanted}
                for i in range(batch.num_rows):
                    yield _parquet_row(number, cells, i, text, image, folder, limits)
                    number += 1
        except damage as error:
            yield from _lost_rows(number, end, modality, error)
        number = max(number, end)


def check_parquet_columns(path: str, columns: Columns) -> None:
    """See that columns named by the user are in a Parquet file.

    A file that is no readable Parquet passes: reading it will tell.

    Raises:
        ConfigError: a named column is missing or holds something else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_file(path) as stream:
            schema = pq.read_schema(stream)
    except (pa.ArrowException, OSError, ValueError):
        return
    try:
        _parquet_columns(schema, columns)
    except ConfigError as error:
        raise ConfigError(f"{display_path(path)}: {error}") from error


# --------------------------------------------------------------------------- records


def _parse(line: bytes) -> dict[str, Any]:
    text = decode_line(line)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"The line is not JSON ({_first_line(error)}). Write one JSON object per line."
        ) from error
    if not isinstance(record, dict):
        raise InputError(
            f"The line holds a JSON {type(record).__name__}, wanted an object such as "
            '{"text": "..."} or {"image": "a.jpg"}. For plain lines use the suffix .txt.'
        )
    return record


def _pick(record: dict[str, Any], columns: Columns) -> tuple[Any, Any]:
    """Values of text and picture in a JSON object; None where there is none."""
    names = {key.lower(): key for key in reversed(record) if record[key] is not None}

    def find(asked: str | None, known: tuple[str, ...]) -> Any:
        if asked is None:
            return next((record[names[k]] for k in known if k in names), None)
        if asked and asked not in record:
            raise InputError(f"No key {asked!r} in the object, which has {_listed(record)}.")
        return record.get(asked) if asked else None

    text, image = find(columns.text, TEXT_COLUMNS), find(columns.image, IMAGE_COLUMNS)
    if text is None and image is None:
        raise InputError(
            f"The object has neither text nor picture; its keys are {_listed(record)}. Add one, "
            "or name the key: --text-column or --image-column."
        )
    return text, image


def _row(number: int, text: Any, image: Any, folder: str, limits: Limits, *, void: Modality) -> Row:
    """Check both sides of a row. What could be read is kept beside the error.

    `void` is the modality of a row that holds nothing. An empty string, and a picture object
    without bytes and path, are nothing; zero bytes are an empty picture and an error.
    """
    if isinstance(text, str) and not text.strip():
        text = None
    if image == "" or (
        isinstance(image, Mapping) and image.get("bytes") is None and not image.get("path")
    ):
        image = None
    if text is None and image is None:
        problem = InputError("The row has neither text nor picture. Fill it or take it out.")
        return Row(number, void, error=problem)
    error: InputError | None = None
    good_text: str | None = None
    good_image: bytes | None = None
    if text is not None:
        try:
            good_text = _checked_text(text, limits)
        except InputError as problem:
            error = problem
    if image is not None:
        try:
            good_image = _picture(image, folder, limits)
        except InputError as problem:
            error = error or problem
    return Row(number, _modality(text, image), good_text, good_image, error)


def _checked_text(text: Any, limits: Limits) -> str:
    if not isinstance(text, str):
        raise InputError(f"The text is a {type(text).__name__}, wanted a string. Quote it.")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InputError(
            "The text holds half of a surrogate pair, which is no character. "
            "Write it again as UTF-8."
        ) from error
    if size > limits.text_bytes:
        raise _too_long(limits.text_bytes)
    return text


def _picture(value: Any, folder: str, limits: Limits) -> bytes:
    """Bytes of a picture field: bytes, {bytes, path}, data URI, or path relative to `folder`."""
    if isinstance(value, Mapping):
        inner = value.get("bytes")
        if isinstance(inner, str):
            return _from_base64(inner, limits)
        return _picture(value.get("path") if inner is None else inner, folder, limits)
    if isinstance(value, bytes):
        if not value:
            raise InputError("The picture is empty (0 bytes). Export or fetch it again.")
        if len(value) > limits.file_bytes:
            raise InputError(
                f"The picture has {len(value):,} bytes, more than the {limits.file_bytes:,} "
                "allowed. Scale it down, or raise the limit (max_file_bytes)."
            )
        return value
    if not isinstance(value, str) or not value:
        raise InputError(
            f"The picture field holds {'nothing' if not value else type(value).__name__}, wanted "
            "bytes, a path or a base64 data URI."
        )
    if match := DATA_URI.match(value):
        if not match.group().lower().endswith(";base64,"):
            raise InputError("The data URI is not base64. Write it as data:image/png;base64,...")
        return _from_base64(value[match.end() :], limits)
    if REMOTE.match(value):
        raise InputError(
            f"{value[:200]} is an address, and nothing is ever fetched. "
            "Download the picture and give its path."
        )
    path = os.path.join(folder, value)
    with open_file(path) as stream:
        return read_picture(stream, path, limit=limits.file_bytes)


def _from_base64(text: str, limits: Limits) -> bytes:
    if len(text) * 3 // 4 > limits.file_bytes + 3:
        raise InputError(
            f"The picture has more than the {limits.file_bytes:,} bytes allowed. "
            "Scale it down, or raise the limit (max_file_bytes)."
        )
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"The picture is not base64 ({error}). Encode it again.") from error
    return _picture(data, "", limits)


# --------------------------------------------------------------------------- Parquet


def _parquet_columns(schema: Any, columns: Columns) -> tuple[str | None, str | None]:
    """Names of the text and the picture column; ConfigError if a named one does not fit."""
    declared = _declared_images(schema)
    single = [name for name in schema.names if schema.names.count(name) == 1]
    names = {name.lower(): name for name in reversed(single)}

    def find(asked: str | None, known: tuple[str, ...], fits: Any, wanted: str) -> str | None:
        if asked is None:
            candidates = [names[k] for k in known if k in names]
            return next((c for c in candidates if fits(schema.field(c).type)), None)
        if asked == "":
            return None
        if asked not in single:
            problem = "more than one" if asked in schema.names else "no"
            raise ConfigError(f"{problem} column {asked!r} among {_listed(schema.names)}.")
        if not fits(schema.field(asked).type):
            raise ConfigError(
                f"column {asked!r} holds {schema.field(asked).type}, wanted {wanted}. "
                "Name another one."
            )
        return asked

    text = find(columns.text, TEXT_COLUMNS, _holds_text, "strings")
    image = find(
        columns.image,
        (*declared, *IMAGE_COLUMNS),
        _holds_pictures,
        "pictures as {bytes, path}, binary or path",
    )
    return text, image


def _declared_images(schema: Any) -> tuple[str, ...]:
    """Lower-case names of the columns that Hugging Face metadata declares as pictures."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(k.lower() for k, v in features.items() if v.get("_type") == "Image")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return ()


def _holds_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _holds_pictures(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return bool({"bytes", "path"} & {field.name for field in kind})
    return bool(
        _holds_text(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _parquet_row(
    number: int,
    cells: Mapping[str, Any],
    i: int,
    text: str | None,
    image: str | None,
    folder: str,
    limits: Limits,
) -> Row:
    try:
        values = [None if c is None else cells[c][i].as_py() for c in (text, image)]
    except (UnicodeDecodeError, ValueError) as error:
        problem = InputError(
            f"A string of the row is not UTF-8 ({_first_line(error)}). Write the column again."
        )
        problem.__cause__ = error
        return Row(number, _modality(text, image), error=problem)
    return _row(number, values[0], values[1], folder, limits, void=_modality(text, image))


def _lost_rows(start: int, end: int, modality: Modality, cause: Exception) -> Iterator[Row]:
    """Error rows for what a damaged row group held, so that every row is accounted for."""
    kept = min(end, start + MAX_LOST_ROWS)
    for number in range(start, kept):
        more = f" So are {end - kept:,} rows after it." if number == kept - 1 < end - 1 else ""
        error = InputError(
            f"The row lies in a damaged part of the file ({_first_line(cause)}). "
            f"Write the file again.{more}"
        )
        error.__cause__ = cause
        yield Row(number, modality, error=error)


# --------------------------------------------------------------------------- words


def _modality(text: Any, image: Any) -> Modality:
    if image is None:
        return "text"
    return "image" if text is None else "image+text"


def _too_long(limit: int) -> InputError:
    return InputError(
        f"The line or text is longer than the {limit:,} bytes allowed. "
        "Split it, or raise the limit (max_text_bytes)."
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _listed(names: Any) -> str:
    """The first names of a table, for a message."""
    shown = [str(name)[:40] for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
