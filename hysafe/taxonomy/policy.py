"""A policy: a view of the taxonomy for one product, kept in a small YAML file.

.. code-block:: yaml

    name: shop
    review: {risk: 0.2, novelty: 0.05}
    nodes:
      D1: {status: non_violating}
      "6.1": {status: sensitive, threshold: 0.4}
      "x.1": {parent: D6, name: ..., definition: ..., synonyms: [...], examples: [a.jpg, ...],
              example_texts: [..., ...]}

Keys are node ids of any level; settings are inherited by descendants, the nearest one wins. A
concept switched off takes its share of its category with it, one kept on below a category that is
off still counts. Example pictures count by their content: it goes into the policy's hash, their
paths do not. Example texts stand in the policy itself.
"""

from __future__ import annotations

import errno
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

from hysafe.errors import ConfigError, HysafeError, TaxonomyError
from hysafe.taxonomy.reading import parse_yaml, read_text
from hysafe.taxonomy.tree import Kind, Node, Taxonomy

__all__ = [
    *("DEFAULT_THRESHOLD", "MAX_EXAMPLES", "SENSITIVE_THRESHOLD", "Example", "NodeRule", "Policy"),
    "MAX_EXAMPLE_LENGTH",
    *("distinct_texts", "example_of", "is_example", "read_example_texts"),
    *("PolicyView", "ReviewBand"),
]

Status = Literal["default", "non_violating", "sensitive"]

# Score of a node from which an item is rated unsafe, unless the policy says otherwise.
DEFAULT_THRESHOLD = 0.5
SENSITIVE_THRESHOLD = 0.25
# Severity of a category added by a policy: the middle of the scale, as where a file gives none.
NEW_SEVERITY = 2
# Example pictures, and example texts, of one node: more of them hardly move the mean, and each is
# encoded alone.
MAX_EXAMPLES = 64
# Characters of an example text: more than the text tower reads at once.
MAX_EXAMPLE_LENGTH = 2000

_CHILD_KIND: Mapping[Kind, Kind] = {
    "domain": "category",
    "category": "concept",
    "safe_domain": "background",
}


@dataclass(frozen=True)
class Example:
    """A picture of what a node means.

    Args:
        file: where it lies, from the root of the file system.
        sha256: of its bytes, as hex digits.
    """

    file: str
    sha256: str


@dataclass(frozen=True)
class NodeRule:
    """What a policy says of one node; None means "inherited"."""

    status: Status | None = None
    threshold: float | None = None
    parent: str | None = None
    name: str | None = None
    definition: str | None = None
    synonyms: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    example_texts: tuple[str, ...] = ()

    def example_hashes(self) -> tuple[str, ...]:
        """What the examples are: sha256 of each different one, sorted."""
        return tuple(sorted({e.sha256 for e in self.examples}))


@dataclass(frozen=True)
class ReviewBand:
    """What goes to a person; None means "as the model has it".

    Args:
        risk: weighted risk from which an item that is not unsafe is reviewed.
        novelty: p-value of the distribution score down from which it is.
    """

    risk: float | None = None
    novelty: float | None = None

    def to_dict(self) -> dict[str, float]:
        """As in a policy file."""
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Policy:
    """Rules by node id. The empty policy is the taxonomy as it is."""

    name: str = "default"
    rules: Mapping[str, NodeRule] = field(default_factory=dict)
    origin: str = "default policy"
    review: ReviewBand = ReviewBand()

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Policy:
        """Read a policy file.

        Raises:
            TaxonomyError: not readable or not valid; names file, node and remedy.
            ConfigError: an example picture is missing.
        """
        data = parse_yaml(read_text(path), origin=str(path))
        return cls.from_dict(data, origin=str(path), folder=pathlib.Path(path).parent)

    @classmethod
    def from_dict(
        cls, data: Any, *, origin: str = "policy", folder: str | pathlib.Path = ""
    ) -> Policy:
        """Policy from the mapping of a policy file; node ids must be strings.

        Args:
            folder: what the paths of example pictures start from.

        Raises:
            TaxonomyError: not valid; names file, node and remedy.
            ConfigError: an example picture is missing.
        """
        if not isinstance(data, dict):
            raise TaxonomyError(
                f"{origin}: expected a mapping with the keys `name`, `review` and `nodes`, got "
                f"{type(data).__name__}. Write `nodes: {{D1: {{status: non_violating}}}}`."
            )
        unknown = set(data) - {"name", "review", "nodes"}
        if unknown:
            raise TaxonomyError(
                f"{origin}: unknown key {', '.join(map(repr, sorted(map(str, unknown))))}. "
                "Known: name, review, nodes; node ids go below `nodes`."
            )
        nodes = data.get("nodes") or {}
        if not isinstance(nodes, dict):
            raise TaxonomyError(
                f"{origin}: `nodes` is {type(nodes).__name__}. Make it a mapping of node ids to "
                "settings: {D1: {status: non_violating}}."
            )
        for node_id in nodes:
            if not isinstance(node_id, str) or not node_id.strip():
                raise TaxonomyError(
                    f"{origin}: node {node_id!r}: the id is no text. Put it in quotes."
                )
        rules = {k: _rule(k, v, origin, pathlib.Path(folder)) for k, v in nodes.items()}
        name = str(data.get("name") or pathlib.Path(origin).stem)
        return cls(name, rules, origin, _review(data.get("review") or {}, origin))

    def to_dict(self) -> dict[str, Any]:
        """As in a policy file; :meth:`from_dict` gives an equal policy back.

        Example pictures come with their sha256 and are not read again.
        """
        nodes = {}
        for node_id, rule in self.rules.items():
            examples = [asdict(e) for e in rule.examples]
            settings = asdict(rule) | {
                "synonyms": list(rule.synonyms),
                "examples": examples,
                "example_texts": list(rule.example_texts),
            }
            nodes[node_id] = {k: v for k, v in settings.items() if v not in (None, [])}
        review = self.review.to_dict()
        return {"name": self.name, **({"review": review} if review else {}), "nodes": nodes}

    @cached_property
    def hash(self) -> str:
        """First 16 hex digits of the sha256 of rules and review band (the name does not count)."""
        rules = {k: _hashed(v) for k, v in sorted(self.rules.items())}
        digest = hashlib.sha256(json.dumps(rules, sort_keys=True, ensure_ascii=False).encode())
        if self.review != ReviewBand():
            digest.update(json.dumps(self.review.to_dict(), sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def apply(self, taxonomy: Taxonomy) -> PolicyView:
        """The taxonomy as this policy sees it.

        Raises:
            TaxonomyError: a rule names an unknown node, or a new node lacks parent or texts.
        """
        view = taxonomy
        waiting: list[str] = []
        for node_id, rule in self.rules.items():
            if node_id in taxonomy:
                changed = self._redescribed(taxonomy[node_id], rule)
                view = view if changed is None else view.with_nodes(changed)
            elif rule.parent and rule.name and rule.definition:
                waiting.append(node_id)
            else:
                raise self._fail(
                    node_id,
                    "not in the taxonomy",
                    "Correct the id, or give parent, name and definition to add it.",
                )
        while waiting:  # a new node may stand above its new parent in the file
            ready = [n for n in waiting if self.rules[n].parent in view]
            if not ready:
                raise self._fail(
                    waiting[0],
                    f"unknown parent {self.rules[waiting[0]].parent!r}",
                    "Give a domain (D6) or category (6.1).",
                )
            view = view.with_nodes(*(self._new_node(n, view) for n in ready))
            waiting = [n for n in waiting if n not in ready]
        for node_id, rule in self.rules.items():
            if not view[node_id].risky and (
                rule.status == "sensitive" or rule.threshold is not None
            ):
                raise self._fail(
                    node_id,
                    "a harmless node has no threshold and cannot be sensitive",
                    "Set it on the risk node beside it.",
                )
        return PolicyView(self, view)

    def _fail(self, node_id: str, problem: str, remedy: str) -> TaxonomyError:
        return TaxonomyError(f"{self.origin}: node {node_id}: {problem}. {remedy}")

    def _redescribed(self, old: Node, rule: NodeRule) -> Node | None:
        if rule.parent is not None and rule.parent != old.parent:
            raise self._fail(
                old.id, "a policy cannot move a node", "Switch it off and add a new one."
            )
        for key in ("examples", "example_texts"):
            if getattr(rule, key):
                raise self._fail(
                    old.id,
                    f"`{key}` are for a node that the policy adds",
                    "Add one below it, with parent, name and definition.",
                )
        if not (rule.name or rule.definition or rule.synonyms):
            return None
        return replace(
            old,
            name=rule.name or old.name,
            definition=rule.definition or old.definition,
            synonyms=rule.synonyms or old.synonyms,
        )

    def _new_node(self, node_id: str, view: Taxonomy) -> Node:
        rule = self.rules[node_id]
        parent = view[str(rule.parent)]
        kind = _CHILD_KIND.get(parent.kind)
        if kind is None:
            raise self._fail(
                node_id,
                f"its parent {parent.id} is a {parent.kind.replace('_', ' ')}",
                "Put a new node below a domain (D6) or a category (6.1).",
            )
        if rule.examples and parent.text_only:
            raise self._fail(
                node_id,
                f"its parent {parent.id} is for text only, so it takes no pictures",
                "Remove `examples`.",
            )
        return Node(
            node_id,
            str(rule.name),
            str(rule.definition),
            kind,
            parent.id,
            rule.synonyms,
            severity=NEW_SEVERITY if kind == "category" else 0,
            text_only=parent.text_only,
        )


@dataclass(frozen=True)
class PolicyView:
    """A policy applied: which nodes count, and from which score on."""

    policy: Policy
    taxonomy: Taxonomy

    def status(self, node_id: str) -> Status:
        """default, non_violating or sensitive: the rule of the nearest ancestor that has one."""
        for node in reversed(self.taxonomy.path(node_id).nodes):
            rule = self.policy.rules.get(node.id)
            if rule is not None and rule.status is not None:
                return rule.status
        return "default"

    def active(self, node_id: str) -> bool:
        """Whether the node is a risk under this policy."""
        return self.taxonomy[node_id].risky and self.status(node_id) != "non_violating"

    def all_active(self) -> PolicyView:
        """The same nodes, with nothing switched off and no thresholds."""
        rules = {n: replace(r, status=None, threshold=None) for n, r in self.policy.rules.items()}
        return replace(self, policy=replace(self.policy, rules=rules))

    def threshold(self, node_id: str) -> float:
        """Score from which the node makes an item unsafe.

        The nearest threshold counts; a sensitive node without one has SENSITIVE_THRESHOLD.
        """
        for node in reversed(self.taxonomy.path(node_id).nodes):
            rule = self.policy.rules.get(node.id)
            if rule is None:
                continue
            if rule.threshold is not None:
                return rule.threshold
            if rule.status == "sensitive":
                return SENSITIVE_THRESHOLD
            if rule.status == "default":
                return DEFAULT_THRESHOLD
        return DEFAULT_THRESHOLD


def _review(value: Any, origin: str) -> ReviewBand:
    """The review band as a policy file gives it."""
    known = {"risk", "novelty"}
    if not isinstance(value, dict) or set(value) - known:
        raise TaxonomyError(
            f"{origin}: `review` is {value!r}. Write {{risk: 0.3, novelty: 0.01}}, or one of them."
        )
    for key, number in value.items():
        numeric = isinstance(number, int | float) and not isinstance(number, bool)
        if not numeric or not 0 <= number <= 1:
            raise TaxonomyError(
                f"{origin}: review: {key} is {number!r}. Give a number of at least 0, at most 1."
            )
    return ReviewBand(**{key: float(number) for key, number in value.items()})


def _hashed(rule: NodeRule) -> dict[str, Any]:
    """What of a rule goes into the policy's hash: of the examples their content alone."""
    settings = asdict(rule)
    # a policy without any keeps the hash it had before there were some
    del settings["examples"], settings["example_texts"]
    if rule.examples:
        settings["examples"] = rule.example_hashes()
    if rule.example_texts:
        settings["example_texts"] = sorted(set(rule.example_texts))
    return settings


def _rule(node_id: str, value: Any, origin: str, folder: pathlib.Path) -> NodeRule:
    def fail(problem: str, remedy: str) -> TaxonomyError:
        return TaxonomyError(f"{origin}: node {node_id}: {problem}. {remedy}")

    if not isinstance(value, dict):
        raise fail(f"expected a mapping, got {value!r}", "Write {status: ...}.")
    known = {
        *("status", "threshold", "parent", "name", "definition", "synonyms", "examples"),
        "example_texts",
    }
    unknown = set(value) - known
    if unknown:
        raise fail(
            f"unknown key {', '.join(sorted(map(str, unknown)))}",
            f"Known: {', '.join(sorted(known))}.",
        )
    status = value.get("status")
    if status is not None and status not in get_args(Status):
        raise fail(f"status is {status!r}", f"Give one of {', '.join(get_args(Status))}.")
    threshold = value.get("threshold")
    if threshold is not None:
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not 0 < threshold <= 1:
            raise fail(f"threshold is {threshold!r}", "Give a number above 0, at most 1.")
        threshold = float(threshold)
    synonyms = value.get("synonyms") or []
    if not isinstance(synonyms, list) or not all(_is_text(s) for s in synonyms):
        raise fail("`synonyms` is no list of texts", "Write [phrase, phrase], in quotes.")
    for key in ("parent", "name", "definition"):
        if value.get(key) is not None and not _is_text(value[key]):
            raise fail(f"`{key}` is {value[key]!r}", "Write it as text, in quotes.")
    examples = value.get("examples") or []
    if not isinstance(examples, list) or not all(map(is_example, examples)):
        raise fail("`examples` is no list of files", "Write [picture.jpg, picture.png].")
    if len(examples) > MAX_EXAMPLES:
        raise fail(f"{len(examples)} examples", f"Keep the best {MAX_EXAMPLES} or fewer.")
    return NodeRule(
        status,
        threshold,
        value.get("parent"),
        value.get("name"),
        value.get("definition"),
        tuple(synonyms),
        tuple(example_of(e, f"{origin}: node {node_id}", folder) for e in examples),
        read_example_texts(value.get("example_texts"), fail),
    )


def read_example_texts(value: Any, fail: Callable[[str, str], HysafeError]) -> tuple[str, ...]:
    """Example texts as a policy file gives them.

    Args:
        fail: the error of a problem and its remedy.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise fail("`example_texts` is no list", "Write one text a line, each after `- `.")
    for place, text in enumerate(value, 1):
        if not _is_text(text):
            raise fail(f"example text {place} is {text!r}", "Write it as text, in quotes.")
        if len(text) > MAX_EXAMPLE_LENGTH:
            raise fail(
                f"example text {place} has {len(text):,} characters",
                f"Keep the part that shows what is meant, {MAX_EXAMPLE_LENGTH:,} or fewer.",
            )
        if any(0xD800 <= ord(c) < 0xE000 for c in text):
            raise fail(f"example text {place} has half a character", "Write it anew.")
    if len(value) > MAX_EXAMPLES:
        raise fail(f"{len(value)} example texts", f"Keep the best {MAX_EXAMPLES} or fewer.")
    if len(distinct_texts(value)) == 1:
        raise fail("one example text", "Give two or more: each is judged by the others.")
    return tuple(value)


def distinct_texts(texts: Iterable[str]) -> list[str]:
    """Texts that differ in more than capitals and spaces, the first of each."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(" ".join(text.lower().split()), text)
    return list(found.values())


def example_of(value: str | Mapping[str, str], where: str, folder: pathlib.Path) -> Example:
    """An example as a policy file gives it: a path, read for its hash, or both.

    Args:
        where: named in the error. folder: what the path starts from.

    Raises:
        ConfigError: it cannot be read.
    """
    file, known = (value, None) if isinstance(value, str) else (value["file"], value["sha256"])
    path = (folder / file).absolute()
    if known is not None:
        return Example(str(path), known)
    try:
        if not path.is_file():  # nor a device, which could be read forever
            raise FileNotFoundError(errno.ENOENT, "no such file")
        with path.open("rb") as stream:
            return Example(str(path), hashlib.file_digest(stream, "sha256").hexdigest())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}: example {file}: cannot be read "
            f"({getattr(error, 'strerror', None) or error}). Correct the path, which starts from "
            "the policy file's folder, or remove it from `examples`."
        ) from error


def is_example(value: object) -> bool:
    """Whether :func:`example_of` takes it."""
    if not isinstance(value, dict):
        return _is_text(value)
    return (
        set(value) == {"file", "sha256"}
        and _is_text(value["file"])
        and isinstance(value["sha256"], str)
        and re.fullmatch("[0-9a-f]{64}", value["sha256"]) is not None
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
