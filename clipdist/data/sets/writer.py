"""Writing shard sets: deterministic bytes, every file whole or absent, the manifest last."""

import contextlib
import importlib.metadata
import io
import json
import os
import shlex
import sys
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
import zstandard
from PIL import ExifTags, Image

from clipdist.data.images.header import header_of
from clipdist.data.shard_index import (
    IMAGE_EXTENSIONS,
    MAX_MEMBER_BYTES,
    RECORD,
    index_bytes,
    index_path,
    sample_checksum,
)
from clipdist.data.shards import MANIFEST, SHARD_NAME, Manifest, ShardInfo, fsync_folder, write_atomically
from clipdist.errors import UserError, disk_errors

UNFINISHED = ".unfinished"
BLOCK = 512
END_OF_ARCHIVE = b"\0" * (2 * BLOCK)
LARGEST_SIDE = (1 << 16) - 1
# How the chunk of a PNG begins that may hold an orientation: EXIF by itself or as text, or XMP.
PNG_ORIENTATION = (b"eXIf", b"tEXtRaw profile type", b"zTXtRaw profile type", b"iTXtXML:com.adobe.xmp")
LONGEST_KEY = 4096  # bytes; what file systems take for a path, far below the index's 16 bits


class UnusableSample(UserError):
    """A shard cannot hold this one sample; nothing of it was written, and others can be."""


def made_by(command: list[str] | None = None) -> dict[str, Any]:
    """The command line and the versions of the packages that shaped the bytes, for the manifest."""
    versions = {name: importlib.metadata.version(name) for name in ("pillow", "numpy", "zstandard")}
    from clipdist import __version__

    return {"command": shlex.join(command or sys.argv), "versions": {"clipdist": __version__, **versions}}


def check_free(folder: Path, overwrite: bool) -> None:
    """`UserError` where `folder` holds a shard set that must stay; worth asking before a long preparation."""
    if (folder / MANIFEST).exists() and not overwrite:
        raise UserError(f"{folder}: already holds a shard set; choose another folder or pass --overwrite")


class ShardSetWriter:
    """Writes a shard set into `folder`; a context manager. On a clean exit the manifest is written, last.

    After an exception there is no manifest, so what was written is never taken for a whole set; the same
    call again clears it away. Equal calls of `write` give equal bytes. One process, one thread.

    Args:
        folder: made if need be; files of other tools in it stay.
        samples_per_shard: samples after which a shard ends.
        shard_mib: a shard also ends with the sample that brings it to so many MiB.
        zstd: compress each sample by itself, as `.tar.zst`.
        license_text: what users of the set must know; goes into the manifest.
        command: what made it, for the manifest; by default this process's command line.
        sources: checksums of what it was made of, by name, for the manifest.
        notes: anything else for the manifest, of JSON's types.
        overwrite: replace a set that is there.

    Raises `UserError` when `folder` already holds a set and `overwrite` is false, when a key is used twice,
    and when the disk is full.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        samples_per_shard: int = 1000,
        shard_mib: float | None = None,
        zstd: bool = False,
        license_text: str = "",
        command: list[str] | None = None,
        sources: dict[str, str] | None = None,
        notes: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        if samples_per_shard < 1:
            raise UserError(f"samples per shard: found {samples_per_shard}, expected at least 1")
        if shard_mib is not None and not shard_mib > 0:
            raise UserError(f"size of a shard: found {shard_mib} MiB, expected more than 0")
        self.shard_bytes = None if shard_mib is None else shard_mib * 2**20
        self.folder, self.overwrite = Path(folder), overwrite
        self.samples_per_shard, self.zstd = samples_per_shard, zstd
        self._manifest = Manifest({}, license_text, made_by(command), sources or {}, notes or {})
        self._open: dict[str, _OpenShard] = {}
        self._keys: set[str] = set()

    def __enter__(self) -> "ShardSetWriter":
        with disk_errors(self.folder):
            self._clear()
        return self

    def _clear(self) -> None:
        """An empty folder, marked as unfinished; what other tools put there stays."""
        manifest, unfinished = self.folder / MANIFEST, self.folder / UNFINISHED
        check_free(self.folder, self.overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        leftovers = sorted(path for path in self.folder.iterdir() if _is_ours(path))
        named = _named_files(manifest)
        foreign = [path for path in leftovers if named is not None and path.name.removesuffix(".partial") not in named]
        if foreign and not unfinished.exists():
            raise UserError(
                f"{self.folder}: holds {foreign[0].name} that no manifest names; choose an empty folder, "
                f"or run: clipdist index {self.folder}"
            )
        # The marker first: from here on until the new manifest stands, whatever lies here is unfinished.
        write_atomically(unfinished, b"")
        manifest.unlink(missing_ok=True)
        for path in leftovers:
            path.unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            for shard in self._open.values():
                shard.abandon()
            return
        with disk_errors(self.folder):
            for split in list(self._open):
                self.close_shard(split)
            write_atomically(self.folder / MANIFEST, self._manifest.to_json().encode())
            (self.folder / UNFINISHED).unlink()
            fsync_folder(self.folder)

    @property
    def manifest(self) -> Manifest:
        """What was written so far."""
        return self._manifest

    def write(self, split: str, key: str, image: bytes, extension: str, fields: dict[str, Any]) -> None:
        """Appends one sample; all of `fields` goes to `<key>.json`, `fields["text"]` is its caption or
        captions, the first of which also goes to `<key>.txt`.

        `image` is stored as it is and not looked at but for its size; `extension` names its kind (`jpg`, `png`, …).
        `fields["unit"]` says what must not straddle splits, `fields["label"]` the class, any other name what you like.
        Raises `UnusableSample`, with the writer as it was before, for a key that is too long, absolute, no UTF-8 or
        holds a dot in its last part, and for fields that JSON in UTF-8 cannot hold, such as an infinite number;
        `UserError` for a key that is used twice.
        """
        extension = extension.lower().lstrip(".")
        if extension not in IMAGE_EXTENSIONS:
            raise UserError(f"{key}: image extension {extension!r}, expected one of {', '.join(IMAGE_EXTENSIONS)}")
        _check_key(key)
        if key in self._keys:
            raise UserError(f"key {key!r} is used twice; keys must be unique in a shard set")
        if not split or "/" in split or "\0" in split:
            raise UserError(f"split {split!r}: expected a name that can begin a file's name")
        try:
            info = json.dumps(fields, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UnusableSample(f"{key}: its fields cannot be written as JSON in UTF-8 ({error})") from None
        if max(len(image), len(info)) > MAX_MEMBER_BYTES:
            raise UnusableSample(f"{key}: an image or its fields of more than 4 GiB; the index holds less")
        self._keys.add(key)
        if split not in self._manifest.splits:
            self._manifest.splits[split] = []
        with disk_errors(self.folder):
            if split not in self._open:
                number = len(self._manifest.splits[split])
                suffix = ".tar.zst" if self.zstd else ".tar"
                self._open[split] = _OpenShard(self.folder / f"{split}-{number:06d}{suffix}", self.zstd)
            shard = self._open[split]
            shard.append(key, image, extension, info, first_caption(fields.get("text")))
            full = self.shard_bytes is not None and shard.position >= self.shard_bytes
            if full or len(shard.keys) >= self.samples_per_shard:
                self.close_shard(split)

    def close_shard(self, split: str) -> None:
        """Finishes the split's open shard, if any; the next `write` starts another."""
        if split in self._open:
            self._manifest.splits[split].append(self._open.pop(split).finish())


def _check_key(key: str) -> None:
    *folders, last = key.split("/")
    if "." in last or ".." in folders or key.startswith("/") or not last or "\0" in key:
        raise UnusableSample(
            f"key {key!r}: expected a relative name without dots (a dot starts the extension in a tar)"
        )
    try:
        size = len(key.encode())
    except UnicodeEncodeError as error:
        raise UnusableSample(f"key {key!r}: cannot be written in UTF-8 ({error.reason})") from None
    if size > LONGEST_KEY:
        raise UnusableSample(f"key {key[:40]!r}…: found {size} bytes, expected at most {LONGEST_KEY}")


def _named_files(manifest: Path) -> set[str] | None:
    """Shards that a manifest names, and their indexes, whatever its version; None when it is beyond reading."""
    if not manifest.exists():
        return set()
    try:
        splits = json.loads(manifest.read_bytes())["splits"].values()
        files = [Path(shard["file"]) for split in splits for shard in split["shards"]]
        return {path.name for path in files} | {index_path(path).name for path in files}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_ours(path: Path) -> bool:
    name = path.name.removesuffix(".partial")
    return bool(SHARD_NAME.match(name) or SHARD_NAME.match(name.removesuffix(".idx") + ".tar"))


def sealed(row: int, record: np.ndarray, key: str, key_offset: int, members: Sequence[bytes]) -> bytes:
    """Record number `row` with the place of its key, the picture's size and the checksum, as an index stores it.

    `record` has dtype `RECORD`, no dimension, and says where the members lie; `members` are image, JSON and text.
    """
    encoded = key.encode()
    if key_offset + len(encoded) > MAX_MEMBER_BYTES:
        raise UserError(f"{key}: the keys of its shard take more than 4 GiB; make smaller shards")
    record["key_offset"], record["key_size"] = key_offset, len(encoded)
    record["width"], record["height"] = displayed_size(members[0])
    record["checksum"] = 0
    record["checksum"] = sample_checksum(row, record.tobytes(), encoded, members)
    return record.tobytes()


def displayed_size(image: bytes) -> tuple[int, int]:
    """Width and height in pixels with the EXIF orientation applied, from an encoded image's header; (0, 0) when they
    cannot be told, or are above 65535."""
    header = header_of(image)
    if header and header.orientation:
        width, height = header.width, header.height
        if header.orientation > 4:
            width, height = height, width
        return (width, height) if max(width, height) <= LARGEST_SIDE else (0, 0)
    try:
        with unlimited_pillow():
            opened = Image.open(io.BytesIO(image))
        # Pillow turns a TIFF's size itself, and would decode a whole PNG to look for an orientation behind the pixels.
        may_turn = opened.format != "TIFF" and (opened.format != "PNG" or _says_orientation(image))
        if may_turn and opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8):
            height, width = opened.size
        else:
            width, height = opened.size
    except Exception:  # Pillow raises many kinds; whoever reads the sample names the fault
        return 0, 0
    return (width, height) if max(width, height) <= LARGEST_SIDE else (0, 0)


def _says_orientation(png: bytes) -> bool:
    at = 8
    while at < len(png):
        if png.startswith(PNG_ORIENTATION, at + 4):
            return True
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return False


@contextlib.contextmanager
def unlimited_pillow() -> Iterator[None]:
    """Pillow's own size limit and its warnings out of the way, where sizes are checked anyhow."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


# A tar's header of a regular file as Python's tarfile writes it, to be filled in (ustar, POSIX.1-1988).
_TEMPLATE = bytearray(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT))
_TEMPLATE[148:156] = b" " * 8
_SUM = sum(_TEMPLATE) - 11 * ord("0")  # without the digits of the size
LONGEST_PLAIN_NAME, LARGEST_PLAIN_SIZE = 100, 8 << 30


def tar_header(name: str, size: int) -> bytes:
    """The header of a member of `size` bytes, mode 644: what tarfile's PAX format gives, but ten times faster where no
    extended header is needed."""
    if not name.isascii() or len(name) > LONGEST_PLAIN_NAME or size >= LARGEST_PLAIN_SIZE:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.PAX_FORMAT)
    encoded, digits = name.encode(), b"%011o" % size
    header = _TEMPLATE.copy()
    header[: len(encoded)] = encoded
    header[124:135] = digits
    header[148:156] = b"%06o\0 " % (_SUM + sum(encoded) + sum(digits))
    return bytes(header)


def first_caption(text: Any) -> bytes:
    """What goes to `<key>.txt`, for readers that know no JSON: the first caption that says anything."""
    texts = [text] if isinstance(text, str) else text if isinstance(text, list) else []
    return next((text.strip().encode() for text in texts if isinstance(text, str) and text.strip()), b"")


class _OpenShard:
    """One shard being written under a temporary name."""

    def __init__(self, path: Path, zstd: bool) -> None:
        self.path, self.position = path, 0
        self.keys: list[str] = []
        self._key_bytes = 0
        self._records = io.BytesIO()
        self._hasher = xxhash.xxh3_64()
        # The checksum inside each frame makes a flipped bit an error instead of another picture.
        self._compressor = zstandard.ZstdCompressor(level=3, write_checksum=True) if zstd else None
        self._temporary = path.with_name(path.name + ".partial")
        self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed by finish or abandon)

    def append(self, key: str, image: bytes, extension: str, info: bytes, text: bytes) -> None:
        record = np.zeros((), RECORD)
        parts: list[bytes] = []
        at = 0 if self._compressor else self.position
        for name, suffix, data in (("image", extension, image), ("json", "json", info), ("text", "txt", text)):
            if name == "text" and not data:
                continue
            header = tar_header(f"{key}.{suffix}", len(data))
            record[f"{name}_offset"], record[f"{name}_size"] = at + len(header), len(data)
            padding = bytes(-len(data) % BLOCK)
            parts += (header, data, padding)
            at += len(header) + len(data) + len(padding)
        record["image_kind"] = IMAGE_EXTENSIONS.index(extension)
        frame_offset, written = self.position, self._write(b"".join(parts))
        if self._compressor:
            record["frame_offset"], record["frame_size"] = frame_offset, written
        self._records.write(sealed(len(self.keys), record, key, self._key_bytes, (image, info, text)))
        self._key_bytes += int(record["key_size"])
        self.keys.append(key)

    def _write(self, data: bytes) -> int:
        if self._compressor:
            data = self._compressor.compress(data)
        self._file.write(data)
        self._hasher.update(data)
        self.position += len(data)
        return len(data)

    def finish(self) -> ShardInfo:
        self._write(END_OF_ARCHIVE)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        records = np.frombuffer(self._records.getvalue(), RECORD)
        write_atomically(index_path(self.path), index_bytes(records, self.keys, self.position, bool(self._compressor)))
        os.replace(self._temporary, self.path)
        fsync_folder(self.path.parent)
        return ShardInfo(self.path.name, len(self.keys), self.position, self._hasher.hexdigest())

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk, closing tries once more to write what is buffered
            self._file.close()
        self._temporary.unlink(missing_ok=True)
