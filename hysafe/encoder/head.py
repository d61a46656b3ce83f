"""Heads that lift backbone features onto the space: linear, learned scale, exponential map."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hysafe.errors import ConfigError
from hysafe.geometry import BoundedScalar, get_space

__all__ = ["LorentzHead", "NodeHead", "Normalize", "example_direction"]

Normalize = Literal["layer", "unit", "none"]

# Largest r * |tangent|: beyond 11 float32 coordinates no longer resolve the space.
MAX_TANGENT = 8.0
# Radii of domains, categories, concepts at the start, in units of 1/sqrt(c): half-apertures of
# about 50, 29 and 16 degrees with K = 0.1.
DEPTH_RADII = (0.26, 0.40, 0.66)
# A depth's radius stays within these factors of its start. The lower one is what keeps cones from
# collapsing: without it every parent drifts to the origin, where a cone is a half space that holds
# everything (seen in the first training run; docs/results.md).
RADIUS_BOUNDS = (0.85, 4.0)
# Direction of a node with example pictures: its phrases count as so many pictures, and this share
# of what it has in common with all nodes is taken off. Chosen on half of the classes that
# `benchmarks/example_pictures.py` asks for.
PHRASES_COUNT, COMMON_SHARE = 1.0, 0.5


class LorentzHead(nn.Module):
    """Features [B, E] -> space components [B, D].

    Args:
        in_features: E.
        dim: D.
        normalize: features before the linear map: layer norm without parameters, unit norm (CLIP
            features) or none.
        linear: a learned linear map; identity (E must equal D) when false, as in the untrained
            lift.
        scale: starting value of the learned scale alpha, 1/sqrt(D) by default (MERU).
    """

    def __init__(
        self,
        in_features: int,
        dim: int,
        *,
        normalize: Normalize = "layer",
        linear: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if not linear and in_features != dim:
            raise ConfigError(f"a head without linear map needs E == D, got {in_features}, {dim}.")
        self.normalize: Normalize = normalize
        self.linear = nn.Linear(in_features, dim, bias=False) if linear else nn.Identity()
        start = scale if scale is not None else 1 / math.sqrt(dim)
        self.scale = BoundedScalar(start, start / 30, start * 30)

    def tangent(self, features: Tensor) -> Tensor:
        """Tangent vectors at the origin [B, D], float32, outside autocast."""
        with torch.autocast(features.device.type, enabled=False):
            x = features.float()
            if self.normalize == "layer":
                x = F.layer_norm(x, x.shape[-1:])
            elif self.normalize == "unit":
                x = F.normalize(x, dim=-1)
            return self.linear(x) * self.scale()  # type: ignore[no-any-return]

    def forward(self, features: Tensor, c: Tensor, space: str = "lorentz") -> Tensor:
        """Space components [B, D]."""
        with torch.autocast(features.device.type, enabled=False):
            v = self.tangent(features)
            limit = MAX_TANGENT / c.detach().sqrt()
            norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
            v = v * torch.clamp(limit / norm.clamp_min(1e-12), max=1.0)
            return get_space(space).exp_map0(v, c)


class NodeHead(LorentzHead):
    """Places taxonomy nodes: the direction comes from text, the radius from the depth.

    All nodes of one depth share one learned radius and so one aperture; a node that a policy adds
    as text gets the cone of its depth without training. Nodes known in training also have a learned
    offset of the direction, which moves a cone from where its phrases lie to where its items lie.

    Args:
        radii: starting radius of each depth, in units of 1/sqrt(c).
        known: number of nodes with an offset.
        others: as for :class:`LorentzHead`.
    """

    def __init__(
        self,
        in_features: int,
        dim: int,
        *,
        normalize: Normalize = "layer",
        linear: bool = True,
        radii: tuple[float, ...] = DEPTH_RADII,
        known: int = 0,
    ) -> None:
        super().__init__(in_features, dim, normalize=normalize, linear=linear)
        low, high = RADIUS_BOUNDS
        self.offsets = nn.Parameter(torch.zeros(known, dim)) if known else None
        self.radii = nn.ModuleList(BoundedScalar(r, low * r, high * r) for r in radii)

    def place(
        self,
        features: Tensor,
        depth: Tensor,
        c: Tensor,
        space: str = "lorentz",
        rows: Tensor | None = None,
    ) -> Tensor:
        """Space components [N, D] of nodes.

        Args:
            features: mean phrase features [N, E]. depth: [N], >= 1; nodes deeper than the head
                knows take the deepest radius.
            rows: [N], which offset belongs to a node, -1 for none; None for none at all.
        """
        with torch.autocast(features.device.type, enabled=False):
            table = torch.stack([r() for r in self.radii])
            radius = table[(depth - 1).clamp(0, len(self.radii) - 1)]
            direction = F.normalize(self.tangent(features), dim=-1)
            if rows is not None and self.offsets is not None:
                known = self.offsets.float()[rows.clamp_min(0)] * (rows >= 0)[:, None]
                direction = F.normalize(direction + known, dim=-1)
            if space == "lorentz":  # the aperture depends on sqrt(c) * radius alone
                radius = radius / c.sqrt()
            return get_space(space).exp_map0(direction * radius[:, None], c)


def example_direction(
    phrases: Tensor,
    examples: Tensor,
    common: Tensor,
    *,
    phrases_count: float = PHRASES_COUNT,
    common_share: float = COMMON_SHARE,
) -> Tensor:
    """Where the cone of a node points for pictures, given pictures that show what it means.

    Pictures lie close together, so that the mean of a few says above all "a picture": a cone that
    points there holds the others too. What it shares with all nodes is therefore reduced.

    Args:
        phrases: tangent vector of the apex as its phrases place it [D].
        examples: tangent vectors of the pictures [n, D], n >= 1.
        common: mean direction of the taxonomy's nodes [D].

    Returns:
        Unit vector [D].
    """
    mean = F.normalize(F.normalize(examples, dim=-1).mean(0), dim=-1)
    direction = phrases_count * F.normalize(phrases, dim=-1) + len(examples) * mean
    direction, common = F.normalize(direction, dim=-1), F.normalize(common, dim=-1)
    return F.normalize(direction - common_share * (direction @ common) * common, dim=-1)
