"""Tree metrics against networkx and brute force, on random forests."""

from __future__ import annotations

import random

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hysafe.errors import ShapeError, TaxonomyError
from hysafe.taxonomy import load_taxonomy, metrics

ROOT = "(root)"

Tree = dict[str, str | None]

laws = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def forests(draw: st.DrawFn) -> Tree:
    """Random recursive forests of 1 to 25 nodes, listed in any order."""
    parents: Tree = {}
    for i in range(draw(st.integers(1, 25))):
        above = draw(st.integers(-1, i - 1))
        parents[f"n{i}"] = None if above < 0 else f"n{above}"
    names = draw(st.permutations(sorted(parents)))
    return {n: parents[n] for n in names}


def graph(tree: Tree) -> nx.DiGraph:
    """Edges parent -> child, with the virtual root above all roots."""
    made = nx.DiGraph()
    made.add_node(ROOT)
    made.add_edges_from((ROOT if p is None else p, n) for n, p in tree.items())
    return made


def height(made: nx.DiGraph, node: str) -> int:
    return max(nx.single_source_shortest_path_length(made, node).values())


def pairs(tree: Tree, seed: int) -> list[tuple[str, str]]:
    names, chance = sorted(tree), random.Random(seed)
    return [(chance.choice(names), chance.choice(names)) for _ in range(12)]


@laws
@given(forests(), st.integers(0, 99))
def test_tree_induced_error_is_the_length_of_the_shortest_path(tree: Tree, seed: int) -> None:
    undirected = graph(tree).to_undirected()
    for a, b in pairs(tree, seed):
        expected = nx.shortest_path_length(undirected, a, b)
        assert metrics.tree_induced_error(tree, a, b) == expected


@laws
@given(forests(), st.integers(0, 99))
def test_lca_height_is_that_of_networkx_lowest_common_ancestor(tree: Tree, seed: int) -> None:
    made = graph(tree)
    for a, b in pairs(tree, seed):
        common = nx.lowest_common_ancestor(made, a, b)
        assert metrics.lowest_common_ancestor_height(tree, a, b) == height(made, common)


@laws
@given(forests(), st.integers(0, 99))
def test_hierarchical_scores_are_means_over_ancestor_sets(tree: Tree, seed: int) -> None:
    made = graph(tree)
    drawn = pairs(tree, seed)
    shared = size_p = size_t = 0
    for p, t in drawn:
        a = (nx.ancestors(made, p) | {p}) - {ROOT}
        b = (nx.ancestors(made, t) | {t}) - {ROOT}
        shared, size_p, size_t = shared + len(a & b), size_p + len(a), size_t + len(b)
    got = metrics.hierarchical_scores(tree, [p for p, _ in drawn], [t for _, t in drawn])
    assert got.precision == pytest.approx(shared / size_p)
    assert got.recall == pytest.approx(shared / size_t)
    total = got.precision + got.recall
    assert got.f1 == pytest.approx(2 * got.precision * got.recall / total if shared else 0)
    errors = [metrics.tree_induced_error(tree, p, t) for p, t in drawn]
    heights = [metrics.lowest_common_ancestor_height(tree, p, t) for p, t in drawn]
    assert got.tree_induced_error == pytest.approx(sum(errors) / len(drawn))
    assert got.lca_height == pytest.approx(sum(heights) / len(drawn))


@laws
@given(forests())
def test_ancestors_are_the_path_of_networkx_upwards(tree: Tree) -> None:
    made = graph(tree)
    for node in tree:
        path = nx.shortest_path(made, ROOT, node)[1:]
        assert metrics.ancestors(tree, node) == tuple(reversed(path))


def test_a_perfect_prediction_of_leaves_has_no_error() -> None:
    parents = load_taxonomy().parents
    leaves = sorted(set(parents) - set(parents.values()))
    assert metrics.hierarchical_scores(parents, leaves, leaves) == (0, 0, 1, 1, 1)


def test_numbers_on_the_bundled_taxonomy_by_hand() -> None:
    parents = load_taxonomy().parents
    assert metrics.tree_induced_error(parents, "6.1", "6.2") == 2
    assert metrics.tree_induced_error(parents, "6.1", "1.1") == 4
    assert metrics.tree_induced_error(parents, "6.1.1", "D6") == 2
    assert metrics.lowest_common_ancestor_height(parents, "6.1.1", "6.1.2") == 1
    assert metrics.lowest_common_ancestor_height(parents, "6.1", "6.2") == 2
    assert metrics.lowest_common_ancestor_height(parents, "6.1", "1.1") == 3
    scores = metrics.hierarchical_scores(parents, ["6.1.1"], ["6.1"])
    assert (scores.precision, scores.recall) == (pytest.approx(2 / 3), 1)
    nothing = metrics.hierarchical_scores(parents, ["6.1"], ["1.1"])
    assert nothing == (4, 3, 0, 0, 0)


def test_lengths_must_agree_and_nodes_must_exist() -> None:
    tree: Tree = {"a": None, "b": "a"}
    with pytest.raises(ShapeError, match="got 1, 2"):
        metrics.hierarchical_scores(tree, ["a"], ["a", "b"])
    with pytest.raises(ShapeError, match="at least 1"):
        metrics.hierarchical_scores(tree, [], [])
    with pytest.raises(TaxonomyError, match="no node 'c'"):
        metrics.tree_induced_error(tree, "c", "a")
    with pytest.raises(TaxonomyError, match="own ancestor"):
        metrics.ancestors({"a": "b", "b": "a"}, "a")
