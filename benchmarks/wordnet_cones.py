"""Entailment cones on WordNet: the link prediction protocol of Ganea et al. 2018, our geometry.

    python benchmarks/wordnet_cones.py --dim 5 --percent 25 [--minutes 10] [--test POS NEG]

Trains on the basic edges plus `--percent` of the rest of the transitive closure, chooses the
threshold on the energy by F1 on the validation pairs, and prints precision, recall and F1 on the
test pairs: ``--test``, else those of the set (mammal has some), else every other validation pair,
with the threshold from the rest. The state with the best F1 on validation counts. Files, with lines
parent TAB child: ``$HYSAFE_DATA/wordnet/SET``.

Points are space components in float64, curvature -1. Loss: E for an edge, max(0, gamma - E) for
negatives that replace one end by a random node and are no training edge. Optimiser: Riemannian
Adagrad on the touched rows (Bécigneul and Ganea 2019, one accumulator per row, exponential map), so
that a leaf, met once in an epoch, moves as far as the top of the tree. The start is one of

    tree      nested cones, level by level, over one tree read from the training edges
    poincare  the paper's: a Poincaré embedding of the training edges (Nickel and Kiela 2017)
    random    directions at random, small radii

Nothing but the training edges is used to train or to place. The start ``tree`` is no learning: the
basic edges, which every setting holds, spell out the order, and exactly nested cones are transitive.
Its ``start`` line is what that construction gives; the paper's setting, where transitivity has to
come out of the training, is ``--init poincare``. With ``tree`` the ancestors in the tree are not
drawn as negatives either.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hysafe.geometry import cones, lorentz

C = 1.0
# Margin of the negatives and negatives per edge, as in the paper.
GAMMA = 0.01
NEGATIVES = 10
# No step is longer, in geodesic length.
MAX_STEP = 0.5
# Radii are kept above the widest cone, as in the paper, where the aperture still has a gradient.
INNER_RADIUS = math.asinh(2 * cones.MIN_RADIUS) + 1e-3
# Longest step from the start `tree`, as a share of the half-aperture.
TRUST = 0.003
# Children lie within this share of the half-aperture; the rest is slack for the training.
FILL = 0.8
# How much more than a lost pair a wrong one weighs where several parents are put in one chain:
# chains grow long below 8, and nothing is gained.
WRONG_WEIGHT = 8
# A child is at least this far from its parent.
MIN_GAP = 0.3
# Candidates per child, from which the farthest are taken one by one.
CANDIDATES = 4
# The start of the paper: radii of the first points, share of the budget at a tenth of the step
# size, factor on the points in the ball.
POINCARE_RADIUS, BURN_IN, SHRINK = 1e-3, 0.1, 0.7
# Largest radius of the random start.
RANDOM_RADIUS = 1.0
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


# ---------------------------------------------------------------- Riemannian steps on some rows


def gradient_length(x: Tensor, gradient: Tensor) -> Tensor:
    """Riemannian length [B, 1] of derivatives by the space components of x [B, D], curvature -1."""
    along = (x * gradient).sum(-1, keepdim=True)
    return (gradient.square().sum(-1, keepdim=True) + along.square()).sqrt()


def step(
    x: Tensor, gradient: Tensor, lr: Tensor | float, *, longest: Tensor | float = math.inf
) -> Tensor:
    r"""One Riemannian SGD step, :math:`\exp_x(-lr\, \mathrm{grad})`, on space components.

    Args:
        x: points [B, D], curvature -1.
        gradient: derivatives by the space components [B, D].
        lr: step size, a number or [B, 1].
        longest: geodesic length that no step exceeds, a number or [B, 1].

    Returns:
        Points [B, D]. In the chart of space components the inverse metric is I + x xᵀ.
    """
    length = gradient_length(x, gradient)
    angle = (lr * length).minimum(torch.as_tensor(longest, dtype=x.dtype))
    direction = gradient + (x * gradient).sum(-1, keepdim=True) * x
    direction = direction / length.clamp_min(torch.finfo(x.dtype).tiny)
    return torch.cosh(angle) * x - torch.sinh(angle) * direction


def keep_out(x: Tensor, radius: float) -> Tensor:
    """Points [B, D], those nearer to the origin than `radius` moved out along their rays."""
    floor = math.sinh(radius)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (floor / norm.clamp_min(torch.finfo(x.dtype).tiny)).clamp_min(1.0)


# ---------------------------------------------------------------- where the training starts


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


def chains(parent: Tensor) -> Tensor:
    """Ancestors of every node in the tree of the given parents [N] -> [N, L], -1 for none."""
    columns = [parent]
    while bool((columns[-1] >= 0).any()):
        up = columns[-1]
        columns.append(torch.where(up >= 0, parent[up.clamp(min=0)], up))
    return torch.stack(columns, dim=1)


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


def random_start(nodes: int, dim: int, radius: float, *, generator: torch.Generator) -> Tensor:
    """Points [nodes, dim] in random directions, at radii up to `radius`."""
    x = torch.nn.functional.normalize(
        torch.randn(nodes, dim, generator=generator, dtype=torch.float64), dim=-1
    )
    return x * torch.sinh(radius * torch.rand(nodes, 1, generator=generator, dtype=torch.float64))


# ---------------------------------------------------------------- losses and training


class Sampler:
    """Shuffled batches of training edges with negatives that are no training edge.

    Args:
        edges: [E, 2] (parent, child).
        nodes: number of nodes.
        batch: edges per batch.
        generator: source of all randomness.
        ancestors: per node others that are no negatives of it as parents [nodes, L], -1 for none.
    """

    def __init__(
        self,
        edges: Tensor,
        nodes: int,
        batch: int,
        generator: torch.Generator,
        ancestors: Tensor | None = None,
    ) -> None:
        self.edges, self.nodes, self.batch, self.generator = edges, nodes, batch, generator
        self.ancestors = ancestors
        self.keys = (edges[:, 0] * nodes + edges[:, 1]).sort().values
        self.inner = edges[:, 0].unique()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (edges [B, 2], negatives [about 10 B, 2])."""
        while True:
            order = torch.randperm(len(self.edges), generator=self.generator)
            for rows in order.split(self.batch):
                edges = self.edges[rows]
                yield edges, self.negatives(edges)

    def negatives(self, edges: Tensor) -> Tensor:
        """Half with another child, half with another parent; known edges left out."""
        half = NEGATIVES // 2
        other = edges.repeat(2 * half, 1).view(2, half * len(edges), 2)
        size = (half * len(edges),)
        other[0, :, 1] = torch.randint(self.nodes, size, generator=self.generator)
        pick = torch.randint(len(self.inner), size, generator=self.generator)
        other[1, :, 0] = self.inner[pick]
        other = other.view(-1, 2)
        keys = other[:, 0] * self.nodes + other[:, 1]
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        keep = (self.keys[place] != keys) & (other[:, 0] != other[:, 1])
        if self.ancestors is not None:
            keep &= (self.ancestors[other[:, 1]] != other[:, :1]).all(1)
        return other[keep]


def cone_loss(x: Tensor, edges: Tensor, negatives: Tensor) -> Tensor:
    """Sum of E over edges and max(0, gamma - E) over negatives; pairs are rows of x [R, D]."""
    pull = cones.energy(x[edges[:, 0]], x[edges[:, 1]], C)
    push = cones.margin(x[negatives[:, 0]], x[negatives[:, 1]], C)
    return pull.sum() + torch.relu(GAMMA + push).sum()


def distance_loss(x: Tensor, edges: Tensor, negatives: Tensor) -> Tensor:
    """Sum of -log softmax(-d) of the parent against other nodes, NEGATIVES [B·K, 2] per edge."""
    near = lorentz.dist(x[edges[:, 1]], x[edges[:, 0]], C)
    far = lorentz.dist(x[negatives[:, 1]], x[negatives[:, 0]], C).view(len(edges), -1)
    return (near + torch.logsumexp(-torch.cat((near[:, None], far), dim=1), dim=1)).sum()


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Adagrad:
    """Riemannian Adagrad on rows of `points` [N, D], in place.

    Args:
        points: the table of points.
        trust: longest step as a share of the half-aperture of the row (far out the cones are so
            narrow that a longer one throws the children of a row out); None: MAX_STEP for all.
    """

    def __init__(self, points: Tensor, trust: float | None = None) -> None:
        self.points, self.trust = points, trust
        self.squares = points.new_zeros(len(points), 1)

    def step(self, edges: Tensor, negatives: Tensor, loss: Loss, lr: float) -> float:
        """Move the rows that the pairs touch; returns the mean loss of an edge."""
        rows, at = torch.cat((edges, negatives)).unique(return_inverse=True)
        x = self.points[rows].requires_grad_()
        value = loss(x, at[: len(edges)], at[len(edges) :])
        (gradient,) = torch.autograd.grad(value, x)
        x = x.detach()
        self.squares[rows] += gradient_length(x, gradient).square()
        rate = lr / self.squares[rows].sqrt().clamp_min(torch.finfo(x.dtype).eps)
        longest: Tensor | float = MAX_STEP
        if self.trust is not None:
            longest = (self.trust * cones.half_aperture(x, C)[:, None]).clamp(max=MAX_STEP)
        x = step(x, gradient, rate, longest=longest)
        self.points[rows] = keep_out(x, INNER_RADIUS) if loss is cone_loss else x
        return float(value.detach()) / len(edges)


class Budget:
    """Steps and minutes; whichever is used up first ends the training."""

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps, self.seconds, self.done = steps, 60 * minutes, 0
        self.start = time.monotonic()

    def spent(self) -> float:
        """The share that is used up, >= 1 at the end."""
        elapsed = time.monotonic() - self.start
        return max(self.done / max(1, self.steps), elapsed / self.seconds)


def poincare_start(
    edges: Tensor,
    nodes: int,
    dim: int,
    *,
    lr: float,
    batch: int,
    budget: Budget,
    generator: torch.Generator,
) -> Tensor:
    """A Poincaré embedding of the edges [nodes, dim], shrunk in the ball and kept out of its core.

    The first BURN_IN of the budget runs at a tenth of the step size.
    """
    points = random_start(nodes, dim, POINCARE_RADIUS, generator=generator)
    optimiser = Adagrad(points)
    while budget.spent() < 1:
        for rows in torch.randperm(len(edges), generator=generator).split(batch):
            pairs = edges[rows]
            negatives = pairs.repeat_interleave(NEGATIVES, 0)
            negatives[:, 0] = torch.randint(nodes, (len(negatives),), generator=generator)
            share = budget.spent()
            rate = lr / 10 if share < BURN_IN else lr * (1 - share)
            optimiser.step(pairs, negatives, distance_loss, max(0.0, rate))
            budget.done += 1
            if budget.spent() >= 1:
                break
    ball = SHRINK * points / (1 + lorentz.time(points, C))[:, None]
    points = 2 * ball / (1 - ball.square().sum(-1, keepdim=True))
    return keep_out(points, INNER_RADIUS)


def train(optimiser: Adagrad, sampler: Sampler, *, lr: float, budget: Budget) -> Iterator[float]:
    """Train the points of the optimiser; yields the mean loss at each evaluation.

    The step size falls linearly to 0 over the budget.
    """
    due, losses = 1 / EVALUATIONS, []
    for edges, negatives in sampler:
        share = budget.spent()
        if share >= min(due, 1.0) and losses:
            yield sum(losses) / len(losses)
            due, losses = (math.floor(share * EVALUATIONS) + 1) / EVALUATIONS, []
        if share >= 1:
            return
        losses.append(optimiser.step(edges, negatives, cone_loss, lr * (1 - share)))
        budget.done += 1


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=5)
    parser.add_argument("--percent", type=int, default=25, choices=(0, 10, 25, 50, 90))
    parser.add_argument("--set", default="noun", choices=("noun", "mammal"))
    parser.add_argument("--data", type=Path, help="folder of the set's files")
    parser.add_argument("--init", default="tree", choices=("tree", "poincare", "random"))
    parser.add_argument("--steps", type=int, default=2000, help="batches; 0 scores the start")
    parser.add_argument("--minutes", type=float, default=50.0, help="limit, the start included")
    parser.add_argument("--batch", type=int, default=1024, help="edges")
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--start-steps", type=int, default=8000, help="batches of poincare")
    parser.add_argument("--start-lr", type=float, default=0.5, help="step size of poincare")
    parser.add_argument("--test", type=Path, nargs=2, metavar=("POS", "NEG"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="JSON file of the settings, the course, the result"
    )
    args = parser.parse_args(arguments)

    began = time.monotonic()
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

    generator = torch.Generator().manual_seed(args.seed)
    ancestors = None
    if args.init == "tree":
        parent = merged_tree(edges, nodes)
        ancestors = chains(parent)
        points = tree_start(parent, args.dim, generator=generator)
    elif args.init == "random":
        points = random_start(nodes, args.dim, RANDOM_RADIUS, generator=generator)
        points = keep_out(points, INNER_RADIUS)
    else:
        points = poincare_start(
            edges,
            nodes,
            args.dim,
            lr=args.start_lr,
            batch=args.batch,
            budget=Budget(args.start_steps, args.minutes / 2),
            generator=generator,
        )

    course: list[dict[str, float | None]] = []
    best, best_f1 = Result(0.0, 0.0, 0.0, 0.0), -1.0

    def record(steps: int, loss: float | None) -> None:
        nonlocal best, best_f1
        chosen, result = evaluate(points, choose, test)
        minutes = (time.monotonic() - began) / 60
        if chosen.f1 > best_f1:
            best, best_f1 = result, chosen.f1
        course.append(
            {"minutes": minutes, "steps": steps, "loss": loss, "valid_f1": chosen.f1}
            | result._asdict()
        )
        print(
            f"{minutes:6.1f} min {steps:7d} steps  "
            + ("start       " if loss is None else f"loss {loss:7.4f}")
            + f"  valid F1 {chosen.f1:5.2f}  test F1 {result.f1:5.2f} P {result.precision:5.2f} "
            f"R {result.recall:5.2f} threshold {result.threshold:.2g}",
            flush=True,
        )

    record(0, None)
    left = args.minutes - (time.monotonic() - began) / 60
    if args.steps and left > 0:
        budget = Budget(args.steps, left)
        sampler = Sampler(edges, nodes, args.batch, generator, ancestors)
        optimiser = Adagrad(points, TRUST if args.init == "tree" else None)
        for loss in train(optimiser, sampler, lr=args.lr, budget=budget):
            record(budget.done, loss)
    print(
        f"best by validation: F1 {best.f1:.1f}, precision {best.precision:.1f}, "
        f"recall {best.recall:.1f} (d={args.dim}, {args.percent} %, init {args.init}, "
        f"seed {args.seed}, {(time.monotonic() - began) / 60:.1f} min)"
    )
    if args.out:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        settings["test"] = name
        report = {"settings": settings, "result": best._asdict(), "course": course}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
