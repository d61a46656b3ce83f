"""The safety taxonomy: a tree of nodes read from YAML, validated, hashed.

Three levels below the root: domains, categories, concepts. Beside the risk domains stands one safe
domain, ``S``: it holds the benign sibling of every category and the background of everyday content,
so that "harmless" is a place in the same space and not just the absence of risk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import resources
import pathlib
from typing import Any, Literal

import yaml

from hysafe.errors import TaxonomyError

__all__ = ["Kind", "Node", "Path", "Taxonomy", "load_taxonomy"]

Kind = Literal["domain", "category", "concept", "safe_domain", "benign", "background"]

SAFE_DOMAIN = "S"
MIN_SYNONYMS = 5
SYNONYM_WORDS = (2, 6)

_COMMON = {"id", "name", "definition", "synonyms"}
_KEYS = {
    "domain": _COMMON | {"categories"},
    "category": _COMMON
    | {"severity", "should_not", "can", "benign", "crosswalk", "concepts", "modality"},
    "concept": _COMMON | {"source"},
    "benign": {"name", "definition", "synonyms"},
    "background": _COMMON,
}


@dataclass(frozen=True)
class Node:
    """One node.

    Args:
        id: stable id, e.g. ``D6``, ``6.1``, ``6.1.2``, ``S.6.1`` (benign sibling of 6.1).
        name: short name.
        definition: what is inside and what is not.
        kind: domain, category, concept, safe_domain, benign or background.
        parent: id of the parent, None for domains.
        synonyms: bank of phrases that name the node.
        severity: 1 (policy choice) to 4 (gravest); categories only, 0 elsewhere.
        should_not, can: policy bullets in LlavaGuard's manner; categories only.
        sibling: id of the benign sibling (categories) or of the category (benign siblings).
        crosswalk: scheme -> codes of other taxonomies; categories only.
        text_only: no imagery may be trained on, stored, shown or generated for it.
    """

    id: str
    name: str
    definition: str
    kind: Kind
    parent: str | None = None
    synonyms: tuple[str, ...] = ()
    severity: int = 0
    should_not: tuple[str, ...] = ()
    can: tuple[str, ...] = ()
    sibling: str | None = None
    crosswalk: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    text_only: bool = False

    @property
    def phrases(self) -> tuple[str, ...]:
        """All texts that stand for the node: name, definition, synonyms, without repeats."""
        return tuple(dict.fromkeys((self.name, self.definition, *self.synonyms)))

    @property
    def risky(self) -> bool:
        """Whether the node names a risk (and not harmless content)."""
        return self.kind in ("domain", "category", "concept")


@dataclass(frozen=True)
class Path:
    """Nodes from the domain down to a node."""

    nodes: tuple[Node, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(n.id for n in self.nodes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(n.name for n in self.nodes)

    def __str__(self) -> str:
        return " > ".join(self.names)


class Taxonomy:
    """A validated tree of nodes.

    Args:
        nodes: every node, parents before children.
        name, version: of the taxonomy.
        origin: file name used in error messages.

    Raises:
        TaxonomyError: duplicate id, unknown parent, cycle, missing text; names file and node.
    """

    def __init__(
        self, nodes: Iterable[Node], *, name: str, version: str, origin: str = "taxonomy"
    ) -> None:
        self.name, self.version, self.origin = name, version, origin
        self._nodes: dict[str, Node] = {}
        for node in nodes:
            if node.id in self._nodes:
                raise TaxonomyError(f"{origin}: node {node.id}: id used twice. Give it a new id.")
            if node.parent is not None and node.parent not in self._nodes:
                raise TaxonomyError(
                    f"{origin}: node {node.id}: parent {node.parent!r} is not defined before it. "
                    f"Known domains: {', '.join(n for n in self._nodes if '.' not in n)}."
                )
            if not node.name.strip() or not node.definition.strip():
                raise TaxonomyError(f"{origin}: node {node.id}: name and definition must be given.")
            self._nodes[node.id] = node

    # ------------------------------------------------------------ reading the tree

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._nodes

    def __getitem__(self, node_id: str) -> Node:
        try:
            return self._nodes[node_id]
        except KeyError:
            raise TaxonomyError(
                f"{self.origin}: no node {node_id!r}. Ids look like D6 (domain), 6.1 (category), "
                "6.1.2 (concept)."
            ) from None

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def of_kind(self, *kinds: Kind) -> tuple[Node, ...]:
        """Nodes of these kinds, in file order."""
        return tuple(n for n in self if n.kind in kinds)

    @property
    def domains(self) -> tuple[Node, ...]:
        return self.of_kind("domain")

    @property
    def categories(self) -> tuple[Node, ...]:
        return self.of_kind("category")

    @property
    def concepts(self) -> tuple[Node, ...]:
        return self.of_kind("concept")

    @cached_property
    def parents(self) -> dict[str, str | None]:
        """Child id -> parent id (None for domains): what the tree metrics take."""
        return {n.id: n.parent for n in self}

    @cached_property
    def _children(self) -> dict[str | None, tuple[str, ...]]:
        table: dict[str | None, list[str]] = {}
        for n in self:
            table.setdefault(n.parent, []).append(n.id)
        return {k: tuple(v) for k, v in table.items()}

    def children(self, node_id: str | None) -> tuple[Node, ...]:
        """Direct children; of None: the domains and the safe domain."""
        return tuple(self._nodes[c] for c in self._children.get(node_id, ()))

    def path(self, node_id: str) -> Path:
        """Nodes from the domain down to `node_id`."""
        chain: list[Node] = []
        current: str | None = self[node_id].id
        while current is not None:
            chain.append(self._nodes[current])
            current = self._nodes[current].parent
        return Path(tuple(reversed(chain)))

    def depth(self, node_id: str) -> int:
        """1 for domains, 2 for categories, 3 for concepts."""
        return len(self.path(node_id).nodes)

    def descendants(self, node_id: str) -> tuple[Node, ...]:
        """All nodes below `node_id`, depth first."""
        found: list[Node] = []
        for child in self.children(self[node_id].id):
            found.append(child)
            found.extend(self.descendants(child.id))
        return tuple(found)

    # ------------------------------------------------------------ changing and identity

    def with_nodes(self, *nodes: Node) -> Taxonomy:
        """A new taxonomy with nodes added (new id) or replaced (known id, same parent)."""
        table = dict(self._nodes)
        for node in nodes:
            table[node.id] = node
        return Taxonomy(
            table.values(), name=self.name, version=self.version, origin=self.origin
        )

    @cached_property
    def hash(self) -> str:
        """First 16 hex digits of the sha256 of all node contents, in id order."""
        content = [
            dict(asdict(n), crosswalk={k: list(v) for k, v in sorted(n.crosswalk.items())})
            for n in sorted(self, key=lambda n: n.id)
        ]
        payload = json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
        return hashlib.sha256(payload).hexdigest()[:16]

    def __repr__(self) -> str:
        return (
            f"Taxonomy({self.name!r}, version={self.version!r}, domains={len(self.domains)}, "
            f"categories={len(self.categories)}, concepts={len(self.concepts)})"
        )


def load_taxonomy(path: str | pathlib.Path | None = None) -> Taxonomy:
    """Read and validate a taxonomy YAML; the bundled one without a path.

    Raises:
        TaxonomyError: the file cannot be read or is not valid; the message names file, node and
            remedy.
    """
    if path is None:
        text = resources.files("hysafe.taxonomy").joinpath("taxonomy.yaml").read_text("utf-8")
        return parse_taxonomy(text, origin="taxonomy.yaml")
    try:
        text = pathlib.Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaxonomyError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    return parse_taxonomy(text, origin=str(path))


def parse_taxonomy(text: str, *, origin: str) -> Taxonomy:
    """Taxonomy from YAML text; `origin` is the file name for messages."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TaxonomyError(f"{origin}: not valid YAML: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("domains"), list):
        raise TaxonomyError(f"{origin}: expected a mapping with a list `domains`.")
    reader = _Reader(origin)
    nodes: list[Node] = []
    siblings: list[Node] = []
    for domain in data["domains"]:
        nodes.append(reader.node(domain, "domain", parent=None))
        domain_id = nodes[-1].id
        for category in reader.list_of(domain, "categories", domain_id):
            node, sibling = reader.category(category, domain_id)
            nodes.append(node)
            siblings.append(sibling)
            for concept in reader.list_of(category, "concepts", node.id):
                child = reader.node(concept, "concept", parent=node.id)
                nodes.append(replace(child, text_only=node.text_only))
    safe = data.get("safe") or {}
    nodes.append(
        Node(
            SAFE_DOMAIN,
            str(safe.get("name", "Harmless content")),
            str(safe.get("definition", "Content that harms nobody.")),
            "safe_domain",
            synonyms=tuple(safe.get("synonyms", ())),
        )
    )
    nodes.extend(siblings)
    for entry in safe.get("background", ()):
        nodes.append(reader.node(entry, "background", parent=SAFE_DOMAIN))
    return Taxonomy(
        nodes,
        name=str(data.get("name", "taxonomy")),
        version=str(data.get("version", "0")),
        origin=origin,
    )


class _Reader:
    """Turns YAML mappings into nodes; every complaint names file and node."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def fail(self, node: object, problem: str, remedy: str) -> TaxonomyError:
        return TaxonomyError(f"{self.origin}: node {node}: {problem}. {remedy}")

    def list_of(self, entry: dict[str, Any], key: str, node_id: str) -> list[Any]:
        value = entry.get(key, [])
        if not isinstance(value, list):
            raise self.fail(node_id, f"`{key}` is {type(value).__name__}", "Make it a list.")
        return value

    def node(self, entry: Any, kind: Kind, *, parent: str | None, node_id: str = "") -> Node:
        if not isinstance(entry, dict):
            raise self.fail(
                node_id or f"below {parent}", f"expected a mapping, got {entry!r}", "See the docs."
            )
        node_id = node_id or str(entry.get("id", ""))
        if not node_id:
            raise self.fail(entry.get("name", "?"), "has no id", 'Add `id: "6.1"`.')
        unknown = set(entry) - _KEYS[kind]
        if unknown:
            raise self.fail(
                node_id,
                f"unknown key {', '.join(map(repr, sorted(map(str, unknown))))}",
                f"Known: {', '.join(sorted(_KEYS[kind]))}.",
            )
        for key in ("name", "definition"):
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                raise self.fail(node_id, f"`{key}` is missing", "Write one as text.")
        return Node(
            id=node_id,
            name=entry["name"].strip(),
            definition=entry["definition"].strip(),
            kind=kind,
            parent=parent,
            synonyms=self.texts(entry, "synonyms", node_id),
        )

    def texts(self, entry: dict[str, Any], key: str, node_id: str) -> tuple[str, ...]:
        values = self.list_of(entry, key, node_id)
        for value in values:
            if not isinstance(value, str) or not value.strip():
                raise self.fail(node_id, f"`{key}` holds {value!r}", "Each entry must be text.")
        return tuple(v.strip() for v in values)

    def category(self, entry: Any, domain: str) -> tuple[Node, Node]:
        base = self.node(entry, "category", parent=domain)
        if len(set(base.synonyms)) < MIN_SYNONYMS:
            raise self.fail(
                base.id,
                f"{len(set(base.synonyms))} different synonyms",
                f"The bank needs at least {MIN_SYNONYMS} phrases.",
            )
        low, high = SYNONYM_WORDS
        for phrase in base.synonyms:
            if not low <= len(phrase.split()) <= high:
                raise self.fail(
                    base.id, f"synonym {phrase!r}", f"A phrase has {low} to {high} words."
                )
        severity = entry.get("severity", 2)
        if not isinstance(severity, int) or not 1 <= severity <= 4:
            raise self.fail(base.id, f"severity {severity!r}", "Give 1, 2, 3 or 4.")
        modality = entry.get("modality", "any")
        if modality not in ("any", "text"):
            raise self.fail(base.id, f"modality {modality!r}", "Give any or text.")
        crosswalk = entry.get("crosswalk", {})
        if not isinstance(crosswalk, dict) or not all(
            isinstance(v, list) for v in crosswalk.values()
        ):
            raise self.fail(base.id, "`crosswalk` is no mapping of lists", "scheme: [code, ...].")
        if "benign" not in entry:
            raise self.fail(base.id, "has no benign sibling", "Add `benign: {name, definition}`.")
        sibling_id = f"{SAFE_DOMAIN}.{base.id}"
        sibling = self.node(entry["benign"], "benign", parent=SAFE_DOMAIN, node_id=sibling_id)
        node = replace(
            base,
            severity=severity,
            should_not=self.texts(entry, "should_not", base.id),
            can=self.texts(entry, "can", base.id),
            sibling=sibling_id,
            crosswalk={str(k): tuple(map(str, v)) for k, v in crosswalk.items()},
            text_only=modality == "text",
        )
        return node, replace(sibling, sibling=node.id)
