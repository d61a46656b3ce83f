"""The scan: items in, results.jsonl, a collection and a report out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hysafe.app.pipeline import Judgement, SafetyModel, ScanOptions
from hysafe.app.report import ReportData, write_report
from hysafe.data.images import thumbnail
from hysafe.data.inputs import InputReader
from hysafe.errors import InputError
from hysafe.index import CollectionMeta, CollectionWriter
from hysafe.index.collection import Collection, matrix
from hysafe.taxonomy import Policy

__all__ = ["RESULTS", "REPORT", "ScanSummary", "scan"]

RESULTS, REPORT = "results.jsonl", "report.html"
# Items the report shows with their picture and text: those to be looked at, and some safe ones.
SHOWN, SHOWN_SAFE = 3000, 600
TEXT_SHOWN = 600
# Rows that go to the table at once.
TABLE_BATCH = 512

log = logging.getLogger(__name__)


@dataclass
class ScanSummary:
    """What a scan did.

    Attributes:
        items: number of rows. ratings, nodes, errors: counts. skipped: files that were neither
        pictures nor texts. out: folder with the three outputs.
    """

    out: Path
    items: int = 0
    skipped: int = 0
    ratings: Counter[str] = field(default_factory=Counter)
    nodes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


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
    progress: Callable[[int], None] | None = None,
) -> ScanSummary:
    """Judge everything under `paths` and write the outputs into `out`.

    Args:
        paths: pictures, folders, Parquet, JSONL, text files, or ``-``.
        out: made if missing; earlier outputs in it are replaced.
        model, policy, ocr, options: see :meth:`SafetyModel.judge`.
        report: write report.html.
        text_column, image_column: of tables.
        progress: called with the number of rows done.

    Raises:
        InputError: a path does not exist, or `out` cannot be written.
    """
    reader = InputReader(
        paths, text_column=text_column, image_column=image_column, exclude=[str(out)]
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {out}: cannot be made ({error.strerror}). Name another folder."
        ) from error
    view = model.view(policy)
    table, apexes = model.place(view)
    writer = CollectionWriter(out, _meta(model, view, table, apexes))
    summary, shown = ScanSummary(out), _Shown()
    judged = model.judge(reader, policy=policy, ocr=ocr, options=options)
    with (out / RESULTS).open("w", encoding="utf-8") as lines:
        while batch := list(islice(judged, TABLE_BATCH)):
            for j in batch:
                lines.write(json.dumps(j.result.to_dict(), ensure_ascii=False) + "\n")
                summary.items += 1
                summary.ratings[j.result.rating] += 1
                if j.result.error:
                    summary.errors[j.result.error.type] += 1
                if j.result.paths and j.result.rating != "safe":
                    summary.nodes[j.result.paths[0].node] += 1
                if report:
                    shown.add(j)
                if progress:
                    progress(summary.items)
            lines.flush()
            writer.append(
                [j.result for j in batch],
                [j.vector for j in batch],
                [j.text_vector for j in batch],
                [j.scores for j in batch],
            )
    summary.skipped = reader.skipped
    if report:
        _report(out, model, view, table, apexes, shown, title)
    return summary


class _Shown:
    """Pictures and texts for the report, a bounded number of them."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.pictures: dict[str, bytes] = {}
        self._risky = self._safe = 0

    def add(self, judgement: Judgement) -> None:
        safe = judgement.result.rating == "safe"
        if (self._safe >= SHOWN_SAFE) if safe else (self._risky >= SHOWN):
            return
        self._safe, self._risky = self._safe + safe, self._risky + (not safe)
        name = judgement.result.id
        if judgement.text:
            self.texts[name] = judgement.text[:TEXT_SHOWN]
        image = judgement.item.image
        if image is not None and judgement.vector is not None:
            try:
                self.pictures[name] = thumbnail(image)
            except InputError as error:
                log.debug("%s: no thumbnail: %s", name, error)


def _meta(model: SafetyModel, view: Any, table: Any, apexes: Any) -> CollectionMeta:
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
    )


def _report(
    out: Path, model: SafetyModel, view: Any, table: Any, apexes: Any, shown: _Shown, title: str
) -> None:
    with (out / RESULTS).open(encoding="utf-8") as lines:
        results = [json.loads(line) for line in lines]
    rows = Collection.open(out).to_arrow(["id", "vector", "text_vector"])
    vectors = matrix(rows["vector"], apexes.space.shape[1])
    texts = matrix(rows["text_vector"], apexes.space.shape[1])
    if rows["id"].to_pylist() != [r["id"] for r in results]:
        position = {name: i for i, name in enumerate(rows["id"].to_pylist())}
        order = np.array([position[r["id"]] for r in results], dtype=int)
        vectors, texts = vectors[order], texts[order]
    # an item stands on the map where the channel that decided saw it
    spoke = np.array([r["channels"].get("decided_by") in ("ocr", "text") for r in results])
    use = spoke[:, None] & np.isfinite(texts) if len(results) else np.empty_like(texts, dtype=bool)
    vectors = np.where(use, texts, vectors)
    write_report(
        out / REPORT,
        ReportData(
            results=results,
            texts=shown.texts,
            thumbnails=shown.pictures,
            tangents=vectors,
            node_ids=table.ids,
            node_tangents=apexes.tangent().numpy(),
            c=float(apexes.c),
            geometry=apexes.geometry,
            taxonomy=view.taxonomy,
            active=frozenset(n for n, a in zip(table.ids, table.active.tolist(), strict=True) if a),
            title=title or out.name,
            model=model.name,
            policy=view.policy.name,
        ),
    )
