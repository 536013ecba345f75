"""Asks a run to stop or to save: handlers only set a flag, which the ranks compare at the next step boundary."""

import logging
import signal
import time
from types import FrameType

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """`requested` turns true once one of SIGTERM, SIGUSR1 and SIGUSR2 has arrived."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Nothing more may happen here: a save inside a handler would run between any two operations of a step.
        self.requested = True


class Clock:
    """Says when the next save by time is due."""

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self.last = time.monotonic()

    def due(self) -> bool:
        return self.seconds > 0 and time.monotonic() - self.last >= self.seconds

    def reset(self) -> None:
        self.last = time.monotonic()
