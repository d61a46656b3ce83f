"""A collection judged again under another policy: from its stored points, without its pictures."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hysafe.app.columns import RATINGS, ColumnJudge, Verdicts
from hysafe.app.gallery import Card, card_of, write_gallery
from hysafe.app.lock import lock
from hysafe.app.output import RESULTS, SAID
from hysafe.app.pipeline import SafetyModel, ahead
from hysafe.app.scan import (
    REPORT,
    ScanSummary,
    Shown,
    collection_meta,
    report_scan,
    result_of_line,
)
from hysafe.app.stored import judge_items, read_media, view_of
from hysafe.data.remote import make_out
from hysafe.errors import CollectionError, InputError
from hysafe.index import Collection, CollectionMeta, CollectionWriter, Decision, EncodedItem, Row
from hysafe.index.collection import ENCODED, TABLE, decode_rows
from hysafe.taxonomy import Policy, PolicyView, Taxonomy
from hysafe.types import Result

__all__ = [
    *("Change", "Diff", "RescoreSummary", "diff_json", "policy_names", "report_stored"),
    *("rescore", "write_diff"),
]

# Changes of a kind that are kept with their items, to be shown.
EXAMPLES = 60
# Items judged at once: their points and scores for 300 nodes take 20 MB, a batch in each thread.
BATCH = 8192
# Row -> what a guard said of it.
Names = Mapping[int, Mapping[str, Any]]
RATING_NAMES = pa.array(RATINGS, pa.string())


@dataclass(frozen=True)
class Change:
    """An item that is judged otherwise than before.

    Args:
        item: the stored item. result: its new judgement. before: the old rating.
        node_before: node that came first before, or None.
        decision: of a person on the item, if there is one.
        line: its old line of results.jsonl; "" where there is none.
    """

    item: EncodedItem
    result: Result
    before: str
    node_before: str | None
    decision: Decision | None = None
    line: str = ""

    @property
    def node(self) -> str | None:
        """Node that comes first now."""
        return self.result.paths[0].node if self.result.paths else None

    @property
    def score(self) -> float | None:
        """Its score."""
        return self.result.paths[0].score if self.result.paths else None

    @property
    def score_before(self) -> float | None:
        """Score of the node that came first before, as the old results give it."""
        try:
            first = self._old["paths"][0]
            return float(first["score"]) if first["node"] == self.node_before else None
        except (KeyError, IndexError, TypeError):
            return None

    @property
    def p_before(self) -> float | None:
        """p_unsafe before, as the old results give it."""
        value = self._old.get("p_unsafe")
        return float(value) if isinstance(value, int | float) else None

    @property
    def _old(self) -> dict[str, Any]:
        """The old line of this item; {} where there is none."""
        try:
            old = json.loads(self.line)
            return dict(old) if old["id"] == self.result.id else {}
        except (ValueError, KeyError, TypeError):
            return {}


@dataclass
class Diff:
    """What a rescore changed.

    Attributes:
        ratings: (old, new) rating -> items, unchanged ones included.
        moved: (old, new) first node -> items whose rating stayed and whose first node did not.
        examples: kind (``newly unsafe``, ``newly safe``, ``newly review``, ``moved``) -> the first
            items of it.
    """

    ratings: Counter[tuple[str, str]] = field(default_factory=Counter)
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[str, list[Change]] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Items of each kind of change."""
        found = {f"newly {r}": 0 for r in ("unsafe", "safe", "review")}
        for (old, new), count in self.ratings.items():
            if old != new:
                found[f"newly {new}"] += count
        return found | {"moved": sum(self.moved.values())}

    def add(
        self, before: pa.Array, now: pa.Array, node_before: pa.Array, node: pa.Array
    ) -> dict[int, str]:
        """Count a batch: old and new ratings and first nodes [n].

        Returns:
            Place -> kind of the items that :meth:`keep` has room for.
        """
        old, new = (pc.index_in(r, RATING_NAMES).to_numpy() for r in (before, now))
        size = len(RATINGS)
        pairs = np.bincount(old * size + new, minlength=size * size)
        for pair in np.flatnonzero(pairs).tolist():
            self.ratings[RATINGS[pair // size], RATINGS[pair % size]] += int(pairs[pair])
        nodes = [pc.fill_null(n, "") for n in (node_before, node)]
        moved = (old == new) & pc.not_equal(*nodes).to_numpy(zero_copy_only=False)
        mask = pa.array(moved)
        self.moved.update(zip(*(n.filter(mask).to_pylist() for n in nodes), strict=True))
        kinds = {f"newly {r}": (old != new) & (new == k) for k, r in enumerate(RATINGS)}
        wanted: dict[int, str] = {}
        for kind, found in (kinds | {"moved": moved}).items():
            room = EXAMPLES - len(self.examples.get(kind, ()))
            wanted |= dict.fromkeys(np.flatnonzero(found)[:room].tolist(), kind)
        return dict(sorted(wanted.items()))

    def keep(self, change: Change, kind: str) -> None:
        """Keep a change as an example."""
        self.examples.setdefault(kind, []).append(change)


@dataclass
class RescoreSummary:
    """What a rescore did.

    Attributes:
        scan: counts as of a scan. diff: what changed. version: of the table.
        encoded: towers had to be loaded, for new text nodes.
    """

    scan: ScanSummary
    diff: Diff
    version: int = 0
    encoded: bool = False


def rescore(
    collection: Collection,
    model: SafetyModel,
    policy: Policy | None = None,
    *,
    out: str | Path | None = None,
    report: bool | None = None,
    progress: Callable[[int], None] | None = None,
) -> RescoreSummary:
    """Judge all items of a collection again and write a new version of its table and results.

    The results are those that a scan under the policy would give. No guard is asked: what one said
    of a novel item stays where the item's rating and novelty do.

    Args:
        model: that of the collection; its towers are needed only for nodes that the policy adds or
            describes anew, the first time.
        policy: the default policy where None.
        out: folder for the new collection; by default the collection itself, whose table then gets
            a new version.
        report: write report.html, with the pictures and texts whose sources are still there; by
            default where the collection has one.
        progress: called with the number of rows done.

    Raises:
        CollectionError: another model. InputError: `out` cannot be written, or another process
            writes into it.
    """
    collection.check_model(model.hash)
    view = model.view(policy)
    model.place(view)
    target = collection.folder if out is None else Path(out)
    make_out(target)
    # of a rescore that was killed there may be a lock and a part of the results
    other = [p.name for p in target.iterdir() if not p.name.startswith((".", RESULTS))]
    if other and not (target / f"{TABLE}.lance").exists():
        raise InputError(
            f"--out {target}: holds other files ({sorted(other)[0]}) and is no collection. Name a new folder."
        )
    if report is None:
        report = (collection.folder / REPORT).is_file()
    with lock(target):
        return _rescore(collection, model, view, target, report, progress)


def _rescore(
    collection: Collection,
    model: SafetyModel,
    view: PolicyView,
    target: Path,
    report: bool,
    progress: Callable[[int], None] | None,
) -> RescoreSummary:
    """Judge and write, with the folder locked."""
    stored = collection.meta
    reading = stored.reading or model.hash
    meta = collection_meta(model, view, reading=reading, reads=stored.reads)
    summary = RescoreSummary(ScanSummary(target), Diff())
    shown: list[tuple[EncodedItem, Result]] = []
    room = Shown()
    judge = ColumnJudge(model, view, stored, meta)
    old, decisions = _OldLines(collection.folder / RESULTS), collection.decisions()
    names = _OldNames(collection.folder / RESULTS, meta.reading)
    partial = target / f"{RESULTS}.part"
    try:
        lines = partial.open("wb")
    except OSError as error:
        raise InputError(
            f"{partial}: cannot be written ({error.strerror}). Name another folder with --out."
        ) from error
    with lines, old:

        def results(batch: pa.RecordBatch, places: Sequence[int], said: Names) -> list[Row]:
            items = decode_rows(batch.take(pa.array(places, pa.int64())), stored)
            rows = [j.row for j in judge_items(collection, model, view, items)]
            return [_named(row, said.get(k)) for k, row in zip(places, rows, strict=True)]

        def work(given: tuple[int, pa.RecordBatch]) -> _Judged:
            start, batch = given
            found = judge.judge(batch)
            said = names.of(start, batch, found)
            told = judge.lines(batch, found, said)
            return _Judged(batch, found, judge.rows(batch, found), said, told)

        def judged() -> Iterator[pa.RecordBatch]:
            batches = collection.batches([*ENCODED, "rating", "node"], size=BATCH)
            for batch, found, rows, said, told in ahead(
                work, _numbered(batches), torch.get_num_threads()
            ):
                lines.write(told)
                wanted = summary.diff.add(
                    batch["rating"], rows["rating"], batch["node"], rows["node"]
                )
                examples = results(batch, list(wanted), said)
                for (k, kind), row in zip(wanted.items(), examples, strict=True):
                    before, node = batch["rating"][k].as_py(), batch["node"][k].as_py()
                    line = old.line(summary.scan.items + k)
                    decision = decisions.get(row.item.id)
                    change = Change(row.item, row.result, before, node, decision, line)
                    summary.diff.keep(change, kind)
                if report:
                    safe = found.rating == RATINGS.index("safe")
                    places = [np.flatnonzero(safe == s)[: room.room(safe=s)] for s in (True, False)]
                    for row in results(batch, np.sort(np.concatenate(places)).tolist(), said):
                        room.add(row.result, row.item.text or row.item.read_text, None)
                        shown.append((row.item, row.result))
                _count(summary.scan, found, rows)
                if progress:
                    progress(summary.scan.items)
                yield rows

        try:
            summary.version = CollectionWriter.write_columns(target, meta, judged())
        except BaseException:  # an interrupted rescore leaves the collection as it was
            partial.unlink(missing_ok=True)
            raise
    partial.replace(target / RESULTS)
    if target.resolve() != collection.folder.resolve():
        Collection.open(target).decide(collection.all_decisions())
    summary.encoded = bool(getattr(model.encoder, "towers_loaded", True))
    if report:
        _report(target, model, view, shown)
    else:  # one of the old ratings would contradict the new ones
        (target / REPORT).unlink(missing_ok=True)
    return summary


def report_stored(collection: Collection, model: SafetyModel) -> None:
    """Write report.html again from what is stored, with the decisions of now.

    Pictures and texts are those whose sources are still there.

    Raises:
        CollectionError: another model or taxonomy, or results.jsonl is not that of the table.
    """
    collection.check_model(model.hash)
    view = view_of(collection, model, None)
    shown: list[tuple[EncodedItem, Result]] = []
    room = Shown()
    try:
        stored = (collection.folder / RESULTS).open(encoding="utf-8")
    except OSError as error:
        raise CollectionError(
            f"{collection.folder}: no {RESULTS} ({error.strerror}). Write it again: hysafe rescore."
        ) from error
    with stored as lines:
        for item in (item for items in collection.items() for item in items):
            line = next(lines, "")
            result = result_of_line(json.loads(line)) if line else None
            if result is None or result.id != item.id:
                raise CollectionError(
                    f"{collection.folder}: {RESULTS} is not that of the table. Write both again: "
                    "hysafe rescore."
                )
            if room.wants(result):
                room.add(result, "", None)
                shown.append((item, result))
    _report(collection.folder, model, view, shown)


def _report(
    target: Path, model: SafetyModel, view: PolicyView, shown: list[tuple[EncodedItem, Result]]
) -> None:
    """Write report.html, with the pictures and texts whose sources are still there."""
    media = read_media(item for item, result in shown if result.p_unsafe is not None)
    whole = Shown()
    for item, result in shown:
        seen = media.get(item.id)
        whole.add(result, item.text or item.read_text, seen.image if seen else None)
    report_scan(target, model, view, whole, "")


def _count(summary: ScanSummary, found: Verdicts, rows: pa.RecordBatch) -> None:
    """Count a batch, as :meth:`ScanSummary.count` does row by row."""
    summary.items += rows.num_rows
    risky = rows["node"].filter(pa.array(found.rating != RATINGS.index("safe")))
    for counter, column in (
        (summary.ratings, rows["rating"]), (summary.errors, rows["error"]), (summary.nodes, risky)
    ):  # fmt: skip
        for counted in column.drop_null().value_counts().to_pylist():
            counter[counted["values"]] += counted["counts"]


class _Judged(NamedTuple):
    """A batch, its judgement, and the rows and lines of it."""

    batch: pa.RecordBatch
    found: Verdicts
    rows: pa.RecordBatch
    said: Names
    told: memoryview


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches, each with the place of its first row."""
    start = 0
    for batch in batches:
        yield start, batch
        start += batch.num_rows


def _named(row: Row, said: Mapping[str, Any] | None) -> Row:
    """The row with what a guard said of its item."""
    if said is None:
        return row
    return replace(row, result=replace(row.result, novelty=replace(row.result.novelty, **said)))


class _OldNames:
    """What a guard said of novel items, from the lines of results.jsonl as it stood.

    Args:
        reading: the model's hash in the new results.
    """

    def __init__(self, path: Path, reading: str) -> None:
        self._reading = reading
        self._lines: dict[int, Mapping[str, Any]] = {}
        with suppress(OSError), path.open("rb") as lines:
            for place, line in enumerate(lines):
                if SAID in line:
                    with suppress(ValueError):
                        self._lines[place] = json.loads(line)
        self._places = sorted(self._lines)

    def of(self, start: int, batch: pa.RecordBatch, found: Verdicts) -> Names:
        """Row -> name and rationale, where the item, its rating and its novelty are the same."""
        first, last = (bisect_left(self._places, start + k) for k in (0, batch.num_rows))
        kept = {}
        for place in self._places[first:last]:
            k, line = place - start, self._lines[place]
            novelty = (found.policy[k], found.distribution[k])
            now = {
                "id": batch["id"][k].as_py(),
                "rating": RATINGS[found.rating[k]],
                "content": batch["content_hash"][k].as_py(),
                "model": self._reading,
                "novelty": [None if math.isnan(p) else float(p) for p in novelty],
            }
            with suppress(KeyError, TypeError):
                before = {
                    "id": line["id"],
                    "rating": line["rating"],
                    "content": line["hashes"]["content"],
                    "model": line["hashes"]["model"],
                    "novelty": [line["novelty"]["policy"], line["novelty"]["distribution"]],
                }
                if before == now:
                    said = line["novelty"]
                    kept[k] = {key: said[key] for key in ("name", "rationale") if key in said}
        return kept


class _OldLines:
    """Lines of results.jsonl as it stood, of which few are wanted; "" where there is none."""

    def __init__(self, path: Path) -> None:
        self._lines: BinaryIO | None = None
        with suppress(OSError):  # a collection without its lines is judged all the same
            self._lines = path.open("rb")
        self._next = 0

    def __enter__(self) -> _OldLines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()

    def line(self, place: int) -> str:
        """The line at a place, which is beyond that of the last call."""
        if self._lines is None:
            return ""
        skip, self._next = place - self._next, place + 1
        return next(islice(self._lines, skip, None), b"").decode("utf-8", "replace")


def policy_names(before: CollectionMeta, now: Policy) -> tuple[str, str]:
    """Names of the two policies, with their hashes where one name stands for two policies."""
    if before.policy_name != now.name or before.policy == now.hash:
        return before.policy_name, now.name
    return f"{now.name} {before.policy[:8]}", f"{now.name} {now.hash[:8]}"


def write_diff(path: Path, diff: Diff, collection: Collection, view: PolicyView) -> None:
    """Write what changed as a page with pictures.

    Args:
        collection: as it was. view: the new policy applied.
    """
    taxonomy = view.taxonomy
    before, now = policy_names(collection.meta, view.policy)
    changes = [c for kept in diff.examples.values() for c in kept]
    media = read_media(c.item for c in changes)
    counts = diff.counts()

    def card(change: Change) -> Card:
        seen = media.get(change.item.id)
        return card_of(
            change.result,
            taxonomy,
            lead=f"was {change.before}"
            + ("" if change.p_before is None else f" {change.p_before:.2f}"),
            text=change.item.text or change.item.read_text,
            image=seen.image if seen else None,
            lines=[
                f"{_node(change.node_before, change.score_before, taxonomy)} → "
                f"{_node(change.node, change.score, taxonomy)}",
                *([change.decision.words] if change.decision else []),
            ],
        )

    sections = [
        (f"{kind.capitalize()}: {counts[kind]:,}" + (f", first {len(kept)}"
         if len(kept) < counts[kind] else ""), [card(c) for c in kept])
        for kind in counts if (kept := diff.examples.get(kind))
    ]  # fmt: skip
    facts = {
        "Collection": str(collection.folder),
        "Items": f"{sum(diff.ratings.values()):,}",
        "Policy before": before,
        "Policy now": now,
    }
    write_gallery(path, "What the new policy changes", facts, sections)


def diff_line(change: Change, kind: str) -> dict[str, Any]:
    """A change as plain data."""
    line = {
        "change": kind,
        "id": change.result.id,
        "source": change.result.source,
        "rating_before": change.before,
        "rating": change.result.rating,
        "p_unsafe_before": change.p_before,
        "p_unsafe": change.result.p_unsafe,
        "node_before": change.node_before,
        "score_before": change.score_before,
        "node": change.node,
        "score": change.score,
    }
    if change.decision is not None:
        line["decision"] = change.decision.rating
    return line


def diff_json(diff: Diff) -> str:
    """Counts, then the examples, as JSON lines."""
    lines: list[Mapping[str, Any]] = [{"counts": diff.counts()}]
    lines += [diff_line(c, kind) for kind in diff.counts() for c in diff.examples.get(kind, ())]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _node(node: str | None, score: float | None, taxonomy: Taxonomy) -> str:
    if node is None:
        return "no node"
    name = f"{node} {taxonomy[node].name}" if node in taxonomy else node
    return name if score is None else f"{name} {score:.2f}"
