"""A scan that ends at any moment and starts again ends as if nothing had happened."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hysafe.app import output, watch
from hysafe.app.cli import main
from hysafe.app.lock import LOCK, BusyError, lock
from hysafe.app.output import RESULTS, Output, State
from hysafe.app.pipeline import TEXTS_PER_PICTURE, SafetyModel, ScanOptions
from hysafe.app.scan import add, scan
from hysafe.errors import CollectionError, ConfigError
from hysafe.index import Collection
from hysafe.taxonomy import Policy

OPTIONS = ScanOptions(batch=4, workers=0, commit=8)
PICTURES, LINES = 14, 24  # the lines fill more than one batch


def png(seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of pictures (one of them broken) and a file of lines: 38 items."""
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(PICTURES):
        (folder / f"{n:02d}.png").write_bytes(png(n) if n != 5 else png(n)[:30])
    (folder / "lines.txt").write_text("".join(f"line number {n}\n" for n in range(LINES)))
    return folder


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the items that went through the encoder."""
    ids: list[str] = []
    real = SafetyModel._encode

    def counting(self: SafetyModel, batch: Any) -> Any:
        ids.extend(s.item.id for s in batch.seen if s.known is None)
        return real(self, batch)

    monkeypatch.setattr(SafetyModel, "_encode", counting)
    return ids


def run(source: Path, out: Path, model: SafetyModel, **options: Any) -> bytes:
    """Scan, see that table and lines agree, and give the lines."""
    scan([str(source)], out, model, **{"options": OPTIONS, "report": False, **options})
    lines = (out / RESULTS).read_bytes()
    rows = [json.loads(line) for line in lines.splitlines()]
    table = Collection.open(out).to_arrow(["id", "content_hash", "rating"])
    assert table["id"].to_pylist() == [r["id"] for r in rows]
    assert table["content_hash"].to_pylist() == [r["hashes"]["content"] for r in rows]
    assert table["rating"].to_pylist() == [r["rating"] for r in rows]
    assert len({r["id"] for r in rows}) == len(rows)
    assert not (out / "next.lance").exists()
    assert not (out / "next.jsonl").exists()
    return lines


@contextmanager
def moments(out: Path, kept: Path) -> Iterator[Callable[[], list[Path]]]:
    """Copies of `out` as a kill would leave it, at every step of the writing."""
    kept.mkdir()
    count = 0

    def copy() -> None:
        nonlocal count
        shutil.copytree(out, kept / f"{count:02d}")
        count += 1

    def before_and_after(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            copy()
            value = real(*arguments, **options)
            copy()
            return value

        return wrapped

    def torn(stream: Any, data: bytes) -> None:
        write(stream, data[: len(data) // 2])
        copy()
        write(stream, data[len(data) // 2 :])

    write = output._write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "_write", torn)
        patch.setattr(Collection, "append", before_and_after(Collection.append))
        patch.setattr(Collection, "append_batches", before_and_after(Collection.append_batches))
        patch.setattr(output, "drop_table", before_and_after(output.drop_table))
        patch.setattr(State, "save", before_and_after(State.save))
        yield lambda: sorted(kept.iterdir())


def test_a_scan_killed_at_any_moment_ends_like_an_uninterrupted_one(
    source: Path, tmp_path: Path, tiny_model: SafetyModel, encoded: list[str]
) -> None:
    out = tmp_path / "out"
    with moments(out, tmp_path / "kept") as copies:
        whole = run(source, out, tiny_model)
    assert len(whole.splitlines()) == len(encoded) == PICTURES + LINES
    assert len(copies()) > 12
    for copy in copies():
        stood = len(Collection.open(copy)) if (copy / "items.lance").exists() else 0
        encoded.clear()
        assert run(source, copy, tiny_model) == whole, copy
        assert len(encoded) == PICTURES + LINES - stood  # a batch is written before the next


@pytest.fixture
def copies(source: Path) -> Path:
    """The folder with copies of some of its items, near to the first one and far from it."""
    for place in ("00a", "06a", "13a", "zz"):
        for n in range(PICTURES) if place == "zz" else (0, 1, 5):  # 5 is broken
            shutil.copy(source / f"{n:02d}.png", source / f"{place}-{n}.png")
    (source / "more.txt").write_text("a new line\n" + (source / "lines.txt").read_text())
    return source


@pytest.mark.parametrize("remembered", [65536, 1])
def test_copies_are_encoded_once_and_have_a_row_each(
    copies: Path, tmp_path: Path, tiny_model: SafetyModel, encoded: list[str],
    monkeypatch: pytest.MonkeyPatch, remembered: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("hysafe.app.scan.REMEMBERED", remembered)
    monkeypatch.setattr("hysafe.app.known.GROUP_ITEMS", 3)  # many are looked up after their first
    out, distinct = tmp_path / "out", PICTURES + LINES + 1
    summary = scan([str(copies)], out, tiny_model, options=OPTIONS, report=False)
    assert len(encoded) == distinct
    assert summary.known == 9 + PICTURES + LINES
    assert summary.items == distinct + summary.known
    assert summary.errors == {"InputError": 5}
    rows = Collection.open(out).to_arrow().to_pylist()
    lines = [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    first: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for row, line in zip(rows, lines, strict=True):
        row, line = ({k: v for k, v in d.items() if k not in ("id", "source")} for d in (row, line))
        assert first.setdefault(row["content_hash"], (row, line)) == (row, line)
    assert len(first) == distinct
    encoded.clear()
    run(copies, tmp_path / "fresh", tiny_model, fresh=True)
    assert len(encoded) == distinct


def test_a_scan_of_copies_killed_at_any_moment_ends_like_an_uninterrupted_one(
    copies: Path, tmp_path: Path, tiny_model: SafetyModel, encoded: list[str]
) -> None:
    with moments(tmp_path / "out", tmp_path / "kept") as kept:
        whole = run(copies, tmp_path / "out", tiny_model)
    for copy in kept()[::3]:
        encoded.clear()
        assert run(copies, copy, tiny_model) == whole, copy
        assert len(encoded) <= PICTURES + LINES + 1
    encoded.clear()
    (copies / "00.png").unlink()  # the first of its kind is gone
    run(copies, tmp_path / "out", tiny_model)
    assert not encoded


def test_a_whole_scan_is_not_done_again(
    source: Path, tmp_path: Path, tiny_model: SafetyModel, encoded: list[str]
) -> None:
    out = tmp_path / "out"
    whole = run(source, out, tiny_model)
    encoded.clear()
    version = Collection.open(out).version
    summary = scan([str(source)], out, tiny_model, options=OPTIONS)
    assert not encoded
    assert summary.known == summary.items == PICTURES + LINES
    assert summary.errors == {"InputError": 1}
    assert (out / RESULTS).read_bytes() == whole
    assert Collection.open(out).version == version
    assert (out / "report.html").stat().st_size > 1000
    (source / "zz.png").write_bytes(png(0))  # known under another name
    run(source, out, tiny_model)
    assert not encoded
    run(source, out, tiny_model, fresh=True)
    assert len(encoded) == PICTURES + LINES  # the copy is not


def change(source: Path) -> set[str]:
    """A picture comes, one changes, one goes, one is moved, a line comes; ids of the new ones."""
    (source / "000.png").write_bytes(png(100))
    (source / "03.png").write_bytes(png(103))
    (source / "07.png").unlink()
    (source / "10.png").rename(source / "moved.png")
    with (source / "lines.txt").open("a") as lines:
        lines.write("one more line\n")
    return {"in/000.png", "in/03.png", f"in/lines.txt#{LINES + 1}"}


def test_of_a_changed_folder_only_what_is_new_is_encoded(
    source: Path, tmp_path: Path, tiny_model: SafetyModel, encoded: list[str]
) -> None:
    out = tmp_path / "out"
    run(source, out, tiny_model)
    encoded.clear()
    new = change(source)
    with moments(out, tmp_path / "kept") as copies:
        found = run(source, out, tiny_model)
    assert set(encoded) == new
    assert found == run(source, tmp_path / "fresh", tiny_model)
    for copy in copies()[4::5]:
        unfinished = copy / "next.lance/_versions"
        kept = Collection.open(copy, name="next") if unfinished.is_dir() else None
        done = set(kept.to_arrow(["id"])["id"].to_pylist()) if kept else set()
        # killed, and then the folder changes once more
        (source / "zz.png").write_bytes(png(200))
        (source / "0000.png").write_bytes(png(201))
        encoded.clear()
        run(source, copy, tiny_model)
        assert {"in/zz.png", "in/0000.png"} <= set(encoded) <= new | {"in/zz.png", "in/0000.png"}
        assert not done & set(encoded), copy
        (source / "zz.png").unlink()
        (source / "0000.png").unlink()
        encoded.clear()
        assert run(source, copy, tiny_model) == found, copy
        assert not encoded


def test_another_policy_needs_no_encoder_and_another_model_does(
    source: Path, tmp_path: Path, tiny_model: SafetyModel, encoded: list[str]
) -> None:
    policy = Policy.from_dict({"name": "mine", "nodes": {"D1": {"status": "non_violating"}}})
    out = tmp_path / "out"
    run(source, out, tiny_model)
    encoded.clear()
    judged = run(source, out, tiny_model, policy=policy)
    assert not encoded
    assert judged == run(source, tmp_path / "fresh", tiny_model, policy=policy)
    encoded.clear()
    other = SafetyModel(tiny_model.encoder, calibration=tiny_model.calibration)
    other.hash = "another"
    other._features = tiny_model._features
    run(source, out, other)
    assert len(encoded) == PICTURES + LINES


def test_retry_decodes_again_what_failed(
    source: Path, tmp_path: Path, tiny_model: SafetyModel, encoded: list[str]
) -> None:
    run(source, tmp_path / "out", tiny_model)
    encoded.clear()
    run(source, tmp_path / "out", tiny_model, retry=True)
    assert encoded == ["in/05.png"]


def test_added_items_are_not_written_twice_after_a_kill(
    source: Path, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    out, more = tmp_path / "out", tmp_path / "more.txt"
    more.write_text("alpha\nbeta\n")
    run(source, out, tiny_model)
    with (out / RESULTS).open("a") as lines:  # written before its row, and torn
        lines.write('{"id": "more.txt#1", "sour')
    add(Collection.open(out), tiny_model, [str(more)], options=OPTIONS)
    rows = [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]
    assert [r["id"] for r in rows] == Collection.open(out).to_arrow(["id"])["id"].to_pylist()
    assert len(rows) == PICTURES + LINES + 2


@pytest.mark.parametrize("torn", ["_versions/*.manifest", "data/*.lance"])
def test_a_version_torn_by_a_power_failure_is_left_out(
    source: Path, tmp_path: Path, tiny_model: SafetyModel, encoded: list[str], torn: str
) -> None:
    out = tmp_path / "out"
    whole = run(source, out, tiny_model)
    files = (out / "items.lance").glob(torn)
    newest = max(files, key=lambda f: f.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    encoded.clear()
    assert run(source, out, tiny_model) == whole
    assert 0 < len(encoded) <= OPTIONS.batch * TEXTS_PER_PICTURE  # what was written last


# ---------------------------------------------------------------- a full disk


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_is_one_clear_error_and_the_next_scan_goes_on(
    source: Path, tmp_path: Path, tiny_model: SafetyModel, encoded: list[str]
) -> None:
    import resource

    whole = run(source, tmp_path / "whole", tiny_model)
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    encoded.clear()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) * 3 // 4, hard))
    try:
        with pytest.raises(CollectionError, match=r"no space is left.*run the same command again"):
            run(source, out, tiny_model)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        stood = len(Collection.open(out))
        assert 0 < stood < PICTURES + LINES
        assert len((out / RESULTS).read_bytes().splitlines()) == stood
        encoded.clear()
        assert run(source, out, tiny_model) == whole
        assert len(encoded) == PICTURES + LINES - stood
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---------------------------------------------------------------- two scans at once


@pytest.fixture
def command(
    source: Path, tmp_path: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Arguments of a scan on the command line, with the model loaded already."""
    monkeypatch.setattr("hysafe.app.pipeline.load", lambda *_, **__: tiny_model)
    return ["scan", str(source), "--out", str(tmp_path / "out"), "--no-ocr", "--workers", "0"]


def test_a_second_scan_is_refused_with_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with lock(out):
        assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "calibrated" not in line]
    assert len(lines) == 1
    assert f"process {os.getpid()} is writing into this folder" in lines[0]
    assert not (out / RESULTS).exists()


HOLDER = """
import sys, time
from pathlib import Path
from hysafe.app.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=f"process {holder.pid} "), lock(tmp_path):
            pass
        holder.kill()
        holder.wait()
    assert (tmp_path / LOCK).read_text() == str(holder.pid)
    with lock(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == ""


# ---------------------------------------------------------------- folders that grow


def test_watch_scans_again_what_changed_and_ends_while_it_waits(
    source: Path, tmp_path: Path, tiny_model: SafetyModel, encoded: list[str]
) -> None:
    out = source / "out"  # not taken for a change, though it lies within
    steps: list[Callable[[], Any]] = [
        lambda: None,
        lambda: (source / "04.png").write_bytes(png(300)),
        lambda: (source / "99.png").write_bytes(png(301)),
        lambda: (source / "99.png").unlink(),
    ]

    def sleep(seconds: float) -> None:
        assert seconds == 7
        if not steps:
            raise KeyboardInterrupt
        steps.pop(0)()

    rounds = watch.watch(
        [str(source)], out,
        lambda: scan([str(source)], out, tiny_model, options=OPTIONS), seconds=7, sleep=sleep,
    )  # fmt: skip
    seen = []
    for summary in rounds:
        seen.append((summary.items, list(encoded)))
        encoded.clear()
    whole = PICTURES + LINES
    assert [items for items, _ in seen] == [whole, whole, whole + 1, whole]
    assert [ids for _, ids in seen[1:]] == [["in/04.png"], ["in/99.png"], []]
    out.rename(tmp_path / "out")
    assert (tmp_path / "out" / RESULTS).read_bytes() == run(source, tmp_path / "f", tiny_model)


def test_watch_waits_for_another_writer(
    source: Path, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    out = tmp_path / "out"
    (tmp_path / "one.txt").write_text("alpha\n")
    paths, looks = [str(tmp_path / "one.txt")], 0

    def once() -> Any:
        return scan(paths, out, tiny_model, options=OPTIONS, report=False)

    held = lock(out)

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            (tmp_path / "one.txt").write_text("alpha\nbeta\n")
            held.__enter__()
        elif looks == 2:
            held.__exit__(None, None, None)
        elif looks == 3:
            raise KeyboardInterrupt

    found = [s.items for s in watch.watch(paths, out, once, seconds=1, sleep=sleep)]
    assert found == [1, 2]
    assert looks == 3


def test_ctrl_c_ends_a_watch_with_0_while_it_waits_and_with_130_in_a_scan(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(watch.time, "sleep", interrupt)
        assert main([*command, "--watch", "5"]) == 0
    assert "38 items, 38 new: " in capsys.readouterr().out
    monkeypatch.setattr("hysafe.app.scan.scan", interrupt)
    assert main([*command, "--watch", "5"]) == 130


@pytest.mark.parametrize("arguments", [("-", "--watch", "5"), (".", "--watch", "0")])
def test_watch_refuses_what_it_cannot_do(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, *rest = arguments
    with pytest.raises(ConfigError, match="--watch"):
        watch.watch([path], tmp_path, lambda: pytest.fail("scanned"), seconds=float(rest[1]))
    assert main(["scan", *arguments, "--out", "out"]) == 2


# ---------------------------------------------------------------- pieces


def test_many_small_pieces_are_put_together(
    source: Path, tmp_path: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(source, tmp_path / "one", tiny_model)
    monkeypatch.setattr("hysafe.index.collection.MAX_FRAGMENTS", 2)
    assert run(source, tmp_path / "two", tiny_model) == whole
    stored = Collection.open(tmp_path / "two")
    assert stored._table.stats()["fragment_stats"]["num_fragments"] == 1


def test_a_damaged_table_is_not_overwritten(
    source: Path, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    out = tmp_path / "out"
    run(source, out, tiny_model)
    manifests = set((out / "items.lance/_versions").glob("*.manifest"))
    assert len(manifests) > 4
    for manifest in manifests:
        manifest.write_bytes(b"")
    with pytest.raises(CollectionError, match=r"damaged.*Move it away"):
        run(source, out, tiny_model)
    assert set((out / "items.lance/_versions").glob("*.manifest")) == manifests
    assert len((out / RESULTS).read_bytes().splitlines()) == PICTURES + LINES


def test_an_output_needs_a_line_for_every_row(
    source: Path, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    out = tmp_path / "out"
    run(source, out, tiny_model)
    lines = (out / RESULTS).read_bytes().splitlines(keepends=True)
    (out / RESULTS).write_bytes(b"".join(lines[:-1]))
    with pytest.raises(CollectionError, match="37 lines for 38 items"):
        Output(Collection.open(out)).match_all()
    assert run(source, out, tiny_model) == b"".join(lines)  # the scan writes it again


# ---------------------------------------------------------------- the benchmarks, in small


def test_damaged_files_of_every_kind_have_a_row_each(
    tmp_path: Path, tiny_model: SafetyModel, load_script: Callable[[str], ModuleType]
) -> None:
    fuzz = load_script("benchmarks/fuzz.py")
    made = fuzz.write_files(tmp_path / "in", 90, seed=3)
    assert set(made) == {*fuzz.PICTURES, *fuzz.TABLES}
    counts, faults = fuzz.run(tmp_path / "in", tmp_path / "out", tiny_model, workers=0)
    assert not faults
    outcomes = {outcome for _, outcome in counts}
    assert {"judged", "InputError"} <= outcomes
    # the check itself sees a missing row
    (tmp_path / "in/more.png").write_bytes(b"")
    lines = (tmp_path / "out" / RESULTS).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "scan", lambda *_, **__: None)
        assert fuzz.run(tmp_path / "in", tmp_path / "out", tiny_model)[1] == ["more.png: 0 rows"]
    assert (tmp_path / "out" / RESULTS).read_bytes() == lines


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_real_kills(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "kill.py"
    command = [sys.executable, str(script), "--items", "300", "--kills", "6", "--commit", "32"]
    run = subprocess.run([*command, "--model", str(tiny_folder)], check=False)
    assert run.returncode == 0
    assert "each of 300 items once" in capfd.readouterr().out
