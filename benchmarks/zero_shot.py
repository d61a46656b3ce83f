"""Pictures of classes that a model has never seen, asked for by name.

``python benchmarks/zero_shot.py --model runs/mini_held_out/model`` encodes ``val.parquet`` and asks for each
held-out class by its name, lemmas and hypernyms, as a node that was written into the taxonomy after
training would be. Beside it the same questions for the classes that were trained on, and a shuffled
ranking. *branch*: pictures whose class shares the held-out class's nearest hypernym among the classes.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from hysafe.app.pipeline import load
from hysafe.app.tasks import class_phrases
from hysafe.data.images import decode
from hysafe.data.sources import data_root, iter_samples
from hysafe.evaluate.metrics import detection
from hysafe.evaluate.novelty_data import read_held_out
from hysafe.geometry import Points, get_space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--held-out", type=Path, help="names, one a line (default: the bundled 17)")
    a = parser.parse_args()
    model = load(a.model)
    root = data_root(a.data) / "images" / "tiny_imagenet" / "val.parquet"
    samples = list(iter_samples(str(root), "tiny_imagenet"))
    parts = [
        model.encode_image([decode(s.image) for s in samples[i : i + 256]]).space
        for i in range(0, len(samples), 256)
    ]
    pictures = torch.cat(parts)
    chains = {str(s.extra["name"]): tuple(s.extra["hypernyms"]) for s in samples}
    names = [str(s.extra["name"]) for s in samples]
    hidden = set(read_held_out(a.held_out))
    found: dict[str, dict[str, list[float]]] = {
        k: {"AP": [], "P@10": [], "branch P@10": [], "chance": [], "branch chance": []}
        for k in ("held out", "trained on")
    }
    shuffle = torch.Generator().manual_seed(0)
    shuffled: list[float] = []
    encoder = model.encoder
    for name, chain in sorted(chains.items()):
        phrases = class_phrases(name, chain)
        feature = encoder.node_features([phrases])
        with torch.inference_mode():
            query: Points = encoder.lift("text", feature)
            distance = get_space(query.geometry).pairwise_dist(pictures, query.space, encoder.c)[:, 0]
        wanted = torch.tensor([n == name for n in names])
        near = branch(name, chains)
        kin = torch.tensor([n in near for n in names])
        best = distance.argsort()[:10]
        row = found["held out" if name in hidden else "trained on"]
        row["AP"].append(detection(-distance[~wanted], -distance[wanted]).aupr)
        row["P@10"].append(float(wanted[best].float().mean()))
        row["branch P@10"].append(float(kin[best].float().mean()))
        row["chance"].append(float(wanted.float().mean()))
        row["branch chance"].append(float(kin.float().mean()))
        if name in hidden:
            order = torch.randn(len(names), generator=shuffle)
            shuffled.append(detection(order[~wanted], order[wanted]).aupr)
    columns = ("AP", "P@10", "branch P@10", "chance", "branch chance")
    print(f"| classes | n | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for kind, row in found.items():
        values = " | ".join(f"{statistics.fmean(row[k]):.3f}" for k in columns)
        print(f"| {kind} | {len(row['AP'])} | {values} |")
    print(f"| held out, shuffled | {len(shuffled)} | {statistics.fmean(shuffled):.3f} | | | | |")


def branch(name: str, chains: dict[str, tuple[str, ...]]) -> set[str]:
    """The class and the classes below the nearest of its hypernyms that holds another class."""
    chain = chains[name]
    for depth in range(len(chain), 0, -1):
        kin = {n for n, other in chains.items() if other[:depth] == chain[:depth]}
        if len(kin) > 1:
            return kin
    return {name}


if __name__ == "__main__":
    main()
