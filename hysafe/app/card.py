"""``hysafe eval card``: every figure of the model card, with baselines from the same run."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hysafe.app.pipeline import SafetyModel, load
from hysafe.data.contrast import contrast_set, core_set, long_set
from hysafe.data.datamodule import EmbedData, Pictures, WorldTree
from hysafe.encoder.model import HyperbolicEncoder
from hysafe.encoder.pretrained import LIFT_CONE_SCALE, LIFT_RADIUS, resolve_folder
from hysafe.encoder.towers import mini_architecture
from hysafe.errors import ConfigError, MissingExtraError
from hysafe.evaluate.curves import reliability, risk_coverage
from hysafe.evaluate.metrics import detection
from hysafe.evaluate.plots import (
    plot_radius,
    plot_reliability,
    plot_risk_coverage,
    require_matplotlib,
)
from hysafe.geometry import Points
from hysafe.score.calibration import (
    Calibration,
    ModalityCalibration,
    expected_calibration_error,
    fit_platt,
    fit_temperature,
    quantile_grid,
)
from hysafe.score.leaves import LeafScores, NodeTable, score_margins
from hysafe.score.reference import save_reference
from hysafe.taxonomy import metrics
from hysafe.types import Sample

__all__ = ["evaluate_card", "fit_calibration", "reference_points"]

# The share of safe sentences rated unsafe is reported at the threshold of the product.
THRESHOLD = 0.5
FUNCTIONAL_RECALL = 0.85
# Ordinary items of a channel that new nodes are compared with.
REFERENCES = 2000
BLOCK, BLOCK_END = "<!-- figures: card -->", "<!-- end -->"
LOOK_ALIKES = ("homonym", "figurative", "safe_target", "safe_context")
LOGISTIC_C = (0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class _Texts:
    """Contrast sentences of one split with what a figure needs."""

    samples: list[Sample]

    @property
    def texts(self) -> list[str]:
        return [str(s.text) for s in self.samples]

    @property
    def unsafe(self) -> Tensor:
        return torch.tensor([not s.safe for s in self.samples])

    def categories(self) -> list[str]:
        return [s.nodes[0] for s in self.samples if not s.safe]


@dataclass(frozen=True)
class _Judged:
    """What a model says of items, kept for figures and plots.

    Args:
        points: of the items. margins: [n, N]. scores: calibrated. unsafe: bool [n], the truth.
    """

    points: Points
    margins: Tensor
    scores: LeafScores
    unsafe: Tensor


def evaluate_card(
    name: str,
    *,
    control: str | None = None,
    data: str | None = None,
    fit: bool = False,
    out: Path | None = None,
    pages: Sequence[Path] = (),
) -> int:
    """Print the card's table; write ``card.json``, ``card.md`` and plots into `out`.

    Plots (reliability, risk against coverage, radius by depth) need the extra ``plots``.

    Args:
        name: model to evaluate. control: its Euclidean control, a folder.
        data: development data; HYSAFE_DATA by default.
        fit: fit the calibration of the model (and control) first and store it in the folder.
        pages: Markdown files whose blocks between ``<!-- figures: card -->`` and ``<!-- end -->``
            are replaced by the table and its setting.
    """
    for page in pages:  # known before the work of minutes
        _find_block(page)
    modules: dict[int, EmbedData] = {}  # by the side of the pictures that a model reads
    rows: dict[str, dict[str, float]] = {}
    judged: dict[str, tuple[SafetyModel, _Judged, _Judged | None]] = {}
    for label, model_name in (("hysafe " + name, name), ("Euclidean control", control)):
        if model_name is None:
            continue
        model = load(model_name)
        module = modules.get(model.encoder.image_size)
        if module is None:
            module = EmbedData(data, model.encoder.image_size, held_out_only=True)
            module.setup()
            modules[model.encoder.image_size] = module
        if fit:
            folder = resolve_folder(model_name)
            if folder is None:
                raise ConfigError(f"--fit needs a model folder, got {model_name!r}.")
            fit_calibration(model, module).save(folder)
            save_reference(folder, reference_points(model, module))
            model = load(model_name)
        texts, pictures = _judge_texts(model, _core("test")), _judge_pictures(model, module)
        rows[label] = {
            **text_figures(model, texts), **picture_figures(model, module, pictures)
        }  # fmt: skip
        judged[label] = (model, texts, pictures)
    rows["untrained lift (MiniLM)"] = text_figures(_untrained_lift())
    rows["MiniLM + logistic regression"] = logistic_figures()
    card = {"figures": rows, "setting": _setting(name, control)}
    table = _markdown(rows)
    print(table)
    for page in pages:
        write_block(page, table, card["setting"])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "card.json").write_text(json.dumps(card, indent=1, sort_keys=True) + "\n")
        (out / "card.md").write_text(table + "\n")
        print(f"{out}/: card.json, card.md" + "".join(f", {p.name}" for p in _plots(out, judged)))
    return 0


def fit_calibration(model: SafetyModel, data: EmbedData) -> Calibration:
    """Platt scaling, temperature and conformal scores, from validation texts and held-out pictures.

    Texts: the contrast validation split; the held-out shares of the public text sets join it for
    the conformal scores. Pictures: the held-out share of the training pictures.
    """
    table, apexes = model.place(model.view())
    scale = model.encoder.cone_scale_value
    texts = _core("validation")
    margins = model.encode_text(texts.texts).margin(apexes)
    scores = score_margins(margins, table, scale=scale)
    slope, offset = fit_platt(scores.evidence, texts.unsafe)
    risk = margins[texts.unsafe][:, table.leaves[table.risk]] * scale
    ids = [table.ids[i] for i in table.leaves[table.risk].tolist()]
    labels = torch.tensor([ids.index(c) for c in texts.categories()])
    temperature = fit_temperature(risk, labels)
    public = [str(s.text) for s in data.held_out_texts]
    ordinary = torch.cat([margins, model.encode_text(public).margin(apexes)])
    channels = {"text": _channel_calibration(model, slope, offset, temperature, ordinary)}
    held = data.held_out_pictures
    points, _ = _encode_pictures(model, held)
    margins = points.margin(apexes)
    unsafe = (held.candidates[:, data.leaves.risky].any(-1)).cpu()
    slope, offset = fit_platt(score_margins(margins, table, scale=scale).evidence, unsafe)
    channels["image"] = _channel_calibration(model, slope, offset, 1.0, margins)
    return Calibration(
        channels,
        "contrast validation split and held-out 5 % of the public text sets; held-out 5 % of the "
        "training pictures",
    )


def reference_points(model: SafetyModel, data: EmbedData) -> dict[str, Tensor]:
    """Tangent vectors [n, D] of ordinary items that the calibration was fitted on, by channel:
    REFERENCES of them at most, evenly spaced."""

    def some(count: int) -> list[int]:
        return np.linspace(0, count - 1, min(count, REFERENCES)).astype(int).tolist()

    texts = [*_core("validation").texts, *(str(s.text) for s in data.held_out_texts)]
    pictures, _ = _encode_pictures(model, data.held_out_pictures)
    return {
        "text": model.encode_text([texts[i] for i in some(len(texts))]).tangent(),
        "image": pictures.tangent()[some(len(pictures))],
    }


def _channel_calibration(
    model: SafetyModel, slope: float, offset: float, temperature: float, margins: Tensor
) -> ModalityCalibration:
    """Calibration of a channel with conformal scores from the margins [n, N] of ordinary items."""
    table, _ = model.place(model.view())
    scores = score_margins(
        margins, table, scale=model.encoder.cone_scale_value, slope=slope, offset=offset,
        temperature=temperature,
    )  # fmt: skip
    return ModalityCalibration(
        slope, offset, temperature, quantile_grid(scores.energy),
        quantile_grid(scores.policy_evidence), len(margins),
    )  # fmt: skip


# ---------------------------------------------------------------- figures


def _judge_texts(model: SafetyModel, texts: _Texts) -> _Judged:
    points = model.encode_text(texts.texts)
    return _judge(model, points, texts.unsafe, "text")


def _judge_pictures(model: SafetyModel, data: EmbedData) -> _Judged | None:
    """Tiny-ImageNet's val.parquet with its weak labels of risk; None where there are no pictures."""
    pictures = data.validation_pictures
    if pictures is None:
        return None
    points, _ = _encode_pictures(model, pictures)
    unsafe = pictures.candidates[:, data.leaves.risky].any(-1)
    return _judge(model, points, unsafe, "image")


def _judge(model: SafetyModel, points: Points, unsafe: Tensor, channel: str) -> _Judged:
    table, apexes = model.place(model.view())
    fit = model.calibration.channel(channel)
    margins = points.margin(apexes)
    scores = score_margins(
        margins, table, scale=model.encoder.cone_scale_value, slope=fit.slope, offset=fit.offset,
        temperature=fit.temperature,
    )  # fmt: skip
    return _Judged(points, margins, scores, unsafe)


def text_figures(model: SafetyModel, judged: _Judged | None = None) -> dict[str, float]:
    """Figures on the contrast test split.

    Args:
        judged: its sentences, where they are judged already.
    """
    table, _ = model.place(model.view())
    texts = _core("test")
    judged = judged or _judge_texts(model, texts)
    margins, scores = judged.margins, judged.scores
    leaves = table.leaves[table.risk]
    best = [table.ids[int(leaves[i])] for i in scores.nodes[texts.unsafe][:, leaves].argmax(-1)]
    inside = margins[texts.unsafe] > 0
    position = [table.index[c] for c in texts.categories()]
    domain = [i for i, n in enumerate(table.ids) if n.startswith("D")]
    above = [table.ids[domain[i]] for i in scores.nodes[texts.unsafe][:, domain].argmax(-1)]
    figures = _text_figures(texts, scores.evidence, best, above, model.taxonomy.parents)
    figures["text in its category's cone"] = float(
        inside[range(len(position)), position].float().mean()
    )
    if model.calibration.fitted:
        figures["text ECE"] = expected_calibration_error(scores.p_unsafe, texts.unsafe)
        figures.update(node_calibration(scores.nodes, table, texts.categories(), texts.unsafe))
        hard = torch.tensor([s.extra["side"] == "background_hard" for s in texts.samples])
        over = scores.p_unsafe >= THRESHOLD
        figures["false alarms, benign siblings"] = float(
            over[~texts.unsafe & torch.tensor([s.pair is not None for s in texts.samples])]
            .float().mean()
        )  # fmt: skip
        figures["false alarms, feared words"] = float(over[hard].float().mean())
        figures["recall, risky sentences"] = float(over[texts.unsafe].float().mean())
    validation = _core("validation")
    known = _judge_texts(model, validation).scores
    functional = _Texts([s for s in contrast_set("test") if s.extra["functionality"]])
    probed = _judge_texts(model, functional).scores
    figures.update(
        functional_figures(
            known.evidence[validation.unsafe], scores.evidence[texts.unsafe], probed.evidence,
            functional,
        )
    )  # fmt: skip
    long = _Texts(long_set("test"))
    evidence = _judge_texts(model, long).scores.evidence
    figures["long texts AUROC"] = detection(evidence[~long.unsafe], evidence[long.unsafe]).auroc
    return figures


def node_calibration(
    nodes: Tensor, table: NodeTable, categories: Sequence[str], unsafe: Tensor
) -> dict[str, float]:
    """Calibration error of the scores of domains and categories, each one against the rest.

    Args:
        nodes: scores [n, N] of the items. categories: of the unsafe ones, in their order.
        unsafe: bool [n].

    Returns:
        that of all nodes pooled, and the largest of one node.
    """
    taxonomy = table.view.taxonomy
    ids = [n.id for n in taxonomy.of_kind("domain", "category") if table.view.active(n.id)]
    truth = torch.zeros(len(nodes), len(ids), dtype=torch.bool)
    for row, category in zip(unsafe.nonzero()[:, 0].tolist(), categories, strict=True):
        for node in taxonomy.path(category).ids:
            truth[row, ids.index(node)] = True
    scores = nodes[:, [table.index[n] for n in ids]]
    return {
        "node ECE, domains and categories pooled": expected_calibration_error(
            scores.reshape(-1), truth.reshape(-1)
        ),
        "node ECE, largest of one node": max(
            expected_calibration_error(scores[:, i], truth[:, i]) for i in range(len(ids))
        ),
    }  # fmt: skip


def functional_figures(
    validation_risky: Tensor, test_risky: Tensor, evidence: Tensor, functional: _Texts
) -> dict[str, float]:
    """False alarms on harmless look-alikes at the threshold of 0.85 recall on validation.

    Args:
        validation_risky, test_risky: evidence of the risky sentences of the two splits.
        evidence: of the functional sentences of the test split.
    """
    threshold = torch.quantile(validation_risky.float(), 1 - FUNCTIONAL_RECALL)
    names = [str(s.extra["functionality"]) for s in functional.samples]
    over = evidence >= threshold
    alike = torch.tensor([n in LOOK_ALIKES for n in names])
    safe = ~functional.unsafe
    return {
        "recall at the threshold of 0.85 validation recall": float(
            (test_risky >= threshold).float().mean()
        ),
        "its false alarms, homonyms and figures of speech": float(over[alike].float().mean()),
        "its false alarms, all harmless functionalities": float(over[safe].float().mean()),
        "its recall, risky functionalities": float(over[~safe].float().mean()),
        "functionalities AUROC": detection(evidence[safe], evidence[~safe]).auroc,
    }  # fmt: skip


def _core(split: str) -> _Texts:
    """Pairs and background of a split; functionalities and long texts have figures of their own."""
    return _Texts(core_set(split))


def _text_figures(
    texts: _Texts,
    evidence: Tensor,
    best: list[str],
    domains: list[str],
    parents: dict[str, str | None],
) -> dict[str, float]:
    truth = texts.categories()
    tree = {k: v for k, v in parents.items()}
    scores = metrics.hierarchical_scores(tree, best, truth)
    found = detection(evidence[~texts.unsafe], evidence[texts.unsafe])
    return {
        "text AUROC": found.auroc,
        "text average precision": found.aupr,
        "category top-1 of 45": sum(a == b for a, b in zip(best, truth, strict=True)) / len(truth),
        "domain top-1 of 12": sum(a == parents[b] for a, b in zip(domains, truth, strict=True))
        / len(truth),
        "category tree-induced error": scores.tree_induced_error,
        "category hierarchical precision": scores.precision,
    }


def picture_figures(
    model: SafetyModel, data: EmbedData, judged: _Judged | None = None
) -> dict[str, float]:
    """Class retrieval on Tiny-ImageNet's val.parquet, and risk on its weak labels.

    Args:
        judged: its pictures, where they are judged already.
    """
    pictures = data.validation_pictures
    judged = judged or _judge_pictures(model, data)
    if pictures is None or judged is None:
        return {}
    points, said, unsafe = judged.points, judged.scores, judged.unsafe
    prototypes = class_points(model, data.world)[: data.photo_classes]
    order = points.dist(prototypes).argsort(-1)
    truth = pictures.classes
    leaf = data.world.leaf_ids()
    scores = metrics.hierarchical_scores(
        data.world.parents(), [leaf[i] for i in order[:, 0]], [leaf[i] for i in truth]
    )
    figures = {
        "picture top-1 of 177": float((order[:, 0] == truth).float().mean()),
        "picture top-5 of 177": float((order[:, :5] == truth[:, None]).any(-1).float().mean()),
        "picture tree-induced error": scores.tree_induced_error,
        "picture hierarchical precision": scores.precision,
        "picture hierarchical recall": scores.recall,
        "picture risk AUROC (weak labels)": detection(
            said.evidence[~unsafe], said.evidence[unsafe]
        ).auroc,
    }
    if model.calibration.fitted:
        figures["picture ECE"] = expected_calibration_error(said.p_unsafe, unsafe)
    return figures


def class_points(model: SafetyModel, world: WorldTree) -> Points:
    """Text points of the classes: mean feature of three phrases each, through the text head."""
    from hysafe.app.tasks import class_phrases

    banks = [class_phrases(n, c) for n, c in zip(world.names, world.chains, strict=True)]
    with torch.inference_mode():
        points = model.encoder.lift("text", model.encoder.node_features(banks))
    return Points(points.space.clone(), float(points.c), points.geometry)


def _encode_pictures(
    model: SafetyModel, pictures: Pictures, batch: int = 256
) -> tuple[Points, int]:
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pictures), batch):
            pixels = torch.from_numpy(pictures.pixels[start : start + batch])
            parts.append(model.encoder.encode_image(pixels.to(model.encoder.device)).space.cpu())
    c = model.encoder.c
    return Points(torch.cat(parts).clone(), c, model.encoder.space), len(parts)


# ---------------------------------------------------------------- baselines


def _untrained_lift() -> SafetyModel:
    """MiniLM on the hyperboloid without training: directions of features, radii of depths."""
    encoder = HyperbolicEncoder(
        mini_architecture("resnet10t", lora_rank=0), normalize="unit", linear_heads=False,
        instance_radius=LIFT_RADIUS, learn_curvature=False,
    )  # fmt: skip
    encoder.cone_scale.set(LIFT_CONE_SCALE)
    return SafetyModel(encoder, name="lift")


def logistic_figures() -> dict[str, float]:
    """Frozen MiniLM features and logistic regression, strength chosen on the validation split."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ConfigError("the baseline needs scikit-learn: pip install 'hysafe[test]'") from error
    model = _untrained_lift()
    splits = {s: _core(s) for s in ("train", "validation", "test")}
    functional = _Texts([s for s in contrast_set("test") if s.extra["functionality"]])
    splits["functional"], splits["long"] = functional, _Texts(long_set("test"))
    x = {
        s: F.normalize(model.encoder.text_features(t.texts), dim=-1).cpu().numpy()
        for s, t in splits.items()
    }
    y = {s: t.unsafe.numpy() for s, t in splits.items()}
    z = {s: t.categories() for s, t in splits.items()}

    def best(fit: Any, score: Any) -> Any:
        return max((fit(c) for c in LOGISTIC_C), key=score)

    def binary(c: float) -> Any:
        return LogisticRegression(C=c, max_iter=3000).fit(x["train"], y["train"])

    def categories(c: float) -> Any:
        return LogisticRegression(C=c, max_iter=3000).fit(x["train"][y["train"]], z["train"])

    def auroc(m: Any) -> float:
        evidence = torch.tensor(m.decision_function(x["validation"]))
        unsafe = torch.tensor(y["validation"])
        return detection(evidence[~unsafe], evidence[unsafe]).auroc

    def accuracy(m: Any) -> float:
        return float(m.score(x["validation"][y["validation"]], z["validation"]))

    chosen = best(binary, auroc)
    evidence = torch.tensor(chosen.decision_function(x["test"]))
    by_category = best(categories, accuracy)
    share = torch.tensor(by_category.predict_proba(x["test"][y["test"]]))
    names = [str(n) for n in by_category.classes_]
    above = [str(model.taxonomy.parents[n]) for n in names]
    domains = sorted(set(above))
    pooled = torch.stack(
        [share[:, torch.tensor([a == d for a in above])].sum(-1) for d in domains], dim=-1
    )
    figures = _text_figures(
        splits["test"], evidence, [names[i] for i in share.argmax(-1)],
        [domains[i] for i in pooled.argmax(-1)], model.taxonomy.parents,
    )  # fmt: skip
    known, probed = (
        torch.tensor(chosen.decision_function(x[s])) for s in ("validation", "functional")
    )
    figures.update(
        functional_figures(
            known[splits["validation"].unsafe], evidence[splits["test"].unsafe], probed, functional
        )
    )
    long = torch.tensor(chosen.decision_function(x["long"]))
    unsafe = splits["long"].unsafe
    figures["long texts AUROC"] = detection(long[~unsafe], long[unsafe]).auroc
    return figures


# ---------------------------------------------------------------- output


def _setting(name: str, control: str | None) -> dict[str, Any]:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True,
            check=False, timeout=10,
        )  # fmt: skip
        commit = done.stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    command = f"hysafe eval card --model {name}" + (f" --control {control}" if control else "")
    return {
        "command": command,
        "commit": commit,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _plots(
    out: Path, judged: Mapping[str, tuple[SafetyModel, _Judged, _Judged | None]]
) -> list[Path]:
    """Draw what the models said, reliability of the calibrated ones only; the files written."""
    try:
        require_matplotlib()
    except MissingExtraError as error:
        print(f"hysafe: {error}", file=sys.stderr)
        return []
    said: dict[str, dict[str, _Judged]] = {"texts": {}, "pictures": {}}
    for label, (_, texts, pictures) in judged.items():
        said["texts"][label] = texts
        if pictures is not None:
            said["pictures"][label] = pictures
    panels = {kind: models for kind, models in said.items() if models}
    calibrated = {
        kind: {
            label: reliability(j.scores.p_unsafe, j.unsafe)
            for label, j in models.items() if judged[label][0].calibration.fitted
        }
        for kind, models in panels.items()
    }  # fmt: skip
    selective = {
        kind: {
            label: risk_coverage(
                (p := j.scores.p_unsafe.double()).sub(THRESHOLD).abs(),
                (p >= THRESHOLD) != j.unsafe,
            )
            for label, j in models.items()
        }
        for kind, models in panels.items()
    }
    written = [] if not any(calibrated.values()) else plot_reliability(
        out / "reliability", calibrated
    )  # fmt: skip
    written += plot_risk_coverage(out / "risk_coverage", selective)
    model, texts, pictures = next(iter(judged.values()))
    written += plot_radius(out / "radius", *_radii(model, texts, pictures))
    return written


def _radii(
    model: SafetyModel, texts: _Judged, pictures: _Judged | None
) -> tuple[dict[str, list[tuple[int, Tensor]]], dict[str, Tensor]]:
    """Radii of nodes, by kind and depth, and of items."""
    table, apexes = model.place(model.view())
    radius = apexes.radius()
    risky = torch.tensor([model.taxonomy[n].risky for n in table.ids])
    nodes = {
        kind: [
            (depth, radius[side & (table.depth == depth)])
            for depth in sorted(set(table.depth[side].tolist()))
        ]
        for kind, side in (("risk nodes", risky), ("harmless nodes", ~risky))
    }
    of = texts.points.radius()
    items = {"risky texts": of[texts.unsafe], "harmless texts": of[~texts.unsafe]}
    if pictures is not None:
        items["pictures"] = pictures.points.radius()
    return nodes, items


def write_block(page: Path, table: str, setting: Mapping[str, Any]) -> None:
    """Replace the figures of a Markdown page, with the setting that made them.

    Raises:
        ConfigError: the page has no such block.
    """
    text, start, end = _find_block(page)
    lines = [f"- {k}: `{v}`" for k, v in setting.items()]
    block = f"{BLOCK}\n{table}\n\n" + "\n".join(lines) + "\n"
    page.write_text(text[:start] + block + text[end:], "utf-8")


def _find_block(page: Path) -> tuple[str, int, int]:
    """Text of a page, and where its block of figures starts and ends."""
    try:
        text = page.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"--write {page}: {error.strerror}. Name a Markdown page.") from error
    start, end = text.find(BLOCK), text.find(BLOCK_END)
    if start < 0 or end < start:
        raise ConfigError(
            f"--write {page}: no block between {BLOCK} and {BLOCK_END}. Add both lines."
        )
    return text, start, end


def _markdown(rows: dict[str, dict[str, float]]) -> str:
    figures = list(dict.fromkeys(k for row in rows.values() for k in row))
    lines = ["| figure | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for figure in figures:
        cells = [f"{row[figure]:.3f}" if figure in row else "" for row in rows.values()]
        lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
