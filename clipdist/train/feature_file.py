"""Rows of features in files, found by a key of what they were computed from.

A file is appended to by one rank in one epoch, and consists of records, one for the new rows of a forward pass:

    header   magic, dtype, width, bytes of a row, rows, and the xxh3-64 of all these and the keys: 40 bytes
    keys     16 bytes for each row
    rows     each with its xxh3-64 before it, 8 bytes, and then the values as they lie in memory

A record counts only when all of it is there, so that the new rows of a forward pass are kept together or not at all.
What a kill leaves of a last one is cut off when its rank opens the file again, and passed over by all others.
"""

import logging
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from clipdist.data.shards import fsync_folder
from clipdist.errors import UserError, disk_errors

logger = logging.getLogger(__name__)

MAGIC = b"cdfeat01"
HEADER = struct.Struct("<8s8sIIQ")
KEY_BYTES, SUM_BYTES, CHECKSUM_BYTES = 16, 8, 8
START = HEADER.size + CHECKSUM_BYTES


class Layout(NamedTuple):
    """What the rows of a file are: `width` values of torch's `dtype`, `row_bytes` together."""

    dtype: str
    width: int
    row_bytes: int

    @property
    def stride(self) -> int:
        """From one row to the next."""
        return SUM_BYTES + self.row_bytes


@dataclass
class Records:
    """What of a file is whole."""

    keys: bytes
    """One behind the other."""
    offsets: np.ndarray
    """int64 [n]: where each row's checksum lies, before the row itself."""
    layout: Layout | None
    end: int
    """Bytes of the whole records."""


def pack(keys: Sequence[bytes], rows: np.ndarray, layout: Layout) -> bytes:
    """One record; `rows` is uint8 [n, row_bytes]."""
    assert rows.shape == (len(keys), layout.row_bytes)
    header = HEADER.pack(MAGIC, layout.dtype.encode(), layout.width, layout.row_bytes, len(keys))
    body = np.empty((len(keys), layout.stride), np.uint8)
    sums = [xxhash.xxh3_64_intdigest(row) for row in rows]
    body[:, :SUM_BYTES] = np.array(sums, "<u8").view(np.uint8).reshape(-1, SUM_BYTES)
    body[:, SUM_BYTES:] = rows
    joined = b"".join(keys)
    return b"".join((header, _checksum(header, joined), joined, body.tobytes()))


def _checksum(header: bytes, keys: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(header + keys).to_bytes(CHECKSUM_BYTES, "little")


def read_records(path: Path, *, check_rows: bool) -> Records:
    """The whole records from the beginning of a file up to the first that is none. Without `check_rows` the rows
    themselves are not read; `checked` is for whoever takes one."""
    found = Records(b"", np.zeros(0, np.int64), None, 0)
    all_keys, all_offsets = [], [found.offsets]
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while len(header := file.read(HEADER.size)) == HEADER.size:
            magic, dtype, width, row_bytes, count = HEADER.unpack(header)
            layout = Layout(dtype.rstrip(b"\0").decode("ascii", "replace"), width, row_bytes)
            rows_at = found.end + START + count * KEY_BYTES
            end = rows_at + count * layout.stride
            if magic != MAGIC or end > size or layout != (found.layout or layout):
                break
            checksum, keys = file.read(CHECKSUM_BYTES), file.read(count * KEY_BYTES)
            if checksum != _checksum(header, keys):
                break
            if check_rows:
                body = file.read(count * layout.stride)
                if not all(_is_sound(body[n : n + layout.stride]) for n in range(0, len(body), layout.stride)):
                    break
            all_keys.append(keys)
            all_offsets.append(np.arange(rows_at, end, layout.stride))
            found.layout, found.end = layout, end
            file.seek(end)
    found.keys, found.offsets = b"".join(all_keys), np.concatenate(all_offsets)
    return found


def _is_sound(row: bytes | memoryview) -> bool:
    return xxhash.xxh3_64_intdigest(row[SUM_BYTES:]) == int.from_bytes(bytes(row[:SUM_BYTES]), "little")


def checked(row: bytes | memoryview, path: Path) -> bytes | memoryview:
    """`row`, as it lies in the file, without its checksum; `UserError` when that is another."""
    if not _is_sound(row):
        raise UserError(
            f"{path}: a row of features there does not equal its checksum; remove {path.parent} and start again: "
            f"they are computed anew"
        )
    return row[SUM_BYTES:]


class OwnFile:
    """The file that this rank appends to in the running epoch. It is made when there is something to write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets: dict[bytes, int] = {}
        self.layout: Layout | None = None
        self._descriptor, self._end, self._unsynced = -1, 0, False
        if path.exists():
            with disk_errors(path.parent):
                self._reopen()

    def _reopen(self) -> None:
        found = read_records(self.path, check_rows=True)
        keys = (found.keys[n : n + KEY_BYTES] for n in range(0, len(found.keys), KEY_BYTES))
        self.offsets = dict(zip(keys, found.offsets.tolist(), strict=True))
        self.layout, self._end = found.layout, found.end
        self._descriptor = os.open(self.path, os.O_RDWR)
        if torn := os.fstat(self._descriptor).st_size - found.end:
            logger.info("%s: cut off %d bytes of a record that was not written to its end", self.path, torn)
            os.ftruncate(self._descriptor, found.end)
            self._unsynced = True

    def append(self, keys: Sequence[bytes], rows: np.ndarray, layout: Layout) -> None:
        """Writes one record. `UserError` when the disk is full."""
        assert layout == (self.layout or layout), "one tower gives rows of one kind"
        with disk_errors(self.path.parent):
            if self._descriptor < 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            left, at = memoryview(pack(keys, rows, layout)), self._end
            while left:
                written = os.pwrite(self._descriptor, left, at)
                left, at = left[written:], at + written
        rows_at = self._end + START + len(keys) * KEY_BYTES
        self.offsets.update(zip(keys, range(rows_at, at, layout.stride), strict=True))
        self.layout, self._end, self._unsynced = layout, at, True

    def row(self, key: bytes) -> bytes | memoryview:
        """The bytes of a row that `offsets` has."""
        assert self.layout is not None
        return checked(os.pread(self._descriptor, self.layout.stride, self.offsets[key]), self.path)

    def sync(self) -> None:
        """Returns when what was appended survives a power cut."""
        if self._unsynced:
            with disk_errors(self.path.parent):
                os.fsync(self._descriptor)
                fsync_folder(self.path.parent)
            self._unsynced = False

    def close(self) -> None:
        self.sync()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Index:
    """Keys -> where their rows lie, for files that do not change any more; sorted arrays, 24 bytes a row.

    Of equal keys, that of the file given first, and there the first, counts.
    """

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.layout: Layout | None = None
        self._high, self._low = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        self._places = np.zeros(0, np.int64)  # in all files, laid one behind the other
        self._starts = [0]  # where each of them begins there
        self._maps: dict[int, tuple[mmap.mmap, memoryview]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def add(self, paths: Sequence[Path]) -> None:
        """Takes in further files."""
        keys, places = [_pairs(b"")], [np.zeros(0, np.int64)]
        for path in paths:
            found = read_records(path, check_rows=False)
            keys.append(_pairs(found.keys))
            places.append(found.offsets + self._starts[-1])
            self.paths.append(path)
            self._starts.append(self._starts[-1] + found.end)
            assert found.layout in (None, self.layout or found.layout), "one tower gives rows of one kind"
            self.layout = self.layout or found.layout
        new = np.concatenate(keys)
        if not len(new):
            return
        high, low = np.concatenate([self._high, new[:, 0]]), np.concatenate([self._low, new[:, 1]])
        order = np.lexsort((low, high))  # stable: of equal ones, the first stays the first
        high, low = high[order], low[order]
        first = np.ones(len(order), bool)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        self._high, self._low = high[first], low[first]
        self._places = np.concatenate([self._places, *places])[order][first]

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """int64 [n]: a place for `rows`, or -1."""
        if not len(self) or not keys:
            return np.full(len(keys), -1, np.int64)
        wanted = _pairs(b"".join(keys))
        left = np.searchsorted(self._high, wanted[:, 0], "left")
        right = np.searchsorted(self._high, wanted[:, 0], "right")
        for n in np.nonzero(right - left > 1)[0]:  # halves of different keys that happen to be equal
            left[n] += np.searchsorted(self._low[left[n] : right[n]], wanted[n, 1])
        at = np.minimum(left, len(self) - 1)
        there = (self._high[at] == wanted[:, 0]) & (self._low[at] == wanted[:, 1])
        return np.where(there, self._places[at], -1)

    def rows(self, places: np.ndarray) -> list[bytes | memoryview]:
        """The bytes of the rows at places that `find` gave. `UserError` when one is damaged."""
        files = np.searchsorted(self._starts, places, "right") - 1
        offsets = places - np.array(self._starts)[files]
        assert self.layout is not None
        stride, wanted = self.layout.stride, list(zip(files.tolist(), offsets.tolist(), strict=True))
        for file, offset in wanted:  # the disk is asked for all of them before the first is waited for
            page = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map(file)[0].madvise(mmap.MADV_WILLNEED, page, offset + stride - page)
        return [checked(self._map(file)[1][offset : offset + stride], self.paths[file]) for file, offset in wanted]

    def _map(self, file: int) -> tuple[mmap.mmap, memoryview]:
        if file not in self._maps:
            with open(self.paths[file], "rb") as opened:
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[file] = mapped, memoryview(mapped)
        return self._maps[file]


def _pairs(keys: bytes) -> np.ndarray:
    """uint64 [n, 2]: the two halves of each key."""
    return np.frombuffer(keys, "<u8").reshape(-1, 2)
