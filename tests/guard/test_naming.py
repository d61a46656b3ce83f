"""Names by the nearest phrase, and the whitening that items and phrases are compared in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from hysafe.errors import ConfigError
from hysafe.geometry import Points
from hysafe.guard.corpus import PhraseIndex
from hysafe.guard.naming import (
    THINGS,
    PhraseNamer,
    Whitening,
    agreement,
    borrowed,
    bundled_phrases,
    restated,
)
from hysafe.taxonomy import Policy, PolicyView, load_taxonomy

WORDS = ["laser pointers", "old coins", "garden tools", "tusk carvings"]
C = 0.7


@pytest.fixture(scope="module")
def view() -> PolicyView:
    return Policy().apply(load_taxonomy())


class Encoder:
    """A place for each phrase: its own axis, beside an offset that all share."""

    def __init__(self, offset: float = 0.0) -> None:
        self.offset, self.calls = offset, 0

    def __call__(self, texts: Sequence[str]) -> Points:
        self.calls += 1
        rows = [self.place(WORDS.index(t)) if t in WORDS else np.zeros(6) for t in texts]
        return Points.from_tangent(torch.from_numpy(np.stack(rows)), C)

    def place(self, k: int) -> np.ndarray:
        v = np.zeros(6)
        v[k], v[5] = 1.0, self.offset
        return v


def names(found: Sequence[object]) -> list[str | None]:
    return [None if f is None else f.name for f in found]  # type: ignore[attr-defined]


def test_the_nearest_phrase_is_the_name(view: PolicyView) -> None:
    encode = Encoder()
    namer = PhraseNamer(encode, WORDS)
    vectors = np.stack([1.3 * encode.place(k) for k in (2, 0, 3)])
    found = namer.name(vectors, ["text", "image", "text"], [""] * 3, view)
    assert names(found) == ["garden tools", "laser pointers", "tusk carvings"]
    assert found[0] is not None
    assert "4 phrases" in found[0].rationale
    namer.name(vectors, ["text"] * 3, [""] * 3, view)
    assert encode.calls == 1  # phrases are encoded once


def test_whitening_names_what_stands_apart_from_the_phrases_as_a_whole(view: PolicyView) -> None:
    """Pictures lie elsewhere than phrases: on their own axis, which drowns all else."""
    encode = Encoder()
    rng = np.random.default_rng(0)
    gap = np.array([0, 1.1, 0, 0, 4.0, 0])  # towards "old coins"
    pictures = np.stack([gap + 0.5 * encode.place(k % 4) for k in range(80)])
    pictures += 0.05 * rng.normal(size=pictures.shape)
    reference = {"image": Whitening.fit(pictures)}
    wanted = [WORDS[k % 4] for k in range(80)]
    modalities, texts = ["image"] * 80, [""] * 80
    plain = names(PhraseNamer(encode, WORDS).name(pictures, modalities, texts, view))
    white = names(
        PhraseNamer(encode, WORDS, reference=reference).name(pictures, modalities, texts, view)
    )
    assert white == wanted
    assert plain != wanted


def test_where_the_phrases_lie_as_a_whole_plays_no_part(view: PolicyView) -> None:
    rng = np.random.default_rng(0)
    items = rng.normal(size=(40, 6))
    reference = {"text": Whitening.fit(items)}
    found = [
        PhraseNamer(Encoder(offset), WORDS, reference=reference).name(
            items[:5], ["text"] * 5, [""] * 5, view
        )
        for offset in (0.0, 3.0)
    ]
    assert found[0] == found[1]  # with its cosine


def test_what_near_phrases_agree_on_wins_over_an_odd_one() -> None:
    """The nearest phrase means something else than the three behind it."""
    nearness = np.array([0.50, 0.48, 0.46, 0.47, -np.inf, -0.9])
    meanings = np.eye(3)[[1, 0, 0, 0, 0, 1]]
    meanings[2:4] = [[0.96, 0, 0.28], [0.96, 0, -0.28]]
    order, scores = agreement(nearness, meanings)
    assert order.tolist() == [1, 3, 2, 0, 5]  # the phrase that may not be named does not vote
    assert (np.diff(scores) <= 0).all()
    # by hand: the votes' weighted mean similarity to the second phrase
    votes = np.exp(6.0 * (nearness[[0, 1, 2, 3, 5]] - 0.5))
    wanted = votes @ meanings[[0, 1, 2, 3, 5]] @ meanings[1] / votes.sum()
    assert scores[0] == pytest.approx(wanted)
    assert agreement(np.full(3, -np.inf), meanings[:3])[0].tolist() == []


def test_items_borrow_from_near_ones_only() -> None:
    rng = np.random.default_rng(0)
    units = np.eye(6)[[0, 0, 0, 3, 4]] + 0.1 * rng.normal(size=(5, 6))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    moved = borrowed(units)
    assert np.linalg.norm(moved, axis=1) == pytest.approx(np.ones(5))
    assert moved[3:] == pytest.approx(units[3:])  # alone: as they were
    middle = units[:3].mean(0)
    assert (moved[:3] @ middle > units[:3] @ middle).all()
    assert borrowed(units[:1]) == pytest.approx(units[:1])
    assert borrowed(units[:0]).shape == (0, 6)


def test_the_list_ranks_by_agreement_and_is_the_same_after_loading(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors, items = rng.normal(size=(90, 5)), rng.normal(size=(30, 5))
    meanings = rng.normal(size=(90, 7))
    meanings /= np.linalg.norm(meanings, axis=1, keepdims=True)
    whitening = {"text": Whitening.fit(items)}
    index = PhraseIndex([f"phrase {k}" for k in range(90)], vectors, whitening, meanings)
    index.save(tmp_path)
    again = PhraseIndex.load(tmp_path)
    assert again.meanings == pytest.approx(index.meanings, abs=1e-7)
    assert again.meanings == pytest.approx(meanings, abs=0.01)
    off = np.zeros(90, bool)
    off[::2] = True
    for borrow in (False, True):
        for places, scores, cosines in index.choose(items, "text", 12, borrow=borrow, without=off):
            assert len(places) == len(scores) == len(cosines) == 12
            assert not off[places].any()
            assert (np.diff(scores) <= 1e-9).all()
    plain = PhraseIndex(index.phrases, vectors, whitening).choose(items, "text", 3)
    near = index.nearest(items, "text", 3)
    assert [tuple(index.phrases[c] for c in places) for places, *_ in plain] == near
    assert len(index.choose(items, "radio", 3)[0][0]) == 0


def test_a_namer_with_meanings_says_what_phrases_agree_on(view: PolicyView) -> None:
    encode = Encoder()
    reference = {"text": Whitening(np.zeros(6), np.eye(6))}
    around = np.mean([encode.place(k) for k in range(4)], axis=0)
    item = (encode.place(0) + 0.95 * encode.place(1) + 0.9 * encode.place(2) - around)[None]
    one = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]])  # three of four mean the same
    plain = PhraseNamer(encode, WORDS, reference=reference)
    namer = PhraseNamer(encode, WORDS, reference=reference, meaning=lambda texts: one)
    assert names(plain.name(item, ["text"], [""], view)) == ["laser pointers"]
    (found,) = namer.name(item, ["text"], [""], view)
    assert found is not None
    assert found.name in WORDS[1:3]
    assert "agree" in found.rationale


def test_a_name_never_restates_an_active_node(view: PolicyView) -> None:
    encode = Encoder()
    node = {"parent": "D6", "name": "Old coin", "definition": "Coins.",
            "synonyms": ["Tool for the garden"]}  # fmt: skip
    on = Policy.from_dict({"nodes": {"x.1": node}}).apply(view.taxonomy)
    off = Policy.from_dict({"nodes": {"x.1": {**node, "status": "non_violating"}}})
    assert restated(WORDS, on).tolist() == [False, True, True, False]
    assert not restated(WORDS, off.apply(view.taxonomy)).any()
    vectors = encode.place(1)[None]
    assert names(PhraseNamer(encode, WORDS).name(vectors, ["text"], [""], on)) != ["old coins"]
    only = PhraseNamer(encode, ["old coins"])
    assert only.name(vectors, ["text"], [""], on) == [None]


def test_what_is_no_number_has_no_name(view: PolicyView) -> None:
    encode = Encoder()
    vectors = np.stack([np.full(6, np.nan), encode.place(0)])
    found = PhraseNamer(encode, WORDS).name(vectors, ["text"] * 2, [""] * 2, view)
    assert names(found) == [None, "laser pointers"]


def test_no_phrases_is_said() -> None:
    with pytest.raises(ConfigError, match="no phrases"):
        PhraseNamer(Encoder(), [" "])


def test_whitened_directions_do_not_see_a_shared_spread() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 4)) * [10, 1, 1, 1]
    whitening = Whitening.fit(x)
    units = whitening.directions(x)
    assert np.linalg.norm(units, axis=1) == pytest.approx(np.ones(500))
    spread = (units**2).mean(0)
    plain = ((x / np.linalg.norm(x, axis=1, keepdims=True)) ** 2).mean(0)
    # shrinkage leaves some of it
    assert spread.max() / spread.min() < 0.7 * plain.max() / plain.min()
    assert whitening.directions(whitening.mean[None]).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("rows", [np.empty((0, 3)), np.ones((1, 3)), np.ones((4, 3))])
def test_too_few_vectors_are_only_centred(rows: np.ndarray) -> None:
    whitening = Whitening.fit(rows)
    assert whitening.matrix.tolist() == np.eye(3).tolist()
    far = whitening.mean + np.array([0, 2, 0])
    assert whitening.directions(far[None]).tolist() == [[0, 1, 0]]


def test_pictures_are_named_by_what_they_show_and_texts_are_not(view: PolicyView) -> None:
    asked: list[str] = []

    def encode(texts: Sequence[str]) -> Points:
        asked.extend(texts)
        generator = torch.Generator().manual_seed(0)
        return Points.from_tangent(torch.randn(len(texts), 3, generator=generator), 1.0)

    vectors = np.random.default_rng(0).normal(size=(40, 3))
    namer = PhraseNamer(encode)
    things, phrases = bundled_phrases(THINGS), bundled_phrases()
    shown, said = (
        {n.name for n in namer.name(vectors, [c] * 40, [""] * 40, view) if n}
        for c in ("image", "text")
    )
    assert shown
    assert shown <= set(things)
    assert said <= set(phrases)
    assert set(asked) == {*things, *phrases}
    assert len(things) == len(set(things)) > 500
