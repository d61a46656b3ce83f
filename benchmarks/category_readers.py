"""How well two readers, and models, tell the categories of risky sentences: `python benchmarks/category_readers.py mini`

Two language models read the 429 risky sentences of the contrast validation split without their labels, in other orders, with the
definitions of the 45 categories (`data/readings_categories.csv`): one best category each, a second where it fits about as well.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

from hysafe.app.pipeline import load
from hysafe.data.contrast import core_set
from hysafe.taxonomy import load_taxonomy

READINGS = Path(__file__).parent / "data" / "readings_categories.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    a = parser.parse_args()
    parents = load_taxonomy().parents
    with READINGS.open() as lines:
        read = {row["id"]: row for row in csv.DictReader(lines)}
    sentences = [s for s in core_set("validation") if s.id in read]
    rows = [read[s.id] for s in sentences]
    label = [s.nodes[0] for s in sentences]
    said = {"label": label, **{f"reader {r}": [row[r] for row in rows] for r in "ab"}}
    for name in a.models:
        model = load(name)
        table, apexes = model.place(model.view())
        leaves = table.leaves[table.risk]
        with torch.no_grad():
            best = model.encode_text([str(s.text) for s in sentences]).margin(apexes)[:, leaves].argmax(-1)
        said[name] = [table.ids[int(leaves[i])] for i in best]
    sure = [x == y == z for x, y, z in zip(said["reader a"], said["reader b"], label, strict=True)]
    pairs = list(zip(said["reader a"], said["reader b"], strict=True))
    same = sum(x == y for x, y in pairs) / len(pairs), sum(parents[x] == parents[y] for x, y in pairs) / len(pairs)
    print(f"{len(sentences)} sentences; both readers give the label of {sum(sure)}, and the same category and domain {same[0]:.3f}, {same[1]:.3f}")
    print("| | category, domain as labelled | where both readers give the label | elsewhere |\n|---|---|---|---|")
    for name in [n for n in said if n != "label"]:
        shares = []
        for wanted in ([True, False], [True], [False]):
            at = [i for i, s in enumerate(sure) if s in wanted]
            right = sum(said[name][i] == label[i] for i in at) / len(at)
            domain = sum(parents[said[name][i]] == parents[label[i]] for i in at) / len(at)
            shares.append(f"{right:.3f}, {domain:.3f}")
        print(f"| {name} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
