"""benchmarks/wordnet_cones.py on a tiny tree: the kernels, the construction, the measures, the flow."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from hysafe.geometry import cones, geoopt_bridge, lorentz

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "wordnet_cones.py"
NODES = 40


@pytest.fixture(scope="module")
def bench(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/wordnet_cones.py")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("numba")
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("wordnet_kernels")


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


def cloud(count: int, dim: int) -> Tensor:
    """Points at radii from 0.3 to 6; the second half near the first, inward, outward and aside."""
    x = torch.nn.functional.normalize(torch.randn(count, dim, generator=generator()).double())
    radius = 0.3 + 5.7 * torch.rand(count, 1, generator=generator(1)).double()
    half = count // 2
    aside = torch.randn(half // 2, dim, generator=generator(2)).double()
    x[half : half + half // 2] = torch.nn.functional.normalize(x[: half // 2] + 0.01 * aside)
    return x * torch.sinh(radius)


@pytest.mark.parametrize("dim", [2, 5, 10])
def test_kernels_have_the_energies_and_gradients_of_the_geometry(
    kernels: ModuleType, dim: int
) -> None:
    points, half = cloud(400, dim), 200
    x, y = (part.clone().requires_grad_() for part in points.split(half))
    grad_i, grad_j = np.empty(dim), np.empty(dim)
    for reference, kernel in (
        (-cones.margin(x, y, 1.0), lambda *a: kernels.cone_gradient(*a[:3], -9.0, 9.0, *a[3:])),
        (lorentz.dist(x, y, 1.0), lambda *a: math.log(kernels.distance_gradient(*a))),
    ):
        by_x, by_y = torch.autograd.grad(reference.sum(), (x, y))
        for k in range(half):
            value = kernel(points.numpy(), k, half + k, grad_i, grad_j)
            assert value == pytest.approx(float(reference[k]), rel=1e-8, abs=1e-8)
            assert grad_i == pytest.approx(by_x[k].numpy(), rel=1e-8, abs=1e-8)
            assert grad_j == pytest.approx(by_y[k].numpy(), rel=1e-8, abs=1e-8)


def test_gradients_are_written_only_where_they_are_asked_for(kernels: ModuleType) -> None:
    points = cloud(2, 3).numpy()
    grads = np.zeros((2, 3))
    excess = kernels.cone_gradient(points, 0, 1, -9.0, 9.0, *grads)
    for low, high in ((excess + 1e-9, 9.0), (-9.0, excess - 1e-9)):
        grads[0] = 0
        assert kernels.cone_gradient(points, 0, 1, low, high, *grads) == excess
        assert (grads[0] == 0).all()


def test_a_step_is_the_one_of_geoopt(kernels: ModuleType) -> None:
    import geoopt

    x = lorentz.exp_map0(torch.randn(20, 3, generator=generator()).double(), 1.0)
    gradient = torch.randn(20, 3, generator=generator(1)).double()
    ours = x.clone()
    for row in range(20):
        kernels.move(ours.numpy(), np.empty(0), row, gradient[row].numpy(), 0.01, 0.0)

    p = geoopt.ManifoldParameter(geoopt_bridge.to_geoopt(x, 1.0), geoopt_bridge.to_manifold(1.0))
    optimiser = geoopt.optim.RiemannianSGD([p], lr=0.01)
    (p[:, 1:] * gradient).sum().backward()
    optimiser.step()
    theirs = geoopt_bridge.from_geoopt(p.detach(), 1.0)
    assert (ours - x).abs().max() > 0.1
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_steps_are_capped_kept_out_of_the_core_and_get_shorter(kernels: ModuleType) -> None:
    start = lorentz.exp_map0(torch.tensor([[0.0, 1.0, 2.0]]).double(), 1.0)
    gradient = np.array([1.0, 2.0, 3.0])

    def moved(rate: float, floor: float, squares: np.ndarray, x: Tensor = start) -> Tensor:
        x = x.clone()
        kernels.move(x.numpy(), squares, 0, gradient, rate, floor)
        return x

    far = moved(99.0, 0.0, np.empty(0))
    assert float(lorentz.dist(start, far, 1.0)) == pytest.approx(kernels.MAX_STEP)
    assert float(moved(99.0, 50.0, np.empty(0)).norm()) == pytest.approx(50.0)
    squares = np.zeros(1)
    first = moved(0.1, 0.0, squares)
    assert float(lorentz.dist(start, first, 1.0)) == pytest.approx(0.1)
    second = moved(0.1, 0.0, squares, first)
    assert float(lorentz.dist(first, second, 1.0)) < 0.08
    assert float(lorentz.dist(first, moved(-0.1, 0.0, np.zeros(1), first), 1.0)) > 0.09


def test_cones_that_hold_the_edges_change_only_for_pairs_within_the_margin(
    bench: ModuleType, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges, _, outside = tree()
    points = bench.tree_start(bench.merged_tree(edges, NODES), 3, generator=generator())
    nearest = float(bench.energies(points, outside).min())
    monkeypatch.setattr(bench, "INNER_RADIUS", 0.1)  # below all points: none is moved out

    def trained(gamma: float) -> tuple[Tensor, float]:
        x = points.clone()
        trainer = bench.Trainer(edges[torch.randperm(len(edges))], NODES, seed=0)
        losses = list(trainer.cones(x, epochs=20, lr=0.01, gamma=gamma, power=0.0))
        return x, losses[-1]

    after, _ = trained(0.9 * nearest)
    assert torch.equal(after, points)
    after, _ = trained(nearest + 0.2)
    assert not torch.equal(after, points)
    assert bench.energies(after, outside).min() > nearest


def test_edges_are_no_negatives(kernels: ModuleType) -> None:
    edges, starts = np.array([[0, 1], [0, 2]]), np.array([0, 2, 2, 2])
    start = torch.tensor([[0.5, 0.0], [3.0, 1.5], [3.0, -1.5]]).double()
    energy = cones.energy(start[[0, 0]], start[1:], 1.0)
    assert (energy > 0).all()

    def epoch(count: int) -> tuple[Tensor, float]:
        x, rng, pool = start.clone(), np.random.default_rng(0), np.zeros(1, np.int64)
        order = np.arange(2)
        return x, kernels.cone_epoch(
            x.numpy(), np.zeros(3), edges, starts, order, pool, rng, count, 0.0, 9.0, 0.1
        )

    alone, loss = epoch(0)
    others, same = epoch(10)
    assert torch.equal(alone, others)
    assert loss == same == pytest.approx(float(energy.mean()))


def test_each_end_of_a_pair_moves_the_right_way(kernels: ModuleType) -> None:
    """One edge (0, 1), node 2 as the only other; rate 1e-3."""
    edges, starts, order = np.array([[0, 1]]), np.array([0, 1, 1, 1]), np.zeros(1, np.int64)
    start = torch.tensor([[0.5, 0.0], [3.0, 1.5], [3.0, -1.5]]).double()

    def changes(measure: Callable[..., Tensor], after: Tensor) -> list[float]:
        """By moving 0 alone and 1 alone, 0 alone and 2 alone."""
        return [
            float(measure(x, y, 1.0) - measure(start[0], start[other], 1.0))
            for other in (1, 2)
            for x, y in ((after[0], start[other]), (start[0], after[other]))
        ]

    x, rng = start.clone(), np.random.default_rng(0)
    kernels.distance_epoch(x.numpy(), edges, starts, order, np.array([2]), rng, 1, 1e-3)
    _, child, _, other = changes(lorentz.dist, x)
    assert child < 0 < other

    def cone_changes(count: int) -> list[float]:
        x = start.clone()
        kernels.cone_epoch(
            x.numpy(), np.empty(0), edges, starts, order, np.zeros(1, np.int64), rng, count, 1e-3, 9.0, 0.1
        )  # fmt: skip
        return changes(cones.energy, x)

    assert max(cone_changes(0)[:2]) < 0
    start[1] = torch.tensor([3.0, 0.0])  # inside: only the other node moves anything
    assert min(cone_changes(20)[2:]) > 0


def test_edges_lie_by_parent_then_child(bench: ModuleType, kernels: ModuleType) -> None:
    trainer = bench.Trainer(torch.tensor([[2, 0], [1, 3], [2, 1], [1, 0]]), 4, seed=0)
    assert trainer.edges.tolist() == [[1, 0], [1, 3], [2, 0], [2, 1]]
    assert trainer.starts.tolist() == [0, 0, 2, 4, 4]


def test_training_is_the_same_for_the_same_seed(bench: ModuleType, kernels: ModuleType) -> None:
    edges, _, _ = tree()

    def trained(seed: int) -> Tensor:
        trainer = bench.Trainer(edges, NODES, seed=seed)
        points = bench.shrink(trainer.poincare(3, epochs=5, lr=0.1), 0.5)
        list(trainer.cones(points, epochs=5, lr=0.1, gamma=0.1, power=0.5))
        return points

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_the_poincare_embedding_ranks_children_first(
    bench: ModuleType, kernels: ModuleType
) -> None:
    edges, _, _ = tree()
    points = bench.Trainer(edges, NODES, seed=0).poincare(3, epochs=200, lr=0.1)
    x = points[torch.randperm(NODES, generator=generator())]
    near, far = (
        lorentz.dist(points[edges[:, 0]], points[edges[:, 1]], 1.0),
        lorentz.dist(x, points, 1.0),
    )
    assert near.mean() < 0.6 * far.mean()


def test_shrinking_scales_in_the_ball_and_keeps_out_of_the_core(bench: ModuleType) -> None:
    points = torch.tensor([[0.0, 30.0], [0.1, 0.0]]).double()
    far, near = bench.shrink(points, 0.5)
    assert math.asinh(float(far.norm())) == pytest.approx(
        2 * math.atanh(0.5 * math.tanh(math.asinh(30) / 2))
    )
    assert math.asinh(float(near.norm())) == pytest.approx(bench.INNER_RADIUS)


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
    parent = bench.merged_tree(torch.tensor(edges), 1 + max(child for _, child in edges)).tolist()
    found = set()
    while (node := parent[node]) >= 0:
        found.add(node)
    return found


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


@pytest.mark.parametrize("init", ["tree", "poincare"])
def test_from_files_to_report(
    bench: ModuleType,
    folder: Path,
    tmp_path: Path,
    init: str,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if init == "poincare":
        request.getfixturevalue("kernels")
    out = tmp_path / "report.json"
    stem = folder / "noun_closure.tsv"
    command = f"--data {folder} --percent 0 --dim 3 --init {init} --epochs 20 --lr 0.3 "
    command += f"--out {out} --test {stem}.other {stem}.other_neg"
    bench.main(command.split())
    report = json.loads(out.read_text(encoding="utf-8"))
    course = report["course"]
    assert f"F1 {report['result']['f1']:.1f}" in capsys.readouterr().out.splitlines()[-1]
    if init == "tree":
        assert [at["f1"] for at in course] == [100]
        assert report["result"]["f1"] == 100
    else:
        assert [at["epochs"] for at in course] == list(range(0, 21, 2))
        assert course[-1]["loss"] < 0.7 * course[1]["loss"]
        assert report["result"]["f1"] > course[0]["f1"] + 10


def test_without_test_pairs_half_of_the_validation_is_the_test(
    bench: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main(f"--data {folder} --percent 0 --dim 3 --init tree".split())
    assert "every other pair of valid" in capsys.readouterr().out


def test_without_numba_the_way_out_is_named(
    bench: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.delitem(sys.modules, "wordnet_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(SystemExit, match="hysafe\\[bench\\]"):
        bench.main(f"--data {folder} --percent 0".split())


def test_missing_files_are_named(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="train_25percent is not there"):
        bench.main(["--data", str(tmp_path)])
