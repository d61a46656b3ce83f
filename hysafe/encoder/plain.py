"""Letters as a text tower knows them: what is written in look-alikes, and how many letters are left that it cannot read."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container
from functools import lru_cache
from itertools import product

__all__ = ["foreign_share", "plain"]

# Letters of other scripts that look like Latin ones (a part of the confusables of Unicode TS 39), and
# small capitals.
_ALIKE = {
    "АВЕКМНОРСТУХЅІЈԌԚԜҮ": "ABEKMHOPCTYXSIJGQWY",
    "авекмнорстухѕіјһԁԛԝѵҽӏґғ": "abekmhopctyxsijhdqwvelrf",
    "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ": "ABEZHIKMNOPTYX",
    "αβεικνορτυχωϲϳ": "abeikvoptuxwcj",
    "օոսհցԁյ": "onuhgdj",
    "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘꞯʀꜱᴛᴜᴠᴡʏᴢɑɡɩıȷſƖ": "abcdefghijklmnopqrstuvwyzagiijsl",
}
LOOK_ALIKES = {
    ord(a): b for alike, latin in _ALIKE.items() for a, b in zip(alike, latin, strict=True)
}
# White letters in black circles and squares have no letter in Unicode; tags are letters that no screen shows.
ORNAMENTED = {first + i: chr(65 + i) for first in (0x1F150, 0x1F170) for i in range(26)}
TAGS = {0xE0000 + code: chr(code) for code in range(0x20, 0x7F)}
FLAG = "\U0001f3f4"  # its tags name a country
WORD = re.compile(r"[^\W\d_]+")
# Letters with the same mark between them.
APART = re.compile(r"(?<![^\W_])[^\W\d_](?:([ .\-_*·•|/\\~])[^\W\d_])(?:\1[^\W\d_])+(?![^\W_])")
# From six letters on they are put together though they make no word that is known.
LONG = 6
# Longer than a word is but for a few.
RUN = re.compile(r"[A-Za-z]{24,}")
LONGEST = 20
# A word with digits or signs among its letters, but no number, ordinal, unit or version.
DISGUISED = re.compile(
    r"(?<![\w@#/.$])(?=[a-z]*[\d@$!|+])[a-z\d$][a-z\d@$!|+]+[a-z\d$](?![\w/])", re.I
)
COUNTED = re.compile(r"\d+[a-z]{1,3}|[a-z]{1,3}\d+", re.I)
SIGNS = {
    "0": "o", "1": "il", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g",
    "@": "a", "$": "s", "!": "i", "|": "il", "+": "t",
}  # fmt: skip
MOST_DOUBTS = 4
LATIN = frozenset("abcdefghijklmnopqrstuvwxyzßæœþðªºłøđħı")
# Of less than three letters most words that a tower knows are parts of others.
SHORT = frozenset(
    (
        "a", "i", "am", "an", "as", "at", "be", "by", "do", "go", "he", "if", "in", "is", "it", "me", "my", "no", "of",
        "on", "or", "so", "to", "up", "us", "we",
    )
)  # fmt: skip
# Kinds of characters that may be a letter in another form.
FORMS = ("Lu", "Ll", "Lo", "Lm", "Nd", "So")


def plain(text: str, words: Container[str] = ()) -> str:
    """The text in plain letters; one that is in plain letters is returned as it is.

    Full-width, mathematical and circled letters become letters; letters of another script that look like Latin
    ones do, in words that have Latin letters too and in texts that have no other; letters with a mark between
    them are put together, long runs of words without spaces taken apart; signs that stand for letters are read
    where that makes one of `words`.

    Args:
        words: lower-case words that a tower knows whole.
    """
    if not text.isascii():
        text = text.translate(ORNAMENTED if FLAG in text else ORNAMENTED | TAGS)
        text = "".join(map(_compatible, text))
        text = _folded(text)
    text = APART.sub(lambda m: _together(m[0], words), text)
    text = RUN.sub(lambda m: m[0] if m[0].lower() in words else _in_words(m[0], words), text)
    return DISGUISED.sub(lambda m: _undisguised(m[0], words), text)


def foreign_share(text: str) -> float:
    """Share of the letters of a text that are not Latin; 0 for a text without letters."""
    if text.isascii():
        return 0.0
    letters = [c for c in unicodedata.normalize("NFKD", text).lower() if c.isalpha()]
    return sum(c not in LATIN for c in letters) / len(letters) if letters else 0.0


def _folded(text: str) -> str:
    """Look-alikes as Latin letters, but for words that may be of their own script."""
    words = {w: w.translate(LOOK_ALIKES) for w in set(WORD.findall(text))}
    other = any(foreign_share(latin) for latin in words.values())

    def fold(match: re.Match[str]) -> str:
        latin = words[match[0]]
        stays = foreign_share(latin) > 0 or (other and foreign_share(match[0]) == 1)
        return match[0] if stays else latin

    return WORD.sub(fold, text)


@lru_cache(4096)
def _compatible(letter: str) -> str:
    """The letters or the digit that one in another form stands for; superscripts and signs stay."""
    if "\uff01" <= letter <= "\uff5e":  # full width
        return chr(ord(letter) - 0xFEE0)
    kind, form = unicodedata.category(letter), unicodedata.normalize("NFKC", letter)
    stands_for_it = form.isascii() and form.isalnum() and (len(form) == 1 or kind[0] == "L")
    return form if kind in FORMS and stands_for_it else letter


def _together(spaced: str, known: Container[str]) -> str:
    word = spaced[::2]
    if word.lower() in known:
        return word
    return _in_words(word, known) if len(word) >= LONG else spaced


def _in_words(letters: str, known: Container[str]) -> str:
    """Letters without spaces as words that are known, long ones before short ones; as they are where they make none."""
    # score and beginning of the last word of the best parting of the first letters
    best: list[tuple[int, int] | None] = [(0, 0)]
    for end in range(1, len(letters) + 1):
        found = []
        for start in range(max(0, end - LONGEST), end):
            before, word = best[start], letters[start:end].lower()
            if before is not None and word in (SHORT if len(word) < 3 else known):
                found.append((before[0] + len(word) ** 2, start))
        best.append(max(found) if found else None)
    words, end = [], len(letters)
    while end:
        last = best[end]
        if last is None:
            return letters
        words.append(letters[last[1] : end])
        end = last[1]
    return " ".join(reversed(words))


def _undisguised(word: str, known: Container[str]) -> str:
    signs = sum(c in SIGNS for c in word)
    if signs == 0 or 3 * signs > 2 * len(word) or COUNTED.fullmatch(word):
        return word
    read = [SIGNS.get(c, c) for c in word.lower()]
    if sum(len(letters) > 1 for letters in read) > MOST_DOUBTS:
        return word
    return next((w for w in map("".join, product(*read)) if w in known), word)
