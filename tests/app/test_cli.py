"""The command line: exit codes, one clear line, light start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hysafe.app.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("scan", "--no-such-option"),
        ("scan",),
        ("scan", "/nowhere/at/all", "--out", "x"),
        ("scan", ".", "--out", "x", "--policy", "/nowhere.yaml"),
        ("scan", ".", "--out", "x", "--model", "./no-model"),
        ("scan", ".", "--out", "x", "--batch", "0"),
        ("scan", ".", "--out", "x", "--decode-seconds", "nan"),
        ("scan", ".", "--out", "x", "--decode-memory", "1"),
        ("juggle",),
        ("taxonomy", "99.9"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:  # fmt: skip
    (tmp_path / "a.txt").write_text("x\n")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert len([line for line in err.splitlines() if line.startswith("hysafe")]) == 1
    assert "Traceback" not in err


def test_scan_from_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_folder: Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text('{"text": "hello"}\n{broken\n{"text": "world"}\n')
    policy = tmp_path / "policy.yaml"
    policy.write_text("name: mine\nnodes:\n  D1: {status: non_violating}\n")
    code, shown, _ = run(
        capsys, "scan", str(source), "--out", str(out), "--model", str(tiny_folder), "--no-ocr",
        "--policy", str(policy), "--workers", "0",
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert code == 0
    assert len(rows) == 3
    assert [r["error"] is None for r in rows] == [True, False, True]
    assert "3 items" in shown


def test_taxonomy_prints_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "taxonomy", "6.1")
    assert code == 0
    assert "Weapons & explosives" in out
    assert "llavaguard" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("hysafe 0.")
