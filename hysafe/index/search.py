r"""Nearest neighbours over all points of a collection, exact or approximate.

Distance in the Lorentz model falls as the inner product with the query's time negated rises,
:math:`x_s\cdot q_s - x_t q_t = -\cosh(rd)/c`, so that one float32 product ranks all points. What
float32 may get wrong is bounded (the product's time term is shortened by :data:`SLACK`), a
shortlist by that bound is measured in float64, and it grows until nothing left out can be nearer:
the result is that of a float64 search over all points. An approximate search does the same over
the points of the :mod:`cells <hysafe.index.cells>` nearest to the query.

What lies near the origin is near to every query. So a search may take a share
:math:`\lambda` of an item's radius off its distance (1 is the Gromov product of query and item):
the products of a block become distances, in float32 and not above the true ones but for a small
tolerance, and the shortlist is one of :math:`d - \lambda R`.

The matrix [P, D + 1] and the tangent vectors [P, D] lie in ``index/`` beside the table, mapped
into memory, in the order of the scan or, once there are cells, in theirs. They are built again
whenever the table has changed, and never needed to open it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hysafe.errors import CollectionError, ShapeError
from hysafe.geometry import Points, get_space
from hysafe.index.cells import Cells, assign, cell_count, fit_centers, fit_size

if TYPE_CHECKING:
    from hysafe.index.collection import Collection

__all__ = ["EXACT_UP_TO", "Hit", "PointIndex", "nearest_of"]

FOLDER = "index"
STATE = "state.json"
FORMAT = 2
# Points up to which a search is exact where nobody says how.
EXACT_UP_TO = 2_000_000
# Share of the points that an approximate search reads, and at least so many for each item wanted.
PROBED_SHARE, PROBED_LEAST, PROBED_PER_ITEM = 0.05, 10_000, 100
# Queries at once, exact and approximate, and scores of one product: 1 MiB, which stays in the cache.
QUERY_BLOCK, PROBE_BLOCK = 128, 256
SCORES, MOST_ROWS = 1 << 18, 16384
# Rows that are not all allowed are gathered below this share, else read and left out afterwards.
GATHERED_SHARE, GATHERED_ROWS = 0.25, 8192
# Shortlist: so many points for k items, four times as many when that was not enough.
SHORTLIST_FACTOR, SHORTLIST_LEAST, GROWTH = 4, 64, 4
# Scores of one block up to which a plain comparison is the fastest.
FEW_SCORES = 1 << 14
# Candidates are thinned when there are so many times those wanted.
PENDING = 3
# Pairs measured at once in float64.
RERANK_BLOCK = 1024
# Points written at once.
WRITE_BLOCK = 65536

LEAST = np.finfo(np.float32).min
# What a distance made of a float32 product may be above the true one: near 0 it has half the digits.
TOLERANCE = 2e-3
# More than float32 may lose in a distance, and of a cosh relatively.
ROUNDED = 2e-5
# cosh of a radius up to which it is taken from the space components.
NEAR = 1.5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """One item found.

    Args:
        row: place in the scan. distance: geodesic. channel: whose point was nearest.
        value: what hits are ordered by, the distance less a share of the point's radius.
    """

    row: int
    distance: float
    channel: str
    value: float


@dataclass(frozen=True)
class _State:
    """What an index was built from, and its files."""

    stamp: str
    version: int
    model: str
    points: int
    dim: int
    matrix: str
    tangents: str
    owners: str
    # of the cells; "" where there are none. grouped: there were some, before the table changed
    centers: str = ""
    starts: str = ""
    grouped: bool = False
    format: int = FORMAT

    @property
    def files(self) -> tuple[str, ...]:
        names = (self.matrix, self.tangents, self.owners, self.centers, self.starts)
        return tuple(n for n in names if n)

    @classmethod
    def read(cls, folder: Path) -> _State:
        return cls(**json.loads((folder / STATE).read_text("utf-8")))

    def write(self, folder: Path) -> None:
        partial = folder / f"{STATE}.{os.getpid()}.tmp"
        partial.write_text(json.dumps(asdict(self)), "utf-8")
        partial.replace(folder / STATE)


CHANNELS = ("image", "text", "ocr")


class PointIndex:
    """All points of a collection, ready to be searched.

    Args:
        matrix: space components and the time (Euclidean: half the squared norm), float32
            [P, D + 1]. tangents: float32 [P, D].
        owners: row of the item and channel of each point, int64 [P, 2].
        cells: where each cell lies among the points; None where none are made.
        grouped: whether cells are wanted: they are there, or were before the table changed.
    """

    def __init__(
        self,
        matrix: np.ndarray,
        tangents: np.ndarray,
        owners: np.ndarray,
        *,
        c: float,
        geometry: str,
        key: tuple[str, int] = ("", 0),
        cells: Cells | None = None,
        grouped: bool = False,
    ) -> None:
        self.matrix, self.tangents, self.owners = matrix, tangents, owners
        self.c, self.geometry, self._key = c, geometry, key
        self.cells, self.grouped = cells, grouped
        self._centers: np.ndarray | None = None
        self._radii: np.ndarray | None = None
        self._warned = self._failed = False

    def __len__(self) -> int:
        return len(self.matrix)

    def fits(self, collection: Collection) -> bool:
        """Whether the table is still the one the index was built from."""
        return self._key == (collection.meta.stamp, collection.version)

    # ------------------------------------------------------------ building

    @classmethod
    def open(cls, collection: Collection) -> PointIndex:
        """The stored index of a collection; built first where it is missing, stale or damaged."""
        folder = collection.folder / FOLDER
        found = cls._load(folder, collection)
        if found is not None:
            return found
        try:
            folder.mkdir(exist_ok=True)
            cls._build(folder, collection)
        except OSError as error:  # a collection that cannot be written to is searched all the same
            log.info("%s: index kept in a temporary folder (%s)", collection.folder, error)
            with tempfile.TemporaryDirectory(prefix="hysafe-index-") as place:
                cls._build(Path(place), collection)
                # a mapped file stays readable after its folder is gone
                return cls._expect(Path(place), collection)
        return cls._expect(folder, collection)

    @classmethod
    def _expect(cls, folder: Path, collection: Collection) -> PointIndex:
        found = cls._load(folder, collection)
        if found is None:
            raise OSError(f"{folder}: the index just written cannot be read. Is the disk full?")
        return found

    @classmethod
    def _load(cls, folder: Path, collection: Collection) -> PointIndex | None:
        try:
            state = _State.read(folder)
            wanted = (FORMAT, collection.meta.stamp, collection.version, collection.meta.model)
            if (state.format, state.stamp, state.version, state.model) != wanted:
                return None
            n, dim = state.points, state.dim
            return cls(
                _map(folder / state.matrix, np.float32, (n, dim + 1)),
                _map(folder / state.tangents, np.float32, (n, dim)),
                _map(folder / state.owners, np.int64, (n, 2)),
                c=collection.meta.c,
                geometry=collection.meta.geometry,
                key=(state.stamp, state.version),
                cells=_load_cells(folder, state),
                grouped=state.grouped,
            )
        except (OSError, ValueError, TypeError) as error:
            log.debug("%s: no usable index: %s", folder, error)
            return None

    @classmethod
    def _build(cls, folder: Path, collection: Collection) -> None:
        """Stream the table into files of this version, then point the state file to them."""
        meta, version = collection.meta, collection.version
        name = f"{meta.stamp[:12]}-{version}-{os.getpid()}"
        state = _State(
            meta.stamp, version, meta.model, 0, meta.dim,
            f"matrix-{name}.f32", f"tangents-{name}.f32", f"owners-{name}.i64",
        )  # fmt: skip
        with contextlib.suppress(OSError, ValueError, TypeError):  # of an index before, if any
            state = replace(state, grouped=_State.read(folder).grouped)
        count = row = 0
        with (
            (folder / state.matrix).open("wb") as matrix,
            (folder / state.tangents).open("wb") as tangents,
            (folder / state.owners).open("wb") as owners,
        ):
            for items in collection.items():
                parts, owned = [], []
                for item in items:
                    for channel, points in item.points.items():
                        points = points[np.isfinite(points).all(axis=1)]
                        parts.append(points)
                        owned += [(row, CHANNELS.index(channel))] * len(points)
                    row += 1
                if owned:
                    stack = np.concatenate(parts)
                    tangents.write(stack.tobytes())
                    matrix.write(_extended(stack, meta.c, meta.geometry).tobytes())
                    owners.write(np.array(owned, dtype=np.int64).tobytes())
                    count += len(owned)
        replace(state, points=count).write(folder)
        for old in folder.iterdir():  # files of earlier versions; who maps them keeps them
            if old.suffix in (".f32", ".i64") and f"-{meta.stamp[:12]}-{version}-" not in old.name:
                old.unlink(missing_ok=True)

    def group(
        self, collection: Collection, *, progress: Callable[[float], None] | None = None
    ) -> None:
        """Make the cells for approximate search and put the points in their order, on disk too.

        Args:
            progress: called with the share of the work done.

        Raises:
            CollectionError: the index cannot be written beside the collection.
        """
        folder = collection.folder / FOLDER
        try:
            state = _State.read(folder)
            if (state.stamp, state.version) != self._key:
                raise OSError("it is of another version of the table")
            self._group(folder, state, progress)
        except (OSError, ValueError, TypeError) as error:
            raise CollectionError(
                f"{folder}: no approximate index can be written ({error}). Free the disk or the "
                "folder, or search exactly: --exact"
            ) from error

    def _group(self, folder: Path, state: _State, progress: Callable[[float], None] | None) -> None:
        count = cell_count(len(self))
        fitting = fit_size(len(self), count)

        def done(points: int) -> None:
            if progress:
                progress(points / (fitting + len(self)))

        centers = fit_centers(self.tangents, count, progress=done)
        cell = assign(self.tangents, centers, progress=done, done=fitting)
        order = np.argsort(cell, kind="stable")
        starts = np.searchsorted(cell[order], np.arange(len(centers) + 1))
        name = f"{state.stamp[:12]}-{state.version}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        grouped = replace(
            state, grouped=True, matrix=f"matrix-{name}.f32", tangents=f"tangents-{name}.f32",
            owners=f"owners-{name}.i64", centers=f"centers-{name}.f32",
            starts=f"starts-{name}.i64",
        )  # fmt: skip
        try:
            for array, file in (
                (self.matrix, grouped.matrix), (self.tangents, grouped.tangents),
                (self.owners, grouped.owners),
            ):  # fmt: skip
                with (folder / file).open("wb") as out:
                    for low in range(0, len(order), WRITE_BLOCK):
                        out.write(array[order[low : low + WRITE_BLOCK]].tobytes())
            (folder / grouped.centers).write_bytes(centers.tobytes())
            (folder / grouped.starts).write_bytes(starts.astype(np.int64).tobytes())
            n, dim = state.points, state.dim
            matrix = _map(folder / grouped.matrix, np.float32, (n, dim + 1))
            tangents = _map(folder / grouped.tangents, np.float32, (n, dim))
            owners = _map(folder / grouped.owners, np.int64, (n, 2))
            grouped.write(folder)
        except OSError:
            for file in grouped.files:
                (folder / file).unlink(missing_ok=True)
            raise
        for file in state.files:
            (folder / file).unlink(missing_ok=True)
        self.matrix, self.tangents, self.owners = matrix, tangents, owners
        self.cells, self.grouped, self._centers = Cells(centers, starts), True, None
        self._radii = None  # the points lie in another order

    def ready(
        self,
        collection: Collection,
        approximate: bool | None = None,
        *,
        progress: Callable[[float], None] | None = None,
    ) -> bool:
        """Whether to search approximately: as asked, by default above :data:`EXACT_UP_TO` points.

        Missing cells are made if they were asked for, or were there before the table changed. A
        warning says it where they are missed: the search is exact then.
        """
        if approximate is None:
            approximate = len(self) > EXACT_UP_TO
            make = approximate and self.grouped
        else:
            make = approximate
        if not approximate:
            return False
        if self.cells is None and make and not self._failed:
            try:
                self.group(collection, progress=progress)
            except CollectionError as error:
                self._failed = True
                log.warning("%s", error)
        if self.cells is None:
            self._warn()
        return self.cells is not None

    def _warn(self) -> None:
        if not self._warned:
            log.warning("no approximate index: searched exactly. Make one: hysafe index COLLECTION")
        self._warned = True

    # ------------------------------------------------------------ search

    def search(
        self,
        query: Points,
        k: int,
        *,
        rows: np.ndarray | None = None,
        approximate: bool = False,
        radius_share: float = 0.0,
    ) -> list[list[Hit]]:
        """The k nearest items of each query, nearest first; equal distances by row.

        Args:
            query: [Q, D], of the collection's space.
            rows: rows of the items that may be found; None for all.
            approximate: read only the cells nearest to each query. Without cells the search is
                exact, and a warning says so once.
            radius_share: of an item's radius is taken off its distance, in [0, 1]; in flat space
                nothing is.

        Raises:
            ShapeError: the query is of another space or dimension.
        """
        self._check(query)
        share = radius_share if self.geometry == "lorentz" else 0.0
        cells = self.cells if approximate else None
        if approximate and cells is None:
            self._warn()
        tangents = query.tangent().double()
        allowed = None if rows is None else np.isin(self.owners[:, 0], rows)
        size = len(self) if allowed is None else int(np.count_nonzero(allowed))
        found: list[list[Hit]] = [[] for _ in range(len(query))]
        if not size or k < 1:
            return found
        pending = np.arange(len(query))
        shortlist = max(SHORTLIST_FACTOR * k, SHORTLIST_LEAST)
        step = QUERY_BLOCK if cells is None else PROBE_BLOCK
        while len(pending):
            shortlist = min(shortlist, size)
            left = []
            for start in range(0, len(pending), step):
                block = pending[start : start + step]
                q = tangents[torch.from_numpy(block)]
                best = _Shortlist(len(q), shortlist)
                if cells is None:
                    self._read_all(self._bounding(q), best, allowed, share)
                else:
                    self._read_cells(cells, self._bounding(q), best, allowed, k, share)
                bound, index = best.sorted()
                distance, radius = self._distances(q, index, np.isfinite(bound))
                for j, (number, hits) in enumerate(
                    zip(
                        block.tolist(),
                        self._hits(distance, distance - share * radius, index, k),
                        strict=True,
                    )
                ):
                    found[number] = hits
                    last = float(bound[j, -1])
                    whole = shortlist == size or np.isinf(last)  # nothing read was left out
                    if not whole and not self._certain(hits, k, q[j], last, share):
                        left.append(number)
            pending = np.array(left, dtype=int)
            shortlist *= GROWTH
        return found

    def _check(self, query: Points) -> None:
        wanted = (self.geometry, self.tangents.shape[1])
        if (query.geometry, query.space.shape[1]) != wanted:
            raise ShapeError(
                f"search: got a {query.geometry} query of dimension {query.space.shape[1]}, wanted "
                f"{wanted[0]}, {wanted[1]}. Encode it with the collection's model."
            )
        if self.geometry == "lorentz" and not np.isclose(float(query.c), self.c, rtol=1e-6):
            raise ShapeError(
                f"search: the query's curvature is {float(query.c):g}, the collection's "
                f"{self.c:g}. Encode it with the collection's model."
            )

    def _discount(self, share: float) -> np.ndarray | None:
        """What is taken off the distances of points [P, 1], times the root of c; None for nothing."""
        if not share:
            return None
        if self._radii is None:
            self._radii = _radii(self.matrix, self.c)
        return self._radii * np.float32(share)

    def _read_all(
        self,
        query: np.ndarray,
        best: _Shortlist,
        allowed: np.ndarray | None,
        share: float,
    ) -> None:
        """Score all points, or those allowed, for queries [Q, D + 1]."""
        weight, discount = query.T, self._discount(share)
        size = min(MOST_ROWS, max(1, SCORES // len(query)))
        # memory asked for anew for each block costs a tenth of the product
        memory = np.empty((min(size, len(self)), len(query)), dtype=np.float32)
        if allowed is not None and np.count_nonzero(allowed) < GATHERED_SHARE * len(self):
            places = np.flatnonzero(allowed)
            size = min(size, GATHERED_ROWS)
            for low in range(0, len(places), size):
                block = places[low : low + size]
                score = np.matmul(self.matrix[block], weight, out=memory[: len(block)])
                if discount is not None:
                    _nearness(score, self.c, discount[block])
                best.add(score, block)
            return
        for low in range(0, len(self), size):
            block = self.matrix[low : low + size]
            score = _product(block, weight, memory[: len(block)])
            if discount is not None:
                _nearness(score, self.c, discount[low : low + size])
            if allowed is not None:
                score[~allowed[low : low + size]] = -np.inf
            best.add(score, low)

    def _read_cells(
        self,
        cells: Cells,
        query: np.ndarray,
        best: _Shortlist,
        allowed: np.ndarray | None,
        k: int,
        share: float,
    ) -> None:
        """Score the points of the cells nearest to each of the queries [Q, D + 1]."""
        sizes = cells.sizes(allowed)
        wanted = max(PROBED_SHARE * sizes.sum(), PROBED_LEAST, PROBED_PER_ITEM * k)
        if self._centers is None:
            self._centers = _extended(cells.centers, self.c, self.geometry)
        near = query @ self._centers.T
        discount = self._discount(share)
        if discount is not None:
            _nearness(near, self.c, _radii(self._centers, self.c).T * np.float32(share))
        chosen = cells.nearest(near, sizes, int(wanted))
        # of each query its nearest cells first, so that little of the others is worth keeping
        members: dict[int, list[int]] = {}
        for j, numbers in enumerate(chosen):
            first = int(np.searchsorted(np.cumsum(sizes[numbers]), PENDING * best.size)) + 1
            if len(query) == 1:
                first = len(numbers)
            spans = [slice(*cells.starts[n : n + 2]) for n in np.sort(numbers[:first])]
            score = np.concatenate([self.matrix[s] @ query[j] for s in spans])
            places = np.concatenate([np.arange(s.start, s.stop) for s in spans])
            if discount is not None:
                _nearness(score, self.c, discount[places, 0])
            if allowed is not None:
                score[~allowed[places]] = -np.inf
            best.add(score[:, None], places, np.array([j]))
            for n in numbers[first:].tolist():
                members.setdefault(n, []).append(j)
        if not members:
            return
        # the limits known by now leave little of the other cells; distances are worked out of that alone
        gate = self._gate(cells, discount, best.limit)
        starts = cells.starts.tolist()
        for n, asking in sorted(members.items()):
            low, high = starts[n : n + 2]
            score = self.matrix[low:high] @ query[asking].T
            point, column = np.divmod(np.flatnonzero(score >= gate[n, asking]), len(asking))
            if not len(point):
                continue
            value, place = score[point, column], point + low
            if discount is not None:
                _nearness(value, self.c, discount[place, 0])
            if allowed is not None:
                value[~allowed[place]] = -np.inf
            best.add_pairs(value, place, np.array(asking)[column])

    def _gate(self, cells: Cells, discount: np.ndarray | None, limit: np.ndarray) -> np.ndarray:
        """The least product [K, Q] of a point of each cell whose nearness can reach the limits [Q].

        Without discounts nearness is the product itself.
        At a distance d, less a discount of a at most, all times the root of c, a limit b needs cosh d
        to be at most cosh(a - b). Rounding lets more points through, never fewer.
        """
        sizes = np.diff(cells.starts)
        if discount is None:
            return np.broadcast_to(limit, (len(sizes), len(limit)))
        most = np.zeros(len(sizes))
        filled = np.flatnonzero(sizes)
        most[filled] = np.maximum.reduceat(discount[:, 0], cells.starts[filled])
        with np.errstate(over="ignore"):  # no limit yet: everything passes
            least = np.cosh(most[:, None] - limit.astype(np.float64) + ROUNDED)
            least *= -(1 + ROUNDED) / self.c
            return np.asarray(least.astype(np.float32))

    def _bounding(self, tangents: torch.Tensor) -> np.ndarray:
        """Queries [Q, D + 1] whose float32 product with the matrix is never below the true one."""
        space = get_space(self.geometry).exp_map0(tangents, self.c)
        if self.geometry == "lorentz":
            time = (1 / self.c + space.square().sum(-1, keepdim=True)).sqrt()
            last = -(1 - self._slack) * time
        else:
            last = torch.full_like(space[:, :1], -(1 - 2 * self._slack))
        return torch.cat((space, last), 1).float().numpy()

    @property
    def _slack(self) -> float:
        """Relative rounding of a float32 product of D + 1 terms, stored operands included.

        Source: Higham 2002, section 3.1: |error| <= n u / (1 - n u) of the sum of |terms|, which
        is at most 2 x_t q_t; four more roundings are those of the operands.
        """
        unit = float(np.finfo(np.float32).eps) / 2
        n = self.matrix.shape[1] + 4
        return 2 * n * unit / (1 - n * unit)

    def _distances(
        self, query: torch.Tensor, index: np.ndarray, there: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distances [Q, S] of queries (tangent vectors [Q, D]) to points, and the radii of these, in
        float64.

        Args:
            index: of the points [Q, S]. there: which of them count; the others are at infinity.
        """
        space = get_space(self.geometry)
        origin = space.exp_map0(query, self.c)
        distance, radius = np.full(index.shape, np.inf), np.zeros(index.shape)
        which, place = np.nonzero(there)
        for low in range(0, len(which), RERANK_BLOCK):
            i, j = which[low : low + RERANK_BLOCK], place[low : low + RERANK_BLOCK]
            tangents = torch.from_numpy(self.tangents[index[i, j]]).double()
            points = space.exp_map0(tangents, self.c)
            near = space.dist(origin[torch.from_numpy(i)], points, self.c)
            distance[i, j], radius[i, j] = near.numpy(), tangents.norm(dim=1).numpy()
        return distance, radius

    def _hits(
        self, distance: np.ndarray, value: np.ndarray, index: np.ndarray, k: int
    ) -> list[list[Hit]]:
        """The k items of least value among the points measured for each query, all [Q, S]."""
        owners = self.owners[index]
        row, channel = owners[..., 0], owners[..., 1]
        order = np.lexsort((channel, row, value))
        columns = (row, distance, channel, value)
        sorted_ = (np.take_along_axis(a, order, 1).tolist() for a in columns)
        found = []
        for points in zip(*sorted_, strict=True):
            hits: dict[int, Hit] = {}
            for number, near, name, least in zip(*points, strict=True):
                if near == math.inf or len(hits) == k:
                    break
                if number not in hits:
                    hits[number] = Hit(number, near, CHANNELS[name], least)
            found.append(list(hits.values()))
        return found

    def _certain(
        self, hits: list[Hit], k: int, query: torch.Tensor, bound: float, share: float
    ) -> bool:
        """Whether no point with a product below the bound can come before the hits."""
        if len(hits) < k:
            return False
        if not share:
            return self._product(hits[-1].distance, query) > bound
        return math.sqrt(self.c) * hits[-1].value + TOLERANCE < -bound

    def _product(self, distance: float, query: torch.Tensor) -> float:
        """What the product is at a distance from the query, less what bounds are off by."""
        if self.geometry == "lorentz":
            return float(-np.cosh(np.sqrt(self.c) * distance) / self.c)
        square = float(query.square().sum())
        return (square - distance**2) / 2 - self._slack * square


def _radii(matrix: np.ndarray, c: float) -> np.ndarray:
    """Radii of points, rows of a matrix [P, D + 1], times the root of the curvature [P, 1]."""
    time = matrix[:, -1].astype(np.float64) * math.sqrt(c)
    near = np.flatnonzero(time < NEAR)  # there the radius is lost in the digits of the time
    radius = np.arccosh(np.maximum(time, 1.0))
    space = np.linalg.norm(matrix[near, :-1].astype(np.float64), axis=1)
    radius[near] = np.arcsinh(space * math.sqrt(c))
    return radius.astype(np.float32)[:, None]


def _product(block: np.ndarray, weight: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Rows [n, D + 1] times columns [D + 1, Q], into `out`; for one column torch's is a fifth faster."""
    if weight.shape[1] > 1:
        return np.matmul(block, weight, out=out)
    torch.mv(
        torch.from_numpy(block), torch.from_numpy(weight[:, 0]), out=torch.from_numpy(out[:, 0])
    )
    return out


def _nearness(product: np.ndarray, c: float, discount: np.ndarray) -> None:
    """Write over products [n, q]: the discount [n, 1] less the distance that they stand for, both times
    the root of c."""
    np.multiply(product, -c, out=product)
    np.maximum(product, 1.0, out=product)
    root = np.sqrt(product * product - 1.0)
    np.add(product, root, out=product)
    np.log(product, out=product)
    np.subtract(discount, product, out=product)


class _Shortlist:
    """The `size` best points of each query, of those added so far."""

    def __init__(self, queries: int, size: int) -> None:
        self.size = size
        # [Q]: a score below is of no use; minus infinity (not allowed) never is
        self.limit = np.full(queries, LEAST, dtype=np.float32)
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._pending = 0

    def add(
        self, score: np.ndarray, places: np.ndarray | int, queries: np.ndarray | None = None
    ) -> None:
        """Points to choose from.

        Args:
            score: float32 [n, q]. places: of the points [n], or of the first of a row of them.
            queries: numbers of the queries [q]; None for all.
        """
        limit = self.limit if queries is None else self.limit[queries]
        rank = len(score) - self.size
        if rank > 0 and (limit == LEAST).any():  # these points are enough for a limit
            limit = np.maximum(limit, np.partition(score, rank, axis=0)[rank])
            self.limit[slice(None) if queries is None else queries] = limit
        point, query = _at_least(score, limit)
        value = score[point, query]
        point = point + places if isinstance(places, int) else places[point]
        self._parts.append((query if queries is None else queries[query], value, point))
        self._pending += len(point)
        if self._pending > PENDING * self.size * len(self.limit):
            self._thin()

    def add_pairs(self, score: np.ndarray, place: np.ndarray, query: np.ndarray) -> None:
        """Single points, each for one query: all [n]."""
        better = score >= self.limit[query]
        self._parts.append((query[better], score[better], place[better]))
        self._pending += int(np.count_nonzero(better))
        if self._pending > PENDING * self.size * len(self.limit):
            self._thin()

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores (float64) and places [Q, size], best first; minus infinity where there are less."""
        self._thin()
        ((query, score, place),) = self._parts
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        best = np.full((len(self.limit), self.size), -np.inf)
        index = np.zeros(best.shape, dtype=np.int64)
        best[query, rank], index[query, rank] = score, place
        return best, index

    def _thin(self) -> None:
        query, score, place = (np.concatenate(p) for p in zip(*self._parts, strict=True))
        order = np.lexsort((-score, query))
        query, score, place = query[order], score[order], place[order]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        last = rank == self.size - 1
        self.limit[query[last]] = score[last]
        keep = rank < self.size
        self._parts = [(query[keep], score[keep], place[keep])]
        self._pending = int(np.count_nonzero(keep))


def _at_least(score: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the few scores [n, q] that are not below the limit of their column [q].

    Many of them by eights of rows: numpy's loop over a short row costs more than the row.
    """
    if score.size < FEW_SCORES:
        row, column = np.nonzero(score >= limit)
        return row, column
    whole = len(score) - len(score) % 8
    width = score.shape[1]
    mask = np.ascontiguousarray(score[:whole]).reshape(-1, 8 * width) >= np.tile(limit, 8)
    flat = mask.reshape(-1)
    eights = np.flatnonzero(flat.view(np.uint64))
    place, offset = np.nonzero(flat.reshape(-1, 8)[eights])
    row, column = np.divmod(eights[place] * 8 + offset, width)
    if whole == len(score):
        return row, column
    last = np.nonzero(score[whole:] >= limit)
    return np.concatenate((row, last[0] + whole)), np.concatenate((column, last[1]))


def _load_cells(folder: Path, state: _State) -> Cells | None:
    """The stored cells; None where there are none, or damaged ones."""
    if not state.centers:
        return None
    try:
        count = (folder / state.starts).stat().st_size // np.dtype(np.int64).itemsize - 1
        cells = Cells(
            _map(folder / state.centers, np.float32, (count, state.dim)),
            _map(folder / state.starts, np.int64, (count + 1,)),
        )
        return cells if cells.fit(state.points) else None
    except (OSError, ValueError) as error:
        log.debug("%s: no usable cells: %s", folder, error)
        return None


def nearest_of(found: Iterable[list[Hit]], k: int) -> list[Hit]:
    """The k nearest items of several lists, each item once."""
    best: dict[int, Hit] = {}
    for hit in (h for hits in found for h in hits):
        if hit.row not in best or hit.value < best[hit.row].value:
            best[hit.row] = hit
    return sorted(best.values(), key=lambda h: (h.value, h.row))[:k]


def _extended(tangents: np.ndarray, c: float, geometry: str) -> np.ndarray:
    """Tangent vectors [n, D] -> rows of the matrix [n, D + 1]."""
    v = torch.from_numpy(tangents).double()
    space = get_space(geometry).exp_map0(v, c)
    square = space.square().sum(-1, keepdim=True)
    last = (1 / c + square).sqrt() if geometry == "lorentz" else square / 2
    return torch.cat((space, last), 1).float().numpy()


def _map(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A file mapped into memory; the wrong size is a ValueError."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, wanted {size}")
    if not size:
        return np.empty(shape, dtype=dtype)
    # as a plain array: a slice of a memmap costs ten times as much
    return np.asarray(np.memmap(path, dtype=dtype, mode="c", shape=shape))
