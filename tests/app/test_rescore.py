"""A rescore gives what a scan under the policy would give, from stored points alone."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
import torch
from PIL import Image

from hysafe.app import pipeline
from hysafe.app.cli import main
from hysafe.app.guard_namer import write_names
from hysafe.app.lock import BusyError, lock
from hysafe.app.pipeline import SafetyModel, ScanOptions
from hysafe.app.rescore import diff_json, policy_names, rescore, write_diff
from hysafe.app.scan import scan
from hysafe.app.stored import model_of, stored_policy
from hysafe.errors import CollectionError, ConfigError
from hysafe.guard.naming import Naming
from hysafe.index import Collection
from hysafe.score.calibration import Calibration, ModalityCalibration
from hysafe.taxonomy import Policy

POLICY = {
    "name": "shop",
    "nodes": {
        "D1": {"status": "non_violating"},
        "6.1": {"status": "sensitive", "threshold": 0.05},
        "7.4.1": {"status": "non_violating"},
        "x.1": {"parent": "D6", "name": "Laser pointers", "definition": "Sale of laser pointers.",
                "synonyms": ["laser pointer sale"]},
    },
}  # fmt: skip
ROUNDING = 1.01e-4  # results are rounded to four digits


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), color).save(buffer, "PNG")
    return buffer.getvalue()


class Reader:
    """Reads a long text in red pictures, a short one in blue ones, fails on green ones."""

    version = "reader 1"

    def read(self, image: Any, content_hash: str) -> Any:
        from hysafe.errors import InputError

        red, green, blue = image.resize((1, 1)).getpixel((0, 0))
        if green > 150:
            raise InputError("the engine failed")
        text = "a weapon shop with many offers " * 30 if red > 150 else "hello" * (blue > 150)
        return type("Read", (), {"text": text})()


@pytest.fixture(scope="module")
def model(tiny_model: SafetyModel) -> SafetyModel:
    """The random model with a calibration, so that novelty has values."""
    grid = tuple(np.linspace(-30, 30, 200))
    fit = ModalityCalibration(0.8, 0.1, 1.2, grid, grid, 200)
    made = SafetyModel(
        tiny_model.encoder, calibration=Calibration({"text": fit, "image": fit}), name="whole"
    )
    made._features = tiny_model._features
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with long, short, no and unreadable text, given texts, long texts, broken input."""
    folder = tmp_path_factory.mktemp("rescore") / "in"
    folder.mkdir()
    for name, color in (
        ("red", (220, 20, 20)), ("green", (20, 220, 20)), ("blue", (20, 20, 220)),
        ("dark", (9, 9, 9)),
    ):  # fmt: skip
        (folder / f"{name}.png").write_bytes(png(color))
    (folder / "broken.png").write_bytes(png((1, 1, 1))[:50])
    rows = [{"text": f"sentence {i} about a laser pointer " * (i + 1)} for i in range(12)]
    rows.append({"text": "one two three " * 4000})  # cut
    rows.append({"text": "a caption " * 40, "image": "red.png"})  # three channels, windows
    rows.append({"text": "a caption", "image": "dark.png"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines + "{broken\n" + '{"text": ""}\n')
    return folder


@pytest.fixture(scope="module")
def default_scan(
    source: Path, model: SafetyModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A scan of all of it under the default policy, to be copied."""
    folder = tmp_path_factory.mktemp("default") / "out"
    scanned(source, folder, model, None)
    return folder


@pytest.fixture
def default(default_scan: Path, tmp_path: Path) -> Collection:
    return Collection.open(shutil.copytree(default_scan, tmp_path / "old"))


@pytest.fixture(scope="module")
def small_scan(tiny_model: SafetyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four texts, scanned by the random model as it lies on disk."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "a.txt").write_text("laser pointer sale\na street\na pistol\nhello\n")
    scan([str(folder / "a.txt")], folder / "out", tiny_model, options=ScanOptions(8, 0),
         report=False)  # fmt: skip
    return folder / "out"


def scanned(source: Path, out: Path, model: SafetyModel, policy: Policy | None) -> Collection:
    scan([str(source)], out, model, policy=policy, ocr=Reader(), options=ScanOptions(5, 0),
         report=False)  # fmt: skip
    return Collection.open(out)


def table_of(collection: Collection) -> list[dict[str, Any]]:
    return collection.to_arrow().to_pylist()


@pytest.mark.parametrize("rules", [{}, POLICY], ids=["default", "shop"])
def test_under_the_policy_of_the_scan_nothing_changes_in_a_byte(
    source: Path, default_scan: Path, tmp_path: Path, model: SafetyModel, rules: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    policy = Policy.from_dict(rules)
    collection = (
        scanned(source, tmp_path / "old", model, policy)
        if rules
        else Collection.open(shutil.copytree(default_scan, tmp_path / "old"))
    )
    before = table_of(collection)
    items = [i for batch in collection.items() for i in batch]
    assert {tuple(i.points) for i in items} >= {
        ("image", "text", "ocr"), ("image", "ocr"), ("text",), ("image",), ()
    }  # fmt: skip
    assert max(len(p) for i in items for p in i.points.values()) == 32
    monkeypatch.setattr("hysafe.app.rescore.BATCH", 7)  # other batches than the scan's
    summary = rescore(collection, model, policy, out=tmp_path / "two")
    assert (tmp_path / "two/results.jsonl").read_bytes() == (
        tmp_path / "old/results.jsonl"
    ).read_bytes()
    assert table_of(Collection.open(tmp_path / "two")) == before
    assert summary.diff.counts() == dict.fromkeys(summary.diff.counts(), 0)
    assert sum(summary.scan.ratings.values()) == len(items)


def test_another_policy_gives_what_a_scan_under_it_gives(
    source: Path, default: Collection, tmp_path: Path, model: SafetyModel
) -> None:
    policy, collection = Policy.from_dict(POLICY), default
    old = [json.loads(s) for s in (tmp_path / "old/results.jsonl").read_text().splitlines()]
    fresh = scanned(source, tmp_path / "fresh", model, policy)
    summary = rescore(collection, model, policy)
    made = Collection.open(tmp_path / "old")
    wanted, got = (
        [json.loads(s) for s in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        for name in ("fresh", "old")
    )
    assert made.meta == fresh.meta
    assert made.meta.policy_name == "shop"
    differs = 0
    for a, b, before in zip(wanted, got, old, strict=True):
        assert a["hashes"] == b["hashes"]
        assert a["rating"] == b["rating"]
        assert [p["node"] for p in a["paths"]] == [p["node"] for p in b["paths"]]
        assert a["channels"].keys() == b["channels"].keys()
        assert a["channels"].get("decided_by") == b["channels"].get("decided_by")
        for key in ("p_unsafe", "radius"):
            assert a[key] == pytest.approx(b[key], abs=ROUNDING)
        differs += b["p_unsafe"] != before["p_unsafe"]
    assert differs > 5  # the policies do differ
    for a, b in zip(table_of(fresh), table_of(made), strict=True):
        for key in ("vector", "text_vector", "scores"):
            assert (a[key] is None) == (b[key] is None)
            if a[key] is not None:
                np.testing.assert_allclose(a[key], b[key], atol=1e-5)
    assert summary.scan.ratings.total() == len(wanted)


def test_what_a_guard_said_stays_where_rating_and_novelty_do(
    default: Collection, model: SafetyModel, tmp_path: Path
) -> None:
    path = default.folder / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    judged = [line["id"] for line in lines if line["channels"]]
    said = {k: Naming("" if i % 3 else f'"{i}" ✓', f"because {i}") for i, k in enumerate(judged)}
    write_names(path, said)
    before = path.read_bytes()
    summary = rescore(default, model, out=tmp_path / "same")
    assert (tmp_path / "same/results.jsonl").read_bytes() == before
    assert summary.scan.items == len(lines)

    old = {line["id"]: line for line in map(json.loads, before.splitlines())}
    stays = {"none": set[str](), "some": set[str]()}
    strict = {"nodes": {"D1": {"status": "sensitive", "threshold": 1e-4}}}
    policies = {"none": Policy(), "some": Policy.from_dict(strict)}
    old[judged[0]]["hashes"]["content"] = "another picture"
    path.write_text("".join(json.dumps(line) + "\n" for line in old.values()))
    for name, policy in policies.items():
        summary = rescore(default, model, policy, out=tmp_path / name, report=True)
        got = [json.loads(s) for s in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        for new in got:
            was, keys = old[new["id"]], ("name", "rationale")
            same = new["id"] in said and new["rating"] == was["rating"]
            same &= all(new["novelty"][k] == was["novelty"][k] for k in ("policy", "distribution"))
            same &= new["id"] != judged[0]
            wanted = {k: was["novelty"][k] for k in keys} if same else {}
            assert {k: v for k, v in new["novelty"].items() if k in keys} == wanted
            stays[name] |= {new["id"]} if wanted else set()
    assert stays["none"] == set(judged[1:])
    assert stays["some"] < stays["none"]
    assert "because 1" in (tmp_path / "none/report.html").read_text()


def test_the_old_table_stays_as_a_version_and_results_match_the_table(
    default: Collection, model: SafetyModel
) -> None:
    collection, folder = default, default.folder
    before, version = collection.to_arrow(["rating"]), collection.version
    (folder / "report.html").write_text("old")
    summary = rescore(collection, model, Policy.from_dict(POLICY), report=False)
    assert summary.version > version
    assert not (folder / "report.html").exists()  # it would contradict the new ratings
    table = lancedb.connect(str(folder)).open_table("items")
    table.checkout(version)
    assert table.search().select(["rating"]).limit(None).to_arrow()["rating"] == before["rating"]
    lines = (folder / "results.jsonl").read_text().splitlines()
    ratings = Collection.open(folder).to_arrow(["rating"])["rating"].to_pylist()
    assert [json.loads(line)["rating"] for line in lines] == ratings
    assert not list(folder.glob("*.part"))


def test_a_rescore_that_fails_leaves_everything_as_it_was(
    default: Collection, model: SafetyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection, folder = default, default.folder
    before = (folder / "results.jsonl").read_bytes()
    monkeypatch.setattr("hysafe.app.rescore.BATCH", 7)

    def fail(done: int) -> None:
        if done > 7:
            raise ValueError("stopped")

    with pytest.raises(Exception, match="stopped"):
        rescore(collection, model, Policy.from_dict(POLICY), progress=fail)
    assert (folder / "results.jsonl").read_bytes() == before
    assert Collection.open(folder).meta == collection.meta
    assert not list(folder.glob("*.part"))


def test_the_report_shows_the_new_ratings(default: Collection, model: SafetyModel) -> None:
    rescore(default, model, Policy.from_dict(POLICY), report=True)
    page = (default.folder / "report.html").read_text()
    assert '"thumb":"' in page  # pictures are read again from their sources
    assert "shop" in page


def test_another_model_cannot_rescore(default: Collection, model: SafetyModel) -> None:
    other = SafetyModel(model.encoder)
    assert other.hash != model.hash  # another calibration
    with pytest.raises(CollectionError, match="Points of two models"):
        rescore(default, other)


# ---------------------------------------------------------------- without the towers


def test_no_tower_is_loaded_unless_a_phrase_is_new(
    small_scan: Path, tmp_path: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection, cache = Collection.open(small_scan), tmp_path / "cache"
    assert tiny_model._cache is not None
    shutil.copytree(tiny_model._cache, cache)  # the taxonomy, no phrase of a policy
    monkeypatch.setattr(pipeline, "_cache_folder", lambda: cache)

    light = model_of(collection)
    off = Policy.from_dict({"nodes": {"D1": {"status": "non_violating"}}})
    assert not rescore(collection, light, off, out=tmp_path / "a").encoded

    added = Policy.from_dict(POLICY)
    first = model_of(collection)
    assert rescore(collection, first, added, out=tmp_path / "b").encoded
    again = model_of(collection)  # its phrases are in the cache now
    assert not rescore(collection, again, added, out=tmp_path / "c").encoded
    assert (tmp_path / "b/results.jsonl").read_bytes() == (
        tmp_path / "c/results.jsonl"
    ).read_bytes()


# ---------------------------------------------------------------- what changed


def test_the_difference_counts_and_shows_every_change(
    default: Collection, tmp_path: Path, model: SafetyModel
) -> None:
    collection = default
    off = {"nodes": {f"D{i}": {"status": "non_violating"} for i in range(1, 13)}}
    summary = rescore(collection, model, Policy.from_dict(off), out=tmp_path / "two")
    pairs = zip(
        (r["rating"] for r in table_of(collection)),
        (r["rating"] for r in table_of(Collection.open(tmp_path / "two"))),
        strict=True,
    )
    changed = [(a, b) for a, b in pairs if a != b]
    counts = summary.diff.counts()
    assert counts["newly safe"] == sum(b == "safe" for _, b in changed) > 0
    assert counts["newly unsafe"] == 0
    assert len(summary.diff.examples["newly safe"]) == counts["newly safe"]
    lines = [json.loads(line) for line in diff_json(summary.diff).splitlines()]
    assert lines[0] == {"counts": counts}
    assert all(line["rating_before"] != "safe" for line in lines if line.get("rating") == "safe")
    view = model.view(Policy.from_dict(off))
    write_diff(tmp_path / "diff.html", summary.diff, collection, view)
    page = (tmp_path / "diff.html").read_text()
    assert "Newly safe" in page
    assert page.count("<li>") == sum(map(len, summary.diff.examples.values()))


def test_a_change_says_why_with_node_and_score_before_and_now(
    default: Collection, model: SafetyModel, tmp_path: Path
) -> None:
    old = [json.loads(s) for s in (default.folder / "results.jsonl").read_text().splitlines()]
    before = {r["id"]: r["paths"][0] for r in old if r["paths"]}
    domain = model.taxonomy.path(next(iter(before.values()))["node"]).ids[0]
    rules = {"D6": {"threshold": 0.01}, domain: {"status": "non_violating"}}
    summary = rescore(default, model, Policy.from_dict({"nodes": rules}))  # in place
    lines = [json.loads(line) for line in diff_json(summary.diff).splitlines()[1:]]
    now = [json.loads(s) for s in (default.folder / "results.jsonl").read_text().splitlines()]
    after = {r["id"]: r["paths"][0] for r in now if r["paths"]}
    assert lines
    for line in lines:
        for paths, suffix in ((before, "_before"), (after, "")):
            known = paths.get(line["id"], {})
            assert line[f"node{suffix}"] == known.get("node")
            assert line[f"score{suffix}"] == known.get("score")
    kinds = list(dict.fromkeys(line["change"] for line in lines))
    assert kinds == [k for k in summary.diff.counts() if k in kinds]
    assert list(summary.diff.counts()) == [
        "newly unsafe", "newly safe", "newly review", "moved"
    ]  # fmt: skip
    (default.folder / "results.jsonl").unlink()  # not needed to judge
    again = rescore(Collection.open(default.folder), model, out=tmp_path / "three")
    assert {c.score_before for kept in again.diff.examples.values() for c in kept} == {None}


def test_two_policies_of_one_name_are_told_apart_by_their_hashes(default: Collection) -> None:
    meta, named = default.meta, Policy.from_dict({"name": "default", "nodes": {"D1": {}}})
    other = Policy.from_dict({"name": "default", "nodes": {"D1": {"threshold": 0.3}}})
    assert policy_names(meta, Policy()) == ("default", "default")
    assert policy_names(meta, Policy.from_dict(POLICY)) == ("default", "shop")
    old, new = policy_names(meta, other)
    assert (old, new) == (f"default {meta.policy[:8]}", f"default {other.hash[:8]}")
    assert old != new
    assert policy_names(meta, named)[0] != "default"


def test_rescore_from_the_command_line(
    small_scan: Path, tmp_path: Path, tiny_model: SafetyModel, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "_cache_folder", lambda: tiny_model._cache)
    shutil.copytree(small_scan, tmp_path / "one")
    policy = tmp_path / "shop.json"
    policy.write_text(json.dumps(POLICY))
    one, two, page = str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "diff.html")
    assert main(["rescore", one, "--policy", str(policy), "--out", two, "--diff",
                 "--html", page]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "items in" in shown
    assert "newly unsafe" in shown
    assert Path(page).is_file()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(png((1, 2, 3)))
    assert main(["rescore", one, "--out", str(tmp_path / "photos")]) == 2
    assert "holds other files (a.png) and is no collection" in capsys.readouterr().err
    assert main(["rescore", one, "--policy", str(policy), "--json", "--out", two]) == 0
    changed = [json.loads(line) for line in capsys.readouterr().out.splitlines()[1:]]
    was = {r["id"]: r for r in map(json.loads, (tmp_path / "one/results.jsonl").open())}
    now = {r["id"]: r for r in map(json.loads, (tmp_path / "two/results.jsonl").open())}
    assert changed
    for c in changed:
        assert (c["p_unsafe_before"], c["p_unsafe"]) == (
            was[c["id"]]["p_unsafe"],
            now[c["id"]]["p_unsafe"],
        )
    assert main(["rescore", two, "--json"]) == 0
    assert "counts" in json.loads(capsys.readouterr().out.splitlines()[0])
    lines = (tmp_path / "two/results.jsonl").read_text()
    assert lines == (tmp_path / "one/results.jsonl").read_text()  # back under the default policy
    assert main(["rescore", one, "--policy", str(tmp_path / "none.yaml")]) == 2
    capsys.readouterr()


def test_another_window_of_a_long_text_may_speak_under_another_policy(
    model: SafetyModel, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(
        " ".join(f"{word} " * 40 for word in ("fireworks", "hello", "pistol", "street", "poison"))
    )
    policies = [
        Policy.from_dict({"nodes": {f"D{i}": {"status": "non_violating"} for i in off}})
        for off in ([], range(1, 12), range(2, 13), (5, 6, 7), (1, 2, 3, 4, 12))
    ]
    collection = Collection.open(_scan_texts(tmp_path, model, policies[0]))
    (item,) = next(collection.items())
    assert len(item.points["text"]) > 3
    vectors = []
    for k, policy in enumerate(policies):
        rescore(collection, model, policy, out=tmp_path / f"r{k}")
        made = Collection.open(tmp_path / f"r{k}")
        risks = model.risk(made.points(item.points["text"]), model.view(policy))
        np.testing.assert_array_equal(
            made.vectors()[1][0], item.points["text"][int(risks.argmax())]
        )
        vectors.append(made.vectors()[1][0].tobytes())
    assert len(set(vectors)) > 1


def _scan_texts(folder: Path, model: SafetyModel, policy: Policy) -> Path:
    scan([str(folder / "a.txt")], folder / "long", model, policy=policy, report=False,
         options=ScanOptions(8, 0))  # fmt: skip
    return folder / "long"


def test_a_folder_that_is_written_is_not_rescored(tiny_model: SafetyModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    out = tmp_path / "out"
    scan([str(tmp_path / "a.txt")], out, tiny_model, options=ScanOptions(16, 0), report=False)
    before = (out / "results.jsonl").read_bytes()
    with lock(out), pytest.raises(BusyError, match="is writing into this folder"):
        rescore(Collection.open(out), tiny_model)
    assert (out / "results.jsonl").read_bytes() == before


def test_a_page_that_is_a_folder_is_refused_before_the_work(
    small_scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["rescore", str(small_scan), "--out", str(tmp_path / "a"), "--html", str(tmp_path)]
    assert main(command) == 2
    assert "is a folder. Name a file." in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- example pictures


def shown(folder: Path, *colors: tuple[int, int, int], **settings: Any) -> Policy:
    """A policy with a node that pictures of these colours show."""
    for i, color in enumerate(colors):
        (folder / f"{i}.png").write_bytes(png(color))
    rule = {"parent": "D6", "name": "Red flags", "definition": "Red flags.", "threshold": 0.3,
            "examples": [f"{i}.png" for i in range(len(colors))], **settings}  # fmt: skip
    path = folder / "shown.yaml"
    path.write_text(json.dumps({"nodes": {"x.1": rule}}))
    return Policy.load(path)


def test_example_pictures_decide_for_pictures_and_phrases_for_texts(
    model: SafetyModel, tmp_path: Path
) -> None:
    # another colour than that of the examples, and a text
    asked = {"texts": ["a red flag"], "images": [png((20, 30, 220))]}
    plain = Policy.from_dict({"nodes": {"x.1": {**shown(tmp_path).to_dict()["nodes"]["x.1"]}}})
    red, blue = tmp_path / "red", tmp_path / "blue"
    red.mkdir(), blue.mkdir()
    (_, without), (text, seen), (_, other) = (
        model.moderate(**asked, policy=policy)
        for policy in (plain, shown(blue, (20, 30, 220)), shown(red, (220, 30, 20)))
    )
    first = model.moderate(texts=asked["texts"], policy=plain)[0]
    assert text.channels == first.channels
    table, _ = model.place(model.view(plain))
    column = table.index["x.1"]
    vectors = model.encode_image([Image.new("RGB", (40, 40), (20, 30, 220))]).tangent().numpy()

    def score(policy: Policy) -> float:
        return float(model.score_vectors("image", vectors, model.view(policy)).margins[0, column])

    policies = Policy.load(blue / "shown.yaml"), Policy.load(red / "shown.yaml")
    assert score(policies[0]) > score(policies[1])
    assert len({seen.p_unsafe, without.p_unsafe, other.p_unsafe}) > 1
    texts = model.encode_text(asked["texts"]).tangent().numpy()
    margins = [model.score_vectors("text", texts, model.view(p)).margins for p in policies]
    np.testing.assert_array_equal(margins[0], margins[1])


def test_a_node_with_examples_keeps_its_aperture_and_leaves_the_others(
    model: SafetyModel, tmp_path: Path
) -> None:
    placed = model._placed(model.view(shown(tmp_path, (220, 30, 20), (200, 10, 10))))
    row = placed.table.index["x.1"]
    assert float(placed.shown.radius()[row]) == pytest.approx(float(placed.apexes.radius()[row]))
    same = (placed.shown.space == placed.apexes.space).all(dim=1)
    assert same.sum() == len(same) - 1
    assert not same[row]


@pytest.fixture
def cache(tmp_path: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model's cache, in use."""
    folder = tmp_path / "cache"
    assert tiny_model._cache is not None
    shutil.copytree(tiny_model._cache, folder)
    monkeypatch.setattr(pipeline, "_cache_folder", lambda: folder)
    return folder


def scan_and_rescore(
    source: Path, policy: Policy, folder: Path, model: SafetyModel, cache: Path
) -> dict[str, Path]:
    """One file scanned under a policy, and without it and rescored under it, which encodes the examples."""
    out = {name: folder / name for name in ("scan", "plain", "again", "third")}
    for name, under in (("scan", policy), ("plain", None)):
        scan([str(source)], out[name], model, policy=under, report=False,
             options=ScanOptions(8, 0))  # fmt: skip
    shutil.rmtree(cache / f"examples-{model.encoder.hash()}", ignore_errors=True)
    collection = Collection.open(out["plain"])
    assert rescore(collection, model_of(collection), policy, out=out["again"]).encoded
    return out


def test_a_rescore_with_examples_is_a_scan_with_them_and_loads_the_towers_once(
    small_scan: Path, tmp_path: Path, tiny_model: SafetyModel, cache: Path
) -> None:
    (tmp_path / "in.png").write_bytes(png((210, 40, 40)))
    policy = shown(tmp_path, (220, 30, 20), (90, 200, 90))
    out = scan_and_rescore(tmp_path / "in.png", policy, tmp_path, tiny_model, cache)
    stored = sorted(cache.glob("examples-*/*.safetensors"))
    assert [p.stem for p in stored] == list(policy.rules["x.1"].example_hashes())
    for file in tmp_path.glob("[01].png"):  # known by their content: not read again
        file.unlink()
    made = Collection.open(out["again"])
    kept = stored_policy(made.meta)
    assert kept.hash == policy.hash
    assert not rescore(made, model_of(made), kept, out=out["third"]).encoded
    lines = {(out[name] / "results.jsonl").read_bytes() for name in ("scan", "again", "third")}
    assert len(lines) == 1
    assert json.loads(lines.pop())["hashes"]["policy"] == policy.hash


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda p: p.write_bytes(b"no picture"), "no picture in a format that is read"),
        (lambda p: p.unlink(), "cannot be read"),
        (lambda p: p.write_bytes(png((1, 2, 3))), "not the picture that it was"),
    ],
    ids=["broken", "gone", "changed"],
)
def test_an_example_that_cannot_be_used_stops_a_rescore_before_any_work(
    small_scan: Path, tmp_path: Path, tiny_folder: Path, harm: Any, problem: str
) -> None:
    model = pipeline.load(str(tiny_folder), cache=tmp_path / "empty")
    policy = shown(tmp_path, (220, 30, 20))
    harm(tmp_path / "0.png")
    if problem.startswith("no picture"):  # read when it was broken already
        policy = Policy.load(tmp_path / "shown.yaml")
        assert main(["taxonomy", "--policy", str(tmp_path / "shown.yaml")]) == 2
    with pytest.raises(ConfigError) as caught:
        rescore(Collection.open(small_scan), model, policy, out=tmp_path / "out")
    where = f"{tmp_path / 'shown.yaml'}: node x.1: example {tmp_path / '0.png'}: "
    assert str(caught.value).startswith(where)
    assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "empty").rglob("phrases-*"))


def test_rescore_with_examples_from_the_command_line(
    small_scan: Path, tmp_path: Path, tiny_model: SafetyModel, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "_cache_folder", lambda: tiny_model._cache)
    shown(tmp_path, (220, 30, 20))
    command = ["rescore", str(small_scan), "--policy", str(tmp_path / "shown.yaml"), "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    (tmp_path / "0.png").unlink()
    assert main([*command, str(tmp_path / "two")]) == 2
    assert "node x.1: example 0.png: cannot be read (no such file)" in capsys.readouterr().err


# ---------------------------------------------------------------- example texts

FLAGS = ("red flags on the beach", "raise the red flag", "two red flags in the sand")


def said(*texts: str, **settings: Any) -> Policy:
    """A policy with a node that these texts tell."""
    rule = {"parent": "D6", "name": "Red flags", "definition": "Red flags.", "threshold": 0.3,
            "example_texts": list(texts), **settings}  # fmt: skip
    return Policy.from_dict({"nodes": {"x.1": rule}})


def test_example_texts_decide_for_texts_and_leave_pictures(model: SafetyModel) -> None:
    asked = {"texts": ["red flags in the harbour"], "images": [png((20, 30, 220))]}
    (_, seen), (_, again) = (model.moderate(**asked, policy=p) for p in (said(), said(*FLAGS)))
    assert seen.channels == again.channels
    column = model.place(model.view(said()))[0].index["x.1"]
    vectors = model.encode_text(asked["texts"]).tangent().numpy()

    def margin(policy: Policy) -> float:
        return float(model.score_vectors("text", vectors, model.view(policy)).margins[0, column])

    other = said("a quiet evening with soup", "my cat is asleep", "two spoons of sugar")
    assert margin(said(*FLAGS)) > margin(other)


def test_a_node_with_example_texts_keeps_its_aperture_and_leaves_the_others(
    model: SafetyModel,
) -> None:
    placed = model._placed(model.view(said(*FLAGS)))
    row = placed.table.index["x.1"]
    assert float(placed.said.radius()[row]) == pytest.approx(float(placed.apexes.radius()[row]))
    same = (placed.said.space == placed.apexes.space).all(dim=1)
    assert same.sum() == len(same) - 1
    assert not same[row]
    assert placed.shown is placed.apexes


@pytest.mark.parametrize(
    "settings",
    [{"status": "non_violating"}, {"parent": "S", "threshold": None}],
    ids=["off", "background"],
)
def test_example_texts_tell_what_a_node_means_whether_it_counts_or_not(
    model: SafetyModel, settings: dict[str, Any]
) -> None:
    placed = model._placed(model.view(said(*FLAGS, **settings)))
    row = placed.table.index["x.1"]
    assert not torch.equal(placed.said.space[row], placed.apexes.space[row])


def test_words_that_stay_are_said(model: SafetyModel, caplog: pytest.LogCaptureFixture) -> None:
    policy = said("red flags", "blue soup of seven beans")
    placed = model._placed(model.view(policy))
    row = placed.table.index["x.1"]
    stay = torch.equal(placed.said.space[row], placed.apexes.space[row])
    assert ("texts are judged by the words" in caplog.text) == stay


def test_a_rescore_with_example_texts_is_a_scan_with_them_and_encodes_them_once(
    small_scan: Path, tmp_path: Path, tiny_model: SafetyModel, cache: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "red flags in the harbour"}\n')
    policy = said(*FLAGS)
    out = scan_and_rescore(tmp_path / "in.jsonl", policy, tmp_path, tiny_model, cache)
    assert len(list(cache.glob("examples-*/*.safetensors"))) == len(FLAGS)
    made = Collection.open(out["again"])
    kept = stored_policy(made.meta)
    assert kept == replace(policy, origin=kept.origin)
    assert not rescore(made, model_of(made), kept, out=out["third"]).encoded
    assert len({(out[name] / "results.jsonl").read_bytes() for name in out if name != "plain"}) == 1


def test_an_example_text_in_another_language_is_warned_of(
    model: SafetyModel, caplog: pytest.LogCaptureFixture
) -> None:
    german = "rote Fahnen wehen heute am ganzen Strand entlang"
    model.place(model.view(said(german, "red flags")))
    assert german in caplog.text


# ---------------------------------------------------------------- review band


def test_a_policy_moves_the_review_band_in_a_scan_and_in_a_rescore(
    source: Path, default: Collection, tmp_path: Path, model: SafetyModel
) -> None:
    lines = (default.folder / "results.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    risks = sorted(r["p_unsafe"] for r in results if r["rating"] != "unsafe" and not r["error"])
    wide = Policy.from_dict({"review": {"risk": risks[0] / 2}})
    # no band, and nothing new is looked at: what is left is what could not be read
    none = Policy.from_dict({"review": {"risk": 1, "novelty": 0}})
    counts = {}
    for name, policy in (("wide", wide), ("none", none)):
        fresh = scanned(source, tmp_path / f"{name}-fresh", model, policy)
        counts[name] = rescore(default, model, policy, out=tmp_path / name).scan.ratings
        made = Collection.open(tmp_path / name)
        assert made.meta == fresh.meta
        assert stored_policy(made.meta).hash == policy.hash
        ratings = [r["rating"] for r in table_of(made)]
        assert ratings == [r["rating"] for r in table_of(fresh)]
    assert counts["wide"]["safe"] == 0
    assert counts["none"]["review"] < counts["wide"]["review"]
    assert counts["none"]["unsafe"] == counts["wide"]["unsafe"]


def test_novelty_of_the_review_band_counts(model: SafetyModel) -> None:
    texts = [f"sentence {i} about the weather" for i in range(6)]
    off = {f"D{i}": {"status": "non_violating"} for i in range(1, 13)}
    rated = [
        {r.rating for r in model.moderate(texts, policy=Policy.from_dict(
            {"nodes": off, "review": {"novelty": level}}))}
        for level in (0.0, 1.0)
    ]  # fmt: skip
    assert rated == [{"safe"}, {"review"}]
