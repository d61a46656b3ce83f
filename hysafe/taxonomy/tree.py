"""The safety taxonomy: a tree of nodes read from YAML, validated, hashed.

Three levels below the root: domains, categories, concepts. Beside the risk domains stands one safe
domain, ``S``: it holds the benign sibling of every category and the background of everyday content,
so that "harmless" is a place in the same space and not just the absence of risk.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import resources
from typing import Any, Literal

from hysafe.errors import TaxonomyError
from hysafe.taxonomy.reading import parse_yaml, read_text

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
    "safe_domain": {"name", "definition", "synonyms", "background"},
}
_TOP_KEYS = {"name", "version", "licence", "domains", "safe"}
# Sources of concepts that are a published system: its name is the scheme of the crosswalk, the
# concept's name the code.
_SOURCE_SCHEMES = {"UnsafeConcepts": "unsafe_concepts"}


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
        crosswalk: scheme -> codes of other taxonomies; categories, and concepts taken from one.
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
                raise TaxonomyError(
                    f"{origin}: node {node.id}: name or definition is empty. Write both as text."
                )
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
        return Taxonomy(table.values(), name=self.name, version=self.version, origin=self.origin)

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
        return _taxonomy(parse_yaml(text, origin="taxonomy.yaml", trusted=True), "taxonomy.yaml")
    return parse_taxonomy(read_text(path), origin=str(path))


def parse_taxonomy(text: str, *, origin: str) -> Taxonomy:
    """Taxonomy from YAML text; `origin` is the file name for messages."""
    return _taxonomy(parse_yaml(text, origin=origin), origin)


def _taxonomy(data: Any, origin: str) -> Taxonomy:
    if not isinstance(data, dict) or not isinstance(data.get("domains"), list):
        raise TaxonomyError(
            f"{origin}: expected a mapping with a list `domains`, got {_short(data)}. "
            "Write `domains:` and below it `- id: ...`."
        )
    reader = _Reader(origin)
    reader.known_keys(data, _TOP_KEYS, "(top)")
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
                child = reader.concept(concept, node.id)
                nodes.append(replace(child, text_only=node.text_only))
    safe = {"name": "Harmless content", "definition": "Content that harms nobody."}
    if data.get("safe") is not None:
        if not isinstance(data["safe"], dict):
            raise reader.fail(
                SAFE_DOMAIN, f"`safe` is {_short(data['safe'])}", "Make it a mapping."
            )
        safe |= data["safe"]
    nodes.append(reader.node(safe, "safe_domain", parent=None, node_id=SAFE_DOMAIN))
    nodes.extend(siblings)
    for entry in reader.list_of(safe, "background", SAFE_DOMAIN):
        nodes.append(reader.node(entry, "background", parent=SAFE_DOMAIN))
    return Taxonomy(
        nodes,
        name=str(data.get("name", "taxonomy")),
        version=str(data.get("version", "0")),
        origin=origin,
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Reader:
    """Turns YAML mappings into nodes; every complaint names file and node."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def fail(self, node: object, problem: str, remedy: str) -> TaxonomyError:
        return TaxonomyError(f"{self.origin}: node {node}: {problem}. {remedy}")

    def list_of(self, entry: dict[str, Any], key: str, node_id: str) -> list[Any]:
        value = entry.get(key, [])
        if not isinstance(value, list):
            raise self.fail(node_id, f"`{key}` is {_short(value)}", "Make it a list.")
        return value

    def known_keys(self, entry: dict[str, Any], known: set[str], node_id: str) -> None:
        unknown = set(entry) - known
        if unknown:
            raise self.fail(
                node_id,
                f"unknown key {', '.join(map(repr, sorted(unknown)))}",
                f"Known: {', '.join(sorted(known))}.",
            )

    def node(self, entry: Any, kind: Kind, *, parent: str | None, node_id: str = "") -> Node:
        if not isinstance(entry, dict):
            raise self.fail(
                node_id or f"below {parent or 'domains'}",
                f"expected a mapping, got {_short(entry)}",
                'Write `id: "6.1"`, `name: ...`, `definition: ...`.',
            )
        if not node_id:
            value = entry.get("id")
            if value is None or value == "":
                raise self.fail(entry.get("name", "?"), "has no id", 'Add `id: "6.1"`.')
            if not isinstance(value, str):  # 6.10 is the number 6.1 to YAML
                raise self.fail(value, "the id is no text", f'Put it in quotes: `id: "{value}"`.')
            node_id = value
        self.known_keys(entry, _KEYS[kind], node_id)
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
                raise self.fail(
                    node_id, f"`{key}` holds {_short(value)}", "Write each entry as quoted text."
                )
        return tuple(v.strip() for v in values)

    def concept(self, entry: Any, category: str) -> Node:
        base = self.node(entry, "concept", parent=category)
        source = entry.get("source", "")
        if not isinstance(source, str):
            raise self.fail(base.id, f"`source` is {_short(source)}", "Write it as text.")
        scheme = _SOURCE_SCHEMES.get(source)
        return replace(base, crosswalk={scheme: (base.name,)}) if scheme else base

    def category(self, entry: Any, domain: str) -> tuple[Node, Node]:
        base = self.node(entry, "category", parent=domain)
        if len(set(base.synonyms)) < MIN_SYNONYMS:
            raise self.fail(
                base.id,
                f"has {len(set(base.synonyms))} different synonyms",
                f"The bank needs at least {MIN_SYNONYMS} phrases.",
            )
        low, high = SYNONYM_WORDS
        for phrase in base.synonyms:
            if not low <= len(phrase.split()) <= high:
                raise self.fail(
                    base.id,
                    f"synonym {phrase!r} has {len(phrase.split())} words",
                    f"Give {low} to {high}.",
                )
        severity = entry.get("severity", 2)
        if type(severity) is not int or not 1 <= severity <= 4:
            raise self.fail(base.id, f"severity {severity!r}", "Give 1, 2, 3 or 4.")
        modality = entry.get("modality", "any")
        if modality not in ("any", "text"):
            raise self.fail(base.id, f"modality {modality!r}", "Give any or text.")
        crosswalk = entry.get("crosswalk", {})
        if not isinstance(crosswalk, dict):
            raise self.fail(
                base.id, f"`crosswalk` is {_short(crosswalk)}", "Write {scheme: [code, ...]}."
            )
        codes = {k: self.texts(crosswalk, k, base.id) for k in crosswalk}
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
            crosswalk=codes,
            text_only=modality == "text",
        )
        return node, replace(sibling, sibling=node.id)
