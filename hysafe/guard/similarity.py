"""The frozen sentence encoder that names are compared with: all-MiniLM-L6-v2 as published."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hysafe.encoder.towers import minilm_path, quiet_transformers

__all__ = ["minilm_embed"]


@cache
def _minilm() -> tuple[Any, Any]:
    path = minilm_path()
    with quiet_transformers():
        model = AutoModel.from_pretrained(path, use_safetensors=True, local_files_only=True)
    return AutoTokenizer.from_pretrained(path, local_files_only=True), model.eval()


def minilm_embed(texts: Sequence[str]) -> Tensor:
    """Unit embeddings [N, 384] of short texts: the mean over tokens.

    Not the text tower of ``mini``, which was trained on; these are the published weights.
    """
    tokenizer, model = _minilm()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), 128):
            batch = tokenizer(
                list(texts[start : start + 128]), padding=True, truncation=True, max_length=64,
                return_tensors="pt",
            )  # fmt: skip
            hidden = model(**batch).last_hidden_state
            weight = batch["attention_mask"][..., None].to(hidden.dtype)
            parts.append((hidden * weight).sum(1) / weight.sum(1).clamp(min=1))
    stacked = torch.cat(parts) if parts else torch.empty(0, 384)
    return torch.nn.functional.normalize(stacked, dim=-1).clone()
