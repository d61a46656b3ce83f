"""One grammar for the guard's prompt, its answer and the parser.

The prompt lists a policy: any subset of nodes, in any order, under any ids. The answer is one JSON
object, ``{"rating": ..., "category": id | null, "rationale": ...}`` or, for a risk that no listed
category holds, ``{"rating": ..., "novel": "short name", "rationale": ...}``.

Text from outside (item, OCR) stands in the prompt as a JSON string on one line with every ``<``
escaped: it can neither open a section nor spell a special token. What cannot be parsed is a
:class:`ParseError`, a value rated ``review``.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from hysafe.errors import ConfigError
from hysafe.taxonomy import Node, PolicyView, Taxonomy
from hysafe.types import NoveltyScores, Rating

__all__ = [
    "Answer",
    "AnswerGrammar",
    "Bank",
    "Context",
    "Entry",
    "Episode",
    "GrammarState",
    "ParseError",
    "PromptPolicy",
    "Renaming",
    "TokenConstraint",
    "episode",
    "load_object",
    "parse_answer",
    "render_prompt",
    "split_bank",
    "tidy",
    "twins",
    "write_answer",
]

# Longest answer that is looked at; a full rationale and name stay below it, escaped as they may be.
MAX_ANSWER = 8192
MAX_NAME = 80
MAX_RATIONALE = 600
MAX_ID = 32
# Synonym banks hold phrases of 2 to 6 words; a name as long as the longest is still a name.
MAX_NAME_WORDS = 6
# Characters of an unreadable answer that are kept with the error.
KEPT = 200
# Share of every synonym bank kept away from training.
HELD_OUT = 0.1
# How often an episode hides the siblings of the hidden category as well.
SIBLING_RATE = 0.3

RATINGS: tuple[Rating, ...] = get_args(Rating)
_ORDER: tuple[Rating, ...] = ("safe", "unsafe", "review")

ParseErrorKind = Literal[
    "type", "length", "json", "duplicate", "keys", "rating", "category", "novel", "format"
]


# ---------------------------------------------------------------- policy in the prompt


@dataclass(frozen=True)
class Renaming:
    """Node ids and the ids that stand for them in a prompt, one to one."""

    prompt_ids: Mapping[str, str]
    _nodes: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for prompt_id in self.prompt_ids.values():
            plain = prompt_id.isprintable() and not set(prompt_id) & set(' "\\[]<')
            if not plain or not 0 < len(prompt_id) <= MAX_ID:
                raise ConfigError(
                    f"id {prompt_id!r} cannot stand in a prompt: 1 to {MAX_ID} printable "
                    "characters without space, quote, backslash, bracket or <. Rename it: "
                    "Renaming.draw(nodes, rng)."
                )
        nodes = {v: k for k, v in self.prompt_ids.items()}
        if len(nodes) != len(self.prompt_ids):
            raise ConfigError("two nodes have one id in the prompt. Give every node its own.")
        object.__setattr__(self, "_nodes", nodes)

    @classmethod
    def identity(cls, nodes: Iterable[str]) -> Renaming:
        """Every node under its own id."""
        return cls({n: n for n in nodes})

    @classmethod
    def draw(cls, nodes: Iterable[str], rng: random.Random) -> Renaming:
        """New ids in one of several manners (O3, C2S1, 17, KQ), in no order."""
        nodes = tuple(nodes)
        letter = rng.choice("OSCRKP")
        numbers = rng.sample(range(2 * len(nodes)), len(nodes))
        style = rng.randrange(4 if 2 * len(nodes) <= 26 * 26 else 3)
        if style == 0:
            ids = [f"{letter}{n + 1}" for n in numbers]
        elif style == 1:
            ids = [f"{letter}{n // 4 + 1}S{n % 4 + 1}" for n in numbers]
        elif style == 2:
            ids = [str(n + 1) for n in numbers]
        else:
            ids = [chr(65 + n // 26) + chr(65 + n % 26) for n in numbers]
        return cls(dict(zip(nodes, ids, strict=True)))

    def prompt_id(self, node: str) -> str:
        """Id of a node in the prompt.

        Raises:
            ConfigError: the prompt does not list it.
        """
        if node not in self.prompt_ids:
            raise ConfigError(
                f"node {node!r} is not in the prompt. Listed: {', '.join(self.prompt_ids)}."
            )
        return self.prompt_ids[node]

    def node(self, prompt_id: str) -> str | None:
        """The node behind an id of the prompt; None where there is none."""
        return self._nodes.get(prompt_id)


@dataclass(frozen=True)
class Entry:
    """One category of a policy as the prompt lists it.

    Args:
        node: its id in the taxonomy.
        path: names from the domain down to it.
        definition: shown where it has no bullets.
        should_not, can: the bullets.
        allowed: listed as permitted: an item it holds is safe.
    """

    node: str
    path: tuple[str, ...]
    definition: str = ""
    should_not: tuple[str, ...] = ()
    can: tuple[str, ...] = ()
    allowed: bool = False

    @property
    def name(self) -> str:
        return self.path[-1]


@dataclass(frozen=True)
class PromptPolicy:
    """The policy of one prompt: entries in their order, and the ids they go by."""

    entries: tuple[Entry, ...]
    renaming: Renaming

    def __post_init__(self) -> None:
        listed = [e.node for e in self.entries]
        if len(set(listed)) != len(listed) or set(listed) != set(self.renaming.prompt_ids):
            raise ConfigError(
                f"a policy lists every node once and renames exactly these; got {listed} and "
                f"{list(self.renaming.prompt_ids)}. Build it with PromptPolicy.of(entries)."
            )

    @classmethod
    def of(cls, entries: Iterable[Entry], renaming: Renaming | None = None) -> PromptPolicy:
        """Entries under a renaming, which may hold more; without one, under their own ids."""
        entries = tuple(entries)
        nodes = [e.node for e in entries]
        if renaming is None:
            return cls(entries, Renaming.identity(nodes))
        return cls(entries, Renaming({n: renaming.prompt_id(n) for n in nodes}))

    @classmethod
    def from_view(
        cls, view: PolicyView, nodes: Iterable[str] | None = None, *, numbered: bool = False
    ) -> PromptPolicy:
        """A policy view as a prompt lists it.

        Args:
            view: a policy applied to a taxonomy.
            nodes: what to list; by default all categories, and concepts whose status is not that
                of their category.
            numbered: under the ids 1, 2, ... instead of their own.
        """
        tree = view.taxonomy
        if nodes is None:
            nodes = [
                n.id
                for n in tree
                if n.kind == "category"
                or (n.kind == "concept" and view.active(n.id) != view.active(str(n.parent)))
            ]
        nodes = list(nodes)
        ids = Renaming({n: str(i) for i, n in enumerate(nodes, 1)}) if numbered else None
        return cls.of((_entry(tree, n, allowed=not view.active(n)) for n in nodes), ids)

    def __contains__(self, node: object) -> bool:
        return any(e.node == node for e in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def entry(self, node: str) -> Entry | None:
        """The entry of exactly this node."""
        return next((e for e in self.entries if e.node == node), None)

    def listed(self, path: Sequence[str]) -> Entry | None:
        """The deepest entry on a path of node ids (domain first); None where none is listed."""
        return next((e for n in reversed(path) if (e := self.entry(n))), None)

    def to_json(self) -> str:
        """One line of JSON: a column that survives any data set format."""
        entries = [asdict(e) for e in self.entries]
        data = {"entries": entries, "ids": dict(self.renaming.prompt_ids)}
        return json.dumps(data, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> PromptPolicy:
        """Back from :meth:`to_json`."""
        data = json.loads(text)
        entries = tuple(
            Entry(
                e["node"],
                tuple(e["path"]),
                e["definition"],
                tuple(e["should_not"]),
                tuple(e["can"]),
                e["allowed"],
            )
            for e in data["entries"]
        )
        return cls(entries, Renaming(data["ids"]))


@dataclass(frozen=True)
class Context:
    """What the encoder found, for the prompt.

    Args:
        margins: cone margin in radians by node id, nearest first. Nodes that the policy does not
            list are left out of the prompt, so that a hidden category is not given away.
        novelty: p-values; they must have been computed under the policy of the prompt.
        ocr: text found in the picture.
    """

    margins: Mapping[str, float] = field(default_factory=dict)
    novelty: NoveltyScores = field(default_factory=lambda: NoveltyScores(None, None))
    ocr: str | None = None


def render_prompt(
    policy: PromptPolicy,
    *,
    text: str | None = None,
    image: bool = False,
    context: Context | None = None,
    max_bullets: int | None = None,
    image_token: str = "<image>",
    max_chars: int = 2000,
) -> str:
    """The prompt: policy, context, item, and the word ANSWER.

    Args:
        policy: what is forbidden and what is allowed.
        text: the item's text, cut after `max_chars` characters.
        image: whether the item has a picture; it stands as `image_token`.
        context: retrieved nodes, novelty and OCR text; lines without content are left out.
        max_bullets: bullets per list; None for all, 0 for names only.
        image_token: the placeholder the decoder's processor knows.

    Raises:
        ConfigError: neither text nor picture.
    """
    if text is None and not image:
        raise ConfigError("an item needs text, a picture or both. Pass text=... or image=True.")
    lines = ["POLICY"]
    for entry in policy.entries:
        head = f"[{policy.renaming.prompt_id(entry.node)}] {' > '.join(map(tidy, entry.path))}"
        lines.append(f"{head} (allowed)" if entry.allowed else head)
        lines += _bullets(entry, max_bullets)
    if context is not None and (facts := _facts(context, policy, max_chars)):
        lines += ["CONTEXT", *facts]
    lines.append("ITEM")
    if image:
        lines.append(f"image {image_token}")
    if text is not None:
        lines.append(f"text {_quoted(text, max_chars)}")
    return "\n".join([*lines, "ANSWER\n"])


def _bullets(entry: Entry, limit: int | None) -> list[str]:
    if not entry.should_not and not entry.can:
        return [] if limit == 0 or not entry.definition else [f"- {tidy(entry.definition)}"]
    lists = {"should not": entry.should_not, "can": entry.can}
    if entry.allowed:  # what the category forbids elsewhere is what is allowed here
        lists = {"can": (*entry.should_not, *entry.can)}
    lines = []
    for title, bullets in lists.items():
        if shown := bullets[:limit]:
            lines += [title, *(f"- {tidy(b)}" for b in shown)]
    return lines


def _facts(context: Context, policy: PromptPolicy, max_chars: int) -> list[str]:
    lines = [
        f"near [{policy.renaming.prompt_id(node)}] {margin:+.3f}"
        for node, margin in context.margins.items()
        if node in policy
    ]
    for name in ("policy", "distribution"):
        p = getattr(context.novelty, name)
        if p is not None:
            lines.append(f"novelty {name} p={p:.3g}")
    if context.ocr:
        lines.append(f"ocr {_quoted(context.ocr, max_chars)}")
    return lines


def _quoted(text: str, limit: int) -> str:
    """One JSON string that no tokenizer can read as a special token."""
    cut = tidy(text[:limit]) + (" ..." if len(text) > limit else "")
    return json.dumps(cut, ensure_ascii=False).replace("<", "\\u003c")


def tidy(text: str) -> str:
    """One line: white space collapsed, unprintable characters dropped."""
    return " ".join("".join(c for c in " ".join(text.split()) if c.isprintable()).split())


def _entry(tree: Taxonomy, node_id: str, *, allowed: bool) -> Entry:
    node = tree[node_id]
    if not node.risky:
        raise ConfigError(f"node {node_id} is no risk ({node.kind}); a policy lists risks only.")
    names = tree.path(node_id).names
    return Entry(node_id, names, node.definition, node.should_not, node.can, allowed)


# ---------------------------------------------------------------- the answer


@dataclass(frozen=True)
class Answer:
    """What the guard says of one item.

    Args:
        rating: safe, unsafe or review.
        category: node id (not the prompt's) of the listed category it belongs to, or None.
        novel: short name of a risk that no listed category holds, or None.
        rationale: one line of reasons.
    """

    rating: Rating
    category: str | None = None
    novel: str | None = None
    rationale: str = ""


@dataclass(frozen=True)
class ParseError:
    """An answer that could not be read: a value, never raised. Its rating is ``review``."""

    kind: ParseErrorKind
    message: str
    text: str = ""

    @property
    def rating(self) -> Rating:
        return "review"


def parse_answer(text: object, policy: PromptPolicy) -> Answer | ParseError:
    """Read an answer to a prompt with this policy; total, it never raises.

    The object may have its keys in any order, with JSON's white space; a null category or name is
    one that is not given. Not accepted: anything around the object, unknown, missing or repeated
    keys, ids the policy does not list, both a category and a name, an unsafe item with neither, an
    unsafe item in an allowed category, a safe item with a name.
    """
    data = load_object(text, MAX_ANSWER)
    if isinstance(data, ParseError):
        return data

    def fail(kind: ParseErrorKind, message: str) -> ParseError:
        return ParseError(kind, message, str(text)[:KEPT])

    unknown = set(data) - {"rating", "category", "novel", "rationale"}
    missing = {"rating", "rationale"} - set(data)
    if unknown or missing or not data.keys() & {"category", "novel"}:
        return fail(
            "keys", f"expected rating, category or novel, rationale; got {', '.join(data) or '-'}"
        )
    for key, value in data.items():
        if not isinstance(value, str) and not (value is None and key in ("category", "novel")):
            return fail("type", f"{key} is {type(value).__name__}")
    rating, category, novel = data["rating"], data.get("category"), data.get("novel")
    if rating not in RATINGS:
        return fail("rating", f"rating is {rating[:KEPT]!r}")
    if category is not None and novel is not None:
        return fail("novel", "both a category and a name")
    if novel is not None:
        novel = tidy(novel)
        if not any(c.isalpha() for c in novel) or len(novel) > MAX_NAME:
            return fail("novel", f"the name is no name of 1 to {MAX_NAME} characters")
        if rating == "safe":
            return fail("novel", "a safe item has no risk to name")
    node = None
    if category is not None:
        node = policy.renaming.node(category)
        entry = None if node is None else policy.entry(node)
        if entry is None:
            return fail("category", f"{category[:KEPT]!r} is not listed")
        if rating == "unsafe" and entry.allowed:
            return fail("category", f"unsafe, yet {category!r} is allowed")
    if rating == "unsafe" and node is None and novel is None:
        return fail("category", "unsafe, with neither category nor name")
    rationale = tidy(data["rationale"])
    if len(rationale) > MAX_RATIONALE:
        return fail("length", f"the rationale has more than {MAX_RATIONALE} characters")
    return Answer(rating, node, novel, rationale)


def write_answer(answer: Answer, policy: PromptPolicy) -> str:
    """The canonical text of an answer; :func:`parse_answer` gives it back, tidied.

    Raises:
        ConfigError: the answer cannot be given to this policy.
    """
    body: dict[str, str | None] = {"rating": answer.rating}
    if answer.novel is not None:
        body["novel"] = tidy(answer.novel)
    if answer.category is not None:
        body["category"] = policy.renaming.prompt_id(answer.category)
    elif answer.novel is None:
        body["category"] = None
    text = json.dumps(body | {"rationale": tidy(answer.rationale)}, ensure_ascii=False)
    read = parse_answer(text, policy)
    if isinstance(read, ParseError):
        raise ConfigError(f"{answer} is no answer to this policy: {read.message}.")
    return text


def load_object(text: object, max_chars: int) -> dict[str, Any] | ParseError:
    """A JSON object from text of a model; total. NaN, repeated keys and deep nesting are errors."""

    def fail(kind: ParseErrorKind, message: str) -> ParseError:
        return ParseError(kind, message, text[:KEPT] if isinstance(text, str) else "")

    if not isinstance(text, str):
        return fail("type", f"expected text, got {type(text).__name__}")
    if len(text) > max_chars:
        return fail("length", f"{len(text)} characters, at most {max_chars} are read")
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except _RepeatedKey as error:
        return fail("duplicate", f"the key {str(error)[:KEPT]!r} is given twice")
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of 5000 digits
        return fail("json", f"no JSON object: {str(error)[:KEPT]}")
    if not isinstance(data, dict):
        return fail("json", f"a JSON {type(data).__name__}, not an object")
    return data


class _RepeatedKey(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKey(key)
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


# ---------------------------------------------------------------- training episodes


class Bank(NamedTuple):
    """Phrases that name a node: for training, and kept away from it."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def split_bank(node: Node, *, held_out: float = HELD_OUT) -> Bank:
    """Name and synonyms of a node; of the synonyms at least one, the same in every run, held out.

    The node's name stays in training: policies show it.
    """
    phrases = tuple(p for p in dict.fromkeys(node.synonyms) if p != node.name)
    count = math.ceil(held_out * len(phrases))
    ranked = sorted(phrases, key=lambda p: hashlib.sha256(f"{node.id}\n{p}".encode()).hexdigest())
    kept = set(ranked[:count])
    return Bank((node.name, *(p for p in phrases if p not in kept)),
                tuple(p for p in phrases if p in kept))  # fmt: skip


@dataclass(frozen=True)
class Episode:
    """A policy for one item, and what is right under it.

    Args:
        policy: as the prompt lists it.
        rating: safe or unsafe.
        category: listed node that holds the item; None for a harmless one and for a novel one.
        hidden: nodes taken out of the policy; () unless the item is novel under it.
        bank: training phrases that name the hidden category; () unless the item is novel.
        parent: the hidden category's parent.
        benign_of: category whose benign sibling the item is, or None.
        pair: shared by two policy twins, or None.
    """

    policy: PromptPolicy
    rating: Rating
    category: str | None = None
    hidden: tuple[str, ...] = ()
    bank: tuple[str, ...] = ()
    parent: str | None = None
    benign_of: str | None = None
    pair: str | None = None

    def columns(self) -> dict[str, Any]:
        """The row's columns for the rewards; plain data."""
        return {
            "policy": self.policy.to_json(),
            "rating": self.rating,
            "category": self.category,
            "bank": list(self.bank),
            "parent": self.parent,
            "benign_of": self.benign_of,
            "pair": self.pair,
        }

    def answer(self, rationale: str = "", *, name: str | None = None) -> Answer:
        """The right answer; a novel item goes by `name`, or by the first phrase of its bank."""
        novel = (name or self.bank[0]) if self.bank else None
        return Answer(self.rating, self.category, novel, rationale)


def episode(
    policy: PromptPolicy,
    taxonomy: Taxonomy,
    truth: str | None,
    *,
    seed: int,
    hide: bool = False,
    size: int | None = None,
    sibling_rate: float = SIBLING_RATE,
    also: Sequence[str] = (),
    benign_of: str | None = None,
) -> Episode:
    """A policy for one item: a subset, in random order, under random ids.

    Args:
        policy: what to draw from.
        taxonomy: the tree of its nodes.
        truth: node that holds the item (of any level), None for a harmless item.
        seed: the same gives the same episode.
        hide: take the true category out, with all that stands above and below it, and sometimes
            its siblings: the item is then unsafe and novel.
        size: number of entries; all without it.
        sibling_rate: how often the siblings go with it, where something else is left.
        also: further nodes that may hold the item; they are hidden with it.
        benign_of: category whose benign sibling the item is; it stays in the policy.

    Raises:
        ConfigError: the truth is not listed, or cannot be hidden.

    Source: Yu et al. 2025 (ProGuard), the out-of-policy episodes.
    """
    rng = random.Random(seed)
    held = _holder(policy, taxonomy, truth)
    entries = list(policy.entries)
    hidden: tuple[str, ...] = ()
    if hide:
        if held is None or held.allowed:
            raise ConfigError("only a listed and forbidden category can be hidden. Pass its node.")
        above = {n for t in (str(truth), *also) for n in taxonomy.path(t).ids}
        below = {held.node, *also}
        gone = {
            e.node
            for e in entries
            if e.node in above or not below.isdisjoint(taxonomy.path(e.node).ids)
        }
        parent = taxonomy[held.node].parent
        siblings = {e.node for e in entries if taxonomy[e.node].parent == parent} | gone
        if rng.random() < sibling_rate and any(e.node not in siblings for e in entries):
            gone = siblings
        hidden = tuple(e.node for e in entries if e.node in gone)
        entries = [e for e in entries if e.node not in gone]
        if not entries:
            raise ConfigError("hiding the category leaves an empty policy. List more categories.")
    kept = [held.node] if held is not None and not hide else []
    if benign_of is not None and (entry := _holder(policy, taxonomy, benign_of)):
        kept.append(entry.node)
    entries = _drawn(entries, kept, size, rng)
    drawn = PromptPolicy.of(entries, Renaming.draw([e.node for e in entries], rng))
    if held is None:
        return Episode(drawn, "safe", benign_of=benign_of)
    if hide:
        node = taxonomy[held.node]
        return Episode(drawn, "unsafe", None, hidden, split_bank(node).train, node.parent)
    return Episode(drawn, "safe" if held.allowed else "unsafe", held.node)


def twins(
    policy: PromptPolicy,
    taxonomy: Taxonomy,
    truth: str,
    *,
    seed: int,
    pair: str,
    size: int | None = None,
) -> tuple[Episode, Episode]:
    """One item under two policies that differ in one entry: forbidden, then allowed.

    Raises:
        ConfigError: the truth is not listed.
    """
    first = episode(policy, taxonomy, truth, seed=seed, size=size)
    found = []
    for allowed in (False, True):
        entries = tuple(
            replace(e, allowed=allowed) if e.node == first.category else e
            for e in first.policy.entries
        )
        rating: Rating = "safe" if allowed else "unsafe"
        changed = PromptPolicy(entries, first.policy.renaming)
        found.append(replace(first, policy=changed, rating=rating, pair=pair))
    return found[0], found[1]


def _holder(policy: PromptPolicy, taxonomy: Taxonomy, truth: str | None) -> Entry | None:
    if truth is None:
        return None
    held = policy.listed(taxonomy.path(truth).ids)
    if held is None:
        raise ConfigError(f"node {truth} has no entry in the policy. List it or what is above it.")
    return held


def _drawn(
    entries: list[Entry], kept: list[str], size: int | None, rng: random.Random
) -> list[Entry]:
    wanted = [e for e in entries if e.node in kept]
    others = [e for e in entries if e.node not in kept]
    if size is not None:
        others = rng.sample(others, max(0, min(size - len(wanted), len(others))))
    drawn = wanted + others
    rng.shuffle(drawn)
    return drawn


# ---------------------------------------------------------------- constrained decoding


@dataclass(frozen=True)
class GrammarState:
    """Where in an answer the text so far ends.

    Args:
        part: head (up to the first free string), name, bridge, rationale, tail or end.
        done: what is written of the head, bridge or tail.
        left: characters that may still follow in the string.
        words: words that may still begin in the name.
        held: name: the last character was a space; rationale: a backslash is open.
    """

    part: Literal["head", "name", "bridge", "rationale", "tail", "end"]
    done: str = ""
    left: int = 0
    words: int = 0
    held: bool = False


_BRIDGE = ', "rationale": "'
_ESCAPABLE = '"\\'


class AnswerGrammar:
    """The canonical answers to one policy as an automaton over characters.

    Every text it accepts is parsed by :func:`parse_answer`, and from every state it can be brought
    to an end.

    Args:
        policy: whose ids may stand as category.
        ratings: which ratings may be given.
        max_words, max_name, max_rationale: limits of the free strings.
    """

    def __init__(
        self,
        policy: PromptPolicy,
        *,
        ratings: Sequence[Rating] = _ORDER,
        max_words: int = MAX_NAME_WORDS,
        max_name: int = MAX_NAME,
        max_rationale: int = MAX_RATIONALE,
    ) -> None:
        name = GrammarState("name", left=min(max_name, MAX_NAME), words=max_words)
        self._rationale = GrammarState("rationale", left=min(max_rationale, MAX_RATIONALE))
        heads: dict[str, GrammarState] = {}
        for rating in ratings:
            start = f'{{"rating": "{rating}", '
            if rating != "unsafe":
                heads[f'{start}"category": null{_BRIDGE}'] = self._rationale
            for entry in policy.entries:
                if rating != "unsafe" or not entry.allowed:
                    prompt_id = policy.renaming.prompt_id(entry.node)
                    heads[f'{start}"category": "{prompt_id}"{_BRIDGE}'] = self._rationale
            if rating != "safe":
                heads[f'{start}"novel": "'] = name
        self._heads = heads
        following: dict[str, set[str]] = {}
        for head in heads:
            for i, character in enumerate(head):
                following.setdefault(head[:i], set()).add(character)
        self._following = {k: frozenset(v) for k, v in following.items()}
        self.start = GrammarState("head")

    @property
    def characters(self) -> frozenset[str]:
        """Characters that fixed parts are made of; a vocabulary needs each as a token."""
        return frozenset("".join(self._heads)) | frozenset(f'"{_BRIDGE}}}')

    def next_characters(self, state: GrammarState) -> tuple[frozenset[str], bool]:
        """Characters of fixed text that may follow, and whether free text may follow as well.

        In free text any printable character but a quote and a backslash may stand, unless
        :meth:`advance` says otherwise (a name begins with a letter and has single spaces).
        """
        if state.part == "head":
            return self._following[state.done], False
        if state.part == "bridge":
            return frozenset(_BRIDGE[len(state.done)]), False
        if state.part == "tail":
            return frozenset("}"), False
        if state.part == "end":
            return frozenset(), False
        if state.part == "name":
            closes = bool(state.done) and not state.held
            return frozenset('"' if closes else ""), state.left > 0
        if state.held:
            return frozenset(_ESCAPABLE), False
        return frozenset('"\\' if state.left else '"'), state.left > 0

    def advance(self, state: GrammarState, text: str) -> GrammarState | None:
        """The state after more text; None where it leaves the grammar."""
        current: GrammarState | None = state
        for character in text:
            if current is None:
                return None
            current = self._step(current, character)
        return current

    def state(self, text: str) -> GrammarState | None:
        """The state after a text from the beginning."""
        return self.advance(self.start, text)

    def forced(self, state: GrammarState) -> str:
        """The text that must come next, as far as there is no choice; it needs no model."""
        text = ""
        current: GrammarState | None = state
        while current is not None:
            fixed, free = self.next_characters(current)
            if free or len(fixed) != 1:
                break
            (character,) = fixed
            text += character
            current = self._step(current, character)
        return text

    def _step(self, state: GrammarState, character: str) -> GrammarState | None:
        fixed, free = self.next_characters(state)
        if character not in fixed:
            plain = free and character.isprintable() and character not in _ESCAPABLE
            return self._string_step(state, character) if plain else None
        if state.part == "head":
            done = state.done + character
            return self._heads.get(done) or GrammarState("head", done)
        if state.part == "name":
            return GrammarState("bridge")
        if state.part == "bridge":
            done = state.done + character
            return self._rationale if done == _BRIDGE else GrammarState("bridge", done)
        if state.part == "tail":
            return GrammarState("end")
        if state.held:
            return replace(state, left=state.left - 1, held=False)
        return GrammarState("tail") if character == '"' else replace(state, held=True)

    def _string_step(self, state: GrammarState, character: str) -> GrammarState | None:
        if state.part == "rationale":
            return replace(state, left=state.left - 1)
        if character == " ":
            fits = state.done and not state.held and state.words > 0 and state.left > 1
            return replace(state, left=state.left - 1, held=True) if fits else None
        if not state.done and not character.isalpha():
            return None
        words = state.words - (state.held or not state.done)
        if words < 0:
            return None
        return GrammarState("name", "begun", state.left - 1, words, False)


class TokenConstraint:
    """Which tokens keep an answer well-formed, for any tokenizer.

    Args:
        grammar: of the prompt's policy.
        vocabulary: the text each token id adds; None for special tokens and for pieces of a
            character. Tokens without text are never allowed.
        eos: id of the token that ends the answer.

    Raises:
        ConfigError: a character of the fixed parts is no token by itself, so that the decoder
            could get stuck.
    """

    def __init__(
        self, grammar: AnswerGrammar, vocabulary: Sequence[str | None], *, eos: int
    ) -> None:
        missing = grammar.characters - {t for t in vocabulary if t}
        if missing:
            raise ConfigError(
                f"the vocabulary has no token for {' '.join(map(repr, sorted(missing)))}. Add "
                "every printable ASCII character as a token."
            )
        self.grammar, self.eos = grammar, eos
        self._tokens = [(i, t) for i, t in enumerate(vocabulary) if t and i != eos]
        self._text = dict(self._tokens)
        self._longest = max(len(t) for _, t in self._tokens)
        self._cache: dict[GrammarState, tuple[int, ...]] = {}

    def state(self, tokens: Iterable[int]) -> GrammarState | None:
        """The state after the tokens of an answer so far (without the prompt)."""
        current: GrammarState | None = self.grammar.start
        for token in tokens:
            if current is None or token not in self._text:
                return None
            current = self.grammar.advance(current, self._text[token])
        return current

    def allowed(self, state: GrammarState) -> tuple[int, ...]:
        """Token ids that may follow; at the end only `eos`, and never none."""
        if state.part == "end":
            return (self.eos,)
        # no token reaches further than the longest: beyond it all states are alike
        key = replace(state, left=min(state.left, self._longest + 1))
        if key not in self._cache:
            advance = self.grammar.advance
            self._cache[key] = tuple(i for i, t in self._tokens if advance(key, t) is not None)
        return self._cache[key]
