"""Published vision-language models as the guard's decoder, under the same training command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from hysafe.app.guard_data import Draw
from hysafe.app.guard_task import GuardRL, GuardSFT
from hysafe.errors import ConfigError
from hysafe.guard.algorithms import sft_loss
from hysafe.guard.corpus import Labelled
from hysafe.guard.hub import HubDecoder, HubPrompt, Lora, PromptSettings
from hysafe.guard.model import PolicySpace
from hysafe.guard.protocol import Context, PromptPolicy
from hysafe.types import NoveltyScores

__all__ = ["HubRL", "HubSFT", "hub_prompt"]

# Listed categories that the prompt's context names, nearest first.
NEAR = 5


def hub_prompt(item: Labelled, policy: PromptPolicy, space: PolicySpace) -> HubPrompt:
    """An item as a published model reads it: its text and picture, and in words what the encoder
    found."""
    evidence = item.evidence
    rows = space.rows()
    listed = [e.node for e in policy.entries if e.node in rows]
    near = sorted(listed, key=lambda n: -float(evidence.margins[rows[n]]))[:NEAR]
    known = evidence.distribution[~(evidence.distribution != evidence.distribution)]
    context = Context(
        {n: float(evidence.margins[rows[n]]) for n in near},
        # the p-value for the policy was computed under another policy than the prompt's
        NoveltyScores(None, float(known.min()) if len(known) else None),
        evidence.text if "ocr" in evidence.channels else None,
    )
    text = evidence.text if "text" in evidence.channels else None
    images = () if item.image is None else (item.image,)
    if text is None and not images:
        raise ConfigError("an item without text has no picture. Read pictures with keep_images.")
    return HubPrompt(policy, text, images, context)


class _Hub:
    """What both stages share; the base stays as it is, the adapter is trained.

    Args:
        base: folder or hub id of the model; a hub id is downloaded.
        revision: commit of a hub id.
        adapter: folder of an adapter to go on from.
    """

    base: str

    def configure_model(self: Any) -> None:
        """Load the base and put the adapter on."""
        if self.decoder is not None:
            return
        self.decoder = HubDecoder.from_pretrained(
            self.base, adapter=self.init_from, lora=None if self.init_from else self.lora,
            revision=self.revision, dtype=self.weights, gradient_checkpointing=self.checkpointing,
            max_new_tokens=self.max_new_tokens, settings=self.prompt_settings,
        )  # fmt: skip

    def on_fit_start(self: Any) -> None:
        super().on_fit_start()  # type: ignore[misc]
        # transformers recompute activations in training mode only; these bases have no dropout
        self.model().train(self.checkpointing)

    def prompts(self: Any, draw: Draw) -> dict[str, Any]:
        """The prompts of what a batch wants judged, in words and pictures."""
        rows = [
            hub_prompt(item, drawn.policy, self.world.space)
            for item, drawn in zip(draw.items, draw.episodes, strict=True)
        ]
        return dict(self.model().prepare(rows))

    def kept(self: Any, draw: Draw) -> tuple[Tensor, Tensor]:
        """The loss of right answers; such a base has its words."""
        loss = sft_loss(self.model(), self.prompts(draw), draw.answers)
        return loss, loss.detach() * 0

    def start(self: Any) -> Any:
        """The policy that training began from: the base, with the adapter it went on from if any."""
        if self.init_from is None:
            return self.model().reference  # the adapter switched off: no second copy
        frozen = HubDecoder.from_pretrained(
            self.base, adapter=self.init_from, revision=self.revision, dtype=self.weights,
            max_new_tokens=self.max_new_tokens, settings=self.prompt_settings,
        )  # fmt: skip
        return frozen.requires_grad_(False)

    def export(self: Any, folder: Path) -> None:
        """Write the adapter and the prompt settings, not the base."""
        self.model().save(folder)


class HubSFT(_Hub, GuardSFT):
    """SFT of an adapter on right answers.

    Args:
        base, init_from: the model, and the adapter to go on from.
        revision, dtype, checkpointing, max_new_tokens: see :meth:`HubDecoder.from_pretrained`.
        lora, prompt_settings: of a new adapter, and of the prompt.
        lr, warmup: of the schedule.
    """

    def __init__(
        self,
        base: str,
        init_from: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        checkpointing: bool = True,
        max_new_tokens: int = 256,
        lora: Lora = Lora(),  # noqa: B008 - frozen
        prompt_settings: PromptSettings = PromptSettings(),  # noqa: B008 - frozen
        lr: float = 1e-4,
        warmup: int = 20,
        samples_every: int = 200,
    ) -> None:
        super().__init__(
            init_from, lr=lr, warmup=warmup, samples_every=samples_every, name_from_list=False
        )
        self.base, self.revision, self.weights, self.checkpointing = (
            base,
            revision,
            dtype,
            checkpointing,
        )
        self.max_new_tokens, self.lora, self.prompt_settings = max_new_tokens, lora, prompt_settings


class HubRL(_Hub, GuardRL):
    """Reinforcement learning of an adapter.

    Args:
        algorithm, reward, group, minibatch, beta, warm: see :class:`GuardRL`.
        others: see :class:`HubSFT`.
    """

    def __init__(
        self,
        base: str,
        init_from: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        checkpointing: bool = True,
        max_new_tokens: int = 256,
        lora: Lora = Lora(),  # noqa: B008 - frozen
        prompt_settings: PromptSettings = PromptSettings(),  # noqa: B008 - frozen
        algorithm: str = "grpo",
        reward: str = "ours",
        group: int = 8,
        minibatch: int = 2,
        beta: float = 0.04,
        warm: float = 0.0,
        lr: float = 2e-5,
        warmup: int = 5,
        samples_every: int = 25,
    ) -> None:
        super().__init__(
            "", algorithm, reward, group=group, minibatch=minibatch, beta=beta, warm=warm,  # type: ignore[arg-type]
            lr=lr, warmup=warmup, samples_every=samples_every,
        )  # fmt: skip
        self.init_from = init_from
        self.base, self.revision, self.weights, self.checkpointing = (
            base,
            revision,
            dtype,
            checkpointing,
        )
        self.max_new_tokens, self.lora, self.prompt_settings = max_new_tokens, lora, prompt_settings

    def configure_model(self) -> None:
        """The base, and a value head where the algorithm wants one."""
        super().configure_model()
        self._add_values()
