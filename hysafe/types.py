"""The frozen records that pass between the layers. No third-party import."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

__all__ = [
    "ErrorRecord",
    "Hashes",
    "Item",
    "Modality",
    "NodeScore",
    "NoveltyScores",
    "Rating",
    "Result",
    "Sample",
]

Rating = Literal["safe", "unsafe", "review"]
Modality = Literal["image", "text", "image+text"]


@dataclass(frozen=True)
class ErrorRecord:
    """Why an item could not be read: the error's type and a message with the remedy."""

    type: str
    message: str


@dataclass(frozen=True)
class Item:
    """One thing to be judged, as it came in: undecoded.

    Args:
        id: unique within a scan, stable between scans of the same input.
        source: where it came from: a path, ``file.parquet#row 12``, ``file.jsonl:7``, ``-:3``.
        text: the text, if any.
        image: encoded picture (file bytes), if any.
        content_hash: sha256 hex of picture bytes and text; "" where nothing could be read.
        error: set where the item could not be read; such an item is rated ``review``.
        modality: what it was meant to be, known even where reading failed.
    """

    id: str
    source: str
    modality: Modality
    text: str | None = None
    image: bytes | None = None
    content_hash: str = ""
    error: ErrorRecord | None = None


@dataclass(frozen=True)
class Sample:
    """One training or evaluation example.

    Args:
        id: stable id within its source.
        source: name of the data set.
        text: the text, or None.
        image: encoded picture bytes, or None.
        nodes: ids of taxonomy nodes any of which may hold it ([] = not known). Leaves or inner
            nodes; an inner node stands for all its descendants.
        safe: True, False or None (not known), the set's own label.
        pair: id shared by the two sides of a contrast pair, or None.
        extra: anything else a set carries (register, split, wnid, ...).
    """

    id: str
    source: str
    text: str | None = None
    image: bytes | None = None
    nodes: tuple[str, ...] = ()
    safe: bool | None = None
    pair: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeScore:
    """One taxonomy node that applies to an item.

    Args:
        node: node id.
        path: names from the domain down to the node.
        score: calibrated probability in [0, 1]; never above the parent's.
        in_cone: whether the point lies inside the node's cone.
    """

    node: str
    path: tuple[str, ...]
    score: float
    in_cone: bool


@dataclass(frozen=True)
class NoveltyScores:
    """Conformal p-values in (0, 1], small = novel; None where the model has no calibration.

    policy: it looks risky and no active node holds it. distribution: far from all that is known.
    name, rationale: what a guard calls a novel item, and why; None where none was asked.
    """

    policy: float | None
    distribution: float | None
    name: str | None = None
    rationale: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; name and rationale where a guard gave them."""
        said = {k: v for k in ("name", "rationale") if (v := getattr(self, k)) is not None}
        return {"policy": self.policy, "distribution": self.distribution, **said}


@dataclass(frozen=True)
class Hashes:
    """What a result depends on; equal hashes give an equal result."""

    content: str
    model: str
    taxonomy: str
    policy: str


@dataclass(frozen=True)
class Result:
    """The judgement of one item; :meth:`to_dict` is its line in ``results.jsonl``."""

    id: str
    source: str
    modality: Modality
    rating: Rating
    p_unsafe: float | None
    paths: tuple[NodeScore, ...]
    novelty: NoveltyScores
    radius: float | None
    channels: dict[str, Any]
    error: ErrorRecord | None
    hashes: Hashes

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for json.dumps."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        # by hand: dataclasses.asdict took a tenth of the time of a scan of small pictures
        data["paths"] = [{**vars(p), "path": list(p.path)} for p in self.paths]
        data["novelty"], data["hashes"] = self.novelty.to_dict(), dict(vars(self.hashes))
        data["channels"] = copy.deepcopy(self.channels)
        data["error"] = None if self.error is None else asdict(self.error)
        return data
