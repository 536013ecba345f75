"""Signs of progress, and the end of a process that gives none: a rank whose peer has stopped waits in a collective
forever, and so does the job around it.

`faulthandler` does the watching, in a thread of C that needs nothing of Python: it still runs where a library hangs.
"""

import faulthandler
import os
from contextlib import suppress
from pathlib import Path

from clipdist import world

STANDARD_ERROR = 2
NAME = "beat-"
_seconds = 0.0
_note: Path | None = None


def watch(minutes: float) -> None:
    """From now on `beat` must be called within so many minutes each time, or all threads' stacks are written to
    standard error and the process ends with exit code 1. 0: stops watching."""
    global _seconds, _note
    _seconds = minutes * 60
    folder = world.exit_codes()
    _note = folder / f"{NAME}{world.announced().rank}" if folder is not None else None
    if _note is not None:
        _note.touch()
    faulthandler.cancel_dump_traceback_later()
    beat()


def beat() -> None:
    """A sign of progress; does nothing where nobody watches."""
    if _seconds:
        faulthandler.dump_traceback_later(_seconds, exit=True, file=STANDARD_ERROR)
    if _note is not None:
        with suppress(OSError):
            os.utime(_note)


def times(folder: Path) -> list[float]:
    """When each rank that notes its end in `folder` last gave a sign, in seconds since 1970."""
    return [path.stat().st_mtime for path in folder.glob(f"{NAME}*")]
