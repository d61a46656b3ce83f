"""Redirect a risky query to safe items: moved along its geodesic, answered with safe items only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hysafe.app.pipeline import SafetyModel, rounded
from hysafe.app.search import DIGITS, Found
from hysafe.app.stored import judge_items, view_of
from hysafe.errors import ConfigError
from hysafe.geometry import Points
from hysafe.index import Collection
from hysafe.index.search import Hit
from hysafe.score.redirect import redirect
from hysafe.taxonomy import Policy, PolicyView

__all__ = ["Redirection", "redirect_queries"]

# Of a query or an answer, chosen on data that redirection is not measured on (docs/results.md).
AT_MOST = {"text": 0.1, "image": 0.02}


@dataclass(frozen=True)
class Redirection:
    """Where a query was moved, and what was found there.

    Args:
        radius, risk: of the query before and after. reached: the risk fell below the threshold.
        found: items, nearest to the moved query first; never one rated unsafe, and only on request
            one rated review.
        at_most: p_unsafe that the answers have at most; None where the query has no more itself.
    """

    radius: tuple[float, float]
    risk: tuple[float, float]
    reached: bool
    found: list[Found]
    at_most: float | None = None


def redirect_queries(
    collection: Collection,
    model: SafetyModel,
    queries: Points,
    *,
    channel: str = "text",
    policy: Policy | None = None,
    threshold: float | None = None,
    review: bool = False,
    at_most: float | None = None,
    where: str | None = None,
    k: int = 10,
) -> list[Redirection]:
    """Safe answers to a batch of queries.

    Answers are ordered by distance alone: a moved query lies near the origin itself.

    A query whose risk is below the threshold is answered where it is; a risky one is moved along
    its geodesic towards the origin until it is.

    Args:
        queries: points [Q, D] of the collection's model.
        channel: calibration of the queries: ``text`` or ``image``.
        policy: what counts as risk; by default the collection's own.
        threshold: risks below it are safe; by default the triage's, from which items are unsafe.
        review: also return items rated review (never those rated unsafe).
        at_most: answers to a query of more risk have at most this p_unsafe; AT_MOST by default,
            with `review` what the ratings allow. Next to a risky query a safe rating is wrong more
            often than elsewhere.
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
    if at_most is not None and not 0 <= at_most <= 1:
        raise ConfigError(f"redirect: at_most is {at_most}. Give a number in [0, 1].")
    if at_most is None:
        at_most = 1.0 if review else AT_MOST[channel]
    collection.check_model(model.hash)
    view = view_of(collection, model, policy)
    limit = model.triage.unsafe_from if threshold is None else threshold
    queries = Points(queries.space.double(), queries.c, queries.geometry)
    before = model.risk(queries, view, channel)
    done = redirect(queries, lambda p: model.risk(p, view, channel), limit)
    allowed = ("safe", "review") if review else ("safe",)
    rows, risks = _rated(collection, model, view, allowed)
    if where is not None:
        kept = np.isin(rows, collection.places(where))
        rows, risks = rows[kept], risks[kept]
    hits_of: list[list[Hit]] = [[] for _ in range(len(queries))]
    bound = ~(before <= at_most)  # a risk that is no number is doubtful
    for doubtful, among in ((False, rows), (True, rows[risks <= at_most])):
        chosen = bound.eq(doubtful).nonzero().squeeze(1)
        found_hits = collection.index.search(done.points[chosen], k, rows=among)
        for q, hits in zip(chosen.tolist(), found_hits, strict=True):
            hits_of[q] = hits
    answers = []
    for q, hits in enumerate(hits_of):
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
                at_most if bound[q] else None,
            )
        )  # fmt: skip
    return answers


def _rated(
    collection: Collection, model: SafetyModel, view: PolicyView, allowed: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the items with an allowed rating, and their p_unsafe (NaN without one): as stored, or
    judged now under another policy.

    Items that a person decided against are left out.
    """
    meta = collection.meta
    if (view.policy.hash, view.taxonomy.hash) == (meta.policy, meta.taxonomy):
        table = collection.to_arrow(["rating", "p_unsafe"])
        ratings, risks = table["rating"].to_pylist(), table["p_unsafe"].to_pylist()
    else:
        judged = [
            j.result
            for items in collection.items()
            for j in judge_items(collection, model, view, items)
        ]
        ratings, risks = [r.rating for r in judged], [r.p_unsafe for r in judged]
    decisions = collection.decisions()
    if decisions:  # a person's "no" counts; a "yes" does not outvote the model
        ids = collection.to_arrow(["id"])["id"].to_pylist()
        refused = {name for name, d in decisions.items() if d.rating not in allowed}
        ratings = ["" if name in refused else r for name, r in zip(ids, ratings, strict=True)]
    rows = np.array([i for i, rating in enumerate(ratings) if rating in allowed], dtype=int)
    told = np.array([np.nan if p is None else p for p in risks], dtype=float)
    return rows, rounded(told)[rows]  # as in the results; the table has float32
