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
from functools import lru_cache

import numpy as np
import xxhash

from clipdist.errors import UserError

MAX_LANES = 64
MIN_WINDOW = 16_384
SHARDS_PER_WINDOW = 4


def philox(*parts: int | str) -> np.random.Philox:
    """The counter-based generator keyed by `parts`: equal parts give equal streams, whatever ran before."""
    text = "\0".join(map(str, parts))
    return np.random.Philox(key=xxhash.xxh3_128_intdigest(text.encode()))


def sample_generator(seed: int, epoch: int, key: str) -> np.random.Generator:
    """Draws every random choice about one sample (caption, crop, flip, noise) in one epoch."""
    return np.random.Generator(philox("sample", seed, epoch, key))


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
    """As many lanes, up to `MAX_LANES`, as keep a whole window in each; 1 for a small set: one full shuffle."""
    lanes = math.gcd(global_batch, MAX_LANES)
    while lanes > 1 and samples // lanes < window:
        lanes //= 2
    return lanes


class Order:
    """(epoch, step) -> sample numbers of the global batch, for one split.

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
        counts = np.asarray(samples_per_shard, dtype=np.int64)
        self.samples, self.seed, self.global_batch = int(counts.sum()), seed, global_batch
        self.window = window or default_window(counts)
        self.lanes = lanes or default_lanes(self.samples, global_batch, self.window)
        if global_batch % self.lanes:
            raise UserError(
                f"data.lanes={self.lanes} must divide train.global_batch={global_batch}; set data.lanes=0 to choose"
            )
        self.steps_per_epoch = self.samples // global_batch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"the training split has {self.samples} samples, fewer than train.global_batch={global_batch}; "
                f"set train.global_batch to at most {self.samples}"
            )
        self.rows_per_lane = global_batch // self.lanes
        self.lane_length = self.steps_per_epoch * self.rows_per_lane
        self._counts = counts
        self._starts = np.cumsum(counts) - counts
        self._line = lru_cache(maxsize=2)(self._lay_line)
        # A batch may lie in two windows of each lane; more than that is looked up again.
        self._window = lru_cache(maxsize=2 * self.lanes + 2)(self._shuffle_window)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Sample numbers of the global batch, int64 [B]."""
        return self.rows(epoch, step, 0, self.global_batch)

    def rows(self, epoch: int, step: int, start: int, stop: int) -> np.ndarray:
        """Sample numbers of rows start..stop of the global batch, int64; `step` counts from 0 in the epoch."""
        assert 0 <= step < self.steps_per_epoch, f"step {step} of {self.steps_per_epoch}"
        assert 0 <= start <= stop <= self.global_batch
        parts = []
        while start < stop:
            lane, row = divmod(start, self.rows_per_lane)
            size = min(stop - start, self.rows_per_lane - row)
            parts.append(self.lane_samples(epoch, lane, step * self.rows_per_lane + row, size))
            start += size
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def replacement(self, epoch: int, step: int, row: int, attempt: int) -> int:
        """The sample that stands in for an unreadable one: the `attempt`-th after it in its lane, round the end."""
        lane, row_in_lane = divmod(row, self.rows_per_lane)
        position = (step * self.rows_per_lane + row_in_lane + attempt) % self.lane_length
        return int(self.lane_samples(epoch, lane, position, 1)[0])

    def lane_samples(self, epoch: int, lane: int, position: int, size: int) -> np.ndarray:
        """Sample numbers at `size` consecutive shuffled positions of a lane, int64."""
        assert position + size <= self.lane_length
        found = np.empty(size, np.int64)
        done = 0
        while done < size:
            number, offset = divmod(position + done, self.window)
            taken = self._window(epoch, lane, number)[offset : offset + size - done]
            found[done : done + len(taken)] = taken
            done += len(taken)
        return found

    def _shuffle_window(self, epoch: int, lane: int, number: int) -> np.ndarray:
        start = number * self.window
        size = min(self.window, self.lane_length - start)
        within = shuffled(size, "window", self.seed, epoch, lane, number)
        return self._resolve(epoch, lane * self.lane_length + start + within)

    def _resolve(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Positions on the epoch's virtual line -> sample numbers of the split."""
        shards, ends, rotation = self._line(epoch)
        rotated = (positions + rotation) % self.samples
        place = np.searchsorted(ends, rotated, side="right")
        shard = shards[place]
        return self._starts[shard] + rotated - (ends[place] - self._counts[shard])

    def _lay_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        shards = shuffled(len(self._counts), "shards", self.seed, epoch)
        rotation = int(philox("rotation", self.seed, epoch).random_raw()) % self.samples
        return shards, np.cumsum(self._counts[shards]), rotation


def share(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """The run of rows [start, stop) that a rank takes; sizes differ by at most one, every row belongs to one rank."""
    return total * rank // world_size, total * (rank + 1) // world_size


def consumed_hash(step: int, key: str) -> int:
    """What one consumed sample adds to the digest: 64 bits of (step, key)."""
    return xxhash.xxh3_64_intdigest(f"{step}\0{key}".encode())
