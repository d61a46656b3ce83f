"""The encoder: open_clip towers, heads that lift onto the space, saved directories."""

from hysafe.encoder.head import LorentzHead, NodeHead
from hysafe.encoder.model import HyperbolicEncoder
from hysafe.encoder.towers import Towers, mini_architecture, open_clip_architecture

__all__ = [
    "HyperbolicEncoder",
    "LorentzHead",
    "NodeHead",
    "Towers",
    "mini_architecture",
    "open_clip_architecture",
]
