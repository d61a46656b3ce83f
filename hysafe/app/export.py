"""Results of a collection for other tools, and decisions of people back in.

CSV and Parquet hold one row per item; Label Studio gets tasks with predictions and a labelling
configuration beside them; FiftyOne a data set of the pictures that are files.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

from hysafe.app.output import RESULTS
from hysafe.data.files import is_address
from hysafe.data.remote import check_scheme, uploading
from hysafe.errors import CollectionError, InputError
from hysafe.index import Collection, Decision
from hysafe.types import Rating

__all__ = ["FORMATS", "export", "import_decisions", "read_decisions"]

FORMATS = ("csv", "parquet", "labelstudio", "fiftyone")
BATCH = 4096
# A cell that begins so would be run as a formula by spreadsheets.
FORMULA = ("=", "+", "-", "@", "\t", "\r")

LABELS = """<View>
  <Text name="item" value="$text"/>
  <Image name="picture" value="$image"/>
  <Choices name="rating" toName="item" choice="single" required="true">
    <Choice value="safe"/><Choice value="unsafe"/><Choice value="review"/>
  </Choices>
  <TextArea name="reason" toName="item"/>
</View>
"""


def export(collection: Collection, path: str | Path, form: str) -> tuple[int, int]:
    """Write a collection's results and decisions in another form.

    Args:
        path: file to write, or its address (``s3://bucket/out.csv``), where it appears when it is
            whole; a folder for ``fiftyone``.
        form: one of :data:`FORMATS`.

    Returns:
        Items written, and items left out because the form cannot hold them.

    Raises:
        CollectionError: results.jsonl is missing or not that of the table.
        InputError: the file cannot be written.
    """
    writers = {"csv": _csv, "parquet": _parquet, "labelstudio": _tasks, "fiftyone": _fiftyone}
    if is_address(str(path)):
        check_scheme(str(path))
        parent, _, name = str(path).rstrip("/").rpartition("/")
        with uploading(parent) as folder:
            return writers[form](folder / name, _rows(collection), collection)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return writers[form](path, _rows(collection), collection)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}). Name another file."
        ) from error


def import_decisions(collection: Collection, path: Path) -> tuple[int, int]:
    """Keep the decisions of a JSONL file with a collection.

    Returns:
        Decisions in the file, and how many of them were new.

    Raises:
        InputError: a line is not a decision on an item of the collection. Nothing is kept then.
    """
    decisions = _numbered(path)
    ids = set(collection.to_arrow(["id"])["id"].to_pylist())
    for number, decision in decisions:
        if decision.id not in ids:
            raise InputError(
                f"{path}, line {number}: no item has the id {decision.id!r}. Ids stand in {RESULTS}."
            )
    return len(decisions), collection.decide([d for _, d in decisions])


def read_decisions(path: Path) -> list[Decision]:
    """Decisions of a JSONL file: ``id``, ``rating``, ``author``, and if known ``time``, ``reason``.

    Raises:
        InputError: not readable, or a line is wrong; names the line and the remedy.
    """
    return [decision for _, decision in _numbered(path)]


def _numbered(path: Path) -> list[tuple[int, Decision]]:
    """Decisions with the numbers of their lines."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        # only \n ends a line: a text may hold other characters that Python takes for one
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Name a JSONL file.") from error
    decisions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                decisions.append((number, _decision(json.loads(line), now)))
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}, line {number}: no JSON ({error.msg} at character {error.pos + 1}). Give one "
                    "object a line."
                ) from error
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}") from error
    return decisions


def _decision(data: Any, now: str) -> Decision:
    if not isinstance(data, dict):
        raise ValueError("expected an object with id, rating, author, time, reason.")
    known = ("id", "rating", "author", "time", "reason")
    values: dict[str, Any] = {k: data.get(k) for k in known}
    for key in ("id", "rating", "author"):
        if not isinstance(values[key], str) or not str(values[key]).strip():
            raise ValueError(f"`{key}` is missing. Give id, rating and author.")
    if values["rating"] not in get_args(Rating):
        raise ValueError(f"rating is {values['rating']!r}. Give safe, unsafe or review.")
    time = values["time"] or now
    try:
        datetime.fromisoformat(str(time))
    except ValueError as error:
        raise ValueError(f"time is {time!r}. Write 2026-03-01T12:00:00Z.") from error
    return Decision(
        values["id"], values["rating"], values["author"], str(time), str(values["reason"] or "")
    )


# ---------------------------------------------------------------- rows


def _rows(collection: Collection) -> Iterator[dict[str, Any]]:
    """One flat row per item: the result, what the table adds, and the latest decision."""
    decisions = collection.decisions()
    try:
        lines = (collection.folder / RESULTS).open(encoding="utf-8")
    except OSError as error:
        raise CollectionError(
            f"{collection.folder}: no {RESULTS} ({error.strerror}). Write it again: hysafe rescore."
        ) from error
    stored = (
        pair
        for batch in collection.batches(["id", "text"])
        for pair in zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)
    )
    with lines:
        for line, pair in zip_longest(lines, stored):
            result = json.loads(line) if line else None
            if result is None or pair is None or result["id"] != pair[0]:
                raise CollectionError(
                    f"{collection.folder}: {RESULTS} is not that of the table. Write both again: "
                    "hysafe rescore."
                )
            yield _row(result, pair[1], decisions.get(result["id"]))


def _row(result: dict[str, Any], text: str, decision: Decision | None) -> dict[str, Any]:
    paths, channels = result["paths"], result["channels"]
    return {
        "id": result["id"],
        "source": result["source"],
        "modality": result["modality"],
        "rating": result["rating"],
        "p_unsafe": result["p_unsafe"],
        "node": paths[0]["node"] if paths else None,
        "path": paths[0]["path"] if paths else [],
        "nodes": [p["node"] for p in paths],
        "novelty_policy": result["novelty"]["policy"],
        "novelty_distribution": result["novelty"]["distribution"],
        "radius": result["radius"],
        "decided_by": channels.get("decided_by"),
        "reason": channels.get("reason"),
        "text": text,
        "read_text": (channels.get("ocr") or {}).get("text") or "",
        "error": result["error"]["message"] if result["error"] else None,
        "decision": decision.rating if decision else None,
        "decision_author": decision.author if decision else None,
        "decision_time": decision.time if decision else None,
        "decision_reason": decision.reason if decision else None,
        "content_hash": result["hashes"]["content"],
        "model": result["hashes"]["model"],
        "taxonomy": result["hashes"]["taxonomy"],
        "policy": result["hashes"]["policy"],
    }


NUMBERS = ("p_unsafe", "novelty_policy", "novelty_distribution", "radius")
LISTS = ("path", "nodes")
COLUMNS = (
    *("id", "source", "modality", "rating", "p_unsafe", "node", "path", "nodes"),
    *("novelty_policy", "novelty_distribution", "radius", "decided_by", "reason", "text"),
    *("read_text", "error", "decision", "decision_author", "decision_time", "decision_reason"),
    *("content_hash", "model", "taxonomy", "policy"),
)


# ---------------------------------------------------------------- forms


def _csv(path: Path, rows: Iterator[dict[str, Any]], collection: Collection) -> tuple[int, int]:
    count = 0
    partial = path.with_name(path.name + ".part")
    with partial.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_cell(row[c]) for c in COLUMNS])
            count += 1
    partial.replace(path)
    return count, 0


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        value = " > ".join(value)
    if isinstance(value, str) and value.startswith(FORMULA):
        return "'" + value
    return value


def _parquet(path: Path, rows: Iterator[dict[str, Any]], collection: Collection) -> tuple[int, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {c: pa.float64() for c in NUMBERS} | {c: pa.list_(pa.string()) for c in LISTS}
    schema = pa.schema([pa.field(c, kinds.get(c, pa.string())) for c in COLUMNS])
    count = 0
    partial = path.with_name(path.name + ".part")
    with pq.ParquetWriter(partial, schema) as writer:
        for batch in _batches(rows):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            count += len(batch)
    partial.replace(path)
    return count, 0


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _tasks(path: Path, rows: Iterator[dict[str, Any]], collection: Collection) -> tuple[int, int]:
    """Label Studio: tasks with our rating as a prediction; decisions as annotations."""
    count = 0
    partial = path.with_name(path.name + ".part")
    with partial.open("w", encoding="utf-8", errors="replace") as file:
        file.write("[")
        for row in rows:
            file.write(",\n" if count else "\n")
            file.write(json.dumps(_task(row), ensure_ascii=False))
            count += 1
        file.write("\n]\n")
    partial.replace(path)
    path.with_suffix(".xml").write_text(LABELS, "utf-8")
    return count, 0


def _task(row: dict[str, Any]) -> dict[str, Any]:
    def choice(rating: str) -> dict[str, Any]:
        return {
            "from_name": "rating",
            "to_name": "item",
            "type": "choices",
            "value": {"choices": [rating]},
        }

    data = {
        "id": row["id"],
        "source": row["source"],
        "text": row["text"] or row["read_text"] or row["source"],
        "image": row["source"] if "image" in row["modality"] else "",
        "rating": row["rating"],
        "nodes": [" > ".join(row["path"])] if row["path"] else [],
        "why": row["reason"] or row["error"] or "",
    }
    task: dict[str, Any] = {
        "data": data,
        "predictions": [
            {
                "model_version": f"hysafe {row['model']} {row['policy']}",
                "score": row["p_unsafe"],
                "result": [choice(row["rating"])],
            }
        ],
    }
    if row["decision"]:
        task["data"]["decided_by"] = row["decision_author"]
        task["annotations"] = [{"result": [choice(row["decision"])]}]
    return task


def _fiftyone(
    path: Path, rows: Iterator[dict[str, Any]], collection: Collection
) -> tuple[int, int]:
    """A FiftyOneImageClassificationDataset: data.json names the files, labels.json the ratings.

    ``nodes.json`` and ``decisions.json`` are label files of the same pictures, for
    ``labels_path=``.
    """
    data: dict[str, str] = {}
    labels: dict[str, dict[str, str | None]] = {"labels": {}, "nodes": {}, "decisions": {}}
    left_out = 0
    for number, row in enumerate(rows):
        file = Path(row["source"])
        if "image" not in row["modality"] or not file.is_file():
            left_out += 1
            continue
        key = f"{number:09d}"
        data[key] = str(file.resolve())
        labels["labels"][key] = row["rating"]
        labels["nodes"][key] = " > ".join(row["path"]) or None
        labels["decisions"][key] = row["decision"]
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "data.json", data)
    for name, values in labels.items():
        _write_json(path / f"{name}.json", {"labels": values})
    return len(data), left_out


def _write_json(path: Path, data: Any) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", "utf-8", "replace")
    partial.replace(path)
