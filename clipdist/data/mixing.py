"""Several sources drawn from by their shares: the shard sets of a mixture, the classes of a balanced set.

How a run is laid out, with K sources of shares w_k, and a global batch of B:

1. By the end of step n, source k has given C_k(n) rows. The sources lie one after another on a line of length B, each
   w_k·B long; step v takes the sources that the B points θ_v, θ_v + 1, θ_v + 2, … hit, with θ_v = v/φ modulo 1 and φ
   the golden ratio (systematic sampling with a low-discrepancy start). So every C_k(n) is within 1 + 0.63·ln n rows of
   n·w_k·B (twice the star discrepancy of the sequence, 3 / (20 ln φ)·ln n: Dupain and Sós, 1984), which is 6 in a
   thousand steps and 10 in a million, and is found at once as a sum of floors.
2. `round_steps` steps make a round; what the sources owe in a round is dealt to the B rows of its steps. A source that
   owes a whole column (one row in each step) gets that row of the batch for the round. What is left, less than a column
   for each source, is joined in random order, cut into columns, and each column is shuffled, so that rare sources meet
   others in every round. In each batch a source has less than two rows more or fewer than its mean over the round.
3. A source's rows, one after another, are its stream; the stream walks through the source's samples in passes, each
   shuffled as `order.Order` shuffles an epoch: shards, then windows. No sample is left out of a pass. Within a round
   the stream is read at several places at once, as an epoch is in lanes.

Nothing here knows of ranks and workers, and any step is found at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from clipdist.data.classes import ClassSources, class_shares, class_table
from clipdist.data.order import (
    MAX_WINDOW_ENTRIES,
    MIN_WINDOW,
    Line,
    Order,
    Rows,
    SampleOrder,
    Windows,
    default_window,
    philox,
    shuffled,
    whole_steps,
)
from clipdist.data.shards import RawSample, ShardFile, ShardInfo, ShardSet, Split
from clipdist.errors import UserError
from clipdist.settings import settings

if TYPE_CHECKING:
    from clipdist.data.config import DataConfig
    from clipdist.data.shard_cache import Held

ROUND_ROWS = 1 << 20
MAX_ROUND_ROWS = 1 << 22
# Resolution of the shares, and the step 1/φ in that resolution: neighbours in Fibonacci's sequence, whose quotient is
# closest to 1/φ, and which have no common divisor.
UNIT, GOLDEN_STEP = 1_836_311_903, 1_134_903_170
LINES_KEPT = 4096


@settings
class MixEntry:
    """One shard set of a mixture."""

    set: str
    """Folder of the shard set."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Share of each batch, relative to the others'; by default (for all sets alike) the number of samples."""
    name: str = ""
    """What the keys of its samples begin with; by default the folder's name."""

    @property
    def called(self) -> str:
        return self.name or called(self.set)


def called(location: str) -> str:
    """The last part of a folder's path or of a URL."""
    return location.rstrip("/").rpartition("/")[2] if "://" in location else Path(location).resolve().name


class Sources(Protocol):
    """What a `MixedOrder` draws from. Samples of a source are numbered from 0."""

    sizes: np.ndarray
    """int64 [K]: samples of each source, at least one."""

    def blocks(self, source: int) -> np.ndarray:
        """int64: sizes of the blocks of neighbouring samples that are shuffled as a whole."""

    def numbers(self, source: int, own: np.ndarray) -> np.ndarray:
        """Numbers in the source -> numbers in the split, int64."""


class SetSources:
    """The shard sets of a mixture, whose splits lie one after another in a `MixedSplit`."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self._splits = splits
        self.sizes = np.array([len(split) for split in splits], np.int64)
        self._offsets = np.cumsum(self.sizes) - self.sizes

    def blocks(self, source: int) -> np.ndarray:
        return self._splits[source].samples_per_shard

    def numbers(self, source: int, own: np.ndarray) -> np.ndarray:
        return self._offsets[source] + own


class _Round(NamedTuple):
    """The rows of S consecutive steps."""

    first: int  # step of the run
    given: np.ndarray  # int64 [K]: rows that each source gave before
    source_SB: np.ndarray  # uint32
    place_SB: np.ndarray  # int64: in the source's stream


class MixedOrder(SampleOrder):
    """The order in which each batch holds each source by its share, whatever the source's size.

    An epoch has as many steps as the samples of all sources fill. `shares` are relative. `window` 0 chooses by the size
    of the source's blocks. There are no lanes: rounds take their place.

    Raises `UserError` when there are fewer samples than the global batch.
    """

    def __init__(self, sources: Sources, shares: np.ndarray, *, seed: int, global_batch: int, window: int = 0) -> None:
        self._shares = shares
        self.sources, self.seed, self.global_batch = sources, seed, global_batch
        self.samples = int(sources.sizes.sum())
        self.steps_per_epoch = whole_steps(self.samples, global_batch)
        self.lanes, self.window = 1, window
        shares = np.asarray(shares, np.float64)
        assert len(shares) == len(sources.sizes)
        assert shares.min() > 0
        assert sources.sizes.min() > 0
        ends = np.cumsum(shares / shares.sum())
        self._ends = np.rint(np.concatenate([[0.0], ends / ends[-1]]) * global_batch * UNIT).astype(np.int64)
        rows = min(max(ROUND_ROWS, 2 * len(shares)), MAX_ROUND_ROWS)
        self.round_steps = max(1, min(self.steps_per_epoch, rows // global_batch))
        self._given = lru_cache(maxsize=2)(self._count_given)
        self._round = lru_cache(maxsize=2)(self._lay_round)
        self._walk = lru_cache(maxsize=LINES_KEPT)(self._begin_walk)
        self._windows = Windows(MAX_WINDOW_ENTRIES)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MixedOrder":
        # Caches of methods would be shared with the copy, which another thread may use.
        return MixedOrder(
            self.sources, self._shares, seed=self.seed, global_batch=self.global_batch, window=self.window
        )

    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Rows start..stop of the global batch; the pass is that of each row's source."""
        assert step >= 0, step
        assert 0 <= start <= stop <= self.global_batch
        source, place = self._places(step, start, stop)
        size = self.sources.sizes[source]
        passes, positions = place // size, place % size
        numbers = np.empty(stop - start, np.int64)
        by_source = np.argsort(source, kind="stable")
        sorted_source = source[by_source]
        for rows in np.split(by_source, np.flatnonzero(np.diff(sorted_source)) + 1) if stop > start else []:
            numbers[rows] = self._numbers(int(source[rows[0]]), passes[rows], positions[rows])
        return Rows(numbers, passes)

    def replacement(self, step: int, row: int, attempt: int) -> tuple[int, int]:
        """The `attempt`-th sample after an unreadable one in its source's stream, and its pass.

        A source that has been gone through as a whole hands on to the next source: one unreadable sample may be all
        that a class has.
        """
        found, place = self._places(step, row, row + 1)
        source, sizes = int(found[0]), self.sources.sizes
        while attempt >= sizes[source]:
            attempt -= int(sizes[source])
            source = (source + 1) % len(sizes)
            place = self._round_of(step).given[source : source + 1]
        times_round, position = divmod(int(place[0]) + attempt, int(sizes[source]))
        return int(self._numbers(source, np.array([times_round]), np.array([position]))[0]), times_round

    def sources_of(self, step: int) -> np.ndarray:
        """The source of each row of the global batch, int64 [B]."""
        return self._places(step, 0, self.global_batch)[0]

    def _round_of(self, step: int) -> _Round:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        begin = step_in_epoch - step_in_epoch % self.round_steps
        first = epoch * self.steps_per_epoch + begin
        return self._round(first, min(self.round_steps, self.steps_per_epoch - begin))

    def _places(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, place in the source's stream) of rows start..stop."""
        laid = self._round_of(step)
        return laid.source_SB[step - laid.first, start:stop], laid.place_SB[step - laid.first, start:stop]

    def _count_given(self, step: int) -> np.ndarray:
        """Rows that each source gave before `step`: C_k, int64 [K]; they add up to step·B."""
        assert step < UNIT
        # Step v takes ceil(c - θ) points below c; θ's own floor is the same for all c and cancels in the difference.
        return -np.diff(floor_sums(step, UNIT, GOLDEN_STEP, -self._ends))

    def _lay_round(self, first: int, steps: int) -> _Round:
        given = self._given(first)
        owed = self._given(first + steps) - given
        source_SB = self._deal(first, steps, owed)
        # In the order of steps and rows, how many rows of the same source come before?
        by_source = np.argsort(source_SB.reshape(-1), kind="stable")
        source = np.repeat(np.arange(len(owed)), owed)
        nth = np.arange(len(source)) - np.repeat(np.cumsum(owed) - owed, owed)
        # A source that the round does not carry into another pass is read at as many places, far apart, as it has rows
        # in a step: many shards meet in a batch, as lanes let them. Elsewhere this could put a sample twice in a batch.
        sizes = self.sources.sizes
        apart = np.where(given // sizes == (given + owed - 1) // sizes, np.maximum(1, owed // steps), 1)
        length = owed // apart
        spread = nth % apart[source] * length[source] + nth // apart[source]
        place = np.where(nth < (apart * length)[source], spread, nth) + given[source]
        place_SB = np.empty(steps * self.global_batch, np.int64)
        place_SB[by_source] = place
        return _Round(first, given, source_SB, place_SB.reshape(steps, self.global_batch))

    def _deal(self, first: int, steps: int, owed: np.ndarray) -> np.ndarray:
        """The source of each row of a round, uint32 [S, B]; each source gets as many rows as it owes."""
        columns, left = np.divmod(owed, steps)
        shared = self.global_batch - int(columns.sum())
        source_SB = np.empty((steps, self.global_batch), np.uint32)
        # Columns of a source lie evenly over the rows, so that every rank reads about its share of each source.
        own = np.repeat(np.arange(len(owed)), columns)
        nth = np.arange(len(own)) - np.repeat(np.cumsum(columns) - columns, columns)
        where = np.concatenate([(nth + 0.5) / columns[own], (np.arange(shared) + 0.5) / max(1, shared)])
        rows = np.argsort(np.argsort(where, kind="stable"), kind="stable")
        source_SB[:, rows[: len(own)]] = own
        rest = np.flatnonzero(left)
        rest = rest[shuffled(len(rest), "rest", self.seed, first)]
        raw = philox("columns", self.seed, first).random_raw(shared * steps).reshape(shared, steps)
        turn = np.argsort(raw, axis=1, kind="stable")
        mixed = np.repeat(rest, left[rest]).astype(np.uint32).reshape(shared, steps)
        source_SB[:, rows[len(own) :]] = np.take_along_axis(mixed, turn, axis=1).T
        return source_SB

    def _numbers(self, source: int, passes: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Positions in passes over a source -> numbers in the split, int64."""
        own = np.empty(len(passes), np.int64)
        size = int(self.sources.sizes[source])
        if size <= (self.window or MIN_WINDOW):  # one window: its shuffle is all there is to do
            for times_round in set(passes.tolist()):
                rows = passes == times_round
                within = self._windows.permutation(size, self.seed, "source", source, times_round)
                own[rows] = within[positions[rows]]
            return self.sources.numbers(source, own)
        line, window = self._walk(source)
        # Rows of a source in a batch lie in one pass and few windows, mostly.
        pairs = passes * (line.samples // window + 1) + positions // window
        for pair in np.unique(pairs).tolist():
            times_round, number = divmod(pair, line.samples // window + 1)
            rows = pairs == pair
            first = number * window
            size = min(window, line.samples - first)
            within = self._windows.permutation(size, self.seed, "source", source, times_round, number)
            own[rows] = line.numbers(times_round, first + within[positions[rows] - first].astype(np.int64))
        return self.sources.numbers(source, own)

    def _begin_walk(self, source: int) -> tuple[Line, int]:
        blocks = self.sources.blocks(source)
        return Line(blocks, self.seed, "source", source), self.window or default_window(blocks)


def floor_sums(terms: int, modulus: int, factor: int, offsets: np.ndarray) -> np.ndarray:
    """Σ over v < terms of floor((factor·v + offset) / modulus) for each offset, int64, in O(log modulus).

    The Euclid-like recursion that swaps modulus and factor; `terms`, `modulus` and `factor` at most 2^31.
    """
    total = np.zeros(len(offsets), np.int64)
    count, offsets = np.full(len(offsets), terms, np.int64), offsets.astype(np.int64)
    while True:
        total += count * (count - 1) // 2 * (factor // modulus) + count * (offsets // modulus)
        factor, offsets = factor % modulus, offsets % modulus
        count, offsets = np.divmod(factor * count + offsets, modulus)
        if not count.any():
            return total
        modulus, factor = factor, modulus


def order_of(split: Split, config: "DataConfig", *, seed: int, global_batch: int) -> SampleOrder:
    """Which samples make up each batch of a run over `split`, by the recipe's mixture, balance, lanes and window.

    Raises `UserError` as the orders do, and where samples lack the field to balance by.
    """
    if not isinstance(split, MixedSplit) and not config.balance:
        return Order(
            split.samples_per_shard, seed=seed, global_batch=global_batch, lanes=config.lanes, window=config.window
        )
    if config.lanes:
        raise UserError(
            f"data.lanes={config.lanes}: the order of data.mix and data.balance has no lanes; set data.lanes=0"
        )
    parts = split.splits if isinstance(split, MixedSplit) else [split]
    if config.balance:
        tables = [class_table(part, config.balance) for part in parts]
        sources: Sources = ClassSources(tables, np.cumsum([0, *map(len, parts)]).tolist())
        sizes = [int(table.counts.sum()) for table in tables]
        within = [class_shares(table.counts, config.balance_temperature) for table in tables]
    else:
        sources, sizes, within = SetSources(parts), [len(part) for part in parts], [np.ones(1)] * len(parts)
    given = [entry.weight for entry in config.mix] or [None]
    weights = [size if weight is None else weight for size, weight in zip(sizes, given, strict=True)]
    shares = np.concatenate([weight * one for weight, one in zip(weights, within, strict=True)])
    return MixedOrder(sources, shares, seed=seed, global_batch=global_batch, window=config.window)


class _MixedShards(Sequence[ShardInfo]):
    """The shards of all parts one after another, each named with its set."""

    def __init__(self, names: Sequence[str], splits: Sequence[Split]) -> None:
        self._names, self._splits = names, splits
        self._ends = np.cumsum([len(split.shards) for split in splits])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, number: int) -> tuple[int, int]:
        """Shard number -> (part, shard number in that part)."""
        part = int(np.searchsorted(self._ends, number, side="right"))
        return part, number - int(self._ends[part]) + len(self._splits[part].shards)

    def __getitem__(self, number: Any) -> Any:
        part, own = self.place(number)
        info = self._splits[part].shards[own]
        return replace(info, file=f"{self._names[part]}/{info.file}")


class MixedSplit(Split):
    """Splits of several shard sets as one, numbered part after part. A key is the set's name, `/` and the key there.

    `folder` names all the folders: it is for messages.
    """

    def __init__(self, name: str, names: Sequence[str], splits: Sequence[Split]) -> None:
        self.name, self.names, self.splits = name, list(names), list(splits)
        for split in splits:
            split.max_open_shards = max(1, Split.max_open_shards // len(splits))
        self.folder = Path(" + ".join(str(split.folder) for split in splits))
        self.shards = _MixedShards(self.names, self.splits)  # type: ignore[assignment]
        self.samples_per_shard = np.concatenate([split.samples_per_shard for split in splits])
        self._ends = np.cumsum(self.samples_per_shard)
        self._offsets = np.cumsum([0, *map(len, splits)])

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "names": self.names, "splits": self.splits}

    def __setstate__(self, state: Any) -> None:
        self.__init__(state["name"], state["names"], state["splits"])  # type: ignore[misc]

    def part(self, number: int) -> tuple[int, int]:
        """Sample number -> (part, sample number in that part)."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = int(np.searchsorted(self._offsets, number, side="right")) - 1
        return part, number - int(self._offsets[part])

    def shard(self, number: int) -> ShardFile:
        part, own = self.shards.place(number)  # type: ignore[attr-defined]
        return self.splits[part].shard(own)

    @property
    def is_remote(self) -> bool:
        return any(split.is_remote for split in self.splits)

    def hold(self, number: int, stopped: Callable[[], bool] = lambda: False) -> "Held | None":
        part, own = self.shards.place(number)  # type: ignore[attr-defined]
        return self.splits[part].hold(own, stopped)

    def records(self, number: int) -> np.ndarray:
        part, own = self.shards.place(number)  # type: ignore[attr-defined]
        return self.splits[part].records(own)

    def let_go(self) -> None:
        for split in self.splits:
            split.let_go()

    def key(self, number: int) -> str:
        part, own = self.part(number)
        return f"{self.names[part]}/{self.splits[part].key(own)}"

    def read(self, number: int) -> RawSample:
        part, own = self.part(number)
        sample = self.splits[part].read(own)
        return replace(sample, key=f"{self.names[part]}/{sample.key}")

    def fields(self, number: int) -> dict[str, Any]:
        part, own = self.part(number)
        return self.splits[part].fields(own)


class Mixture:
    """The shard sets that a recipe names: one in `data.set`, or several in `data.mix`."""

    def __init__(self, sets: Sequence[ShardSet], names: Sequence[str]) -> None:
        self.sets, self.names = list(sets), list(names)

    @staticmethod
    def open(config: "DataConfig", opener: Callable[..., ShardSet] = ShardSet.open) -> "Mixture":
        """Raises `UserError` when a set cannot be opened, two have one name, or some have weights and others none.

        `opener` takes a folder or URL, `check` and `remote`: training passes one that indexes foreign tars first.
        """

        def opened(location: str) -> ShardSet:
            return opener(location, check=config.checksums, remote=config.remote)

        if not config.mix:
            return Mixture([opened(config.set)], [called(config.set)])
        names = [entry.called for entry in config.mix]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"data.mix: two sets are called {name!r}; give them a `name` each")
        given = [entry.weight for entry in config.mix if entry.weight is not None]
        if given and len(given) < len(names):
            raise UserError(
                f"data.mix: found {len(given)} weights for {len(names)} sets; give each set its weight, or none "
                f"(then the number of samples is the weight)"
            )
        return Mixture([opened(entry.set) for entry in config.mix], names)

    def training(self, split: str) -> Split:
        """The split that all sets must have."""
        splits = [one.split(split) for one in self.sets]
        for part in splits:
            if not len(part) and len(splits) > 1:
                raise UserError(f"{part.folder}: split {split!r} has no samples; take the set out of data.mix")
        return splits[0] if len(splits) == 1 else MixedSplit(split, self.names, splits)

    def validation(self, split: str) -> Split:
        """The split in all sets that have it, one after another; `UserError` when none has it."""
        having = [number for number, one in enumerate(self.sets) if split in one.manifest.splits]
        if len(self.sets) == 1 or not having:
            return self.sets[0].split(split)
        return MixedSplit(split, [self.names[i] for i in having], [self.sets[i].split(split) for i in having])

    @property
    def folder(self) -> str:
        return " + ".join(one.location for one in self.sets)

    @property
    def digest(self) -> str:
        return "+".join(one.manifest.digest for one in self.sets)

    @property
    def license(self) -> str:
        return "; ".join(dict.fromkeys(one.manifest.license for one in self.sets if one.manifest.license))

    @property
    def notes(self) -> dict[str, Any]:
        if len(self.sets) == 1:
            return self.sets[0].manifest.notes
        return {name: one.manifest.notes for name, one in zip(self.names, self.sets, strict=True)}
