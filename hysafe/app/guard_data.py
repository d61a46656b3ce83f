"""Batches for the guard's training, from the frozen encoder's points."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset

from hysafe.app.pipeline import SafetyModel, load
from hysafe.data.contrast import contrast_set
from hysafe.data.images import decode, to_pixels
from hysafe.data.sources import data_root, iter_samples
from hysafe.evaluate.novelty_data import read_held_out
from hysafe.guard.corpus import (
    HIDE_RATE,
    Labelled,
    PhraseIndex,
    Writer,
    item_of,
    node_phrases,
    seen_policy,
    wordnet_phrases,
)
from hysafe.guard.model import Evidence, PolicySpace
from hysafe.guard.naming import Whitening, bundled_phrases
from hysafe.guard.protocol import Episode
from hysafe.guard.similarity import minilm_embed
from hysafe.guard.split import hidden_nodes
from hysafe.taxonomy import PolicyView, Taxonomy
from hysafe.types import Sample

__all__ = ["Draw", "GuardData", "GuardWorld", "encode_texts", "evidence_of"]

log = logging.getLogger(__name__)

# Permissive sets with one category a row, beside the contrast set.
SETS = (
    "catqa",
    "salad_defense_base",
    "advbench",
    "harmfulqa",
    "dangerousqa",
    "edos",
    "clinc150",
    "banking77",
)
# Of one set at most this many, so that no register prevails.
MOST = 500
# Of the contrast set at most this many; they are drawn at random.
MOST_CONTRAST = 14_000
# Phrases kept for the perplexity.
HELD_OUT_PHRASES = 1000
# Noise on a phrase's point, as shares of its length: items do not stand where phrases stand.
NOISE = 0.6
# Pictures of a class that are read.
PICTURES = 60


def encode_texts(model: SafetyModel, texts: Sequence[str], cache: Path | None) -> np.ndarray:
    """Tangent vectors [n, D] of texts (their first window), kept under `cache`."""
    digest = hashlib.sha256(model.encoder.hash().encode())
    for text in texts:
        digest.update(text.encode() + b"\n")
    return _kept(cache, digest.hexdigest(), lambda: _encoded(model, texts))


def _encoded(model: SafetyModel, texts: Sequence[str]) -> np.ndarray:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = np.empty((len(texts), model.encoder.dim), np.float32)
    for start in range(0, len(order), 256):
        rows = order[start : start + 256]
        vectors[rows] = model.encode_text([texts[i] for i in rows]).tangent().numpy()
    return vectors


def _kept(cache: Path | None, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Vectors from the cache, or made and put there."""
    if cache is None:
        return make()
    path = cache / f"guard-{key[:24]}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        save_file({"vectors": torch.from_numpy(make())}, unfinished)
        unfinished.replace(path)
    return np.asarray(load_file(path)["vectors"].numpy())


def evidence_of(
    model: SafetyModel, channels: Mapping[str, np.ndarray], texts: Sequence[str], index: PhraseIndex,
    view: PolicyView | None = None, *, phrases: int = 16, borrow: bool = False,
    without: np.ndarray | None = None,
) -> list[Evidence]:  # fmt: skip
    """Evidence of n items, each with the same channels.

    Args:
        channels: tangent vectors [n, D] by channel; the margins are the highest of all channels, as
            in a scan.
        texts: what each item says.
        view: whose nodes have margins and scores, whether it switches them off or not, as in training;
            the taxonomy's without it.
        phrases, borrow, without: see :meth:`PhraseIndex.choose`.
    """
    view = model.view() if view is None else view.all_active()
    said = {name: model.score_vectors(name, v, view) for name, v in channels.items()}
    margins = np.max([s.margins for s in said.values()], axis=0).astype(np.float32)
    scores = np.max([s.nodes for s in said.values()], axis=0).astype(np.float32)
    words = next(c for c in ("text", "ocr", "image") if c in channels)
    near = index.choose(channels[words], words, phrases, borrow=borrow, without=without)
    found = []
    for i, text in enumerate(texts):
        found.append(
            Evidence(
                tuple(channels),
                np.stack([v[i] for v in channels.values()]),
                np.array([s.p_unsafe[i] for s in said.values()]),
                np.array(
                    [np.nan if s.distribution is None else s.distribution[i] for s in said.values()]
                ),
                margins[i], scores[i], text, tuple(index.phrases[c] for c in near[i][0]),
                index.vectors[near[i][0]].astype(np.float16), near[i][1], near[i][2],
            )
        )  # fmt: skip
    return found


@dataclass
class GuardWorld:
    """All that training and evaluation share.

    Args:
        model: the frozen encoder with taxonomy and calibration.
        space: cones of its nodes.
        index: phrases for the prompts; none names a hidden category in its own words.
        train, validation: items of seen categories, harmless ones and pictures.
        words, word_vectors: phrases and their points, for the vocabulary; the last
            ``HELD_OUT_PHRASES`` are for the perplexity.
        writer: draws episodes.
    """

    model: SafetyModel
    space: PolicySpace
    index: PhraseIndex
    train: list[Labelled]
    validation: list[Labelled]
    words: list[str]
    word_vectors: np.ndarray
    writer: Writer


@dataclass(frozen=True)
class Draw:
    """One batch before it is made into tensors.

    Args:
        items, episodes, answers: what is to be judged, under what, and the right answers.
        describe: evidence of what is to be put into words, with its phrases.
    """

    items: list[Labelled]
    episodes: list[Episode]
    answers: list[str]
    describe: list[tuple[Evidence, str]]


class GuardData(L.LightningDataModule):
    """Items, episodes and phrases for the guard.

    Args:
        encoder: a model as ``hysafe.load`` takes it.
        data_dir: the development data; HYSAFE_DATA by default. Without it the contrast set and
            the bundled phrases are all there is.
        judged, described: rows of a batch of each kind.
        pictures: of each Tiny-ImageNet class; 0 for none.
        limit: items of each set, for a quick look.
        cache: folder for encoded texts and pictures.
        seed: of what is drawn.
        hidden: keep the hidden categories out; without it the guard learns all 45.
        text_sets: names of sets beside the contrast set.
        hide: share of risky items whose category is taken out of the policy.
        keep_images: keep the encoded pictures, for a published decoder that sees pixels.
    """

    def __init__(
        self,
        encoder: str = "mini",
        data_dir: str | None = None,
        judged: int = 32,
        described: int = 32,
        pictures: int = PICTURES,
        limit: int | None = None,
        cache: str | None = "runs/features",
        seed: int = 0,
        hidden: bool = True,
        text_sets: list[str] | None = None,
        keep_images: bool = False,
        hide: float = HIDE_RATE,
    ) -> None:
        super().__init__()
        self.encoder, self.data_dir, self.seed = encoder, data_dir, seed
        self.judged, self.described, self.pictures, self.limit = judged, described, pictures, limit
        self.cache = Path(cache) if cache else None
        self.hidden, self.keep_images, self.hide = hidden, keep_images, hide
        self._images: list[bytes] = []
        self.text_sets = list(SETS) if text_sets is None else text_sets
        self._world: GuardWorld | None = None

    @property
    def world(self) -> GuardWorld:
        """What was read; :meth:`setup` comes first."""
        if self._world is None:
            self.setup()
        assert self._world is not None
        return self._world

    def setup(self, stage: str | None = None) -> None:
        if self._world is not None:
            return
        model = load(self.encoder)
        view = model.view()
        table, apexes = model.place(view)
        space = PolicySpace(table.ids, apexes.tangent().float())
        gone = hidden_nodes(model.taxonomy) if self.hidden else frozenset()
        samples = {s: self._samples(s, gone, model.taxonomy) for s in ("train", "validation")}
        texts = {k: [str(s.text) for s, *_ in v] for k, v in samples.items()}
        vectors = {k: encode_texts(model, v, self.cache) for k, v in texts.items()}
        pixels, names = self._pictures(model)
        whitening = {"text": Whitening.fit(vectors["train"])}
        whitening["ocr"] = whitening["text"]
        if len(pixels):
            whitening["image"] = Whitening.fit(pixels)
        shown = self._shown(model, gone)
        phrases = [p for p in bundled_phrases() if p.casefold() not in shown]
        phrases = phrases[: self.limit and self.limit * 4]
        index = PhraseIndex(
            phrases, encode_texts(model, phrases, self.cache), whitening,
            minilm_embed(phrases).numpy(),
        )  # fmt: skip
        made = {k: self._texts(model, samples[k], vectors[k], index) for k in samples}
        if len(pixels):
            evidence = evidence_of(model, {"image": pixels}, [""] * len(pixels), index)
            kept: list[bytes | None] = [*self._images] or [None] * len(names)
            whole = [
                Labelled(e, picture=n, image=i)
                for e, n, i in zip(evidence, names, kept, strict=True)
            ]
            made["train"] += whole
            made["train"] += self._both(model, made["train"], vectors["train"], pixels, index)
        words = self._words(model, gone, phrases)
        self._world = GuardWorld(
            model, space, index, made["train"], made["validation"], words,
            encode_texts(model, words, self.cache),
            Writer(seen_policy(view, gone), model.taxonomy, hide=self.hide),
        )  # fmt: skip
        log.info(
            "guard: %d items to learn from, %d to check with, %d phrases, %d in the list",
            len(made["train"]), len(made["validation"]), len(words), len(phrases),
        )  # fmt: skip

    # ------------------------------------------------------------ reading

    def _samples(
        self, split: str, gone: frozenset[str], taxonomy: Taxonomy
    ) -> list[tuple[Sample, Any]]:
        read = list(contrast_set(split))
        random.Random(self.seed).shuffle(read)
        read = read[: min(self.limit or MOST_CONTRAST, MOST_CONTRAST)]
        root = self._root()
        if split == "train" and root is not None:
            for name in self.text_sets:
                rows = list(iter_samples(str(root / "text" / f"{name}.jsonl"), "hysafe_text"))
                rows = [r for r in rows if item_of(r, taxonomy) is not None]
                random.Random(self.seed).shuffle(rows)
                read += rows[: min(self.limit or MOST, MOST)]
        kept = []
        for s in read:
            found = item_of(s, taxonomy)
            if found is None or found[0] in gone or found[2] in gone or not s.text:
                continue
            kept.append((s, found))
        return kept

    def _texts(
        self, model: SafetyModel, samples: Sequence[tuple[Sample, Any]], vectors: np.ndarray,
        index: PhraseIndex,
    ) -> list[Labelled]:  # fmt: skip
        texts = [str(s.text) for s, _ in samples]
        evidence = evidence_of(model, {"text": vectors}, texts, index)
        return [
            Labelled(e, node, concept, benign)
            for e, (_, (node, concept, benign)) in zip(evidence, samples, strict=True)
        ]

    def _both(
        self, model: SafetyModel, items: Sequence[Labelled], vectors: np.ndarray,
        pixels: np.ndarray, index: PhraseIndex,
    ) -> list[Labelled]:  # fmt: skip
        """Pictures with text in them: a harmless picture, and what is written on it."""
        rng = np.random.default_rng(self.seed)
        rows = rng.choice(len(vectors), min(len(vectors), len(pixels)) // 2, replace=False)
        behind = rng.choice(len(pixels), len(rows))
        seen = pixels[behind]
        texts = [items[i].evidence.text for i in rows]
        both = evidence_of(model, {"image": seen, "ocr": vectors[rows]}, texts, index)
        images = [self._images[k] if self._images else None for k in behind]
        return [
            replace(items[i], evidence=e, image=b)
            for i, e, b in zip(rows, both, images, strict=True)
        ]

    def _pictures(self, model: SafetyModel) -> tuple[np.ndarray, list[str]]:
        """Tangent vectors [n, D] of pictures, and the names of their classes."""
        root = self._root()
        none: tuple[np.ndarray, list[str]] = (np.empty((0, model.encoder.dim), np.float32), [])
        if root is None or not self.pictures:
            return none
        held = set(read_held_out())
        counts: dict[str, int] = {}
        names: list[str] = []
        pictures: list[bytes] = []
        for part in sorted((root / "images" / "tiny_imagenet").glob("train-*.parquet")):
            for s in iter_samples(str(part), "tiny_imagenet"):
                name = s.extra["name"]
                if (
                    name in held
                    or not s.safe
                    or counts.get(name, 0) >= min(self.pictures, self.limit or MOST)
                ):
                    continue
                counts[name] = counts.get(name, 0) + 1
                names.append(f"{name}|{'|'.join(s.extra['hypernyms'][-2:])}")
                pictures.append(s.image or b"")
        if not pictures:
            return none
        if self.keep_images:
            self._images = pictures
        digest = hashlib.sha256(model.encoder.hash().encode())
        for picture in pictures:
            digest.update(hashlib.sha256(picture).digest())
        return _kept(self.cache, digest.hexdigest(), lambda: _seen(model, pictures)), names

    def _shown(self, model: SafetyModel, gone: frozenset[str]) -> set[str]:
        """Words of the hidden categories, which no list of the guard's holds."""
        nodes = [model.taxonomy[n] for n in sorted(gone)]
        return {p.casefold() for n in nodes for p in n.phrases}

    def _words(self, model: SafetyModel, gone: frozenset[str], phrases: Sequence[str]) -> list[str]:
        banks = node_phrases(model.taxonomy, gone).values()
        own = [p for bank in banks for p in bank if len(p.split()) < 7] + list(phrases)
        root = self._root()
        nouns = [] if root is None else wordnet_phrases(root / "wordnet" / "noun_edges.tsv")
        shown = self._shown(model, gone)
        words = [p for p in dict.fromkeys([*nouns, *own]) if p.casefold() not in shown]
        random.Random(self.seed).shuffle(words)
        return words[: self.limit * 10 if self.limit else None]

    def _root(self) -> Path | None:
        if self.data_dir is None and not os.environ.get("HYSAFE_DATA"):
            return None  # the contrast set and the bundled phrases are all there is
        return Path(data_root(self.data_dir))

    # ------------------------------------------------------------ batches

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Draws(self, train=True), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(_Draws(self, train=False), batch_size=None)


def _seen(model: SafetyModel, pictures: Sequence[bytes]) -> np.ndarray:
    """Tangent vectors [n, D] of encoded pictures."""
    size = model.encoder.image_size
    parts = []
    for start in range(0, len(pictures), 256):
        squares = [to_pixels(decode(p, size=size), size) for p in pictures[start : start + 256]]
        points = model._encode_pixels(torch.from_numpy(np.stack(squares)))
        parts.append(points.tangent().numpy())
    return np.concatenate(parts)


class _Draws(IterableDataset):
    def __init__(self, data: GuardData, *, train: bool) -> None:
        self.data, self.train = data, train

    def __iter__(self) -> Iterator[Draw]:
        data, world = self.data, self.data.world
        rng = random.Random(f"{data.seed}/{self.train}")
        items = world.train if self.train else world.validation
        groups = _groups(items)
        for _ in range(2**31 if self.train else 12):
            chosen = [rng.choice(rng.choice(groups)) for _ in range(data.judged)]
            seeds = [rng.randrange(2**31) for _ in chosen]
            episodes, kept, answers = [], [], []
            for item, seed in zip(chosen, seeds, strict=True):
                drawn = world.writer.draw(item, seed)
                kept.append(item)
                episodes.append(drawn)
                answers.append(world.writer.answer(item, drawn, seed))
            yield Draw(kept, episodes, answers, self._described(rng))

    def _described(self, rng: random.Random) -> list[tuple[Evidence, str]]:
        data, world = self.data, self.data.world
        held = min(HELD_OUT_PHRASES, len(world.words) // 10)
        count = len(world.words)
        made = []
        pictures = [i for i in world.train if i.picture] if self.train else []
        for k in range(data.described):
            if pictures and k % 4 == 0:
                item = rng.choice(pictures)
                made.append((item.evidence, rng.choice(str(item.picture).split("|"))))
                continue
            i = rng.randrange(count - held) if self.train else count - 1 - rng.randrange(held)
            vector = world.word_vectors[i]
            if self.train:
                noise = np.random.default_rng(rng.randrange(2**31)).standard_normal(len(vector))
                length = rng.random() * NOISE * np.linalg.norm(vector) / np.sqrt(len(vector))
                vector = (vector + length * noise).astype(np.float32)
            made.append((_phrase_evidence(vector), world.words[i]))
        return made


def _groups(items: Sequence[Labelled]) -> list[list[Labelled]]:
    """Items by kind: risky texts, harmless siblings, other harmless texts, pictures, both."""
    groups: dict[tuple[Any, ...], list[Labelled]] = {}
    for item in items:
        risky = item.node is not None
        key = (item.evidence.channels, risky, item.benign_of is not None)
        groups.setdefault(key, []).append(item)
        if risky:  # half of what is judged is risky, or nearly
            groups.setdefault((*key, "again"), []).append(item)
    return list(groups.values())


def _phrase_evidence(vector: np.ndarray) -> Evidence:
    none = np.array([np.nan])
    return Evidence(("text",), vector[None], none, none, np.empty(0), np.empty(0))
