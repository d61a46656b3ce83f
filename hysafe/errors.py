"""Errors of hysafe.

Every error a caller may want to catch is a :class:`HysafeError` and also the builtin that fits
best. A message says what came, what was wanted and what to do.
"""

from __future__ import annotations

__all__ = [
    "CollectionError",
    "ConfigError",
    "HysafeError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "ShapeError",
    "TaxonomyError",
]


class HysafeError(Exception):
    """Base of all errors raised on purpose by hysafe."""


class ShapeError(HysafeError, ValueError):
    """A tensor has the wrong shape or dtype."""


class ConfigError(HysafeError, ValueError):
    """A setting, option or policy value is not usable."""


class TaxonomyError(HysafeError, ValueError):
    """A taxonomy or policy file is not valid; the message names file, node and remedy."""


class InputError(HysafeError, ValueError):
    """An input item or path cannot be read. Per item it becomes a row, never a stopped run."""


class ModelError(HysafeError, RuntimeError):
    """A model directory is missing, damaged or does not fit the data."""


class CollectionError(HysafeError, RuntimeError):
    """A collection on disk is missing, damaged or was made by another model."""


class MissingExtraError(HysafeError, ImportError):
    """An optional dependency is needed; the message gives the pip command."""
