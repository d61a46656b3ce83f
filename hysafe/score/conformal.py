r"""Conformal p-values for novelty, and false-alarm control over a whole collection.

A score is a p-value once it is ranked among the scores of calibration items: the share of them that
are at least as novel. For items that are exchangeable with the calibration items
:math:`P(p \le \alpha) \le \alpha`, whatever the scorer. The compact form that is stored beside a
model's weights (a grid of order statistics) is in :mod:`hysafe.score.calibration`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from hysafe.errors import ConfigError, ShapeError
from hysafe.score.calibration import conformal_p_values, quantile_grid

__all__ = [
    "adjusted_p_values",
    "benjamini_hochberg",
    "conformal_p_values",
    "mondrian_p_values",
    "quantile_grid",
    "split_conformal",
]

Dependence = Literal["positive", "any"]


def split_conformal(
    scores: Tensor,
    calibration: Tensor,
    *,
    smoothed: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Split-conformal p-values, exact.

    .. math:: p(s) = \frac{1 + \#\{i : s_i \ge s\}}{n + 1}

    or, with ties broken at random (u uniform in [0, 1], one draw an item),

    .. math:: p(s) = \frac{\#\{i : s_i > s\} + u\,(1 + \#\{i : s_i = s\})}{n + 1}

    which is exactly uniform for exchangeable items, also where scores are equal.

    Args:
        scores: [B], higher is more novel. A score that is no number is as novel as can be.
        calibration: [n] scores of items that no scorer was fitted on, any order.
        smoothed: break ties at random.
        generator: of the draws, on the CPU.

    Returns:
        [B] double, in (0, 1] (smoothed: [0, 1]).

    Raises:
        ShapeError: no calibration scores, or one that is no number.

    Source: Vovk, Gammerman, Shafer 2005, eq. 2.20 (smoothed) and section 4.2; Bates et al. 2023.
    """
    known = _calibration(calibration)
    values = torch.nan_to_num(scores.detach().double().cpu(), nan=math.inf, posinf=math.inf)
    n = len(known)
    at_least = n - torch.searchsorted(known, values.contiguous(), right=False)
    if not smoothed:
        return (1 + at_least).double() / (n + 1)
    above = n - torch.searchsorted(known, values.contiguous(), right=True)
    u = torch.rand(len(values), generator=generator, dtype=torch.double)
    return (above + u * (1 + at_least - above)) / (n + 1)


def mondrian_p_values(
    scores: Tensor,
    groups: Tensor,
    calibration: Tensor,
    calibration_groups: Tensor,
    *,
    smoothed: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Class-conditional p-values: every item is ranked among the calibration items of its group.

    The false-alarm rate is then bounded within every group and not only on average. A group is what
    is known of an item without its label: its modality, or the class the model predicts for it (of
    calibration items the predicted class too).

    Args:
        scores: [B], higher is more novel. groups: int [B].
        calibration: [n]. calibration_groups: int [n].
        smoothed, generator: as in :func:`split_conformal`.

    Returns:
        [B] double. An item of a group without calibration items has p = 1: nothing is known
        against it.

    Raises:
        ShapeError: scores and groups differ in length, or there are no calibration scores.

    Source: Vovk, Gammerman, Shafer 2005, section 4.5 (Mondrian conformal predictors).
    """
    for values, members in ((scores, groups), (calibration, calibration_groups)):
        if values.shape != members.shape or values.ndim != 1:
            raise ShapeError(
                f"mondrian_p_values: {tuple(values.shape)} scores with {tuple(members.shape)} "
                "groups. Give one group a score, both [B]."
            )
    _calibration(calibration)
    p = torch.ones(len(scores), dtype=torch.double)
    groups, calibration_groups = groups.cpu(), calibration_groups.cpu()
    for group in groups.unique().tolist():
        mine, theirs = groups == group, calibration_groups == group
        if bool(theirs.any()):
            p[mine] = split_conformal(
                scores.cpu()[mine], calibration.cpu()[theirs], smoothed=smoothed,
                generator=generator,
            )  # fmt: skip
    return p


def adjusted_p_values(p: Tensor, *, dependence: Dependence = "positive") -> Tensor:
    r"""P-values adjusted for the size of the collection: :math:`\min_{j \ge i} p_{(j)}\,m / j`.

    Args:
        p: [m] in [0, 1].
        dependence: of the p-values. ``positive``: Benjamini-Hochberg, right for conformal p-values
            of one calibration set (Bates et al. 2023, theorem 2). ``any``: Benjamini-Yekutieli,
            larger by 1 + 1/2 + ... + 1/m.

    Returns:
        [m] in [0, 1], in the order of `p`: the least level at which an item is called novel.

    Raises:
        ShapeError: not [m], or a value outside [0, 1].
        ConfigError: unknown dependence.
    """
    if dependence not in ("positive", "any"):
        raise ConfigError(f"dependence {dependence!r}: positive (Benjamini-Hochberg) or any.")
    if p.ndim != 1 or not bool(((p >= 0) & (p <= 1)).all()):
        raise ShapeError(
            f"adjusted_p_values: got {tuple(p.shape)}; wanted p-values [m] in [0, 1]. Fill in 1 "
            "where an item has none."
        )
    m = len(p)
    if m == 0:
        return p.double()
    rank = torch.arange(1, m + 1, dtype=torch.double)
    ordered, order = p.double().cpu().sort()
    factor = m / rank * (1 if dependence == "positive" else float((1 / rank).sum()))
    # from the largest down: an item is called whenever a larger p-value is
    least = (ordered * factor).flip(0).cummin(0).values.flip(0).clamp(max=1)
    out = torch.empty_like(least)
    out[order] = least
    return out


def benjamini_hochberg(p: Tensor, level: float, *, dependence: Dependence = "positive") -> Tensor:
    """Which items of a collection to call novel, so that few of the calls are false.

    The expected share of false alarms among the called items is at most `level` (times the share of
    ordinary items in the collection).

    Args:
        p: [m] p-values. level: in (0, 1). dependence: see :func:`adjusted_p_values`.

    Returns:
        bool [m].

    Raises:
        ConfigError: level outside (0, 1). ShapeError: see :func:`adjusted_p_values`.

    Source: Benjamini and Hochberg 1995; Benjamini and Yekutieli 2001.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level {level}: wanted a share between 0 and 1, e.g. 0.1.")
    return adjusted_p_values(p, dependence=dependence) <= level


def _calibration(calibration: Tensor) -> Tensor:
    known = calibration.detach().double().cpu()
    if known.ndim != 1 or not len(known) or bool(known.isnan().any()):
        raise ShapeError(
            f"conformal p-values: got calibration scores {tuple(calibration.shape)}, wanted at "
            "least one and all of them numbers [n]. Fit the scorer on other items and score these."
        )
    return known.sort().values
