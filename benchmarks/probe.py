"""What models say of sentences that others wrote: `python benchmarks/probe.py runs/mini_heads/model mini`

Two sets of 740 sentences, each by a writer (a language model, from a brief) who saw neither the training data, nor a
model, nor the other set: harmless requests that sound dangerous and risky counterparts, everyday texts, functional
checks of hate, moderation traffic, bland instructions. `a` was looked at while training texts were written and towers
chosen; `b` is for the last look. No sentence of the contrast set's batches `k` and `s` shares five words in a row
with either; older ones do (*how do I get rid of*). `c` and `d`, 210 each, by two more writers, are what OCR reads off
screens and signs: `c` was looked at, `d` is for the last look. `e` is of the developers: 24 messages like those of banks,
carriers and shops, half of them fraud, written when the demo showed one that is missed. `f` and `g`, 240 each, by two more writers, are messages, posts
and what stands on posters, half of it risky: `f` was looked at, `g` is for the last look. `h`, 333, by two more writers, are adverts, prompts to
assistants and comments, for the last look; a reader judged each blind as its writer did.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from hysafe.app.pipeline import load
from hysafe.evaluate.metrics import detection

SETS = Path(__file__).parent / "data"
# Kinds whose harmless and risky sentences belong together.
TOGETHER = {
    "all": None,
    "over-refusal": ("over_refusal", "contrast"),
    "hate": ("hate_functional",),
    "moderation": ("moderation",),
    "instructions": ("instruction",),
    "screens": ("screen",),
    "signs": ("sign",),
    "messages": ("message",),
    "social": ("social",),
    "posters": ("poster",),
    "adverts": ("advert",),
    "prompts": ("prompt",),
    "comments": ("comment",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--set", choices=tuple("abcdefgh"), default="b")
    parser.add_argument("--show", type=int, default=0, help="worst errors of each model that are printed")
    a = parser.parse_args()
    with (SETS / f"probe_{a.set}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    safe = torch.tensor([row["safe"] for row in rows])
    kind = [row["kind"] for row in rows]
    models = {name: load(name) for name in a.models}
    risks = {
        name: model.risk(model.encode_text([row["text"] for row in rows]), model.view()).double()
        for name, model in models.items()
    }
    print("rated unsafe / unsafe or review\n")
    print("| texts | n |" + "".join(f" {name} |" for name in models))
    print("|---|---|" + "---|" * len(models))
    for one in sorted(set(kind)):
        for side in (True, False):
            at = torch.tensor([k == one for k in kind]) & (safe == side)
            if not at.any():
                continue
            cells = []
            for name, model in models.items():
                risk, levels = risks[name][at], model.triage
                shares = (risk >= levels.unsafe_from, risk >= levels.review_from)
                cells.append(" / ".join(f"{x.double().mean():.3f}" for x in shares))
            print(f"| {one}, {'harmless' if side else 'risky'} | {int(at.sum())} | {' | '.join(cells)} |")
    print("\n| AUROC | n |" + "".join(f" {name} |" for name in models))
    print("|---|---|" + "---|" * len(models))
    for title, kinds in TOGETHER.items():
        at = torch.tensor([kinds is None or k in kinds for k in kind])
        if not at.any():
            continue
        cells = [f"{detection(r[at & safe], r[at & ~safe]).auroc:.3f}" for r in risks.values()]
        print(f"| {title} | {int(at.sum())} | {' | '.join(cells)} |")
    for name, risk in risks.items():
        off = (risk - (~safe).double()).abs()
        for i in off.argsort(descending=True)[: a.show].tolist():
            print(f"{name}: off by {off[i]:.2f}: {rows[i]['text']}")


if __name__ == "__main__":
    main()
