"""Calibration: Platt scaling, a temperature over categories, conformal p-values.

Fitted on a validation split and stored as ``calibration.json`` beside the weights. A model without
it (an untrained lift) still scores, but says that it is not calibrated and gives no p-values.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hysafe.errors import ModelError, ShapeError

__all__ = [
    "Calibration",
    "ModalityCalibration",
    "conformal_p_values",
    "expected_calibration_error",
    "fit_platt",
    "fit_temperature",
    "quantile_grid",
]

log = logging.getLogger(__name__)

FILE = "calibration.json"
# Of the file; in files before 2 the scores of policy novelty are of another kind.
FORMAT = 2
# Conformal scores are kept as a grid of this many order statistics: p-values move by at most
# 1/GRID, always upwards (conservative).
GRID = 1000
# Digits after the point of a stored conformal score, rounded upwards.
GRID_DIGITS = 5
# More evidence of risk never lowers the probability of risk, whatever the validation split says.
MIN_SLOPE = 1e-3
# Temperatures beyond this range mean labels without signal, or a handful of examples.
TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class ModalityCalibration:
    """Calibration of one channel (``text`` or ``image``).

    Args:
        slope, offset: of the log odds of risk (Platt).
        temperature: of the distribution over categories given risk.
        distribution, policy: sorted conformal scores of in-distribution items; () = none.
        n: size of the conformal set.
    """

    slope: float = 1.0
    offset: float = 0.0
    temperature: float = 1.0
    distribution: tuple[float, ...] = ()
    policy: tuple[float, ...] = ()
    n: int = 0


@dataclass(frozen=True)
class Calibration:
    """Calibration of a model, by channel."""

    channels: Mapping[str, ModalityCalibration] = field(default_factory=dict)
    fitted_on: str = ""

    def __post_init__(self) -> None:
        # one order, so that a calibration just fitted and the same one read from disk have one repr
        object.__setattr__(self, "channels", dict(sorted(self.channels.items())))

    @property
    def fitted(self) -> bool:
        return bool(self.channels)

    def channel(self, name: str) -> ModalityCalibration:
        """Calibration of a channel; ``ocr`` is text; the neutral one where nothing was fitted."""
        return self.channels.get("text" if name == "ocr" else name, ModalityCalibration())

    def save(self, folder: str | Path) -> None:
        """Write calibration.json into a model folder."""
        payload = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True)
        (Path(folder) / FILE).write_text(payload + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """Read calibration.json of a model folder; the neutral one where there is none.

        Raises:
            ModelError: the file is damaged.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return cls()
        try:
            data = json.loads(path.read_text("utf-8"))
            channels = {str(k): _channel(v) for k, v in data["channels"].items()}
            if int(data.get("format", 1)) < FORMAT:
                log.warning(
                    "%s: of an earlier release, so without p-values of policy novelty. Fit it again: "
                    "hysafe eval card --model %s --fit", path, path.parent,
                )  # fmt: skip
                channels = {k: replace(c, policy=()) for k, c in channels.items()}
            return cls(channels, str(data.get("fitted_on", "")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{path}: not a calibration file ({type(error).__name__}: {error}). Fit it again."
            ) from error


def _channel(data: dict[str, Any]) -> ModalityCalibration:
    scores = {k: tuple(map(float, data[k])) for k in ("distribution", "policy")}
    channel = ModalityCalibration(
        slope=float(data["slope"]),
        offset=float(data["offset"]),
        temperature=float(data["temperature"]),
        n=int(data["n"]),
        **scores,
    )
    numbers = (channel.slope, channel.offset, channel.temperature, *channel.distribution)
    if not all(map(math.isfinite, (*numbers, *channel.policy))):
        raise ValueError("a number is not finite")
    if channel.slope <= 0 or channel.temperature <= 0:
        raise ValueError("slope and temperature must be above 0")
    for name, values in scores.items():
        if list(values) != sorted(values) or len(values) > channel.n:
            raise ValueError(f"the {name} scores are not n sorted numbers")
    return channel


def fit_platt(evidence: Tensor, unsafe: Tensor) -> tuple[float, float]:
    """Slope and offset of sigmoid(slope * evidence + offset) by maximum likelihood.

    Args:
        evidence: [n] log odds. unsafe: bool [n].

    Source: Platt 1999, with his smoothed targets.
    """
    positives = int(unsafe.sum())
    negatives = len(unsafe) - positives
    if not positives or not negatives:
        raise ShapeError("Platt scaling needs safe and unsafe examples.")
    high, low = (positives + 1) / (positives + 2), 1 / (negatives + 2)
    target = torch.where(unsafe, high, low).double()
    x = evidence.detach().double()
    parameters = torch.tensor([1.0, 0.0], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = parameters[0] * x + parameters[1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        loss.backward()
        return loss

    optimizer.step(closure)
    slope, offset = parameters.detach().tolist()
    return max(slope, MIN_SLOPE), offset


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Temperature of softmax(logits / T) by maximum likelihood. logits [n, L], labels [n].

    Source: Guo et al. 2017.
    """
    log_t = torch.zeros((), dtype=torch.double, requires_grad=True)
    x = logits.detach().double()
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_t.detach().exp().clamp(*TEMPERATURES))


def quantile_grid(scores: Tensor, size: int = GRID) -> tuple[float, ...]:
    """Order statistics of conformal scores, at most `size`, sorted; the largest is kept."""
    values = np.sort(scores.detach().double().cpu().numpy())
    n = len(values)
    if n > size:
        # upper order statistics: at most a share j/n of them lies below the j-th score, so that a
        # p-value read off the grid is never too small
        values = values[[-(-(k + 1) * n // size) - 1 for k in range(size)]]
    factor = 10.0**GRID_DIGITS
    up = np.ceil(values * factor)
    up += up / factor < values  # the product may have been rounded, either way
    up -= (up - 1) / factor >= values
    return tuple((up / factor).tolist())


def conformal_p_values(scores: Tensor, calibration: tuple[float, ...], n: int) -> Tensor:
    """Split-conformal p-values: (1 + number of calibration scores >= score) / (n + 1).

    Args:
        scores: [B], higher is more novel.
        calibration: sorted scores of exchangeable in-distribution items (a grid of them).
        n: how many items the grid stands for.

    Returns:
        [B] in (0, 1]; P(p <= alpha) <= alpha for exchangeable items.

    Raises:
        ShapeError: no calibration scores, which would be read as "nothing is novel".

    Source: Vovk et al. 2005; Bates et al. 2023 for outlier testing.
    """
    if not calibration or n < 1:
        raise ShapeError(
            f"conformal p-values: got {len(calibration)} calibration scores for n={n}, wanted at "
            "least 1. Fit the calibration, or give no p-values."
        )
    grid = torch.tensor(calibration, dtype=torch.double)
    below = torch.searchsorted(grid, scores.double().cpu().contiguous(), right=False)
    size = len(grid)
    above = ((size - below) * n + size - 1) // size  # [B], rounded up, exact
    return ((1 + above).double() / (n + 1)).to(scores)


def expected_calibration_error(p: Tensor, truth: Tensor, *, bins: int = 15) -> float:
    """Mean |confidence - frequency| over bins of equal count (adaptive bins).

    Args:
        p: [n] probabilities. truth: bool [n].

    Source: Nguyen and O'Connor 2015; Nixon et al. 2019.
    """
    order = torch.argsort(p)
    p, truth = p[order].double(), truth[order].double()
    total = 0.0
    for a, b in zip(p.tensor_split(bins), truth.tensor_split(bins), strict=True):
        if len(a):
            total += len(a) * abs(float(a.mean() - b.mean()))
    return total / max(1, len(p))
