"""``report.html``: one self-contained file in which a person reads what a scan found.

Names, texts and pictures of a collection are hostile input. They never become markup: they travel
in a JSON block in which every ``<`` is escaped, the page's script makes text nodes and nothing
else, and a content security policy allows this script, this style sheet and ``data:`` pictures.
The page loads nothing. Numbers, words and positions are made here; the script draws and filters.

A collection may be larger than the memory: some bytes are kept of each row, and only rows that the
page shows are asked for again.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from hysafe.errors import ConfigError, ShapeError
from hysafe.geometry import get_space, lorentz
from hysafe.taxonomy import Taxonomy

__all__ = [
    *("DiskLayout", "ReportData", "Results", "Tangents"),
    *("disk_layout", "nearest_items", "write_report"),
]

RATINGS = ("unsafe", "review", "safe")
CHANNELS = {"image": "the picture", "text": "the text", "ocr": "the text read in the picture"}
MODALITIES = ("image", "text", "image+text")

NEIGHBOURS = 3
# Pairs of points compared at once: 256 x 16,384 doubles are 32 MiB.
QUERY_BLOCK, POINT_BLOCK = 256, 16384
SHORTLIST = 8
# Dots on the disk; above, every rating keeps its share and at least MIN_DOTS items.
MAX_DOTS, MIN_DOTS = 2500, 300
# p-value at or below which the report calls an item novel.
NOVEL_AT = 0.05
# What one item may show: characters of its text, of the text read in its picture, of a message;
# nodes. Rows in the list of errors.
MAX_TEXT, MAX_READ, MAX_MESSAGE, MAX_PATHS, MAX_ERRORS = 4000, 1500, 500, 4, 500
# Softmax weight of a standard deviation of direction cosine when an item is turned towards nodes.
TURN = 2.0
# Share of the disk used where a flat space has no rim, and of a sector that stays empty.
FLAT_EXTENT, SECTOR_GAP = 0.95, 0.12
# Radii that may get a ring, and how far apart rings stand in the unit disk.
RING_RADII = tuple(n * 10.0**k for k in range(-2, 4) for n in (1, 2, 3, 5))
RING_APART = 0.12


class Tangents(Protocol):
    """Tangent vectors at the origin [n, D] that need not be in memory, NaN without a point."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, D)."""
        ...

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """All rows in order, at most `size` [b, D] at a time."""
        ...

    def take(self, rows: Sequence[int]) -> np.ndarray:
        """Some rows [len(rows), D], in the order asked for."""
        ...


class Results(Protocol):
    """Rows of ``results.jsonl`` that need not be in memory."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def __getitem__(self, row: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ReportData:
    """All that a report shows.

    Args:
        results: rows of ``results.jsonl``, see :meth:`hysafe.types.Result.to_dict`; gone through
            once, and those shown asked for by their place.
        texts: item id -> text shown (may be shortened).
        thumbnails: item id -> small JPEG.
        tangents: tangent vectors at the origin [n, D], rows as in `results`, NaN without a point.
        node_ids, node_tangents: nodes that have a point, and their tangent vectors [N, D].
        c: curvature magnitude. geometry: ``lorentz`` or ``euclidean``.
        taxonomy: of the policy view. active: ids of the nodes that count as risk under it.
        title, model, policy: names for the header.
        decisions: item id -> what a person decided on it, in words.
    """

    results: Results
    texts: Mapping[str, str]
    thumbnails: Mapping[str, bytes]
    tangents: np.ndarray | Tangents
    node_ids: Sequence[str]
    node_tangents: np.ndarray
    c: float
    geometry: str
    taxonomy: Taxonomy
    active: Collection[str]
    title: str
    model: str
    policy: str
    decisions: Mapping[str, str] = field(default_factory=dict)


def write_report(path: Path, data: ReportData, *, max_items: int = 3000) -> None:
    """Write the report to one file, which appears whole or not at all.

    Totals, tree counts and errors count every row; the queue embeds at most `max_items`, unsafe
    rows first, then review, errors and safe, and says how many it leaves out.

    Raises:
        ShapeError: tangents do not fit the rows. ConfigError: `max_items` is below 1, or the
            geometry is unknown. OSError: the file cannot be written.
    """
    _check(data, max_items)
    nodes = _Nodes(data.taxonomy)
    totals = _Totals(data, nodes)
    payload = _payload(data, totals, nodes, max_items)
    partial = path.with_name(path.name + ".part")
    # a name may hold half a surrogate pair (undecodable file names): "?" in the page
    partial.write_bytes(_page(data, totals, payload).encode("utf-8", "replace"))
    partial.replace(path)


# ---------------------------------------------------------------- positions and neighbours


class DiskLayout(NamedTuple):
    """Positions in the unit disk, NaN where there is no point, and rings of equal radius."""

    nodes: np.ndarray  # [N, 2]
    items: np.ndarray  # [n, 2]
    rings: tuple[tuple[float, float], ...]  # (geodesic radius, disk radius)


def disk_layout(
    tangents: np.ndarray,
    node_ids: Sequence[str],
    node_tangents: np.ndarray,
    taxonomy: Taxonomy,
    *,
    c: float,
    geometry: str,
) -> DiskLayout:
    r"""Nodes and items in two dimensions, each at its own geodesic radius.

    The radius is kept: :math:`\tanh(\sqrt c\,|v|/2)` in the Poincaré disk (linear in a flat
    space). Hundreds of directions do not fit into one angle, so that the angle only arranges: every
    domain has a sector, domains in the order of a principal component analysis of their directions,
    and an item is turned towards the leaves that its direction resembles most.

    Args:
        tangents: [n, D]. node_tangents: [N, D], rows as in `node_ids`.
    """
    radii, node_radii = _norms(tangents), _norms(node_tangents)
    finite = np.concatenate([radii[np.isfinite(radii)], node_radii[np.isfinite(node_radii)]])
    reach = float(finite.max()) if finite.size and finite.max() > 0 else 1.0

    def shrink(radius: np.ndarray) -> np.ndarray:
        if geometry == "euclidean":
            return radius * (FLAT_EXTENT / reach)
        return np.tanh(math.sqrt(c) * radius / 2)

    placed = {n: row for row, n in enumerate(node_ids) if n in taxonomy}
    angle_of = _node_angles(taxonomy, placed, node_tangents)
    node_angles = np.array([angle_of.get(n, np.nan) for n in node_ids], dtype=float)
    leaves = [
        row
        for n, row in placed.items()
        if taxonomy[n].kind in ("category", "benign", "background") and node_radii[row] > 0
    ] or [row for row in placed.values() if node_radii[row] > 0]
    angles = _item_angles(tangents, node_tangents[leaves], node_angles[leaves])
    rings: list[tuple[float, float]] = []
    for radius in RING_RADII:
        rho = float(shrink(np.array(radius)))
        if radius <= reach and rho - (rings[-1][1] if rings else 0.0) >= RING_APART:
            rings.append((radius, rho))
    return DiskLayout(
        _polar(shrink(node_radii), node_angles), _polar(shrink(radii), angles), tuple(rings)
    )


class _InMemory:
    """An array as :class:`Tangents`."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors, self.shape = vectors, vectors.shape

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self._vectors), size):
            yield self._vectors[start : start + size]

    def take(self, rows: Sequence[int]) -> np.ndarray:
        return self._vectors[np.asarray(rows, dtype=np.int64)]


def _readable(tangents: np.ndarray | Tangents) -> Tangents:
    return _InMemory(tangents) if isinstance(tangents, np.ndarray) else tangents


def nearest_items(
    tangents: np.ndarray | Tangents,
    rows: Iterable[int],
    *,
    c: float,
    geometry: str,
    count: int = NEIGHBOURS,
) -> dict[int, list[tuple[int, float]]]:
    """The nearest other items of each row: (row, geodesic distance), nearest first.

    Args:
        tangents: tangent vectors [n, D]; rows with NaN have no neighbours and are none.
        rows: rows asked for.

    Returns:
        A list of at most `count` per row that has a point; of items at one distance the earlier.
    """
    source = _readable(tangents)
    asked = np.fromiter(dict.fromkeys(rows), np.int64)
    own = np.ascontiguousarray(source.take(asked.tolist()), dtype=np.float32)
    own = own.reshape(len(asked), source.shape[1])
    known = np.isfinite(own).all(axis=1)
    asked, own = asked[known], own[known]
    if not len(asked):
        return {}
    space = get_space(geometry)
    queries = space.exp_map0(torch.from_numpy(own), c)
    near = _Nearest(queries, torch.from_numpy(asked), c, geometry, SHORTLIST * (count + 1))
    place = 0
    for block in source.blocks(POINT_BLOCK):
        block = np.ascontiguousarray(block, dtype=np.float32)
        kept = _few_of_each(block, count + 1)
        near.add(torch.from_numpy(block[kept]), torch.from_numpy(kept + place))
        place += len(block)
    return near.found(source, count)


def _few_of_each(vectors: np.ndarray, most: int) -> np.ndarray:
    """Places of the rows [n, D] that are finite, equal ones `most` times: more copies of a point
    than neighbours wanted can be nobody's neighbours."""
    seen: Counter[bytes] = Counter()
    kept = []
    for place in np.flatnonzero(np.isfinite(vectors).all(axis=1)).tolist():
        point = vectors[place].tobytes()
        seen[point] += 1
        if seen[point] <= most:
            kept.append(place)
    return np.array(kept, dtype=np.int64)


class _Nearest:
    """A shortlist by products for each query point, block by block; then exact distances.

    Args:
        points: queries [Q, D], and their rows [Q]. size: of the shortlist.
    """

    def __init__(
        self, points: torch.Tensor, rows: torch.Tensor, c: float, geometry: str, size: int
    ) -> None:
        self._points, self._rows, self._c, self._size = points, rows, c, size
        self._space, self._flat = get_space(geometry), geometry != "lorentz"
        self._score = torch.empty(len(points), 0)
        self._row = torch.empty(len(points), 0, dtype=torch.long)

    def add(self, tangents: torch.Tensor, rows: torch.Tensor) -> None:
        """Take tangent vectors [b, D] of these rows [b] into account."""
        if not len(rows):
            return
        others = self._space.exp_map0(tangents, self._c)
        parts = []
        for start in range(0, len(self._points), QUERY_BLOCK):
            part = slice(start, start + QUERY_BLOCK)
            score = self._rank(self._points[part], others).nan_to_num(nan=torch.inf)
            score[self._rows[part, None] == rows] = torch.inf  # itself
            score, column = score.topk(min(self._size, len(rows)), largest=False)
            parts.append((score, column))
        score, column = (torch.cat(p) for p in zip(*parts, strict=True))
        score = torch.cat((self._score, score), 1)
        row = torch.cat((self._row, rows[column]), 1)
        order = score.argsort(dim=1, stable=True)[:, : self._size]
        self._score, self._row = score.gather(1, order), row.gather(1, order)

    def _rank(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # smaller is nearer
        if self._flat:
            return self._space.pairwise_dist(x, y, self._c)
        return -lorentz.pairwise_inner(x, y, self._c)  # cosh of the distance, one product

    def found(self, source: Tangents, count: int) -> dict[int, list[tuple[int, float]]]:
        """The nearest of each query, by exact distances."""
        found = {}
        for start in range(0, len(self._points), QUERY_BLOCK):
            part = slice(start, start + QUERY_BLOCK)
            rows = self._row[part]
            distinct, place = rows.unique(return_inverse=True)
            vectors = np.ascontiguousarray(source.take(distinct.tolist()), dtype=np.float32)
            near = self._space.exp_map0(torch.from_numpy(vectors), self._c)[place]
            points = self._points[part, None]
            distance = self._space.dist(points, near, self._c)
            distance[(points == near).all(-1)] = 0.0
            distance = torch.where(torch.isfinite(self._score[part]), distance, torch.inf)
            for query, others, far in zip(
                self._rows[part].tolist(), rows.tolist(), distance.tolist(), strict=True
            ):
                pairs = sorted((d, r) for r, d in zip(others, far, strict=True) if math.isfinite(d))
                found[query] = [(r, d) for d, r in pairs[:count]]
        return found


def _norms(vectors: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.asarray(vectors, dtype=np.float64), axis=-1)


def _polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)


def _node_angles(
    taxonomy: Taxonomy, placed: Mapping[str, int], tangents: np.ndarray
) -> dict[str, float]:
    """Angle of every node: sectors for the roots, shared out among their descendants."""
    roots = [n.id for n in taxonomy.children(None)]
    known = [n for n in roots if n in placed and np.isfinite(tangents[placed[n]]).all()]
    if len(known) > 2:
        directions = _unit(np.asarray(tangents[[placed[n] for n in known]], dtype=np.float64))
        plane = np.linalg.svd(directions - directions.mean(0), full_matrices=False)[2][:2]
        turn = dict(zip(known, np.arctan2(*(directions @ plane.T).T[::-1]), strict=True))
        roots.sort(key=lambda n: float(turn.get(n, math.inf)))
    weights = [1 + math.sqrt(len(taxonomy.children(n))) for n in roots]
    angles: dict[str, float] = {}

    def place(node_id: str, low: float, high: float) -> None:
        angles[node_id] = (low + high) / 2
        gap = SECTOR_GAP * (high - low) / 2
        children = taxonomy.children(node_id)
        width = (high - low - 2 * gap) / max(1, len(children))
        for i, child in enumerate(children):
            place(child.id, low + gap + i * width, low + gap + (i + 1) * width)

    edges = np.cumsum([0.0, *weights]) * (2 * math.pi / sum(weights))
    # the harmless domain, where most items are, looks down
    base = next((i for i, n in enumerate(roots) if not taxonomy[n].risky), 0)
    edges += 1.5 * math.pi - (edges[base] + edges[base + 1]) / 2
    for node_id, low, high in zip(roots, edges[:-1], edges[1:], strict=True):
        place(node_id, float(low), float(high))
    return angles


def _item_angles(tangents: np.ndarray, leaves: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Angle of each item [n]: mean of the leaves' angles, weighted by likeness of direction."""
    directions = _unit(np.asarray(tangents, dtype=np.float64))
    if len(leaves) < 2:  # nothing to turn towards: the plane of most variance
        rows = directions[np.isfinite(directions).all(axis=1)]
        if not len(rows) or directions.shape[1] < 2:
            return np.where(np.isfinite(directions).all(axis=1), 0.0, np.nan)
        plane = np.linalg.svd(rows, full_matrices=True)[2][:2]
        return np.arctan2(*(directions @ plane.T).T[::-1])
    nodes = _unit(np.asarray(leaves, dtype=np.float64))
    common = nodes.mean(0)  # what all leaves share says nothing about the side
    cosine = _unit(directions - common) @ _unit(nodes - common).T
    spread = cosine.std(axis=1, keepdims=True)
    likeness = TURN * (cosine - cosine.max(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
    weight = np.exp(likeness)
    turned = np.arctan2(weight @ np.sin(angles), weight @ np.cos(angles))
    return turned + _fan(directions - weight @ nodes / weight.sum(1, keepdims=True), len(nodes))


def _fan(residual: np.ndarray, leaves: int) -> np.ndarray:
    """Small offsets of angle [n] along what varies most within the leaves, so that items of one
    leaf lie side by side and not on one ray; a leaf's slot is 2 pi / leaves wide."""
    known = np.isfinite(residual).all(axis=1)
    if known.sum() < 2:
        return np.zeros(len(residual))
    centred = residual[known] - residual[known].mean(0)
    along = (residual - residual[known].mean(0)) @ np.linalg.eigh(centred.T @ centred)[1][:, -1]
    spread = float(along[known].std())
    return np.clip(along / (spread or 1.0), -2, 2) * (2 * math.pi / leaves)


# ---------------------------------------------------------------- what the page holds


class _Nodes:
    """Nodes of the taxonomy by position, with the positions of every node's path."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.nodes = list(taxonomy)
        self.index = {n.id: i for i, n in enumerate(self.nodes)}
        self.lineage = {
            n.id: tuple(self.index[p] for p in taxonomy.path(n.id).ids) for n in self.nodes
        }

    def of_row(self, row: Mapping[str, Any]) -> list[int]:
        """Positions of all nodes that apply to a row, ancestors included, ascending."""
        found = {i for p in row["paths"] for i in self.lineage.get(p["node"], ())}
        return sorted(found)

    def name(self, node_id: Any) -> str:
        """Name of a node; the text itself where the taxonomy does not know it."""
        known = isinstance(node_id, str) and node_id in self.index
        return self.nodes[self.index[node_id]].name if known else _cut(str(node_id), 80)


def _check(data: ReportData, max_items: int) -> None:
    if max_items < 1:
        raise ConfigError(f"max_items: got {max_items}, wanted at least 1.")
    get_space(data.geometry)
    for name, given, count in (
        ("tangents", data.tangents, len(data.results)),
        ("node_tangents", data.node_tangents, len(data.node_ids)),
    ):
        if len(given.shape) != 2 or given.shape[0] != count:
            raise ShapeError(
                f"ReportData.{name} expected [{count}, D], got {given.shape}. Give one row per "
                "entry, NaN where there is no point."
            )
    if data.tangents.shape[1] != data.node_tangents.shape[1]:
        raise ShapeError(
            f"ReportData: tangents have D = {data.tangents.shape[1]}, node_tangents "
            f"D = {data.node_tangents.shape[1]}. Take both from one model."
        )


class _Totals:
    """What the page says of all rows, and a few bytes of each."""

    def __init__(self, data: ReportData, nodes: _Nodes) -> None:
        self.counts = np.zeros((len(nodes.nodes), len(RATINGS)), dtype=int)
        self.unplaced = [0] * len(RATINGS)
        self.kinds: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.errors: list[list[str]] = []
        self.hashes: dict[str, dict[str, None]] = {k: {} for k in ("model", "taxonomy", "policy")}
        ratings, groups, risks = array("b"), array("b"), array("f")
        for row in data.results:
            rating = RATINGS.index(row["rating"])
            ratings.append(rating)
            groups.append(_group(row))
            risks.append(_number(row["p_unsafe"]) or 0.0)
            applies = nodes.of_row(row)
            self.counts[applies, rating] += 1
            self.unplaced[rating] += not applies
            self.kinds[row["modality"]] += 1
            for key, seen in self.hashes.items():
                seen.setdefault(str((row.get("hashes") or {}).get(key) or ""))
            if row["error"]:
                self._failed(row)
        self.ratings = np.frombuffer(ratings, np.int8) if ratings else np.empty(0, np.int8)
        self._groups = np.frombuffer(groups, np.int8) if groups else np.empty(0, np.int8)
        self._risks = np.frombuffer(risks, np.float32) if risks else np.empty(0, np.float32)
        finite = [np.isfinite(b).all(axis=1) for b in _readable(data.tangents).blocks(POINT_BLOCK)]
        self.placed = np.concatenate(finite) if finite else np.empty(0, dtype=bool)

    def _failed(self, row: Mapping[str, Any]) -> None:
        kind = str(row["error"]["type"])
        self.failures[kind] += 1
        if len(self.errors) < MAX_ERRORS:
            message = _cut(str(row["error"]["message"]), MAX_MESSAGE)
            self.errors.append([row["source"] or row["id"], kind, message])

    def by_rating(self) -> list[int]:
        return np.bincount(self.ratings, minlength=len(RATINGS)).tolist()

    def queue(self, most: int) -> list[int]:
        """Rows, unsafe first, then review, errors, safe; the higher probability first."""
        return np.lexsort((-self._risks, self._groups))[:most].tolist()

    def sample(self) -> list[int]:
        """Rows drawn on the disk: all, or evenly spaced ones of each rating, in input order."""
        rows = [np.flatnonzero(self.placed & (self.ratings == r)) for r in range(len(RATINGS))]
        total = sum(map(len, rows))
        if total <= MAX_DOTS:
            return sorted(int(i) for r in rows for i in r)
        keep: list[int] = []
        for r in rows:
            size = min(len(r), max(MIN_DOTS, round(MAX_DOTS * len(r) / total)))
            keep += [int(r[i]) for i in np.linspace(0, len(r) - 1, size).astype(int)]
        return sorted(keep)


def _group(row: Mapping[str, Any]) -> int:
    """Place of a row's kind in the queue."""
    unread = row["rating"] == "review" and bool(row["error"])
    return 2 if unread else {"unsafe": 0, "review": 1, "safe": 3}[row["rating"]]


def _payload(data: ReportData, totals: _Totals, nodes: _Nodes, max_items: int) -> dict[str, Any]:
    """The JSON block of the page."""
    order, dots = totals.queue(max_items), totals.sample()
    place = {row: i for i, row in enumerate(order)}
    neighbours = nearest_items(data.tangents, order, c=data.c, geometry=data.geometry)
    layout = disk_layout(
        _readable(data.tangents).take(dots),
        data.node_ids,
        data.node_tangents,
        data.taxonomy,
        c=data.c,
        geometry=data.geometry,
    )
    return {
        "geometry": data.geometry,
        "nodes": _node_entries(data, nodes, totals.counts, layout.nodes),
        "unplaced": totals.unplaced,
        "items": [_item(data, nodes, row, neighbours.get(row, []), place) for row in order],
        "total": len(data.results),
        "dots": [
            _dot(data.results, row, nodes, position, place.get(row, -1))
            for row, position in zip(dots, layout.items, strict=True)
        ],
        "points": int(totals.placed.sum()),
        "rings": layout.rings,
        "errors": {
            "types": totals.failures.most_common(),
            "rows": totals.errors,
            "total": totals.failures.total(),
        },
    }


def _node_entries(
    data: ReportData, nodes: _Nodes, counts: np.ndarray, positions: np.ndarray
) -> list[dict[str, Any]]:
    at = dict(zip(data.node_ids, positions, strict=True))
    active = set(data.active)
    return [
        {
            "id": node.id,
            "name": node.name,
            "kind": node.kind,
            "parent": nodes.index[node.parent] if node.parent is not None else -1,
            "root": nodes.lineage[node.id][0],
            "active": node.id in active,
            "counts": counts[i].tolist(),
            "at": _position(at.get(node.id)),
        }
        for i, node in enumerate(nodes.nodes)
    ]


def _item(
    data: ReportData,
    nodes: _Nodes,
    row: int,
    neighbours: Sequence[tuple[int, float]],
    place: Mapping[int, int],
) -> dict[str, Any]:
    result = data.results[row]
    text = data.texts.get(result["id"]) or ""
    read = str((result["channels"].get("ocr") or {}).get("text") or "")
    if result["modality"] == "image":  # whatever text it has was read in it
        text, read = "", read or text
    paths = _telling_paths(result["paths"], nodes)
    return {
        "row": row,
        "id": result["id"],
        "name": _name(result),
        "source": result["source"],
        "kind": result["modality"],
        "rating": result["rating"],
        "p": _number(result["p_unsafe"]),
        "in": nodes.of_row(result),
        "paths": [
            [
                nodes.index.get(p["node"], -1),
                " › ".join(map(str, p["path"])),
                _number(p["score"]),
                bool(p["in_cone"]),
            ]
            for p in paths[:MAX_PATHS]
        ],
        "more": max(0, len(paths) - MAX_PATHS),
        "text": _cut(text, MAX_TEXT),
        "read": _cut(read, MAX_READ),
        "thumb": _picture(data, result, nodes),
        "why": " ".join(filter(None, (_decided(data, result), _why(result, paths)))),
        "channel": _channel_words(result["channels"], nodes),
        "novelty": _novelty_words(result),
        "novel": _number(result["novelty"]["policy"]),
        "far": _number(result["novelty"]["distribution"]),
        "radius": _number(result["radius"]),
        "near": [
            [place.get(i, -1), _name(other), other["rating"], round(d, 4)]
            for i, d, other in ((i, d, data.results[i]) for i, d in neighbours)
        ],
        "error": bool(result["error"]),
    }


def _dot(results: Results, row: int, nodes: _Nodes, position: np.ndarray, item: int) -> list[Any]:
    """[x, y, item of the queue]; what an item would say follows for those not in the queue."""
    at: list[Any] = [*(_position(position) or [0.0, 0.0]), item]
    if item < 0:
        result = results[row]
        kind = MODALITIES.index(result["modality"])
        at += [RATINGS.index(result["rating"]), kind, _name(result), nodes.of_row(result)]
    return at


def _picture(data: ReportData, result: Mapping[str, Any], nodes: _Nodes) -> str | None:
    """Base64 of the thumbnail; "withheld" where a text-only node applies; None without one."""
    content = data.thumbnails.get(result["id"])
    if content is None:
        return None
    named = [p["node"] for p in result["paths"]]
    if result["rating"] != "safe":
        channels = [result["channels"].get(c) or {} for c in CHANNELS]
        named += [c["top"] for c in channels if isinstance(c.get("top"), str)]
    if any(n in nodes.index and nodes.nodes[nodes.index[n]].text_only for n in named):
        return "withheld"
    return base64.b64encode(content).decode("ascii")


def _telling_paths(paths: Sequence[Mapping[str, Any]], nodes: _Nodes) -> list[Mapping[str, Any]]:
    """Paths without the domains that a listed node below them already names."""
    listed = {p["node"] for p in paths}
    named = {nodes.lineage[n][0] for n in listed if len(nodes.lineage.get(n, ())) > 1}
    return [p for p in paths if nodes.index.get(p["node"], -1) not in named]


# ---------------------------------------------------------------- reasons in words


def _decided(data: ReportData, result: Mapping[str, Any]) -> str:
    words = _cut(data.decisions.get(result["id"], "").strip(), MAX_MESSAGE)
    return words if not words or words.endswith((".", "!", "?", "…")) else f"{words}."


def _why(result: Mapping[str, Any], paths: Sequence[Mapping[str, Any]]) -> str:
    words = []
    if result["error"]:
        problem = _cut(f"{result['error']['type']}: {result['error']['message']}", MAX_MESSAGE)
        if result["p_unsafe"] is None:
            return f"Could not be judged, so a person has to look. {problem}"
        words.append(f"A part of it could not be read. {problem}")
    reason = _cut(str(result["channels"].get("reason") or "").strip(), MAX_MESSAGE)
    if reason:
        stop = "" if reason.endswith((".", "!", "?")) else "."
        words.append(reason[:1].upper() + reason[1:] + stop)
    if words:
        return " ".join(words)
    if result["rating"] == "safe":
        return "No active node reaches its threshold."
    return "" if paths else "No active node holds it."


def _channel_words(channels: Mapping[str, Any], nodes: _Nodes) -> str:
    """Which channel decided, and what each of the others says alone."""

    def says(name: str) -> str:
        channel = channels[name]
        top = channel.get("top")
        node = f", {nodes.name(top)}" if top else ""
        return f"{_probability(channel.get('p_unsafe'))}{node}"

    spoke = [c for c in CHANNELS if isinstance(channels.get(c), Mapping)]
    if not spoke:
        return ""
    decided = channels.get("decided_by")
    decided = decided if decided in spoke else spoke[0]
    others = [c for c in spoke if c != decided]
    if not others:
        return f"Only {CHANNELS[decided]} was judged (risk {says(decided)})."
    rest = "; ".join(f"{CHANNELS[c]} alone: {says(c)}" for c in others)
    lead = CHANNELS[decided]
    return f"{lead[0].upper()}{lead[1:]} decided (risk {says(decided)}); {rest}."


def _novelty_words(result: Mapping[str, Any]) -> str:
    if result["p_unsafe"] is None:
        return ""
    policy = _number(result["novelty"]["policy"])
    distribution = _number(result["novelty"]["distribution"])
    if policy is None and distribution is None:
        return "Not measured: the model has no calibration for it."
    words = []
    if policy is not None and policy <= NOVEL_AT:
        words.append(
            f"New to the policy (p = {policy:.3f}): risky in a way that no active node explains."
        )
    if distribution is not None and distribution <= NOVEL_AT:
        words.append(f"Far from everything the model knows (p = {distribution:.3f}).")
    name, rationale = result["novelty"].get("name"), result["novelty"].get("rationale")
    if name:
        words.append(f"The guard calls it “{name}”: {rationale}.")
    elif rationale:
        words.append(f"{rationale[:1].upper()}{rationale[1:]}.")
    if not words:
        pairs = (("policy", policy), ("distribution", distribution))
        known = ", ".join(f"{name} p = {p:.2f}" for name, p in pairs if p is not None)
        words.append(f"Nothing new ({known}).")
    return " ".join(words)


def _probability(value: Any) -> str:
    number = _number(value)
    if number is None:
        return "unknown"
    if number < 0.01:
        return "below 0.01"
    return "above 0.99" if number > 0.99 else f"{number:.2f}"


def _name(result: Mapping[str, Any]) -> str:
    tail = str(result["source"]).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return _cut(tail or str(result["id"]), 120)


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1].rstrip() + "…"


def _number(value: Any) -> float | None:
    """A finite number, rounded for the page, or None: JSON knows neither NaN nor infinity."""
    if value is None or not math.isfinite(value):
        return None
    return round(float(value), 4)


def _position(point: np.ndarray | None) -> list[float] | None:
    if point is None or not np.isfinite(point).all():
        return None
    return [round(float(x), 4) for x in point]


# ---------------------------------------------------------------- the page


def _page(data: ReportData, totals: _Totals, payload: Mapping[str, Any]) -> str:
    folder = resources.files("hysafe.assets").joinpath("report")
    style = folder.joinpath("report.css").read_text("utf-8")
    script = folder.joinpath("report.js").read_text("utf-8")
    block = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    # one pass: a placeholder inside a value stays text
    return Template(folder.joinpath("page.html").read_text("utf-8")).substitute(
        csp=html.escape(policy),
        title=html.escape(data.title),
        facts=_facts(data, totals),
        tiles=_tiles(totals),
        style=style,
        script=script,
        data=block.replace("<", "\\u003c"),
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _facts(data: ReportData, totals: _Totals) -> str:
    """Names and hashes of what the results depend on; several hashes if the rows are mixed."""

    def hashes(key: str) -> str:
        return " ".join(f"<code>{html.escape(h)}</code>" for h in totals.hashes[key] if h)

    space = "hyperbolic" if data.geometry == "lorentz" else "flat (Euclidean control)"
    curvature = f", curvature −{data.c:.3g}" if data.geometry == "lorentz" else ""
    name = data.taxonomy.name
    rows = (
        ("Model", data.model, hashes("model")),
        ("Taxonomy", f"{name} {data.taxonomy.version}", hashes("taxonomy")),
        ("Policy", data.policy, hashes("policy")),
        ("Space", space + curvature, ""),
    )
    return "".join(
        f"<div><dt>{label}</dt><dd><bdi>{html.escape(value)}</bdi> {codes}</dd></div>"
        for label, value, codes in rows
    )


def _tiles(totals: _Totals) -> str:
    total, kinds = len(totals.ratings), totals.kinds
    words = {"image": "pictures", "text": "texts", "image+text": "pictures with text"}
    split = ", ".join(f"{kinds[k]:,} {words[k]}" for k in MODALITIES if kinds[k])
    cells = [
        f'<div class="tile"><b>{total:,}</b><span class="share"></span>'
        f'<span class="name">Items</span><span class="sub">{split}</span></div>'
    ]
    meaning = {
        "unsafe": "a node reaches its threshold",
        "review": "unsure, novel or unreadable",
        "safe": "no node reaches its threshold",
    }
    for rating, count in zip(RATINGS, totals.by_rating(), strict=True):
        cells.append(
            f'<button type="button" class="tile" data-rating="{rating}" aria-pressed="false">'
            f'<b>{count:,}</b><span class="share">{_share(count, total)}</span>'
            f'<span class="name"><i class="mark {rating}"></i>{rating.capitalize()}</span>'
            f'<span class="sub">{meaning[rating]}</span></button>'
        )
    failed = totals.failures.total()
    cells.append(
        f'<a class="tile" href="#errors"><b>{failed:,}</b>'
        f'<span class="share">{_share(failed, total)}</span>'
        '<span class="name"><i class="mark error"></i>Errors</span>'
        '<span class="sub">unreadable, whole or in part</span></a>'
    )
    return "".join(cells)


def _share(count: int, total: int) -> str:
    if not count or not total:
        return ""
    percent = 100 * count / total
    return "&lt; 1 %" if percent < 1 else f"{percent:.0f} %"
