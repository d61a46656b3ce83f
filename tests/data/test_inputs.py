"""The reading side of a scan: whatever lies in a folder, as many rows come out as items went in."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hysafe.data.decoding import decode_items
from hysafe.data.files import MAX_TEXT_BYTES, kind_of, read_lines, read_picture
from hysafe.data.images import content_hash
from hysafe.data.inputs import InputReader, check_paths, iter_items
from hysafe.errors import ConfigError, InputError
from hysafe.types import Item

HF_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(format: str = "PNG", colour: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, format)
    return out.getvalue()


def read(*paths: Path | str, **options: object) -> list[Item]:
    return list(iter_items([str(path) for path in paths], **options))


def only(path: Path, **options: object) -> Item:
    (item,) = read(path, **options)
    return item


def error_of(item: Item) -> str:
    assert item.error is not None
    assert item.content_hash == ""
    return f"{item.error.type}: {item.error.message}"


def ids(items: list[Item]) -> list[str]:
    found = [item.id for item in items]
    assert len(set(found)) == len(found)
    return found


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list that holds the most bytes Python had allocated, once the block is left."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------- files and folders


def test_a_picture_is_read_undecoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    assert only(path) == Item(
        id="a.png",
        source=str(path),
        modality="image",
        image=picture(),
        content_hash=content_hash(picture(), None),
    )


def test_a_folder_is_read_recursively_and_in_a_stable_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/2.jpg", "a/1.png", "c/d/e.gif", ".hidden.png", ".h/x.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture())
    (tmp_path / "photos" / "n.txt").write_text("one\n\ntwo\n")
    assert ids(read(tmp_path / "photos")) == [
        "photos/.h/x.png",
        "photos/.hidden.png",
        "photos/a/1.png",
        "photos/a/2.jpg",
        "photos/b.png",
        "photos/c/d/e.gif",
        "photos/n.txt#1",
        "photos/n.txt#3",
    ]


def test_ids_do_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(picture())
    wanted = ids(read(tmp_path / "photos"))
    monkeypatch.chdir(tmp_path / "photos")
    assert ids(read(".")) == wanted == ["photos/a.png"]
    monkeypatch.chdir(tmp_path)
    assert ids(read("photos/")) == wanted


def test_ids_of_paths_with_the_same_name_differ(tmp_path: Path) -> None:
    paths = []
    for folder in ("x", "y", "z"):
        path = tmp_path / folder / "a.png"
        path.parent.mkdir()
        path.write_bytes(picture())
        paths.append(path)
    (tmp_path / "a.png~2").write_bytes(picture())
    paths.insert(1, tmp_path / "a.png~2")
    assert ids(read(*paths)) == ["a.png", "a.png~2", "a.png~3", "a.png~4"]


def test_names_like_row_ids_do_not_collide(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n")
    (tmp_path / "t.txt#1").write_bytes(picture())
    (tmp_path / "t.txt#1#file").write_bytes(picture())
    assert ids(read(tmp_path)) == [
        f"{tmp_path.name}/{name}" for name in ("t.txt#1", "t.txt#1#file", "t.txt#1#file#file")
    ]


def test_names_that_are_no_utf8_can_be_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\\.png")
    try:
        (tmp_path / name).write_bytes(picture())
    except OSError:
        pytest.skip("this file system wants UTF-8 names")
    item = only(tmp_path)
    assert item.error is None
    assert item.id.encode("utf-8").endswith(rb"/caf\udce9\\.png")
    assert json.dumps(item.source, ensure_ascii=False).encode("utf-8")


def test_content_decides_and_not_the_suffix(tmp_path: Path) -> None:
    names = {"a.txt": "PNG", "b": "JPEG", "c.pdf": "GIF", "d.dat": "WEBP", "e.md": "BMP"}
    names |= {"f.jsonl": "TIFF"}
    for name, format in names.items():
        (tmp_path / name).write_bytes(picture(format))
    items = read(tmp_path)
    assert [item.modality for item in items] == ["image"] * 6
    assert all(pixels is not None for _, pixels in decode_items(items, 8, workers=0))


def test_a_text_that_begins_like_a_bitmap_is_a_text() -> None:
    assert kind_of("a.txt", b"BMW for sale, one owner, no accidents, price on request") == "lines"


def test_other_files_in_a_folder_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.md", "b.md", "c.pdf", "Makefile"):
        (tmp_path / name).write_text("words")
    (tmp_path / "._photo.jpg").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (tmp_path / "x.png").write_bytes(picture())
    os.mkfifo(tmp_path / "pipe.jpg")
    reader = InputReader([str(tmp_path)])
    with caplog.at_level(logging.INFO, logger="hysafe.data.inputs"):
        assert len(list(reader)) == 1
    assert reader.skipped == 6
    assert "skipped 6 files" in caplog.text
    assert "2 .md" in caplog.text


@pytest.mark.parametrize("name", ["a.md", "a.pdf", "a.csv", "noext"])
def test_other_files_named_on_the_command_line_are_error_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("words")
    assert "neither a picture nor" in error_of(only(tmp_path / name))


def test_files_that_are_not_regular_never_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in error_of(only(tmp_path / "pipe.png"))


def test_link_loops_end_and_linked_folders_are_read_once(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "deep").mkdir(parents=True)
    (outside / "sub").mkdir(parents=True)
    (inside / "deep" / "a.png").write_bytes(picture())
    (outside / "sub" / "b.png").write_bytes(picture())
    (inside / "deep" / "loop").symlink_to(inside)
    (tmp_path / "beside.png").write_bytes(picture())
    (inside / "up").symlink_to(tmp_path)
    (inside / "again").symlink_to(inside / "deep")
    (inside / "other").symlink_to(outside)
    (inside / "other2").symlink_to(outside / "sub")
    (outside / "back").symlink_to(inside)
    (inside / "one.png").symlink_to(outside / "sub" / "b.png")
    assert ids(read(inside)) == ["in/deep/a.png", "in/one.png", "in/other/sub/b.png"]


def test_a_link_to_itself_is_an_error_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    assert "cannot be read" in error_of(only(tmp_path))


def test_dangling_links_are_error_rows_whatever_their_name(tmp_path: Path) -> None:
    for name in ("a.jpg", "b", "c.md"):
        (tmp_path / name).symlink_to(tmp_path / "gone" / name)
    items = read(tmp_path)
    assert len(items) == 3
    assert all("is a link to" in error_of(item) for item in items)
    assert "is a link to" in error_of(only(tmp_path / "a.jpg"))


def test_what_may_not_be_read_is_an_error_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.md").write_text("words")
    (tmp_path / "folder").mkdir()
    (tmp_path / "c.png").write_bytes(picture())
    for name in ("a.png", "b.md", "folder"):
        (tmp_path / name).chmod(0)
    if os.access(tmp_path / "a.png", os.R_OK):
        pytest.skip("root may read everything")
    try:
        items = read(tmp_path)
        assert [item.error is None for item in items] == [False, False, True, False]
        assert all("PermissionError" in error_of(i) and "chmod" in error_of(i) for i in items[:2])
        assert "PermissionError" in error_of(only(tmp_path / "a.png"))
    finally:
        (tmp_path / "folder").chmod(0o700)


def test_permission_errors_are_error_rows_for_root_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "folder").mkdir()
    real_open, real_scandir = os.open, os.scandir

    def refuse(function):
        def call(path, *args, **kwargs):
            if str(path).endswith(("a.png", "folder")):
                raise PermissionError(13, "Permission denied", path)
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "open", refuse(real_open))
    monkeypatch.setattr(os, "scandir", refuse(real_scandir))
    items = read(tmp_path)
    assert ids(items) == [f"{tmp_path.name}/a.png", f"{tmp_path.name}/folder/"]
    assert all("PermissionError" in error_of(i) and "chmod" in error_of(i) for i in items)


def test_files_and_folders_that_vanish_are_error_rows(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "d.png"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "c").mkdir()
    items = iter_items([str(tmp_path)])
    first = next(items)
    (tmp_path / "b.png").unlink()
    (tmp_path / "c").rmdir()
    rest = list(items)
    assert first.error is None
    assert "FileNotFoundError" in error_of(rest[0])
    assert "does not exist (any more)" in error_of(rest[1])
    assert rest[2].error is None


def test_empty_and_oversized_pictures_are_error_rows(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with open(tmp_path / "b.png", "wb") as stream:
        stream.truncate(10 << 30)  # sparse: takes no room, and must not be read
    (tmp_path / "c.png").write_bytes(picture())
    with peak_memory() as peak:
        items = read(tmp_path)
    assert peak[0] < 1 << 20
    assert "empty" in error_of(items[0])
    assert "10,737,418,240 bytes" in error_of(items[1])
    assert items[2].error is None
    (small,) = InputReader([str(tmp_path / "c.png")], max_file_bytes=20)
    assert "more than the 20 allowed" in error_of(small)


def test_a_file_that_grows_while_it_is_read_is_read_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"x" * 50)
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((*real(fd)[:6], 10, *real(fd)[7:])))
    with open(path, "rb") as stream:
        assert read_picture(stream, str(path), limit=50) == b"x" * 50
        stream.seek(0)
        with pytest.raises(InputError, match="more than the 49 allowed"):
            read_picture(stream, str(path), limit=49)


def test_folders_nested_deeper_than_python_recurses(tmp_path: Path) -> None:
    depth = 1200
    deepest = os.path.join(tmp_path, "a", *["d"] * depth)
    os.makedirs(os.path.join(tmp_path, "a"))
    for level in range(1, depth + 1):
        os.mkdir(os.path.join(tmp_path, "a", *["d"] * level))
    (tmp_path / "z.png").write_bytes(picture())
    try:
        Path(deepest, "x.png").write_bytes(picture())
        items = read(tmp_path)
        assert [len(item.id.split("/")) for item in items] == [depth + 3, 2]
        assert all(item.error is None for item in items)
    finally:  # pytest clears up by recursion
        Path(deepest, "x.png").unlink(missing_ok=True)
        for level in range(depth, 0, -1):
            os.rmdir(os.path.join(tmp_path, "a", *["d"] * level))


def test_excluded_folders_are_not_entered(tmp_path: Path) -> None:
    for name in ("a.png", "out/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "link").symlink_to(tmp_path / "out")
    reader = InputReader([str(tmp_path)], exclude=[str(tmp_path / "out")])
    assert ids(list(reader)) == [f"{tmp_path.name}/a.png"]


def test_a_folder_with_a_broken_file_of_each_kind_gives_a_row_for_each(tmp_path: Path) -> None:
    whole = picture("JPEG")
    (tmp_path / "01_truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "02_empty.jpg").touch()
    (tmp_path / "03_words.jpg").write_text("no picture")
    (tmp_path / "04_suffix.txt").write_bytes(whole)
    (tmp_path / "05_dangling.jpg").symlink_to("nowhere")
    (tmp_path / "06.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (tmp_path / "07.txt").write_bytes(b"fine\n\xff\xfe\xff\n" + b"x" * 1_000_000 + b"\nfine\n")
    (tmp_path / "08.jsonl").write_text('{"text": "fine"}\n{"text": \n{"label": 1}\n[]\n')
    (tmp_path / "09.parquet").write_bytes(b"PAR1 is not enough")
    pq.write_table(pa.table({"label": [1, 2]}), tmp_path / "10.parquet")
    (tmp_path / "11_good.jpg").write_bytes(whole)
    decoded = list(decode_items(read(tmp_path), 8, workers=0))
    good = [item.id.split("/")[-1] for item, _ in decoded if item.error is None]
    bad = [item.id.split("/")[-1] for item, _ in decoded if item.error is not None]
    assert good == ["04_suffix.txt", "07.txt#1", "07.txt#4", "08.jsonl#1", "11_good.jpg"]
    assert bad == [
        *("01_truncated.jpg", "02_empty.jpg", "03_words.jpg", "05_dangling.jpg", "06.heic"),
        *("07.txt#2", "07.txt#3", "08.jsonl#2", "08.jsonl#3", "08.jsonl#4"),
        *("09.parquet", "10.parquet"),
    ]
    for item, pixels in decoded:
        assert (pixels is not None) == (item.error is None and item.modality == "image")


# --------------------------------------------------------------------------- command line paths


def test_paths_that_do_not_exist_stop_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    with pytest.raises(InputError, match=r"No such file or folder: .*nope.*Check the spelling"):
        iter_items([str(tmp_path / "a.png"), str(tmp_path / "nope")])
    with pytest.raises(InputError, match="not fetched"):
        check_paths(["https://example.org/a.png"])
    with pytest.raises(InputError, match="No such file"):
        check_paths(["a\0b"])
    with pytest.raises(InputError, match="No input"):
        check_paths([])
    with pytest.raises(InputError, match="more than once"):
        check_paths(["-", "-"])


# --------------------------------------------------------------------------- lines of text


def test_lines_of_text_are_items(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffone\r\n \t \n\nzwei ä\nlast".encode())
    items = read(path)
    assert [(i.id, i.source, i.text) for i in items] == [
        ("t.txt#1", f"{path}:1", "one"),
        ("t.txt#4", f"{path}:4", "zwei ä"),
        ("t.txt#5", f"{path}:5", "last"),
    ]
    assert all(i.modality == "text" and i.content_hash == content_hash(None, i.text) for i in items)


def test_standard_input_is_lines(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    items = read("-", tmp_path / "a.png", stdin=io.BytesIO(b"one\n\ntwo\n\xff\n"))
    assert [(i.id, i.source, i.text) for i in items[:3]] == [
        ("-#1", "-:1", "one"),
        ("-#3", "-:3", "two"),
        ("-#4", "-:4", None),
    ]
    assert "UnicodeDecodeError" in error_of(items[2])
    assert items[3].id == "a.png"


def test_lines_that_are_no_utf8_are_error_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"good\ncaf\xe9\nnul \0 byte\ngood\n")
    items = read(path)
    assert [item.text for item in items] == ["good", None, None, "good"]
    assert "byte 0xe9 at position 3" in error_of(items[1])
    assert "iconv" in error_of(items[1])
    assert "NUL" in error_of(items[2])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_wide_encodings_are_errors_and_never_garbage(
    tmp_path: Path, encoding: str, name: str
) -> None:
    (tmp_path / name).write_bytes('{"text": "one"}\n{"text": "two"}\n'.encode(encoding))
    items = read(tmp_path)
    assert all("UTF-16" in error_of(item) for item in items)
    # Where a byte order mark tells, it is one row; else every line is one.
    assert len(items) == (1 if encoding in ("utf-16", "utf-32") else 2 + encoding.endswith("le"))


def test_standard_input_that_cannot_be_read_is_one_error_row() -> None:
    (item,) = read("-", stdin=io.BytesIO("words\nmore\n".encode("utf-16")))
    assert "UTF-16" in error_of(item)
    assert item.id == "-"


def test_lines_are_cut_at_the_limit_and_counted() -> None:
    stream = io.BytesIO(b"12345\n1234\r\n123456789\n\n12345")
    assert list(read_lines(stream, "name", limit=4)) == [
        (1, None),
        (2, b"1234"),
        (3, None),
        (4, b""),
        (5, None),
    ]


def test_a_line_over_the_limit_is_an_error_row_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    with open(path, "wb") as stream:
        stream.write(b"before\n" + b"y" * 1_000_000 + b"\nbetween\n")
        for _ in range(40):
            stream.write(b"x" * (1 << 20))
        stream.write(b"\nafter\n" + b"z" * 1_000_000)
    with peak_memory() as peak:
        items = read(path)
    assert peak[0] < 4 << 20
    assert [item.text for item in items] == ["before", None, "between", None, "after", None]
    assert all("longer than the 262,144 bytes" in error_of(item) for item in items[1::2])
    assert [item.id for item in items] == [f"t.txt#{n}" for n in range(1, 7)]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("over", [-1, 0, 1])
def test_the_limit_is_met_to_the_byte(tmp_path: Path, over: int, end: bytes) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"x" * (MAX_TEXT_BYTES + over) + end)
    assert (only(path).error is None) == (over <= 0)


# --------------------------------------------------------------------------- JSONL


def jsonl(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def test_jsonl_holds_texts_pictures_and_both(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(picture())
    uri = "data:image/png;base64," + base64.b64encode(picture()).decode()
    path = jsonl(
        tmp_path,
        {"text": "only text", "label": 3},
        "\n",
        {"image": "sub/a.png"},
        {"text": "both", "image": uri},
        {"Caption": "by another name", "image": None},
        {"image": {"bytes": base64.b64encode(picture()).decode(), "path": "gone.png"}},
        {"image": {"path": str(tmp_path / "sub" / "a.png")}},
        {"text": "no picture after all", "image": ""},
    )
    items = read(path)
    assert [(i.id, i.modality, i.text, i.image) for i in items] == [
        ("d.jsonl#1", "text", "only text", None),
        ("d.jsonl#3", "image", None, picture()),
        ("d.jsonl#4", "image+text", "both", picture()),
        ("d.jsonl#5", "text", "by another name", None),
        ("d.jsonl#6", "image", None, picture()),
        ("d.jsonl#7", "image", None, picture()),
        ("d.jsonl#8", "text", "no picture after all", None),
    ]
    assert items[2].source == f"{path}:4"
    assert items[2].content_hash == content_hash(picture(), "both")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut off', "JSONDecodeError.*not JSON"),
        ("plain words", "not JSON.*one JSON object per line"),
        ("[" * 100_000, "not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON|wanted a string"),
        ('"a string"', "holds a JSON str"),
        ('{"label": 1}', "neither text nor picture; its keys are label"),
        ("{}", "neither"),
        ('{"text": null}', "neither"),
        ('{"text": "  "}', "neither"),
        ('{"text": 7}', "The text is a int"),
        ('{"text": ["a"]}', "is a list"),
        (r'{"text": "\ud800"}', "surrogate"),
        ('{"text": "' + "x" * 1_000_000 + '"}', "longer than"),
        ('{"image": 7}', "holds int"),
        ('{"image": {"bytes": "###"}}', "not base64"),
        ('{"image": "data:image/png;base64,"}', "empty"),
        ('{"image": "data:image/svg+xml,%3Csvg/%3E"}', "data URI is not base64"),
        ('{"image": "gone.png"}', "FileNotFoundError.*gone.png"),
        (r'{"image": "a\u0000b.png"}', "cannot be read"),
        (r'{"image": "a\ud800b.png"}', "cannot be read"),
        ('{"image": "' + "x" * 5000 + '"}', "cannot be read"),
        ('{"image": "."}', "not a regular file"),
    ],
)
def test_broken_jsonl_lines_are_error_rows(tmp_path: Path, line: str, words: str) -> None:
    items = read(jsonl(tmp_path, line + "\n", {"text": "goes on"}))
    assert len(items) == 2
    assert re.search(words, error_of(items[0]))
    assert items[0].error is not None
    assert len(items[0].error.message) < 1000
    items[0].error.message.encode("utf-8")
    assert items[1].text == "goes on"


@pytest.mark.parametrize(
    "address", ["https://example.org/a.png", "s3://bucket/a.png", "FILE:///etc/passwd"]
)
def test_addresses_are_never_fetched(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: object) -> None:
        raise AssertionError("tried to open a connection")

    monkeypatch.setattr("socket.socket.connect", no_network)
    path = jsonl(tmp_path, {"image": address, "text": "t"}, {"image": {"path": address}})
    items = read(path)
    assert [item.modality for item in items] == ["image+text", "image"]
    assert all("nothing is ever fetched" in error_of(item) for item in items)
    assert items[0].text == "t"  # what could be read is kept


def test_jsonl_keys_can_be_named_or_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "a", "note": "b", "image": "gone"}, {"text": "c", "image": "x"})
    first, second = read(path, text_column="note", image_column="")
    assert (first.text, first.error) == ("b", None)
    assert "No key 'note'" in error_of(second)


def test_jsonl_pictures_over_the_limit_are_error_rows(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    uri = "data:image/png;base64," + base64.b64encode(bytes(4000)).decode()
    path = jsonl(tmp_path, {"image": "a.png"}, {"image": uri})
    items = list(InputReader([str(path)], max_file_bytes=20))
    assert all("20" in error_of(item) and "allowed" in error_of(item) for item in items)


# --------------------------------------------------------------------------- Parquet


def parquet(tmp_path: Path, table: pa.Table, **options: object) -> Path:
    path = tmp_path / "d.parquet"
    pq.write_table(table, path, **options)
    return path


def hf_pictures(*values: object) -> pa.Array:
    return pa.array(list(values), HF_STRUCT)


def test_parquet_with_hugging_face_pictures_and_texts(tmp_path: Path) -> None:
    (tmp_path / "by_path.png").write_bytes(picture(colour="blue"))
    table = pa.table(
        {
            "id": [1, 2, 3, 4, 5],
            "image": hf_pictures(
                {"bytes": picture(), "path": "a.png"},
                {"bytes": None, "path": "by_path.png"},
                None,
                {"bytes": picture(), "path": None},
                {"bytes": None, "path": None},
            ),
            "caption": pa.array(["one", "two", "three", None, ""]),
        }
    )
    path = parquet(tmp_path, table)
    items = read(path)
    assert [(i.id, i.source, i.modality) for i in items] == [
        ("d.parquet#0", f"{path}#row 0", "image+text"),
        ("d.parquet#1", f"{path}#row 1", "image+text"),
        ("d.parquet#2", f"{path}#row 2", "text"),
        ("d.parquet#3", f"{path}#row 3", "image"),
        ("d.parquet#4", f"{path}#row 4", "image+text"),
    ]
    assert items[1].image == picture(colour="blue")
    assert [i.text for i in items] == ["one", "two", "three", None, None]
    assert "neither text nor picture" in error_of(items[4])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string(), HF_STRUCT])
@pytest.mark.parametrize("name", ["image", "IMG", "jpg", "bytes"])
def test_parquet_picture_columns_are_found(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    value: object = picture()
    if kind == pa.string():
        value = "a.png"
    elif kind == HF_STRUCT:
        value = {"bytes": picture(), "path": None}
    item = only(parquet(tmp_path, pa.table({"label": [0], name: pa.array([value], kind)})))
    assert (item.modality, item.image) == ("image", picture())


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("name", ["text", "Caption", "prompt", "content", "sentence"])
def test_parquet_text_columns_are_found(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    item = only(parquet(tmp_path, pa.table({"label": [0], name: pa.array(["words"], kind)})))
    assert (item.modality, item.text) == ("text", "words")
    coded = pa.array(["words"]).dictionary_encode()
    assert only(parquet(tmp_path, pa.table({name: coded}))).text == "words"


def test_parquet_picture_columns_declared_in_metadata_are_found(tmp_path: Path) -> None:
    declared = json.dumps({"info": {"features": {"scan": {"_type": "Image"}}}})
    table = pa.table({"scan": hf_pictures({"bytes": picture(), "path": None})})
    table = table.replace_schema_metadata({"huggingface": declared})
    assert only(parquet(tmp_path, table)).image == picture()


def test_parquet_columns_of_the_wrong_type_are_not_taken(tmp_path: Path) -> None:
    table = pa.table({"text": [1, 2], "caption": ["a", "b"], "image": [0.5, 0.6]})
    assert [i.text for i in read(parquet(tmp_path, table))] == ["a", "b"]


def test_a_named_column_that_is_missing_stops_before_anything_starts(tmp_path: Path) -> None:
    path = parquet(tmp_path, pa.table({"text": ["a"], "n": [1]}))
    with pytest.raises(ConfigError, match=r"d.parquet: no column 'body' among text, n"):
        iter_items([str(path)], text_column="body")
    with pytest.raises(ConfigError, match=r"column 'n' holds int64, wanted strings"):
        iter_items([str(path)], text_column="n")
    with pytest.raises(ConfigError, match="no column 'pic'"):
        iter_items([str(path)], image_column="pic")
    # In a folder it is found while the scan runs, so it is a row.
    (item,) = read(tmp_path, text_column="body")
    assert "no column 'body'" in error_of(item)


def test_parquet_without_texts_and_pictures_is_one_error_row(tmp_path: Path) -> None:
    item = only(parquet(tmp_path, pa.table({"a": [1, 2], "b": ["x", "y"]})))
    assert "no column of text or pictures among a, b" in error_of(item)
    assert item.id == "d.parquet"


def test_parquet_columns_can_be_named_or_left_out(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "other": ["b"], "image": hf_pictures({"bytes": b"x"})})
    path = parquet(tmp_path, table)
    item = only(path, text_column="other", image_column="")
    assert (item.modality, item.text, item.image) == ("text", "b", None)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"words"])
def test_what_is_no_parquet_is_one_error_row(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "d.parquet").write_bytes(data)
    assert "no readable Parquet file" in error_of(only(tmp_path / "d.parquet"))
    assert error_of(only(tmp_path / "d.parquet", text_column="body"))


def test_damaged_row_groups_keep_their_rows_as_errors(tmp_path: Path) -> None:
    texts = [f"row {i} {i * 7919:080x}" for i in range(400)]
    path = parquet(
        tmp_path,
        pa.table({"text": texts}),
        row_group_size=100,
        compression="zstd",
        use_dictionary=False,
    )
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    magic = data.index(bytes.fromhex("28b52ffd"), chunk.data_page_offset)  # of the zstd frame
    data[magic : magic + 40] = bytes(40)
    path.write_bytes(data)
    items = read(path)
    assert ids(items) == [f"d.parquet#{i}" for i in range(400)]
    bad = [i for i, item in enumerate(items) if item.error]
    assert bad == list(range(100, 200))
    assert "damaged part" in error_of(items[150])
    assert items[250].text == texts[250]


def test_parquet_strings_that_are_no_utf8_are_error_rows(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"caf\xe9", b"good"], pa.binary())
    table = pa.table({"text": pa.StringArray.from_buffers(3, *raw.buffers()[1:])})
    items = read(parquet(tmp_path, table))
    assert [item.text for item in items] == ["good", None, "good"]
    assert "not UTF-8" in error_of(items[1])


def test_parquet_texts_and_pictures_over_the_limit_are_error_rows(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * 1_000_000, "ok"], "image": hf_pictures(None, {"bytes": b""})})
    first, second = read(parquet(tmp_path, table))
    assert "longer than" in error_of(first)
    assert "empty" in error_of(second)
    assert second.text == "ok"
    path = parquet(tmp_path, pa.table({"image": [picture()]}))
    (item,) = InputReader([str(path)], max_file_bytes=20)
    assert "more than the 20 allowed" in error_of(item)


READ_AND_REPORT = """
import resource, sys
import pyarrow.parquet
from hysafe.data.inputs import InputReader
high = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = high()
count = sum(item.error is None for item in InputReader(sys.argv[1:]))
print(count, (high() - before) // 1024)
"""


def test_parquet_is_streamed_and_a_row_group_is_not_loaded_whole(tmp_path: Path) -> None:
    block = os.urandom(1 << 17)
    table = pa.table({"image": [i.to_bytes(2, "big") + block for i in range(1024)]})
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 16}
    path = parquet(tmp_path, table, row_group_size=1024, **options)
    assert path.stat().st_size > 128 << 20
    command = [sys.executable, "-c", READ_AND_REPORT, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    count, mebibytes = map(int, run.stdout.split())
    assert count == 1024
    assert mebibytes < 100


# --------------------------------------------------------------------------- development data

DATA = os.environ.get("HYSAFE_DATA")


@pytest.mark.skipif(not DATA, reason="HYSAFE_DATA is not set")
def test_development_data_is_read_in_full() -> None:
    folder = Path(DATA or "")
    if not (folder / "images").is_dir():
        pytest.skip("no images under HYSAFE_DATA")
    path = folder / "images" / "tiny_imagenet" / "val.parquet"
    items = read(path)
    assert len(items) == pq.ParquetFile(path).metadata.num_rows
    assert all(item.error is None and item.modality == "image" for item in items)
    path = folder / "text" / "clinc150.jsonl"
    items = read(path)
    assert len(items) == sum(1 for _ in path.open("rb"))
    assert all(item.error is None and item.modality == "text" for item in items)
