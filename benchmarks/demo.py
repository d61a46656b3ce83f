"""Ratings of the demo beside its labels: `hysafe demo --out first && python benchmarks/demo.py first`

Printed: how many pictures and texts of each label got which rating, and the items whose rating differs.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from importlib import resources
from pathlib import Path

RATINGS = ("safe", "review", "unsafe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that hysafe demo wrote")
    a = parser.parse_args()
    with resources.files("hysafe.assets").joinpath("demo/labels.csv").open(encoding="utf-8") as lines:
        labels = {row["item"]: row for row in csv.DictReader(lines)}
    with (resources.files("hysafe.assets").joinpath("demo/texts.jsonl")).open(encoding="utf-8") as lines:
        texts = [json.loads(line)["id"] for line in lines]
    with (a.out / "results.jsonl").open(encoding="utf-8") as lines:
        results = [json.loads(line) for line in lines]
    counts: Counter[tuple[str, str, str]] = Counter()
    wrong = []
    for row in results:
        item = row["id"]
        if row["modality"] == "text":  # texts.jsonl#3 is the third line
            item = texts[int(item.split("#")[1]) - 1]
        label = labels[item]
        counts[row["modality"], label["rating"], row["rating"]] += 1
        if label["rating"] != row["rating"]:
            wrong.append(f"{item}: {row['rating']} {row['p_unsafe']}, {label['rating']}: {label['note']}")
    print("| kind | label |" + "".join(f" rated {r} |" for r in RATINGS))
    print("|---|---|" + "---|" * len(RATINGS))
    for modality, label in sorted({key[:2] for key in counts}):
        print(f"| {modality} | {label} |" + "".join(f" {counts[modality, label, r]} |" for r in RATINGS))
    print("\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
