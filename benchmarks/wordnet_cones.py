"""Entailment cones on WordNet: the link prediction protocol of Ganea et al. 2018, our geometry.

    python benchmarks/wordnet_cones.py --dim 5 --percent 25 [--test POS NEG]

Trains on the basic edges plus `--percent` of the rest of the transitive closure, chooses the
threshold on the energy by F1 on the validation pairs, and prints precision, recall and F1 on the
test pairs: ``--test``, else those of the set (mammal has some), else every other validation pair,
with the threshold from the rest. The state with the best F1 on validation counts. Files, with lines
parent TAB child: ``$HYSAFE_DATA/wordnet/SET``.

Points are space components in float64, curvature -1. ``--init poincare`` trains, one edge after the
other (wordnet_kernels.py; needs numba), in two parts, as in the paper:

1. A Poincaré embedding (Nickel and Kiela 2017): -log softmax of minus the distance of a parent to
   its child against NEGATIVES other nodes, drawn by their number of children + 1 to the power
   START_POWER. Riemannian SGD, the first BURN_IN of the epochs at a tenth of the step size.
2. The cones: the points shrunk in the ball; E for an edge, max(0, gamma - E) for NEGATIVES pairs of
   a parent, drawn by its number of children to the power `--power`, and any node. Riemannian
   Adagrad (Bécigneul and Ganea 2019, one accumulator per row), so that a leaf, met once in an
   epoch, moves as far as the top of the tree.

In both the step size falls linearly, and no training edge is a negative. (The authors keep the
parent of the edge in its negatives, as with `--power 1`: the top of the tree then meets, again and
again, most of its descendants that are not in the training edges.)

``--init tree`` is no learning: nested cones, level by level, over one tree read from the training
edges, scored as they are. The basic edges, which every setting holds, spell out the order, and
exactly nested cones are transitive.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hysafe.geometry import cones, lorentz

C = 1.0
# Negatives per edge, as in the paper.
NEGATIVES = 10
# Radii are kept above the widest cone, as in the paper, where the aperture still has a gradient.
INNER_RADIUS = math.asinh(2 * cones.MIN_RADIUS) + 1e-3
# `tree`: children lie within this share of the half-aperture.
FILL = 0.8
# How much more than a lost pair a wrong one weighs where several parents are put in one chain:
# chains grow long below 8, and nothing is gained.
WRONG_WEIGHT = 8
# A child is at least this far from its parent.
MIN_GAP = 0.3
# Candidates per child, from which the farthest are taken one by one.
CANDIDATES = 4
# The Poincaré embedding: radii of the first points, share of the epochs at a tenth of the step size,
# power of the number of children by which negatives are drawn (the authors': without it the top of
# the tree does not come to lie at the centre), entries for the rarest in the list to draw from.
POINCARE_RADIUS, BURN_IN, START_POWER, POOL_SHARE = 1e-3, 0.1, 0.75, 8
EVALUATIONS = 10
SCORE_ROWS = 1 << 15


class Result(NamedTuple):
    """Classification of pairs by energy <= threshold; percentages."""

    f1: float
    precision: float
    recall: float
    threshold: float


class Pairs(NamedTuple):
    """True and false pairs (parent, child), [P, 2] each."""

    positive: Tensor
    negative: Tensor


# ---------------------------------------------------------------- data


def read_pairs(path: Path) -> Tensor:
    """Pairs of node ids [P, 2] from a file with one tab-separated pair per line."""
    return torch.from_numpy(np.loadtxt(path, dtype=np.int64, delimiter="\t", ndmin=2))


def halves(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """Every other positive with its own negatives: the files hold them in the same order."""
    share = len(pairs.negative) // len(pairs.positive)
    parts = []
    for k in (0, 1):
        negative = pairs.negative[: share * len(pairs.positive)].view(-1, share, 2)[k::2]
        parts.append(Pairs(pairs.positive[k::2], negative.reshape(-1, 2)))
    return parts[0], parts[1]


# ---------------------------------------------------------------- measures


def energies(points: Tensor, pairs: Tensor) -> Tensor:
    """Energy of each pair [P], 0 inside the cone of the parent."""
    with torch.no_grad():
        return torch.cat(
            [cones.energy(points[p[:, 0]], points[p[:, 1]], C) for p in pairs.split(SCORE_ROWS)]
        )


def best_threshold(positive: Tensor, negative: Tensor) -> float:
    """The energy at or below which pairs are called true with the highest F1."""
    scores, order = torch.cat((positive, negative)).sort(stable=True)
    hit = (order < len(positive)).double()
    true = hit.cumsum(0)
    f1 = 2 * true / (torch.arange(1, len(scores) + 1) + len(positive))
    last = torch.ones(len(scores), dtype=torch.bool)
    last[:-1] = scores[1:] > scores[:-1]  # equal energies fall on one side
    return float(scores[torch.where(last, f1, torch.zeros_like(f1)).argmax()])


def classify(positive: Tensor, negative: Tensor, threshold: float) -> Result:
    """F1, precision and recall of energies at a threshold."""
    true = int((positive <= threshold).sum())
    called = true + int((negative <= threshold).sum())
    precision, recall = 100 * true / max(1, called), 100 * true / len(positive)
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    return Result(f1, precision, recall, threshold)


def evaluate(points: Tensor, choose: Pairs, test: Pairs) -> tuple[Result, Result]:
    """Results on `choose` and on `test`, both with the threshold best on `choose`."""
    chosen = energies(points, choose.positive), energies(points, choose.negative)
    threshold = best_threshold(*chosen)
    tested = energies(points, test.positive), energies(points, test.negative)
    return classify(*chosen, threshold), classify(*tested, threshold)


# ---------------------------------------------------------------- the construction `tree`


def spanning_tree(edges: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """One parent per node (-1 for roots) and its level, from the training edges.

    The parent is the deepest one by longest path: with closure edges in the set it is a direct one.
    """
    parent, child = edges.unbind(1)
    level = torch.zeros(nodes, dtype=torch.long)
    for _ in range(nodes):
        deeper = level.scatter_reduce(0, child, level[parent] + 1, "amax")
        if torch.equal(deeper, level):
            break
        level = deeper
    else:
        raise SystemExit("the training edges hold a cycle.")
    chosen = torch.full((nodes,), -1)
    best = level[parent] == level[child] - 1
    chosen[child[best]] = parent[best]
    return chosen, level


def merged_tree(edges: Tensor, nodes: int) -> Tensor:
    """One parent per node [nodes] (-1 for roots), so that few pairs of the order are lost.

    Starts as :func:`spanning_tree`. For each edge (q, x) that it left out, largest x first, the
    ancestors of x and those of q, below the last that they share, can be put in one chain: q's
    branch below x's parent, or x's branch below q. Either keeps size(x) pairs per node of q's
    branch and wrongly puts what else hangs on the moved branch below the other one. The better
    way is taken where the kept pairs outweigh, WRONG_WEIGHT times, the wrong pairs that
    NEGATIVES / 2 random nodes for each pair of the order would hit.
    """
    tree, level = spanning_tree(edges, nodes)
    parent, size = tree.tolist(), [1] * nodes
    for node in level.argsort(descending=True).tolist():
        if parent[node] >= 0:
            size[parent[node]] += size[node]

    def chain(node: int) -> list[int]:
        found = []
        while node >= 0:
            found.append(node)
            node = parent[node]
        return found

    def move(node: int, below: int) -> None:
        for ancestor in chain(node)[1:]:
            size[ancestor] -= size[node]
        parent[node] = below
        for ancestor in chain(below):
            size[ancestor] += size[node]

    left_out = edges[tree[edges[:, 1]] != edges[:, 0]].tolist()
    for q, x in sorted(left_out, key=lambda edge: -size[edge[1]]):
        above, other = chain(x)[1:], chain(q)
        if q in above or x in other:
            continue
        known = set(above)
        other = other[: next((i for i, node in enumerate(other) if node in known), len(other))]
        shared = parent[other[-1]]
        own = above[: above.index(shared)] if shared >= 0 else above
        if not own:  # q lies below the parent of x
            move(x, q)
            continue
        weight = WRONG_WEIGHT * NEGATIVES / 2 / nodes
        gain = size[x] * len(other)
        down = weight * size[other[-1]] * sum(size[node] for node in own)
        up = weight * (size[own[-1]] - size[x]) * sum(size[node] + size[x] for node in other)
        if up < min(down, gain):
            move(own[-1], q)
        elif down < gain:
            move(other[-1], parent[x])
            move(x, q)
    return torch.tensor(parent)


def spread(count: int, dim: int, *, generator: torch.Generator, sphere: bool = False) -> Tensor:
    """Points [count, dim] of the unit ball (or sphere) far from one another, greedily chosen."""
    if count == 1 and not sphere:
        return torch.zeros(1, dim, dtype=torch.float64)
    tries = max(64, CANDIDATES * count)
    x = torch.nn.functional.normalize(
        torch.randn(tries, dim, generator=generator, dtype=torch.float64), dim=-1
    )
    if not sphere:
        x = x * torch.rand(tries, 1, generator=generator, dtype=torch.float64) ** (1 / dim)
    chosen = [int(x.square().sum(-1).argmax())]
    distance = (x - x[chosen[0]]).square().sum(-1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(-1))
    return x[chosen]


def smallest_gap(x: Tensor) -> float:
    """Smallest distance between two of the points [B, D]; 2 for a single one."""
    return float(torch.pdist(x).min()) if len(x) > 1 else 2.0


def children_at(x: Tensor, offsets: Tensor, distance: Tensor) -> Tensor:
    """Points [B, D] in the cones of x [B, D] at offsets [B, D-1] of the unit ball, distances [B].

    The exterior angle is FILL·|offset|·omega.
    """
    axis = x / x.norm(dim=-1, keepdim=True)
    # Householder: the reflection that takes the first axis to `axis` takes the others across it
    mirror = axis.clone()
    mirror[:, 0] += torch.where(axis[:, 0] < 0, -1.0, 1.0)
    across = torch.nn.functional.pad(offsets, (1, 0))
    share = 2 * (across * mirror).sum(-1, keepdim=True) / mirror.square().sum(-1, keepdim=True)
    across = across - share * mirror
    length = across.norm(dim=-1, keepdim=True)
    angle = FILL * length * cones.half_aperture(x, C)[:, None]
    across = across / length.clamp_min(torch.finfo(x.dtype).tiny)
    go, sinh = distance[:, None], x.norm(dim=-1, keepdim=True)
    along = go.cosh() * sinh + go.sinh() * (1 + sinh.square()).sqrt() * angle.cos()
    return along * axis + go.sinh() * angle.sin() * across


def gap_between_levels(offsets: Tensor) -> float:
    """Distance from the parent at which the cones of children at these offsets stay apart.

    Seen from the parent their axes lie at 1 - exp(-2d) of the exterior angle of the child, their
    half-apertures are exp(-2d) of the parent's.
    """
    return max(MIN_GAP, 0.5 * math.log1p(2 / (FILL * smallest_gap(offsets))))


def root_radius(half_angle: float) -> float:
    """Radius at which a cone covers `half_angle` of the sky of the origin."""
    low, high = INNER_RADIUS, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        aperture = math.asin(2 * cones.MIN_RADIUS / math.sinh(middle))
        shadow = 2 * math.atan(math.exp(-middle) * math.tan(aperture / 2))
        low, high = (middle, high) if shadow > half_angle else (low, middle)
    return high


def tree_start(parent: Tensor, dim: int, *, generator: torch.Generator) -> Tensor:
    """Points [N, dim] with the cones of a tree (parents [N]) nested and those of siblings apart."""
    nodes = len(parent)
    counts = torch.bincount(parent + 1, minlength=nodes + 1)
    roots, *families = parent.argsort(stable=True).split(counts.tolist())
    directions = spread(len(roots), dim, generator=generator, sphere=True)
    half_angle = math.asin(min(1.0, FILL * smallest_gap(directions) / 2))
    points = torch.empty(nodes, dim, dtype=torch.float64)
    points[roots] = directions * math.sinh(root_radius(half_angle))
    layouts = {k: spread(k, dim - 1, generator=generator) for k in set(counts[1:].tolist()) - {0}}
    gaps = {k: gap_between_levels(offsets) for k, offsets in layouts.items()}
    level = roots
    while len(level := level[counts[level + 1] > 0]):
        sizes = counts[level + 1]
        children = torch.cat([families[node] for node in level.tolist()])
        offsets = torch.cat([layouts[k] for k in sizes.tolist()])
        distance = torch.tensor([gaps[k] for k in sizes.tolist()], dtype=points.dtype)
        apexes = points[level].repeat_interleave(sizes, 0)
        points[children] = children_at(apexes, offsets, distance.repeat_interleave(sizes))
        level = children
    return points


# ---------------------------------------------------------------- training


def kernels() -> ModuleType:
    """The compiled inner loops."""
    try:
        return importlib.import_module("wordnet_kernels")
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        raise SystemExit("--init poincare needs numba: pip install 'hysafe[bench]'") from None


def shrink(points: Tensor, factor: float) -> Tensor:
    """Points [N, D] scaled in the ball, those of its core moved out along their rays."""
    ball = factor * points / (1 + lorentz.time(points, C))[:, None]
    points = 2 * ball / (1 - ball.square().sum(-1, keepdim=True))
    norm = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    return points * (math.sinh(INNER_RADIUS) / norm).clamp_min(1.0)


class Trainer:
    """The two parts of the training on one set of edges.

    Args:
        edges: [E, 2] (parent, child).
        nodes: number of nodes.
        seed: of all randomness.
    """

    def __init__(self, edges: Tensor, nodes: int, *, seed: int) -> None:
        pairs = edges.numpy()
        self.edges = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        self.starts = np.searchsorted(self.edges[:, 0], np.arange(nodes + 1))
        self.nodes, self.rng, self.kernels = nodes, np.random.default_rng(seed), kernels()

    def pool(self, often: NDArray[np.float64]) -> NDArray[np.int64]:
        """Node ids, each as often as `often` [nodes] says, to draw from."""
        return np.repeat(np.arange(self.nodes), np.rint(POOL_SHARE * often).astype(int))

    def poincare(self, dim: int, *, epochs: int, lr: float) -> Tensor:
        """Points [nodes, dim] of the first part."""
        points = self.rng.standard_normal((self.nodes, dim))
        points *= POINCARE_RADIUS / np.linalg.norm(points, axis=1, keepdims=True)
        pool = self.pool((1 + np.diff(self.starts)) ** START_POWER)
        for epoch in range(epochs):
            share = epoch / epochs
            rate = lr / 10 if share < BURN_IN else lr * (1 - share)
            order = self.rng.permutation(len(self.edges))
            self.kernels.distance_epoch(
                points, self.edges, self.starts, order, pool, self.rng, NEGATIVES, rate
            )
        return torch.from_numpy(points)

    def cones(
        self, start: Tensor, *, epochs: int, lr: float, gamma: float, power: float
    ) -> Iterator[float]:
        """The second part, on the points [nodes, dim] in place; yields the mean loss of an epoch."""
        points = start.numpy()
        pool, squares = self.pool(np.diff(self.starts) ** power), np.zeros(self.nodes)
        floor = math.sinh(INNER_RADIUS)
        for epoch in range(epochs):
            rate = lr * (1 - epoch / epochs)
            order = self.rng.permutation(len(self.edges))
            yield self.kernels.cone_epoch(
                points, squares, self.edges, self.starts, order, pool, self.rng, NEGATIVES, rate,
                gamma, floor,
            )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=5)
    parser.add_argument("--percent", type=int, default=25, choices=(0, 10, 25, 50, 90))
    parser.add_argument("--set", default="noun", choices=("noun", "mammal"))
    parser.add_argument("--data", type=Path, help="folder of the set's files")
    parser.add_argument("--init", default="poincare", choices=("poincare", "tree"))
    parser.add_argument("--start-epochs", type=int, default=30, help="of the Poincaré embedding")
    parser.add_argument("--start-lr", type=float, default=0.1)
    parser.add_argument("--shrink", type=float, default=0.7, help="between the parts, in the ball")
    parser.add_argument("--epochs", type=int, default=120, help="of the cones; 0 scores the start")
    parser.add_argument("--lr", type=float, default=2.0)
    parser.add_argument("--gamma", type=float, default=0.4, help="margin of the negatives, radians")
    parser.add_argument("--power", type=float, default=0.5, help="of children, for the negatives")
    parser.add_argument("--test", type=Path, nargs=2, metavar=("POS", "NEG"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="JSON file of the settings, the course, the result"
    )
    args = parser.parse_args(arguments)

    began = time.process_time()  # minutes are the processor's
    folder = args.data or Path(os.environ.get("HYSAFE_DATA", "")) / "wordnet" / args.set
    stem = folder / f"{args.set}_closure.tsv"
    if not Path(f"{stem}.train_{args.percent}percent").is_file():
        raise SystemExit(f"{stem}.train_{args.percent}percent is not there. Set HYSAFE_DATA.")
    edges = read_pairs(Path(f"{stem}.train_{args.percent}percent"))
    with Path(f"{stem}.vocab").open(encoding="utf-8") as file:
        nodes = sum(1 for _ in file)
    choose = Pairs(read_pairs(Path(f"{stem}.valid")), read_pairs(Path(f"{stem}.valid_neg")))
    files = args.test or (Path(f"{stem}.test"), Path(f"{stem}.test_neg"))
    if args.test or files[0].is_file():
        test, name = Pairs(read_pairs(files[0]), read_pairs(files[1])), files[0].name
    else:
        (choose, test), name = halves(choose), "every other pair of valid, threshold from the rest"
    print(f"{nodes} nodes, {len(edges)} training edges, {len(choose.positive)} validation pairs")
    print(f"test: {len(test.positive)} pairs ({name})", flush=True)

    if args.init == "tree":
        generator = torch.Generator().manual_seed(args.seed)
        points = tree_start(merged_tree(edges, nodes), args.dim, generator=generator)
        args.epochs = 0
    else:
        trainer = Trainer(edges, nodes, seed=args.seed)
        points = trainer.poincare(args.dim, epochs=args.start_epochs, lr=args.start_lr)
        points = shrink(points, args.shrink)

    course: list[dict[str, float | None]] = []
    best, best_f1 = Result(0.0, 0.0, 0.0, 0.0), -1.0

    def record(epochs: int, loss: float | None) -> None:
        nonlocal best, best_f1
        chosen, result = evaluate(points, choose, test)
        minutes = (time.process_time() - began) / 60
        if chosen.f1 > best_f1:
            best, best_f1 = result, chosen.f1
        course.append(
            {"minutes": minutes, "epochs": epochs, "loss": loss, "valid_f1": chosen.f1}
            | result._asdict()
        )
        print(
            f"{minutes:6.1f} min {epochs:4d} epochs  "
            + ("start       " if loss is None else f"loss {loss:7.4f}")
            + f"  valid F1 {chosen.f1:5.2f}  test F1 {result.f1:5.2f} P {result.precision:5.2f} "
            f"R {result.recall:5.2f} threshold {result.threshold:.2g}",
            flush=True,
        )

    record(0, None)
    if args.epochs:
        every = max(1, args.epochs // EVALUATIONS)
        losses = trainer.cones(
            points, epochs=args.epochs, lr=args.lr, gamma=args.gamma, power=args.power
        )
        for epoch, loss in enumerate(losses, 1):
            if epoch % every == 0 or epoch == args.epochs:
                record(epoch, loss)
    print(
        f"best by validation: F1 {best.f1:.1f}, precision {best.precision:.1f}, "
        f"recall {best.recall:.1f} (d={args.dim}, {args.percent} %, init {args.init}, "
        f"seed {args.seed}, {(time.process_time() - began) / 60:.1f} min)"
    )
    if args.out:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        settings["test"] = name
        report = {"settings": settings, "result": best._asdict(), "course": course}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
