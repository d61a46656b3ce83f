"""What a logistic regression finds on means of text towers, to choose a mean by before heads are trained.

``python benchmarks/text_towers.py --base runs/mini_messages/model runs/mini_text_l/model,runs/mini_text_m/model``:
a mean an argument, folders of exports with commas between them. It learns from 6,000 contrast sentences and 2,500 posts
(risky posts weigh 2.5 times) and is asked about the contrast validation split, the posts that are held out from training, and
the sets `a`, `c` and `f` of `benchmarks/probe.py`. Category: of 45, on the risky contrast sentences alone.
"""

from __future__ import annotations

import argparse
import json
import random

import numpy as np
import torch
from probe import SETS
from sklearn.linear_model import LogisticRegression

from hysafe.data.contrast import contrast_set, core_set
from hysafe.data.datamodule import EmbedData
from hysafe.encoder import HyperbolicEncoder
from hysafe.evaluate.metrics import detection
from hysafe.types import Sample

STRENGTH = {"risk": 0.02, "category": 0.03}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("means", nargs="+")
    parser.add_argument("--base", default="mini", help="encoder whose text layers are replaced")
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    rng = random.Random(a.seed)
    data = EmbedData(a.data, pictures=False, rendered=4, image_size=16, text_sets=["edos", "davidson"], posts=True)
    data.setup()
    known = [s for s in contrast_set("train") if not s.extra["form"]]
    posts = [s for s in data.train_texts.samples if s.source == "posts"]
    core, more = rng.sample(known, 6000), rng.sample(posts, 2500)
    weights = np.concatenate([np.ones(len(core)), np.where(_unsafe(more), 2.5, 1.0)])
    asked = {"validation": core_set("validation"), "posts": [s for s in data.held_out_texts if s.source == "posts"]}
    for name in "acf":
        rows = [json.loads(line) for line in (SETS / f"probe_{name}.jsonl").open(encoding="utf-8")]
        asked[name] = [Sample(str(i), name, r["text"], None, (), r["safe"]) for i, r in enumerate(rows)]
    print("| mean of | category |" + "".join(f" {name} |" for name in asked))
    print("|---|---|" + "---|" * len(asked))
    for mean in a.means:
        encoder = HyperbolicEncoder.load_directory(a.base)
        encoder.towers.take(mean.split(","), "text")

        def features(samples: list[Sample], encoder: HyperbolicEncoder = encoder) -> np.ndarray:
            return encoder.text_features([str(s.text) for s in samples]).float().numpy()

        x = features([*core, *more])
        found = {name: features(samples) for name, samples in asked.items()}
        risk = LogisticRegression(C=STRENGTH["risk"], max_iter=3000)
        risk.fit(x, _unsafe([*core, *more]), sample_weight=weights)
        cells = []
        for name, samples in asked.items():
            evidence, unsafe = torch.tensor(risk.decision_function(found[name])), torch.tensor(_unsafe(samples))
            cells.append(f"{detection(evidence[~unsafe], evidence[unsafe]).auroc:.3f}")
        risky, tested = ([i for i, s in enumerate(ss) if not s.safe] for ss in (core, asked["validation"]))
        category = LogisticRegression(C=STRENGTH["category"], max_iter=500)
        category.fit(x[risky], [core[i].nodes[0] for i in risky])
        right = category.score(found["validation"][tested], [asked["validation"][i].nodes[0] for i in tested])
        print(f"| {mean} | {right:.3f} | {' | '.join(cells)} |", flush=True)


def _unsafe(samples: list[Sample]) -> np.ndarray:
    return np.array([not s.safe for s in samples])


if __name__ == "__main__":
    main()
