"""``hysafe eval novelty``: our novelty scorers beside pytorch-ood's detectors on the same features.

Every scorer is fitted on the same in-distribution items. Settings (k, shrinkage, the head's weight
decay, theirs as ours) and the weights of the combination are chosen on validation items, with
held-out classes standing in for novelty; no test item takes part.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hysafe.data.contrast import contrast_set
from hysafe.errors import ConfigError, MissingExtraError, ShapeError
from hysafe.evaluate.baselines import DETECTORS, LinearHead, PytorchOod, require_pytorch_ood
from hysafe.evaluate.curves import mean_roc
from hysafe.evaluate.metrics import Detection, detection, mean_detection
from hysafe.evaluate.novelty_data import (
    Case,
    Encoder,
    Encodes,
    Suite,
    catqa_suite,
    clinc_suite,
    contrast_suite,
    picture_suite,
    read_held_out,
)
from hysafe.evaluate.plots import plot_roc
from hysafe.score.conformal import benjamini_hochberg, split_conformal
from hysafe.score.leaves import SPREAD, NodeTable, score_margins
from hysafe.score.novelty import (
    ClassCones,
    CombinedScorer,
    ConeEnergy,
    ConeMargin,
    DiscriminantClasses,
    DiscriminantKNN,
    Encoded,
    LorentzKNN,
    Mahalanobis,
    NoveltyScorer,
    Radius,
    RelativeMahalanobis,
    StandIns,
    class_means,
    describe,
    stand_in_scores,
)
from hysafe.taxonomy import Policy

__all__ = ["SETTINGS", "check_settings", "evaluate_novelty", "policy_figures", "suite_figures"]

SETTINGS = ("near", "far", "clinc150", "contrast", "catqa", "policy")
COMBINED = "combined"
DECAYS = (1e-4, 1e-3, 1e-2)
NEIGHBOURS = (1, 5, 20)
SHRINKAGES = (None, 0.1, 0.3)
# Of the discriminants of the classes, and of the distance that is usual among neighbours.
SHARES, LOCALS = (0.4, 0.7, 1.0), (0.3, 0.6)
# The stated false-alarm rate at which p-values are checked, and the share of false alarms in a queue.
ALPHA, QUEUE_LEVEL = 0.05, 0.1
# Margin, in radians, to a node that is not there.
GONE = 100.0
# Categories with fewer test sentences say nothing of a policy.
LEAST_ITEMS = 3
# Fewer items of a class have no covariance.
LEAST_LIMIT = 2

Figures = dict[str, dict[str, Detection]]
# row -> column -> mean true-positive rates, one entry a case
Curves = dict[str, dict[str, list[Tensor]]]


def _ours() -> dict[str, list[NoveltyScorer]]:
    """Scorers by row of the table, with the settings that validation chooses among."""
    return {
        "cone margin": [ConeMargin()],
        "cone energy": [ConeEnergy()],
        "radius": [Radius()],
        "class cones": [ClassCones(s, t) for s in (0.3, 0.6) for t in (0.0, 0.1)],
        "Lorentz k-NN": [LorentzKNN(k) for k in NEIGHBOURS],
        "Lorentz k-NN, whitened": [LorentzKNN(k, whiten=True) for k in NEIGHBOURS],
        "Mahalanobis": [Mahalanobis(shrinkage=s) for s in SHRINKAGES],
        "relative Mahalanobis": [RelativeMahalanobis(shrinkage=s) for s in SHRINKAGES],
        "Lorentz k-NN, features": [LorentzKNN(k, "features") for k in NEIGHBOURS],
        "Lorentz k-NN, whitened features": [
            LorentzKNN(k, "features", whiten=True) for k in NEIGHBOURS
        ],
        "Mahalanobis, features": [Mahalanobis("features", s) for s in SHRINKAGES],
        "relative Mahalanobis, features": [
            RelativeMahalanobis("features", s) for s in SHRINKAGES
        ],
        "discriminant k-NN, features": [
            DiscriminantKNN("features", share, k=10, local=w) for share in SHARES for w in LOCALS
        ],
        "discriminant classes, features": [
            DiscriminantClasses("features", share, temperature=t) for share in SHARES for t in (0.1, 0.2)
        ],
    }  # fmt: skip


def _theirs(
    decay: float, heads: dict[tuple[Any, ...], LinearHead]
) -> dict[str, list[NoveltyScorer]]:
    return {
        name: [PytorchOod(name, options, decay, heads) for options in choices]
        for name, (_, choices, _) in DETECTORS.items()
    }


def evaluate_novelty(
    model: Encodes,
    *,
    settings: Sequence[str] = SETTINGS,
    data: str | None = None,
    held_out: Path | None = None,
    unseen: bool = False,
    limit: int | None = None,
    out: Path | None = None,
    seed: int = 0,
) -> int:
    """Print the tables; write ``novelty.json``, ``novelty.md`` and ROC curves into `out`.

    The curves need the extra ``plots``.

    Args:
        model: loaded. settings: which of :data:`SETTINGS` to run.
        data: development data; HYSAFE_DATA by default.
        held_out: file of class names that are novel in `near`; the bundled list by default.
        unseen: the model was trained without these classes.
        limit: at most so many items of each class (quick runs).
        seed: of folds, far pictures and noise.

    Raises:
        ConfigError: an unknown setting. MissingExtraError: pytorch-ood is not installed.
    """
    check_settings(settings, limit)
    started = time.perf_counter()
    names = read_held_out(held_out)
    common: dict[str, Any] = {"data": data, "limit": limit, "seed": seed}
    results: list[dict[str, Any]] = []
    if {"near", "far"} & set(settings):
        suite = picture_suite(model, held_out=names, unseen=unseen, **common)
        results.append(suite_figures(suite, seed=seed))
    for key, build in (
        ("clinc150", clinc_suite), ("contrast", contrast_suite), ("catqa", catqa_suite),
    ):  # fmt: skip
        if key in settings:
            results.append(suite_figures(build(model, **common), seed=seed))
    report: dict[str, Any] = {
        "suites": results,
        "setting": {
            "model": model.name, "seed": seed, "limit": limit, "settings": list(settings),
            "torch": torch.__version__, "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }  # fmt: skip
    if "policy" in settings:
        report["policy"] = policy_figures(model)
    report["setting"]["seconds"] = round(time.perf_counter() - started)
    text = _markdown(report)
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "novelty.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
        (out / "novelty.md").write_text(text + "\n")
        names = ["novelty.json", "novelty.md", *(p.name for p in _plot(out, report))]
        print(f"{out}/: {', '.join(names)}")
    return 0


def check_settings(settings: Sequence[str], limit: int | None) -> None:
    """Raise where a run of these settings cannot start: see :func:`evaluate_novelty`."""
    unknown = [s for s in settings if s not in SETTINGS]
    if unknown or not settings:
        raise ConfigError(f"settings {unknown}: known are {', '.join(SETTINGS)}.")
    if limit is not None and limit < LEAST_LIMIT:
        raise ConfigError(f"limit {limit}: wanted at least {LEAST_LIMIT} items of each class.")
    require_pytorch_ood()


# ---------------------------------------------------------------- one suite


def suite_figures(suite: Suite, *, seed: int = 0) -> dict[str, Any]:
    """Figures of all scorers on a suite: mean over its cases, by column.

    Returns:
        plain data: ``ours``/``theirs`` -> row -> column -> figures, ``accuracy``, ``chosen``,
        ``weights``, ``conformal``, ``notes``; ``roc`` -> column -> row -> mean true-positive rates
        at :data:`hysafe.evaluate.curves.FPR_GRID`, of the combination and the best rows.
    """
    curves: Curves = {}
    ours: dict[str, dict[str, list[Detection]]] = {}
    theirs: dict[str, dict[str, list[Detection]]] = {}
    chosen: dict[str, dict[str, int]] = {}
    accuracies: list[dict[str, float]] = []
    weights: list[dict[str, float]] = []
    alarms: list[dict[str, float]] = []
    decay = _head_decay(suite.cases[0])
    for number, case in enumerate(suite.cases):
        heads: dict[tuple[Any, ...], LinearHead] = {}
        for table, group in ((ours, _ours()), (theirs, _theirs(decay, heads))):
            candidates = [s for choices in group.values() for s in choices]
            stand_ins = _stand_ins(candidates, case)
            picks = _choose(group, stand_ins)
            for row, pick in zip(group, picks, strict=True):
                scorer = candidates[pick]
                counts = chosen.setdefault(row, {})
                counts[_options(scorer)] = counts.get(_options(scorer), 0) + 1
                scorer.fit(case.train, case.train_labels)
                _collect(table.setdefault(row, {}), suite, scorer, case, curves.setdefault(row, {}))
            if table is ours:
                combined = CombinedScorer([candidates[pick] for pick in picks]).learn_weights(
                    [StandIns(s.scores[:, picks], s.novel) for s in stand_ins]
                )
        combined.fit(case.train, case.train_labels)
        _collect(
            ours.setdefault(COMBINED, {}), suite, combined, case, curves.setdefault(COMBINED, {})
        )
        weights.append(dict(zip(_ours(), combined.weights.values(), strict=True)))
        alarms.append(_conformal(combined, case, seed + number))
        accuracies.append(_accuracies(case, decay, heads))
    means = {"ours": _means(ours), "theirs": _means(theirs)}
    return {
        "name": suite.name,
        "columns": list(suite.columns),
        **means,
        "roc": {c: _shown_curves(c, means, curves) for c in suite.columns},
        "accuracy": _mean_of(accuracies),
        "chosen": chosen,
        "weights": _mean_of(weights),
        "conformal": _mean_of(alarms),
        "notes": list(suite.notes),
        "cases": len(suite.cases),
    }


def _collect(
    row: dict[str, list[Detection]],
    suite: Suite,
    scorer: NoveltyScorer,
    case: Case,
    curves: dict[str, list[Tensor]],
) -> None:
    """Score a case and keep its figures and ROC by column; a column's kinds are averaged."""
    known = scorer.score(case.test)
    for column, kinds in suite.columns.items():
        novel = [scorer.score(case.novel[kind]) for kind in kinds]
        values = [detection(known, scores) for scores in novel]
        curves.setdefault(column, []).append(mean_roc([(known, scores) for scores in novel]))
        row.setdefault(column, []).append(mean_detection(values))
        if len(kinds) > 1:
            for kind, value in zip(kinds, values, strict=True):
                row.setdefault(f"{column}: {kind}", []).append(value)


def _shown_curves(
    column: str, means: Mapping[str, Mapping[str, Any]], curves: Curves
) -> dict[str, list[float]]:
    """Mean ROC of the combination and of the best row of either side."""
    best = {
        side: max(rows, key=lambda row: rows[row][column]["auroc"]) for side, rows in means.items()
    }
    names = {
        COMBINED: COMBINED,
        f"best of ours: {best['ours']}": best["ours"],
        f"best of pytorch-ood: {best['theirs']}": best["theirs"],
    }
    if best["ours"] == COMBINED:
        del names[COMBINED]
    return {
        name: [round(v, 4) for v in torch.stack(curves[row][column]).mean(0).tolist()]
        for name, row in names.items()
    }


def _stand_ins(scorers: Sequence[NoveltyScorer], case: Case) -> list[StandIns]:
    return stand_in_scores(
        scorers, case.train, case.train_labels, case.validation, case.validation_labels,
        folds=case.folds, without=case.without,
    )  # fmt: skip


def _choose(
    group: Mapping[str, Sequence[NoveltyScorer]], stand_ins: Sequence[StandIns]
) -> list[int]:
    """Of each row the candidate (its column) that tells left-out classes best from the others."""
    picks, start = [], 0
    for candidates in group.values():
        columns = range(start, start + len(candidates))
        start += len(candidates)
        value = {
            i: sum(detection(s.scores[~s.novel, i], s.scores[s.novel, i]).auroc for s in stand_ins)
            for i in columns
        }
        picks.append(max(columns, key=value.__getitem__))
    return picks


def _head_decay(case: Case) -> float:
    """Weight decay of the head with the best validation accuracy."""
    x, z = case.train.vectors("features").float(), case.validation.vectors("features").float()
    scores = [
        LinearHead(d).fit(x, case.train_labels).accuracy(z, case.validation_labels) for d in DECAYS
    ]
    return DECAYS[max(range(len(DECAYS)), key=scores.__getitem__)]


def _accuracies(
    case: Case, decay: float, heads: dict[tuple[Any, ...], LinearHead]
) -> dict[str, float]:
    """In-distribution accuracy: nearest class mean in both layers, and the baselines' head."""
    classes = case.train_labels.unique()
    figures = {}
    for layer in ("points", "features"):
        x, y = (items.vectors(layer) for items in (case.train, case.test))  # type: ignore[arg-type]
        means, _ = class_means(x, case.train_labels)
        found = classes[torch.cdist(y, means).argmin(-1)]
        figures[f"nearest mean, {layer}"] = float((found == case.test_labels).double().mean())
    x = case.train.vectors("features").float()
    head = PytorchOod("MSP", {}, decay, heads).head(x, case.train_labels)
    figures["linear head"] = head.accuracy(case.test.vectors("features").float(), case.test_labels)
    return figures


def _conformal(scorer: NoveltyScorer, case: Case, seed: int) -> dict[str, float]:
    """Conformal p-values of the combination in use: false alarms, and a queue of both kinds.

    Calibrated on a random half of the known test items and asked of the other half: validation
    items chose the weights, so their scores are a little too low.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = scorer.score(case.test)[torch.randperm(len(case.test), generator=generator)]
    calibration, rest = scores.tensor_split(2)
    known = split_conformal(rest, calibration)
    novel = split_conformal(
        torch.cat([scorer.score(items) for items in case.novel.values()]), calibration
    )
    called = benjamini_hochberg(torch.cat((known, novel)), QUEUE_LEVEL)
    false = int(called[: len(known)].sum())
    total = int(called.sum())
    return {
        "false-alarm rate at 0.05": float((known <= ALPHA).double().mean()),
        "novel found at 0.05": float((novel <= ALPHA).double().mean()),
        "share of false alarms in the queue at 0.1": false / max(1, total),
        "novel in the queue at 0.1": (total - false) / len(novel),
    }


# ---------------------------------------------------------------- policy novelty


def policy_figures(model: Encodes) -> dict[str, Any]:
    """A category is switched off: is its content flagged as risky-and-unnamed?

    For every category: ``policy_evidence`` of its test sentences against harmless ones (their own
    benign siblings among them) and against those of the other categories. Beside it the same rule
    with two logistic regressions on the same features. *Node gone*: the category is not in the
    taxonomy at all, so nothing that the model learnt of it is used.
    """
    encode = Encoder(model)
    samples = {s: [x for x in contrast_set(s) if (x.pair or x.safe) and not x.extra["form"]] for s in
               ("train", "validation", "test")}  # fmt: skip
    items = {s: encode.texts([str(x.text) for x in v]) for s, v in samples.items()}
    ids = encode.risk_ids
    category = {
        s: torch.tensor([ids.index(x.nodes[0]) if not x.safe else -1 for x in v])
        for s, v in samples.items()
    }
    margins = {s: v.points.margin(encode.apexes) for s, v in items.items()}
    head = _policy_head(items, category)
    everything = NodeTable(model.view())
    channel = model.calibration.channel("text")
    fit = {k: getattr(channel, k) for k in ("slope", "offset", "temperature")}
    rows: dict[str, dict[str, list[Detection]]] = {
        "policy evidence": {},
        "policy evidence, node gone": {},
        "logistic regressions": {},
    }
    curves: Curves = {row: {} for row in rows}
    alarms: list[dict[str, float]] = []
    for hidden, node in enumerate(ids):
        mine = category["test"] == hidden
        if int(mine.sum()) < LEAST_ITEMS:
            continue
        policy = Policy.from_dict({"name": "off", "nodes": {node: {"status": "non_violating"}}})
        table = NodeTable(model.view(policy))
        scale = model.encoder.cone_scale_value
        evidence: dict[str, Tensor] = {}
        gone: dict[str, Tensor] = {}
        for s in ("validation", "test"):
            evidence[s] = score_margins(margins[s], table, scale=scale, **fit).policy_evidence
            without = margins[s].clone()
            without[:, table.index[node]] = -GONE
            gone[s] = score_margins(without, everything, scale=scale, **fit).policy_evidence
        safe = category["test"] == -1
        others = ~safe & ~mine
        for row, scores in (
            ("policy evidence", evidence["test"]),
            ("policy evidence, node gone", gone["test"]),
            ("logistic regressions", head(items["test"], hidden)),
        ):
            for column, rest in (("safe content", safe), ("other risky content", others)):
                value = detection(scores[rest], scores[mine])
                rows[row].setdefault(column, []).append(value)
                curves[row].setdefault(column, []).append(mean_roc([(scores[rest], scores[mine])]))
        known = category["validation"] != hidden
        flagged: dict[str, float] = {}
        for how, by in (("off", evidence), ("gone", gone)):
            p = split_conformal(by["test"], by["validation"][known])
            for what, part in (("content of the node", mine), ("safe content", safe),
                               ("other risky content", others)):  # fmt: skip
                share = float((p[part] <= ALPHA).double().mean())
                flagged[f"node {how}: {what} flagged at 0.05"] = share
        alarms.append(flagged)
    if not alarms:
        raise ShapeError("policy novelty: no category has test sentences in the contrast set.")
    counts = {k: int(((category["test"] == -1) == (k == "safe")).sum()) for k in ("safe", "risky")}
    return {
        "rows": _means(rows),
        "conformal": _mean_of(alarms),
        "categories": len(alarms),
        "roc": {
            f"policy, against {column}": {
                row: [round(v, 4) for v in torch.stack(curves[row][column]).mean(0).tolist()]
                for row in rows
            }
            for column in rows["policy evidence"]
        },
        "notes": [
            f"policy: mean over {len(alarms)} categories with at least {LEAST_ITEMS} test "
            f"sentences in the contrast set ({counts['safe']} safe, {counts['risky']} risky). "
            "p-values are calibrated on the validation split under the same policy, without the "
            "category."
        ],
    }


def _policy_head(items: Mapping[str, Encoded], category: Mapping[str, Tensor]) -> Any:
    """Risky-and-unnamed from two linear heads on the features: (items, hidden) -> scores."""
    x = items["train"].vectors("features").float()
    risky = category["train"] >= 0
    binary = LinearHead().fit(x, risky.long())
    named = LinearHead().fit(x[risky], category["train"][risky])

    def score(batch: Encoded, hidden: int) -> Tensor:
        z = batch.vectors("features").float()
        odds = (binary.logits(z) @ torch.tensor([-1.0, 1.0])).double()
        shares = named.logits(z).double().softmax(-1)[:, named.classes != hidden]
        unheld = (1 - shares.pow(SPREAD).sum(-1)).clamp_min(1e-12)
        return torch.nn.functional.logsigmoid(odds) + unheld.log()

    return score


# ---------------------------------------------------------------- output


def _plot(out: Path, report: Mapping[str, Any]) -> list[Path]:
    """Draw the ROC curves of a report; the files written, none without matplotlib."""
    panels: dict[str, dict[str, tuple[Tensor, float]]] = {}
    for suite in report["suites"]:
        for column, shown in suite["roc"].items():
            sides = suite["theirs"] | suite["ours"]
            panels[column] = {
                name: (torch.tensor(rates), sides[name.rpartition(": ")[2]][column]["auroc"])
                for name, rates in shown.items()
            }
    if "policy" in report:
        for title, shown in report["policy"]["roc"].items():
            column = title.removeprefix("policy, against ")
            rows = report["policy"]["rows"]
            panels[title] = {
                row: (torch.tensor(rates), rows[row][column]["auroc"])
                for row, rates in shown.items()
            }
    try:
        return plot_roc(out / "roc", panels)
    except MissingExtraError as error:
        print(f"hysafe: {error}", file=sys.stderr)
        return []


def _means(rows: Mapping[str, Mapping[str, list[Detection]]]) -> dict[str, dict[str, Any]]:
    return {
        row: {
            c: {k: round(v, 4) for k, v in mean_detection(values)._asdict().items()}
            for c, values in columns.items()
        }
        for row, columns in rows.items()
    }


def _mean_of(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {k: round(sum(v[k] for v in values) / len(values), 4) for k in values[0]}


def _options(scorer: NoveltyScorer) -> str:
    if isinstance(scorer, PytorchOod):
        return ", ".join(f"{k}={v}" for k, v in scorer.options.items()) or "-"
    return describe(scorer).partition(" (")[2].rstrip(")") or "-"


def _markdown(report: Mapping[str, Any]) -> str:
    """All tables and notes of a report."""
    parts = []
    suites = report["suites"]
    if suites:
        parts += [_table(suites, "auroc"), ""]
        parts += ["AUPR (novel = positive) and FPR at 95 % TPR (the share of known items called "
                  "novel where 95 % of the novel are found):", ""]  # fmt: skip
        parts += [_table(suites, "aupr"), "", _table(suites, "fpr"), ""]
        parts += [_small_table("in-distribution accuracy", suites, "accuracy"), ""]
        parts += [_small_table("conformal p-values of `combined`", suites, "conformal"), ""]
        parts += [_small_table("weights of `combined`", suites, "weights"), ""]
    if "policy" in report:
        policy = report["policy"]
        parts += [
            "| policy novelty, node off | against | AUROC | AUPR | FPR95 |",
            "|---|---|---|---|---|",
        ]
        for row, columns in policy["rows"].items():
            for column, v in columns.items():
                parts.append(
                    f"| {row} | {column} | {v['auroc']:.3f} | {v['aupr']:.3f} | {v['fpr']:.3f} |"
                )
        parts.append("")
        parts += [f"- {k}: {v:.3f}" for k, v in policy["conformal"].items()] + [""]
    notes = [n for s in (*suites, *([report["policy"]] if "policy" in report else []))
             for n in s["notes"]]  # fmt: skip
    parts += [f"- {n}" for n in notes]
    s = report["setting"]
    parts.append(
        f"- model {s['model']}, seed {s['seed']}, limit {s['limit']}, torch {s['torch']}, "
        f"{s['threads']} threads, {s['seconds']} s. Features are layer-normalised, the same for ours "
        "and theirs. Settings of all rows were chosen on validation stand-ins; `best` is the best "
        "row of the test, on both sides."
    )
    return "\n".join(parts)


def _table(suites: Sequence[Mapping[str, Any]], figure: str) -> str:
    """One figure of all rows, ours first, then theirs; kinds of a column stand behind it."""
    columns: list[tuple[Mapping[str, Any], str]] = []
    for suite in suites:
        every = dict.fromkeys(c for row in suite["ours"].values() for c in row)
        columns += [(suite, c) for c in every]
    title = {"auroc": "AUROC", "aupr": "AUPR", "fpr": "FPR95"}[figure]
    lines = [f"| {title} | " + " | ".join(c for _, c in columns) + " |",
             "|---" * (len(columns) + 1) + "|"]  # fmt: skip
    best = min if figure == "fpr" else max
    for side, label in (("ours", ""), ("theirs", "pytorch-ood ")):
        rows = dict.fromkeys(r for s in suites for r in s[side])
        for row in rows:
            cells = [f"{s[side][row][c][figure]:.3f}" if row in s[side] else "" for s, c in columns]
            name = f"**{row}**" if row == COMBINED else f"{label}{row}"
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        cells = [f"{best(r[c][figure] for r in s[side].values()):.3f}" for s, c in columns]
        lines.append(f"| *best of {side}* | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _small_table(title: str, suites: Sequence[Mapping[str, Any]], key: str) -> str:
    lines = [f"| {title} | " + " | ".join(s["name"] for s in suites) + " |",
             "|---" * (len(suites) + 1) + "|"]  # fmt: skip
    for row in suites[0][key]:
        lines.append(f"| {row} | " + " | ".join(f"{s[key][row]:.3f}" for s in suites) + " |")
    return "\n".join(lines)
