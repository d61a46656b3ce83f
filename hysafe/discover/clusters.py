r"""Clusters of items by average linkage of their whitened directions.

Chosen by measurement (``benchmarks/discovery_loop.py --clusters``): geodesic distances, and Euclidean
ones of raw tangent vectors, put nearly all items into one cluster, for a few directions in which all
texts spread drown the rest. Divided by the covariance of ordinary items of the collection, directions
separate intents and categories; average linkage leaves strays out, where Ward's takes them in.

The dendrogram is cut where the sum of the groups' squared mean silhouettes, each times its size,
is greatest: unsquared, two or three loose groups of nearly everything can outweigh many tight
ones. Two directions that have nothing to do with each other are :math:`\sqrt 2` apart: so far is, at
most, the "other cluster" that the silhouette of an item is measured against, which makes one cluster
alone a possible answer. An item that is in no cluster of the least size and the least silhouette
counts 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist, pdist, squareform

from hysafe.errors import ConfigError
from hysafe.guard.naming import Whitening

__all__ = ["LINKED", "Cluster", "find_clusters"]

# Items whose pairs are compared: 2,000 take 64 MB and a few seconds. More are assigned afterwards.
LINKED = 2000
# Cuts of the dendrogram that are tried.
CUTS = 64
# An item that was not linked joins a cluster if it is as near to its middle as this share of the
# linked members.
REACH = 0.9
# Mean silhouette that a cluster has at least: strays that fall together have less.
LEAST_SILHOUETTE = 0.05
# Distance of directions that have nothing to do with each other.
UNRELATED = math.sqrt(2)


class Cluster(NamedTuple):
    """Items that belong together.

    Args:
        members: rows of the vectors, the medoid first, then by their distance to it.
        purity: share of the members that are nearer to this medoid than to any other.
    """

    members: np.ndarray
    purity: float

    @property
    def medoid(self) -> int:
        """The member with the least mean distance to the others."""
        return int(self.members[0])


def find_clusters(
    vectors: np.ndarray,
    whitening: Whitening,
    *,
    min_size: int = 8,
    linked: int = LINKED,
    seed: int = 0,
) -> list[Cluster]:
    """Clusters of tangent vectors [n, D], largest first; strays are in none.

    Args:
        whitening: of ordinary items of the same channel.
        min_size: members a cluster has at least.
        linked: items that are linked; a sample of them where there are more, the rest is assigned
            to the clusters found.
        seed: of the sample; the same items and seed give the same clusters.

    Raises:
        ConfigError: a size below 2.
    """
    if min_size < 2 or linked < 2:
        raise ConfigError(
            f"a cluster of {min_size} of {linked} linked items: both must be at least 2."
        )
    units = whitening.directions(vectors)
    n = len(units)
    if n < min_size:
        return []
    chosen = np.arange(n)
    if n > linked:
        chosen = np.sort(np.random.default_rng(seed).choice(n, linked, replace=False))
    # a cluster of the sample may be smaller, as its share of the sample is
    least = max(2, math.ceil(min_size * len(chosen) / n))
    groups = [chosen[g] for g in _cut(units[chosen], least)]
    if n > len(chosen):
        groups = _assign(units, groups, np.setdiff1d(np.arange(n), chosen))
    groups = [g for g in groups if len(g) >= min_size]
    ordered = [_from_medoid(units, g) for g in groups]
    ordered.sort(key=lambda g: (-len(g), int(g[0])))
    medoids = units[[int(g[0]) for g in ordered]]
    return [Cluster(g, _purity(units[g], medoids, k)) for k, g in enumerate(ordered)]


def _cut(units: np.ndarray, least: int) -> list[np.ndarray]:
    """Groups of at least `least` rows, at the cut with the best silhouettes."""
    n = len(units)
    if n < 2:
        return []
    condensed = pdist(units)
    tree, distances = linkage(condensed, "average"), squareform(condensed)
    best: tuple[float, list[np.ndarray]] = (0.0, [])
    for count in sorted({int(k) for k in np.geomspace(1, max(1, n // least), CUTS)}):
        labels = fcluster(tree, count, "maxclust")
        groups = [np.flatnonzero(labels == k) for k in np.unique(labels)]
        groups = [g for g in groups if len(g) >= least]
        if not groups:
            continue
        each = zip(groups, silhouettes(distances, groups), strict=True)
        kept = [(g, s) for g, s in each if s >= LEAST_SILHOUETTE]
        score = float(sum(len(g) * s**2 for g, s in kept))
        if score > best[0]:
            best = score, [g for g, _ in kept]
    return best[1]


def silhouettes(distances: np.ndarray, groups: list[np.ndarray]) -> list[float]:
    """Mean silhouette of each group's rows, from distances [n, n]."""
    inside = np.zeros((len(distances), len(groups)))
    for k, g in enumerate(groups):
        inside[g, k] = 1
    sums, sizes = distances @ inside, inside.sum(0)
    means = []
    for k, g in enumerate(groups):
        own = sums[g, k] / max(1, sizes[k] - 1)
        others = np.delete(sums[g] / sizes, k, axis=1)
        other = np.minimum(UNRELATED, others.min(1, initial=UNRELATED))
        widest = np.maximum(own, other)
        means.append(float(((other - own) / np.where(widest > 0, widest, 1)).mean()))
    return means


def _assign(units: np.ndarray, groups: list[np.ndarray], rest: np.ndarray) -> list[np.ndarray]:
    """Groups with those of the rest that lie within reach of their middle."""
    if not groups:
        return groups
    middles = np.stack([units[g].mean(0) for g in groups])
    reach = [
        np.quantile(np.linalg.norm(units[g] - m, axis=1), REACH)
        for g, m in zip(groups, middles, strict=True)
    ]
    distances = cdist(units[rest], middles)
    nearest = distances.argmin(1)
    within = distances[np.arange(len(rest)), nearest] <= np.array(reach)[nearest]
    return [
        np.sort(np.concatenate((g, rest[within & (nearest == k)]))) for k, g in enumerate(groups)
    ]


def _from_medoid(units: np.ndarray, group: np.ndarray) -> np.ndarray:
    """A group, its medoid first, the others by their distance to it."""
    own = units[group]
    part = own[:: -(-len(own) // LINKED)]  # of a large group the medoid of an even part of it
    medoid = part[int(np.argmin(cdist(part, part).sum(1)))]
    return group[np.argsort(cdist(own, medoid[None])[:, 0], kind="stable")]


def _purity(own: np.ndarray, medoids: np.ndarray, k: int) -> float:
    return float((cdist(own, medoids).argmin(1) == k).mean())
