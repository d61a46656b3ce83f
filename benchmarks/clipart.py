"""Drawings that no model here was trained on: `python benchmarks/clipart.py FOLDER MODEL [MODEL ...]`

FOLDER holds Debian's clip art (`apt-get download openclipart-png`, `dpkg-deb -x openclipart-png_*.deb FOLDER`; in the public
domain). Its drawings are sorted into folders; those below ask for the words beside them, and for one another: a picture asks
for the others of its folder. One drawing of each file name is kept, on white. What is asked for is ranked by distance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_precision

from hysafe.app.pipeline import SafetyModel, load
from hysafe.evaluate.metrics import detection
from hysafe.geometry import Points

# Folder under openclipart/png, and what it holds in words.
FOLDERS = {
    "animals/amphibian": "amphibian", "animals/birds": "bird", "animals/bugs": "insect", "animals/fish": "fish",
    "animals/mammals/bears": "bear", "animals/mammals/big_cats": "big cat", "animals/mammals/dogs": "dog",
    "animals/mammals/horses": "horse", "animals/mammals/housecats": "cat", "buildings/furniture": "furniture",
    "buildings/homes": "house", "computer/hardware": "computer hardware", "education/books": "book",
    "electronics": "electronic component", "food/beverages": "beverage", "food/beverages/alcohol": "alcoholic drink",
    "food/breads_and_carbs": "bread", "food/desserts": "dessert", "food/fruit": "fruit", "food/meats_and_eggs": "meat",
    "food/vegetables": "vegetable", "office/telephone": "telephone", "people/clothing": "clothing",
    "people/clothing/hats": "hat", "people/clothing/jewelry": "jewelry", "plants/flowers": "flower",
    "plants/trees": "tree", "recreation/games/dice": "dice", "recreation/music": "musical instrument",
    "recreation/sports": "sports equipment", "recreation/toys": "toy", "science/medicine": "medical equipment",
    "signs_and_symbols/clocks": "clock", "tools": "tool", "tools/weapons": "weapon", "transportation/boating": "boat",
    "transportation/vehicles": "vehicle",
}  # fmt: skip
# Folders of things that a category of risk may be drawn by.
RISKS = {"tools/weapons": "6.1", "food/beverages/alcohol": "6.4"}
SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+")
    a = parser.parse_args()
    drawings = read(a.folder)
    folders = sorted({f for f, _ in drawings})
    of = torch.tensor([folders.index(f) for f, _ in drawings])
    print(f"{len(drawings)} drawings in {len(folders)} folders; a rank by chance has mAP {by_chance(of):.3f}")
    print("| model | words: mAP, precision@10 | picture: mAP, best other of its folder | AUROC of the cone of "
          + ", ".join(f"{node} for {FOLDERS[f]}" for f, node in RISKS.items())
          + " | rated unsafe: " + ", ".join(FOLDERS[f] for f in RISKS) + ", others |")  # fmt: skip
    print("|---|---|---|---|---|")
    each = {}
    for name in a.models:
        model = load(name)
        items = encode(model, [image for _, image in drawings])
        words = model.encode_text([article(FOLDERS[f]) for f in folders])
        asked = [figures(d, of == i) for i, d in enumerate(words.dist(items))]
        others = items.dist(items)
        others.fill_diagonal_(float("inf"))
        near = [figures(d, of == of[i]) for i, d in enumerate(others)]
        best = (of[others.argmin(-1)] == of).double().mean()
        view = model.view()
        margins = items.margin(model.place(view)[1])
        ids = model.place(view)[0].ids
        risky = [
            detection(margins[of != folders.index(f), ids.index(node)], margins[of == folders.index(f), ids.index(node)]).auroc
            for f, node in RISKS.items()
        ]
        rated = [r.rating == "unsafe" for r in model.moderate(images=[image for _, image in drawings])]
        groups = [*([of == folders.index(f) for f in RISKS]), torch.stack([of != folders.index(f) for f in RISKS]).all(0)]
        shares = [float(torch.tensor(rated)[g].double().mean()) for g in groups]
        each[name] = {f: x[0] for f, x in zip(folders, asked, strict=True)}
        print(f"| {name} | {mean(asked, 0):.3f}, {mean(asked, 1):.3f} | {mean(near, 0):.3f}, {best:.3f} | "
              + ", ".join(f"{r:.3f}" for r in risky) + " | " + ", ".join(f"{x:.3f}" for x in shares) + " |", flush=True)  # fmt: skip
    print("\nWords, mAP of each folder (drawings): " + "; ".join(
        f"{FOLDERS[f]} ({int((of == i).sum())}) " + ", ".join(f"{each[m][f]:.2f}" for m in a.models)
        for i, f in enumerate(folders)
    ))  # fmt: skip


def read(root: Path) -> list[tuple[str, Image.Image]]:
    top = next((p for p in [root, *root.rglob("png")] if (p / "animals").is_dir()), None)
    if top is None:
        raise SystemExit(f"{root} holds no drawings: dpkg-deb -x openclipart-png_*.deb {root}")
    out, seen = [], set()
    # The deepest folder has a drawing that lies in several.
    for folder in sorted(FOLDERS, key=lambda f: (-f.count("/"), f)):
        for file in sorted((top / folder).glob("*.png")):
            if file.name in seen or file.stat().st_size == 0:
                continue
            seen.add(file.name)
            with Image.open(file) as image:
                image.thumbnail((SIZE, SIZE))
                paper = Image.new("RGBA", image.size, "white")
                out.append((folder, Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")))
    return out


def encode(model: SafetyModel, images: list[Image.Image]) -> Points:
    parts = [model.encode_image(images[i : i + 64]).tangent() for i in range(0, len(images), 64)]
    return Points.from_tangent(torch.cat(parts), model.encoder.c, model.encoder.space)


def figures(distance: Tensor, relevant: Tensor) -> tuple[float, float]:
    """Average precision, and precision among the first ten; an infinite distance is not found."""
    nearness = 1 / (1 + distance)  # torchmetrics finds what is above 0
    return float(retrieval_average_precision(nearness, relevant)), float(retrieval_precision(nearness, relevant, top_k=10))


def by_chance(of: Tensor) -> float:
    """Average precision of a random order, on average over the folders `of` drawings [n]."""
    n = len(of)
    harmonic = float((1 / torch.arange(1, n + 1, dtype=torch.double)).sum())
    share = (of.bincount().double() - 1) / (n - 1)
    return float((share * (n - harmonic) + harmonic).mean() / n)


def mean(rows: list[tuple[float, float]], column: int) -> float:
    return sum(r[column] for r in rows) / len(rows)


def article(noun: str) -> str:
    if noun in ("furniture", "clothing", "jewelry", "bread", "meat", "dice", "computer hardware") or noun.endswith("equipment"):
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


if __name__ == "__main__":
    main()
