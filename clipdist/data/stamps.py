"""A shard's whole file compared with its checksum, once per machine and state of the file.

That it was sound is remembered in the user's cache folder, one small file per shard, so that the other processes of a
machine, and the next run, need not read it again. A cache that cannot be written means checking again.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import xxhash

from clipdist.errors import UserError
from clipdist.user_cache import user_cache

BLOCK = 1 << 22


def checksum_descriptor(descriptor: int) -> str:
    """xxh3-64 of an open file's bytes, 16 hexadecimal digits; leaves the file's position alone."""
    hasher, offset = xxhash.xxh3_64(), 0
    while block := os.pread(descriptor, BLOCK, offset):
        hasher.update(block)
        offset += len(block)
    return hasher.hexdigest()


def check_once(path: Path, descriptor: int, expected: str) -> None:
    """`UserError` when the file's checksum is not `expected`, unless this state of it was found sound before."""
    state = os.fstat(descriptor)
    stamp = f"{state.st_size} {state.st_mtime_ns} {state.st_ino} {expected}\n".encode()
    with _stamp_file(path) as file:
        if file >= 0 and os.pread(file, len(stamp) + 1, 0) == stamp:
            return
        found = checksum_descriptor(descriptor)
        if found != expected:
            raise UserError(
                f"{path}: found checksum {found}, the manifest expects {expected}: damaged, or changed after packing "
                f"(run: clipdist verify {path.parent})"
            )
        if file >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
                os.pwrite(file, stamp, 0)


@contextlib.contextmanager
def _stamp_file(path: Path) -> Iterator[int]:
    """The open stamp of a shard, held by this process alone; -1 when the cache folder cannot be used."""
    file = -1
    try:
        # The name of the machine: a home folder may serve many, each with a disk of its own under the same path.
        name = xxhash.xxh3_128_hexdigest(f"{os.uname().nodename}\0{path.absolute()}".encode(errors="surrogateescape"))
        folder = user_cache("checked") / name[:2]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # Whoever comes second waits until the first has read the shard, instead of reading it too.
        fcntl.flock(file, fcntl.LOCK_EX)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home folder
        if file >= 0:
            os.close(file)
        file = -1
    try:
        yield file
    finally:
        if file >= 0:
            os.close(file)
