r"""The maths of the guard's training: advantages and losses of GRPO, RLOO, PPO and DPO.

Pure functions on tensors. Shapes: P prompts, G completions of each (the group), B completions, T
tokens. A mask is True on the tokens a completion is judged by; what stands on other tokens, infinite
or NaN as it may be, changes neither value nor gradient. A reward of NaN is "cannot judge": it counts
in no mean and its advantage is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hysafe.errors import ShapeError

__all__ = [
    "clipped_policy_loss",
    "clipped_value_loss",
    "dpo_loss",
    "generalized_advantages",
    "group_advantages",
    "grpo_loss",
    "kl_k3",
    "leave_one_out_advantages",
    "masked_mean",
    "rewards_per_token",
    "sequence_log_probs",
    "token_log_probs",
    "whiten",
]

# TRL's: keeps groups of one reward at advantage 0.
STD_EPS = 1e-4
# Schulman et al. 2017.
CLIP = 0.2
# Schulman et al. 2016; with gamma 1, as a completion is one short episode.
LAMBDA = 0.95
# Rafailov et al. 2023.
DPO_BETA = 0.1


# ---------------------------------------------------------------- advantages


def group_advantages(rewards: Tensor, *, std: bool = True, eps: float = STD_EPS) -> Tensor:
    r"""GRPO: reward minus the group's mean, over the group's standard deviation.

    .. math:: A_i = \frac{r_i - \bar r}{s + \epsilon}

    Args:
        rewards: [P, G]; NaN where a completion could not be judged.
        std: divide by s (unbiased); without it, as in Dr. GRPO, easy and hard prompts are not
            weighed up.
        eps: added to s.

    Returns:
        [P, G], 0 in groups of one reward and where the reward is NaN.

    Source: Shao et al. 2024 (DeepSeekMath), eq. 4; Liu et al. 2025 (Dr. GRPO) without std.
    """
    _two_axes(rewards, "rewards", "[P, G]")
    judged = ~rewards.isnan()
    count = judged.sum(-1, keepdim=True)
    known = torch.where(judged, rewards, torch.zeros_like(rewards))
    mean = known.sum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(judged, known - mean, torch.zeros_like(rewards))
    if not std:
        return centred
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    r"""RLOO: reward minus the mean of the group's other rewards.

    .. math:: A_i = r_i - \frac{1}{G-1}\sum_{j \ne i} r_j

    Args:
        rewards: [P, G]; NaN where a completion could not be judged.

    Returns:
        [P, G], 0 where the reward is NaN or stands alone.

    Source: Ahmadian et al. 2024 (Back to Basics), eq. 8.
    """
    _two_axes(rewards, "rewards", "[P, G]")
    judged = ~rewards.isnan()
    count = judged.sum(-1, keepdim=True)
    known = torch.where(judged, rewards, torch.zeros_like(rewards))
    others = (known.sum(-1, keepdim=True) - known) / (count - 1).clamp(min=1)
    return torch.where(judged & (count > 1), known - others, torch.zeros_like(rewards))


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = LAMBDA
) -> tuple[Tensor, Tensor]:
    r"""GAE over the judged tokens of each completion.

    .. math:: \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \sum_k (\gamma\lambda)^k \delta_{t+k}

    Args:
        rewards: [B, T], see :func:`rewards_per_token`.
        values: [B, T], the value head's estimates; taken as constants.
        mask: bool [B, T]; tokens outside are skipped, wherever they stand.
        gamma, lam: discount and trace decay.

    Returns:
        advantages and returns (advantages + values), [B, T], 0 outside the mask.

    Source: Schulman et al. 2016, eq. 16.
    """
    _same_shape(rewards=rewards, values=values, mask=mask)
    with torch.no_grad():
        zero = torch.zeros_like(values)
        r, v = torch.where(mask, rewards, zero), torch.where(mask, values, zero)
        advantages = torch.zeros_like(v)
        carried = torch.zeros_like(v[:, 0])
        following = torch.zeros_like(v[:, 0])
        for t in reversed(range(v.shape[1])):
            on = mask[:, t]
            step = r[:, t] + gamma * following - v[:, t] + gamma * lam * carried
            carried = torch.where(on, step, carried)
            following = torch.where(on, v[:, t], following)
            advantages[:, t] = torch.where(on, step, torch.zeros_like(step))
        return advantages, torch.where(mask, advantages + v, zero)


def rewards_per_token(score: Tensor, kl: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """PPO's rewards: -beta * kl on every token, the score on the last judged one.

    Args:
        score: of the whole completion [B]; NaN counts as 0.
        kl: per token [B, T], e.g. log-probability minus that of the reference.
        mask: bool [B, T].
        beta: weight of the penalty.

    Returns:
        [B, T], 0 outside the mask; no gradient.

    Source: Ouyang et al. 2022 (InstructGPT), eq. 2.
    """
    _same_shape(kl=kl, mask=mask)
    if score.shape != kl.shape[:1]:
        raise ShapeError(f"score expected [{kl.shape[0]}], got {tuple(score.shape)}. One per row.")
    with torch.no_grad():
        rewards = torch.where(mask, -beta * kl, torch.zeros_like(kl))
        place = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, place, -torch.ones_like(place)).amax(-1, keepdim=True)  # [B, 1]
        at_last = mask & (place == last)
        return rewards + at_last * score.nan_to_num(nan=0.0)[:, None].to(rewards.dtype)


def whiten(advantages: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over the judged tokens [B, T] of the whole batch, as PPO has it."""
    mean = masked_mean(advantages, mask)
    variance = masked_mean((advantages - mean).square(), mask)
    return torch.where(
        mask, (advantages - mean) * (variance + eps).rsqrt(), torch.zeros_like(advantages)
    )


# ---------------------------------------------------------------- log-probabilities


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token.

    Args:
        logits: [B, T, V]; entry t predicts token t (already shifted).
        tokens: [B, T].

    Returns:
        [B, T] float32 or more.
    """
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ShapeError(
            f"logits expected [B, T, V] for tokens [B, T], got {tuple(logits.shape)} and "
            f"{tuple(tokens.shape)}. Shift first: logits[:, :-1], tokens[:, 1:]."
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def sequence_log_probs(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each completion [B]: the sum over its judged tokens [B, T]."""
    _same_shape(log_probs=log_probs, mask=mask)
    return torch.where(mask, log_probs, torch.zeros_like(log_probs)).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the mask, a scalar; 0 where the mask is empty."""
    _same_shape(x=x, mask=mask)
    return torch.where(mask, x, torch.zeros_like(x)).sum() / mask.sum().clamp(min=1)


def kl_k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    r"""The k3 estimate of KL(policy || reference) per token, never below 0.

    .. math:: \frac{\pi_{ref}}{\pi} - \log\frac{\pi_{ref}}{\pi} - 1

    Args:
        log_probs, reference: of the tokens that the policy drew, same shape.

    Source: Schulman 2020, "Approximating KL divergence"; Shao et al. 2024, eq. 4.
    """
    log_ratio = reference - log_probs
    return torch.expm1(log_ratio) - log_ratio


# ---------------------------------------------------------------- losses


def clipped_policy_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = CLIP
) -> Tensor:
    r"""PPO's clipped surrogate, the mean over all judged tokens of the batch.

    .. math:: -\min\bigl(\rho A,\; \mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon)\,A\bigr),
        \qquad \rho = \pi / \pi_{old}

    Args:
        log_probs: of the policy [B, T], with gradient.
        old: of the policy that drew the tokens [B, T].
        advantages: [B, T], or [B, 1] for one per completion.
        mask: bool [B, T].
        clip: epsilon.

    Source: Schulman et al. 2017, eq. 7.
    """
    return masked_mean(_surrogate(log_probs, old, advantages, mask, clip), mask)


def grpo_loss(
    log_probs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reference: Tensor | None = None,
    beta: float = 0.0,
    clip: float = CLIP,
) -> Tensor:
    """GRPO: the clipped surrogate and beta * k3, mean over tokens, then over completions.

    Args:
        log_probs, old: [B, T] as in :func:`clipped_policy_loss`.
        advantages: one per completion [B], e.g. ``group_advantages(rewards).flatten()``; with
            :func:`leave_one_out_advantages` this is RLOO with clipping.
        mask: bool [B, T].
        reference: log-probabilities of the reference policy [B, T]; needed where beta > 0.
        beta: weight of the KL term.
        clip: epsilon.

    Source: Shao et al. 2024, eq. 3.
    """
    if advantages.shape != log_probs.shape[:1]:
        raise ShapeError(
            f"advantages expected [{log_probs.shape[0]}], got {tuple(advantages.shape)}. One per "
            "completion: flatten the groups."
        )
    loss = _surrogate(log_probs, old, advantages[:, None], mask, clip)
    if beta > 0:
        if reference is None:
            raise ShapeError("beta > 0 needs reference [B, T]. Pass it, or beta=0.")
        _same_shape(log_probs=log_probs, reference=reference)
        kl = kl_k3(_quiet(log_probs, mask), _quiet(reference, mask).detach())
        loss = loss + beta * kl
    per_row = torch.where(mask, loss, torch.zeros_like(loss)).sum(-1) / mask.sum(-1).clamp(min=1)
    return per_row.mean()


def clipped_value_loss(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, *, clip: float = CLIP
) -> Tensor:
    """PPO's value loss: half the squared error, of the value or of the value held within `clip` of
    the old one, whichever is worse. All [B, T].

    Source: Schulman et al. 2017, the authors' implementation.
    """
    _same_shape(values=values, old=old, returns=returns, mask=mask)
    v, before = _quiet(values, mask), _quiet(old, mask).detach()
    target = _quiet(returns, mask).detach()
    held = before + (v - before).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((v - target).square(), (held - target).square()), mask)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = DPO_BETA,
) -> Tensor:
    r"""DPO, the mean over pairs.

    .. math:: -\log\sigma\Bigl(\beta\bigl[\log\tfrac{\pi(y_w)}{\pi_{ref}(y_w)}
        - \log\tfrac{\pi(y_l)}{\pi_{ref}(y_l)}\bigr]\Bigr)

    Args:
        chosen, rejected: log-probabilities of whole completions [B], see
            :func:`sequence_log_probs`.
        reference_chosen, reference_rejected: the same under the reference policy [B].
        beta: strength of the pull to the reference.

    Source: Rafailov et al. 2023, eq. 7.
    """
    _same_shape(
        chosen=chosen,
        rejected=rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    margin = (chosen - reference_chosen.detach()) - (rejected - reference_rejected.detach())
    return -torch.nn.functional.logsigmoid(beta * margin).mean()


def _surrogate(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> Tensor:
    _same_shape(log_probs=log_probs, old=old, mask=mask)
    wanted = {log_probs.shape, (*log_probs.shape[:1], 1)}
    if advantages.shape not in wanted:
        raise ShapeError(
            f"advantages expected [B, T] or [B, 1] for {tuple(log_probs.shape)}, got "
            f"{tuple(advantages.shape)}. Add an axis: advantages[:, None]."
        )
    fixed = _quiet(advantages.detach().expand_as(log_probs), mask)
    ratio = (_quiet(log_probs, mask) - _quiet(old, mask).detach()).exp()
    return -torch.minimum(ratio * fixed, ratio.clamp(1 - clip, 1 + clip) * fixed)


def _quiet(x: Tensor, mask: Tensor) -> Tensor:
    """x with 0 outside the mask, before anything is computed of it: 0 * inf would be NaN."""
    return torch.where(mask, x, torch.zeros_like(x))


def _two_axes(x: Tensor, name: str, wanted: str) -> None:
    if x.ndim != 2:
        raise ShapeError(
            f"{name} expected {wanted}, got {tuple(x.shape)}. Group it: x.view(-1, group_size)."
        )


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{n} {s}" for n, s in shapes.items())
        raise ShapeError(f"shapes differ: {listed}. Give tensors of one shape.")
    mask = tensors.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        raise ShapeError(f"mask expected bool, got {mask.dtype}. Convert it: mask.bool().")
