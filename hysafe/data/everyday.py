"""Sentences that mention things, made for training from WordNet's nouns and ``assets/everyday.yaml``."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hysafe.data.label_map import SAFE
from hysafe.data.wordnet import lemma, noun_edges
from hysafe.errors import ConfigError
from hysafe.types import Sample

__all__ = ["everyday_texts", "things"]

# Share of the sentences that are about dangerous things, and of these that are harmless.
DANGEROUS, MENTIONED = 0.3, 0.35
# Draws in a row that bring nothing new, before more are given up.
MOST_MISSES = 200


def everyday_texts(root: Path, count: int, *, seed: int = 0) -> list[Sample]:
    """Harmless sentences about everyday things, and sentences about dangerous ones.

    Each thing is drawn as often as the others of its kind, each kind and each frame equally often.

    Args:
        root: of the data, with ``wordnet/`` and ``images/``.
        count: sentences.

    Raises:
        ConfigError: a file is missing, or there are not so many different ones.
    """
    rng = random.Random(seed)
    table, nouns = _table(), things(root)
    kinds = sorted(nouns)
    groups = sorted(table["risky"])
    samples: dict[str, Sample] = {}
    misses = 0
    while len(samples) < count:
        if rng.random() < DANGEROUS:
            name = rng.choice(groups)
            group = table["risky"][name]
            about, risky = group["things"], rng.random() >= MENTIONED
            frames = group["frames" if risky else "harmless"]
            nodes = (group["node"],) if risky else (f"S.{group['node']}",)
        else:
            name = rng.choice(kinds)
            about, risky, nodes = nouns[name], False, (SAFE,)
            frames = table["harmless"][name if rng.random() < 0.5 else "any"]
        how = rng.choice(table["how"])
        text = _written(rng.choice(frames), how, *rng.sample(about, 2))
        text = text if rng.random() < 0.5 else _loose(text)
        if text in samples:
            if (misses := misses + 1) > MOST_MISSES:
                raise ConfigError(
                    f"everyday: only {len(samples)} sentences can be made. Ask for fewer."
                )
            continue
        misses = 0
        samples[text] = Sample(f"everyday-{len(samples)}", "everyday", text, None, nodes, not risky,
                               None, {"kind": name})  # fmt: skip
    return list(samples.values())


def things(root: Path) -> dict[str, list[str]]:
    """Nouns of everyday things by kind, sorted.

    The synsets of Tiny-ImageNet's classes are left out; their names may stand in longer ones.

    Raises:
        ConfigError: a file is missing.
    """
    below: dict[str, list[str]] = {}
    for child, parent in noun_edges(root / "wordnet" / "noun_edges.tsv"):
        below.setdefault(parent, []).append(child)
    classes = root / "images" / "tiny_imagenet" / "classes.csv"
    if not classes.is_file():
        raise ConfigError(
            f"no list of classes {classes}. Point HYSAFE_DATA at the development data."
        )
    with classes.open(encoding="utf-8") as lines:
        asked = {row["synset"] for row in csv.DictReader(lines)}
    table = _table()
    words = re.compile(rf"\b({'|'.join(table['words'])})s?\b")
    left_out = asked | {s for top in table["exclude"] for s in _all_below(below, top)}
    found = {}
    for kind, roots in table["kinds"].items():
        synsets = {s for top in roots for s in _all_below(below, top)} - left_out
        names = {lemma(s) for s in synsets if s.endswith(".01")}
        found[kind] = sorted(n for n in names if not words.search(n) and not re.search(r"\d", n))
    return found


@cache
def _table() -> dict[str, Any]:
    text = resources.files("hysafe.assets").joinpath("everyday.yaml").read_text("utf-8")
    return yaml.safe_load(text)  # type: ignore[no-any-return]


def _all_below(below: dict[str, list[str]], top: str) -> Iterator[str]:
    seen, waiting = {top}, [top]
    while waiting:
        yield (synset := waiting.pop())
        new = [s for s in below.get(synset, ()) if s not in seen]
        seen.update(new)
        waiting += new


def _written(frame: str, how: str, x: str, y: str) -> str:
    return frame.format(how=how, x=x, y=y, a=_with_article(x), b=_with_article(y))


def _with_article(noun: str) -> str:
    if noun.endswith("s") and not noun.endswith(("ss", "us")):
        return noun
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


def _loose(text: str) -> str:
    """As in chats and searches."""
    return text.rstrip("?.").lower()
