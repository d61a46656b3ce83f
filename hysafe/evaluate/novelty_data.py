"""The settings of ``eval novelty``: which items are known, which are novel, and what was seen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from hysafe.data.contrast import contrast_set
from hysafe.data.datamodule import EmbedData, Pictures
from hysafe.data.rendered import render_text_pictures
from hysafe.data.sources import data_root, image_bytes, iter_samples, load_rows
from hysafe.errors import ConfigError, InputError
from hysafe.geometry import Points
from hysafe.score.calibration import Calibration
from hysafe.score.leaves import NodeTable
from hysafe.score.novelty import Encoded, class_folds
from hysafe.taxonomy import Policy, PolicyView
from hysafe.types import Sample

__all__ = [
    "Case",
    "Encodes",
    "Encoder",
    "Suite",
    "catqa_suite",
    "clinc_suite",
    "contrast_suite",
    "read_held_out",
    "picture_suite",
]

# Items of a class that scorers are fitted on: four times the items move few figures by 0.01.
FIT_ITEMS = 100
# Far pictures of each kind.
FAR = 600
# Every fold of stand-ins leaves out about this share of the classes, so that each is left out once: with less, the
# weights of the combination hang on which classes the folds took. Fewer where a suite has many cases.
FOLD_SHARE, FOLDS, FEW_FOLDS = 0.1, 10, 2
# CatQA has no splits: shares of train and validation, by a hash of the text; the rest is the test.
CATQA_SHARES = (0.5, 0.2)


class Encodes(Protocol):
    """What a suite needs of a model (:class:`hysafe.app.pipeline.SafetyModel` has it)."""

    name: str
    calibration: Calibration

    @property
    def encoder(self) -> Any:
        """A :class:`hysafe.encoder.HyperbolicEncoder`."""

    def view(self, policy: Policy | None = None) -> PolicyView: ...

    def place(self, view: PolicyView) -> tuple[NodeTable, Points]: ...


@dataclass(frozen=True)
class Case:
    """One question: which of `test` and `novel` belong to the classes of `train`?

    Args:
        name: of the case, e.g. the hidden category.
        train, validation, test: in-distribution items with their classes.
        novel: items of no known class, by kind.
        folds: classes to leave out as stand-ins for novelty; validation alone decides with them.
        columns: the margin columns that remain when classes are unknown; None: all do.
    """

    name: str
    train: Encoded
    train_labels: Tensor
    validation: Encoded
    validation_labels: Tensor
    test: Encoded
    test_labels: Tensor
    novel: Mapping[str, Encoded]
    folds: Sequence[Tensor]
    columns: Callable[[Tensor], Tensor] | None = None

    def without(self, classes: Tensor) -> tuple[Encoded, Encoded]:
        """Train and validation items as they look with these classes' nodes switched off."""
        if self.columns is None:
            return self.train, self.validation
        keep = self.columns(classes)
        return only_columns(self.train, keep), only_columns(self.validation, keep)


@dataclass(frozen=True)
class Suite:
    """Cases whose figures are averaged.

    Args:
        columns: column of the table -> kinds of novel items, whose figures are averaged too.
        notes: what a reader must know: what the tower has seen, sizes, protocol.
    """

    name: str
    cases: Sequence[Case]
    columns: Mapping[str, Sequence[str]]
    notes: Sequence[str] = field(default_factory=tuple)


class Encoder:
    """Encodes items with everything a scorer may look at.

    Margins are to the leaves of the default policy: all of them, or the risky ones only.
    Features are layer-normalised, as the model's own heads see them.
    """

    def __init__(self, model: Encodes, *, batch: int = 256) -> None:
        self.model, self.batch = model, batch
        self.table, self.apexes = model.place(model.view())

    @property
    def risk_ids(self) -> list[str]:
        """Ids of the risky leaves, in the order of their margin columns."""
        return [self.table.ids[i] for i in self.table.leaves[self.table.risk].tolist()]

    def texts(self, texts: Sequence[str], *, risk_only: bool = False) -> Encoded:
        return self._items("text", self.model.encoder.text_features(texts), risk_only)

    def pixels(self, pixels: np.ndarray) -> Encoded:
        """uint8 [B, 3, S, S]."""
        encoder = self.model.encoder
        parts = []
        with torch.inference_mode():
            for start in range(0, len(pixels), self.batch):
                chunk = torch.from_numpy(pixels[start : start + self.batch]).to(encoder.device)
                parts.append(encoder.towers.encode_image(chunk).float())
        return self._items("image", torch.cat(parts), False)

    def _items(self, modality: str, features: Tensor, risk_only: bool) -> Encoded:
        encoder = self.model.encoder
        with torch.inference_mode():
            lifted = encoder.lift(modality, features).space.cpu()
        points = Points(lifted.clone(), encoder.c, encoder.space)
        leaves = self.table.leaves[self.table.risk] if risk_only else self.table.leaves
        margins = points.margin(self.apexes)[:, leaves] * encoder.cone_scale_value
        features = features.detach().cpu().clone()
        return Encoded(points, margins, F.layer_norm(features, features.shape[-1:]))


def only_columns(items: Encoded, keep: Tensor) -> Encoded:
    """Items with a part of their margin columns."""
    assert items.margins is not None
    return Encoded(items.points, items.margins[:, keep], items.features)


# ---------------------------------------------------------------- pictures


def read_held_out(path: Path | None = None) -> list[str]:
    """Class names of a list: one a line, ``#`` starts a comment; the bundled list by default.

    Raises:
        InputError: no such file, or no name in it.
    """
    source = resources.files("hysafe.evaluate") / "held_out_classes.txt" if path is None else path
    try:
        lines = source.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Check the path.") from error
    names = [n for n in (line.partition("#")[0].strip() for line in lines) if n]
    if not names:
        raise InputError(f"{path}: no class names. Write one a line.")
    return names


def picture_suite(
    model: Encodes,
    *,
    data: str | None = None,
    held_out: Sequence[str],
    unseen: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> Suite:
    """Held-out classes (near) and drawings, noise and rendered text (far) against photo classes.

    Args:
        held_out: class names that are novel. unseen: the tower was trained without them.
        limit: at most so many pictures of each class and kind.

    Raises:
        ConfigError: a held-out class is not among the classes.
    """
    source = EmbedData(
        data_dir=data, image_size=model.encoder.image_size, text_sets=[], rendered=1, seed=seed
    )
    source.setup()
    names = source.world.names[: source.photo_classes]
    unknown = [n for n in held_out if n not in names]
    if unknown:
        raise ConfigError(f"held-out classes {unknown}: not among the {len(names)} classes.")
    if source.validation_pictures is None:
        raise ConfigError("eval novelty on pictures needs images/tiny_imagenet in the data folder.")
    hidden = torch.tensor([names.index(n) for n in held_out])
    encode = Encoder(model)

    def part(pictures: Pictures, novel: bool, most: int | None) -> tuple[Encoded, Tensor]:
        """Encoded pictures of the held-out or of the known photo classes."""
        chosen = torch.isin(pictures.classes, hidden) == novel
        rows = chosen & (pictures.classes < len(names))
        index = _at_most(rows.nonzero()[:, 0], pictures.classes, most)
        return encode.pixels(pictures.pixels[index.numpy()]), pictures.classes[index]

    train, train_labels = part(source.train_pictures, False, min(FIT_ITEMS, limit or FIT_ITEMS))
    validation, validation_labels = part(source.held_out_pictures, False, limit)
    test, test_labels = part(source.validation_pictures, False, limit)
    near, _ = part(source.validation_pictures, True, limit)
    far = {
        kind: encode.pixels(stack)
        for kind, stack in _far_pictures(source, model.encoder.image_size, limit, seed).items()
    }
    case = Case(
        "pictures", train, train_labels, validation, validation_labels, test, test_labels,
        {"held-out classes": near, **far}, _folds(train_labels, seed),
    )  # fmt: skip
    seen = (
        "The tower was trained without these classes."
        if unseen
        else "**The tower has seen training pictures of the held-out classes with their names** "
        "(the scorers have not): near figures are not those of new classes. Train with "
        "`exclude_classes` and pass `--held-out FILE --unseen` for these."
    )
    return Suite(
        "pictures",
        [case],
        {"near": ["held-out classes"], "far": list(far)},
        (
            f"near, far: Tiny-ImageNet, {len(names) - len(held_out)} known classes. Fitted on "
            f"{len(train)} training pictures, settings and weights chosen on {len(validation)} that "
            f"were never trained on, tested on {len(test)} of `val.parquet` against {len(near)} of "
            f"{len(held_out)} held-out classes ({', '.join(held_out)}). {seen}",
            "far: the mean over "
            + ", ".join(f"{k} ({len(v)})" for k, v in far.items())
            + ". The tower was trained with emoji and with text rendered as in `text, as trained` "
            "(as `icon` and `picture of text`), so noise and the other layouts say more.",
        ),
    )


def _at_most(index: Tensor, classes: Tensor, most: int | None) -> Tensor:
    """The first `most` rows of each class, in order."""
    if most is None:
        return index
    taken: dict[int, int] = {}
    kept = []
    for i, label in zip(index.tolist(), classes[index].tolist(), strict=True):
        if taken.get(label, 0) < most:
            taken[label] = taken.get(label, 0) + 1
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long)


def _folds(labels: Tensor, seed: int, count: int = FOLDS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return class_folds(labels, round(1 / FOLD_SHARE), generator=generator)[:count]


def _far_pictures(
    source: EmbedData, size: int, limit: int | None, seed: int
) -> dict[str, np.ndarray]:
    count = min(FAR, limit or FAR)
    rng = np.random.default_rng(seed)
    texts = [str(s.text) for s in contrast_set("test")][:count]
    rows = load_rows(str(data_root(source.data_dir) / "images" / "noto_emoji.parquet"))
    chosen = rng.choice(len(rows), min(count, len(rows)), replace=False)
    emoji = np.stack([_emoji(image_bytes(rows[int(i)]["image"]) or b"", size) for i in chosen])
    return {
        "emoji": emoji,
        "noise": _noise(count, size, rng),
        "text, as trained": render_text_pictures(texts, size, seed=seed + 1),
        "text, other layouts": np.stack([_other_layout(t, size, rng) for t in texts]),
    }


def _emoji(data: bytes, size: int) -> np.ndarray:
    """On white, filling the picture."""
    import io

    icon = Image.open(io.BytesIO(data)).convert("RGBA")
    back = Image.new("RGB", icon.size, "white")
    back.paste(icon, (0, 0), icon)
    return np.asarray(back.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def _noise(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A third each: uniform noise, Gaussian noise around a colour, smooth blobs of colour."""
    stack = []
    for i in range(count):
        if i % 3 == 0:
            x = rng.uniform(0, 255, (3, size, size))
        elif i % 3 == 1:
            x = rng.uniform(60, 195, (3, 1, 1)) + rng.normal(0, 40, (3, size, size))
        else:
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            smooth = coarse.resize((size, size), Image.Resampling.BICUBIC)
            x = np.asarray(smooth, dtype=float).transpose(2, 0, 1)
        stack.append(x.clip(0, 255).astype(np.uint8))
    return np.stack(stack)


# Large enough that shrinking it smooths the letters, as in a photograph of a page.
CANVAS = 256


def _other_layout(text: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Tilted lines, two columns, one huge word, or a table: none of which training renders."""
    style = ("tilted", "columns", "word", "table")[int(rng.integers(4))]
    light = rng.random() < 0.5
    back = tuple(int(v) for v in rng.integers(*((200, 256) if light else (0, 70)), 3))
    ink = tuple(int(v) for v in rng.integers(*((0, 90) if light else (180, 256)), 3))
    image = Image.new("RGB", (CANVAS, CANVAS), back)
    draw = ImageDraw.Draw(image)
    words = text.split() or ["-"]
    if style == "word":
        word = max(words, key=len)[:9]
        draw.text((8, 60), word, fill=ink, font=ImageFont.load_default(380 // max(4, len(word))))
    elif style == "table":
        for edge in range(0, CANVAS, 32):
            draw.line((0, edge, CANVAS, edge), fill=ink)
            draw.line((edge * 2, 0, edge * 2, CANVAS), fill=ink)
        font = ImageFont.load_default(14)
        for i in range(32):
            place = (i % 4 * 64 + 4, i // 4 * 32 + 8)
            draw.text(place, words[i % len(words)][:8], fill=ink, font=font)
    else:
        font = ImageFont.load_default(15)
        width = 3 if style == "columns" else 6
        lines = [" ".join(words[i : i + width]) for i in range(0, len(words), width)] * 3
        for i, line in enumerate(lines[:26]):
            column, row = (i // 13, i % 13) if style == "columns" else (0, i)
            draw.text((8 + column * 128, 8 + row * 19), line, fill=ink, font=font)
        if style == "tilted":
            image = image.rotate(float(rng.uniform(20, 70)), fillcolor=back)
    small = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(small).transpose(2, 0, 1)


# ---------------------------------------------------------------- texts


def clinc_suite(
    model: Encodes, *, data: str | None = None, limit: int | None = None, seed: int = 0
) -> Suite:
    """CLINC150's out-of-scope protocol: fitted on train intents, tested on the test split."""
    rows: dict[tuple[str, bool], list[Sample]] = {}
    path = data_root(data) / "text" / "clinc150.jsonl"
    for s in iter_samples(str(path), "hysafe_text"):
        outside = s.extra["labels"] == ["out-of-scope"]
        rows.setdefault((str(s.extra["split"]), outside), []).append(s)
    known = {k: _first(v, limit) for (k, outside), v in rows.items() if not outside}
    outside = rows[("test", True)][: None if limit is None else 10 * limit]
    names = sorted({_label(s) for s in known["train"]})
    encode = Encoder(model)
    parts: dict[str, tuple[Encoded, Tensor]] = {}
    for split in ("train", "val", "test"):
        inside = [s for s in known[split] if _label(s) in names]
        labels = torch.tensor([names.index(_label(s)) for s in inside])
        parts[split] = encode.texts([str(s.text) for s in inside]), labels
    domains = sorted({n.split("/")[0] for n in names})
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(domains), generator=generator).tolist()
    of_domain = [
        torch.tensor([i for i, n in enumerate(names) if n.split("/")[0] == domains[d]])
        for d in order[:FOLDS]
    ]
    case = Case(
        "clinc150", *parts["train"], *parts["val"], *parts["test"],
        {"out of scope": encode.texts([str(s.text) for s in outside])}, of_domain,
    )  # fmt: skip
    return Suite(
        "clinc150",
        [case],
        {"clinc150": ["out of scope"]},
        (
            f"clinc150: {len(names)} intents, fitted on {len(parts['train'][0])} train queries, "
            f"settings and weights chosen on {len(parts['val'][0])} validation queries with whole "
            f"domains as stand-ins (the out-of-scope rows of train and val are not used), tested on "
            f"{len(parts['test'][0])} test queries against {len(outside)} out-of-scope ones. `mini` "
            "trains its text tower on all these texts as harmless ones, without intents and without "
            "the out-of-scope mark.",
        ),
    )


def contrast_suite(
    model: Encodes, *, data: str | None = None, limit: int | None = None, seed: int = 0
) -> Suite:
    """Leave one category out, on the risky sentences of the contrast set."""
    encode = Encoder(model)
    ids = encode.risk_ids
    parts: dict[str, tuple[Encoded, Tensor]] = {}
    for split in ("train", "validation", "test"):
        risky = [
            s
            for s in contrast_set(split)
            if not s.safe and s.pair and not s.extra["form"] and s.nodes[0] in ids
        ]
        most = min(FIT_ITEMS, limit or FIT_ITEMS) if split == "train" else limit
        risky = _first(risky, most, key=lambda s: s.nodes[0])
        labels = torch.tensor([ids.index(s.nodes[0]) for s in risky])
        parts[split] = encode.texts([str(s.text) for s in risky], risk_only=True), labels
    cases = []
    for hidden, name in enumerate(ids):
        if not bool((parts["test"][1] == hidden).any()):
            continue

        def columns(classes: Tensor, hidden: int = hidden) -> Tensor:
            everything = torch.arange(len(ids))
            return everything[(everything != hidden) & ~torch.isin(everything, classes)]

        cases.append(_leave_out(name, hidden, parts, columns, seed, folds=FEW_FOLDS))
    sizes = ", ".join(f"{len(parts[s][0])} {s}" for s in parts)
    return Suite(
        "contrast",
        cases,
        {"contrast": ["hidden category"]},
        (
            f"contrast: mean over {len(cases)} hidden categories of the contrast set, its test "
            f"sentences against those of the other categories (risky sentences, {sizes}). Scorers "
            "are fitted without the category and its node is off; the tower was trained with both.",
        ),
    )


def catqa_suite(
    model: Encodes, *, data: str | None = None, limit: int | None = None, seed: int = 0
) -> Suite:
    """Leave one category out, on CatQA's main categories."""
    encode = Encoder(model)
    ids = encode.risk_ids
    path = data_root(data) / "text" / "catqa.jsonl"
    samples = list(iter_samples(str(path), "hysafe_text"))
    samples = _first(samples, limit)
    names = sorted({s.extra["labels"][0] for s in samples})
    nodes = {
        i: {ids.index(n) for s in samples if s.extra["labels"][0] == name for n in s.nodes
            if n in ids}
        for i, name in enumerate(names)
    }  # fmt: skip
    everyone = encode.texts([str(s.text) for s in samples], risk_only=True)
    labels = torch.tensor([names.index(s.extra["labels"][0]) for s in samples])
    share = torch.tensor([_share(str(s.text)) for s in samples])
    first, second = CATQA_SHARES
    bounds = {"train": (0.0, first), "validation": (first, first + second),
              "test": (first + second, 1.0)}  # fmt: skip
    parts = {}
    for split, (low, high) in bounds.items():
        index = ((share >= low) & (share < high)).nonzero()[:, 0]
        parts[split] = everyone[index], labels[index]
    cases = []
    for hidden, name in enumerate(names):

        def columns(classes: Tensor, hidden: int = hidden) -> Tensor:
            off = nodes[hidden].union(*(nodes[int(i)] for i in classes))
            return torch.tensor([i for i in range(len(ids)) if i not in off])

        cases.append(
            _leave_out(name, hidden, parts, columns, seed, novel=everyone[labels == hidden])
        )
    sizes = ", ".join(f"{len(parts[s][0])} {s}" for s in parts)
    return Suite(
        "catqa",
        cases,
        {"catqa": ["hidden category"]},
        (
            f"catqa: mean over {len(cases)} hidden main categories of CatQA, all of the category "
            f"against the test part of the others ({sizes}, split by a hash of the text). The nodes "
            "its labels map to are off; the tower was trained with these texts.",
        ),
    )


def _leave_out(
    name: str,
    hidden: int,
    parts: Mapping[str, tuple[Encoded, Tensor]],
    columns: Callable[[Tensor], Tensor],
    seed: int,
    novel: Encoded | None = None,
    folds: int = FOLDS,
) -> Case:
    """The case in which class `hidden` is unknown; its nodes' columns are left out everywhere."""
    nobody = torch.empty(0, dtype=torch.long)
    keep = columns(nobody)
    known = {}
    for split, (items, labels) in parts.items():
        rows = labels != hidden
        known[split] = only_columns(items[rows], keep), labels[rows]
    if novel is None:
        items, labels = parts["test"]
        novel = items[labels == hidden]

    def remaining(classes: Tensor) -> Tensor:
        """Positions, among the case's own columns, of those left with `classes` unknown."""
        return torch.isin(keep, columns(classes)).nonzero()[:, 0]

    return Case(
        name, *known["train"], *known["validation"], *known["test"],
        {"hidden category": only_columns(novel, keep)},
        _folds(known["train"][1], seed, folds), remaining,
    )  # fmt: skip


def _label(sample: Sample) -> str:
    return "/".join(sample.extra["labels"])


def _first(
    samples: Sequence[Sample], limit: int | None, key: Callable[[Sample], str] = _label
) -> list[Sample]:
    """The first `limit` samples of each label; all when None."""
    if limit is None:
        return list(samples)
    taken: dict[str, int] = {}
    kept = []
    for s in samples:
        taken[key(s)] = taken.get(key(s), 0) + 1
        if taken[key(s)] <= limit:
            kept.append(s)
    return kept


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
