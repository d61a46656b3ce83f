"""Does scaling each category by itself help? `python benchmarks/category_scaling.py mini`

Offsets of the 45 categories, and with them scales, in place of one temperature (vector scaling, Guo et al. 2017), by cross
entropy with a ridge on the risky sentences of the validation split; five folds, seed 0. A failed try (docs/results.md).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hysafe.app.card import _core
from hysafe.app.pipeline import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    a = parser.parse_args()
    model = load(a.model)
    table, apexes = model.place(model.view())
    texts = _core("validation")
    leaves = table.leaves[table.risk]
    ids = [table.ids[i] for i in leaves.tolist()]
    with torch.no_grad():
        margins = model.encode_text(texts.texts).margin(apexes)[texts.unsafe][:, leaves].float()
    logits = margins * model.encoder.cone_scale_value / model.calibration.channel("text").temperature
    truth = torch.tensor([ids.index(c) for c in texts.categories()])
    parents = [model.taxonomy[i].parent for i in ids]
    domain = torch.tensor([sorted({*parents}).index(p) for p in parents])
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))
    print(f"{len(truth)} sentences\n| | ridge | category | domain | cross entropy |\n|---|---|---|---|---|")
    print(row("as it is", 0, logits, truth, domain))
    for scales in (False, True):
        for ridge in (0.3, 1.0, 3.0, 10.0, 30.0):
            scaled = torch.zeros_like(logits)
            for fold in order.chunk(5):
                rest = order[~torch.isin(order, fold)]
                scale, offset = fit(logits[rest], truth[rest], ridge, scales)
                scaled[fold] = logits[fold] * scale + offset
            print(row("scales and offsets" if scales else "offsets", ridge, scaled, truth, domain))


def fit(logits: Tensor, truth: Tensor, ridge: float, scales: bool) -> tuple[Tensor, Tensor]:
    """Scale and offset of each category [C], by cross entropy; the ridge is about one and zero."""
    scale, offset = (torch.zeros(logits.shape[1], requires_grad=True) for _ in range(2))
    optimiser = torch.optim.LBFGS([scale, offset] if scales else [offset], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        size = scale.square().sum() + offset.square().sum()
        value = cross_entropy(logits * (1 + scale) + offset, truth) + ridge * size / len(truth)
        value.backward()
        return value

    optimiser.step(loss)
    return 1 + scale.detach(), offset.detach()


def row(name: str, ridge: float, logits: Tensor, truth: Tensor, domain: Tensor) -> str:
    sums = torch.zeros(len(logits), int(domain.max()) + 1).index_add_(1, domain, logits.softmax(-1))
    right = (logits.argmax(-1) == truth).float().mean(), (sums.argmax(-1) == domain[truth]).float().mean()
    return f"| {name} | {ridge} | {right[0]:.3f} | {right[1]:.3f} | {cross_entropy(logits, truth):.4f} |"


if __name__ == "__main__":
    main()
