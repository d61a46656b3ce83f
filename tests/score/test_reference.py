"""New leaves measured on ordinary items."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hysafe.errors import ModelError
from hysafe.score.calibration import ModalityCalibration
from hysafe.score.leaves import NodeTable, score_margins
from hysafe.score.reference import HIGH, LEVEL, load_reference, narrowing, save_reference
from hysafe.taxonomy import Policy, load_taxonomy

SCALE = 12.0
NEW = {"x.1": {"parent": "D6", "name": "Laser pointers", "definition": "Their sale.", "synonyms": ["b"]},
       "s.x": {"parent": "S", "name": "Garden parties", "definition": "Parties.", "synonyms": ["c"]}}  # fmt: skip
TABLE = NodeTable(Policy.from_dict({"nodes": NEW}).apply(load_taxonomy()))
ADDED = torch.tensor([n in NEW for n in TABLE.leaf_ids])
FITS = [
    ModalityCalibration(),
    ModalityCalibration(0.4, -1.5, 1.7),
    ModalityCalibration(2.0, 0.5, 0.6),
]


def margins(count: int, seed: int) -> torch.Tensor:
    """Of ordinary items: the new leaves hold many of them as they are."""
    drawn = torch.Generator().manual_seed(seed)
    found = torch.randn(count, len(TABLE.ids), generator=drawn, dtype=torch.double) * 0.2 - 0.5
    found[:, TABLE.leaves[ADDED]] += 0.5
    return found


def scores(values: torch.Tensor, fit: ModalityCalibration) -> torch.Tensor:
    return score_margins(
        values, TABLE, scale=SCALE, slope=fit.slope, offset=fit.offset, temperature=fit.temperature
    ).nodes[:, TABLE.index["x.1"]]


@pytest.mark.parametrize("fit", FITS)
def test_a_new_leaf_holds_few_ordinary_items(fit: ModalityCalibration) -> None:
    known, fresh = margins(4000, 0), margins(20000, 1)
    # one new leaf at a time is what the level is about: the other is put out of reach
    for values in (known, fresh):
        values[:, TABLE.index["s.x"]] = -50
    taken = narrowing(known, TABLE, ADDED, fit, scale=SCALE)
    assert float(taken[TABLE.index["x.1"]]) > 0
    assert float((scores(known, fit) >= HIGH).double().mean()) > 3 * LEVEL
    assert float((scores(known - taken, fit) >= HIGH).double().mean()) <= LEVEL
    assert (
        float((scores(fresh - taken, fit) >= HIGH).double().mean()) <= 1.6 * LEVEL
    )  # sampling error of both
    # and no more is taken than that needs
    assert float((scores(known - taken, fit) >= HIGH - 0.02).double().mean()) > LEVEL / 2


def test_a_new_harmless_leaf_outweighs_few_risks() -> None:
    known = margins(4000, 0)
    taken = narrowing(known, TABLE, ADDED, FITS[0], scale=SCALE)
    logits = (known - taken)[:, TABLE.leaves] * SCALE
    harmless = torch.tensor([n == "s.x" for n in TABLE.leaf_ids])
    rest = torch.logsumexp(logits[:, ~ADDED], 1)
    assert float((logits[:, harmless][:, 0] > rest).double().mean()) <= LEVEL


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from(FITS))
def test_known_nodes_are_left_alone_and_nothing_widens(seed: int, fit: ModalityCalibration) -> None:
    taken = narrowing(margins(300, seed), TABLE, ADDED, fit, scale=SCALE)
    assert bool((taken >= 0).all())
    kept = torch.ones(len(TABLE.ids), dtype=torch.bool)
    kept[TABLE.leaves[ADDED]] = False
    assert not taken[kept].any()
    assert not narrowing(margins(300, seed) - 50 * ~kept, TABLE, ADDED, fit, scale=SCALE).any()


def test_too_few_items_say_nothing() -> None:
    assert not narrowing(margins(98, 0), TABLE, ADDED, FITS[0], scale=SCALE).any()
    assert narrowing(margins(99, 0), TABLE, ADDED, FITS[0], scale=SCALE).any()
    none = torch.zeros_like(ADDED)
    assert not narrowing(margins(500, 0), TABLE, none, FITS[0], scale=SCALE).any()


def test_a_reference_is_stored_beside_the_model(tmp_path: Path) -> None:
    assert load_reference(tmp_path) == {}
    drawn = {"text": torch.randn(5, 4), "image": torch.randn(3, 4)}
    save_reference(tmp_path, drawn)
    found = load_reference(tmp_path)
    assert set(found) == set(drawn)
    assert found["text"].dtype == torch.double
    torch.testing.assert_close(found["text"].float(), drawn["text"], rtol=1e-3, atol=1e-3)
    (tmp_path / "reference.safetensors").write_bytes(b"{}")
    with pytest.raises(ModelError, match="cannot be read"):
        load_reference(tmp_path)
