"""LightningDataModules: pictures and texts with candidate leaves, and role batches for presets."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hysafe.data.class_means import ClassMeans
from hysafe.data.contrast import contrast_set, core_set
from hysafe.data.everyday import everyday_texts
from hysafe.data.images import decode, to_pixels
from hysafe.data.joined import join_texts
from hysafe.data.label_map import permissive_sets, picture_nodes
from hysafe.data.leaves import LeafSpace
from hysafe.data.misspelt import misspelt_texts
from hysafe.data.posts import digest, read_posts, was_read
from hysafe.data.rendered import render_text_pictures
from hysafe.data.screens import screen_texts
from hysafe.data.sources import data_root, image_bytes, iter_samples, load_rows
from hysafe.errors import ConfigError
from hysafe.taxonomy import load_taxonomy
from hysafe.types import Sample

__all__ = ["Described", "EmbedData", "Pictures", "RoleData", "Texts", "WorldTree", "held_out"]

TEXT_PICTURE, ICON = "picture of text", "icon"
# Share of training pictures and of public text sets kept for calibration, never trained on.
HELD_OUT_SHARE = 0.05

# How often a batch draws from each source; the rest of the permissive sets share `other`.
TEXT_WEIGHTS = {
    "contrast": 0.52,
    "functional": 0.06,
    "background": 0.06,
    "phrases": 0.08,
    "edos": 0.05,
    "catqa": 0.04,
    "clinc150": 0.03,
    "harmfulqa": 0.03,
    "advbench": 0.03,
    "davidson": 0.03,
    "other": 0.07,
    "joined": 0.05,
    "everyday": 0.08,
    "screens": 0.08,
    "misspelt": 0.3,
    "posts": 0.35,
}


@dataclass
class WorldTree:
    """Classes of the training pictures with their hypernyms: the tree of everyday things.

    Attributes:
        names: class names [C]. chains: hypernym names of each class, root first.
    """

    names: list[str] = field(default_factory=list)
    chains: list[tuple[str, ...]] = field(default_factory=list)

    def node_ids(self, index: int) -> list[str]:
        """Ids of a class's hypernyms and itself, root first; an id is the path so far."""
        ids, path = [], ""
        for name in (*self.chains[index], f"={self.names[index]}"):
            path = f"{path}/{name}"
            ids.append(path)
        return ids

    def parents(self) -> dict[str, str | None]:
        """Tree for the metrics; classes are the leaves."""
        table: dict[str, str | None] = {}
        for i in range(len(self.names)):
            above: str | None = None
            for node in self.node_ids(i):
                table[node] = above
                above = node
        return table

    def leaf_ids(self) -> list[str]:
        return [self.node_ids(i)[-1] for i in range(len(self.names))]


class Pictures(Dataset):
    """Decoded pictures in memory; an index list gives a batch.

    Args:
        pixels: uint8 [M, 3, S, S]. classes: [M] indices into a WorldTree. candidates: bool [M, L].
    """

    def __init__(self, pixels: np.ndarray, classes: Tensor, candidates: Tensor) -> None:
        self.pixels, self.classes, self.candidates = pixels, classes, candidates

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return {
            "index": torch.arange(len(self))[index],
            "pixels": torch.from_numpy(self.pixels[index]),
            "classes": self.classes[index],
            "candidates": self.candidates[index],
        }


class Texts(Dataset):
    """Texts with candidate leaves; an index list gives a batch (tokens are made by the task)."""

    def __init__(self, samples: Sequence[Sample], leaves: LeafSpace) -> None:
        self.samples = list(samples)
        cache: dict[tuple[str, ...], Tensor] = {}
        for s in self.samples:
            if s.nodes not in cache:
                cache[s.nodes] = leaves.candidates(s.nodes)
        self.candidates = torch.stack([cache[s.nodes] for s in self.samples])
        self.concepts = torch.tensor(
            [leaves.node_index.get(str(s.extra.get("concept")), -1) if not s.safe else -1
             for s in self.samples]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Sequence[int]) -> dict[str, Any]:
        return {
            "index": torch.as_tensor(index),
            "texts": [str(self.samples[i].text) for i in index],
            "candidates": self.candidates[index],
            "concepts": self.concepts[index],
        }


@dataclass(frozen=True)
class Described:
    """Classes known by the mean of their pictures alone.

    Attributes:
        means: features [C, E]. candidates: bool [C, L]. weights: how often each is drawn [C].
        tower: hash of the image tower that the means are features of.
    """

    means: Tensor
    candidates: Tensor
    weights: Tensor
    tower: str


class EmbedData(L.LightningDataModule):
    """Pictures of everyday things and texts of risk and harmlessness, for the taxonomy objective.

    Args:
        data_dir: development data (``images/``, ``text/``); HYSAFE_DATA when None. With
            ``pictures=False`` and ``text_sets=[]`` nothing outside the package is needed.
        image_size: S.
        image_batch, text_batch: items of each kind a step.
        pictures: read Tiny-ImageNet and emoji.
        text_sets: names of text sets in ``text/``; None: all permissive ones.
        text_weights: how often each source is drawn.
        batch_weights: how much more often than others contrast sentences of a batch are drawn, by
            the letters before the number of their ids (``k`` of ``6.1-k003r``, ``bk`` of ``bk-017``).
        rendered: number of rendered pictures of text.
        joined: number of longer texts made of the others (:func:`~hysafe.data.joined.join_texts`).
        everyday: number of sentences that mention things
            (:func:`~hysafe.data.everyday.everyday_texts`).
        screens: number of texts among the rows of a screen or sign
            (:func:`~hysafe.data.screens.screen_texts`).
        misspelt: number of texts in another spelling (:func:`~hysafe.data.misspelt.misspelt_texts`).
        posts: read posts of public sets as readers judged them (:func:`~hysafe.data.posts.read_posts`)
            instead of as their own labels have them.
        risky_posts: how much more often a risky post is drawn than a harmless one; of those that
            were read one in six is risky.
        with_mates: a contrast sentence is always drawn with the other side of its pair.
        limit: at most this many pictures and texts of each source (quick runs).
        seed: of sampling and rendering.
        exclude_classes: names of picture classes that are left out everywhere, as if they were not
            in the data (``hysafe eval novelty`` asks for them as novel).
        class_means: file of a :class:`~hysafe.data.class_means.ClassMeans`: classes of which there are no pictures here, and
            where the pictures of each lie on average in the features of the image tower.
        described: so many features a step are drawn about these means, for the taxonomy terms.
        risky_described: how much more often those of a class are drawn that may be of risk.
        held_out_only: of the training pictures only those are read that are kept from training (to judge a model).
    """

    def __init__(
        self,
        data_dir: str | None = None,
        image_size: int = 64,
        image_batch: int = 128,
        text_batch: int = 48,
        pictures: bool = True,
        text_sets: list[str] | None = None,
        text_weights: dict[str, float] | None = None,
        rendered: int = 1500,
        limit: int | None = None,
        seed: int = 0,
        exclude_classes: list[str] | None = None,
        joined: int = 0,
        with_mates: bool = False,
        everyday: int = 0,
        batch_weights: dict[str, float] | None = None,
        screens: int = 0,
        posts: bool = False,
        risky_posts: float = 1.0,
        class_means: str | None = None,
        described: int = 256,
        risky_described: float = 1.0,
        held_out_only: bool = False,
        misspelt: int = 0,
    ) -> None:
        super().__init__()
        self.class_means, self.described = class_means, described
        self.risky_described, self.held_out_only = risky_described, held_out_only
        self.described_classes: Described | None = None
        if class_means and (described < 1 or not 0 < risky_described < float("inf")):
            raise ConfigError(
                f"described {described}, risky_described {risky_described}: at least 1, and a number greater "
                "than 0. Correct them."
            )
        self.batch_weights = batch_weights or {}
        self.data_dir, self.image_size = data_dir, image_size
        self.image_batch, self.text_batch = image_batch, text_batch
        self.joined, self.everyday, self.screens = joined, everyday, screens
        self.misspelt = misspelt
        self.with_mates, self.posts, self.risky_posts = with_mates, posts, risky_posts
        self.pictures, self.rendered, self.limit, self.seed = pictures, rendered, limit, seed
        self.text_sets = list(permissive_sets()) if text_sets is None else text_sets
        self.text_weights = text_weights or TEXT_WEIGHTS
        self.exclude_classes = frozenset(exclude_classes or ())
        self.taxonomy = load_taxonomy()
        self.leaves = LeafSpace(self.taxonomy)
        self.world = WorldTree()
        self._ready = False

    # ------------------------------------------------------------ reading

    def setup(self, stage: str | None = None) -> None:
        if self._ready:
            return
        self._read_texts()
        self._read_pictures()
        self._ready = True

    def _read_texts(self) -> None:
        train: dict[str, list[Sample]] = {"contrast": [], "background": [], "functional": []}
        for s in contrast_set("train"):
            kind = (
                "contrast" if s.pair else "functional" if s.extra["functionality"] else "background"
            )
            train[kind].append(s)
        if self.risky_posts <= 0:
            raise ConfigError(f"risky_posts {self.risky_posts}: it is greater than 0. Correct it.")
        batches = {_batch(s) for own in train.values() for s in own}
        unknown = sorted(set(self.batch_weights) - batches)
        if unknown or any(w <= 0 for w in self.batch_weights.values()):
            raise ConfigError(
                f"batch_weights {self.batch_weights}: the contrast set has the batches "
                f"{sorted(batches - {''})}; a weight is greater than 0. Correct it."
            )
        train["phrases"] = [
            Sample(f"phrase-{n.id}-{i}", "phrases", phrase, None, (n.id,), not n.risky, None,
                   {"concept": n.id} if n.kind == "concept" else {})
            for n in self.taxonomy
            if n.kind != "safe_domain"
            for i, phrase in enumerate(n.phrases)
        ]  # fmt: skip
        self.held_out_texts: list[Sample] = []
        posts = read_posts("train", self.data_dir) if self.posts else []
        read = was_read() if self.posts else frozenset()
        for name in self.text_sets:
            path = data_root(self.data_dir) / "text" / f"{name}.jsonl"
            own = iter_samples(str(path), "hysafe_text")
            train[name] = self._kept(name, [s for s in own if digest(str(s.text)) not in read])
        if self.posts:
            train["posts"] = self._kept("posts", posts)
        if self.limit:
            train = {k: v[: self.limit] for k, v in train.items()}
        whole = [s for v in train.values() for s in v]
        if self.joined:
            train["joined"] = join_texts(whole, self.joined, seed=self.seed)
        if self.misspelt:
            count = min(self.misspelt, self.limit or self.misspelt)
            train["misspelt"] = misspelt_texts(whole, count, seed=self.seed)
        if self.screens:
            count = min(self.screens, self.limit or self.screens)
            train["screens"] = screen_texts(whole, data_root(self.data_dir), count, seed=self.seed)
        if self.everyday:
            count = min(self.everyday, self.limit or self.everyday)
            train["everyday"] = everyday_texts(data_root(self.data_dir), count, seed=self.seed)
        self.train_texts = Texts([s for v in train.values() for s in v], self.leaves)
        listed = [k for k in train if k in self.text_weights]
        others = [k for k in train if k not in self.text_weights]
        share = {k: self.text_weights[k] for k in listed}
        share.update({k: self.text_weights.get("other", 0.0) / max(1, len(others)) for k in others})
        weights: list[float] = []
        for kind, samples in train.items():
            factors = [self._factor(s) for s in samples]
            weights += [share[kind] * factor / sum(factors) for factor in factors]
        self.draw_weights = torch.tensor(weights, dtype=torch.double)
        self.mates = _mates(self.train_texts.samples) if self.with_mates else None
        self.validation_texts = core_set("validation")[: self.limit]

    def _factor(self, sample: Sample) -> float:
        """How much more often than others of its source a text is drawn."""
        if sample.source == "posts":
            return 1.0 if sample.safe else self.risky_posts
        return self.batch_weights.get(_batch(sample), 1.0)

    def _kept(self, name: str, samples: list[Sample]) -> list[Sample]:
        """The samples to train on; the others join `held_out_texts`."""
        held = [_share(f"{name}/{s.text}") < HELD_OUT_SHARE for s in samples]
        self.held_out_texts += [s for s, out in zip(samples, held, strict=True) if out]
        return [s for s, out in zip(samples, held, strict=True) if not out][: self.limit]

    def _read_pictures(self) -> None:
        size, rng = self.image_size, random.Random(self.seed)
        pixels: list[np.ndarray] = []
        classes: list[int] = []
        nodes: list[tuple[str, ...]] = []
        held: list[bool] = []
        val_pixels: list[np.ndarray] = []
        val_classes: list[int] = []
        val_nodes: list[tuple[str, ...]] = []
        if self.pictures:
            root = data_root(self.data_dir) / "images"
            names: dict[int, tuple[str, tuple[str, ...]]] = {}
            left_out: set[str] = set()
            for split in ("train", "val"):
                location = str(root / "tiny_imagenet" / f"{split}*.parquet")
                for s in iter_samples(location, "tiny_imagenet"):
                    label = s.extra["label"]
                    if s.extra["name"] in self.exclude_classes:
                        left_out.add(s.extra["name"])
                        continue
                    names[label] = (s.extra["name"], s.extra["hypernyms"])
                    assert s.image is not None
                    if split == "train":
                        kept = held_out(s.image)
                        if self.held_out_only and not kept:
                            continue
                        held.append(kept)
                    picture = to_pixels(decode(s.image), size)
                    target = (pixels, classes, nodes) if split == "train" else (
                        val_pixels, val_classes, val_nodes)  # fmt: skip
                    target[0].append(picture)
                    target[1].append(label)
                    target[2].append(s.nodes)
                    if self.limit and len(target[0]) >= self.limit:
                        break
            unknown = sorted(self.exclude_classes - left_out)
            if unknown and not self.limit:  # a limit may end before a class comes up
                raise ConfigError(
                    f"exclude_classes {unknown}: no such picture classes. Correct them."
                )
            known = sorted(names)
            remap = {label: i for i, label in enumerate(known)}
            classes[:] = [remap[x] for x in classes]
            val_classes[:] = [remap[x] for x in val_classes]
            self.world = WorldTree([names[k][0] for k in known], [names[k][1] for k in known])
        self.photo_classes = len(self.world.names)
        extra = self._drawn_pictures(rng)
        for name, node, stack in extra:
            index = len(self.world.names)
            self.world.names.append(name)
            self.world.chains.append(("abstraction", "depiction"))
            for picture in stack:
                pixels.append(picture)
                classes.append(index)
                nodes.append((node,))
                held.append(rng.random() < HELD_OUT_SHARE)
        if self.class_means:
            self.described_classes = self._read_class_means(self.class_means)
        masks = {n: self.leaves.candidates(n) for n in {*nodes, *val_nodes}}
        candidates = torch.stack([masks[n] for n in nodes])
        # a quick run has no picture to spare
        spare = self.held_out_only or len(held) > 200
        keep = ~torch.tensor(held) if spare else torch.ones(len(held), dtype=torch.bool)
        stack, labels = np.stack(pixels), torch.tensor(classes)
        k = keep.numpy()
        self.train_pictures = Pictures(stack[k], labels[keep], candidates[keep])
        self.held_out_pictures = Pictures(stack[~k], labels[~keep], candidates[~keep])
        if val_pixels:
            self.validation_pictures: Pictures | None = Pictures(
                np.stack(val_pixels),
                torch.tensor(val_classes),
                torch.stack([masks[n] for n in val_nodes]),
            )
        else:
            self.validation_pictures = None

    def _read_class_means(self, file: str) -> Described:
        """The classes of a file but those that have pictures here or are left out."""
        known = ClassMeans.load(file)
        passed = {*self.world.names, *self.exclude_classes}
        kept = [i for i, (name, _) in enumerate(known.classes) if name not in passed]
        if not kept:
            raise ConfigError(
                f"{file}: every class in it has pictures here. Leave class_means out."
            )
        candidates = torch.stack(
            [
                self.leaves.candidates(picture_nodes("tiny_imagenet", *known.classes[i]))
                for i in kept
            ]
        )
        risky = (candidates & self.leaves.risky).any(-1)
        weights = torch.where(risky, self.risky_described, 1.0)
        return Described(known.means[kept], candidates, weights, known.tower)

    def _drawn_pictures(self, rng: random.Random) -> list[tuple[str, str, np.ndarray]]:
        """Rendered text, and emoji on plain backgrounds."""
        texts = [
            str(s.text)
            for s in self.train_texts.samples
            if s.source not in ("everyday", "screens", "posts", "misspelt")
        ]
        chosen = [rng.choice(texts) for _ in range(self.rendered)]
        made = [
            (TEXT_PICTURE, "S.b11", render_text_pictures(chosen, self.image_size, seed=self.seed))
        ]
        if self.pictures:
            path = data_root(self.data_dir) / "images" / "noto_emoji.parquet"
            stack = []
            for row in load_rows(str(path)).select(range(self.limit or 1257)):
                stack.append(_on_background(image_bytes(row["image"]), self.image_size, rng))
            made.append((ICON, "S.b12", np.stack(stack)))
        return made

    # ------------------------------------------------------------ loaders

    def train_dataloader(self) -> CombinedLoader:
        steps = max(1, len(self.train_pictures) // self.image_batch)
        pictures = DataLoader(
            self.train_pictures,
            sampler=_Batches(len(self.train_pictures), self.image_batch, self.seed, None, steps),
            batch_size=None,
        )
        texts = DataLoader(
            self.train_texts,
            sampler=_Batches(
                len(self.train_texts),
                self.text_batch,
                self.seed + 1,
                self.draw_weights,
                steps,
                self.mates,
            ),
            batch_size=None,
        )
        return CombinedLoader({"image": pictures, "text": texts}, "min_size")


class RoleData(L.LightningDataModule):
    """Rows with one column per role, for the published presets.

    Args:
        location: hub id, Parquet or JSONL; e.g. columns ``safe, nsfw, safe_image, nsfw_image``.
        columns: role -> column, e.g. ``{text: safe, image: safe_image, unsafe_text: nsfw, ...}``.
        image_size, batch, workers, split: as usual.
        limit: at most this many rows.
    """

    def __init__(
        self,
        location: str,
        columns: dict[str, str],
        image_size: int = 224,
        batch: int = 128,
        workers: int = 0,
        split: str = "train",
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.location, self.columns, self.image_size = location, columns, image_size
        self.batch, self.workers, self.split, self.limit = batch, workers, split, limit
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        rows = load_rows(self.location, split=self.split)
        missing = [c for c in self.columns.values() if c not in rows.column_names]
        if missing:
            raise ConfigError(
                f"{self.location}: no column {', '.join(missing)}; it has {rows.column_names}."
            )
        self.rows = rows.select(range(min(self.limit or len(rows), len(rows))))

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            self.rows,
            batch_size=self.batch,
            shuffle=True,
            drop_last=True,
            num_workers=self.workers,
            collate_fn=self._collate,
            generator=generator,
        )

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for role, column in self.columns.items():
            values = [r[column] for r in rows]
            if isinstance(values[0], str) and not Path(values[0]).is_file():
                batch[role] = values
                continue
            pictures = [to_pixels(decode(image_bytes(v) or b""), self.image_size) for v in values]
            batch[role] = torch.from_numpy(np.stack(pictures))
        return batch


def _batch(sample: Sample) -> str:
    """Letters of the batch of the contrast set that a text is of: ``k`` of ``6.1-k003r``; else none."""
    found = re.search(r"([a-z]*)-?\d+[rb]?$", sample.id) if sample.source == "contrast" else None
    return found[1] if found else ""


class _Batches(torch.utils.data.Sampler):
    """Index lists: a shuffle without weights, draws with replacement with them; new every epoch.

    Of several processes (DDP) each takes its share of every batch.
    With `mates` (index of each item's mate, its own where it has none) the second half of a batch
    holds the mates of the first half, and other draws where there is none.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        seed: int,
        weights: Tensor | None,
        steps: int,
        mates: Tensor | None = None,
    ) -> None:
        self.size, self.batch, self.weights, self.steps = size, min(batch, size), weights, steps
        self.mates = mates
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Any:
        if self.weights is None:
            order = torch.randperm(self.size, generator=self.generator)
        else:
            order = torch.multinomial(
                self.weights, self.steps * self.batch, replacement=True, generator=self.generator
            )
        for step in range(self.steps):
            batch = order[step * self.batch : (step + 1) * self.batch]
            if self.mates is not None:
                first, second = batch.chunk(2)
                mates = self.mates[first[: len(second)]]
                alone = mates == first[: len(second)]
                batch = torch.cat([first, torch.where(alone, second, mates)])
            yield _share_of_process(batch).tolist()


def _share_of_process(batch: Tensor) -> Tensor:
    """Every n-th item of a batch, where n processes train together; else all."""
    import torch.distributed as processes

    if not (processes.is_available() and processes.is_initialized()):
        return batch
    return batch[processes.get_rank() :: processes.get_world_size()]


def _mates(samples: Sequence[Sample]) -> Tensor:
    """Index [T] of the other side of each sample's pair; its own where there is none."""
    pairs: dict[str, list[int]] = {}
    for i, s in enumerate(samples):
        if s.pair:
            pairs.setdefault(s.pair, []).append(i)
    mates = torch.arange(len(samples))
    for members in pairs.values():
        if len(members) == 2:
            mates[members[0]], mates[members[1]] = members[1], members[0]
    return mates


def held_out(picture: bytes) -> bool:
    """Whether an encoded picture of a training file is kept from training."""
    return _share(hashlib.sha256(picture).hexdigest()) < HELD_OUT_SHARE


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def _on_background(data: bytes | None, size: int, rng: random.Random) -> np.ndarray:
    import io

    from PIL import Image

    icon = Image.open(io.BytesIO(data or b"")).convert("RGBA")
    back = Image.new("RGB", icon.size, tuple(rng.randint(0, 255) for _ in range(3)))
    if rng.random() < 0.4:
        back.paste((255, 255, 255), (0, 0, *icon.size))
    back.paste(icon, (0, 0), icon)
    return np.asarray(back.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
