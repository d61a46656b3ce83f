"""Does the geometry earn its keep? Heads and nodes of several geometries on the same frozen towers.

``python benchmarks/geometry.py --image-from runs/mini_image/model --text-from runs/mini_text/model
--cache runs/geometry/cache --out runs/geometry --presets`` encodes texts and pictures once, then
trains every row with the same features, seeds, steps, batches and learning rate, and writes
``table.md`` and ``table.json`` after every run; rows that are there are not run again. Nothing is
chosen by any figure: every run is judged after its last step, on the test split too.
Quick look: ``--dims 8 --seeds 0 --steps 50 --limit 300``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import logging
import math
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional import spearman_corrcoef

from hysafe.app.card import _text_figures, _Texts
from hysafe.app.tasks import TaxonomyTask, random_resized_crop_flip
from hysafe.app.training import _commit
from hysafe.data.contrast import core_set
from hysafe.data.datamodule import EmbedData, WorldTree
from hysafe.data.leaves import LeafSpace
from hysafe.data.sources import data_root
from hysafe.encoder import HyperbolicEncoder
from hysafe.encoder.towerless import TowerlessEncoder
from hysafe.errors import ConfigError
from hysafe.evaluate.metrics import detection
from hysafe.evaluate.novelty_data import read_held_out
from hysafe.geometry import Space, get_space
from hysafe.loss import TaxonomyWeights, item_cones, preset_loss, prototype_cross_entropy
from hysafe.score.leaves import LeafScores, NodeTable, score_margins
from hysafe.taxonomy import Policy, Taxonomy, load_taxonomy, metrics
from hysafe.types import Sample

log = logging.getLogger(__name__)

DIMS, SEEDS = (8, 32, 128, 256), (0, 1, 2)
PRESET_DIM = 128
STEPS, BATCH = 1200, 256
# Sibling pairs of a step: all 5,074 take longer than everything else at D = 256.
SIBLINGS = 1024
# Above any distance of an item to a node (34 by the bounds of head.py): affinities stay positive.
FAR = 40.0
ENCODE_BATCH = 256
MISSING = "–"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-from", required=True, help="export with the image tower")
    parser.add_argument("--text-from", required=True, help="export with the text tower")
    parser.add_argument("--cache", required=True, type=Path, help="folder of the features")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/geometry"), help="folder of the table"
    )
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--dims", type=_numbers, default=DIMS, help="e.g. 8,32")
    parser.add_argument("--seeds", type=_numbers, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH, help="texts, and pictures, of a step")
    parser.add_argument(
        "--presets", action="store_true", help=f"published losses, too, at D = {PRESET_DIM}"
    )
    parser.add_argument("--views", type=int, default=2, help="crops of each training picture")
    parser.add_argument("--crop", type=float, default=0.7, help="least share of the area of a crop")
    parser.add_argument("--limit", type=int, help="so many items of each source (quick looks)")
    a = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    command = shlex.join(["python", *sys.argv]) if arguments is None else shlex.join(arguments)
    features = cached_features(a)
    jobs = [(k, d, s) for s in a.seeds for d in a.dims for k in ROWS]
    if a.presets:
        jobs += [(k, PRESET_DIM, s) for s in a.seeds for k in (Cones.title, *PRESETS)]
    run_all(
        list(dict.fromkeys(jobs)), features, a.out, setting(a, features), command,
        steps=a.steps, batch=a.batch,
    )  # fmt: skip


def run_all(
    jobs: Sequence[tuple[str, int, int]],
    features: Features,
    out: Path,
    settings: Mapping[str, Any],
    command: str,
    *,
    steps: int,
    batch: int,
) -> dict[str, Any]:
    """Train and judge every (row, D, seed) that ``table.json`` does not have; write after each.

    Raises:
        ConfigError: the runs in `out` were made with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / "table.json"
    results: dict[str, Any] = {"setting": dict(settings), "runs": []}
    if file.is_file():
        results = json.loads(file.read_text("utf-8"))
        other = [k for k in settings if results["setting"].get(k) != settings[k]]
        if other:
            raise ConfigError(
                f"{file}: made with another {', '.join(other)}. Give another --out, or delete it."
            )
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    done = {(r["row"], r["dim"], r["seed"]) for r in results["runs"]}
    for title, dim, seed in (j for j in jobs if j not in done):
        start = time.process_time()
        kind = (ROWS | PRESETS)[title]
        task = train(kind, dim, seed, features, steps=steps, batch=batch)
        trained = time.process_time()
        values = figures(task, features)
        seconds = round(time.process_time() - start, 1)
        results["runs"].append(
            {"row": title, "dim": dim, "seed": seed, "figures": values, "seconds": seconds,
             "command": command, "commit": _commit(), "machine": machine}
        )  # fmt: skip
        _write(file, json.dumps(results, indent=1) + "\n")
        _write(out / "table.md", markdown(results))
        log.info(
            "%s, D %d, seed %d: top-1 %.3f, text AUROC %.3f (%.0f s of training, %.0f s in all)",
            title, dim, seed, values["picture top-1"],
            values.get("validation text AUROC", math.nan), trained - start, seconds,
        )  # fmt: skip
    return results


def setting(a: argparse.Namespace, features: Features) -> dict[str, Any]:
    """What every run of a table shares."""
    t = features.tensors
    return {
        "image model": f"{a.image_from} ({TowerlessEncoder(a.image_from).hash()})",
        "text model": f"{a.text_from} ({TowerlessEncoder(a.text_from).hash()})",
        "features": features.key,
        "training pictures and crops": f"{t['train_image'].shape[1]} x {len(t['train_image'])}",
        "training texts": len(t["train_text"]),
        "judged on": f"{len(t['validation_image'])} pictures, {len(features.validation)} validation "
        f"and {len(features.test)} test sentences",
        "taxonomy": load_taxonomy().hash,
        "steps": a.steps,
        "batch": f"{a.batch} texts, {a.batch} pictures",
        "learning rate": inspect.signature(TaxonomyTask).parameters["head_lr"].default,
    }


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


# ---------------------------------------------------------------- features


@dataclass(frozen=True)
class Features:
    """What the frozen towers say, and what is known of the items.

    Attributes:
        tensors: ``train_text`` [B, E], ``candidates``, ``concepts``, ``draw``, ``partner`` (row of
            the harmless side of a contrast pair, -1 for none), ``validation_text``, ``test_text``;
            ``train_image`` [views, B, E], ``classes``, ``image_candidates``, ``validation_image``,
            ``validation_classes``; ``node``, ``class``, ``hypernym`` (mean phrase features).
        world: picture classes. photo_classes: how many of them are photographs.
        validation, test: contrast sentences, in the order of their features.
        key: of the cache.
    """

    tensors: Mapping[str, Tensor]
    world: WorldTree
    photo_classes: int
    validation: Sequence[Sample]
    test: Sequence[Sample]
    key: str


def cached_features(a: argparse.Namespace) -> Features:
    """Read the features from the cache; encode what is not there."""
    source = _source(a)
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(a.cache) / key
    files = {name: folder / f"{name}.safetensors" for name in ("nodes", "texts", "pictures")}
    if not all(f.is_file() for f in (*files.values(), folder / "facts.json")):
        folder.mkdir(parents=True, exist_ok=True)
        encode(a, folder, files, source)
    facts = json.loads((folder / "facts.json").read_text("utf-8"))
    tensors = {k: v for f in files.values() for k, v in load_file(f).items()}
    world = WorldTree(facts["names"], [tuple(c) for c in facts["chains"]])
    validation, test = _core("validation", a.limit), _core("test", a.limit)
    return Features(tensors, world, facts["photo_classes"], validation, test, key)


def encode(
    a: argparse.Namespace, folder: Path, files: Mapping[str, Path], source: Mapping[str, Any]
) -> None:
    """Write the parts of the cache that are missing."""
    towers = _towers(a.image_from, a.text_from)
    data = EmbedData(a.data, image_size=towers.image_size, limit=a.limit)
    data.setup()
    if data.validation_pictures is None:
        raise ConfigError("the benchmark needs images/tiny_imagenet in the development data.")
    world = data.world
    facts = {
        "names": world.names, "chains": world.chains, "photo_classes": data.photo_classes,
        "source": source,
    }  # fmt: skip
    (folder / "facts.json").write_text(json.dumps(facts) + "\n")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        if not files["nodes"].is_file():
            _save(files["nodes"], _phrase_features(towers, data))
        if not files["texts"].is_file():
            _save(files["texts"], _text_tensors(towers, data, a.limit))
        if not files["pictures"].is_file():
            _save(files["pictures"], _picture_tensors(towers, data, a))


def _phrase_features(towers: HyperbolicEncoder, data: EmbedData) -> dict[str, Tensor]:
    task = build(Cones, 8, data)
    banks = {k: getattr(task, f"_{k}_phrases") for k in ("node", "class", "hypernym")}
    log.info("phrases of %s", ", ".join(f"{len(b)} of {k}" for k, b in banks.items()))
    return {k: towers.node_features(b).float() for k, b in banks.items()}


def _text_tensors(
    towers: HyperbolicEncoder, data: EmbedData, limit: int | None
) -> dict[str, Tensor]:
    train = data.train_texts
    safe = {s.pair: i for i, s in enumerate(train.samples) if s.pair and s.safe}
    partner = [-1 if s.safe or not s.pair else safe.get(s.pair, -1) for s in train.samples]
    tensors = {
        "candidates": train.candidates,
        "concepts": train.concepts,
        "draw": data.draw_weights,
        "partner": torch.tensor(partner),
    }
    parts = {
        "train_text": [str(s.text) for s in train.samples],
        "validation_text": [str(s.text) for s in _core("validation", limit)],
        "test_text": [str(s.text) for s in _core("test", limit)],
    }
    for name, texts in parts.items():
        log.info("%s: %d texts", name, len(texts))
        tensors[name] = towers.text_features(texts).to(torch.bfloat16)
    return tensors


def _picture_tensors(
    towers: HyperbolicEncoder, data: EmbedData, a: argparse.Namespace
) -> dict[str, Tensor]:
    train, held = data.train_pictures, data.validation_pictures
    assert held is not None
    torch.manual_seed(0)
    views = []
    for view in range(a.views):
        log.info("train_image, crop %d: %d pictures", view + 1, len(train))
        parts = []
        for start in range(0, len(train), ENCODE_BATCH):
            pixels = train[slice(start, start + ENCODE_BATCH)]["pixels"].float()
            cropped = random_resized_crop_flip(pixels, towers.image_size, scale=(a.crop, 1.0))
            parts.append(towers.towers.encode_image(cropped).to(torch.bfloat16))
        views.append(torch.cat(parts))
    log.info("validation_image: %d pictures", len(held))
    parts = [
        towers.towers.encode_image(held[slice(i, i + ENCODE_BATCH)]["pixels"]).to(torch.bfloat16)
        for i in range(0, len(held), ENCODE_BATCH)
    ]
    return {
        "train_image": torch.stack(views),
        "classes": train.classes,
        "image_candidates": train.candidates,
        "validation_image": torch.cat(parts),
        "validation_classes": held.classes,
    }


def _towers(image_from: str, text_from: str) -> HyperbolicEncoder:
    """The image tower of one export beside the text tower of another."""
    image, text = (
        json.loads((Path(f) / "config.json").read_text("utf-8"))["architecture"]
        for f in (image_from, text_from)
    )
    architecture = {**image, **{k: text.get(k, 0) for k in ("lora_rank", "text_layers")}}
    encoder = HyperbolicEncoder(architecture, dim=8)
    encoder.towers.take([image_from], "visual")
    if any(architecture[k] for k in ("lora_rank", "text_layers")):
        encoder.towers.take([text_from], "text")
    return encoder.eval()


def _source(a: argparse.Namespace) -> dict[str, Any]:
    """What the features depend on: models, data files, settings."""
    root = data_root(a.data)
    files = sorted(p for d in ("text", "images") for p in (root / d).rglob("*") if p.is_file())
    listed = [(p.relative_to(root).as_posix(), p.stat().st_size) for p in files]
    contrast = resources.files("hysafe.assets").joinpath("contrast/contrast.jsonl").read_bytes()
    return {
        "image model": TowerlessEncoder(a.image_from).hash(),
        "text model": TowerlessEncoder(a.text_from).hash(),
        "data files": _digest(listed),
        "contrast set": hashlib.sha256(contrast).hexdigest()[:16],
        "taxonomy": load_taxonomy().hash,
        "views": a.views, "crop": a.crop, "limit": a.limit,
    }  # fmt: skip


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _core(split: str, limit: int | None) -> list[Sample]:
    """Pairs and background of a split, as in the card and in training's quick validation."""
    return core_set(split)[:limit]


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_suffix(".partial")
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, partial)
    partial.replace(path)
    log.info("%s is there", path)


# ---------------------------------------------------------------- rows


class NoTowers(nn.Module):
    """Stands where the towers are; their features are cached."""

    def __init__(self, width: int, architecture: Any, *, load_pretrained: bool = True) -> None:
        super().__init__()
        self.embed_dim = width
        self.model, self.text_module = nn.Module(), nn.Identity()
        self.model.visual = nn.Identity()


class Cones(TaxonomyTask):
    """The taxonomy objective on cached features; the other rows say how they differ.

    Items are scored against nodes by cone margin, pictures against class texts by distance.
    """

    title: ClassVar[str] = "hyperbolic cones"
    geometry: ClassVar[str] = "lorentz"
    has_cones: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {}

    data: EmbedData

    def __init__(self, dim: int) -> None:
        super().__init__(
            classifier_weight=0.0, freeze_image=True, freeze_text=True, dim=dim,
            space=self.geometry, lora_rank=0, node_offsets=True, monitor_every=1 << 30,
            **self.options,
        )  # fmt: skip
        self.space = self.scoring()

    def scoring(self) -> Space:
        """Its ``pairwise_margin`` scores items against nodes, ``pairwise_dist`` against classes."""
        return get_space(self.geometry)

    def scale(self) -> Tensor:
        """Learned inverse temperature of the scores against nodes."""
        return self.encoder.cone_scale()

    def apexes(self) -> Tensor:
        """Points of the nodes [N, D]."""
        return self.encoder.place_nodes(
            self._node_features, self._leaves.depth, self._node_banks
        ).space

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._all_siblings = self._siblings

    def training_step(self, batch: Any, index: int) -> Tensor:
        drawn = torch.randperm(len(self._all_siblings))[: SIBLINGS if self.has_cones else 1]
        self._siblings = self._all_siblings[drawn]
        return super().training_step(batch, index)

    def _data(self) -> EmbedData:
        return self.data

    def _cache_features(self) -> None:
        assert isinstance(self.data, CachedData)
        take(self, self.data.features)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Quiet: a run takes a minute."""

    def on_train_epoch_end(self) -> None:
        """Nothing is looked at before the last step."""


NO_CONES = TaxonomyWeights(inside=0.0, outside=0.0, edge=0.0, sibling=0.0)


class Euclidean(Cones):
    """The same objective in flat space."""

    title = "Euclidean control"
    geometry = "euclidean"


class Distance(Cones):
    """Softmax over negative distances to nodes and class texts; no cone terms."""

    title = "hyperbolic distance only"
    has_cones = False
    options: ClassVar[Mapping[str, Any]] = {"weights": NO_CONES, "class_entail": 0.0}

    def scoring(self) -> Space:
        space = get_space(self.geometry)

        def affinity(nodes: Tensor, items: Tensor, c: Tensor) -> Tensor:
            return FAR - space.pairwise_dist(items, nodes, c)  # > 0: no hinge ever acts

        return dataclasses.replace(space, pairwise_margin=affinity)

    def _image_terms(self, image: Tensor, classes: Tensor, c: Tensor) -> dict[str, Tensor]:
        encoder = self.encoder
        prototypes = encoder.lift("text", self._class_features).space
        term = prototype_cross_entropy(
            image, prototypes, classes, c, encoder.logit_scale(),
            space=self.space, label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return {"class": term, "class_entail": term * 0}


class Sphere(Distance):
    """CLIP's head: softmax over cosine similarity with learned temperatures."""

    title = "spherical CLIP head"
    geometry = "euclidean"

    def scoring(self) -> Space:
        def cosine(a: Tensor, b: Tensor) -> Tensor:
            return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T

        return dataclasses.replace(
            get_space(self.geometry),
            name="sphere",
            pairwise_dist=lambda a, b, c: 1 - cosine(a, b),
            pairwise_margin=lambda nodes, items, c: 1 + cosine(items, nodes),
        )


class Negatives(Cones):
    """Entailment with negatives (Ganea et al. 2018): hinges alone place texts, nodes, hypernyms.

    Class texts are no cones, so the class of a picture is still learned by distance.
    """

    title = "cones with negatives"
    options: ClassVar[Mapping[str, Any]] = {
        "weights": TaxonomyWeights(leaf=0.0, inside=1.0, outside=1.0, edge=1.0, sibling=1.0),
        "class_entail": 1.0,
        "image_leaf_weight": 1.0,
        "concept_weight": 1.0,
    }

    def _image_terms(self, image: Tensor, classes: Tensor, c: Tensor) -> dict[str, Tensor]:
        terms = super()._image_terms(image, classes, c)
        hypernyms = self.encoder.node_head.place(
            self._hypernym_features, self._hypernym_depth, c, self.encoder.space
        )
        above = self._ancestors[classes]
        margins = self.space.pairwise_margin(hypernyms, image, c)
        terms["class_entail"] = (
            terms["class_entail"] + item_cones(margins, torch.zeros_like(above), ~above)[1]
        )
        return terms

    def _concept_term(self, items: Tensor, target: Tensor, nodes: Tensor, c: Tensor) -> Tensor:
        rows = (target >= 0).nonzero()[:, 0]
        margins = self.space.pairwise_margin(nodes[self._concepts], items[rows], c)
        own = self._concepts[None, :] == target[rows, None]
        parent = self._concept_parent[own.float().argmax(-1)] if len(rows) else rows
        beside = (self._concept_parent[None, :] == parent[:, None]) & ~own
        pull, push = item_cones(margins, own, beside)
        return pull + push


class Meru(Distance):
    """MERU: contrast, and text entails item, for class texts and pictures, leaf texts and texts.

    Every batch has one picture of each class and one text of each leaf, so that no negative is
    false. Texts that allow more than one leaf are left out: a pair has one partner.
    """

    title = "MERU-like"
    has_cones = True

    def scale(self) -> Tensor:
        return self.encoder.logit_scale()

    def apexes(self) -> Tensor:
        return self.encoder.lift("text", self._node_features).space

    def _cache_features(self) -> None:
        super()._cache_features()
        assert isinstance(self.data, CachedData)
        t = self.data.features.tensors
        self._pictures = Groups(t["classes"], torch.arange(len(t["classes"])))
        self._group_texts(t["candidates"], t["partner"])

    def _group_texts(self, candidates: Tensor, partner: Tensor) -> None:
        single = (candidates.sum(-1) == 1).nonzero()[:, 0]
        self._texts = Groups(candidates[single].float().argmax(-1), single)

    def training_step(self, batch: Any, index: int) -> Tensor:
        classes, rows = self._pictures.draw()
        view = torch.randint(self.image_views, rows.shape)
        image = self._lift("image", self._image_cache[view, rows])
        pictures = {"text": self._lift("text", self._class_features[classes]), "image": image}
        return self._preset("meru", pictures) + self._text_loss()

    def _text_loss(self) -> Tensor:
        leaves, rows = self._texts.draw()
        texts = {"text": self._leaf(leaves), "image": self._spoken(rows)}
        return self._preset("meru", texts)

    def _preset(self, name: str, points: Mapping[str, Tensor]) -> Tensor:
        encoder = self.encoder
        return preset_loss(
            name, points, encoder.curvature(), encoder.logit_scale(), space=self.space
        )["loss"]

    def _lift(self, modality: str, features: Tensor) -> Tensor:
        return self.encoder.lift(modality, features.float()).space

    def _leaf(self, leaves: Tensor) -> Tensor:
        return self._lift("text", self._node_features[self._leaves.leaf_nodes[leaves]])

    def _spoken(self, rows: Tensor) -> Tensor:
        features = self._text_cache[rows].float()
        return self._lift("text", F.dropout(features, self.text_dropout, self.training))


class Hysac(Meru):
    """HySAC on contrast pairs: benign node << benign sentence << category << risky sentence.

    Nodes are the captions and sentences what they describe. There are no risky pictures; pictures
    take MERU's terms, which are HySAC's safe half.
    """

    title = "HySAC-like"

    def _group_texts(self, candidates: Tensor, partner: Tensor) -> None:
        risky = (partner >= 0).nonzero()[:, 0]
        self._texts = Groups(candidates[risky].float().argmax(-1), risky)
        self._partner, self._leaf_of = partner, candidates.float().argmax(-1)

    def _text_loss(self) -> Tensor:
        categories, risky = self._texts.draw()
        harmless = self._partner[risky]
        points = {
            "text": self._leaf(self._leaf_of[harmless]),
            "image": self._spoken(harmless),
            "unsafe_text": self._leaf(categories),
            "unsafe_image": self._spoken(risky),
        }
        return self._preset("hysac", points)


ROWS = {k.title: k for k in (Cones, Distance, Euclidean, Sphere)}
PRESETS = {k.title: k for k in (Meru, Hysac, Negatives)}


class Groups:
    """Rows by label; a draw gives one row of each label.

    Args:
        labels, rows: [B].
    """

    def __init__(self, labels: Tensor, rows: Tensor) -> None:
        order = labels.argsort(stable=True)
        self.rows = rows[order]
        self.labels, self.counts = labels[order].unique_consecutive(return_counts=True)
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(self) -> tuple[Tensor, Tensor]:
        """Labels and rows, [G] each."""
        within = (torch.rand(len(self.counts)) * self.counts).long()
        return self.labels, self.rows[self.starts + within.clamp(max=self.counts - 1)]


def take(task: TaxonomyTask, features: Features) -> None:
    """Give a task its features."""
    t = features.tensors
    task._node_features, task._class_features = t["node"], t["class"]
    task._hypernym_features = t["hypernym"]
    task._text_cache, task._image_cache = t["train_text"], t["train_image"]
    task.image_views = len(t["train_image"])


def build(kind: type[Cones], dim: int, data: EmbedData, width: int = 384) -> Cones:
    """A task with fresh heads and nodes, and without towers."""
    with mock.patch("hysafe.encoder.model.Towers", lambda *x, **y: NoTowers(width, *x, **y)):
        task = kind(dim)
    task.data = data
    task.setup("fit")
    return task


class CachedData(EmbedData):
    """Batches as EmbedData draws them, of rows of the cache."""

    def __init__(self, features: Features, *, steps: int, batch: int, seed: int) -> None:
        super().__init__(image_batch=batch, text_batch=batch, seed=seed)
        self.features, self.steps = features, steps
        self.world, self.photo_classes = features.world, features.photo_classes

    def setup(self, stage: str | None = None) -> None:
        """Everything is there."""

    def train_dataloader(self) -> Any:
        return Batches(self.features.tensors, self.steps, self.image_batch, self.seed)


class Batches:
    """Pictures in epochs of a shuffle, texts drawn by weight."""

    def __init__(self, tensors: Mapping[str, Tensor], steps: int, batch: int, seed: int) -> None:
        self.tensors, self.steps, self.batch, self.seed = tensors, steps, batch, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        t, wanted = self.tensors, self.steps * self.batch
        generator = torch.Generator().manual_seed(self.seed)
        many = len(t["classes"])
        epochs = [torch.randperm(many, generator=generator) for _ in range(-(-wanted // many))]
        pictures = torch.cat(epochs)[:wanted].split(self.batch)
        drawn = torch.multinomial(t["draw"], wanted, replacement=True, generator=generator)
        for image, text in zip(pictures, drawn.split(self.batch), strict=True):
            yield {
                "image": {
                    "index": image,
                    "classes": t["classes"][image],
                    "candidates": t["image_candidates"][image],
                },
                "text": {
                    "index": text,
                    "candidates": t["candidates"][text],
                    "concepts": t["concepts"][text],
                },
            }


def train(
    kind: type[Cones], dim: int, seed: int, features: Features, *, steps: int, batch: int
) -> Cones:
    """One run."""
    L.seed_everything(seed, verbose=False)
    data = CachedData(features, steps=steps, batch=batch, seed=seed)
    task = build(kind, dim, data, features.tensors["class"].shape[1])
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    task.eval()
    return task


# ---------------------------------------------------------------- figures


@torch.no_grad()
def figures(task: Cones, features: Features) -> dict[str, float]:
    """Every figure of a trained task; those a geometry does not have are left out."""
    encoder, space, t = task.encoder, task.space, features.tensors
    c, nodes = encoder.curvature(), task.apexes()
    table = NodeTable(Policy().apply(task.data.taxonomy))
    scale = float(task.scale())

    def judge(items: Tensor) -> tuple[Tensor, LeafScores]:
        margins = space.pairwise_margin(nodes, items, c)
        # slope 0: the nodes' scores are those given risk, and cannot underflow
        return margins, score_margins(margins, table, scale=scale, slope=0.0)

    found: dict[str, float] = {}
    lifted = {}
    for split, samples in (("validation", features.validation), ("test", features.test)):
        items = encoder.lift("text", t[f"{split}_text"].float()).space
        margins, scores = judge(items)
        lifted[split] = items
        found |= {f"{split} {k}": v for k, v in text_figures(samples, scores, table).items()}
        found[f"{split} mAP"] = mean_average_precision(margins, samples, table)
    image = encoder.lift("image", t["validation_image"].float()).space
    found |= picture_figures(task, image, features)
    hidden, truth = _hidden(features.world), t["validation_classes"]
    novel = hidden[truth]
    energy = judge(image)[1].energy
    found["novelty (leaves)"] = _auroc(energy[~novel], energy[novel])
    leaves = task._leaves
    found["nearer to another domain"] = strays(space.pairwise_dist, nodes, leaves, c)
    if task.has_cones:
        parent, child = (nodes[i] for i in leaves.edges().T)
        outside = space.exterior_angle(parent, child, c) > space.half_aperture(parent, c)
        found["edges violated"] = float(outside.float().mean())
    if space.name != "sphere":
        samples = features.validation
        depth = torch.tensor([item_depth(s, task.data.taxonomy) for s in samples])
        radius = space.dist0(lifted["validation"], c)
        unsafe = torch.tensor([not s.safe for s in samples])
        found["AUROC by radius"] = _auroc(radius[~unsafe], radius[unsafe])
        known = depth > 0
        found["radius and depth"] = float(
            spearman_corrcoef(
                torch.cat((space.dist0(nodes, c), radius[known])),
                torch.cat((leaves.depth, depth[known])).float(),
            )
        )
    found["curvature"] = float(c) if encoder.space == "lorentz" else math.nan
    return {k: v for k, v in found.items() if not math.isnan(v)}


def text_figures(
    samples: Sequence[Sample], scores: LeafScores, table: NodeTable
) -> dict[str, float]:
    """As in the card: safe or unsafe, category and domain of the risky sentences."""
    texts = _Texts(list(samples))
    if not texts.unsafe.any() or texts.unsafe.all():
        return {}
    nodes = scores.nodes[texts.unsafe]
    leaves = table.leaves[table.risk]
    domain = torch.tensor([i for i, n in enumerate(table.ids) if n.startswith("D")])
    best, above = (
        [table.ids[i] for i in of[nodes[:, of].argmax(-1)].tolist()] for of in (leaves, domain)
    )
    parents = table.view.taxonomy.parents
    return _text_figures(texts, scores.evidence, best, above, parents)


def picture_figures(task: Cones, image: Tensor, features: Features) -> dict[str, float]:
    """Classes by distance to class texts, and the energy over the classes that are not hidden."""
    encoder, t, world = task.encoder, features.tensors, features.world
    prototypes = encoder.lift("text", t["class"]).space[: features.photo_classes]
    logits = -task.space.pairwise_dist(image, prototypes, encoder.curvature())
    logits = logits * encoder.logit_scale()
    truth, leaf = t["validation_classes"], world.leaf_ids()
    best = logits.argmax(-1)
    tree = metrics.hierarchical_scores(
        world.parents(), [leaf[i] for i in best.tolist()], [leaf[i] for i in truth.tolist()]
    )
    hidden = _hidden(world)
    energy = -logits[:, ~hidden[: features.photo_classes]].logsumexp(-1)
    novel = hidden[truth]
    return {
        "picture top-1": float((best == truth).float().mean()),
        "tree-induced error": tree.tree_induced_error,
        "hierarchical precision": tree.precision,
        "hierarchical recall": tree.recall,
        "novelty (classes)": _auroc(energy[~novel], energy[novel]),
    }


def mean_average_precision(margins: Tensor, samples: Sequence[Sample], table: NodeTable) -> float:
    """Categories as queries over the sentences of a split, ranked by score; mean over categories."""
    values = []
    for category in table.view.taxonomy.categories:
        wanted = torch.tensor([s.nodes[0] == category.id for s in samples])
        if wanted.any() and not wanted.all():
            score = margins[:, table.index[category.id]]
            values.append(detection(score[~wanted], score[wanted]).aupr)
    return statistics.fmean(values) if values else math.nan


def strays(distance: Callable[..., Tensor], nodes: Tensor, leaves: LeafSpace, c: Tensor) -> float:
    """Share of the nodes below the domains that are nearer to another domain than to their own."""
    roots = (leaves.depth == 1).nonzero()[:, 0]
    below = (leaves.depth > 1).nonzero()[:, 0]
    own = [leaves.node_index[leaves.taxonomy.path(leaves.nodes[i]).ids[0]] for i in below]
    nearest = roots[distance(nodes[below], nodes[roots], c).argmin(-1)]
    return float((nearest != torch.tensor(own)).float().mean())


def item_depth(sample: Sample, taxonomy: Taxonomy) -> int:
    """One more than the depth of its deepest known node; 0 where no node is known."""
    concept = None if sample.safe else sample.extra.get("concept")
    node = str(concept or sample.nodes[0])
    return taxonomy.depth(node) + 1 if node in taxonomy else 0


def _hidden(world: WorldTree) -> Tensor:
    held_out = set(read_held_out())
    return torch.tensor([n in held_out for n in world.names])


def _auroc(known: Tensor, novel: Tensor) -> float:
    return detection(known, novel).auroc if len(known) and len(novel) else math.nan


# ---------------------------------------------------------------- the table

#: figure -> heading, and whether more is better (1), worse (-1) or neither (0)
COLUMNS: Mapping[str, tuple[str, int]] = {
    "picture top-1": ("top-1 of 177", 1),
    "tree-induced error": ("tree error", -1),
    "hierarchical precision": ("h-prec.", 1),
    "hierarchical recall": ("h-recall", 1),
    "novelty (classes)": ("near novelty, classes", 1),
    "novelty (leaves)": ("near novelty, leaves", 1),
    "validation text AUROC": ("text AUROC", 1),
    "validation category top-1 of 45": ("category", 1),
    "validation domain top-1 of 12": ("domain", 1),
    "validation mAP": ("mAP", 1),
    "AUROC by radius": ("AUROC by radius", 0),
    "edges violated": ("edges violated", -1),
    "nearer to another domain": ("nearer to another domain", -1),
    "radius and depth": ("radius–depth", 0),
    "test text AUROC": ("test AUROC", 1),
    "test category top-1 of 45": ("test category", 1),
    "test domain top-1 of 12": ("test domain", 1),
}

NOTES = """\
All rows: the same frozen towers and cached features, batches, steps, seeds and learning rate; only
linear heads, node offsets, radii and temperatures are trained. Mean ± standard deviation over the
seeds; **bold**: best mean at this D (or among the presets). Every run is judged after its last step;
nothing was chosen by any of these figures.

- *hyperbolic cones*: the objective of `mini`. *Euclidean control*: the same in flat space.
  *hyperbolic distance only*: softmax over negative distances to nodes and class texts, no cone terms,
  nodes placed as for the cones. *spherical CLIP head*: softmax over cosines, learned temperatures.
- top-1, tree error (mean tree-induced error), h-prec., h-recall: Tiny-ImageNet's `val.parquet`, by
  distance to the text points of the classes, in the hypernym tree.
- near novelty: AUROC of the 17 classes of `hysafe/evaluate/held_out_classes.txt` against the other 160
  by the model's own energy: over the classes that remain (negative distances at the learned
  temperature), and over the leaves of the safety taxonomy. **Towers and heads have seen training
  pictures of the 17 classes**; only their class texts are hidden from the energy. So these are not
  figures for new classes.
- text AUROC, category (top-1 of 45) and domain (top-1 of 12) of the risky sentences: contrast validation
  split; test columns: contrast test split. mAP: categories as queries over the validation sentences,
  ranked by margin (distance, cosine).
- AUROC by radius: risky sentences further out than harmless ones (HySAC's claim).
- edges violated: share of the taxonomy's edges whose child apex lies outside the parent's cone. Models
  without cones have none; for them, and beside the others, *nearer to another domain*: share of the
  categories and concepts that are nearer to another domain than to their own.
- radius–depth: Spearman's correlation over nodes and validation sentences together, a sentence one
  deeper than its deepest known node. The nodes of a depth share one learned radius (not in the presets
  MERU-like and HySAC-like), so much of it is that sentences lie further out than nodes. A sphere has
  no radius.
"""

PRESET_NOTES = """\
- *taxonomy*: the row *hyperbolic cones*. *MERU-like*: one picture a class and one sentence a leaf each
  step, contrast and entailment (`meru`); sentences that allow several leaves cannot be paired and
  take no part. *HySAC-like*: the chain benign node, benign sentence, category, risky sentence on
  contrast pairs (`hysac`); pictures with MERU's terms, for there are no risky pictures. *cones with
  negatives*: hinges alone (Ganea et al. 2018) for texts, nodes and hypernyms; the class of a picture
  by softmax over distances, since class texts are no cones.
- HyCoCLIP is left out: its boxes are parts of pictures and captions, and cached features of whole
  pictures have no parts.
"""


def markdown(results: Mapping[str, Any]) -> str:
    """Markdown of all runs, rows by D."""
    runs = results["runs"]
    main = [(d, k) for d in sorted({r["dim"] for r in runs}) for k in ROWS]
    text = "# Geometry\n\n" + _rows(runs, main) + "\n\n" + NOTES
    if any(r["row"] in PRESETS for r in runs):
        dims = sorted({r["dim"] for r in runs if r["row"] in PRESETS})
        rows = [(d, k) for d in dims for k in (Cones.title, *PRESETS)]
        names = {Cones.title: "taxonomy"}
        text += "\n## Presets\n\n" + _rows(runs, rows, names)
        text += "\n\n" + PRESET_NOTES
    setting = "".join(f"| {k} | {v} |\n" for k, v in _setting_lines(results))
    return f"{text}\n## Setting\n\n| | |\n|---|---|\n{setting}"


def _rows(
    runs: Sequence[Mapping[str, Any]],
    rows: Sequence[tuple[int, str]],
    names: Mapping[str, str] | None = None,
) -> str:
    cells: dict[tuple[int, str], dict[str, list[float]]] = {}
    for run in runs:
        cell = cells.setdefault((run["dim"], run["row"]), {})
        for name, value in run["figures"].items():
            cell.setdefault(name, []).append(value)
    shown = [r for r in rows if r in cells]
    headings = [h for h, _ in COLUMNS.values()]
    lines = [
        "| D | model | seeds | " + " | ".join(headings) + " |",
        "|---|---|---|" + "---|" * len(headings),
    ]
    for dim, title in shown:
        rivals = [cells[r] for r in shown if r[0] == dim]
        line = []
        for name, (_, sign) in COLUMNS.items():
            values = cells[dim, title].get(name)
            if not values:
                line.append(MISSING)
                continue
            means = [statistics.fmean(r[name]) for r in rivals if name in r]
            mean = statistics.fmean(values)
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            best = sign and len(means) > 1 and mean * sign >= max(m * sign for m in means)
            line.append(f"**{mean:.3f}**{spread}" if best else f"{mean:.3f}{spread}")
        seeds = len(next(iter(cells[dim, title].values())))
        label = (names or {}).get(title, title)
        lines.append(f"| {dim} | {label} | {seeds} | " + " | ".join(line) + " |")
    return "\n".join(lines)


def _setting_lines(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    runs = results["runs"]
    lines = [(k, str(v)) for k, v in results["setting"].items()]
    lines += [
        ("seeds", ", ".join(map(str, sorted({r["seed"] for r in runs})))),
        ("commands", "; ".join(f"`{c}`" for c in dict.fromkeys(r["command"] for r in runs))),
        ("machine", ", ".join(dict.fromkeys(r["machine"] for r in runs))),
        ("commits", ", ".join(dict.fromkeys(r["commit"] for r in runs))),
        ("CPU seconds of a run", f"{statistics.fmean(r['seconds'] for r in runs):.0f} (mean)"),
    ]
    return lines


if __name__ == "__main__":
    main()
