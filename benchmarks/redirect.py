"""Redirection of risky queries: how often the best answer is safe, and what safe queries lose.

``python benchmarks/redirect.py --data $HYSAFE_DATA`` builds a collection of one half of the contrast
test split and one half of Tiny-ImageNet's ``val.parquet``, and asks it with the other halves. Truth
is the label of the item, not the rating that the model gave it. Pairs are split whole.

``--split validation`` takes that split of the contrast set and the training pictures that were held out. With
``--each`` every risky picture asks, and all pictures but itself may answer; nothing else is measured.

- Risky texts and pictures: share of queries whose best answer is safe, by plain search and redirected.
- Safe queries (``a photo of a CLASS`` and pictures of harmless classes): share that have a picture of
  their class among the first ten, by plain search and redirected.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

from hysafe.app.pipeline import SafetyModel, ScanOptions, load
from hysafe.app.redirect import redirect_queries
from hysafe.app.scan import scan
from hysafe.data.contrast import contrast_set
from hysafe.data.datamodule import held_out
from hysafe.data.images import decode
from hysafe.data.sources import data_root, iter_samples
from hysafe.geometry import Points
from hysafe.index import Collection
from hysafe.types import Sample

# Of a plain search: as in the product, and by distance alone, as redirection orders.
ORDERS: tuple[dict[str, float], ...] = ({}, {"radius_share": 0.0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--limit", type=int, help="at most this many pictures")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--at-most", type=float, nargs="+", default=[None], metavar="P",
                        help="p_unsafe of answers to a query of more risk; a line for each")  # fmt: skip
    parser.add_argument("--each", action="store_true", help="every risky picture asks, among all others")
    a = parser.parse_args()
    model = load(a.model)
    texts = [s for s in contrast_set(a.split) if not s.extra["form"]]
    root = data_root(a.data) / "images" / "tiny_imagenet"
    name = "val.parquet" if a.split == "test" else "train-*.parquet"
    pictures = [
        s
        for s in iter_samples(str(root / name), "tiny_imagenet")
        if a.split == "test" or held_out(s.image or b"")
    ][: a.limit]
    with tempfile.TemporaryDirectory() as folder:
        collection, label = build(
            Path(folder), model, [s for s in texts if not _asks(s)], pictures[:: 1 if a.each else 2]
        )
        if a.each:
            _each(collection, label, model, pictures, a.at_most)
            return
        asked = [s for s in texts if _asks(s) and not s.safe]
        print(
            "| queries | n | plain search | by distance alone | redirected |\n|---|---|---|---|---|"
        )
        risky = [p for p in pictures[1::2] if not p.safe]
        for name, queries, channel in (
            ("risky texts, best answer is safe", _text(model, asked), "text"),
            ("risky pictures, best answer is safe", _images(model, risky), "image"),
        ):
            plain = [
                [
                    bool(hits) and label[_id(collection, hits[0].row)]["safe"]
                    for hits in collection.search(queries, model=model.hash, k=1, **order)
                ]
                for order in ORDERS
            ]
            for bound in a.at_most:
                moved = redirect_queries(
                    collection, model, queries, channel=channel, k=1, at_most=bound
                )
                after = [bool(r.found) and label[r.found[0].item.id]["safe"] for r in moved]
                _line(name if bound is None else f"{name} ({bound:g})", *plain, after)
        said: list[tuple[str, int, int]] = []
        classes = sorted({p.extra["name"] for p in pictures if p.safe})
        harmless = [p for p in pictures[1::2] if p.safe]
        phrases = [Sample(n, "", f"a photo of a {n}", None, (), True, None, {}) for n in classes]
        for name, queries, channel, truth in (
            ("class names, class among the first 10", _text(model, phrases), "text", classes),
            ("harmless pictures, class among the first 10", _images(model, harmless), "image",
             [p.extra["name"] for p in harmless]),
        ):  # fmt: skip
            # pictures only on both sides: the question is which picture comes back
            where = "modality = 'image'"
            plain = []
            for order in ORDERS:
                hits_of = collection.search(queries, model=model.hash, k=10, where=where, **order)
                plain.append([
                    t in [label[_id(collection, h.row)]["name"] for h in hits]
                    for t, hits in zip(truth, hits_of, strict=True)
                ])  # fmt: skip
            for bound in a.at_most:
                moved = redirect_queries(
                    collection, model, queries, channel=channel, where=where, k=10, at_most=bound
                )
                said.append((name, sum(r.at_most is not None for r in moved),
                             sum(r.radius[0] != r.radius[1] for r in moved)))  # fmt: skip
                after = [
                    t in [label[f.item.id]["name"] for f in r.found]
                    for t, r in zip(truth, moved, strict=True)
                ]
                _line(name if bound is None else f"{name} ({bound:g})", *plain, after)
        for name, doubtful, count in said:
            print(f"\n{name}: {doubtful} above --at-most, {count} moved")


def build(
    folder: Path, model: SafetyModel, texts: list[Sample], pictures: list[Sample]
) -> tuple[Collection, dict[str, dict[str, Any]]]:
    """A collection of texts and pictures, and the truth about each of its items."""
    label: dict[str, dict[str, Any]] = {}
    (folder / "in").mkdir()
    with (folder / "in" / "t.jsonl").open("w") as file:
        for s in texts:
            file.write(json.dumps({"text": s.text}) + "\n")
    for i, p in enumerate(pictures):
        assert p.image is not None
        (folder / "in" / f"{i:05d}.jpg").write_bytes(p.image)
    scan([str(folder / "in")], folder / "out", model, options=ScanOptions(64, 0), report=False)
    collection = Collection.open(folder / "out")
    ids = collection.to_arrow(["id"])["id"].to_pylist()
    for name in ids:
        if name.endswith(".jpg"):
            p = pictures[int(Path(name).stem)]
            label[name] = {"safe": p.safe, "name": p.extra["name"]}
        else:
            found = texts[int(name.rsplit("#", 1)[1]) - 1]  # lines are counted from 1
            label[name] = {"safe": found.safe, "name": None}
    return collection, label


def _each(
    collection: Collection,
    label: dict[str, dict[str, Any]],
    model: SafetyModel,
    pictures: list[Sample],
    bounds: list[float | None],
) -> None:
    """How often the best answer to a risky picture, itself left out, is safe."""
    risky = [i for i, p in enumerate(pictures) if not p.safe]
    queries = _images(model, [pictures[i] for i in risky])
    for bound in bounds:
        moved = redirect_queries(collection, model, queries, channel="image", k=2, at_most=bound)
        found = [
            [f.item.id for f in r.found if Path(f.item.id).stem != f"{i:05d}"]
            for i, r in zip(risky, moved, strict=True)
        ]
        safe = sum(bool(ids) and label[ids[0]]["safe"] for ids in found)
        at = "in use" if bound is None else f"{bound:g}"
        print(f"best answer is safe, --at-most {at}: {safe} of {len(risky)} risky pictures", flush=True)


def _asks(sample: Sample) -> bool:
    """The sample belongs to the half that asks; pairs stay together."""
    return zlib.crc32((sample.pair or sample.id).encode()) % 2 == 0


def _text(model: SafetyModel, samples: list[Sample]) -> Points:
    return model.encode_text([str(s.text) for s in samples])


def _images(model: SafetyModel, samples: list[Sample]) -> Points:
    size = model.encoder.image_size
    return model.encode_image([decode(s.image, size=size) for s in samples if s.image])


def _id(collection: Collection, row: int) -> str:
    if not hasattr(collection, "_names"):
        collection._names = collection.to_arrow(["id"])["id"].to_pylist()  # type: ignore[attr-defined]
    return str(collection._names[row])  # type: ignore[attr-defined]


def _line(name: str, *found: list[bool]) -> None:
    shares = " | ".join(f"{sum(f) / len(f):.3f}" for f in found)
    print(f"| {name} | {len(found[0])} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
