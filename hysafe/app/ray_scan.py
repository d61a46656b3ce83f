"""A scan by the machines of a Ray cluster: the one file that imports ray.

The driver lists the inputs and hands them out in units. Actors, which load the model once, read,
decode and judge a unit as a local scan does, and write its rows as Parquet shards into a folder that
all machines see (:mod:`hysafe.app.shards`). The driver puts the shards into the collection in the
order of the inputs, as one version of the table. Rows never travel through ray: what a machine
holds when it is lost is at most the shard that it was making, and that is made elsewhere.

Actors and not Ray Data: a shard that stands is found by reading its items, before anything is
decoded; order and "each item once" follow from the list of units; and an actor reads for
itself, so no CPU has to be kept for reading.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import socket
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from hysafe import __version__
from hysafe.app.known import groups
from hysafe.app.lock import lock
from hysafe.app.output import NEXT, NEXT_RESULTS, RESULTS, State, writing
from hysafe.app.pipeline import SafetyModel, ScanOptions, load
from hysafe.app.scan import (
    REPORT,
    ScanSummary,
    Shown,
    collection_meta,
    name_results,
    report_scan,
    result_of_line,
)
from hysafe.app.shards import LINE, Shards, shard_name, shard_table
from hysafe.app.stored import read_media
from hysafe.data.remote import local_folder, make_out
from hysafe.data.units import UNIT_FILES, Lister, Unit, UnitReader
from hysafe.encoder.pretrained import resolve_folder
from hysafe.errors import (
    CollectionError,
    ConfigError,
    HysafeError,
    InputError,
    MissingExtraError,
)
from hysafe.index import Collection, CollectionMeta, CollectionWriter, EncodedItem
from hysafe.index.collection import drop_table, sync_table
from hysafe.taxonomy import Policy, PolicyView
from hysafe.types import Item

__all__ = ["SHARDS", "ClusterOptions", "check_ray", "ray_scan"]

# Folder of the shards in the output folder, where no other is named.
SHARDS = "shards"
# Seconds without a finished shard after which a scan gives up; one whose pictures are all read by
# OCR takes some minutes.
TIMEOUT = 1800.0
# The driver looks for free CPUs, and at its clock, this often, in seconds.
LOOK_SECONDS = 2.0
# Workers that may end over one unit, or one after the other before any is ready.
MOST_LOST = 3
# Shared memory of a cluster of our own: only names of shards go through it. The least that ray takes.
OBJECT_BYTES = 100 << 20
# Items whose pictures are read again at once for the report.
MEDIA = 500
# Ray gives a machine half a minute to start, which a busy one needs now and then.
STARTS = 3
# What an actor's process runs.
RAY_MAIN = "default_worker.py"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClusterOptions:
    """Where a scan runs; none of it changes a result.

    Args:
        address: of a running cluster, ``HOST:6379`` or ``auto``; None starts one on this machine.
        shards: folder or address of the shards, seen by all machines; None: ``OUT/shards``.
        actors: how many; None: as many as there are CPUs for.
        timeout: seconds without a finished shard after which the scan gives up.
    """

    address: str | None = None
    shards: str | None = None
    actors: int | None = None
    timeout: float = TIMEOUT


def check_ray() -> None:
    """See that ray is installed.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("--engine ray: ray is not installed. pip install 'hysafe[ray]'")


def ray_scan(
    paths: Sequence[str],
    out: Path,
    model: SafetyModel,
    cluster: ClusterOptions | None = None,
    *,
    policy: Policy | None = None,
    ocr: Any | None = None,
    options: ScanOptions | None = None,
    report: bool = True,
    title: str = "",
    text_column: str | None = None,
    image_column: str | None = None,
    fresh: bool = False,
    retry: bool = False,
    progress: Callable[[int], None] | None = None,
    guard: str | None = None,
) -> ScanSummary:
    """Judge everything under `paths` on a cluster; afterwards `out` holds what a local scan leaves.

    A scan that ended early goes on from the shards that stand: their items are read again, to know
    them by their content, and not encoded again.

    Args:
        paths: as of :func:`hysafe.app.scan.scan`, without ``-``; local ones are seen by all machines
            by the same absolute path.
        out: on this machine.
        model: needs no towers here; the machines load it by its name.
        cluster: where; by default on this machine.
        ocr: a :class:`hysafe.data.ocr.Ocr`, or None; each machine has its own.
        options: of each actor; it takes one CPU, and one for each of its decode processes.
        policy, report, title, text_column, image_column, fresh, retry, progress, guard: as of
            :func:`hysafe.app.scan.scan`.

    Raises:
        MissingExtraError: ray is not installed.
        ConfigError: no cluster answers, it has too few CPUs, or a machine has another version, model
            or taxonomy.
        InputError: a path or the folder of shards is not seen here, or by a machine.
        CollectionError: the disk is full, or a shard is damaged.
        HysafeError: no progress within the timeout, or workers that end again and again.
    """
    if model.bf16:
        raise ConfigError(f"workers encode in float32. Load {model.name} without bf16.")
    check_ray()
    cluster, options = cluster or ClusterOptions(), options or ScanOptions()
    out = local_folder(out, "--out")
    make_out(out)
    shards = Shards(_absolute(cluster.shards or str(out / SHARDS)))
    shards.make()
    view = model.view(policy)
    meta = collection_meta(model, view, reading=model.hash_with(ocr), reads=ocr is not None)
    setup = Setup(
        model=_model_name(model.name), taxonomy=model.taxonomy, policy=policy,
        reads=ocr is not None, meta=meta, shards=shards, options=options,
        inputs=Inputs(
            tuple(map(_absolute, paths)), text_column, image_column,
            (str(out.resolve()), *(() if shards.remote else (shards.place,))),
        ),
    )  # fmt: skip
    units = Lister(**setup.inputs.arguments()).units(UNIT_FILES)
    namer = None
    if guard is not None:
        from hysafe.app.guard_namer import load_guard

        namer = load_guard(guard, model)
    with lock(out):
        with _probe(setup) as probed, _running(cluster) as ray:
            team = _Team(ray, probed, cluster, _standing(shards, fresh=fresh, retry=retry))
            pieces, skipped = team.run(units, progress)
        summary = ScanSummary(out, known=sum(p.rows for p in pieces if p.stood), skipped=skipped)
        picked = _Picked() if report else None
        with writing(out):
            _commit(out, meta, shards, pieces, summary, picked)
        shards.sweep()
        summary.asked, summary.named = name_results(out, model, view, namer)
        with writing(out):
            _report(out, model, view, picked, title)
    return summary


# ---------------------------------------------------------------- what the actors are told


@dataclass(frozen=True)
class Inputs:
    """What is read, and how; see :class:`hysafe.data.inputs.InputReader`."""

    paths: tuple[str, ...]
    text_column: str | None
    image_column: str | None
    exclude: tuple[str, ...]

    def arguments(self) -> dict[str, Any]:
        return vars(self)


@dataclass(frozen=True)
class Setup:
    """All that an actor starts with. It is sent once; there is no code in it.

    Args:
        model: a name that every machine loads. meta: how the driver judges, to be compared.
        probe: name of a file beside the shards, to be seen; "" where there is none.
    """

    model: str
    taxonomy: Any
    policy: Policy | None
    reads: bool
    meta: CollectionMeta
    shards: Shards
    options: ScanOptions
    inputs: Inputs
    probe: str = ""
    version: str = __version__


class Piece(NamedTuple):
    """A shard of a unit; `stood`: it was there before."""

    name: str
    rows: int
    stood: bool


class End(NamedTuple):
    """A unit has no more shards. `skipped`: its files that were neither pictures nor texts."""

    skipped: int


class Worker:
    """What an actor does. Not for use without ray, but it needs none."""

    def __init__(self, setup: Setup, standing: frozenset[str]) -> None:
        self._setup, self._standing = setup, standing
        self._number = -1
        self._pieces: Iterator[Piece] = iter(())

    def ready(self) -> str:
        """Load the model, and see that this machine has what the driver has; its name.

        Raises:
            HysafeError: it has not.
        """
        where = socket.gethostname()
        try:
            self._prepare()
        except HysafeError as error:
            raise type(error)(f"machine {where}: {error}") from error
        return where

    def piece(self, number: int, unit: Unit, done: frozenset[str]) -> Piece | End:
        """The next shard of a unit.

        Args:
            number: of the unit. Another one than before begins a unit, at its first shard.
            done: shards of the unit that a lost worker has made.
        """
        if number != self._number:
            self._number = number
            self._pieces = self._shards_of(unit, self._standing | done)
        piece = next(self._pieces, None)
        if piece is None:
            self._number = -1
            return End(self._reader.skipped)
        return piece

    def _prepare(self) -> None:
        import torch

        setup = self._setup
        if setup.version != __version__:
            raise ConfigError(
                f"hysafe {__version__}, and the driver has {setup.version}. Install the same."
            )
        if setup.probe and not os.path.exists(os.path.join(setup.shards.place, setup.probe)):
            raise InputError(
                f"{setup.shards.place}: not the folder of shards that the driver sees. Name one "
                "that all machines share, or an address: --shards s3://BUCKET/PATH."
            )
        self._reader = UnitReader(**setup.inputs.arguments())
        torch.set_num_threads(1)  # there are as many actors as CPUs allow
        main = sys.modules["__main__"]
        if os.path.basename(getattr(main, "__file__", "")) == RAY_MAIN:
            del main.__file__  # decode processes would import it, and all of ray with it
        self._ocr = None
        if setup.reads:
            from hysafe.data.ocr import Ocr

            self._ocr = Ocr()
        model = load(setup.model)
        if model.taxonomy.hash != setup.taxonomy.hash:
            model = SafetyModel(
                model.encoder,
                setup.taxonomy,
                model.calibration,
                name=model.name,
                cache=None,
                reference=model.reference,
            )
        view = model.view(setup.policy)
        found = (model.hash_with(self._ocr), view.taxonomy.hash, view.policy.hash)
        wanted = (setup.meta.reading, setup.meta.taxonomy, setup.meta.policy)
        for what, here, there in zip(
            ("model or reader of text", "taxonomy", "policy"), found, wanted, strict=True
        ):
            if here != there:
                raise ConfigError(
                    f"another {what} ({here}) than the driver's ({there}). Install the same "
                    "hysafe, extras and models on all machines."
                )
        model.place(view)
        self._model = model

    def _shards_of(self, unit: Unit, standing: frozenset[str]) -> Iterator[Piece]:
        """Shards of a unit, in order; one that stands is not made again."""
        setup = self._setup
        plan: deque[Piece] = deque()

        def wanted() -> Iterator[Item]:
            for group in groups(self._reader.read(unit)):
                name = shard_name(group, setup.meta)
                plan.append(Piece(name, len(group), name in standing))
                if name not in standing:
                    yield from group

        judged = self._model.judge(
            wanted(), policy=setup.policy, ocr=self._ocr, options=setup.options
        )
        for first in judged:
            while plan[0].stood:
                yield plan.popleft()
            piece = plan.popleft()
            rows = [first, *(next(judged) for _ in range(piece.rows - 1))]
            with writing(Path(setup.shards.place)):
                setup.shards.write(piece.name, shard_table(rows, setup.meta))
            yield piece
        yield from plan


# ---------------------------------------------------------------- the cluster


@contextmanager
def _running(cluster: ClusterOptions) -> Iterator[Any]:
    """Ray, connected; where the program had done so before, it is left as it was."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before ray is imported: no reports to anyone
    # by name, for a checker of types would read all of ray
    ray: Any = importlib.import_module("ray")
    if ray.is_initialized():
        yield ray
        return
    verbose = log.isEnabledFor(logging.INFO)
    how: dict[str, Any] = {"log_to_driver": verbose, "configure_logging": verbose}
    if not verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
    if cluster.address is None:
        how |= {"include_dashboard": False, "object_store_memory": OBJECT_BYTES}
        os.environ.setdefault("RAY_worker_niceness", "0")  # of all that runs here, the work itself
    elif "://" in cluster.address:
        raise ConfigError(
            f"--address {cluster.address}: wanted HOST:PORT of the cluster's head, or auto. Run the "
            "scan on a machine of the cluster."
        )
    for left in reversed(range(1 if cluster.address else STARTS)):
        try:
            # an address in the environment is not meant: none was given
            ray.init(address=cluster.address or "local", **how)
            break
        except Exception as error:  # of many types, none of them ours
            ray.shutdown()
            log.info("ray does not start: %s", error)
            if left:
                continue
            detail = " ".join(str(error).split())[:300]
            where = f"--address {cluster.address}" if cluster.address else "--engine ray"
            raise ConfigError(
                f"{where}: no Ray cluster answers ({type(error).__name__}: {detail}). See that it "
                "runs (ray status), with the same versions of Python and ray, and that this user has "
                "its token."
            ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _room(ray: Any, need: int) -> list[int]:
    """Actors of `need` CPUs that each machine could hold if nothing else ran there."""
    alive = [n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]]
    return [int(cpus // need) for cpus in alive]


def _check_room(ray: Any, need: int, actors: int | None) -> None:
    """See that the actors find CPUs, now or when others have ended: else they would wait for ever.

    Raises:
        ConfigError: they never will.
    """
    room = _room(ray, need)
    if sum(room) >= (actors or 1):
        return
    cpus = ", ".join(f"{n['Resources'].get('CPU', 0):g}" for n in ray.nodes() if n["Alive"])
    raise ConfigError(
        f"{actors or 1} workers of {need} CPUs each (one to encode, {need - 1} to decode) are wanted, "
        f"and the cluster's machines have {cpus or 'no'} CPUs: room for {sum(room)}. Add machines, "
        "or lower --actors or --workers (0: no process to decode, and no limits on it)."
    )


@dataclass
class _Task:
    """A unit under way. `pieces`: its shards so far. `lost`: workers that ended over it."""

    number: int
    unit: Unit
    pieces: list[Piece] = field(default_factory=list)
    done: frozenset[str] = frozenset()
    lost: int = 0


class _Team:
    """The actors of a scan, and what each of them does.

    Args:
        ray: connected. standing: shards that need not be made.

    Raises:
        ConfigError: the cluster has too few CPUs.
    """

    def __init__(
        self, ray: Any, setup: Setup, cluster: ClusterOptions, standing: frozenset[str]
    ) -> None:
        self._ray, self._cluster = ray, cluster
        self._need = 1 + setup.options.workers
        _check_room(ray, self._need, cluster.actors)
        # max_restarts and retries stay 0: whom to ask again, and for what, is decided here
        kind = ray.remote(Worker).options(num_cpus=self._need)
        arguments = (ray.put(setup), ray.put(standing))
        self._hire_one: Callable[[], Any] = lambda: kind.remote(*arguments)
        self._starting: dict[Any, Any] = {}  # reference -> actor
        self._busy: dict[Any, tuple[Any, _Task]] = {}
        self._idle: list[Any] = []
        self._failed = 0  # starts, one after the other
        self._looked = 0.0
        self._moved = time.monotonic()
        self._waiting: deque[_Task] = deque()  # units of lost workers
        self._ended: dict[int, list[Piece]] = {}
        self._rows = self._skipped = 0

    def run(
        self, units: Iterator[Unit], progress: Callable[[int], None] | None
    ) -> tuple[list[Piece], int]:
        """The shards of all units, in order, and how many files were skipped."""
        tasks = (_Task(n, unit) for n, unit in enumerate(units))
        coming = next(tasks, None)
        try:
            while coming is not None or self._waiting or self._busy:
                if self._waiting or coming is not None:
                    self._hire()
                while self._idle and (self._waiting or coming is not None):
                    if self._waiting:
                        task = self._waiting.popleft()
                    else:
                        assert coming is not None
                        task, coming = coming, next(tasks, None)
                    self._ask(self._idle.pop(), task)
                self._dismiss(self._idle)  # others may want its CPUs
                self._look()
                if progress:
                    progress(self._rows)
        finally:
            busy = [actor for actor, _ in self._busy.values()]
            self._dismiss([*self._starting.values(), *busy, *self._idle])
        ended = [self._ended[n] for n in range(len(self._ended))]
        return [piece for pieces in ended for piece in pieces], self._skipped

    def _dismiss(self, actors: list[Any]) -> None:
        while actors:
            self._ray.kill(actors.pop())

    def _hire(self) -> None:
        """Start actors where there is room: all at first, later for lost ones and on new machines."""
        now = time.monotonic()
        if self._starting or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        wanted = self._cluster.actors or sum(_room(self._ray, self._need))
        here = len(self._busy) + len(self._idle)
        free = int(self._ray.available_resources().get("CPU", 0) // self._need)
        for _ in range(min(wanted - here, free)):
            actor = self._hire_one()
            self._starting[actor.ready.remote()] = actor

    def _ask(self, actor: Any, task: _Task) -> None:
        reference = actor.piece.remote(task.number, task.unit, task.done)
        self._busy[reference] = (actor, task)

    def _look(self) -> None:
        """Wait a moment for an answer, and act on it.

        Raises:
            HysafeError: as an actor says, or none has come for too long.
        """
        references = [*self._busy, *self._starting]
        if not references:
            time.sleep(LOOK_SECONDS)
            answered = []
        else:
            answered, _ = self._ray.wait(references, num_returns=1, timeout=LOOK_SECONDS)
        for reference in answered:
            self._moved = time.monotonic()
            if reference in self._starting:
                self._started(reference)
            else:
                self._answered(reference)
        if time.monotonic() - self._moved > self._cluster.timeout:
            raise HysafeError(self._stalled())

    def _started(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            where = self._get(reference)
        except _Lost as lost:
            self._ray.kill(actor)  # it may be out of reach only
            self._failed += 1
            log.warning("a worker ended while it started: %s", lost)
            if self._failed >= MOST_LOST:
                raise HysafeError(
                    f"{self._failed} workers ended while they started, the last one so: {lost} "
                    "See that hysafe is installed on all machines and that they have memory for it."
                ) from lost
        else:
            self._failed = 0
            log.info("a worker is ready on %s", where)
            self._idle.append(actor)

    def _answered(self, reference: Any) -> None:
        actor, task = self._busy.pop(reference)
        try:
            answer = self._get(reference)
        except _Lost as lost:
            self._ray.kill(actor)  # it may be out of reach only
            task.lost += 1
            log.warning("a worker is lost, its unit is given to another one: %s", lost)
            if task.lost >= MOST_LOST:
                raise HysafeError(
                    f"{task.lost} workers ended over the same unit ({_names(task.unit)}), the last one "
                    f"so: {lost} Look for what is the matter with its files, or give workers more "
                    "memory; the shards that stand are kept."
                ) from lost
            task.done |= {p.name for p in task.pieces}
            self._rows -= sum(p.rows for p in task.pieces)
            task.pieces = []
            self._waiting.append(task)
            return
        if isinstance(answer, Piece):
            # what a lost worker made is new to the scan all the same
            stood = answer.stood and answer.name not in task.done
            task.pieces.append(answer._replace(stood=stood))
            self._rows += answer.rows
            self._ask(actor, task)
        else:
            self._ended[task.number] = task.pieces
            self._skipped += answer.skipped
            self._idle.append(actor)

    def _get(self, reference: Any) -> Any:
        """An answer.

        Raises:
            _Lost: the actor or its machine is gone.
            HysafeError: as the actor says.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, HysafeError):
                raise type(cause)(str(cause)) from error
            raise HysafeError(
                f"a worker failed ({type(cause).__name__}: {cause}). The shards that stand are kept; "
                "--verbose shows more."
            ) from error
        except errors.RayError as error:
            raise _Lost(" ".join(str(error).split())[:300]) from error

    def _stalled(self) -> str:
        free = self._ray.available_resources().get("CPU", 0)
        total = self._ray.cluster_resources().get("CPU", 0)
        ready = len(self._busy) + len(self._idle)
        if not ready:
            what = f"no worker of {self._need} CPUs became ready"
            remedy = "Wait for other jobs to end, or add machines"
        else:
            units = ", ".join(_names(task.unit) for _, task in list(self._busy.values())[:3])
            what = f"{ready} workers finished no shard; they have {units or 'nothing to do'}"
            remedy = "Look at the machines and the storage, or raise --timeout"
        return (
            f"No progress for {self._cluster.timeout:g} s: {what}. {free:g} of {total:g} CPUs are "
            f"free. {remedy}, and run the same command again: it goes on from the shards that stand."
        )


class _Lost(Exception):
    """An actor, or its machine, is gone."""


def _names(unit: Unit) -> str:
    if unit.root is not None:
        names = [f"{unit.label}{f.key.removeprefix(unit.root.label)}" for f in unit.root.found]
    else:
        names = [item.id for item in unit.files]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


# ---------------------------------------------------------------- before and after


def _absolute(path: str) -> str:
    """A path that is the same on every machine."""
    return path if path == "-" or "://" in path else os.path.join(os.getcwd(), path)


def _model_name(name: str) -> str:
    """A model's name, or its folder as other machines see it."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() and resolve_folder(name) == folder else name


@contextmanager
def _probe(setup: Setup) -> Iterator[Setup]:
    """A file beside the shards, by which a machine knows that it sees the same folder."""
    if setup.shards.remote:
        yield setup
        return
    name = f".probe-{uuid.uuid4().hex}"
    path = Path(setup.shards.place, name)
    try:
        path.touch()
    except OSError as error:
        raise InputError(
            f"{setup.shards.place}: cannot be written ({error.strerror}). Name another folder: "
            "--shards."
        ) from error
    try:
        yield replace(setup, probe=name)
    finally:
        path.unlink(missing_ok=True)


def _standing(shards: Shards, *, fresh: bool, retry: bool) -> frozenset[str]:
    """Shards that need not be made."""
    if fresh:
        return frozenset()
    names = shards.names()
    return names - frozenset(shards.with_errors(sorted(names))) if retry else names


class _Picked:
    """What the report shows, as far as the shards tell; the pictures are read again."""

    def __init__(self) -> None:
        self.shown = Shown()
        self._left = {safe: self.shown.room(safe=safe) for safe in (True, False)}
        self._rows: list[tuple[str, EncodedItem]] = []

    def add(self, table: pa.Table) -> None:
        """Pick items of a shard, while there is room."""
        ratings = table["rating"].to_pylist()
        for k, rating in enumerate(ratings):
            safe = rating == "safe"
            if self._left[safe] == 0:
                continue
            self._left[safe] -= 1
            row = {c: table[c][k].as_py() for c in ("id", "source", "modality", "content_hash")}
            text = table["text"][k].as_py() or table["read_text"][k].as_py()
            self._rows.append((table[LINE][k].as_py(), EncodedItem(**row, points={}, text=text)))

    def read(self) -> Shown:
        """Texts and pictures; those that are local, and as they were."""
        for start in range(0, len(self._rows), MEDIA):
            part = self._rows[start : start + MEDIA]
            media = read_media([item for _, item in part if item.modality != "text"])
            for line, item in part:
                image = media[item.id].image if item.id in media else None
                self.shown.add(result_of_line(json.loads(line)), item.text, image)
        return self.shown


def _commit(
    out: Path,
    meta: CollectionMeta,
    shards: Shards,
    pieces: Sequence[Piece],
    summary: ScanSummary,
    picked: _Picked | None,
) -> None:
    """Write the table, as one version, and its lines from the shards; count them.

    The table takes its place first, then the lines: a driver that ends between the two leaves lines
    that did not, and both are written again. Where both stand already, they stay as they are.

    Raises:
        CollectionError: a shard cannot be read.
    """
    stamp = uuid.uuid5(uuid.NAMESPACE_OID, "\n".join(p.name for p in pieces)).hex
    meta = replace(meta, stamp=stamp)
    part = out / f"{RESULTS}.part"

    def read() -> Iterator[pa.Table]:
        for piece in pieces:
            table = shards.read(piece.name)
            if len(table) != piece.rows:
                raise CollectionError(
                    f"{piece.name}: a shard of {len(table)} rows, wanted {piece.rows}. Remove it and "
                    "run the same command again."
                )
            _count(summary, table)
            if picked is not None:
                picked.add(table)
            yield table

    if not part.exists() and _committed(out, meta, sum(p.rows for p in pieces)):
        for _ in read():
            pass
        return
    with part.open("wb") as stream:

        def batches() -> Iterator[pa.RecordBatch]:
            schema = meta.schema()
            for table in read():
                stream.write("".join(table[LINE].to_pylist()).encode())
                columns = [table[name] for name in schema.names]
                yield from (
                    pa.Table.from_arrays(columns, schema=schema).combine_chunks().to_batches()
                )

        CollectionWriter.write_columns(out, meta, batches())
        stream.flush()
        os.fsync(stream.fileno())
    sync_table(out)
    part.replace(out / RESULTS)
    drop_table(out, NEXT)  # of a local scan that ended early
    (out / NEXT_RESULTS).unlink(missing_ok=True)
    State().save(out)
    Collection.open(out).tidy(replaced=True)


def _committed(out: Path, meta: CollectionMeta, rows: int) -> bool:
    """Whether table and lines of these shards stand already."""
    try:
        stored = Collection.open(out)
    except CollectionError:
        return False
    if stored.meta.stamp != meta.stamp or not stored.meta.same(meta) or len(stored) != rows:
        return False
    try:
        with (out / RESULTS).open("rb") as lines:
            return sum(1 for _ in lines) == rows
    except OSError:
        return False


def _count(summary: ScanSummary, table: pa.Table) -> None:
    """Count the rows of a shard, as :meth:`ScanSummary.count` does."""
    ratings, nodes = table["rating"].to_pylist(), table["node"].to_pylist()
    summary.items += len(ratings)
    summary.ratings.update(ratings)
    summary.errors.update(Counter(e for e in table["error"].to_pylist() if e))
    summary.nodes.update(n for n, r in zip(nodes, ratings, strict=True) if n and r != "safe")


def _report(
    out: Path, model: SafetyModel, view: PolicyView, picked: _Picked | None, title: str
) -> None:
    if picked is None:  # an old one would contradict the results
        (out / REPORT).unlink(missing_ok=True)
    else:
        report_scan(out, model, view, picked.read(), title)
