"""Proposed nodes: what a cluster would be called and where it would stand, for a person to decide.

A proposal file is YAML: what a person may edit (name, parent, definition, synonyms, ``accept``) and,
below it, what speaks for the proposal. :func:`accepted_policy` turns accepted proposals into nodes of
a policy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from hysafe.discover.clusters import Cluster
from hysafe.errors import ConfigError, InputError
from hysafe.geometry import Points
from hysafe.guard.naming import Naming
from hysafe.guard.rewards import token_f1
from hysafe.taxonomy import Policy, PolicyView, Taxonomy
from hysafe.taxonomy.policy import Example, example_of, is_example, read_example_texts
from hysafe.taxonomy.reading import parse_yaml, read_text

__all__ = [
    *("Near", "Proposal", "accepted_policy", "best_parent", "central_name", "propose"),
    *("read_proposals", "write_proposals"),
]

# Further names that a proposal takes as synonyms, and nodes and items it shows.
SYNONYMS, NEAREST, EXAMPLES = 6, 4, 8
# A further name counts if two members have it; of names that one member has, so many are taken.
SINGLE = 2
# Names that share this much of their words (F1) agree.
AGREE = 0.5
# A domain holds a cluster if its cone holds more than this share of the members.
MOST = 0.5
DIGITS = 4
# What a person may give a proposal, beside its key: it becomes the node's rule.
RULE = ("parent", "name", "definition", "synonyms", "example_texts", "threshold", "status")
MARK = "Proposed: "

HEAD = """\
# Proposed by hysafe discover. Read the examples, correct name, parent, definition and synonyms, set
# `accept: true` where the proposal is right, then: hysafe discover accept THIS_FILE --out policy.yaml
# `parent` is a domain (D6: a new category), a category (6.1: a concept of it) or S (a harmless place).
# `example_texts` and `pictures` become the examples of the node, by which texts and pictures are judged:
# remove wrong ones.
"""


class Near(NamedTuple):
    """An active category near a cluster: mean cone margin of the members in radians (> 0 inside),
    and geodesic distance of the medoid to the apex."""

    node: str
    name: str
    margin: float
    distance: float


class Named(NamedTuple):
    """What the members of a cluster are called: the most central name, the share of members whose
    names agree with it, and further names, most central first: those of two members or more, or,
    where there are few, the first of the others."""

    name: str
    agreement: float
    others: tuple[str, ...]


@dataclass(frozen=True)
class Proposal:
    """A cluster as a node that a policy might have.

    Args:
        key: number in its file.
        rule: of the node: parent, name, definition, synonyms, example texts, and what a person adds.
        accept: a person said yes.
        size: members. channel: ``image``, ``text`` or ``ocr``. purity: see
            :class:`hysafe.discover.clusters.Cluster`. agreement: see :class:`Named`.
        held: share of the members in the parent's cone. p_unsafe: mean of the members.
        nearest: active categories, nearest first. examples: ids of items, the medoid first.
        rationale: the namer's, for the name. pictures: files of members, for the node's examples.
    """

    key: int
    rule: Mapping[str, Any]
    accept: bool = False
    size: int = 0
    channel: str = ""
    purity: float = 0.0
    agreement: float = 0.0
    held: float = 0.0
    p_unsafe: float = 0.0
    nearest: tuple[Near, ...] = ()
    examples: tuple[str, ...] = ()
    rationale: str = ""
    pictures: tuple[Example, ...] = ()
    # rows of the members, the medoid first; not in the file
    members: tuple[int, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        return str(self.rule["name"])

    @property
    def parent(self) -> str:
        return str(self.rule["parent"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in a proposal file."""
        return {
            "key": self.key, "accept": self.accept, **self.rule,
            "size": self.size, "channel": self.channel, "purity": round(self.purity, DIGITS),
            "agreement": round(self.agreement, DIGITS), "held": round(self.held, DIGITS),
            "p_unsafe": round(self.p_unsafe, DIGITS),
            "nearest": [
                {"node": n.node, "name": n.name, "margin": round(n.margin, DIGITS),
                 "distance": round(n.distance, DIGITS)} for n in self.nearest
            ],
            "rationale": self.rationale, "examples": list(self.examples),
            **({"pictures": [asdict(e) for e in self.pictures]} if self.pictures else {}),
        }  # fmt: skip


def propose(
    cluster: Cluster,
    names: Sequence[Naming | None],
    encode: Callable[[Sequence[str]], np.ndarray],
    margins: np.ndarray,
    medoid: Points,
    apexes: Points,
    view: PolicyView,
    *,
    ids: Sequence[str],
    channel: str = "",
    p_unsafe: float = 0.0,
    key: int = 1,
    pictures: Sequence[Example] = (),
    texts: Sequence[str] = (),
) -> Proposal:
    """The node that a cluster of n items would be.

    Args:
        names: of the first members, as many as were named.
        encode: texts -> tangent vectors [T, D], to compare names with each other.
        margins: cone margins of the members to all nodes of the view [n, N].
        medoid: point of the medoid [1, D]. apexes: of the nodes [N, D], in taxonomy order.
        ids: of the members. p_unsafe: their mean.
        key: number of the proposal. pictures: files of members. texts: of members, for the node's
            example texts.
    """
    called = central_name([n.name for n in names if n is not None], encode)
    parent, held = best_parent(margins, view)
    nearest = _nearest(margins, medoid, apexes, view)
    name = called.name if called is not None else f"Unnamed {key}"
    others = called.others[:SYNONYMS] if called is not None else ()
    why = next((n.rationale for n in names if n is not None and n.name == name), "")
    rule = {
        "name": _capital(name), "parent": parent, "definition": _definition(name, others),
        "synonyms": [name, *others] if called is not None else [],
        **({"example_texts": list(texts)} if texts else {}),
    }  # fmt: skip
    return Proposal(
        key, rule, False, len(cluster.members), channel, cluster.purity,
        called.agreement if called is not None else 0.0, held, p_unsafe, nearest,
        tuple(ids[:EXAMPLES]), why, tuple(pictures),
        tuple(cluster.members.tolist()),
    )  # fmt: skip


def central_name(
    names: Sequence[str], encode: Callable[[Sequence[str]], np.ndarray]
) -> Named | None:
    """The name that is most like all of them, by the cosine of their vectors; None of none."""
    votes = Counter(names)
    if not votes:
        return None
    distinct = list(votes)
    vectors = np.asarray(encode(distinct), np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    weight = np.array([votes[n] for n in distinct], np.float64)
    centrality = units @ units.T @ weight
    order = np.lexsort((np.array(distinct), -weight, -np.round(centrality, 6)))
    first, *rest = (distinct[k] for k in order)
    agreed = sum(
        n for name, n in votes.items() if name == first or token_f1(name, [first]) >= AGREE
    )
    shared = [name for name in rest if votes[name] > 1]
    single = [name for name in rest if votes[name] == 1][: max(0, SINGLE - len(shared))]
    return Named(first, agreed / len(names), tuple(n for n in rest if n in (*shared, *single)))


def best_parent(margins: np.ndarray, view: PolicyView) -> tuple[str, float]:
    """The active domain whose cone holds most of the members [n, N], and the share it holds.

    Where no cone holds more than half of them, the domain with the greatest mean margin.

    Raises:
        ConfigError: the policy has no active domain.
    """
    nodes = list(view.taxonomy)
    columns = [i for i, n in enumerate(nodes) if n.kind == "domain" and view.active(n.id)]
    if not columns:
        raise ConfigError(
            f"the policy {view.policy.name!r} has no domain that is on, so a new node has no parent. "
            "Switch one on."
        )
    own = margins[:, columns]
    shares, means = (own > 0).mean(0), own.mean(0)
    holds = shares > MOST
    best = max(range(len(columns)), key=lambda k: (shares[k] if holds[k] else 0.0, means[k]))
    return nodes[columns[best]].id, float(shares[best])


def _nearest(
    margins: np.ndarray, medoid: Points, apexes: Points, view: PolicyView
) -> tuple[Near, ...]:
    means = margins.mean(0)
    nodes = list(view.taxonomy)
    found = [i for i, n in enumerate(nodes) if n.kind == "category" and view.active(n.id)]
    found = sorted(found, key=lambda i: -means[i])[:NEAREST]
    if not found:
        return ()
    distances = medoid.dist(apexes[found])[0].tolist()
    return tuple(
        Near(nodes[i].id, nodes[i].name, float(means[i]), d)
        for i, d in zip(found, distances, strict=True)
    )


def _definition(name: str, others: Sequence[str]) -> str:
    """A sentence from the names alone: names of neighbours would draw the node towards them."""
    also = f", also {', '.join(others[:2])}" if others else ""
    return f"{MARK}content about {name}{also}."


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


# ---------------------------------------------------------------- the file


def write_proposals(
    path: Path, proposals: Sequence[Proposal], policy: Policy, facts: Mapping[str, Any]
) -> None:
    """Write a proposal file, whole or not at all.

    Args:
        policy: that the items were judged under; new nodes are added to it.
        facts: where the proposals come from.

    Raises:
        InputError: the file cannot be written.
    """
    data = {
        **facts,
        "policy": policy.to_dict(),
        "proposals": [p.to_dict() for p in proposals],
    }
    text = HEAD + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}). Name another file."
        ) from error


def read_proposals(path: str | Path) -> tuple[list[Proposal], Policy, dict[str, Any]]:
    """Proposals of a file as a person left it, the policy they were made under, and the facts.

    Raises:
        TaxonomyError: the file cannot be read, is no YAML, or its policy is not valid.
        ConfigError: it is no proposal file, or a proposal lacks something.
    """
    data = parse_yaml(read_text(path), origin=str(path))
    if not isinstance(data, dict) or not isinstance(data.get("proposals"), list):
        raise ConfigError(f"{path}: no list `proposals`. Give a file that hysafe discover wrote.")
    proposals = [_read(p, str(path)) for p in data["proposals"]]
    keys = [p.key for p in proposals]
    if len(set(keys)) < len(keys):
        twice = sorted({k for k in keys if keys.count(k) > 1})
        raise ConfigError(f"{path}: key {twice[0]} is given twice. Number the proposals anew.")
    policy = Policy.from_dict(data.get("policy") or {}, origin=f"{path}: policy")
    facts = {k: v for k, v in data.items() if k not in ("policy", "proposals")}
    return proposals, policy, facts


def _read(data: Any, origin: str) -> Proposal:
    key = data.get("key") if isinstance(data, dict) else None
    if not isinstance(key, int) or isinstance(key, bool):
        raise ConfigError(f"{origin}: a proposal without a number as its `key`. Give it one.")
    accept = data.get("accept", False)
    if not isinstance(accept, bool):
        raise ConfigError(f"{origin}: proposal {key}: accept is {accept!r}. Write true or false.")
    rule = {k: data[k] for k in RULE if data.get(k) is not None}
    for needed in ("name", "parent", "definition"):
        if not isinstance(rule.get(needed), str) or not rule[needed].strip():
            raise ConfigError(f"{origin}: proposal {key}: no `{needed}`. Write it as text.")
    read_example_texts(
        rule.get("example_texts"),
        lambda problem, remedy: ConfigError(f"{origin}: proposal {key}: {problem}. {remedy}"),
    )
    pictures = data.get("pictures") or []
    if not isinstance(pictures, list) or not all(map(is_example, pictures)):
        raise ConfigError(
            f"{origin}: proposal {key}: `pictures` is no list of files. Write [picture.jpg, "
            "picture.png], or remove it."
        )
    examples = tuple(
        example_of(e, f"{origin}: proposal {key}", Path(origin).parent) for e in pictures
    )
    found = Proposal(
        key, rule, accept, examples=tuple(map(str, data.get("examples") or ())), pictures=examples
    )
    shown = {k: data[k] for k in ("channel", "rationale") if isinstance(data.get(k), str)}
    numbers = {
        k: data[k] for k in ("size", "purity", "agreement", "held", "p_unsafe")
        if isinstance(data.get(k), int | float)
    }  # fmt: skip
    return replace(found, **shown, **numbers)


# ---------------------------------------------------------------- into a policy


def accepted_policy(
    proposals: Iterable[Proposal],
    policy: Policy,
    taxonomy: Taxonomy,
    *,
    only: Sequence[int] | None = None,
) -> tuple[Policy, dict[int, str]]:
    """A policy with the accepted proposals as nodes, and the id of each by its key.

    Args:
        policy: to add to; its nodes keep their ids.
        taxonomy: that the policy is over.
        only: keys to take, whatever their `accept` says; by default those a person accepted.

    Raises:
        ConfigError: no proposal is accepted, or none has a key that was asked for.
        TaxonomyError: a proposal's parent is not there or can have no children.
    """
    listed = list(proposals)
    known = {p.key for p in listed}
    if unknown := sorted(set(only or ()) - known):
        raise ConfigError(
            f"no proposal {', '.join(map(str, unknown))}. The file has "
            f"{', '.join(map(str, sorted(known))) or 'none'}."
        )
    taken = [p for p in listed if (p.accept if only is None else p.key in only)]
    if not taken:
        raise ConfigError(
            "no proposal is accepted. Set `accept: true` in the file, or name some: --only 1,2."
        )
    data = policy.to_dict()
    added: dict[int, str] = {}
    number = 0
    for proposal in taken:
        number = next(
            n for n in range(number + 1, number + len(data["nodes"]) + len(taxonomy) + 2)
            if f"x.{n}" not in data["nodes"] and f"x.{n}" not in taxonomy
        )  # fmt: skip
        added[proposal.key] = f"x.{number}"
        parent = proposal.parent
        text_only = parent in taxonomy and taxonomy[parent].text_only  # takes no pictures
        shown = [] if text_only else [asdict(e) for e in proposal.pictures]
        data["nodes"][f"x.{number}"] = {**proposal.rule, **({"examples": shown} if shown else {})}
    made = Policy.from_dict(data, origin="accepted proposals")
    made.apply(taxonomy)
    return made, added
