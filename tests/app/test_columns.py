"""Judging by columns: to the byte what judging item by item gives."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hysafe.app import columns, pipeline
from hysafe.app.columns import ColumnJudge, _numbers, _quoted, _riskiest
from hysafe.app.output import result_line
from hysafe.app.pipeline import DIGITS, SafetyModel, rounded
from hysafe.app.rescore import Diff
from hysafe.app.scan import collection_meta
from hysafe.app.stored import judge_items
from hysafe.index import Collection, CollectionWriter, EncodedItem
from hysafe.index.collection import ENCODED, decode_rows, encode_rows, point_columns
from hysafe.score.calibration import Calibration, ModalityCalibration
from hysafe.score.triage import TriagePolicy
from hysafe.taxonomy import Policy
from hysafe.types import ErrorRecord, Modality

DOMAINS = [f"D{i}" for i in range(1, 13)]
POLICIES: dict[str, dict[str, Any]] = {
    "default": {},
    "off": {"D1": {"status": "non_violating"}, "7.4.1": {"status": "non_violating"}},
    "sensitive": {"6.1": {"status": "sensitive", "threshold": 0.05}, "D7": {"threshold": 0.9}},
    "added": {"x.1": {"parent": "D6", "name": 'Laser "pointers"', "definition": "Their sale.",
                      "synonyms": ["laser pointer sale"]},
              "s.x": {"parent": "S", "name": "Garden parties", "definition": "Parties outside.",
                      "synonyms": ["lawn party"]}},
    "nothing": {d: {"status": "non_violating"} for d in DOMAINS},
}  # fmt: skip
# of channels, with the number of their windows
SHAPES = [
    {"image": 1}, {"text": 1}, {"image": 1, "ocr": 1}, {"image": 1, "text": 1},
    {"image": 1, "text": 3, "ocr": 2}, {"text": 5}, {"text": 2, "ocr": 2}, {"ocr": 1}, {},
    {"image": 1, "ocr": 4}, {"text": 1, "ocr": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: SafetyModel) -> SafetyModel:
    """The random model with a calibration and a triage under which every rating comes up."""
    grid = tuple(np.linspace(-12, 12, 300))
    fits = {"text": ModalityCalibration(0.3, -1.0, 1.2, grid, grid, 300),
            "image": ModalityCalibration(0.3, -1.0, 0.8, grid, grid, 700)}  # fmt: skip
    triage = TriagePolicy(novelty_level=0.1)
    table, placed = tiny_model.place(
        tiny_model.view(Policy.from_dict({"nodes": POLICIES["added"]}))
    )
    apexes = placed.tangent()[[table.index["x.1"], table.index["s.x"]]] * 2  # deep in new cones
    rng = torch.Generator().manual_seed(3)
    reference = {
        name: apexes[torch.randint(len(apexes), (400,), generator=rng)].double()
        + torch.randn(400, apexes.shape[1], generator=rng) * 0.1
        for name in ("text", "image")
    }
    made = SafetyModel(
        tiny_model.encoder, calibration=Calibration(fits), name="x", triage=triage,
        reference=reference,
    )  # fmt: skip
    made._features = tiny_model._features
    return made


def test_new_leaves_alone_are_narrowed(model: SafetyModel) -> None:
    view = model.view(Policy.from_dict({"nodes": POLICIES["added"]}))
    placed = model._placed(view)
    for channel in ("text", "image", "ocr"):
        narrowed = placed.cones(channel)[1]
        assert narrowed is not None
        changed = {placed.table.ids[i] for i in narrowed.nonzero()[:, 0].tolist()}
        assert changed == {"x.1", "s.x"}
    assert model._placed(model.view()).narrowed == {}


def mixed(model: SafetyModel, count: int = 120) -> list[EncodedItem]:
    """Items of all kinds, some near a node, with texts that JSON has to escape."""
    rng = np.random.default_rng(0)
    table, apexes = model.place(model.view())
    tangents = apexes.tangent().numpy()
    text_picture = table.index[pipeline.TEXT_PICTURE_NODE]
    items = []
    for k in range(count):
        points = {}
        for name, windows in SHAPES[k % len(SHAPES)].items():
            near = rng.integers(len(tangents), size=windows)
            if name == "image" and k % 3 == 0:
                near[:] = text_picture
            noise = rng.normal(size=(windows, tangents.shape[1])) * rng.choice([0.01, 0.3, 2.0])
            points[name] = (tangents[near] * rng.uniform(0.5, 3) + noise).astype(np.float32)
        failed = k % 5 == 0 and (not points or "image" in points)
        items.append(EncodedItem(
            f'item "{k}"\n' if k % 7 == 0 else f"item {k}", f"a\\b/{k}.png", _modality(points),
            f"{k:064x}", points, frozenset(n for n in points if k % 4 == 0 and n != "image"),
            "ä text\t" * (k % 2), 'read "it"\x01 \u2028 ✓' if "ocr" in points else "",
            ErrorRecord("InputError", f"the {k % 3}. \"error\"") if failed else None,
        ))  # fmt: skip
    return items


def _modality(points: dict[str, np.ndarray]) -> Modality:
    if "image" not in points:
        return "text"
    return "image+text" if "text" in points else "image"


@pytest.fixture(scope="module", params=[True, False], ids=["read", "unread"])
def collection(
    model: SafetyModel, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Collection:
    """Items of all kinds; the vectors of the table are to be found anew."""
    folder = tmp_path_factory.mktemp("columns")
    meta = collection_meta(model, model.view(), reading=model.hash, reads=request.param)
    judged = model.judge_encoded(
        mixed(model), model.view(), reading=model.hash, reads=request.param
    )
    CollectionWriter.write(folder, meta, [[j.row for j in judged]])
    return Collection.open(folder)


@pytest.mark.parametrize("rules", POLICIES.values(), ids=list(POLICIES))
@pytest.mark.parametrize("size", [1, 50, 4096])
def test_columns_give_the_lines_and_rows_of_the_items(
    collection: Collection, model: SafetyModel, rules: dict[str, Any], size: int
) -> None:
    _same(collection, model, rules, size)


def test_columns_of_a_model_without_a_calibration(tiny_model: SafetyModel, tmp_path: Path) -> None:
    meta = collection_meta(tiny_model, tiny_model.view(), reading=tiny_model.hash, reads=True)
    judged = tiny_model.judge_encoded(
        mixed(tiny_model, 30), tiny_model.view(), reading=tiny_model.hash, reads=True
    )
    CollectionWriter.write(tmp_path, meta, [[j.row for j in judged]])
    _same(Collection.open(tmp_path), tiny_model, {}, 4096)


def _same(collection: Collection, model: SafetyModel, rules: dict[str, Any], size: int) -> None:
    before = collection.meta
    view = model.view(Policy.from_dict({"nodes": rules}))
    meta = collection_meta(model, view, reading=before.reading, reads=before.reads)
    judge = ColumnJudge(model, view, before, meta)
    reasons, ratings = set(), set()
    for k, batch in enumerate(collection.batches(ENCODED, size=size)):
        if size == 1 and k % 3:  # enough of them
            continue
        found = judge.judge(batch)
        rows, lines = judge.rows(batch, found), bytes(judge.lines(batch, found)).decode()
        judged = judge_items(collection, model, view, decode_rows(batch, before))
        assert lines.split("\n") == "".join(result_line(j.result) for j in judged).split("\n")
        wanted = encode_rows([j.row for j in judged], meta)
        rows.validate(full=True)
        assert rows.schema.equals(wanted.schema)
        for name in wanted.schema.names:
            assert rows[name].to_pylist() == wanted[name].to_pylist(), name
        ratings |= {j.result.rating for j in judged}
        reasons |= {j.result.channels.get("reason") for j in judged}
    if size == 4096 and not rules and len(collection) > 100:
        assert ratings == {"safe", "review", "unsafe"}
        assert judge.score(point_columns(batch, before))["image"].text_picture.any()
        for words in ("too long", "error", "unlike", "above", "near the threshold"):
            assert any(words in str(reason) for reason in reasons), words


@pytest.mark.parametrize("rules", [POLICIES["default"], POLICIES["off"]], ids=["default", "off"])
def test_no_score_depends_on_the_batch_or_on_the_order_of_its_rows(
    collection: Collection, model: SafetyModel, rules: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before, view = collection.meta, model.view(Policy.from_dict({"nodes": rules}))
    meta = collection_meta(model, view, reading=before.reading, reads=before.reads)
    whole = collection.to_arrow(list(ENCODED)).combine_chunks()
    rng = np.random.default_rng(0)
    wanted: dict[str, Any] = {}
    for size in (120, 97, 64, 33, 16, 7, 3, 2, 1):
        monkeypatch.setattr(columns, "ROWS", int(rng.integers(1, 130)))
        judge = ColumnJudge(model, view, before, meta)
        order = rng.permutation(len(whole))[: 120 if size > 3 else 30]
        for start in range(0, len(order), size):
            part = whole.take(pa.array(order[start : start + size]))
            batch = part.combine_chunks().to_batches()[0]
            found = judge.judge(batch)
            lines = bytes(judge.lines(batch, found)).decode().split("\n")[:-1]
            rows = judge.rows(batch, found).to_pylist()
            for row, line in zip(rows, lines, strict=True):
                assert wanted.setdefault(row["id"], (row, line)) == (row, line)


@pytest.mark.parametrize("reads", [True, False])
def test_a_point_that_is_no_number_is_reviewed(model: SafetyModel, reads: bool) -> None:
    items = [replace(i, error=None) for i in mixed(model, 3)]
    points = {n: np.full_like(v, np.nan) for n, v in items[0].points.items()}
    items[0] = replace(items[0], points=points)
    meta = collection_meta(model, model.view(), reading=model.hash, reads=reads)
    judged = model.judge_encoded(items, model.view(), reading=model.hash, reads=reads)
    batch = encode_rows([j.row for j in judged], meta).combine_chunks().to_batches()[0]
    judge = ColumnJudge(model, model.view(), meta, meta)
    found = judge.judge(batch)
    lines = bytes(judge.lines(batch, found)).decode()
    assert lines == "".join(result_line(j.result) for j in judged)
    assert found.rating[0] == 1
    assert not reads or judge.words[found.word[0]] == ("review", "no score")


def test_a_node_is_in_the_cone_where_any_channel_is(
    collection: Collection, model: SafetyModel
) -> None:
    before, view = collection.meta, model.view()
    judge = ColumnJudge(model, view, before, before)
    (batch,) = collection.batches(ENCODED)
    told, n = judge.score(point_columns(batch, before)), batch.num_rows
    rng = np.random.default_rng(0)
    item, node = rng.integers(n, size=900), rng.integers(len(judge.table.ids), size=900)
    wanted = np.zeros(900, dtype=bool)
    for name, said in told.items():
        margins = model.score_vectors(name, said.vectors, view).margins
        every = np.zeros((n, margins.shape[1]), dtype=bool)
        every[said.row] = margins > 0
        wanted |= every[item, node]
    assert 0 < wanted.sum() < 900
    assert judge._inside(told, item, node, n).tolist() == wanted.tolist()
    # what one channel does not hold is asked of the others
    items, nodes, _, inside = judge._listed(told, n)
    blind = {k: replace(s, inside=np.zeros_like(s.inside)) for k, s in told.items()}
    several = np.array([len(i.points) > 1 for i in decode_rows(batch, before)])[items]
    domain = np.array([judge.table.depth[k] == 1 for k in nodes])
    asked = several | domain
    assert inside[several].any()
    assert judge._listed(blind, n)[3].tolist() == np.where(asked, inside, False).tolist()


def test_points_by_channel_are_those_of_the_items(
    collection: Collection, model: SafetyModel
) -> None:
    for batch in collection.batches(ENCODED, size=13):
        by_channel = point_columns(batch, collection.meta)
        items = decode_rows(batch, collection.meta)
        assert {n for i in items for n in i.points} == by_channel.keys()
        for name, column in by_channel.items():
            owners = [k for k, i in enumerate(items) for _ in i.points.get(name, ())]
            assert column.row.tolist() == owners
            wanted = np.concatenate([i.points[name] for i in items if name in i.points])
            np.testing.assert_array_equal(column.vectors, wanted)


def test_no_rows_have_no_points(collection: Collection) -> None:
    batch = next(collection.batches(ENCODED)).slice(0, 0)
    assert point_columns(batch, collection.meta) == {}


@given(st.lists(st.floats(0, 30) | st.integers(0, 60000).map(lambda k: k / 20000), max_size=40))
def test_rounding_is_that_of_the_language(values: list[float]) -> None:
    assert rounded(np.array(values)).tolist() == [round(v, DIGITS) for v in values]


@given(st.lists(st.floats(-2, 30) | st.sampled_from([0.0, -0.0, 19.99996, math.nan])))
def test_numbers_are_written_as_in_json(values: list[float]) -> None:
    values = [round(v, DIGITS) for v in values]
    assert _numbers(np.array(values)).to_pylist() == [json.dumps(v) for v in values]


@given(st.lists(st.text()), st.integers(0, 3))
def test_texts_are_written_as_in_json(texts: list[str], start: int) -> None:
    texts = [t.encode("utf-8", "replace").decode() for t in texts]
    column = pa.array(texts, pa.string()).slice(start)
    wanted = [json.dumps(t, ensure_ascii=False) for t in texts[start:]]
    assert _quoted(column).to_pylist() == wanted


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, math.nan]), min_size=1), min_size=1))
def test_the_first_window_of_highest_risk_speaks(risks: list[list[float]]) -> None:
    wanted, start = [], 0
    for own in risks:
        best = 0
        for k, risk in enumerate(own):
            best = k if risk > own[best] else best
        wanted.append(start + best)
        start += len(own)
    row = np.repeat(np.arange(len(risks)), [len(own) for own in risks])
    assert _riskiest(row, np.concatenate(risks)).tolist() == wanted


def test_a_difference_counts_what_a_loop_counts() -> None:
    rng = np.random.default_rng(0)
    ratings, nodes = ("safe", "review", "unsafe"), ("1.1", "2.1", None)
    diff, counted, moved = Diff(), dict[tuple[str, str], int](), dict[tuple[str, str], int]()
    kept: dict[str, int] = {}
    for _ in range(4):
        a, b = rng.choice(ratings, (2, 200)).tolist()
        c, d = ([nodes[k] for k in rng.integers(0, 3, 200)] for _ in range(2))
        wanted = diff.add(pa.array(a), pa.array(b), pa.array(c, pa.string()),
                          pa.array(d, pa.string()))  # fmt: skip
        expected = {}
        for k, (was, now, old, new) in enumerate(zip(a, b, c, d, strict=True)):
            counted[was, now] = counted.get((was, now), 0) + 1
            kind = f"newly {now}" if was != now else "moved"
            if was == now and old == new:
                continue
            if was == now:
                moved[old or "", new or ""] = moved.get((old or "", new or ""), 0) + 1
            if kept.get(kind, 0) < 60:
                kept[kind] = kept.get(kind, 0) + 1
                expected[k] = kind
        assert list(wanted.items()) == list(expected.items())
        for kind in wanted.values():
            diff.keep(None, kind)  # type: ignore[arg-type]
    assert diff.ratings == counted
    assert diff.moved == moved
