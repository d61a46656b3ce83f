"""The inner loops of wordnet_cones.py: gradients in closed form, Riemannian steps (numba).

Points are space components [N, D] in float64, curvature -1, changed in place, one edge after the
other. Edges [E, 2] are (parent, child) in lexical order, those of a parent from starts[parent] on,
and `order` [E] says which comes when. The gradients are by space components; energies, distances
and gradients are those of ``hysafe.geometry``, which the tests hold them against.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hysafe.geometry import cones

__all__ = ["cone_epoch", "cone_gradient", "distance_epoch", "distance_gradient", "move"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# sinh of the radius at which a cone is a half space.
WIDEST = 2 * cones.MIN_RADIUS
# Legs, lengths and roots below this count as this where they divide.
TINY = 1e-12
# No step is longer, in geodesic length.
MAX_STEP = 0.5


@njit(cache=True, fastmath=True)
def cone_gradient(
    points: Floats, i: int, j: int, low: float, high: float, grad_i: Floats, grad_j: Floats
) -> float:
    """Exterior angle minus half-aperture of the apex i and the point j, radii above asinh(WIDEST).

    Where it lies in [low, high) the gradients are written into grad_i and grad_j [D]. Legs as in
    ``hysafe.geometry.lorentz.legs``.
    """
    dim = points.shape[1]
    square_x = square_y = product = 0.0
    for k in range(dim):
        x, y = points[i, k], points[j, k]
        square_x += x * x
        square_y += y * y
        product += (y - x) * x
    sinh_x, cosh_x, cosh_y = math.sqrt(square_x), math.sqrt(1 + square_x), math.sqrt(1 + square_y)
    share = product / square_x
    across = 0.0
    for k in range(dim):
        part = points[j, k] - (1 + share) * points[i, k]  # of y across the ray of x
        grad_j[k] = part
        across += part * part
    product /= sinh_x
    along = sinh_x + product
    if along > 0:
        forward = product * (along + sinh_x) - square_x * across
        forward /= along * cosh_x + sinh_x * cosh_y
    else:
        forward = along * cosh_x - sinh_x * cosh_y
    across = max(TINY, math.sqrt(across))
    room = math.sqrt(max(TINY, square_x - WIDEST * WIDEST))
    excess = math.atan2(across, forward) - math.atan2(WIDEST, room)
    if excess < low or excess >= high:
        return excess
    over = 1 / (forward * forward + across * across)
    radial = WIDEST / (square_x * room) - across * over * (along / cosh_x - cosh_y / sinh_x)
    sideways = -(forward * along / across + across * cosh_x) * over / sinh_x
    by_part = forward / across * over
    by_x = -across * cosh_x / sinh_x * over
    by_y = across * sinh_x / cosh_y * over
    for k in range(dim):
        part = grad_j[k]
        grad_i[k] = radial * points[i, k] + sideways * part
        grad_j[k] = by_part * part + by_x * points[i, k] + by_y * points[j, k]
    return excess


@njit(cache=True, fastmath=True)
def distance_gradient(points: Floats, i: int, j: int, grad_i: Floats, grad_j: Floats) -> float:
    """exp of the distance of the points i and j; gradients of the distance into grad_i, grad_j."""
    dim = points.shape[1]
    square_x = square_y = product = 0.0
    for k in range(dim):
        x, y = points[i, k], points[j, k]
        square_x += x * x
        square_y += y * y
        product += x * y
    cosh_x, cosh_y = math.sqrt(1 + square_x), math.sqrt(1 + square_y)
    cosh = max(1.0, cosh_x * cosh_y - product)
    sinh = max(TINY, math.sqrt(cosh * cosh - 1))
    for k in range(dim):
        x, y = points[i, k], points[j, k]
        grad_i[k] = (cosh_y / cosh_x * x - y) / sinh
        grad_j[k] = (cosh_x / cosh_y * y - x) / sinh
    return cosh + sinh


@njit(cache=True, fastmath=True)
def move(
    points: Floats, squares: Floats, row: int, gradient: Floats, rate: float, floor: float
) -> None:
    """One step of a row along its geodesic, down the gradient for a rate > 0.

    Where `squares` [N] is not empty it sums the squared Riemannian lengths of each row's gradients,
    and the rate is divided by the root (Adagrad). Points that come nearer to the origin than
    asinh(floor) are moved out along their rays.
    """
    dim = points.shape[1]
    along = total = norm = 0.0
    for k in range(dim):
        along += points[row, k] * gradient[k]
        total += gradient[k] * gradient[k]
    length = math.sqrt(total + along * along)
    if length < TINY:
        return
    if len(squares):
        squares[row] += length * length
        rate /= math.sqrt(squares[row])
    sinh = math.sinh(max(-MAX_STEP, min(MAX_STEP, rate * length)))
    go = sinh / length
    stay = math.sqrt(1 + sinh * sinh) - go * along
    for k in range(dim):
        x = stay * points[row, k] - go * gradient[k]
        points[row, k] = x
        norm += x * x
    if norm < floor * floor:
        for k in range(dim):
            points[row, k] *= floor / math.sqrt(norm)


@njit(cache=True)
def is_edge(edges: Ints, starts: Ints, parent: int, child: int) -> bool:
    low, high = starts[parent], starts[parent + 1]
    end = high
    while low < high:
        middle = (low + high) // 2
        if edges[middle, 1] < child:
            low = middle + 1
        else:
            high = middle
    return low < end and edges[low, 1] == child


@njit(cache=True)
def cone_epoch(
    points: Floats,
    squares: Floats,
    edges: Ints,
    starts: Ints,
    order: Ints,
    pool: Ints,
    rng: np.random.Generator,
    negatives: int,
    rate: float,
    gamma: float,
    floor: float,
) -> float:
    """Steps on E for each edge and max(0, gamma - E) for other pairs; mean loss of an edge.

    The other pairs are a parent from the pool and any node, edges left out. Those inside the cone
    have a constant loss, so no gradient, as in the paper.
    """
    loss = 0.0
    grad_i, grad_j = np.empty(points.shape[1]), np.empty(points.shape[1])
    for e in order:
        parent, child = edges[e]
        excess = cone_gradient(points, parent, child, 0.0, math.inf, grad_i, grad_j)
        if excess > 0:
            loss += excess
            move(points, squares, parent, grad_i, rate, floor)
            move(points, squares, child, grad_j, rate, floor)
        for _ in range(negatives):
            i, j = pool[int(rng.random() * len(pool))], int(rng.random() * len(points))
            if i == j or is_edge(edges, starts, i, j):
                continue
            excess = cone_gradient(points, i, j, 0.0, gamma, grad_i, grad_j)
            if excess < gamma:
                loss += gamma - max(0.0, excess)
            if 0 <= excess < gamma:
                move(points, squares, i, grad_i, -rate, floor)
                move(points, squares, j, grad_j, -rate, floor)
    return loss / len(order)


@njit(cache=True)
def distance_epoch(
    points: Floats,
    edges: Ints,
    starts: Ints,
    order: Ints,
    pool: Ints,
    rng: np.random.Generator,
    negatives: int,
    rate: float,
) -> float:
    """Steps on -log softmax(-d) of the child against others, d from the parent; mean loss.

    The others are nodes from the pool, children of the parent left out.
    """
    loss = 0.0
    squares = np.empty(0)
    nodes = np.empty(negatives + 1, np.int64)
    shares = np.empty(negatives + 1)
    grad_i = np.empty((negatives + 1, points.shape[1]))
    grad_j = np.empty((negatives + 1, points.shape[1]))
    for e in order:
        parent = edges[e, 0]
        nodes[0] = edges[e, 1]
        count = 1
        for _ in range(negatives):
            node = nodes[count] = pool[int(rng.random() * len(pool))]
            count += node != parent and not is_edge(edges, starts, parent, node)
        for k in range(count):
            shares[k] = 1 / distance_gradient(points, parent, nodes[k], grad_i[k], grad_j[k])
        shares[:count] /= shares[:count].sum()
        loss -= math.log(shares[0])
        grad_i[0] *= 1 - shares[0]
        grad_j[0] *= 1 - shares[0]
        for k in range(1, count):
            grad_i[0] -= shares[k] * grad_i[k]
            grad_j[k] *= -shares[k]
        move(points, squares, parent, grad_i[0], rate, 0.0)
        for k in range(count):
            move(points, squares, nodes[k], grad_j[k], rate, 0.0)
    return loss / len(order)
