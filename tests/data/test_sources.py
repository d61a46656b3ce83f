"""Any source to Samples: local files, folders and the adapters of the published schemas."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hysafe.data.label_map import RISK, SAFE
from hysafe.data.sources import (
    ADAPTERS,
    VISU_NODES,
    VISU_TAGS,
    auto,
    data_root,
    hysafe_text,
    image_bytes,
    iter_samples,
    load_rows,
    tiny_imagenet,
    visu,
)
from hysafe.errors import ConfigError, InputError
from hysafe.taxonomy import load_taxonomy
from hysafe.types import Sample


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def jsonl(path: Path, *rows: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return path


# ---------------------------------------------------------------- sources


def test_jsonl(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "mine.jsonl",
        {"text": "grüße", "node": "6.1", "safe": False, "pair": "p1", "id": "a"},
        {"text": None, "node": None, "safe": None, "pair": None, "id": "b"},
        {"text": "hello", "node": None, "safe": True, "pair": None, "id": "c"},
    )
    assert list(iter_samples(str(path))) == [
        Sample("a", "mine", "grüße", None, ("6.1",), False, "p1"),
        Sample("c", "mine", "hello", None, (), True, None),
    ]


def test_parquet_with_pictures_stays_encoded(tmp_path: Path) -> None:
    cells = [{"bytes": png(10), "path": None}, {"bytes": png(20), "path": None}]
    table = pa.table({"image": cells, "text": ["one", None]})
    features = {"info": {"features": {"image": {"_type": "Image"},
                                      "text": {"dtype": "string", "_type": "Value"}}}}  # fmt: skip
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path = tmp_path / "shots-00000-of-00001.parquet"
    pq.write_table(table, path)
    samples = list(iter_samples(str(path)))
    assert [s.image for s in samples] == [png(10), png(20)]
    assert [s.text for s in samples] == ["one", None]
    assert {s.source for s in samples} == {"shots"}


def test_a_glob_of_files_is_read_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        jsonl(tmp_path / f"part-{name}.jsonl", {"text": name})
    samples = list(iter_samples(str(tmp_path / "part-*.jsonl"), source="parts"))
    assert [s.text for s in samples] == ["a", "b", "c"]
    assert [s.id for s in samples] == ["0", "1", "2"]


def test_an_image_folder(tmp_path: Path) -> None:
    for kind in ("cat", "dog"):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        (tmp_path / "pets" / kind / "1.png").write_bytes(png(30))
    samples = list(iter_samples(str(tmp_path / "pets")))
    assert [s.image for s in samples] == [png(30)] * 2
    assert samples[0].source == "pets"


def test_an_adapter_may_be_a_function_leave_rows_out_or_make_several(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "n.jsonl", *({"n": i} for i in range(3)))

    def adapter(index: int, row: Mapping[str, Any], source: str) -> list[Sample] | None:
        return [Sample(f"{index}-{k}", source) for k in range(row["n"])] if row["n"] else None

    made = list(iter_samples(str(path), adapter, source="s"))
    assert [m.id for m in made] == ["1-0", "2-0", "2-1"]


def test_streaming_gives_the_same_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "n.jsonl", *({"n": i} for i in range(3)))
    rows = load_rows(str(path), streaming=True)
    assert not hasattr(rows, "__len__")  # nothing is read ahead
    assert [r["n"] for r in rows] == [r["n"] for r in load_rows(str(path))] == [0, 1, 2]


def test_sources_that_cannot_be_read_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.parquet: no such file\. Check"):
        load_rows(str(tmp_path / "absent.parquet"))
    with pytest.raises(InputError, match=r"x-\*\.jsonl: no such file"):
        load_rows(str(tmp_path / "x-*.jsonl"))
    for location in ("./absent", str(tmp_path / "absent"), "word", "a/b/c", "notes.txt"):
        with pytest.raises(
            InputError, match=r"neither a folder, .* nor a hub id .* Check the path"
        ):
            load_rows(location)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n', "utf-8")
    with pytest.raises(InputError, match=r"broken\.jsonl: cannot be read"):
        load_rows(str(broken))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"broken\.parquet: cannot be read"):
        load_rows(str(tmp_path / "broken.parquet"))
    with pytest.raises(InputError, match=r"hysafe-nobody/absent: cannot be read .* network"):
        load_rows("hysafe-nobody/absent")


def test_an_unknown_adapter_and_a_missing_column_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "n.jsonl", {"caption": "a"})
    with pytest.raises(ConfigError, match=r"adapter 'visuu': known are auto, .*visu"):
        list(iter_samples(str(path), "visuu"))
    with pytest.raises(InputError, match=r"row 0 has no column 'tag'; it has caption"):
        list(iter_samples(str(path), "visu"))


def test_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYSAFE_DATA", raising=False)
    with pytest.raises(ConfigError, match="set HYSAFE_DATA"):
        data_root()
    monkeypatch.setenv("HYSAFE_DATA", str(tmp_path))
    assert data_root() == tmp_path
    assert data_root(str(tmp_path.parent)) == tmp_path.parent
    with pytest.raises(ConfigError, match="absent does not exist"):
        data_root(str(tmp_path / "absent"))


# ---------------------------------------------------------------- adapters


def test_every_adapter_is_tested_here() -> None:
    assert set(ADAPTERS) == {"auto", "hysafe_text", "visu", "tiny_imagenet"}


def test_auto_takes_one_node_a_list_or_none() -> None:
    assert auto(3, {"text": "a"}, "s") == Sample("3", "s", "a")
    assert auto(0, {"text": "a", "node": "6.1"}, "s").nodes == ("6.1",)  # type: ignore[union-attr]
    assert auto(0, {"text": "a", "nodes": "6.1"}, "s").nodes == ("6.1",)  # type: ignore[union-attr]
    two = auto(0, {"image": b"x", "nodes": ["6.1", "6.2"]}, "s")
    assert two == Sample("0", "s", None, b"x", ("6.1", "6.2"))
    assert auto(0, {"caption": "a"}, "s") is None


def test_image_cells(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    assert image_bytes(b"x") == b"x"
    assert image_bytes({"bytes": b"y", "path": "gone.png"}) == b"y"
    assert image_bytes({"bytes": None, "path": str(tmp_path / "a.png")}) == png(1)
    assert image_bytes(str(tmp_path / "a.png")) == png(1)
    assert image_bytes(None) is None
    assert image_bytes({"bytes": None, "path": None}) is None


def test_text_rows_carry_nodes_and_leave_out_what_the_map_leaves_out() -> None:
    row = {"text": "t", "source": "catqa", "labels": ["Illegal Activity", "Weapon"],
           "safe": False, "severity": 3}  # fmt: skip
    made = hysafe_text(5, row, "file")
    assert made is not None
    assert (made.id, made.source, made.nodes, made.safe) == ("catqa-5", "catqa", ("6.1",), False)
    assert made.extra == {"labels": ["Illegal Activity", "Weapon"], "severity": 3}
    assert hysafe_text(0, {**row, "labels": ["Unlisted"]}, "file") is None
    assert hysafe_text(0, {**row, "text": "  "}, "file") is None
    assert hysafe_text(0, {**row, "text": None}, "file") is None
    assert hysafe_text(0, {"text": "t", "safe": True}, "banking77").nodes == ("S.b15",)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="no label map for 'nobody'"):
        hysafe_text(0, {"text": "t"}, "nobody")


def test_visu_rows_become_a_safe_and_an_unsafe_sample_of_one_pair() -> None:
    row = {"safe": "a park", "nsfw": "a fight", "coco_id": 7, "tag": " Harrassment"}
    safe, unsafe = visu(4, row, "visu")
    assert (safe.text, safe.nodes, safe.safe) == ("a park", (SAFE,), True)
    assert (unsafe.text, unsafe.nodes, unsafe.safe) == ("a fight", ("1.3",), False)
    assert safe.pair == unsafe.pair == "visu-4"
    assert safe.id != unsafe.id
    assert unsafe.extra == {"coco_id": 7, "tag": "harassment"}  # the misspelt tag, corrected
    _, unknown = visu(0, {**row, "tag": "something new"}, "visu")
    assert unknown.nodes == (RISK,)


def test_visu_has_20_tags_and_all_lead_to_risk_nodes() -> None:
    taxonomy = load_taxonomy()
    assert len(VISU_NODES) == 20
    assert set(VISU_TAGS.values()) <= set(VISU_NODES)
    assert not set(VISU_TAGS) & set(VISU_NODES)
    for nodes in VISU_NODES.values():
        assert nodes
        assert all(taxonomy[n].kind == "category" for n in nodes)
        assert not any(taxonomy[n].text_only for n in nodes)


@pytest.mark.parametrize("chain", ["feline|animal", ["feline", "animal"]])
def test_tiny_imagenet_rows(chain: str | list[str]) -> None:
    row = {"image": {"bytes": b"x"}, "label": 3, "wnid": "n1", "name": "tabby", "hypernyms": chain}
    made = tiny_imagenet(9, row, "val")
    assert (made.id, made.image, made.nodes, made.safe) == ("val-9", b"x", ("S.b1",), True)
    assert made.extra == {"label": 3, "name": "tabby", "hypernyms": ("feline", "animal")}
    cannon = tiny_imagenet(0, {**row, "name": "cannon"}, "val")
    assert (cannon.nodes, cannon.safe) == (("6.1",), False)


# ---------------------------------------------------------------- the development data


def development_data() -> Path:
    try:
        return data_root()
    except ConfigError as error:
        pytest.skip(str(error))


def test_every_label_of_the_development_texts_is_known_or_left_out_on_purpose() -> None:
    folder = development_data() / "text"
    taxonomy = load_taxonomy()
    for name in ("catqa", "davidson", "convabuse", "banking77", "advbench"):
        made = []
        with (folder / f"{name}.jsonl").open(encoding="utf-8") as lines:
            for index, line in enumerate(lines):
                sample = hysafe_text(index, json.loads(line), name)
                made += [sample] if sample is not None else []
        assert len(made) > 100, name
        for sample in made:
            assert all(n in (RISK, SAFE) or n in taxonomy for n in sample.nodes)


def test_every_class_of_the_development_pictures_has_a_node() -> None:
    path = development_data() / "images" / "tiny_imagenet" / "val.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    table = pq.read_table(path, columns=["label", "wnid", "name", "hypernyms"]).to_pylist()
    classes = {row["name"]: row for row in table}
    assert len(classes) > 150
    for row in classes.values():
        assert tiny_imagenet(0, {**row, "image": None}, "val").nodes
