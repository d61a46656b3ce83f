"""Risk of real posts: `python benchmarks/posts.py mini`

Posts of Gab, Reddit and Twitter from permissively licensed sets of the development data (EDOS: rows that are *not
sexist*; Davidson et al.: *offensive language*), which two readers (language models) judged alike under the taxonomy
(`hysafe.data.posts`). The test posts were trained on by no model; the present `mini` has learnt from others of the
same sets, the models before it only from those rows of the sets that their own labels call risky. ``--unseen`` asks about
tweets, comments and beginnings of web sentences of sets that no model is trained on (OLID, ETHOS, RealToxicityPrompts as in
DecodingTrust), which two readers judged alike as well.

*logistic regression*: on frozen MiniLM features of the contrast train split, and of it with the training posts.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from hysafe.app.card import _untrained_lift
from hysafe.app.pipeline import load
from hysafe.data.contrast import core_set
from hysafe.data.posts import find_posts, read_posts
from hysafe.evaluate.metrics import detection
from hysafe.types import Sample

READINGS = Path(__file__).parent / "data" / "readings_unseen.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--unseen", action="store_true", help="texts of sets that no model is trained on")
    parser.add_argument("--no-baseline", action="store_true")
    a = parser.parse_args()
    posts = unseen(a.data) if a.unseen else read_posts("test", a.data)
    unsafe = _unsafe(posts)
    sets = [str(s.extra["set"]).removesuffix("_toxic").removesuffix("_nontoxic") for s in posts]
    masks = {name: torch.tensor([s == name for s in sets]) for name in sorted(set(sets))}
    masks["all"] = torch.ones(len(posts), dtype=torch.bool)

    def line(name: str, evidence: Tensor, said: Tensor | None, more: Tensor | None) -> None:
        for title, at in masks.items():
            bad, good = at & unsafe, at & ~unsafe
            shares = [
                f"{s[good].double().mean():.3f} | {s[bad].double().mean():.3f}" if s is not None else " | "
                for s in (said, more)
            ]
            auroc = detection(evidence[good], evidence[bad]).auroc
            print(f"| {name} | {title} | {int(bad.sum())} / {int(good.sum())} | {auroc:.3f} | {' | '.join(shares)} |")

    print("| model | posts | risky / harmless | AUROC | harmless: unsafe | risky: unsafe |"
          " harmless: unsafe or review | risky: unsafe or review |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for name in a.models:
        model = load(name)
        risk = model.risk(model.encode_text([str(s.text) for s in posts]), model.view()).double()
        line(name, risk, risk >= model.triage.unsafe_from, risk >= model.triage.review_from)
    if a.no_baseline:
        return
    frozen = _untrained_lift().encoder
    core, more = core_set("train"), read_posts("train", a.data)
    known = F.normalize(frozen.text_features([str(s.text) for s in [*core, *more]]), dim=-1).cpu().numpy()
    labels = torch.cat([_unsafe(core), _unsafe(more)]).numpy()
    asked = F.normalize(frozen.text_features([str(s.text) for s in posts]), dim=-1).cpu().numpy()
    for name, count in (("logistic regression", len(core)), ("with the training posts", len(labels))):
        fitted = LogisticRegression(max_iter=3000).fit(known[:count], labels[:count])
        line(name, torch.from_numpy(fitted.decision_function(asked)), None, None)


def unseen(data: str | None) -> list[Sample]:
    """Texts of other sets with the readings of `READINGS`."""
    with READINGS.open(encoding="utf-8", newline="") as lines:
        return find_posts(csv.DictReader(lines), data)


def _unsafe(samples: list[Sample]) -> Tensor:
    return torch.tensor([not s.safe for s in samples])


if __name__ == "__main__":
    main()
