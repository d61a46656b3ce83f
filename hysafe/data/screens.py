"""Texts as OCR reads them off screens and signs, made of others for training.

What is said stands among buttons, times, prices and headings (``assets/screens.yaml``), which say nothing of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hysafe.data.everyday import things
from hysafe.data.joined import SPEAKERS, draw_part, part_groups
from hysafe.data.label_map import SAFE
from hysafe.types import Sample

__all__ = ["screen_texts"]

# Share of the harmless screens on which nothing is said.
BARE = 0.25
# Words of what is said, and of all: a tower reads 128 tokens.
MOST_SAID, MOST_WORDS = 70, 90
MONTHS = (
    "Jan", "February", "March", "Apr", "May", "June", "July", "August", "Sept", "October", "Nov", "December",
)  # fmt: skip
DAYS = ("Mon", "Tuesday", "Wed", "Thursday", "Fri", "Saturday", "Sun")
MISREAD = {"m": "rn", "l": "1", "o": "0", "i": "l", "w": "vv", "e": "c", "S": "5", "I": "l"}


def screen_texts(
    samples: Sequence[Sample], root: Path, count: int, *, seed: int = 0
) -> list[Sample]:
    """`count` texts among the rows of a screen or sign; half are harmless, in half one part is risky.

    Args:
        samples: texts to draw the parts from; those whose safety is unknown are left out.
        root: of the data, with ``wordnet/`` and ``images/``, for the things that rows mention.

    Returns:
        Samples whose nodes are those of the risky part, or of all parts where none is risky; none where
        one side has no text.

    Raises:
        ConfigError: a file of `root` is missing.
    """
    rng = random.Random(seed)
    short = [s for s in samples if len(str(s.text).split()) <= MOST_SAID]
    safe, risky = (part_groups(short, safe=s) for s in (True, False))
    if not safe or not risky:
        return []
    known = things(root)
    nouns = [known[kind] for kind in sorted(known)]
    made: list[Sample] = []
    for number in range(count):
        harmless = number % 2 == 0
        if harmless and rng.random() < BARE:
            said: list[Sample] = []
        else:
            said = [draw_part(safe, rng) for _ in range(rng.choice((0, 0, 1, 2)) + harmless)]
        bad = [] if harmless else [draw_part(risky, rng)]
        while said and sum(len(str(part.text).split()) for part in said + bad) > MOST_SAID:
            said.pop()
        nodes = tuple(dict.fromkeys(n for part in bad or said for n in part.nodes)) or (SAFE,)
        said += bad
        text = _read([str(part.text) for part in said], nouns, rng)
        made.append(Sample(f"screen-{number}", "screens", text, None, nodes, harmless))
    return made


@cache
def _layouts() -> Mapping[str, Sequence[str]]:
    with resources.files("hysafe.assets").joinpath("screens.yaml").open(encoding="utf-8") as file:
        table: dict[str, Any] = yaml.safe_load(file)
    return {str(k): [str(row) for row in rows] for k, rows in table["layouts"].items()}


def _read(said: Sequence[str], nouns: Sequence[Sequence[str]], rng: random.Random) -> str:
    """What is said among rows of one or two layouts, in the order of reading."""
    layouts = _layouts()
    rows = [
        row for kind in rng.sample(sorted(layouts), rng.choice((1, 1, 2))) for row in layouts[kind]
    ]
    few = rng.randint(1, 8) if said else rng.randint(5, 16)
    filled = [_filled(row, nouns, rng) for row in rng.sample(rows, min(few, len(rows)))]
    capitals = rng.random() < 0.2
    filled = [line.upper() if capitals and rng.random() < 0.7 else line for line in filled]
    lines = [(line, True) for line in filled]
    for part in said:
        words = part.split()
        if rng.random() < 0.25:  # columns: a row of something else is read into it
            cut = rng.randint(0, len(words))
            pieces = [" ".join(words[:cut]), " ".join(words[cut:])]
        else:
            pieces = [" ".join(words)]
        place = rng.randint(0, len(lines))
        shout = rng.random() < 0.15
        for piece in reversed([p.upper() if shout else p for p in pieces if p]):
            lines.insert(place, (piece, False))
            place = max(0, place - rng.randint(0, 1))
    # rows go, never what is said
    while sum(len(line.split()) for line, _ in lines) > MOST_WORDS:
        lines.remove(rng.choice([line for line in lines if line[1]]))
    text = " ".join(line for line, _ in lines)
    return _misread(text, rng) if rng.random() < 0.2 else text


def _filled(row: str, nouns: Sequence[Sequence[str]], rng: random.Random) -> str:
    thing = rng.choice(rng.choice(nouns))
    day = rng.choice((*DAYS, ""))
    values = {
        "n": lambda: str(rng.choice((rng.randint(1, 9), rng.randint(10, 99), rng.randint(100, 9999)))),
        "p": lambda: rng.choice(("{:.2f}", "{:.0f}", "${:.2f}", "{:.2f} EUR", "£{:.0f}")).format(rng.uniform(1, 300)),
        "t": lambda: f"{rng.randint(0, 23):02d}{rng.choice(':.')}{rng.randint(0, 59):02d}",
        "d": lambda: f"{day} {rng.randint(1, 28)} {rng.choice(MONTHS)}".strip(),
        "u": lambda: f"{thing.split()[-1].lower()}{rng.choice(('', '_', '.'))}{rng.randint(1, 99)}",
        "m": lambda: rng.choice(SPEAKERS).capitalize(),
        "x": lambda: thing,
        "X": lambda: thing.upper(),
        "w": lambda: f"{thing.replace(' ', '')}.example",
    }  # fmt: skip
    return re.sub(r"\{(\w)\}", lambda found: values[found[1]](), row)


def _misread(text: str, rng: random.Random) -> str:
    """One to three letters as another shape, or a lost space."""
    for _ in range(rng.randint(1, 3)):
        places = [i for i, c in enumerate(text) if c == " " or c in MISREAD]
        if places:
            at = rng.choice(places)
            text = text[:at] + MISREAD.get(text[at], "") + text[at + 1 :]
    return text
