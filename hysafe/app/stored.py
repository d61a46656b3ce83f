"""What the commands on a stored collection share: its model, its policy, its pictures and texts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hysafe.app.pipeline import Judgement, SafetyModel, load
from hysafe.data.inputs import InputReader
from hysafe.errors import CollectionError, HysafeError, ModelError
from hysafe.index import Collection, CollectionMeta, EncodedItem
from hysafe.taxonomy import Policy, PolicyView

__all__ = ["Media", "judge_items", "model_of", "read_media", "stored_policy", "view_of"]

# file.parquet#row 12, file.jsonl:7
ROW_OF = re.compile(r"(?P<file>.+?)(?:#row |:)(?P<row>\d+)")

log = logging.getLogger(__name__)


def stored_policy(meta: CollectionMeta) -> Policy:
    """The policy that a collection's scores and ratings follow."""
    data = {"name": meta.policy_name, "review": dict(meta.review), "nodes": dict(meta.rules)}
    return Policy.from_dict(data, origin="the collection's policy")


def model_of(
    collection: Collection,
    *,
    name: str | None = None,
    taxonomy: str | Path | None = None,
    towers: bool = False,
) -> SafetyModel:
    """The model that a collection was scanned with.

    Args:
        name: where it is now; by default where it was at the scan.
        towers: load its towers at once; otherwise they follow when something has to be encoded.

    Raises:
        CollectionError: another model. ModelError: no model of that name.
    """
    name = name or collection.meta.model_name
    try:
        model = load(name, taxonomy=taxonomy, towers=towers)
    except ModelError as error:
        raise ModelError(
            f"{error} The collection was scanned with {collection.meta.model_name!r} "
            f"({collection.meta.model}); --model says where it is now."
        ) from error
    collection.check_model(model.hash)
    return model


def view_of(collection: Collection, model: SafetyModel, policy: Policy | None) -> PolicyView:
    """The taxonomy under a policy, by default the collection's own.

    Raises:
        CollectionError: the collection's own policy is over another taxonomy.
    """
    if policy is not None:
        return model.view(policy)
    try:
        view = model.view(stored_policy(collection.meta))
        fits = view.taxonomy.hash == collection.meta.taxonomy
    except HysafeError:
        fits = False
    if not fits:
        raise CollectionError(
            f"{collection.folder}: scanned with another taxonomy ({collection.meta.taxonomy}) "
            f"than this one ({model.taxonomy.hash}). Name it with --taxonomy FILE, or judge "
            "everything again under this one: hysafe rescore."
        )
    return view


def judge_items(
    collection: Collection, model: SafetyModel, view: PolicyView, items: list[EncodedItem]
) -> list[Judgement]:
    """Judgements of stored items, as a scan would give them."""
    meta = collection.meta
    return model.judge_encoded(items, view, reading=meta.reading or meta.model, reads=meta.reads)


@dataclass(frozen=True)
class Media:
    """Picture and text of an item, read again from its source."""

    image: bytes | None = None
    text: str = ""


def read_media(items: Iterable[EncodedItem]) -> dict[str, Media]:
    """Pictures and texts of items whose sources are still there and unchanged, by id.

    An item is recognised by its content hash; what has changed since the scan, or came from
    standard input, is left out.
    """
    wanted: dict[str, dict[str, list[str]]] = {}
    for item in items:
        file = _file_of(item.source)
        if file is not None and item.content_hash:
            wanted.setdefault(file, {}).setdefault(item.content_hash, []).append(item.id)
    found: dict[str, Media] = {}
    for file, hashes in wanted.items():
        missing = set(hashes)
        try:
            for read in InputReader([file]):
                if read.content_hash in missing:
                    missing.discard(read.content_hash)
                    for name in hashes[read.content_hash]:
                        found[name] = Media(read.image, read.text or "")
                    if not missing:
                        break
        except HysafeError as error:
            log.debug("%s: not read again: %s", file, error)
    return found


def _file_of(source: str) -> str | None:
    """The file that a source names, None where there is none (any more)."""
    if Path(source).is_file():
        return source
    match = ROW_OF.fullmatch(source)
    return match["file"] if match and Path(match["file"]).is_file() else None
