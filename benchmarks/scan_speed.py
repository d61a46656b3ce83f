"""Scans against decoding alone, encoding alone, the plain loop and the bare text tower, in one run.

``python benchmarks/scan_speed.py --side 1000 --items 2000`` scans JPEGs of one megapixel and prints
milliseconds a picture, on the clock and of processor time, and the ratio of the scan to the slower of
its two halves, each with what it has in the scan: decoding has the scan's decode processes (with the
same reading, hashing and handing over), encoding the cores that they leave. It also prints the loop
of open_clip's documentation on the same encoder: open, preprocess, stack, encode, one after another.
``--kind text`` scans lines against the bare tower in buckets of like length; ``--memory 5000 20000``
prints the peak memory of scans of so many items. All contestants take turns; the best turn counts.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

# Decode processes import this file anew, so it stays as light as the command: no torch up here.

LINES_FROM = ("davidson", "clinc150", "banking77", "olid", "edos")
LOOP_ITEMS = 512  # of the slow loop
BUCKET = 32  # lines that the bare tower sees at once: the fastest of 16, 32, 64 and 128 here
WATCH_SECONDS = 0.05
CHANGES = 800  # items that are judged in float32, too
DISTINCT = 1000  # pictures that are made; more of them differ in what is not decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--kind", choices=("pictures", "text"), default="pictures")
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--side", type=int, default=0, help="enlarge the pictures to this side")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--memory", type=int, nargs="+", metavar="N", help="peak memory instead")
    parser.add_argument("--bf16", action="store_true", help="scan in bfloat16, and say what it changes")
    parser.add_argument("--report", action="store_true", help="with report.html")
    parser.add_argument("--watched", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.watched is not None:
        print(json.dumps(watched_scan(a)))
        return
    from hysafe.data.sources import data_root

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / ("in" if a.kind == "pictures" else "in.txt")
        if a.memory:
            for count in a.memory:
                write_items(source, data_root(a.data), count, a)
                show_memory(count, source, sys.argv[1:])
            return
        write_items(source, data_root(a.data), a.items, a)
        contest = pictures if a.kind == "pictures" else text
        contest(a, folder, source)


# ---------------------------------------------------------------- pictures


def pictures(a: argparse.Namespace, folder: Path, source: Path) -> None:
    """The contest of pictures."""
    import numpy as np
    import torch

    from hysafe.app.pipeline import load
    from hysafe.data.decoding import DecodePool
    from hysafe.data.inputs import iter_items

    model = load(a.model, bf16=a.bf16)
    model.place(model.view())
    size, cores = model.encoder.image_size, torch.get_num_threads()
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 255, (a.batch, 3, size, size), dtype=np.uint8)
    )

    def decode() -> None:
        with DecodePool(size, workers=a.workers) as pool:
            for _ in pool.decode(iter_items([str(source)])):
                pass

    def encode(threads: int) -> None:
        torch.set_num_threads(threads)
        for _ in range(0, a.items, a.batch):
            model._encode_pixels(pixels, bf16=a.bf16)
        torch.set_num_threads(cores)

    left = max(1, cores - a.workers)
    best = turns(
        a.repeats,
        {
            "decoding": (a.items, decode),
            "encoding": (a.items, lambda: encode(left)),
            "encoding, all cores": (a.items, lambda: encode(cores)),
            "scan": (a.items, lambda: scan_once(a, model, source, folder)),
            "open_clip loop": (min(a.items, LOOP_ITEMS), plain_loop(a, model, source)),
        },
    )
    show(best)
    scan, loop = best["scan"], best["open_clip loop"]
    slower = max(best["decoding"].wall, best["encoding"].wall)
    both = max(best["decoding"].wall, best["encoding, all cores"].wall)
    print(f"slower half / scan: {slower / scan.wall:.2f}")
    print(f"slower half / scan, where encoding has all cores: {both / scan.wall:.2f}")
    print(f"open_clip loop / scan: {loop.wall / scan.wall:.1f}")
    halves = max(best["decoding"].others / max(1, a.workers), best["encoding"].own / left)
    print(f"in processor time, {cores} cores: {halves / (scan.total / cores):.2f}, loop "
          f"{loop.total / (scan.total / cores):.1f}")  # fmt: skip
    if a.bf16:
        some = sorted(source.iterdir())[:CHANGES]
        show_changes(model.moderate(images=some), load(a.model).moderate(images=some))


def plain_loop(a: argparse.Namespace, model: Any, source: Path) -> Callable[[], None]:
    """The loop of open_clip's documentation, on batches."""
    import open_clip
    import torch

    towers = model.encoder.towers
    preprocess = open_clip.image_transform(
        towers.image_size,
        is_train=False,
        mean=tuple(towers.mean.flatten().tolist()),
        std=tuple(towers.std.flatten().tolist()),
    )
    files = sorted(source.iterdir())[:LOOP_ITEMS]

    def run() -> None:
        half = torch.autocast("cpu", torch.bfloat16, enabled=a.bf16)
        with torch.no_grad(), half:
            for start in range(0, len(files), a.batch):
                images = [preprocess(Image.open(f)) for f in files[start : start + a.batch]]
                features = towers.model.encode_image(torch.stack(images))
                features /= features.norm(dim=-1, keepdim=True)

    return run


# ---------------------------------------------------------------- text


def text(a: argparse.Namespace, folder: Path, source: Path) -> None:
    """The contest of lines."""
    import torch

    from hysafe.app.pipeline import load

    model = load(a.model, bf16=a.bf16)
    model.place(model.view())
    towers, cores = model.encoder.towers, torch.get_num_threads()
    lines = source.read_text("utf-8").splitlines()
    limit = towers.context_length
    lengths = [min(n, limit) for n in towers.token_counts(lines)]
    order = sorted(range(len(lines)), key=lengths.__getitem__)

    def bare(dtype: torch.dtype) -> None:
        half = dtype is not torch.float32
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=half):
            for start in range(0, len(order), BUCKET):
                chosen = [lines[i] for i in order[start : start + BUCKET]]
                towers.encode_text(towers.tokenize(chosen))

    best = turns(
        a.repeats,
        {
            "bare tower, bf16": (a.items, lambda: bare(torch.bfloat16)),
            **({} if a.bf16 else {"bare tower, float32": (a.items, lambda: bare(torch.float32))}),
            "scan": (a.items, lambda: scan_once(a, model, source, folder)),
        },
    )
    show(best)
    scan = best["scan"]
    print(f"{a.items} lines of {sum(lengths) / len(lengths):.1f} tokens, {cores} cores")
    for name in (n for n in best if n != "scan"):
        print(
            f"{name} / scan: {best[name].wall / scan.wall:.2f}, in processor time "
            f"{best[name].total / scan.total:.2f}"
        )
    if a.bf16:
        some = lines[:CHANGES]
        show_changes(model.moderate(texts=some), load(a.model).moderate(texts=some))


def show_changes(found: Sequence[Any], exact: Sequence[Any]) -> None:
    """What bfloat16 does to the verdicts."""
    moved = [abs((x.p_unsafe or 0.0) - (y.p_unsafe or 0.0)) for x, y in zip(found, exact, strict=True)]
    other = sum(x.rating != y.rating for x, y in zip(found, exact, strict=True))
    print(
        f"bfloat16 changed {other} of {len(exact)} ratings; p_unsafe by {sum(moved) / len(moved):.4f} "
        f"on average, {max(moved):.3f} at most"
    )


# ---------------------------------------------------------------- memory


def show_memory(count: int, source: Path, arguments: list[str]) -> None:
    """Run a scan in a process of its own, and print its peak."""
    command = [sys.executable, __file__, *arguments, "--watched", str(source)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seen = json.loads(told.splitlines()[-1])
    print(
        f"{count:>8,} items: model {seen['model']:,.0f} MB; scan, above it {seen['own']:,.0f} MB, "
        f"decode processes {seen['others']:,.0f} MB, all at once {seen['all']:,.0f} MB",
        flush=True,
    )


def watched_scan(a: argparse.Namespace) -> dict[str, float]:
    """Peaks of the memory of a scan, in MB: of this process above the loaded model, of its
    decode processes, and of both together."""
    from hysafe.app.pipeline import load

    model = load(a.model, bf16=a.bf16)
    model.place(model.view())
    list(model.judge([]))
    model.moderate(texts=["a line"])  # what the first text loads belongs to the model
    before = resident(os.getpid())
    peak = {"model": before, "own": 0.0, "others": 0.0, "all": 0.0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            own = resident(os.getpid()) - before
            others = sum(resident(pid) for pid in children(os.getpid()))
            for name, value in (("own", own), ("others", others), ("all", own + others)):
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as out:
        scan_once(a, model, a.watched, Path(out))
    ended.set()
    watcher.join()
    return peak


def resident(pid: int) -> float:
    """Resident memory of a process in MB; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    except OSError:
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += [int(p) for p in (task / "children").read_text().split()]
        except OSError:  # the thread has ended
            continue
    return found


# ---------------------------------------------------------------- common


class Turn:
    """Milliseconds an item: on the clock, of this process, and of the processes it started."""

    def __init__(self, items: int, run: Callable[[], None]) -> None:
        start, began = os.times(), time.perf_counter()
        run()
        wall, end = time.perf_counter() - began, os.times()
        ms = 1000 / items
        self.wall = wall * ms
        self.own = (end.user + end.system - start.user - start.system) * ms
        self.others = (
            end.children_user + end.children_system - start.children_user - start.children_system
        ) * ms

    @property
    def total(self) -> float:
        """Of processor time."""
        return self.own + self.others


class Best:
    """The best of some turns, each number for itself."""

    def __init__(self, turns: list[Turn]) -> None:
        self.wall = min(t.wall for t in turns)
        best = min(turns, key=lambda t: t.total)
        self.own, self.others, self.total = best.own, best.others, best.total


def turns(repeats: int, runs: dict[str, tuple[int, Callable[[], None]]]) -> dict[str, Best]:
    """Let all contestants run in turn."""
    seen: dict[str, list[Turn]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (items, run) in runs.items():
            seen[name].append(Turn(items, run))
    return {name: Best(list_) for name, list_ in seen.items()}


def show(best: dict[str, Best]) -> None:
    print(f"{'ms an item':<22}{'clock':>8}{'processor':>11}{'of it in decode processes':>27}")
    for name, turn in best.items():
        print(f"{name:<22}{turn.wall:8.2f}{turn.total:11.2f}{turn.others:27.2f}")


def scan_once(a: argparse.Namespace, model: Any, source: Path, folder: Path) -> None:
    from hysafe.app.pipeline import ScanOptions
    from hysafe.app.scan import scan

    options = ScanOptions(a.batch, a.workers)
    scan([str(source)], folder / "out", model, options=options, report=a.report, fresh=True)


def write_items(target: Path, data: Path, count: int, a: argparse.Namespace) -> None:
    if a.kind == "text":
        target.write_text("".join(f"{line}\n" for line in islice(lines_of(data), count)), "utf-8")
    else:
        write_pictures(target, data, count, a.side)


def lines_of(data: Path) -> Iterator[str]:
    """Lines of the text sets, each once, in turn."""
    sets = []
    for name in LINES_FROM:
        rows = (data / "text" / f"{name}.jsonl").read_text("utf-8").splitlines()
        sets.append(iter([" ".join(str(json.loads(row)["text"]).split()) for row in rows]))
    seen: set[str] = set()
    while sets:
        for rows in list(sets):
            line = next(rows, None)
            if line is None:
                sets.remove(rows)
            elif line and line not in seen:
                seen.add(line)
                yield line


def write_pictures(folder: Path, data: Path, count: int, side: int) -> None:
    """JPEGs, each of other content: the small pictures as they are, or enlarged."""
    from hysafe.data.sources import image_bytes, load_rows

    folder.mkdir(exist_ok=True)
    rows = load_rows(str(data / "images" / "tiny_imagenet" / "val.parquet"))
    small = [image_bytes(row["image"]) or b"" for row in islice(rows, min(count, DISTINCT))]
    for i in range(count):
        path = folder / f"{i:06d}.jpg"
        if path.exists():
            continue
        if i >= len(small):  # what follows the end of a JPEG makes other content, decoded alike
            first = folder / f"{i % len(small):06d}.jpg"
            path.write_bytes(first.read_bytes() + b"%d" % i)
        elif side:
            path.write_bytes(enlarged(small[i], side))
        else:
            path.write_bytes(small[i])


def enlarged(content: bytes, side: int) -> bytes:
    picture = Image.open(io.BytesIO(content)).convert("RGB").resize((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
