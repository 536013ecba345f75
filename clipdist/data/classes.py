"""Which samples of a split have which value of a field: made once, kept beside the set, memory mapped.

A sidecar file, little endian: a header of 64 bytes (`HEADER`), the classes' counts (uint64), the samples' numbers class
by class, ascending within each (uint32, or uint64 beyond 2^32 samples), and the classes' names as JSON.
"""

import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import xxhash

from clipdist.data.shards import BadSample, Split, fsync_folder
from clipdist.errors import UserError, disk_errors
from clipdist.progress import progress
from clipdist.user_cache import user_cache

logger = logging.getLogger(__name__)

MAGIC = b"CDCLASS1"
HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("identity", "S16"),
        ("classes", "<u8"),
        ("members", "<u8"),
        ("left_out", "<u8"),
        ("name_bytes", "<u8"),
        ("number_bytes", "<u8"),
    ]
)
assert HEADER.itemsize == 64
# Code of a sample that cannot be read.
NONE = 0xFFFFFFFF
# Neighbours in the set that stay together when a class is shuffled, so that reads keep some locality; more of them in
# a set so large that its blocks would fill the memory.
BLOCK = 64
MAX_BLOCKS = 1 << 19
# Below this, starting processes takes longer than reading.
SAMPLES_FOR_PROCESSES = 100_000
MAX_PROCESSES = 8
SHOWN = 3


class ClassTable:
    """The classes of a split in the order of their first samples. `counts`: int64 [K]; `members` of a class ascend."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = np.fromfile(path, HEADER, 1)[0]
        classes, members = int(header["classes"]), int(header["members"])
        self.left_out = int(header["left_out"])
        self.counts = np.fromfile(path, "<u8", classes, offset=HEADER.itemsize).astype(np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        self._members_at = HEADER.itemsize + 8 * classes
        self._number = np.dtype(f"<u{int(header['number_bytes'])}")
        self._names_at = self._members_at + members * self._number.itemsize

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    @cached_property
    def _members(self) -> np.ndarray:
        return np.memmap(self.path, self._number, "r", self._members_at, (int(self.counts.sum()),))

    @cached_property
    def names(self) -> list[str]:
        with open(self.path, "rb") as file:
            file.seek(self._names_at)
            return json.loads(file.read())

    def members(self, number: int, own: np.ndarray) -> np.ndarray:
        """Sample numbers in the split, int64, of the `own`-th samples of a class."""
        return self._members[self.starts[number] + own].astype(np.int64)


class ClassSources:
    """The classes of one split, or of each part of a mixture one after another; see `mixing.Sources`."""

    def __init__(self, tables: Sequence[ClassTable], offsets: Sequence[int]) -> None:
        self.sizes = np.concatenate([table.counts for table in tables])
        self._tables, self._offsets = list(tables), list(offsets)
        self._firsts = np.cumsum([0, *(len(table.counts) for table in tables)])
        # Whole multiples of BLOCK, so that few samples more do not cut everything anew.
        self._block = BLOCK * max(1, -(-int(self.sizes.sum()) // (BLOCK * MAX_BLOCKS)))

    def blocks(self, source: int) -> np.ndarray:
        size = int(self.sizes[source])
        return np.diff(np.minimum(np.arange(-(-size // self._block) + 1) * self._block, size))

    def numbers(self, source: int, own: np.ndarray) -> np.ndarray:
        part = int(np.searchsorted(self._firsts, source, side="right")) - 1
        return self._offsets[part] + self._tables[part].members(source - int(self._firsts[part]), own)


def class_shares(counts: np.ndarray, temperature: float) -> np.ndarray:
    """Shares of classes of n samples each, proportional to n^(1/T); float64, of sum 1.

    Temperature sampling, as for the languages of multilingual models: Arivazhagan et al. 2019, "Massively Multilingual
    Neural Machine Translation in the Wild" (arXiv:1907.05019), section 4. T = 1 leaves the set as it is; the larger T,
    the more equal the classes.
    """
    raised = (counts / counts.max()) ** (1 / temperature)
    return raised / raised.sum()


def class_table(split: Split, field: str) -> ClassTable:
    """The classes of `split` by `field`, read from the sidecar file; made first where that is missing or stale.

    Several processes may ask at once: one makes it, the others wait. Samples whose JSON cannot be read belong to no
    class, and are named in a warning. Raises `UserError` when samples lack the field.
    """
    identity = _identity(split, field)
    beside = split.folder / f"{split.name}-{xxhash.xxh3_64_hexdigest(field.encode())}.classes"
    cached = user_cache("classes") / f"{identity}.classes"
    for path in (beside, cached):
        if _sound(path, identity):
            return ClassTable(path)
    writable = split.folder.is_dir() and os.access(split.folder, os.W_OK)
    path = beside if writable else cached
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            if not _sound(path, identity):
                _make(split, field, identity, path)
    return ClassTable(path)


@dataclass
class FieldValues:
    """What a field says of each sample of a split: `codes`, int64 [N], number the `names`, and are -1 for the `lacking`
    samples without the field and the `unreadable` ones."""

    codes: np.ndarray
    names: list[str]
    lacking: int
    unreadable: int

    def counts(self) -> dict[str, int]:
        """name -> samples, the commonest first."""
        counts = np.bincount(self.codes[self.codes >= 0], minlength=len(self.names))
        order = np.argsort(-counts, kind="stable")
        return {self.names[code]: int(counts[code]) for code in order}


def field_values(split: Split, field: str) -> FieldValues:
    """The values of `field`, read from every sample's JSON; nothing is kept."""
    codes_of: dict[str, int] = {}
    codes, lacking, unreadable = [np.zeros(0, np.int64)], 0, 0
    for found in _read_all(split, field):
        lacking, unreadable = lacking + found.lacking, unreadable + len(found.unreadable)
        table = np.array([codes_of.setdefault(name, len(codes_of)) for name in found.names] + [-1], np.int64)
        codes.append(table[np.minimum(found.codes, len(found.names))])
    return FieldValues(np.concatenate(codes), list(codes_of), lacking, unreadable)


def _identity(split: Split, field: str) -> str:
    """16 hexadecimal digits of what decides the classes."""
    return xxhash.xxh3_64_hexdigest(f"{split.name}\0{field}\0{split.digest}".encode())


def _sound(path: Path, identity: str) -> bool:
    try:
        header, size = np.fromfile(path, HEADER, 1), path.stat().st_size
    except OSError:
        return False
    if len(header) != 1 or header["magic"][0] != MAGIC or header["identity"][0] != identity.encode():
        return False
    one = header[0]
    body = 8 * int(one["classes"]) + int(one["members"]) * int(one["number_bytes"]) + int(one["name_bytes"])
    return size == HEADER.itemsize + body


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@dataclass
class _Found:
    """What one shard told: a code per sample, `NONE` for the unreadable, and the name of each code."""

    codes: np.ndarray  # uint32
    names: list[str]
    lacking: int
    first_lacking: str
    unreadable: list[str]


def _make(split: Split, field: str, identity: str, path: Path) -> None:
    numbers = np.dtype("<u4" if len(split) <= 1 << 32 else "<u8")
    codes_of: dict[str, int] = {}
    counts = np.zeros(0, np.int64)
    lacking, first_lacking, left_out, unreadable = 0, "", 0, list[str]()
    ends = np.concatenate([[0], np.cumsum(split.samples_per_shard)]).tolist()
    with tempfile.TemporaryFile(dir=path.parent) as scratch:
        scratch.truncate(max(1, 4 * len(split)))
        codes = np.memmap(scratch, np.uint32, "r+", shape=(max(1, len(split)),))
        found_all = progress(
            _read_all(split, field), total=len(split.shards), unit="shard", description=f"classes by {field}"
        )
        for (start, stop), found in zip(pairwise(ends), found_all, strict=True):
            lacking, first_lacking = lacking + found.lacking, first_lacking or found.first_lacking
            left_out, unreadable = left_out + len(found.unreadable), (unreadable + found.unreadable)[:SHOWN]
            table = np.array([codes_of.setdefault(name, len(codes_of)) for name in found.names] + [NONE], np.uint32)
            codes[start:stop] = table[np.minimum(found.codes, len(found.names))]
            counts = np.pad(counts, (0, len(codes_of) - len(counts)))
            counts += np.bincount(codes[start:stop][codes[start:stop] != NONE], minlength=len(counts))
        if lacking:
            raise UserError(
                f"{split.folder}: data.balance={field}: {lacking} of {len(split)} samples of split {split.name!r}, "
                f"such as {first_lacking}, have no field {field!r}; name a field that every sample has"
            )
        if not codes_of:
            raise UserError(
                f"{split.folder}: data.balance={field}: split {split.name!r} has no readable sample; "
                f"run: clipdist verify {split.folder}"
            )
        if left_out:
            logger.warning(
                "%s: %d samples without readable fields are in no class of %s and left out: %s%s",
                split.folder,
                left_out,
                field,
                "; ".join(unreadable),
                "; …" if left_out > SHOWN else "",
            )
        _write(path, identity, counts, list(codes_of), codes, ends, left_out, numbers)


def _write(
    path: Path,
    identity: str,
    counts: np.ndarray,
    names: list[str],
    codes: np.ndarray,
    ends: list[int],
    left_out: int,
    numbers: np.dtype,
) -> None:
    """A counting sort by class, shard by shard, straight into the file."""
    told = json.dumps(names, ensure_ascii=False).encode()
    members, members_at = int(counts.sum()), HEADER.itemsize + 8 * len(counts)
    header = np.zeros(1, HEADER)
    header[0] = (MAGIC, identity.encode(), len(counts), members, left_out, len(told), numbers.itemsize)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w+b") as file:
        file.write(header.tobytes() + counts.astype("<u8").tobytes())
        file.truncate(members_at + members * numbers.itemsize)
        file.flush()
        placed = np.memmap(file, numbers, "r+", members_at, (members,))
        free = np.cumsum(counts) - counts
        for start, stop in pairwise(ends):
            own = np.array(codes[start:stop])
            order = np.argsort(own, kind="stable")[: int((own != NONE).sum())]  # NONE is the largest
            ordered = own[order]
            found, first, count = np.unique(ordered, return_index=True, return_counts=True)
            placed[free[ordered] + np.arange(len(ordered)) - np.repeat(first, count)] = start + order
            free[found] += count
        placed.flush()
        file.seek(0, os.SEEK_END)
        file.write(told)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    fsync_folder(path.parent)


def _read_all(split: Split, field: str) -> Iterator[_Found]:
    processes = min(MAX_PROCESSES, os.cpu_count() or 1)
    shards = range(len(split.shards))
    if len(split) < SAMPLES_FOR_PROCESSES or processes == 1:
        yield from (_read_shard(split, field, shard) for shard in shards)
        return
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(split, field)
    ) as pool:
        yield from pool.map(_read_in_process, shards, chunksize=4)


_work: tuple[Split, str]


def _begin(split: Split, field: str) -> None:
    # Sent once to each process: with each shard it would be most of the traffic.
    global _work
    _work = split, field


def _read_in_process(shard: int) -> _Found:
    return _read_shard(*_work, shard)


def _read_shard(split: Split, field: str, number: int) -> _Found:
    if not split.samples_per_shard[number]:
        return _Found(np.zeros(0, np.uint32), [], 0, "", [])
    shard = split.shard(number)
    found = _Found(np.full(shard.index.samples, NONE, np.uint32), [], 0, "", [])
    codes: dict[str, int] = {}
    for row in range(shard.index.samples):
        try:
            fields = shard.fields(row)
        except BadSample as error:
            found.unreadable.append(f"{shard.index.key(row)}: {error}")
            continue
        if field in fields:
            found.codes[row] = codes.setdefault(str(fields[field]), len(codes))
        else:
            found.lacking += 1
            found.first_lacking = found.first_lacking or shard.index.key(row)
    found.names = list(codes)
    return found
