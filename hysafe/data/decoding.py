"""Items to pixels in worker processes, in order, with flat memory.

Decoding costs more than the encoder's small tower, so it runs beside it. A worker has a limit of
time for each picture and one of memory; what crashes, hangs or swells costs one row. Workers are
spawned and import Pillow and numpy, never torch: this module and the packages above it must stay
light. As with every spawned process, a script that uses workers keeps its own start behind
``if __name__ == "__main__":``.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hysafe.data.files import error_record
from hysafe.data.images import MAX_PIXELS, decode, out_of_memory, to_pixels
from hysafe.errors import ConfigError, InputError
from hysafe.types import ErrorRecord, Item

__all__ = ["DECODE_MEMORY", "DECODE_SECONDS", "DecodePool", "decode_items"]

# A picture of 134 million pixels takes some seconds.
DECODE_SECONDS = 60.0
# What a worker may take beyond its start: nearly twice what an RGBA picture of MAX_PIXELS takes.
DECODE_MEMORY = 2 << 30

# A chunk ends at this many encoded bytes even when it has few items.
CHUNK_BYTES = 16 << 20
# Work handed out and not yet taken back: enough to keep workers busy while the encoder works on
# a batch of several hundred, and a bound on memory (encoded plus decoded bytes).
AHEAD_CHUNKS_PER_WORKER = 8
AHEAD_BYTES = 256 << 20

Pixels = NDArray[np.uint8]
Decoded = tuple[Item, Pixels | None]
# Per picture: its pixels [3, S, S], or why there are none.
Outcome = Pixels | ErrorRecord

CRASHED = ErrorRecord(
    "DecoderCrash",
    "The picture made the decoding process crash or run out of memory. Treat it with suspicion; "
    "export it again if you trust it.",
)
TIMED_OUT = ErrorRecord(
    "DecoderTimeout",
    "Decoding the picture took longer than the time limit. Treat it with suspicion; scale it down, "
    "or raise the limit (--decode-seconds) if you trust it.",
)
OUT_OF_MEMORY = error_record(out_of_memory())

logger = logging.getLogger(__name__)


def decode_items(
    items: Iterable[Item],
    size: int,
    *,
    workers: int,
    chunk: int = 32,
    max_pixels: int = MAX_PIXELS,
    seconds: float = DECODE_SECONDS,
    memory: int = DECODE_MEMORY,
) -> Iterator[Decoded]:
    """Decode the pictures among `items` to squares of pixels.

    Args:
        items: read lazily, a bounded number ahead.
        size: side S in pixels, as for :func:`hysafe.data.images.to_pixels`.
        workers: worker processes; 0 decodes in this process.
        chunk: items handed to a worker at once.
        max_pixels: larger pictures become error rows.
        seconds: a picture that takes longer becomes an error row; in a worker process, and not on
            Windows.
        memory: bytes that a worker process may take beyond its start; on Linux.

    Yields:
        (item, uint8 [3, S, S]) in the order of `items`; (item, None) for an item without picture,
        and for a picture that cannot be decoded, then with `error` set. An error that the item
        came with stays. A picture that makes a worker process crash or hang is such an error row,
        too.
    """
    with DecodePool(
        size, workers=workers, chunk=chunk, max_pixels=max_pixels, seconds=seconds, memory=memory
    ) as pool:
        yield from pool.decode(items)


class DecodePool:
    """Worker processes kept between calls; see :func:`decode_items` for the arguments.

    Use it as a context manager. Processes start with the first picture and end with the pool,
    or with the process that owns it, even if that is killed.
    """

    def __init__(
        self,
        size: int,
        *,
        workers: int,
        chunk: int = 32,
        max_pixels: int = MAX_PIXELS,
        seconds: float = DECODE_SECONDS,
        memory: int = DECODE_MEMORY,
    ) -> None:
        for name, value, least in (("size", size, 1), ("workers", workers, 0), ("chunk", chunk, 1)):
            if value < least:
                raise ConfigError(f"{name} is {value}, wanted at least {least}.")
        for name, limit in (("seconds", seconds), ("memory", memory)):
            if not 0 < limit < float("inf"):
                raise ConfigError(f"{name} is {limit}, wanted more than 0, and finite.")
        self.size = size
        self.workers = workers
        self.chunk = chunk
        self.max_pixels = max_pixels
        self.seconds = seconds
        self.memory = memory
        self._executor: ProcessPoolExecutor | None = None
        self._quarantine: _Cell | None = None

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. The pool may be used again and then starts new ones."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None
        self._end_quarantine()

    def decode(
        self, items: Iterable[Item], *, skip: Callable[[Item], bool] | None = None
    ) -> Iterator[Decoded]:
        """As :func:`decode_items`.

        Args:
            skip: pictures that are passed on undecoded, without an error.
        """
        pending: deque[_Task] = deque()
        ahead_bytes = 0
        for group in self._groups(items):
            task = self._submit(group, skip)
            pending.append(task)
            ahead_bytes += task.cost
            # Items without picture need not wait, unless for a picture before them.
            while pending and (
                pending[0].future is None
                or len(pending) > AHEAD_CHUNKS_PER_WORKER * self.workers
                or ahead_bytes > AHEAD_BYTES
            ):
                task = pending.popleft()
                ahead_bytes -= task.cost
                yield from self._collect(task)
        while pending:
            yield from self._collect(pending.popleft())
        self._end_quarantine()

    def _groups(self, items: Iterable[Item]) -> Iterator[list[Item]]:
        group: list[Item] = []
        size = 0
        for item in items:
            group.append(item)
            size += len(item.image or b"")
            if len(group) >= self.chunk or size >= CHUNK_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _submit(self, group: list[Item], skip: Callable[[Item], bool] | None) -> _Task:
        wanted = [
            i.image is not None and i.error is None and not (skip is not None and skip(i))
            for i in group
        ]
        pictures = [i.image or b"" for i, w in zip(group, wanted, strict=True) if w]
        cost = sum(len(i.image or b"") for i in group) + 3 * self.size**2 * len(pictures)
        if not pictures or self.workers == 0:
            return _Task(group, wanted, pictures, None, cost)
        if self._executor is None and not self._start():
            self.workers = 0
            return _Task(group, wanted, pictures, None, cost)
        return _Task(group, wanted, pictures, self._send(pictures), cost)

    def _collect(self, task: _Task) -> Iterator[Decoded]:
        if task.future is None:
            outcomes = _decode_chunk(task.pictures, self.size, self.max_pixels)
        else:
            outcomes = self._result(task)
        rest = iter(outcomes)
        for item, wanted in zip(task.items, task.wanted, strict=True):
            outcome = next(rest) if wanted else None
            if isinstance(outcome, ErrorRecord):
                yield replace(item, error=outcome), None
            else:
                yield item, outcome

    def _result(self, task: _Task) -> list[Outcome]:
        """Outcome of a chunk; where its pool broke, find the picture to blame."""
        assert task.future is not None
        try:
            return task.future.result()
        except (BrokenProcessPool, MemoryError):
            if self._quarantine is None:
                logger.warning("a decoding process ended unexpectedly; its work is done again")
            return [self._alone(picture) for picture in task.pictures]

    def _alone(self, picture: bytes) -> Outcome:
        """Decode in a process beside the pool, one picture at a time: a crash names its cause.

        Twice, for the process may also have been killed from outside.
        """
        for _ in range(2):
            if self._quarantine is None:
                self._quarantine = _Cell(self.memory)
            outcome = self._quarantine.decode(picture, self.size, self.max_pixels, self.seconds)
            if outcome is not None and outcome is not TIMED_OUT:
                return outcome
            self._end_quarantine()
            if outcome is TIMED_OUT:
                return TIMED_OUT
        return CRASHED

    def _end_quarantine(self) -> None:
        if self._quarantine is not None:
            self._quarantine.close()
            self._quarantine = None

    def _send(self, pictures: list[bytes]) -> Future[list[Outcome]]:
        assert self._executor is not None
        work = partial(_decode_chunk, pictures, self.size, self.max_pixels, self.seconds)
        try:
            return self._executor.submit(work)
        except BrokenProcessPool:
            self._executor.shutdown()
            self._executor = self._new_executor()
            return self._executor.submit(work)

    def _start(self) -> bool:
        """Start the pool; False, with a warning, where processes cannot be started."""
        executor = self._new_executor()
        try:
            executor.submit(os.getpid).result()
        except (BrokenProcessPool, OSError) as error:
            executor.shutdown()
            logger.warning(
                "decoding processes do not start (%s), decoding in this one, which is slower. "
                'In a script, keep the start behind `if __name__ == "__main__":`.',
                error,
            )
            return False
        self._executor = executor
        return True

    def _new_executor(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare_worker,
            initargs=(self.memory,),
        )


class _Cell:
    """A process that decodes one picture at a time; its owner ends it when time is up."""

    def __init__(self, memory: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, far_end = context.Pipe()
        self._process = context.Process(target=_serve_cell, args=(far_end, memory), daemon=True)
        self._process.start()
        far_end.close()
        self._started = False

    def decode(self, picture: bytes, size: int, max_pixels: int, seconds: float) -> Outcome | None:
        """What came of a picture; None where the process ended. After that and after
        :data:`TIMED_OUT` the cell is of no use any more."""
        try:
            self._started = self._started or self._line.recv()  # its start is not the picture's
            self._line.send((picture, size, max_pixels))
            if not self._line.poll(seconds):
                return TIMED_OUT
            outcome: Outcome = self._line.recv()
            return outcome
        except (EOFError, OSError):
            return None

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._line.close()


class _Task(NamedTuple):
    items: list[Item]
    wanted: list[bool]  # is there a picture to decode?
    pictures: list[bytes]
    future: Future[list[Outcome]] | None  # None: nothing to decode, or decoded in this process
    cost: int  # bytes held, encoded and decoded


def _decode_chunk(
    pictures: list[bytes], size: int, max_pixels: int, seconds: float | None = None
) -> list[Outcome]:
    """Runs in the worker, which ends when a picture takes longer than `seconds`."""
    outcomes: list[Outcome] = []
    for picture in pictures:
        try:
            with _deadline(seconds):
                image = decode(picture, size=size, max_pixels=max_pixels)
                outcomes.append(to_pixels(image, size))
        except InputError as error:
            outcomes.append(error_record(error))
        except MemoryError:
            outcomes.append(OUT_OF_MEMORY)
    return outcomes


@contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    """End this process when the body takes longer. The system does it: a loop inside a decoder's
    C code hears nothing else."""
    if seconds is None or not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _serve_cell(line: Connection, memory: int) -> None:
    _prepare_worker(memory)
    line.send(True)
    while True:
        picture, size, max_pixels = line.recv()
        line.send(_decode_chunk([picture], size, max_pixels)[0])


def _prepare_worker(memory: int) -> None:
    """Leave Ctrl-C to the owner, keep Pillow's warnings off the terminal, end with the owner."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    warnings.simplefilter("ignore")
    _limit_memory(memory)
    threading.Thread(target=_end_with_owner, daemon=True).start()


def _limit_memory(memory: int) -> None:
    """Allow this process `memory` bytes more of address space than it has; no core files."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as sizes:
        now = int(sizes.read().split()[0]) * resource.getpagesize()
    for which, wanted in ((resource.RLIMIT_AS, now + memory), (resource.RLIMIT_CORE, 0)):
        allowed = [v for v in resource.getrlimit(which) if v != resource.RLIM_INFINITY]
        limit = min([wanted, *allowed])
        resource.setrlimit(which, (limit, limit))


def _end_with_owner() -> None:
    # Workers hold both ends of their queues, so the death of a killed owner is no end of file.
    owner = multiprocessing.parent_process()
    if owner is not None:
        multiprocessing.connection.wait([owner.sentinel])
        os._exit(1)
