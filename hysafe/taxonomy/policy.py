"""A policy: a view of the taxonomy for one product, kept in a small YAML file.

.. code-block:: yaml

    name: shop
    nodes:
      D1: {status: non_violating}
      "6.1": {status: sensitive, threshold: 0.4}
      "x.1": {parent: D6, name: ..., definition: ..., synonyms: [...]}

Keys are node ids of any level; settings are inherited by descendants, the nearest one wins.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import yaml

from hysafe.errors import TaxonomyError
from hysafe.taxonomy.tree import Node, Taxonomy

__all__ = ["DEFAULT_THRESHOLD", "SENSITIVE_THRESHOLD", "NodeRule", "Policy", "PolicyView"]

Status = Literal["default", "non_violating", "sensitive"]

# Score of a node from which an item is rated unsafe, unless the policy says otherwise.
DEFAULT_THRESHOLD = 0.5
SENSITIVE_THRESHOLD = 0.25


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
        try:
            data = yaml.safe_load(pathlib.Path(path).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise TaxonomyError(f"{path}: policy cannot be read ({error}).") from error
        except yaml.YAMLError as error:
            raise TaxonomyError(f"{path}: not valid YAML: {error}") from error
        return cls.from_dict(data, origin=str(path))

    @classmethod
    def from_dict(cls, data: Any, *, origin: str = "policy") -> Policy:
        """Policy from the mapping of a policy file."""
        if not isinstance(data, dict) or set(data) - {"name", "nodes"}:
            raise TaxonomyError(f"{origin}: expected a mapping with the keys `name` and `nodes`.")
        nodes = data.get("nodes") or {}
        if not isinstance(nodes, dict):
            raise TaxonomyError(f"{origin}: `nodes` must map node ids to settings.")
        rules = {str(k): _rule(str(k), v, origin) for k, v in nodes.items()}
        return cls(str(data.get("name", pathlib.Path(origin).stem)), rules, origin)

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
        added: list[Node] = []
        for node_id, rule in self.rules.items():
            known = node_id in taxonomy
            if not known:
                if not (rule.parent and rule.name and rule.definition):
                    raise TaxonomyError(
                        f"{self.origin}: node {node_id}: not in the taxonomy. Correct the id, or "
                        "give parent, name and definition to add it."
                    )
                pending = {n.id for n in added}
                if rule.parent not in taxonomy and rule.parent not in pending:
                    raise TaxonomyError(
                        f"{self.origin}: node {node_id}: unknown parent {rule.parent!r}. "
                        "Give a domain (D6) or category (6.1)."
                    )
                kind = _child_kind(rule.parent, taxonomy, added)
                added.append(
                    Node(
                        node_id, rule.name, rule.definition, kind, rule.parent, rule.synonyms, 2
                    )
                )
            elif rule.parent is not None and rule.parent != taxonomy[node_id].parent:
                raise TaxonomyError(
                    f"{self.origin}: node {node_id}: a policy cannot move a node. Switch it off "
                    "and add a new one."
                )
            elif rule.name or rule.definition or rule.synonyms:
                old = taxonomy[node_id]
                added.append(
                    replace(
                        old,
                        name=rule.name or old.name,
                        definition=rule.definition or old.definition,
                        synonyms=rule.synonyms or old.synonyms,
                    )
                )
        return PolicyView(self, taxonomy.with_nodes(*added) if added else taxonomy)


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


def _child_kind(parent: str, taxonomy: Taxonomy, added: list[Node]) -> Any:
    kinds = {n.id: n.kind for n in added}
    kind = kinds.get(parent) or taxonomy[parent].kind
    child = {"domain": "category", "category": "concept", "safe_domain": "background"}.get(kind)
    if child is None:
        raise TaxonomyError(
            f"parent {parent}: a new node goes below a domain or a category, not below a {kind}."
        )
    return child


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
        raise fail(f"status {status!r}", f"Give one of {', '.join(get_args(Status))}.")
    threshold = value.get("threshold")
    if threshold is not None:
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not 0 < threshold <= 1:
            raise fail(f"threshold {threshold!r}", "Give a number above 0, at most 1.")
        threshold = float(threshold)
    synonyms = value.get("synonyms") or []
    if not isinstance(synonyms, list) or not all(isinstance(s, str) for s in synonyms):
        raise fail("`synonyms` is no list of texts", "Write [phrase, phrase].")
    for key in ("parent", "name", "definition"):
        if value.get(key) is not None and not isinstance(value[key], str):
            raise fail(f"`{key}` is {value[key]!r}", "Write it as text, in quotes.")
    return NodeRule(
        status,
        threshold,
        value.get("parent"),
        value.get("name"),
        value.get("definition"),
        tuple(synonyms),
    )
