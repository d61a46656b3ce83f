"""A saved model without its towers: enough to place nodes and score stored points.

The heads and scalars are read from the model's folder; open_clip and the towers are loaded when
something has to be encoded, and not before.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hysafe.encoder.head import NodeHead
from hysafe.encoder.model import (
    CONE_SCALE,
    CONFIG,
    WEIGHTS,
    HyperbolicEncoder,
    bank_hash,
    read_weights,
    state_hash,
    text_state_hash,
)
from hysafe.encoder.towers import Towers
from hysafe.errors import ModelError
from hysafe.geometry import BoundedScalar, Curvature, Points

__all__ = ["TowerlessEncoder"]


class TowerlessEncoder:
    """Stands in for :class:`HyperbolicEncoder` at inference; same hash, same nodes, same scores.

    Args:
        folder: written by :meth:`HyperbolicEncoder.save_directory`.

    Raises:
        ModelError: a file is missing or does not fit.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._whole: HyperbolicEncoder | None = None
        for name in (CONFIG, WEIGHTS):
            if not (self._folder / name).is_file():
                raise ModelError(
                    f"{folder}: no {name}. A hysafe model folder holds {CONFIG}, {WEIGHTS}."
                )
        try:
            config = _defaults() | json.loads((self._folder / CONFIG).read_text("utf-8"))
            # as the whole model holds them: matrices may be stored in half the width
            state = {
                k: v.float() if v.is_floating_point() else v
                for k, v in read_weights(self._folder).items()
            }
            linear, known = bool(config["linear_heads"]), list(config.get("known_nodes", ()))
            self._dim = int(config["dim"]) if linear else None
            self.space = str(config["space"])
            # without a linear map only the offsets have a width
            offsets = state["node_head.offsets"].shape[1] if known else 1
            width = state["node_head.linear.weight"].shape[1] if linear else offsets
            self._known_rows = {key: row for row, key in enumerate(known)}
            self._curvature = Curvature(
                float(config["curvature"]), learnable=bool(config["learn_curvature"])
            )
            self._cone_scale = BoundedScalar(*CONE_SCALE)
            self._node_head = NodeHead(
                width,
                self._dim or width,
                normalize=config["normalize"],
                linear=linear,
                known=len(known),
            )
            for prefix, module in (
                ("curvature.", self._curvature),
                ("cone_scale.", self._cone_scale),
                ("node_head.", self._node_head),
            ):
                own = module.state_dict()
                module.load_state_dict({k: state[prefix + k].reshape(own[k].shape) for k in own})
        except ModelError:
            raise
        except Exception as error:  # safetensors raises its own type
            raise ModelError(
                f"{folder}: not a hysafe model ({type(error).__name__}: {error})."
            ) from error
        self._hash, self._text_hash = state_hash(config, state), text_state_hash(config, state)

    @property
    def towers_loaded(self) -> bool:
        """Whether something had to be encoded."""
        return self._whole is not None

    @property
    def whole(self) -> HyperbolicEncoder:
        """The model with its towers, loaded on first use."""
        if self._whole is None:
            self._whole = HyperbolicEncoder.load_directory(self._folder)
            self._whole.prepare_inference()
        return self._whole

    # ------------------------------------------------------------ without towers

    def hash(self) -> str:
        """As :meth:`HyperbolicEncoder.hash`."""
        return self._hash

    def text_hash(self) -> str:
        """As :meth:`HyperbolicEncoder.text_hash`."""
        return self._text_hash

    def eval(self) -> TowerlessEncoder:
        """Itself: it knows no training mode."""
        return self

    @property
    def dim(self) -> int:
        """D, dimension of the space."""
        return self._dim or self.whole.dim

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self._whole is None else self._whole.device

    @property
    def c(self) -> float:
        """The curvature magnitude as a number."""
        return float(self._curvature().detach())

    @property
    def cone_scale_value(self) -> float:
        """Inverse temperature of cone margins as a number."""
        return float(self._cone_scale().detach())

    @torch.no_grad()
    def place_nodes(
        self, features: Tensor, depth: Tensor, banks: Sequence[Sequence[str]] | None = None
    ) -> Points:
        """As :meth:`HyperbolicEncoder.place_nodes`."""
        c, rows = self._curvature(), None
        if banks is not None:
            rows = torch.tensor([self._known_rows.get(bank_hash(b), -1) for b in banks])
        return Points(self._node_head.place(features, depth, c, self.space, rows), c, self.space)

    # ------------------------------------------------------------ with towers

    @property
    def towers(self) -> Towers:
        return self.whole.towers

    @property
    def image_size(self) -> int:
        return self.whole.image_size

    def lift(self, modality: str, features: Tensor) -> Points:
        """As :meth:`HyperbolicEncoder.lift`."""
        return self.whole.lift(modality, features)

    def encode_image(self, pixels: Tensor) -> Points:
        """As :meth:`HyperbolicEncoder.encode_image`."""
        return self.whole.encode_image(pixels)

    def text_features(self, texts: Sequence[str], **options: Any) -> Tensor:
        """As :meth:`HyperbolicEncoder.text_features`."""
        return self.whole.text_features(texts, **options)

    def node_features(self, phrases: Sequence[Sequence[str]], **options: Any) -> Tensor:
        """As :meth:`HyperbolicEncoder.node_features`."""
        return self.whole.node_features(phrases, **options)


def _defaults() -> dict[str, Any]:
    """Settings that a config may leave out, as the whole model fills them in."""
    parameters = inspect.signature(HyperbolicEncoder.__init__).parameters.values()
    left_out = ("known_nodes", "load_pretrained")
    return {
        p.name: p.default for p in parameters if p.default is not p.empty and p.name not in left_out
    }
