"""Items to pixels in worker processes, in order, with flat memory.

Decoding costs more than the encoder's small tower, so it runs beside it. Workers are spawned and
import Pillow and numpy, never torch: this module and the packages above it must stay light. As
with every spawned process, a script that uses workers keeps its own start behind
``if __name__ == "__main__":``.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hysafe.data.files import error_record
from hysafe.data.images import MAX_PIXELS, decode, to_pixels
from hysafe.errors import ConfigError, InputError
from hysafe.types import ErrorRecord, Item

__all__ = ["DecodePool", "decode_items"]

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
OUT_OF_MEMORY = ErrorRecord(
    "MemoryError", "There was not enough memory to decode the picture. Scale it down."
)

logger = logging.getLogger(__name__)


def decode_items(
    items: Iterable[Item],
    size: int,
    *,
    workers: int,
    chunk: int = 32,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Decoded]:
    """Decode the pictures among `items` to squares of pixels.

    Args:
        items: read lazily, a bounded number ahead.
        size: side S in pixels, as for :func:`hysafe.data.images.to_pixels`.
        workers: worker processes; 0 decodes in this process.
        chunk: items handed to a worker at once.
        max_pixels: larger pictures become error rows.

    Yields:
        (item, uint8 [3, S, S]) in the order of `items`; (item, None) for an item without picture,
        and for a picture that cannot be decoded, then with `error` set. An error that the item
        came with stays. A picture that makes a worker process crash is such an error row, too.
    """
    with DecodePool(size, workers=workers, chunk=chunk, max_pixels=max_pixels) as pool:
        yield from pool.decode(items)


class DecodePool:
    """Worker processes kept between calls; see :func:`decode_items` for the arguments.

    Use it as a context manager. Processes start with the first picture and end with the pool,
    or with the process that owns it, even if that is killed.
    """

    def __init__(
        self, size: int, *, workers: int, chunk: int = 32, max_pixels: int = MAX_PIXELS
    ) -> None:
        for name, value, least in (("size", size, 1), ("workers", workers, 0), ("chunk", chunk, 1)):
            if value < least:
                raise ConfigError(f"{name} is {value}, wanted at least {least}.")
        self.size = size
        self.workers = workers
        self.chunk = chunk
        self.max_pixels = max_pixels
        self._executor: ProcessPoolExecutor | None = None
        self._quarantine: ProcessPoolExecutor | None = None

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

    def decode(self, items: Iterable[Item]) -> Iterator[Decoded]:
        """As :func:`decode_items`."""
        pending: deque[_Task] = deque()
        ahead_bytes = 0
        for group in self._groups(items):
            task = self._submit(group)
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

    def _submit(self, group: list[Item]) -> _Task:
        pictures = [i.image for i in group if i.image is not None and i.error is None]
        cost = sum(len(picture) + 3 * self.size**2 for picture in pictures)
        if not pictures or self.workers == 0:
            return _Task(group, pictures, None, cost)
        if self._executor is None and not self._start():
            self.workers = 0
            return _Task(group, pictures, None, cost)
        return _Task(group, pictures, self._send(pictures), cost)

    def _collect(self, task: _Task) -> Iterator[Decoded]:
        if task.future is None:
            outcomes = _decode_chunk(task.pictures, self.size, self.max_pixels)
        else:
            outcomes = self._result(task)
        rest = iter(outcomes)
        for item in task.items:
            outcome = next(rest) if item.image is not None and item.error is None else None
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
                self._quarantine = self._new_executor(1)
            try:
                work = self._quarantine.submit(_decode_chunk, [picture], self.size, self.max_pixels)
                return work.result()[0]
            except (BrokenProcessPool, MemoryError):
                self._end_quarantine()
        return CRASHED

    def _end_quarantine(self) -> None:
        if self._quarantine is not None:
            self._quarantine.shutdown()
            self._quarantine = None

    def _send(self, pictures: list[bytes]) -> Future[list[Outcome]]:
        assert self._executor is not None
        try:
            return self._executor.submit(_decode_chunk, pictures, self.size, self.max_pixels)
        except BrokenProcessPool:
            self._executor.shutdown()
            self._executor = self._new_executor(self.workers)
            return self._executor.submit(_decode_chunk, pictures, self.size, self.max_pixels)

    def _start(self) -> bool:
        """Start the pool; False, with a warning, where processes cannot be started."""
        executor = self._new_executor(self.workers)
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

    def _new_executor(self, workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare_worker,
        )


class _Task(NamedTuple):
    items: list[Item]
    pictures: list[bytes]
    future: Future[list[Outcome]] | None  # None: nothing to decode, or decoded in this process
    cost: int  # bytes held, encoded and decoded


def _decode_chunk(pictures: list[bytes], size: int, max_pixels: int) -> list[Outcome]:
    """Runs in the worker."""
    outcomes: list[Outcome] = []
    for picture in pictures:
        try:
            image = decode(picture, size=size, max_pixels=max_pixels)
            outcomes.append(to_pixels(image, size))
        except InputError as error:
            outcomes.append(error_record(error))
        except MemoryError:
            outcomes.append(OUT_OF_MEMORY)
    return outcomes


def _prepare_worker() -> None:
    """Leave Ctrl-C to the owner, keep Pillow's warnings off the terminal, end with the owner."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_owner, daemon=True).start()


def _end_with_owner() -> None:
    # Workers hold both ends of their queues, so the death of a killed owner is no end of file.
    owner = multiprocessing.parent_process()
    if owner is not None:
        multiprocessing.connection.wait([owner.sentinel])
        os._exit(1)
