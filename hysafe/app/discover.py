"""What a collection's policy does not name, as proposed nodes: ``hysafe discover``.

An item is novel where one of its novelty p-values is at most alpha, or where it is rated unsafe or
review and no node is listed for it. Of each novel item the channel that is most novel counts; items of
different channels are never in one cluster, for their points lie apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hysafe.app.gallery import Card, card_of, write_gallery
from hysafe.app.pipeline import Channel, SafetyModel
from hysafe.app.report import NOVEL_AT
from hysafe.app.stored import judge_items, read_media, view_of
from hysafe.discover import (
    Proposal,
    accepted_policy,
    find_clusters,
    propose,
    read_proposals,
    write_proposals,
)
from hysafe.discover.proposals import write_text
from hysafe.errors import ConfigError
from hysafe.geometry import Points
from hysafe.guard.naming import Namer, PhraseNamer, Whitening
from hysafe.guard.similarity import minilm_embed
from hysafe.index import Collection, EncodedItem
from hysafe.taxonomy import Policy, PolicyView, Taxonomy
from hysafe.taxonomy.policy import MAX_EXAMPLE_LENGTH, Example, distinct_texts

__all__ = [
    *("PROPOSALS", "Accepted", "Discovery", "accept", "discover", "load_namer", "novel_places"),
    *("write_discovery", "write_page"),
]

PROPOSALS = "proposals.yaml"
# Novel items that are looked at; of more, a sample. Ordinary items that the space is whitened by.
MOST_ITEMS, REFERENCE = 20_000, 4000
# Members of a cluster that are named, those nearest to its middle, and those that a new node takes as examples.
NAMED, SHOWN = 48, 20
CHUNK = 2048
NOVELTY = ("novelty_policy", "novelty_distribution")
COLUMNS = (*NOVELTY, "rating", "node", "error")
CHANNELS = ("image", "text", "ocr")
CHANNEL_WORDS = {"image": "pictures", "text": "texts", "ocr": "pictures by the text in them"}


@dataclass(frozen=True)
class Discovery:
    """What was found.

    Args:
        proposals: one for each cluster, largest first.
        items, novel, used: in the collection, novel ones, and those of them that were looked at.
        view: the policy they were judged under.
        places: channel -> place in the collection of each of its novel items, to which the members
            of a proposal point.
    """

    proposals: list[Proposal]
    items: int
    novel: int
    used: int
    view: PolicyView
    alpha: float
    namer: str
    places: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def clustered(self) -> int:
        """Items in a cluster."""
        return sum(p.size for p in self.proposals)

    def members(self, proposal: Proposal) -> np.ndarray:
        """Places in the collection of a proposal's members, the medoid first."""
        return self.places[proposal.channel][list(proposal.members)]


@dataclass
class _Novel:
    """Novel items of one channel: their places, ids, vectors, risk and text, and whether the vector is of
    the whole text."""

    places: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)
    p_unsafe: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def discover(
    collection: Collection,
    model: SafetyModel,
    *,
    namer: str | Namer = "phrases",
    alpha: float = NOVEL_AT,
    min_size: int = 8,
    most: int = MOST_ITEMS,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Discovery:
    """Cluster the novel items of a collection and propose a node for each cluster.

    Args:
        model: that of the collection, with its towers, which encode the names.
        namer: a name for :func:`load_namer`, or a namer.
        alpha: p-value at or below which an item is novel.
        min_size: items that a cluster has at least.
        most: novel items that are looked at; where there are more, a sample of this size.
        seed: of the samples; the same collection and seed give the same proposals.
        progress: called with what is being done.

    Raises:
        CollectionError: another model or taxonomy. ConfigError: a wrong argument.
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"--alpha is {alpha:g}. Give a p-value between 0 and 1.")
    if min_size < 2 or most < 2:
        raise ConfigError("--min-size and --most must be at least 2.")
    say = progress or (lambda _: None)
    collection.check_model(model.hash)
    view = view_of(collection, model, None)
    novel = novel_places(collection, alpha)
    rng = np.random.default_rng(seed)
    used = novel if len(novel) <= most else np.sort(rng.choice(novel, most, replace=False))
    say("reading novel items")
    by_channel = _novel_items(collection, model, view, used)
    if any(len(found.places) >= min_size for found in by_channel.values()):
        say("naming")
        reference = _reference(collection, novel, rng)
        who = load_namer(namer, model, reference=reference) if isinstance(namer, str) else namer
    drafts = []
    for channel, found in by_channel.items():
        if len(found.places) < min_size:
            continue
        vectors = np.stack(found.vectors)
        whitening = reference.get(channel) or Whitening.fit(vectors)
        for cluster in find_clusters(vectors, whitening, min_size=min_size, seed=seed):
            drafts.append((channel, found, vectors, cluster))
    drafts.sort(key=lambda d: -len(d[3].members))
    proposals = []
    placed = model._placed(view)
    apexes = placed.apexes
    for key, (channel, found, vectors, cluster) in enumerate(drafts, 1):
        named = cluster.members[:NAMED]
        names = who.name(
            vectors[named], [channel] * len(named), [found.texts[k] for k in named], view
        )
        points = Points.from_tangent(
            torch.from_numpy(vectors[cluster.members]).double(), apexes.c, apexes.geometry
        )
        proposals.append(
            propose(
                cluster, names, lambda texts: _tangents(model, texts),
                placed.margins(points, channel).numpy(), points[:1], _double(apexes), view,
                ids=[found.ids[k] for k in cluster.members], channel=channel,
                p_unsafe=float(np.mean([found.p_unsafe[k] for k in cluster.members])), key=key,
                pictures=_pictures(collection, found, cluster.members) if channel == "image" else (),
                texts=_texts(found, cluster.members) if channel != "image" else (),
            )
        )  # fmt: skip
    places = {c: np.array(found.places, np.int64) for c, found in by_channel.items()}
    named_by = namer if isinstance(namer, str) else type(namer).__name__
    return Discovery(
        proposals, len(collection), len(novel), len(used), view, alpha, named_by, places
    )


def load_namer(
    name: str, model: SafetyModel, *, reference: Mapping[str, Whitening] | None = None
) -> Namer:
    """A namer by its name on the command line.

    Args:
        name: ``phrases``, or a guard as :func:`hysafe.app.guard_namer.load_guard` takes it.
        model: whose points it names.
        reference: whitening of each channel of the collection.

    Raises:
        ConfigError: there is none of that name.
    """
    if name == "phrases":
        return PhraseNamer(model.encode_text, reference=reference, meaning=minilm_embed)
    from hysafe.app.guard_namer import load_guard

    return load_guard(name, model)


def novel_places(collection: Collection, alpha: float = NOVEL_AT) -> np.ndarray:
    """Places in the scan of the novel items that could be read, ascending."""
    found, start = [], 0
    for batch in collection.batches(COLUMNS):
        low = [pc.fill_null(pc.less_equal(batch[c], pa.scalar(alpha, pa.float32())), False)
               for c in NOVELTY]  # fmt: skip
        unnamed = pc.and_(pc.not_equal(batch["rating"], "safe"), pc.is_null(batch["node"]))
        mask = pc.and_(pc.or_(pc.or_(*low), unnamed), pc.is_null(batch["error"]))
        found.append(start + np.flatnonzero(mask.to_numpy(zero_copy_only=False)))
        start += batch.num_rows
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _novel_items(
    collection: Collection, model: SafetyModel, view: PolicyView, places: np.ndarray
) -> dict[str, _Novel]:
    """Novel items by the channel that is most novel in each."""
    by_channel = {name: _Novel() for name in CHANNELS}
    for start in range(0, len(places), CHUNK):
        part = places[start : start + CHUNK]
        items = collection.take(part.tolist())
        channels = model.score_encoded(items, view)
        for i, item in enumerate(items):
            spoken = {name: c.at[i] for name, c in channels.items() if i in c.at}
            if not spoken:
                continue
            name = min(spoken, key=lambda n: _order(channels[n], spoken[n]))
            k, found = spoken[name], by_channel[name]
            found.places.append(int(part[i]))
            found.ids.append(item.id)
            found.vectors.append(np.asarray(channels[name].vectors[k], np.float64))
            found.p_unsafe.append(channels[name].p_unsafe[k])
            found.whole.append(len(item.points[name]) == 1)
            found.texts.append(item.read_text if name == "ocr" else item.text)
    return {name: found for name, found in by_channel.items() if found.places}


def _order(channel: Channel, row: int) -> tuple[float, float]:
    """Least p-value first, then greatest risk."""
    values = (channel.novelty[row].policy, channel.novelty[row].distribution)
    return min((v for v in values if v is not None), default=1.0), -channel.risk[row]


def _spread(members: np.ndarray) -> np.ndarray:
    """Members of a cluster to show: the medoid first, then evenly outwards, for the middle alone is
    narrower than the cluster."""
    return members[np.linspace(0, len(members) - 1, min(SHOWN, len(members))).round().astype(int)]


def _texts(found: _Novel, members: np.ndarray) -> list[str]:
    """Texts of members of a cluster, each once; of long ones a part was compared, which is not told apart."""
    whole = members[[found.whole[k] for k in members]]
    every = (found.texts[k].strip() for k in _spread(whole))
    texts = [t for t in distinct_texts(every) if 0 < len(t) <= MAX_EXAMPLE_LENGTH]
    return texts if len(texts) > 1 else []


def _pictures(collection: Collection, found: _Novel, members: np.ndarray) -> list[Example]:
    """Files of members of a cluster, those that are still there and unchanged."""
    items = collection.take([found.places[k] for k in _spread(members)])
    files = [item for item in items if Path(item.source).is_file()]
    media = read_media(files)
    shown = [(item.source, media[item.id].image) for item in files if item.id in media]
    return [
        Example(str(Path(source).absolute()), hashlib.sha256(image).hexdigest())
        for source, image in shown
        if image
    ]


def _reference(
    collection: Collection, novel: np.ndarray, rng: np.random.Generator
) -> dict[str, Whitening]:
    """Whitening of each channel, from a sample of the items that are not novel.

    Novel ones are left out: the spread of a cluster must not be divided out.
    """
    rows = np.setdiff1d(np.arange(len(collection)), novel)
    if len(rows) > REFERENCE:
        rows = np.sort(rng.choice(rows, REFERENCE, replace=False))
    vectors: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(rows), CHUNK):
        for item in collection.take(rows[start : start + CHUNK].tolist()):
            for name, points in item.points.items():
                vectors.setdefault(name, []).append(points[0])
    return {name: Whitening.fit(np.stack(v)) for name, v in vectors.items()}


def _tangents(model: SafetyModel, texts: Sequence[str]) -> np.ndarray:
    return np.asarray(model.encode_text(texts).tangent().double().numpy())


def _double(points: Points) -> Points:
    return Points(points.space.double(), points.c, points.geometry)


# ---------------------------------------------------------------- what is written


def write_discovery(path: Path, found: Discovery, collection: Collection) -> None:
    """Write the proposal file.

    Raises:
        InputError: it cannot be written.
    """
    meta = collection.meta
    write_proposals(
        path, found.proposals, found.view.policy,
        {
            "collection": str(collection.folder), "model": meta.model, "taxonomy": meta.taxonomy,
            "items": found.items, "novel": found.novel, "alpha": found.alpha, "namer": found.namer,
        },
    )  # fmt: skip


def write_page(path: Path, found: Discovery, collection: Collection, model: SafetyModel) -> None:
    """Write the clusters as a page with pictures, blurred until they are clicked.

    Raises:
        InputError: the file cannot be written.
    """
    view = found.view
    shown: list[list[EncodedItem]] = []
    for p in found.proposals:
        shown.append(collection.take(found.members(p)[: len(p.examples)].tolist()))
    media = read_media(item for items in shown for item in items)
    sections = []
    for p, items in zip(found.proposals, shown, strict=True):
        cards = [_summary(p, view.taxonomy)]
        for judged in judge_items(collection, model, view, items):
            item, result = judged.row.item, judged.result
            seen = media.get(item.id)
            novelty = result.novelty
            values = (("policy", novelty.policy), ("distribution", novelty.distribution))
            words = ", ".join(f"{name} {v:.3f}" for name, v in values if v is not None)
            cards.append(
                card_of(
                    result, view.taxonomy, lead=f"novelty p: {words}" if words else "",
                    text=item.text or item.read_text, image=seen.image if seen else None,
                )
            )  # fmt: skip
        sections.append((f"{p.key}. {p.name}: {p.size} {CHANNEL_WORDS[p.channel]}", cards))
    facts = {
        "Collection": str(collection.folder),
        "Items": f"{found.items:,}",
        "Novel": f"{found.novel:,}",
        "In clusters": f"{found.clustered:,}",
        "Policy": view.policy.name,
        "Named by": found.namer,
    }
    write_gallery(path, "What no node names", facts, sections)


def _summary(p: Proposal, taxonomy: Taxonomy) -> Card:
    """The proposal itself as the first card of its section."""
    synonyms = ", ".join(map(str, p.rule.get("synonyms", ())))
    near = "; ".join(
        f"{n.node} {n.name} ({n.margin:+.2f} rad, {n.distance:.2f})" for n in p.nearest
    )
    return Card(
        "", f"purity {p.purity:.2f} · agreement {p.agreement:.2f}", p.name,
        [
            str(p.rule["definition"]), f"also: {synonyms}",
            f"parent: {p.parent} {taxonomy[p.parent].name}, holds {p.held:.0%}",
            f"nearest: {near}", f"mean p(unsafe) {p.p_unsafe:.2f}", p.rationale,
        ],
    )  # fmt: skip


# ---------------------------------------------------------------- accepting


@dataclass(frozen=True)
class Accepted:
    """A policy with accepted proposals, their ids by key, and the file's facts."""

    policy: Policy
    nodes: Mapping[int, str]
    facts: Mapping[str, Any]


def accept(
    path: str | Path,
    out: Path,
    taxonomy: Taxonomy,
    *,
    policy: Policy | None = None,
    only: Sequence[int] | None = None,
) -> Accepted:
    """Write a policy that has the accepted proposals of a file as nodes.

    Args:
        path: the proposal file. out: the policy to write.
        taxonomy: that the policy is over.
        policy: to add to; by default the one the proposals were made under.
        only: keys to take, whatever their ``accept`` says.

    Raises:
        ConfigError: nothing is accepted. TaxonomyError: a proposal does not fit into the taxonomy.
        InputError: the policy cannot be written.
    """
    import yaml

    proposals, own, facts = read_proposals(path)
    made, nodes = accepted_policy(proposals, policy or own, taxonomy, only=only)
    text = yaml.safe_dump(made.to_dict(), sort_keys=False, allow_unicode=True, width=100)
    write_text(out, f"# With nodes accepted from proposals of hysafe discover.\n{text}")
    written = Policy.load(out)
    written.apply(taxonomy)
    return Accepted(written, nodes, facts)
