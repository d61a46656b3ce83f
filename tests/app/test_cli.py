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
    assert "errors: 1 JSONDecodeError. Which items and why: `error` in results.jsonl." in " ".join(
        shown.split()
    )


def test_a_scan_of_nothing_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_folder: Path
) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = run(
        capsys, "scan", str(tmp_path / "empty"), "--out", str(tmp_path / "out"), "--model",
        str(tiny_folder), "--no-ocr", "--workers", "0",
    )  # fmt: skip
    assert code == 0
    assert "nothing was there to judge" in err


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (("search", "x", "words", "-k", "0"), "'0' is no whole number of at least 1"),
        (("redirect", "x", "words", "-k", "few"), "'few' is no whole number of at least 1"),
        (("search", "x", "words", "--radius-share", "2"), "'2' is no number in [0, 1]"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused_before_the_collection_is_opened(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...], problem: str
) -> None:
    code, _, err = run(capsys, *command)
    assert code == 2
    assert problem in err
    assert err.count("\n") == 1


def test_taxonomy_prints_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "taxonomy", "6.1")
    assert code == 0
    assert "Weapons & explosives" in out
    assert "llavaguard" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("hysafe 0.")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("card", "--seed", "0"), "--seed: of eval novelty only"),
        (("card", "--unseen", "--held-out", "x"), "--held-out, --unseen: of eval novelty only"),
        (("novelty", "--fit", "--write", "x.md"), "--fit, --write: of eval card only"),
        (("novelty", "--control", "x"), "--control: of eval card only"),
    ],
)
def test_options_of_another_suite_are_not_ignored(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], problem: str
) -> None:
    code, _, err = run(capsys, "eval", *arguments)
    assert code == 2
    assert problem in err


def test_a_scan_names_nodes_of_its_policy_and_doubts_a_calibration_for_another_taxonomy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from types import SimpleNamespace

    from hysafe.app.cli import _print_summary, warn_of_taxonomy
    from hysafe.app.scan import ScanSummary
    from hysafe.taxonomy import Policy, load_taxonomy

    added = {"parent": "D6", "name": "Laser pointers", "definition": "Sale of laser pointers."}
    view = Policy.from_dict({"nodes": {"x.1": added}}).apply(load_taxonomy())
    summary = ScanSummary(tmp_path, items=1)
    summary.nodes["x.1"] += 1
    _print_summary(summary, 1.0, False, view.taxonomy)
    assert "Laser pointers" in capsys.readouterr().out

    def warned(path: Path | None, taxonomy: object, fitted: bool = True) -> str:
        calibration = SimpleNamespace(fitted=fitted)
        model = SimpleNamespace(name="mini", taxonomy=taxonomy, calibration=calibration)
        warn_of_taxonomy(model, path)  # type: ignore[arg-type]
        return capsys.readouterr().err

    path = tmp_path / "own.yaml"
    assert warned(path, view.taxonomy).count("\n") == 1
    assert "was made for the bundled taxonomy, not for" in warned(path, view.taxonomy)
    assert not warned(path, load_taxonomy())  # a copy of the bundled one
    assert not warned(None, load_taxonomy())
    assert not warned(path, view.taxonomy, fitted=False)  # says so already
