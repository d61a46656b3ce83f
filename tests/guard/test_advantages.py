"""The maths of GRPO, RLOO, PPO and DPO against hand-made numbers, laws, and a bandit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hysafe.errors import ShapeError
from hysafe.guard.advantages import (
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
    token_log_probs,
    whiten,
)

laws = settings(max_examples=50, deadline=None, derandomize=True)
NAN, INF = math.nan, math.inf


def tensor(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- advantages


def test_group_advantages_by_hand() -> None:
    rewards = tensor([1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0])
    s = math.sqrt(1 / 3)
    expected = tensor([0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0])
    torch.testing.assert_close(group_advantages(rewards, std=False), expected)
    torch.testing.assert_close(group_advantages(rewards, eps=0.1), expected / (s + 0.1))


def test_leave_one_out_by_hand() -> None:
    found = leave_one_out_advantages(tensor([1.0, 0.0, 0.5]))
    torch.testing.assert_close(found, tensor([0.75, -0.75, 0.0]))


def test_a_reward_that_cannot_be_judged_counts_nowhere() -> None:
    rewards = tensor([1.0, NAN, 0.0], [NAN, NAN, 3.0], [NAN, NAN, NAN])
    centred = group_advantages(rewards, std=False)
    torch.testing.assert_close(centred, tensor([0.5, 0, -0.5], [0, 0, 0], [0, 0, 0]))
    assert group_advantages(rewards).isfinite().all()
    found = leave_one_out_advantages(rewards)
    torch.testing.assert_close(found, tensor([1.0, 0, -1.0], [0, 0, 0], [0, 0, 0]))


@laws
@given(st.integers(0, 10_000), st.integers(2, 8), st.floats(-5, 5))
def test_advantages_sum_to_zero_and_do_not_see_a_constant(seed: int, g: int, shift: float) -> None:
    rewards = rows(seed, 3, g)
    for advantages in (
        group_advantages, leave_one_out_advantages, lambda r: group_advantages(r, std=False)
    ):  # fmt: skip
        found = advantages(rewards)
        torch.testing.assert_close(found.sum(-1), torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(advantages(rewards + shift), found)
    loo = leave_one_out_advantages(rewards)
    torch.testing.assert_close(loo, group_advantages(rewards, std=False) * g / (g - 1))


def test_gae_by_hand() -> None:
    rewards, values = tensor([0.0, 0.0, 1.0]), tensor([0.5, 0.6, 0.8])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.5)
    d2, d1, d0 = 1 - 0.8, 0.9 * 0.8 - 0.6, 0.9 * 0.6 - 0.5
    expected = tensor([d0 + 0.45 * d1 + 0.45**2 * d2, d1 + 0.45 * d2, d2])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


@laws
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_sum_of_discounted_errors(seed: int, gamma: float, lam: float) -> None:
    rewards, values = rows(seed, 2, 6), rows(seed + 1, 2, 6)
    mask = rows(seed + 2, 2, 6) > -0.5
    advantages, returns = generalized_advantages(
        rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, INF), mask, gamma=gamma, lam=lam
    )
    for b in range(2):
        at = mask[b].nonzero().flatten().tolist()
        r, v = rewards[b, at].tolist(), [*values[b, at].tolist(), 0.0]
        errors = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(at))]
        for i, t in enumerate(at):
            total = sum((gamma * lam) ** k * e for k, e in enumerate(errors[i:]))
            assert float(advantages[b, t]) == pytest.approx(total, abs=1e-9)
            assert float(returns[b, t]) == pytest.approx(total + v[i], abs=1e-9)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_with_lambda_one_the_return_is_what_is_still_to_come() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    _, returns = generalized_advantages(tensor([1, 2, 4]), tensor([9, 9, 9]), mask, lam=1.0)
    torch.testing.assert_close(returns, tensor([7.0, 6.0, 4.0]))


def test_the_score_falls_on_the_last_judged_token() -> None:
    kl = tensor([0.1, 0.2, NAN], [0.3, 0.4, 0.5], [NAN, NAN, NAN])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    found = rewards_per_token(torch.tensor([1.0, NAN, 5.0]), kl, mask, beta=2.0)
    torch.testing.assert_close(found, tensor([-0.2, 0.6, 0], [-0.6, -0.8, -1.0], [0, 0, 0]))


def test_whitening_leaves_mean_zero_and_variance_one() -> None:
    x, mask = rows(0, 4, 5), rows(1, 4, 5) > 0
    found = whiten(x.masked_fill(~mask, NAN), mask)
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-9)
    assert float(found[mask].var(unbiased=False)) == pytest.approx(1, abs=1e-6)
    assert (found[~mask] == 0).all()


# ---------------------------------------------------------------- log-probabilities and KL


def test_token_log_probs_are_those_of_cross_entropy() -> None:
    logits, tokens = rows(0, 2, 3, 7), torch.tensor([[1, 2, 3], [6, 0, 5]])
    expected = -torch.nn.functional.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none")
    torch.testing.assert_close(token_log_probs(logits, tokens), expected)
    assert token_log_probs(logits.bfloat16(), tokens).dtype == torch.float32


@laws
@given(st.integers(0, 10_000), st.floats(0, 20))
def test_kl_is_never_negative_and_zero_for_equal_policies(seed: int, scale: float) -> None:
    a, b = (rows(s, 50).float() * scale for s in (seed, seed + 1))
    assert (kl_k3(a, b) >= 0).all()
    assert (kl_k3(a, a) == 0).all()
    for distance in (1e-8, 1e-6, 1e-4):  # where exp(x) - x - 1 rounds to less than 0
        assert (kl_k3(a, a + distance) >= 0).all()


def test_k3_is_the_kl_divergence_on_average() -> None:
    p, q = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * kl_k3(p.log(), q.log())).sum(), exact)


# ---------------------------------------------------------------- losses


def test_on_the_first_minibatch_the_ratio_is_one() -> None:
    log_probs = rows(0, 3, 4).requires_grad_()
    advantages, mask = rows(1, 3, 4), torch.ones(3, 4, dtype=torch.bool)
    loss = clipped_policy_loss(log_probs, log_probs.detach(), advantages, mask)
    loss.backward()
    torch.testing.assert_close(loss.detach(), -advantages.mean())
    torch.testing.assert_close(log_probs.grad, -advantages / 12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.1, 1.0, -1.1, True),
        (1.5, 1.0, -1.2, False),
        (0.5, 1.0, -0.5, True),
        (0.5, -1.0, 0.8, False),
        (1.5, -1.0, 1.5, True),
    ],
)
def test_the_clipped_ratio_by_hand(
    ratio: float, advantage: float, expected: float, slope: bool
) -> None:
    log_probs = tensor([math.log(ratio)]).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = clipped_policy_loss(log_probs, tensor([0.0]), tensor([advantage]), mask)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert bool(log_probs.grad.item()) == slope


def test_grpo_by_hand_counts_every_completion_alike() -> None:
    old = tensor([-1.0, -2.0], [-1.0, -9.0])
    mask = torch.tensor([[True, True], [True, False]])
    advantages = torch.tensor([1.0, -3.0], dtype=torch.float64)
    loss = grpo_loss(old, old, advantages, mask)
    assert loss.item() == pytest.approx((-1 + 3) / 2)
    reference = old + math.log(2)
    kl = 2 - math.log(2) - 1
    loss = grpo_loss(old, old, advantages, mask, reference=reference, beta=0.5)
    assert loss.item() == pytest.approx(1 + 0.5 * kl)


def test_value_loss_by_hand() -> None:
    values, old, returns = tensor([1.0, 0.9]), tensor([0.0, 1.0]), tensor([1.0, 0.0])
    mask = torch.ones(1, 2, dtype=torch.bool)
    # held at 0.2 the first is 0.8 off; the second moved less than the clip
    expected = 0.5 * (0.8**2 + 0.9**2) / 2
    assert clipped_value_loss(values, old, returns, mask).item() == pytest.approx(expected)


def test_dpo_by_hand() -> None:
    loss = dpo_loss(tensor(-1.0), tensor(-3.0), tensor(-2.0), tensor(-2.5), beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5 * 1.5)))
    same = dpo_loss(tensor(-1.0), tensor(-3.0), tensor(-1.0), tensor(-3.0))
    assert same.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e30])
def test_masked_tokens_have_no_value_and_no_gradient(junk: float) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    fixed = rows(1, 2, 3).masked_fill(~mask, junk)
    advantages = rows(2, 2, 3).masked_fill(~mask, junk)

    def losses(x: Tensor, y: Tensor, a: Tensor) -> list[Tensor]:
        row = torch.tensor([1.0, -1.0], dtype=torch.float64)
        return [
            clipped_policy_loss(x, y, a, mask),
            grpo_loss(x, y, row, mask, reference=y, beta=0.1),
            clipped_value_loss(x, y, a, mask),
            sequence_log_probs(x, mask).sum(),
            masked_mean(x, mask),
        ]

    x = rows(0, 2, 3).masked_fill(~mask, junk).requires_grad_()
    clean = rows(0, 2, 3).requires_grad_()
    found = losses(x, fixed, advantages)
    wanted = losses(clean, rows(1, 2, 3), rows(2, 2, 3))
    for loss, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, x)
        (clean_gradient,) = torch.autograd.grad(expected, clean)
        assert (gradient[~mask] == 0).all()
        torch.testing.assert_close(gradient, clean_gradient)
        assert gradient[mask].abs().max() > 0


def test_an_empty_mask_is_no_division_by_zero() -> None:
    none = torch.zeros(2, 3, dtype=torch.bool)
    x = rows(0, 2, 3)
    assert masked_mean(x, none) == 0
    assert grpo_loss(x, x, x[:, 0], none) == 0


def test_shapes_that_do_not_fit_are_named() -> None:
    x, mask = rows(0, 2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ShapeError, match="view"):
        group_advantages(x[0])
    with pytest.raises(ShapeError, match="flatten the groups"):
        grpo_loss(x, x, x, mask)
    with pytest.raises(ShapeError, match=r"advantages\[:, None\]"):
        clipped_policy_loss(x, x, x[:, 0], mask)
    with pytest.raises(ShapeError, match="mask expected bool"):
        masked_mean(x, mask.float())
    with pytest.raises(ShapeError, match="shapes differ"):
        generalized_advantages(x, x[:1], mask)
    with pytest.raises(ShapeError, match="One per row"):
        rewards_per_token(x[0], x, mask, beta=0.1)
    with pytest.raises(ShapeError, match="Shift first"):
        token_log_probs(rows(0, 2, 3, 4), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ShapeError, match="needs reference"):
        grpo_loss(x, x, x[:, 0], mask, beta=0.1)


# ---------------------------------------------------------------- a bandit

ARMS = torch.tensor([0.1, 0.2, 0.9, 0.4])
STEPS, GROUP = 60, 16


def play(update: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """Expected reward of a softmax policy before and after; arms are one-token completions."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    before = float((logits.detach().softmax(-1) * ARMS).sum())
    for _ in range(STEPS):
        old = logits.detach().clone()
        drawn = torch.multinomial(old.softmax(-1), GROUP, replacement=True, generator=generator)
        noise = 0.05 * torch.randn(GROUP, generator=generator)
        for _ in range(2):  # the second minibatch is off-policy
            optimizer.zero_grad()
            update(logits, old, drawn, ARMS[drawn] + noise).backward()
            optimizer.step()
    return before, float((logits.detach().softmax(-1) * ARMS).sum())


def log_probs(logits: Tensor, drawn: Tensor) -> Tensor:
    return token_log_probs(logits.expand(len(drawn), 1, -1), drawn[:, None])


ONE = torch.ones(GROUP, 1, dtype=torch.bool)


def by_group(advantages: Callable[[Tensor], Tensor], beta: float = 0.0) -> Callable[..., Tensor]:
    def update(logits: Tensor, old: Tensor, drawn: Tensor, rewards: Tensor) -> Tensor:
        a = advantages(rewards[None]).flatten()
        uniform = log_probs(torch.zeros(4), drawn)
        before = log_probs(old, drawn)
        now = log_probs(logits, drawn)
        return grpo_loss(now, before, a, ONE, reference=uniform, beta=beta)

    return update


def by_ppo() -> Callable[..., Tensor]:
    value = torch.zeros(1)  # the value head: a running mean

    def update(logits: Tensor, old: Tensor, drawn: Tensor, rewards: Tensor) -> Tensor:
        before = log_probs(old, drawn)
        kl = before - log_probs(torch.zeros(4), drawn)
        values = value.expand(GROUP, 1)
        shaped = rewards_per_token(rewards, kl, ONE, beta=0.01)
        advantages, returns = generalized_advantages(shaped, values, ONE)
        head = values.clone().requires_grad_()
        (slope,) = torch.autograd.grad(clipped_value_loss(head, values, returns, ONE), head)
        value.sub_(0.5 * slope.sum())
        return clipped_policy_loss(log_probs(logits, drawn), before, whiten(advantages, ONE), ONE)

    return update


def by_dpo(logits: Tensor, old: Tensor, drawn: Tensor, rewards: Tensor) -> Tensor:
    a, b = drawn.view(2, -1)
    better = rewards.view(2, -1)[0] > rewards.view(2, -1)[1]
    chosen, rejected = torch.where(better, a, b), torch.where(better, b, a)
    one = ONE[: len(a)]
    zero = torch.zeros(4)
    return dpo_loss(
        *(sequence_log_probs(log_probs(p, arm), one)
          for p, arm in ((logits, chosen), (logits, rejected), (zero, chosen), (zero, rejected))),
        beta=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "update",
    [
        by_group(group_advantages),
        by_group(lambda r: group_advantages(r, std=False)),
        by_group(leave_one_out_advantages),
        by_group(group_advantages, beta=0.01),
        by_ppo(),
        by_dpo,
    ],
    ids=["grpo", "grpo without std", "rloo", "grpo with kl", "ppo", "dpo"],
)
def test_on_a_bandit_the_expected_reward_rises(update: Callable[..., Tensor]) -> None:
    before, after = play(update)
    assert before == pytest.approx(0.4)
    assert after > 0.7
