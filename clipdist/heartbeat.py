"""Signs of progress, and the end of a process that gives none: a rank whose peer has stopped waits in a collective
forever, and so does the job around it.

`faulthandler` does the watching, in a thread of C that needs nothing of Python: it still runs where a library hangs.

All ranks wait then, and end at the same time. What tells them apart is how many exchanges each has come to: the one
that the others wait for, whatever holds it, is behind them. Each keeps the number where its node can read it.
"""

import faulthandler
import struct
import time
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

from clipdist import world

STANDARD_ERROR = 2
NAME = "beat-"
FORMAT = "<ddQ"
_seconds = 0.0
_exchanges = 0
_note: mmap | None = None


class Sign(NamedTuple):
    """What a rank tells the node that it runs on."""

    time: float
    """Of its last sign of progress, in seconds since 1970."""
    limit: float
    """Within so many seconds the next one must follow; 0: nobody watches."""
    exchanges: int
    """So many collectives it has come to: as many as all others, unless it is behind."""

    def overdue(self) -> bool:
        return 0 < self.limit <= time.time() - self.time


def watch(minutes: float) -> None:
    """From now on `beat` must be called within so many minutes each time, or all threads' stacks are written to
    standard error and the process ends with exit code 1. 0: stops watching."""
    global _seconds, _note
    _seconds = minutes * 60
    folder = world.exit_codes()
    if folder is not None and _note is None:
        path = folder / f"{NAME}{world.announced().rank}"
        with open(path, "w+b") as file:
            file.truncate(struct.calcsize(FORMAT))
            _note = mmap(file.fileno(), 0)
        world.traffic.on_entry = _come
    faulthandler.cancel_dump_traceback_later()
    beat()


def beat() -> None:
    """A sign of progress; does nothing where nobody watches."""
    _write()
    if _seconds:
        faulthandler.dump_traceback_later(_seconds, exit=True, file=STANDARD_ERROR)


def signs(folder: Path) -> dict[int, Sign]:
    """Rank -> what it last told; of the ranks that note their end in `folder`."""
    found = {}
    for path in folder.glob(f"{NAME}*"):
        with suppress(OSError, struct.error):  # not written yet
            found[int(path.name.removeprefix(NAME))] = Sign(*struct.unpack(FORMAT, path.read_bytes()))
    return found


def _come() -> None:
    global _exchanges
    _exchanges += 1
    _write_exchanges()


def _write() -> None:
    if _note is not None:
        struct.pack_into(FORMAT, _note, 0, time.time(), _seconds, _exchanges)


def _write_exchanges() -> None:
    if _note is not None:
        struct.pack_into("<Q", _note, struct.calcsize("<dd"), _exchanges)
