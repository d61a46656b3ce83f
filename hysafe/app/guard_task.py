"""The guard's training as Lightning modules, and the command behind ``train_guard.py``."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from hysafe.app.guard_data import Draw, GuardData, GuardWorld
from hysafe.app.training import RunConfig, StagesCLI, trainer_defaults
from hysafe.errors import ConfigError
from hysafe.guard.algorithms import (
    DPO,
    GRPO,
    PPO,
    RESPONSE_PPO,
    RLOO,
    Algorithm,
    ValueHead,
    collect,
    minibatches,
    response_reward,
)
from hysafe.guard.model import PHRASES, WHY, GuardModel, GuardProcessor, train_tokenizer
from hysafe.guard.protocol import split_bank
from hysafe.guard.rewards import (
    Reward,
    Similarity,
    Thresholds,
    calibrate_similarity,
    cone_margins,
    cosine_similarity,
    guard_rewards,
    proguard_reward,
)
from hysafe.guard.similarity import minilm_embed
from hysafe.guard.split import hidden_nodes

__all__ = ["GuardRL", "GuardSFT", "GuardTask", "guard_main", "name_similarity"]

log = logging.getLogger(__name__)

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "grpo": GRPO, "rloo": RLOO, "ppo": PPO, "dpo": DPO, "response_ppo": lambda beta: replace(RESPONSE_PPO, beta=beta),
}  # fmt: skip
# Weight of a rationale's tokens in SFT: many, and easy.
RATIONALE_WEIGHT = 0.2
SAMPLES = 6
# Log-probabilities below it are those of what the shape of an answer forbids.
NEVER_SAID = -1e6


class GuardTask(L.LightningModule):
    """A decoder, an optimizer, and what both stages of training share.

    Args:
        init_from: folder of a guard to start from; without it the decoder begins at random.
        width, layers, heads, vocab: of a new decoder.
        lr: peak learning rate of AdamW.
        weight_decay, warmup: of the schedule; the rate falls as a cosine to a tenth.
        samples_every: steps between sample completions in the log; 0 for none.
        new_points: `init_from` may have read another encoder's points. Right where this one was
            trained on from that one, so that its points lie near the old ones.
    """

    def __init__(
        self,
        init_from: str | None = None,
        width: int = 256,
        layers: int = 6,
        heads: int = 4,
        vocab: int = 6000,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: int = 100,
        samples_every: int = 200,
        new_points: bool = False,
    ) -> None:
        super().__init__()
        self.init_from, self.new_points = init_from, new_points
        self.sizes = {"width": width, "layers": layers, "heads": heads}
        self.vocab, self.lr, self.weight_decay, self.warmup = vocab, lr, weight_decay, warmup
        self.samples_every = samples_every
        self.decoder: Any = None

    @property
    def world(self) -> GuardWorld:
        """What the data module read."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, GuardData):
            raise ConfigError("the guard learns from hysafe.app.guard_data.GuardData.")
        return data.world

    def configure_model(self) -> None:
        """Make the decoder, once the data are known."""
        if self.decoder is not None:
            return
        if self.device.type != "cpu":
            raise ConfigError(
                "the small decoder trains on the CPU. Pass --trainer.accelerator cpu."
            )
        world = self.world
        encoder = world.model.encoder
        if self.init_from is not None:
            self.decoder = GuardModel.load(self.init_from)
            if not self.decoder.reads(encoder):
                if not self.new_points:
                    raise ConfigError(
                        f"{self.init_from} reads points of another encoder. Train it again from the "
                        "first stage, or name its encoder; where that encoder was only trained on, "
                        "pass new_points=true."
                    )
                self.decoder.config.encoder_hash = encoder.hash()
                self.decoder.config.text_hash = encoder.text_hash()
            return
        texts = [*world.words, *world.index.phrases]
        texts += [i.evidence.text for i in world.train]
        texts += [world.writer.answer(i, world.writer.draw(i, k), k) for k, i in enumerate(world.train[:4000])]  # fmt: skip
        tokenizer = train_tokenizer(texts, vocab=self.vocab)
        self.decoder = GuardModel.new(
            GuardProcessor(tokenizer), dim=world.space.apexes.shape[1],
            encoder_hash=encoder.hash(), text_hash=encoder.text_hash(), **self.sizes,
        )  # fmt: skip

    def transfer_batch_to_device(self, batch: Draw, device: torch.device, index: int) -> Draw:
        """A batch is no tensors yet."""
        return batch

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.parameters() if p.requires_grad and p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.lr, betas=(0.9, 0.98),
        )  # fmt: skip
        total = max(1, int(self.trainer.estimated_stepping_batches))

        def factor(step: int) -> float:
            if step < self.warmup:
                return (step + 1) / self.warmup
            done = min(1.0, (step - self.warmup) / max(1, total - self.warmup))
            return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def model(self) -> Any:
        """The decoder; :meth:`configure_model` has made it."""
        assert self.decoder is not None
        return self.decoder

    def start(self) -> Any:
        """The policy that training began from, standing still."""
        frozen = GuardModel.load(str(self.init_from)).requires_grad_(False)
        frozen.rationale = False
        return frozen

    def kept(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Losses of right answers and of phrases: what the warm-up trains."""
        return _losses(self, draw)

    def prompts(self, draw: Draw) -> dict[str, Any]:
        """The prompts of what a batch wants judged."""
        policies = [e.policy for e in draw.episodes]
        evidence = [i.evidence for i in draw.items]
        return self._processor().judge(evidence, policies, self.world.space)

    def _processor(self) -> GuardProcessor:
        return self.model()._processor()

    def _show(self, draw: Draw) -> None:
        """A few completions of the likeliest kind, into the log and TensorBoard."""
        if not self.samples_every or self.global_step % self.samples_every:
            return
        few = Draw(draw.items[:SAMPLES], draw.episodes[:SAMPLES], draw.answers[:SAMPLES], [])
        said = self.model().sample(self.prompts(few), temperature=0.0).texts
        lines = [
            f"{item.evidence.text[:90]!r}\n  said {text}\n  want {want}"
            for item, text, want in zip(few.items, said, few.answers, strict=True)
        ]
        log.info("step %d\n%s", self.global_step, "\n".join(lines))
        for logger in self.loggers:
            board: Any = getattr(logger, "experiment", None)
            if hasattr(board, "add_text"):
                board.add_text("samples", "\n\n".join(lines), self.global_step)

    def export(self, folder: Path) -> None:
        """Write the decoder and its phrases: a folder that ``--guard`` takes."""
        self.model().save(folder)
        self.world.index.save(folder)


class GuardSFT(GuardTask):
    """Warm-up: right answers, and points put back into the phrases they came from.

    Args:
        describe_weight: of the phrases' loss beside the answers'.
        name_from_list: most names of novel risks are that of the item's nearest phrases which MiniLM
            finds closest to the bank, so that the decoder learns to choose.
        **options: of :class:`GuardTask`.
    """

    def __init__(
        self,
        init_from: str | None = None,
        width: int = 256,
        layers: int = 6,
        heads: int = 4,
        vocab: int = 6000,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: int = 100,
        samples_every: int = 200,
        new_points: bool = False,
        describe_weight: float = 1.0,
        name_from_list: bool = True,
    ) -> None:
        super().__init__(
            init_from, width, layers, heads, vocab, lr, weight_decay, warmup, samples_every,
            new_points,
        )  # fmt: skip
        self.describe_weight, self.name_from_list = describe_weight, name_from_list

    def on_fit_start(self) -> None:
        if self.name_from_list:
            similarity, thresholds = name_similarity(self.world)
            self.world.writer.best = _best(similarity, thresholds)

    def training_step(self, batch: Draw, index: int) -> Tensor:
        judged, described = self.kept(batch)
        self.log_dict({"loss/answer": judged, "loss/phrase": described})
        self._show(batch)
        loss: Tensor = judged + self.describe_weight * described
        return loss

    def validation_step(self, batch: Draw, index: int) -> None:
        judged, described = self.kept(batch)
        self.log_dict(
            {"val/answer": judged, "val/phrase_perplexity": described.exp()}, batch_size=1
        )


class GuardRL(GuardTask):
    """Reinforcement learning on verdicts and names, from a warm-up.

    Args:
        algorithm: grpo, rloo, ppo, dpo, or response_ppo (PPO as for a reward on the response).
        reward: ours (:func:`guard_rewards`), proguard (the published one) or response.
        cone: whether a name must lie in its parent's cone.
        group: answers to each prompt.
        temperature: of the sampling.
        epochs, minibatch: passes over a rollout, and prompts in each step of one.
        beta: weight of the KL to where training began.
        warm: weight of the warm-up's loss, kept in so that what RL does not pay is not forgotten.
        **options: of :class:`GuardTask`.
    """

    def __init__(
        self,
        init_from: str = "runs/guard/sft/model",
        algorithm: Literal["grpo", "rloo", "ppo", "dpo", "response_ppo"] = "grpo",
        reward: Literal["ours", "proguard", "response"] = "ours",
        cone: bool = True,
        group: int = 8,
        temperature: float = 1.0,
        epochs: int = 1,
        minibatch: int = 16,
        beta: float = 0.02,
        warm: float = 0.2,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        warmup: int = 5,
        samples_every: int = 25,
    ) -> None:
        super().__init__(
            init_from, lr=lr, weight_decay=weight_decay, warmup=warmup, samples_every=samples_every
        )
        self.automatic_optimization = False
        self.algorithm = ALGORITHMS[algorithm](beta=beta)
        self.reward, self.cone, self.group, self.temperature = reward, cone, group, temperature
        self.epochs, self.minibatch, self.warm = epochs, minibatch, warm
        self.value_head: nn.Module | None = None
        self._reference: list[Any] = []  # a list keeps it out of the state and the optimizer
        self._terms: dict[str, Reward] = {}

    def configure_model(self) -> None:
        super().configure_model()
        self._add_values()

    def _add_values(self) -> None:
        if self.algorithm.needs_values and self.value_head is None:
            self.value_head = ValueHead(self.model().width)

    def on_fit_start(self) -> None:
        self.model().eval()
        if self.algorithm.needs_reference:
            self._reference = [self.start()]
        similarity, thresholds = name_similarity(self.world)
        self.world.writer.best = _best(similarity, thresholds)
        world = self.world
        if self.reward == "ours":
            cone = None
            if self.cone:
                table, apexes = world.model.place(world.model.view())
                cone = cone_margins(world.model.encode_text, apexes, table.ids)
            self._terms = guard_rewards(similarity, thresholds, world.model.taxonomy, cone=cone)
        elif self.reward == "proguard":
            self._terms = {"proguard": proguard_reward(similarity)}
        else:
            self._terms = {"response": response_reward()}
        # the same answers whatever the process's other draws
        self._generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)

    def training_step(self, batch: Draw, index: int) -> None:
        optimizer: Any = self.optimizers()
        model = self.model()
        self._show(batch)
        columns = [e.columns() for e in batch.episodes]
        model.rationale = False
        rollout = self.algorithm.prepare(
            collect(
                model, self.prompts(batch), {k: [c[k] for c in columns] for k in columns[0]},
                self._terms, group=self.group, temperature=self.temperature,
                generator=self._generator, value_head=self.value_head,
                reference=self._reference[0] if self._reference else None,
            )
        )  # fmt: skip
        sums: dict[str, list[float]] = {}
        schedule: Any = self.lr_schedulers()
        for _ in range(self.epochs):
            for part in minibatches(rollout, self.minibatch, self._generator):
                loss, logged = self.algorithm.loss(model, part, self.value_head)
                if self.warm:
                    loss = loss + self.warm * self._kept(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                norm = nn.utils.clip_grad_norm_(list(self.parameters()), 1.0)
                optimizer.step()
                schedule.step()
                for name, value in {**logged, "loss": float(loss), "norm": float(norm)}.items():
                    sums.setdefault(name, []).append(value)
        model.rationale = True
        means = {k: sum(v) / len(v) for k, v in sums.items()}
        self.log_dict({f"rl/{k}": v for k, v in means.items()}, batch_size=1)

    def _kept(self, batch: Draw) -> Tensor:
        """The warm-up's loss on the same batch."""
        model = self.model()
        model.rationale = True
        judged, described = self.kept(batch)
        model.rationale = False
        return judged + described

    def validation_step(self, batch: Draw, index: int) -> None:
        judged, described = self.kept(batch)
        self.log_dict(
            {"val/answer": judged, "val/phrase_perplexity": described.exp()}, batch_size=1
        )


def _losses(task: GuardTask, draw: Draw) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihoods: of right answers, and of phrases."""
    prompts = task.prompts(draw)
    # an item whose category is not among the slots of its prompt has no right answer there
    keep = [
        k
        for k, (e, ids) in enumerate(zip(draw.episodes, prompts["slot_ids"], strict=True))
        if e.category is None or e.policy.renaming.prompt_id(e.category) in ids
    ]
    model = task.model()
    prompts = _rows(prompts, keep)
    answers = model.complete(prompts, [draw.answers[k] for k in keep])
    found, _ = model.log_probs(prompts, answers)
    weight = answers.mask.float()
    why = answers.tokens == task._processor().special[WHY]
    after = (why.cumsum(-1) - why.long()) > 0
    weight = torch.where(after, weight * RATIONALE_WEIGHT, weight)
    weight = weight * ((found > NEVER_SAID) | ~answers.mask).all(-1, keepdim=True)
    judged = -(found * weight).sum() / weight.sum().clamp(min=1)
    if not draw.describe:
        return judged, judged * 0
    asked = task._processor().describe([e for e, _ in draw.describe])
    phrases = model.complete(asked, [p for _, p in draw.describe])
    said, _ = model.log_probs(asked, phrases)
    # a phrase of more than six words, or in another script, can never be said
    sayable = phrases.mask & ((said > NEVER_SAID) | ~phrases.mask).all(-1, keepdim=True)
    return judged, -(said * sayable).sum() / sayable.sum().clamp(min=1)


def name_similarity(world: GuardWorld) -> tuple[Similarity, Thresholds]:
    """MiniLM's similarity of names, with thresholds from the banks of the seen categories."""
    similarity = cosine_similarity(minilm_embed)
    hidden = hidden_nodes(world.model.taxonomy)
    banks = [
        split_bank(n).train
        for n in world.model.taxonomy
        if n.kind == "category" and n.id not in hidden
    ]
    return similarity, calibrate_similarity(similarity, banks)


def _best(
    similarity: Similarity, thresholds: Thresholds
) -> Callable[[Sequence[str], Sequence[str]], int | None]:
    """Which phrase is nearest to a bank, where it is nearer than most strangers are."""

    def best(phrases: Sequence[str], bank: Sequence[str]) -> int | None:
        near = similarity(list(phrases)[:PHRASES], list(bank)).amax(-1)
        found = int(near.argmax())
        return found if float(near[found]) >= thresholds.low else None

    return best


def _rows(prompts: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    at = torch.tensor(list(keep), dtype=torch.long)
    return {k: v[at] if isinstance(v, Tensor) else [v[i] for i in keep] for k, v in prompts.items()}


# ---------------------------------------------------------------- the command


class ExportGuard(Callback):
    """Writes the guard, ``model/`` in the run directory, when fit ends."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, GuardTask) and not trainer.interrupted:
            target = Path(trainer.default_root_dir) / "model"
            pl_module.export(target)
            log.info("guard written to %s", target)


class GuardCLI(StagesCLI):
    """Trains guards; every stage has the same encoder, data and hidden categories."""

    def run_stage(self, config: str, settings: Any) -> None:
        given = [
            f"--data.{k}={v}"
            for k in ("encoder", "data_dir", "hidden")
            if (v := getattr(settings.data, k, None)) is not None
        ]
        guard_main(["fit", "--config", config, *given])


def guard_main(args: list[str] | None = None) -> None:
    """Entry point: ``python train_guard.py fit --config configs/guard/NAME.yaml``.

    Resume with ``--ckpt_path RUN/csv/checkpoints/last.ckpt``.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("hysafe").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")
    GuardCLI(
        GuardTask,
        GuardData,
        subclass_mode_model=True,
        save_config_callback=RunConfig,
        seed_everything_default=0,
        trainer_defaults=trainer_defaults(ExportGuard()),
        args=args,
    )
