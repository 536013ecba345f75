"""The index beside a shard: where each sample's members lie, and what they must be.

Little endian: a header of 64 bytes (`HEADER`), one record of 64 bytes per sample (`RECORD`), then the keys one after
another in UTF-8. Records are read where they lie, so an index costs no memory. Each holds a checksum over itself, the
key and the members.
"""

import os
import re
import struct
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from clipdist.errors import UserError

MAGIC = b"CDINDEX2"
OLD_MAGIC = b"CDINDEX1"  # no checksums: it is named in an error, never read

HEADER = np.dtype(
    [("magic", "S8"), ("samples", "<u8"), ("tar_bytes", "<u8"), ("key_bytes", "<u8"), ("zstd", "u1"), ("_", "V31")]
)
RECORD = np.dtype(
    [
        ("frame_offset", "<u8"),
        ("image_offset", "<u8"),
        ("json_offset", "<u8"),
        ("text_offset", "<u8"),
        ("key_offset", "<u4"),
        ("frame_size", "<u4"),
        ("image_size", "<u4"),
        ("json_size", "<u4"),
        ("text_size", "<u4"),
        ("checksum", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("key_size", "<u2"),
        ("image_kind", "u1"),
        ("_", "V1"),
    ]
)
assert HEADER.itemsize == 64
assert RECORD.itemsize == 64
assert RECORD.fields is not None
CHECKSUM_AT = RECORD.fields["checksum"][1]
# The members of a sample, in the order in which their bytes count into its checksum.
MEMBERS = ("image", "json", "text")
MAX_MEMBER_BYTES = (1 << 32) - 1

# Position in this tuple is what an index stores: append only.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif")


class BadSample(Exception):
    """One sample cannot be used; the message says why. The loader counts it, names it and takes the next."""


class Entry(NamedTuple):
    """A record of an index in plain integers; the fields of `RECORD`."""

    frame_offset: int
    image_offset: int
    json_offset: int
    text_offset: int
    key_offset: int
    frame_size: int
    image_size: int
    json_size: int
    text_size: int
    checksum: int
    width: int
    height: int
    key_size: int
    image_kind: int


_RECORD = struct.Struct("<4Q6I3HBx")
assert _RECORD.size == RECORD.itemsize


def index_path(shard: Path) -> Path:
    """`x.tar` and `x.tar.zst` -> `x.idx`."""
    return shard.with_name(re.sub(r"\.tar(\.zst)?$", ".idx", shard.name))


def sample_checksum(row: int, record: bytes, key: bytes, members: Iterable[bytes]) -> int:
    """Low 32 bits of xxh3-64, seeded with the number of the row, over the record with checksum 0, the key, and the
    image, JSON and text members. The seed tells a record that took another's place."""
    hasher = xxhash.xxh3_64(record[:CHECKSUM_AT] + bytes(4) + record[CHECKSUM_AT + 4 :], seed=row)
    hasher.update(key)
    for member in members:
        hasher.update(member)
    return hasher.intdigest() & 0xFFFFFFFF


def index_bytes(records: np.ndarray, keys: list[str], tar_bytes: int, zstd: bool) -> bytes:
    """Serialises an index. `records` has dtype `RECORD`, one row per key, complete with key places and checksums."""
    joined = "".join(keys).encode()
    header = np.zeros(1, HEADER)
    header["magic"], header["samples"], header["tar_bytes"] = MAGIC, len(keys), tar_bytes
    header["key_bytes"], header["zstd"] = len(joined), zstd
    assert int(records["key_size"].sum(dtype=np.int64)) == len(joined)
    return header.tobytes() + records.tobytes() + joined


class ShardIndex:
    """The index of one shard. `records` is a read-only, memory-mapped array of dtype `RECORD`, for whoever wants
    columns; `entry` reads one sample's record and key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{path}: the index is missing; run: clipdist index {path.parent}") from None
        size = os.fstat(self._descriptor).st_size
        start = os.pread(self._descriptor, HEADER.itemsize, 0)
        header = np.frombuffer(start, HEADER, 1) if len(start) == HEADER.itemsize else np.zeros(1, HEADER)
        if header["magic"][0] == OLD_MAGIC:
            raise UserError(
                f"{path}: an index without checksums, of an earlier version; run: clipdist index {path.parent} "
                f"(or pack the set again)"
            )
        if header["magic"][0] != MAGIC:
            raise UserError(f"{path}: not a shard index; run: clipdist index {path.parent}")
        self.samples = int(header["samples"][0])
        self.tar_bytes = int(header["tar_bytes"][0])
        self.zstd = bool(header["zstd"][0])
        self._keys_at = HEADER.itemsize + self.samples * RECORD.itemsize
        if size != self._keys_at + int(header["key_bytes"][0]):
            raise UserError(
                f"{path}: found {size} bytes, expected {self._keys_at + int(header['key_bytes'][0])}; "
                f"run: clipdist index {path.parent}"
            )

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    @cached_property
    def records(self) -> np.ndarray:
        # An empty map is an error of mmap's, and an empty shard is legal.
        if not self.samples:
            return np.zeros(0, RECORD)
        return np.memmap(self.path, RECORD, "r", HEADER.itemsize, (self.samples,))

    def entry(self, row: int) -> tuple[bytes, Entry, bytes]:
        """The 64 bytes of sample `row`, what they say, and its key as stored."""
        # Positioned reads, not the map: a file cut short under a map ends the process.
        assert 0 <= row < self.samples
        record = read_at(self._descriptor, RECORD.itemsize, HEADER.itemsize + row * RECORD.itemsize)
        if len(record) != RECORD.itemsize:
            raise BadSample("its index was cut short")
        entry = Entry._make(_RECORD.unpack(record))
        return record, entry, read_at(self._descriptor, entry.key_size, self._keys_at + entry.key_offset)

    def keys(self) -> list[bytes]:
        """All keys as stored, by one read. Raises `BadSample`."""
        size = int(self.records["key_size"].sum(dtype=np.int64))
        block = read_at(self._descriptor, size, self._keys_at)
        if len(block) != size:
            raise BadSample("its index was cut short")
        starts, sizes = self.records["key_offset"].tolist(), self.records["key_size"].tolist()
        return [block[start : start + length] for start, length in zip(starts, sizes, strict=True)]

    def key(self, row: int) -> str:
        """The key of sample `row`, or its place where the index cannot be read: whoever names a bad sample gets a
        name."""
        try:
            return self.entry(row)[2].decode(errors="replace")
        except BadSample:
            return f"sample {row}"


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes of a file from `offset` on; `BadSample` when the disk, or the server behind it, fails."""
    try:
        return os.pread(descriptor, size, offset)
    except OSError as error:
        raise BadSample(f"cannot be read ({error.strerror})") from None
