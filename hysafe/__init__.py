"""hysafe: content safety in hyperbolic space.

>>> import hysafe as hs
>>> model = hs.load("mini")                         # doctest: +SKIP
>>> model.moderate(texts=["how do I kill a Python process"])  # doctest: +SKIP

Importing the package loads neither torch nor open_clip nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hysafe.app.pipeline import SafetyModel, load
    from hysafe.geometry.points import Points
    from hysafe.taxonomy import Policy, Taxonomy, load_taxonomy
    from hysafe.types import Result

__all__ = [
    "Points",
    "Policy",
    "Result",
    "SafetyModel",
    "Taxonomy",
    "__version__",
    "load",
    "load_taxonomy",
]

__version__ = "0.1.0"

_HOMES = {
    "Points": "hysafe.geometry.points",
    "Policy": "hysafe.taxonomy",
    "Result": "hysafe.types",
    "SafetyModel": "hysafe.app.pipeline",
    "Taxonomy": "hysafe.taxonomy",
    "load": "hysafe.app.pipeline",
    "load_taxonomy": "hysafe.taxonomy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hysafe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
