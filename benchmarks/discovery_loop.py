"""Discovery end to end: a category that no node names is found, named, accepted and retrieved.

``python benchmarks/discovery_loop.py``: the sentences of the contrast set's test and validation parts,
and the risky training sentences of the hidden categories, are scanned (the tower was trained with
both; only the taxonomy lacks a category). Then, one hidden category at a time, they are judged again
under a taxonomy without it, discovered, accepted and judged again. *novel*: share of the hidden
category's risky sentences flagged as novel, and of all other sentences. A simulated person accepts a
proposal where at least half of its members are of the hidden category, and changes nothing in it. *new
node*: precision and recall of the items whose first node is an accepted one; AP: ranking by its score.
*own words*: the same where the new node has the hidden category's own name, definition and synonyms, as
a person might write it.

``--pictures mini --hidden S.b6 S.b2``: the same for pictures of one kind among Tiny-ImageNet's validation
pictures. The taxonomy lacks the node; the tower was trained with such pictures. Novelty, and the cones of new
nodes, are calibrated on half of the other pictures. ``--pictures runs/held_out/model`` hides classes
(``--classes``, joined by ``+`` to groups) that the tower was trained without.

``--both 7.2 S.b6``: one collection of the texts and the pictures, whose taxonomy lacks a category of the
texts and a node of the pictures; proposals of both are accepted at once.

``--clusters`` compares ways to cluster on intents of CLINC150 and on categories of the contrast set,
with strays, and ways to compare phrases with items.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform

from hysafe.app.discover import discover, novel_places
from hysafe.app.pipeline import SafetyModel, ScanOptions, load
from hysafe.app.rescore import rescore
from hysafe.app.scan import scan
from hysafe.app.search import rank_by_node
from hysafe.data.contrast import contrast_set
from hysafe.data.sources import data_root, iter_samples
from hysafe.discover import Proposal, accepted_policy, find_clusters
from hysafe.discover.clusters import silhouettes
from hysafe.evaluate.metrics import detection
from hysafe.evaluate.novelty_data import read_held_out
from hysafe.geometry import Points
from hysafe.guard.naming import Whitening
from hysafe.index import Collection
from hysafe.score.calibration import quantile_grid
from hysafe.taxonomy import Policy, Taxonomy, load_taxonomy
from hysafe.types import Sample

COLUMNS = ("hidden", "items", "novel", "of others", "clusters", "accepted", "new node P", "R", "AP",
           "own words P", "R", "AP")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument(
        "--hidden", nargs="*", help="nodes, one at a time (default for texts: 2.5 6.4 7.2)"
    )
    parser.add_argument("--pictures", metavar="MODEL", help="pictures, with this model")
    parser.add_argument("--classes", nargs="*", help="default: all held-out ones; A+B is one group")
    parser.add_argument("--both", nargs=2, metavar="NODE", help="hidden in texts and in pictures")
    parser.add_argument("--words", action="store_true", help="new nodes without examples")
    parser.add_argument("--clusters", action="store_true", help="compare ways to cluster and name")
    parser.add_argument("--namer", default="phrases")
    parser.add_argument("--min-size", type=int, default=8)
    a = parser.parse_args()
    if a.clusters:
        compare(load(a.model), a.data)
        return
    with tempfile.TemporaryDirectory() as folder:
        if a.both:
            rows = both(*a.both, Path(folder), a)
        elif a.pictures:
            rows = pictures(Path(folder), a)
        else:
            rows = texts(a.hidden or ("2.5", "6.4", "7.2"), Path(folder), a)
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        numbers, called = [], []
        for hidden, row, names in rows:
            print("| " + " | ".join([hidden, *map(shown, row)]) + " |", flush=True)
            numbers.append(row)
            called += [f"{hidden}: {name}" for name in names]
    means = [statistics.fmean(column) for column in zip(*numbers, strict=True)]
    print("| **mean** | " + " | ".join(map(shown, means)) + " |\n")
    print("\n".join(called))


def shown(value: float) -> str:
    return f"{value:.0f}" if value == int(value) and value > 1 else f"{value:.3f}"


# ---------------------------------------------------------------- the loop

Row = tuple[str, list[float], list[str]]


def texts(hidden: Sequence[str], folder: Path, a: Namespace) -> Iterator[Row]:
    """Loop of each hidden category of the contrast set."""
    samples, source = _sentences(hidden, folder)
    model = load(a.model)
    scan([str(source)], folder / "scan", model, options=ScanOptions(256, 0), report=False)
    collection = Collection.open(folder / "scan")
    full = load_taxonomy()
    for category in hidden:
        truth = np.array([s.nodes == (category,) and not s.safe for s in samples])
        asked = _with(model, without(full, category))
        label = f"{category} {full[category].name}"
        one = Hidden(label, truth, _words(full, category))
        yield from loop(collection, asked, [one], folder / category, a)


def pictures(folder: Path, a: Namespace) -> Iterator[Row]:
    """Loop of each hidden node, or else of each held-out class of Tiny-ImageNet, among the validation
    pictures of the others."""
    samples, source = _pictures(a.data, folder)
    names = [str(s.extra["name"]) for s in samples]
    chains = {str(s.extra["name"]): tuple(s.extra["hypernyms"]) for s in samples}
    held_out = read_held_out(None)
    model, hidden = load(a.pictures), a.hidden
    scan([str(source)], folder / "all", model, options=ScanOptions(256, 0), report=False)
    whole = Collection.open(folder / "all")
    order = [int(Path(x).stem) for x in whole.to_arrow(["source"])["source"].to_pylist()]
    names = [names[i] for i in order]
    nodes = [samples[i].nodes for i in order]
    vectors = whole.vectors()[1]
    known = np.array([hidden is not None or n not in held_out for n in names])
    for wanted in hidden or a.classes or held_out:
        group, tree = wanted.split("+"), model.taxonomy
        truth = np.array([n in group for n in names])
        if hidden:
            truth, tree = np.array([wanted in own for own in nodes]), without(tree, wanted)
        # every other picture of the known classes calibrates, the rest is the collection
        keep = truth | (known & (np.arange(len(names)) % 2 == 0))
        ordinary = vectors[known & ~keep]
        asked = _calibrated(_with(model, tree), ordinary)
        place = folder / wanted.replace(" ", "_")
        place.mkdir()
        for row in np.flatnonzero(keep):
            link = place / f"{row:06d}.jpg"
            link.symlink_to(source / f"{order[row]:06d}.jpg")
        scan([str(place)], place / "scan", asked, options=ScanOptions(256, 0), report=False)
        collection = Collection.open(place / "scan")
        if hidden:
            own = _words(model.taxonomy, wanted)
            wanted = f"{wanted} {own['name']}"
        else:
            own = {
                "parent": "D2", "name": " or ".join(group),
                "definition": f"A picture of a {' or a '.join(group)}.",
                "synonyms": list(dict.fromkeys(c for n in group for c in (n, *chains[n][-2:]))),
            }  # fmt: skip
        yield from loop(collection, asked, [Hidden(wanted, truth[keep], own)], place / "loop", a)


def both(said: str, shown: str, folder: Path, a: Namespace) -> Iterator[Row]:
    """Loop of a collection that hides a category of the texts and a node of the pictures."""
    model, options = load(a.model), ScanOptions(256, 0)
    sentences, texts_file = _sentences([said], folder)
    samples, source = _pictures(a.data, folder)
    # every other picture of the known kinds calibrates, the rest is in the collection
    rest = [i for i, s in enumerate(samples) if i % 2 and shown not in s.nodes]
    (folder / "rest").mkdir()
    for i in rest:
        (source / f"{i:06d}.jpg").rename(folder / "rest" / f"{i:06d}.jpg")
    scan([str(folder / "rest")], folder / "ordinary", model, options=options, report=False)
    tree = without(without(model.taxonomy, said), shown)
    vectors = Collection.open(folder / "ordinary").vectors()[1]
    asked = _calibrated(_with(model, tree), vectors)
    scan([str(texts_file), str(source)], folder / "scan", asked, options=options, report=False)
    collection = Collection.open(folder / "scan")
    sources = collection.to_arrow(["source"])["source"].to_pylist()
    drawn = np.array([Path(x).suffix == ".jpg" for x in sources])
    texts, pictures = np.zeros((2, len(sources)), bool)
    texts[~drawn] = [s.nodes == (said,) and not s.safe for s in sentences]
    pictures[drawn] = [
        shown in samples[int(Path(x).stem)].nodes
        for x, p in zip(sources, drawn, strict=True) if p
    ]  # fmt: skip
    hidden = [
        Hidden(f"{node} {model.taxonomy[node].name}", truth, _words(model.taxonomy, node))
        for node, truth in ((said, texts), (shown, pictures))
    ]
    yield from loop(collection, asked, hidden, folder / "loop", a)


def _sentences(hidden: Sequence[str], folder: Path) -> tuple[list[Sample], Path]:
    """The contrast set's sentences, and a file of them."""
    samples = contrast_set(("validation", "test"))
    # so that a category is no needle in a haystack: all that there is of it
    samples += [s for s in contrast_set("train") if s.nodes[0] in hidden and not s.safe]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": s.text}) + "\n" for s in samples))
    return samples, source


def _pictures(data: str | None, folder: Path) -> tuple[list[Sample], Path]:
    """Tiny-ImageNet's validation pictures, and a folder of them, by number."""
    path = data_root(data) / "images" / "tiny_imagenet" / "val.parquet"
    samples = list(iter_samples(str(path), "tiny_imagenet"))
    source = folder / "pictures"
    source.mkdir()
    for i, s in enumerate(samples):
        (source / f"{i:06d}.jpg").write_bytes(s.image or b"")
    return samples, source


class Hidden(NamedTuple):
    """What a taxonomy lacks: its items [n], and the node as a person might write it."""

    label: str
    truth: np.ndarray
    own: dict[str, Any]


def loop(
    collection: Collection, model: SafetyModel, hidden: Sequence[Hidden], folder: Path, a: Namespace
) -> Iterator[Row]:  # fmt: skip
    """Before and after for each of what is hidden, with all proposals accepted at once; and the names
    of those that were."""
    rescore(collection, model, out=folder / "before", report=False)
    before = Collection.open(folder / "before")
    novel = np.isin(np.arange(len(before)), novel_places(before))
    found = discover(before, model, namer=a.namer, min_size=a.min_size)
    proposals = [in_words(p) for p in found.proposals] if a.words else found.proposals
    chosen = [
        [p for p in proposals if h.truth[found.members(p)].mean() >= 0.5] for h in hidden
    ]  # fmt: skip
    keys = sorted({p.key for own in chosen for p in own})
    policy, nodes = (
        accepted_policy(proposals, Policy(), model.taxonomy, only=keys) if keys else (Policy(), {})
    )
    for k, ((label, truth, own), mine) in enumerate(zip(hidden, chosen, strict=True)):
        row: list[float] = [int(truth.sum()), novel[truth].mean(), novel[~truth].mean(),
                            len(proposals), len(mine)]  # fmt: skip
        new = [nodes[p.key] for p in mine]
        row += (
            figures(before, model, truth, folder / f"after{k}", policy, new) if new else [0.0] * 3
        )
        words = Policy.from_dict({"name": "own words", "nodes": {"x.1": own}})
        row += figures(before, model, truth, folder / f"own{k}", words, ["x.1"])
        names = [
            f"{p.name} (below {p.parent}, {p.size} items, purity {p.purity:.2f}, agreement "
            f"{p.agreement:.2f}, {truth[found.members(p)].mean():.0%} hidden; also "
            f"{', '.join(p.rule['synonyms'][1:])})" for p in mine
        ]  # fmt: skip
        yield label, row, names


def in_words(proposal: Proposal) -> Proposal:
    """Without examples."""
    rule = {k: v for k, v in proposal.rule.items() if k != "example_texts"}
    return replace(proposal, rule=rule, pictures=())


def figures(
    before: Collection, model: SafetyModel, truth: np.ndarray, folder: Path, policy: Policy,
    nodes: Sequence[str],
) -> list[float]:  # fmt: skip
    """Precision and recall of the first node, AP of the greatest of the nodes' scores."""
    rescore(before, model, policy, out=folder, report=False)
    after = Collection.open(folder)
    first = np.isin(np.array(after.to_arrow(["node"])["node"].to_pylist(), dtype=str), nodes)
    scores = np.zeros(len(truth))
    for node in nodes:
        for place, score, _ in rank_by_node(after, model, model.view(policy), node, k=len(truth)):
            scores[place] = max(scores[place], score)
    ranked = torch.from_numpy(scores)
    hit = (first & truth).sum()
    return [hit / max(1, first.sum()), hit / truth.sum(),
            detection(ranked[~truth], ranked[truth]).aupr]  # fmt: skip


def _words(taxonomy: Taxonomy, node: str) -> dict[str, Any]:
    """A node in its own words, as a policy adds it; a harmless one below D2."""
    own = taxonomy[node]
    parent = own.parent if own.risky else "D2"
    return {"parent": parent, "name": own.name, "definition": own.definition,
            "synonyms": list(own.synonyms)}  # fmt: skip


def without(taxonomy: Taxonomy, category: str) -> Taxonomy:
    """The taxonomy as if nobody had thought of a category: without its concepts and sibling."""
    gone = {category, taxonomy[category].sibling, *(n.id for n in taxonomy.descendants(category))}
    kept = [n for n in taxonomy if n.id not in gone]
    return Taxonomy(kept, name=taxonomy.name, version=taxonomy.version)


def _with(model: SafetyModel, taxonomy: Taxonomy) -> SafetyModel:
    """The model over another taxonomy."""
    made = SafetyModel(
        model.encoder, taxonomy, model.calibration, name=model.name, reference=model.reference
    )
    made._features.update(model._features)  # the phrases are encoded once
    return made


def _calibrated(model: SafetyModel, ordinary: np.ndarray) -> SafetyModel:
    """The model with p-values, and cones of new nodes, by ordinary pictures; the slope is that of `mini`."""
    view = model.view()
    _, apexes = model.place(view)
    tangents = torch.from_numpy(ordinary)
    points = Points.from_tangent(tangents.double(), apexes.c, apexes.geometry)
    _, scores = model._scores(points, view, "image")
    grids = (quantile_grid(scores.energy), quantile_grid(scores.policy_evidence))
    slope = load("mini", towers=False).calibration.channel("image")
    fit = replace(slope, distribution=grids[0], policy=grids[1], n=len(ordinary))
    made = SafetyModel(
        model.encoder, model.taxonomy, replace(model.calibration, channels={
            **model.calibration.channels, "image": fit,
        }), name=model.name,
        reference={**model.reference, "image": tangents},
    )  # fmt: skip
    made._features.update(model._features)
    return made


# ---------------------------------------------------------------- ways to cluster and to name


def compare(model: SafetyModel, data: str | None, seeds: int = 8, least: int = 8) -> None:
    """Print how well each way of clustering finds hidden groups, and of naming the category."""
    encode = _encoder(model)
    path = data_root(data) / "text" / "clinc150.jsonl"
    rows = [s for s in iter_samples(str(path), "hysafe_text") if s.extra["split"] == "test"]
    intents = np.array(["/".join(s.extra["labels"]) for s in rows])
    queries = encode([str(s.text) for s in rows])
    core = [s for s in contrast_set(("validation", "test")) if not s.extra["form"]]
    nodes = np.array([s.nodes[0] for s in core])
    sentences = encode([str(s.text) for s in core])
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        inside = np.array([i for i in np.unique(intents) if i != "out-of-scope"])
        risky = np.array([n for n in np.unique(nodes) if not n.startswith("S")])
        for name, vectors, labels, hidden, strays in (
            ("CLINC150", queries, intents, rng.choice(inside, 12, replace=False), 100),
            ("contrast", sentences, nodes, rng.choice(risky, 3, replace=False), 40),
        ):
            own = np.flatnonzero(np.isin(labels, hidden))
            others = np.flatnonzero(~np.isin(labels, hidden))
            if name == "CLINC150":
                others = np.flatnonzero(labels == "out-of-scope")
            chosen = np.concatenate((own, rng.choice(others, strays, replace=False)))
            truth = np.where(np.arange(len(chosen)) < len(own), labels[chosen], "")
            for way, groups in _ways(model, vectors, chosen, least).items():
                found.setdefault((name, way), []).append(_found(groups, truth))
    print(
        "| items | way | best F1 of a group | purity | items in clusters |\n|---|---|---|---|---|"
    )
    for (name, way), values in sorted(found.items()):
        f1, purity, share = np.mean(values, axis=0)
        print(f"| {name} | {way} | {f1:.2f} | {purity:.2f} | {share:.2f} |")
    _compare_names(model, core, sentences)


def _encoder(model: SafetyModel) -> Callable[[Sequence[str]], np.ndarray]:
    def encode(texts: Sequence[str]) -> np.ndarray:
        parts = [model.encode_text(texts[i : i + 256]) for i in range(0, len(texts), 256)]
        return np.concatenate([p.tangent().double().numpy() for p in parts])

    return encode


def _ways(
    model: SafetyModel, vectors: np.ndarray, chosen: np.ndarray, least: int
) -> dict[str, list[np.ndarray]]:
    """Groups by each way of clustering."""
    own = vectors[chosen]
    points = Points.from_tangent(torch.from_numpy(own), model.encoder.c)
    geodesic = squareform(points.dist(points).numpy(), checks=False)
    centred = own - vectors.mean(0)
    units = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    whitening = Whitening.fit(vectors)
    white = (own - whitening.mean) @ whitening.matrix
    directions = whitening.directions(own)
    ways = {
        "geodesic, average": (geodesic, "average"),
        "tangent, average": (pdist(own), "average"),
        "tangent, Ward": (pdist(own), "ward"),
        "centred directions, average": (pdist(units), "average"),
        "whitened, average": (pdist(white), "average"),
        "whitened, Ward": (pdist(white), "ward"),
        "whitened directions, Ward": (pdist(directions), "ward"),
    }
    found = {name: _best_cut(d, method, least) for name, (d, method) in ways.items()}
    clusters = find_clusters(own, whitening, min_size=least)
    return found | {"**whitened directions, average**": [c.members for c in clusters]}


def _best_cut(condensed: np.ndarray, method: str, least: int) -> list[np.ndarray]:
    """Groups at the cut with the best silhouette among two groups and more."""
    tree, distances = linkage(condensed, method), squareform(condensed)
    best: tuple[float, list[np.ndarray]] = (-1.0, [])
    for count in range(2, max(3, len(distances) // least)):
        labels = fcluster(tree, count, "maxclust")
        groups = [g for k in np.unique(labels) if len(g := np.flatnonzero(labels == k)) >= least]
        # without the bound for unrelated directions, which is for unit vectors
        if len(groups) < 2:
            continue
        each = silhouettes(distances / distances.max(), groups)
        score = sum(len(g) * s * abs(s) for g, s in zip(groups, each, strict=True))
        if score > best[0]:
            best = score, groups
    return best[1]


def _found(groups: Sequence[np.ndarray], truth: np.ndarray) -> tuple[float, float, float]:
    """Mean over true groups of the best F1 of a cluster; purity; share of items in clusters."""
    if not groups:
        return 0.0, 0.0, 0.0
    best = []
    for label in sorted(set(truth) - {""}):
        own = truth == label
        best.append(max(2 * own[g].sum() / (len(g) + own.sum()) for g in groups))
    most = sum(np.unique(truth[g], return_counts=True)[1].max() for g in groups)
    size = sum(map(len, groups))
    return float(np.mean(best)), most / size, size / len(truth)


def _compare_names(model: SafetyModel, core: Sequence[Any], sentences: np.ndarray) -> None:
    """How often the nearest phrase of the taxonomy is of a risky sentence's own category."""
    taxonomy = model.taxonomy
    banks = [
        (taxonomy.path(n.id).ids[1], p) for n in taxonomy if n.kind in ("category", "concept")
        for p in (n.name, *n.synonyms)
    ]  # fmt: skip
    phrases = _encoder(model)([p for _, p in banks])
    owner = np.array([i for i, _ in banks])
    rows = [k for k, s in enumerate(core) if not s.safe]
    truth, items = np.array([core[k].nodes[0] for k in rows]), sentences[rows]
    c = model.encoder.c
    near = Points.from_tangent(torch.from_numpy(items), c).dist(
        Points.from_tangent(torch.from_numpy(phrases), c)
    )
    whitening = Whitening.fit(sentences)
    seen = whitening.directions(phrases, mean=phrases.mean(0))
    print("\n| phrases compared by | right category |\n|---|---|")
    for name, scores in (
        ("geodesic distance", -near.numpy()),
        ("**whitened directions**", whitening.directions(items) @ seen.T),
    ):
        print(f"| {name} | {(owner[scores.argmax(1)] == truth).mean():.3f} |")


if __name__ == "__main__":
    main()
