"""LightningModule shells: the taxonomy objective and the published presets."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from hysafe.data.datamodule import Described, EmbedData
from hysafe.encoder import HyperbolicEncoder, mini_architecture, open_clip_architecture
from hysafe.encoder.model import bank_hash
from hysafe.errors import ConfigError
from hysafe.evaluate.metrics import detection
from hysafe.geometry import BoundedScalar, Points, get_space
from hysafe.loss import (
    TaxonomyWeights,
    candidate_cross_entropy,
    distillation,
    item_cones,
    node_cones,
    preset_loss,
    prototype_cross_entropy,
    prototype_retrieval,
)
from hysafe.score.novelty import class_means
from hysafe.taxonomy import load_taxonomy

log = logging.getLogger(__name__)

__all__ = ["EncoderTask", "PresetTask", "TaxonomyTask", "class_phrases"]

# Texts of like length are encoded together in training, so many groups a batch.
LENGTH_GROUPS = 6


class EncoderTask(L.LightningModule):
    """What every training of the encoder shares: model, optimiser, schedule, monitors.

    Args:
        image_tower: timm tower trained from scratch beside MiniLM (``mini``), or
        open_clip: ``NAME`` or ``NAME/TAG`` of an open_clip model (tag or local weights file).
        image_size: of the timm tower.
        dim: D. space: lorentz or euclidean (the control).
        lora_rank: of the text tower (``mini``) or both towers (open_clip); 0 trains none.
        lr: of the image tower. head_lr: heads and scalars. lora_lr: adapters.
        weight_decay: AdamW, matrices only.
        warmup: share of the steps.
        text_layers: upper layers of MiniLM that are trained whole (``mini``, with lora_rank 0).
        text_lr: of these layers.
        node_offsets: a learned offset for every node of the bundled taxonomy.
        context_length: tokens of a text (``mini``); longer ones are read in windows of it.
    """

    def __init__(
        self,
        image_tower: str | None = "resnet10t",
        open_clip: str | None = None,
        image_size: int = 64,
        dim: int = 128,
        space: str = "lorentz",
        curvature: float = 1.0,
        lora_rank: int = 8,
        lr: float = 2e-3,
        head_lr: float = 2e-3,
        lora_lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        text_layers: int = 0,
        text_lr: float = 1e-4,
        node_offsets: bool = False,
        context_length: int = 64,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if (image_tower is None) == (open_clip is None):
            raise ConfigError("give exactly one of image_tower and open_clip.")
        if open_clip is not None:
            name, _, tag = open_clip.partition("/")
            architecture = open_clip_architecture(name, tag or None)
            architecture["lora_rank"] = lora_rank
        else:
            architecture = mini_architecture(
                str(image_tower), image_size=image_size, lora_rank=lora_rank,
                text_layers=text_layers, context_length=context_length,
            )  # fmt: skip
        known = [bank_hash(n.phrases) for n in load_taxonomy()] if node_offsets else []
        self.encoder = HyperbolicEncoder(
            architecture, dim=dim, space=space, curvature=curvature, known_nodes=known
        )
        self.space = get_space(space)
        self.lr, self.head_lr, self.lora_lr, self.text_lr = lr, head_lr, lora_lr, text_lr
        self.weight_decay, self.warmup = weight_decay, warmup

    def configure_optimizers(self) -> Any:
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            lr = self._rate(name)
            decay = self.weight_decay if p.ndim >= 2 else 0.0
            groups.setdefault((lr, decay), []).append(p)
        optimizer = torch.optim.AdamW(
            [{"params": v, "lr": k[0], "weight_decay": k[1]} for k, v in groups.items()],
            betas=(0.9, 0.98),
        )
        total = int(self.trainer.estimated_stepping_batches)

        def schedule(step: int) -> float:
            """Linear warm-up, then cosine to zero."""
            start = max(1, int(self.warmup * total))
            if step < start:
                return (step + 1) / start
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - start) / max(1, total - start))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _rate(self, name: str) -> float:
        if "lora_" in name:
            return self.lora_lr
        if name.startswith("encoder.towers.model.text."):
            return self.text_lr
        return self.lr if name.startswith("encoder.towers") else self.head_lr

    def autocast(self) -> Any:
        """Context in which towers encode outside of the steps: bfloat16 where the trainer has it."""
        half = str(self.trainer.precision).startswith("bf16")
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)

    def training_side(self, sizes: list[list[float]]) -> int:
        """Side of the training pictures now, from [[share of training from which on, side], ...]."""
        return int(max((s for s in sizes if s[0] <= self.progress), key=lambda s: s[0])[1])

    @property
    def progress(self) -> float:
        """Share of the training steps that are done."""
        return self.global_step / max(1, int(self.trainer.estimated_stepping_batches))

    def monitor_scalars(self) -> dict[str, float]:
        """Curvature, scales and whether a bound saturates."""
        values = {"monitor/curvature": float(self.encoder.curvature().detach())}
        for name, module in self.named_modules():
            if isinstance(module, BoundedScalar):
                short = name.removeprefix("encoder.").replace(".", "_")
                values[f"monitor/{short}"] = float(module().detach())
                values[f"saturated/{short}"] = float(module.saturated)
        return values

    def text_features(self, texts: list[str]) -> Tensor:
        """Features [B, E]; short and long texts apart, so that short ones are not padded."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        features = []
        size = -(-len(order) // LENGTH_GROUPS)
        for start in range(0, len(order), size):
            tokens = self.encoder.towers.tokenize([texts[i] for i in order[start : start + size]])
            features.append(self.encoder.towers.encode_text(tokens.to(self.device)).float())
        joined = torch.cat(features)
        back = torch.empty_like(joined)
        back[torch.tensor(order, device=joined.device)] = joined
        return back

    def log_terms(self, terms: dict[str, Tensor]) -> None:
        """Every loss term by name."""
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items()})


class TaxonomyTask(EncoderTask):
    """The taxonomy objective of ``mini``: cones for the safety taxonomy, and pictures of classes.

    Every text and picture is drawn into the cones of its candidate leaves; pictures are also
    matched to the text of their class, which lies in the cones of its hypernyms.

    Args:
        weights: of the taxonomy terms.
        image_weight: of picture-to-class-text cross entropy.
        retrieval_weight: of the other direction, class text to the pictures of the batch.
        classifier_weight: of an auxiliary softmax classifier on the picture features, dropped
            after training: early on, distances to text points give the tower a weak gradient.
        image_leaf_weight: of the taxonomy terms for pictures.
        class_entail: of "hypernym entails picture" and "hypernym entails class text". Class texts
            themselves entail nothing: that pulls them to the origin, where no distance tells them
            apart.
        concept_weight: of the concept within the category, where known.
        teacher_weight: of the divergence, for texts, of the softmax over leaf margins from a linear
            softmax over the same features, which learns beside it and is dropped (distillation,
            Hinton et al. 2015): a linear layer finds the leaves more easily than cones do.
        label_smoothing: of the picture classes. leaf_smoothing: of the leaves.
        text_dropout: on text features, before the head.
        text_noise: standard deviation of Gaussian noise on text features, in units of their own:
            a tower that has learnt these very texts leaves them too far apart for a head to learn
            from (docs/results.md).
        text_every: texts take part in every n-th step, with n times the weight.
        phrases: at most this many phrases a node (quick runs); all when None.
        init_from: folder of an earlier stage's export to start from.
        image_from: folder of an export whose image tower alone is taken (ImageTowerTask).
        text_from: folders of exports of which the text layers alone are taken, their mean
            (TextTowerTask).
        text_side_from: folder of a finished encoder of which all but the image tower and its head
            is taken and stands still: texts, nodes, thresholds and whatever was trained on them (a
            guard) stay what they are, and only the picture head is trained.
        freeze_image: keep the image tower as it is (a later stage: adapter and heads only).
        freeze_text: keep the text tower as it is.
        image_views: with both towers frozen, features are computed once: of the texts, and of so
            many crops of every picture; steps then cost almost nothing.
        train_sizes: [[share of training from which on, side], ...]: smaller pictures first.
        refresh_every: steps between re-encodings of all phrases (nodes, classes, hypernyms); in
            between the head moves and the tower's phrase features stand still.
        monitor_every: steps between the geometry monitors.
        augment: crops and flips. crop: least share of the area that a crop keeps.
        feature_cache: folder where features of towers that stand still are kept for other trainings
            on the same towers and data (the control, a sweep of losses).
    """

    _node_features: Tensor
    _class_features: Tensor
    _hypernym_features: Tensor

    def __init__(
        self,
        weights: TaxonomyWeights = TaxonomyWeights(),  # noqa: B008 - frozen
        image_weight: float = 1.0,
        retrieval_weight: float = 0.0,
        image_leaf_weight: float = 0.3,
        classifier_weight: float = 1.0,
        class_entail: float = 0.1,
        concept_weight: float = 0.2,
        teacher_weight: float = 0.0,
        label_smoothing: float = 0.1,
        leaf_smoothing: float = 0.05,
        text_dropout: float = 0.1,
        text_noise: float = 0.0,
        text_every: int = 1,
        phrases: int | None = None,
        init_from: str | None = None,
        image_from: str | None = None,
        text_from: str | list[str] | None = None,
        text_side_from: str | None = None,
        freeze_image: bool = False,
        freeze_text: bool = False,
        image_views: int = 2,
        feature_cache: str | None = None,
        train_sizes: list[list[float]] = [[0.0, 64]],  # noqa: B006 - read only
        refresh_every: int = 400,
        monitor_every: int = 200,
        augment: bool = True,
        crop: float = 0.45,
        image_tower: str | None = "resnet10t",
        open_clip: str | None = None,
        image_size: int = 64,
        dim: int = 128,
        space: str = "lorentz",
        curvature: float = 1.0,
        lora_rank: int = 8,
        lr: float = 2e-3,
        head_lr: float = 2e-3,
        lora_lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        text_layers: int = 0,
        text_lr: float = 1e-4,
        node_offsets: bool = False,
        context_length: int = 64,
    ) -> None:
        super().__init__(
            image_tower, open_clip, image_size, dim, space, curvature, lora_rank, lr, head_lr,
            lora_lr, weight_decay, warmup, text_layers, text_lr, node_offsets, context_length,
        )  # fmt: skip
        self.weights, self.image_weight = weights, image_weight
        self.retrieval_weight = retrieval_weight
        self.image_leaf_weight, self.class_entail = image_leaf_weight, class_entail
        self.concept_weight, self.label_smoothing = concept_weight, label_smoothing
        self.teacher_weight = teacher_weight
        self.leaf_smoothing = leaf_smoothing
        if init_from is not None:
            self.encoder = HyperbolicEncoder.load_directory(init_from)
            if (self.encoder.dim, self.encoder.space) != (dim, space):
                raise ConfigError(
                    f"{init_from} has dim {self.encoder.dim} in {self.encoder.space} space; the "
                    f"config wants {dim}, {space}."
                )
            self.encoder.towers.lock_text()
        if image_from is not None:
            self.encoder.towers.take([image_from], "visual")
        if text_from is not None:
            folders = [text_from] if isinstance(text_from, str) else text_from
            self.encoder.towers.take(folders, "text")
        self.text_stands = text_side_from is not None
        if self.text_stands and teacher_weight:
            raise ConfigError(
                "teacher_weight is for texts, and with text_side_from these stand still. Set it to 0."
            )
        if text_side_from is not None:
            self.encoder.take_text_side(text_side_from)
            self.encoder.requires_grad_(False)
            self.encoder.towers.model.visual.requires_grad_(True)
            self.encoder.heads["image"].requires_grad_(True)
        self.freeze_image, self.image_views = freeze_image, image_views
        self.feature_cache = feature_cache
        if freeze_image:
            self.encoder.towers.model.visual.requires_grad_(False)
        if freeze_text:
            self.encoder.towers.text_module.requires_grad_(False)
        self.cached = freeze_image and (freeze_text or self.text_stands)
        self.text_dropout, self.text_noise = text_dropout, text_noise
        self.text_every, self.phrases = text_every, phrases
        self.classifier_weight = classifier_weight
        self.train_sizes, self.augment, self.crop = train_sizes, augment, crop
        self.refresh_every, self.monitor_every = refresh_every, monitor_every

    # ------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        data = self._data()
        data.setup()
        described = data.described_classes
        if described is not None and not self.cached:
            raise ConfigError(
                "class_means are features of one image tower: set freeze_image and text_side_from (or freeze_text)."
            )
        if described is not None and described.tower != self.encoder.image_tower_hash():
            raise ConfigError(
                f"{data.class_means}: made with another image tower than this one. Make it with the same."
            )
        leaves = data.leaves
        self._leaves = leaves
        self._edges, self._siblings = leaves.edges(), leaves.siblings()
        self._node_banks = [n.phrases for n in data.taxonomy]
        self._node_phrases = [bank[: self.phrases] for bank in self._node_banks]
        world = data.world
        if not hasattr(self, "classifier"):
            self.classifier = torch.nn.Linear(self.encoder.towers.embed_dim, len(world.names))
        if self.teacher_weight and not hasattr(self, "teacher"):
            self.teacher = torch.nn.Linear(self.encoder.towers.embed_dim, len(leaves.leaves))
        named = zip(world.names, world.chains, strict=True)
        self._class_phrases = [class_phrases(n, c) for n, c in named]
        hypernyms: dict[str, int] = {}
        texts: list[tuple[str, ...]] = []
        depths: list[int] = []
        edges: list[tuple[int, int]] = []
        for i, chain in enumerate(world.chains):
            for level, node in enumerate(world.node_ids(i)[:-1]):
                if node not in hypernyms:
                    hypernyms[node] = len(texts)
                    texts.append((chain[level],))
                    depths.append(1 + min(2, 3 * level // max(1, len(chain))))
                edges.append((hypernyms[node], i))
        self._hypernym_phrases = texts
        self._hypernym_depth = torch.tensor(depths)
        self._ancestors = torch.zeros(len(world.names), len(texts), dtype=torch.bool)
        for hypernym, i in edges:
            self._ancestors[i, hypernym] = True
        concept_ids = [n.id for n in data.taxonomy.concepts]
        self._concepts = torch.tensor([leaves.node_index[c] for c in concept_ids])
        owner = [leaves.node_index[str(data.taxonomy[c].parent)] for c in concept_ids]
        self._concept_parent = torch.tensor(owner)

    def _data(self) -> EmbedData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, EmbedData):
            raise ConfigError("TaxonomyTask trains on EmbedData; presets take RoleData.")
        return data

    def refresh(self) -> None:
        """Re-encode every phrase with the tower as it is."""
        training = self.encoder.towers.training
        self.encoder.towers.eval()
        with torch.no_grad(), self.autocast():
            for name in ("node", "class", "hypernym"):
                phrases = getattr(self, f"_{name}_phrases")
                setattr(self, f"_{name}_features", self.encoder.node_features(phrases).clone())
        self.encoder.towers.train(training)

    def on_train_start(self) -> None:
        for name in ("_edges", "_siblings", "_hypernym_depth", "_ancestors", "_concepts",
                     "_concept_parent"):  # fmt: skip
            setattr(self, name, getattr(self, name).to(self.device))
        leaves = self._leaves
        leaves.depth, leaves.below = leaves.depth.to(self.device), leaves.below.to(self.device)
        leaves.leaf_nodes = leaves.leaf_nodes.to(self.device)
        if self.cached:
            self._cache_features()

    @torch.no_grad()
    def _cache_features(self) -> None:
        """Features of all texts, and of a few crops of every picture; towers do not move."""
        data, encoder = self._data(), self.encoder
        self.refresh()
        encoder.eval()
        texts = [str(s.text) for s in data.train_texts.samples]
        pictures = data.train_pictures

        def of_texts() -> Tensor:
            return encoder.text_features(texts).to(torch.bfloat16)

        def of_pictures() -> Tensor:
            views = []
            for view in range(self.image_views):
                parts = []
                for start in range(0, len(pictures), 256):
                    batch = pictures[slice(start, start + 256)]
                    pixels = self._augment(batch["pixels"].to(self.device))
                    parts.append(encoder.towers.encode_image(pixels).to(torch.bfloat16))
                views.append(torch.cat(parts))
                log.info("crop %d of %d pictures is encoded", view + 1, len(views[0]))
            return torch.stack(views)

        settings = f"{self.image_views} {self.augment} {self.crop} {self.train_sizes}"
        with self.autocast():
            if not self.text_stands:
                self._text_cache = self._kept("text", ["\0".join(texts)], of_texts)
                log.info("features of %d texts are there", len(texts))
            self._image_cache = self._kept("visual", [settings, pictures.pixels], of_pictures)
            log.info("features of %d pictures are there", len(pictures))
        if data.described_classes is not None:
            self._from_mean = self._residuals(pictures.classes.to(self.device))
        encoder.train()

    def _kept(self, part: str, content: Sequence[Any], make: Callable[[], Tensor]) -> Tensor:
        """Features from `feature_cache`, where the same tower has encoded the same content."""
        if self.feature_cache is None:
            return make().to(self.device)
        architecture = json.dumps(self.encoder.towers.architecture, sort_keys=True)
        digest = hashlib.sha256(architecture.encode())
        if not torch.is_autocast_enabled(self.device.type):
            digest.update(b"float32")
        for name, value in sorted(self.encoder.towers.own_state().items()):
            if f"model.{part}." in name:
                digest.update(name.encode())
                digest.update(value.detach().float().cpu().numpy().tobytes())
        for piece in content:
            digest.update(piece.encode() if isinstance(piece, str) else piece.tobytes())
        file = Path(self.feature_cache) / f"{part}-{digest.hexdigest()[:24]}.safetensors"
        if not file.is_file():
            features = make()
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".part")
            save_file({"features": features.contiguous()}, unfinished)
            unfinished.replace(file)
        return load_file(file)["features"].to(self.device)

    # ------------------------------------------------------------ one step

    def training_step(self, batch: Any, index: int) -> Tensor:
        moving = not self.cached and self.global_step % self.refresh_every == 0
        if moving or not hasattr(self, "_node_features"):
            self.refresh()
        # CombinedLoader yields the dict of both kinds
        pictures, texts = batch["image"], batch["text"]
        encoder, c = self.encoder, self.encoder.curvature()
        features = self._picture_features(pictures)
        image = encoder.lift("image", features).space
        spoken = not self.text_stands and self.global_step % self.text_every == 0
        if spoken:
            spoken_features = (
                self._text_cache[texts["index"]].float()
                if self.cached
                else self.text_features(texts["texts"])
            )
            noisy = spoken_features
            if self.text_noise:
                spread = noisy.std(-1, keepdim=True) * self.text_noise
                noisy = noisy + spread * torch.randn_like(noisy)
            noisy = F.dropout(noisy, self.text_dropout, self.training)
            text = encoder.lift("text", noisy).space
        nodes = encoder.place_nodes(self._node_features, self._leaves.depth, self._node_banks).space
        terms = self._image_terms(image, pictures["classes"], c)
        terms["classifier"] = F.cross_entropy(
            self.classifier(F.layer_norm(features, features.shape[-1:])),
            pictures["classes"],
            label_smoothing=self.label_smoothing,
        )
        items, candidates = image, pictures["candidates"]
        classes = self._data().described_classes
        if classes is not None:
            described, of = self._described(classes)
            items = torch.cat([image, encoder.lift("image", described).space])
            candidates = torch.cat([candidates, of])
        terms.update(self._item_terms("image", items, candidates, nodes, c))
        kinds = [("image", self.image_leaf_weight)]
        concept = image.sum() * 0
        if spoken:
            told = None
            if self.teacher_weight:
                learnt = self._teach(noisy)
                terms["teacher"] = candidate_cross_entropy(
                    learnt, texts["candidates"], smoothing=self.leaf_smoothing
                ).mean()
                told = self._teach(spoken_features)
            terms.update(self._item_terms("text", text, texts["candidates"], nodes, c, told))
            terms["concept"] = concept = self._concept_term(text, texts["concepts"], nodes, c)
            kinds.append(("text", float(self.text_every)))
        edge, sibling = node_cones(nodes, self._edges, self._siblings, c, space=self.space)
        terms["edge"], terms["sibling"] = edge, sibling
        w = self.weights
        loss = self.image_weight * terms["class"]
        if self.retrieval_weight:
            loss = loss + self.retrieval_weight * terms["class_retrieval"]
        loss = loss + self.classifier_weight * terms["classifier"]
        loss = loss + self.class_entail * terms["class_entail"]
        for kind, factor in kinds:
            loss = loss + factor * (
                w.leaf * terms[f"{kind}_leaf"]
                + w.inside * terms[f"{kind}_inside"]
                + w.outside * terms[f"{kind}_outside"]
            )
        loss = loss + w.edge * edge + w.sibling * sibling + self.concept_weight * concept
        if spoken and self.teacher_weight:
            taught = terms["teacher"] + self.teacher_weight * terms["text_divergence"]
            loss = loss + self.text_every * taught
        if self.global_step % 20 == 0:
            self.log_terms({"loss": loss, **terms})
            self.log("loss", loss.detach(), prog_bar=True, logger=False)
        if self.global_step % self.monitor_every == 0:
            self.log_dict({**self.monitor_scalars(), **self.monitor_tree(nodes, c)})
        return loss

    def _picture_features(self, pictures: dict[str, Tensor]) -> Tensor:
        if self.cached:
            index = pictures["index"]
            view = torch.randint(self.image_views, index.shape, device=index.device)
            return self._image_cache[view, index].float()
        pixels = self._augment(pictures["pixels"])
        if self.freeze_image:
            self.encoder.towers.model.visual.eval()
        with torch.set_grad_enabled(not self.freeze_image):
            return self.encoder.towers.encode_image(pixels).float()

    def _residuals(self, classes: Tensor) -> Tensor:
        """How each crop of each picture lies about the mean of its class [V * N, E]; classes [N]."""
        features = self._image_cache.flatten(0, 1).float()
        means, index = class_means(features, classes.repeat(len(self._image_cache)))
        return features - means[index]

    def _described(self, classes: Described) -> tuple[Tensor, Tensor]:
        """Features [n, E] of classes known by their mean alone, and candidate leaves [n, L].

        A picture of such a class is taken to lie about its mean as some other picture lies about the mean of
        its own class. These join the taxonomy terms only: names of so many classes, whose texts were not
        trained to stand apart, cost the names of those with pictures (docs/results.md).
        """
        count, device = self._data().described, self.device
        drawn = torch.multinomial(classes.weights, count, replacement=True)
        other = torch.randint(len(self._from_mean), (count,), device=device)
        means, candidates = classes.means[drawn].to(device), classes.candidates[drawn].to(device)
        return means + self._from_mean[other], candidates

    def _image_terms(self, image: Tensor, classes: Tensor, c: Tensor) -> dict[str, Tensor]:
        encoder = self.encoder
        prototypes = encoder.lift("text", self._class_features).space
        term = prototype_cross_entropy(
            image, prototypes, classes, c, encoder.logit_scale(),
            space=self.space, label_smoothing=self.label_smoothing,
        )  # fmt: skip
        hypernyms = encoder.node_head.place(
            self._hypernym_features, self._hypernym_depth, c, encoder.space
        )
        entail = term * 0
        for items, of in ((image, classes), (prototypes, torch.arange(len(prototypes)))):
            margins = self.space.pairwise_margin(hypernyms, items, c)
            entail = (
                entail + F.relu(-margins[self._ancestors[of.to(self._ancestors.device)]]).mean()
            )
        terms = {"class": term, "class_entail": entail}
        if self.retrieval_weight:
            terms["class_retrieval"] = prototype_retrieval(
                image, prototypes, classes, c, encoder.logit_scale(), space=self.space
            )
        return terms

    def _item_terms(
        self,
        kind: str,
        items: Tensor,
        candidates: Tensor,
        nodes: Tensor,
        c: Tensor,
        teacher: Tensor | None = None,
    ) -> dict[str, Tensor]:
        margins = self.space.pairwise_margin(nodes, items, c)  # [B, N]
        logits = margins[:, self._leaves.leaf_nodes] * self.encoder.cone_scale()
        inside, outside = self._leaves.cone_masks(candidates)
        pull, push = item_cones(margins, inside, outside)
        terms = {
            f"{kind}_leaf": candidate_cross_entropy(
                logits, candidates, smoothing=self.leaf_smoothing
            ).mean(),
            f"{kind}_inside": pull,
            f"{kind}_outside": push,
        }
        if teacher is not None:
            terms[f"{kind}_divergence"] = distillation(logits, teacher)
        return terms

    def _teach(self, features: Tensor) -> Tensor:
        """Logits of the teacher over the leaves [B, L]."""
        x = features.detach()
        return self.teacher(F.layer_norm(x, x.shape[-1:])).float()  # type: ignore[no-any-return]

    def _concept_term(self, items: Tensor, target: Tensor, nodes: Tensor, c: Tensor) -> Tensor:
        """Cross entropy over the concepts of the item's category, where the concept is known."""
        rows = (target >= 0).nonzero()[:, 0]
        if len(rows) == 0:
            return items.sum() * 0
        margins = self.space.pairwise_margin(nodes[self._concepts], items[rows], c)
        position = (self._concepts[None, :] == target[rows, None]).float().argmax(-1)
        same = self._concept_parent[None, :] == self._concept_parent[position][:, None]
        logits = (margins * self.encoder.cone_scale()).masked_fill(~same, -torch.inf)
        inside = F.relu(-margins.gather(1, position[:, None])).mean()
        return F.cross_entropy(logits, position) + inside

    def _augment(self, pixels: Tensor) -> Tensor:
        size = self.training_side(self.train_sizes)
        x = pixels.float()
        if not self.augment:
            return x if size == x.shape[-1] else F.interpolate(x, size=size, mode="area")
        return random_resized_crop_flip(x, size, scale=(self.crop, 1.0))

    # ------------------------------------------------------------ monitors

    @torch.no_grad()
    def monitor_tree(self, nodes: Tensor, c: Tensor) -> dict[str, float]:
        """Aperture and radius per depth, share of violated edges."""
        values: dict[str, float] = {}
        for depth in (1, 2, 3):
            of = nodes[self._leaves.depth == depth]
            values[f"radius/depth_{depth}"] = float(self.space.dist0(of, c).mean())
            values[f"aperture/depth_{depth}"] = float(self.space.half_aperture(of, c).mean())
        e = self._edges
        angle = self.space.exterior_angle(nodes[e[:, 0]], nodes[e[:, 1]], c)
        outside = angle > self.space.half_aperture(nodes[e[:, 0]], c)
        values["monitor/violated_edges"] = float(outside.float().mean())
        return values

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 100 == 0:
            log.info("epoch %d step %d loss %.3f", self.current_epoch, batch_idx, outputs["loss"])

    def on_train_epoch_end(self) -> None:
        """Quick validation figures; the card has the whole ones."""
        if self.cached and self.global_step < int(self.trainer.estimated_stepping_batches):
            return  # the towers take longer over the validation split than all steps of an epoch
        values = self.validate_quickly()
        self.log_dict(values)
        parts = [f"{k.split('/')[-1]} {v:.4f}" for k, v in values.items()]
        self.print(f"epoch {self.current_epoch}: " + ", ".join(parts))

    @torch.no_grad()
    def validate_quickly(self) -> dict[str, float]:
        """Top-1 of the pictures by distance; AUROC and category top-1 of the contrast split."""
        data, encoder, values = self._data(), self.encoder, {}
        encoder.eval()
        self.refresh()
        c = encoder.curvature()
        with self.autocast():
            if data.validation_pictures is not None:
                pictures, hits = data.validation_pictures, 0
                prototypes = encoder.lift("text", self._class_features).space[: data.photo_classes]
                for i in range(0, len(pictures), 256):
                    batch = pictures[slice(i, i + 256)]
                    points = encoder.encode_image(batch["pixels"].to(self.device))
                    d = self.space.pairwise_dist(points.space, prototypes, c)
                    hits += int((d.argmin(-1).cpu() == batch["classes"]).sum())
                values["validation/top1"] = hits / len(pictures)
            samples = data.validation_texts
            features = encoder.text_features([str(s.text) for s in samples]).clone()
        items = encoder.lift("text", features)
        nodes = encoder.place_nodes(self._node_features, self._leaves.depth, self._node_banks)
        logits = items.margin(nodes)[:, self._leaves.leaf_nodes] * self.encoder.cone_scale()
        values.update(text_validation(logits, data))
        encoder.train()
        return values


def text_validation(logits: Tensor, data: EmbedData) -> dict[str, float]:
    """AUROC and category top-1 of the validation texts from logits over the leaves [B, L]."""
    samples, leaves = data.validation_texts, data.leaves
    risky = leaves.risky.to(logits.device)
    evidence = logits[:, risky].logsumexp(-1) - logits[:, ~risky].logsumexp(-1)
    unsafe = torch.tensor([not s.safe for s in samples], device=logits.device)
    values: dict[str, float] = {}
    if unsafe.any() and not unsafe.all():
        values["validation/auroc"] = detection(evidence[~unsafe], evidence[unsafe]).auroc
    if unsafe.any():
        ids = [leaves.leaves[i] for i in risky.nonzero()[:, 0].tolist()]
        best = logits[unsafe][:, risky].argmax(-1).tolist()
        truth = [s.nodes[0] for s in samples if not s.safe]
        hits = sum(ids[b] == t for b, t in zip(best, truth, strict=True))
        values["validation/category_top1"] = hits / len(truth)
    return values


class PresetTask(EncoderTask):
    """A published recipe (``meru``, ``hycoclip``, ``hysac``) on role batches of RoleData.

    Args:
        preset: name in :data:`hysafe.loss.PRESETS`.
    """

    def __init__(
        self,
        preset: str = "meru",
        image_tower: str | None = None,
        open_clip: str | None = "ViT-B-16",
        image_size: int = 224,
        dim: int = 512,
        space: str = "lorentz",
        curvature: float = 1.0,
        lora_rank: int = 16,
        lr: float = 5e-4,
        head_lr: float = 5e-4,
        lora_lr: float = 8e-4,
        weight_decay: float = 0.2,
        warmup: float = 0.05,
    ) -> None:
        super().__init__(
            image_tower, open_clip, image_size, dim, space, curvature, lora_rank,
            lr, head_lr, lora_lr, weight_decay, warmup,
        )  # fmt: skip
        self.preset = preset

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        points: dict[str, Tensor] = {}
        for role, value in batch.items():
            points[role] = self._encode(value).space
        terms = preset_loss(
            self.preset, points, self.encoder.curvature(), self.encoder.logit_scale(),
            space=self.space,
        )  # fmt: skip
        self.log_terms(terms)
        if self.global_step % 50 == 0:
            radii = {
                f"radius/{k}": float(
                    self.space.dist0(v.detach(), self.encoder.curvature().detach()).mean()
                )
                for k, v in points.items()
            }
            self.log_dict({**self.monitor_scalars(), **radii})
        return terms["loss"]

    def _encode(self, value: Any) -> Points:
        if isinstance(value, Tensor):
            return self.encoder.encode_image(value)
        tokens = self.encoder.towers.tokenize(value).to(self.device)
        return self.encoder.encode_tokens(tokens)


def random_resized_crop_flip(
    pixels: Tensor, size: int, *, scale: tuple[float, float] = (0.45, 1.0)
) -> Tensor:
    """Random crop (area share in `scale`, aspect 3/4 to 4/3), resize, flip; each picture its own.

    pixels [B, 3, S, S] float -> [B, 3, size, size], one grid_sample for the batch.
    """
    n, device = len(pixels), pixels.device
    area = torch.empty(n, device=device).uniform_(*scale)
    aspect = torch.empty(n, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x = (torch.rand(n, device=device) * 2 - 1) * (1 - width)
    y = (torch.rand(n, device=device) * 2 - 1) * (1 - height)
    flip = torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(x)
    theta = torch.stack(
        (torch.stack((width * flip, zero, x), -1), torch.stack((zero, height, y), -1)), dim=1
    )
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def class_phrases(name: str, chain: tuple[str, ...]) -> tuple[str, ...]:
    """Phrases whose mean feature stands for a class of pictures."""
    general = chain[-1] if chain else "thing"
    return (name, f"a photo of a {name}", f"{name}, a kind of {general}")
