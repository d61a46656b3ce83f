r"""Exact nearest neighbours over all points of a collection.

Distance in the Lorentz model falls as the inner product with the query's time negated rises,
:math:`x_s\cdot q_s - x_t q_t = -\cosh(rd)/c`, so that one float32 product ranks all points. What
float32 may get wrong is bounded (the product's time term is shortened by :data:`SLACK`), a
shortlist by that bound is measured in float64, and it grows until nothing left out can be nearer:
the result is that of a float64 search over all points.

The matrix [P, D + 1] and the tangent vectors [P, D] lie in ``index/`` beside the table, mapped
into memory. They are built again whenever the table has changed, and never needed to open it.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hysafe.errors import ShapeError
from hysafe.geometry import Points, get_space

if TYPE_CHECKING:
    from hysafe.index.collection import Collection

__all__ = ["Hit", "PointIndex", "nearest_of"]

FOLDER = "index"
STATE = "state.json"
FORMAT = 1
# Points per product and queries at once: 16,384 x 64 floats are 4 MiB.
POINT_BLOCK, QUERY_BLOCK = 16384, 64
# Shortlist: so many points for k items, four times as many when that was not enough.
SHORTLIST_FACTOR, SHORTLIST_LEAST, GROWTH = 4, 64, 4
# Pairs measured at once in float64.
RERANK_BLOCK = 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """One item found.

    Args:
        row: place in the scan. distance: geodesic. channel: whose point was nearest.
    """

    row: int
    distance: float
    channel: str


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
    format: int = FORMAT


CHANNELS = ("image", "text", "ocr")


class PointIndex:
    """All points of a collection, ready to be searched.

    Args:
        matrix: space components and the time (Euclidean: half the squared norm), float32
            [P, D + 1]. tangents: float32 [P, D].
        owners: row of the item and channel of each point, int64 [P, 2], rows ascending.
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
    ) -> None:
        self.matrix, self.tangents, self.owners = matrix, tangents, owners
        self.c, self.geometry, self._key = c, geometry, key

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
            state = _State(**json.loads((folder / STATE).read_text("utf-8")))
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
        partial = folder / f"{STATE}.{os.getpid()}.tmp"
        partial.write_text(json.dumps(asdict(state) | {"points": count}), "utf-8")
        partial.replace(folder / STATE)
        for old in folder.iterdir():  # files of earlier versions; who maps them keeps them
            if old.suffix in (".f32", ".i64") and f"-{meta.stamp[:12]}-{version}-" not in old.name:
                old.unlink(missing_ok=True)

    # ------------------------------------------------------------ search

    def search(self, query: Points, k: int, *, rows: np.ndarray | None = None) -> list[list[Hit]]:
        """The k nearest items of each query, nearest first; equal distances by row.

        Args:
            query: [Q, D], of the collection's space.
            rows: rows of the items that may be found; None for all.

        Raises:
            ShapeError: the query is of another space or dimension.
        """
        self._check(query)
        tangents = query.tangent().double()
        allowed = None if rows is None else np.isin(self.owners[:, 0], rows)
        size = len(self) if allowed is None else int(allowed.sum())
        found: list[list[Hit]] = [[] for _ in range(len(query))]
        if not size or k < 1:
            return found
        pending = np.arange(len(query))
        shortlist = max(SHORTLIST_FACTOR * k, SHORTLIST_LEAST)
        while len(pending):
            shortlist = min(shortlist, size)
            left = []
            for start in range(0, len(pending), QUERY_BLOCK):
                block = pending[start : start + QUERY_BLOCK]
                q = tangents[torch.from_numpy(block)]
                bound, index = self._shortlist(q, shortlist, allowed)
                for j, number in enumerate(block.tolist()):
                    hits, certain = self._measure(q[j], bound[j], index[j], k, shortlist == size)
                    found[number] = hits
                    if not certain:
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

    def _shortlist(
        self, tangents: torch.Tensor, size: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Upper bounds of the product and the points they belong to, [Q, size], best first."""
        query = self._bounding(tangents).float()
        best = torch.empty(len(query), 0)
        index = torch.empty(len(query), 0, dtype=torch.long)
        for low in range(0, len(self), POINT_BLOCK):
            block = torch.from_numpy(np.asarray(self.matrix[low : low + POINT_BLOCK]))
            score = query @ block.T
            if allowed is not None:
                score[:, torch.from_numpy(~allowed[low : low + POINT_BLOCK])] = -torch.inf
            score, column = score.topk(min(size, score.shape[1]), dim=1)
            best = torch.cat((best, score), 1)
            index = torch.cat((index, column + low), 1)
            best, order = best.topk(min(size, best.shape[1]), dim=1)
            index = index.gather(1, order)
        return best.double().numpy(), index.numpy()

    def _bounding(self, tangents: torch.Tensor) -> torch.Tensor:
        """Queries [Q, D + 1] whose float32 product with the matrix is never below the true one."""
        space = get_space(self.geometry).exp_map0(tangents, self.c)
        if self.geometry == "lorentz":
            time = (1 / self.c + space.square().sum(-1, keepdim=True)).sqrt()
            return torch.cat((space, -(1 - self._slack) * time), 1)
        return torch.cat((space, torch.full_like(space[:, :1], -(1 - 2 * self._slack))), 1)

    @property
    def _slack(self) -> float:
        """Relative rounding of a float32 product of D + 1 terms, stored operands included.

        Source: Higham 2002, section 3.1: |error| <= n u / (1 - n u) of the sum of |terms|, which
        is at most 2 x_t q_t; four more roundings are those of the operands.
        """
        unit = float(np.finfo(np.float32).eps) / 2
        n = self.matrix.shape[1] + 4
        return 2 * n * unit / (1 - n * unit)

    def _measure(
        self, query: torch.Tensor, bound: np.ndarray, index: np.ndarray, k: int, whole: bool
    ) -> tuple[list[Hit], bool]:
        """The k nearest items of a shortlist, and whether no other item can be nearer."""
        index = index[np.isfinite(bound)]
        distances = np.concatenate(
            [
                self._distances(query, index[i : i + RERANK_BLOCK])
                for i in range(0, len(index), RERANK_BLOCK)
            ]
        )
        owners = np.asarray(self.owners[index])
        hits: list[Hit] = []
        seen: set[int] = set()
        for place in np.lexsort((owners[:, 1], owners[:, 0], distances)).tolist():
            row, channel = owners[place].tolist()
            if row not in seen:
                seen.add(row)
                hits.append(Hit(row, float(distances[place]), CHANNELS[channel]))
                if len(hits) == k:
                    break
        if whole:
            return hits, True
        # the shortlist's last bound is above the product of every point outside of it
        return hits, len(hits) == k and self._product(hits[-1].distance, query) > float(bound[-1])

    def _distances(self, query: torch.Tensor, index: np.ndarray) -> np.ndarray:
        space = get_space(self.geometry)
        tangents = torch.from_numpy(np.asarray(self.tangents[index])).double()
        points = space.exp_map0(tangents, self.c)
        return space.dist(space.exp_map0(query[None], self.c), points, self.c).numpy()

    def _product(self, distance: float, query: torch.Tensor) -> float:
        """What the product is at a distance from the query, less what bounds are off by."""
        if self.geometry == "lorentz":
            return float(-np.cosh(np.sqrt(self.c) * distance) / self.c)
        square = float(query.square().sum())
        return (square - distance**2) / 2 - self._slack * square


def nearest_of(found: Iterable[list[Hit]], k: int) -> list[Hit]:
    """The k nearest items of several lists, each item once."""
    best: dict[int, Hit] = {}
    for hit in (h for hits in found for h in hits):
        if hit.row not in best or hit.distance < best[hit.row].distance:
            best[hit.row] = hit
    return sorted(best.values(), key=lambda h: (h.distance, h.row))[:k]


def _extended(tangents: np.ndarray, c: float, geometry: str) -> np.ndarray:
    """Tangent vectors [n, D] -> rows of the matrix [n, D + 1]."""
    v = torch.from_numpy(tangents).double()
    space = get_space(geometry).exp_map0(v, c)
    square = space.square().sum(-1, keepdim=True)
    last = (1 / c + square).sqrt() if geometry == "lorentz" else square / 2
    return torch.cat((space, last), 1).float().numpy()


def _map(path: Path, dtype: type, shape: tuple[int, int]) -> np.ndarray:
    """A file mapped into memory; the wrong size is a ValueError."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, wanted {size}")
    if not size:
        return np.empty(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="c", shape=shape)
