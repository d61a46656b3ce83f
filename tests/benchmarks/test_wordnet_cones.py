"""benchmarks/wordnet_cones.py on a tiny tree: the optimiser, the start, the measures, the flow."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hysafe.geometry import cones, geoopt_bridge, lorentz

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "wordnet_cones.py"
NODES = 40


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wordnet_cones", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tree() -> tuple[Tensor, Tensor, Tensor]:
    """Edges, the rest of the closure and all pairs outside it: two roots, a wide and a long part."""
    parent = [-1, -1] + [0] * 12 + [max(1, i - 1 - i % 2) for i in range(14, NODES)]
    parent[14] = 1
    edges = torch.tensor([(p, i) for i, p in enumerate(parent) if p >= 0])
    ancestors = torch.zeros(NODES, NODES, dtype=torch.bool)
    for i, p in enumerate(parent):
        if p >= 0:
            ancestors[:, i] = ancestors[:, p]
            ancestors[p, i] = True
    direct = torch.zeros_like(ancestors)
    direct[edges[:, 0], edges[:, 1]] = True
    outside = ~ancestors & ~torch.eye(NODES, dtype=torch.bool)
    return edges, (ancestors & ~direct).nonzero(), outside.nonzero()


def test_a_step_is_the_one_of_geoopt(bench: ModuleType) -> None:
    import geoopt

    x = lorentz.exp_map0(torch.randn(20, 3, generator=generator(), dtype=torch.float64), 1.0)
    target = torch.randn(20, 3, generator=generator(1), dtype=torch.float64)
    chart = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(((chart - target) ** 2).sum(), chart)
    ours = bench.step(x, gradient, 0.01)

    p = geoopt.ManifoldParameter(geoopt_bridge.to_geoopt(x, 1.0), geoopt_bridge.to_manifold(1.0))
    optimiser = geoopt.optim.RiemannianSGD([p], lr=0.01)
    ((p[:, 1:] - target) ** 2).sum().backward()
    optimiser.step()
    theirs = geoopt_bridge.from_geoopt(p.detach(), 1.0)
    assert (ours - x).abs().max() > 0.1
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_no_step_is_longer_than_asked(bench: ModuleType) -> None:
    x = lorentz.exp_map0(torch.randn(20, 3, generator=generator(), dtype=torch.float64), 1.0)
    moved = bench.step(x, torch.randn(20, 3, generator=generator(1)).double(), 5.0, longest=0.01)
    assert torch.allclose(lorentz.dist(x, moved, 1.0), torch.tensor(0.01).double(), rtol=1e-6)


def test_adagrad_moves_touched_rows_by_lr_at_first_and_less_later(bench: ModuleType) -> None:
    points = bench.random_start(6, 3, 2.0, generator=generator())
    start, optimiser = points.clone(), bench.Adagrad(points)
    edges, negatives = torch.tensor([[0, 1]]), torch.tensor([[0, 2], [0, 3]])
    optimiser.step(edges, negatives, bench.distance_loss, 0.01)
    far = lorentz.dist(start, points, 1.0)
    assert torch.allclose(far[[0, 1]], torch.tensor(0.01).double(), rtol=1e-6)
    assert (far[4:] == 0).all()
    between = points.clone()
    optimiser.step(edges, negatives, bench.distance_loss, 0.01)
    assert (lorentz.dist(between, points, 1.0)[[0, 1]] < 0.008).all()
    careful = bench.Adagrad(start, trust=1e-3)
    before = start.clone()
    careful.step(edges, negatives, bench.distance_loss, 0.3)
    limit = 1e-3 * cones.half_aperture(before, 1.0)
    assert torch.allclose(lorentz.dist(before, start, 1.0)[[0, 1]], limit[[0, 1]], rtol=1e-6)


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_the_tree_start_is_the_order_of_the_tree(bench: ModuleType, dim: int) -> None:
    edges, rest, outside = tree()
    parent = bench.merged_tree(edges, NODES)
    points = bench.tree_start(parent, dim, generator=generator())
    assert len(rest) > 50
    assert bench.energies(points, edges).max() == 0
    assert bench.energies(points, rest).max() == 0
    assert bench.energies(points, outside).min() > 0


def test_closure_edges_do_not_change_the_spanning_tree(bench: ModuleType) -> None:
    edges, rest, _ = tree()
    parent, level = bench.spanning_tree(edges, NODES)
    more, deeper = bench.spanning_tree(torch.cat((edges, rest)), NODES)
    assert torch.equal(parent, more)
    assert torch.equal(level, deeper)
    assert (parent[edges[:, 1]] == edges[:, 0]).all()
    with pytest.raises(SystemExit, match="cycle"):
        bench.spanning_tree(torch.tensor([[0, 1], [1, 0]]), 2)


def ancestors(bench: ModuleType, edges: list[tuple[int, int]], node: int) -> set[int]:
    parent = bench.merged_tree(torch.tensor(edges), 1 + max(child for _, child in edges))
    return set(bench.chains(parent)[node].tolist()) - {-1}


def leaves(parent: int, start: int, count: int) -> list[tuple[int, int]]:
    return [(parent, i) for i in range(start, start + count)]


def test_two_parents_are_put_in_one_chain_where_little_else_hangs_there(bench: ModuleType) -> None:
    diamond = [(0, 1), (0, 2), (1, 3), (2, 3), *leaves(3, 10, 200), (1, 210)]
    assert ancestors(bench, diamond, 209) == {0, 1, 2, 3}
    # a node that comes later, under the branch that was moved or the one it was moved below
    for later in ([(2, 211), (1, 211)], [(1, 211), (2, 211)]):
        assert ancestors(bench, diamond + later, 211) == {0, 1, 2}
    # much else below both: nothing is moved
    wide = [*diamond, *leaves(1, 211, 400), *leaves(2, 611, 400)]
    assert len(ancestors(bench, wide, 209) & {1, 2}) == 1
    # the long branch holds much else, the short one nothing: the short one is moved
    long = [(0, 1), (1, 2), (2, 3), (0, 4), (4, 3), *leaves(3, 10, 100), *leaves(1, 110, 140)]
    assert ancestors(bench, long, 109) == {0, 1, 2, 3, 4}
    assert ancestors(bench, long, 249) == {0, 1}
    # both would pay: the short one still
    both = [(0, 1), (1, 2), (2, 3), (0, 4), (4, 3), *leaves(3, 10, 1000), *leaves(1, 1010, 4)]
    assert ancestors(bench, both, 1013) == {0, 1}


def test_the_threshold_has_the_best_f1_of_all(bench: ModuleType) -> None:
    positive = torch.randint(8, (30,), generator=generator()).double()
    negative = torch.randint(12, (90,), generator=generator(1)).double()
    found = bench.classify(positive, negative, bench.best_threshold(positive, negative))
    scores = [bench.classify(positive, negative, float(t)).f1 for t in range(-1, 13)]
    assert found.f1 == max(scores)
    # in a tie all pairs fall on one side
    assert bench.best_threshold(torch.tensor([0.0, 1, 1, 1]), torch.ones(30)) == 0
    true = int((positive <= found.threshold).sum())
    false = int((negative <= found.threshold).sum())
    assert found.f1 == pytest.approx(200 * true / (true + false + len(positive)))


def test_negatives_are_no_training_edges(bench: ModuleType) -> None:
    edges, _, _ = tree()
    _, negatives = next(iter(bench.Sampler(edges, NODES, 16, generator())))
    known = {tuple(pair) for pair in edges.tolist()}
    assert len(negatives) > 100
    assert not known & {tuple(pair) for pair in negatives.tolist()}
    assert (negatives[:, 0] != negatives[:, 1]).all()


def test_halves_keep_negatives_with_their_positive(bench: ModuleType) -> None:
    positive = torch.arange(10).view(5, 2)
    pairs = bench.Pairs(positive, positive.repeat_interleave(3, 0))
    first, second = bench.halves(pairs)
    for part in (first, second):
        assert torch.equal(part.positive.repeat_interleave(3, 0), part.negative)
    assert len(first.positive) + len(second.positive) == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    edges, rest, outside = tree()
    where = tmp_path_factory.mktemp("wordnet")
    outside = outside[torch.randperm(len(outside), generator=generator())]
    files = {
        "train_0percent": edges,
        "valid": rest[::2],
        "valid_neg": outside[: 10 * len(rest[::2])],
        "other": rest[1::2],
        "other_neg": outside[-10 * len(rest[1::2]) :],
    }
    for name, pairs in files.items():
        lines = "".join(f"{a}\t{b}\n" for a, b in pairs.tolist())
        (where / f"noun_closure.tsv.{name}").write_text(lines, encoding="utf-8")
    names = "".join(f"{i}\tnode.n.{i}\n" for i in range(NODES))
    (where / "noun_closure.tsv.vocab").write_text(names, encoding="utf-8")
    return where


@pytest.mark.parametrize("init", ["tree", "poincare", "random"])
def test_from_files_to_report(
    bench: ModuleType, folder: Path, tmp_path: Path, init: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    stem = folder / "noun_closure.tsv"
    command = f"--data {folder} --percent 0 --dim 3 --init {init} --batch 16 --steps 60 "
    command += f"--start-steps 60 --out {out} --test {stem}.other {stem}.other_neg"
    bench.main(command.split())
    report = json.loads(out.read_text(encoding="utf-8"))
    course = report["course"]
    assert len(course) >= 3
    assert f"F1 {report['result']['f1']:.1f}" in capsys.readouterr().out.splitlines()[-1]
    if init == "tree":
        assert course[0]["f1"] == 100
        assert report["result"]["f1"] == 100
    else:
        assert course[-1]["loss"] < 0.95 * course[1]["loss"]


def test_without_test_pairs_half_of_the_validation_is_the_test(
    bench: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main(f"--data {folder} --percent 0 --dim 3 --steps 0".split())
    assert "every other pair of valid" in capsys.readouterr().out


def test_missing_files_are_named(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="train_25percent is not there"):
        bench.main(["--data", str(tmp_path)])
