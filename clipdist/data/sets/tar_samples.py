"""The samples of a tar, as an index describes them. Plain tars, and Zstandard frames that each hold whole samples.

Every byte of the file is read once, from front to back: headers, members and the file's own checksum come of one pass.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
import zstandard

from clipdist.data.sets.writer import BLOCK, LONGEST_KEY, sealed
from clipdist.data.shard_index import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, MEMBERS, RECORD
from clipdist.errors import UserError

CHUNK = 1 << 16
# A frame is decompressed from its start for each sample in it: beyond this it must hold one sample alone.
MAX_SHARED_FRAME_BYTES = 8 << 20
MAX_FRAME_BYTES = 1 << 30
# Zstandard, RFC 8878: frames with these magic numbers, up to …5F, hold user data that readers skip.
SKIPPABLE = 0x184D2A50
LONGEST_FRAME_HEADER = 18
# What tarfile raises for damaged headers, beside its own errors.
TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError, IndexError, MemoryError)


class IndexedTar(NamedTuple):
    """`records` has dtype `RECORD`, one row per key; `checksum` is xxh3-64 of the file, 16 hexadecimal digits."""

    records: np.ndarray
    keys: list[str]
    checksum: str


def index_tar(path: Path) -> IndexedTar:
    """The index of a tar's samples; members are grouped by WebDataset's own rule.

    Members other than one image, one `.json` and one `.txt` per key are left alone. Raises `UserError` for a tar that
    ends early, a key whose members are not adjacent, members that the format cannot hold, names that no sample can
    have, and a compressed tar without random access.
    """
    samples = _Samples(path)
    with open(path, "rb") as file:
        source = HashedFile(file)
        try:
            if path.name.endswith(".zst"):
                _read_frames(source, samples)
            else:
                _read_members(source, path.stat().st_size, samples)
            source.read_rest()
        except UserError:
            raise
        except zstandard.ZstdError as error:
            raise UserError(f"{path}: damaged at byte {source.position} ({error}); restore or repack it") from None
        except TAR_ERRORS as error:
            number = len(samples.keys) + bool(samples.key)
            raise UserError(f"{path}: damaged tar after {number} samples ({error}); restore or repack it") from None
    samples.finish()
    records = np.frombuffer(b"".join(samples.records), RECORD)
    return IndexedTar(records, samples.keys, source.hasher.hexdigest())


class HashedFile:
    """A file that is read forward only; each byte counts into `hasher` (xxh3-64 unless another is given), also those
    sought over."""

    def __init__(self, file: BinaryIO, hasher: Any = None) -> None:
        self._file, self.hasher, self.position = file, xxhash.xxh3_64() if hasher is None else hasher, 0
        self.last = b""

    def read(self, size: int) -> bytes:
        data = self.last = self._file.read(size)
        self.hasher.update(data)
        self.position += len(data)
        return data

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> int:
        if position < self.position:
            raise tarfile.ReadError(f"a header points back to byte {position}")
        while self.position < position and self.read(min(1 << 22, position - self.position)):
            pass
        return self.position

    def read_rest(self) -> None:
        while self.read(1 << 22):
            pass


class _Samples:
    """The records of a tar while its members go by; each sample is complete when the next begins."""

    def __init__(self, path: Path) -> None:
        self.path, self.key = path, ""
        self.records: list[bytes] = []
        self.keys: list[str] = []
        self._seen: set[str] = set()
        self._key_bytes = 0
        self._frame = (0, 0)
        self._start()

    def _start(self) -> None:
        self._record = np.zeros((), RECORD)
        self._members = dict.fromkeys(MEMBERS, b"")
        self._names: dict[str, str] = {}

    def refuse(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}; write it anew with clipdist repack")

    def wants(self, member: tarfile.TarInfo) -> tuple[str, str, str] | None:
        """(key, kind, extension) of a member that belongs to a sample."""
        if not member.isfile():
            return None
        key, extension = key_and_extension(member.name)
        kind = _kind(extension)
        if not key or kind is None:
            return None
        self._check_name(member.name, key)
        if member.issparse():
            raise self.refuse(f"{member.name!r} is stored with holes (a sparse file)")
        if not 0 <= member.size <= MAX_MEMBER_BYTES:
            raise UserError(
                f"{self.path}: {member.name!r} has {member.size} bytes; the index holds less than 4 GiB a member"
            )
        return key, kind, extension.lower()

    def _check_name(self, name: str, key: str) -> None:
        try:
            size = len(key.encode())
        except UnicodeEncodeError:
            raise self.refuse(f"the name {name!r} is not UTF-8") from None
        if name.startswith("/") or ".." in name.split("/"):
            raise self.refuse(f"the name {name!r} points outside the archive")
        if size > LONGEST_KEY:
            raise self.refuse(f"the name {name[:40]!r}… has {size} bytes, expected at most {LONGEST_KEY}")

    def add(self, key: str, kind: str, extension: str, name: str, data: bytes, offset: int) -> None:
        if key != self.key:
            self.finish()
            if key in self._seen:
                # A frame's end closes the sample, so only there its key can come again at once.
                how = "lie in several frames" if self.keys[-1] == key else "are not adjacent"
                raise self.refuse(f"the members of sample {key!r} {how}")
            self._seen.add(key)
            self.key = key
            self._start()
        if kind in self._names:
            raise UserError(f"{self.path}: sample of {name!r} has two {kind} members; expected one")
        self._names[kind], self._members[kind] = name, data
        self._record[f"{kind}_offset"], self._record[f"{kind}_size"] = offset, len(data)
        if kind == "image":
            self._record["image_kind"] = IMAGE_EXTENSIONS.index(extension)

    def finish(self) -> None:
        """Completes the sample that is open, if any."""
        if self.key:
            self._record["frame_offset"], self._record["frame_size"] = self._frame
            members = tuple(self._members.values())
            self.records.append(sealed(len(self.keys), self._record, self.key, self._key_bytes, members))
            self.keys.append(self.key)
            self._key_bytes += len(self.key.encode())
        self.key = ""

    def enter_frame(self, offset: int, size: int) -> None:
        """What is added from here on lies in this frame; a sample never goes on in the next."""
        self.finish()
        self._frame = (offset, size)


def key_and_extension(name: str) -> tuple[str, str]:
    """`folder/a.left.jpg` -> (`folder/a`, `left.jpg`), as WebDataset does it; the key of a hidden file is empty."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return (folder + slash + stem if stem else ""), extension


def _kind(extension: str) -> str | None:
    if extension.lower() in IMAGE_EXTENSIONS:
        return "image"
    return {"json": "json", "txt": "text"}.get(extension.lower())


def _read_members(source: HashedFile, size: int, samples: _Samples, *, frame: bool = False) -> bool:
    """Adds the members of a tar of `size` bytes. Returns whether it ends with a block of zeros, as all but a frame's
    must."""
    with tarfile.open(fileobj=source, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:  # type: ignore[call-overload]
        for member in tar:
            wanted = samples.wants(member)
            if wanted:
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                source.seek(member.offset_data)
                samples.add(*wanted, member.name, source.read(member.size), member.offset_data)
        # Python's tarfile takes a damaged header for the end; the true end is a block of zeros, which it read last.
        ended = source.last == bytes(BLOCK)
        if not ended and not (frame and tar.offset == size):
            raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")
    return ended


def _read_frames(source: HashedFile, samples: _Samples) -> None:
    ended = False
    for offset, size, data in _frames(source, samples):
        if data.count(0) == len(data):
            ended = ended or len(data) >= BLOCK
            continue
        if ended:
            raise tarfile.ReadError(f"more data behind the archive's end, at byte {offset}")
        samples.enter_frame(offset, size)
        before = len(samples.keys)
        try:
            ended = _read_members(HashedFile(io.BytesIO(data)), len(data), samples, frame=True)
        except tarfile.TarError as error:
            raise samples.refuse(
                f"no random access: the frame at byte {offset} holds a part of a tar ({error})"
            ) from None
        if len(data) > MAX_SHARED_FRAME_BYTES and len(samples.keys) > before:
            raise samples.refuse(
                f"no random access: the frame at byte {offset} holds {len(data):,} bytes of many samples"
            )
    if not ended:
        raise tarfile.ReadError(f"no end at byte {source.position}")


def _frames(source: HashedFile, samples: _Samples) -> Iterator[tuple[int, int, bytes]]:
    """(offset, size, decompressed bytes) of each Zstandard frame; skippable ones are skipped."""
    buffer, offset = b"", 0
    while True:
        if len(buffer) < LONGEST_FRAME_HEADER:
            buffer += source.read(CHUNK)
        if not buffer:
            return
        if int.from_bytes(buffer[:4], "little") & ~0xF == SKIPPABLE:
            size = 8 + int.from_bytes(buffer[4:8], "little")
            while len(buffer) < size and (more := source.read(CHUNK)):
                buffer += more
            if len(buffer) < size:
                raise tarfile.ReadError(f"the frame at byte {offset} is cut short")
            buffer = buffer[size:]
        else:
            size, data, buffer = _frame(source, buffer, offset, samples)
            yield offset, size, data
        offset += size


def _frame(source: HashedFile, buffer: bytes, offset: int, samples: _Samples) -> tuple[int, bytes, bytes]:
    """(size, decompressed bytes, what was read beyond) of the frame with which `buffer` begins."""
    content = zstandard.frame_content_size(buffer)
    if content < 0:
        raise samples.refuse(f"no random access: the frame at byte {offset} does not state its size")
    if content > MAX_FRAME_BYTES:
        raise samples.refuse(f"no random access: the frame at byte {offset} holds {content:,} bytes")
    decompressor, parts, size, found = zstandard.ZstdDecompressor().decompressobj(), [], 0, 0
    while not decompressor.eof:
        if not buffer:
            raise tarfile.ReadError(f"the frame at byte {offset} is cut short")
        # In small pieces, so that a frame that lies about its size is found out before it fills the memory.
        piece, buffer = buffer[:CHUNK], buffer[CHUNK:] or source.read(CHUNK)
        parts.append(decompressor.decompress(piece))
        size, found = size + len(piece), found + len(parts[-1])
        if found > content:
            raise tarfile.ReadError(f"the frame at byte {offset} holds more than the {content:,} bytes that it states")
    beyond = decompressor.unused_data
    return size - len(beyond), b"".join(parts), beyond + buffer
