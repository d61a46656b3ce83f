"""Thresholds from labels: chosen on one part, measured on the other, written as a policy that holds."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hysafe.app.calibrate import (
    Calibrated,
    Label,
    RatingFigures,
    _scored,
    calibrate,
    calibrated_json,
    decided_labels,
    read_labels,
    write_policy,
)
from hysafe.app.cli import main
from hysafe.app.pipeline import SafetyModel, load
from hysafe.app.scan import collection_meta
from hysafe.app.stored import judge_items
from hysafe.errors import ConfigError, InputError
from hysafe.index import Collection, CollectionWriter, Decision, EncodedItem
from hysafe.score.thresholds import Counts, Rate, Target, choose_threshold, count_at
from hysafe.taxonomy import Policy

NODES = ("6.1", "6.2", "7.4", "1.1", "S.6.1", "S.7.4", "S.b1", "S.b2")
EACH = 26
PRECISION = Target("precision", 0.8)


@pytest.fixture(scope="module")
def model() -> SafetyModel:
    """The bundled model's heads; no tower is needed for stored points."""
    return load("mini", towers=False)


@pytest.fixture(scope="module")
def folder(model: SafetyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items scattered around the apexes of a few nodes, so that their truth is known."""
    out = tmp_path_factory.mktemp("calibrate") / "out"
    out.mkdir()
    view = model.view()
    table, apexes = model.place(view)
    tangents, rng = apexes.tangent().numpy(), np.random.default_rng(0)
    items = []
    for node in NODES:
        apex = tangents[table.index[node]]
        length = float(np.linalg.norm(apex))
        for i in range(EACH):
            noise = rng.normal(size=len(apex)) / np.sqrt(len(apex))
            spread = 0.3 if node == "S.b1" else 1.5  # only what lies near a node is rated safe
            point = (1.3 * apex + spread * length * noise).astype(np.float32)
            name = f"{node}/{i}"
            digest = hashlib.sha256(name.encode()).hexdigest()
            items.append(EncodedItem(name, name, "text", digest, {"text": point[None]}))
    items.append(EncodedItem("broken", "broken", "image", "", {}))
    rng.shuffle(items)  # type: ignore[arg-type]
    judged = model.judge_encoded(items, view, reading=model.hash, reads=False)
    meta = collection_meta(model, view, reading=model.hash, reads=False)
    CollectionWriter.write(out, meta, [[j.row for j in judged]])
    (out / "results.jsonl").write_text(
        "".join(json.dumps(j.result.to_dict()) + "\n" for j in judged)
    )
    return out


@pytest.fixture(scope="module")
def collection(folder: Path) -> Collection:
    return Collection.open(folder)


def truth(**changed: Label) -> list[Label]:
    """The labels of all items, in the order of the nodes."""
    labels = [
        Label(f"{node}/{i}", nodes=() if node.startswith("S") else (node,))
        for node in NODES for i in range(EACH)
    ]  # fmt: skip
    return [changed.get(label.id, label) for label in labels]


def chosen_part(label: Label, seed: int = 0) -> bool:
    """The split, written again."""
    content = hashlib.sha256(label.id.encode()).hexdigest()
    digest = hashlib.sha256(f"{seed}/{content}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < 0.5


@pytest.fixture(scope="module")
def made(collection: Collection, model: SafetyModel) -> Calibrated:
    return calibrate(collection, model, truth(), PRECISION, review=0.2, use="all")


def results(collection: Collection, model: SafetyModel, policy: Policy) -> dict[str, Any]:
    view = model.view(policy)
    return {
        j.result.id: j.result
        for items in collection.items()
        for j in judge_items(collection, model, view, items)
    }


def scores(collection: Collection, model: SafetyModel) -> dict[str, tuple[float, dict[str, float]]]:
    """p_unsafe and scores of nodes by item, unrounded."""
    view = model.view()
    table, _ = model.place(view)
    found = {}
    for items in collection.items():
        text = model.score_encoded(items, view)["text"]
        for i, k in text.at.items():
            found[items[i].id] = (
                text.p_unsafe[k], dict(zip(table.ids, text.nodes[k].tolist(), strict=True))
            )  # fmt: skip
    return found


# ---------------------------------------------------------------- the policy that comes out


@pytest.mark.parametrize("target", ["precision=0.8", "recall=0.95", "cost=4:1"])
def test_the_threshold_of_p_unsafe_is_where_the_rating_turns(
    collection: Collection, model: SafetyModel, target: str
) -> None:
    found = calibrate(collection, model, truth(), Target.parse(target), use="none")
    assert found.p_unsafe.chosen
    assert not any(n.chosen for n in found.nodes)
    threshold = found.p_unsafe.now
    said = {k: p for k, (p, _) in scores(collection, model).items()}
    rated = results(collection, model, found.policy)
    assert threshold != 0.5
    for name, p in said.items():
        assert (rated[name].rating == "unsafe") == (p >= threshold), name
    assert found.after.unsafe == found.p_unsafe.reached
    assert set(found.policy.rules) == {f"D{i}" for i in range(1, 13)}


def test_entries_of_a_policy_stay_and_its_own_thresholds_too(
    collection: Collection, model: SafetyModel
) -> None:
    given = Policy.from_dict({
        "name": "shop",
        "nodes": {
            "D5": {"status": "non_violating"},
            "5.1": {"status": "default"},
            "8.1": {"status": "sensitive"},
            "9.1": {"threshold": 0.7},
            "6.1": {"status": "sensitive", "synonyms": ["a", "b"]},
        },
    })  # fmt: skip
    given = replace(given, rules={k: replace(r, synonyms=()) for k, r in given.rules.items()})
    found = calibrate(collection, model, truth(), PRECISION, policy=given, use="all")
    view = model.view(found.policy)
    t = found.p_unsafe.now
    own = {n.node: n.now for n in found.nodes if n.chosen}
    assert {"6.1", "6.2", "7.4", "1.1"} <= set(own)
    for node, rule in given.rules.items():
        assert found.policy.rules[node].status == rule.status
    assert view.threshold("8.1") == 0.25
    assert view.threshold("9.1") == 0.7
    assert view.threshold("5.1") == view.threshold("6.3") == view.threshold("12.2") == t
    assert not view.active("5.2")
    assert {n: view.threshold(n) for n in own} == own
    assert not {"8.1", "9.1", "5.2", *own} & set(found.followers)
    assert {"5.1", "6.3", "12.2"} <= set(found.followers)
    assert found.policy.name == "shop calibrated"
    # calibrated again, with other labels: nothing is left of the first time but what was given
    again = calibrate(
        collection, model, truth(), Target("recall", 0.7), policy=found.policy, use="all"
    )
    fresh = calibrate(collection, model, truth(), Target("recall", 0.7), policy=given, use="all")
    assert again.policy == fresh.policy


def test_a_sensitive_node_is_no_follower_of_the_same_number(
    collection: Collection, model: SafetyModel
) -> None:
    """The threshold that is chosen here happens to be that of sensitive nodes."""
    given = Policy.from_dict({
        "name": "shop",
        "nodes": {**{f"D{i}": {"threshold": 0.25} for i in range(1, 13)},
                  "8.1": {"status": "sensitive"}},
    })  # fmt: skip
    found = calibrate(collection, model, truth(), PRECISION, policy=given, use="none")
    assert "8.1" not in found.followers
    assert "8.2" in found.followers
    assert model.view(found.policy).threshold("8.1") == 0.25


def test_a_policy_that_is_written_is_read_and_rated_alike(
    collection: Collection, model: SafetyModel, made: Calibrated, tmp_path: Path
) -> None:
    write_policy(tmp_path / "a" / "policy.yaml", made, collection)
    text = (tmp_path / "a" / "policy.yaml").read_text()
    read = Policy.load(tmp_path / "a" / "policy.yaml")
    assert read.hash == made.policy.hash
    assert read.name == "calibrated"
    assert collection.meta.model in text
    assert "precision=0.8, seed 0" in text
    # some that look harmless are not: they are rated safe, wrongly
    labels = truth(**{f"S.b1/{i}": Label(f"S.b1/{i}", nodes=("6.1",)) for i in range(8)})
    found = calibrate(collection, model, labels, PRECISION, use="all")
    rated = results(collection, model, found.policy)
    measured = [label for label in labels if not chosen_part(label)]
    said = [(rated[label.id].rating, bool(label.nodes)) for label in measured]
    assert found.measured_on == len(measured)
    assert found.after.unsafe.found == said.count(("unsafe", True))
    assert found.after.unsafe.alarms == said.count(("unsafe", False)) > 0
    assert found.after.unsafe.missed == said.count(("safe", True)) + said.count(("review", True))
    assert found.after.review.hits == sum(r == "review" for r, _ in said)
    wrong = said.count(("unsafe", False)), said.count(("safe", True))
    assert found.after.error.hits == sum(wrong)
    assert min(wrong) > 0
    assert found.after.error.n == len(measured) - found.after.review.hits
    with pytest.raises(InputError, match="cannot be written"):
        write_policy(tmp_path / "a" / "policy.yaml" / "x.yaml", made, collection)


# ---------------------------------------------------------------- honest figures


def test_thresholds_are_those_of_one_part_and_figures_those_of_the_other(
    collection: Collection, model: SafetyModel, made: Calibrated
) -> None:
    said = scores(collection, model)
    labels = truth()
    known = {n.node: n for n in made.nodes}
    for node in ("6.1", "D6", "7.4", "1.1"):
        parts = {}
        for part in (True, False):
            mine = [label for label in labels if chosen_part(label) == part]
            parts[part] = (
                torch.tensor([said[label.id][1][node] for label in mine]).double(),
                torch.tensor([
                    any(n == node or f"D{n.split('.')[0]}" == node for n in label.nodes or ())
                    for label in mine
                ]),
            )  # fmt: skip
        wanted = choose_threshold(*parts[True], PRECISION)
        found = known[node]
        assert found.chosen
        assert found.now == wanted
        assert found.reached == count_at(*parts[False], found.now)
        assert found.positives == EACH * (2 if node == "D6" else 1)


def test_labels_of_the_measuring_part_decide_nothing(
    collection: Collection, model: SafetyModel, made: Calibrated
) -> None:
    turned = [
        label if chosen_part(label) else replace(label, safe=bool(label.nodes))
        for label in truth()
    ]  # fmt: skip
    found = calibrate(collection, model, turned, PRECISION, review=0.2)
    base = calibrate(collection, model, truth(), PRECISION, review=0.2)
    assert found.policy == base.policy
    assert found.use == base.use != "all"
    assert [(b.low, b.high) for b in found.curve] == [(b.low, b.high) for b in base.curve]
    assert found.after.error.value > 0.6 > base.after.error.value
    other = calibrate(collection, model, truth(), PRECISION, seed=1)
    assert other.chosen_on != made.chosen_on or other.p_unsafe != made.p_unsafe


def test_rare_nodes_keep_theirs_and_are_named(
    collection: Collection, model: SafetyModel, made: Calibrated
) -> None:
    for node in made.nodes:
        if node.positives < 20:
            assert not node.chosen
            assert node.why == "fewer than 20 positives"
    found = calibrate(collection, model, truth(), PRECISION, least=EACH + 1, use="all")
    assert {n.node for n in found.nodes if n.chosen} == {"D6"}
    # categories below a domain with a threshold of its own still follow p_unsafe
    assert model.view(found.policy).threshold("6.1") == found.p_unsafe.now
    hard = calibrate(collection, model, truth(), Target("precision", 1.0))
    kept = [n for n in hard.nodes if n.why == "precision=1 not reached"]
    assert all(not n.chosen and n.now == hard.p_unsafe.now for n in kept)


@pytest.mark.parametrize("target", ["precision=0.8", "recall=0.9", "cost=4:1"])
def test_nodes_get_thresholds_as_far_as_the_rating_keeps_its_target(
    collection: Collection, model: SafetyModel, target: str
) -> None:
    wanted = Target.parse(target)
    labels = [label for label in truth() if chosen_part(label)]
    # measured on what was chosen on: the other part has the labels of the same items
    found = {use: calibrate(collection, model, truth(), wanted, use=use)  # type: ignore[arg-type]
             for use in ("all", "above", "none", "auto")}  # fmt: skip
    t = found["none"].p_unsafe.now
    assert all(n.now >= t for n in found["above"].nodes if n.chosen)
    assert all(n.chosen == (n.proposal is not None) for n in found["all"].nodes)
    assert not any(n.chosen for n in found["none"].nodes)
    for n in found["none"].nodes:
        assert (n.why == "left out of the policy") == (n.proposal is not None)

    def figures(use: str) -> RatingFigures:
        rated = results(collection, model, found[use].policy)
        said = Counter((rated[lb.id].rating == "unsafe", bool(lb.nodes)) for lb in labels)
        counts = Counts(said[True, True], said[True, False], said[False, True], said[False, False])
        return RatingFigures(counts, Rate(0, 1), Rate(0, 1))

    alone = figures("none")
    holding = [use for use in ("all", "above", "none") if figures(use).holds(wanted, alone)]
    assert found["auto"].use == holding[0]
    assert found["auto"].policy == found[holding[0]].policy


def test_a_rating_holds_where_it_is_no_worse() -> None:
    def rating(*counts: int) -> RatingFigures:
        return RatingFigures(Counts(*counts), Rate(0, 1), Rate(0, 1))

    alone = rating(80, 10, 20, 90)
    for target, figures, holds in (
        ("precision=0.8", rating(80, 18, 20, 82), True),  # less precise, still at the target
        ("precision=0.85", rating(80, 18, 20, 82), False),
        ("precision=0.95", rating(80, 10, 20, 90), True),  # neither reaches it
        ("precision=0.8", rating(40, 5, 60, 95), False),  # at the price of recall
        ("recall=0.75", rating(76, 10, 24, 90), True),
        ("recall=0.8", rating(79, 10, 21, 90), False),
        ("recall=0.8", rating(95, 80, 5, 20), False),  # at the price of precision
        ("cost=1:1", rating(81, 11, 19, 89), True),
        ("cost=1:2", rating(81, 11, 19, 89), False),
        ("precision=0.8", rating(0, 0, 100, 100), False),
    ):
        assert figures.holds(Target.parse(target), alone) == holds, (target, figures)


def test_a_rating_that_loses_one_and_wins_neither_gains_nothing() -> None:
    def rating(*counts: int) -> RatingFigures:
        return RatingFigures(Counts(*counts), Rate(0, 1), Rate(0, 1))

    before = rating(80, 20, 20, 80)
    assert not before.gains_nothing_over(before)
    assert rating(80, 30, 20, 70).gains_nothing_over(before)  # less precise
    assert rating(40, 20, 60, 80).gains_nothing_over(before)  # and finds less
    assert not rating(70, 5, 30, 95).gains_nothing_over(before)  # finds less, more precise
    assert rating(0, 0, 100, 100).gains_nothing_over(before)  # calls nothing unsafe


# ---------------------------------------------------------------- what a label says


def test_a_coarse_label_says_nothing_of_the_nodes_below(
    collection: Collection, model: SafetyModel, made: Calibrated
) -> None:
    coarse = {f"6.1/{i}": Label(f"6.1/{i}", nodes=("D6",)) for i in range(EACH)}
    found = calibrate(collection, model, truth(**coarse), PRECISION, use="all")
    known = {n.node: n for n in found.nodes}
    assert known["6.1"].positives == 0
    assert known["D6"].positives == 2 * EACH
    # its items are no alarms of 6.1 either: counted are only those whose label tells
    counts = known["6.1"].reached
    told = [lb for lb in truth(**coarse) if not chosen_part(lb) and lb.nodes != ("D6",)]
    assert counts.alarms + counts.passed == len(told)
    assert known["7.4"].reached == next(n.reached for n in made.nodes if n.node == "7.4")


def test_a_plain_verdict_says_nothing_of_nodes_and_decides_the_rating(
    collection: Collection, model: SafetyModel, made: Calibrated
) -> None:
    plain = [Label(label.id, safe=not label.nodes) for label in truth()]
    found = calibrate(collection, model, plain, PRECISION)
    assert found.p_unsafe == made.p_unsafe
    assert {n.positives for n in found.nodes} == {0}
    harmless = sum(not chosen_part(lb) and bool(lb.safe) for lb in plain)
    assert {n.reached.alarms + n.reached.passed for n in found.nodes} == {harmless}
    # what applies and what is tolerated are two things
    tolerant = [replace(lb, safe=True) if lb.nodes == ("1.1",) else lb for lb in truth()]
    found = calibrate(collection, model, tolerant, PRECISION)
    assert found.p_unsafe.positives == 3 * EACH
    assert next(n for n in found.nodes if n.node == "1.1").positives == EACH


def test_a_node_that_is_off_makes_nothing_unsafe(
    collection: Collection, model: SafetyModel
) -> None:
    off = Policy.from_dict({"nodes": {"D7": {"status": "non_violating"}}})
    found = calibrate(collection, model, truth(), PRECISION, policy=off)
    assert found.p_unsafe.positives == 3 * EACH
    assert not {n.node for n in found.nodes} & {"D7", "7.4"}
    assert found.policy.rules["D7"].threshold is None
    one = Policy.from_dict({"nodes": {"7.4": {"status": "non_violating"}}})
    found = calibrate(collection, model, truth(), PRECISION, policy=one)
    # what counts of D7 is the rest of it
    assert next(n for n in found.nodes if n.node == "D7").positives == 0
    part = Policy.from_dict({
        "nodes": {"D7": {"status": "non_violating"}, "7.1": {"status": "default"}}
    })  # fmt: skip
    vague = {f"7.4/{i}": Label(f"7.4/{i}", nodes=("D7",)) for i in range(EACH)}
    found = calibrate(collection, model, truth(**vague), PRECISION, policy=part)
    assert found.unknown == EACH  # D7 may be 7.1, which counts, or another one


def test_the_riskier_channel_speaks(model: SafetyModel, tmp_path: Path) -> None:
    view = model.view()
    table, apexes = model.place(view)
    apex = {n: apexes.tangent()[table.index[n]][None].numpy() * 1.2 for n in ("6.1", "S.b1")}
    items = [
        EncodedItem("a", "a", "image+text", "a", {"image": apex["6.1"], "text": apex["S.b1"]}),
        EncodedItem("b", "b", "image+text", "b", {"image": apex["S.b1"], "text": apex["6.1"]}),
    ]
    judged = model.judge_encoded(items, view, reading=model.hash, reads=False)
    meta = collection_meta(model, view, reading=model.hash, reads=False)
    CollectionWriter.write(tmp_path, meta, [[j.row for j in judged]])
    known = [(0, Label("a"), "a"), (1, Label("b"), "b")]
    for scored, j in zip(
        _scored(Collection.open(tmp_path), model, view, known), judged, strict=True
    ):
        assert scored.p_unsafe == pytest.approx(j.result.p_unsafe, abs=1e-4)
        assert scored.scores is not None
        top = {p.node: p.score for p in j.result.paths}
        assert scored.scores[table.index["6.1"]] == pytest.approx(top["6.1"], abs=1e-4)


def test_items_that_are_gone_or_unreadable_are_counted(
    collection: Collection, model: SafetyModel, made: Calibrated
) -> None:
    more = [*truth(), Label("gone", nodes=()), Label("broken", nodes=())]
    found = calibrate(collection, model, more, PRECISION, review=0.2, use="all")
    assert (found.absent, found.unreadable) == (1, 1)
    assert found.policy == made.policy
    assert (found.chosen_on, found.measured_on) == (made.chosen_on, made.measured_on)


# ---------------------------------------------------------------- review


def test_the_band_is_chosen_on_one_part_and_counted_on_the_other(
    collection: Collection, model: SafetyModel, made: Calibrated
) -> None:
    said = scores(collection, model)
    parts: dict[bool, list[tuple[float, bool]]] = {True: [], False: []}
    for label in truth():
        parts[chosen_part(label)].append((said[label.id][0], bool(label.nodes)))
    t = made.p_unsafe.now
    widths = []
    for band, share in zip(made.curve, (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6),
                           strict=True):  # fmt: skip
        assert band.low <= t <= band.high
        taken = sum(band.low <= p < band.high for p, _ in parts[True])
        assert share * len(parts[True]) - 1 < taken <= share * len(parts[True])
        inside = [band.low <= p < band.high for p, _ in parts[False]]
        wrong = [
            (p >= t) != bad
            for (p, bad), held in zip(parts[False], inside, strict=True) if not held
        ]  # fmt: skip
        assert (band.share.hits, band.share.n) == (sum(inside), len(inside))
        assert (band.error.hits, band.error.n) == (sum(wrong), len(wrong))
        assert band.missed + band.alarms == sum(wrong)
        widths.append((band.low, band.high))
    assert widths[0] == (t, t)
    assert made.curve[-1].error.value < made.curve[0].error.value
    assert all(a[0] >= b[0] and a[1] <= b[1] for a, b in pairwise(widths))
    assert made.chosen == made.curve[5]
    assert made.curve[0].error.value == pytest.approx(float(made.selective.risk[-1]))


def test_the_band_of_an_error_rate_is_the_narrowest_that_has_it(
    collection: Collection, model: SafetyModel
) -> None:
    said = scores(collection, model)
    mine = [(said[lb.id][0], bool(lb.nodes)) for lb in truth() if chosen_part(lb)]

    def left(band: Any, t: float) -> float:
        rest = [(p >= t) != bad for p, bad in mine if not band.low <= p < band.high]
        return sum(rest) / max(1, len(rest))

    found = calibrate(collection, model, truth(), PRECISION, review_error=0.05)
    assert found.chosen is not None
    assert left(found.chosen, found.p_unsafe.now) <= 0.05
    narrower = [b for b in found.curve if found.chosen.low < b.low or b.high < found.chosen.high]
    assert narrower
    assert all(left(b, found.p_unsafe.now) > 0.05 for b in narrower
               if found.chosen.low <= b.low and b.high <= found.chosen.high)  # fmt: skip
    whole = calibrate(collection, model, truth(), PRECISION, review_error=0.0)
    assert whole.chosen is not None
    assert left(whole.chosen, whole.p_unsafe.now) == 0
    assert whole.chosen.share.value < 0.9


# ---------------------------------------------------------------- labels and settings


def test_labels_are_read(model: SafetyModel, tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(
        '\ufeff{"id": "a\u2028", "nodes": ["6.1", "S.6.1"]}\r\n\n{"id": "b", "safe": true}\n'
        '{"id": "c", "nodes": [], "safe": false, "note": "new"}\n',
        encoding="utf-8",
    )
    assert read_labels(file, model.taxonomy) == [
        Label("a\u2028", None, ("6.1", "S.6.1")), Label("b", True), Label("c", False, ())
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2"),
        ("[1]", "line 2: expected an object"),
        ('{"nodes": []}', "line 2: expected an object with `id`"),
        ('{"id": "x"}', "line 2: `nodes` and `safe` are missing"),
        ('{"id": "x", "safe": "yes"}', "line 2: safe is 'yes'"),
        ('{"id": "x", "nodes": "6.1"}', "line 2: `nodes` is no list"),
        ('{"id": "x", "nodes": ["66.1"]}', "line 2: no node '66.1'"),
        ('{"id": "a", "safe": true}', "line 2: the id 'a' is given twice"),
    ],
)
def test_wrong_labels_are_refused(
    model: SafetyModel, tmp_path: Path, line: str, problem: str
) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text('{"id": "a", "nodes": []}\n' + line + "\n")
    with pytest.raises(InputError, match=problem):
        read_labels(file, model.taxonomy)


def test_files_without_labels_are_refused(model: SafetyModel, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no labels"):
        read_labels(tmp_path / "empty.jsonl", model.taxonomy)
    with pytest.raises(InputError, match="cannot be read"):
        read_labels(tmp_path / "none.jsonl", model.taxonomy)


def test_settings_that_cannot_be_used(collection: Collection, model: SafetyModel) -> None:
    for options, problem in (
        ({"least": 1}, "--least is 1"),
        ({"share": 1.0}, "--share is 1.0"),
        ({"review": 1.0}, "--review is 1.0"),
        ({"review_error": -0.1}, "--review-error is -0.1"),
        ({"review": 0.1, "review_error": 0.1}, "one of --review and --review-error"),
    ):
        with pytest.raises(ConfigError, match=problem):
            calibrate(collection, model, truth(), PRECISION, **options)  # type: ignore[arg-type]
    harmless = [label for label in truth() if not label.nodes]
    with pytest.raises(ConfigError, match="0 unsafe and"):
        calibrate(collection, model, harmless, PRECISION)
    with pytest.raises(InputError, match="none of the 1 labels names an item, first id 'gone'"):
        calibrate(collection, model, [Label("gone", nodes=())], PRECISION)
    off = Policy.from_dict({"nodes": {f"D{i}": {"status": "non_violating"} for i in range(1, 13)}})
    plain = [Label(label.id, safe=not label.nodes) for label in truth()]
    with pytest.raises(ConfigError, match="every category is off"):
        calibrate(collection, model, plain, PRECISION, policy=off)


# ---------------------------------------------------------------- the command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["calibrate", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_command(
    folder: Path, made: Calibrated, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "160")
    labels, out = tmp_path / "labels.jsonl", tmp_path / "policy.yaml"
    lines = [json.dumps({"id": lb.id, "nodes": list(lb.nodes or ())}) + "\n" for lb in truth()]
    labels.write_text("".join(lines) + '{"id": "gone", "safe": true}\n')
    options = (str(folder), "--labels", str(labels), "--target", "precision=0.8", "--review", "0.2",
               "--nodes", "all")  # fmt: skip
    code, shown, _ = run(capsys, *options, "--out", str(out))
    assert code == 0
    assert Policy.load(out).hash == made.policy.hash
    for words in ("1 labels name no item", "fewer than 20 positives: ", "p_unsafe", "to review",
                  "calibration error", "asked for", f"--policy {out}"):  # fmt: skip
        assert words in shown
    assert "keep the rules before" not in shown
    with monkeypatch.context() as patch:
        patch.setattr(RatingFigures, "gains_nothing_over", lambda *_: True)
        assert "keep the rules before" in run(capsys, *options)[1]
    code, shown, _ = run(capsys, *options, "--json")
    data = json.loads(shown)
    assert data == json.loads(json.dumps(calibrated_json(made))) | {
        "labels": {"chosen_on": made.chosen_on, "measured_on": made.measured_on, "unknown": 0,
                   "absent": 1, "unreadable": 0},
    }  # fmt: skip
    assert main(["rescore", str(folder), "--policy", str(out), "--out", str(tmp_path / "two")]) == 0
    capsys.readouterr()
    for wrong in (("--target", "f1=1"), ("--policy", "none.yaml"), ("--labels", "none.jsonl"),
                  ("--review", "0.1", "--review-error", "0.1")):  # fmt: skip
        try:
            code, _, error = run(capsys, *options[:3], *wrong)
        except SystemExit as end:
            code, error = int(end.code or 0), capsys.readouterr().err
        assert code == 2
        assert len(error.strip().splitlines()) == 1


def test_decisions_of_people_are_labels(
    folder: Path, made: Calibrated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    own = Collection.open(shutil.copytree(folder, tmp_path / "own"))
    code, _, error = run(capsys, str(own.folder))
    assert code == 2
    assert "no decisions of people" in error
    rows = [("unsafe" if lb.nodes else "safe", lb.id) for lb in truth()]
    time = "2026-03-01T12:00:00Z"
    own.decide([
        Decision(name, rating, "ann", time) for rating, name in rows  # type: ignore[arg-type]
    ] + [Decision("broken", "review", "ann", time)])  # fmt: skip
    assert len(decided_labels(own)) == len(rows)
    code, shown, _ = run(capsys, str(own.folder), "--target", "precision=0.8", "--json")
    assert code == 0
    data = json.loads(shown)
    assert data["p_unsafe"] == calibrated_json(made)["p_unsafe"]
    assert not any(n["chosen"] for n in data["nodes"])


def test_plots_of_the_labelled_items(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    labels = tmp_path / "labels.jsonl"
    labels.write_text(
        "".join(json.dumps({"id": lb.id, "safe": not lb.nodes}) + "\n" for lb in truth())
    )
    code, shown, _ = run(
        capsys, str(folder), "--labels", str(labels), "--plots", str(tmp_path / "p")
    )
    assert code == 0
    assert {p.name for p in (tmp_path / "p").iterdir()} == {
        f"{name}.{form}" for name in ("reliability", "risk_coverage") for form in ("svg", "png")
    }
    assert "risk_coverage.svg" in shown
