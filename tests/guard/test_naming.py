"""Names by the nearest phrase, and the whitening that items and phrases are compared in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hysafe.errors import ConfigError
from hysafe.geometry import Points
from hysafe.guard.naming import PhraseNamer, Whitening, restated
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
