"""Redirect a risky query to safe items: moved along its geodesic, answered with safe items only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hysafe.app.pipeline import SafetyModel
from hysafe.app.search import DIGITS, Found
from hysafe.app.stored import judge_items, view_of
from hysafe.errors import ConfigError
from hysafe.geometry import Points
from hysafe.index import Collection
from hysafe.score.redirect import redirect
from hysafe.taxonomy import Policy, PolicyView

__all__ = ["Redirection", "redirect_queries"]


@dataclass(frozen=True)
class Redirection:
    """Where a query was moved, and what was found there.

    Args:
        radius, risk: of the query before and after. reached: the risk fell below the threshold.
        found: items, nearest to the moved query first; never one that is not rated safe.
    """

    radius: tuple[float, float]
    risk: tuple[float, float]
    reached: bool
    found: list[Found]


def redirect_queries(
    collection: Collection,
    model: SafetyModel,
    queries: Points,
    *,
    channel: str = "text",
    policy: Policy | None = None,
    threshold: float | None = None,
    review: bool = False,
    where: str | None = None,
    k: int = 10,
) -> list[Redirection]:
    """Safe answers to a batch of queries.

    A query whose risk is below the threshold is answered where it is; a risky one is moved along
    its geodesic towards the origin until it is.

    Args:
        queries: points [Q, D] of the collection's model.
        channel: calibration of the queries: ``text`` or ``image``.
        policy: what counts as risk; by default the collection's own.
        threshold: risks below it are safe; by default the triage's, from which items are unsafe.
        review: also return items rated review (never those rated unsafe).
        where: SQL filter over the columns of the table.

    Raises:
        CollectionError: another model. ConfigError: a wrong argument.
    """
    if k < 1:
        raise ConfigError(f"redirect: k is {k}. Ask for at least 1 item.")
    if channel not in ("text", "image"):
        raise ConfigError(f"redirect: channel is {channel!r}. Give text or image.")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"redirect: threshold is {threshold}. Give a number in [0, 1].")
    collection.check_model(model.hash)
    view = view_of(collection, model, policy)
    limit = model.triage.unsafe_from if threshold is None else threshold
    queries = Points(queries.space.double(), queries.c, queries.geometry)
    before = model.risk(queries, view, channel)
    done = redirect(queries, lambda p: model.risk(p, view, channel), limit)
    allowed = ("safe", "review") if review else ("safe",)
    rows = _rated(collection, model, view, allowed)
    if where is not None:
        rows = np.intersect1d(rows, collection.places(where))
    answers = []
    for q, hits in enumerate(collection.index.search(done.points, k, rows=rows)):
        items = collection.take([h.row for h in hits])
        judged = judge_items(collection, model, view, items)
        found = [
            Found(item, j.result, round(hit.distance, DIGITS), None, hit.channel)
            for item, j, hit in zip(items, judged, hits, strict=True)
            if j.result.rating in allowed
        ]
        answers.append(
            Redirection(
                (float(queries[q : q + 1].radius()), float(done.radius[q])),
                (float(before[q]), float(done.risk[q])), bool(done.reached[q]), found,
            )
        )  # fmt: skip
    return answers


def _rated(
    collection: Collection, model: SafetyModel, view: PolicyView, allowed: Sequence[str]
) -> np.ndarray:
    """Rows of the items with an allowed rating: as stored, or judged now under another policy.

    Items that a person decided against are left out.
    """
    meta = collection.meta
    if (view.policy.hash, view.taxonomy.hash) == (meta.policy, meta.taxonomy):
        ratings = collection.to_arrow(["rating"])["rating"].to_pylist()
    else:
        ratings = [
            j.result.rating
            for items in collection.items()
            for j in judge_items(collection, model, view, items)
        ]
    decisions = collection.decisions()
    if decisions:  # a person's "no" counts; a "yes" does not outvote the model
        ids = collection.to_arrow(["id"])["id"].to_pylist()
        refused = {name for name, d in decisions.items() if d.rating not in allowed}
        ratings = ["" if name in refused else r for name, r in zip(ids, ratings, strict=True)]
    return np.array([i for i, rating in enumerate(ratings) if rating in allowed], dtype=int)
