"""Questions to a guard: verdicts, names, how novel an item looks to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hysafe.guard.model import NOVEL, UNSAFE, Evidence, GuardModel, PolicySpace
from hysafe.guard.policy import Completions
from hysafe.guard.protocol import Answer, ParseError, PromptPolicy, parse_answer

__all__ = ["answers_of", "chosen_names", "names_of", "novelty_of", "places_of"]

# Prompts at once.
ROWS = 64
# Weight of a phrase's agreement beside the guard's log-probability of it: on validation items whose
# category is hidden, the more the better up to 80 (benchmarks/naming.py), where it is nearly the rule alone.
AGREEMENT = 80.0


def answers_of(
    guard: GuardModel,
    items: Sequence[Evidence],
    policies: Sequence[PromptPolicy],
    space: PolicySpace,
) -> list[Answer | ParseError]:
    """The likeliest answer to each item; a text that does not parse stands as its error."""
    found: list[Answer | ParseError] = []
    for start in range(0, len(items), ROWS):
        part = slice(start, start + ROWS)
        prompts = guard.prompts(items[part], policies[part], space)
        texts = guard.sample(prompts, temperature=0.0).texts
        found += [parse_answer(t, p) for t, p in zip(texts, policies[part], strict=True)]
    return found


def names_of(
    guard: GuardModel,
    items: Sequence[Evidence],
    policies: Sequence[PromptPolicy],
    space: PolicySpace,
    *,
    draws: int = 0,
    choose: Callable[[Evidence, Sequence[str]], int] | None = None,
    seed: int = 0,
) -> list[str]:
    """The name the guard gives each item when it must name it.

    Args:
        draws: names drawn beside the likeliest one, for `choose`.
        choose: index of the best of several names of an item.
    """
    generator = torch.Generator().manual_seed(seed)
    before, guard.rationale = guard.rationale, False
    found: list[str] = []
    try:
        for start in range(0, len(items), ROWS):
            part = slice(start, start + ROWS)
            prompts = guard.prompts(items[part], policies[part], space)
            best = guard.sample(prompts, temperature=0.0, begin=(UNSAFE, NOVEL)).texts
            names = [[_name(t, p)] for t, p in zip(best, policies[part], strict=True)]
            if draws and choose is not None:
                more = guard.sample(
                    prompts, draws, generator=generator, begin=(UNSAFE, NOVEL)
                ).texts
                for i, (item, policy) in enumerate(zip(items[part], policies[part], strict=True)):
                    drawn = [_name(t, policy) for t in more[i * draws : (i + 1) * draws]]
                    options = [n for n in dict.fromkeys([*names[i], *drawn]) if n]
                    names[i] = [options[choose(item, options)] if options else ""]
            found += [n[0] for n in names]
    finally:
        guard.rationale = before
    return found


def _name(text: str, policy: PromptPolicy) -> str:
    answer = parse_answer(text, policy)
    return (answer.novel or "") if isinstance(answer, Answer) else ""


def chosen_names(
    guard: GuardModel,
    items: Sequence[Evidence],
    policies: Sequence[PromptPolicy],
    space: PolicySpace,
    *,
    agreement: float = AGREEMENT,
) -> list[str]:
    """The phrase of each prompt that the guard and the phrases near to the item like best together;
    "" where there is none to point at.

    Args:
        agreement: weight of the phrase's agreement (``Evidence.phrase_scores``) beside the guard's
            log-probability.
    """
    found: list[str] = []
    for start in range(0, len(items), ROWS):
        part = slice(start, start + ROWS)
        prompts = guard.prompts(items[part], policies[part], space)
        likely = guard.pointer_log_probs(prompts)
        for item, phrases, row in zip(items[part], prompts["phrases"], likely, strict=True):
            if not phrases or item.phrase_scores is None:
                found.append("")
                continue
            scores = dict(zip(item.phrases, item.phrase_scores, strict=True))
            both = [
                float(p) + agreement * float(scores[n]) for n, p in zip(phrases, row, strict=False)
            ]
            found.append(phrases[int(np.argmax(both))])
    return found


def places_of(
    guard: GuardModel,
    items: Sequence[Evidence],
    policies: Sequence[PromptPolicy],
    space: PolicySpace,
) -> list[str | None]:
    """The forbidden category that each item is put into if it must be put into one; None where none
    is listed."""
    found: list[str | None] = []
    for start in range(0, len(items), ROWS):
        part = slice(start, start + ROWS)
        prompts = guard.prompts(items[part], policies[part], space)
        likely, best = guard.slot_log_probs(prompts).max(-1)
        found += [
            policy.renaming.node(ids[k]) if np.isfinite(p) else None
            for policy, ids, p, k in zip(
                policies[part], prompts["slot_ids"], likely.tolist(), best.tolist(), strict=True
            )
        ]
    return found


def novelty_of(
    guard: GuardModel,
    items: Sequence[Evidence],
    policies: Sequence[PromptPolicy],
    space: PolicySpace,
) -> np.ndarray:
    """Probability [N] that the guard calls an item risky and novel."""
    found = []
    s = guard.tokens
    with torch.no_grad():
        for start in range(0, len(items), ROWS):
            part = slice(start, start + ROWS)
            prompts = guard.prompts(items[part], policies[part], space)
            n = len(prompts["input_ids"])
            tokens = torch.tensor([[s[UNSAFE], s[NOVEL]]]).repeat(n, 1)
            asked = Completions(tokens, torch.ones(n, 2, dtype=torch.bool), [""] * n)
            found.append(guard.log_probs(prompts, asked)[0].sum(-1).exp().numpy())
    return np.concatenate(found) if found else np.empty(0)
