"""Cone scoring against the bare float32 matrix product, as ratios within one run.

    python benchmarks/cone_scoring.py [--points 100000] [--nodes 300] [--dim 512] [--threads N]

Points at radius 1 to 3 in random directions, apexes at radius 0.3 to 1.5. ``--members`` puts that
share of the points inside the cone of some apex, where the kernel has to redo pairs. The baseline
is ``torch.mm`` into preallocated memory; contestants take turns, and the best of ``--repeats`` of
each counts, so that another job on the machine hits all of them alike. The margins are checked
against the float64 functions on a sample before any time is taken.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hysafe.geometry import cones, lorentz

APEX_RADII = (0.3, 1.5)
POINT_RADII = (1.0, 3.0)
# Offset of a member from the axis of its cone, as a share of its distance from the origin.
MEMBER_SPREAD = 0.02
CHECKED_POINTS = 500
# What DESIGN allows an angle of the kernel, in radians.
ANGLE_LIMIT = 1e-4


def cloud(
    count: int, dim: int, radii: tuple[float, float], c: float, *, generator: torch.Generator
) -> Tensor:
    """Points [count, dim] in random directions at uniform radii (times 1/sqrt(c))."""
    v = torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)
    radius = radii[0] + (radii[1] - radii[0]) * torch.rand(count, generator=generator)
    return lorentz.to_radius(v, radius / c**0.5, c)


def with_members(
    points: Tensor, apex: Tensor, share: float, *, generator: torch.Generator
) -> Tensor:
    """The first `share` of the points moved next to the axis of a random apex, same norms."""
    count = round(share * len(points))
    chosen = torch.randint(len(apex), (count,), generator=generator)
    axis = torch.nn.functional.normalize(apex[chosen], dim=-1)
    offset = torch.randn(count, points.shape[1], generator=generator) / points.shape[1] ** 0.5
    direction = torch.nn.functional.normalize(axis + MEMBER_SPREAD * offset, dim=-1)
    moved = direction * points[:count].norm(dim=-1, keepdim=True)
    return torch.cat((moved, points[count:]))


def plain_margin(apex: Tensor, points: Tensor, c: float) -> Tensor:
    """The textbook float32 formulas (arccos, no care for close pairs), for comparison only."""
    x_time, y_time = (
        (1 / c + apex.square().sum(-1)).sqrt(),
        (1 / c + points.square().sum(-1)).sqrt(),
    )
    inner = c * (points @ apex.T - y_time[:, None] * x_time)
    top = y_time[:, None] + inner * x_time
    bottom = apex.norm(dim=-1) * (inner.square() - 1).clamp_min(1e-8).sqrt()
    angle = torch.acos((top / bottom).clamp(-1 + 1e-7, 1 - 1e-7))
    aperture = torch.asin((2 * cones.MIN_RADIUS / (c**0.5 * apex.norm(dim=-1))).clamp(max=1))
    return aperture - angle


def best_times(
    contestants: dict[str, Callable[[], Tensor]], repeats: int
) -> dict[str, tuple[float, float]]:
    """Best and median seconds of each, taking turns; the first, untimed turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return {name: (min(t), sorted(t)[len(t) // 2]) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=300)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=None, help="default: as torch chooses")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--c", type=float, default=1.0, help="curvature magnitude")
    parser.add_argument("--members", type=float, default=0.0, help="share of points inside a cone")
    parser.add_argument("--plain", action="store_true", help="time the textbook formulas too")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    generator = torch.Generator().manual_seed(args.seed)
    apex = cloud(args.nodes, args.dim, APEX_RADII, args.c, generator=generator)
    points = cloud(args.points, args.dim, POINT_RADII, args.c, generator=generator)
    points = with_members(points, apex, args.members, generator=generator)

    sample = points[:CHECKED_POINTS]
    exact = cones.pairwise_margin(apex.double(), sample.double(), args.c)
    error = float((cones.pairwise_margin(apex, sample, args.c) - exact).abs().max())
    inside = float((exact > 0).double().mean())

    weight = apex.T.contiguous()
    product, margins = (torch.zeros(args.points, args.nodes) for _ in range(2))
    contestants: dict[str, Callable[[], Tensor]] = {
        "mm, out given": lambda: torch.mm(points, weight, out=product),
        "mm, fresh memory": lambda: torch.mm(points, weight),
        "margin, out given": lambda: cones.pairwise_margin(apex, points, args.c, out=margins),
        "margin, fresh memory": lambda: cones.pairwise_margin(apex, points, args.c),
    }
    if args.plain:
        contestants["plain formulas"] = lambda: plain_margin(apex, points, args.c)
    times = best_times(contestants, args.repeats)

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"{args.points} points x {args.nodes} apexes x {args.dim} dimensions, c={args.c:g}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, load {load:.1f}"
    )
    print(f"sample: {inside:.2%} of pairs inside, largest error {error:.1e} rad")
    base, base_median = times["mm, out given"]
    print(f"{'best of ' + str(args.repeats):22}{'ms':>9}{'ratio':>8}{'of medians':>12}")
    for name, (best, median) in times.items():
        print(f"{name:22}{1e3 * best:9.1f}{best / base:8.2f}{median / base_median:12.2f}")
    if error > ANGLE_LIMIT:
        raise SystemExit(f"the kernel is off by {error:.1e} rad, more than {ANGLE_LIMIT}.")


if __name__ == "__main__":
    main()
