"""Example texts of a node: by its words or by them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hysafe.geometry import Points
from hysafe.score.calibration import ModalityCalibration
from hysafe.score.examples import example_tangent
from hysafe.score.leaves import NodeTable
from hysafe.taxonomy import Policy, Taxonomy, load_taxonomy

D, C, SCALE = 12, 1.0, 8.0
FIT = ModalityCalibration()


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return load_taxonomy()


@pytest.fixture(scope="module")
def placed(taxonomy: Taxonomy) -> tuple[NodeTable, Points, int, torch.Tensor]:
    """A view with a node x.1, apexes in random directions, its row, and which leaves are new."""
    rule = {"parent": "D6", "name": "Laser pointers", "definition": "Laser pointers."}
    table = NodeTable(Policy.from_dict({"nodes": {"x.1": rule}}).apply(taxonomy))
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(table.ids), D, generator=generator).double()
    apexes = Points.from_tangent(F.normalize(directions, dim=-1) * 0.7, C)
    return table, apexes, table.index["x.1"], torch.tensor([n == "x.1" for n in table.leaf_ids])


def around(direction: torch.Tensor, count: int, spread: float, seed: int) -> torch.Tensor:
    noise = torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).double()
    return F.normalize(F.normalize(direction, dim=-1) + spread * noise, dim=-1) * 2.0


def ordinary(count: int = 400) -> torch.Tensor:
    return around(torch.zeros(D).double(), count, 1.0, 9)


def told(placed: Any, examples: torch.Tensor, **settings: Any) -> torch.Tensor | None:
    table, apexes, row, new = placed
    known = settings.pop("ordinary", ordinary())
    return example_tangent(row, examples, known, apexes, table, new, FIT, scale=SCALE)


def test_examples_that_lie_elsewhere_than_the_words_decide(placed: Any) -> None:
    _, apexes, row, _ = placed
    away = -apexes.tangent()[row] + 0.3 * torch.eye(D).double()[0]
    examples = around(away, 6, 0.1, 1)
    found = told(placed, examples)
    assert found is not None
    mean = F.normalize(F.normalize(examples, dim=-1).mean(0), dim=-1)
    torch.testing.assert_close(F.normalize(found, dim=-1), mean)
    assert float(found.norm()) == pytest.approx(float(apexes.tangent()[row].norm()))


def test_words_that_find_the_examples_better_stay(placed: Any) -> None:
    _, apexes, row, _ = placed
    # scattered round the words: the mean of the others is a worse guess of each than the words are
    assert told(placed, around(apexes.tangent()[row], 3, 0.25, 2)) is None


def test_each_example_is_judged_by_the_others(placed: Any) -> None:
    """Two texts 60 degrees from the words and 76 from each other; their mean lies 38 from both."""
    _, apexes, row, _ = placed
    words = F.normalize(apexes.tangent()[row], dim=-1)
    basis = torch.linalg.qr(torch.stack([words, *torch.eye(D).double()[:2]]).T).Q.T
    one, other = 0.5 * words + math.sqrt(0.75) * basis[1:]
    assert told(placed, 2 * torch.stack([one, other])) is None
    near = torch.cat([around(v, 2, 0.02, k) for k, v in enumerate((one, other))])
    assert told(placed, near) is not None


def test_it_is_the_same_for_the_examples_in_any_order(placed: Any) -> None:
    _, apexes, row, _ = placed
    examples = around(-apexes.tangent()[row], 5, 0.2, 3)
    first, second = told(placed, examples), told(placed, examples.flip(0))
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first, second)


def test_without_ordinary_texts_it_still_chooses(placed: Any) -> None:
    _, apexes, row, _ = placed
    examples = around(-apexes.tangent()[row], 5, 0.1, 4)
    assert told(placed, examples, ordinary=torch.empty(0, D)) is not None


@pytest.mark.parametrize("parent", ["S", "6.1"])
def test_a_background_node_and_a_concept_take_examples_too(taxonomy: Taxonomy, parent: str) -> None:
    rule = {"parent": parent, "name": "Laser pointers", "definition": "Laser pointers."}
    table = NodeTable(Policy.from_dict({"nodes": {"x.1": rule}}).apply(taxonomy))
    directions = torch.randn(len(table.ids), D, generator=torch.Generator().manual_seed(0)).double()
    apexes = Points.from_tangent(F.normalize(directions, dim=-1) * 0.7, C)
    row = table.index["x.1"]
    examples = around(-directions[row], 5, 0.1, 6)
    new = torch.tensor([n == "x.1" for n in table.leaf_ids])
    found = example_tangent(row, examples, ordinary(), apexes, table, new, FIT, scale=SCALE)
    assert found is not None


def test_one_point_twice_says_nothing(placed: Any) -> None:
    _, apexes, row, _ = placed
    assert told(placed, around(-apexes.tangent()[row], 1, 0.1, 7).repeat(3, 1)) is None


def test_what_the_caller_has_is_left_alone(placed: Any) -> None:
    _, apexes, row, _ = placed
    before = apexes.space.clone()
    told(placed, around(-apexes.tangent()[row], 4, 0.1, 5))
    assert torch.equal(apexes.space, before)
    assert math.isfinite(float(before.sum()))
