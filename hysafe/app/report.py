"""``report.html``: one self-contained file in which a person reads what a scan found.

Names, texts and pictures of a collection are hostile input. They never become markup: they travel
in a JSON block in which every ``<`` is escaped, the page's script makes text nodes and nothing
else, and a content security policy allows this script, this style sheet and ``data:`` pictures.
The page loads nothing. Numbers, words and positions are made here; the script draws and filters.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import torch

from hysafe.errors import ConfigError, ShapeError
from hysafe.geometry import get_space, lorentz
from hysafe.taxonomy import Taxonomy

__all__ = ["DiskLayout", "ReportData", "disk_layout", "nearest_items", "write_report"]

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


@dataclass(frozen=True)
class ReportData:
    """All that a report shows.

    Args:
        results: rows of ``results.jsonl``, see :meth:`hysafe.types.Result.to_dict`.
        texts: item id -> text shown (may be shortened).
        thumbnails: item id -> small JPEG.
        tangents: tangent vectors at the origin [n, D], rows as in `results`, NaN without a point.
        node_ids, node_tangents: nodes that have a point, and their tangent vectors [N, D].
        c: curvature magnitude. geometry: ``lorentz`` or ``euclidean``.
        taxonomy: of the policy view. active: ids of the nodes that count as risk under it.
        title, model, policy: names for the header.
        decisions: item id -> what a person decided on it, in words.
    """

    results: Sequence[dict[str, Any]]
    texts: Mapping[str, str]
    thumbnails: Mapping[str, bytes]
    tangents: np.ndarray
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
    payload = _payload(data, max_items)
    partial = path.with_name(path.name + ".part")
    # a name may hold half a surrogate pair (undecodable file names): "?" in the page
    partial.write_bytes(_page(data, payload).encode("utf-8", "replace"))
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


def nearest_items(
    tangents: np.ndarray,
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
        A list of at most `count` per row that has a point. Equal points are found by their bytes,
        so that a collection of copies costs nothing.
    """
    tangents = np.ascontiguousarray(tangents, dtype=np.float32)
    groups: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(np.isfinite(tangents).all(axis=1)).tolist():
        groups.setdefault(tangents[row].tobytes(), []).append(row)
    members = list(groups.values())
    group_of = {row: g for g, same in enumerate(members) for row in same}
    wanted = [row for row in rows if row in group_of]
    if not wanted:
        return {}
    points = get_space(geometry).exp_map0(torch.from_numpy(tangents[[m[0] for m in members]]), c)
    near = _nearest_points(points, sorted({group_of[row] for row in wanted}), c, geometry, count)
    result = {}
    for row in wanted:
        own = group_of[row]
        candidates = [(other, 0.0) for other in members[own][: count + 1] if other != row]
        for group, distance in near[own]:
            candidates += [(other, distance) for other in members[group][:count]]
        result[row] = candidates[:count]
    return result


def _nearest_points(
    points: torch.Tensor, queries: Sequence[int], c: float, geometry: str, count: int
) -> dict[int, list[tuple[int, float]]]:
    """Nearest other points of each query index; a shortlist by products, then exact distances."""
    space = get_space(geometry)

    def rank(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # smaller is nearer
        if geometry == "lorentz":
            return -lorentz.pairwise_inner(x, y, c)  # cosh of the distance, one product
        return space.pairwise_dist(x, y, c)

    near: dict[int, list[tuple[int, float]]] = {}
    for start in range(0, len(queries), QUERY_BLOCK):
        block = torch.tensor(queries[start : start + QUERY_BLOCK])
        best, index = torch.empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.long)
        for low in range(0, len(points), POINT_BLOCK):
            other = points[low : low + POINT_BLOCK]
            score = rank(points[block], other).nan_to_num(nan=torch.inf)
            score[block[:, None] == torch.arange(low, low + len(other))] = torch.inf  # itself
            size = min(SHORTLIST, len(other))
            score, column = score.topk(size, largest=False)
            best, index = torch.cat((best, score), 1), torch.cat((index, column + low), 1)
        best, order = best.topk(min(SHORTLIST, best.shape[1]), largest=False)
        index = index.gather(1, order)  # [queries, shortlist]
        distance = space.dist(points[block][:, None], points[index], c)
        distance = torch.where(torch.isfinite(best), distance, torch.inf)
        distance, order = distance.sort(stable=True)
        index = index.gather(1, order)
        for row, query in enumerate(block.tolist()):
            pairs = zip(index[row].tolist(), distance[row].tolist(), strict=True)
            near[query] = [(i, d) for i, d in pairs if math.isfinite(d)][:count]
    return near


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
    for name, array, count in (
        ("tangents", data.tangents, len(data.results)),
        ("node_tangents", data.node_tangents, len(data.node_ids)),
    ):
        if array.ndim != 2 or array.shape[0] != count:
            raise ShapeError(
                f"ReportData.{name} expected [{count}, D], got {array.shape}. Give one row per "
                "entry, NaN where there is no point."
            )
    if data.tangents.shape[1] != data.node_tangents.shape[1]:
        raise ShapeError(
            f"ReportData: tangents have D = {data.tangents.shape[1]}, node_tangents "
            f"D = {data.node_tangents.shape[1]}. Take both from one model."
        )


def _payload(data: ReportData, max_items: int) -> dict[str, Any]:
    """The JSON block of the page."""
    nodes = _Nodes(data.taxonomy)
    applies = [nodes.of_row(row) for row in data.results]
    order = _queue_order(data.results)[:max_items]
    place = {row: i for i, row in enumerate(order)}
    neighbours = nearest_items(data.tangents, order, c=data.c, geometry=data.geometry)
    dots = _sample([RATINGS.index(r["rating"]) for r in data.results], data.tangents)
    layout = disk_layout(
        data.tangents[dots],
        data.node_ids,
        data.node_tangents,
        data.taxonomy,
        c=data.c,
        geometry=data.geometry,
    )
    return {
        "geometry": data.geometry,
        "nodes": _node_entries(data, nodes, applies, layout.nodes),
        "unplaced": _by_rating(
            row for row, found in zip(data.results, applies, strict=True) if not found
        ),
        "items": [
            _item(data, nodes, row, applies[row], neighbours.get(row, []), place) for row in order
        ],
        "total": len(data.results),
        "dots": [
            _dot(data.results[row], applies[row], position, place.get(row, -1))
            for row, position in zip(dots, layout.items, strict=True)
        ],
        "points": int(np.isfinite(data.tangents).all(axis=1).sum()),
        "rings": layout.rings,
        "errors": _errors(data.results),
    }


def _queue_order(results: Sequence[Mapping[str, Any]]) -> list[int]:
    """Rows, unsafe first, then review, errors, safe; the higher probability first."""

    def key(row: int) -> tuple[int, float, int]:
        result = results[row]
        unread = result["rating"] == "review" and bool(result["error"])
        group = 2 if unread else {"unsafe": 0, "review": 1, "safe": 3}[result["rating"]]
        return group, -(_number(result["p_unsafe"]) or 0.0), row

    return sorted(range(len(results)), key=key)


def _sample(ratings: Sequence[int], tangents: np.ndarray) -> list[int]:
    """Rows drawn on the disk: all, or evenly spaced ones of each rating, in input order."""
    with_point = np.isfinite(tangents).all(axis=1)
    rows = [np.flatnonzero(with_point & (np.array(ratings) == r)) for r in range(len(RATINGS))]
    total = sum(map(len, rows))
    if total <= MAX_DOTS:
        return sorted(int(i) for r in rows for i in r)
    keep: list[int] = []
    for r in rows:
        size = min(len(r), max(MIN_DOTS, round(MAX_DOTS * len(r) / total)))
        keep += [int(r[i]) for i in np.linspace(0, len(r) - 1, size).astype(int)]
    return sorted(keep)


def _by_rating(rows: Iterable[Mapping[str, Any]]) -> list[int]:
    counts = Counter(row["rating"] for row in rows)
    return [counts[r] for r in RATINGS]


def _node_entries(
    data: ReportData, nodes: _Nodes, applies: Sequence[Sequence[int]], positions: np.ndarray
) -> list[dict[str, Any]]:
    counts = np.zeros((len(nodes.nodes), len(RATINGS)), dtype=int)
    for row, found in zip(data.results, applies, strict=True):
        counts[found, RATINGS.index(row["rating"])] += 1
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
    applies: list[int],
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
        "in": applies,
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
            [place.get(i, -1), _name(data.results[i]), data.results[i]["rating"], round(d, 4)]
            for i, d in neighbours
        ],
        "error": bool(result["error"]),
    }


def _dot(
    result: Mapping[str, Any], applies: list[int], position: np.ndarray, item: int
) -> list[Any]:
    """[x, y, item of the queue]; what an item would say follows for those not in the queue."""
    at: list[Any] = [*(_position(position) or [0.0, 0.0]), item]
    if item < 0:
        kind = MODALITIES.index(result["modality"])
        at += [RATINGS.index(result["rating"]), kind, _name(result), applies]
    return at


def _errors(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    failed = [r for r in results if r["error"]]
    return {
        "types": Counter(str(r["error"]["type"]) for r in failed).most_common(),
        "rows": [
            [
                r["source"] or r["id"],
                str(r["error"]["type"]),
                _cut(str(r["error"]["message"]), MAX_MESSAGE),
            ]
            for r in failed[:MAX_ERRORS]
        ],
        "total": len(failed),
    }


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


def _page(data: ReportData, payload: Mapping[str, Any]) -> str:
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
        facts=_facts(data),
        tiles=_tiles(data.results),
        style=style,
        script=script,
        data=block.replace("<", "\\u003c"),
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _facts(data: ReportData) -> str:
    """Names and hashes of what the results depend on; several hashes if the rows are mixed."""

    def hashes(key: str) -> str:
        found = dict.fromkeys(str((r.get("hashes") or {}).get(key) or "") for r in data.results)
        return " ".join(f"<code>{html.escape(h)}</code>" for h in found if h)

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


def _tiles(results: Sequence[Mapping[str, Any]]) -> str:
    total = len(results)
    kinds = Counter(r["modality"] for r in results)
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
    for rating, count in zip(RATINGS, _by_rating(results), strict=True):
        cells.append(
            f'<button type="button" class="tile" data-rating="{rating}" aria-pressed="false">'
            f'<b>{count:,}</b><span class="share">{_share(count, total)}</span>'
            f'<span class="name"><i class="mark {rating}"></i>{rating.capitalize()}</span>'
            f'<span class="sub">{meaning[rating]}</span></button>'
        )
    failed = sum(bool(r["error"]) for r in results)
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
