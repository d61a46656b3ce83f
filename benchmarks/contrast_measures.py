"""Measures of the contrast set: counts, variety, and what register, length and source give away.

``python benchmarks/contrast_measures.py`` needs no data outside the package; with HYSAFE_DATA (or
``--data``) it adds the source-only baseline. Self-BLEU needs sacrebleu (in the ``dev`` extra).
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter, defaultdict

import numpy as np
import torch

from hysafe.data.contrast import contrast_set, core_set
from hysafe.evaluate.metrics import detection
from hysafe.types import Sample

GRAM = 5
BLEU_SENTENCES, BLEU_REFERENCES = 100, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA); - for none")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    samples = contrast_set()
    print(f"sentences {len(samples)}, pairs {len({s.pair for s in samples if s.pair})}")
    for name in ("split", "register", "functionality", "form"):
        counts = Counter(str(s.extra[name]) for s in samples)
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in sorted(counts.items())))
    pairs = Counter(str(s.extra["node"]) for s in samples if s.pair and not s.safe)
    print(
        f"pairs a category: least {min(pairs.values())}, median {np.median([*pairs.values()]):.0f}"
    )
    print(f"sentences with a {GRAM}-gram seen in another pair: {shared_grams(samples):.4f}")
    print(f"self-BLEU-4 ({BLEU_SENTENCES} x {BLEU_REFERENCES}): {self_bleu(samples, a.seed):.1f}")
    test = [s for s in samples if s.extra["split"] == "test"]
    core = core_set("test")
    for title, part in (("test split", core), ("with functionalities", test)):
        unsafe = torch.tensor([not s.safe for s in part])
        length = torch.tensor([float(len(words(s))) for s in part])
        share: dict[str, list[bool]] = defaultdict(list)
        for s in samples:
            if s.extra["split"] == "train":
                share[str(s.extra["register"])].append(not s.safe)
        register = torch.tensor([np.mean(share[str(s.extra["register"])]) for s in part]).float()
        print(f"{title}: length-only AUROC {auroc(length, unsafe):.3f}, "
              f"register-only AUROC {auroc(register, unsafe):.3f}")  # fmt: skip
    if a.data != "-":
        print(f"source-only AUROC on the test split: {source_only(core, a.data):.3f}")


def auroc(evidence: torch.Tensor, unsafe: torch.Tensor) -> float:
    return detection(evidence[~unsafe], evidence[unsafe]).auroc


def words(sample: Sample) -> list[str]:
    return re.findall(r"[a-z0-9']+", str(sample.text).lower())


def shared_grams(samples: list[Sample]) -> float:
    """Share of sentences with a 5-gram that a sentence of another pair has, too."""
    seen: dict[tuple[str, ...], set[str]] = defaultdict(set)
    grams = []
    for s in samples:
        w = words(s)
        own = {tuple(w[i : i + GRAM]) for i in range(len(w) - GRAM + 1)}
        grams.append(own)
        for g in own:
            seen[g].add(s.pair or s.id)
    hits = sum(
        any(seen[g] - {s.pair or s.id} for g in own) for s, own in zip(samples, grams, strict=True)
    )
    return hits / len(samples)


def self_bleu(samples: list[Sample], seed: int) -> float:
    """Mean BLEU-4 of sentences against others as references; lower is more varied."""
    from sacrebleu import sentence_bleu

    rng = random.Random(seed)
    drawn = [str(s.text) for s in rng.sample(samples, BLEU_SENTENCES + BLEU_REFERENCES)]
    references = drawn[BLEU_SENTENCES:]
    return float(np.mean([sentence_bleu(t, references).score for t in drawn[:BLEU_SENTENCES]]))


def source_only(part: list[Sample], data: str | None) -> float:
    """AUROC of what public sets' styles say: frozen MiniLM, labels by the source's majority.

    A set whose rows are mostly unsafe counts as unsafe whole. What this finds in the contrast split
    is style, not risk.
    """
    from sklearn.linear_model import LogisticRegression

    from hysafe.app.card import _untrained_lift
    from hysafe.data.label_map import permissive_sets
    from hysafe.data.sources import data_root, iter_samples

    model = _untrained_lift()
    rng = random.Random(0)
    texts: list[str] = []
    labels: list[bool] = []
    for name in permissive_sets():
        path = data_root(data) / "text" / f"{name}.jsonl"
        rows = list(iter_samples(str(path), "hysafe_text"))
        rows = rng.sample(rows, min(500, len(rows)))
        unsafe = np.mean([s.safe is False for s in rows]) > 0.5
        texts += [str(s.text) for s in rows]
        labels += [bool(unsafe)] * len(rows)
    features = torch.nn.functional.normalize(model.encoder.text_features(texts), dim=-1)
    fit = LogisticRegression(C=1.0, max_iter=2000).fit(features.numpy(), labels)
    probe = model.encoder.text_features([str(s.text) for s in part])
    evidence = fit.decision_function(torch.nn.functional.normalize(probe, dim=-1).numpy())
    unsafe = torch.tensor([not s.safe for s in part])
    return auroc(torch.tensor(evidence), unsafe)


if __name__ == "__main__":
    main()
