"""Results out, decisions in, shards annotated, items added."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hysafe.app.annotate import AUDIT, annotate, shard_paths
from hysafe.app.cli import main
from hysafe.app.export import COLUMNS, FORMATS, export, import_decisions, read_decisions
from hysafe.app.pipeline import SafetyModel, ScanOptions
from hysafe.app.redirect import redirect_queries
from hysafe.app.rescore import diff_json, report_stored, rescore
from hysafe.app.scan import add, scan
from hysafe.app.search import search, search_line, write_found
from hysafe.app.stored import view_of
from hysafe.errors import CollectionError, InputError
from hysafe.index import Collection
from hysafe.taxonomy import Policy

OFF = {"nodes": {f"D{i}": {"status": "non_violating"} for i in range(1, 13)}}
TEXTS = ["=HYPERLINK(1)", "a quiet street", 'selling, "a" pistol', "last\nline"]


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "in"
    folder.mkdir()
    (folder / "red.png").write_bytes(png((200, 0, 0)))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return folder


@pytest.fixture
def collection(source: Path, tmp_path: Path, tiny_model: SafetyModel) -> Collection:
    scan([str(source)], tmp_path / "out", tiny_model, options=ScanOptions(8, 0), report=False)
    return Collection.open(tmp_path / "out")


def decide(collection: Collection, path: Path, *rows: dict[str, Any]) -> tuple[int, int]:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return import_decisions(collection, path)


def decision(**values: Any) -> dict[str, Any]:
    return {"id": "in/red.png", "rating": "safe", "author": "ann", "time": "2026-03-01T12:00:00Z",
            "reason": "a red square", **values}  # fmt: skip


# ---------------------------------------------------------------- export


def results_of(collection: Collection) -> list[dict[str, Any]]:
    lines = (collection.folder / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_csv_and_parquet_hold_the_results(collection: Collection, tmp_path: Path) -> None:
    decide(collection, tmp_path / "d.jsonl", decision())
    results = results_of(collection)
    assert export(collection, tmp_path / "a/out.csv", "csv") == (6, 0)
    assert export(collection, tmp_path / "out.parquet", "parquet") == (6, 0)
    with (tmp_path / "a/out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert list(rows[0]) == list(table[0]) == list(COLUMNS)
    for result, row, typed in zip(results, rows, table, strict=True):
        assert row["id"] == typed["id"] == result["id"]
        assert row["rating"] == typed["rating"] == result["rating"]
        assert typed["p_unsafe"] == result["p_unsafe"]
        assert typed["nodes"] == [p["node"] for p in result["paths"]]
        assert row["error"] == (result["error"] or {}).get("message", "")
    assert {r["text"] for r in table} >= {*TEXTS, ""}
    assert "'=HYPERLINK(1)" in {r["text"] for r in rows}  # no formula for a spreadsheet
    decided = [r for r in table if r["decision"]]
    assert [(r["id"], r["decision"], r["decision_author"]) for r in decided] == [
        ("in/red.png", "safe", "ann")
    ]


def test_label_studio_tasks(collection: Collection, tmp_path: Path) -> None:
    decide(collection, tmp_path / "d.jsonl", decision())
    export(collection, tmp_path / "tasks.json", "labelstudio")
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert len(tasks) == 6
    config = (tmp_path / "tasks.xml").read_text()
    for task, result in zip(tasks, results_of(collection), strict=True):
        (prediction,) = task["predictions"]
        (choice,) = prediction["result"]
        assert choice["value"] == {"choices": [result["rating"]]}
        assert f'name="{choice["from_name"]}"' in config
        assert f'name="{choice["to_name"]}"' in config
        assert task["data"]["text"]
    (decided,) = [t for t in tasks if "annotations" in t]
    assert decided["annotations"][0]["result"][0]["value"] == {"choices": ["safe"]}


def test_fiftyone_holds_the_pictures_that_are_files(collection: Collection, tmp_path: Path) -> None:
    decide(collection, tmp_path / "d.jsonl", decision())
    assert export(collection, tmp_path / "fo", "fiftyone") == (2, 4)
    data, labels, decisions = (
        json.loads((tmp_path / f"fo/{name}.json").read_text())
        for name in ("data", "labels", "decisions")
    )
    assert {Path(p).name for p in data.values()} == {"red.png", "broken.png"}
    assert set(labels["labels"]) == set(data)
    assert set(labels["labels"].values()) <= {"safe", "unsafe", "review"}
    assert sorted(map(str, decisions["labels"].values())) == ["None", "safe"]


def test_results_of_another_table_are_not_exported(collection: Collection, tmp_path: Path) -> None:
    file = collection.folder / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for wrong in (lines[:-1], [*lines, lines[0]], [lines[1], lines[0], *lines[2:]]):
        file.write_text("".join(wrong))
        with pytest.raises(CollectionError, match="not that of the table.*rescore"):
            export(collection, tmp_path / "x.csv", "csv")
    file.unlink()
    with pytest.raises(CollectionError, match="no results.jsonl"):
        export(collection, tmp_path / "x.csv", "csv")
    assert not (tmp_path / "x.csv").exists()


# ---------------------------------------------------------------- decisions


def test_the_latest_decision_counts_and_none_is_doubled(
    collection: Collection, tmp_path: Path
) -> None:
    file = tmp_path / "d.jsonl"
    late = decision(rating="review", author="bo", time="2026-03-02T00:00:00+01:00")
    assert decide(collection, file, decision(), late, decision()) == (3, 2)
    assert decide(collection, file, decision(), late) == (2, 0)
    early = decision(rating="unsafe", author="cy", time="2026-01-01")
    assert decide(collection, file, early) == (1, 1)
    found = Collection.open(collection.folder).decisions()
    assert {k: (d.rating, d.author) for k, d in found.items()} == {"in/red.png": ("review", "bo")}
    assert len(collection.all_decisions()) == 3


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2: no JSON .*Give one object a line"),
        ("[]", "line 2: expected an object"),
        (json.dumps(decision(rating="maybe")), "line 2: rating is 'maybe'"),
        (json.dumps(decision(author="")), "line 2: `author` is missing"),
        (json.dumps(decision(time="yesterday")), "line 2: time is 'yesterday'"),
        (json.dumps(decision(id="in/none.png")), "line 2: no item has the id 'in/none.png'"),
    ],
)
def test_a_wrong_decision_stops_the_import_before_anything_is_kept(
    collection: Collection, tmp_path: Path, line: str, problem: str
) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(decision()) + "\n" + line + "\n")
    with pytest.raises(InputError, match=problem):
        import_decisions(collection, tmp_path / "d.jsonl")
    assert collection.decisions() == {}


def test_a_decision_without_a_time_is_made_now(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "a", "rating": "safe", "author": "x"}))
    (made,) = read_decisions(tmp_path / "d.jsonl")
    assert made.moment.tzinfo is not None


def test_only_line_feeds_end_a_decision_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    reasons = ["one\u2028two", "one\x0btwo", "one\x85two"]
    rows = [json.dumps(decision(reason=r), ensure_ascii=False) for r in reasons]
    text = "\ufeff" + "\r\n".join(rows)
    (tmp_path / "d.jsonl").write_bytes(text.replace("\x0b", "\\u000b").encode())
    assert [d.reason for d in read_decisions(tmp_path / "d.jsonl")] == reasons


def test_decisions_are_shown_kept_by_a_rescore_and_heeded_by_a_redirect(
    collection: Collection, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    decide(collection, tmp_path / "d.jsonl", decision(rating="unsafe"))
    found = search(collection, tiny_model, text="x")
    (shown,) = [search_line(f, 1) for f in found if f.decision]
    assert shown["id"] == "in/red.png"
    assert shown["decision"]["author"] == "ann"
    policy = Policy.from_dict(OFF)
    summary = rescore(collection, tiny_model, policy, out=tmp_path / "two")
    assert Collection.open(tmp_path / "two").decisions() == collection.decisions()
    lines = [json.loads(line) for line in diff_json(summary.diff).splitlines()[1:]]
    assert {line.get("decision") for line in lines if line["id"] == "in/red.png"} <= {"unsafe"}
    query = tiny_model.encode_text(["anything"])
    (answer,) = redirect_queries(collection, tiny_model, query, policy=policy, k=99)
    assert {f.result.rating for f in answer.found} == {"safe"}
    assert "in/red.png" not in {f.item.id for f in answer.found}


def test_decisions_stand_in_the_report_and_in_pages(
    collection: Collection, tmp_path: Path, tiny_model: SafetyModel,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def why(name: str) -> str:
        page = (collection.folder / "report.html").read_text()
        block = page.split('type="application/json"', 1)[1].split(">", 1)[1].split("</script>")[0]
        (item,) = [i for i in json.loads(block)["items"] if i["id"] == name]
        return str(item["why"])

    words = "ann decided safe, 2026-03-01T12:00:00Z: a <red> square."
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(decision(reason="a <red> square")))
    assert main(["import", str(collection.folder), str(file)]) == 0
    assert not (collection.folder / "report.html").exists()  # there was none
    rescore(collection, tiny_model, report=True)
    assert why("in/red.png").startswith(words)
    assert "decided" not in why("in/broken.png")
    later = decision(rating="unsafe", author="bo", time="2026-03-02", reason="")
    file.write_text(json.dumps(later))
    capsys.readouterr()
    assert main(["import", str(collection.folder), str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "1 decisions, 1 of them new"
    assert why("in/red.png").startswith("bo decided unsafe, 2026-03-02.")
    again = Collection.open(collection.folder)
    found = search(again, tiny_model, like="in/texts.jsonl#1")
    write_found(tmp_path / "found.html", "t", found, view_of(again, tiny_model, None), again)
    assert "bo decided unsafe, 2026-03-02" in (tmp_path / "found.html").read_text()
    (collection.folder / "results.jsonl").write_text("")
    with pytest.raises(CollectionError, match="not that of the table"):
        report_stored(again, tiny_model)
    (collection.folder / "results.jsonl").unlink()
    capsys.readouterr()
    file.write_text(json.dumps(decision(author="cy")))
    assert main(["import", str(collection.folder), str(file)]) == 0
    shown = capsys.readouterr()
    assert shown.out == "1 decisions, 1 of them new\n"
    assert shown.err.count("\n") == 1
    assert "the decisions are kept, but" in shown.err
    assert main(["import", str(collection.folder), str(file), "--report"]) == 1


def test_a_decision_does_not_hold_for_other_content(
    collection: Collection, tmp_path: Path, source: Path, tiny_model: SafetyModel
) -> None:
    decide(collection, tmp_path / "d.jsonl", decision())
    assert set(collection.decisions()) == {"in/red.png"}
    other = tmp_path / "in"
    other.mkdir()
    (other / "red.png").write_bytes(png((0, 200, 0)))
    scan([str(other)], collection.folder, tiny_model, options=ScanOptions(8, 0), report=False)
    again = Collection.open(collection.folder)
    assert len(again) == 1
    assert again.decisions() == {}


# ---------------------------------------------------------------- add


def test_what_is_added_is_judged_as_in_one_scan(
    source: Path, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    policy = Policy.from_dict({"name": "mild", "nodes": {"6.1": {"threshold": 0.9}}})
    options = ScanOptions(8, 0)
    one, two = tmp_path / "one", tmp_path / "two"
    files = [str(source / "red.png"), str(source / "texts.jsonl")]
    scan(files, one, tiny_model, policy=policy, options=options, report=False)
    scan(files[:1], two, tiny_model, policy=policy, options=options, report=False)
    collection = Collection.open(two)
    query = tiny_model.encode_text(["a quiet street"])
    assert len(collection.search(query, model=tiny_model.hash)[0]) == 1
    summary = collection.add(tiny_model, files, options=options)
    assert summary.items == 4  # the picture is known
    assert len(collection.search(query, model=tiny_model.hash)[0]) == 5
    lines = [(folder / "results.jsonl").read_text() for folder in (one, two)]
    assert lines[0] == lines[1]
    assert add(collection, tiny_model, files, options=options).items == 0


def test_added_items_of_a_known_name_get_another_id(
    collection: Collection, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    other = tmp_path / "in"
    other.mkdir()
    (other / "red.png").write_bytes(png((0, 0, 90)))
    assert add(collection, tiny_model, [str(other)], options=ScanOptions(8, 0)).items == 1
    assert Collection.open(collection.folder).place_of("in/red.png~2") == 6
    assert results_of(collection)[-1]["id"] == "in/red.png~2"


def test_adding_with_another_reader_is_refused(
    collection: Collection, source: Path, tiny_model: SafetyModel
) -> None:
    class Reader:
        version = "reader 1"

    with pytest.raises(CollectionError, match="scanned without reading text"):
        add(collection, tiny_model, [str(source)], ocr=Reader())


def test_adding_in_other_numbers_is_refused(
    collection: Collection, source: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model, "bf16", True)
    with pytest.raises(CollectionError, match="scanned without --bf16"):
        add(collection, tiny_model, [str(source)])


# ---------------------------------------------------------------- annotate


def shard(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"made by": "a test"})
    pq.write_table(table, path, row_group_size=3)


def test_shards_come_back_with_our_columns_row_for_row(
    tmp_path: Path, tiny_model: SafetyModel
) -> None:
    first = [{"text": f"sentence {i}", "n": i, "hysafe_rating": "old"} for i in range(7)]
    first[4]["text"] = ""  # nothing to judge
    shard(tmp_path / "in/a.parquet", first)
    shard(tmp_path / "in/b.parquet", [
        {"image": {"bytes": png((200, 0, 0)), "path": "x.png"}, "n": 0},
        {"image": {"bytes": b"broken", "path": "y.png"}, "n": 1},
    ])  # fmt: skip
    audit = annotate([str(tmp_path / "in")], tmp_path / "out", tiny_model,
                     options=ScanOptions(4, 0))  # fmt: skip
    assert (audit.shards, audit.items) == (2, 9)
    table = pq.read_table(tmp_path / "out/a.parquet")
    assert table.schema.metadata[b"made by"] == b"a test"
    rows = table.to_pylist()
    assert [r["n"] for r in rows] == list(range(7))
    assert [r["text"] for r in rows] == [r["text"] for r in first]
    alone = tiny_model.moderate(texts=[r["text"] for r in first])
    for row, result in zip(rows, alone, strict=True):
        assert row["hysafe_rating"] == result.rating
        assert row["hysafe_node"] == (result.paths[0].node if result.paths else None)
        assert row["hysafe_nodes"] == [p.node for p in result.paths]
        assert (row["hysafe_p_unsafe"] is None) == (result.p_unsafe is None)
    assert rows[4]["hysafe_rating"] == "review"
    assert "neither text nor picture" in rows[4]["hysafe_error"]
    pictures = pq.read_table(tmp_path / "out/b.parquet").to_pylist()
    assert pictures[0]["image"]["bytes"] == png((200, 0, 0))
    assert pictures[1]["hysafe_rating"] == "review"
    summary = json.loads((tmp_path / "out" / AUDIT).read_text())
    assert summary["items"] == 9
    assert sum(summary["ratings"].values()) == 9
    assert summary["errors"] == {"InputError": 2}
    for counts in summary["nodes"].values():
        assert 0 < sum(v for k, v in counts.items() if k != "name") <= 9


def test_an_empty_shard_stays_a_shard(tmp_path: Path, tiny_model: SafetyModel) -> None:
    schema = pa.schema([("text", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    annotate([str(tmp_path / "a.parquet")], tmp_path / "out", tiny_model)
    table = pq.read_table(tmp_path / "out/a.parquet")
    assert table.num_rows == 0
    assert "hysafe_rating" in table.column_names


def test_shards_that_cannot_be_annotated(tmp_path: Path, tiny_model: SafetyModel) -> None:
    shard(tmp_path / "a/x.parquet", [{"text": "a"}])
    shard(tmp_path / "b/x.parquet", [{"text": "b"}])
    with pytest.raises(InputError, match="2 shards have this name"):
        shard_paths([str(tmp_path)])
    with pytest.raises(InputError, match="no Parquet file"):
        shard_paths([str(tmp_path / "none.parquet")])
    with pytest.raises(InputError, match="the shards stand there"):
        annotate([str(tmp_path / "a")], tmp_path / "a", tiny_model)
    shard(tmp_path / "c/numbers.parquet", [{"n": 1}])
    with pytest.raises(InputError, match="no column of texts or pictures|could not be read"):
        annotate([str(tmp_path / "c")], tmp_path / "out", tiny_model)
    data = (tmp_path / "a/x.parquet").read_bytes()
    (tmp_path / "d").mkdir()
    (tmp_path / "d/cut.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError):
        annotate([str(tmp_path / "d")], tmp_path / "out", tiny_model)
    assert not list((tmp_path / "out").glob("*.part"))
    assert not list((tmp_path / "out").glob("*.parquet"))


# ---------------------------------------------------------------- the commands


def test_commands(
    collection: Collection, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(collection.folder)
    for form in FORMATS:
        assert main(["export", out, "--format", form, str(tmp_path / f"x.{form}")]) == 0
    assert "6 items" in capsys.readouterr().out
    (tmp_path / "d.jsonl").write_text(json.dumps(decision()) + "\n")
    assert main(["import", out, str(tmp_path / "d.jsonl")]) == 0
    assert "1 decisions, 1 of them new" in capsys.readouterr().out
    assert main(["import", out, str(tmp_path / "none.jsonl")]) == 2
    capsys.readouterr()
    shard(tmp_path / "in/a.parquet", [{"text": "a"}, {"text": "b"}])
    assert main(["annotate", str(tmp_path / "in"), "--out", str(tmp_path / "o"), "--no-ocr",
                 "--model", str(tiny_folder)]) == 0  # fmt: skip
    assert "2 items" in capsys.readouterr().out


def tar(path: Path, *members: tuple[str, bytes | tarfile.TarInfo]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as made:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                made.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 7
            made.addfile(info, io.BytesIO(content))
    return path


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path, "r:") as made:
        names = made.getnames()
        assert len(set(names)) == len(names)
        return {name: made.extractfile(name).read() for name in names}  # type: ignore[union-attr]


def test_a_tar_comes_back_with_an_answer_beside_each_sample(
    tmp_path: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tarfile.TarInfo("l.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    red, text = png((200, 0, 0)), b"selling a pistol"
    kept: list[tuple[str, bytes | tarfile.TarInfo]] = [
        ("a/1.png", red), ("a/1.txt", text), ("2.jpg", red[:40]), ("2.json", b'{"n": 1}'),
        ("3.json", b'{\n "n": 3,\n "Caption": "a quiet street"\n}'), ("4.webp", red),
        ("4.png", red), ("5.txt", b"\xff"), ("6.txt", b"x" * 50), ("7.json", b"[1]"),
    ]  # fmt: skip
    out_of_place: list[tuple[str, bytes | tarfile.TarInfo]] = [
        ("../x.png", red), ("/x.png", red), ("a/../x.txt", text), ("l.jpg", link),
        ("1.cls", b"0"), ("a/1.hysafe.json", b"{}"), ("noend", b""), ("c:x.txt", text),
    ]  # fmt: skip
    tar(tmp_path / "in/s.tar", *kept[:2], *out_of_place, *kept[2:])
    monkeypatch.setattr("hysafe.app.annotate.MAX_TEXT_BYTES", 49)
    audit = annotate([str(tmp_path / "in")], tmp_path / "out", tiny_model,
                     options=ScanOptions(4, 0))  # fmt: skip
    found = members_of(tmp_path / "out/s.tar")
    answers = {k: json.loads(found.pop(k)) for k in list(found) if k.endswith(".hysafe.json")}
    assert found == dict(kept)
    assert list(answers) == [f"{k}.hysafe.json" for k in ("a/1", "2", "3", "4", "5", "6", "7")]
    errors = [a["error"] or "" for a in answers.values()]
    for error, part in zip(
        errors, ("", "", "", "second picture", "no text", "more than the 49 allowed", "neither"),
        strict=True,
    ):  # fmt: skip
        assert part in error
    assert errors[0] == errors[2] == ""
    assert errors[1]  # the broken picture
    assert all(a["rating"] == "review" for a, e in zip(answers.values(), errors, strict=True) if e)
    (alone,) = tiny_model.moderate(texts=["a quiet street"])
    three = answers["3.hysafe.json"]
    assert (three["rating"], three["p_unsafe"]) == (alone.rating, alone.p_unsafe)
    assert three["nodes"] == [p.node for p in alone.paths]
    assert (audit.items, audit.left_out.total()) == (7, 7)
    assert audit.left_out[".cls"] == 1
    assert not list(tmp_path.rglob("*.part"))
    assert {p.name for p in tmp_path.rglob("*")} == {"in", "out", "s.tar", AUDIT}


def test_tars_that_cannot_be_annotated(tmp_path: Path, tiny_model: SafetyModel) -> None:
    lines: list[tuple[str, bytes | tarfile.TarInfo]] = [
        (f"{i}.txt", b"a line of text") for i in range(9)
    ]
    data = tar(tmp_path / "in/whole.tar", *lines).read_bytes()
    torn = bytearray(data)
    torn[1024 * 4] ^= 0xFF  # a header: tarfile would take it for the end
    for number, (content, problem) in enumerate((
        (data[:2000], "damaged"), (bytes(torn), "damaged.*no valid header"),
        (b"no tar" * 200, "no readable tar"), (tar(tmp_path / "e/e.tar").read_bytes(), "no sample"),
    )):  # fmt: skip
        path = tmp_path / f"{number}/s.tar"
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(InputError, match=problem):
            annotate([str(path)], tmp_path / "out", tiny_model, options=ScanOptions(4, 0))
        assert not list((tmp_path / "out").glob("s.tar*"))
