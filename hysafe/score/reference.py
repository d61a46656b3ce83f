r"""Ordinary items that nodes of a policy are measured on, so that a new node does not hold them all.

The cones of a model's own nodes are trained against each other. A node that a policy adds in words
is only placed: nothing has told it from ordinary items, and pictures lie far from all words. So it is
compared with a few thousand points that were kept from training, and its cone is narrowed until at
most a small share of them scores high for it: conformal calibration of one threshold (Vovk et al.
2005; Angelopoulos and Bates 2021), spoken in angles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hysafe.errors import ModelError
from hysafe.score.calibration import ModalityCalibration
from hysafe.score.leaves import NOTHING, NodeTable

__all__ = ["LEVEL", "load_reference", "narrowing", "save_reference"]

FILE = "reference.safetensors"
# At most this share of ordinary items scores HIGH or more for a new node.
LEVEL, HIGH = 0.01, 0.3
# Logits between which a score is looked for, and halvings of that range.
REACH, HALVINGS = 400.0, 60


def save_reference(folder: str | Path, tangents: Mapping[str, Tensor]) -> None:
    """Write tangent vectors [n, D] of ordinary items, by channel, into a model folder."""
    kept = {name: t.detach().to(torch.float16).contiguous() for name, t in tangents.items()}
    save_file(kept, Path(folder) / FILE)


def load_reference(folder: str | Path) -> dict[str, Tensor]:
    """Back from :func:`save_reference`, in float64; nothing where there is none.

    Raises:
        ModelError: the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    try:
        found = {name: t.double() for name, t in load_file(path).items()}
    except Exception as error:
        raise ModelError(
            f"{path}: cannot be read ({error}). Take the model's own again."
        ) from error
    if not all(t.dim() == 2 and bool(torch.isfinite(t).all()) for t in found.values()):
        raise ModelError(f"{path}: not tangent vectors [n, D]. Take the model's own again.")
    return found


def narrowing(
    margins: Tensor,
    table: NodeTable,
    new: Tensor,
    fit: ModalityCalibration,
    *,
    scale: float,
    level: float = LEVEL,
) -> Tensor:
    r"""By how much the cones of new leaves are narrowed, in radians.

    For each ordinary item there is a logit from which a new leaf would score HIGH (a harmless one:
    would outweigh all known leaves), beside the known leaves alone. A leaf's cone loses the angle by
    which its scaled margins exceed those logits at the :math:`\lceil (n+1)(1-\text{level})\rceil`-th
    smallest excess, so that a further ordinary item exceeds it with a probability of `level` at most.

    Args:
        margins: [n, N] of ordinary items to all nodes of the table's view.
        new: bool [L], leaves of the table that the model does not know.
        fit: calibration of the channel.
        scale: inverse temperature of margins.

    Returns:
        [N], 0 for nodes that are not new, and where there are too few items to tell.
    """
    found = margins.new_zeros(margins.shape[1])
    rank = math.ceil((len(margins) + 1) * (1 - level))
    if not bool(new.any()) or rank > len(margins):
        return found
    logits = margins[:, table.leaves] * scale  # [n, L]
    risky = logits[:, table.risk & ~new]
    rest = torch.logsumexp(logits[:, ~table.risk & ~new], 1).clamp_min(NOTHING)
    every = torch.logaddexp(torch.logsumexp(risky, 1), rest)
    from_where = torch.where(
        table.risk[new][:, None], _scores_high(risky, rest, fit)[None], every[None]
    )  # [new, n]
    excess = logits[:, new].T - from_where
    needed = excess.sort(dim=1).values[:, rank - 1].clamp_min(0)
    found[table.leaves[new]] = needed / scale
    return found


def _scores_high(risky: Tensor, rest: Tensor, fit: ModalityCalibration) -> Tensor:
    """The logit [n] from which one more leaf at risk scores HIGH beside the others [n, R]."""
    mass = torch.logsumexp(risky, 1)
    shared = torch.logsumexp(risky / fit.temperature, 1)
    low, high = torch.full_like(rest, -REACH), torch.full_like(rest, REACH)
    for _ in range(HALVINGS):
        z = (low + high) / 2
        share = torch.sigmoid(z / fit.temperature - shared)
        evidence = torch.logaddexp(z, mass) - rest
        over = share * torch.sigmoid(fit.slope * evidence + fit.offset) >= HIGH
        low, high = torch.where(over, low, z), torch.where(over, z, high)
    return high
