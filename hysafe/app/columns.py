"""Stored items judged by columns: the ratings, rows and lines of a batch without a Result each.

What :meth:`SafetyModel.judge_encoded` gives item by item, to the byte; a rescore of a million items
has no time for a million objects, nor for margins to nodes that no result names: those of domains,
and those of the concepts of categories that are not listed. Arrays are over the n rows of a batch,
those of a channel over the rows that have it; a missing number is NaN, a missing node -1.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from hysafe.app.pipeline import (
    DIGITS,
    LIST_FROM,
    NOT_JUDGED,
    NOT_READ_WHOLE,
    RANK,
    TEXT_PICTURE_NODE,
    TEXT_PICTURE_SHARE,
    TEXT_READ,
    TEXT_UNREAD,
    SafetyModel,
    rounded,
)
from hysafe.geometry import Points
from hysafe.geometry.cones import ConeBank
from hysafe.index import CollectionMeta
from hysafe.index.collection import PointColumn, matrix, point_columns, vector_column
from hysafe.score.calibration import conformal_p_values
from hysafe.score.leaves import score_concepts, score_leaves
from hysafe.taxonomy import PolicyView
from hysafe.taxonomy.policy import DEFAULT_THRESHOLD
from hysafe.types import Rating

__all__ = ["RATINGS", "ColumnJudge", "Said", "Spoken", "Verdicts"]

RATINGS: tuple[Rating, ...] = tuple(sorted(RANK, key=RANK.__getitem__))
CHANNELS = ("image", "text", "ocr")
# Points scored at once; fewer stay in a nearer cache, more take fewer calls.
ROWS = 2048
# Numbers up to this one have their words in a table; p-values and scores all do.
TABLED = 20
# Bytes that JSON escapes: the quotation mark, the backslash and what lies below the blank.
ESCAPED = np.array([b < 0x20 or b in b'"\\' for b in range(256)])

TEXT = pa.large_string()


@dataclass(frozen=True)
class Said:
    """What the model says of the m points of a channel that speak, one a row; of a long text it is
    the riskiest window.

    Attributes:
        row: int [m], ascending: the rows that have the channel. vectors: [m, D].
        p_unsafe, risk, over, radius, top, policy, distribution: as in
            :class:`hysafe.app.pipeline.Scored`.
        kept: float32 [m, K], the scores that the table holds.
        text_picture: bool [m].
        place, node, score, inside: [q], the active nodes from LIST_FROM on: the place among the m
            points, the node, its score, and whether the point lies in its cone (of domains that is
            not known).
    """

    row: np.ndarray
    vectors: np.ndarray
    p_unsafe: np.ndarray
    risk: np.ndarray
    over: np.ndarray
    radius: np.ndarray
    top: np.ndarray
    policy: np.ndarray | None
    distribution: np.ndarray | None
    kept: np.ndarray
    text_picture: np.ndarray
    place: np.ndarray
    node: np.ndarray
    score: np.ndarray
    inside: np.ndarray


@dataclass(frozen=True)
class Spoken:
    """What a channel says, and the rating of each point by it alone.

    Attributes:
        word: rating and reason of each, as places in :attr:`ColumnJudge.words`.
    """

    said: Said
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
        self._scorers = {name: _Scorer(model, view, name) for name in CHANNELS}
        taxonomy, ids = view.taxonomy, self.table.ids
        self.words: list[tuple[Rating, str]] = []
        self._places: dict[tuple[Rating, str], int] = {}
        self._lock = Lock()
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

    def score(self, points: Mapping[str, PointColumn]) -> dict[str, Said]:
        """What the model says of each channel."""
        return {
            name: self._scorers[name].score(points[name]) for name in CHANNELS if name in points
        }

    def decide(self, batch: pa.RecordBatch, told: Mapping[str, Said]) -> Verdicts:
        """Ratings, reasons and listed nodes of a batch."""
        n = batch.num_rows
        spoken = {name: self._speak(name, batch, said) for name, said in told.items()}
        ranks = self._ranks()
        rating, p_unsafe, radius, policy, distribution, highest = (np.full(n, np.nan)
                                                                   for _ in range(6))  # fmt: skip
        word, decided, judged = np.full(n, -1), np.full(n, -1), np.zeros(n, dtype=bool)
        rating[:] = -1
        for code, name in enumerate(CHANNELS):
            if name not in spoken:
                continue
            own, said = spoken[name], spoken[name].said
            row, rank, p = said.row, ranks[own.word], said.p_unsafe
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
        item, node, score, in_cone = self._listed(told, n)
        first = np.full(n, -1)
        first[item[::-1]] = node[::-1]
        return Verdicts(
            spoken, judged, rating, word, decided, rounded(highest), rounded(radius), policy,
            distribution, item, node, score, in_cone, first, self._scores(told, n),
        )  # fmt: skip

    def _scores(self, told: Mapping[str, Said], n: int) -> np.ndarray:
        """The scores that the table holds: the highest of the channels."""
        if len(told) == 1 and len(only := next(iter(told.values())).kept) == n:
            return only
        scores = np.zeros((n, len(self.meta.nodes)), np.float32)
        for said in told.values():
            scores[said.row] = np.maximum(scores[said.row], said.kept)
        return scores

    def _speak(self, name: str, batch: pa.RecordBatch, said: Said) -> Spoken:
        """The rating of a channel alone."""
        word, row = self._rated(said), said.row
        if len(batch["cut"].flatten()):
            cut = np.array([name in c for c in batch["cut"].to_pylist()])[row]
            word[cut & (self._ranks()[word] == 0)] = self._word(NOT_READ_WHOLE)
        if said.text_picture.any():
            seen = said.text_picture & (self._ranks()[word] < RANK["unsafe"])
            read = pc.not_equal(batch["read_text"], "").to_numpy(zero_copy_only=False)[row]
            word[seen & read] = self._word(TEXT_READ)
            if not self.stored.reads:
                word[seen & ~read] = self._word(TEXT_UNREAD)
        return Spoken(said, word)

    def _ranks(self) -> np.ndarray:
        """Ranks of the ratings of all words."""
        return np.array([RANK[rating] for rating, _ in self.words], dtype=np.int8)

    def _rated(self, said: Said) -> np.ndarray:
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
        self, told: Mapping[str, Said], n: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Item, node, score and place in the cone of the nodes that apply, best first: categories
        and concepts; a domain where none of its categories does."""
        size, every = len(self._rank), list(told.values())
        item, node, score, inside = (
            np.concatenate([np.empty(0, dtype), *parts])
            for dtype, parts in (
                (int, [s.row[s.place] for s in every]), (int, [s.node for s in every]),
                (float, [s.score for s in every]), (bool, [s.inside for s in every]),
            )
        )  # fmt: skip
        open_ = np.zeros(len(item), dtype=bool)  # not known yet whether the cone holds it
        if len(every) > 1:  # the highest of the channels
            times = np.bincount(np.concatenate([s.row for s in every]), minlength=n)
            many = times[item] > 1
            keys, at = np.unique(item[many] * size + node[many], return_inverse=True)
            best, held = np.zeros(len(keys)), np.zeros(len(keys), dtype=bool)
            np.maximum.at(best, at, score[many])
            np.logical_or.at(held, at, inside[many])
            item, node, score, inside = (
                np.concatenate((one[~many], other))
                for one, other in (
                    (item, keys // size), (node, keys % size), (score, best), (inside, held)
                )
            )  # fmt: skip
            open_ = np.concatenate((open_[~many], ~held))
        domain, root = self._is_domain[node], self._root[node]
        covered = np.zeros((n, self._root.max(initial=0) + 1), dtype=bool)
        covered[item[~domain], root[~domain]] = True
        kept = ~(domain & covered[item, root])
        item, node, score, inside = item[kept], node[kept], score[kept], inside[kept]
        unknown = np.flatnonzero((open_ | domain)[kept])
        inside[unknown] = self._inside(told, item[unknown], node[unknown], n)
        score, parts = rounded(score), 10**DIGITS
        below = parts - np.rint(score * parts).astype(np.int64)
        order = np.argsort((item * (parts + 1) + below) * size + self._rank[node])
        return item[order], node[order], score[order], inside[order]

    def _inside(
        self, told: Mapping[str, Said], item: np.ndarray, node: np.ndarray, n: int
    ) -> np.ndarray:
        """Whether a cone holds a point of any channel of an item, bool [q] for pairs of both."""
        found = np.zeros(len(item), dtype=bool)
        for name, said in told.items():
            place = np.full(n, -1)
            place[said.row] = np.arange(len(said.row))
            at = np.flatnonzero(place[item] >= 0)
            if len(at):
                vectors = said.vectors[place[item[at]]]
                found[at] |= self._scorers[name].inside(vectors, node[at])
        return found

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
            has[name][own.said.row] = many[own.said.row]
        image, text, read = (has[name] for name in CHANNELS)
        # first the picture, else the text; then what was read in the picture, else the text
        chosen = (
            {"image": image, "text": text & ~image, "ocr": read & ~image & ~text},
            {"ocr": read & (image | text), "text": text & image & ~read},
        )
        for into, of in zip(made, chosen, strict=True):
            for name in of.keys() & found.spoken.keys():
                said = found.spoken[name].said
                use = of[name][said.row]
                into[said.row[use]] = said.vectors[use]
        return vector_column(made[0], valid[0]), vector_column(made[1], valid[1])

    def lines(
        self,
        batch: pa.RecordBatch,
        found: Verdicts,
        names: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
    ) -> memoryview:
        """Lines of ``results.jsonl``, as bytes: those of :func:`hysafe.app.output.result_line`.

        Args:
            names: row -> what a guard said of the item, ``name`` and ``rationale``.
        """
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
            _said({k: f", {_json(dict(said))[1:-1]}" for k, said in names.items()}, batch.num_rows),
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
            said = own.said
            top = np.where(said.top < 0, len(self.table.ids), said.top)
            part = [
                f'"{name}": {{"p_unsafe": ', _numbers(rounded(said.p_unsafe)),
                self._tops.take(pa.array(top * len(RATINGS) + ratings[own.word])),
            ]  # fmt: skip
            if name == "ocr":
                part += [', "text": ', _quoted(batch["read_text"].take(pa.array(said.row)))]
            parts.append(_spread(_joined(*part, "}, "), said.row, n))
        named = [f'"decided_by": "{name}"' for name in CHANNELS] + [""]
        reasons = [f', "reason": {_json(reason)}' for _, reason in self.words] + [""]
        return [*parts, _chosen(named, found.decided), _chosen(reasons, found.word)]


# ---------------------------------------------------------------- scores


class _Scorer:
    """Scores the points of one channel under a view, in float64: what
    :meth:`SafetyModel.score_vectors` gives, as far as a result or the table names it."""

    def __init__(self, model: SafetyModel, view: PolicyView, name: str) -> None:
        placed = model._placed(view)
        table = self.table = placed.table
        apexes, narrowed = placed.cones(name)
        self.apexes = apexes
        self.fit, self.scale = model.calibration.channel(name), model.encoder.cone_scale_value
        self.leaves = table.leaves[table.order]  # [L]
        self.text_picture: int | None = None  # its place in the order
        if name == "image" and TEXT_PICTURE_NODE in table.leaf_ids:
            self.text_picture = table.order.tolist().index(table.leaf_ids.index(TEXT_PICTURE_NODE))
        self.cones = _bank(apexes, torch.arange(len(table.ids)))
        dense = torch.cat((self.leaves, table.concepts[table.split]))
        self.dense = _bank(apexes, dense)
        # nothing is taken off where nothing is narrowed; concepts never are
        self.narrowed = None if narrowed is None else narrowed.double()
        self.narrow = None if self.narrowed is None else self.narrowed[dense][:, None]
        self.risky = table.leaves[table.risk]  # [R]
        active, thresholds = table.active, table.thresholds.double()
        self.own = active & (table.thresholds != DEFAULT_THRESHOLD)
        self.thresholds = thresholds
        self.weight = (DEFAULT_THRESHOLD / table.thresholds[self.risky]).double()  # [R]
        inner = torch.ones(len(table.ids), dtype=torch.bool)
        inner[table.leaves] = inner[table.concepts] = False
        self.upper = inner.nonzero().squeeze(1)  # [U]
        self.below = table.below[table.risk][:, self.upper].T.double()  # [U, R]
        self.stored = table.risk[table.risk | table.inactive].nonzero().squeeze(1)  # [R] of K
        self.kept = int((table.risk | table.inactive).sum())
        # concepts of each leaf at risk, [R, K]; a shorter row repeats itself
        place = torch.full((len(table.leaf_ids),), -1)
        place[table.risk] = torch.arange(len(self.risky))
        lists = [table.concepts[place[table.concept_leaf] == r] for r in range(len(self.risky))]
        width = max((len(own) for own in lists), default=0)
        self.members = torch.zeros((len(lists), width), dtype=torch.long)
        self.member = torch.zeros((len(lists), width), dtype=torch.bool)
        for r, own in enumerate(lists):
            self.members[r, : len(own)], self.member[r, : len(own)] = own, True
        # no concept scores above its category: below this score of it no concept is named
        named = self.thresholds[table.concepts][self.own[table.concepts]].tolist()
        self.least = min([LIST_FROM, *named])
        self.has_concepts = self.member.any(1)  # [R]
        # from which score on a leaf is named, [R]; below `lowest` nothing of a leaf is said
        self.named_from = torch.where(
            self.own[self.risky], thresholds[self.risky].clamp(max=LIST_FROM), LIST_FROM
        )
        self.lowest = min([self.least, *self.named_from.tolist()])

    def score(self, points: PointColumn) -> Said:
        """What the model says of the points of a channel."""
        n, risky = len(points.row), len(self.risky)
        told = torch.full((6, n), -torch.inf, dtype=torch.double)
        p_unsafe, risk, radius, energy, unheld, picture = told
        kept, top = torch.zeros(n, self.kept), torch.full((n,), -1)
        found_named: list[_Named] = []
        for start in range(0, n or 1, ROWS):  # a portion stays in the cache until all is said of it
            part = slice(start, start + ROWS)
            own = self._lifted(points.vectors[part])
            radius[part] = own.radius
            margins = self.dense.margins(own.space, own.square)
            if self.narrow is not None:
                margins -= self.narrow
            held = margins[:risky] > 0
            logits = margins[: len(self.leaves)].mul_(self.scale)
            split = margins[len(self.leaves) :].mul_(self.scale / self.fit.temperature)
            found = score_leaves(
                logits, split, self.table, slope=self.fit.slope, offset=self.fit.offset,
                temperature=self.fit.temperature,
            )  # fmt: skip
            leaves, p_unsafe[part] = found.leaves, found.p_unsafe
            energy[part], unheld[part] = found.energy, found.policy_evidence
            risk[part] = (self.weight @ leaves).clamp_(max=1)
            if self.text_picture is not None:
                picture[part] = logits[self.text_picture]
            by_point = leaves.T.contiguous()
            kept[part].index_copy_(1, self.stored, by_point.float())
            if risky:
                top[part] = self.risky[torch.from_numpy(by_point.numpy().argmax(1))]
            for named in (
                *self._of_leaves(leaves, held, own),
                self._of_domains(leaves, found.p_unsafe),
            ):
                found_named.append(named._replace(place=named.place + start))
        place, node, score, inside = (torch.cat(parts) for parts in zip(*found_named, strict=True))
        row, vectors = points.row, points.vectors
        if (row[1:] == row[:-1]).any():
            chosen = _riskiest(row, risk.numpy())
            row, vectors, at = row[chosen], vectors[chosen], torch.from_numpy(chosen)
            p_unsafe, risk, radius, energy, unheld, picture = told[:, at]
            kept, top = kept[at], top[at]
            window = torch.full((n,), -1)
            window[at] = torch.arange(len(at))
            spoken = window[place] >= 0
            place, node, score, inside = (
                window[place][spoken], node[spoken], score[spoken], inside[spoken]
            )  # fmt: skip
        over = torch.zeros(len(row), dtype=torch.bool)
        over[place[(score >= self.thresholds[node]) & self.own[node]]] = True
        listed = (score >= LIST_FROM) & self.table.active[node]
        seen = ~((picture + energy).exp() < TEXT_PICTURE_SHARE)  # its share of all leaves
        fit, policy, distribution = self.fit, None, None
        if fit.distribution and fit.policy:
            policy = rounded(conformal_p_values(unheld, fit.policy, fit.n).numpy())
            distribution = rounded(conformal_p_values(energy, fit.distribution, fit.n).numpy())
        return Said(
            row, vectors, p_unsafe.numpy(), risk.numpy(), over.numpy(), radius.numpy(),
            top.numpy(), policy, distribution, kept.numpy(), seen.numpy(),
            place[listed].numpy(), node[listed].numpy(), score[listed].numpy(),
            inside[listed].numpy(),
        )  # fmt: skip

    def inside(self, vectors: np.ndarray, node: np.ndarray) -> np.ndarray:
        """Whether points lie in the cones of nodes, bool [P]."""
        space = self._lifted(vectors).space
        nodes = torch.from_numpy(node)
        margins = self.cones.margins_at(space, nodes)
        if self.narrowed is not None:
            margins = margins - self.narrowed[nodes]
        found: np.ndarray = (margins > 0).numpy()
        return found

    def _lifted(self, vectors: np.ndarray) -> _Lifted:
        tangents = torch.from_numpy(np.ascontiguousarray(vectors)).double()
        points = Points.from_tangent(tangents, self.apexes.c, self.apexes.geometry)
        if points.geometry != "lorentz":
            return _Lifted(points.space, points.radius(), None)
        root = torch.as_tensor(points.c, dtype=torch.double).sqrt()
        radius = torch.linalg.vector_norm(tangents, dim=1)
        return _Lifted(points.space, radius, (root * radius).sinh_().square_())

    def _of_leaves(self, leaves: Tensor, held: Tensor, own: _Lifted) -> tuple[_Named, _Named]:
        """The leaves at risk that a result may name, and their concepts, with their scores."""
        r, place = (leaves >= self.lowest).nonzero(as_tuple=True)
        scores = leaves[r, place]
        named = scores >= self.named_from[r]
        at, of = r[named], place[named]
        spoken = _Named(of, self.risky[at], scores[named], held[at, of])
        wide = (scores >= self.least) & self.has_concepts[r]
        return spoken, self._of_concepts(r[wide], place[wide], scores[wide], own)

    def _of_concepts(self, r: Tensor, place: Tensor, leaves: Tensor, own: _Lifted) -> _Named:
        """The concepts of categories r [P] (places among the leaves at risk) of points [P]."""
        if not len(r):
            return _Named(place, r, leaves, r > 0)
        square = None if own.square is None else own.square[place]
        points = own.space.index_select(0, place)
        margins = self.cones.margins_of(points, r, self.members, square)  # [K, P]
        member, nodes = self.member.T[:, r], self.members.T[:, r]
        logits = (margins * (self.scale / self.fit.temperature)).masked_fill_(~member, -torch.inf)
        scores = score_concepts(logits, self.table.active[nodes] & member, leaves)
        k, pair = (scores >= self.least).nonzero(as_tuple=True)
        return _Named(place[pair], nodes[k, pair], scores[k, pair], margins[k, pair] > 0)

    def _of_domains(self, leaves: Tensor, p_unsafe: Tensor) -> _Named:
        """What lies above the leaves."""
        scores = torch.minimum(self.below @ leaves, p_unsafe)  # sums round up
        own = self.own[self.upper]
        named = scores >= torch.where(
            own, self.thresholds[self.upper].clamp(max=LIST_FROM), LIST_FROM
        )[:, None]  # fmt: skip
        u, place = named.nonzero(as_tuple=True)
        return _Named(place, self.upper[u], scores[u, place], u < 0)


class _Lifted(NamedTuple):
    """Points of a portion: space components [B, D], radii [B], and c|x|² [B] in hyperbolic space."""

    space: Tensor
    radius: Tensor
    square: Tensor | None


class _Named(NamedTuple):
    """Nodes [q] of points: place of the point, node, score, and whether its cone holds it."""

    place: Tensor
    node: Tensor
    score: Tensor
    inside: Tensor


class _PlainCones:
    """:class:`ConeBank` for points of any space, by its own functions."""

    def __init__(self, apexes: Points) -> None:
        self.apexes = apexes

    def margins(self, points: Tensor, square: Tensor | None = None) -> Tensor:
        own = self.apexes
        margins: Tensor = own.functions.pairwise_margin(own.space, points, own.c)
        return margins.T.contiguous()

    def margins_of(
        self, points: Tensor, groups: Tensor, members: Tensor, square: Tensor | None = None
    ) -> Tensor:
        every = self.margins(points)
        return every.gather(0, members.T[:, groups])

    def margins_at(self, points: Tensor, nodes: Tensor) -> Tensor:
        return self.margins(points).gather(0, nodes[None])[0]


def _bank(apexes: Points, nodes: Tensor) -> ConeBank | _PlainCones:
    own = apexes[nodes]
    return ConeBank(own.space, own.c) if own.geometry == "lorentz" else _PlainCones(own)


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


def _said(texts: Mapping[int, str], n: int) -> pa.Array | str:
    """Texts of a few of n rows, "" elsewhere."""
    if not texts:
        return ""
    places = np.zeros(n, dtype=np.int64)
    places[list(texts)] = np.arange(1, len(texts) + 1)
    return pa.array(["", *texts.values()], TEXT).take(pa.array(places))


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
