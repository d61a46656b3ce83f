"""Locations that are no local paths: the same items as from the disk, and no request too many.

``memory://`` always; ``s3://`` against a local server where s3fs and moto are installed.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hysafe.app.annotate import AUDIT, annotate
from hysafe.app.cli import main
from hysafe.app.export import export
from hysafe.app.pipeline import SafetyModel, ScanOptions
from hysafe.app.scan import scan
from hysafe.data import inputs, remote
from hysafe.data.inputs import InputReader, check_paths, iter_items
from hysafe.data.remote import READERS, RemoteFile, RemoteStream, local_folder, locate
from hysafe.errors import ConfigError, InputError, MissingExtraError
from hysafe.index import Collection
from hysafe.types import Item


def picture(colour: str = "red", format: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, format)
    return out.getvalue()


def table(**columns: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def read(*paths: str | Path, **options: Any) -> list[Item]:
    return list(iter_items([str(p) for p in paths], **options))


def error_of(item: Item) -> str:
    assert item.error is not None
    assert item.content_hash == ""
    return f"{item.error.type}: {item.error.message}"


FILES = {
    "b.png": picture(),
    "a/2.jpg": picture("blue", "JPEG"),
    "a/1.png": picture("green"),
    "a.png": picture("white"),
    "c/d/e.gif": picture("black", "GIF"),
    ".hidden.png": picture("gray"),
    "noext": picture("yellow"),
    "broken.png": b"no picture",
    "empty.jpg": b"",
    "n.txt": b"one\n\ntwo\n",
    "p.parquet": table(text=["x", "y"]),
    "q.jsonl": b'{"text": "t"}\nno json\n{"text": "u", "image": "a/1.png"}\n',
    "readme.md": b"words",
    "._a.png": b"\0\5\x16\7\0\2\0\0Mac OS X",
    "odd [1]*#7": picture("pink"),
}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty location."""
    if request.param == "s3":
        for key, value in {
            "AWS_ENDPOINT_URL": request.getfixturevalue("s3_server"),
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(key, value)
    yield from _emptied(f"{request.param}://hysafe-test")


@pytest.fixture
def memory() -> Iterator[str]:
    yield from _emptied("memory://hysafe-test")


def _emptied(address: str) -> Iterator[str]:
    kind = fsspec.get_filesystem_class(address.partition(":")[0])
    kind.clear_instance_cache()
    fs = fsspec.filesystem(address.partition(":")[0])
    if fs.exists(address):
        fs.rm(address, recursive=True)
    fs.mkdir(address)
    yield address
    kind.clear_instance_cache()


def put(address: str, data: bytes) -> None:
    with fsspec.open(address, "wb") as stream:
        stream.write(data)


def filled(address: str, files: dict[str, bytes] = FILES) -> str:
    for name, data in files.items():
        fs, path = fsspec.core.url_to_fs(address)
        fs.pipe_file(f"{path}/{name}", data)
    return address


def on_disk(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every request for bytes: (name, how many)."""
    requests: list[tuple[str, int]] = []
    real = RemoteStream._ask

    def ask(self: RemoteStream, start: int, stop: int) -> bytes:
        if stop > start:
            requests.append((self._file.name, stop - start))
        return real(self, start, stop)

    monkeypatch.setattr(RemoteStream, "_ask", ask)
    return requests


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """An object whose bytes do not come."""
    kind = fsspec.get_filesystem_class("memory")
    real = kind.cat_file

    def cat_file(self: Any, path: str, **options: Any) -> bytes:
        if path.endswith(name):
            raise error
        return real(self, path, **options)

    monkeypatch.setattr(kind, "cat_file", cat_file)


# --------------------------------------------------------------------------- what is read


def test_a_location_gives_the_items_of_a_local_folder(place: str, tmp_path: Path) -> None:
    filled(f"{place}/photos")
    on_disk(tmp_path / "photos")
    there, here = InputReader([f"{place}/photos"]), InputReader([str(tmp_path / "photos")])
    ours, theirs = list(there), list(here)
    facts = ("id", "modality", "text", "image", "content_hash")
    assert [[getattr(i, f) for f in facts] for i in ours] == [
        [getattr(i, f) for f in facts] for i in theirs
    ]
    assert [i.error and i.error.type for i in ours] == [i.error and i.error.type for i in theirs]
    assert there.skipped == here.skipped == 2
    assert [i.source for i in ours] == [i.source.replace(str(tmp_path), place, 1) for i in theirs]
    assert list(there) == ours  # in the same order again


def test_single_objects_are_read(place: str) -> None:
    filled(place)
    names = ("b.png", "n.txt", "p.parquet", "noext", "odd [1]*#7", "readme.md")
    items = read(*(f"{place}/{name}" for name in names))
    assert [i.id for i in items] == [
        "b.png", "n.txt#1", "n.txt#3", "p.parquet#0", "p.parquet#1", "noext", "odd [1]*#7#file",
        "readme.md",
    ]  # fmt: skip
    assert items[0].source == f"{place}/b.png"
    assert items[4].source == f"{place}/p.parquet#row 1"
    assert "neither a picture nor" in error_of(items[-1])
    assert [i.error for i in items[:-1]] == [None] * 7


def test_a_pattern_is_a_folder_of_what_it_matches(place: str) -> None:
    names = ("2024-01/x.txt", "2024-02/x.txt", "2024-02/y.png", "2025-01/x.txt", "deep/er/x.txt")
    filled(f"{place}/data", {n: picture() if n.endswith("png") else b"word" for n in names})

    def ids(pattern: str) -> list[str]:
        return [i.id for i in read(f"{place}/data/{pattern}")]

    assert ids("2024-*/x.txt") == ["data/2024-01/x.txt#1", "data/2024-02/x.txt#1"]
    assert ids("2024-0[2]") == ["data/2024-02/x.txt#1", "data/2024-02/y.png"]
    assert ids("**/x.txt") == [f"data/{n}#1" for n in names if n.endswith("x.txt")]
    assert len(ids("**")) == len(names)  # a folder and what is in it count once
    with pytest.raises(InputError, match=r"Nothing matches .*2023-\*"):
        iter_items([f"{place}/data/2023-*"])


def test_locations_of_one_name_have_different_ids(memory: str) -> None:
    filled(f"{memory}/x/photos", {"a.png": picture()})
    filled(f"{memory}/y/photos", {"a.png": picture()})
    items = read(f"{memory}/x/photos/", f"{memory}/y/photos")
    assert [i.id for i in items] == ["photos/a.png", "photos~2/a.png"]


def test_columns_are_named_as_for_local_tables(place: str) -> None:
    filled(place, {"d.parquet": table(note=["n"], text=["t"])})
    assert read(f"{place}/d.parquet", text_column="note")[0].text == "n"
    with pytest.raises(ConfigError, match=r"d.parquet: no column 'gone'"):
        iter_items([f"{place}/d.parquet"], text_column="gone")


# --------------------------------------------------------------------------- what is not asked for


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture of this machine that no remote table may reach."""
    (tmp_path / "secret.png").write_bytes(picture("purple"))
    return tmp_path / "secret.png"


def test_rows_are_followed_only_inside_the_location_given(
    place: str, secret: Path, asked: list[tuple[str, int]]
) -> None:
    values = {
        "../in/a.png": picture(),
        "./b.png": picture("blue"),
        str(secret): None,
        "../../out.png": None,
        f"{place}/out.png": None,
        "memory://hysafe-test/out.png": None,
        "https://example.org/a.png": None,
        f"file://{secret}": None,
        "/hysafe-test/out.png": None,
        "gone.png": None,
        "": None,
        "../in": None,
    }
    rows = b"".join(json.dumps({"text": "t", "image": v}).encode() + b"\n" for v in values)
    filled(f"{place}/root", {
        "in/a.png": picture(), "t/b.png": picture("blue"), "t/d.jsonl": rows,
        "t/d.parquet": table(image=list(values)),
    })  # fmt: skip
    filled(place, {"out.png": picture("purple")})
    items = read(f"{place}/root")
    for kind in ("jsonl", "parquet"):
        found = [i.image for i in items if f"d.{kind}" in i.id]
        assert found == list(values.values())
    told = [i.error.message for i in items if i.error is not None]
    assert sum("does not lie in the location" in m for m in told) == 6
    assert sum("nothing is ever fetched" in m for m in told) == 2 * sum("://" in v for v in values)
    assert "out.png" not in {name for name, _ in asked}
    # a table alone gives no folder
    alone = read(f"{place}/root/t/d.jsonl")
    assert [i.image for i in alone] == [None] * len(values)
    local = read(secret)  # and the reader of local files is what it was
    assert local[0].image == picture("purple")


def test_addresses_in_a_local_table_are_not_followed(memory: str, tmp_path: Path) -> None:
    put(f"{memory}/a.png", picture())
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"image": f"{memory}/a.png"}))
    assert "nothing is ever fetched" in error_of(read(path)[0])


def test_limits_and_kinds_hold_before_bytes_are_read(
    place: str, asked: list[tuple[str, int]]
) -> None:
    filled(place, {
        "big.png": b"x" * 5000, "big": picture("red", "BMP") + bytes(5000), "ok.png": picture(),
        "movie.mp4": b"m" * 3000, "ok": picture(),
    })  # fmt: skip
    reader = InputReader([place], max_file_bytes=2000)
    items = {i.id.rpartition("/")[2]: i for i in reader}
    assert reader.skipped == 1
    assert "5,000 bytes" in error_of(items["big.png"])
    assert "more than the 2,000" in error_of(items["big"])
    assert items["ok"].image == items["ok.png"].image == picture()
    sizes = {name: [n for other, n in asked if other == name] for name, _ in asked}
    assert sizes["ok.png"] == [len(picture())]  # its name tells: one request
    assert all(sum(sizes[name]) <= 64 for name in ("big.png", "big", "movie.mp4"))


def test_tables_are_read_by_large_requests(
    place: str, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "TABLE_BUFFER", 4096)
    lines = b"".join(b"%d\n" % i for i in range(2000))
    filled(place, {"n.txt": lines})
    items = read(f"{place}/n.txt")
    assert [i.text for i in items] == [str(i) for i in range(2000)]
    assert len(asked) <= 2 + len(lines) // 4096 + 1


def test_pictures_are_asked_for_ahead_and_not_too_far(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(memory, {f"{i:03d}.png": picture() + bytes([i]) for i in range(80)})
    kind = fsspec.get_filesystem_class("memory")
    real, lock, begun, most, at_once = kind.cat_file, threading.Lock(), [0], [0], [0]

    def cat_file(self: Any, path: str, **options: Any) -> bytes:
        with lock:
            begun[0] += 1
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.002 * (hash(path) % 5))
        with lock:
            at_once[0] -= 1
        return real(self, path, **options)

    monkeypatch.setattr(kind, "cat_file", cat_file)
    names = []
    for count, item in enumerate(iter_items([memory]), 1):
        names.append(item.id)
        assert begun[0] <= count + READERS
    assert names == sorted(names)
    assert 1 < most[0] <= READERS
    # and by bytes
    monkeypatch.setattr(remote, "AHEAD_BYTES", 3 * len(picture()))
    begun[0] = 0
    first = next(items := iter_items([memory]))
    assert first.image is not None
    assert begun[0] <= 4
    items.close()  # type: ignore[attr-defined]


# --------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Forbidden"), "PermissionError.*with these credentials"),
        (FileNotFoundError("gone"), "FileNotFoundError.*is not there"),
        (TimeoutError("slow"), "InputError.*cannot be read .slow.*--retry"),
        (RuntimeError("of a client\nlibrary"), "InputError.*RuntimeError: of a client"),
    ],
)
def test_objects_that_do_not_come_are_error_rows(
    memory: str, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    filled(memory, {"a.png": picture(), "b.png": picture(), "n.txt": b"one", "z.png": picture()})
    failing(monkeypatch, "b.png", error)
    items = read(memory)
    assert [i.error is None for i in items] == [True, False, True, True]
    assert re.search(words, error_of(items[1]))
    failing(monkeypatch, "n.txt", error)
    assert read(memory)[2].modality == "text"
    assert error_of(read(memory)[2])


def test_a_table_that_breaks_off_says_so(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "TABLE_BUFFER", 4096)
    filled(memory, {"n.txt": b"a line\n" * 2000, "z.png": picture()})
    kind = fsspec.get_filesystem_class("memory")
    real = kind.cat_file

    def cat_file(self: Any, path: str, start: int, end: int) -> bytes:
        data = real(self, path, start=start, end=end)
        return data[:-5] if start > 8000 else data  # shorter than asked for

    monkeypatch.setattr(kind, "cat_file", cat_file)
    items = read(memory)
    assert 1000 < len(items) < 2000
    assert "has changed" in error_of(items[-2])
    assert all(i.error is None for i in items[:-2])
    assert items[-1].error is None


def test_folders_that_cannot_be_listed_are_error_rows(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(memory, {"a/1.png": picture(), "b/2.png": picture()})
    kind = fsspec.get_filesystem_class("memory")
    real = kind.ls

    def ls(self: Any, path: str, **options: Any) -> Any:
        if path.endswith("/a"):
            raise PermissionError(13, "Forbidden")
        return real(self, path, **options)

    monkeypatch.setattr(kind, "ls", ls)
    first, second = read(memory)
    assert (first.id, second.id) == ("hysafe-test/a/", "hysafe-test/b/2.png")
    assert "credentials" in error_of(first)


def test_what_is_not_there_stops_before_anything_starts(place: str) -> None:
    with pytest.raises(InputError, match=r"Nothing is at .*/nope"):
        check_paths([f"{place}/nope"])
    with pytest.raises(InputError, match="Nothing is at"):
        check_paths([f"{place}-no-such-bucket/x"])
    with pytest.raises(InputError, match="names no bucket"):
        check_paths([place.partition("//")[0] + "//"])


def test_a_store_that_does_not_answer_stops_before_anything_starts(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"{memory}/a.png", picture())
    kind = fsspec.get_filesystem_class("memory")

    def info(self: Any, path: str, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(kind, "info", info)
    error: Exception = RuntimeError("no credentials")
    with pytest.raises(InputError, match="no credentials.*Check the address, the credentials"):
        check_paths([f"{memory}/a.png"])
    error = PermissionError(13, "Forbidden")  # this one may be a picture
    (item,) = read(f"{memory}/a.png")
    assert (item.id, item.modality) == ("a.png", "image")
    assert "credentials" in error_of(item)


def test_a_missing_driver_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(scheme: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", none)
    with pytest.raises(MissingExtraError, match=r"s3fs is not installed.*'hysafe\[remote\]'"):
        check_paths(["s3://bucket/a.png"])


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_s3_names_that_stand_for_folders(place: str) -> None:
    import boto3

    client, bucket = boto3.client("s3"), place.removeprefix("s3://")
    for key in ("x/", "x/sub/", "x/a.png", "x//lost.png", "x/sub/b.png"):
        data = b"" if key.endswith("/") else picture()
        client.put_object(Bucket=bucket, Key=key, Body=data)
    items = read(f"{place}/x")
    assert [(i.id, i.error is None) for i in items] == [
        ("x//", False), ("x/a.png", True), ("x/sub/b.png", True),
    ]  # fmt: skip
    assert "empty part" in error_of(items[0])


# --------------------------------------------------------------------------- whole commands


def test_a_scan_goes_on_and_is_that_of_the_local_folder(
    place: str, tmp_path: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {k: v for k, v in FILES.items() if k != "q.jsonl"}
    address = filled(f"{place}/photos", files)
    options = ScanOptions(2, 0, commit=2)
    scan([str(on_disk(tmp_path / "photos", files))], tmp_path / "a", tiny_model, options=options,
         report=False)  # fmt: skip

    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if done == 7:
            raise Stop

    with pytest.raises(Stop):
        scan([address], tmp_path / "b", tiny_model, options=options, progress=stop)
    done = scan([address], tmp_path / "b", tiny_model, options=options)
    assert done.known >= 6

    def results(folder: Path, root: str) -> list[dict[str, Any]]:
        text = (folder / "results.jsonl").read_text().replace(root, "")
        lines = [json.loads(line) for line in text.splitlines()]
        return [line | {"error": (line["error"] or {}).get("type")} for line in lines]

    ours = results(tmp_path / "b", place)
    assert ours == results(tmp_path / "a", str(tmp_path))
    assert {r["rating"] for r in ours if r["error"]} == {"review"}
    again = scan([address], tmp_path / "b", tiny_model, options=options, report=False)
    assert again.known == again.items == len(ours)


def test_the_command_line_says_what_it_cannot_do(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(f"{memory}/a.png", picture())
    monkeypatch.chdir(tmp_path)

    def told(*words: str) -> str:
        try:
            code = main(list(words))
        except SystemExit as end:
            code = int(str(end.code))
        assert code == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        return shown

    assert "written and searched on a local disk only" in told("scan", memory, "--out", "s3://b/x")
    assert "local disk only" in told("search", "s3://bucket/out", "words")
    assert "is not watched" in told("scan", memory, "--out", "out", "--watch", "9")
    assert "only those of s3://" in told(
        "annotate",
        str(on_disk(tmp_path / "s", {"p.parquet": table(text=["x"])})),
        "--out",
        "ftp://a/b",
    )
    assert "not fetched but those of s3://" in told("scan", "https://a/b.png", "--out", "out")
    assert not list(tmp_path.glob("s3*"))
    with pytest.raises(InputError, match="local disk only"):
        local_folder(Path("s3://bucket/out"), "out")
    assert local_folder("a/b", "out") == Path("a/b")


def test_export_writes_to_an_address(place: str, tmp_path: Path, tiny_model: SafetyModel) -> None:
    scan([filled(f"{place}/in")], tmp_path / "out", tiny_model, options=ScanOptions(8, 0))
    collection = Collection.open(tmp_path / "out")
    for form in ("csv", "parquet", "labelstudio"):
        export(collection, tmp_path / f"here.{form}", form)
        count, _ = export(collection, f"{place}/made/here.{form}", form)
        assert count == len(collection)
        with fsspec.open(f"{place}/made/here.{form}", "rb") as stream:
            assert stream.read() == (tmp_path / f"here.{form}").read_bytes()
    with fsspec.open(f"{place}/made/here.xml", "rb") as stream:
        assert b"<View>" in stream.read()
    with pytest.raises(InputError, match="only those of s3://"):
        export(collection, "ftp://host/a.csv", "csv")
    if place.startswith("s3"):  # a bucket is not made in passing
        with pytest.raises(InputError, match=r"s3://hysafe-slip/a.csv: cannot be written"):
            export(collection, "s3://hysafe-slip/a.csv", "csv")
        assert not fsspec.filesystem("s3").exists("hysafe-slip")


def test_shards_are_annotated_from_an_address_to_another(
    place: str, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as made:
        for name, data in {"1.png": picture(), "1.txt": b"words", "2.txt": b"more"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    shards = {"a.parquet": table(text=["x", "y"]), "b.tar": tar.getvalue()}
    address = filled(f"{place}/shards", shards)
    options = ScanOptions(8, 0)
    here = annotate([str(on_disk(tmp_path / "in", shards))], tmp_path / "out", tiny_model,
                    options=options)  # fmt: skip
    there = annotate([address], f"{place}/done", tiny_model, options=options)
    assert there == here
    assert there.items == 4
    for name in (*shards, AUDIT):
        with fsspec.open(f"{place}/done/{name}", "rb") as stream:
            assert stream.read() == (tmp_path / "out" / name).read_bytes()
    with pytest.raises(InputError, match="the shards stand there"):
        annotate([address], f"{place}/shards/", tiny_model, options=options)
    filled(f"{place}/shards", {"c.tar": tar.getvalue()[:700]})
    with pytest.raises(InputError, match="damaged"):
        annotate([f"{place}/shards/c.tar"], f"{place}/done", tiny_model, options=options)
    fs, path = fsspec.core.url_to_fs(f"{place}/done")
    assert not fs.exists(f"{path}/c.tar")  # what is not whole does not appear


def test_a_stream_is_that_of_a_file(memory: str) -> None:
    data = os.urandom(5000)
    put(f"{memory}/x", data)
    file = locate(f"{memory}/x").found[0].file
    assert isinstance(file, RemoteFile)
    raw, wanted = RemoteStream(file), io.BytesIO(data)
    raw.preload(100)
    for seek, size in ((0, 50), (90, 30), (4990, 100), (6000, 5), (0, 6000), (120, 0)):
        assert raw.seek(seek) == wanted.seek(seek)
        assert raw.read(size) == wanted.read(size)
        assert raw.tell() == wanted.tell()
    assert raw.seek(-10, os.SEEK_END) == 4990
    assert file.open().read() == data
