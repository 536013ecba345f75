"""One thread that owns the model, and takes what waits for it together: requests that arrive at about the same time
cost one pass, not one each."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from clipdist.publish.serve.metrics import Metrics

Compute = Callable[[Hashable, Sequence[Any]], Sequence[Any]]
"""(kind, items of that kind) -> what became of each, in order."""


@dataclass(eq=False)
class Job:
    kind: Hashable
    item: Any
    ticket: str | None
    arrived: float
    future: "Future[Any]" = field(default_factory=Future)


class Stopped(RuntimeError):
    """The service is ending, and computes nothing any more."""


class Batcher:
    """Runs `compute` on a thread of its own: the oldest job and up to `max_batch` jobs of its kind, in one call.

    While fewer are there it waits, at most `max_wait_seconds` after the oldest came, and only as long as `coming()`
    says that more are on their way. Jobs of the kind `alone` are never put together.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        max_batch: int,
        max_wait_seconds: float,
        metrics: Metrics,
        alone: Hashable = None,
        coming: Callable[[], bool] = lambda: True,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._compute, self._coming, self._before = compute, coming, before
        self.max_batch, self.max_wait_seconds, self.metrics = max_batch, max_wait_seconds, metrics
        self._alone = alone
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._since: float | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    async def ask(self, kind: Hashable, item: Any, ticket: str | None = None) -> tuple[Any, int]:
        """(what became of the item, how many were computed together). Raises what computing it raised, and `Stopped`.

        Cancelling the caller takes the item out of the line.
        """
        job = Job(kind, item, ticket, time.monotonic())
        with self._changed:
            if self._stopping:
                raise Stopped
            self._jobs.append(job)
            self._changed.notify()
        try:
            made: tuple[Any, int] = await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            with self._changed:
                if job in self._jobs:
                    self._jobs.remove(job)
            raise
        return made

    def position(self, ticket: str) -> int | None:
        """1 for the oldest job that waits; None for a ticket that none of them has."""
        with self._changed:
            return next((place for place, job in enumerate(self._jobs, 1) if job.ticket == ticket), None)

    def __len__(self) -> int:
        """Jobs that wait."""
        return len(self._jobs)

    def busy_seconds(self) -> float:
        """For how long the pass that is under way has taken; 0 between passes."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def close(self, seconds: float = 10.0) -> None:
        """Lets the pass under way end, and refuses all that waits."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)
        while self._jobs:
            _fail(self._jobs.popleft(), Stopped())

    def _run(self) -> None:
        self._before()
        while jobs := self._take():
            self._since = time.monotonic()
            try:
                made = self._compute(jobs[0].kind, [job.item for job in jobs])
                assert len(made) == len(jobs)
            except Exception as error:
                self._settle_failed(jobs, error)
            else:
                for job, one in zip(jobs, made, strict=True):
                    job.future.set_result((one, len(jobs)))
            finally:
                self.metrics.model_seconds.inc(time.monotonic() - self._since)
                self._since = None

    def _settle_failed(self, jobs: list[Job], error: Exception) -> None:
        """One bad item must not fail the others that happened to be in its batch: each is tried alone."""
        if len(jobs) == 1:
            _fail(jobs[0], error)
            return
        for job in jobs:
            try:
                job.future.set_result((self._compute(job.kind, [job.item])[0], 1))
            except Exception as alone:
                _fail(job, alone)

    def _take(self) -> list[Job]:
        """The next jobs, of one kind, marked as begun; none when the service ends."""
        with self._changed:
            while True:
                while not self._jobs and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return []
                self._wait_for_more()
                if not self._jobs:  # all have given up
                    continue
                kind = self._jobs[0].kind
                most = 1 if kind == self._alone else self.max_batch
                taken: list[Job] = []
                left: deque[Job] = deque()
                for job in self._jobs:
                    if job.kind == kind and len(taken) < most:
                        taken.append(job)
                    else:
                        left.append(job)
                self._jobs = left
                begun = [job for job in taken if job.future.set_running_or_notify_cancel()]
                if begun:
                    self.metrics.batch.labels(str(kind)).observe(len(begun))
                    return begun

    def _wait_for_more(self) -> None:
        end = self._jobs[0].arrived + self.max_wait_seconds
        while len(self._jobs) < self.max_batch and not self._stopping and self._coming():
            left = end - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return


def _fail(job: Job, error: Exception) -> None:
    if not job.future.done():
        job.future.set_exception(error)
