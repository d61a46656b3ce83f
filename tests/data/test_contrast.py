"""The contrast set in the package: its size, its splits by pair, its nodes."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hysafe.data.contrast import SPLITS, contrast_set, core_set, long_set
from hysafe.data.datamodule import EmbedData
from hysafe.data.label_map import SAFE
from hysafe.errors import ConfigError
from hysafe.taxonomy import load_taxonomy
from hysafe.types import Sample

TAXONOMY = load_taxonomy()
REGISTERS = {"caption", "chat", "listing", "query", "prompt", "comment"}


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return contrast_set()


def pairs(samples: list[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.pair is not None and sample.extra["side"] in ("risky", "benign"):
            found.setdefault(sample.pair, []).append(sample)
    return found


def test_size(samples: list[Sample]) -> None:
    assert len(samples) >= 2400
    background = [s for s in samples if s.nodes == (SAFE,)]
    assert len(background) >= 600
    assert {s.extra["register"] for s in background} >= REGISTERS


def test_every_category_has_at_least_20_pairs(samples: list[Sample]) -> None:
    counts = Counter(members[0].extra["node"] for members in pairs(samples).values())
    assert {n.id for n in TAXONOMY.categories} == set(counts)
    assert min(counts.values()) >= 20


def test_a_pair_is_a_risky_sentence_and_its_benign_sibling(samples: list[Sample]) -> None:
    for name, members in pairs(samples).items():
        assert sorted(m.extra["side"] for m in members) == ["benign", "risky"], name
        by_side = {m.extra["side"]: m for m in members}
        risky, benign = by_side["risky"], by_side["benign"]
        assert (risky.safe, benign.safe) == (False, True)
        assert risky.nodes == (risky.extra["node"],)
        assert benign.nodes == (TAXONOMY[risky.nodes[0]].sibling,)
        assert risky.text != benign.text


def test_pairs_are_never_split_and_every_split_has_every_category(samples: list[Sample]) -> None:
    for name, members in pairs(samples).items():
        assert len({m.extra["split"] for m in members}) == 1, name
    every = {n.id for n in TAXONOMY.categories}
    for split in SPLITS:
        held = {s.extra["node"] for s in samples if s.extra["split"] == split}
        assert every <= held, split


def test_splits_are_disjoint_and_make_the_whole(samples: list[Sample]) -> None:
    parts = {split: contrast_set(split) for split in SPLITS}
    for split, part in parts.items():
        assert part
        assert {s.extra["split"] for s in part} == {split}
    ids = [s.id for part in parts.values() for s in part]
    assert len(ids) == len(set(ids)) == len(samples)
    two = contrast_set(("validation", "test"))
    assert len(two) == len(parts["validation"]) + len(parts["test"])


def test_no_text_stands_in_two_splits_or_twice(samples: list[Sample]) -> None:
    seen = Counter(" ".join(str(s.text).casefold().split()) for s in samples)
    assert [t for t, n in seen.items() if n > 1] == []


def test_nodes_concepts_and_texts_are_usable(samples: list[Sample]) -> None:
    for sample in samples:
        assert sample.text
        assert sample.text.strip() == sample.text
        assert sample.source == "contrast"
        assert all(n == SAFE or n in TAXONOMY for n in sample.nodes)
        concept, node = sample.extra["concept"], sample.extra["node"]
        if concept is not None:
            assert TAXONOMY[concept].parent == node


def test_an_unknown_split_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"\['dev'\]: known are train, validation, test"):
        contrast_set("dev")
    with pytest.raises(ConfigError, match=r"\['dev'\]"):
        contrast_set(["train", "dev"])


def test_core_and_long_texts_are_apart(samples: list[Sample]) -> None:
    core, long = core_set(), long_set()
    assert not {s.id for s in core} & {s.id for s in long}
    assert min(len(str(s.text).split()) for s in long) >= 30
    assert all(s.pair for s in long)
    assert {s.extra["split"] for s in long} == set(SPLITS)
    ids = {s.id for s in (*core, *long)}
    rest = [s for s in samples if s.id not in ids]
    assert rest
    assert all(s.extra["functionality"] for s in rest)


def test_a_batch_is_drawn_more_often_and_its_source_as_often() -> None:
    given: dict[str, Any] = {"pictures": False, "text_sets": [], "rendered": 4, "image_size": 16}
    plain, often = EmbedData(**given), EmbedData(**given, batch_weights={"k": 4, "bk": 2})
    plain.setup()
    often.setup()
    samples = plain.train_texts.samples
    for letters, factor in (("-k", 4), ("bk", 2)):
        batch = torch.tensor([letters in s.id for s in samples])
        source = torch.tensor([bool(s.pair) == (letters == "-k") for s in samples])
        source &= torch.tensor([s.source == "contrast" for s in samples])
        source &= torch.tensor([not s.extra.get("functionality") for s in samples])
        drawn, weight = often.draw_weights, plain.draw_weights
        assert drawn[source].sum().item() == pytest.approx(weight[source].sum().item())
        rest = source & ~batch
        ratio = (drawn[batch][0] / drawn[rest][0]).item()
        assert ratio == pytest.approx(factor)


@pytest.mark.parametrize("weights", [{"kk": 2.0}, {"k": 0.0}])
def test_weights_of_no_batch_and_no_weight_are_refused(weights: dict[str, float]) -> None:
    data = EmbedData(pictures=False, text_sets=[], rendered=4, image_size=16, batch_weights=weights)
    with pytest.raises(ConfigError, match="batch_weights"):
        data.setup()


def five_words(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w']+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


@pytest.mark.parametrize(("letters", "probes"), [("k", "ab"), ("s", "abcd")])
def test_the_last_batches_share_no_five_words_with_what_is_measured(
    samples: list[Sample], letters: str, probes: str
) -> None:
    measured = [str(s.text) for s in samples if s.extra["split"] != "train"]
    folder = Path(__file__).parents[2] / "benchmarks" / "data"
    for probe in probes:
        lines = (folder / f"probe_{probe}.jsonl").read_text("utf-8").splitlines()
        measured += [json.loads(line)["text"] for line in lines]
    known = set().union(*map(five_words, measured))
    last = [s for s in samples if re.search(rf"-{letters}\d|^b{letters}-", s.id)]
    assert len(last) > 1500
    assert [s.id for s in last if five_words(str(s.text)) & known] == []
