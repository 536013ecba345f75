"""Which samples make up the global batch of a step: a pure function of the shard set and a few numbers.

Nothing here knows of ranks, nodes or workers, so that every world size sees the same batches, and any step
is found at once: resuming needs a step number and nothing else.

How an epoch is laid out, with N samples, a global batch of B and L lanes:

1. The shards are shuffled and joined into one virtual line of N positions, rotated by a random amount, of
   which the first (N // B)·B are used. The rotation makes the few samples left out differ each epoch, also
   when there is a single shard.
2. The line is cut into L lanes of equal length. A lane may begin and end inside a shard.
3. Each lane is shuffled in windows that span several shards.
4. Global batch number `step` takes the next B / L samples of each lane. Rows are in lane order, so that a rank
   that takes a run of rows touches few lanes, and so few shards.

Time and memory to find any step: one sort of the shard numbers per epoch (memory linear in shards, not samples)
and one sort per window.
"""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import xxhash

from clipdist.errors import UserError

MAX_LANES = 64
MIN_WINDOW = 16_384
SHARDS_PER_WINDOW = 4
MAX_WINDOW_ENTRIES = 4_000_000


def philox(*parts: int | str) -> np.random.Philox:
    """The counter-based generator keyed by `parts`: equal parts give equal streams, whatever ran before."""
    text = "\0".join(map(str, parts))
    return np.random.Philox(key=xxhash.xxh3_128_intdigest(text.encode()))


def sample_generator(seed: int, times_round: int, key: str) -> np.random.Generator:
    """Draws every random choice about one sample (caption, crop, flip, noise) in one pass over its source."""
    return np.random.Generator(philox("sample", seed, times_round, key))


def shuffled(size: int, *parts: int | str) -> np.ndarray:
    """A permutation of range(size), int64, that depends on `parts` alone.

    Sorts raw generator output: NumPy promises that raw streams never change between versions, and does not
    promise it for `Generator.permutation`.
    """
    return np.argsort(philox(*parts).random_raw(size), kind="stable")


def default_window(samples_per_shard: np.ndarray) -> int:
    """Samples per shuffle window: several shards, and never so few that neighbours in the tar stay neighbours."""
    mean = math.ceil(samples_per_shard.sum() / max(1, len(samples_per_shard)))
    return max(MIN_WINDOW, SHARDS_PER_WINDOW * mean)


def default_lanes(samples: int, global_batch: int, window: int) -> int:
    """As many lanes, up to `MAX_LANES`, as keep a whole window in each and `MAX_WINDOW_ENTRIES` in all; 1 for a small
    set: one full shuffle."""
    lanes = math.gcd(global_batch, MAX_LANES)
    while lanes > 1 and (samples // lanes < window or lanes * window > MAX_WINDOW_ENTRIES):
        lanes //= 2
    return lanes


class Rows(NamedTuple):
    """Samples in row order, and how often the walk has been round each one's source before: 0 the first time."""

    numbers: np.ndarray  # int64 [n]: in the split
    passes: np.ndarray  # int64 [n]


class SampleOrder(ABC):
    """step of the run -> the samples of its global batch. Steps count from the start of the run, not of an epoch."""

    samples: int
    seed: int
    global_batch: int
    steps_per_epoch: int
    lanes: int
    window: int

    def batch(self, step: int) -> Rows:
        """The global batch, B rows."""
        return self.rows(step, 0, self.global_batch)

    @abstractmethod
    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Rows start..stop of the global batch."""

    @abstractmethod
    def replacement(self, step: int, row: int, attempt: int) -> tuple[int, int]:
        """(number, pass) of the sample that stands in for an unreadable one, at the `attempt`-th trial."""


class Windows:
    """Shuffles of windows, kept while there is room for `entries` numbers in all; at least the latest is kept."""

    def __init__(self, entries: int) -> None:
        self._room, self._kept = entries, OrderedDict[tuple[int | str, ...], np.ndarray]()

    def permutation(self, size: int, *parts: int | str) -> np.ndarray:
        """`shuffled(size, "window", *parts)`, in the smallest unsigned type that holds it."""
        found = self._kept.get(parts)
        if found is not None:
            self._kept.move_to_end(parts)
            return found
        found = shuffled(size, "window", *parts).astype(np.min_scalar_type(max(0, size - 1)))
        self._kept[parts] = found
        self._room -= size
        while self._room < 0 and len(self._kept) > 1:
            self._room += len(self._kept.popitem(last=False)[1])
        return found


class Line:
    """The samples of a source in one line per pass: its blocks (shards) shuffled and joined, and the line rotated.

    Args:
        counts: int64, samples of each block; the source's samples are numbered from 0 in block order.
        parts: what the shuffles depend on, beside the pass.
    """

    def __init__(self, counts: np.ndarray, *parts: int | str) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self._parts = parts
        self._starts = np.cumsum(self.counts) - self.counts
        self._laid: OrderedDict[int, tuple[np.ndarray, np.ndarray, int]] = OrderedDict()

    def numbers(self, times_round: int, positions: np.ndarray) -> np.ndarray:
        """Positions on a pass's line -> sample numbers of the source, int64."""
        shards, ends, rotation = self._lay(times_round)
        rotated = (positions + rotation) % self.samples
        place = np.searchsorted(ends, rotated, side="right")
        shard = shards[place]
        return self._starts[shard] + rotated - (ends[place] - self.counts[shard])

    def _lay(self, times_round: int) -> tuple[np.ndarray, np.ndarray, int]:
        if times_round not in self._laid:
            shards = shuffled(len(self.counts), "shards", *self._parts, times_round)
            rotation = int(philox("rotation", *self._parts, times_round).random_raw()) % self.samples
            self._laid[times_round] = shards, np.cumsum(self.counts[shards]), rotation
            if len(self._laid) > 2:  # a batch may lie in two passes
                self._laid.popitem(last=False)
        return self._laid[times_round]


class Order(SampleOrder):
    """The order of one split in which each epoch is one pass over it.

    Args:
        samples_per_shard: int64, one count per shard, in manifest order.
        seed, global_batch: as in the recipe.
        lanes: divides `global_batch`; 0 chooses by the set's size.
        window: samples shuffled together within a lane; 0 chooses by the shards' size.

    Raises `UserError` when the split has fewer samples than the global batch or the lanes do not divide it.
    """

    def __init__(
        self, samples_per_shard: np.ndarray, *, seed: int, global_batch: int, lanes: int = 0, window: int = 0
    ) -> None:
        self._line = Line(samples_per_shard, seed)
        self.samples, self.seed, self.global_batch = self._line.samples, seed, global_batch
        self.window = window or default_window(self._line.counts)
        self.lanes = lanes or default_lanes(self.samples, global_batch, self.window)
        if global_batch % self.lanes:
            raise UserError(
                f"data.lanes={self.lanes} must divide train.global_batch={global_batch}; set data.lanes=0 to choose"
            )
        self.steps_per_epoch = whole_steps(self.samples, global_batch)
        self.rows_per_lane = global_batch // self.lanes
        self.lane_length = self.steps_per_epoch * self.rows_per_lane
        # A batch may lie in two windows of each lane; more than that is looked up again.
        self._windows = Windows(2 * self.lanes * min(self.window, self.lane_length))

    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Rows start..stop of the global batch; the pass is the epoch."""
        assert step >= 0, step
        assert 0 <= start <= stop <= self.global_batch
        epoch, step = divmod(step, self.steps_per_epoch)
        parts = []
        first = start
        while first < stop:
            lane, row = divmod(first, self.rows_per_lane)
            size = min(stop - first, self.rows_per_lane - row)
            parts.append(self._positions(epoch, lane, step * self.rows_per_lane + row, size))
            first += size
        positions = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return Rows(self._line.numbers(epoch, positions), np.full(stop - start, epoch, np.int64))

    def replacement(self, step: int, row: int, attempt: int) -> tuple[int, int]:
        """The `attempt`-th sample after an unreadable one in its lane, round the end, and the pass."""
        epoch, step = divmod(step, self.steps_per_epoch)
        lane, row_in_lane = divmod(row, self.rows_per_lane)
        position = (step * self.rows_per_lane + row_in_lane + attempt) % self.lane_length
        return int(self._line.numbers(epoch, self._positions(epoch, lane, position, 1))[0]), epoch

    def _positions(self, epoch: int, lane: int, start: int, size: int) -> np.ndarray:
        """Where on the epoch's line `size` consecutive shuffled positions of a lane lie, int64."""
        assert start + size <= self.lane_length
        found = np.empty(size, np.int64)
        done = 0
        while done < size:
            number, offset = divmod(start + done, self.window)
            first = number * self.window
            length = min(self.window, self.lane_length - first)
            within = self._windows.permutation(length, self.seed, epoch, lane, number)
            taken = within[offset : offset + size - done]
            found[done : done + len(taken)] = taken
            found[done : done + len(taken)] += lane * self.lane_length + first
            done += len(taken)
        return found


def whole_steps(samples: int, global_batch: int) -> int:
    """Steps of an epoch; `UserError` when the samples do not fill one."""
    if samples < global_batch:
        raise UserError(
            f"the training split has {samples} samples, fewer than train.global_batch={global_batch}; "
            f"set train.global_batch to at most {samples}"
        )
    return samples // global_batch


def share(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """The run of rows [start, stop) that a rank takes; sizes differ by at most one, every row belongs to one rank."""
    return total * rank // world_size, total * (rank + 1) // world_size


def consumed_hash(step: int, key: str) -> int:
    """What one consumed sample adds to the digest: 64 bits of (step, key)."""
    return xxhash.xxh3_64_intdigest(f"{step}\0{key}".encode())
