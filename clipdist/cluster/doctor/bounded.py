"""Work that may hang: in a child process, which is given up when it does not answer.

A file system whose server is dead keeps a process in the kernel, where no signal reaches it. Threads share that fate
with their process; a child does not.
"""

import os
import pickle
import select
import signal
import time
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

from clipdist.errors import UserError

T = TypeVar("T")
REAP_SECONDS = 0.5


class Hung(Exception):
    """The child has not answered in time; the message says which process it is."""


class Work(Generic[T]):
    """`function(*words)` in a forked child, begun at once. What it prints is lost; what it returns is pickled.

    The child has whatever the parent has loaded, so it costs milliseconds. It must not use a GPU that the parent has
    used before.
    """

    def __init__(self, function: Callable[..., T], *words: Any) -> None:
        self._began = time.monotonic()
        self._reader, writer = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            _answer(writer, function, words)
        os.close(writer)

    def result(self, seconds: float) -> T:
        """What the function returned, at most `seconds` after it began. Call it once.

        Raises the function's `UserError`; `RuntimeError` for any other exception, and when the child died; `Hung` when
        there is no answer yet: then the child is killed, and left behind where even that takes no effect.
        """
        try:
            data = self._read(self._began + seconds)
            if data is None:
                raise Hung(f"no answer within {seconds:.0f} s (given up; process {self._pid} may hang on)")
        finally:
            os.close(self._reader)
            self._end()
        if not data:
            raise RuntimeError("the process that looked has died")
        good, answer = pickle.loads(data)  # from our own child
        if not good:
            raise answer
        result: T = answer
        return result

    def _read(self, end: float) -> bytes | None:
        """All bytes until the child closes the pipe; None when time is up before."""
        blocks: list[bytes] = []
        while True:
            ready, _, _ = select.select([self._reader], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            block = os.read(self._reader, 1 << 16)
            if not block:
                return b"".join(blocks)
            blocks.append(block)

    def _end(self) -> None:
        """Not `waitpid` without limit: what hangs in the kernel does not end even when killed."""
        end = time.monotonic() + REAP_SECONDS
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0) and time.monotonic() < end:
            os.kill(self._pid, signal.SIGKILL)
            time.sleep(0.005)


def _answer(writer: int, function: Callable[..., Any], words: tuple[Any, ...]) -> NoReturn:
    """The child's whole life: no clean-up of the parent's may run in it."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with os.fdopen(writer, "wb") as out:
            out.write(_outcome(function, words))
    finally:
        os._exit(0)


def _outcome(function: Callable[..., Any], words: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((True, function(*words)))
    except UserError as error:
        return pickle.dumps((False, UserError(str(error))))
    except Exception as error:  # whatever it is, the parent has to know
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
