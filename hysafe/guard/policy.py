"""What training and decoding ask of a decoder, whatever it is built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Completions", "Decoder"]


class Completions(NamedTuple):
    """Answers to a batch of prompts.

    Args:
        tokens: ids [B, T], padded at the end.
        mask: bool [B, T], True on the tokens of the answer, its end token included.
        texts: what they spell, B strings without special tokens.
    """

    tokens: Tensor
    mask: Tensor
    texts: list[str]


class Decoder(Protocol):
    """A model that answers prompts and can be trained on answers.

    A batch of prompts is a mapping of tensors whose first axis is the prompt, as the decoder's own
    processor makes it.
    """

    def sample(
        self,
        prompts: Mapping[str, Any],
        n: int = 1,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Completions:
        """n answers to each of P prompts, [P * n, T], those to one prompt side by side.

        Args:
            temperature: 0 takes the likeliest token each time.
        """
        ...

    def complete(self, prompts: Mapping[str, Any], texts: Sequence[str]) -> Completions:
        """Answers given as texts, one to each prompt, as :meth:`sample` would have returned them."""
        ...

    def log_probs(
        self, prompts: Mapping[str, Any], completions: Completions
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each token of B answers to B prompts, with gradient.

        Returns:
            log-probabilities [B, T] (what stands outside the mask has no meaning), and the last
            hidden states [B, T, W] that predict these tokens.
        """
        ...

    def repeat(self, prompts: Mapping[str, Any], n: int) -> dict[str, Any]:
        """Every prompt n times, side by side."""
        ...
