"""The scan: items in, results.jsonl, a collection and a report out."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hysafe.app.known import KEY_DIGITS, Known, Stored
from hysafe.app.lock import lock
from hysafe.app.output import RESULTS, Feed, Output, writing
from hysafe.app.pipeline import Judgement, SafetyModel, ScanOptions
from hysafe.app.report import ReportData, write_report
from hysafe.app.report_rows import ResultLines, StoredTangents
from hysafe.data.images import thumbnail
from hysafe.data.inputs import InputReader
from hysafe.data.remote import local_folder, make_out
from hysafe.errors import CollectionError, InputError
from hysafe.index import CollectionMeta, EncodedItem
from hysafe.index.collection import TABLE, Collection
from hysafe.taxonomy import Policy, PolicyView
from hysafe.types import ErrorRecord, Hashes, Item, NodeScore, NoveltyScores, Result

if TYPE_CHECKING:
    from hysafe.app.guard_namer import GuardNamer

__all__ = [
    *("REPORT", "ScanSummary", "Shown", "add", "collection_meta", "report_scan", "scan"),
    *("name_results", "result_of_line"),
]

REPORT = "report.html"
# Items the report shows with their picture and text: those to be looked at, and some safe ones.
SHOWN, SHOWN_SAFE = 3000, 600
TEXT_SHOWN = 600
# Contents of this scan that are remembered whole, to find copies; of those before a key is kept.
REMEMBERED = 65536
# A slow scan writes at least this often, in seconds, so that little is done again after an end.
COMMIT_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass
class ScanSummary:
    """What a scan did.

    Attributes:
        items: number of rows. ratings, nodes, errors: counts. skipped: files that were neither
        pictures nor texts. known: rows that stood there, or whose content was encoded
        before, for an earlier scan or an earlier row. asked: novel items that a guard answered for.
        named: those of them that it named.
        out: folder with the three outputs.
    """

    out: Path
    items: int = 0
    known: int = 0
    skipped: int = 0
    asked: int = 0
    named: int = 0
    ratings: Counter[str] = field(default_factory=Counter)
    nodes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def count(self, result: Result) -> None:
        """Count one row."""
        self.items += 1
        self.ratings[result.rating] += 1
        if result.error:
            self.errors[result.error.type] += 1
        if result.paths and result.rating != "safe":
            self.nodes[result.paths[0].node] += 1


def scan(
    paths: Sequence[str],
    out: Path,
    model: SafetyModel,
    *,
    policy: Policy | None = None,
    ocr: Any | None = None,
    options: ScanOptions | None = None,
    report: bool = True,
    title: str = "",
    text_column: str | None = None,
    image_column: str | None = None,
    fresh: bool = False,
    retry: bool = False,
    progress: Callable[[int], None] | None = None,
    guard: str | None = None,
) -> ScanSummary:
    """Judge everything under `paths` and write the outputs into `out`.

    Afterwards the outputs are those of a first scan of the paths (with a `bf16` model but for last
    digits), whatever stood in `out` before: a
    scan that was killed goes on where it stood, and what a scan with the same model encoded before
    is not encoded again. Items of the same content are encoded once and have a row each.

    Args:
        paths: pictures, folders, Parquet, JSONL, text files, addresses of them, or ``-``.
        out: local; made if missing.
        model, policy, ocr, options: see :meth:`SafetyModel.judge`.
        report: write report.html.
        text_column, image_column: of tables.
        fresh: encode everything again.
        retry: decode and read again what failed before.
        progress: called with the number of rows done.
        guard: a guard as :func:`hysafe.app.guard_namer.load_guard` takes it: it names the novel
            items when all are judged; no rating depends on it.

    Raises:
        InputError: a path does not exist, `out` cannot be written, or another process writes there.
        CollectionError: the disk is full; what was written is kept.
    """
    out = local_folder(out, "--out")
    reader = InputReader(
        paths, text_column=text_column, image_column=image_column, exclude=[str(out)]
    )
    make_out(out)
    options = options or ScanOptions()
    view = model.view(policy)
    namer = _guard(guard, model)
    summary, shown = ScanSummary(out), Shown()

    def count(result: Result, text: str, image: bytes | None) -> None:
        summary.count(result)
        if report:
            shown.add(result, text, image)
        if progress:
            progress(summary.items)

    with lock(out):
        with writing(out):
            meta = collection_meta(model, view, reading=model.hash_with(ocr), reads=ocr is not None)
            output = Output.open(out, meta, fresh=fresh)
        try:
            items = Feed(reader)
            for item, line in output.match(items, retry=retry):
                result = result_of_line(line)
                count(result, item.text or _read_text(result), item.image)
            summary.known = output.rows
            with writing(out):
                if output.left:
                    output = output.restart()
                output.cut()
            known = _Seen([] if fresh else _tables(output, meta), output, retry=retry)
            judged = model.judge_batches(
                items, policy=policy, ocr=ocr, options=options, known=known
            )
            for batch in _commits(judged, options):
                with writing(out):
                    batch = known.fill(batch, model, view)
                for j in batch:
                    count(j.result, j.text, j.image)
                with writing(out):
                    output.append(batch)
            summary.known += known.found
            with writing(out):
                output.finish()
        finally:
            output.close()
        summary.skipped = reader.skipped
        summary.asked, summary.named = name_results(out, model, view, namer)
        if report:
            with writing(out):
                report_scan(out, model, view, shown, title)
        else:  # an old one would contradict the results
            (out / REPORT).unlink(missing_ok=True)
    return summary


def _guard(name: str | None, model: SafetyModel) -> GuardNamer | None:
    if name is None:
        return None
    from hysafe.app.guard_namer import load_guard

    return load_guard(name, model)


def name_results(
    out: Path, model: SafetyModel, view: PolicyView, namer: GuardNamer | None
) -> tuple[int, int]:
    """Names for the novel items in `out`, in place of those of an earlier scan's guard: how many the
    namer answered for, and how many got one. Without a namer there are none."""
    from hysafe.app.guard_namer import name_novel, write_names

    names = {} if namer is None else name_novel(Collection.open(out), model, view, namer)
    with writing(out):
        return len(names), write_names(out / RESULTS, names)


def _commits(batches: Iterable[list[Judgement]], options: ScanOptions) -> Iterator[list[Judgement]]:
    """Judgements in the portions that are written at once: whole batches, so that a scan that goes
    on after them makes the batches that it would have made."""
    portion: list[Judgement] = []
    last = time.monotonic()
    for batch in batches:
        portion += batch
        done_again = len(portion) + options.encoders * len(batch)  # were it killed now
        if done_again >= options.commit or time.monotonic() - last >= COMMIT_SECONDS:
            yield portion
            portion, last = [], time.monotonic()
    if portion:
        yield portion


def _tables(output: Output, meta: CollectionMeta) -> list[Stored]:
    """What items may be known from."""
    tables = []
    for name in dict.fromkeys((TABLE, output.name)):
        try:
            stored = Collection.open(output.folder, name=name)
        except CollectionError:
            continue
        if (stored.meta.model, stored.meta.reading) == (meta.model, meta.reading):
            tables.append(Stored(stored))
    return tables


class _Seen(Known):
    """What is known from tables, and the copies among the items of this scan.

    A copy whose first item is not encoded yet passes through the batches as an item without points;
    :meth:`fill` judges it when the first one is there. It takes its place in a batch either way, so
    that a scan that goes on makes the batches that it would have made.
    """

    def __init__(self, tables: Sequence[Stored], output: Output, *, retry: bool) -> None:
        super().__init__(tables, retry=retry)
        self._output = output
        self._tables.append(output.collection)
        self._next = output.start + output.rows
        self._recent: dict[str, int] = {}  # content hash -> place of its first item
        self._first: dict[str, int] = {}  # id of a copy -> the same

    def find(self, items: Sequence[Item]) -> dict[str, EncodedItem]:
        """As in :class:`Known`; copies of items of this scan come without points."""
        known = super().find(items)
        for item in items:
            if item.content_hash and item.error is None and item.id not in known:
                first = self._recent.setdefault(item.content_hash, self._next)
                if first != self._next:
                    self._first[item.id] = first
                    known[item.id] = EncodedItem(
                        item.id, item.source, item.modality, item.content_hash, {},
                        text=item.text or "",
                    )  # fmt: skip
            self._next += 1
        return known

    def fill(
        self, portion: list[Judgement], model: SafetyModel, view: PolicyView
    ) -> list[Judgement]:
        """A portion about to be written, with its copies judged like their first items."""
        start, meta = self._output.start + self._output.rows, self._output.collection.meta
        if len(self._recent) >= REMEMBERED:
            self._forget(start)
        firsts = {k: self._first.pop(j.row.item.id, -1) for k, j in enumerate(portion)}
        copies = {k: place for k, place in firsts.items() if place >= 0}
        if not copies:
            return portion
        written = [place for place in copies.values() if place < start]
        rows = dict(zip(written, self._output.collection.take(written), strict=True))
        encoded = []
        for k, place in copies.items():
            item = portion[k].row.item
            first = rows[place] if place < start else portion[place - start].row.item
            encoded.append(
                replace(item, points=first.points, cut=first.cut, read_text=first.read_text,
                        error=first.error)
            )  # fmt: skip
        judged = model.judge_encoded(encoded, view, reading=meta.reading, reads=meta.reads)
        for k, j in zip(copies, judged, strict=True):
            portion[k] = replace(j, image=portion[k].image)
        self.found += len(copies)
        return portion

    def _forget(self, written: int) -> None:
        """Keep of items that are written what finds them in the table, and no more."""
        old = {h: place for h, place in self._recent.items() if place < written}
        self._recent = {h: place for h, place in self._recent.items() if h not in old}
        keys = np.array([int(h[:KEY_DIGITS], 16) for h in old], np.uint64)
        order = np.argsort(keys)
        at = np.searchsorted(self._keys, keys[order])
        self._keys = np.insert(self._keys, at, keys[order])
        self._places = np.insert(self._places, at, np.array(list(old.values()), np.int64)[order])
        self._owners = np.insert(self._owners, at, len(self._tables) - 1)


def add(
    collection: Collection,
    model: SafetyModel,
    paths: Sequence[str],
    *,
    ocr: Any | None = None,
    options: ScanOptions | None = None,
    text_column: str | None = None,
    image_column: str | None = None,
) -> ScanSummary:
    """Judge more paths under the collection's own policy and append what is new.

    An item whose content is in the collection already is passed over; one with a known id and
    other content gets a new id.

    Args:
        ocr: the reader of text in pictures, as in the scan that made the collection.
        others: as in :func:`scan`.

    Returns:
        Counts of what was added.

    Raises:
        CollectionError: another model, taxonomy or reader than the scan's.
    """
    from hysafe.app.stored import view_of

    collection.check_model(model.hash)
    options = options or ScanOptions()
    meta = collection.meta
    if model.hash_with(ocr) != (meta.reading or meta.model):
        how = "with" if meta.reads else "without"
        if model.hash_with(ocr, bf16=not model.bf16) == (meta.reading or meta.model):
            raise CollectionError(
                f"{collection.folder}: scanned {'without' if model.bf16 else 'with'} --bf16. Add "
                f"items as they were scanned: load(..., bf16={not model.bf16})."
            )
        raise CollectionError(
            f"{collection.folder}: scanned {how} reading text in pictures, or by another reader "
            f"({meta.reading}, this is {model.hash_with(ocr)}). Add items as they were scanned."
        )
    policy = view_of(collection, model, None).policy
    known = collection.to_arrow(["id", "content_hash"]).to_pydict()
    ids = set(known["id"])
    contents = set(zip(known["content_hash"], known["id"], strict=True))
    hashes = {h for h in known["content_hash"] if h}

    def new(items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            if item.content_hash in hashes or (item.content_hash, item.id) in contents:
                continue
            if item.content_hash:
                hashes.add(item.content_hash)
            name, count = item.id, 2
            while name in ids:
                name, count = f"{item.id}~{count}", count + 1
            ids.add(name)
            yield replace(item, id=name)

    reader = InputReader(paths, text_column=text_column, image_column=image_column,
                         exclude=[str(collection.folder)])  # fmt: skip
    judged = model.judge_batches(new(reader), policy=policy, ocr=ocr, options=options)
    summary = ScanSummary(collection.folder)
    with lock(collection.folder):
        with writing(collection.folder):
            output = Output(collection)
        try:
            with writing(collection.folder):
                output.match_all()
                output.cut()
            for batch in _commits(judged, options):
                for j in batch:
                    summary.count(j.result)
                with writing(collection.folder):
                    output.append(batch)
            with writing(collection.folder):
                output.finish()
        finally:
            output.close()
    summary.skipped = reader.skipped
    return summary


class Shown:
    """Pictures and texts for the report, a bounded number of them."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.pictures: dict[str, bytes] = {}
        self._risky = self._safe = 0

    def wants(self, result: Result) -> bool:
        """Whether there is room for an item of this rating."""
        return self.room(safe=result.rating == "safe") > 0

    def room(self, *, safe: bool) -> int:
        """How many more items there is room for."""
        return SHOWN_SAFE - self._safe if safe else SHOWN - self._risky

    def add(self, result: Result, text: str, image: bytes | None) -> None:
        """Keep an item's text and picture, while there is room."""
        if not self.wants(result):
            return
        safe = result.rating == "safe"
        self._safe, self._risky = self._safe + safe, self._risky + (not safe)
        if text:
            self.texts[result.id] = text[:TEXT_SHOWN]
        if image is not None and result.p_unsafe is not None:
            try:
                self.pictures[result.id] = thumbnail(image)
            except InputError as error:
                log.debug("%s: no thumbnail: %s", result.id, error)


def result_of_line(line: dict[str, Any]) -> Result:
    """The result that a line of ``results.jsonl`` was written from."""
    error = line["error"]
    return Result(
        line["id"],
        line["source"],
        line["modality"],
        line["rating"],
        line["p_unsafe"],
        tuple(NodeScore(**{**p, "path": tuple(p["path"])}) for p in line["paths"]),
        NoveltyScores(**line["novelty"]),
        line["radius"],
        line["channels"],
        None if error is None else ErrorRecord(**error),
        Hashes(**line["hashes"]),
    )


def _read_text(result: Result) -> str:
    """What was read in an item's picture."""
    return str(result.channels.get("ocr", {}).get("text", ""))


def collection_meta(
    model: SafetyModel, view: PolicyView, *, reading: str, reads: bool
) -> CollectionMeta:
    """What the vectors and scores of a collection mean that this model judges under a view.

    Args:
        reading, reads: as in :meth:`SafetyModel.judge_encoded`.
    """
    table, apexes = model.place(view)
    categories = table.leaves[table.risk | table.inactive].tolist()
    return CollectionMeta(
        dim=apexes.space.shape[1],
        c=float(apexes.c),
        geometry=apexes.geometry,
        model=model.hash,
        taxonomy=view.taxonomy.hash,
        policy=view.policy.hash,
        model_name=model.name,
        nodes=tuple(table.ids[i] for i in categories),
        policy_name=view.policy.name,
        rules=view.policy.to_dict()["nodes"],
        review=view.policy.review.to_dict(),
        reading=reading,
        reads=reads,
    )


def report_scan(out: Path, model: SafetyModel, view: PolicyView, shown: Shown, title: str) -> None:
    """Write report.html from the results and the collection in `out`."""
    table, apexes = model.place(view)
    collection, results = Collection.open(out), ResultLines(out / RESULTS)
    write_report(
        out / REPORT,
        ReportData(
            results=results,
            texts=shown.texts,
            thumbnails=shown.pictures,
            tangents=StoredTangents(collection, results, apexes.space.shape[1]),
            node_ids=table.ids,
            node_tangents=apexes.tangent().numpy(),
            c=float(apexes.c),
            geometry=apexes.geometry,
            taxonomy=view.taxonomy,
            active=frozenset(n for n, a in zip(table.ids, table.active.tolist(), strict=True) if a),
            title=title or out.name,
            model=model.name,
            policy=view.policy.name,
            decisions={k: d.words for k, d in collection.decisions().items()},
        ),
    )
