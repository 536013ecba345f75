"""What a run asks of the file system that all nodes share: speed with small files, locks, the time, room.

The functions that touch the file system may hang with it: the doctor calls them in a child process (bounded.py).
"""

import errno
import fcntl
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from clipdist.cluster.doctor.bounded import Work
from clipdist.cluster.doctor.findings import CLOCK_SECONDS, Finding, figure
from clipdist.data.shards import write_atomically
from clipdist.errors import disk_errors
from clipdist.train.run_folder import LOCK

FILES = 10
SLOW_MS = 100.0
"""A median above is told of: shared file systems in good health take 1 to 20 ms."""
GIB = 1 << 30
REFUSED, GRANTED = "refused", "granted"


class Probe(NamedTuple):
    """What a folder answered."""

    milliseconds: list[float]
    """Of each small file: written, synced, renamed, and looked at."""
    lock: str
    """What is wrong with its locks; empty: nothing."""
    clock_ahead: float
    """Seconds by which the file system's clock is ahead of this machine's; 0 where no difference is certain."""
    free_bytes: int
    """For this user; a quota is not in it."""


def probe(folder: Path) -> Probe:
    """Writes a few small files into a folder of its own below `folder`, which is made if need be, and removes them.

    Raises `UserError` when that cannot be written or is full.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder, ignore_cleanup_errors=True) as name:
            own = Path(name)
            milliseconds = []
            for number in range(FILES):
                began = time.perf_counter()
                write_atomically(own / str(number), b"a few bytes\n")
                (own / str(number)).stat()
                milliseconds.append(1000 * (time.perf_counter() - began))
            before = time.time()
            write_atomically(own / "clock", b"now\n")
            after = time.time()
            written = (own / "clock").stat().st_mtime
            space = os.statvfs(folder)
            # Kernels stamp files with the time of their last tick.
            ahead = max(written - after, 0.0) + min(written - before + 0.02, 0.0)
            return Probe(milliseconds, fault_of_locks(own / "lock"), ahead, space.f_bavail * space.f_frsize)


def fault_of_locks(path: Path) -> str:
    """What is wrong with POSIX record locks on a new file, taken here and then tried by a second process; empty: they
    are what a run's folder needs to be one process' alone."""
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"a lock cannot be taken ({error.strerror})"
        tried = Work(try_lock, path).result(10)
    if tried == GRANTED:
        return "two processes got the same lock at once"
    return "" if tried == REFUSED else f"a second process cannot try a lock ({tried})"


def try_lock(path: Path) -> str:
    """`REFUSED` while another process holds the lock of an existing file, `GRANTED` when none does, else the system's
    words. Never in the process that holds it: closing the file again would give the lock up."""
    try:
        with open(path, "r+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return GRANTED
    except OSError as error:
        return REFUSED if error.errno in (errno.EAGAIN, errno.EACCES) else str(error.strerror)


def holder(run: Path) -> str:
    """`process 12 on n1`: who trains the run in a folder; empty when nobody does. For another process than that."""
    lock = run / LOCK
    if not lock.exists() or try_lock(lock) != REFUSED:
        return ""
    return lock.read_text(encoding="utf-8").strip() or "an unknown process"


def checkpoint_bytes(run: Path) -> int:
    """What the run's checkpoints take now."""
    return sum(path.stat().st_size for path in (run / "checkpoints").glob("*/*") if path.is_file())


def check_speed(name: str, found: Probe) -> Finding:
    median, slowest = statistics.median(found.milliseconds), max(found.milliseconds)
    told = (
        f"a small file takes {figure(median)} ms to write, sync and rename (median of {FILES}, the slowest "
        f"{figure(slowest)} ms)"
    )
    if median <= SLOW_MS:
        return Finding(f"{name}: speed", "ok", told)
    return Finding(
        f"{name}: speed",
        "warn",
        f"{told}, expected at most {SLOW_MS:g} ms; it is overloaded or far away: checkpoints and starts will be slow, "
        f"choose another file system with runs=",
    )


def check_locks(name: str, found: Probe) -> Finding:
    if not found.lock:
        return Finding(f"{name}: locks", "ok", "a lock that is held is refused to a second process")
    return Finding(
        f"{name}: locks",
        "error",
        f"{found.lock}, expected a second process to be refused; two jobs could train one run and spoil it: choose "
        f"another file system with runs=, or have it mounted with POSIX locks (Lustre: -o flock)",
    )


def check_clock(name: str, found: Probe) -> Finding:
    ahead = found.clock_ahead
    if abs(ahead) <= CLOCK_SECONDS:
        return Finding(f"{name}: clock", "ok", f"agrees with this machine's, to {figure(max(abs(ahead), 0.02))} s")
    return Finding(
        f"{name}: clock",
        "warn",
        f"{figure(abs(ahead))} s {'ahead of' if ahead > 0 else 'behind'} this machine's, expected at most "
        f"{CLOCK_SECONDS:g} s, since the ages of files mislead; ask the administrators to synchronise them (chronyc "
        f"tracking)",
    )


def check_space(name: str, free_bytes: int, needed_bytes: int, why: str) -> Finding:
    """`needed_bytes` are those still to be written; a disk with less than twice as much is told of."""
    told = f"{gib(free_bytes)} free, the run needs about {gib(needed_bytes)} ({why})"
    if free_bytes < needed_bytes:
        advice = "free some, lower checkpoint.keep, or choose another file system with runs="
        return Finding(f"{name}: space", "error", f"{told}; {advice}")
    if free_bytes < 2 * needed_bytes:
        return Finding(f"{name}: space", "warn", f"{told}; expected twice as much, since others write there too")
    return Finding(f"{name}: space", "ok", f"{told}; a quota, if there is one, is not in this")


def gib(size: float) -> str:
    """Readable: 12 MiB, 3.4 GiB."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{figure(size / (1 << 20))} MiB"
