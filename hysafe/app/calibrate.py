"""Thresholds from labelled items of a collection, as a policy; what they reach on other items.

Labels are split by a seeded hash of the items' content. Thresholds and the review band are chosen
on one part; every figure is measured on the other.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from hysafe.app.pipeline import SafetyModel
from hysafe.app.stored import judge_items, view_of
from hysafe.errors import ConfigError, InputError
from hysafe.evaluate.curves import Reliability, RiskCoverage, reliability, risk_coverage
from hysafe.index import Collection
from hysafe.score.calibration import fit_platt
from hysafe.score.leaves import NodeTable
from hysafe.score.thresholds import Counts, Rate, Target, choose_threshold, count_at
from hysafe.taxonomy import Node, Policy, PolicyView, Taxonomy
from hysafe.taxonomy.policy import DEFAULT_THRESHOLD, NodeRule

__all__ = [
    *("Calibrated", "Label", "NodeThreshold", "RatingFigures", "ReviewBand", "calibrate"),
    *("calibrated_json", "decided_labels", "read_labels", "write_plots", "write_policy"),
]

# Labelled items that a node applies to, from which it gets a threshold of its own.
LEAST_POSITIVES = 20
# Part of the labels on which thresholds are chosen; the rest measures them.
CHOOSING_SHARE = 0.5
# Shares sent to review at which the curve is printed.
REVIEW_SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
# Stored items judged at once.
BATCH = 2048
# Probabilities are kept this far from 0 and 1 before their log odds are taken.
EDGE = 1e-9
# A node whose threshold is the default has none of its own: one that falls on it is moved.
NUDGE = 1e-6
BAND_DIGITS = 6
TRUE, FALSE, UNKNOWN = 1, 0, -1
LEFT_OUT = "left out of the policy"

Use = Literal["auto", "all", "above", "none"]
USES: tuple[Use, ...] = ("all", "above", "none")


@dataclass(frozen=True)
class Label:
    """What a person says of an item.

    Args:
        id: of the item. safe: None where only nodes are given.
        nodes: ids that truly apply, () for none; None where only `safe` is given.
    """

    id: str
    safe: bool | None = None
    nodes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class NodeThreshold:
    """The threshold of a node.

    Args:
        node: id. before: threshold under the policy given. now: under the one made.
        proposal: chosen on the labels of this node, None where they are too few or no threshold
            reaches the target. chosen: the proposal is in force. why: it is not.
        positives: labelled items that the node applies to.
        reached: on the measuring part, at `now`.
    """

    node: str
    name: str
    before: float
    now: float
    proposal: float | None
    chosen: bool
    why: str
    positives: int
    reached: Counts


@dataclass(frozen=True)
class ReviewBand:
    """Items with low <= p_unsafe < high go to a person.

    Args:
        share: of the measuring part that goes. error: of the decisions on what is left of it.
        missed, alarms: its wrong decisions by kind.
    """

    low: float
    high: float
    share: Rate
    error: Rate
    missed: int
    alarms: int


@dataclass(frozen=True)
class RatingFigures:
    """Ratings of the measuring part under a policy, with all its rules: what a scan would say.

    Args:
        unsafe: counts of the rating unsafe. review: share rated review.
        error: share of wrong ratings among those that are not review.
    """

    unsafe: Counts
    review: Rate
    error: Rate

    def worse_than(self, other: RatingFigures) -> list[str]:
        """Which of precision and recall of the rating unsafe are surely lower (intervals apart)."""
        mine, theirs = self.unsafe, other.unsafe
        pairs = {
            "precision": (mine.precision, theirs.precision), "recall": (mine.recall, theirs.recall)
        }  # fmt: skip
        return [k for k, (a, b) in pairs.items() if a.n and a.interval[1] < b.interval[0]]

    def gains_nothing_over(self, other: RatingFigures) -> bool:
        """Whether neither precision nor recall of the rating unsafe is higher, and one is lower."""
        mine, theirs = ((f.unsafe.precision.value, f.unsafe.recall.value) for f in (self, other))
        pairs = list(zip(mine, theirs, strict=True))
        return any(a < b for a, b in pairs) and not any(a > b for a, b in pairs)

    def holds(self, target: Target, other: RatingFigures) -> bool:
        """Whether it is no worse than another, and as near to a target, as far as that reaches it."""
        if self.worse_than(other):
            return False
        if target.kind == "cost":
            return self.unsafe.cost(target) <= other.unsafe.cost(target)
        mine, theirs = (getattr(f.unsafe, target.kind).value for f in (self, other))
        return bool(mine >= min(target.value, theirs))


@dataclass(frozen=True)
class Calibrated:
    """What a calibration chose and what it reaches.

    Attributes:
        policy: the given one with the thresholds. target, seed: as given.
        p_unsafe: the threshold of the probability of risk (node ``p_unsafe``).
        use: which nodes got thresholds of their own.
        nodes: domains and categories that count under the policy, in the taxonomy's order.
        followers: categories that take the threshold of `p_unsafe`.
        before, alone, after: ratings under the policy given, with the threshold of `p_unsafe` only,
            and under the policy made.
        curve: review bands of growing share. chosen: the one asked for.
        reliability, selective: of p_unsafe on the measuring part.
        chosen_on, measured_on: labelled items of the two parts. unknown: of all, items whose labels
            do not say whether they are unsafe.
        absent: labels of items that the collection does not have. unreadable: labelled items
            without a score.
    """

    policy: Policy
    target: Target
    seed: int
    p_unsafe: NodeThreshold
    use: Use
    nodes: tuple[NodeThreshold, ...]
    followers: tuple[str, ...]
    before: RatingFigures
    alone: RatingFigures
    after: RatingFigures
    curve: tuple[ReviewBand, ...]
    chosen: ReviewBand | None
    reliability: Reliability
    selective: RiskCoverage
    chosen_on: int
    measured_on: int
    unknown: int
    absent: int
    unreadable: int


def calibrate(
    collection: Collection,
    model: SafetyModel,
    labels: Sequence[Label],
    target: Target,
    *,
    policy: Policy | None = None,
    least: int = LEAST_POSITIVES,
    share: float = CHOOSING_SHARE,
    seed: int = 0,
    review: float | None = None,
    review_error: float | None = None,
    use: Use = "auto",
) -> Calibrated:
    """Choose thresholds of nodes and of p_unsafe from labels, and measure them on other labels.

    Args:
        model: that of the collection; its towers are needed only for nodes new to it.
        labels: of some of its items. policy: by default the collection's own; its entries are kept.
        least: labelled items from which a node gets a threshold of its own.
        share: of the labels to choose on. seed: of the split.
        review, review_error: the share to send to review, or the error rate to leave; at most one.
        use: which nodes get their own thresholds: all; those above that of p_unsafe, which call
            nothing that it lets pass; none; auto, the first of these under which the ratings of
            the choosing part are as near to the target as under that of p_unsafe alone.

    Raises:
        ConfigError: a wrong setting, or labels of one kind only. CollectionError: another model.
    """
    _check_settings(least, share, review, review_error)
    collection.check_model(model.hash)
    view = view_of(collection, model, policy)
    table, _ = model.place(view)
    known, absent = _places(collection, labels)
    items = _scored(collection, model, view, known)
    unreadable = sum(i.p_unsafe is None for i in items)
    items = [i for i in items if i.p_unsafe is not None]
    choosing = torch.tensor([_hashed(i.content, seed) < share for i in items], dtype=torch.bool)
    p = torch.tensor([i.p_unsafe for i in items], dtype=torch.double)
    unsafe = torch.tensor([_unsafe(i.label, view) for i in items], dtype=torch.long)
    told = unsafe != UNKNOWN
    a, b = choosing & told, ~choosing & told
    _check_both_kinds(unsafe[a], unsafe[b], len(labels), absent)

    base_rule = _base_rule(table)
    base = base_rule[0]
    chosen = choose_threshold(p[a], unsafe[a] == TRUE, target)
    in_force = base if chosen is None else chosen
    overall = NodeThreshold(
        "p_unsafe", "probability of risk", base, in_force, chosen, chosen is not None,
        "" if chosen is not None else f"{target} not reached",
        int((unsafe == TRUE).sum()), count_at(p[b], unsafe[b] == TRUE, in_force),
    )  # fmt: skip
    nodes = _labelled_nodes(items, view, table)
    picks = nodes.choose(choosing, target, least)
    parts = [
        ([i for i, keep in zip(items, part.tolist(), strict=True) if keep], unsafe[part] == TRUE)
        for part in (a, b)
    ]

    def made(use: Use) -> tuple[Policy, tuple[str, ...], dict[str, float]]:
        own = {node: t for node, (t, _) in picks.items() if t is not None and use != "none"}
        if use == "above":
            own = {node: t for node, t in own.items() if t >= in_force}
        return *_with_thresholds(view, table, chosen, base_rule, own), own

    def rated(under: Policy, part: int) -> RatingFigures:
        return _ratings(collection, model, model.view(under), *parts[part])

    if use == "auto":
        plain = rated(made("none")[0], 0)
        fits = (u for u in USES if not made(u)[2] or rated(made(u)[0], 0).holds(target, plain))
        use = next(fits)
    policy_made, followers, own = made(use)
    alone = rated(made("none")[0], 1)
    truth = parts[1][1]
    bands = _Bands(p[a], unsafe[a] == TRUE, p[b], truth, in_force)
    return Calibrated(
        policy=policy_made,
        target=target,
        seed=seed,
        p_unsafe=overall,
        use=use,
        nodes=nodes.measure(~choosing, picks, own, view, model.view(policy_made)),
        followers=followers,
        before=rated(view.policy, 1),
        alone=alone,
        after=rated(policy_made, 1) if own else alone,
        curve=tuple(bands.of_share(s) for s in REVIEW_SHARES),
        chosen=(
            bands.of_share(review) if review is not None
            else bands.of_error(review_error) if review_error is not None
            else None
        ),
        reliability=reliability(p[b], truth),
        selective=bands.curve(),
        chosen_on=int(a.sum()),
        measured_on=int(b.sum()),
        unknown=int((~told).sum()),
        absent=absent,
        unreadable=unreadable,
    )  # fmt: skip


def read_labels(path: Path, taxonomy: Taxonomy) -> list[Label]:
    """Labels of a JSONL file: ``id`` and ``nodes`` (ids that truly apply, [] for none), ``safe`` or
    both.

    Raises:
        InputError: not readable, or a line is wrong; names the line and the remedy.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # an id may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Name a JSONL file.") from error
    labels: dict[str, Label] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label = _label(json.loads(line), taxonomy)
            if label.id in labels:
                raise ValueError(f"the id {label.id!r} is given twice. Keep one line of each item.")
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        labels[label.id] = label
    if not labels:
        raise InputError(f'{path}: no labels. Write lines like {{"id": ..., "nodes": []}}.')
    return list(labels.values())


def _label(data: Any, taxonomy: Taxonomy) -> Label:
    if not isinstance(data, dict) or not isinstance(data.get("id"), str):
        raise ValueError("expected an object with `id` and `nodes` or `safe`.")
    nodes, safe = data.get("nodes"), data.get("safe")
    if nodes is None and safe is None:
        raise ValueError("`nodes` and `safe` are missing. Give one: [] or true for harmless.")
    if safe is not None and not isinstance(safe, bool):
        raise ValueError(f"safe is {safe!r}. Give true or false.")
    if nodes is None:
        return Label(data["id"], safe)
    if not isinstance(nodes, list) or not all(isinstance(n, str) for n in nodes):
        raise ValueError('`nodes` is no list of ids. Write ["6.1"], in quotes.')
    unknown = [n for n in nodes if n not in taxonomy]
    if unknown:
        raise ValueError(f"no node {unknown[0]!r}. See: hysafe taxonomy")
    return Label(data["id"], safe, tuple(nodes))


def decided_labels(collection: Collection) -> list[Label]:
    """Decisions of people on a collection's items as labels; those to review say nothing.

    Raises:
        ConfigError: there are none.
    """
    labels = [
        Label(d.id, d.rating == "safe")
        for d in collection.decisions().values()
        if d.rating != "review"
    ]
    if not labels:
        raise ConfigError(
            f"{collection.folder}: no decisions of people. Give --labels FILE, or keep some: hysafe "
            "import COLLECTION DECISIONS"
        )
    return labels


# ---------------------------------------------------------------- items and truth


@dataclass(frozen=True)
class _Scored:
    """A labelled item with its place in the collection and its scores, None without a point."""

    label: Label
    place: int
    content: str
    p_unsafe: float | None
    scores: np.ndarray | None


def _places(
    collection: Collection, labels: Sequence[Label]
) -> tuple[list[tuple[int, Label, str]], int]:
    """Labels with the places and content hashes of their items, and how many have none."""
    table = collection.to_arrow(["id", "content_hash"])
    place = {name: i for i, name in enumerate(table["id"].to_pylist())}
    hashes = table["content_hash"].to_pylist()
    found = [
        (place[label.id], label, hashes[place[label.id]] or label.id)
        for label in sorted(labels, key=lambda label: place.get(label.id, -1))
        if label.id in place
    ]
    if not found:
        raise InputError(
            f"{collection.folder}: none of the {len(labels)} labels names an item, first id "
            f"{labels[0].id!r}. Ids stand in results.jsonl."
        )
    return found, len(labels) - len(found)


def _scored(
    collection: Collection,
    model: SafetyModel,
    view: PolicyView,
    known: Sequence[tuple[int, Label, str]],
) -> list[_Scored]:
    """Scores as the rating sees them: of several channels the highest."""
    scored = []
    for start in range(0, len(known), BATCH):
        part = known[start : start + BATCH]
        stored = collection.take([place for place, _, _ in part])
        p: list[float | None] = [None] * len(part)
        nodes: list[np.ndarray | None] = [None] * len(part)
        for channel in model.score_encoded(stored, view).values():
            for i, k in channel.at.items():
                before, highest = p[i], nodes[i]
                p[i] = max(channel.p_unsafe[k], before or 0.0)
                nodes[i] = (
                    channel.nodes[k] if highest is None else np.maximum(highest, channel.nodes[k])
                )
        scored += [
            _Scored(label, place, content, p[i], nodes[i])
            for i, (place, label, content) in enumerate(part)
        ]
    return scored


def _hashed(content: str, seed: int) -> float:
    """A number in [0, 1) from an item's content: equal content falls into one part."""
    digest = hashlib.sha256(f"{seed}/{content}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _unsafe(label: Label, view: PolicyView) -> int:
    """Whether an item is unsafe under a policy; UNKNOWN where its label is coarser than that."""
    if label.safe is not None:
        return FALSE if label.safe else TRUE
    nodes = label.nodes or ()
    if any(view.active(n) for n in nodes):
        return TRUE
    below = (d for n in nodes for d in _below(n, view.taxonomy))
    return UNKNOWN if any(view.active(d) for d in below) else FALSE


def _applies(label: Label, view: PolicyView, columns: Mapping[str, int]) -> np.ndarray:
    """TRUE, FALSE or UNKNOWN [len(columns)]: whether a label says that each node applies."""
    truth = np.full(len(columns), FALSE, dtype=np.int8)
    if label.nodes is None:
        return truth if label.safe else np.full_like(truth, UNKNOWN)
    # a label says nothing of the nodes below it
    for node in (d for n in label.nodes for d in _below(n, view.taxonomy)):
        if node in columns:
            truth[columns[node]] = UNKNOWN
    for node in (a for n in label.nodes if view.active(n) for a in view.taxonomy.path(n).ids):
        if node in columns:
            truth[columns[node]] = TRUE
    return truth


def _below(node: str, taxonomy: Taxonomy) -> Iterable[str]:
    for child in taxonomy.children(node):
        yield child.id
        yield from _below(child.id, taxonomy)


# ---------------------------------------------------------------- thresholds


@dataclass(frozen=True)
class _LabelledNodes:
    """Active domains and categories [M] over labelled items [n]: what is true, and the scores.

    Args:
        truth: [n, M], TRUE, FALSE or UNKNOWN. scores: [n, M].
    """

    nodes: tuple[Node, ...]
    truth: Tensor
    scores: Tensor

    def choose(
        self, choosing: Tensor, target: Target, least: int
    ) -> dict[str, tuple[float | None, str]]:
        """By node its threshold, or None and why."""
        picks: dict[str, tuple[float | None, str]] = {}
        for i, node in enumerate(self.nodes):
            true, told = self.truth[:, i] == TRUE, self.truth[:, i] != UNKNOWN
            a = choosing & told
            if int(true.sum()) < least:
                picks[node.id] = None, f"fewer than {least} positives"
            elif not bool(true[a].any()) or not bool(true[~choosing].any()):
                picks[node.id] = None, "no positives in one part"
            else:
                threshold = choose_threshold(self.scores[a, i], true[a], target)
                if threshold == DEFAULT_THRESHOLD:
                    threshold -= NUDGE
                picks[node.id] = threshold, "" if threshold is not None else f"{target} not reached"
        return picks

    def measure(
        self,
        measuring: Tensor,
        picks: Mapping[str, tuple[float | None, str]],
        own: Mapping[str, float],
        view: PolicyView,
        made: PolicyView,
    ) -> tuple[NodeThreshold, ...]:
        """What each node reaches under the policy made, which holds the thresholds `own`."""
        measured = []
        for i, node in enumerate(self.nodes):
            true, told = self.truth[:, i] == TRUE, self.truth[:, i] != UNKNOWN
            b = measuring & told
            proposal, why = picks[node.id]
            if proposal is not None and node.id not in own:
                why = LEFT_OUT
            now = own.get(node.id, made.threshold(node.id))
            measured.append(
                NodeThreshold(
                    node.id, node.name, view.threshold(node.id), now, proposal, node.id in own,
                    why, int(true.sum()), count_at(self.scores[b, i], true[b], now),
                )
            )  # fmt: skip
        return tuple(measured)


def _labelled_nodes(items: Sequence[_Scored], view: PolicyView, table: NodeTable) -> _LabelledNodes:
    nodes = tuple(n for n in view.taxonomy.of_kind("domain", "category") if view.active(n.id))
    columns = {n.id: i for i, n in enumerate(nodes)}
    rows = [table.index[n.id] for n in nodes]
    truths: dict[tuple[bool | None, tuple[str, ...] | None], np.ndarray] = {}
    for label in (i.label for i in items):
        if (label.safe, label.nodes) not in truths:
            truths[label.safe, label.nodes] = _applies(label, view, columns)
    truth = np.stack([truths[i.label.safe, i.label.nodes] for i in items])
    scores = np.stack([i.scores[rows] for i in items if i.scores is not None])
    return _LabelledNodes(nodes, torch.from_numpy(truth), torch.from_numpy(scores).double())


_Rule = tuple[float, str]


def _rule_of(view: PolicyView, node: str) -> _Rule:
    """What tells whether a node follows p_unsafe: a sensitive node among default ones does not, even
    where their threshold is that of sensitive nodes."""
    return view.threshold(node), view.status(node)


def _base_rule(table: NodeTable) -> _Rule:
    """Threshold and status of most categories: that of p_unsafe, as far as a policy has one."""
    view = table.view
    counts = Counter(_rule_of(view, table.leaf_ids[i]) for i in table.risk.nonzero()[:, 0].tolist())
    if not counts:
        raise ConfigError(
            f"policy {view.policy.name!r}: every category is off, there is nothing to calibrate."
        )
    return max(counts, key=lambda r: (counts[r], -abs(r[0] - DEFAULT_THRESHOLD)))


def _with_thresholds(
    view: PolicyView,
    table: NodeTable,
    chosen: float | None,
    base: _Rule,
    own: Mapping[str, float],
) -> tuple[Policy, tuple[str, ...]]:
    """The policy with thresholds of nodes, and of p_unsafe for all others that have the base rule; and
    these categories.

    Where all categories have one threshold t, the weighted risk reaches 0.5 exactly where p_unsafe
    reaches t: so the threshold of p_unsafe is written as that of the domains, and of categories
    whose domain has another.
    """
    rules = dict(view.policy.rules)
    name = view.policy.name.removesuffix(" calibrated") + " calibrated"
    policy = replace(view.policy, name=name.removeprefix("default "), rules=rules)
    made = PolicyView(policy, view.taxonomy)

    def put(node: str, threshold: float) -> None:
        if made.threshold(node) == threshold:
            return
        rule = rules.get(node, NodeRule())
        rules[node] = replace(rule, threshold=None)
        if made.threshold(node) != threshold:
            rules[node] = replace(rule, threshold=threshold)
        elif rules[node] == NodeRule():  # what it inherits is enough
            del rules[node]

    def follows(node: str) -> bool:
        return chosen is not None and node not in own and _rule_of(view, node) == base

    def wanted(node: str) -> float:
        if chosen is not None and follows(node):
            return chosen
        return own.get(node, view.threshold(node))

    for domain in view.taxonomy.of_kind("domain"):
        if view.active(domain.id):
            put(domain.id, wanted(domain.id))
    categories = [table.leaf_ids[i] for i in table.risk.nonzero()[:, 0].tolist()]
    for category in categories:
        put(category, wanted(category))
    return policy, tuple(c for c in categories if follows(c))


# ---------------------------------------------------------------- ratings and review


def _ratings(
    collection: Collection,
    model: SafetyModel,
    view: PolicyView,
    items: Sequence[_Scored],
    unsafe: Tensor,
) -> RatingFigures:
    """Ratings of items under a view by the code of a scan, beside the truth."""
    model.place(view)
    counts: Counter[tuple[str, bool]] = Counter()
    truth = unsafe.tolist()
    for start in range(0, len(items), BATCH):
        stored = collection.take([i.place for i in items[start : start + BATCH]])
        judged = judge_items(collection, model, view, stored)
        counts.update(
            (j.result.rating, t) for j, t in zip(judged, truth[start : start + BATCH], strict=True)
        )
    said = Counts(
        counts["unsafe", True], counts["unsafe", False],
        counts["safe", True] + counts["review", True],
        counts["safe", False] + counts["review", False],
    )  # fmt: skip
    review = counts["review", True] + counts["review", False]
    wrong = counts["unsafe", False] + counts["safe", True]
    return RatingFigures(said, Rate(review, len(items)), Rate(wrong, len(items) - review))


class _Bands:
    """Review bands around a threshold, chosen on some items (p, unsafe), measured on others.

    An item's confidence is the chance that its decision is right, by a Platt scaling of p_unsafe on
    the choosing part: the model's own calibration need not hold for this collection.
    """

    def __init__(
        self, p: Tensor, unsafe: Tensor, p_rest: Tensor, unsafe_rest: Tensor, threshold: float
    ) -> None:
        self.p, self.unsafe, self.threshold = p, unsafe, threshold
        self.p_rest, self.unsafe_rest = p_rest, unsafe_rest
        self.slope, self.offset = fit_platt(_log_odds(p), unsafe)
        self.confidence = self._confidence(p)

    def _confidence(self, p: Tensor) -> Tensor:
        posterior = torch.sigmoid(self.slope * _log_odds(p) + self.offset)
        return torch.where(p >= self.threshold, posterior, 1 - posterior)

    def _wrong(self, p: Tensor, unsafe: Tensor) -> Tensor:
        return (p >= self.threshold) != unsafe

    def curve(self) -> RiskCoverage:
        """Risk against coverage on the measuring part."""
        return risk_coverage(
            self._confidence(self.p_rest), self._wrong(self.p_rest, self.unsafe_rest)
        )

    def of_share(self, share: float) -> ReviewBand:
        """The widest band that takes at most a share of the choosing part."""
        return self._measured(int(share * len(self.p) + EDGE))

    def of_error(self, rate: float) -> ReviewBand:
        """The narrowest band that leaves at most an error rate on the choosing part."""
        wrong = self._wrong(self.p, self.unsafe)[self.confidence.argsort()]
        left = wrong.flip(0).cumsum(0).flip(0)  # errors among what is left
        rest = torch.arange(len(wrong), 0, -1)
        reached = (left <= rate * rest + EDGE).nonzero()[:, 0]
        return self._measured(int(reached[0]) if len(reached) else len(wrong))

    def _measured(self, count: int) -> ReviewBand:
        """The band of the `count` least confident items of the choosing part."""
        t, ordered = self.threshold, self.p[self.confidence.argsort()]
        taken, rest = ordered[:count], ordered[count:]
        low = high = t
        # to half way between what is taken and what is left, on either side
        if len(below := taken[taken < t]):
            left = rest[rest < t]
            low = (float(below.min()) + (float(left.max()) if len(left) else 0.0)) / 2
        if len(above := taken[taken >= t]):
            left = rest[rest >= t]
            high = (float(above.max()) + float(left.min())) / 2 if len(left) else 1 + NUDGE
        low, high = round(low, BAND_DIGITS), round(high, BAND_DIGITS)
        inside = (self.p_rest >= low) & (self.p_rest < high)
        wrong = self._wrong(self.p_rest, self.unsafe_rest) & ~inside
        missed = int((wrong & self.unsafe_rest).sum())
        share = Rate(int(inside.sum()), len(inside))
        error = Rate(int(wrong.sum()), int((~inside).sum()))
        return ReviewBand(low, high, share, error, missed, error.hits - missed)


def _log_odds(p: Tensor) -> Tensor:
    return torch.logit(p.double(), eps=EDGE)


# ---------------------------------------------------------------- settings


def _check_settings(
    least: int, share: float, review: float | None, review_error: float | None
) -> None:
    if least < 2:
        raise ConfigError(f"--least is {least}. Give at least 2: one to choose on, one to measure.")
    if not 0 < share < 1:
        raise ConfigError(f"--share is {share}. Give a number between 0 and 1.")
    if review is not None and review_error is not None:
        raise ConfigError("Give one of --review and --review-error.")
    for name, value in (("--review", review), ("--review-error", review_error)):
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"{name} is {value}. Give a share: at least 0, below 1.")


def _check_both_kinds(chosen: Tensor, measured: Tensor, labels: int, absent: int) -> None:
    for part, unsafe in (("to choose on", chosen), ("to measure", measured)):
        kinds = {int(v) for v in unsafe.unique()}
        if kinds != {TRUE, FALSE}:
            raise ConfigError(
                f"{labels} labels, {absent} of them of items that are not there: the part {part} "
                f"has {int((unsafe == TRUE).sum())} unsafe and {int((unsafe == FALSE).sum())} "
                "harmless items, wanted some of each. Label more items, or try another --seed."
            )


# ---------------------------------------------------------------- output


def write_policy(path: Path, calibrated: Calibrated, collection: Collection) -> None:
    """Write the policy as YAML, with what made it in comments.

    Raises:
        InputError: the file cannot be written.
    """
    meta, c = collection.meta, calibrated
    head = [
        f"Thresholds by hysafe calibrate: {c.target}, seed {c.seed}, chosen on {c.chosen_on} and "
        f"measured on {c.measured_on} labelled items.",
        f"For the model {' '.join(meta.model_name.split())} ({meta.model}) and the taxonomy "
        f"{meta.taxonomy}: scores of others mean something else.",
    ]
    text = "".join(f"# {line}\n" for line in head) + yaml.safe_dump(
        c.policy.to_dict(), sort_keys=False, allow_unicode=True
    )
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"--out {path}: cannot be written ({error.strerror}). Name another file."
        ) from error


def write_plots(folder: Path, calibrated: Calibrated) -> list[Path]:
    """Draw reliability and risk against coverage of p_unsafe on the measuring part.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    from hysafe.evaluate.plots import plot_reliability, plot_risk_coverage

    c = calibrated
    title = f"{c.measured_on} labelled items"
    return [
        *plot_reliability(folder / "reliability", {title: {"p_unsafe": c.reliability}}),
        *plot_risk_coverage(folder / "risk_coverage", {title: {"p_unsafe": c.selective}}),
    ]


def calibrated_json(calibrated: Calibrated) -> dict[str, Any]:
    """All of it as plain data."""
    c = calibrated
    return {
        "target": str(c.target),
        "seed": c.seed,
        "labels": {
            "chosen_on": c.chosen_on, "measured_on": c.measured_on, "unknown": c.unknown,
            "absent": c.absent, "unreadable": c.unreadable,
        },
        "p_unsafe": _node_json(c.p_unsafe),
        "use": c.use,
        "nodes": [_node_json(n) for n in c.nodes],
        "followers": list(c.followers),
        "rating": {
            "before": _ratings_json(c.before), "p_unsafe_alone": _ratings_json(c.alone),
            "after": _ratings_json(c.after),
        },
        "review": {
            "curve": [_band_json(b) for b in c.curve],
            "chosen": _band_json(c.chosen) if c.chosen else None,
            "aurc": round(c.selective.area, 6),
        },
        "reliability": {
            "ece": round(c.reliability.error, 6),
            "confidence": [round(v, 6) for v in c.reliability.confidence.tolist()],
            "frequency": [round(v, 6) for v in c.reliability.frequency.tolist()],
            "size": c.reliability.size.tolist(),
        },
        "policy": c.policy.to_dict(),
    }  # fmt: skip


def _node_json(node: NodeThreshold) -> dict[str, Any]:
    return {
        "node": node.node, "name": node.name, "positives": node.positives, "before": node.before,
        "threshold": node.now, "proposal": node.proposal, "chosen": node.chosen,
        "why_not": node.why or None,
        "precision": _rate_json(node.reached.precision),
        "recall": _rate_json(node.reached.recall),
    }  # fmt: skip


def _ratings_json(figures: RatingFigures) -> dict[str, Any]:
    return {
        "unsafe_precision": _rate_json(figures.unsafe.precision),
        "unsafe_recall": _rate_json(figures.unsafe.recall),
        "review": _rate_json(figures.review),
        "error": _rate_json(figures.error),
    }


def _band_json(band: ReviewBand) -> dict[str, Any]:
    return {
        "low": band.low, "high": band.high, "share": _rate_json(band.share),
        "error": _rate_json(band.error), "missed": band.missed, "alarms": band.alarms,
    }  # fmt: skip


def _rate_json(rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    return {
        "value": round(rate.value, 6) if rate.n else None, "low": round(low, 6),
        "high": round(high, 6), "hits": rate.hits, "n": rate.n,
    }  # fmt: skip
