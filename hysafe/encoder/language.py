"""Whether a text is English, the language that the text tower of `mini` has learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

__all__ = ["is_other", "p_english", "words"]

# Links, character references, mentions, tags, numbers and codes (`500mg`, `RTX4090`) are of no language.
NAMES = re.compile(r"https?://\S+|www\.\S+|&#?\w+;|[@#]\w+|(?<!\w)(?=\w{0,10}\d)\w{1,11}(?!\w)")
# Those widely written in Latin letters. Among all that py3langid knows are creoles and small languages that slang is
# taken for (`lol u r so dumb m8`).
LANGUAGES = (
    "af", "az", "bs", "ca", "cs", "cy", "da", "de", "en", "eo", "es", "et", "eu", "fi", "fr", "ga",
    "gl", "ha", "hr", "ht", "hu", "id", "is", "it", "la", "lt", "lv", "ms", "mt", "nl", "no", "pl",
    "pt", "ro", "sk", "sl", "so", "sq", "sr", "sv", "sw", "tl", "tr", "uz", "vi", "yo", "zu",
)  # fmt: skip
# What is written without spaces, such as base64, counts as several words.
WORD = re.compile(r"\w{1,24}|[^\w\s]")
# A text of fewer words may be a name.
FEWEST = 3
# Of another language: hardly English, and of words that the tower knows in parts; or of no language
# (reversed, enciphered): hardly a word that the tower knows whole.
OTHER = ((0.02, 1.2, FEWEST), (0.2, 1.8, 4))


def words(text: str) -> list[str]:
    """The words and signs of a text, without its links, mentions, tags and codes."""
    return WORD.findall(NAMES.sub(" ", text))


def p_english(text: str) -> float:
    """Probability in [0, 1] that a text in Latin letters is English rather than another of `LANGUAGES`."""
    return dict(_identifier().rank(NAMES.sub(" ", text)))["en"]


def is_other(text: str, found: Sequence[str], pieces: int) -> bool:
    """Whether a text is of another language than English, or of none.

    The thresholds were chosen so that less than one English text in 200 is taken for another
    (`benchmarks/languages.py`). Those that are, are short: names from elsewhere, slang.

    Args:
        found: its :func:`words`.
        pieces: into how many pieces the tower's tokenizer takes these apart.
    """
    spelt = sum(w[0].isalnum() for w in found)
    if spelt < FEWEST or pieces < OTHER[0][1] * len(found):
        return False
    p = p_english(text)
    return any(
        p < rare and pieces >= apart * len(found) and spelt >= fewest
        for rare, apart, fewest in OTHER
    )


@cache
def _identifier() -> LanguageIdentifier:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return identifier
