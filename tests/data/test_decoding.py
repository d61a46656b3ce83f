"""Decoding in worker processes: same pixels, same order, and no picture stops the run."""

from __future__ import annotations

import io
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hysafe.data import decoding
from hysafe.data.decoding import DecodePool, decode_items
from hysafe.data.images import decode, to_pixels
from hysafe.errors import ConfigError, HysafeError
from hysafe.types import ErrorRecord, Item


def jpeg(seed: int, side: int = 24) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "JPEG")
    return out.getvalue()


def image_item(number: int, data: bytes) -> Item:
    return Item(id=f"{number}", source=f"{number}", modality="image", image=data)


def mixed_items() -> list[Item]:
    items = []
    for number in range(40):
        if number % 10 == 3:
            items.append(image_item(number, b"no picture"))
        elif number % 10 == 5:
            items.append(Item(id=f"{number}", source="t", modality="text", text="words"))
        elif number % 10 == 7:
            error = ErrorRecord("FileNotFoundError", "gone")
            items.append(Item(id=f"{number}", source="g", modality="image", error=error))
        elif number % 10 == 9:  # the text is at fault, the picture is not
            error = ErrorRecord("InputError", "the text is too long")
            items.append(Item(f"{number}", "g", "image+text", image=jpeg(number), error=error))
        elif number % 10 == 8:
            items.append(
                Item(f"{number}", "b", "image+text", text="words", image=jpeg(number, side=500))
            )
        else:
            items.append(image_item(number, jpeg(number)))
    return items


class Crash(bytes):
    """Bytes that end the process that unpickles them: no picture of their message has a chance."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (3,)


class Trap(bytes):
    """Bytes that run `code` in the process that looks at them, as a bug in a C decoder would."""

    code: str

    def __reduce__(self) -> tuple[object, tuple[str]]:
        code = f"lambda self: {self.code}"
        return eval, (f"type('Sprung', (bytes,), {{'__len__': {code}}})(b'x')",)


class CrashInTurn(Trap):
    code = "__import__('os')._exit(3)"


HANG_SECONDS = 300


class Hang(Trap):
    code = f"__import__('time').sleep({HANG_SECONDS})"


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` gives; red where it hangs."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "it raised or hangs"
    return results[0]


def errors(decoded: list[tuple[Item, Any]]) -> dict[int, str]:
    assert all((pixels is None) == (item.error is not None) for item, pixels in decoded)
    return {int(item.id): item.error.type for item, _ in decoded if item.error is not None}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("chunk", [1, 7])
def test_every_item_comes_back_in_order(workers: int, chunk: int) -> None:
    items = mixed_items()
    decoded = list(decode_items(items, 16, workers=workers, chunk=chunk))
    assert [item.id for item, _ in decoded] == [item.id for item in items]
    for before, (after, pixels) in zip(items, decoded, strict=True):
        number = int(before.id) % 10
        if number == 3:
            assert after.error is not None
            assert "no picture" in after.error.message
            assert pixels is None
        elif number in (5, 7, 9):
            assert after is before
            assert pixels is None
        else:
            assert after is before
            assert before.image is not None
            assert pixels is not None
            wanted = to_pixels(decode(before.image, size=16), 16)
            np.testing.assert_array_equal(pixels, wanted)


def test_the_pixel_limit_reaches_the_workers() -> None:
    ((item, pixels),) = decode_items([image_item(0, jpeg(0))], 8, workers=1, max_pixels=100)
    assert pixels is None
    assert item.error is not None
    assert "more than the 100 allowed" in item.error.message


@pytest.mark.parametrize("side", [24, 200])  # at 200 a message fills a pipe's buffer
@pytest.mark.parametrize("crash", [Crash, CrashInTurn])
def test_a_crash_costs_the_guilty_items_only(
    caplog: pytest.LogCaptureFixture, crash: type[bytes], side: int
) -> None:
    guilty = {5, 6, 30}
    pictures = [jpeg(n, side) for n in range(40)]
    items = [image_item(n, crash(p) if n in guilty else p) for n, p in enumerate(pictures)]
    with caplog.at_level(logging.WARNING):
        decoded = within(120, lambda: list(decode_items(items, 8, workers=2, chunk=8)))
    assert [item.id for item, _ in decoded] == [item.id for item in items]
    assert errors(decoded) == dict.fromkeys(guilty, "DecoderCrash")
    assert caplog.text.count("ended unexpectedly") == 1


def test_two_workers_that_crash_again_and_again_leave_nothing_behind() -> None:
    def decoded() -> list[tuple[Item, Any]]:
        crashes = itertools.cycle([Crash, CrashInTurn])
        items = [image_item(n, jpeg(n) if n % 3 else next(crashes)(b"x")) for n in range(60)]
        return list(decode_items(items, 8, workers=2, chunk=4))

    def left() -> tuple[int, int]:
        assert not multiprocessing.active_children()
        files = Path("/proc/self/fd")
        return threading.active_count(), len(list(files.iterdir())) if files.exists() else 0

    list(decode_items([image_item(0, jpeg(0))], 8, workers=1))  # multiprocessing's own files
    before = left()
    assert errors(within(240, decoded)) == dict.fromkeys(range(0, 60, 3), "DecoderCrash")
    assert left() == before


def big_png(side: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (side, side)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def test_a_picture_that_takes_too_long_costs_itself_only() -> None:
    items = [image_item(n, Hang(jpeg(n)) if n in (3, 5) else jpeg(n)) for n in range(12)]
    start = time.monotonic()
    decoded = list(decode_items(items, 8, workers=1, chunk=4, seconds=1.0))
    assert time.monotonic() - start < HANG_SECONDS
    assert [item.id for item, _ in decoded] == [item.id for item in items]
    assert errors(decoded) == {3: "DecoderTimeout", 5: "DecoderTimeout"}


def test_closing_does_not_wait_for_pictures_that_hang() -> None:
    threads = threading.active_count()
    items = [image_item(n, Hang(b"x") if n else jpeg(n)) for n in range(20)]
    stream = decode_items(items, 8, workers=2, chunk=1)
    next(stream)
    assert within(30, lambda: stream.close() is None)
    assert not multiprocessing.active_children()
    assert threading.active_count() == threads


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of Linux")
def test_a_picture_that_swells_costs_itself_only() -> None:
    swelling = big_png(11_000)  # 121 MB
    items = [image_item(n, swelling if n == 3 else jpeg(n)) for n in range(12)]
    decoded = list(decode_items(items, 8, workers=1, chunk=4, memory=64 << 20))
    assert errors(decoded) == {3: "MemoryError"}


def test_skipped_pictures_come_back_undecoded() -> None:
    items = [image_item(n, jpeg(n)) for n in range(10)]
    with DecodePool(8, workers=1, chunk=4) as pool:
        decoded = list(pool.decode(items, skip=lambda item: int(item.id) % 3 == 0))
    assert [item for item, _ in decoded] == items
    assert [int(i.id) for i, pixels in decoded if pixels is None] == [0, 3, 6, 9]


def test_killed_workers_cost_nothing() -> None:
    items = [image_item(n, jpeg(n)) for n in range(200)]
    decoded = []
    for number, pair in enumerate(decode_items(iter(items), 8, workers=2, chunk=4)):
        decoded.append(pair)
        if number in (20, 100):
            for worker in multiprocessing.active_children():
                worker.kill()
    assert [item.id for item, _ in decoded] == [item.id for item in items]
    assert all(pixels is not None and item.error is None for item, pixels in decoded)


def test_idle_workers_that_were_killed_cost_nothing() -> None:
    items = [image_item(n, jpeg(n)) for n in range(20)]
    with DecodePool(8, workers=2, chunk=2) as pool:
        while len(multiprocessing.active_children()) < 2:
            list(pool.decode(items))
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        assert errors(list(pool.decode(items))) == {}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_worker_killed_in_the_middle_of_a_message_costs_nothing() -> None:
    picture = jpeg(0, side=2_000)
    assert len(picture) > 1 << 20
    with DecodePool(8, workers=1, chunk=2) as pool:
        list(pool.decode([image_item(0, jpeg(0))]))
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)  # reads no more: the message stays half sent
        threading.Timer(0.5, worker.kill).start()
        items = [image_item(n, picture) for n in range(4)]
        assert errors(within(60, lambda: list(pool.decode(items)))) == {}


def test_workers_killed_while_they_start_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    start = decoding._Cell.__init__
    starts = itertools.count()

    def killed(cell: decoding._Cell, *settings: int) -> None:
        start(cell, *settings)
        if next(starts) in (1, 2):
            cell.process.kill()

    monkeypatch.setattr(decoding._Cell, "__init__", killed)
    items = [image_item(n, Crash(b"x") if n == 3 else jpeg(n)) for n in range(8)]
    decoded = within(60, lambda: list(decode_items(items, 8, workers=1, chunk=4)))
    assert errors(decoded) == {3: "DecoderCrash"}


def test_a_run_ends_where_workers_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> bool:
        with DecodePool(8, workers=2, chunk=1) as pool:
            list(pool.decode([image_item(0, jpeg(0))]))
            monkeypatch.setattr(decoding, "_serve", itertools.chain)  # returns at once
            with pytest.raises(HysafeError, match="do not start any more"):
                list(pool.decode([image_item(n, CrashInTurn(b"x")) for n in range(20)]))
        return True

    assert within(60, refused)


def test_reading_ahead_is_bounded() -> None:
    read = 0

    def endless() -> Iterator[Item]:
        nonlocal read
        data = jpeg(0)
        while True:
            read += 1
            yield image_item(read, data)

    stream = decode_items(endless(), 8, workers=1, chunk=4)
    for given in range(1, 301):
        next(stream)
        assert read - given <= 4 * 9 + 4
    assert read - given > 8  # it does read ahead
    stream.close()


def test_big_items_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hysafe.data.decoding.AHEAD_BYTES", 100_000)
    monkeypatch.setattr("hysafe.data.decoding.CHUNK_BYTES", 10_000)
    read = 0

    def big() -> Iterator[Item]:
        nonlocal read
        for number in range(60):
            read += 1
            yield image_item(number, bytes(9_000))

    for given, _ in enumerate(decode_items(big(), 8, workers=1), 1):
        assert (read - given) * 9_000 <= 130_000
    assert read == 60


def test_texts_do_not_wait_for_more_input() -> None:
    read = 0

    def texts() -> Iterator[Item]:
        nonlocal read
        for number in range(100):
            read += 1
            yield Item(id=f"{number}", source="-", modality="text", text="words")

    stream = decode_items(texts(), 8, workers=2, chunk=5)
    next(stream)
    assert read == 5
    assert not multiprocessing.active_children()  # and no process is started for them


def test_processes_end_with_the_stream() -> None:
    stream = decode_items([image_item(n, jpeg(n)) for n in range(50)], 8, workers=2, chunk=2)
    next(stream)
    assert multiprocessing.active_children()
    stream.close()
    assert not multiprocessing.active_children()


def test_a_pool_serves_several_calls_with_the_same_processes() -> None:
    with DecodePool(8, workers=1) as pool:
        for _ in range(2):
            ((_, pixels),) = pool.decode([image_item(0, jpeg(0))])
            assert pixels is not None
            children = multiprocessing.active_children()
            assert len(children) == 1
        assert multiprocessing.active_children() == children
    assert not multiprocessing.active_children()


def test_a_pool_that_is_dropped_takes_its_processes_along() -> None:
    pool = DecodePool(8, workers=2)
    list(pool.decode([image_item(0, jpeg(0))]))
    assert multiprocessing.active_children()
    del pool
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"workers": -1}, {"chunk": 0}, {"seconds": 0}, {"memory": 0}]
)
def test_senseless_settings_are_refused(wrong: dict[str, int]) -> None:
    settings = {"size": 8, "workers": 0, "chunk": 4} | wrong
    with pytest.raises(ConfigError, match="wanted"):
        list(decode_items([], settings.pop("size"), **settings))


WORKER_MODULES = """
from hysafe.data.decoding import decode_items
from hysafe.types import Item
LOADED = "[m for m in {heavy} if m in __import__('sys').modules]"
class Look(bytes):
    def __reduce__(self):
        heavy = ("torch", "open_clip", "transformers", "pyarrow")
        return eval, (f"print({LOADED.format(heavy=heavy)}, flush=True) or b'x'",)
if __name__ == "__main__":
    list(decode_items([Item(id="", source="", modality="image", image=Look(b"x"))], 8, workers=1))
"""

SLOW_START = """
import time
from hysafe.data.decoding import decode_items
from hysafe.types import Item
if __name__ != "__main__":
    time.sleep(1.5)
else:
    item = Item(id="", source="", modality="image", image=b"x")
    for item, _ in decode_items([item], 8, workers=1, seconds=1.0):
        print(item.error.type)
"""

LEFT_OPEN = """
import atexit, threading
if __name__ == "__main__":
    atexit.register(lambda: print(threading.active_count()))  # the last to run
import multiprocessing, time
from hysafe.data.decoding import DecodePool
from hysafe.types import Item
class Hang(bytes):
    def __reduce__(self):
        return time.sleep, (300,)
if __name__ == "__main__":
    pictures = [b"x", *[Hang(b"x")] * 50]
    items = (Item(id="", source="", modality="image", image=p) for p in pictures)
    pool = DecodePool(8, workers=2, chunk=1)
    stream = pool.decode(items)
    next(stream)
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.1)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
"""

STOPPED = """
from hysafe.data.decoding import decode_items
from hysafe.types import Item
class Slow(bytes):
    def __reduce__(self):
        return eval, ("print('now', flush=True) or __import__('time').sleep(1) or b'x'",)
if __name__ == "__main__":
    item = Item(id="", source="", modality="image", image=Slow(b"x"))
    for item, _ in decode_items([item], 8, workers=1, seconds=2.0):
        print(item.error.type)
"""

UNGUARDED = """
import io
from PIL import Image
from hysafe.data.decoding import decode_items
from hysafe.types import Item
out = io.BytesIO()
Image.new("RGB", (8, 8)).save(out, "PNG")
items = [Item(id=str(n), source="", modality="image", image=out.getvalue()) for n in range(9)]
print(sum(pixels is not None for _, pixels in decode_items(items, 8, workers=2)))
"""

KILLED = f"{LEFT_OPEN}    time.sleep(120)"


def script(tmp_path: Path, text: str, **options: Any) -> subprocess.Popen[Any]:
    path = tmp_path / "script.py"
    path.write_text(text)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(path)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, start_new_session=True, **options
    )


def run_script(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    with script(tmp_path, text, stderr=subprocess.PIPE, encoding="utf-8") as run:
        try:
            out, err = run.communicate(timeout=60)
        finally:
            run.kill()
    return subprocess.CompletedProcess(run.args, run.returncode, out, err)


def test_workers_load_nothing_heavy(tmp_path: Path) -> None:
    assert run_script(tmp_path, WORKER_MODULES).stdout.strip() == "[]"


def test_the_start_of_a_process_is_not_the_pictures_time(tmp_path: Path) -> None:
    assert run_script(tmp_path, SLOW_START).stdout.strip() == "InputError"


def test_a_pool_left_open_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    run = run_script(tmp_path, LEFT_OPEN)  # in far less than the pictures hang
    assert (run.returncode, run.stderr) == (0, "")
    pids, threads = run.stdout.splitlines()
    assert threads == "1"
    assert not any(alive(int(pid)) for pid in pids.split())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_program_that_is_stopped_for_a_while_loses_no_picture(tmp_path: Path) -> None:
    with script(tmp_path, STOPPED) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline().strip() == b"now"
        os.killpg(owner.pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.killpg(owner.pid, signal.SIGCONT)
        assert owner.stdout.read().strip() == b"InputError"


def test_a_script_without_main_guard_is_served_in_its_own_process(tmp_path: Path) -> None:
    run = run_script(tmp_path, UNGUARDED)
    assert run.stdout.strip() == "9"
    assert "decoding processes do not start" in run.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_workers_end_when_their_owner_is_killed(tmp_path: Path) -> None:
    with script(tmp_path, KILLED) as owner:
        assert owner.stdout is not None
        workers = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(workers) == 2
        time.sleep(1)  # until they hang
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # A zombie waits for init to collect it: it has ended.
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
