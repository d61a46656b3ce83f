"""Clusters: groups that were planted come back, strays stay out, work is bounded."""

from __future__ import annotations

import numpy as np
import pytest

from hysafe.discover import clusters
from hysafe.discover.clusters import find_clusters
from hysafe.errors import ConfigError
from hysafe.guard.naming import Whitening

DIM = 24


def planted(
    sizes: tuple[int, ...] = (30, 20, 12), strays: int = 15, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, Whitening]:
    """Groups around own directions, drowned in a spread that everything shares; strays are -1."""
    rng = np.random.default_rng(seed)
    middles = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0][: len(sizes)] * 6
    labels = np.repeat([*range(len(sizes)), -1], [*sizes, strays])
    x = np.concatenate((middles, np.zeros((1, DIM))))[labels]
    x = x + rng.normal(size=x.shape) * np.where(labels < 0, 1.2, 0.4)[:, None]
    ordinary = rng.normal(size=(600, DIM))
    for rows in (x, ordinary):
        rows[:, :2] += 6 * rng.normal(size=(len(rows), 2))
    return x, labels, Whitening.fit(ordinary)


def f1(group: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * truth[group].sum() / (len(group) + truth.sum()))


def test_planted_groups_come_back() -> None:
    x, labels, whitening = planted()
    found = find_clusters(x, whitening, min_size=6)
    assert len(found) == 3
    assert [len(c.members) for c in found] == sorted((len(c.members) for c in found), reverse=True)
    for k in range(3):
        assert max(f1(c.members, labels == k) for c in found) > 0.9
    assert all(c.purity > 0.9 for c in found)
    members = np.concatenate([c.members for c in found])
    assert len(set(members.tolist())) == len(members)  # in one cluster at most
    assert (labels[members] < 0).mean() < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_tight_groups_are_not_outweighed_by_loose_ones_of_everything(seed: int) -> None:
    """Two kinds; of each four groups of 8 that share more, and 12 items that do not."""
    rng, dim = np.random.default_rng(seed), 300
    axes = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    groups = np.repeat([*range(8), -1, -1], [8] * 8 + [12, 12])
    kinds = np.repeat([0, 1, 0, 1], [32, 32, 12, 12])
    noise = rng.normal(size=(len(groups), dim)) / np.sqrt(dim)
    tight = (groups >= 0)[:, None]
    x = np.sqrt(0.2) * axes[kinds] + np.sqrt(0.28) * tight * axes[10 + groups]
    x += np.sqrt(np.where(tight, 0.52, 0.8)) * noise
    found = find_clusters(x, Whitening(np.zeros(dim), np.eye(dim)), min_size=6)
    best = [max(f1(c.members, groups == k) for c in found) for k in range(8)]
    assert np.mean(best) > 0.7  # two loose groups have 0.3


def test_without_whitening_the_shared_spread_hides_them() -> None:
    x, labels, _ = planted()
    none = Whitening(np.zeros(DIM), np.eye(DIM))
    found = find_clusters(x, none, min_size=6)
    assert max((f1(c.members, labels == 0) for c in found), default=0) < 0.8


def test_one_group_alone_is_one_cluster_and_strays_alone_are_none() -> None:
    x, _, whitening = planted((40,), 0)
    (only,) = find_clusters(x, whitening, min_size=6)
    assert len(only.members) > 35
    assert only.purity == 1
    rng = np.random.default_rng(0)
    strays, ordinary = rng.normal(size=(40, 4 * DIM)), rng.normal(size=(600, 4 * DIM))
    assert find_clusters(strays, Whitening.fit(ordinary), min_size=6) == []


def test_a_weak_cluster_of_nearly_all_does_not_hide_a_tight_one() -> None:
    rng = np.random.default_rng(2)
    base, middle = 0.3 * rng.standard_normal(32), rng.standard_normal(32)
    strays = rng.standard_normal((400, 32)) + base
    group = middle + 0.4 * rng.standard_normal((20, 32)) + base
    whitening = Whitening.fit(rng.standard_normal((2000, 32)))
    found = find_clusters(np.concatenate([strays, group]), whitening)
    truth = np.arange(420) >= 400
    assert max(f1(c.members, truth) for c in found) > 0.9


def test_the_medoid_comes_first_then_the_members_by_distance() -> None:
    x, _, whitening = planted((15,), 0)
    (only,) = find_clusters(x, whitening, min_size=6)
    units = whitening.directions(x[only.members])
    distances = np.linalg.norm(units[:, None] - units[None], axis=2)
    assert only.medoid == only.members[distances.sum(1).argmin()]
    assert (np.diff(distances[0]) >= 0).all()


def test_a_seed_repeats_and_a_small_sample_finds_the_same_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, labels, whitening = planted((200, 150, 120), 60)
    linked: list[int] = []
    pdist = clusters.pdist
    monkeypatch.setattr(clusters, "pdist", lambda u: linked.append(len(u)) or pdist(u))
    found = find_clusters(x, whitening, min_size=40, linked=90, seed=3)
    assert linked == [90]  # no pair beyond the bound
    for k in range(3):
        assert max(f1(c.members, labels == k) for c in found) > 0.85
    again = find_clusters(x, whitening, min_size=40, linked=90, seed=3)
    assert [c.members.tolist() for c in again] == [c.members.tolist() for c in found]
    other = find_clusters(x, whitening, min_size=40, linked=90, seed=4)
    assert [c.members.tolist() for c in other] != [c.members.tolist() for c in found]


@pytest.mark.parametrize("n", [0, 1, 5])
def test_fewer_items_than_a_cluster_has_are_no_cluster(n: int) -> None:
    x, _, whitening = planted()
    assert find_clusters(x[:n], whitening, min_size=6) == []


def test_equal_items_are_one_cluster() -> None:
    x, _, whitening = planted()
    (only,) = find_clusters(np.repeat(x[:1], 12, axis=0), whitening, min_size=6)
    assert len(only.members) == 12


def test_no_cluster_is_smaller_than_asked_for() -> None:
    x, _, whitening = planted((30, 9), 5)
    assert [len(c.members) >= 15 for c in find_clusters(x, whitening, min_size=15)] == [True]
    with pytest.raises(ConfigError, match="at least 2"):
        find_clusters(x, whitening, min_size=1)


def test_a_group_of_the_sample_that_stays_too_small_is_none() -> None:
    x, _, whitening = planted((200, 40), 0)
    for seed in range(6):
        found = find_clusters(x, whitening, min_size=40, linked=80, seed=seed)
        assert all(len(c.members) >= 40 for c in found)
