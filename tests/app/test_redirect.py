"""Redirect over a collection: what comes back is safe, whatever is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hysafe.app.cli import main
from hysafe.app.pipeline import SafetyModel, ScanOptions
from hysafe.app.redirect import AT_MOST, redirect_queries
from hysafe.app.scan import scan
from hysafe.errors import ConfigError
from hysafe.index import Collection
from hysafe.score.calibration import Calibration, ModalityCalibration
from hysafe.taxonomy import Policy

TEXTS = [f"sentence number {i} " + "about a street " * (i % 5) for i in range(40)]


@pytest.fixture(scope="module")
def model(tiny_model: SafetyModel) -> SafetyModel:
    """The random model, calibrated so that its sentences fall on all sides of the threshold."""
    view = tiny_model.view()
    points = tiny_model.encode_text(TEXTS)
    _, scores = tiny_model._scores(points, view, "text")
    middle = float(scores.evidence.median())
    spread = float(scores.evidence.std())
    fit = ModalityCalibration(2 / spread, -2 * middle / spread - 0.7)
    made = SafetyModel(tiny_model.encoder, calibration=Calibration({"text": fit, "image": fit}))
    made._features = tiny_model._features
    return made


@pytest.fixture(scope="module")
def collection(model: SafetyModel, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    folder = tmp_path_factory.mktemp("redirect")
    (folder / "a.txt").write_text("\n".join(TEXTS) + "\n")
    scan([str(folder / "a.txt")], folder / "out", model, options=ScanOptions(16, 0), report=False)
    return Collection.open(folder / "out")


def test_only_safe_items_come_back(collection: Collection, model: SafetyModel) -> None:
    ratings = dict(zip(*(collection.to_arrow(["id", "rating"]).to_pydict().values()), strict=False))
    assert set(ratings.values()) >= {"safe", "unsafe"}
    answers = redirect_queries(collection, model, model.encode_text(TEXTS), k=5, at_most=1.0)
    assert len(answers) == len(TEXTS)
    for answer in answers:
        assert len(answer.found) == 5
        assert {ratings[f.item.id] for f in answer.found} == {"safe"}
        assert {f.result.rating for f in answer.found} == {"safe"}
        assert answer.radius[1] <= answer.radius[0] + 1e-9
        assert answer.reached == (answer.risk[1] < model.triage.unsafe_from)


def test_a_risky_query_moves_to_where_its_risk_is_below_the_threshold(
    collection: Collection, model: SafetyModel
) -> None:
    queries = model.encode_text(TEXTS)
    hardest = redirect_queries(collection, model, queries, threshold=0.0, k=1)
    assert not any(a.reached for a in hardest)  # all end where their risk is least
    drop = [a.risk[0] - a.risk[1] for a in hardest]
    best = max(range(len(drop)), key=drop.__getitem__)
    assert drop[best] > 0.01
    limit = sum(hardest[best].risk) / 2
    (answer,) = redirect_queries(collection, model, queries[best : best + 1], threshold=limit, k=3)
    assert answer.reached
    assert answer.risk[1] < limit <= answer.risk[0]
    assert hardest[best].radius[1] <= answer.radius[1] < answer.radius[0]


def test_a_safe_query_is_answered_as_a_search_among_safe_items(
    collection: Collection, model: SafetyModel
) -> None:
    points = model.encode_text(TEXTS)
    safe = (model.risk(points, model.view()) < model.triage.unsafe_from).nonzero().squeeze(1)
    query = points[safe[:1]]
    (answer,) = redirect_queries(collection, model, query, k=4, at_most=1.0)
    (hits,) = collection.search(
        query, model=model.hash, k=4, where="rating = 'safe'", radius_share=0.0
    )
    assert [f.distance for f in answer.found] == pytest.approx([h.distance for h in hits], abs=1e-6)
    assert answer.radius[0] == answer.radius[1]


def test_answers_to_risky_queries_have_little_risk(
    collection: Collection, model: SafetyModel
) -> None:
    lines = map(json.loads, (collection.folder / "results.jsonl").read_text().splitlines())
    risks = [line["p_unsafe"] for line in lines if line["rating"] == "safe"]
    points = model.encode_text(TEXTS)
    asked = model.risk(points, model.view())
    most, least = int(asked.argmax()), int(asked.argmin())
    query = points[most : most + 1]
    for bound in (0.0, *sorted(risks)[::4], 1.0):
        (answer,) = redirect_queries(collection, model, query, k=99, threshold=0.0, at_most=bound)
        assert len(answer.found) == sum(p <= bound for p in risks)
    (answer,) = redirect_queries(collection, model, points[least : least + 1], k=99, at_most=0.9)
    assert len(answer.found) == len(risks), "a query of less risk is answered as it is"
    (answer,) = redirect_queries(collection, model, query, k=99)
    kept = [p for p in risks if p <= AT_MOST["text"]] if asked[most] > AT_MOST["text"] else risks
    assert len(answer.found) == len(kept)


def test_review_is_asked_for_and_unsafe_cannot_be(
    collection: Collection, model: SafetyModel
) -> None:
    (answer,) = redirect_queries(collection, model, model.encode_text(TEXTS[:1]), k=99, review=True)
    ratings = collection.to_arrow(["rating"])["rating"].to_pylist()
    assert len(answer.found) == sum(r != "unsafe" for r in ratings)
    assert "unsafe" not in {f.result.rating for f in answer.found}


def test_another_policy_decides_what_is_safe(collection: Collection, model: SafetyModel) -> None:
    off = Policy.from_dict({"nodes": {f"D{i}": {"status": "non_violating"} for i in range(1, 13)}})
    (answer,) = redirect_queries(collection, model, model.encode_text(TEXTS[:1]), k=99, policy=off)
    assert len(answer.found) == len(TEXTS)
    assert answer.reached


def test_a_filter_holds(collection: Collection, model: SafetyModel) -> None:
    where = "text LIKE '%number 1%'"
    (answer,) = redirect_queries(collection, model, model.encode_text(["x"]), where=where, k=40)
    assert 0 < len(answer.found) <= 11
    assert all("number 1" in str(f.item.text) for f in answer.found)


def test_wrong_arguments(collection: Collection, model: SafetyModel) -> None:
    query = model.encode_text(["x"])
    with pytest.raises(ConfigError, match="k is 0"):
        redirect_queries(collection, model, query, k=0)
    with pytest.raises(ConfigError, match="channel is 'sound'"):
        redirect_queries(collection, model, query, channel="sound")
    for bad in (-0.1, 2.0, float("nan")):
        with pytest.raises(ConfigError, match="at_most"):
            redirect_queries(collection, model, query, at_most=bad)
    for threshold in (-0.1, 2.0, float("nan")):
        with pytest.raises(ConfigError, match="threshold"):
            redirect_queries(collection, model, model.encode_text(["a"]), threshold=threshold)


def test_redirect_from_the_command_line(
    tiny_model: SafetyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:9]) + "\n")
    out = tmp_path / "out"
    scan([str(tmp_path / "a.txt")], out, tiny_model, options=ScanOptions(16, 0), report=False)
    assert main(["redirect", str(out), "selling a pistol", "-k", "3", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert set(lines[0]) == {"query", "radius", "risk", "reached", "found"}
    assert {f["rating"] for f in lines[0]["found"]} <= {"safe"}
    assert main(["redirect", str(out), "selling a pistol"]) == 0
    assert "risk" in capsys.readouterr().out
    assert main(["redirect", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
