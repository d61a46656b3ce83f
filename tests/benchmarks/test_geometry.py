"""benchmarks/geometry.py on small made-up features: every row trains, is judged and is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hysafe.data.datamodule import WorldTree
from hysafe.data.label_map import SAFE
from hysafe.data.leaves import LeafSpace
from hysafe.errors import ConfigError
from hysafe.taxonomy import load_taxonomy
from hysafe.types import Sample

E, SPREAD, BATCH = 24, 0.5, 32
SETTINGS = {"steps": 2, "batch": BATCH}


@pytest.fixture(scope="module")
def geometry(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/geometry.py")


@pytest.fixture(scope="module")
def features(geometry: ModuleType) -> Any:
    """A direction for each node and class; items lie around those of their leaf or class."""
    generator = torch.Generator().manual_seed(0)
    taxonomy = load_taxonomy()
    leaves = LeafSpace(taxonomy)
    node = torch.randn(len(leaves.nodes), E, generator=generator)
    names = ["goldfish", "tench", "oak", "elm", "text"]
    chains = [("thing", "fish"), ("thing", "fish"), ("thing", "tree"), ("thing", "tree"), ("sign",)]
    classes = torch.randn(len(names), E, generator=generator)

    def around(centres: torch.Tensor) -> torch.Tensor:
        return centres + SPREAD * torch.randn(centres.shape, generator=generator)

    def samples(prefix: str) -> list[Sample]:
        return [
            Sample(f"{prefix}{i}", "made up", "", None, (n,), not taxonomy[n].risky, None,
                   {"concept": None})
            for i, n in enumerate(leaves.leaves)
        ] + [Sample(f"{prefix}-safe", "made up", "", None, (SAFE,), True, None, {})]  # fmt: skip

    leaf = torch.arange(4 * len(leaves.leaves)) % len(leaves.leaves)
    at = leaves.leaf_nodes[leaf]
    partner = torch.full((len(leaf),), -1)
    index = leaves.leaf_index
    for i, n in enumerate(taxonomy[leaves.leaves[j]] for j in leaf.tolist()):
        if n.sibling and n.risky:
            partner[i] = index[n.sibling]  # row of its first sentence
    concepts = torch.full((len(leaf),), -1)
    first = taxonomy.concepts[0]
    concepts[leaf == index[str(first.parent)]] = leaves.node_index[first.id]
    seen = torch.arange(60) % len(names)
    held = torch.arange(40) % 4
    both = leaves.leaf_nodes[[*range(len(leaves.leaves)), 0]]
    everyday = F.one_hot(torch.full((60,), index["S.b1"]), len(leaves.leaves)).bool()
    tensors = {
        "train_text": around(node[at]).bfloat16(),
        "candidates": F.one_hot(leaf, len(leaves.leaves)).bool(),
        "concepts": concepts,
        "draw": torch.ones(len(leaf), dtype=torch.double),
        "partner": partner,
        "validation_text": around(node[both]).bfloat16(),
        "test_text": around(node[both]).bfloat16(),
        "train_image": torch.stack([around(classes[seen]) for _ in range(2)]).bfloat16(),
        "classes": seen,
        "image_candidates": everyday,
        "validation_image": around(classes[held]).bfloat16(),
        "validation_classes": held,
        "node": node,
        "class": classes,
        "hypernym": torch.randn(4, E, generator=generator),  # thing, fish, tree, sign
    }
    world = WorldTree(names, chains)
    return geometry.Features(tensors, world, 4, samples("v"), samples("t"), "made up")


TITLES = [
    "hyperbolic cones", "hyperbolic distance only", "Euclidean control", "spherical CLIP head",
    "MERU-like", "HySAC-like", "cones with negatives",
]  # fmt: skip


def test_all_rows_are_tested(geometry: ModuleType) -> None:
    assert [*geometry.ROWS, *geometry.PRESETS] == TITLES


@pytest.mark.parametrize("title", TITLES)
def test_a_row_trains_its_heads_and_has_its_figures(
    geometry: ModuleType, features: Any, title: str
) -> None:
    kind = (geometry.ROWS | geometry.PRESETS)[title]
    task = geometry.train(kind, 4, 0, features, steps=2, batch=BATCH)
    for name in ("image", "text"):
        assert task.encoder.heads[name].linear.weight.grad.abs().sum() > 0
    values = geometry.figures(task, features)
    missing = {
        "hyperbolic distance only": {"edges violated"},
        "spherical CLIP head": {"edges violated", "radius and depth", "AUROC by radius"},
    }.get(title, set())
    assert set(geometry.COLUMNS) - set(values) == missing
    for name in set(values) - {"tree-induced error", "radius and depth", "curvature"}:
        low = 0 if not name.endswith("error") else -1
        assert low <= values[name] <= (1 if low == 0 else 10), name


@pytest.mark.parametrize("title", ["hyperbolic cones", "spherical CLIP head"])
def test_training_learns(geometry: ModuleType, features: Any, title: str) -> None:
    before, after = (
        geometry.figures(
            geometry.train(geometry.ROWS[title], 8, 1, features, steps=steps, batch=BATCH), features
        )
        for steps in (1, 60)
    )
    assert after["picture top-1"] > max(0.6, before["picture top-1"])
    for name in ("test category top-1 of 45", "validation mAP"):
        assert after[name] > before[name] + 0.1, name


def test_the_seed_decides(geometry: ModuleType, features: Any) -> None:
    first, again, other = (
        geometry.figures(
            geometry.train(geometry.Cones, 4, seed, features, steps=2, batch=BATCH), features
        )
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_finished_rows_are_kept_and_other_settings_refused(
    geometry: ModuleType, features: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [("hyperbolic cones", 4, 0), ("spherical CLIP head", 4, 0)]

    def run(more: list[tuple[str, int, int]], settings: dict[str, int]) -> dict[str, Any]:
        return geometry.run_all(  # type: ignore[no-any-return]
            more, features, tmp_path, settings, "command", steps=2, batch=BATCH
        )

    run(jobs[:1], SETTINGS)
    made = (tmp_path / "table.json").read_text()
    trained = []
    train = geometry.train

    def watched(kind: Any, *rest: Any, **options: Any) -> Any:
        trained.append(kind.title)
        return train(kind, *rest, **options)

    monkeypatch.setattr(geometry, "train", watched)
    results = run(jobs, SETTINGS)
    assert trained == ["spherical CLIP head"]
    assert results["runs"][0] == json.loads(made)["runs"][0]
    text = (tmp_path / "table.md").read_text()
    assert all(f"| 4 | {title} | 1 |" in text for title, _, _ in jobs)
    assert results["runs"][1]["commit"] in text
    with pytest.raises(ConfigError, match="another steps"):
        run(jobs, {**SETTINGS, "steps": 3})


def test_the_table_shows_mean_deviation_and_the_best_in_bold(geometry: ModuleType) -> None:
    runs = [
        {"row": row, "dim": 8, "seed": seed, "figures": {"picture top-1": top, "edges violated": e},
         "seconds": 1.0, "command": "c", "commit": "d", "machine": "m"}
        for row, seed, top, e in (
            ("hyperbolic cones", 0, 0.5, 0.2), ("hyperbolic cones", 1, 0.7, 0.2),
            ("Euclidean control", 0, 0.55, 0.1), ("Euclidean control", 1, 0.55, 0.1),
        )
    ]  # fmt: skip
    text = geometry.markdown({"setting": {}, "runs": runs})
    cones, flat = (next(x for x in text.splitlines() if f"| {row} |" in x) for row, *_ in
                   (("hyperbolic cones",), ("Euclidean control",)))  # fmt: skip
    assert "**0.600** ± 0.141" in cones
    assert "| 0.550 ± 0.000" in flat
    assert "**0.100** ± 0.000" in flat  # fewer violated edges are better
    assert "**0.200**" not in cones
    assert geometry.MISSING in flat


def test_pictures_come_in_epochs_and_texts_by_weight(geometry: ModuleType, features: Any) -> None:
    draw = features.tensors["draw"].clone()
    draw[10:] = 0
    batches = list(geometry.Batches({**features.tensors, "draw": draw}, 5, 24, 0))
    pictures = torch.cat([b["image"]["index"] for b in batches])
    assert len(batches) == 5
    assert sorted(pictures[:60].tolist()) == list(range(60))
    assert sorted(pictures[60:].tolist()) == list(range(60))
    assert int(torch.cat([b["text"]["index"] for b in batches]).max()) < 10


def test_a_draw_has_one_row_of_each_label(geometry: ModuleType) -> None:
    labels, rows = torch.tensor([2, 0, 2, 5, 0]), torch.tensor([10, 11, 12, 13, 14])
    groups = geometry.Groups(labels, rows)
    seen = set()
    for _ in range(40):
        of, drawn = groups.draw()
        assert of.tolist() == [0, 2, 5]
        assert all(labels[rows == r].item() == want for r, want in zip(drawn, of, strict=True))
        seen |= set(drawn.tolist())
    assert seen == set(rows.tolist())


def test_strays_are_counted_by_the_nearest_domain(geometry: ModuleType) -> None:
    leaves = LeafSpace(load_taxonomy())
    roots = (leaves.depth == 1).nonzero()[:, 0].tolist()
    nodes = torch.zeros(len(leaves.nodes), len(roots))
    for i, name in enumerate(leaves.nodes):
        nodes[i, roots.index(leaves.node_index[leaves.taxonomy.path(name).ids[0]])] = 1
    below = int((leaves.depth > 1).sum())
    distance = lambda a, b, c: torch.cdist(a, b)  # noqa: E731
    assert geometry.strays(distance, nodes, leaves, 1.0) == 0
    child = int((leaves.depth == 2).nonzero()[0])
    nodes[child] = nodes[roots[-1]]
    assert geometry.strays(distance, nodes, leaves, 1.0) == pytest.approx(1 / below)


def test_average_precision_is_one_where_categories_come_first(
    geometry: ModuleType, features: Any
) -> None:
    from hysafe.score.leaves import NodeTable
    from hysafe.taxonomy import Policy

    table = NodeTable(Policy().apply(load_taxonomy()))
    samples = features.validation
    margins = torch.zeros(len(samples), len(table.ids))
    for i, s in enumerate(samples):
        if s.nodes[0] in table.index:
            margins[i, table.index[s.nodes[0]]] = 1
    assert geometry.mean_average_precision(margins, samples, table) == 1
    assert geometry.mean_average_precision(-margins, samples, table) < 0.1
