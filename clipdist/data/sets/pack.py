"""Image-text pairs -> a shard set: every image verified, every pair that cannot be packed listed with its reason."""

import csv
import io
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from clipdist.data.sets.recode import ImageOptions, ImageSource, UnusableImage, recode_all
from clipdist.data.sets.writer import ShardSetWriter, UnusableSample
from clipdist.data.shards import write_atomically
from clipdist.errors import UserError, disk_errors
from clipdist.progress import progress

REJECTED = "rejected.csv"
SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNK = 4  # images handed to a worker at once: few, because results wait in memory for their turn
# More where they are so small that handing them over would cost as much as the work: as many as take this long.
CHUNK_SECONDS, LARGEST_CHUNK = 0.01, 256


@dataclass(frozen=True, slots=True)
class Pair:
    """One image with its captions. `fields` (label, unit, source, anything JSON) is stored beside the captions."""

    key: str
    image: ImageSource
    text: list[str]
    fields: dict[str, Any] = field(default_factory=dict)
    row: int | None = None  # where it came from: data row of a table, the first being 1

    @property
    def image_name(self) -> str:
        return f"{len(self.image)} bytes" if isinstance(self.image, bytes) else str(self.image)


@dataclass(frozen=True, slots=True)
class Rejected:
    """One pair that was not packed; a line of `rejected.csv`."""

    row: int | None
    key: str
    image: str
    reason: str

    @staticmethod
    def of(pair: Pair, reason: str) -> "Rejected":
        return Rejected(pair.row, pair.key, pair.image_name, reason)

    def __str__(self) -> str:
        where = self.image or self.key or "a pair"
        return f"{where}: {self.reason}" if self.row is None else f"row {self.row} ({where}): {self.reason}"


@dataclass(frozen=True)
class PackSummary:
    """What a packing made. `units` is empty when no pair names one; `straddling` counts units in several splits;
    `left_out` counts sound pairs that were not wanted."""

    folder: Path
    samples: dict[str, int]
    shards: dict[str, int]
    bytes: int
    units: dict[str, int]
    straddling: int
    rejected: list[Rejected]
    left_out: int = 0

    @property
    def total(self) -> int:
        return sum(self.samples.values())

    @property
    def fractions(self) -> dict[str, float]:
        return {name: count / self.total for name, count in self.samples.items()}

    def __str__(self) -> str:
        """A few lines for people; the last says how many pairs were rejected."""
        lines = [
            f"{self.folder}: {_counted(self.total, 'sample')} in {_counted(sum(self.shards.values()), 'shard')}, "
            f"{self.bytes / 2**20:,.1f} MiB"
        ]
        width = max(len(name) for name in self.samples)
        for name, samples in self.samples.items():
            units = f", {_counted(self.units[name], 'unit')}" if self.units else ""
            lines.append(
                f"  {name:<{width}}  {samples:>9,}  {self.fractions[name]:7.2%}  "
                f"{_counted(self.shards[name], 'shard')}{units}"
            )
        if self.straddling:
            lines.append(f"warning: {_counted(self.straddling, 'unit')} in more than one split; scores would leak")
        given = self.total + len(self.rejected) + self.left_out
        if self.rejected:
            share = len(self.rejected) / given
            lines.append(f"rejected: {len(self.rejected):,} of {given:,} ({share:.2%}), see {self.folder / REJECTED}")
        else:
            lines.append(f"rejected: none of {given:,}")
        return "\n".join(lines)


def pack_pairs(
    pairs_by_split: Mapping[str, Sequence[Pair]],
    folder: Path,
    *,
    images: ImageOptions | None = None,
    samples_per_shard: int = 1000,
    shard_mib: float | None = None,
    zstd: bool = False,
    workers: int | None = None,
    license_text: str = "",
    command: list[str] | None = None,
    sources: dict[str, str] | None = None,
    notes: dict[str, Any] | None = None,
    overwrite: bool = False,
    seed: int = 0,
    shuffle: bool = True,
    rejected: Sequence[Rejected] = (),
    left_out: int = 0,
    beside: Mapping[str, bytes] | None = None,
    max_rejected_fraction: float = 0.05,
    quiet: bool = False,
) -> PackSummary:
    """Writes a shard set into `folder`; the same bytes for any number of workers.

    Within each split the samples are shuffled once with `seed`, so that a shard is not one class (`shuffle=False`
    keeps their order). `workers` processes decode and encode; None takes one for each available core, 0 uses this
    process, as does packing that decodes nothing. Pairs without a caption, with a key that was there before, with an
    image that is missing, damaged or too large, and those of which a shard cannot hold key, caption or fields (see
    `ShardSetWriter.write`) are left out and listed in `folder/rejected.csv` (row, key, image, reason), after the ones
    given as `rejected`. Raises `UserError`, and leaves no manifest, when nothing is left, when
    more than `max_rejected_fraction` of all pairs are rejected, and when the disk is full. All pairs are those given,
    those rejected, and `left_out` that were found sound but not wanted. `beside` are further files of the set, by name;
    the manifest's notes hold their checksums.

    As with any use of processes, a script that calls this with workers needs `if __name__ == "__main__":`.
    """
    images = images or ImageOptions()
    if not 0 <= max_rejected_fraction <= 1:
        raise UserError(f"largest rejected fraction: found {max_rejected_fraction}, expected 0 to 1")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected a folder, or a name that is free")
    refused = Refused(folder, list(rejected), max_rejected_fraction)
    refused.total = len(refused.found) + sum(map(len, pairs_by_split.values())) + left_out
    jobs = _usable(pairs_by_split, refused, seed, shuffle)
    tally = Tally(dict.fromkeys(pairs_by_split, 0))
    # Where nothing is decoded, handing images from process to process costs more than it saves.
    workers = available_cores() if workers is None else workers
    workers = min(workers, -(-len(jobs) // CHUNK)) if images.decodes else 0
    writer = ShardSetWriter(
        folder,
        samples_per_shard=samples_per_shard,
        shard_mib=shard_mib,
        zstd=zstd,
        license_text=license_text,
        command=command,
        sources=sources,
        notes={**(notes or {}), "images": asdict(images), "order_seed": seed if shuffle else None},
        overwrite=overwrite,
    )
    results = in_order(partial(recode_all, options=images), [pair.image for _, pair in jobs], workers)
    # Closed, so that an error here ends the workers at once rather than with the last reference to the traceback.
    with disk_errors(folder, lambda: needed(tally.total, len(jobs), tally.bytes)), writer, closing(results):
        refused.check()
        shown = progress(jobs, unit="pair", description=f"packing {folder.name}", quiet=quiet)
        for (split, pair), result in zip(shown, results, strict=True):
            if isinstance(result, UnusableImage):
                refused.add(Rejected.of(pair, str(result)))
            elif reason := _write_pair(writer, split, pair, *result):
                refused.add(Rejected.of(pair, reason))
            else:
                tally.add(split, pair, len(result[0]))
        if not tally.total:
            refused.fail("nothing could be packed")
        refused.save()
        writer.manifest.notes["rejected"] = len(refused.found)
        _write_beside(writer, beside or {})
    shards = {name: len(writer.manifest.splits.get(name, [])) for name in pairs_by_split}
    written = sum(shard.bytes for found in writer.manifest.splits.values() for shard in found)
    told = (tally.units(), tally.straddling(), refused.found, left_out)
    return PackSummary(folder, tally.samples, shards, written, *told)


def _write_pair(writer: ShardSetWriter, split: str, pair: Pair, image: bytes, extension: str) -> str:
    """Writes it, or tells why no shard can hold it."""
    text = pair.text[0] if len(pair.text) == 1 else pair.text
    try:
        writer.write(split, pair.key, image, extension, {**pair.fields, "text": text})
    except UnusableSample as error:
        return str(error)
    return ""


def _write_beside(writer: ShardSetWriter, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        write_atomically(writer.folder / name, content)
        writer.manifest.notes.setdefault("files", {})[name] = xxhash.xxh3_64_hexdigest(content)


def needed(done: int, total: int, size: int) -> str:
    """How much a set of `total` samples is likely to need, of which `done` took `size` bytes."""
    need = f"about {size * total / done / 2**20:,.0f} MiB" if done else "an unknown amount"
    return f"after {done:,} of {total:,} samples; the whole set needs {need}"


def available_cores() -> int:
    """Cores this process may use: a SLURM step or a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Refused:
    """The rejected pairs so far, and the limit at which packing is given up."""

    def __init__(self, folder: Path, found: list[Rejected], limit: float, what: str = "pairs") -> None:
        self.folder, self.found, self.limit, self.what, self.total = folder, found, limit, what, 0

    def add(self, rejected: Rejected) -> None:
        self.found.append(rejected)
        self.check()

    def check(self) -> None:
        """Gives up as soon as the outcome is certain: a wrong image folder should not cost a pass over all rows."""
        if self.total and len(self.found) == self.total:
            self.fail("nothing could be packed")
        if len(self.found) > self.limit * self.total:
            self.fail(
                f"{len(self.found):,} of {self.total:,} {self.what} rejected so far, above the limit of "
                f"{self.limit:.2%}"
            )

    def fail(self, what: str) -> None:
        self.save()
        first = "; ".join(map(str, self.found[:3])) or f"there were no {self.what}"
        cure = f"the rejected ones so far are in {self.folder / REJECTED}; " if self.found else ""
        raise UserError(f"{self.folder}: {what}: {first}; {cure}mend them, or raise --max-rejected")

    def save(self) -> None:
        path = self.folder / REJECTED
        path.unlink(missing_ok=True)
        if self.found:
            text = io.StringIO(newline="")
            table = csv.writer(text)
            table.writerow(["row", "key", "image", "reason"])
            in_order = sorted(self.found, key=lambda rejected: rejected.row or 0)
            table.writerows(["" if r.row is None else r.row, r.key, r.image, r.reason] for r in in_order)
            # Half a character, of which keys, paths and their reasons may hold some, is written as \ud800.
            write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


@dataclass
class Tally:
    samples: dict[str, int]
    bytes: int = 0
    splits_of_unit: dict[Any, int] = field(default_factory=dict)  # one bit for each split

    def add(self, split: str, pair: Pair, size: int) -> None:
        self.samples[split] += 1
        self.bytes += size
        if pair.fields.get("unit") is not None:
            unit, bit = pair.fields["unit"], 1 << list(self.samples).index(split)
            self.splits_of_unit[unit] = self.splits_of_unit.get(unit, 0) | bit

    @property
    def total(self) -> int:
        return sum(self.samples.values())

    def units(self) -> dict[str, int]:
        if not self.splits_of_unit:
            return {}
        held = Counter(self.splits_of_unit.values())
        return {
            name: sum(count for bits, count in held.items() if bits >> number & 1)
            for number, name in enumerate(self.samples)
        }

    def straddling(self) -> int:
        return sum(bits.bit_count() > 1 for bits in self.splits_of_unit.values())


def _usable(
    pairs_by_split: Mapping[str, Sequence[Pair]], refused: Refused, seed: int, shuffle: bool
) -> list[tuple[str, Pair]]:
    """Pairs with a caption and a key of their own, in the order they will be written."""
    keys: set[str] = set()
    jobs: list[tuple[str, Pair]] = []
    for split, pairs in pairs_by_split.items():
        if not SPLIT_NAME.fullmatch(split):
            raise UserError(f"split name: found {split!r}, expected letters, digits, _ and -")
        chosen = []
        for pair in pairs:
            if not any(text.strip() for text in pair.text):
                refused.found.append(Rejected.of(pair, "empty caption"))
            elif pair.key in keys:
                refused.found.append(Rejected.of(pair, f"duplicate key {pair.key}"))
            else:
                keys.add(pair.key)
                chosen.append((split, pair))
        if shuffle:
            # A string seed is hashed the same on every machine; the name makes splits independent of each other.
            random.Random(f"{seed}/{split}").shuffle(chosen)
        jobs += chosen
    return jobs


def in_order(
    work: Callable[[list[Item]], list[Result]], items: Sequence[Item], workers: int, size: int = CHUNK
) -> Generator[Result, None, None]:
    """`work` on all items by `workers` processes (0: this one), `size` at a time, or more where that takes no time; the
    results in the items' order.

    At most a few chunks for each worker are under way or waiting. Raises `UserError` when a process is killed.
    """
    if workers <= 0:
        for at in range(0, len(items), size):
            yield from work(list(items[at : at + size]))
        return
    # Spawned, not forked: a forked copy of a process with threads (torch, OpenMP) may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    under_way: deque[Future[tuple[list[Result], float]]] = deque()
    at, now = 0, size
    try:
        while at < len(items) or under_way:
            while at < len(items) and len(under_way) < 3 * workers:
                under_way.append(pool.submit(_timed, work, list(items[at : at + now])))
                at += now
            results, seconds = under_way.popleft().result()
            now = max(size, min(LARGEST_CHUNK, 2 * now, int(CHUNK_SECONDS * len(results) / max(seconds, 1e-9))))
            yield from results
    except BrokenProcessPool:
        raise UserError(
            f"a process that decodes images died, most likely for lack of memory; found {workers} workers, "
            f"try fewer (--workers), or 0 to see the image at fault"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _timed(work: Callable[[list[Item]], list[Result]], chunk: list[Item]) -> tuple[list[Result], float]:
    """The results, and how many seconds each chunk took."""
    began = time.perf_counter()
    return work(chunk), time.perf_counter() - began


def start_worker() -> None:
    """Interrupts are the parent's to handle; and no worker outlives a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _counted(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'' if count == 1 else 's'}"
