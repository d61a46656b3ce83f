"""Stored items judged by columns: the ratings, rows and lines of a batch without a Result each.

What :meth:`SafetyModel.judge_encoded` gives item by item, to the byte; a rescore of a million items
has no time for a million objects. Arrays are over the n rows of a batch, those of a channel over
the rows that have it; a missing number is NaN, a missing node -1.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hysafe.app.pipeline import (
    DIGITS,
    LIST_FROM,
    NOT_JUDGED,
    RANK,
    TEXT_READ,
    TEXT_UNREAD,
    TOO_LONG,
    SafetyModel,
    Scored,
    rounded,
    text_pictures,
)
from hysafe.index import CollectionMeta
from hysafe.index.collection import PointColumn, matrix, point_columns, vector_column
from hysafe.taxonomy import PolicyView
from hysafe.types import Rating

__all__ = ["RATINGS", "ColumnJudge", "Spoken", "Verdicts"]

RATINGS: tuple[Rating, ...] = tuple(sorted(RANK, key=RANK.__getitem__))
CHANNELS = ("image", "text", "ocr")
# Numbers up to this one have their words in a table; p-values and scores all do.
TABLED = 20
# Bytes that JSON escapes: the quotation mark, the backslash and what lies below the blank.
ESCAPED = np.array([b < 0x20 or b in b'"\\' for b in range(256)])

TEXT = pa.large_string()


@dataclass(frozen=True)
class Spoken:
    """What one channel says of a batch; of a long text the riskiest window speaks.

    Attributes:
        row: int [m], ascending: the rows that have the channel. vectors: [m, D]. scored: of them.
        word: rating and reason of each, as places in :attr:`ColumnJudge.words`.
    """

    row: np.ndarray
    vectors: np.ndarray
    scored: Scored
    word: np.ndarray


@dataclass(frozen=True)
class Verdicts:
    """The judgements of a batch.

    Attributes:
        spoken: by channel. judged: bool [n], there was something to judge.
        rating: [n], places in :data:`RATINGS`. word: as in :class:`Spoken`, of the item.
        decided: [n], places in :data:`CHANNELS`.
        p_unsafe, radius, policy, distribution: [n], rounded.
        item, node, score, in_cone: [q], the listed nodes of all items, in order.
        first: [n], the node that comes first. scores: float32 [n, len(meta.nodes)].
    """

    spoken: Mapping[str, Spoken]
    judged: np.ndarray
    rating: np.ndarray
    word: np.ndarray
    decided: np.ndarray
    p_unsafe: np.ndarray
    radius: np.ndarray
    policy: np.ndarray
    distribution: np.ndarray
    item: np.ndarray
    node: np.ndarray
    score: np.ndarray
    in_cone: np.ndarray
    first: np.ndarray
    scores: np.ndarray


class ColumnJudge:
    """Judges batches of a collection under a view; several threads may ask at once.

    Args:
        stored: of the collection. meta: of the one that is written.

    Attributes:
        words: ratings with their reasons, as they come up.
    """

    def __init__(
        self, model: SafetyModel, view: PolicyView, stored: CollectionMeta, meta: CollectionMeta
    ) -> None:
        self.model, self.view, self.stored, self.meta = model, view, stored, meta
        self.schema = meta.schema()
        self.table, _ = model.place(view)
        taxonomy, ids = view.taxonomy, self.table.ids
        self.words: list[tuple[Rating, str]] = []
        self._places: dict[tuple[Rating, str], int] = {}
        self._lock = Lock()
        self._kept = self.table.leaves[self.table.risk | self.table.inactive].numpy()
        self._active = self.table.active.numpy()
        self._is_domain = np.array([taxonomy[n].kind == "domain" for n in ids])
        paths = [taxonomy.path(n) for n in ids]
        roots = {root: i for i, root in enumerate(dict.fromkeys(p.ids[0] for p in paths))}
        self._root = np.array([roots[p.ids[0]] for p in paths])
        order = {n: i for i, n in enumerate(sorted(ids))}
        self._rank = np.array([order[n] for n in ids])
        self._ids = pa.array(ids, pa.string())
        # the words of results.jsonl
        heads = [
            f'{{"node": {_json(n)}, "path": {_json(list(p.names))}, "score": '
            for n, p in zip(ids, paths, strict=True)
        ]
        self._heads = pa.array(heads, TEXT)
        tops = [f', "top": {_json(n)}, "rating": "{r}"' for n in (*ids, None) for r in RATINGS]
        self._tops = pa.array(tops, TEXT)
        told = {"model": meta.reading, "taxonomy": meta.taxonomy, "policy": meta.policy}
        self._end = f", {_json(told)[1:]}}}\n"

    # ------------------------------------------------------------ judging

    def judge(self, batch: pa.RecordBatch) -> Verdicts:
        """Judgements of rows with the columns :data:`hysafe.index.collection.ENCODED`."""
        return self.decide(batch, self.score(point_columns(batch, self.stored)))

    def score(self, points: Mapping[str, PointColumn]) -> dict[str, tuple[PointColumn, Scored]]:
        """What the model says of every point, before one window is chosen."""
        return {
            name: (points[name], self.model.score_vectors(name, points[name].vectors, self.view))
            for name in CHANNELS
            if name in points
        }

    def decide(
        self, batch: pa.RecordBatch, scored: Mapping[str, tuple[PointColumn, Scored]]
    ) -> Verdicts:
        """Ratings, reasons and listed nodes of a batch."""
        n = batch.num_rows
        spoken = {name: self._speak(name, batch, *both) for name, both in scored.items()}
        ranks = np.array([RANK[rating] for rating, _ in self.words], dtype=np.int8)
        rating, p_unsafe, radius, policy, distribution, highest = (np.full(n, np.nan)
                                                                   for _ in range(6))  # fmt: skip
        word, decided, judged = np.full(n, -1), np.full(n, -1), np.zeros(n, dtype=bool)
        rating[:] = -1
        for code, name in enumerate(CHANNELS):
            if name not in spoken:
                continue
            own, said = spoken[name], spoken[name].scored
            row, rank, p = own.row, ranks[own.word], said.p_unsafe
            # the riskier one decides, of equals the first
            wins = (rank > rating[row]) | ((rank == rating[row]) & (p > p_unsafe[row]))
            won = row[wins]
            rating[won], p_unsafe[won], word[won] = rank[wins], p[wins], own.word[wins]
            decided[won], radius[won] = code, said.radius[wins]
            distribution[won] = np.nan if said.distribution is None else said.distribution[wins]
            higher = ~judged[row] | (p > highest[row])
            highest[row[higher]] = p[higher]
            judged[row] = True
            if said.policy is not None:
                policy[row] = np.fmin(policy[row], said.policy)
        rating = np.where(judged, rating, RANK["review"]).astype(np.int8)
        for i in np.flatnonzero(judged & (rating == 0) & _valid(batch["error"])).tolist():
            rating[i] = RANK["review"]  # what could not be read is not cleared
            word[i] = self._word(("review", batch["error_message"][i].as_py()))
        item, node, score, in_cone = self._listed(spoken, n)
        first = np.full(n, -1)
        first[item[::-1]] = node[::-1]
        scores = np.zeros((n, len(self._kept)))
        for own in spoken.values():
            scores[own.row] = np.maximum(scores[own.row], own.scored.nodes[:, self._kept])
        return Verdicts(
            spoken, judged, rating, word, decided, rounded(highest), rounded(radius), policy,
            distribution, item, node, score, in_cone, first, scores.astype(np.float32),
        )  # fmt: skip

    def _speak(
        self, name: str, batch: pa.RecordBatch, points: PointColumn, every: Scored
    ) -> Spoken:
        """The windows that speak, each with the rating of its channel."""
        row, vectors = points.row, points.vectors
        if (row[1:] == row[:-1]).any():
            chosen = _riskiest(row, every.risk)
            row, vectors = row[chosen], vectors[chosen]
            every = Scored(*(_taken(getattr(every, f.name), chosen) for f in fields(Scored)))
        word = self._rated(every)
        ratings = np.array([RANK[rating] for rating, _ in self.words])
        if len(batch["cut"].flatten()):
            cut = np.array([name in c for c in batch["cut"].to_pylist()])[row]
            word[cut & (ratings[word] == 0)] = self._word(TOO_LONG)
            ratings = np.array([RANK[rating] for rating, _ in self.words])
        if name == "image":
            seen = text_pictures(every.margins, self.table, self.model.encoder.cone_scale_value)
            seen &= ratings[word] < RANK["unsafe"]
            read = pc.not_equal(batch["read_text"], "").to_numpy(zero_copy_only=False)[row]
            word[seen & read] = self._word(TEXT_READ)
            if not self.stored.reads:
                word[seen & ~read] = self._word(TEXT_UNREAD)
        return Spoken(row, vectors, every, word)

    def _rated(self, said: Scored) -> np.ndarray:
        """Words of the rating by scores alone: the triage is asked once for each case it tells
        apart."""
        triage, risk = self.model.triage_of(self.table.view), said.risk
        cases = [said.over, np.isnan(risk), risk >= triage.unsafe_from, risk >= triage.review_from]
        if said.distribution is not None:
            cases.append(said.distribution > triage.novelty_level)
        case = np.zeros(len(risk), dtype=int)
        for known in cases:
            case = 2 * case + known
        _, firsts, inverse = np.unique(case, return_index=True, return_inverse=True)
        words = [
            self._word(
                triage.rate(
                    float(risk[k]), bool(said.over[k]),
                    None if said.distribution is None else float(said.distribution[k]),
                )
            )
            for k in firsts.tolist()
        ]  # fmt: skip
        return np.array(words, dtype=int)[inverse]

    def _word(self, word: tuple[Rating, str]) -> int:
        with self._lock:  # batches may be judged at once
            place = self._places.setdefault(word, len(self.words))
            if place == len(self.words):
                self.words.append(word)
        return place

    def _listed(
        self, spoken: Mapping[str, Spoken], n: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Item, node, score and place in the cone of the nodes that apply, best first: categories
        and concepts; a domain where none of its categories does."""
        size = len(self._rank)
        found = []
        for own in spoken.values():
            row, node = np.nonzero(own.scored.nodes >= LIST_FROM)
            active = self._active[node]
            found.append(own.row[row[active]] * size + node[active])
        pairs = np.concatenate([np.empty(0, dtype=int), *found])
        item, node = np.divmod(np.unique(pairs) if len(found) > 1 else pairs, size)
        domain, root = self._is_domain[node], self._root[node]
        covered = np.zeros((n, self._root.max(initial=0) + 1), dtype=bool)
        covered[item[~domain], root[~domain]] = True
        kept = ~(domain & covered[item, root])
        item, node = item[kept], node[kept]
        score, margin = np.zeros(len(item)), np.full(len(item), -np.inf)
        for own in spoken.values():  # the highest of the channels
            place = np.full(n, -1)
            place[own.row] = np.arange(len(own.row))
            at = np.flatnonzero(place[item] >= 0)
            row, column = place[item[at]], node[at]
            score[at] = np.maximum(score[at], own.scored.nodes[row, column])
            margin[at] = np.maximum(margin[at], own.scored.margins[row, column])
        score, parts = rounded(score), 10**DIGITS
        below = parts - np.rint(score * parts).astype(np.int64)
        order = np.argsort((item * (parts + 1) + below) * size + self._rank[node])
        return item[order], node[order], score[order], margin[order] > 0

    # ------------------------------------------------------------ writing

    def rows(self, batch: pa.RecordBatch, found: Verdicts) -> pa.RecordBatch:
        """Rows of the table: what is stored of the items, with their new judgement."""
        vector, text_vector = self._vectors(batch, found)
        error, message = _errors(batch, found)
        columns = {
            "vector": vector,
            "text_vector": text_vector,
            "scores": vector_column(found.scores, found.judged),
            "rating": pa.array(RATINGS, pa.string()).take(pa.array(found.rating)),
            "p_unsafe": _floats(found.p_unsafe, found.judged),
            "node": self._ids.take(pa.array(found.first, mask=found.first < 0)),
            "novelty_policy": _floats(found.policy),
            "novelty_distribution": _floats(found.distribution),
            "radius": _floats(found.radius, found.judged),
            "error": error,
            "error_message": message,
        }
        arrays = [columns[k] if k in columns else batch[k] for k in self.schema.names]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _vectors(self, batch: pa.RecordBatch, found: Verdicts) -> tuple[pa.Array, pa.Array]:
        """The columns vector and text_vector; under another policy another window may speak."""
        many = _valid(batch["points"])
        columns = batch["vector"], batch["text_vector"]
        if not many.any():
            return columns
        made = [matrix(c, self.stored.dim) for c in columns]
        valid = [_valid(c) for c in columns]
        n = batch.num_rows
        has = {name: np.zeros(n, dtype=bool) for name in CHANNELS}
        for name, own in found.spoken.items():
            has[name][own.row] = many[own.row]
        image, text, read = (has[name] for name in CHANNELS)
        # first the picture, else the text; then what was read in the picture, else the text
        chosen = (
            {"image": image, "text": text & ~image, "ocr": read & ~image & ~text},
            {"ocr": read & (image | text), "text": text & image & ~read},
        )
        for into, of in zip(made, chosen, strict=True):
            for name in of.keys() & found.spoken.keys():
                own = found.spoken[name]
                use = of[name][own.row]
                into[own.row[use]] = own.vectors[use]
        return vector_column(made[0], valid[0]), vector_column(made[1], valid[1])

    def lines(self, batch: pa.RecordBatch, found: Verdicts) -> memoryview:
        """Lines of ``results.jsonl``, as bytes: those of :func:`hysafe.app.scan.result_line`."""
        error, message = _errors(batch, found)
        line = _joined(
            '{"id": ', _quoted(batch["id"]),
            ', "source": ', _quoted(batch["source"]),
            ', "modality": ', _quoted(batch["modality"]),
            _chosen([f', "rating": "{r}", "p_unsafe": ' for r in RATINGS], found.rating),
            _numbers(found.p_unsafe, found.judged),
            ', "paths": [', self._paths(found, batch.num_rows),
            '], "novelty": {"policy": ', _numbers(found.policy, ~np.isnan(found.policy)),
            ', "distribution": ', _numbers(found.distribution, ~np.isnan(found.distribution)),
            '}, "radius": ', _numbers(found.radius, found.judged),
            ', "channels": {', *self._channels(batch, found),
            '}, "error": ', _records(error, message),
            ', "hashes": {"content": ', _quoted(batch["content_hash"]), self._end,
        )  # fmt: skip
        _, offsets, data = line.buffers()
        ends = np.frombuffer(offsets, np.int64)[line.offset : line.offset + len(line) + 1]
        return memoryview(data)[int(ends[0]) : int(ends[-1])]

    def _paths(self, found: Verdicts, n: int) -> pa.Array:
        ends = _chosen([', "in_cone": false}', ', "in_cone": true}'], found.in_cone)
        listed = _joined(self._heads.take(pa.array(found.node)), _numbers(found.score), ends)
        offsets = np.concatenate(([0], np.cumsum(np.bincount(found.item, minlength=n))))
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), listed)
        return pc.binary_join(lists, pa.scalar(", ", TEXT))

    def _channels(self, batch: pa.RecordBatch, found: Verdicts) -> list[pa.Array]:
        """The parts of the record of channels."""
        n = batch.num_rows
        ratings = np.array([RANK[rating] for rating, _ in self.words], dtype=int)
        parts = []
        for name, own in found.spoken.items():
            top = np.where(own.scored.top < 0, len(self.table.ids), own.scored.top)
            part = [
                f'"{name}": {{"p_unsafe": ', _numbers(rounded(own.scored.p_unsafe)),
                self._tops.take(pa.array(top * len(RATINGS) + ratings[own.word])),
            ]  # fmt: skip
            if name == "ocr":
                part += [', "text": ', _quoted(batch["read_text"].take(pa.array(own.row)))]
            parts.append(_spread(_joined(*part, "}, "), own.row, n))
        named = [f'"decided_by": "{name}"' for name in CHANNELS] + [""]
        reasons = [f', "reason": {_json(reason)}' for _, reason in self.words] + [""]
        return [*parts, _chosen(named, found.decided), _chosen(reasons, found.word)]


# ---------------------------------------------------------------- arrays


def _riskiest(row: np.ndarray, risk: np.ndarray) -> np.ndarray:
    """Place of the first window of highest risk of each row; rows are ascending."""
    begins = np.concatenate(([True], row[1:] != row[:-1]))
    # a risk that is no number stands if it comes first, as in a comparison one by one
    level = np.where(np.isnan(risk), np.where(begins, np.inf, -np.inf), risk)
    group = np.cumsum(begins) - 1
    highest = np.maximum.reduceat(level, np.flatnonzero(begins))
    found = np.flatnonzero(level == highest[group])
    _, firsts = np.unique(group[found], return_index=True)
    return found[firsts]


def _taken(values: Any, rows: np.ndarray) -> Any:
    return None if values is None else values[rows]


def _valid(column: Any) -> np.ndarray:
    """Where a column has a value, bool [n]."""
    found: np.ndarray = column.is_valid().to_numpy(zero_copy_only=False)
    return found


def _floats(values: np.ndarray, valid: np.ndarray | None = None) -> pa.Array:
    valid = ~np.isnan(values) if valid is None else valid
    return pa.array(values.astype(np.float32), mask=~valid)


def _errors(batch: pa.RecordBatch, found: Verdicts) -> tuple[pa.Array, pa.Array]:
    """Types and messages of errors; what cannot be judged has one."""
    kind, message = batch["error"], batch["error_message"]
    if (bare := ~found.judged & ~_valid(kind)).any():
        message = pc.if_else(pa.array(bare), NOT_JUDGED.message, message)
        kind = pc.if_else(pa.array(bare), NOT_JUDGED.type, kind)
    return kind, message


# ---------------------------------------------------------------- JSON


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _joined(*parts: pa.Array | str) -> pa.Array:
    """Texts put together, row by row."""
    return pc.binary_join_element_wise(
        *(pa.scalar(p, TEXT) if isinstance(p, str) else p for p in (*parts, ""))
    )


def _chosen(texts: Sequence[str], places: np.ndarray) -> pa.Array:
    """The text at each place; the last one where it is -1."""
    places = np.asarray(places, dtype=np.int64)
    return pa.array(texts, TEXT).take(pa.array(np.where(places < 0, len(texts) - 1, places)))


def _spread(values: pa.Array, row: np.ndarray, n: int) -> pa.Array:
    """Texts of some rows [m] -> of all [n], "" elsewhere."""
    if len(row) == n:
        return values
    at = np.full(n, -1)
    at[row] = np.arange(len(row))
    return pc.fill_null(values.take(pa.array(at, mask=at < 0)), "")


@functools.cache
def _words_of_numbers() -> pa.Array:
    """JSON of k / 10**DIGITS for k from 0, then null."""
    parts = 10**DIGITS
    return pa.array([_json(k / parts) for k in range(TABLED * parts)] + ["null"], TEXT)


def _numbers(values: np.ndarray, valid: np.ndarray | None = None) -> pa.Array:
    """JSON of rounded numbers; null where not `valid`."""
    table = _words_of_numbers()
    valid = np.ones(len(values), dtype=bool) if valid is None else valid
    with np.errstate(invalid="ignore"):
        simple = (values >= 0) & (values < TABLED) & ~np.signbit(values)
    places = np.full(len(values), len(table) - 1)
    places[simple & valid] = np.rint(values[simple & valid] * 10**DIGITS).astype(np.int64)
    words = table.take(pa.array(places))
    if (other := valid & ~simple).any():
        spelled = pa.array([_json(v) for v in values[other].tolist()], TEXT)
        words = pc.replace_with_mask(words, pa.array(other), spelled)
    return words


def _quoted(column: pa.Array) -> pa.Array:
    """Texts as JSON; one that is null is null."""
    column = column.cast(TEXT)
    words = _joined('"', column, '"')
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    if data is not None and len(ends):
        told = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
        if len(places := np.flatnonzero(ESCAPED[told])):
            mask = np.zeros(len(column), dtype=bool)
            mask[np.searchsorted(ends, places + ends[0], side="right") - 1] = True
            spelled = pa.array([_json(t) for t in column.filter(pa.array(mask)).to_pylist()], TEXT)
            words = pc.replace_with_mask(words, pa.array(mask), spelled)
    return words


def _records(kind: pa.Array, message: pa.Array) -> pa.Array:
    """JSON of errors."""
    if kind.null_count == len(kind):
        return pa.array(["null"] * len(kind), TEXT)
    return pc.fill_null(
        _joined('{"type": ', _quoted(kind), ', "message": ', _quoted(message), "}"), "null"
    )
