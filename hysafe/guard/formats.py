"""The answers of published guards, read and written through the taxonomy's crosswalk.

Reading gives a :class:`Reading`: what the guard said, the codes it named, the nodes behind them.
:func:`under_policy` turns that into an :class:`Answer` to a policy of ours, so that a published
guard stands in as the decoder; :func:`write` lets ours stand in for theirs. What is malformed is a
:class:`ParseError`, as everywhere.

=================  =======================================================  ================
format             answer                                                   codes
=================  =======================================================  ================
proguard           <think>, then <answer> with Request, Response, Category  C1S1 to C11S2
llavaguard         JSON rating, category, rationale                         O1 to O9
llama_guard_3, _4  ``safe``, or ``unsafe`` and a line of codes              S1 to S14
shieldgemma_2      JSON policy -> Yes, No or the probability of Yes         not in crosswalk
openai_moderation  JSON flagged, categories, category_scores                13 names
=================  =======================================================  ================

ShieldGemma 2 answers one Yes or No per policy, as a tensor; the JSON object here is those by policy
name. The taxonomy has no crosswalk to its three policies: it is read without nodes (and becomes
``review`` where it is unsafe) unless the caller gives a table.

Source of the formats: the deployment notes of ProGuard, the model cards of LlavaGuard, Llama Guard
3 and 4, the transformers documentation of ShieldGemma 2, OpenAI's API reference of moderations.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hysafe.errors import ConfigError
from hysafe.guard.protocol import (
    KEPT,
    MAX_NAME,
    MAX_RATIONALE,
    Answer,
    ParseError,
    ParseErrorKind,
    PromptPolicy,
    load_object,
    tidy,
)
from hysafe.taxonomy import Taxonomy, crosswalk
from hysafe.types import Rating

__all__ = ["FORMATS", "Format", "Reading", "Table", "read", "under_policy", "write"]

# Published guards reason at length before they answer.
MAX_TEXT = 65_536
# A Yes at least this probable is one.
YES = 0.5

# Node id -> codes of a format: for systems the taxonomy has no crosswalk to.
Table = Mapping[str, Sequence[str]]

SHIELDGEMMA_POLICIES = ("dangerous", "sexual", "violence")
LLAVAGUARD_NAMES = {
    "O1": "Hate, Humiliation, Harassment",
    "O2": "Violence, Harm, or Cruelty",
    "O3": "Sexual Content",
    "O4": "Nudity Content",
    "O5": "Criminal Planning",
    "O6": "Weapons or Substance Abuse",
    "O7": "Self-Harm",
    "O8": "Animal Cruelty",
    "O9": "Disasters or Emergencies",
}
LLAVAGUARD_NONE = "NA: None applying"


@dataclass(frozen=True)
class Reading:
    """What a published guard said.

    Args:
        rating: of the whole answer: unsafe where any part is.
        codes: categories it named, in its order.
        nodes: our nodes behind these codes, in the same order; () where nothing is known of them.
        novel: name of a category that the guard put in its own words.
        rationale: its reasons, one line.
        request, response: ratings of the parts, for guards that rate both.
    """

    rating: Rating
    codes: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    novel: str | None = None
    rationale: str = ""
    request: Rating | None = None
    response: Rating | None = None


class Format(NamedTuple):
    """A published format: its scheme in the crosswalk (None: there is none), reader and writer."""

    scheme: str | None
    read: Callable[[str, tuple[str, ...]], Reading | ParseError]
    write: Callable[[Answer, tuple[str, ...], tuple[str, ...]], str]


def read(
    text: object, name: str, taxonomy: Taxonomy, *, table: Table | None = None
) -> Reading | ParseError:
    """Read an answer of a published guard; total in `text`.

    Args:
        text: the guard's answer.
        name: its format, a key of ``FORMATS``.
        taxonomy: whose nodes to look up.
        table: node id -> codes, in place of the taxonomy's crosswalk.

    Raises:
        ConfigError: no such format.
    """
    form = _format(name)
    if not isinstance(text, str):
        return ParseError("type", f"expected text, got {type(text).__name__}")
    if len(text) > MAX_TEXT:
        return _fail("length", f"{len(text)} characters, at most {MAX_TEXT} are read", text)
    known = _codes(form, taxonomy, table)
    found = form.read(text, known)
    if isinstance(found, ParseError):
        return found
    nodes = dict.fromkeys(n for c in found.codes for n in _nodes(form, taxonomy, table, c))
    return replace(found, nodes=tuple(nodes))


def write(answer: Answer, name: str, taxonomy: Taxonomy, *, table: Table | None = None) -> str:
    """Our answer in a published format; one category becomes every code it maps to, or the first
    where the format holds one.

    Raises:
        ConfigError: no such format, or it cannot say this: none of them knows ``review``, only
            ProGuard takes a category in words, and some of our nodes have no counterpart.
    """
    form = _format(name)
    if answer.rating == "review":
        raise ConfigError(f"{name} has no word for review. Decide first: safe or unsafe.")
    codes: tuple[str, ...] = ()
    if answer.category is not None and (answer.rating == "unsafe" or name == "llavaguard"):
        codes = _of(form, taxonomy, table, answer.category)
    if answer.rating == "unsafe":
        if answer.category is not None and not codes and name == "proguard":
            answer = Answer("unsafe", None, taxonomy[answer.category].name, answer.rationale)
        elif not codes and name != "proguard":
            what = answer.novel or f"category {answer.category}"
            listed = form.scheme or table
            why = f"{name} has no code for {what!r}" if listed else (
                f"the taxonomy has no crosswalk to {name}")  # fmt: skip
            raise ConfigError(f"{why}. Give one: write(..., table={{node: [code]}}).")
    return form.write(answer, codes, _codes(form, taxonomy, table))


def under_policy(
    reading: Reading | ParseError,
    policy: PromptPolicy,
    taxonomy: Taxonomy,
    *,
    margins: Mapping[str, float] | None = None,
) -> Answer | ParseError:
    """A published guard's word as an answer to a policy of ours.

    One of its codes covers several nodes: of those that the policy forbids, the one with the
    greatest cone margin is taken, without margins the first. Where the policy allows all of them
    the item is safe; where it lists none, or nothing is known of the codes, the answer is
    ``review``.

    Args:
        reading: from :func:`read`.
        policy: ours.
        taxonomy: the tree of its nodes.
        margins: cone margin of the item by node id.
    """
    if isinstance(reading, ParseError):
        return reading
    rationale = reading.rationale[:MAX_RATIONALE].rstrip()
    if reading.rating == "safe":
        return Answer("safe", rationale=rationale)
    if reading.novel is not None:
        return Answer(reading.rating, None, reading.novel, rationale)
    entries = [policy.listed(taxonomy.path(n).ids) for n in reading.nodes]
    listed = list(dict.fromkeys(e for e in entries if e is not None))
    forbidden = [e.node for e in listed if not e.allowed]
    if forbidden:
        score = margins or {}
        best = max(forbidden, key=lambda n: score.get(n, -math.inf))
        return Answer("unsafe", best, rationale=rationale)
    if listed:
        return Answer("safe", listed[0].node, rationale=rationale)
    named = f"unsafe by {', '.join(reading.codes) or 'no category'}, not in this policy"
    return Answer("review", rationale=f"{named}. {rationale}"[:MAX_RATIONALE].rstrip())


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError(f"no format {name!r}. Known: {', '.join(FORMATS)}.")
    return FORMATS[name]


def _codes(form: Format, taxonomy: Taxonomy, table: Table | None) -> tuple[str, ...]:
    """Every code of a format that some node maps to."""
    if table is not None:
        return tuple(dict.fromkeys(c for codes in table.values() for c in codes))
    if form.scheme is None:
        return ()
    return tuple(dict.fromkeys(c for n in taxonomy for c in n.crosswalk.get(form.scheme, ())))


def _of(form: Format, taxonomy: Taxonomy, table: Table | None, node: str) -> tuple[str, ...]:
    if table is not None:
        line = reversed(taxonomy.path(node).ids)  # the nearest node above that has codes
        return next((tuple(table[n]) for n in line if n in table), ())
    return () if form.scheme is None else crosswalk.codes(taxonomy, node, form.scheme)


def _nodes(form: Format, taxonomy: Taxonomy, table: Table | None, code: str) -> tuple[str, ...]:
    if table is not None:
        return tuple(n for n, codes in table.items() if code in codes)
    if form.scheme is None:
        return ()
    return tuple(n.id for n in crosswalk.nodes(taxonomy, form.scheme, code))


def _fail(kind: ParseErrorKind, message: str, text: str) -> ParseError:
    return ParseError(kind, message, text[:KEPT])


# ---------------------------------------------------------------- ProGuard

_PROGUARD_CODE = re.compile(r"C\d+(?:S\d+)?")


def _read_proguard(text: str, known: tuple[str, ...]) -> Reading | ParseError:
    think, answer, body = text.strip().partition("<answer>")
    think = think.strip()
    framed = not think or (think.startswith("<think>") and think.endswith("</think>"))
    if not answer or not framed or not body.endswith("</answer>"):
        return _fail("format", "expected <think>..</think>, then <answer>..</answer>", text)
    parts: dict[str, str] = {}
    for line in filter(None, map(str.strip, body.removesuffix("</answer>").split("\n"))):
        key, colon, value = line.partition(":")
        if not colon or key in parts or key not in ("Request", "Response", "Category"):
            return _fail("format", "expected Request, perhaps Response, Category; each once", text)
        parts[key] = tidy(value)
    if not {"Request", "Category"} <= set(parts):
        return _fail("keys", "expected Request and Category", text)
    ratings: dict[str, Rating] = {"safe": "safe", "unsafe": "unsafe"}
    request, response = ratings.get(parts["Request"]), ratings.get(parts.get("Response", "safe"))
    if request is None or response is None:
        return _fail("rating", "Request and Response are safe or unsafe", text)
    rating: Rating = "unsafe" if "unsafe" in (request, response) else "safe"
    said = response if "Response" in parts else None
    category = parts["Category"]
    rationale = tidy(think.removeprefix("<think>").removesuffix("</think>"))
    if (category == "None") != (rating == "safe"):
        return _fail("category", f"{rating}, with the category {category[:KEPT]!r}", text)
    if rating == "safe":
        return Reading(rating, rationale=rationale, request=request, response=said)
    if not _PROGUARD_CODE.fullmatch(category):
        if not any(c.isalpha() for c in category) or len(category) > MAX_NAME:
            return _fail("novel", "the category is no name", text)
        return Reading(rating, (), (), category, rationale, request, said)
    # a main category (C8) stands for its sub-categories
    codes = tuple(c for c in known if c == category or c.startswith(f"{category}S"))
    if not codes:
        return _fail("category", f"{category!r} is not listed", text)
    return Reading(rating, codes, (), None, rationale, request, said)


def _write_proguard(answer: Answer, codes: tuple[str, ...], known: tuple[str, ...]) -> str:
    category = codes[0] if codes else _plain(answer.novel or "None")
    if answer.novel and (category == "None" or _PROGUARD_CODE.fullmatch(category)):
        raise ConfigError(f"proguard would read the name {category!r} as a code. Rename it.")
    return (
        f"<think>\n{_plain(answer.rationale)}\n</think>\n"
        f"<answer>\nRequest:{answer.rating}\nCategory:{category}\n</answer>"
    )


def _plain(text: str) -> str:
    """One line that closes no tag."""
    return tidy(text).replace("<", "(").replace(">", ")")


# ---------------------------------------------------------------- LlavaGuard


def _read_llavaguard(text: str, known: tuple[str, ...]) -> Reading | ParseError:
    data = load_object(text.strip(), MAX_TEXT)
    if isinstance(data, ParseError):
        return data
    if set(data) != {"rating", "category", "rationale"}:
        return _fail(
            "keys", f"expected rating, category, rationale; got {', '.join(data) or '-'}", text
        )
    if not all(isinstance(v, str) for v in data.values()):
        return _fail("type", "rating, category and rationale are texts", text)
    ratings: dict[str, Rating] = {"safe": "safe", "unsafe": "unsafe"}
    rating = ratings.get(data["rating"].lower())
    if rating is None:
        return _fail("rating", f"rating is {data['rating'][:KEPT]!r}", text)
    code = data["category"].split(":")[0].strip()
    if code == "NA" and rating == "unsafe":
        return _fail("category", "unsafe, with no category", text)
    if code != "NA" and code not in known:
        return _fail("category", f"{data['category'][:KEPT]!r} is not listed", text)
    codes = () if code == "NA" else (code,)
    return Reading(rating, codes, rationale=tidy(data["rationale"]))


def _write_llavaguard(answer: Answer, codes: tuple[str, ...], known: tuple[str, ...]) -> str:
    category = LLAVAGUARD_NONE
    if codes:
        name = LLAVAGUARD_NAMES.get(codes[0])
        category = f"{codes[0]}: {name}" if name else codes[0]
    body = {
        "rating": answer.rating.capitalize(),
        "category": category,
        "rationale": tidy(answer.rationale),
    }
    return json.dumps(body, ensure_ascii=False)


# ---------------------------------------------------------------- Llama Guard

_LLAMA_GUARD = re.compile(r"\s*(?:safe|unsafe[ \t]*\n\s*(?P<codes>S\d+(?:\s*,\s*S\d+)*))\s*")


def _read_llama_guard(text: str, known: tuple[str, ...]) -> Reading | ParseError:
    match = _LLAMA_GUARD.fullmatch(text)
    if match is None:
        return _fail("format", "expected `safe`, or `unsafe` and a line of codes", text)
    if match["codes"] is None:
        return Reading("safe")
    codes = tuple(dict.fromkeys(c.strip() for c in match["codes"].split(",")))
    unknown = [c for c in codes if c not in known]
    if unknown:
        return _fail("category", f"{', '.join(unknown)[:KEPT]} is not listed", text)
    return Reading("unsafe", codes)


def _write_llama_guard(answer: Answer, codes: tuple[str, ...], known: tuple[str, ...]) -> str:
    return "\n".join([answer.rating, ",".join(codes)] if codes else [answer.rating])


# ---------------------------------------------------------------- ShieldGemma 2


def _read_shieldgemma(text: str, known: tuple[str, ...]) -> Reading | ParseError:
    data = load_object(text, MAX_TEXT)
    if isinstance(data, ParseError):
        return data
    if not data:
        return _fail("keys", "no policy was judged", text)
    found: dict[str, float] = {}
    for policy, value in data.items():
        if policy not in (*SHIELDGEMMA_POLICIES, *known):
            return _fail("category", f"policy {policy[:KEPT]!r} is not listed", text)
        p = _probability(value)
        if p is None:
            return _fail("type", f"{policy}: expected Yes, No or a probability", text)
        found[policy] = p
    codes = tuple(k for k, p in sorted(found.items(), key=lambda kp: -kp[1]) if p >= YES)
    return Reading("unsafe" if codes else "safe", codes)


def _probability(value: Any) -> float | None:
    if isinstance(value, str):
        return {"yes": 1.0, "no": 0.0}.get(value.strip().lower())
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value <= 1 else None


def _write_shieldgemma(answer: Answer, codes: tuple[str, ...], known: tuple[str, ...]) -> str:
    policies = dict.fromkeys((*SHIELDGEMMA_POLICIES, *known))
    return json.dumps({p: float(p in codes) for p in policies})


# ---------------------------------------------------------------- OpenAI moderation


def _read_openai(text: str, known: tuple[str, ...]) -> Reading | ParseError:
    data = load_object(text, MAX_TEXT)
    if isinstance(data, ParseError):
        return data
    result: Any = data
    if "results" in data:
        results = data["results"]
        if not isinstance(results, list) or len(results) != 1:
            return _fail("format", "expected one result: one item a call", text)
        result = results[0]
    if not isinstance(result, dict) or not {"flagged", "categories"} <= set(result):
        return _fail("keys", "expected flagged and categories", text)
    flagged, categories = result["flagged"], result["categories"]
    scores = result.get("category_scores", {})
    if not isinstance(flagged, bool) or not isinstance(categories, dict):
        return _fail("type", "flagged is a boolean, categories an object", text)
    if not isinstance(scores, dict) or any(_probability(s) is None for s in scores.values()):
        return _fail("type", "category_scores are numbers in [0, 1]", text)
    for code, value in categories.items():
        if code not in known:
            return _fail("category", f"{code[:KEPT]!r} is not listed", text)
        if not isinstance(value, bool | None):  # null: not asked by the older models
            return _fail("type", f"{code} is {type(value).__name__}", text)
    codes = [c for c, value in categories.items() if value]
    if flagged != bool(codes):
        return _fail("format", "flagged contradicts the categories", text)
    codes.sort(key=lambda c: -float(scores.get(c, 0)))
    return Reading("unsafe" if flagged else "safe", tuple(codes))


def _write_openai(answer: Answer, codes: tuple[str, ...], known: tuple[str, ...]) -> str:
    result = {
        "flagged": bool(codes),
        "categories": {c: c in codes for c in known},
        "category_scores": {c: float(c in codes) for c in known},
    }
    return json.dumps({"results": [result]})


FORMATS: Mapping[str, Format] = {
    "proguard": Format("proguard", _read_proguard, _write_proguard),
    "llavaguard": Format("llavaguard", _read_llavaguard, _write_llavaguard),
    "llama_guard_3": Format("mlcommons", _read_llama_guard, _write_llama_guard),
    "llama_guard_4": Format("mlcommons", _read_llama_guard, _write_llama_guard),
    "shieldgemma_2": Format(None, _read_shieldgemma, _write_shieldgemma),
    "openai_moderation": Format("openai_omni", _read_openai, _write_openai),
}
