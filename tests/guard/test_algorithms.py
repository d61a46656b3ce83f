"""Training algorithms on a toy: a decoder of six tokens whose logits stand in a table.

Outside the mask the toy returns NaN, so that every loss here shows that it looks at no padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hysafe.errors import ConfigError, ShapeError
from hysafe.guard.advantages import group_advantages, leave_one_out_advantages
from hysafe.guard.algorithms import (
    DPO,
    GRPO,
    PPO,
    RESPONSE_PPO,
    RLOO,
    Algorithm,
    Rollout,
    ValueHead,
    collect,
    minibatches,
    response_reward,
    sft_loss,
)
from hysafe.guard.policy import Completions, Decoder
from hysafe.guard.protocol import Answer, PromptPolicy, episode, write_answer
from hysafe.guard.rewards import pay_together, total_reward
from hysafe.taxonomy import Policy, load_taxonomy

NAN = math.nan
LETTERS = "abcde"  # token 0 ends an answer, and stands before its first token
V, LONGEST = 6, 3


class Toy(nn.Module):
    """Logits by prompt and last token."""

    def __init__(self, prompts: int = 2, *, seed: int | None = None) -> None:
        super().__init__()
        table = torch.zeros(prompts, V, V)
        if seed is not None:
            table = torch.randn(prompts, V, V, generator=torch.Generator().manual_seed(seed))
        self.table = nn.Parameter(table)
        self.body = nn.Parameter(torch.ones(()))  # behind the hidden states, not the logits

    def sample(
        self,
        prompts: Mapping[str, Any],
        n: int = 1,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Completions:
        ids = prompts["id"].repeat_interleave(n)
        last = torch.zeros_like(ids)
        running = torch.ones_like(ids, dtype=torch.bool)
        tokens, mask = [], []
        for _ in range(LONGEST):
            odds = (self.table[ids, last] / temperature).softmax(-1)
            drawn = torch.multinomial(odds, 1, generator=generator).squeeze(-1)
            last = torch.where(running, drawn, torch.zeros_like(drawn))
            tokens.append(last)
            mask.append(running)
            running = running & (last > 0)
        return self._completions(torch.stack(tokens, 1), torch.stack(mask, 1))

    def complete(self, prompts: Mapping[str, Any], texts: Sequence[str]) -> Completions:
        spelled = [[LETTERS.index(c) + 1 for c in text] + [0] for text in texts]
        width = max(map(len, spelled))
        tokens = torch.tensor([s + [0] * (width - len(s)) for s in spelled])
        mask = torch.tensor([[i < len(s) for i in range(width)] for s in spelled])
        return self._completions(tokens, mask)

    def log_probs(
        self, prompts: Mapping[str, Any], completions: Completions
    ) -> tuple[Tensor, Tensor]:
        tokens, mask, _ = completions
        last = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
        ids = prompts["id"][:, None].expand_as(last)
        found = self.table[ids, last].log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        hidden = self.body * torch.nn.functional.one_hot(last + V * ids, V * len(self.table))
        return torch.where(mask, found, NAN), torch.where(mask[..., None], hidden, NAN)

    def repeat(self, prompts: Mapping[str, Any], n: int) -> dict[str, Any]:
        return {"id": prompts["id"].repeat_interleave(n)}

    def _completions(self, tokens: Tensor, mask: Tensor) -> Completions:
        rows = [t[m & (t > 0)].tolist() for t, m in zip(tokens, mask, strict=True)]
        return Completions(tokens, mask, ["".join(LETTERS[i - 1] for i in r) for r in rows])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first_letter(
    prompts: Sequence[Any], completions: Sequence[Any], *, wanted: Sequence[str], **columns: Any
) -> list[float | None]:
    return [float(c[:1] == w) for c, w in zip(completions, wanted, strict=True)]


def brevity(
    prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
) -> list[float | None]:
    """Cannot judge an empty answer."""
    return [-float(len(c)) if c else None for c in completions]


PROMPTS = {"id": torch.tensor([0, 1])}
COLUMNS = {"wanted": ["a", "b"]}
TERMS = {"first": first_letter, "brief": brevity}
WEIGHTS = {"brief": 0.1}


def drawn(toy: Toy, *, group: int = 6, seed: int = 0, **more: Any) -> Rollout:
    return collect(
        toy, PROMPTS, COLUMNS, TERMS, WEIGHTS, group=group, generator=seeded(seed), **more
    )


def given(toy: Toy, texts: list[list[str]], rewards: list[list[float]], **more: Any) -> Rollout:
    """A rollout of written answers, one list per prompt."""
    group = len(texts[0])
    prompts = {"id": torch.arange(len(texts)).repeat_interleave(group)}
    completions = toy.complete(prompts, [t for row in texts for t in row])
    old = toy.log_probs(prompts, completions)[0].detach()
    return Rollout(prompts, completions, old, more.pop("reference", old), torch.tensor(rewards), {},
                   values=torch.zeros_like(old), **more)  # fmt: skip


def gradient(
    algorithm: Algorithm, toy: Toy, rollout: Rollout, head: nn.Module | None = None
) -> Tensor:
    loss, _ = algorithm.loss(toy, rollout, head)
    toy.zero_grad()
    loss.backward()
    return torch.zeros_like(toy.table) if toy.table.grad is None else toy.table.grad.clone()


def judged_head(seed: int = 0) -> ValueHead:
    torch.manual_seed(seed)
    head = ValueHead(2 * V)
    nn.init.normal_(head.outer.weight)
    return head


ALGORITHMS = [
    GRPO(beta=0.1),
    GRPO(std=False),
    RLOO(beta=0.1),
    PPO(beta=0.1),
    DPO(beta=0.5),
]
NAMES = ["grpo", "grpo without std", "rloo", "ppo", "dpo"]
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=NAMES)


def test_the_toy_is_a_decoder() -> None:
    toy: Decoder = Toy(seed=0)
    completions = toy.sample(PROMPTS, 4, generator=seeded(0))
    written = toy.complete(toy.repeat(PROMPTS, 4), completions.texts)
    ended = completions.mask.sum(-1) < LONGEST
    assert torch.equal(completions.mask.sum(-1)[ended], written.mask.sum(-1)[ended])
    assert completions.texts == written.texts


# ---------------------------------------------------------------- SFT


def test_sft_is_the_mean_over_tokens_of_all_answers() -> None:
    toy = Toy()
    with torch.no_grad():
        toy.table[1, 0, 0] = math.log(5)  # prompt 1 ends at once with probability 1/2
    loss = sft_loss(toy, PROMPTS, ["ab", ""])  # three tokens of 1/6, one of 1/2
    assert loss.item() == pytest.approx((3 * math.log(6) + math.log(2)) / 4)
    loss.backward()
    assert toy.table.grad is not None
    assert toy.table.grad.isfinite().all()
    assert toy.table.grad[0, 0, 1] < 0  # "a" becomes likelier where it was the answer,
    assert toy.table.grad[1, 0, 1] > 0  # and not at the other prompt


# ---------------------------------------------------------------- collect


def test_collect_scores_every_completion_once_and_as_total_reward_does() -> None:
    calls = []

    def counting(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        calls.append((list(prompts), list(completions), columns))
        return brevity(prompts, completions, **columns)

    toy, other, head = Toy(), Toy(seed=1), judged_head()
    terms = {"first": first_letter, "brief": counting}
    rollout = collect(
        toy, PROMPTS, COLUMNS, terms, WEIGHTS,
        group=8, generator=seeded(0), reference=other, value_head=head,
    )  # fmt: skip
    assert len(calls) == 1
    texts = rollout.completions.texts
    assert calls[0][1] == texts
    assert len(calls[0][0]) == 16
    assert calls[0][2] == {"wanted": ["a"] * 8 + ["b"] * 8}
    sums = total_reward(TERMS, WEIGHTS)([""] * 16, texts, wanted=["a"] * 8 + ["b"] * 8)
    expected = torch.tensor([NAN if s is None else s for s in sums]).view(2, 8)
    torch.testing.assert_close(rollout.rewards, expected, equal_nan=True)
    assert "" in texts  # where brevity cannot judge
    empty = torch.tensor([t == "" for t in texts]).view(2, 8)
    assert torch.equal(rollout.terms["brief"].isnan(), empty)
    assert torch.equal(rollout.prompts["id"], torch.arange(2).repeat_interleave(8))
    on = rollout.completions.mask
    for found, by in ((rollout.old, toy), (rollout.reference, other)):
        assert found is not None
        assert not found.requires_grad
        wanted, hidden = by.log_probs(rollout.prompts, rollout.completions)
        torch.testing.assert_close(found[on], wanted[on])
    assert rollout.values is not None
    torch.testing.assert_close(rollout.values[on], head(hidden)[on])
    assert not rollout.values.requires_grad


def test_an_answer_that_no_term_can_judge_has_no_reward() -> None:
    rollout = collect(
        Toy(), PROMPTS, COLUMNS, {"brief": brevity}, group=20, generator=seeded(0)
    )  # fmt: skip
    empty = torch.tensor([t == "" for t in rollout.completions.texts])
    assert empty.any()
    assert torch.equal(rollout.rewards.isnan().flatten(), empty)
    assert not rollout.mask[empty].any()
    assert torch.equal(rollout.mask[~empty], rollout.completions.mask[~empty])


def test_policy_twins_are_paid_together() -> None:
    def verdict(
        prompts: Sequence[Any], completions: Sequence[Any], *, wanted: Sequence[str], **columns: Any
    ) -> list[float | None]:
        return first_letter(prompts, completions, wanted=wanted)

    toy = Toy(3)
    with torch.no_grad():
        toy.table[:, 0, 1:3] = 3.0  # "a" or "b", as likely under either policy
    columns = {
        "wanted": ["a", "b", "a"],
        "policy": ["forbidden", "allowed", "forbidden"],
        "pair": ["p", "p", None],
    }
    rollout = collect(
        toy, {"id": torch.tensor([0, 1, 2])}, columns, {"rating": pay_together(verdict)},
        group=32, generator=seeded(0),
    )  # fmt: skip
    first = [t[:1] for t in rollout.completions.texts]
    for i in range(32):
        both = float(first[i] == "a" and first[32 + i] == "b")
        assert rollout.rewards[0, i] == rollout.rewards[1, i] == both
        assert rollout.rewards[2, i] == float(first[64 + i] == "a")
    # half of each side is right, a quarter of both together
    assert 0 < rollout.rewards[0].sum() < sum(f == "a" for f in first[:32])
    for part in minibatches(GRPO().prepare(rollout), 1, seeded(0)):
        assert part.rewards.shape == (1, 32)


# ---------------------------------------------------------------- minibatches


@every_algorithm
def test_minibatches_hold_every_group_once_with_the_advantages_of_the_rollout(
    algorithm: Algorithm,
) -> None:
    toy = Toy(5, seed=0)
    columns = {"wanted": list("abcde")}
    rollout = algorithm.prepare(
        collect(toy, {"id": torch.arange(5)}, columns, TERMS, WEIGHTS, group=4,
                generator=seeded(0), reference=Toy(5), value_head=ValueHead(5 * V))
    )  # fmt: skip
    parts = list(minibatches(rollout, 2, seeded(3)))
    assert [len(p.rewards) for p in parts] == [2, 2, 1]
    order = torch.cat([p.prompts["id"] for p in parts])
    assert order.tolist() != rollout.prompts["id"].tolist()
    assert torch.equal(order.view(5, 4)[:, :1].expand(5, 4), order.view(5, 4))
    place = order.argsort(stable=True)
    assert torch.equal(order[place], rollout.prompts["id"])
    texts = [t for p in parts for t in p.completions.texts]
    assert [texts[i] for i in place.tolist()] == rollout.completions.texts
    for name in ("old", "reference", "values", "advantages", "returns"):
        whole = getattr(rollout, name)
        if whole is None:
            assert all(getattr(p, name) is None for p in parts)
        else:
            joined = torch.cat([getattr(p, name) for p in parts])[place]
            torch.testing.assert_close(joined, whole, equal_nan=True)
    rewards = torch.cat([p.rewards for p in parts])[place.view(5, 4)[:, 0] // 4]
    torch.testing.assert_close(rewards, rollout.rewards)
    again = torch.cat([p.prompts["id"] for p in minibatches(rollout, 2, seeded(3))])
    assert torch.equal(order, again)


# ---------------------------------------------------------------- the maths


@pytest.mark.parametrize("std", [True, False])
def test_on_the_first_minibatch_grpo_is_reinforce_with_group_advantages(std: bool) -> None:
    toy = Toy(seed=0)
    rollout = drawn(toy)
    found = gradient(GRPO(std=std), toy, GRPO(std=std).prepare(rollout))
    advantages = group_advantages(rollout.rewards, std=std).flatten()
    toy.zero_grad()
    log_probs, _ = toy.log_probs(rollout.prompts, rollout.completions)
    rows = [lp[m].mean() for lp, m in zip(log_probs, rollout.mask, strict=True)]
    (-(advantages * torch.stack(rows)).mean()).backward()
    assert toy.table.grad is not None
    assert found.abs().max() > 0.01
    torch.testing.assert_close(found, toy.table.grad)


def test_on_the_first_minibatch_rloo_is_reinforce_on_whole_answers_with_the_kl_taken_off() -> None:
    toy, reference = Toy(seed=0), Toy(seed=1)
    rollout = drawn(toy, reference=reference)
    found = gradient(RLOO(beta=0.3), toy, RLOO(beta=0.3).prepare(rollout))
    toy.zero_grad()
    on = rollout.mask

    def whole(decoder: Toy) -> Tensor:
        log_probs, _ = decoder.log_probs(rollout.prompts, rollout.completions)
        return torch.stack([lp[m].sum() for lp, m in zip(log_probs, on, strict=True)])

    kl = (whole(toy) - whole(reference)).detach().view(2, -1)
    advantages = leave_one_out_advantages(rollout.rewards - 0.3 * kl).flatten()
    (-(advantages * whole(toy)).mean()).backward()
    assert toy.table.grad is not None
    assert found.abs().max() > 0.01
    torch.testing.assert_close(found, toy.table.grad)


def test_ppo_by_hand() -> None:
    toy = Toy(1)
    # two tokens, log-probability log 1/6 each; the reference gives 1/3 to each
    rollout = given(toy, [["a"]], [[-2.0]], reference=torch.full((1, 2), math.log(1 / 3)))
    rollout = replace(rollout, values=torch.tensor([[0.5, 1.0]]))
    algorithm = PPO(beta=0.1, gamma=0.9, lam=0.5, whiten=False, value_weight=0.25)
    kl = math.log(1 / 6) - math.log(1 / 3)
    r = [-0.1 * kl, -2.0 - 0.1 * kl]
    second = r[1] - 1.0
    first = r[0] + 0.9 * 1.0 - 0.5 + 0.9 * 0.5 * second
    prepared = algorithm.prepare(rollout)
    assert prepared.advantages is not None
    assert prepared.returns is not None
    torch.testing.assert_close(prepared.advantages, torch.tensor([[first, second]]))
    torch.testing.assert_close(prepared.returns, torch.tensor([[first + 0.5, second + 1.0]]))

    loss, logged = algorithm.loss(toy, prepared, ValueHead(V))  # a new head says 0
    held = [0.5 - 0.2, 1.0 - 0.2]  # 0 is nearer to the returns, and beyond the clip
    off = [(h - x) ** 2 for x, h in zip((first + 0.5, second + 1.0), held, strict=True)]
    assert logged["policy_loss"] == pytest.approx(-(first + second) / 2)
    assert logged["value_loss"] == pytest.approx(0.5 * sum(off) / 2)
    assert loss.item() == pytest.approx(logged["policy_loss"] + 0.25 * logged["value_loss"])
    assert loss.requires_grad


def test_ppo_whitens_over_the_whole_rollout() -> None:
    toy = Toy(seed=0)
    rollout = PPO(beta=0.0).prepare(drawn(toy, value_head=judged_head()))
    assert rollout.advantages is not None
    on = rollout.advantages[rollout.mask]
    assert float(on.mean()) == pytest.approx(0, abs=1e-5)
    assert float(on.var(unbiased=False)) == pytest.approx(1, abs=1e-4)


def test_the_value_loss_trains_the_head_and_leaves_the_decoder_alone() -> None:
    toy, head = Toy(seed=0), judged_head()
    algorithm = PPO(beta=0.0, value_weight=1.0)
    rollout = algorithm.prepare(drawn(toy, value_head=head))
    assert rollout.advantages is not None
    rollout = replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    assert (gradient(algorithm, toy, rollout, head) == 0).all()
    assert toy.body.grad is None
    assert head.outer.weight.grad is not None
    assert head.outer.weight.grad.abs().max() > 0


def test_values_learn_what_a_prompt_is_worth() -> None:
    toy, head = Toy(seed=0), ValueHead(2 * V)
    algorithm = PPO(beta=0.0, lam=1.0, clip=0.0, value_clip=10.0)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)

    def worth(
        prompts: Sequence[Any], completions: Sequence[Any], *, wanted: Sequence[str], **columns: Any
    ) -> list[float | None]:
        return [1.0 if w == "a" else -2.0 for w in wanted]

    for step in range(60):
        rollout = algorithm.prepare(
            collect(toy, PROMPTS, COLUMNS, {"worth": worth}, group=4,
                    generator=seeded(step), value_head=head)
        )  # fmt: skip
        optimizer.zero_grad()
        algorithm.loss(toy, rollout, head)[0].backward()
        optimizer.step()
    assert rollout.values is not None
    for prompt, wanted in ((0, 1.0), (1, -2.0)):
        seen = rollout.values[rollout.prompts["id"] == prompt][:, 0]
        assert float(seen.mean()) == pytest.approx(wanted, abs=0.2)


def test_dpo_pairs_the_best_with_the_worst_where_they_differ_enough() -> None:
    rewards = torch.tensor(
        [
            [0.0, 1.0, NAN, -1.0],
            [0.5, 0.5, 0.5, 0.5],
            [NAN, 0.9, NAN, NAN],
            [NAN] * 4,
            [0.0, NAN, 0.3, 0.2],
        ]
    )
    chosen, rejected = DPO().pairs(rewards)
    assert chosen.tolist() == [1, 18]
    assert rejected.tolist() == [3, 16]
    assert DPO(margin=0.5).pairs(rewards)[0].tolist() == [1]


def test_dpo_by_hand() -> None:
    toy, reference = Toy(1), Toy(1)
    rollout = given(toy, [["a", "b", "cc"]], [[1.0, 0.5, 0.0]])
    with torch.no_grad():
        toy.table[0, 0, 1] = math.log(5)  # "a": from 1/6 to 1/2; "c": from 1/6 to 1/10
    loss, logged = DPO(beta=0.5).loss(toy, rollout)
    moved = math.log(3) - math.log(0.6)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5 * moved)))
    assert logged["accuracy"] == 1
    assert logged["margin"] == pytest.approx(0.5 * moved)
    assert logged["pairs"] == 1
    grad = gradient(DPO(), reference, rollout)  # at the reference: towards a, away from c
    assert grad[0, 0, 1] < 0 < grad[0, 0, 3]
    assert grad[0, 0, 2] == 0


def test_dpo_without_a_pair_is_a_loss_that_changes_nothing() -> None:
    toy = Toy(1)
    rollout = given(toy, [["a", "b"]], [[1.0, 1.0]])
    loss, logged = DPO().loss(toy, rollout)
    loss.backward()
    assert loss.item() == 0
    assert toy.table.grad is None
    assert logged["pairs"] == 0


@every_algorithm
def test_tokens_outside_the_mask_have_no_gradient(algorithm: Algorithm) -> None:
    toy, head = Toy(seed=0), judged_head()
    rollout = drawn(toy, reference=Toy(seed=1), value_head=head)
    expected = gradient(algorithm, toy, algorithm.prepare(rollout), head)

    def wider(x: Tensor | None, fill: float) -> Tensor | None:
        return None if x is None else torch.nn.functional.pad(x, (0, 2), value=fill)

    tokens, mask, texts = rollout.completions
    padded = replace(
        rollout,
        completions=Completions(wider(tokens, 5), wider(mask, False), texts),
        old=wider(rollout.old, -math.inf),
        reference=wider(rollout.reference, NAN),
        values=wider(rollout.values, math.inf),
    )
    found = gradient(algorithm, toy, algorithm.prepare(padded), head)
    assert found.isfinite().all()
    assert found.abs().max() > 1e-4
    torch.testing.assert_close(found, expected)


@every_algorithm
def test_completions_without_a_reward_have_no_gradient(algorithm: Algorithm) -> None:
    toy, head = Toy(3, seed=0), ValueHead(3 * V)
    columns = {"wanted": ["a", "b", "c"]}
    rollout = collect(
        toy, {"id": torch.arange(3)}, columns, TERMS, WEIGHTS, group=6,
        generator=seeded(0), reference=Toy(3, seed=1), value_head=head,
    )  # fmt: skip
    none = replace(rollout, rewards=torch.full_like(rollout.rewards, NAN))
    assert (gradient(algorithm, toy, algorithm.prepare(none), head) == 0).all()

    rewards = rollout.rewards.clone()
    rewards[1] = NAN
    without = algorithm.prepare(replace(rollout, rewards=rewards))
    found = gradient(algorithm, toy, without, head)
    assert (found[1] == 0).all()
    # the group counts in no mean either
    rest = algorithm.prepare(rollout.groups(torch.tensor([0, 2])))
    assert found.abs().max() > 1e-4
    torch.testing.assert_close(found, gradient(algorithm, toy, rest, head))


# ---------------------------------------------------------------- the KL


@every_algorithm
def test_the_logged_kl_is_never_negative_and_zero_at_the_reference(algorithm: Algorithm) -> None:
    toy, head = Toy(seed=0), judged_head()
    for seed in range(5):
        other = Toy(seed=seed)
        rollout = algorithm.prepare(drawn(toy, seed=seed, reference=other, value_head=head))
        _, logged = algorithm.loss(toy, rollout, head)
        assert logged["kl"] >= 0
        assert (logged["kl"] == 0) == (seed == 0)


@pytest.mark.parametrize(
    "algorithm", [GRPO(beta=1.0), RLOO(beta=1.0), PPO(beta=1.0)], ids=["grpo", "rloo", "ppo"]
)
def test_where_all_answers_pay_alike_the_kl_draws_back_to_the_reference(
    algorithm: Algorithm,
) -> None:
    toy, reference, head = Toy(), Toy(seed=1), ValueHead(2 * V)
    with torch.no_grad():
        reference.table *= 3

    def distance() -> float:
        p, q = (t.table[:, 0].detach().log_softmax(-1) for t in (toy, reference))
        return float((p.exp() * (p - q)).sum(-1).mean())

    def alike(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        return [1.0 for _ in completions]

    before = distance()
    optimizer = torch.optim.Adam([toy.table, *head.parameters()], lr=0.1)
    for step in range(60):
        rollout = algorithm.prepare(
            collect(toy, PROMPTS, COLUMNS, {"alike": alike}, group=32,
                    generator=seeded(step), reference=reference, value_head=head)
        )  # fmt: skip
        optimizer.zero_grad()
        algorithm.loss(toy, rollout, head)[0].backward()
        optimizer.step()
    assert distance() < before / 3


# ---------------------------------------------------------------- a bandit


@pytest.mark.parametrize(
    "algorithm",
    [GRPO(), GRPO(std=False, beta=0.02), RLOO(beta=0.02), PPO(beta=0.02), DPO()],
    ids=NAMES,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_on_a_bandit_the_reward_rises(algorithm: Algorithm, seed: int) -> None:
    toy, reference, head = Toy(), Toy(), ValueHead(2 * V)

    def chance() -> Tensor:
        odds = toy.table[:, 0].detach().softmax(-1)
        return torch.stack([odds[0, 1], odds[1, 2]])

    optimizer = torch.optim.Adam([toy.table, *head.parameters()], lr=0.1)
    generator = seeded(seed)
    for _ in range(25):
        rollout = collect(
            toy, PROMPTS, COLUMNS, {"first": first_letter}, group=8, generator=generator,
            reference=reference if algorithm.needs_reference else None,
            value_head=head if algorithm.needs_values else None,
        )  # fmt: skip
        prepared = algorithm.prepare(rollout)
        for _ in range(2):  # the later parts are off-policy
            for part in minibatches(prepared, 1, generator):
                optimizer.zero_grad()
                algorithm.loss(toy, part, head)[0].backward()
                optimizer.step()
    assert chance().min() > 0.6  # from 1/6, at both prompts
    rewards = drawn(toy, group=50, seed=seed).terms["first"]
    assert float(rewards.mean()) > 0.6


# ---------------------------------------------------------------- logs


def test_what_is_logged_by_hand() -> None:
    toy = Toy(3)
    rewards = [[1.0, 0.0], [0.5, 0.5], [0.2, NAN]]
    rollout = given(toy, [["a", "bcd"], ["", "a"], ["a", "b"]], rewards)
    rollout = replace(
        rollout,
        reference=rollout.old + math.log(2),
        terms={"one": torch.tensor([[1.0, NAN], [0.0, NAN], [NAN, NAN]]),
               "none": torch.full((3, 2), NAN)},
    )  # fmt: skip
    algorithm = GRPO()
    _, logged = algorithm.loss(toy, algorithm.prepare(rollout))
    assert logged["reward"] == pytest.approx((1.0 + 0.0 + 0.5 + 0.5 + 0.2) / 5)
    assert logged["reward/one"] == pytest.approx(0.5)
    assert "reward/none" not in logged
    assert logged["length"] == pytest.approx((2 + 4 + 1 + 2 + 2 + 2) / 6)
    assert logged["unjudged"] == pytest.approx(1 / 6)
    assert logged["no_signal"] == pytest.approx(2 / 3)
    assert logged["entropy"] == pytest.approx(math.log(6))
    assert logged["kl"] == pytest.approx(2 - math.log(2) - 1)
    assert logged["clipped"] == 0


def test_the_share_that_the_clip_stops() -> None:
    toy = Toy(1)
    rollout = given(toy, [["a", "b"]], [[1.0, 0.0]])  # two tokens each
    with torch.no_grad():
        toy.table[0, 0, 1] = 2.0  # "a" likelier, "b" less likely, both beyond the clip
    for algorithm, share in ((GRPO(), 0.5), (RLOO(beta=0.0), 1.0)):
        _, logged = algorithm.loss(toy, algorithm.prepare(rollout))
        assert logged["clipped"] == pytest.approx(share)
    with torch.no_grad():
        toy.table[0, 0, 1] = -2.0  # moved against the rewards: nothing is held back
    for algorithm in (GRPO(), RLOO(beta=0.0)):
        _, logged = algorithm.loss(toy, algorithm.prepare(rollout))
        assert logged["clipped"] == 0


@every_algorithm
def test_every_algorithm_logs_plain_numbers(algorithm: Algorithm) -> None:
    toy, head = Toy(seed=0), judged_head()
    rollout = algorithm.prepare(drawn(toy, reference=Toy(), value_head=head))
    _, logged = algorithm.loss(toy, rollout, head)
    assert all(type(x) is float and math.isfinite(x) for x in logged.values()), logged
    wanted = {"reward", "reward/first", "reward/brief", "kl", "entropy", "length", "no_signal"}
    assert wanted <= set(logged)


# ---------------------------------------------------------------- response-based reward


def test_the_response_based_reward_is_one_for_the_right_verdict() -> None:
    taxonomy = load_taxonomy()
    shown = episode(
        PromptPolicy.from_view(Policy().apply(taxonomy)), taxonomy, "6.1", seed=0, size=4
    )
    answers = [
        write_answer(Answer(*a), shown.policy)
        for a in (("unsafe", "6.1"), ("safe", None), ("review", None))
    ]
    answers = [*answers, "unsafe!", answers[0]]
    columns = {"policy": [shown.policy.to_json()] * 5, "rating": ["unsafe"] * 4 + [None]}
    assert response_reward()([""] * 5, answers, **columns, bank=[]) == [1, 0, 0, 0, None]
    assert response_reward(wrong=-1.0)([""] * 5, answers, **columns) == [1, -1, -1, -1, None]
    assert RESPONSE_PPO.beta == 0.1
    assert RESPONSE_PPO.needs_reference


# ---------------------------------------------------------------- errors


def test_what_is_missing_is_named() -> None:
    toy = Toy()
    rollout = drawn(toy)
    with pytest.raises(ConfigError, match="are no terms"):
        collect(toy, PROMPTS, COLUMNS, TERMS, {"breif": 1.0}, group=2)
    with pytest.raises(ConfigError, match="temperature"):
        drawn(toy, temperature=0.0)
    with pytest.raises(ShapeError, match="column wanted has 3 values for 2 prompts"):
        collect(toy, PROMPTS, {"wanted": ["a"] * 3}, TERMS, group=2)
    with pytest.raises(ConfigError, match="prepare"):
        GRPO().loss(toy, rollout)
    for algorithm in (GRPO(), RLOO(beta=0.0), DPO()):
        with pytest.raises(ConfigError, match="group >= 2"):
            algorithm.prepare(drawn(toy, group=1))
    for algorithm in (GRPO(beta=0.1), RLOO(), PPO(), DPO()):
        assert algorithm.needs_reference
        with pytest.raises(ConfigError, match="reference"):
            algorithm.prepare(rollout)
    assert PPO().needs_values
    with pytest.raises(ConfigError, match="value head"):
        PPO(beta=0.0).prepare(rollout)
    prepared = PPO(beta=0.0).prepare(drawn(toy, value_head=judged_head()))
    with pytest.raises(ConfigError, match="value head"):
        PPO(beta=0.0).loss(toy, prepared)
    with pytest.raises(ConfigError, match="beta is -1"):
        GRPO(beta=-1)
    with pytest.raises(ConfigError, match="lam is 1.5"):
        PPO(lam=1.5)
    with pytest.raises(ConfigError, match="Take 1 or more"):
        next(minibatches(rollout, 0))
