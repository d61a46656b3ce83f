"""Learned scalars that stay inside their bounds by a transform, not by editing `.data`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hysafe.errors import ConfigError

__all__ = ["BoundedScalar", "Curvature"]

# A scalar nearer than this share of the log range to a bound is reported as saturated.
SATURATION_SHARE = 0.01


class BoundedScalar(nn.Module):
    """A positive learned scalar in [low, high], a sigmoid of its parameter on the log scale.

    Args:
        init: starting value, low < init < high.
        low, high: bounds, > 0; at a bound the gradient vanishes: watch :attr:`saturated`.
        learnable: a buffer instead of a parameter when false.
    """

    def __init__(self, init: float, low: float, high: float, *, learnable: bool = True) -> None:
        super().__init__()
        if not 0 < low < init < high:
            raise ConfigError(f"expected 0 < low < init < high, got {low}, {init}, {high}.")
        self.low, self.high = float(low), float(high)
        self.log_low, self.log_high = math.log(low), math.log(high)
        share = (math.log(init) - self.log_low) / (self.log_high - self.log_low)
        raw = torch.tensor(math.log(share / (1 - share)), dtype=torch.float32)
        if learnable:
            self.raw = nn.Parameter(raw)
        else:
            self.register_buffer("raw", raw)

    def forward(self) -> Tensor:
        """The value, a scalar tensor (float32 at least), never outside the bounds."""
        raw = self.raw.to(torch.promote_types(self.raw.dtype, torch.float32))
        value = torch.exp(self.log_low + (self.log_high - self.log_low) * torch.sigmoid(raw))
        # exp rounds: a last bit beyond the bound, where the sigmoid has no gradient left anyway
        return value.clamp(self.low, self.high)

    @torch.no_grad()
    def set(self, value: float) -> None:
        """Set the value; it must lie inside the bounds.

        Raises:
            ConfigError: it does not.
        """
        if not self.low < value < self.high:
            raise ConfigError(f"{value} is not between {self.low:.4g} and {self.high:.4g}.")
        share = (math.log(value) - self.log_low) / (self.log_high - self.log_low)
        self.raw.fill_(math.log(share / (1 - share)))

    @property
    def saturated(self) -> bool:
        """Whether the value sits at a bound (released models often do: log it)."""
        share = float(torch.sigmoid(self.raw.detach().double()))
        return not SATURATION_SHARE < share < 1 - SATURATION_SHARE


class Curvature(BoundedScalar):
    """Curvature magnitude c in [low, high]; MERU bounds it to a factor of ten around 1."""

    def __init__(
        self, init: float = 1.0, low: float = 0.1, high: float = 10.0, *, learnable: bool = True
    ) -> None:
        super().__init__(init, low, high, learnable=learnable)
