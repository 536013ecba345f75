"""Decoded pixels of a split in one memory-mapped file on a node's own disk, for all of its ranks and workers.

    <folder>/<identity>/
      pixels.u8     for each sample its pixels, uint8 [h, w, 3], then its payload; starts are multiples of 64
      records.bin   `RECORD` for each sample: where it lies, its size, its checksum, and whether it is stored yet
      layout.json   written last: with it the other two have their full size, without it they are made anew
      in-use.lock   a shared lock for as long as a process has the cache open; its time is that of the last opening
      making.lock   an exclusive lock while the files are laid out

The files are laid out and their space is reserved before the first step; the first epoch stores each sample as it is
decoded. What a sample's record holds must be a function of the sample: then it does not matter who stores it, or how
often. The locks are flock's, which the kernel gives up when their holder dies. The disk must be local: maps and writes
see the same page cache only within one machine.
"""

import errno
import fcntl
import json
import logging
import mmap
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from clipdist.data.shards import write_atomically
from clipdist.errors import UserError, disk_errors

logger = logging.getLogger(__name__)

FORMAT = "clipdist-decoded"
FORMAT_VERSION = 1
PIXELS, RECORDS, LAYOUT, IN_USE, MAKING = "pixels.u8", "records.bin", "layout.json", "in-use.lock", "making.lock"
ALIGNMENT = 64
STORED = 1
LONGEST = 3  # the longer side, in multiples of `side`
GIB = 1 << 30
CHUNK = 1 << 14  # samples laid out at a time

# The fields up to `check` never change; those after it are written when the sample is stored, the state last.
RECORD = np.dtype(
    [
        ("offset", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("capacity", "<u4"),  # bytes set aside for the payload
        ("check", "<u4"),  # of the fields before it and the sample's number
        ("checksum", "<u8"),
        ("payload_size", "<u4"),
        ("state", "u1"),
        ("_", "V3"),
    ]
)
# The same for one sample: ten times as fast as NumPy's.
FIELDS = struct.Struct("<QIIIIQIB3x")
PLACE_BYTES = 20  # the fields before `check`
CONTENT = struct.Struct("<QIB")
CONTENT_START = 24
assert RECORD.itemsize == FIELDS.size

# Linux 5.14; Python names it from 3.14 on.
MADV_POPULATE_READ = 22
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cached_sizes(widths: np.ndarray, heights: np.ndarray, side: int) -> np.ndarray:
    """Height and width at which upright images are stored, int64 [N, 2].

    The shorter side is scaled down to `side`, never up, and the longer one with it, but to at most 3 · side: beyond
    that the image is squashed. (0, 0) for an image without area.
    """
    hw = np.stack([heights, widths], axis=-1).astype(np.int64)
    shorter = hw.min(axis=-1, keepdims=True)
    target = np.minimum(shorter, side)
    divisor = np.maximum(2 * shorter, 1)
    scaled = (2 * hw * target + shorter) // divisor  # rounded half up
    return np.where(shorter > 0, np.minimum(scaled, LONGEST * side), 0)


def cached_size(width: int, height: int, side: int) -> tuple[int, int]:
    """`cached_sizes` of one image."""
    stored_height, stored_width = cached_sizes(np.array([width]), np.array([height]), side)[0].tolist()
    return stored_height, stored_width


@dataclass(frozen=True)
class Layout:
    """What `layout.json` says. `sizes` is the xxh3-64 of the records' fixed fields, so it tells one split's sizes
    from another's."""

    identity: str
    samples: int
    bytes: int
    sizes: str
    format: str = FORMAT
    version: int = FORMAT_VERSION

    @property
    def disk_bytes(self) -> int:
        return self.bytes + self.samples * RECORD.itemsize


def cache_bytes(sizes_hw: np.ndarray, payload_sizes: np.ndarray) -> int:
    """What a cache of these samples takes on the disk; arguments as in `DecodedCache.open`."""
    return _plan("", sizes_hw, payload_sizes).disk_bytes


class DecodedCache:
    """An open cache. Several threads and processes may use it at once; a copy made by fork shares the files, one made
    by pickle opens them at its first use."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        """Of a folder that is laid out; `open` is the way to get one that may not be."""
        self.folder, self.layout = folder, layout
        self._files: _Files | None = None
        self._closed = False
        self._storing = True
        self._damage_told = False

    @staticmethod
    def open(
        folder: Path, identity: str, sizes_hw: np.ndarray, payload_sizes: np.ndarray, *, limit_gib: float
    ) -> "DecodedCache":
        """Opens `folder/identity`, and lays it out first where that was not done, or was not finished.

        `sizes_hw`: int [N, 2], what `cached_size` gives for each sample, (0, 0) for one that is never stored;
        `payload_sizes`: int [N], the most bytes of payload each may have. A cache of the same identity but other sizes
        is replaced. Raises `UserError` when it needs more than `limit_gib`, or than the disk has free.
        """
        assert re.fullmatch(r"[\w-][\w.-]*", identity), f"{identity!r} cannot name a folder"
        assert sizes_hw.shape == (len(payload_sizes), 2), (sizes_hw.shape, payload_sizes.shape)
        layout = _plan(identity, sizes_hw, payload_sizes)
        needed = layout.disk_bytes
        if needed > limit_gib * GIB:
            raise UserError(
                f"{folder}: the decoded split needs {needed / GIB:.2f} GiB, more than its limit of {limit_gib:g} GiB; "
                f"choose a smaller data.cache_side, a larger data.cache_gib, or data.cache: none"
            )
        path = folder / identity
        with disk_errors(path):
            held = _hold(path)
            try:
                with open(path / MAKING, "w") as making:
                    # Whoever finds the lock taken waits, and then finds the work done.
                    fcntl.flock(making, fcntl.LOCK_EX)
                    try:
                        if not _is_complete(path, layout):
                            _make(path, layout, sizes_hw, payload_sizes)
                        cache = DecodedCache(path, layout)
                        cache._files = _Files(path, layout)
                    finally:
                        # Closing would not do: a child forked meanwhile has a copy of the descriptor.
                        fcntl.flock(making, fcntl.LOCK_UN)
            finally:
                os.close(held)
        return cache

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "layout": self.layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["layout"])  # type: ignore[misc]

    def __len__(self) -> int:
        return self.layout.samples

    def close(self) -> None:
        """Gives the lock up. Arrays that `get` returned stay valid."""
        if self._files is not None:
            self._files.close()
        self._files, self._closed = None, True

    def get(self, number: int) -> tuple[np.ndarray, bytes] | None:
        """Pixels, uint8 [h, w, 3], a read-only view of the map, and the payload; None when the sample is not stored
        (yet), or what is stored fails its checksum."""
        assert 0 <= number < len(self), number
        files = self._open_files()
        if files is None:
            return None
        raw = files.record(number)
        if len(raw) < FIELDS.size:
            self._tell_damage(number)
            return None
        offset, height, width, _, _, checksum, payload_size, state = FIELDS.unpack(raw)
        if state != STORED:
            return None
        size = height * width * 3
        end = offset + size + payload_size
        sound = size > 0 and end <= self.layout.bytes and files.readable(offset, end)
        if not sound or _checksum(number, raw, payload_size, files.view[offset:end]) != checksum:
            self._tell_damage(number)
            return None
        pixels = np.frombuffer(files.map, np.uint8, size, offset).reshape(height, width, 3)
        return pixels, files.map[offset + size : end]

    def put(self, number: int, pixels: np.ndarray, payload: bytes) -> None:
        """Stores a sample, pixels uint8 [h, w, 3], unless it is stored soundly, or does not fit what was laid out.

        The first error of the disk ends the storing in this process, with one warning: what is stored stays readable,
        the rest is decoded each time. A sample whose place is damaged is not stored either.
        """
        assert 0 <= number < len(self), number
        files = self._open_files()
        if files is None or not self._storing:
            return
        try:
            raw = files.record(number)
            if len(raw) < FIELDS.size or files.size() != self.layout.bytes:
                raise OSError(errno.EIO, "its files were cut short, or cannot be read")
            offset, height, width, capacity, check, _, _, state = FIELDS.unpack(raw)
            if check != _check(number, raw):
                self._tell_damage(number)  # written at a wrong place, it would damage another sample
                return
            if not height or (state == STORED and self.get(number)):
                return
            assert pixels.dtype == np.uint8
            # An index of another tool may tell another size than the image does.
            if pixels.shape != (height, width, 3) or len(payload) > capacity:
                return
            # Not through the map: there a full disk is a SIGBUS, here it is an error.
            flat = np.ascontiguousarray(pixels).reshape(-1).data
            checksum = _checksum(number, raw, len(payload), flat, payload)
            _pwrite(files.pixels, flat, offset)
            _pwrite(files.pixels, payload, offset + len(flat))
            # The state comes last, as a write goes from front to back. After a power cut the disk may still hold this
            # without the pixels, or half of either: the checksum tells.
            content = CONTENT.pack(checksum, len(payload), STORED)
            _pwrite(files.records, content, number * RECORD.itemsize + CONTENT_START)
        except OSError as error:
            self._storing = False
            logger.warning(
                "%s: cannot be written (%s); %d of %d samples are stored, this process decodes the others each time",
                self.folder,
                error.strerror,
                self.stored(),
                len(self),
            )

    def stored(self) -> int:
        """How many samples are stored, unverified; reads all records."""
        files, found = self._open_files(), 0
        if files is None:
            return 0
        for start in range(0, len(self), CHUNK):
            block = os.pread(files.records, CHUNK * RECORD.itemsize, start * RECORD.itemsize)
            whole = len(block) // RECORD.itemsize
            found += int((np.frombuffer(block, RECORD, whole)["state"] == STORED).sum())
        return found

    def _open_files(self) -> "_Files | None":
        if self._files is None and not self._closed:
            try:
                self._files = _Files(self.folder, self.layout)
            except OSError as error:
                self._closed = True
                logger.warning("%s: cannot be opened (%s); samples are decoded each time", self.folder, error.strerror)
        return self._files

    def _tell_damage(self, number: int) -> None:
        if not self._damage_told:
            self._damage_told = True
            logger.warning("%s: sample %d is damaged, and decoded anew; others may be too", self.folder, number)


class _Files:
    """The open files of a cache: descriptors, the map, and the shared lock that keeps `clean` away."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.lock = self.pixels = self.records = -1
        try:
            self.lock = os.open(folder / IN_USE, os.O_RDWR)
            fcntl.flock(self.lock, fcntl.LOCK_SH)
            if not _is_there(self.lock, folder) or not _is_complete(folder, layout):
                raise FileNotFoundError(errno.ENOENT, "it was removed or replaced")
            self.pixels = os.open(folder / PIXELS, os.O_RDWR)
            self.records = os.open(folder / RECORDS, os.O_RDWR)
            self.map = mmap.mmap(self.pixels, layout.bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        except BaseException:
            self.close()
            raise
        self.view = memoryview(self.map)

    def close(self) -> None:
        for descriptor in (self.lock, self.pixels, self.records):
            if descriptor >= 0:
                os.close(descriptor)
        self.lock = self.pixels = self.records = -1

    def __del__(self) -> None:
        self.close()

    def record(self, number: int) -> bytes:
        """The bytes of a record, shorter when they cannot be read. Not mapped: this is as fast, adds nothing to the
        process's memory, and a file cut short is no SIGBUS."""
        try:
            return os.pread(self.records, RECORD.itemsize, number * RECORD.itemsize)
        except OSError:
            return b""

    def size(self) -> int:
        return os.fstat(self.pixels).st_size

    def readable(self, offset: int, end: int) -> bool:
        """Whether these bytes of the map can be touched; brings them into memory with one call.

        A file that was cut short, or a disk that fails, is a SIGBUS to whoever touches the map. The kernel is asked to
        touch it for us and says no instead; one older than 5.14 cannot, there only the file's size is looked at. Not
        covered: a file cut short, or a page that was dropped and cannot be read again, between this call and the last
        use of the array. A file that is removed, not cut short, stays whole for those who have it open.
        """
        start = offset - offset % mmap.PAGESIZE
        try:
            self.map.madvise(MADV_POPULATE_READ, start, end - start)
            return True
        except OSError as error:
            return error.errno == errno.EINVAL and self.size() >= len(self.map)


def _check(number: int, record: bytes) -> int:
    return xxhash.xxh3_64_intdigest(record[:PLACE_BYTES], number) & 0xFFFFFFFF


def _checksum(number: int, record: bytes, payload_size: int, *blocks: bytes | memoryview) -> int:
    """xxh3-64 of pixels and payload, keyed by the sample's number, place and sizes: neither the bytes of another
    sample nor those of this one in another shape pass."""
    key = xxhash.xxh3_64_intdigest(record[:PLACE_BYTES] + payload_size.to_bytes(4, "little"), number)
    hasher = xxhash.xxh3_64(seed=key)
    for block in blocks:
        hasher.update(block)
    return hasher.intdigest()


def _pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _lay_out(sizes_hw: np.ndarray, payload_sizes: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the records, as yet without checks, of `CHUNK` samples at a time, and where the next ones start."""
    end = 0
    for start in range(0, len(payload_sizes), CHUNK):
        hw = sizes_hw[start : start + CHUNK].astype(np.int64)
        payload = payload_sizes[start : start + CHUNK].astype(np.int64)
        area = hw.prod(axis=1)
        assert 0 <= hw.min() <= hw.max() < 1 << 24
        assert 0 <= payload.min() <= payload.max() < 1 << 32
        size = np.where(area > 0, area * 3 + payload, 0)
        ends = end + np.cumsum(-(-size // ALIGNMENT) * ALIGNMENT)
        records = np.zeros(len(hw), RECORD)
        records["offset"] = np.concatenate([[end], ends[:-1]])
        records["height"], records["width"] = np.where(area[:, None] > 0, hw, 0).T
        records["capacity"] = np.where(area > 0, payload, 0)
        end = int(ends[-1])
        yield records, end


def _plan(identity: str, sizes_hw: np.ndarray, payload_sizes: np.ndarray) -> Layout:
    hasher, size = xxhash.xxh3_64(), 0
    for records, end in _lay_out(sizes_hw, payload_sizes):
        hasher.update(records.tobytes())
        size = end
    # An empty file cannot be mapped.
    return Layout(identity, len(payload_sizes), max(size, ALIGNMENT), hasher.hexdigest())


def _hold(path: Path) -> int:
    """A descriptor with a shared lock on `path/in-use.lock`, touched; makes the file and its folder where missing."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path / IN_USE, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # `clean` was faster
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_there(descriptor, path):
            os.utime(descriptor)
            return descriptor
        os.close(descriptor)


def _is_there(lock: int, path: Path) -> bool:
    """Whether the locked file is still the one that others lock, so that the lock says something."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path / IN_USE))
    except FileNotFoundError:
        return False


def _is_complete(path: Path, layout: Layout) -> bool:
    try:
        found = json.loads((path / LAYOUT).read_text(encoding="utf-8"))
        sizes = [(path / name).stat().st_size for name in (PIXELS, RECORDS)]
    except (FileNotFoundError, ValueError):
        return False
    return found == asdict(layout) and sizes == [layout.bytes, layout.samples * RECORD.itemsize]


def _make(path: Path, layout: Layout, sizes_hw: np.ndarray, payload_sizes: np.ndarray) -> None:
    for name in (LAYOUT, PIXELS, RECORDS):
        # Removed, not cut short: another process may still have a map of it.
        (path / name).unlink(missing_ok=True)
    try:
        with open(path / PIXELS, "xb") as pixels, open(path / RECORDS, "xb") as written:
            _reserve(pixels.fileno(), layout.bytes, path)
            for number, (records, _) in enumerate(_lay_out(sizes_hw, payload_sizes)):
                first = number * CHUNK
                records["check"] = [_check(first + row, record.tobytes()) for row, record in enumerate(records)]
                written.write(records.tobytes())
            written.flush()
            os.fsync(written.fileno())
            os.fsync(pixels.fileno())
    except BaseException:
        for name in (PIXELS, RECORDS):
            (path / name).unlink(missing_ok=True)
        raise
    write_atomically(path / LAYOUT, (json.dumps(asdict(layout), indent=1) + "\n").encode())


def _reserve(descriptor: int, size: int, path: Path) -> None:
    """Gives a new file its size and its space on the disk; `UserError` when there is too little."""
    disk = os.fstatvfs(descriptor)
    free = disk.f_bavail * disk.f_frsize
    try:
        if free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"{path}: found {free / GIB:.2f} GiB free ({os.strerror(error.errno or 0)}), the decoded split needs "
                f"{size / GIB:.2f} GiB; choose a smaller data.cache_side, another data.cache_folder or data.cache: none"
            ) from None
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        logger.warning("%s: the file system reserves no space; storing ends when the disk is full", path)
        os.ftruncate(descriptor, size)


def clean(folder: Path, keep: Sequence[str], limit_gib: float) -> list[str]:
    """Removes the least recently opened caches in `folder` until those not in `keep` take at most `limit_gib` together;
    their names.

    Never one that a living process has open, nor one of another user's: so the rest may still be above the limit.
    Nothing but the files of a cache is touched.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        try:
            opened = (path / IN_USE).stat().st_mtime_ns
            taken = sum((path / name).stat().st_size for name in (PIXELS, RECORDS) if (path / name).exists())
        except OSError:  # no cache, one that vanished, or a folder that is closed to us
            continue
        if path.name not in keep:
            found.append((opened, path, taken))
    total, removed = sum(taken for _, _, taken in found), []
    for _, path, taken in sorted(found):
        if total > limit_gib * GIB and _remove(path):
            total -= taken
            removed.append(path.name)
    return removed


def _remove(path: Path) -> bool:
    """Removes a cache, unless it is in use or not ours to remove."""
    try:
        descriptor = os.open(path / IN_USE, os.O_RDWR)
    except (FileNotFoundError, PermissionError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_there(descriptor, path):  # removed by another cleaner, and perhaps made anew by then
            return False
        # The lock file goes last: until then whoever comes waits for us, and then sees that it is another file.
        for name in (LAYOUT, LAYOUT + ".partial", PIXELS, RECORDS, MAKING, IN_USE):
            (path / name).unlink(missing_ok=True)
    except (BlockingIOError, PermissionError):
        return False
    finally:
        os.close(descriptor)
    with suppress(OSError):  # somebody is making it again, or keeps files of their own there
        path.rmdir()
    return True
