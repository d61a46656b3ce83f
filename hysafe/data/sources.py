"""The one file that imports Hugging Face datasets: any source to Samples.

A source is a hub id, a local Parquet or JSONL file (or a glob of them) or an image folder; an
adapter turns its rows into :class:`hysafe.types.Sample`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hysafe.data.label_map import text_nodes
from hysafe.errors import ConfigError, InputError
from hysafe.types import Sample

__all__ = ["ADAPTERS", "data_root", "iter_samples", "load_rows"]

Adapter = Callable[[int, Mapping[str, Any], str], "Sample | list[Sample] | None"]


def data_root(path: str | None = None) -> Path:
    """Where development data lies: `path`, or the environment variable HYSAFE_DATA.

    Raises:
        ConfigError: neither is given, or the folder does not exist.
    """
    value = path or os.environ.get("HYSAFE_DATA")
    if not value:
        raise ConfigError("no data folder: set HYSAFE_DATA or pass the folder.")
    if not Path(value).is_dir():
        raise ConfigError(f"data folder {value} does not exist; correct HYSAFE_DATA or the flag.")
    return Path(value)


def load_rows(location: str, *, split: str = "train", streaming: bool = False) -> Any:
    """A Hugging Face dataset from a hub id, Parquet, JSONL/JSON, CSV, or an image folder.

    Pictures stay encoded. Code from the hub is never run.

    Raises:
        InputError: there is no such file, folder, split or hub id, or it cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    kind = _kind(location)
    if kind is None:
        arguments: dict[str, Any] = {"path": location, "split": split}
    elif kind == "imagefolder":
        arguments = {"path": "imagefolder", "data_dir": location, "split": split}
    else:
        files = sorted(glob.glob(location))
        if not files:
            raise InputError(f"{location}: no such file. Check the path or glob.")
        arguments = {"path": kind, "data_files": files, "split": "train"}
    try:
        rows = datasets.load_dataset(**arguments, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        detail = " ".join(str(cause).split())
        raise InputError(
            f"{location}: cannot be read ({type(cause).__name__}: {detail}). Check the file, the "
            "split, or (for a hub id) name and network."
        ) from error
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def iter_samples(
    location: str, adapter: str | Adapter = "auto", *, split: str = "train", source: str = ""
) -> Iterator[Sample]:
    """Samples of a source.

    Args:
        location: see :func:`load_rows`.
        adapter: a name in :data:`ADAPTERS` or a function (index, row, source) -> Sample(s) or
            None to leave a row out.
        split: for hub ids and image folders.
        source: name of the set; the file's stem by default.

    Raises:
        ConfigError: unknown adapter.
        InputError: the source cannot be read, or its rows lack a column the adapter needs.
    """
    function = ADAPTERS.get(adapter) if isinstance(adapter, str) else adapter
    if function is None:
        raise ConfigError(f"adapter {adapter!r}: known are {', '.join(ADAPTERS)}.")
    source = source or Path(location).stem.split("-")[0]
    for index, row in enumerate(load_rows(location, split=split)):
        try:
            made = function(index, row, source)
        except KeyError as error:
            raise InputError(
                f"{location}: row {index} has no column {error}; it has {', '.join(row)}. "
                "Choose another adapter."
            ) from error
        if made is None:
            continue
        yield from made if isinstance(made, list) else [made]


# ---------------------------------------------------------------- adapters


def image_bytes(value: Any) -> bytes | None:
    """Encoded bytes of an image cell: {bytes, path}, bytes, or a path."""
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return bytes(value["bytes"])
        value = value.get("path")
    if isinstance(value, str):
        return Path(value).read_bytes()
    return None


def auto(index: int, row: Mapping[str, Any], source: str) -> Sample | None:
    """Any rows with `text` and/or `image`, optional `node`/`nodes`, `safe`, `pair`."""
    text = row.get("text")
    image = image_bytes(row.get("image"))
    if text is None and image is None:
        return None
    nodes = row.get("nodes") or row.get("node") or ()
    nodes = (nodes,) if isinstance(nodes, str) else tuple(nodes)
    safe = row.get("safe")
    return Sample(str(row.get("id", index)), source, text, image, nodes, safe, row.get("pair"))


def hysafe_text(index: int, row: Mapping[str, Any], source: str) -> Sample | None:
    """The JSONL text sets of the development data: `text, source, labels, safe`."""
    name = row.get("source") or source
    nodes, safe = text_nodes(name, row.get("labels") or (), row.get("safe"))
    if not nodes or not (row["text"] or "").strip():
        return None
    extra = {k: row[k] for k in ("labels", "split", "severity") if row.get(k) is not None}
    return Sample(f"{name}-{index}", name, row["text"], None, nodes, safe, None, extra)


# The ViSU-Text release misspells one of its 20 tags.
VISU_TAGS = {"harrassment": "harassment", "obscence gestures": "obscene gestures"}
# The 20 tags (from I2P's seven groups) to nodes.
VISU_NODES = {
    "hate": ("1.2",),
    "harassment": ("1.3",),
    "violence": ("2.1",),
    "suffering": ("5.4",),
    "humiliation": ("1.3",),
    "harm": ("2.1", "3.2"),
    "suicide": ("3.1",),
    "sexual": ("4.1", "4.3"),
    "nudity": ("4.2",),
    "bodily fluids": ("5.1", "4.1"),
    "blood": ("5.1",),
    "obscene gestures": ("1.3",),
    "illegal activity": ("7.5",),
    "drug use": ("3.4", "6.3"),
    "theft": ("7.1",),
    "vandalism": ("7.1",),
    "weapons": ("6.1",),
    "abuse": ("2.4", "5.4"),
    "brutality": ("2.1", "2.4"),
    "cruelty": ("2.4", "2.5"),
}


def visu(index: int, row: Mapping[str, Any], source: str) -> list[Sample]:
    """ViSU-Text quadruplet rows `safe, nsfw, coco_id, tag` -> a safe and an unsafe Sample."""
    tag = str(row["tag"]).strip().lower()
    tag = VISU_TAGS.get(tag, tag)
    pair = f"{source}-{index}"
    extra = {"coco_id": row.get("coco_id"), "tag": tag}
    return [
        Sample(f"{pair}-s", source, row["safe"], None, ("SAFE",), True, pair, extra),
        Sample(f"{pair}-u", source, row["nsfw"], None, VISU_NODES.get(tag, ("RISK",)), False, pair,
               extra),
    ]  # fmt: skip


def tiny_imagenet(index: int, row: Mapping[str, Any], source: str) -> Sample:
    """Tiny-ImageNet Parquet rows `image, label, wnid, name, hypernyms`."""
    from hysafe.data.label_map import picture_nodes

    chain = row["hypernyms"]
    hypernyms = tuple(chain.split("|") if isinstance(chain, str) else chain)
    nodes = picture_nodes("tiny_imagenet", row["name"], hypernyms)
    safe = all(n.startswith("S") for n in nodes)
    extra = {"label": int(row["label"]), "name": row["name"], "hypernyms": hypernyms}
    return Sample(
        f"{source}-{index}", source, None, image_bytes(row["image"]), nodes, safe, None, extra
    )


ADAPTERS: dict[str, Adapter] = {
    "auto": auto,
    "hysafe_text": hysafe_text,
    "visu": visu,
    "tiny_imagenet": tiny_imagenet,
}

_SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def _kind(location: str) -> str | None:
    if Path(location).is_dir():
        return "imagefolder"
    kind = _SUFFIXES.get(Path(location).suffix)
    if kind is None and (location.startswith((".", "/")) or location.count("/") != 1):
        raise InputError(
            f"{location}: neither a folder, a {', '.join(_SUFFIXES)} file nor a hub id "
            "(owner/name). Check the path."
        )
    return kind
