"""The image tower on its own: softmax over classes and their hypernyms, before any geometry.

Both spaces start from the tower that this stage leaves behind, so a comparison of them compares
heads, nodes and losses and not two trainings of a convolutional network.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hysafe.app.tasks import EncoderTask, random_resized_crop_flip
from hysafe.data.datamodule import EmbedData
from hysafe.encoder import Towers
from hysafe.encoder.unfolded import unfold_convolutions
from hysafe.errors import ConfigError

__all__ = [
    "ImageTowerTask",
    "ancestor_cross_entropy",
    "colour_jitter",
    "paste_box",
    "recalibrate_norms",
]

log = logging.getLogger(__name__)

# Pictures that the batch-norm statistics of the export are estimated on.
NORM_PICTURES = 8192


class ImageTowerTask(EncoderTask):
    """Trains the image tower on picture classes; the text tower and the heads stand still.

    Args:
        hierarchy_weight: of the cross entropy over hypernyms (Bertinetto et al. 2020).
        label_smoothing: of the classes.
        ema: decay of the averaged weights that are exported.
        crop: least share of the area that a random crop keeps.
        jitter: strength of changes of brightness, contrast and saturation.
        cutmix: share of steps that paste a box of another picture (Yun et al. 2019).
        cutmix_until: share of training after which no boxes are pasted.
        train_sizes: [[share of training from which on, side], ...]: smaller pictures first.
        image_from: folder of an earlier stage whose image tower this one starts from.
        others: as for :class:`EncoderTask`.
    """

    def __init__(
        self,
        hierarchy_weight: float = 0.3,
        label_smoothing: float = 0.1,
        ema: float = 0.998,
        crop: float = 0.3,
        jitter: float = 0.3,
        cutmix: float = 0.0,
        cutmix_until: float = 1.0,
        train_sizes: list[list[float]] | None = None,
        image_from: str | None = None,
        image_tower: str | None = "resnet10t",
        image_size: int = 64,
        dim: int = 128,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(
            image_tower, image_size=image_size, dim=dim, lora_rank=0, lr=lr,
            weight_decay=weight_decay, warmup=warmup,
        )  # fmt: skip
        self.hierarchy_weight, self.label_smoothing = hierarchy_weight, label_smoothing
        self.ema, self.crop, self.jitter, self.cutmix = ema, crop, jitter, cutmix
        self.cutmix_until = cutmix_until
        self.train_sizes = train_sizes or [[0.0, image_size]]
        if image_from is not None:
            self.encoder.towers.take([image_from], "visual")
        self.encoder.requires_grad_(False)
        self.encoder.towers.model.visual.requires_grad_(True)
        unfold_convolutions(self.encoder.towers.model.visual)
        self._ancestors = torch.zeros(0)

    def setup(self, stage: str) -> None:
        data = self._data()
        data.setup()
        world = data.world
        nodes = sorted({n for i in range(len(world.names)) for n in world.node_ids(i)[:-1]})
        index = {n: i for i, n in enumerate(nodes)}
        self._ancestors = torch.zeros(len(world.names), len(nodes), dtype=torch.bool)
        for i in range(len(world.names)):
            for node in world.node_ids(i)[:-1]:
                self._ancestors[i, index[node]] = True
        if not hasattr(self, "classifier"):
            width = self.encoder.towers.embed_dim
            self.classifier = nn.Linear(width, len(world.names))
            parts = nn.ModuleList([self.encoder.towers.model.visual, self.classifier])
            self.average = AveragedModel(
                parts, multi_avg_fn=get_ema_multi_avg_fn(self.ema), use_buffers=True
            ).requires_grad_(False)

    def _data(self) -> EmbedData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, EmbedData):
            raise ConfigError("ImageTowerTask trains on EmbedData.")
        if data.class_means:
            raise ConfigError(
                "ImageTowerTask has no use for class_means. Leave them out, or train heads."
            )
        return data

    def training_step(self, batch: Any, index: int) -> Tensor:
        pictures = batch["image"]
        pixels = random_resized_crop_flip(
            pictures["pixels"].float(),
            self.training_side(self.train_sizes),
            scale=(self.crop, 1.0),
        )
        pixels = colour_jitter(pixels, self.jitter)
        labels = others = pictures["classes"]
        kept = 1.0
        if torch.rand(()) < self.cutmix and self.progress < self.cutmix_until:
            order = torch.randperm(len(pixels), device=pixels.device)
            pixels, kept = paste_box(pixels, pixels[order])
            others = labels[order]
        logits = _classify(self.classifier, self.encoder.towers.encode_image(pixels))
        ancestors = self._ancestors.to(logits.device)

        def terms_for(targets: Tensor) -> Tensor:
            return torch.stack(
                [
                    F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing),
                    ancestor_cross_entropy(logits, targets, ancestors),
                ]
            )

        both = terms_for(labels)
        if kept < 1:
            both = kept * both + (1 - kept) * terms_for(others)
        classes, above = both
        loss = classes + self.hierarchy_weight * above
        if self.global_step % 20 == 0:
            hits = (logits.argmax(-1) == labels).float().mean()
            terms = {"loss": loss, "class": classes, "hypernym": above, "top1": hits}
            self.log_terms(terms)
            self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        parts = nn.ModuleList([self.encoder.towers.model.visual, self.classifier])
        self.average.update_parameters(parts)
        if batch_idx % 100 == 0:
            log.info("epoch %d step %d loss %.3f", self.current_epoch, batch_idx, outputs["loss"])

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        pictures = self._data().validation_pictures
        if pictures is None:
            return
        visual, classifier = self._averaged()
        towers = self.encoder.towers
        top1 = top5 = 0
        for start in range(0, len(pictures), 256):
            batch = pictures[slice(start, start + 256)]
            x = (batch["pixels"].to(self.device).float() / 255 - towers.mean) / towers.std
            with self.autocast():
                features = visual(x.contiguous(memory_format=torch.channels_last))
            best = _classify(classifier, features).topk(5, dim=-1).indices.cpu()
            hit = best == batch["classes"][:, None]
            top1, top5 = top1 + int(hit[:, 0].sum()), top5 + int(hit.sum())
        values = {"validation/top1": top1 / len(pictures), "validation/top5": top5 / len(pictures)}
        self.log_dict(values)
        self.print(
            f"epoch {self.current_epoch}: "
            + ", ".join(f"{k.split('/')[-1]} {v:.4f}" for k, v in values.items())
        )

    def on_train_end(self) -> None:
        """The averaged weights are the ones that are exported, with statistics of whole pictures."""
        towers = self.encoder.towers
        towers.model.visual.load_state_dict(self._averaged()[0].state_dict())
        pictures = self._data().train_pictures
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
        batches = (
            pictures[chunk.tolist()]["pixels"].to(self.device)
            for chunk in order[:NORM_PICTURES].split(256)
        )
        with self.autocast():
            recalibrate_norms(towers, batches)

    def _averaged(self) -> tuple[nn.Module, nn.Module]:
        visual, classifier = self.average.module.children()
        return visual.eval(), classifier


@torch.no_grad()
def recalibrate_norms(towers: Towers, batches: Iterable[Tensor]) -> None:
    """Estimate the image tower's batch-norm statistics anew on whole pictures.

    Random crops show things larger than whole pictures do, and the running statistics are those of
    the crops: without this step a small tower loses two points of top-1 on whole pictures.

    Args:
        towers: its image tower is left in evaluation mode.
        batches: pixels [B, 3, S, S] in [0, 255], not augmented.

    Source: Touvron et al. 2019, "Fixing the train-test resolution discrepancy".
    """
    norms = [
        m for m in towers.model.visual.modules() if isinstance(m, nn.modules.batchnorm._NormBase)
    ]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain mean over the batches
    towers.model.visual.train()
    for pixels in batches:
        towers.encode_image(pixels)
    towers.model.visual.eval()
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


def _classify(classifier: nn.Module, features: Tensor) -> Tensor:
    x = features.float()
    return classifier(F.layer_norm(x, x.shape[-1:])).float()  # type: ignore[no-any-return]


def ancestor_cross_entropy(logits: Tensor, classes: Tensor, ancestors: Tensor) -> Tensor:
    """Mean over each item's hypernyms of -log of the probability of all classes below them.

    Args:
        logits: [B, C]. classes: [B]. ancestors: bool [C, H], class c lies below hypernym h.

    Returns:
        A scalar >= 0; 0 where no class has a hypernym.

    Source: the hierarchical cross entropy of Bertinetto et al. 2020 without its discount.
    """
    below = torch.softmax(logits.float(), -1) @ ancestors.float()  # [B, H]
    above = ancestors[classes]
    mean = above.float() / above.sum(-1, keepdim=True).clamp_min(1)
    return -(below.clamp_min(1e-8).log() * mean).sum(-1).mean()


def paste_box(pixels: Tensor, others: Tensor) -> tuple[Tensor, float]:
    """Paste one random box of `others` over `pixels`, both [B, 3, S, S].

    Returns:
        The pictures and the share of their area that was kept.

    Source: Yun et al. 2019, "CutMix", with one box for the batch.
    """
    height, width = pixels.shape[-2:]
    share = math.sqrt(float(torch.rand(())))
    box = (round(height * share), round(width * share))
    y, x = (int(torch.randint(0, s, ())) for s in (height, width))
    top, bottom = max(0, y - box[0] // 2), min(height, y + (box[0] + 1) // 2)
    left, right = max(0, x - box[1] // 2), min(width, x + (box[1] + 1) // 2)
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def colour_jitter(pixels: Tensor, strength: float) -> Tensor:
    """Random brightness, contrast and saturation, each picture its own; [B, 3, S, S] in [0, 255]."""
    if strength <= 0:
        return pixels
    n = len(pixels)

    def factor() -> Tensor:
        draw = torch.empty(n, 1, 1, 1, device=pixels.device)
        return draw.uniform_(1 - strength, 1 + strength)

    x = pixels * factor()
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * factor()
    grey = x.mean(1, keepdim=True)
    return (grey + (x - grey) * factor()).clamp(0, 255)
