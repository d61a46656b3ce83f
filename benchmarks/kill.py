"""A scan that is killed at random moments, or finds its disk full, and goes on.

``python benchmarks/kill.py --items 2000 --kills 30`` scans small JPEGs made on the fly, sends the scan
SIGKILL at random moments, starts it again, and compares what it ends with to an uninterrupted scan.
``--disk FOLDER`` does the same with a full disk: FOLDER is an empty one on a small file system (say,
``mount -t tmpfs -o size=8m tmpfs FOLDER``). Exit code 1 where an item is missing or double, a line
differs, or more than one batch is encoded again after a kill. Needs a system with fork.
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hysafe.app import scan as scanning
from hysafe.app.output import Output
from hysafe.app.pipeline import SafetyModel, ScanOptions, load
from hysafe.errors import CollectionError

ENCODED, STOOD = 0, 1  # slots of the memory that a scan shares with the one that kills it
SIDE = 48
# A scan is killed after this part of an uninterrupted one's time at the latest.
LONGEST_RUN = 8


@dataclass
class Tally:
    """What the kills did.

    Attributes:
        kills: scans killed. inside: of these, after they had begun to encode. whole: scans that came to their end. encoded: items, over all scans.
        redone: items encoded again after each kill. faults: what should not be.
    """

    kills: int = 0
    inside: int = 0
    whole: int = 0
    encoded: int = 0
    redone: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--commit", type=int, default=64, help="items that are written at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=Path, metavar="FOLDER", help="on a small file system")
    a = parser.parse_args()
    for name, value in (("RUST_LOG", "error"), ("PYTHONWARNINGS", "ignore")):
        os.environ.setdefault(name, value)  # what a killed scan leaves to its helpers is no news
    torch.set_num_threads(1)  # a process with threads of its own is not to be forked
    model = load(a.model)
    model.place(model.view())
    options = ScanOptions(a.batch, a.workers, commit=a.commit)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "in", a.items, a.seed)
        start = time.monotonic()
        run_to_end(folder / "in", folder / "whole", model, options)
        seconds = time.monotonic() - start
        print(f"{a.items} items, uninterrupted: {seconds:.1f} s")
        wanted = folder / "whole"
        if a.disk is not None:
            tally = fill_disk(folder / "in", a.disk, wanted, model, options)
        else:
            tally = kill_at_random(
                folder / "in", folder / "out", wanted, model, options,
                kills=a.kills, seconds=seconds, seed=a.seed,
            )  # fmt: skip
    show(tally, a.items, -(-a.commit // a.batch) * a.batch)
    return 1 if tally.faults else 0


def show(tally: Tally, items: int, batch: int) -> None:
    """Print the counts."""
    if tally.redone and max(tally.redone) > batch:
        tally.faults.append(f"{max(tally.redone)} items done again after one kill")
    print(f"scans killed {tally.kills} ({tally.inside} while encoding), scans ended {tally.whole}")
    print(
        f"encoded {tally.encoded}, of these again {sum(tally.redone)}; "
        f"at most {max(tally.redone, default=0)} after one kill (a batch has {batch})"
    )
    print("\n".join(tally.faults) or f"each of {items} items once, results as uninterrupted")


def kill_at_random(
    source: Path, out: Path, wanted: Path, model: SafetyModel, options: ScanOptions, *,
    kills: int, seconds: float, seed: int,
) -> Tally:  # fmt: skip
    """Kill scans into `out` until `kills` were killed; one that ends is checked, and begun anew."""
    moments, tally = random.Random(seed), Tally()
    shared = mmap.mmap(-1, 16)
    stood = 0
    since = 0  # items encoded since then
    while True:
        write_slot(shared, ENCODED, 0)
        write_slot(shared, STOOD, -1)
        child = fork_scan(source, out, model, options, shared)
        if tally.kills < kills:
            # every other one while it encodes, the rest also while it starts
            patience = moments.uniform(0.0, max(0.2, seconds / LONGEST_RUN))
            status = wait(child, patience, shared if tally.kills % 2 else None)
        else:
            status = os.waitpid(child, 0)[1]
        if status is None:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        encoded, found = read_slot(shared, ENCODED), read_slot(shared, STOOD)
        tally.encoded += encoded
        if found >= 0:  # it came as far as to know what stands
            if since:
                tally.redone.append(since - (found - stood))
            stood, since = found, encoded
        if os.WIFSIGNALED(status):
            tally.kills += 1
            tally.inside += encoded > 0
            continue
        if status:
            tally.faults.append(f"a scan failed: status {status}")
            return tally
        tally.whole += 1
        tally.faults += check(out, wanted)
        if tally.kills >= kills:
            return tally
        shutil.rmtree(out)
        stood = since = 0


def fill_disk(
    source: Path, disk: Path, wanted: Path, model: SafetyModel, options: ScanOptions
) -> Tally:
    """Scan into a disk that is nearly full, make room, and scan again."""
    tally, shared = Tally(), mmap.mmap(-1, 16)
    out, ballast = disk / "out", disk / "ballast"
    need = sum(f.stat().st_size for f in wanted.rglob("*") if f.is_file())
    free = shutil.disk_usage(disk).free
    if free < need * 3 // 2:
        raise SystemExit(f"{disk}: {free:,} bytes free, wanted {need * 3 // 2:,}.")
    ballast.write_bytes(bytes(free - need // 2))
    stood = 0
    for room in (False, True):
        if room:
            ballast.unlink()
        write_slot(shared, ENCODED, 0)
        child = fork_scan(source, out, model, options, shared)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        encoded = read_slot(shared, ENCODED)
        tally.encoded += encoded
        if room:
            tally.redone.append(stood - read_slot(shared, STOOD))
        else:
            stood = encoded
        print(f"{'with room' if room else 'disk full'}: exit {status}, encoded {encoded}")
        if status != (0 if room else 1):
            tally.faults.append(f"exit code {status}")
    tally.whole = 1
    tally.faults += check(out, wanted)
    return tally


def run_to_end(source: Path, out: Path, model: SafetyModel, options: ScanOptions) -> None:
    child = fork_scan(source, out, model, options, mmap.mmap(-1, 16))
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the uninterrupted scan failed")


def fork_scan(
    source: Path, out: Path, model: SafetyModel, options: ScanOptions, shared: mmap.mmap
) -> int:
    """Scan in a process of its own; it counts in `shared` what it encodes, and what stood."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        encode, cut = SafetyModel._encode, Output.cut

        def counting(self: SafetyModel, batch: Any) -> Any:
            new = sum(s.known is None for s in batch.seen)
            write_slot(shared, ENCODED, read_slot(shared, ENCODED) + new)
            return encode(self, batch)

        def noting(self: Output) -> None:
            write_slot(shared, STOOD, self.rows)
            cut(self)

        SafetyModel._encode, Output.cut = counting, noting  # type: ignore[method-assign]
        scanning.scan([str(source)], out, model, options=options, report=False)
        code = 0
    except CollectionError as error:
        print(f"hysafe: {error}", flush=True)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = 3
    finally:
        os._exit(code)


def check(out: Path, wanted: Path) -> list[str]:
    """What is wrong with a scan's outputs; looked at in a process that is not forked again."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            from hysafe.index import Collection

            ids = Collection.open(out).to_arrow(["id"])["id"].to_pylist()
            lines = (out / "results.jsonl").read_bytes()
            same = lines == (wanted / "results.jsonl").read_bytes()
            names = [json.loads(line)["id"] for line in (wanted / "results.jsonl").open("rb")]
            faults = [] if same else ["results.jsonl differs from the uninterrupted scan's"]
            if ids != names:
                double, missing = len(ids) - len(set(ids)), len(set(names) - set(ids))
                faults.append(f"table: {double} items double, {missing} missing, or out of order")
            os.write(writer, json.dumps(faults).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        data = stream.read()
    os.waitpid(child, 0)
    return list(json.loads(data)) if data else ["the outputs cannot be read"]


def wait(child: int, seconds: float, shared: mmap.mmap | None) -> int | None:
    """Status of a process that ends by itself within some seconds; None for one that does not.

    Args:
        shared: the seconds count from its first batch on.
    """
    deadline = time.monotonic() + seconds if shared is None else float("inf")
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if shared is not None and read_slot(shared, ENCODED):
            deadline, shared = time.monotonic() + seconds, None
        time.sleep(0.002)
    return None


def write_slot(shared: mmap.mmap, slot: int, value: int) -> None:
    struct.pack_into("q", shared, 8 * slot, value)


def read_slot(shared: mmap.mmap, slot: int) -> int:
    return int(struct.unpack_from("q", shared, 8 * slot)[0])


def write_pictures(folder: Path, count: int, seed: int) -> None:
    folder.mkdir()
    random_values = np.random.default_rng(seed)
    for n in range(count):
        values = random_values.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(values).resize((SIDE, SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        (folder / f"{n:06d}.jpg").write_bytes(buffer.getvalue())


if __name__ == "__main__":
    raise SystemExit(main())
