r"""The guard's training: SFT, GRPO, RLOO, PPO and DPO on anything that is a ``Decoder``.

One round of reinforcement learning, the optimizer being the caller's::

    rollout = algorithm.prepare(collect(decoder, prompts, columns, rewards, weights, group=8, ...))
    for part in minibatches(rollout, size, generator):  # as many epochs as wanted
        loss, logged = algorithm.loss(decoder, part, value_head)

Shapes: P prompts, G completions of each (its group, side by side), B = P * G, T tokens, W width of
the hidden states. A reward of NaN is "cannot judge": such a completion is in no loss. Dropout, if
any, must be off, or the ratio of the first minibatch is not 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hysafe.errors import ConfigError, ShapeError
from hysafe.guard.advantages import (
    CLIP,
    DPO_BETA,
    LAMBDA,
    clipped_policy_loss,
    clipped_value_loss,
    dpo_loss,
    generalized_advantages,
    group_advantages,
    grpo_loss,
    kl_k3,
    leave_one_out_advantages,
    masked_mean,
    rewards_per_token,
    sequence_log_probs,
    whiten,
)
from hysafe.guard.policy import Completions, Decoder
from hysafe.guard.rewards import Reward, binary_reward, total_reward

__all__ = [
    "DPO",
    "GRPO",
    "PPO",
    "RESPONSE_PPO",
    "RLOO",
    "Algorithm",
    "Rollout",
    "ValueHead",
    "collect",
    "minibatches",
    "response_reward",
    "sft_loss",
]

# TRL's weights of the KL penalty (RLOO, PPO) and of PPO's value loss.
KL_WEIGHT = 0.05
VALUE_WEIGHT = 0.1

_NO_REFERENCE = "{} compares with a reference policy. Pass it to collect; or beta=0, except in DPO."
_NO_VALUES = "PPO learns from values. Pass one value head to collect and to loss."


def sft_loss(decoder: Decoder, prompts: Mapping[str, Any], answers: Sequence[str]) -> Tensor:
    """Mean negative log-likelihood over the tokens of the right answers, one per prompt."""
    completions = decoder.complete(prompts, answers)
    log_probs, _ = decoder.log_probs(prompts, completions)
    return -masked_mean(log_probs, completions.mask)


# ---------------------------------------------------------------- rollouts


@dataclass(frozen=True, eq=False)
class Rollout:
    """Completions, and all that a loss needs of the policy that drew them.

    Args:
        prompts: every prompt G times, B rows.
        completions: B answers.
        old: their log-probabilities under the policy that drew them [B, T].
        reference: the same under the reference policy, or None.
        rewards: weighted sums of the terms [P, G]; NaN where none can judge.
        terms: every term by name, without its weight [P, G]; NaN where it cannot judge.
        values: what the value head expected [B, T], or None.
        advantages: [B], or [B, T] for PPO; None before ``prepare``.
        returns: what the value head should have expected [B, T]; PPO only.
    """

    prompts: dict[str, Any]
    completions: Completions
    old: Tensor
    reference: Tensor | None
    rewards: Tensor
    terms: dict[str, Tensor]
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """bool [B, T]: tokens of the answers that could be judged."""
        return self.completions.mask & ~self.rewards.isnan().flatten()[:, None]

    def groups(self, chosen: Tensor) -> Rollout:
        """The rollout of some prompts, given by their places [P'], each with its whole group."""
        size = self.rewards.shape[1]
        chosen = chosen.to(self.rewards.device)
        rows = (chosen[:, None] * size + torch.arange(size, device=chosen.device)).flatten()
        per_row: dict[str, Any] = {
            name: None if (x := getattr(self, name)) is None else x[rows]
            for name in ("old", "reference", "values", "advantages", "returns")
        }
        return replace(
            self,
            prompts=_rows(self.prompts, rows),
            completions=_completion_rows(self.completions, rows),
            rewards=self.rewards[chosen],
            terms={name: x[chosen] for name, x in self.terms.items()},
            **per_row,
        )


class ValueHead(nn.Module):
    """Expected reward at every token: hidden states [B, T, W] to [B, T] float32, 0 at first.

    The hidden states are taken as constants: its loss trains the head and leaves the decoder alone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        values: Tensor = self.outer(self.inner(hidden.detach().float()).tanh()).squeeze(-1)
        return values


def collect(
    decoder: Decoder,
    prompts: Mapping[str, Any],
    columns: Mapping[str, Sequence[Any]],
    reward_terms: Mapping[str, Reward],
    weights: Mapping[str, float] | None = None,
    *,
    group: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    reference: Decoder | None = None,
    value_head: nn.Module | None = None,
) -> Rollout:
    """Let the decoder answer, and score the answers; no gradient.

    Each term is called once, with all B completions, groups side by side: policy twins that are
    both among the prompts meet in :func:`hysafe.guard.rewards.pay_together`. Log-probabilities are
    those of temperature 1, whatever the sampling's.

    Args:
        prompts: of P episodes, as the decoder's processor makes them.
        columns: of the same episodes, P values each, see ``Episode.columns``.
        reward_terms: by name.
        weights: of terms; 1 for those not named.
        group: G, completions per prompt.
        temperature: > 0.
        reference: policy that the KL is taken to.
        value_head: for PPO.

    Raises:
        ConfigError: a weight for no term, or a setting out of range.
        ShapeError: columns or prompts of other lengths.
    """
    if group < 1 or temperature <= 0:
        raise ConfigError(
            f"group {group} and temperature {temperature} give nothing to compare. Take group >= 1 "
            "and temperature > 0."
        )
    judged: dict[str, list[float | None]] = {}
    total = total_reward({n: _kept(n, r, judged) for n, r in reward_terms.items()}, weights)
    count = _count(prompts)
    for name, column in columns.items():
        if len(column) != count:
            raise ShapeError(
                f"column {name} has {len(column)} values for {count} prompts. Give one per prompt."
            )
    with torch.no_grad():
        completions = decoder.sample(prompts, group, temperature=temperature, generator=generator)
        if len(completions.texts) != count * group:
            raise ShapeError(
                f"the decoder gave {len(completions.texts)} answers, expected {count} x {group}. "
                "Decoder.sample returns n per prompt."
            )
        repeated = decoder.repeat(prompts, group)
        old, hidden = decoder.log_probs(repeated, completions)
        values = None
        if value_head is not None:
            values = _values(value_head, hidden, completions.mask)
        known = None if reference is None else reference.log_probs(repeated, completions)[0]
    rows = {name: [v for v in column for _ in range(group)] for name, column in columns.items()}
    sums = total([""] * (count * group), completions.texts, **rows)

    def table(values: Sequence[float | None]) -> Tensor:
        row = [float("nan") if v is None else float(v) for v in values]
        return torch.tensor(row, dtype=torch.float32, device=old.device).view(count, group)

    terms = {name: table(values) for name, values in judged.items()}
    return Rollout(repeated, completions, old, known, table(sums), terms, values)


def minibatches(
    rollout: Rollout, size: int, generator: torch.Generator | None = None
) -> Iterator[Rollout]:
    """The rollout in random order, in parts of `size` prompts (the last may have fewer), each
    prompt with its whole group. Prepare it first: advantages are those of the whole rollout."""
    if size < 1:
        raise ConfigError(f"minibatches of {size} prompts. Take 1 or more.")
    order = torch.randperm(len(rollout.rewards), generator=generator)
    for chosen in order.split(size):
        yield rollout.groups(chosen)


# ---------------------------------------------------------------- algorithms


class Algorithm(Protocol):
    """Settings of one way to learn from rollouts."""

    @property
    def needs_reference(self) -> bool:
        """Whether :func:`collect` must be given a reference policy."""
        ...

    @property
    def needs_values(self) -> bool:
        """Whether :func:`collect` and :meth:`loss` must be given a value head."""
        ...

    def prepare(self, rollout: Rollout) -> Rollout:
        """With advantages; once for a whole rollout.

        Raises:
            ConfigError: the rollout lacks what this algorithm needs.
        """
        ...

    def loss(
        self, decoder: Decoder, rollout: Rollout, value_head: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of a prepared rollout or a part of it, and what one logs.

        Always logged: ``length`` (tokens per answer), ``unjudged`` (share of completions),
        ``no_signal`` (share of groups without two different rewards), ``entropy`` (mean negative
        log-probability of the drawn tokens, nats; its estimate while the ratio is near 1). Where
        there is something to take a mean of: ``reward``, ``reward/TERM``, and ``kl`` (k3, per
        token, to the reference). Others are named at each algorithm.
        """
        ...


@dataclass(frozen=True)
class GRPO:
    """Group advantages, clipped ratio per token, KL to the reference in the loss.

    Logs also ``clipped``: share of tokens whose gradient the clip stops.

    Args:
        beta: weight of the KL; 0 needs no reference.
        std: divide advantages by the group's standard deviation; False as in Dr. GRPO (whose other
            change, no division by the length of an answer, is not made).
        clip: epsilon.

    Source: Shao et al. 2024 (DeepSeekMath), eq. 3; Liu et al. 2025 (Dr. GRPO).
    """

    beta: float = 0.0
    std: bool = True
    clip: float = CLIP

    def __post_init__(self) -> None:
        _check_settings(self)

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def needs_values(self) -> bool:
        return False

    def prepare(self, rollout: Rollout) -> Rollout:
        _check(rollout, self, group=2)
        return replace(
            rollout, advantages=group_advantages(rollout.rewards, std=self.std).flatten()
        )

    def loss(
        self, decoder: Decoder, rollout: Rollout, value_head: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        advantages, mask = _prepared(rollout), rollout.mask
        log_probs, _ = decoder.log_probs(rollout.prompts, rollout.completions)
        loss = grpo_loss(
            log_probs,
            rollout.old,
            advantages,
            mask,
            reference=rollout.reference,
            beta=self.beta,
            clip=self.clip,
        )
        # its mean is over all rows; those that cannot be judged count in no mean
        loss = loss * len(mask) / mask.any(-1).sum().clamp(min=1)
        clipped = _clipped(log_probs - rollout.old, advantages[:, None], mask, self.clip)
        logged = _policy_log(log_probs, rollout.reference, mask)
        return loss, _reward_log(rollout) | logged | {"clipped": clipped}


@dataclass(frozen=True)
class RLOO:
    """Leave-one-out advantages; a completion is one action, its KL is taken off its reward.

    Logs also ``clipped``: share of completions whose gradient the clip stops.

    Args:
        beta: weight of the KL; 0 needs no reference.
        clip: epsilon, on the ratio of whole completions; it matters from the second minibatch on.

    Source: Ahmadian et al. 2024 (Back to Basics), eq. 8; the clip as in TRL.
    """

    beta: float = KL_WEIGHT
    clip: float = CLIP

    def __post_init__(self) -> None:
        _check_settings(self)

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def needs_values(self) -> bool:
        return False

    def prepare(self, rollout: Rollout) -> Rollout:
        _check(rollout, self, group=2)
        rewards = rollout.rewards
        if self.beta > 0 and rollout.reference is not None:
            mask = rollout.mask
            kl = sequence_log_probs(rollout.old - rollout.reference, mask)  # [B]
            rewards = rewards - self.beta * kl.view_as(rewards)
        return replace(rollout, advantages=leave_one_out_advantages(rewards).flatten())

    def loss(
        self, decoder: Decoder, rollout: Rollout, value_head: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        advantages, mask = _prepared(rollout)[:, None], rollout.mask
        log_probs, _ = decoder.log_probs(rollout.prompts, rollout.completions)
        whole = sequence_log_probs(log_probs, mask)[:, None]  # [B, 1]
        old = sequence_log_probs(rollout.old, mask)[:, None]
        judged = mask.any(-1, keepdim=True)
        loss = clipped_policy_loss(whole, old, advantages, judged, clip=self.clip)
        clipped = _clipped(whole - old, advantages, judged, self.clip)
        logged = _policy_log(log_probs, rollout.reference, mask)
        return loss, _reward_log(rollout) | logged | {"clipped": clipped}


@dataclass(frozen=True)
class PPO:
    """A value head and GAE; the KL is in the rewards of the tokens. The loss is the policy's plus
    `value_weight` times the value head's.

    Logs also ``clipped`` as GRPO does, ``policy_loss`` and ``value_loss``.

    Args:
        beta: weight of the KL; 0 needs no reference.
        clip: epsilon of the ratio.
        value_clip: how far a value may move from the old one.
        value_weight: of the value head's loss.
        gamma, lam: discount and trace decay.
        whiten: advantages to mean 0 and variance 1 over the rollout.

    Source: Schulman et al. 2017; Ouyang et al. 2022 (InstructGPT), eq. 2.
    """

    beta: float = KL_WEIGHT
    clip: float = CLIP
    value_clip: float = CLIP
    value_weight: float = VALUE_WEIGHT
    gamma: float = 1.0
    lam: float = LAMBDA
    whiten: bool = True

    def __post_init__(self) -> None:
        _check_settings(self)

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def needs_values(self) -> bool:
        return True

    def prepare(self, rollout: Rollout) -> Rollout:
        _check(rollout, self, group=1)
        old, mask, values = rollout.old, rollout.mask, rollout.values
        if values is None:
            raise ConfigError(_NO_VALUES)
        kl = torch.zeros_like(old) if rollout.reference is None else old - rollout.reference
        rewards = rewards_per_token(rollout.rewards.flatten(), kl, mask, beta=self.beta)
        advantages, returns = generalized_advantages(
            rewards, values, mask, gamma=self.gamma, lam=self.lam
        )
        if self.whiten:
            advantages = whiten(advantages, mask)
        return replace(rollout, advantages=advantages, returns=returns)

    def loss(
        self, decoder: Decoder, rollout: Rollout, value_head: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        advantages, mask = _prepared(rollout), rollout.mask
        if value_head is None or rollout.values is None or rollout.returns is None:
            raise ConfigError(_NO_VALUES)
        log_probs, hidden = decoder.log_probs(rollout.prompts, rollout.completions)
        policy = clipped_policy_loss(log_probs, rollout.old, advantages, mask, clip=self.clip)
        values = _values(value_head, hidden, rollout.completions.mask)
        value = clipped_value_loss(
            values, rollout.values, rollout.returns, mask, clip=self.value_clip
        )
        logged = _policy_log(log_probs, rollout.reference, mask) | {
            "clipped": _clipped(log_probs - rollout.old, advantages, mask, self.clip),
            "policy_loss": float(policy.detach()),
            "value_loss": float(value.detach()),
        }
        return policy + self.value_weight * value, _reward_log(rollout) | logged


@dataclass(frozen=True)
class DPO:
    """The best completion of each group against its worst.

    Logs also ``pairs`` (share of groups that give one) and, where there are some, ``accuracy``
    (share in which the policy has moved towards the better) and ``margin`` (beta times how far, in
    nats). ``entropy`` and ``kl`` are those of the pairs.

    Args:
        beta: strength of the pull to the reference.
        margin: rewards of a pair differ by more than this.

    Source: Rafailov et al. 2023, eq. 7.
    """

    beta: float = DPO_BETA
    margin: float = 0.0

    def __post_init__(self) -> None:
        _check_settings(self)

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_values(self) -> bool:
        return False

    def prepare(self, rollout: Rollout) -> Rollout:
        _check(rollout, self, group=2)
        return rollout

    def pairs(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the better and of the worse completion, each [pairs], from rewards [P, G]."""
        unknown = rewards.isnan()
        best, chosen = rewards.masked_fill(unknown, -torch.inf).max(-1)
        worst, rejected = rewards.masked_fill(unknown, torch.inf).min(-1)
        (at,) = torch.where(best - worst > self.margin)
        return at * rewards.shape[1] + chosen[at], at * rewards.shape[1] + rejected[at]

    def loss(
        self, decoder: Decoder, rollout: Rollout, value_head: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        if rollout.reference is None:
            raise ConfigError(_NO_REFERENCE.format("DPO"))
        chosen, rejected = self.pairs(rollout.rewards)
        logged = _reward_log(rollout) | {"pairs": len(chosen) / len(rollout.rewards)}
        if len(chosen) == 0:
            return torch.zeros((), device=rollout.old.device, requires_grad=True), logged
        rows = torch.cat([chosen, rejected])
        drawn = _completion_rows(rollout.completions, rows)
        log_probs, _ = decoder.log_probs(_rows(rollout.prompts, rows), drawn)
        reference = rollout.reference[rows]
        better, worse = sequence_log_probs(log_probs, drawn.mask).chunk(2)
        other_better, other_worse = sequence_log_probs(reference, drawn.mask).chunk(2)
        loss = dpo_loss(better, worse, other_better, other_worse, beta=self.beta)
        moved = ((better - other_better) - (worse - other_worse)).detach()
        return loss, logged | _policy_log(log_probs, reference, drawn.mask) | {
            "accuracy": float((moved > 0).float().mean()),
            "margin": self.beta * float(moved.mean()),
        }


# ---------------------------------------------------------------- logs


def _reward_log(rollout: Rollout) -> dict[str, float]:
    rewards, unknown = rollout.rewards, rollout.rewards.isnan()
    best = rewards.masked_fill(unknown, -torch.inf).amax(-1)
    worst = rewards.masked_fill(unknown, torch.inf).amin(-1)
    logged = {
        "length": float(rollout.completions.mask.sum(-1).float().mean()),
        "unjudged": float(unknown.float().mean()),
        "no_signal": float((best <= worst).float().mean()),
    }
    means = {"reward": rewards} | {f"reward/{name}": x for name, x in rollout.terms.items()}
    return logged | {n: float(x.nanmean()) for n, x in means.items() if not x.isnan().all()}


def _policy_log(log_probs: Tensor, reference: Tensor | None, mask: Tensor) -> dict[str, float]:
    now = log_probs.detach()
    logged = {"entropy": -float(masked_mean(now, mask))}
    if reference is not None and mask.any():
        logged["kl"] = float(masked_mean(kl_k3(now, reference), mask))
    return logged


def _clipped(log_ratio: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> float:
    ratio = log_ratio.detach().exp()
    stopped = ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))
    return float(masked_mean(stopped.float(), mask))


# ---------------------------------------------------------------- checks and rows


def _check_settings(settings: GRPO | RLOO | PPO | DPO) -> None:
    for field in fields(settings):
        value = getattr(settings, field.name)
        if not value >= 0 or (field.name in ("gamma", "lam") and value > 1):
            raise ConfigError(
                f"{type(settings).__name__}: {field.name} is {value}. Take 0 or more; gamma and "
                "lam at most 1."
            )


def _check(rollout: Rollout, algorithm: Algorithm, *, group: int) -> None:
    name = type(algorithm).__name__
    if rollout.rewards.shape[1] < group:
        raise ConfigError(f"{name} compares completions of one prompt. Collect with group >= 2.")
    if algorithm.needs_reference and rollout.reference is None:
        raise ConfigError(_NO_REFERENCE.format(name))


def _prepared(rollout: Rollout) -> Tensor:
    if rollout.advantages is None:
        raise ConfigError(
            "the rollout has no advantages. Call the algorithm's prepare once, before minibatches."
        )
    return rollout.advantages


def _values(value_head: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, T]; 0 stands for hidden states of padding, as 0 * NaN in a gradient would be NaN."""
    values: Tensor = value_head(torch.where(mask[..., None], hidden, torch.zeros_like(hidden)))
    return values


def _kept(name: str, reward: Reward, judged: dict[str, list[float | None]]) -> Reward:
    """The reward, leaving what it returned in `judged`."""

    def once(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        judged[name] = reward(prompts, completions, **columns)
        return judged[name]

    return once


def _count(prompts: Mapping[str, Any]) -> int:
    counts = {name: len(x) for name, x in prompts.items()}
    if len(set(counts.values())) != 1:
        raise ShapeError(
            f"prompts have {counts or 'no'} rows. The first axis of every entry is the prompt."
        )
    return next(iter(counts.values()))


def _rows(prompts: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    return {
        name: x[rows.to(x.device)] if isinstance(x, Tensor) else [x[i] for i in rows.tolist()]
        for name, x in prompts.items()
    }


def _completion_rows(completions: Completions, rows: Tensor) -> Completions:
    texts = [completions.texts[i] for i in rows.tolist()]
    return Completions(completions.tokens[rows], completions.mask[rows], texts)


# ---------------------------------------------------------------- the response-based preset

# PPO as published with the response-based reward; the other settings are the defaults of both.
RESPONSE_PPO = PPO(beta=0.1, lam=1.0)


def response_reward(*, wrong: float = 0.0) -> Reward:
    """1 for a response whose verdict is the label, `wrong` for the other verdict and for none
    (review, unreadable); None without a label. For :data:`RESPONSE_PPO`.

    As published, a RoBERTa classifier reads a free response as safe, unsafe or uncertain, and the
    reward is its negative cross-entropy to the label, scaled to [0, 1] over the batch. Our grammar
    states the verdict: the classifier becomes certain, and the scaled reward 1 or 0. Left out: the
    bonus for long responses (4.0 times the share of the token limit; an answer here is one JSON
    object) and the entropy bonus (0.02; a decoder gives no distribution over tokens).

    Args:
        wrong: 0 as published; -1 widens the gap, which group advantages with std do not see.

    Source: the idea Qu et al. 2025 (UnsafeConcepts), abstract; form and settings as read in the
    authors' repository (TrustAIRLab/SaferVLM), not in the paper's text.
    """

    def response(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        policy: Sequence[str],
        rating: Sequence[str | None],
        **columns: Any,
    ) -> list[float | None]:
        right = binary_reward(prompts, completions, policy=policy, rating=rating)
        return [wrong if r == 0 else r for r in right]

    return response
