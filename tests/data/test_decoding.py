"""Decoding in worker processes: same pixels, same order, and no picture stops the run."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hysafe.data.decoding import DecodePool, decode_items
from hysafe.data.images import decode, to_pixels
from hysafe.errors import ConfigError
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
    """Bytes that end the process that unpickles them, as a bug in a C decoder would."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (3,)


HANG_SECONDS = 300


class Hang(bytes):
    """Bytes that do not let the process that looks at them go on."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        hang = f"lambda self: __import__('time').sleep({HANG_SECONDS})"
        return eval, (f"type('Hang', (bytes,), {{'__len__': {hang}}})(b'x')",)


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


def test_a_crash_costs_the_guilty_items_only(caplog: pytest.LogCaptureFixture) -> None:
    guilty = {5, 6, 30}
    items = [image_item(n, Crash(jpeg(n)) if n in guilty else jpeg(n)) for n in range(40)]
    with caplog.at_level(logging.WARNING):
        decoded = list(decode_items(items, 8, workers=2, chunk=8))
    assert [item.id for item, _ in decoded] == [item.id for item in items]
    failed = {int(item.id) for item, pixels in decoded if pixels is None}
    assert failed == guilty
    for item, _ in decoded:
        if int(item.id) in guilty:
            assert item.error is not None
            assert item.error.type == "DecoderCrash"
    assert "ended unexpectedly" in caplog.text


def big_png(side: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (side, side)).save(out, "PNG", compress_level=1)
    return out.getvalue()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX signals")
def test_a_picture_that_takes_too_long_costs_itself_only() -> None:
    items = [image_item(n, Hang(jpeg(n)) if n == 3 else jpeg(n)) for n in range(12)]
    start = time.monotonic()
    decoded = list(decode_items(items, 8, workers=1, chunk=4, seconds=1.0))
    assert time.monotonic() - start < HANG_SECONDS
    assert [item.id for item, _ in decoded] == [item.id for item in items]
    failed = {int(i.id): i.error.type for i, _ in decoded if i.error is not None}
    assert failed == {3: "DecoderTimeout"}
    assert [int(i.id) for i, pixels in decoded if pixels is None] == [3]


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of Linux")
def test_a_picture_that_swells_costs_itself_only() -> None:
    swelling = big_png(11_000)  # 121 MB
    items = [image_item(n, swelling if n == 3 else jpeg(n)) for n in range(12)]
    decoded = list(decode_items(items, 8, workers=1, chunk=4, memory=64 << 20))
    failed = {int(i.id): i.error.type for i, _ in decoded if i.error is not None}
    assert failed == {3: "MemoryError"}
    assert [int(i.id) for i, pixels in decoded if pixels is None] == [3]


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


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"workers": -1}, {"chunk": 0}, {"seconds": 0}, {"memory": 0}]
)
def test_senseless_settings_are_refused(wrong: dict[str, int]) -> None:
    settings = {"size": 8, "workers": 0, "chunk": 4} | wrong
    with pytest.raises(ConfigError, match="wanted"):
        list(decode_items([], settings.pop("size"), **settings))


WORKER_MODULES = """
import sys
from hysafe.data import decoding
def loaded(*_):
    heavy = ("torch", "open_clip", "transformers", "pyarrow")
    return [m for m in heavy if m in sys.modules]
if __name__ == "__main__":
    pool = decoding.DecodePool(8, workers=1)
    print(pool._new_executor().submit(loaded).result())
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

KILLED = """
import multiprocessing, time
from hysafe.data.decoding import DecodePool
if __name__ == "__main__":
    pool = DecodePool(8, workers=2)
    pool._start()
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(120)
"""


def run_script(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(text)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(path)]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_workers_load_nothing_heavy(tmp_path: Path) -> None:
    assert run_script(tmp_path, WORKER_MODULES).stdout.strip() == "[]"


def test_a_script_without_main_guard_is_served_in_its_own_process(tmp_path: Path) -> None:
    run = run_script(tmp_path, UNGUARDED)
    assert run.stdout.strip() == "9"
    assert "decoding processes do not start" in run.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_workers_end_when_their_owner_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(KILLED)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, str(path)], env=env, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        workers = [int(pid) for pid in owner.stdout.readline().split()]
        assert workers
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
