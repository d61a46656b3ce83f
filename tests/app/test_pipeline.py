"""From items to judgements: contracts that hold for any weights."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hysafe.app.output import result_line
from hysafe.app.pipeline import (
    BATCH_BYTES,
    TEXTS_PER_PICTURE,
    SafetyModel,
    ScanOptions,
    _batches,
    _buckets,
    _Seen,
    ahead,
    load,
)
from hysafe.app.scan import scan
from hysafe.data.images import content_hash
from hysafe.encoder.pretrained import resolve_folder
from hysafe.index import Collection
from hysafe.score.calibration import Calibration, ModalityCalibration
from hysafe.taxonomy import Policy
from hysafe.types import ErrorRecord, Item


def png(color: tuple[int, int, int] = (200, 30, 30), side: int = 48) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return buffer.getvalue()


SMALL_TAXONOMY = """
name: small
version: 1.0.0
domains:
  - id: D1
    name: Goods
    definition: Goods that need care.
    synonyms: [restricted goods]
    categories:
      - id: "1.1"
        name: Fireworks
        definition: Sale of fireworks.
        severity: 1
        synonyms: [fireworks for sale, selling loud rockets, cheap party rockets, big bang sale,
                   rockets and crackers]
        benign: {name: Light shows, definition: Shows of light.}
"""


class Reader:
    """Stands for the OCR engine: the contract of `read`, no engine."""

    def __init__(self, text: str) -> None:
        self.text, self.calls = text, 0

    def read(self, image: Any, content_hash: str) -> Any:
        self.calls += 1
        return type("Read", (), {"text": self.text})()


def test_one_result_per_item_in_order(tiny_model: SafetyModel, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png())
    results = tiny_model.moderate(
        texts=["hello there", "second"], images=[Image.new("RGB", (9, 9)), str(file), png()]
    )
    assert [r.modality for r in results] == ["text", "text", "image", "image", "image"]
    assert all(r.error is None and r.p_unsafe is not None for r in results)
    assert set(results[0].to_dict()) == {
        "id", "source", "modality", "rating", "p_unsafe", "paths", "novelty", "radius", "channels",
        "error", "hashes",
    }  # fmt: skip


def test_nothing_to_judge_is_nothing(tiny_model: SafetyModel) -> None:
    assert tiny_model.moderate() == []
    assert len(tiny_model.encode_text([])) == 0
    assert len(tiny_model.encode_image([])) == 0


def test_unreadable_items_fail_closed(tiny_model: SafetyModel) -> None:
    results = tiny_model.moderate(images=["/nowhere/picture.jpg", b"no picture", png()])
    assert [r.rating for r in results[:2]] == ["review", "review"]
    assert all(r.error is not None and r.p_unsafe is None for r in results[:2])
    assert results[2].error is None


def test_empty_text_is_reviewed_not_cleared(tiny_model: SafetyModel) -> None:
    (result,) = tiny_model.moderate(texts=[""])
    assert result.rating == "review"
    assert result.error is not None


def test_same_input_same_line(tiny_model: SafetyModel) -> None:
    texts = [f"sentence number {i} " + "word " * (i % 7) for i in range(40)]
    first = [json.dumps(r.to_dict()) for r in tiny_model.moderate(texts=texts)]
    assert first == [json.dumps(r.to_dict()) for r in tiny_model.moderate(texts=texts)]


def test_scores_do_not_depend_on_the_batch_size(tiny_model: SafetyModel) -> None:
    items = [Item(f"{i}", "s", "text", text=f"text {i} " * (1 + i)) for i in range(11)]
    runs = [
        [j.result.p_unsafe for j in tiny_model.judge(items, options=ScanOptions(batch, 0))]
        for batch in (1, 4, 64)
    ]
    assert runs[0] == pytest.approx(runs[1], abs=2e-4)
    assert runs[0] == pytest.approx(runs[2], abs=2e-4)


@given(st.lists(st.integers(1, 128), max_size=60), st.integers(1, 600))
def test_texts_of_like_length_share_a_bucket(lengths: list[int], tokens: int) -> None:
    buckets = list(_buckets(lengths, tokens))
    places = [i for bucket in buckets for i in bucket]
    assert sorted(places) == list(range(len(lengths)))
    assert [lengths[i] for i in places] == sorted(lengths)
    for bucket in buckets:
        assert len(bucket) == 1 or len(bucket) * max(lengths[i] for i in bucket) <= tokens


KINDS = {
    "picture": Item("a", "s", "image", image=b"x"),
    "large": Item("a", "s", "image", image=bytes(BATCH_BYTES // 2)),
    "text": Item("a", "s", "text", text="x"),
}


@given(st.lists(st.sampled_from(sorted(KINDS)), max_size=60), st.integers(1, 5))
def test_after_any_batch_the_following_ones_are_the_same(kinds: list[str], pictures: int) -> None:
    seen = [_Seen(KINDS[kind], None, None) for kind in kinds]
    batches = list(_batches(seen, pictures))
    assert [one for batch in batches for one in batch] == seen
    assert all(len(batch) <= pictures * TEXTS_PER_PICTURE for batch in batches)
    assert all(sum(s.item.image is not None for s in batch) <= pictures for batch in batches)
    assert all(sum(len(s.item.image or b"") for s in b[:-1]) < BATCH_BYTES for b in batches)
    done = 0
    for number, batch in enumerate(batches):
        done += len(batch)
        assert list(_batches(seen[done:], pictures)) == batches[number + 1 :]


def test_batches_judged_at_once_are_judged_alike(tiny_model: SafetyModel) -> None:
    items = [
        Item(f"{i}", "s", "image+text", text=f"text {i}" * (i % 5), image=png((9 * i, 50, 9)))
        for i in range(23)
    ]
    lines = [
        [
            result_line(j.result)
            for j in tiny_model.judge(items, options=ScanOptions(4, 0, encoders=encoders))
        ]
        for encoders in (0, 1, 2)
    ]
    assert len(lines[0]) == len(items)
    assert lines[0] == lines[1] == lines[2]


def test_work_ahead_comes_back_in_order_and_is_bounded() -> None:
    threads, begun, gone = torch.get_num_threads(), 0, threading.Event()

    def given_out() -> Iterator[int]:
        nonlocal begun
        while begun < 20:
            begun += 1
            yield begun

    def work(number: int) -> int:
        if number == 1:
            assert gone.wait(30)  # by the second one, which runs beside it
        gone.set()
        return -number

    for done, result in enumerate(ahead(work, given_out(), 2), start=1):
        assert result == -done
        assert begun <= done + 2
    assert begun == 20
    assert torch.get_num_threads() == threads


def test_items_in_bfloat16_are_judged_nearly_alike_under_another_hash(
    tiny_folder: Path, tiny_model: SafetyModel, tmp_path: Path
) -> None:
    half = load(str(tiny_folder), cache=tmp_path, bf16=True)
    texts = [f"text {i}" * (1 + i % 3) for i in range(9)]
    pictures = [Image.new("RGB", (64, 64), (20 * i, 90, 200 - 20 * i)) for i in range(9)]
    items: dict[str, Any] = {"texts": texts, "images": pictures}
    wide, narrow = tiny_model.moderate(**items), half.moderate(**items)
    assert [r.p_unsafe for r in wide] == pytest.approx([r.p_unsafe for r in narrow], abs=0.05)
    for several in (slice(9), slice(9, None)):
        assert [r.radius for r in wide[several]] != [r.radius for r in narrow[several]]
    assert half.hash == tiny_model.hash  # their points may be compared
    assert {r.hashes.model for r in narrow}.isdisjoint(r.hashes.model for r in wide)
    reader = Reader("words")
    assert half.hash_with(reader) not in (tiny_model.hash_with(reader), half.hash_with(None))
    for queries in (
        [m.encode_text(texts).space for m in (half, tiny_model)],
        [m.encode_image(pictures).space for m in (half, tiny_model)],
    ):
        assert torch.equal(*queries)


def test_long_text_goes_through_windows(tiny_model: SafetyModel) -> None:
    long = "the weather is fine today and the park is full of people " * 60
    (whole,) = tiny_model.moderate(texts=[long])
    assert whole.p_unsafe is not None
    (endless,) = tiny_model.moderate(texts=["word " * 20_000])
    assert endless.rating in ("review", "unsafe")  # read in part: never cleared
    (glued,) = tiny_model.moderate(texts=["x" * 5_000])
    assert glued.p_unsafe is not None


def test_letters_that_the_tower_does_not_know_are_never_cleared() -> None:
    mini = load("mini")
    foreign = mini.moderate(texts=["Я люблю тебя", "早上好", "good morning, доброе утро"])
    for result in foreign:
        assert result.rating == "review"
        assert result.channels["reason"].startswith("not read whole")
    plain, disguised = mini.moderate(texts=["good morning", "ｇｏｏｄ ｍоrnіng"])
    assert plain.p_unsafe == disguised.p_unsafe
    assert plain.rating == disguised.rating == "safe"


def test_riskier_channel_counts(tiny_model: SafetyModel) -> None:
    item = Item("a", "s", "image+text", text="hello", image=png(), content_hash="h")
    (judged,) = tiny_model.judge([item], options=ScanOptions(8, 0))
    channels = judged.result.channels
    assert {"image", "text"} <= set(channels)
    p = {k: v["p_unsafe"] for k, v in channels.items() if isinstance(v, dict)}
    assert judged.result.p_unsafe == max(p.values())
    assert channels["decided_by"] in p
    assert judged.vector is not None
    assert judged.text_vector is not None


def test_text_read_in_a_picture_is_judged(tiny_model: SafetyModel) -> None:
    reader = Reader("selling stolen goods")
    (result,) = tiny_model.moderate(images=[png()], ocr=reader)
    (alone,) = tiny_model.moderate(texts=["selling stolen goods"])
    assert reader.calls == 1
    assert result.channels["ocr"]["text"] == "selling stolen goods"
    assert result.channels["ocr"]["p_unsafe"] == pytest.approx(alone.p_unsafe, abs=2e-4)


def test_failed_reading_fails_closed(tiny_model: SafetyModel) -> None:
    from hysafe.errors import InputError

    class Broken:
        def read(self, image: Any, content_hash: str) -> Any:
            raise InputError("the engine failed")

    (result,) = tiny_model.moderate(images=[png()], ocr=Broken())
    assert result.rating != "safe"
    assert result.error is not None


def test_text_of_a_broken_picture_is_still_judged(tiny_model: SafetyModel) -> None:
    item = Item("a", "s", "image+text", text="a risky offer", image=b"broken", content_hash="h")
    (judged,) = tiny_model.judge([item], options=ScanOptions(4, 0))
    assert "text" in judged.result.channels
    assert judged.result.error is not None
    assert judged.result.rating != "safe"


def test_reading_is_part_of_the_hash(tiny_model: SafetyModel) -> None:
    (plain,) = tiny_model.moderate(images=[png()])
    (read,) = tiny_model.moderate(images=[png()], ocr=Reader("x"))
    assert plain.hashes.model != read.hashes.model


def test_policy_switches_a_domain_off(tiny_model: SafetyModel) -> None:
    off = Policy.from_dict({"nodes": {f"D{i}": {"status": "non_violating"} for i in range(1, 13)}})
    (result,) = tiny_model.moderate(texts=["anything at all"], policy=off)
    assert result.p_unsafe == 0
    assert result.paths == ()
    assert result.hashes.policy != tiny_model.moderate(texts=["x"])[0].hashes.policy


def test_policy_node_from_text_is_scored(tiny_model: SafetyModel) -> None:
    policy = Policy.from_dict(
        {"nodes": {"x.1": {"parent": "D6", "name": "Laser pointers", "definition": "Sale of them.",
                           "synonyms": ["laser pointer sale"]}}}
    )  # fmt: skip
    view = tiny_model.view(policy)
    table, apexes = tiny_model.place(view)
    assert "x.1" in table.index
    assert len(apexes) == len(view.taxonomy)
    (result,) = tiny_model.moderate(texts=["laser pointer for sale"], policy=policy)
    assert result.p_unsafe is not None


def test_children_never_score_above_parents(tiny_model: SafetyModel) -> None:
    from hysafe.score.leaves import score_margins

    table, apexes = tiny_model.place(tiny_model.view())
    margins = tiny_model.encode_text(["one", "two words", "three words here"]).margin(apexes)
    scores = score_margins(margins, table, scale=10.0)
    for node in tiny_model.taxonomy:
        if node.parent and node.risky:
            child, parent = table.index[node.id], table.index[node.parent]
            assert (scores.nodes[:, child] <= scores.nodes[:, parent] + 1e-6).all()


def test_novelty_sends_to_review(tiny_model: SafetyModel) -> None:
    # every energy lies above a calibration set of very low ones: all is novel
    fit = ModalityCalibration(1.0, -50.0, 1.0, (-1e6,) * 10, (-1e6,) * 10, 999)
    model = SafetyModel(tiny_model.encoder, calibration=Calibration({"text": fit}))
    model._features = tiny_model._features  # the same encoder: spare the encoding
    (result,) = model.moderate(texts=["anything"])
    assert result.novelty.distribution == pytest.approx(0.001)
    assert result.rating == "review"
    assert "unlike" in result.channels["reason"]


def test_encoded_taxonomy_is_cached_under_both_hashes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hysafe.app.pipeline import load

    small, cache = tmp_path / "small.yaml", tmp_path / "cache"
    small.write_text(SMALL_TAXONOMY)
    first = load(str(tiny_folder), taxonomy=small, cache=cache)
    first.place(first.view())
    (file,) = cache.iterdir()
    assert first.encoder.hash() in file.name
    assert first.taxonomy.hash in file.name
    second = load(str(tiny_folder), taxonomy=small, cache=cache)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the taxonomy was encoded again")

    monkeypatch.setattr(second.encoder, "node_features", never)
    a, b = first.place(first.view())[1], second.place(second.view())[1]
    assert a.space.equal(b.space)


def test_scan_writes_one_line_and_one_row_per_item(tiny_model: SafetyModel, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.png").write_bytes(png())
    (folder / "bad.jpg").write_bytes(png()[:40])
    (folder / "lines.txt").write_text("one line\n\nanother line\n", "utf-8")
    (folder / "note.md").write_text("left out")
    summary = scan([str(folder)], tmp_path / "out", tiny_model, options=ScanOptions(2, 0))
    lines = (tmp_path / "out/results.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert summary.items == len(rows) == 4
    assert len(Collection.open(tmp_path / "out")) == 4
    assert sum(r["error"] is not None for r in rows) == 1
    assert all(r["rating"] == "review" for r in rows if r["error"])
    assert (tmp_path / "out/report.html").stat().st_size > 1000
    meta = Collection.open(tmp_path / "out").meta
    assert meta.model == tiny_model.hash == rows[0]["hashes"]["model"]


def test_a_line_is_the_plain_data_of_its_result(tiny_model: SafetyModel) -> None:
    results = tiny_model.moderate(
        texts=["selling a pistol ü", ""], images=[png(), png()[:40]], ocr=Reader("hello")
    )
    assert {r.error is None for r in results} == {True, False}
    assert any(r.paths for r in results)
    for r in results:
        assert result_line(r) == json.dumps(r.to_dict(), ensure_ascii=False) + "\n"


def test_second_scan_gives_the_same_lines(tiny_model: SafetyModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha\nbeta\n")
    outs = []
    for name in ("one", "two"):
        scan([str(tmp_path / "a.txt")], tmp_path / name, tiny_model, report=False)
        outs.append((tmp_path / name / "results.jsonl").read_bytes())
    assert outs[0] == outs[1]


def test_item_errors_keep_their_message(tiny_model: SafetyModel) -> None:
    item = Item("a", "s", "image", error=ErrorRecord("InputError", "truncated; send it again"))
    (judged,) = tiny_model.judge([item], options=ScanOptions(4, 0))
    assert judged.result.error == item.error
    assert judged.result.rating == "review"


def test_content_hash_is_in_the_result(tiny_model: SafetyModel) -> None:
    (result,) = tiny_model.moderate(images=[png()])
    assert result.hashes.content == content_hash(png(), None)


def test_the_hash_depends_on_the_ordinary_items(tiny_model: SafetyModel) -> None:
    def made(reference: dict[str, torch.Tensor] | None) -> str:
        encoder = tiny_model.encoder
        return SafetyModel(
            encoder, tiny_model.taxonomy, tiny_model.calibration, reference=reference
        ).hash

    one = {"text": torch.zeros(3, tiny_model.encoder.dim)}
    assert made(None) == made({})
    assert (
        len({made(None), made(one), made({"image": one["text"]}), made({"text": one["text"] + 1})})
        == 4
    )


def test_the_bundled_node_features_are_those_of_the_bundled_weights() -> None:
    model = load("mini", towers=False)
    name = f"nodes-{model.encoder.hash()}-{model.taxonomy.hash}.safetensors"
    assert [p.name for p in resolve_folder("mini").glob("nodes-*")] == [name]
