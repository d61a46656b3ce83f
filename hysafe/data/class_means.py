"""Classes of pictures of which there are none: where theirs lie in the features of an image tower."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hysafe.errors import ConfigError

__all__ = ["ClassMeans"]


@dataclass(frozen=True)
class ClassMeans:
    """Mean features of classes of pictures, for ``EmbedData(class_means=FILE)``.

    Attributes:
        means: [C, E], float32. classes: name and hypernyms (root first) of each.
        tower: :meth:`~hysafe.encoder.HyperbolicEncoder.image_tower_hash` of the tower that they are features of.
    """

    means: Tensor
    classes: list[tuple[str, tuple[str, ...]]]
    tower: str

    def save(self, file: str | Path) -> None:
        """Write one safetensors file."""
        said = {"classes": json.dumps(self.classes), "tower": self.tower}
        save_file({"means": self.means.float().contiguous()}, file, metadata=said)

    @classmethod
    def load(cls, file: str | Path) -> ClassMeans:
        """Read a file written by :meth:`save`.

        Raises:
            ConfigError: there is no such file, or it is another.
        """
        try:
            with safe_open(file, framework="pt") as content:
                means, said = content.get_tensor("means"), content.metadata() or {}
            classes = [(str(name), tuple(chain)) for name, chain in json.loads(said["classes"])]
            tower = said["tower"]
        except FileNotFoundError:
            raise ConfigError(
                f"{file}: no such file. Make class means as benchmarks/wheel_tower.py does."
            ) from None
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{file}: no class means ({error}). Make them as benchmarks/wheel_tower.py does."
            ) from None
        if means.ndim != 2 or len(means) != len(classes):
            raise ConfigError(
                f"{file}: {tuple(means.shape)} means for {len(classes)} classes. Make it anew."
            )
        return cls(means, classes, tower)
