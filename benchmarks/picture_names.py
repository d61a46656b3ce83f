"""Names of pictures whose class the guard never had: `python benchmarks/picture_names.py`

Ten pictures of each of the 17 held-out classes of Tiny-ImageNet's ``val.parquet``, named

- by what the near words of the list of what pictures show agree on, as in the product;
- by the phrases for texts that the guard points at;
- in words of the guard's own.

Wu-Palmer similarity x 100 of the nearest noun in the name to the true synset. It favours general words:
"animal" for everything is the last line.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter

import numpy as np

from hysafe.app.guard_data import evidence_of
from hysafe.app.guard_namer import load_guard
from hysafe.app.pipeline import load
from hysafe.data.images import decode
from hysafe.data.sources import data_root, iter_samples
from hysafe.evaluate.novelty_data import read_held_out
from hysafe.guard.ask import chosen_names
from hysafe.guard.model import PolicySpace
from hysafe.guard.naming import restated
from hysafe.guard.protocol import PromptPolicy
from hysafe.guard.rewards import WuPalmer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--guard", default="mini-guard")
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--pictures", type=int, default=10, help="of each class")
    parser.add_argument("--show", action="store_true", help="print the names")
    a = parser.parse_args()
    root, held = data_root(a.data), set(read_held_out(None))
    with (root / "images/tiny_imagenet/classes.csv").open(newline="") as file:
        synsets = {r["name"]: r["synset"] for r in csv.DictReader(file)}
    counts: Counter[str] = Counter()
    pictures, classes = [], []
    for s in iter_samples(str(root / "images/tiny_imagenet/val.parquet"), "tiny_imagenet"):
        name = str(s.extra["name"])
        if name in held and counts[name] < a.pictures:
            counts[name] += 1
            pictures.append(decode(s.image or b""))
            classes.append(name)
    model = load(a.model)
    namer, view = load_guard(a.guard, model), model.view()
    vectors = model.encode_image(pictures).tangent().numpy()
    n = len(vectors)
    listed = [x.name if x else "" for x in namer.name(vectors, ["image"] * n, [""] * n, view)]
    items = evidence_of(
        model, {"image": vectors}, [""] * n, namer.index, view, borrow=True,
        without=restated(namer.index.phrases, view),
    )  # fmt: skip
    table, apexes = model.place(view)
    policies = [PromptPolicy.from_view(view, numbered=True)] * n
    space = PolicySpace(table.ids, apexes.tangent().float())
    guard = namer.guard
    own = guard.sample(guard._processor().describe(items), temperature=0.0).texts
    said = {
        "list of what pictures show (in the product)": listed,
        "phrases for texts": chosen_names(guard, items, policies, space),
        "the guard's own words": own,
        "always `animal`": ["animal"] * n,
    }
    similarity = WuPalmer(root / "wordnet/noun_edges.tsv")
    print(f"{n} pictures of {len(counts)} classes\n\n| name | Wu-Palmer |\n|---|---|")
    for label, names in said.items():
        scores = [
            similarity.to_synset(x, synsets[c]) or 0 for x, c in zip(names, classes, strict=True)
        ]
        print(f"| {label} | {100 * np.mean(scores):.1f} |")
    if a.show:
        for name, *names in zip(classes, listed, own, strict=True):
            print(name, *names, sep=" | ")


if __name__ == "__main__":
    main()
