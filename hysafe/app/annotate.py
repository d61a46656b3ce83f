"""Parquet shards in, the same shards with rating, nodes and novelty out, and an audit by node."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hysafe.app.pipeline import SafetyModel, ScanOptions
from hysafe.data.inputs import InputReader
from hysafe.errors import InputError
from hysafe.taxonomy import Policy, Taxonomy
from hysafe.types import Result

__all__ = ["AUDIT", "Audit", "annotate", "shard_paths"]

AUDIT = "audit.json"
PREFIX = "hysafe_"
BATCH = 256
ROW = re.compile(r".*#row (\d+)")


@dataclass
class Audit:
    """What a data set holds, by node.

    Attributes:
        shards, items: counts. ratings, errors: items of each.
        nodes: node id -> rating -> items to which the node or one below it applies.
    """

    shards: int = 0
    items: int = 0
    ratings: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    nodes: dict[str, Counter[str]] = field(default_factory=dict)

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
            "nodes": {
                n.id: {"name": n.name, **self.nodes[n.id]} for n in taxonomy if n.id in self.nodes
            },
        }


def shard_paths(paths: Sequence[str]) -> list[Path]:
    """Parquet files under paths, in a stable order.

    Raises:
        InputError: a path is no Parquet file or folder of them, or two have one name.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files or not all(f.is_file() and f.suffix == ".parquet" for f in files):
            raise InputError(f"{path}: no Parquet file, nor a folder of them.")
        found += files
    names = Counter(f.name for f in found)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputError(
            f"{twice[0]}: {names[twice[0]]} shards have this name, and would be written to one "
            "file. Annotate their folders one by one."
        )
    return found


def annotate(
    shards: Sequence[str],
    out: Path,
    model: SafetyModel,
    *,
    policy: Policy | None = None,
    ocr: Any | None = None,
    options: ScanOptions | None = None,
    text_column: str | None = None,
    image_column: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """Write every shard again with columns of our own, row for row, and an audit beside them.

    The columns are ``hysafe_rating``, ``_p_unsafe``, ``_node``, ``_nodes``, ``_novelty_policy``,
    ``_novelty_distribution``, ``_reason`` and ``_error``; columns of these names are replaced.

    Args:
        shards: Parquet files, or folders of them.
        out: folder, made if missing; not that of a shard.
        model, policy, ocr, options: see :meth:`SafetyModel.judge`.

    Raises:
        InputError: a shard is damaged or has nothing to judge, or `out` cannot be written.
    """
    files = shard_paths(shards)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made ({error.strerror}).") from error
    if any(f.resolve().parent == out.resolve() for f in files):
        raise InputError(f"--out {out}: the shards stand there. Name another folder.")
    view = model.view(policy)
    audit = Audit()
    for file in files:
        reader = InputReader([str(file)], text_column=text_column, image_column=image_column)
        results = (j.result for j in model.judge(reader, policy=policy, ocr=ocr, options=options))
        for result in _write(file, out / file.name, results):
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
    (out / AUDIT).write_text(json.dumps(summary, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return audit


def _write(file: Path, target: Path, results: Iterator[Result]) -> Iterator[Result]:
    """Write one shard with its results beside its rows; yields the results."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ours = _columns([]).schema
    partial = target.with_name(target.name + ".part")
    writer, row = None, 0
    try:
        shard = pq.ParquetFile(file)
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
        raise InputError(f"{target}: {error}. Free some space or name another folder.") from error
    else:
        partial.replace(target)
    finally:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)


def _check(file: Path, found: Sequence[Result], first: int, wanted: int) -> None:
    """See that results stand beside their own rows."""
    numbers = [int(m[1]) if (m := ROW.fullmatch(r.source)) else -1 for r in found]
    if numbers != list(range(first, first + wanted)):
        why = f" ({found[0].error.message})" if found and found[0].error else ""
        raise InputError(
            f"{file}: rows from {first} on could not be read one by one{why}. Is it damaged, or "
            "has it no column of texts or pictures?"
        )


def _columns(results: Sequence[Result]) -> Any:
    import pyarrow as pa

    def number(values: Sequence[float | None]) -> Any:
        return pa.array(values, pa.float32())

    def words(values: Sequence[str | None]) -> Any:
        return pa.array(values, pa.string())

    columns = {
        "rating": words([r.rating for r in results]),
        "p_unsafe": number([r.p_unsafe for r in results]),
        "node": words([r.paths[0].node if r.paths else None for r in results]),
        "nodes": pa.array([[p.node for p in r.paths] for r in results], pa.list_(pa.string())),
        "novelty_policy": number([r.novelty.policy for r in results]),
        "novelty_distribution": number([r.novelty.distribution for r in results]),
        "reason": words([r.channels.get("reason") for r in results]),
        "error": words([r.error.message if r.error else None for r in results]),
    }
    return pa.table({PREFIX + name: values for name, values in columns.items()})
