"""Texts of kinds that a model does not know, and of kinds that it does, asked for by name, by example texts, and as the product
does with both: `python benchmarks/example_texts.py --model mini`

Each kind becomes a node of a policy, and the texts of a test split are ranked by its score.

*intents*: of CLINC150, named by their labels (*a request about ...*), among its test queries and those that are out of its scope. The
tower of `mini` has read the training queries as harmless, without their intents. *categories*: of the taxonomy, told anew by another
name (so that what training learnt of the node is not used; the tower has learnt the kind), definition and synonyms, where no
category of their domain is left, among the sentences of the contrast test split. Examples are drawn from the training split of each
set, seeds 0, 1 and 2. `--validation` asks for other kinds, those by which the rule was chosen, on the validation splits.

*hits*, *others*: share of the texts of the kind, and of all others, whose score is at least 0.5. *ordinary*: of the model's reference
texts. *words*: how often the product stays with the words.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hysafe.app.pipeline import SafetyModel, load
from hysafe.data.contrast import core_set
from hysafe.data.sources import data_root, load_rows
from hysafe.evaluate.metrics import detection
from hysafe.geometry import Points
from hysafe.score.examples import example_tangent
from hysafe.score.leaves import score_margins
from hysafe.score.reference import narrowing
from hysafe.taxonomy import Policy
from hysafe.taxonomy.policy import DEFAULT_THRESHOLD

COUNTS, DRAWS = (2, 5, 20, 64), 3
NODE = "x.1"


@dataclass
class Texts:
    """Points with the kind of each, and their margins to the model's own nodes."""

    points: Points
    kinds: list[str]
    margins: Tensor

    def of(self, kind: str) -> Tensor:
        return torch.tensor([k == kind for k in self.kinds])


class Asked:
    """A kind as a node of a policy."""

    def __init__(self, model: SafetyModel, kind: str, rule: dict[str, object], off: Sequence[str]) -> None:
        nodes: dict[str, object] = {NODE: rule} | {n: {"status": "non_violating"} for n in off}
        self.model, self.kind = model, kind
        self.table, self.apexes = model.place(model.view(Policy.from_dict({"nodes": nodes})))
        self.row = self.table.index[NODE]
        self.phrases = self.apexes.tangent()[self.row].double()
        self.gone = [self.table.index[n] for n in off]
        self.others = [self.table.index[n.id] for n in model.taxonomy]
        self.new = torch.tensor([n == NODE for n in self.table.leaf_ids])

    def mean(self, examples: Tensor) -> Tensor:
        """Tangent vector towards the mean of the examples."""
        return F.normalize(F.normalize(examples, dim=-1).mean(0), dim=-1) * self.phrases.norm()

    def chosen(self, examples: Tensor) -> Tensor:
        """As the product chooses; the cones of categories that are gone point away from all texts."""
        model, apexes = self.model, self.apexes
        reference = model.reference["text"]
        tangents = apexes.tangent().double()
        tangents[self.gone] = -4 * F.normalize(F.normalize(reference, dim=-1).mean(0), dim=-1).double()
        found = example_tangent(
            self.row, examples, reference, Points.from_tangent(tangents, apexes.c, apexes.geometry), self.table, self.new, model.calibration.channel("text"),
            scale=model.encoder.cone_scale_value,
        )  # fmt: skip
        return self.phrases if found is None else found

    def figures(self, texts: Texts, ordinary: Texts, tangent: Tensor) -> tuple[float, ...]:
        """Average precision, hits, others, ordinary ones by the node's score, were its apex there; whether the words place it."""
        model, apex = self.model, Points.from_tangent(tangent[None], self.apexes.c, self.apexes.geometry)
        scale, fit = model.encoder.cone_scale_value, model.calibration.channel("text")
        margins = {}
        for name, given in (("ordinary", ordinary), ("texts", texts)):
            margins[name] = given.margins.new_empty(len(given.kinds), len(self.others) + 1)
            margins[name][:, self.others] = given.margins
            margins[name][:, self.gone] = -100.0  # not in the taxonomy at all
            margins[name][:, self.row] = given.points.margin(apex)[:, 0]
        taken = narrowing(margins["ordinary"], self.table, self.new, fit, scale=scale)
        scores = {
            k: score_margins(
                m - taken, self.table, scale=scale, slope=fit.slope, offset=fit.offset, temperature=fit.temperature
            ).nodes[:, self.row]
            for k, m in margins.items()
        }  # fmt: skip
        wanted, over = texts.of(self.kind), scores["texts"] >= DEFAULT_THRESHOLD
        return (
            detection(scores["texts"][~wanted], scores["texts"][wanted]).aupr,
            float(over[wanted].float().mean()), float(over[~wanted].float().mean()),
            float((scores["ordinary"] >= DEFAULT_THRESHOLD).float().mean()), float(torch.equal(tangent, self.phrases)),
        )  # fmt: skip


def encoded(model: SafetyModel, texts: Sequence[tuple[str, str]]) -> Texts:
    tangents = [model.encode_text([t for t, _ in texts[i : i + 256]]).tangent() for i in range(0, len(texts), 256)]
    return placed(model, torch.cat(tangents), [k for _, k in texts])


def placed(model: SafetyModel, tangents: Tensor, kinds: list[str]) -> Texts:
    points = Points.from_tangent(tangents.double(), model.encoder.c, model.encoder.space)
    return Texts(points, kinds, points.margin(model.place(model.view())[1]))


def mean(figures: Iterable[tuple[float, ...]]) -> str:
    return " | ".join(f"{statistics.fmean(column):.3f}" for column in zip(*figures, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--validation", action="store_true")
    a = parser.parse_args()
    model = load(a.model)
    reference = model.reference["text"]
    ordinary = placed(model, reference, [""] * len(reference))

    rows = load_rows(str(data_root(a.data) / "text" / "clinc150.jsonl"))
    queries = [(str(r["text"]), str(r["labels"][-1]), str(r["split"])) for r in rows]
    names = sorted({k for _, k, _ in queries} - {"out-of-scope"})
    parents = {n.id: str(n.parent) for n in model.taxonomy.categories}
    categories = sorted(parents)
    if a.validation:
        names, categories = names[0::10], categories[0::3]
    else:
        names, categories = names[1::6], [k for i, k in enumerate(categories) if i % 3]
    asked: dict[str, list[Asked]] = {"intents": [], "categories": []}
    for k in names:
        words = k.replace("_", " ")
        asked["intents"].append(Asked(model, k, {"parent": "D7", "name": words, "definition": f"A request about {words}."}, ()))
    for k in categories:
        node = model.taxonomy[k]
        rule: dict[str, object] = {"parent": node.parent, "name": f"{node.name} things", "definition": node.definition,
                                   "synonyms": list(node.synonyms)}  # fmt: skip
        asked["categories"].append(Asked(model, k, rule, [n for n, d in parents.items() if d == node.parent]))
    split = "validation" if a.validation else "test"
    parts = {s: [(str(x.text), "" if x.safe else x.nodes[0]) for x in core_set(s)] for s in ("train", split)}
    sets = {
        "intents": (
            encoded(model, [(t, k) for t, k, s in queries if s == "train" and k in names]),
            encoded(model, [(t, k) for t, k, s in queries if s == {"validation": "val"}.get(split, split)]),
        ),
        "categories": (encoded(model, [x for x in parts["train"] if x[1] in categories]), encoded(model, parts[split])),
    }  # fmt: skip

    print("| kinds | asked by | examples | average precision | hits | others | ordinary | words |\n|---|---|---|---|---|---|---|---|")
    for name, (pool, texts) in sets.items():
        kinds = [one for one in asked[name] if texts.of(one.kind).any()]
        print(f"| {name} | name | 0 | {mean(one.figures(texts, ordinary, one.phrases) for one in kinds)} |", flush=True)
        for count in COUNTS:
            drawn = []
            for one in kinds:
                found, vectors = pool.of(one.kind).nonzero()[:, 0], pool.points.tangent()
                for seed in range(DRAWS):
                    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
                    drawn.append((one, vectors[found[order[:count]]]))
            for what, place in (("mean of the examples", Asked.mean), ("**the better of both (in use)**", Asked.chosen)):
                figures = mean(one.figures(texts, ordinary, place(one, examples)) for one, examples in drawn)
                print(f"| {name} | {what} | {count} | {figures} |", flush=True)
        chance = statistics.fmean(float(texts.of(one.kind).float().mean()) for one in kinds)
        print(f"| {name} | chance ({len(kinds)} kinds, {len(texts.kinds):,} texts) | | {chance:.3f} | | | | |", flush=True)


if __name__ == "__main__":
    main()
