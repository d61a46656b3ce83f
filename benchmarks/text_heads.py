"""What the cones keep of what a text tower knows: `python benchmarks/text_heads.py runs/mini_text/model`

Heads, nodes and cones are trained on the features of texts alone (no pictures), under several weights of
the objective, beside a linear softmax on the same features. Printed: AUROC and category top-1 of the
contrast validation split, negative log likelihood of held-out items of the public sets, the share of
risky sentences inside their category's cone, and of nodes outside their parent's. Five minutes a row on a
quiet core; of several folders the mean tower is taken.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hysafe.app.tasks import TaxonomyTask, text_validation
from hysafe.data.datamodule import EmbedData
from hysafe.geometry import get_space
from hysafe.loss import candidate_cross_entropy, distillation, item_cones, node_cones

BATCH, DROPOUT, SMOOTHING, CONCEPTS = 192, 0.1, 0.05, 0.2
# noise on features, then the weights of the terms
ROWS = {
    "softmax": (1.0, {}),
    "before": (0.5, {"leaf": 1.0}),
    "more noise": (1.0, {"leaf": 1.0}),
    "leaves x 5": (1.0, {"leaf": 5.0}),
    "leaves x 12": (1.0, {"leaf": 12.0}),
    "teacher": (1.0, {"leaf": 4.0, "teacher": 8.0}),
    "teacher, edges": (1.0, {"leaf": 4.0, "teacher": 8.0, "edge": 60.0, "sibling": 3.0}),
    "teacher, edges, inside": (
        1.0,
        {"leaf": 4.0, "teacher": 8.0, "edge": 60.0, "sibling": 3.0, "inside": 4.0},
    ),
}
USUAL = {"inside": 0.5, "outside": 0.3, "edge": 10.0, "sibling": 0.5, "teacher": 0.0}


class Features:
    """Features of all texts under a tower, kept in a file."""

    def __init__(self, folders: list[str], cache: Path | None) -> None:
        torch.manual_seed(0)
        self.data = EmbedData(
            pictures=False, rendered=1, image_batch=1, text_batch=BATCH, joined=3000, seed=0
        )
        self.data.setup()
        self.task = TaxonomyTask(freeze_image=True, freeze_text=True, lora_rank=0, text_layers=6,
                                 context_length=128, node_offsets=True)  # fmt: skip
        self.banks = [n.phrases for n in self.data.taxonomy]
        if cache is not None and cache.is_file():
            found = torch.load(cache, weights_only=True)
        else:
            found = self._encode(folders)
            if cache is not None:
                torch.save(found, cache)
        self.train, self.validation, self.held_out, self.nodes = found

    def _encode(self, folders: list[str]) -> list[Tensor]:
        encoder = self.task.encoder.eval()
        encoder.towers.take(folders, "text")
        data = self.data
        sets = (data.train_texts.samples, data.validation_texts, data.held_out_texts)
        with torch.autocast("cpu", torch.bfloat16):
            found = [encoder.text_features([str(s.text) for s in some]) for some in sets]
            found.append(encoder.node_features(self.banks))
        return [f.float().clone() for f in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="exports of text stages")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="file for the features, read where it is there")
    a = parser.parse_args()
    seen = Features(a.folders, a.cache)
    print("| weights | AUROC | category | held-out NLL | in its cone | edges violated |")
    print("|---|---|---|---|---|---|")
    for row in a.rows:
        noise, weights = ROWS[row]
        fit = softmax if row == "softmax" else cones
        figures = fit(seen, noise, {**USUAL, **weights}, a.steps, a.seed)
        cells = (f"{x:.{d}f}" for x, d in zip(figures, (4, 3, 4, 3, 3), strict=False))
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


def batches(seen: Features, noise: float, steps: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Rows, their features, and these with noise and dropout."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.multinomial(seen.data.draw_weights, BATCH, True, generator=generator)
        x = seen.train[rows]
        noisy = x + x.std(-1, keepdim=True) * noise * torch.randn(x.shape)
        yield rows, x, F.dropout(noisy, DROPOUT, True)


def optimizer(
    parameters: list[nn.Parameter], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a linear warm-up and a cosine, as in :class:`~hysafe.app.tasks.EncoderTask`."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    made = torch.optim.AdamW(groups, 2e-3, betas=(0.9, 0.98))
    start = 0.1 * steps

    def rate(step: int) -> float:
        if step < start:
            return (step + 1) / start
        return 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))

    return made, torch.optim.lr_scheduler.LambdaLR(made, rate)


def linear(width: int, leaves: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, leaves))


def measured(seen: Features, validation: Tensor, held_out: Tensor) -> tuple[float, float, float]:
    """AUROC, category top-1, NLL from logits over the leaves."""
    data = seen.data
    allowed = torch.stack([data.leaves.candidates(s.nodes) for s in data.held_out_texts])
    values = text_validation(validation, data)
    nll = float(candidate_cross_entropy(held_out, allowed).mean())
    return values["validation/auroc"], values["validation/category_top1"], nll


def softmax(
    seen: Features, noise: float, _: dict[str, float], steps: int, seed: int
) -> tuple[float, ...]:
    """A linear softmax over the leaves."""
    torch.manual_seed(seed)
    model = linear(seen.train.shape[-1], len(seen.data.leaves.leaves))
    step, schedule = optimizer(list(model.parameters()), steps)
    for rows, _x, noisy in batches(seen, noise, steps, seed):
        allowed = seen.data.train_texts.candidates[rows]
        step.zero_grad()
        candidate_cross_entropy(model(noisy), allowed, smoothing=SMOOTHING).mean().backward()
        step.step()
        schedule.step()
    with torch.no_grad():
        return measured(seen, model(seen.validation), model(seen.held_out))


def cones(
    seen: Features, noise: float, w: dict[str, float], steps: int, seed: int
) -> tuple[float, ...]:
    """The taxonomy objective, on texts alone."""
    torch.manual_seed(seed)
    data, leaves, space = seen.data, seen.data.leaves, get_space("lorentz")
    task = TaxonomyTask(freeze_image=True, freeze_text=True, lora_rank=0, text_layers=6,
                        context_length=128, node_offsets=True)  # fmt: skip
    encoder, edges = task.encoder, leaves.edges()
    task._leaves = leaves
    ids = [n.id for n in data.taxonomy.concepts]
    task._concepts = torch.tensor([leaves.node_index[i] for i in ids])
    task._concept_parent = torch.tensor([leaves.node_index[str(data.taxonomy[i].parent)] for i in ids])
    teacher = linear(seen.train.shape[-1], len(leaves.leaves))
    learnt = [p for n, p in encoder.named_parameters() if "towers" not in n and "image" not in n]
    learnt += teacher.parameters() if w["teacher"] else []
    step, schedule = optimizer(learnt, steps)
    for rows, x, noisy in batches(seen, noise, steps, seed):
        c, allowed = encoder.curvature(), data.train_texts.candidates[rows]
        items = encoder.lift("text", noisy).space
        nodes = encoder.place_nodes(seen.nodes, leaves.depth, seen.banks).space
        margins = space.pairwise_margin(nodes, items, c)
        logits = margins[:, leaves.leaf_nodes] * encoder.cone_scale()
        pull, push = item_cones(margins, *leaves.cone_masks(allowed))
        edge, sibling = node_cones(nodes, edges, leaves.siblings(), c, space=space)
        loss = candidate_cross_entropy(logits, allowed, smoothing=SMOOTHING).mean() * w["leaf"]
        loss = loss + w["inside"] * pull + w["outside"] * push + w["edge"] * edge
        loss = loss + w["sibling"] * sibling
        loss = loss + CONCEPTS * task._concept_term(items, data.train_texts.concepts[rows], nodes, c)
        if w["teacher"]:
            told = candidate_cross_entropy(teacher(noisy), allowed, smoothing=SMOOTHING).mean()
            loss = loss + told + w["teacher"] * distillation(logits, teacher(x))
        step.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        step.step()
        schedule.step()
    with torch.no_grad():
        placed = encoder.place_nodes(seen.nodes, leaves.depth, seen.banks)
        found = [encoder.lift("text", f).margin(placed) for f in (seen.validation, seen.held_out)]
        logits = [m[:, leaves.leaf_nodes] * encoder.cone_scale() for m in found]
        risky = torch.tensor([not s.safe for s in data.validation_texts])
        truth = [leaves.node_index[s.nodes[0]] for s in data.validation_texts if not s.safe]
        inside = (found[0][risky][range(len(truth)), truth] > 0).float().mean()
        ends = placed.space[edges[:, 0]], placed.space[edges[:, 1]]
        angle, half = space.exterior_angle(*ends, encoder.curvature()), space.half_aperture(
            ends[0], encoder.curvature()
        )
        violated = (angle > half).float().mean()
    return (*measured(seen, *logits), float(inside), float(violated))


if __name__ == "__main__":
    main()
