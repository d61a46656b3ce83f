"""A policy: a view of the taxonomy for one product, kept in a small YAML file.

.. code-block:: yaml

    name: shop
    nodes:
      D1: {status: non_violating}
      "6.1": {status: sensitive, threshold: 0.4}
      "x.1": {parent: D6, name: ..., definition: ..., synonyms: [...]}

Keys are node ids of any level; settings are inherited by descendants, the nearest one wins. A
concept switched off takes its share of its category with it, one kept on below a category that is
off still counts.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

from hysafe.errors import TaxonomyError
from hysafe.taxonomy.reading import parse_yaml, read_text
from hysafe.taxonomy.tree import Kind, Node, Taxonomy

__all__ = ["DEFAULT_THRESHOLD", "SENSITIVE_THRESHOLD", "NodeRule", "Policy", "PolicyView"]

Status = Literal["default", "non_violating", "sensitive"]

# Score of a node from which an item is rated unsafe, unless the policy says otherwise.
DEFAULT_THRESHOLD = 0.5
SENSITIVE_THRESHOLD = 0.25
# Severity of a category added by a policy: the middle of the scale, as where a file gives none.
NEW_SEVERITY = 2

_CHILD_KIND: Mapping[Kind, Kind] = {
    "domain": "category",
    "category": "concept",
    "safe_domain": "background",
}


@dataclass(frozen=True)
class NodeRule:
    """What a policy says of one node; None means "inherited"."""

    status: Status | None = None
    threshold: float | None = None
    parent: str | None = None
    name: str | None = None
    definition: str | None = None
    synonyms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """Rules by node id. The empty policy is the taxonomy as it is."""

    name: str = "default"
    rules: Mapping[str, NodeRule] = field(default_factory=dict)
    origin: str = "default policy"

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Policy:
        """Read a policy file.

        Raises:
            TaxonomyError: not readable or not valid; names file, node and remedy.
        """
        data = parse_yaml(read_text(path), origin=str(path))
        return cls.from_dict(data, origin=str(path))

    @classmethod
    def from_dict(cls, data: Any, *, origin: str = "policy") -> Policy:
        """Policy from the mapping of a policy file; node ids must be strings.

        Raises:
            TaxonomyError: not valid; names file, node and remedy.
        """
        if not isinstance(data, dict):
            raise TaxonomyError(
                f"{origin}: expected a mapping with the keys `name` and `nodes`, got "
                f"{type(data).__name__}. Write `nodes: {{D1: {{status: non_violating}}}}`."
            )
        unknown = set(data) - {"name", "nodes"}
        if unknown:
            raise TaxonomyError(
                f"{origin}: unknown key {', '.join(map(repr, sorted(map(str, unknown))))}. "
                "Known: name, nodes; node ids go below `nodes`."
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
        rules = {k: _rule(k, v, origin) for k, v in nodes.items()}
        return cls(str(data.get("name") or pathlib.Path(origin).stem), rules, origin)

    def to_dict(self) -> dict[str, Any]:
        """As in a policy file; :meth:`from_dict` gives an equal policy back."""
        nodes = {}
        for node_id, rule in self.rules.items():
            settings = asdict(rule) | {"synonyms": list(rule.synonyms)}
            nodes[node_id] = {k: v for k, v in settings.items() if v not in (None, [])}
        return {"name": self.name, "nodes": nodes}

    @cached_property
    def hash(self) -> str:
        """First 16 hex digits of the sha256 of the rules (the name does not count)."""
        rules = {k: asdict(v) for k, v in sorted(self.rules.items())}
        payload = json.dumps(rules, sort_keys=True, ensure_ascii=False).encode()
        return hashlib.sha256(payload).hexdigest()[:16]

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


def _rule(node_id: str, value: Any, origin: str) -> NodeRule:
    def fail(problem: str, remedy: str) -> TaxonomyError:
        return TaxonomyError(f"{origin}: node {node_id}: {problem}. {remedy}")

    if not isinstance(value, dict):
        raise fail(f"expected a mapping, got {value!r}", "Write {status: ...}.")
    known = {"status", "threshold", "parent", "name", "definition", "synonyms"}
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
    return NodeRule(
        status,
        threshold,
        value.get("parent"),
        value.get("name"),
        value.get("definition"),
        tuple(synonyms),
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
