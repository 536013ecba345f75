"""Shards of remote sets on local disk: bounded, checked, shared by the processes of a machine, sound after kill -9.

    <folder>/lock                      held while room is made
    <folder>/<set>/train-000000.lease      shared lock: somebody has the shard open; exclusive: fetches or removes it
    <folder>/<set>/train-000000.tar        and its index; named so when whole and equal to the manifest's checksum
    <folder>/<set>/train-000000.tar~9216   being fetched, in whole blocks; room for 9216 bytes is taken

Locks are flock's, so that the kernel releases them when their holder dies, however it dies. What a dead process had
fetched is taken up at the last whole block. The least recently opened shard that nobody holds goes first. The name of
the set is its manifest's digest: two URLs of equal shards share them.
"""

import contextlib
import errno
import fcntl
import glob
import os
import random
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from clipdist.data.shard_index import ShardIndex
from clipdist.data.shards import ShardInfo, fsync_folder
from clipdist.errors import UserError, disk_errors

BLOCK = 8 << 20
GIB = 1 << 30
LONGEST_POLL_SECONDS = 0.2
WANTED_SECONDS = 1.0  # for so long after somebody waited for room, the others keep no shard open

Read = Callable[[str, int, int, int], bytes]  # name, start, stop, size of the file
_PARTIAL = re.compile(r"(?P<name>.+)~(?P<bytes>\d+)")


class CacheFull(UserError):
    """What is held at once leaves no room for one more shard. `for_ever`: nor would there be any without it."""

    for_ever = False


class Stopped(Exception):
    """Whoever wanted a shard wants it no more."""


class Held:
    """A shard that stays on disk until this is closed, or forgotten, or its process ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        _held.add(self)

    def close(self) -> None:
        # Closed, never unlocked: after a fork, unlocking would take the lock from the parent too.
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


_held: "weakref.WeakSet[Held]" = weakref.WeakSet()
_locked: set[int] = set()  # descriptors of exclusive locks, held for the time of a fetch


def _let_go_in_child() -> None:
    # A child that keeps its parent's locks would keep shards on disk, and fetches waiting, after the parent let go.
    for held in list(_held):
        held.close()
    for descriptor in list(_locked):
        os.close(descriptor)
    _locked.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@dataclass
class _Entry:
    """What one shard takes of the cache."""

    bytes: int = 0
    used: float = 0.0  # when it was opened last, seconds since 1970


class ShardCache:
    """A folder of shards that never holds more than `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def check_disk(self, wanted: int) -> None:
        """`UserError` when the disk cannot hold what the cache may grow to for a set of `wanted` bytes."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        used = sum(entry.bytes for entry in self._entries().values())
        if min(self.limit, wanted) > free + used:
            raise UserError(
                f"{self.folder}: this disk has room for {(free + used) / GIB:.3g} GiB of shards, data.remote.cache_gib "
                f"allows {self.limit / GIB:.3g} and the set has {wanted / GIB:.3g}; free some space, lower "
                f"data.remote.cache_gib, or choose another data.remote.cache_folder"
            )

    def hold(
        self,
        url: str,
        digest: str,
        info: ShardInfo,
        index: str,
        size_of_index: Callable[[], int],
        read: Read,
        stopped: Callable[[], bool],
    ) -> Held:
        """The shard `info` of the set `digest`, with its index beside it; fetched through `read` by one process while
        others wait for it."""
        folder = self.folder / digest
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        path, lease = folder / info.file, folder / f"{_shard_of(folder / info.file)}.lease"
        for _ in _polls(stopped):
            # Neither lock is waited for by itself: whoever wants to fetch would wait for those who, the shard having
            # come meanwhile, hold it open.
            if (descriptor := _try_lock(lease, fcntl.LOCK_SH)) is None:
                continue
            if _is_whole(path, folder / index, info):
                os.utime(descriptor)
                return Held(path, descriptor)
            os.close(descriptor)
            if (descriptor := _try_lock(lease, fcntl.LOCK_EX)) is None:
                continue
            _locked.add(descriptor)
            try:
                if not _is_whole(path, folder / index, info):
                    self._fetch(url, path, info, index, size_of_index(), read)
            finally:
                # Between this and the shared lock the shard may go again: hence the loop.
                _locked.discard(descriptor)
                os.close(descriptor)
        raise AssertionError("unreachable: polling ends by returning or raising")

    def _fetch(self, url: str, path: Path, info: ShardInfo, index: str, index_bytes: int, read: Read) -> None:
        index_path = path.with_name(index)
        partial = path.with_name(f"{info.file}~{info.bytes}")
        partial_index = path.with_name(f"{index}~{index_bytes}")
        # Of an earlier version of the set's index, or left by a removal that was killed halfway.
        for old in (path, index_path, *path.parent.glob(f"{glob.escape(index)}~*")):
            if old != partial_index:
                old.unlink(missing_ok=True)
        self._reserve(partial, partial_index)
        for last in (False, True):
            _download(partial_index, index, index_bytes, read)
            try:
                ShardIndex(partial_index).close()
                break
            except UserError as error:
                partial_index.unlink()
                if last:
                    raise UserError(f"{url}/{index}: {error}; copy the set to its place again") from None
        for last in (False, True):
            found = _download(partial, info.file, info.bytes, read)
            if found == info.xxh3_64:
                break
            os.truncate(partial, 0)
            if last:
                partial.unlink()
                raise UserError(
                    f"{url}/{info.file}: found checksum {found}, the manifest expects {info.xxh3_64}, twice: damaged "
                    f"there or changed after packing; copy the shard to its place again"
                )
        with disk_errors(path.parent):
            os.replace(partial_index, index_path)
            os.replace(partial, path)  # the shard last: once it is there, both are
            fsync_folder(path.parent)

    def ask_for_room(self) -> None:
        """Asks every process that reads from this cache to close what it does not read at the moment."""
        with disk_errors(self.folder):
            (self.folder / "wanted").touch()

    def room_wanted(self) -> bool:
        try:
            return time.time() - (self.folder / "wanted").stat().st_mtime < WANTED_SECONDS
        except OSError:
            return False

    def _reserve(self, *partials: Path) -> None:
        """Makes room for the partial files, and takes it by creating them; `CacheFull` when there is none."""
        need = sum(_size(partial) for partial in partials)
        descriptor = next(
            found
            for _ in _polls(lambda: False)
            if (found := _try_lock(self.folder / "lock", fcntl.LOCK_EX)) is not None
        )
        _locked.add(descriptor)
        try:
            entries = self._entries()
            entries.pop(partials[0].with_name(_shard_of(partials[0])), None)
            used = sum(entry.bytes for entry in entries.values())
            for shard, entry in sorted(entries.items(), key=lambda item: item[1].used):
                if used + need <= self.limit:
                    break
                if _remove(shard):
                    used -= entry.bytes
            if used + need > self.limit:
                full = CacheFull(
                    f"{self.folder}: the shards open at once need {(used + need) / GIB:.3g} GiB, "
                    f"data.remote.cache_gib={self.limit / GIB:.3g}; set it to at least {(used + need) * 1.05 / GIB:.3g}"
                )
                full.for_ever = need > self.limit
                raise full
            with disk_errors(self.folder):
                for partial in partials:
                    partial.touch()
        finally:
            _locked.discard(descriptor)
            os.close(descriptor)

    def _entries(self) -> dict[Path, _Entry]:
        """What each shard takes, partial ones at the size they will have; keyed by the shard's path."""
        found: dict[Path, _Entry] = {}
        for folder in self.folder.iterdir():
            if not re.fullmatch("[0-9a-f]{16}", folder.name):
                continue
            with contextlib.suppress(FileNotFoundError):
                for file in folder.iterdir():
                    entry = found.setdefault(file.with_name(_shard_of(file)), _Entry())
                    with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                        entry.bytes += _size(file)
                        entry.used = max(entry.used, file.stat().st_mtime if file.suffix == ".lease" else 0.0)
        return found


def _is_whole(path: Path, index: Path, info: ShardInfo) -> bool:
    """Whether shard and index are there; the bytes were compared before they got these names."""
    try:
        if path.stat().st_size != info.bytes:
            return False
        opened = ShardIndex(index)
        opened.close()
        return opened.samples == info.samples and opened.tar_bytes == info.bytes
    except (FileNotFoundError, UserError):
        return False


def _download(partial: Path, name: str, size: int, read: Read) -> str:
    """Fills `partial` from its last whole block on; xxh3-64 of the whole. The file is on disk when this returns."""
    hasher = xxhash.xxh3_64()
    with contextlib.ExitStack() as stack:
        with disk_errors(partial.parent):
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, descriptor)
        done = min(os.fstat(descriptor).st_size, size) // BLOCK * BLOCK
        os.ftruncate(descriptor, done)
        for start in range(0, done, BLOCK):
            hasher.update(os.pread(descriptor, BLOCK, start))
        while done < size:
            data = read(name, done, min(done + BLOCK, size), size)
            hasher.update(data)
            try:
                with disk_errors(partial.parent):
                    _write(descriptor, data, done)
            except UserError:
                os.ftruncate(descriptor, 0)  # the disk is not this shard's alone
                raise
            done += len(data)
        with disk_errors(partial.parent):
            os.fsync(descriptor)
    return hasher.hexdigest()


def _write(descriptor: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _polls(stopped: Callable[[], bool]) -> Iterator[None]:
    """Yields without end, at first often, until `stopped()`; then raises `Stopped`."""
    pause = 0.002
    while True:
        yield
        if stopped():
            raise Stopped
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, LONGEST_POLL_SECONDS)


def _try_lock(path: Path, kind: int) -> int | None:
    with disk_errors(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        # The name may have gone meanwhile, or stand for a newer file: then this lock is nobody's.
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise UserError(
                f"{path.parent}: this file system has no locks; choose a data.remote.cache_folder on local disk"
            ) from error
        raise
    os.close(descriptor)
    return None


def _remove(shard: Path) -> bool:
    """Removes a shard's files unless somebody holds or fetches it. Called with the cache's lock."""
    lease = shard.with_name(f"{shard.name}.lease")
    if (descriptor := _try_lock(lease, fcntl.LOCK_EX)) is None:
        return False
    try:
        # The shard first: what is left of it if this is killed is then known for a rest. The lease last: until then
        # nobody else gets a lock.
        for ending in (".tar", ".tar.zst", ".idx"):
            shard.with_name(shard.name + ending).unlink(missing_ok=True)
        for partial in shard.parent.glob(f"{glob.escape(shard.name)}.*~*"):
            if _shard_of(partial) == shard.name:
                partial.unlink(missing_ok=True)
        lease.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _shard_of(file: Path) -> str:
    """The name, without an ending, that a shard's files have in common."""
    name = found["name"] if (found := _PARTIAL.fullmatch(file.name)) else file.name
    return re.sub(r"(\.tar(\.zst)?)?(\.lease)?$|\.idx$", "", name)


def _size(file: Path) -> int:
    return int(found["bytes"]) if (found := _PARTIAL.fullmatch(file.name)) else file.stat().st_size


def write_replacing(path: Path, data: bytes) -> None:
    """Like `write_atomically`, for a file that several processes may write at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{random.getrandbits(32):08x}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
