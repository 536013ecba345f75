"""Fetches the shards of a remote set before the loader asks for them, in the order in which it will."""

import copy
import logging
import threading
from collections import deque
from collections.abc import Iterator

import numpy as np

from clipdist.data.order import SampleOrder
from clipdist.data.shard_cache import CacheFull, Held, Stopped
from clipdist.data.shards import Split
from clipdist.errors import UserError

logger = logging.getLogger(__name__)

# A shard not needed for so many steps may have been removed from the cache, and is announced again.
FORGET_STEPS = 256


def upcoming_shards(
    order: SampleOrder, split: Split, start: int, stop: int, first_step: int, steps: int
) -> Iterator[tuple[int, int]]:
    """(step, shard) for rows start..stop of the global batches first_step..steps, a shard at the step that needs it
    first. Works on a copy of `order`, so that another thread may read it."""
    ends = np.cumsum(split.samples_per_shard)
    return _upcoming(copy.deepcopy(order), ends, start, stop, first_step, steps)


def _upcoming(
    order: SampleOrder, ends: np.ndarray, start: int, stop: int, first_step: int, steps: int
) -> Iterator[tuple[int, int]]:
    needed = np.full(len(ends), -FORGET_STEPS - 1, np.int64)  # the step that needed each shard last
    for step in range(first_step, steps):
        shards, first = np.unique(np.searchsorted(ends, order.rows(step, start, stop).numbers, "right"), True)
        new = step - needed[shards] > FORGET_STEPS
        needed[shards] = step
        for shard in shards[new][np.argsort(first[new])].tolist():
            yield step, shard


class ReadAhead:
    """A thread that keeps up to `shards` shards ready beyond the current step, and holds them in the cache until then.

    Start it after the loader's workers were forked, call `advance` once per step, and close it (or use `with`). A shard
    that it cannot fetch is named in a warning and left to the reader, which tries again and raises.
    """

    def __init__(self, split: Split, upcoming: Iterator[tuple[int, int]], shards: int) -> None:
        self._split, self._upcoming, self._room = split, upcoming, shards
        self._step, self._closed = -1, False
        self._ready: deque[tuple[int, Held]] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def advance(self, step: int) -> None:
        """The loader has delivered `step`: what it needed is let go. Raises what broke the thread, if anything did."""
        with self._changed:
            if self._error:
                raise self._error
            self._step = step
            while self._ready and self._ready[0][0] <= step:
                self._ready.popleft()[1].close()
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after the read in progress, and lets all shards go."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        while self._ready:
            self._ready.popleft()[1].close()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            for step, shard in self._upcoming:
                if not self._fetch(step, shard):
                    return
        except BaseException as error:
            self._error = error

    def _fetch(self, step: int, shard: int) -> bool:
        """Fetches one shard once there is room for it; False when closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._room)
                seen = self._step
                if self._closed:
                    return False
                if step <= seen:
                    return True  # the reader was faster
            try:
                held = self._split.hold(shard, lambda: self._closed)
            except Stopped:
                return False
            except CacheFull as error:
                with self._changed:
                    if not self._ready:
                        logger.warning("not read ahead: %s", error)
                    # Whatever the reader lets go of makes room.
                    self._changed.wait_for(lambda then=seen: self._closed or self._step > then)  # type: ignore[misc]
                continue
            except UserError as error:
                logger.warning("not read ahead: %s", error)
                return True
            if held is None:
                return True
            with self._changed:
                if step > self._step:
                    self._ready.append((step, held))
                    return True
            held.close()
            return True
