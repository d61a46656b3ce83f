"""A scan again and again, of folders that grow."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hysafe.app.lock import BusyError
from hysafe.data.inputs import STDIN
from hysafe.errors import ConfigError

if TYPE_CHECKING:
    from hysafe.app.scan import ScanSummary

__all__ = ["check_watch", "snapshot", "watch"]

log = logging.getLogger(__name__)


def watch(
    paths: Sequence[str],
    out: Path,
    scan_once: Callable[[], ScanSummary],
    *,
    seconds: float,
    sleep: Callable[[float], None] | None = None,
) -> Iterator[ScanSummary]:
    """Scan, and again whenever something under `paths` has changed.

    Args:
        paths, out: of the scan. scan_once: does it.
        seconds: wait between two looks.

    Yields:
        What each scan did; ends with a KeyboardInterrupt while it waits.

    Raises:
        ConfigError: as :func:`check_watch`.
    """
    check_watch(paths, seconds)
    return _rounds(paths, out, scan_once, seconds, sleep or time.sleep)


def check_watch(paths: Sequence[str], seconds: float) -> None:
    """See that paths can be watched.

    Raises:
        ConfigError: standard input cannot be read twice, or `seconds` is not positive.
    """
    if STDIN in paths:
        raise ConfigError("--watch: standard input ('-') is read once only. Name files or folders.")
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--watch {seconds:g}: wanted seconds, more than 0.")


def _rounds(
    paths: Sequence[str],
    out: Path,
    scan_once: Callable[[], ScanSummary],
    seconds: float,
    sleep: Callable[[float], None],
) -> Iterator[ScanSummary]:
    seen = snapshot(paths, out)  # before the scan: what changes meanwhile is a change
    yield scan_once()
    while True:
        try:
            sleep(seconds)
            now = snapshot(paths, out)
        except KeyboardInterrupt:
            return
        if now != seen:
            try:
                summary = scan_once()
            except BusyError as error:
                log.warning("%s Looking again in %g s.", error, seconds)
                continue
            seen = now
            yield summary


def snapshot(paths: Sequence[str], out: Path) -> str:
    """A hash over names, sizes and times of all files under `paths`, but those in `out`."""
    digest = hashlib.sha256()
    excluded = os.path.realpath(out)
    for path in paths:
        _note(digest, path)
        for folder, folders, files in os.walk(path, followlinks=False):
            folders[:] = sorted(
                f for f in folders if os.path.realpath(os.path.join(folder, f)) != excluded
            )
            for name in (*folders, *sorted(files)):
                _note(digest, os.path.join(folder, name))
    return digest.hexdigest()


def _note(digest: hashlib._Hash, path: str) -> None:
    try:
        status = os.stat(path)
        # the time of a folder says nothing that its entries do not say; and `out` changes it
        folder = os.path.isdir(path)
        facts = (0, 0) if folder else (status.st_size, status.st_mtime_ns)
        entry = f"{path}\0{facts}\0{status.st_mode}\n"
    except OSError as error:
        entry = f"{path}\0{error.errno}\n"
    digest.update(entry.encode("utf-8", "surrogateescape"))
