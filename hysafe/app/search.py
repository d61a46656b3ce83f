"""Search in a collection: by a text, a picture, an item of it, or a node of the taxonomy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hysafe.app.gallery import card_of, write_gallery
from hysafe.app.pipeline import LIST_FROM, SafetyModel
from hysafe.app.stored import judge_items, read_media, view_of
from hysafe.data.images import decode
from hysafe.errors import ConfigError, InputError
from hysafe.geometry import Points
from hysafe.index import Collection, Decision, EncodedItem
from hysafe.index.collection import RADIUS_SHARE
from hysafe.index.search import Hit
from hysafe.taxonomy import Policy, PolicyView
from hysafe.types import Result

__all__ = [
    *(
        "Found",
        "encode_query",
        "rank_by_node",
        "search",
        "search_json",
        "search_line",
    ),
    "write_found",
]

DIGITS = 6
# Items where nobody says how many.
MOST_FOUND = 50
CHANNEL_WORDS = {"image": "picture", "text": "text", "ocr": "read text"}


@dataclass(frozen=True)
class Found:
    """One result of a search.

    Args:
        item: the stored item. result: its judgement under the search's policy.
        distance: geodesic distance of the query to the item's point; None by node. Hits are ordered
            by it less a share of the point's radius.
        score: of the node asked for; None otherwise.
        channel: which of the item's points was nearest, or scored highest.
        decision: of a person on the item, if there is one.
    """

    item: EncodedItem
    result: Result
    distance: float | None
    score: float | None
    channel: str
    decision: Decision | None = None


def search(
    collection: Collection,
    model: SafetyModel,
    *,
    text: str | None = None,
    image: str | Path | None = None,
    like: str | None = None,
    node: str | None = None,
    policy: Policy | None = None,
    where: str | None = None,
    k: int | None = None,
    approximate: bool | None = None,
    radius_share: float = RADIUS_SHARE,
    progress: Callable[[float], None] | None = None,
) -> list[Found]:
    """The k best items, best first. Exactly one of `text`, `image`, `like` and `node` is given.

    Args:
        model: that of the collection; its towers are needed for `text` and `image` only.
        like: id of an item of the collection. node: id of a node.
        policy: ratings (and node scores) are under it; by default the collection's own.
        where: SQL filter over the columns of the table, as stored.
        k: by default 50; by node then only those whose score is at least 0.1, from which on a
            result lists a node.
        approximate: read only the part of the index nearest to the query; by default above two
            million points, if the collection has such an index.
        radius_share: of an item's radius is taken off its distance (what lies near the origin is
            near to every query); 0 orders by distance alone.
        progress: called with the share done where an approximate index has to be made first.

    Raises:
        CollectionError: another model, or another taxonomy. ConfigError: a wrong argument.
    """
    if sum(q is not None for q in (text, image, like, node)) != 1:
        raise ConfigError("search: give one of a text, --image, --like and --node.")
    least = LIST_FROM if k is None else 0.0
    k = MOST_FOUND if k is None else k
    if k < 1:
        raise ConfigError(f"search: k is {k}. Ask for at least 1 item.")
    if not 0 <= radius_share <= 1:
        raise ConfigError(f"search: radius_share is {radius_share}. Give a number in [0, 1].")
    collection.check_model(model.hash)
    view = view_of(collection, model, policy)
    if node is not None:
        ranked = rank_by_node(collection, model, view, node, where=where, k=k, least=least)
        hits = [Hit(row, math.nan, channel, -score) for row, score, channel in ranked]
        scores: Sequence[float | None] = [score for _, score, _ in ranked]
    else:
        if like is not None:
            hits = collection.like(
                like, k=k, where=where, approximate=approximate, radius_share=radius_share,
                progress=progress,
            )  # fmt: skip
        else:
            query = encode_query(model, text=text, image=image)
            (hits,) = collection.search(
                query, model=model.hash, k=k, where=where, approximate=approximate,
                radius_share=radius_share, progress=progress,
            )  # fmt: skip
        scores = [None] * len(hits)
    items = collection.take([h.row for h in hits])
    judged = judge_items(collection, model, view, items)
    decisions = collection.decisions()
    return [
        Found(
            item, j.result, None if node is not None else round(hit.distance, DIGITS), score,
            hit.channel, decisions.get(item.id),
        )
        for item, j, hit, score in zip(items, judged, hits, scores, strict=True)
    ]  # fmt: skip


def encode_query(
    model: SafetyModel, *, text: str | None = None, image: str | Path | None = None
) -> Points:
    """The point [1, D] of a text or a picture file.

    Raises:
        InputError: the text is empty, or the picture cannot be read.
    """
    if image is None:
        if not text or not text.strip():
            raise InputError("The query is empty. Write what to look for.")
        model.warn_of_unread([text])
        return model.encode_text([text])
    try:
        data = Path(image).read_bytes()
        # as a scan decodes it, or the same file would be another point
        return model.encode_image([decode(data, size=model.encoder.image_size)])
    except OSError as error:
        raise InputError(f"--image {image}: {error.strerror}. Name a picture file.") from error
    except InputError as error:
        raise InputError(f"--image {image}: {error}") from error


def rank_by_node(
    collection: Collection,
    model: SafetyModel,
    view: PolicyView,
    node: str,
    *,
    where: str | None = None,
    k: int = 50,
    least: float = 0.0,
) -> list[tuple[int, float, str]]:
    """Rows with the highest scores of a node: (row, score, channel), best first; none with 0, and
    none below `least`.

    Raises:
        ConfigError: the policy does not score the node.
    """
    if node not in view.taxonomy:
        raise ConfigError(f"--node {node}: no such node. See: hysafe taxonomy")
    if not view.taxonomy[node].risky:
        raise ConfigError(f"--node {node}: a harmless node has no score. Name a risk.")
    table, _ = model.place(view)
    if not view.active(node) and not any(
        view.active(n.id) and node in view.taxonomy.path(n.id).ids for n in view.taxonomy
    ):
        raise ConfigError(
            f"--node {node}: off under the policy {view.policy.name!r}, so it has no score. Give a "
            "policy that has it on: --policy FILE"
        )
    column = table.index[node]
    allowed = None if where is None else set(collection.places(where).tolist())
    best: list[tuple[float, int, str]] = []
    start = 0
    for items in collection.items():
        scores = np.zeros(len(items))
        channel = [""] * len(items)
        for name, said in model.score_encoded(items, view).items():
            for i, k_row in said.at.items():
                score = float(said.nodes[k_row, column])
                if score > scores[i]:
                    scores[i], channel[i] = score, name
        rows = [
            (-float(scores[i]), start + i, channel[i])
            for i in np.flatnonzero((scores > 0) & (scores >= least)).tolist()
            if allowed is None or start + i in allowed
        ]
        best = sorted(best + rows)[:k]
        start += len(items)
    return [(row, round(-negative, DIGITS), channel) for negative, row, channel in best]


def search_line(found: Found, rank: int) -> dict[str, Any]:
    """A result as plain data: one line of ``hysafe search --json``."""
    result = found.result
    top = result.paths[0] if result.paths else None
    line: dict[str, Any] = {
        "rank": rank,
        "id": result.id,
        "source": result.source,
        "modality": result.modality,
        "distance": found.distance,
    }
    if found.score is not None:
        line["score"] = found.score
    line |= {
        "channel": found.channel,
        "rating": result.rating,
        "p_unsafe": result.p_unsafe,
        "node": top.node if top else None,
        "path": list(top.path) if top else [],
    }
    if found.decision is not None:
        d = found.decision
        line["decision"] = {
            "rating": d.rating, "author": d.author, "time": d.time, "reason": d.reason,
        }  # fmt: skip
    return line


def write_found(
    path: Path, title: str, found: Sequence[Found], view: PolicyView, collection: Collection
) -> None:
    """Write the results as a page with pictures."""
    media = read_media(f.item for f in found)
    cards = []
    for f in found:
        seen = media.get(f.item.id)
        near = f"{f.distance:.4f}" if f.distance is not None else f"score {f.score:.4f}"
        cards.append(
            card_of(
                f.result,
                view.taxonomy,
                lead=f"{near} · {CHANNEL_WORDS.get(f.channel, f.channel)}",
                text=f.item.text or f.item.read_text,
                image=seen.image if seen else None,
                lines=[
                    *([f"p(unsafe) {f.result.p_unsafe}"] if f.result.p_unsafe is not None else []),
                    *([f.decision.words] if f.decision else []),
                ],
            )
        )
    facts = {
        "Collection": str(collection.folder),
        "Items": f"{len(collection):,}",
        "Model": collection.meta.model_name,
        "Policy": view.policy.name,
    }
    write_gallery(path, title, facts, [(f"{len(found)} items, nearest first", cards)])


def search_json(found: Sequence[Found]) -> str:
    """All results as JSON lines."""
    return "".join(
        json.dumps(search_line(f, rank), ensure_ascii=False) + "\n"
        for rank, f in enumerate(found, 1)
    )
