"""One writer at a time in a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hysafe.errors import InputError

__all__ = ["LOCK", "BusyError", "lock"]

LOCK = ".scan.lock"

log = logging.getLogger(__name__)


class BusyError(InputError):
    """Another process writes into the folder."""


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder while the body runs.

    The system holds it for the process, so the lock of a killed process is gone with it. The file
    stays: to remove it would let two processes lock two files of one name.

    Raises:
        BusyError: another process holds it. InputError: the folder cannot be written.
    """
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}). Free some space, or name another folder."
        ) from error
    try:
        if not _acquire(descriptor):
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            who = f"process {holder}" if holder else "another process"
            raise BusyError(
                f"{folder}: {who} is writing into this folder. Wait until it is done, or name "
                "another folder."
            )
        _write_holder(descriptor, str(os.getpid()))
        try:
            yield
        finally:
            _write_holder(descriptor, "")
    finally:
        os.close(descriptor)  # and with it goes the lock


def _acquire(descriptor: int) -> bool:
    """Take the lock; False where another process has it."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # a byte that nobody reads
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            os.lseek(descriptor, 0, os.SEEK_SET)
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        log.warning("the output folder cannot be locked (%s): run one scan at a time", error)
    return True


def _write_holder(descriptor: int, holder: str) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, holder.encode("ascii"))
    except OSError as error:  # a full disk: the lock holds all the same
        log.debug("the holder of the lock is not noted: %s", error)
