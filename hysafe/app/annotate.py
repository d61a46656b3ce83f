"""Shards in, the same shards with rating, nodes and novelty out, and an audit by node.

A Parquet shard gets columns, a webdataset shard (a ``.tar`` of KEY.jpg, KEY.txt, ...) a member
KEY.hysafe.json after each sample. Of a tar only regular files with plain names and known suffixes
are read and carried over; nothing is unpacked to the disk.
"""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hysafe.app.pipeline import SafetyModel, ScanOptions
from hysafe.data.files import MAX_FILE_BYTES, MAX_TEXT_BYTES, error_record, is_address
from hysafe.data.images import content_hash
from hysafe.data.inputs import InputReader
from hysafe.data.remote import (
    RemoteFile,
    check_scheme,
    is_remote,
    locate,
    make_out,
    uploading,
    walk,
)
from hysafe.data.tables import TEXT_COLUMNS
from hysafe.errors import InputError
from hysafe.taxonomy import Policy, Taxonomy
from hysafe.types import Item, Modality, Result

__all__ = ["AUDIT", "Audit", "annotate", "shard_paths"]

AUDIT = "audit.json"
PREFIX = "hysafe_"
BATCH = 256
ROW = re.compile(r".*#row (\d+)")
PARQUET, TAR = ".parquet", ".tar"
# Members of a tar that are read, and the one that is written.
PICTURES = frozenset({"jpg", "jpeg", "png", "webp"})
TEXTS = frozenset({"txt", "json"})
ANSWER = "hysafe.json"
# What tarfile raises where a tar is damaged.
DAMAGE = (tarfile.TarError, ValueError, EOFError)

Shard = Path | RemoteFile

log = logging.getLogger(__name__)


@dataclass
class Audit:
    """What a data set holds, by node.

    Attributes:
        shards, items: counts. ratings, errors: items of each.
        nodes: node id -> rating -> items to which the node or one below it applies.
        left_out: members of tars that are not in the output, by suffix.
    """

    shards: int = 0
    items: int = 0
    ratings: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    nodes: dict[str, Counter[str]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, result: Result, taxonomy: Taxonomy) -> None:
        """Count an item."""
        self.items += 1
        self.ratings[result.rating] += 1
        if result.error:
            self.errors[result.error.type] += 1
        for node in {n for p in result.paths for n in taxonomy.path(p.node).ids}:
            self.nodes.setdefault(node, Counter())[result.rating] += 1

    def to_dict(self, taxonomy: Taxonomy) -> dict[str, Any]:
        """Plain data; nodes in the order of the taxonomy."""
        return {
            "shards": self.shards,
            "items": self.items,
            "ratings": dict(self.ratings),
            "errors": dict(self.errors),
            "left_out": dict(self.left_out),
            "nodes": {
                n.id: {"name": n.name, **self.nodes[n.id]} for n in taxonomy if n.id in self.nodes
            },
        }


def shard_paths(paths: Sequence[str]) -> list[Shard]:
    """Parquet files and tars under paths and addresses, in a stable order.

    Raises:
        InputError: a path is no shard or folder of them, or two have one name.
        MissingExtraError: the driver of an address is not installed.
    """
    found: list[Shard] = []
    for path in paths:
        files = _remote_shards(path) if is_remote(path) else _local_shards(Path(path))
        if not files:
            raise InputError(f"{path}: no Parquet file or .tar, nor a folder of them.")
        found += files
    names = Counter(f.name for f in found)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputError(
            f"{twice[0]}: {names[twice[0]]} shards have this name, and would be written to one "
            "file. Annotate their folders one by one."
        )
    return found


def _local_shards(path: Path) -> Sequence[Shard]:
    files = [path] if not path.is_dir() else sorted(path.rglob("*"))
    return [f for f in files if f.suffix in (PARQUET, TAR) and f.is_file()]


def _remote_shards(address: str) -> Sequence[Shard]:
    files = []
    for found in walk(locate(address)):
        if found.error is not None:  # a shard that cannot be seen would be left out
            raise found.error
        if found.file is not None and found.file.suffix in (PARQUET, TAR):
            files.append(found.file)
    return files


def annotate(
    shards: Sequence[str],
    out: str | Path,
    model: SafetyModel,
    *,
    policy: Policy | None = None,
    ocr: Any | None = None,
    options: ScanOptions | None = None,
    text_column: str | None = None,
    image_column: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """Write every shard again with our judgements, row for row, and an audit beside them.

    The columns are ``hysafe_rating``, ``_p_unsafe``, ``_node``, ``_nodes``, ``_novelty_policy``,
    ``_novelty_distribution``, ``_reason`` and ``_error``; columns of these names are replaced. In a
    tar these are the keys of KEY.hysafe.json, without the prefix.

    Args:
        shards: Parquet files, tars in webdataset's form, or folders of them; also addresses.
        out: folder, made if missing, or an address; not that of a shard. At an address a shard
            appears when it is whole.
        model, policy, ocr, options: see :meth:`SafetyModel.judge`.
        text_column, image_column: of Parquet; "" leaves that side out. In a tar, `text_column` is a
            key of KEY.json.

    Raises:
        InputError: a shard is damaged or has nothing to judge, or `out` cannot be written.
    """
    files = shard_paths(shards)
    if is_address(str(out)):
        check_scheme(str(out))
        out = str(out).rstrip("/")
    else:
        out = Path(out)
        make_out(out)
    if any(_folder_of(f) == (out if isinstance(out, str) else out.resolve()) for f in files):
        raise InputError(f"--out {out}: the shards stand there. Name another folder.")
    view = model.view(policy)
    audit = Audit()
    for file in files:
        tar = file.suffix == TAR
        items = (
            _tar_items(file, audit.left_out, text_column, image_column)
            if tar
            else InputReader([_address(file)], text_column=text_column, image_column=image_column)
        )
        results = (j.result for j in model.judge(items, policy=policy, ocr=ocr, options=options))
        with _writable(out) as folder:
            for result in (_write_tar if tar else _write)(file, folder / file.name, results):
                audit.add(result, view.taxonomy)
                if progress:
                    progress(audit.items)
        audit.shards += 1
    summary = {
        **audit.to_dict(view.taxonomy),
        "model": model.hash_with(ocr),
        "taxonomy": view.taxonomy.hash,
        "policy": view.policy.hash,
    }
    if audit.left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in audit.left_out.most_common(8))
        log.warning("members of tars that are no known samples were left out: %s", kinds)
    with _writable(out) as folder:
        made = json.dumps(summary, ensure_ascii=False, indent=1) + "\n"
        (folder / AUDIT).write_text(made, "utf-8")
    return audit


@contextmanager
def _writable(out: str | Path) -> Iterator[Path]:
    """A folder whose files are in `out` in the end."""
    if isinstance(out, Path):
        yield out
    else:
        with uploading(out) as folder:
            yield folder


def _address(file: Shard) -> str:
    return file.address if isinstance(file, RemoteFile) else str(file)


def _folder_of(file: Shard) -> str | Path:
    if isinstance(file, RemoteFile):
        return file.address.rpartition("/")[0]
    return file.resolve().parent


def _write(file: Shard, target: Path, results: Iterator[Result]) -> Iterator[Result]:
    """Write one shard with its results beside its rows; yields the results."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ours = _columns([]).schema
    partial = target.with_name(target.name + ".part")
    writer, row = None, 0
    try:
        shard = pq.ParquetFile(file.open() if isinstance(file, RemoteFile) else file)
        kept = [n for n in shard.schema_arrow.names if n not in ours.names]
        for batch in shard.iter_batches(BATCH):
            found = list(islice(results, batch.num_rows))
            _check(file, found, row, batch.num_rows)
            row += batch.num_rows
            table = pa.Table.from_batches([batch]).select(kept)
            for column in (annotated := _columns(found)).column_names:
                table = table.append_column(column, annotated[column])
            table = table.replace_schema_metadata(shard.schema_arrow.metadata)
            if writer is None:
                writer = pq.ParquetWriter(partial, table.schema)
            writer.write_table(table)
            yield from found
        if writer is None:  # no rows
            schema = pa.schema([shard.schema_arrow.field(n) for n in kept] + list(ours))
            writer = pq.ParquetWriter(partial, schema.with_metadata(shard.schema_arrow.metadata))
        writer.close()
    except pa.ArrowException as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: damaged ({detail}). Fetch it again.") from error
    except OSError as error:
        raise _unwritten(file, target, error) from error
    else:
        partial.replace(target)
    finally:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)


def _unwritten(file: Shard, target: Path, error: OSError) -> InputError:
    if isinstance(file, RemoteFile):
        return InputError(
            f"{file}: cannot be read on, or its copy {target} not written ({error}). Check the "
            "network, and the space on the disk."
        )
    return InputError(f"{target}: {error}. Free some space or name another folder.")


def _check(file: Shard, found: Sequence[Result], first: int, wanted: int) -> None:
    """See that results stand beside their own rows."""
    numbers = [int(m[1]) if (m := ROW.fullmatch(r.source)) else -1 for r in found]
    if numbers != list(range(first, first + wanted)):
        why = f" ({found[0].error.message})" if found and found[0].error else ""
        raise InputError(
            f"{file}: rows from {first} on could not be read one by one{why}. Is it damaged, or "
            "has it no column of texts or pictures?"
        )


# ---------------------------------------------------------------- tars


class _Sample(NamedTuple):
    """Consecutive members of one key: (suffix, member)."""

    key: str
    members: list[tuple[str, tarfile.TarInfo]]


def _samples(
    file: Shard, shard: tarfile.TarFile, left_out: Counter[str] | None = None
) -> Iterator[_Sample]:
    """Samples of a shard in their order, each to be read before the next is asked for.

    Args:
        left_out: counts the members that belong to none, by suffix.
    """
    sample: _Sample | None = None
    while (member := shard.next()) is not None:
        shard.members.clear()  # type: ignore[attr-defined]  # kept until the end otherwise
        key, suffix = _key(member)
        if suffix not in PICTURES | TEXTS:
            if suffix != ANSWER and left_out is not None:
                left_out[f".{suffix}" if suffix else "(other)"] += 1
            continue
        if sample is not None and key != sample.key:
            yield sample
            sample = None
        sample = sample or _Sample(key, [])
        sample.members.append((suffix, member))
    if sample is not None:
        yield sample
    with file.open("rb") as stream:  # tarfile takes a damaged header for the end
        stream.seek(shard.offset)
        if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no valid header at byte {shard.offset}")


def _key(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and suffix of a member; no suffix for one that must not be touched."""
    *folders, name = member.name.removeprefix("./").split("/")
    stem, _, suffix = name.partition(".")
    parts = [*folders, stem, suffix]
    plain = all(p and p not in (".", "..") and p.isprintable() for p in parts)
    if not plain or set("\\:") & set(member.name) or not member.isreg() or member.issparse():
        return "", ""
    return "/".join((*folders, stem)), suffix.lower()


def _tar_items(
    file: Shard, left_out: Counter[str], text_column: str | None, image_column: str | None
) -> Iterator[Item]:
    """Samples of a shard as items."""
    with _opened(file) as shard:
        for sample in _samples(file, shard, left_out):
            pictures = [m for suffix, m in sample.members if suffix in PICTURES]
            texts = [(suffix, m) for suffix, m in sample.members if suffix in TEXTS]
            if image_column == "":
                pictures = []
            if text_column == "":
                texts = []
            name, source = f"{file.name}#{sample.key}", f"{file}#{sample.key}"
            try:
                image = _picture(shard, pictures)
                text = _text(shard, texts, text_column)
                if image is None and text is None:
                    raise InputError(f"{sample.key}: neither text nor picture. Add one.")
            except InputError as error:
                meant = _modality(bool(pictures), bool(texts))
                yield Item(name, source, meant, error=error_record(error))
                continue
            modality = _modality(image is not None, text is not None)
            yield Item(name, source, modality, text, image, content_hash(image, text))


def _modality(image: bool, text: bool) -> Modality:
    if image:
        return "image+text" if text else "image"
    return "text"


def _picture(shard: tarfile.TarFile, members: Sequence[tarfile.TarInfo]) -> bytes | None:
    if len(members) > 1:
        raise InputError(f"{members[1].name}: a second picture of its key. Give it another key.")
    data = _content(shard, members[0], MAX_FILE_BYTES) if members else None
    if data == b"":
        raise InputError(f"{members[0].name} is empty (0 bytes). Export or fetch it again.")
    return data


def _text(
    shard: tarfile.TarFile, members: Sequence[tuple[str, tarfile.TarInfo]], column: str | None
) -> str | None:
    """Text of KEY.txt, else that of KEY.json; None for none."""
    suffixes = [suffix for suffix, _ in members]
    if len(set(suffixes)) < len(suffixes):
        raise InputError(f"{members[-1][1].name}: a second text of its key. Give it another key.")
    wanted = "json" if column or "txt" not in suffixes else "txt"
    for suffix, member in members:
        if suffix != wanted:
            continue
        try:
            text = _content(shard, member, MAX_TEXT_BYTES).decode("utf-8-sig")
            if wanted == "json":
                text = _of_json(json.loads(text), column)
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"{member.name}: no text ({error}). Write UTF-8.") from error
        return text if text.strip() else None
    return None


def _of_json(record: Any, column: str | None) -> str:
    """The text of a KEY.json, "" for none."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        return ""
    if column:
        value = record.get(column)
    else:
        found = {k.lower(): v for k, v in record.items()}
        value = next((found[n] for n in TEXT_COLUMNS if found.get(n) is not None), None)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"it is {type(value).__name__}, wanted a string")
    return value


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    """Bytes of a member; one that is too large is not read."""
    if member.size > limit:
        raise InputError(
            f"{member.name} has {member.size:,} bytes, more than the {limit:,} allowed."
        )
    return _stream(shard, member).read()


def _stream(shard: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    stream = shard.extractfile(member)
    assert stream is not None  # it is a regular file
    return stream  # type: ignore[return-value]


def _opened(file: Shard) -> tarfile.TarFile:
    try:
        if isinstance(file, RemoteFile):
            return tarfile.open(fileobj=file.open(), mode="r:")
        return tarfile.open(file, "r:")
    except DAMAGE as error:
        raise InputError(f"{file}: no readable tar ({error}). Unpack a compressed one.") from error


def _write_tar(file: Shard, target: Path, results: Iterator[Result]) -> Iterator[Result]:
    """Write one tar with its results beside its samples; yields the results."""
    partial = target.with_name(target.name + ".part")
    count = 0
    try:
        with _opened(file) as shard, tarfile.open(partial, "w") as made:
            for sample in _samples(file, shard):
                result = next(results, None)
                if result is None or result.id != f"{file.name}#{sample.key}":
                    raise InputError(f"{file}: changed while it was read. Annotate it again.")
                for _, member in sample.members:
                    _add(made, member.name, member.size, member.mtime, _stream(shard, member))
                folder = "./" if sample.members[0][1].name.startswith("./") else ""
                answer = json.dumps(_answer(result), ensure_ascii=False).encode()
                mtime = sample.members[0][1].mtime
                _add(made, f"{folder}{sample.key}.{ANSWER}", len(answer), mtime, io.BytesIO(answer))
                count += 1
                yield result
        if not count:
            raise InputError(f"{file}: no sample in it, such as KEY.jpg with KEY.txt.")
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"{file}: damaged ({error}). Fetch it again.") from error
    except OSError as error:
        raise _unwritten(file, target, error) from error
    else:
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _add(
    made: tarfile.TarFile, name: str, size: int, mtime: float, stream: BinaryIO | io.BytesIO
) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = size, int(mtime)
    made.addfile(info, stream)
    made.members.clear()  # type: ignore[attr-defined]


# ---------------------------------------------------------------- answers


def _answer(result: Result) -> dict[str, Any]:
    return {
        "rating": result.rating,
        "p_unsafe": result.p_unsafe,
        "node": result.paths[0].node if result.paths else None,
        "nodes": [p.node for p in result.paths],
        "novelty_policy": result.novelty.policy,
        "novelty_distribution": result.novelty.distribution,
        "reason": result.channels.get("reason"),
        "error": result.error.message if result.error else None,
    }


def _columns(results: Sequence[Result]) -> Any:
    import pyarrow as pa

    words, number = pa.string(), pa.float32()
    kinds = {
        "rating": words, "p_unsafe": number, "node": words, "nodes": pa.list_(words),
        "novelty_policy": number, "novelty_distribution": number, "reason": words, "error": words,
    }  # fmt: skip
    answers = [_answer(r) for r in results]
    return pa.table(
        {PREFIX + k: pa.array([a[k] for a in answers], kind) for k, kind in kinds.items()}
    )
