"""Contrastive and entailment losses against torch and hand computation, in both spaces."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hysafe.loss
from hysafe.geometry import Space, get_space
from hysafe.loss import (
    candidate_cross_entropy,
    cone_negatives,
    contrastive,
    distillation,
    entailment,
    item_cones,
    node_cones,
    preset_loss,
    prototype_cross_entropy,
    prototype_retrieval,
)
from hysafe.loss.entailment import GAMMA

C = 0.7
SPACES = ["lorentz", "euclidean"]


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> Space:
    return get_space(request.param)


def points(space: Space, count: int, seed: int, dim: int = 5, reach: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    length = 0.3 + reach * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return space.exp_map0(F.normalize(v, dim=-1) * length, C)


# ---------------------------------------------------------------- hand computation, plain Python


def hand_distance(name: str, x: list[float], y: list[float]) -> float:
    if name == "euclidean":
        return math.dist(x, y)
    xt, yt = (math.sqrt(1 / C + sum(v * v for v in p)) for p in (x, y))
    inner = sum(a * b for a, b in zip(x, y, strict=True)) - xt * yt
    return math.acosh(-C * inner) / math.sqrt(C)


def hand_angle(name: str, x: list[float], y: list[float]) -> float:
    """Exterior angle at x, by the formula of Desai et al. 2023 (or plain vectors)."""
    n = math.hypot(*x)
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    if name == "euclidean":
        return math.acos((dot - n * n) / (n * math.dist(x, y)))
    xt, yt = (math.sqrt(1 / C + sum(v * v for v in p)) for p in (x, y))
    inner = dot - xt * yt
    return math.acos((yt + xt * C * inner) / (n * math.sqrt((C * inner) ** 2 - 1)))


def hand_aperture(name: str, x: list[float]) -> float:
    r = 1.0 if name == "euclidean" else math.sqrt(C)
    return math.asin(min(1.0, 2 * 0.1 / (r * math.hypot(*x))))


def hand_cross_entropy(name: str, a: Tensor, b: Tensor, scale: float) -> float:
    """Mean over rows i of -log softmax_j(-scale * d(a_i, b_j)) at j = i."""
    total = 0.0
    for i, x in enumerate(a.tolist()):
        logits = [-scale * hand_distance(name, x, y) for y in b.tolist()]
        total += math.log(sum(math.exp(v) for v in logits)) - logits[i]
    return total / len(a)


def hand_entailment(name: str, parent: Tensor, child: Tensor, eta: float) -> float:
    terms = [
        max(0.0, hand_angle(name, x, y) - eta * hand_aperture(name, x))
        for x, y in zip(parent.tolist(), child.tolist(), strict=True)
    ]
    return sum(terms) / len(terms)


# ---------------------------------------------------------------- contrastive


def test_contrastive_is_the_mean_of_two_cross_entropies_by_hand(space: Space) -> None:
    a, b = points(space, 6, 1), points(space, 6, 2)
    forward = hand_cross_entropy(space.name, a, b, 3.0)
    backward = hand_cross_entropy(space.name, b, a, 3.0)
    both = contrastive(a, b, C, 3.0, space=space)
    one = contrastive(a, b, C, 3.0, space=space, symmetric=False)
    assert float(both) == pytest.approx((forward + backward) / 2, rel=1e-9)
    assert float(one) == pytest.approx(forward, rel=1e-9)
    assert forward != pytest.approx(backward, rel=1e-3)


def test_contrastive_equals_torch_cross_entropy_of_negative_distances(space: Space) -> None:
    a, b = points(space, 6, 1), points(space, 6, 2)
    logits = -torch.stack([space.dist(a, y[None], C) for y in b], dim=1) * 3.0
    target = torch.arange(6)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(contrastive(a, b, C, 3.0, space=space), expected)
    swapped = contrastive(b, a, C, 3.0, space=space)
    torch.testing.assert_close(swapped, expected)


def test_contrastive_falls_to_zero_where_pairs_coincide_and_the_rest_is_far(space: Space) -> None:
    a = points(space, 6, 1, reach=3.0)
    assert float(contrastive(a, a, C, 100.0, space=space)) < 1e-6
    assert float(contrastive(a, a.roll(1, 0), C, 100.0, space=space)) > 10


def test_prototype_cross_entropy_equals_torch(space: Space) -> None:
    items, classes = points(space, 7, 3), points(space, 4, 4)
    labels = torch.tensor([0, 1, 2, 3, 3, 0, 1])
    logits = torch.tensor(
        [
            [-2.0 * hand_distance(space.name, x, y) for y in classes.tolist()]
            for x in items.tolist()
        ],
        dtype=torch.float64,
    )
    for smoothing in (0.0, 0.1):
        got = prototype_cross_entropy(
            items, classes, labels, C, 2.0, space=space, label_smoothing=smoothing
        )
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(got, expected)


def test_prototype_retrieval_counts_the_share_of_own_items(space: Space) -> None:
    items, classes = points(space, 5, 3), points(space, 4, 4)
    labels = [2, 0, 2, 2, 0]
    expected = []
    for k in (0, 2):
        weight = [
            math.exp(-2.0 * hand_distance(space.name, classes[k].tolist(), x))
            for x in items.tolist()
        ]
        own = sum(w for w, label in zip(weight, labels, strict=True) if label == k)
        expected.append(-math.log(own / sum(weight)))
    got = prototype_retrieval(items, classes, torch.tensor(labels), C, 2.0, space=space)
    assert float(got) == pytest.approx(sum(expected) / 2, rel=1e-9)


# ---------------------------------------------------------------- entailment


def test_entailment_equals_hand_computation(space: Space) -> None:
    parent, child = points(space, 8, 5), points(space, 8, 6)
    for eta in (0.7, 1.0, 1.2):
        got = float(entailment(parent, child, C, space=space, eta=eta))
        assert got == pytest.approx(hand_entailment(space.name, parent, child, eta), rel=1e-9)
        assert got > 0


def test_entailment_is_zero_where_every_child_is_inside(space: Space) -> None:
    parent = points(space, 8, 5)
    child = 2.5 * parent  # further out on the same ray
    assert float(entailment(parent, child, C, space=space)) == 0
    assert float(entailment(parent, child, C, space=space, eta=0.01)) == 0
    # and counts only the children that are not
    child[0] = -child[0]
    one = float(entailment(parent, child, C, space=space))
    aperture = hand_aperture(space.name, parent[0].tolist())
    assert one == pytest.approx((math.pi - aperture) / 8, rel=1e-6)


def test_a_wider_cone_entails_more(space: Space) -> None:
    parent, child = points(space, 8, 5), points(space, 8, 6)
    losses = [float(entailment(parent, child, C, space=space, eta=e)) for e in (0.5, 1.0, 2.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_cone_negatives_equal_hand_computation(space: Space) -> None:
    parent, child = points(space, 8, 5), points(space, 8, 6)
    child[:3] = 2 * parent[:3]  # some inside
    terms = [
        max(0.0, GAMMA + hand_aperture(space.name, x) - hand_angle(space.name, x, y))
        for x, y in zip(parent.tolist()[3:], child.tolist()[3:], strict=True)
    ]
    terms += [GAMMA + hand_aperture(space.name, x) for x in parent.tolist()[:3]]  # angle 0
    got = float(cone_negatives(parent, child, C, space=space))
    assert got == pytest.approx(sum(terms) / 8, rel=1e-6)


def test_cone_negatives_are_zero_outside_the_margin_and_push_from_deep_inside(
    space: Space,
) -> None:
    parent = points(space, 8, 5)
    assert float(cone_negatives(parent, -parent, C, space=space)) == 0
    tilt = points(space, 8, 9) * 0.02
    child = (2 * parent + tilt).requires_grad_()
    loss = cone_negatives(parent, child, C, space=space)
    loss.backward()
    assert child.grad is not None
    assert (child.grad.norm(dim=-1) > 0).all()
    with torch.no_grad():
        step = child - 0.05 * child.grad / child.grad.norm(dim=-1, keepdim=True)
        assert (
            space.exterior_angle(parent, step, C) > space.exterior_angle(parent, child, C)
        ).all()


# ---------------------------------------------------------------- every loss, both spaces

Loss = Callable[[Space, Tensor, Tensor], Tensor]


def _preset(space: Space, a: Tensor, b: Tensor) -> Tensor:
    roles = dict.fromkeys(("text", "text_box", "unsafe_text"), a)
    roles |= dict.fromkeys(("image", "image_box", "unsafe_image"), b)
    losses = [preset_loss(n, roles, C, 2.0, space=space)["loss"] for n in hysafe.loss.PRESETS]
    return torch.stack(losses).sum()


def _item_cones(space: Space, a: Tensor, b: Tensor) -> Tensor:
    inside = torch.eye(len(b), len(a), dtype=torch.bool)
    return sum(item_cones(space.pairwise_margin(a, b, C), inside, ~inside), start=a.sum() * 0)


def _node_cones(space: Space, a: Tensor, b: Tensor) -> Tensor:
    pairs = [(i, i + 1) for i in range(len(a) - 1)]
    return sum(node_cones(a + b, pairs, pairs, C, space=space), start=a.sum() * 0)


LOSSES: dict[str, Loss] = {
    "candidate_cross_entropy": lambda space, a, b: candidate_cross_entropy(
        space.pairwise_margin(a, b, C), torch.eye(len(b), len(a), dtype=torch.bool)
    ).mean(),
    "cone_negatives": lambda space, a, b: cone_negatives(a, b, C, space=space),
    "contrastive": lambda space, a, b: contrastive(a, b, C, 2.0, space=space),
    "distillation": lambda space, a, b: distillation(
        space.pairwise_margin(a, b, C), torch.eye(len(b), len(a))
    ),
    "entailment": lambda space, a, b: entailment(a, b, C, space=space),
    "item_cones": _item_cones,
    "node_cones": _node_cones,
    "preset_loss": _preset,
    "prototype_cross_entropy": lambda space, a, b: prototype_cross_entropy(
        a, b, torch.arange(len(a)), C, 2.0, space=space
    ),
    "prototype_retrieval": lambda space, a, b: prototype_retrieval(
        a, b, torch.arange(len(a)), C, 2.0, space=space
    ),
}
NOT_A_LOSS = {"PRESETS", "Preset", "TaxonomyWeights"}


def test_every_public_loss_is_tested_below() -> None:
    assert set(LOSSES) | NOT_A_LOSS == set(hysafe.loss.__all__)


def hard_points(space: Space) -> dict[str, tuple[Tensor, Tensor]]:
    """Batches where plain formulas give NaN: equal, collinear, at the origin, far out."""
    a = points(space, 6, 7).float()
    return {
        "ordinary": (a, points(space, 6, 8).float()),
        "equal": (a, a.clone()),
        "collinear": (a, 2 * a),
        "antipodal": (a, -a),
        "at the origin": (torch.zeros_like(a), a),
        "children at the origin": (a, torch.zeros_like(a)),
        "far out": (a * 400, a.roll(1, 0) * 400),
    }


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_finite_with_finite_gradients(name: str, space: Space) -> None:
    for case, (a, b) in hard_points(space).items():
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        value = LOSSES[name](space, a, b)
        assert value.ndim == 0
        assert torch.isfinite(value), case
        assert float(value.detach()) >= 0, case
        value.backward()
        for leaf in (a, b):
            assert leaf.grad is not None
            assert torch.isfinite(leaf.grad).all(), case


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_pulls_on_something(name: str, space: Space) -> None:
    a, b = hard_points(space)["ordinary"]
    b[:3] = 2 * a[:3] + 0.02 * b[:3]  # half of them inside their cones
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    LOSSES[name](space, a, b).backward()
    assert a.grad is not None
    assert float(a.grad.norm()) > 1e-4


@pytest.mark.parametrize("name", ["contrastive", "cone_negatives", "entailment"])
def test_gradients_reach_the_curvature(name: str) -> None:
    space = get_space("lorentz")
    a, b = points(space, 6, 1), points(space, 6, 2)
    b[:3] = 2 * a[:3] + 0.05 * b[:3]
    c = torch.tensor(C, dtype=torch.float64, requires_grad=True)
    losses = {
        "contrastive": lambda: contrastive(a, b, c, 2.0, space=space),
        "cone_negatives": lambda: cone_negatives(a, b, c, space=space),
        "entailment": lambda: entailment(a, b, c, space=space),
    }
    losses[name]().backward()
    assert c.grad is not None
    assert torch.isfinite(c.grad)
    assert float(c.grad.abs()) > 1e-6


def test_gradients_reach_the_temperature(space: Space) -> None:
    a, b = points(space, 6, 1), points(space, 6, 2)
    for symmetric in (True, False):
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        contrastive(a, b, C, scale, space=space, symmetric=symmetric).backward()
        assert scale.grad is not None
        assert float(scale.grad.abs()) > 1e-6
