"""Discovery: what a policy does not name is found, named, accepted and found again."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from hysafe.app import discover as app
from hysafe.app.cli import main
from hysafe.app.discover import accept, discover, load_namer, novel_places
from hysafe.app.pipeline import SafetyModel, ScanOptions, load
from hysafe.app.scan import scan
from hysafe.app.search import rank_by_node
from hysafe.data.contrast import contrast_set
from hysafe.errors import ConfigError
from hysafe.guard.naming import Naming
from hysafe.index import Collection
from hysafe.taxonomy import Policy, PolicyView, load_taxonomy

HIDDEN = "6.4"
POLICY = {"name": "shop", "nodes": {HIDDEN: {"status": "non_violating"}}}
PHRASES = ["vape sales", "online casino bets", "cheap cigarettes", "bus timetables", "rose pruning",
           "ransomware kits", "dog walking", "fake passports", "bread recipes"]  # fmt: skip


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def mini() -> SafetyModel:
    return load("mini")


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], np.ndarray]:
    """Sentences of a category that the policy switches off, of others, and harmless ones."""
    samples = [
        s for s in contrast_set("train") if not (s.extra["form"] or s.extra["functionality"])
    ]
    hidden = [s for s in samples if s.nodes == (HIDDEN,)][:40]
    others = [s for s in samples if not s.safe and s.nodes != (HIDDEN,)][::90]
    harmless = [s for s in samples if s.safe and s.nodes != (f"S.{HIDDEN}",)][::120]
    chosen = [*hidden, *others, *harmless]
    return [str(s.text) for s in chosen], np.arange(len(chosen)) < len(hidden)


@pytest.fixture(scope="module")
def scanned(
    mini: SafetyModel, texts: tuple[list[str], np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("discover")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[0]))
    policy = Policy.from_dict(POLICY)
    scan([str(folder / "in.jsonl")], folder / "out", mini, policy=policy,
         options=ScanOptions(64, 0), report=False)  # fmt: skip
    return folder / "out"


@pytest.fixture
def few_phrases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hysafe.guard.naming.bundled_phrases", lambda *_: tuple(PHRASES))


@pytest.mark.usefixtures("few_phrases")
def test_the_loop_from_unnamed_to_retrieved(
    scanned: Path, mini: SafetyModel, texts: tuple[list[str], np.ndarray], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    truth = texts[1]
    folder = shutil.copytree(scanned, tmp_path / "c")
    flagged = np.isin(np.arange(len(truth)), novel_places(Collection.open(folder)))
    assert flagged[truth].mean() > 1.5 * flagged[~truth].mean()

    assert main(["discover", str(folder), "--min-size", "6"]) == 0
    shown = capsys.readouterr().out
    assert f"{flagged.sum()} of {len(truth)} items are novel" in shown
    path = folder / "proposals.yaml"
    assert str(path) in shown
    proposals = yaml.safe_load(path.read_text())["proposals"]
    assert not any(p["accept"] for p in proposals)
    best = max(proposals, key=lambda p: sum(truth[int(e.split("#")[1]) - 1] for e in p["examples"]))
    assert best["name"] in ("Vape sales", "Online casino bets", "Cheap cigarettes")
    assert "<h2>" in (folder / "proposals.html").read_text()

    best["accept"] = True  # a person says so
    path.write_text(yaml.safe_dump({"proposals": proposals, "policy": POLICY}))
    out = tmp_path / "new.yaml"
    arguments = ["discover", "accept", str(path), "--out", str(out), "--rescore", str(folder)]
    assert main(arguments) == 0
    assert f"proposal {best['key']}: x.1 {best['name']}" in capsys.readouterr().out
    policy = Policy.load(out)
    assert policy.rules[HIDDEN].status == "non_violating"  # what was there stays
    after = Collection.open(folder)
    assert after.meta.policy == policy.hash
    first = np.array(after.to_arrow(["node"])["node"].to_pylist(), dtype=str) == "x.1"
    assert (first & truth).sum() / first.sum() > 0.6
    assert (first & truth).sum() / truth.sum() > 0.5
    ranked = rank_by_node(after, mini, mini.view(policy), "x.1", k=20)
    assert np.mean([truth[row] for row, _, _ in ranked]) > 0.6


@pytest.mark.usefixtures("few_phrases")
def test_a_file_that_a_person_may_have_edited_is_not_replaced(
    scanned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(scanned, tmp_path / "c")
    (folder / "proposals.yaml").write_text("mine")
    assert main(["discover", str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "proposals.yaml").read_text() == "mine"


class Fixed:
    """Names by a word in the text, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def name(
        self, vectors: np.ndarray, modalities: Sequence[str], texts: Sequence[str], view: PolicyView
    ) -> list[Naming | None]:
        assert len(vectors) == len(modalities) == len(texts)
        self.asked += modalities
        return [Naming(t.split()[0], "first word") if t else None for t in texts]


@pytest.fixture(scope="module")
def mixed(tiny_model: SafetyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and pictures, half of which are marked as novel in the table."""
    folder = tmp_path_factory.mktemp("mixed")
    source = folder / "in"
    source.mkdir()
    lines = [f"ivory tusk carving number {i}" for i in range(12)]
    lines += [
        f"{w} and nothing else" for w in ("rain", "train", "paint", "grain", "stain", "chain")
    ]
    (source / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    for i in range(12):
        (source / f"red{i:02}.png").write_bytes(png((200 + i, 10, 10)))
        (source / f"x{i:02}.png").write_bytes(png((20 * i, 255 - 20 * i, 100)))
    (source / "broken.png").write_bytes(png((1, 2, 3))[:50])
    scan([str(source)], folder / "out", tiny_model, options=ScanOptions(64, 0), report=False)
    return folder / "out"


def marked(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Places of the items that are novel by decree."""
    ids = collection.to_arrow(["id"])["id"].to_pylist()
    places = np.array([k for k, i in enumerate(ids) if "red" in i or "texts" in i])
    monkeypatch.setattr(app, "novel_places", lambda *_: places)
    return places


def test_pictures_and_texts_are_never_in_one_cluster(
    mixed: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = Collection.open(mixed)
    places = marked(collection, monkeypatch)
    namer = Fixed()
    found = discover(collection, tiny_model, namer=namer, min_size=8)
    again = discover(collection, tiny_model, namer=Fixed(), min_size=8)
    assert [p.to_dict() for p in again.proposals] == [p.to_dict() for p in found.proposals]
    assert (found.items, found.novel, found.used) == (len(collection), len(places), len(places))
    assert {p.channel for p in found.proposals} == {"image", "text"}
    assert set(namer.asked) == {"image", "text"}
    ids = collection.to_arrow(["id"])["id"].to_pylist()
    for p in found.proposals:
        members = [ids[k] for k in found.members(p)]
        assert len(members) == p.size >= 8
        assert members[: len(p.examples)] == list(p.examples)
        assert {"red" in m for m in members} == {p.channel == "image"}
        assert p.name.startswith("Unnamed" if p.channel == "image" else "Ivory")
        assert len(p.pictures) == (p.size if p.channel == "image" else 0)
        told = p.rule.get("example_texts", [])
        assert len(told) == (0 if p.channel == "image" else p.size)
        assert all(t.startswith("ivory") or t.endswith("else") for t in told)
        for example, member in zip(p.pictures, members, strict=False):
            assert Path(example.file).name in member
            assert hashlib.sha256(Path(example.file).read_bytes()).hexdigest() == example.sha256
    monkeypatch.setattr(app, "SHOWN", 3)  # from the medoid to the outermost
    spread = discover(collection, tiny_model, namer=namer)
    (p, *_) = (p for p in spread.proposals if p.channel == "image")
    members = [ids[k] for k in spread.members(p)]
    shown = [members[k] for k in (0, round((p.size - 1) / 2), p.size - 1)]
    assert all(Path(e.file).name in m for e, m in zip(p.pictures, shown, strict=True))
    bounded = discover(collection, tiny_model, namer=namer, min_size=2, most=9)
    assert (bounded.used, bounded.novel) == (9, len(places))
    assert sum(p.size for p in bounded.proposals) <= 9


def test_texts_that_were_read_in_parts_are_no_examples() -> None:
    found = app._Novel(texts=["a", "b", "A ", "c"], whole=[True, False, True, True])
    assert app._texts(found, np.arange(4)) == ["a", "c"]
    assert app._texts(found, np.array([0, 1, 2])) == []
    assert app._texts(found, np.array([1])) == []


def test_the_space_is_whitened_by_what_is_not_novel(
    mixed: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = Collection.open(mixed)
    places = marked(collection, monkeypatch)[:-2]  # two texts are ordinary
    monkeypatch.setattr(app, "novel_places", lambda *_: places)
    seen: list[np.ndarray] = []
    fit = app.Whitening.fit
    monkeypatch.setattr(app.Whitening, "fit", lambda v: seen.append(v) or fit(v))
    discover(collection, tiny_model, namer=Fixed(), min_size=8)
    assert sorted(len(v) for v in seen) == [2, 12]  # two texts, the pictures that are not red


def test_the_page_is_safe_and_shows_examples(
    mixed: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Hostile(Fixed):
        def name(self, *given: object) -> list[Naming | None]:  # type: ignore[override]
            return [Naming("<script>alert(1)</script>", "")] * len(given[0])  # type: ignore[arg-type]

    collection = Collection.open(mixed)
    marked(collection, monkeypatch)
    found = discover(collection, tiny_model, namer=Hostile(), min_size=8)
    app.write_page(tmp_path / "p.html", found, collection, tiny_model)
    page = (tmp_path / "p.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "ivory tusk carving" in page
    assert page.count("data:image/jpeg") == 8
    assert "blur" in page


def test_novel_is_by_p_value_or_a_rating_that_no_node_explains(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    rows = [
        (0.05, 0.9, "safe", None, None), (0.9, 0.01, "safe", None, None),
        (0.9, 0.9, "review", None, None), (None, None, "unsafe", None, None),
        (0.06, 0.9, "safe", None, None), (0.9, 0.9, "unsafe", "6.1", None),
        (None, None, "review", None, "InputError"), (None, None, "safe", None, None),
    ]  # fmt: skip
    types = (pa.float32(), pa.float32(), pa.string(), pa.string(), pa.string())
    columns = [pa.array(c, t) for c, t in zip(zip(*rows, strict=True), types, strict=True)]
    batch = pa.RecordBatch.from_arrays(columns, names=list(app.COLUMNS))
    collection = Collection.open(mixed)
    monkeypatch.setattr(collection, "batches", lambda *_: iter([batch, batch]))
    assert novel_places(collection, 0.05).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def test_nothing_novel_is_no_proposal(
    mixed: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(app, "novel_places", lambda *_: np.empty(0, np.int64))
    collection = Collection.open(mixed)
    found = discover(collection, tiny_model)  # no phrase is read, either
    assert found.proposals == []
    app.write_discovery(tmp_path / "p.yaml", found, collection)
    with pytest.raises(ConfigError, match="no proposal is accepted"):
        accept(tmp_path / "p.yaml", tmp_path / "o.yaml", load_taxonomy())
    assert not (tmp_path / "o.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--namer", "oracle"), "Known: "),
        (("--alpha", "0"), "--alpha is 0"),
        (("--min-size", "1"), "--min-size"),
        (("--out", "page.html"), "ends in .html"),
    ],
)
def test_wrong_settings_are_one_line(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], problem: str,
) -> None:  # fmt: skip
    marked(Collection.open(mixed), monkeypatch)
    monkeypatch.chdir(tmp_path)
    out = () if "--out" in arguments else ("--out", "p.yaml")
    assert main(["discover", str(mixed), *out, *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_accept_takes_numbers_and_checks_the_collection_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.yaml"
    with pytest.raises(SystemExit):
        main(["discover", "accept", "p.yaml", "--out", str(out), "--only", "a"])
    assert "no numbers like 1,3" in capsys.readouterr().err
    arguments = ["discover", "accept", "p.yaml", "--out", str(out), "--rescore", str(tmp_path)]
    assert main(arguments) == 2
    assert "no collection there" in capsys.readouterr().err


def test_an_unknown_namer_is_named(tiny_model: SafetyModel) -> None:
    with pytest.raises(ConfigError, match="Known: "):
        load_namer("mini-guard-9", tiny_model)
