"""Longer texts made of short ones: screens of chat, posts of several sentences."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hysafe.types import Sample

__all__ = ["draw_part", "join_texts", "part_groups"]

SPEAKERS = (
    "anna", "tom", "me", "Mum", "jo", "Sam R.", "user", "Assistant", "admin", "kim_92", "Dad",
    "Support", "ali", "Priya", "mod", "guest 4", "Lena", "coach", "Unknown", "bro",
)  # fmt: skip
MOST_WORDS = 120


def join_texts(samples: Sequence[Sample], count: int, *, seed: int = 0) -> list[Sample]:
    """`count` texts of two to six parts; half are harmless, in half one part is risky.

    A text is as risky as its riskiest part. Without such examples a tower that has learnt single
    sentences overlooks the one that counts, or takes every long text for risky.

    Args:
        samples: texts to draw the parts from; those whose safety is unknown are left out.

    Returns:
        Samples whose nodes are those of the risky part, or of all parts where none is risky.
    """
    rng = random.Random(seed)
    safe, risky = (part_groups(samples, safe=s) for s in (True, False))
    if not safe or not risky:
        return []
    made: list[Sample] = []
    for number in range(count):
        parts = [draw_part(safe, rng) for _ in range(rng.randint(2, 6))]
        words = 0
        kept: list[Sample] = []
        for part in parts:
            words += len(str(part.text).split())
            if kept and words > MOST_WORDS:
                break
            kept.append(part)
        nodes = tuple(dict.fromkeys(n for part in kept for n in part.nodes))
        harmless = number % 2 == 0
        if not harmless:
            bad = draw_part(risky, rng)
            kept[rng.randrange(len(kept))] = bad
            nodes = bad.nodes
        text = _written([str(part.text) for part in kept], rng)
        made.append(Sample(f"joined-{number}", "joined", text, None, nodes, harmless))
    return made


def part_groups(samples: Sequence[Sample], *, safe: bool) -> list[list[Sample]]:
    """The harmless or the risky texts of each source."""
    groups: dict[str, list[Sample]] = {}
    for s in samples:
        if s.safe is safe:
            groups.setdefault(s.source, []).append(s)
    return list(groups.values())


def draw_part(groups: list[list[Sample]], rng: random.Random) -> Sample:
    """One text: every second one from the largest source, the others from any source alike."""
    group = max(groups, key=len) if rng.random() < 0.5 else rng.choice(groups)
    return rng.choice(group)


def _written(parts: list[str], rng: random.Random) -> str:
    """The parts as a paragraph, as lines, or as a conversation."""
    kind = rng.random()
    if kind < 0.4:
        return " ".join(parts)
    if kind < 0.6:
        return rng.choice((" / ", "\n", " - ")).join(parts)
    names = rng.sample(SPEAKERS, rng.randint(1, 3))
    lines = [f"{names[i % len(names)]}: {part}" for i, part in enumerate(parts)]
    return rng.choice(("\n", " ", " | ")).join(lines)
