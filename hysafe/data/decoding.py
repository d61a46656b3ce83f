"""Items to pixels in worker processes, in order, with flat memory.

Decoding costs more than the encoder's small tower, so it runs beside it. A worker has a limit of
time for each picture and one of memory; what crashes, hangs or swells costs one row. Workers are
spawned and import Pillow and numpy, never torch: this module and the packages above it must stay
light. As with every spawned process, a script that uses workers keeps its own start behind
``if __name__ == "__main__":``.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hysafe.data.files import error_record
from hysafe.data.images import MAX_PIXELS, decode, out_of_memory, to_pixels
from hysafe.errors import ConfigError, HysafeError, InputError
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

# For a process that replaces another: there may be a moment without memory.
STARTS = 4
START_PAUSE_SECONDS = 0.5
# For the threads to come back at the end; they are daemons, so one that does not holds nothing up.
END_SECONDS = 10.0
# A program that is stopped for a while (Ctrl-Z) loses one slice of a picture's time, not all.
SLICE_SECONDS = 0.25
# Shared memory begins with a number.
COUNT_BYTES = 8

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
        seconds: a picture that takes longer becomes an error row; in a worker process.
        memory: bytes that a worker process may take beyond its start; on Linux.

    Yields:
        (item, uint8 [3, S, S]) in the order of `items`; (item, None) for an item without picture,
        and for a picture that cannot be decoded, then with `error` set. An error that the item
        came with stays. A picture that makes a worker process crash or hang is such an error row,
        too.

    Raises:
        HysafeError: worker processes that ended cannot be replaced.
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
        self._crew: _Crew | None = None

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
        if self._crew is not None:
            self._crew = None
            self._end_crew()

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
        if pictures and self.workers and self._crew is None:
            self._start()
        future = self._crew.submit(pictures) if pictures and self._crew is not None else None
        return _Task(group, wanted, pictures, future, cost)

    def _collect(self, task: _Task) -> Iterator[Decoded]:
        if task.future is not None:
            outcomes = task.future.result()
        else:
            outcomes = [_outcome(p, self.size, self.max_pixels) for p in task.pictures]
        rest = iter(outcomes)
        for item, wanted in zip(task.items, task.wanted, strict=True):
            outcome = next(rest) if wanted else None
            if isinstance(outcome, ErrorRecord):
                yield replace(item, error=outcome), None
            else:
                yield item, outcome

    def _start(self) -> None:
        """Start the processes; with a warning, do without where they cannot be started."""
        try:
            self._crew = _Crew(
                self.workers, self.seconds, self.chunk, self.memory, self.size, self.max_pixels
            )
        except HysafeError as error:
            self.workers = 0
            logger.warning(
                "decoding processes do not start (%r), decoding in this one, which is slower. "
                'In a script, keep the start behind `if __name__ == "__main__":`.',
                error.__cause__,
            )
        else:
            # Also at exit, before multiprocessing waits for the processes.
            self._end_crew = Finalize(self, self._crew.end, exitpriority=0)


class _Crew:
    """Threads that hand chunks to processes; `settings` are those of :class:`_Cell`."""

    def __init__(self, workers: int, seconds: float, *settings: int) -> None:
        self._seconds = seconds
        self._settings = settings
        self._jobs: SimpleQueue[tuple[list[bytes], Future[list[Outcome]]] | None] = SimpleQueue()
        # Not a plain lock: the garbage collector may call `end` in any thread.
        self._lock = threading.RLock()
        self._ended = False
        self._warned = False
        self._cells: set[_Cell] = set()
        self._idle: list[_Cell] = []
        self._idle.append(self._cell(starts=1, new=True))
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, pictures: list[bytes]) -> Future[list[Outcome]]:
        future: Future[list[Outcome]] = Future()
        self._jobs.put((pictures, future))
        return future

    def end(self) -> None:
        """Kill the processes; a thread that waits for one comes back and gives up its work."""
        with self._lock:
            self._ended = True
            for cell in self._cells:
                cell.process.kill()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(END_SECONDS)
        for cell in list(self._cells):
            self._drop(cell)

    def _work(self) -> None:
        for pictures, future in iter(self._jobs.get, None):
            try:
                future.set_result(self._outcomes(pictures))
            except BaseException as error:
                future.set_exception(error)
            del pictures, future

    def _outcomes(self, pictures: list[bytes]) -> list[Outcome]:
        """Outcome of each picture; one that ends its process is tried once more, alone."""
        outcomes: list[Outcome] = []
        at_once, suspect = len(pictures), -1
        while (done := len(outcomes)) < len(pictures):
            cell = self._cell(STARTS, new=suspect == done)
            found, problem = cell.decode(pictures[done : done + at_once], self._seconds)
            outcomes += found
            if problem is None:
                self._idle.append(cell)
                continue
            self._drop(cell)
            if problem is CRASHED and suspect != len(outcomes):
                # Perhaps the process was killed from outside, or by a picture further on.
                at_once, suspect = 1, len(outcomes)
                if not (self._warned or self._ended):
                    self._warned = True
                    logger.warning("a decoding process ended unexpectedly; its work is done again")
            else:
                outcomes.append(problem)
        return outcomes

    def _cell(self, starts: int, *, new: bool) -> _Cell:
        """A cell, `new` or idle, which may have been killed; with so many tries to start one."""
        cell = None
        try:
            with self._lock:
                if self._idle and not new:
                    return self._idle.pop()
                if self._ended:
                    raise CancelledError
                cell = _Cell(*self._settings)
                self._cells.add(cell)
            cell.line.recv()  # its start is not the first picture's time
            return cell
        except (EOFError, OSError) as error:
            if cell is not None:
                self._drop(cell)
            if starts == 1:
                raise HysafeError(
                    f"Decoding processes do not start any more ({error!r}). Free memory and start "
                    "again; if you trust the pictures, decode without processes (--workers 0)."
                ) from error
        if not self._ended:
            time.sleep(START_PAUSE_SECONDS)
        return self._cell(starts - 1, new=new)

    def _drop(self, cell: _Cell) -> None:
        with self._lock:
            self._cells.discard(cell)
        cell.process.kill()
        # Process.close() would fail where another thread has just collected the process.
        cell.process.join()
        cell.line.close()


class _Cell:
    """A process that decodes for one thread at a time; any thread may kill it.

    It puts pixels into shared memory and counts them there. Through the line come errors, and a
    word when all is done: one message a chunk, where nothing is wrong.
    """

    def __init__(self, chunk: int, memory: int, size: int, max_pixels: int) -> None:
        context = multiprocessing.get_context("spawn")
        shared = context.RawArray("B", COUNT_BYTES + chunk * 3 * size**2)
        self._done, self._pixels = _views(shared, size)
        self.line, far_end = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(far_end, shared, memory, size, max_pixels), daemon=True
        )
        self.process.start()
        far_end.close()  # the line ends with the process

    def decode(
        self, pictures: list[bytes], seconds: float
    ) -> tuple[list[Outcome], ErrorRecord | None]:
        """What came of the pictures, and of the one that the cell did not survive."""
        errors: dict[int, ErrorRecord] = {}
        problem: ErrorRecord | None = CRASHED
        self._done[0] = done = 0
        slices = left = math.ceil(seconds / SLICE_SECONDS)
        with suppress(EOFError, OSError):
            self.line.send(pictures)
            while left:
                told = self.line.poll(seconds / slices)
                if told:
                    message = self.line.recv()
                    if message is None:
                        problem = None
                        break
                    errors[message[0]] = message[1]
                last, done = done, int(self._done[0])
                left = slices if told or done > last else left - 1
            else:
                problem = TIMED_OUT
        if problem is not TIMED_OUT:  # what a process that still runs has done since does not count
            done = int(self._done[0])
        pixels = self._pixels[:done].copy()  # the cell goes on to overwrite them
        return [errors.get(k, pixels[k]) for k in range(done)], problem


class _Task(NamedTuple):
    items: list[Item]
    wanted: list[bool]  # is there a picture to decode?
    pictures: list[bytes]
    future: Future[list[Outcome]] | None  # None: nothing to decode, or decoded in this process
    cost: int  # bytes held, encoded and decoded


def _outcome(picture: bytes, size: int, max_pixels: int) -> Outcome:
    try:
        return to_pixels(decode(picture, size=size, max_pixels=max_pixels), size)
    except InputError as error:
        return error_record(error)
    except MemoryError:
        return OUT_OF_MEMORY


def _serve(line: Connection, shared: Any, memory: int, size: int, max_pixels: int) -> None:
    """Runs in the worker: take lists of pictures, and leave an outcome for each."""
    _prepare_worker(memory)
    done, pixels = _views(shared, size)
    with suppress(EOFError, OSError):  # the owner has ended
        line.send(None)
        while True:
            for k, picture in enumerate(line.recv()):
                outcome = _outcome(picture, size, max_pixels)
                if isinstance(outcome, ErrorRecord):
                    line.send((k, outcome))
                else:
                    pixels[k] = outcome
                done[0] = k + 1
            line.send(None)


def _views(shared: Any, size: int) -> tuple[NDArray[np.int64], Pixels]:
    """What a cell and its process share: a count, and pixels [chunk, 3, S, S]."""
    count = np.frombuffer(shared, np.int64, 1)
    pixels = np.frombuffer(shared, np.uint8, offset=COUNT_BYTES)
    return count, pixels.reshape(-1, 3, size, size)


def _prepare_worker(memory: int) -> None:
    """Leave Ctrl-C to the owner, keep Pillow's warnings off the terminal, end with the owner."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
    # Who hangs in a picture reads no end of file.
    owner = multiprocessing.parent_process()
    if owner is not None:
        multiprocessing.connection.wait([owner.sentinel])
        os._exit(1)
