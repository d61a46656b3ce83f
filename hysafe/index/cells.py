"""Cells of neighbouring points, of which an approximate search reads only the nearest.

The cells are those of k-means on tangent vectors (L2): there a neighbourhood of the Lorentz space
stays one. Which cells are nearest to a query is told by the geodesic distance to their centres, for
tangent vectors of different radii (a picture's and a text's) are not comparable by L2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["Cells", "Progress", "assign", "cell_count", "fit_centers", "fit_size"]

# Cells for n points: twice the square root, so that ranking cells and reading them cost alike.
CELLS_PER_ROOT, MOST_CELLS = 2.0, 4096
# k-means sees so many points a cell, so often: more of either moved recall by less than 0.002.
SAMPLE_PER_CELL, ROUNDS = 64, 6
# Cells that are put in order, of those that hold so many points on average.
SORTED_FACTOR = 4
# Points at once; times 4,096 cells these are 32 MiB of float32.
BLOCK = 2048

# Called with a number of points done.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Cells:
    """Where each cell lies among the points, which stand in the order of their cells.

    Args:
        centers: tangent vectors, float32 [K, D]. starts: int64 [K + 1], from 0 to the number of
            points.
    """

    centers: np.ndarray
    starts: np.ndarray

    def fit(self, points: int) -> bool:
        """Whether these can be the cells of so many points."""
        return bool(
            len(self.starts) == len(self.centers) + 1
            and self.starts[0] == 0
            and self.starts[-1] == points
            and (np.diff(self.starts) >= 0).all()
            and np.isfinite(self.centers).all()
        )

    def sizes(self, allowed: np.ndarray | None) -> np.ndarray:
        """Points of each cell [K], those allowed (bool [P]) if given."""
        if allowed is None:
            return np.diff(self.starts)
        before = np.concatenate(([0], np.cumsum(allowed)))
        return np.diff(before[self.starts])

    def nearest(self, score: np.ndarray, sizes: np.ndarray, points: int) -> list[np.ndarray]:
        """The best cells of each query, as many as hold so many points.

        Args:
            score: of the cells for each query [Q, K], higher is nearer. sizes: [K].

        Returns:
            Numbers of the cells, nearest first; none that is empty.
        """
        # most cells are never reached, and need no order
        some = min(len(sizes), 1 + SORTED_FACTOR * round(len(sizes) * points / max(1, sizes.sum())))
        order = _best(score, some)
        if (sizes[order].sum(axis=1) < points).any():
            order = _best(score, len(sizes))
        reached = np.cumsum(sizes[order], axis=1)
        chosen = []
        for cells, total in zip(order, reached, strict=True):
            cells = cells[: np.searchsorted(total, points) + 1]
            chosen.append(cells[sizes[cells] > 0])
        return chosen


def _best(score: np.ndarray, some: int) -> np.ndarray:
    """Places [Q, some] of the highest scores [Q, K], highest first; of equal ones the lower place."""
    places = np.sort(np.argpartition(-score, some - 1, axis=1)[:, :some], axis=1)
    rank = np.argsort(-np.take_along_axis(score, places, 1), axis=1, kind="stable")
    return np.take_along_axis(places, rank, 1)


def cell_count(points: int) -> int:
    """How many cells for so many points."""
    return min(points, MOST_CELLS, round(CELLS_PER_ROOT * points**0.5))


def fit_size(points: int, count: int) -> int:
    """Points that :func:`fit_centers` assigns, over all its rounds."""
    return ROUNDS * min(points, SAMPLE_PER_CELL * count)


def fit_centers(
    tangents: np.ndarray, count: int, *, seed: int = 0, progress: Progress | None = None
) -> np.ndarray:
    """Centres [count, D] by k-means (L2) on a sample of the points [P, D]; count <= P."""
    generator = np.random.default_rng(seed)
    size = min(len(tangents), SAMPLE_PER_CELL * count)
    chosen = np.sort(generator.choice(len(tangents), size, replace=False))
    sample = np.asarray(tangents[chosen])
    centers = sample[generator.choice(size, count, replace=False)]
    for done in range(ROUNDS):
        cell = assign(sample, centers, progress=progress, done=done * size)
        order = np.argsort(cell, kind="stable")
        sizes = np.bincount(cell, minlength=count)
        filled = np.flatnonzero(sizes)  # a cell that nothing falls into keeps its centre
        starts = (np.cumsum(sizes) - sizes)[filled]
        sums = np.add.reduceat(sample[order], starts, axis=0, dtype=np.float64)
        centers[filled] = sums / sizes[filled, None]
    return centers


def assign(
    tangents: np.ndarray, centers: np.ndarray, *, progress: Progress | None = None, done: int = 0
) -> np.ndarray:
    """The nearest centre (L2) of each point, int64 [P]; `progress` counts on from `done`."""
    half = (centers**2).sum(axis=1) / 2
    cell = np.empty(len(tangents), dtype=np.int64)
    for low in range(0, len(tangents), BLOCK):
        score = np.asarray(tangents[low : low + BLOCK]) @ centers.T
        score -= half
        np.argmax(score, axis=1, out=cell[low : low + BLOCK])
        if progress:
            progress(done + min(low + BLOCK, len(tangents)))
    return cell
