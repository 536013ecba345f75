"""Asks a run to stop or to save: handlers only set a flag, which the ranks compare at the next step boundary."""

import os
import signal
import time
from types import FrameType

from clipdist import world

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """`requested` turns true once one of SIGTERM, SIGUSR1 and SIGUSR2 has arrived, or the launcher has died."""

    def __init__(self) -> None:
        self._signalled = False
        self._launcher = world.launcher()
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        folder = world.exit_codes()
        if folder is not None and (folder / world.STOP).exists():  # asked for before anybody listened
            self._signalled = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Nothing more may happen here: a save inside a handler would run between any two operations of a step.
        self._signalled = True

    @property
    def requested(self) -> bool:
        # A launcher that is killed leaves its ranks behind; they would train on beside those of the next start.
        return self._signalled or (self._launcher != 0 and os.getppid() != self._launcher)


class Clock:
    """Says when the next save by time is due."""

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self.last = time.monotonic()

    def due(self) -> bool:
        return self.seconds > 0 and time.monotonic() - self.last >= self.seconds

    def reset(self) -> None:
        self.last = time.monotonic()
