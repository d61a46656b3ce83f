"""A scan by a Ray cluster ends like a local one, whatever is lost on the way.

Most tests ask the worker, which needs no ray; the others share one cluster of two simulated machines
with a CPU each.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hysafe.app import ray_scan as engine
from hysafe.app.cli import main
from hysafe.app.known import GROUP_ITEMS
from hysafe.app.pipeline import SafetyModel, ScanOptions
from hysafe.app.ray_scan import ClusterOptions, End, Inputs, Piece, Setup, Worker, ray_scan
from hysafe.app.scan import collection_meta, scan
from hysafe.app.shards import LINE, Shards, shard_name
from hysafe.data import units
from hysafe.data.inputs import iter_items
from hysafe.data.units import Lister, Unit, UnitReader, Unread
from hysafe.errors import CollectionError, ConfigError, HysafeError, InputError, MissingExtraError
from hysafe.index import Collection
from hysafe.types import Item

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is absent")
OPTIONS = ScanOptions(batch=4, workers=0)
PICTURES, LINES, ROWS = 40, 6, 3
ITEMS = PICTURES + LINES + ROWS


def png(seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


def fill(folder: Path) -> Path:
    """Pictures in folders (one of them broken), lines, a table, and a file that is skipped."""
    for n in range(PICTURES):
        path = folder / f"{n % 3}" / f"{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(n) if n != 5 else png(n)[:30])
    (folder / "lines.txt").write_text("".join(f"line number {n}\n" for n in range(LINES)))
    table = pa.table({"text": ["a row", "", "a last row"], "image": [None, png(99), None]})
    pq.write_table(table, folder / "rows.parquet")
    (folder / "notes.md").write_text("words")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return fill(tmp_path / "in")


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "UNIT_FILES", 4)


def lines_of(out: Path) -> list[dict[str, Any]]:
    """Results, which agree with the table and name each item once."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    rows = Collection.open(out).to_arrow().to_pylist()
    assert [(r["id"], r["rating"], r["content_hash"]) for r in rows] == [
        (x["id"], x["rating"], x["hashes"]["content"]) for x in lines
    ]
    assert len({x["id"] for x in lines}) == len(lines)
    return lines


def assert_as_local(source: Path, out: Path, model: SafetyModel, tmp_path: Path) -> None:
    """The same items in the same order, the same ratings, scores and vectors."""
    scan([str(source)], tmp_path / "local", model, options=OPTIONS, report=False)
    ours, theirs = lines_of(out), lines_of(tmp_path / "local")
    for x, y in zip(ours, theirs, strict=True):
        assert x["p_unsafe"] == pytest.approx(y["p_unsafe"], abs=2e-4)
        for key in ("id", "source", "modality", "rating", "error", "hashes"):
            assert x[key] == y[key], x["id"]
    tables = [Collection.open(o).to_arrow() for o in (out, tmp_path / "local")]
    for name in ("vector", "text_vector", "scores"):
        for x, y in zip(*(t[name].to_pylist() for t in tables), strict=True):
            assert (x is None) == (y is None)
            assert np.asarray(x or [], float) == pytest.approx(np.asarray(y or [], float), abs=1e-4)


# ---------------------------------------------------------------- listing and reading


def test_units_read_are_the_items_of_a_scan(source: Path) -> None:
    whole = list(iter_items([str(source), str(source / "lines.txt")]))
    lister = Lister([str(source), str(source / "lines.txt")])
    listed = list(lister.units(4))
    assert all(isinstance(f, Unread) for unit in listed for f in unit.files)
    assert max(len(unit.files) for unit in listed) <= 16
    assert len(listed) > 3
    reader = UnitReader([str(source), str(source / "lines.txt")])
    read, skipped = [], 0
    for unit in listed:
        read += list(reader.read(unit))
        skipped += reader.skipped
    assert read == whole
    assert skipped == 1


def test_what_cannot_be_looked_at_is_an_item_of_its_unit(source: Path) -> None:
    (source / "gone.png").symlink_to("/nowhere/at/all")
    (source / "1" / "10.png").unlink()
    (source / "1" / "10.png").mkdir()
    listed = list(Lister([str(source)]).units(4))
    os.rename(source / "0" / "00.png", source / "moved.png")  # after it was listed
    items = [i for unit in listed for i in UnitReader([str(source)]).read(unit)]
    errors = {i.id: i.error.type for i in items if i.error is not None}
    assert errors == {"in/0/00.png": "FileNotFoundError", "in/gone.png": "FileNotFoundError"}


def test_a_new_file_changes_one_unit(source: Path) -> None:
    for n in range(300):
        (source / f"more-{n:03d}.png").touch()
    before = {u.files for u in Lister([str(source)]).units(8)}
    (source / "1" / "00-new.png").touch()
    after = {u.files for u in Lister([str(source)]).units(8)}
    assert len(before) > 20
    assert len(after - before) <= 2


def test_large_tables_stand_alone(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 60)
    (source / "a.txt").write_text("x\n")
    (source / "b.txt").write_text("x\n")
    parts = [[f.id for f in u.files] for u in Lister([str(source)]).units(10**6)]
    assert ["in/lines.txt"] in parts
    assert ["in/rows.parquet"] in parts
    assert any({"in/a.txt", "in/b.txt"} <= set(part) for part in parts)


def test_standard_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="read on one machine"):
        list(Lister(["-"]).units())


# ---------------------------------------------------------------- the worker


@pytest.fixture
def setup(
    source: Path, tmp_path: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch
) -> Setup:
    monkeypatch.setattr(engine, "load", lambda name: tiny_model)
    shards = Shards(str(tmp_path / "shards"))
    shards.make()
    meta = collection_meta(tiny_model, tiny_model.view(), reading=tiny_model.hash, reads=False)
    return Setup(
        tiny_model.name, tiny_model.taxonomy, None, False, meta, shards, OPTIONS,
        Inputs((str(source),), None, None, ()),
    )  # fmt: skip


def worked(setup: Setup, worker: Worker | None = None, standing: Any = frozenset()) -> list[Piece]:
    """All shards that a worker makes or finds."""
    worker = worker or Worker(setup, frozenset(standing))
    worker.ready()
    pieces = []
    for number, unit in enumerate(Lister(**setup.inputs.arguments()).units(4)):
        while isinstance(answer := worker.piece(number, unit, frozenset()), Piece):
            pieces.append(answer)
        assert isinstance(answer, End)
    return pieces


def test_shards_follow_from_their_items(
    setup: Setup, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = worked(setup)
    assert sum(p.rows for p in first) == ITEMS
    assert not any(p.stood for p in first)
    assert setup.shards.names() == {p.name for p in first}
    with monkeypatch.context() as patch:
        patch.setattr(SafetyModel, "_encode", None)  # nothing is encoded again
        again = worked(setup, standing=setup.shards.names())
    assert again == [p._replace(stood=True) for p in first]
    (source / "1" / "13.png").write_bytes(png(1000))  # other content under the same name
    third = worked(setup, standing=setup.shards.names())
    assert [p.stood for p in third].count(False) == 1
    assert [p.rows for p in third] == [p.rows for p in first]


def test_a_unit_is_cut_into_shards_that_stand_apart(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hysafe.app.known.GROUP_ITEMS", 2)
    first = worked(setup)
    assert {p.rows for p in first} == {1, 2}
    lost = {first[0].name, first[7].name, first[-1].name}
    again = worked(setup, standing=setup.shards.names() - lost)
    assert [p.name for p in again] == [p.name for p in first]
    assert {p.name for p in again if not p.stood} == lost
    assert GROUP_ITEMS > 2


def test_a_name_says_what_its_rows_depend_on(setup: Setup) -> None:
    item = Item("a", "/a", "image", image=b"x", content_hash="0" * 64)
    base = shard_name([item], setup.meta)
    assert base == shard_name([item], replace(setup.meta, stamp="other"))
    others = [
        shard_name([replace(item, id="b")], setup.meta),
        shard_name([replace(item, source="/b")], setup.meta),
        shard_name([replace(item, content_hash="1" * 64)], setup.meta),
        shard_name([item, item], setup.meta),
        shard_name([item], replace(setup.meta, policy="p")),
        shard_name([item], replace(setup.meta, reading="m")),
    ]
    assert len({base, *others}) == 7


def test_a_shard_appears_whole_or_not_at_all(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = os.replace

    def watched(part: str, name: str) -> None:
        seen.append((setup.shards.names(), len(pq.read_table(part))))
        real(part, name)

    monkeypatch.setattr(os, "replace", watched)
    pieces = worked(setup)
    for k, (names, rows) in enumerate(seen):
        assert (names, rows) == ({p.name for p in pieces[:k]}, pieces[k].rows)
    (path,) = [Path(setup.shards.place, pieces[0].name)]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CollectionError, match="Remove it and run the same command again"):
        setup.shards.read(pieces[0].name)
    left = Path(setup.shards.place, f".{pieces[0].name}.0123.part")
    left.touch()
    setup.shards.sweep()
    assert left.exists()  # a worker may be writing it
    os.utime(left, (0, 0))
    setup.shards.sweep()
    assert not left.exists()
    assert setup.shards.names() == {p.name for p in pieces}


def test_only_shards_with_errors_are_tried_again(setup: Setup) -> None:
    pieces = worked(setup)
    (broken,) = setup.shards.with_errors([p.name for p in pieces])
    rows = setup.shards.read(broken).to_pylist()
    assert [r["id"] for r in rows if r["error"]] == ["in/2/05.png"]
    assert json.loads(rows[0][LINE])["id"] == rows[0]["id"]
    assert engine._standing(setup.shards, fresh=False, retry=True) == {p.name for p in pieces} - {
        broken
    }
    assert engine._standing(setup.shards, fresh=True, retry=False) == frozenset()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.0.1"}, "the driver has 0.0.1. Install the same"),
        ({"probe": ".probe-x"}, "not the folder of shards that the driver sees"),
        ({"inputs": Inputs(("/nowhere/at/all",), None, None, ())}, "No such file or folder"),
        ({"reading": "another"}, "another model or reader of text"),
    ],
)
def test_a_machine_that_has_not_what_the_driver_has_is_refused(
    setup: Setup, change: dict[str, Any], message: str
) -> None:
    if "reading" in change:
        change = {"meta": replace(setup.meta, **change)}
    with pytest.raises(HysafeError, match=message) as raised:
        Worker(replace(setup, **change), frozenset()).ready()
    assert str(raised.value).startswith("machine ")


# ---------------------------------------------------------------- before a cluster is asked


def test_a_missing_ray_names_its_extra(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "ray" else real(name, *a)
    )
    with pytest.raises(MissingExtraError):
        engine.check_ray()
    assert main(["scan", str(source), "--out", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert "pip install 'hysafe[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--address", "auto"], "--address: of --engine ray only"),
        (["--actors", "2", "--shards", "x"], "--shards, --actors: of --engine ray only"),
        (["--engine", "ray", "--watch", "9"], "--watch: of --engine local only"),
        (["--engine", "ray", "--actors", "0"], "--actors must be at least 1"),
        (["--engine", "ray", "--timeout", "nan"], "--timeout more than 0"),
    ],
)
def test_options_that_do_not_go_together(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["scan", str(source), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err


class Machines:
    """A cluster, as far as the check of its CPUs asks it."""

    def __init__(self, *cpus: float) -> None:
        self._nodes = [{"Alive": c > 0, "Resources": {"CPU": abs(c)}} for c in cpus]

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes


@pytest.mark.parametrize(
    ("cpus", "need", "actors"),
    [((1,), 2, None), ((1, 1), 2, None), ((4, 3), 2, 4), ((2, -8), 2, 2)],
)
def test_too_few_cpus_are_named_before_anything_waits_for_them(
    cpus: tuple[int, ...], need: int, actors: int | None
) -> None:
    with pytest.raises(ConfigError, match=rf"{actors or 1} workers of {need} CPUs each") as raised:
        engine._check_room(Machines(*cpus), need, actors)
    assert "--workers" in str(raised.value)
    engine._check_room(Machines(*cpus, 4, 4), need, actors)


class FakeRay:
    """A cluster in this process: actors answer when they are waited for.

    Args:
        machines: CPUs of each. lost: called before every answer, with the actor's number and the
            method; true where the actor is gone.
    """

    class exceptions:
        class RayError(Exception): ...

        class RayTaskError(RayError):
            cause: BaseException

    def __init__(self, machines: list[int], lost: Callable[[int, str], bool]) -> None:
        self.machines, self.lost = machines, lost
        self.actors: list[Any] = []
        self.killed: list[int] = []
        self.waiting: dict[int, tuple[int, str, tuple[Any, ...]]] = {}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": c}} for c in self.machines]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": sum(self.machines)}

    def available_resources(self) -> dict[str, float]:
        return {"CPU": sum(self.machines) - len(self.actors) + len(set(self.killed))}

    def put(self, value: Any) -> Any:
        return value

    def remote(self, kind: Any) -> Any:
        def start(*arguments: Any) -> Any:
            number = len(self.actors)
            self.actors.append(kind(*arguments))

            def method(name: str) -> Any:
                def ask(*words: Any) -> int:
                    self.waiting[key := len(self.waiting)] = (number, name, words)
                    return key

                return SimpleNamespace(remote=ask)

            return SimpleNamespace(number=number, ready=method("ready"), piece=method("piece"))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def wait(self, references: list[int], **_: Any) -> tuple[list[int], list[int]]:
        return references[:1], references[1:]

    def get(self, reference: int) -> Any:
        number, name, words = self.waiting[reference]
        if number in self.killed or self.lost(number, name):
            raise self.exceptions.RayError("gone")
        return getattr(self.actors[number], name)(*words)

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.number)


class Counting:
    """A worker whose units have three shards of two rows each; it makes none."""

    made: ClassVar[list[str]] = []

    def __init__(self, setup: Any, standing: frozenset[str]) -> None:
        self.left: list[Piece] = []
        self.number = -1

    def ready(self) -> str:
        return "here"

    def piece(self, number: int, unit: Any, done: frozenset[str]) -> Piece | End:
        if number != self.number:
            names = [f"{number}-{k}" for k in range(3)]
            self.left, self.number = [Piece(n, 2, n in done) for n in names], number
        if not self.left:
            self.number = -1
            return End(1)
        piece = self.left.pop(0)
        self.made += [] if piece.stood else [piece.name]
        return piece


@pytest.fixture
def teamwork(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[list[Piece], int, FakeRay]]:
    """Five units done by a team, whose actors are lost as it says."""
    monkeypatch.setattr(engine, "Worker", Counting)
    monkeypatch.setattr(engine, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(Counting, "made", [])

    def work(
        lost: Callable[[int, str], bool], machines: Sequence[int] = (1, 2), **settings: Any
    ) -> tuple[list[Piece], int, FakeRay]:
        ray = FakeRay(list(machines), lost)
        setup: Any = SimpleNamespace(options=OPTIONS)
        team = engine._Team(ray, setup, ClusterOptions(**settings), frozenset())
        seen: list[int] = []
        units = [Unit((Unread(f"{n}", f"/{n}", "image"),)) for n in range(5)]
        pieces, skipped = team.run(iter(units), seen.append)
        assert seen[-1] == 30
        return pieces, skipped, ray

    return work


WHOLE = [Piece(f"{n}-{k}", 2, False) for n in range(5) for k in range(3)]


def test_a_team_gives_the_shards_in_the_order_of_the_units(teamwork: Any) -> None:
    pieces, skipped, ray = teamwork(lambda number, name: False)
    assert (pieces, skipped) == (WHOLE, 5)
    assert len(ray.actors) == 3
    assert set(ray.killed) == {0, 1, 2}  # at the end
    assert len(teamwork(lambda number, name: False, actors=2)[2].actors) == 2


@pytest.mark.parametrize("seed", range(8))
def test_units_of_lost_workers_are_done_once_by_others(teamwork: Any, seed: int) -> None:
    chance = random.Random(seed)
    gone: list[str] = []

    def lost(number: int, name: str) -> bool:
        if len(gone) < 4 and chance.random() < 0.3 and gone[-2:] != [name] * 2:
            gone.append(name)
            return True
        return False

    pieces, skipped, ray = teamwork(lost)
    assert gone
    assert (pieces, skipped) == (WHOLE, 5)
    assert sorted(Counting.made) == sorted(p.name for p in WHOLE)  # what stood was not made again
    assert len(ray.actors) > 3 or set(gone) == {"piece"}


def test_workers_that_end_again_and_again_end_the_scan(teamwork: Any) -> None:
    with pytest.raises(HysafeError, match=r"3 workers ended while they started.*gone"):
        teamwork(lambda number, name: name == "ready")
    calls = iter([False] * 8)
    with pytest.raises(HysafeError, match=r"3 workers ended over the same unit \(2\)"):
        teamwork(lambda number, name: name == "piece" and next(calls, True), machines=[1])


def test_shards_that_only_one_process_sees_are_refused() -> None:
    with pytest.raises(ConfigError, match="no other process sees it"):
        Shards("memory://bucket")
    with pytest.raises(InputError, match="are read and written"):
        Shards("ftp://host/folder").make()


# ---------------------------------------------------------------- a cluster


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """Address of a store on this machine; "" where moto is not installed."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None:
        yield ""
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: SafetyModel, s3_server: str
) -> Iterator[Any]:
    """Two machines with a CPU each, and this process connected."""
    tiny_model.place(tiny_model.view())
    cache = tmp_path_factory.mktemp("home")  # where workers find the nodes encoded
    (cache / "hysafe").symlink_to(str(tiny_model._cache))
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "XDG_CACHE_HOME": str(cache),
            "AWS_ENDPOINT_URL": s3_server,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(key, value)
        import ray
        from ray.cluster_utils import Cluster

        machine = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
        machines = Cluster(initialize_head=True, head_node_args=machine)
        machines.second = machines.add_node(wait=False, **machine)
        ray.init(address=machines.address, log_to_driver=False)
        machines.wait_for_nodes(timeout=240)
        yield machines
        ray.shutdown()
        machines.shutdown()


def run(source: Any, out: Path, model: SafetyModel, **options: Any) -> Any:
    settings = {"options": OPTIONS, "report": False, **options}
    place = settings.pop("cluster", ClusterOptions(timeout=240))
    return ray_scan([str(source)], out, model, place, **settings)


def test_workers_encode_in_float32(
    source: Path, tmp_path: Path, tiny_model: SafetyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model, "bf16", True)
    with pytest.raises(ConfigError, match="float32"):
        run(source, tmp_path / "out", tiny_model)


@needs_ray
@pytest.mark.timeout(900)
def test_a_scan_on_a_cluster_is_that_of_this_machine(
    cluster: Any, source: Path, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    out, seen = tmp_path / "out", []
    options = ScanOptions(batch=4, workers=0)
    done = run(source, out, tiny_model, options=options, report=True, progress=seen.append)
    assert (done.items, done.known, done.skipped) == (ITEMS, 0, 1)
    assert done.errors == {"InputError": 1}
    assert seen[-1] == ITEMS
    assert_as_local(source, out, tiny_model, tmp_path)
    assert "line number 3" in (out / "report.html").read_text()
    assert not list((out / "shards").glob(".*"))


@needs_ray
@pytest.mark.timeout(900)
def test_a_machine_is_lost_while_it_works(
    cluster: Any, source: Path, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    for n in range(200):
        (source / f"more-{n:03d}.png").write_bytes(png(2000 + n))
    lost: list[int] = []
    team: list[Any] = []
    real = engine._Team.__init__

    def watched(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        team.append(self)

    def progress(done: int) -> None:
        if len(team[0]._busy) == 2 and not lost:  # both have a unit
            lost.append(done)
            cluster.remove_node(cluster.second, allow_graceful=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Team, "__init__", watched)
        done = run(source, tmp_path / "out", tiny_model, progress=progress)
    cluster.second = cluster.add_node(wait=False, num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes(timeout=240)
    assert lost
    assert lost[0] < done.items
    assert (done.items, done.known) == (ITEMS + 200, 0)
    assert_as_local(source, tmp_path / "out", tiny_model, tmp_path)


@needs_ray
@pytest.mark.timeout(900)
def test_a_killed_driver_goes_on_from_the_shards(
    cluster: Any, source: Path, tmp_path: Path, tiny_model: SafetyModel, tiny_folder: Path
) -> None:
    out = tmp_path / "out"
    code = (
        "import sys; from hysafe.app import ray_scan; ray_scan.UNIT_FILES = 4\n"
        "from hysafe.app.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["scan", source, "--out", out, "--engine", "ray", "--address", cluster.address]
    words += ["--model", tiny_folder, "--no-ocr", "--no-report", "--workers", "0", "--batch", "4"]
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)], stdout=log, stderr=log
        )
    end = time.monotonic() + 240
    while not (out / "shards").is_dir() or len(list((out / "shards").glob("[!.]*"))) < 2:
        assert driver.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (out / "results.jsonl").exists()
    done = run(source, out, tiny_model, cluster=ClusterOptions(actors=1, timeout=240))
    assert done.items == ITEMS
    assert done.known > 0
    assert_as_local(source, out, tiny_model, tmp_path)
    version = Collection.open(out).version
    again = run(source, out, tiny_model, cluster=ClusterOptions(actors=1, timeout=240))
    assert (again.items, again.known, again.errors) == (ITEMS, ITEMS, {"InputError": 1})
    assert Collection.open(out).version == version


@needs_ray
@pytest.mark.timeout(900)
def test_a_store_is_read_and_written(
    cluster: Any, s3_server: str, source: Path, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    if not s3_server:
        pytest.skip("moto and s3fs are absent")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.mkdir("hysafe-ray")
    store.put(str(source / "0"), "hysafe-ray/in", recursive=True)
    place = ClusterOptions(shards="s3://hysafe-ray/shards", actors=1, timeout=240)
    done = run("s3://hysafe-ray/in", tmp_path / "out", tiny_model, cluster=place)
    files = sorted(p.name for p in (source / "0").iterdir())
    assert [x["id"] for x in lines_of(tmp_path / "out")] == [f"in/{name}" for name in files]
    assert lines_of(tmp_path / "out")[0]["source"].startswith("s3://hysafe-ray/in/")
    assert (done.items, done.known) == (len(files), 0)
    assert Shards(place.shards).names()
    assert not (tmp_path / "out" / "shards").exists()
    again = run("s3://hysafe-ray/in", tmp_path / "out", tiny_model, cluster=place)
    assert (again.items, again.known) == (len(files), len(files))


@needs_ray
@pytest.mark.timeout(900)
def test_a_cluster_that_cannot_do_it_says_so(
    cluster: Any, source: Path, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    import ray

    class Idle:  # sent as it is: workers cannot import a test
        def there(self) -> bool:
            return True

    with pytest.raises(ConfigError, match="have 1, 1 CPUs: room for 0"):
        run(source, tmp_path / "out", tiny_model, options=ScanOptions(workers=1))
    taken = [ray.remote(Idle).options(num_cpus=1).remote() for _ in range(2)]
    ray.get([actor.there.remote() for actor in taken])
    start = time.monotonic()
    with pytest.raises(HysafeError, match="no worker of 1 CPUs became ready. 0 of 2 CPUs are free"):
        run(source, tmp_path / "out", tiny_model, cluster=ClusterOptions(timeout=1))
    assert time.monotonic() - start < 60
    for actor in taken:
        ray.kill(actor)
