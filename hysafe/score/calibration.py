"""Calibration: Platt scaling, a temperature over categories, conformal p-values.

Fitted on a validation split and stored as ``calibration.json`` beside the weights. A model without
it (an untrained lift) still scores, but says that it is not calibrated and gives no p-values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

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

FILE = "calibration.json"
# Conformal scores are kept as a grid of this many order statistics: p-values move by at most
# 1/GRID, always upwards (conservative).
GRID = 1000


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

    @property
    def fitted(self) -> bool:
        return bool(self.channels)

    def channel(self, name: str) -> ModalityCalibration:
        """Calibration of a channel; ``ocr`` is text; the neutral one where nothing was fitted."""
        return self.channels.get("text" if name == "ocr" else name, ModalityCalibration())

    def save(self, folder: str | Path) -> None:
        """Write calibration.json into a model folder."""
        payload = json.dumps(asdict(self), indent=1, sort_keys=True)
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
            channels = {
                k: ModalityCalibration(
                    **{
                        **v,
                        "distribution": tuple(v["distribution"]),
                        "policy": tuple(v["policy"]),
                    }
                )
                for k, v in data["channels"].items()
            }
            return cls(channels, data.get("fitted_on", ""))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: not a calibration file ({error}). Fit it again.") from error


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
    return max(slope, 1e-3), offset


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
    return float(log_t.detach().exp().clamp(0.05, 20))


def quantile_grid(scores: Tensor, size: int = GRID) -> tuple[float, ...]:
    """Order statistics of conformal scores, at most `size`, sorted; the largest is kept."""
    values = np.sort(scores.detach().double().cpu().numpy())
    if len(values) > size:
        # upper order statistics: a p-value read off the grid is never too small
        index = np.ceil(np.linspace(0, len(values) - 1, size)).astype(int)
        values = values[index]
    return tuple(round(float(v), 5) for v in values)


def conformal_p_values(scores: Tensor, calibration: tuple[float, ...], n: int) -> Tensor:
    """Split-conformal p-values: (1 + number of calibration scores >= score) / (n + 1).

    Args:
        scores: [B], higher is more novel.
        calibration: sorted scores of exchangeable in-distribution items (a grid of them).
        n: how many items the grid stands for.

    Returns:
        [B] in (0, 1]; P(p <= alpha) <= alpha for exchangeable items.

    Source: Vovk et al. 2005; Bates et al. 2023 for outlier testing.
    """
    grid = torch.tensor(calibration, dtype=torch.double)
    below = torch.searchsorted(grid, scores.double().cpu().contiguous(), right=False)
    share = (len(grid) - below).double() / len(grid)
    return torch.clamp((1 + torch.ceil(share * n)) / (n + 1), max=1.0).to(scores)


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
