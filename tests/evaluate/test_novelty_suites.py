"""``eval novelty``: protocols keep novel items out, choices see no test item, one run of the CLI."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hysafe.app.cli import main
from hysafe.data import datamodule
from hysafe.data.datamodule import EmbedData
from hysafe.errors import ConfigError, InputError
from hysafe.evaluate import novelty, novelty_data
from hysafe.evaluate.curves import FPR_GRID
from hysafe.evaluate.novelty_data import (
    Case,
    Suite,
    catqa_suite,
    clinc_suite,
    contrast_suite,
    picture_suite,
    read_held_out,
)
from hysafe.geometry import Points
from hysafe.score.novelty import Encoded
from hysafe.types import Sample

CLASSES = {
    "goldfish": ("animal", "fish"),
    "lion": ("animal", "carnivore"),
    "bison": ("animal", "ungulate"),
    "banana": ("food", "edible fruit"),
    "teapot": ("instrumentality", "container"),
    "school bus": ("conveyance", "bus"),
}
CATQA = ("Illegal Activity/Drug", "Physical Harm/Self-harm", "Economic Harm/Financial fraud",
         "Adult Content/Nude imagery")  # fmt: skip


def png(rng: np.random.Generator, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of the layout of HYSAFE_DATA with drawn noise and counted words."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    folder = root / "images" / "tiny_imagenet"
    folder.mkdir(parents=True)
    for split, count in (("train-00000", 45), ("val", 4)):
        rows = [
            {"image": png(rng), "label": i, "wnid": f"n{i}", "name": name,
             "hypernyms": list(chain)}
            for _ in range(count)
            for i, (name, chain) in enumerate(CLASSES.items())
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    icon = png(rng)
    emoji = [{"image": icon, "name": f"e{i}"} for i in range(1257)]
    pq.write_table(pa.Table.from_pylist(emoji), root / "images" / "noto_emoji.parquet")
    (root / "text").mkdir()
    clinc = [
        {"text": f"{domain} {intent} {split} {i}", "source": "clinc150", "safe": True,
         "labels": [f"d{domain}", f"i{domain}{intent}"], "split": split}
        for split, count in (("train", 6), ("val", 4), ("test", 3))
        for domain in range(5) for intent in range(2) for i in range(count)
    ]  # fmt: skip
    clinc += [
        {"text": f"strange {split} {i}", "source": "clinc150", "safe": True,
         "labels": ["out-of-scope"], "split": split}
        for split in ("train", "val", "test") for i in range(5)
    ]  # fmt: skip
    catqa = [
        {"text": f"{label} {i}", "source": "catqa", "safe": False, "labels": label.split("/")}
        for label in CATQA for i in range(16)
    ]  # fmt: skip
    for name, rows in (("clinc150", clinc), ("catqa", catqa)):
        lines = "".join(json.dumps(r) + "\n" for r in rows)
        (root / "text" / f"{name}.jsonl").write_text(lines)
    return root


@pytest.fixture
def small_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contrast set of four categories."""
    samples = {
        split: [
            Sample(f"{split}-{node}-{i}-{safe}", "contrast", f"{node} {safe} {split} {i}", None,
                   (f"S.{node}" if safe else node,), safe, f"{node}-{i}", {"functionality": None, "concept": None, "form": None})
            for node in ("1.2", "2.1", "6.1", "7.2") for i in range(count) for safe in (True, False)
        ]
        for split, count in (("train", 8), ("validation", 5), ("test", 4))
    }  # fmt: skip

    def small(split: str = "train") -> list[Sample]:
        return samples[split]

    monkeypatch.setattr(datamodule, "contrast_set", small)  # read by EmbedData, not needed here
    monkeypatch.setattr(novelty_data, "contrast_set", small)
    monkeypatch.setattr(novelty, "contrast_set", small)


# ---------------------------------------------------------------- what is known and what is novel


def test_the_bundled_list_has_seventeen_classes_and_files_may_have_comments(tmp_path: Path) -> None:
    names = read_held_out()
    assert len(names) == len(set(names)) == 17
    assert "goldfish" in names
    file = tmp_path / "held.txt"
    file.write_text("# a list\nlion   # big cat\n\n teapot\n")
    assert read_held_out(file) == ["lion", "teapot"]
    file.write_text("# nothing\n")
    with pytest.raises(InputError, match="no class names"):
        read_held_out(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_held_out(tmp_path / "none.txt")


def test_the_bundled_list_names_classes_of_the_data(data_dir: Path) -> None:
    table = (data_dir / "images" / "tiny_imagenet" / "classes.csv").read_text()
    assert all(f",{name}," in table for name in read_held_out())


@pytest.mark.usefixtures("small_contrast")
def test_excluded_classes_are_nowhere_in_training(small_data: Path) -> None:
    options = {"data_dir": str(small_data), "image_size": 16, "text_sets": [], "rendered": 1}
    whole, less = EmbedData(**options), EmbedData(**options, exclude_classes=["lion", "banana"])
    for data in (whole, less):
        data.setup()
    assert whole.photo_classes == 6
    kept = ["goldfish", "bison", "teapot", "school bus"]
    assert less.world.names[: less.photo_classes] == kept
    assert not {"lion", "banana"} & set(less.world.names)
    for part in ("train_pictures", "held_out_pictures", "validation_pictures"):
        pictures = {}
        for data in (whole, less):
            p = getattr(data, part)
            pictures[data] = {
                (data.world.names[c], x.tobytes())
                for c, x in zip(p.classes.tolist(), p.pixels, strict=True)
                if c < data.photo_classes
            }
        expected = {(n, x) for n, x in pictures[whole] if n in kept}
        assert pictures[less] == expected
        assert len(expected) < len(pictures[whole])
    with pytest.raises(ConfigError, match="dragon"):
        EmbedData(**options, exclude_classes=["lion", "dragon"]).setup()


@pytest.mark.usefixtures("small_contrast")
def test_pictures_to_train_on_need_not_be_read(small_data: Path) -> None:
    options = {"data_dir": str(small_data), "image_size": 16, "text_sets": [], "rendered": 1}
    whole, judged = EmbedData(**options), EmbedData(**options, held_out_only=True)
    for data in (whole, judged):
        data.setup()
    assert judged.world.names == whole.world.names
    for part in ("held_out_pictures", "validation_pictures"):
        ours, all_of_them = getattr(judged, part), getattr(whole, part)
        photos = [p.classes < whole.photo_classes for p in (ours, all_of_them)]
        assert len(ours) > 0
        assert (
            ours.pixels[photos[0].numpy()].tobytes()
            == all_of_them.pixels[photos[1].numpy()].tobytes()
        )
    assert not (judged.train_pictures.classes < judged.photo_classes).any()
    assert (whole.train_pictures.classes < whole.photo_classes).any()


@pytest.mark.usefixtures("small_contrast")
def test_pictures_of_held_out_classes_are_novel_and_nowhere_else(
    small_data: Path, tiny_model
) -> None:  # type: ignore[no-untyped-def]
    suite = picture_suite(tiny_model, data=str(small_data), held_out=["lion", "banana"], limit=20)
    (case,) = suite.cases
    names = sorted(CLASSES, key=list(CLASSES).index)
    hidden = {names.index("lion"), names.index("banana")}
    for labels in (case.train_labels, case.validation_labels, case.test_labels):
        assert len(labels)
        assert set(labels.tolist()) <= set(range(6)) - hidden
    assert len(case.train) == 4 * 20
    assert len(case.test) == 4 * 4
    assert len(case.novel["held-out classes"]) == 2 * 4
    assert set(case.novel) == {"held-out classes", *suite.columns["far"]}
    assert "has seen" in suite.notes[0]
    with pytest.raises(ConfigError, match="dragon"):
        picture_suite(tiny_model, data=str(small_data), held_out=["dragon"])


def test_clinc_follows_its_official_splits(small_data: Path, tiny_model) -> None:  # type: ignore[no-untyped-def]
    suite = clinc_suite(tiny_model, data=str(small_data))
    (case,) = suite.cases
    assert (len(case.train), len(case.validation), len(case.test)) == (60, 40, 30)
    assert len(case.novel["out of scope"]) == 5  # those of the test split
    assert case.train_labels.unique().tolist() == list(range(10))
    assert all(len(fold) == 2 for fold in case.folds)  # the intents of one domain


@pytest.mark.usefixtures("small_contrast")
def test_the_hidden_category_has_neither_items_nor_a_column(tiny_model) -> None:  # type: ignore[no-untyped-def]
    suite = contrast_suite(tiny_model)
    encode = novelty_data.Encoder(tiny_model)
    ids = encode.risk_ids
    assert [c.name for c in suite.cases] == ["1.2", "2.1", "6.1", "7.2"]
    case = suite.cases[2]
    hidden = ids.index("6.1")
    for labels in (case.train_labels, case.validation_labels, case.test_labels):
        assert hidden not in labels.tolist()
        assert len(labels.unique()) == 3
    assert len(case.novel["hidden category"]) == 4
    full = encode.texts(["6.1 False test 0"], risk_only=True)
    assert case.train.margins is not None
    assert full.margins is not None
    assert case.train.margins.shape[1] == len(ids) - 1
    rest = [i for i in range(len(ids)) if i != hidden]
    got = case.novel["hidden category"].margins
    assert got is not None
    torch.testing.assert_close(got[0], full.margins[0, rest], atol=1e-4, rtol=1e-4)
    # with another category unknown, its column goes too
    seen, held = case.without(torch.tensor([ids.index("2.1")]))
    assert seen.margins is not None
    left = [i for i, n in enumerate(rest) if ids[n] != "2.1"]
    torch.testing.assert_close(seen.margins, case.train.margins[:, left])
    assert held.margins is not None
    assert held.margins.shape[1] == len(ids) - 2


def test_catqa_switches_off_every_node_of_the_hidden_category(small_data: Path, tiny_model) -> None:  # type: ignore[no-untyped-def]
    suite = catqa_suite(tiny_model, data=str(small_data))
    case = next(c for c in suite.cases if c.name == "Physical Harm")  # 3.1 and 3.2
    count = len(novelty_data.Encoder(tiny_model).risk_ids)
    assert case.train.margins is not None
    assert case.train.margins.shape[1] == count - 2
    assert len(case.novel["hidden category"]) == 16
    assert len(case.train) + len(case.validation) + len(case.test) == 3 * 16


# ---------------------------------------------------------------- choices and figures


def synthetic(seed: int = 0) -> Case:
    """Clusters in 8 directions; the novel item lies in none of them."""
    g = torch.Generator().manual_seed(seed)

    def make(n: int, classes: range) -> tuple[Encoded, torch.Tensor]:
        labels = torch.tensor(list(classes)).repeat(n)
        x = torch.eye(10)[labels] * 1.5 + 0.3 * torch.randn(len(labels), 10, generator=g)
        return Encoded(Points.from_tangent(x, 1.0), x[:, :8] * 3, x), labels

    known = range(8)
    novel = {"near": make(20, range(8, 9))[0], "other": make(20, range(9, 10))[0]}
    folds = [torch.tensor([0]), torch.tensor([1, 2])]
    return Case("x", *make(30, known), *make(12, known), *make(12, known), novel, folds)


def test_figures_of_a_suite_have_every_row_and_the_mean_of_their_kinds(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_ood")
    case = synthetic()
    suite = Suite("s", [case, synthetic(1)], {"near": ["near"], "far": ["near", "other"]}, ("n",))
    figures = novelty.suite_figures(suite)
    assert set(figures["ours"]) == {*novelty._ours(), "combined"}
    assert set(figures["theirs"]) == set(novelty.DETECTORS)
    for side in ("ours", "theirs"):
        for row in figures[side].values():
            assert set(row) == {"near", "far", "far: near", "far: other"}
            mean = (row["far: near"]["auroc"] + row["far: other"]["auroc"]) / 2
            assert row["far"]["auroc"] == pytest.approx(mean, abs=2e-4)
    assert figures["ours"]["combined"]["near"]["auroc"] > 0.95
    assert figures["accuracy"]["nearest mean, points"] > 0.9
    assert figures["conformal"]["false-alarm rate at 0.05"] < 0.2
    assert sum(figures["chosen"]["Lorentz k-NN"].values()) == 2
    assert set(figures["roc"]) == {"near", "far"}
    for column, shown in figures["roc"].items():
        assert 2 <= len(shown) <= 3
        for name, rates in shown.items():
            row = name.rpartition(": ")[2]
            side = "theirs" if "pytorch-ood" in name else "ours"
            area = float(torch.trapezoid(torch.tensor(rates), FPR_GRID))
            assert area == pytest.approx(figures[side][row][column]["auroc"], abs=5e-3)
            if name.startswith("best"):
                assert figures[side][row][column]["auroc"] == max(
                    values[column]["auroc"] for values in figures[side].values()
                )
    report = {"suites": [figures], "setting": {"model": "m", "seed": 0, "limit": None, "torch": "",
                                               "threads": 1, "seconds": 0}}  # fmt: skip
    table = novelty._markdown(report)
    assert "| **combined** |" in table
    assert "novel = positive" in table
    if importlib.util.find_spec("matplotlib"):
        assert {p.name for p in novelty._plot(tmp_path, report)} == {"roc.svg", "roc.png"}
        assert "combined, " in (tmp_path / "roc.svg").read_text()
    else:
        assert novelty._plot(tmp_path, report) == []


def test_the_roc_of_a_column_is_the_mean_over_its_kinds() -> None:
    scores = {"high": torch.tensor([2.0, 3.0]), "low": torch.tensor([-2.0, -3.0])}
    case = SimpleNamespace(test=torch.tensor([0.0, 1.0]), novel=scores)
    suite = SimpleNamespace(columns={"far": ["high", "low"], "near": ["high"]})
    curves: dict[str, list[torch.Tensor]] = {}
    scorer = SimpleNamespace(score=lambda items: items)
    novelty._collect({}, suite, scorer, case, curves)  # type: ignore[arg-type]
    assert curves["near"][0][:-1].tolist() == [1.0] * 100
    assert curves["far"][0][:-1].tolist() == [0.5] * 100


def test_settings_and_weights_see_no_test_item() -> None:
    pytest.importorskip("pytorch_ood")
    case = synthetic()
    noise = synthetic(7)
    other = replace(
        case,
        test=case.novel["near"],
        test_labels=torch.zeros(20, dtype=torch.long),
        novel={"near": noise.test, "other": noise.train},
    )
    columns = {"near": ["near"]}
    a, b = (novelty.suite_figures(Suite("s", [c], columns)) for c in (case, other))
    assert a["chosen"] == b["chosen"]
    assert a["weights"] == b["weights"]
    assert a["ours"] != b["ours"]


def test_items_that_are_not_novel_look_no_different_so_nothing_was_fitted_on_the_test() -> None:
    pytest.importorskip("pytorch_ood")
    case = replace(synthetic(), novel={"near": synthetic(7).test})
    figures = novelty.suite_figures(Suite("s", [case], {"near": ["near"]}))
    for side in ("ours", "theirs"):
        for row, values in figures[side].items():
            assert abs(values["near"]["auroc"] - 0.5) < 0.2, row  # 4 standard errors


def test_wrong_settings_are_refused_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("pytorch_ood")
    for arguments in (("--settings", "near,imagenet"), ("--limit", "1")):
        assert main(["eval", "novelty", "--model", "./none", *arguments]) == 2
        message = capsys.readouterr().err.strip()
        assert len(message.splitlines()) == 1
        assert arguments[1].split(",")[-1] in message


@pytest.mark.usefixtures("small_contrast")
def test_one_run_of_the_command(
    small_data: Path, tiny_model, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
    pytest.importorskip("pytorch_ood")
    monkeypatch.setattr("hysafe.app.pipeline.load", lambda name: tiny_model)
    held = tmp_path / "held.txt"
    held.write_text("lion\n")
    code = main([
        "eval", "novelty", "--model", "tiny", "--data", str(small_data), "--out",
        str(tmp_path / "out"), "--held-out", str(held), "--unseen", "--limit", "12",
        "--settings", "near,far,clinc150,policy",
    ])  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0
    report = json.loads((tmp_path / "out" / "novelty.json").read_text())
    assert [s["name"] for s in report["suites"]] == ["pictures", "clinc150"]
    assert report["policy"]["categories"] == 4
    assert len(report["policy"]["roc"]) == 2
    table = (tmp_path / "out" / "novelty.md").read_text()
    assert table.strip() in shown
    assert "was trained without these classes" in table
    header = table.splitlines()[0]
    assert all(f"| {c} " in header for c in ("near", "far", "far: noise", "clinc150"))
