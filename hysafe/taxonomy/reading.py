"""YAML written by people, read strictly.

Keys are taken as they are written (``6.10`` stays ``6.10`` and is not the number 6.1, ``on`` stays
``on``), and a key given twice is an error where YAML would silently keep the last one.
"""

from __future__ import annotations

import pathlib
from collections.abc import Hashable
from typing import Any

import yaml

from hysafe.errors import TaxonomyError

__all__ = ["parse_yaml", "read_text"]

_MERGE = "tag:yaml.org,2002:merge"


def read_text(path: str | pathlib.Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        TaxonomyError: the file cannot be read, or is not UTF-8.
    """
    try:
        return pathlib.Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise TaxonomyError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from error
    except (OSError, ValueError) as error:
        raise TaxonomyError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}). Check the path "
            "and its permissions."
        ) from error


def parse_yaml(text: str, *, origin: str, trusted: bool = False) -> Any:
    """Plain data from YAML text.

    Args:
        text: the YAML.
        origin: file name for messages.
        trusted: our own file: libyaml may read it, eight times faster, but it crashes the process
            on deep nesting.

    Raises:
        TaxonomyError: not YAML, a key given twice, or a tag that would build an object.
    """
    loader = _Fast if trusted else _Strict
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError as error:
        raise TaxonomyError(f"{origin}: not valid YAML: nested too deeply. Flatten it.") from error
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: dates and numbers that only look like ones, e.g. 2024-13-45
        detail = " ".join(str(error).split())
        raise TaxonomyError(
            f"{origin}: not valid YAML: {detail}. Correct it there; put texts in quotes."
        ) from error


class _AsWritten:
    """Mixin of a loader: scalar keys as text, each once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(
                None, None, f"expected a mapping, found {node.id}", node.start_mark
            )
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be text, not a list or mapping", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            if key.tag != _MERGE:
                seen.add(key.value)
        self.flatten_mapping(node)  # type: ignore[attr-defined]
        return {
            key.value: self.construct_object(value, deep=deep)  # type: ignore[attr-defined]
            for key, value in node.value
        }


class _Strict(_AsWritten, yaml.SafeLoader):
    pass


class _Fast(_AsWritten, yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    pass
