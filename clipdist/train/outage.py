"""Disks that refuse for a while what a run writes: a shared file system that is full, read-only or gone.

Training needs no disk of its run between two checkpoints, so it goes on. What could not be written is kept, and tried
again after a pause that is short at first.
"""

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from clipdist.data.shards import fsync_folder
from clipdist.errors import DiskError, disk_outages

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 60.0
"""Seconds between two attempts; it doubles from one to the next."""
UNSYNCED_BYTES = 1 << 20
"""So much of a file is kept in memory at most while its disk is well."""


class Outage:
    """From the first refusal until something is written again: tells of its begin and its end once each, and says when
    to try. `tells=False` for a rank that another one tells for."""

    def __init__(self, tells: bool = True) -> None:
        self.error: DiskError | None = None
        """The last refusal; None while all is well."""
        self._level = logging.WARNING if tells else logging.DEBUG
        self._began = self._next = self._pause = 0.0

    @property
    def pause_left(self) -> float:
        """Seconds until the next attempt."""
        return max(0.0, self._next - time.monotonic()) if self.error else 0.0

    def failed(self, error: DiskError, what: str, meanwhile: str) -> None:
        """`what` cannot be written because of `error`."""
        now = time.monotonic()
        if self.error is None:
            self._began, self._pause = now, FIRST_PAUSE
            told = (what, error.reason, self._pause, meanwhile)
            logger.log(self._level, "%s cannot be written (%s); trying again in %.0f s; %s", *told)
        else:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self.error, self._next = error, now + self._pause

    def over(self, what: str) -> None:
        """`what` has been written."""
        if self.error is not None:
            logger.log(self._level, "%s is written again, after %.0f s", what, time.monotonic() - self._began)
            self.error = None


class AppendedFile:
    """A file that one process appends to, and that holds nothing twice and nothing torn whatever its disk does.

    It is made when there is something to write, in a folder that exists, and opened for each write: so a handle never
    goes stale, and a file system that takes data on trust (NFS) tells of a refusal at once. What follows the last sync
    is kept in memory, and written once more, to the same place, after a failure: what a system had taken by then may
    be lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outage = Outage()
        self._synced = path.stat().st_size if path.exists() else 0
        self._kept = bytearray()  # what follows `_synced`
        self._whole = 0  # how much of it has once been in the file

    def append(self, data: bytes) -> None:
        """Adds whole lines or records, now or, while the disk refuses, with a later call."""
        self._kept += data
        if self.outage.pause_left == 0:
            with suppress(DiskError):
                self._attempt(sync=len(self._kept) > UNSYNCED_BYTES)

    def sync(self) -> None:
        """Returns when all of it survives a power cut. Raises `DiskError` when that cannot be; it stays kept."""
        if self._kept:
            self._attempt(sync=True)

    def _attempt(self, sync: bool) -> None:
        try:
            with disk_outages(self.path):
                self._write(sync)
        except DiskError as error:
            self.outage.failed(error, str(self.path), "what belongs there is kept until then")
            raise
        self.outage.over(str(self.path))

    def _write(self, sync: bool) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            # Of a disk that came back with less, the end counts: beyond it there would be a hole.
            self._synced = min(self._synced, os.fstat(descriptor).st_size)
            written = 0 if self.outage.error else self._whole
            try:
                while written < len(self._kept):
                    left = bytes(self._kept[written:])
                    written += os.pwrite(descriptor, left, self._synced + written)
            except OSError:
                with suppress(OSError):  # a torn end; written over later, if it cannot be cut off now
                    if os.fstat(descriptor).st_size > self._synced + self._whole:
                        os.ftruncate(descriptor, self._synced + self._whole)
                raise
            self._whole = written
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if sync:
            fsync_folder(self.path.parent)
            self._synced += len(self._kept)
            self._kept.clear()
            self._whole = 0
