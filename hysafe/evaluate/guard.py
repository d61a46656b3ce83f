"""What the guard knows of categories it never saw: detection, names, and what it keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hysafe.errors import ConfigError
from hysafe.guard.model import Evidence, PolicySpace
from hysafe.guard.protocol import PromptPolicy
from hysafe.guard.rewards import Similarity, Thresholds, WuPalmer, proguard_novelty, token_f1

__all__ = [
    "best_threshold",
    "f1_score",
    "name_scores",
    "novelty_of_cones",
    "novelty_of_listed",
    "proguard_scale",
]


def proguard_scale(similarities: Sequence[float]) -> float:
    """ProGuard's similarity term without its floor, from 0 (a miss) to 100 (the very name)."""
    return 200 * (proguard_novelty(similarities) - 0.5)


def name_scores(
    names: Sequence[str],
    banks: Sequence[Sequence[str]],
    similarity: Similarity,
    thresholds: Thresholds,
    nouns: WuPalmer | None = None,
) -> dict[str, float]:
    """Means over items of how well names fit the banks of their categories.

    Args:
        names: one per item; "" is no name and scores 0.
        banks: all phrases of the true category, those held out of training with them.
        similarity, thresholds: of the embedding model that is the reward, too.
        nouns: Wu-Palmer similarity; like token F1 never a reward.

    Returns:
        proguard: 0 to 100. ours: 0 to 100, by the thresholds. cosine: of the nearest phrase.
        token_f1, wu_palmer: 0 to 100, independent of any embedding.
    """
    found: dict[str, list[float]] = {k: [] for k in ("proguard", "ours", "cosine", "token_f1")}
    if nouns is not None:
        found["wu_palmer"] = []
    for name, bank in zip(names, banks, strict=True):
        row = similarity([name], list(bank))[0].tolist() if name else [0.0]
        found["proguard"].append(proguard_scale(row) if name else 0.0)
        found["ours"].append(100 * thresholds.score(max(row)) if name else 0.0)
        found["cosine"].append(max(row))
        found["token_f1"].append(100 * token_f1(name, bank))
        if nouns is not None:
            found["wu_palmer"].append(100 * (nouns.to_bank(name, bank) or 0.0))
    return {k: float(np.mean(v)) if v else float("nan") for k, v in found.items()}


def novelty_of_cones(
    items: Sequence[Evidence], policies: Sequence[PromptPolicy], space: PolicySpace
) -> np.ndarray:
    """The geometry's own score [N] in [0, 1]: the share of an item's risk that no listed category
    takes.

    The encoder knows more categories than a policy lists; risk that goes to the others is unlisted.
    Of risk that is new to the encoder it says nothing. No two entries may lie on one path.
    """
    found = []
    for item, policy in zip(items, policies, strict=True):
        listed = space.columns(policy)
        risk = max(float(np.nanmax(item.p_unsafe)), 1e-6)
        found.append(1 - min(1.0, float(item.scores[listed].sum()) / risk))
    return np.array(found)


def novelty_of_listed(
    items: Sequence[Evidence], policies: Sequence[PromptPolicy], space: PolicySpace
) -> np.ndarray:
    """Entropy [N] of an item's scores over the listed categories: what can be said of risk that is
    new to the encoder, too. No two entries may lie on one path."""
    found = []
    for item, policy in zip(items, policies, strict=True):
        scores = item.scores[space.columns(policy)].astype(float)
        share = scores / max(float(scores.sum()), 1e-9)
        found.append(-float((share * np.log(share + 1e-9)).sum()))
    return np.array(found)


# ---------------------------------------------------------------- figures


def f1_score(said: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of a yes/no answer [N]."""
    hits = float((said & true).sum())
    precision, recall = hits / max(1, said.sum()), hits / max(1, true.sum())
    f1 = 2 * precision * recall / max(1e-12, precision + recall)
    return {"precision": precision, "recall": recall, "f1": f1}


def best_threshold(scores: np.ndarray, true: np.ndarray) -> float:
    """Threshold (score >= it) of the greatest F1.

    Raises:
        ConfigError: no item is positive.
    """
    if not true.any():
        raise ConfigError("no positive item to choose a threshold by. Give some.")
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(true[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + true.sum())
    ranked = scores[order]
    last = np.append(ranked[1:] != ranked[:-1], True)  # equal scores fall on one side
    return float(ranked[int(np.where(last, f1, -1.0).argmax())])
