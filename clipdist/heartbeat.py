"""Ends a process that makes no progress: a rank whose peer has stopped waits in a collective forever, and so does the
job around it.

`faulthandler` does the watching, in a thread of C that needs nothing of Python: it still runs where a library hangs.
"""

import faulthandler

STANDARD_ERROR = 2
_seconds = 0.0


def watch(minutes: float) -> None:
    """From now on `beat` must be called within so many minutes each time, or all threads' stacks are written to
    standard error and the process ends with exit code 1. 0: stops watching."""
    global _seconds
    _seconds = minutes * 60
    faulthandler.cancel_dump_traceback_later()
    beat()


def beat() -> None:
    """A sign of progress; does nothing where nobody watches."""
    if _seconds:
        faulthandler.dump_traceback_later(_seconds, exit=True, file=STANDARD_ERROR)
