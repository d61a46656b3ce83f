"""The text tower on its own: softmax over the leaves of the taxonomy, before any geometry.

As with the image tower, both spaces start from what this stage leaves behind.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hysafe.app.tasks import EncoderTask, text_validation
from hysafe.data.datamodule import EmbedData
from hysafe.errors import ConfigError
from hysafe.loss import candidate_cross_entropy

__all__ = ["TextTowerTask"]

log = logging.getLogger(__name__)


class TextTowerTask(EncoderTask):
    """Trains the upper layers of MiniLM on the leaves of the taxonomy; nothing else moves.

    Args:
        label_smoothing: of the leaves.
        text_dropout: on text features, before the classifier.
        text_from: folders of earlier stages; this one starts from the mean of their text towers.
        others: as for :class:`EncoderTask`.
    """

    def __init__(
        self,
        label_smoothing: float = 0.05,
        text_dropout: float = 0.1,
        image_tower: str | None = "resnet10t",
        image_size: int = 64,
        dim: int = 128,
        head_lr: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.06,
        text_layers: int = 6,
        text_lr: float = 1e-4,
        context_length: int = 64,
        text_from: list[str] | None = None,
    ) -> None:
        super().__init__(
            image_tower, image_size=image_size, dim=dim, lora_rank=0, head_lr=head_lr,
            weight_decay=weight_decay, warmup=warmup, text_layers=text_layers, text_lr=text_lr,
            context_length=context_length,
        )  # fmt: skip
        self.label_smoothing, self.text_dropout = label_smoothing, text_dropout
        if text_from:
            self.encoder.towers.take(text_from, "text")
        self.encoder.requires_grad_(False)
        self.encoder.towers.lock_text()

    def setup(self, stage: str) -> None:
        leaves = self._data().leaves
        if not hasattr(self, "classifier"):
            self.classifier = nn.Linear(self.encoder.towers.embed_dim, len(leaves.leaves))

    def _data(self) -> EmbedData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, EmbedData):
            raise ConfigError("TextTowerTask trains on EmbedData.")
        if data.class_means:
            raise ConfigError(
                "TextTowerTask has no use for class_means. Leave them out, or train heads."
            )
        return data

    def classify(self, features: Tensor) -> Tensor:
        """Features [B, E] -> logits over the leaves [B, L]."""
        x = features.float()
        return self.classifier(F.layer_norm(x, x.shape[-1:])).float()  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Tensor:
        texts = batch["text"]
        features = self.text_features(texts["texts"])
        logits = self.classify(F.dropout(features, self.text_dropout, self.training))
        loss = candidate_cross_entropy(
            logits, texts["candidates"], smoothing=self.label_smoothing
        ).mean()
        if self.global_step % 20 == 0:
            self.log_terms({"loss": loss})
            self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 100 == 0:
            log.info("epoch %d step %d loss %.3f", self.current_epoch, batch_idx, outputs["loss"])

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        data = self._data()
        texts = [str(s.text) for s in data.validation_texts]
        with self.autocast():
            features = self.encoder.text_features(texts).clone()
        values = text_validation(self.classify(features), data)
        self.log_dict(values)
        self.print(
            f"epoch {self.current_epoch}: "
            + ", ".join(f"{k.split('/')[-1]} {v:.4f}" for k, v in values.items())
        )
