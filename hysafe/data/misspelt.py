"""Texts that are not spelt as a dictionary has them, made of others for training: slips, and what is written to be overlooked."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from hysafe.data.joined import draw_part, part_groups
from hysafe.types import Sample

__all__ = ["misspell", "misspelt_texts"]

# A longer text keeps enough words that are spelt well.
MOST_WORDS = 60
SIGNS = {
    "a": "4@", "b": "8", "e": "3", "g": "9", "i": "1!", "l": "1|", "o": "0", "s": "5$", "t": "7+", "u": "v", "z": "2",
}  # fmt: skip
NEIGHBOURS = {
    "a": "sqz", "b": "vn", "c": "xv", "d": "sfe", "e": "wr", "f": "dg", "g": "fh", "h": "gj", "i": "uo", "j": "hk",
    "k": "jl", "l": "ko", "m": "n", "n": "bm", "o": "ip", "p": "o", "q": "w", "r": "et", "s": "ad", "t": "ry", "u": "yi",
    "v": "cb", "w": "qe", "x": "zc", "y": "tu", "z": "x",
}  # fmt: skip
MASKS = "*#-._"
BETWEEN = (" ", ".", "-", "_", "*")
VOWELS = "aeiou"
WORD = re.compile(r"[^\W\d_]{4,}")
# Those that carry little are changed less often.
COMMON = frozenset(
    (
        "about", "after", "also", "always", "and", "are", "because", "been", "before", "being", "could", "does",
        "doing", "each", "even", "every", "from", "going", "have", "here", "into", "just", "like", "made", "make",
        "many", "more", "most", "much", "need", "only", "other", "over", "please", "really", "should", "some",
        "such", "than", "that", "their", "them", "then", "there", "these", "they", "this", "those", "through",
        "very", "want", "were", "what", "when", "where", "which", "while", "will", "with", "would", "your",
    )
)  # fmt: skip


def misspelt_texts(samples: Sequence[Sample], count: int, *, seed: int = 0) -> list[Sample]:
    """`count` texts of others in another spelling; half are harmless, so that spelling says nothing of risk.

    Args:
        samples: texts to draw from; those whose safety is unknown, and long ones, are left out.

    Returns:
        Samples with the nodes of what they were made of; none where one side has no text.
    """
    rng = random.Random(seed)
    short = [s for s in samples if len(str(s.text).split()) <= MOST_WORDS]
    sides = [part_groups(short, safe=s) for s in (True, False)]
    if not all(sides):
        return []
    made = []
    for number in range(count):
        own = draw_part(sides[number % 2], rng)
        text = misspell(str(own.text), rng)
        made.append(replace(own, id=f"misspelt-{number}", source="misspelt", text=text, pair=None))
    return made


def misspell(text: str, rng: random.Random) -> str:
    """The text in one of several manners of spelling, at least one word of it where it has one of four letters."""
    return rng.choice(MANNERS)(text, rng)


def _words(text: str, rng: random.Random, share: float, change: Callable[[str], str]) -> str:
    """About `share` of the longer words changed, at least one; common ones a third as often."""
    found = list(WORD.finditer(text))
    if not found:
        return text
    odds = [share / 3 if m[0].lower() in COMMON else share for m in found]
    chosen = [m for m, p in zip(found, odds, strict=True) if rng.random() < p]
    for m in reversed(chosen or rng.choices(found, odds)):
        text = text[: m.start()] + change(m[0]) + text[m.end() :]
    return text


def _slips(text: str, rng: random.Random) -> str:
    def slip(word: str) -> str:
        i = rng.randrange(1, len(word) - 1)
        kind = rng.randrange(5)
        if kind == 0:
            return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        if kind == 1:
            return word[:i] + word[i + 1 :]
        if kind == 2:
            return word[:i] + word[i] + word[i:]
        other = NEIGHBOURS.get(word[i].lower(), "e") if kind == 3 else VOWELS
        if kind == 4:
            i = next((k for k in range(i, len(word)) if word[k].lower() in VOWELS), i)
        return word[:i] + rng.choice(other) + word[i + 1 :]

    return _words(text, rng, rng.uniform(0.1, 0.5), slip)


def _signs(text: str, rng: random.Random) -> str:
    share = rng.choice((0.4, 0.7, 1.0))

    def swapped(word: str) -> str:
        letters = [
            rng.choice(SIGNS[c.lower()]) if c.lower() in SIGNS and rng.random() < share else c
            for c in word
        ]
        return "".join(letters)

    return _words(text, rng, rng.choice((0.15, 0.3, 1.0)), swapped)


def _masked(text: str, rng: random.Random) -> str:
    mark = rng.choice(MASKS)

    def masked(word: str) -> str:
        hidden = {rng.randrange(1, len(word)) for _ in range(rng.randint(1, 2))}
        return "".join(mark if i in hidden else c for i, c in enumerate(word))

    return _words(text, rng, rng.uniform(0.05, 0.3), masked)


def _parted(text: str, rng: random.Random) -> str:
    mark = rng.choice(BETWEEN)

    def parted(word: str) -> str:
        i = rng.randrange(1, len(word))
        return word[:i] + mark + word[i:]

    return _words(text, rng, rng.uniform(0.1, 0.4), parted)


def _run_together(text: str, rng: random.Random) -> str:
    share = rng.choice((0.15, 0.3, 1.0))
    words = text.split() or [""]
    joints = [rng.random() < share for _ in words[1:]]
    if joints and not any(joints):
        joints[rng.randrange(len(joints))] = True
    return words[0] + "".join(
        w if joint else " " + w for w, joint in zip(words[1:], joints, strict=True)
    )


def _stretched(text: str, rng: random.Random) -> str:
    def stretched(word: str) -> str:
        i = rng.randrange(1, len(word))
        return word[:i] + word[i] * rng.randint(2, 4) + word[i + 1 :]

    return _words(text, rng, rng.uniform(0.1, 0.3), stretched)


def _clipped(text: str, rng: random.Random) -> str:
    def clipped(word: str) -> str:
        return word[0] + "".join(c for c in word[1:-1] if c.lower() not in VOWELS) + word[-1]

    return _words(text, rng, rng.uniform(0.1, 0.5), clipped)


def _bare(text: str, rng: random.Random) -> str:
    """Without punctuation, as hurried people type, and a slip."""
    bare = "".join(c for c in text.lower() if c.isalnum() or c.isspace())
    return _slips(bare, rng) if rng.random() < 0.5 else bare


def _twice(text: str, rng: random.Random) -> str:
    first, second = rng.sample((_slips, _signs, _masked, _parted, _clipped), 2)
    return second(first(text, rng), rng)


MANNERS: tuple[Callable[[str, random.Random], str], ...] = (
    _slips, _slips, _signs, _masked, _parted, _run_together, _stretched, _clipped, _bare, _twice,
)  # fmt: skip
