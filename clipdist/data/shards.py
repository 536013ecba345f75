"""Shard sets on disk: ordinary WebDataset tars, an index beside each, and a manifest that is written last.

    manifest.json         splits, shards, samples, bytes, checksums, what made it, licence
    train-000000.tar      members of one sample adjacent: <key>.<image extension>, <key>.json
    train-000000.idx      where each sample's members lie, so that any sample is one positioned read away

A `.tar.zst` holds one independent Zstandard frame per sample: a plain `.tar.zst` for every tool, and yet
randomly addressable. Offsets of members then count within the decompressed frame.

Index file, little endian: a header of 64 bytes (`HEADER`), one record of 64 bytes per sample (`RECORD`), then the
keys one after another in UTF-8. It is memory mapped, so its size costs no memory and ranks of a node share it.
"""

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from clipdist.errors import UserError

FORMAT = "clipdist-shards"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAGIC = b"CDINDEX1"

HEADER = np.dtype(
    [("magic", "S8"), ("samples", "<u8"), ("tar_bytes", "<u8"), ("key_bytes", "<u8"), ("zstd", "u1"), ("_", "V31")]
)
RECORD = np.dtype(
    [
        ("frame_offset", "<u8"),
        ("image_offset", "<u8"),
        ("json_offset", "<u8"),
        ("text_offset", "<u8"),
        ("key_offset", "<u8"),
        ("frame_size", "<u4"),
        ("image_size", "<u4"),
        ("json_size", "<u4"),
        ("text_size", "<u4"),
        ("key_size", "<u2"),
        ("image_kind", "u1"),
        ("_", "V5"),
    ]
)
assert HEADER.itemsize == 64
assert RECORD.itemsize == 64

# Position in this tuple is what an index stores: append only.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif")
SHARD_NAME = re.compile(r"^(?P<split>.+)-(?P<number>\d{6,})\.tar(\.zst)?$")


class BadSample(Exception):
    """One sample cannot be used; the message says why. The loader counts it, names it and takes the next."""


@dataclass(frozen=True)
class RawSample:
    """One sample as stored. `texts` may be empty: whoever needs a caption checks."""

    key: str
    image: bytes
    extension: str
    texts: list[str]
    fields: dict[str, Any]


@dataclass(frozen=True)
class ShardInfo:
    file: str
    samples: int
    bytes: int
    xxh3_64: str


@dataclass
class Manifest:
    """What `manifest.json` holds. `splits` maps a split's name to its shards in order."""

    splits: dict[str, list[ShardInfo]]
    license: str = ""
    made_by: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        body = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "splits": {
                name: {"samples": sum(s.samples for s in shards), "shards": [asdict(s) for s in shards]}
                for name, shards in self.splits.items()
            },
            "license": self.license,
            "made_by": self.made_by,
            "sources": self.sources,
            "notes": self.notes,
        }
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Reads `folder/manifest.json`; `UserError` when it is missing, damaged or of another format version."""
        path = folder / MANIFEST
        if not folder.is_dir():
            raise UserError(f"shard set {folder}: there is no such folder")
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if body["format"] != FORMAT or body["version"] != FORMAT_VERSION:
                raise UserError(
                    f"{path}: found format {body['format']!r} version {body['version']!r}, "
                    f"expected {FORMAT!r} version {FORMAT_VERSION}; pack the set again with this version"
                )
            splits = {name: [ShardInfo(**shard) for shard in split["shards"]] for name, split in body["splits"].items()}
            return Manifest(splits, body["license"], body["made_by"], body["sources"], body["notes"])
        except FileNotFoundError:
            raise UserError(
                f"shard set {folder}: no {MANIFEST}, so it is unfinished (pack it again) "
                f"or made by another tool (run: clipdist index {folder})"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); pack the set again") from None

    @cached_property
    def digest(self) -> str:
        """xxh3-64 over what decides the sample order: split names, shard files, counts and checksums."""
        hasher = xxhash.xxh3_64()
        for name in sorted(self.splits):
            for shard in self.splits[name]:
                hasher.update(f"{name}\0{shard.file}\0{shard.samples}\0{shard.xxh3_64}\n".encode())
        return hasher.hexdigest()


def checksum_file(path: Path) -> str:
    """xxh3-64 of a file's bytes, 16 hexadecimal digits."""
    hasher = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Puts `data` at `path` whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def index_path(shard: Path) -> Path:
    """`x.tar` and `x.tar.zst` -> `x.idx`."""
    return shard.with_name(re.sub(r"\.tar(\.zst)?$", ".idx", shard.name))


def index_bytes(records: np.ndarray, keys: list[str], tar_bytes: int, zstd: bool) -> bytes:
    """Serialises an index; fills in where each key lies. `records` has dtype `RECORD`, one row per key."""
    encoded = [key.encode() for key in keys]
    sizes = np.array([len(key) for key in encoded], dtype=np.uint64)
    records = records.copy()
    records["key_size"] = sizes
    records["key_offset"] = np.cumsum(sizes) - sizes
    header = np.zeros(1, HEADER)
    header["magic"], header["samples"], header["tar_bytes"] = MAGIC, len(keys), tar_bytes
    header["key_bytes"], header["zstd"] = int(sizes.sum()), zstd
    return header.tobytes() + records.tobytes() + b"".join(encoded)


class ShardIndex:
    """The memory-mapped index of one shard. `records` is a read-only array of dtype `RECORD`."""

    def __init__(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            header = np.fromfile(path, HEADER, 1)
        except FileNotFoundError:
            raise UserError(f"{path}: the index is missing; run: clipdist index {path.parent}") from None
        if len(header) != 1 or header["magic"][0] != MAGIC:
            raise UserError(f"{path}: not a shard index; run: clipdist index {path.parent}")
        self.samples = int(header["samples"][0])
        self.tar_bytes = int(header["tar_bytes"][0])
        self.zstd = bool(header["zstd"][0])
        key_bytes = int(header["key_bytes"][0])
        end = HEADER.itemsize + self.samples * RECORD.itemsize
        if size != end + key_bytes:
            raise UserError(
                f"{path}: found {size} bytes, expected {end + key_bytes}; run: clipdist index {path.parent}"
            )
        # An empty map is an error of mmap's, and an empty shard is legal.
        self.records = (
            np.memmap(path, RECORD, "r", HEADER.itemsize, (self.samples,)) if self.samples else np.zeros(0, RECORD)
        )
        self._keys = np.memmap(path, np.uint8, "r", end, (key_bytes,)) if key_bytes else np.zeros(0, np.uint8)

    def key(self, row: int) -> str:
        record = self.records[row]
        start = int(record["key_offset"])
        return self._keys[start : start + int(record["key_size"])].tobytes().decode(errors="replace")


class ShardFile:
    """One open shard: reads samples by row number. Thread-safe, because positioned reads share no file position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self.index = ShardIndex(index_path(path))
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{path}: named by the manifest but missing") from None
        size = os.fstat(self._descriptor).st_size
        if size != self.index.tar_bytes:
            self.close()
            raise UserError(
                f"{path}: found {size} bytes where its index expects {self.index.tar_bytes}: "
                f"truncated, or changed after indexing (run: clipdist index {path.parent})"
            )

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def read(self, row: int) -> RawSample:
        """Sample number `row` of this shard; `BadSample` when its bytes are not what the index promises."""
        record = self.index.records[row]
        key = self.index.key(row)
        if not record["image_size"]:
            raise BadSample("no image, or an empty one")
        if record["image_kind"] >= len(IMAGE_EXTENSIONS):
            raise BadSample(f"image kind {record['image_kind']}, unknown to this version")
        members = [(int(record[f"{name}_offset"]), int(record[f"{name}_size"])) for name in ("image", "json", "text")]
        present = [member for member in members if member[1]]
        start, end = min(offset for offset, _ in present), max(offset + size for offset, size in present)
        if self.index.zstd:
            block, base = self._frame(int(record["frame_offset"]), int(record["frame_size"]), end), 0
        else:
            block, base = self._pread(start, end - start), start
        image, info, text = (block[o - base : o - base + s] if s else b"" for o, s in members)
        if [len(image), len(info), len(text)] != [s for _, s in members]:
            raise BadSample("shorter than its index says")
        fields, texts = _parse_texts(info, text)
        return RawSample(key, image, IMAGE_EXTENSIONS[record["image_kind"]], texts, fields)

    def _pread(self, offset: int, size: int) -> bytes:
        # Asked before reading: a damaged index may speak of many gigabytes.
        if offset + size > self.index.tar_bytes:
            raise BadSample(f"the shard ends at byte {self.index.tar_bytes}, its index puts this sample beyond")
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise BadSample(f"the shard ends at byte {offset + len(data)}, inside this sample")
        return data

    def _frame(self, offset: int, size: int, end: int) -> bytes:
        """A decompressed frame, whose last member ends at byte `end` before it is padded to a tar's blocks."""
        frame = self._pread(offset, size)
        try:
            # The size that a frame states is allocated before anything is checked: damaged, it may be any number.
            found = zstandard.frame_content_size(frame)
            if not end <= found < end + 512:
                raise BadSample(f"damaged Zstandard frame: of {found} bytes, expected about {end}")
            return zstandard.ZstdDecompressor().decompress(frame)
        except zstandard.ZstdError as error:
            raise BadSample(f"damaged Zstandard frame: {error}") from None


def _parse_texts(info: bytes, text: bytes) -> tuple[dict[str, Any], list[str]]:
    try:
        fields = json.loads(info) if info else {}
        plain = text.decode() if text else ""
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, endless digits or nesting
        raise BadSample(f"unreadable caption: {error}") from None
    if not isinstance(fields, dict):
        raise BadSample(f"unreadable caption: the JSON member holds a {type(fields).__name__}, expected an object")
    found = fields.pop("text", None) or plain
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise BadSample("unreadable caption: `text` must be a string or a list of strings")
    return fields, [t.strip() for t in texts if t.strip()]


class Split:
    """One split of a shard set as a sequence of samples, numbered from 0 in shard order.

    Holds one 64-bit count per shard and a bounded number of open shards, nothing per sample. Copies made by
    fork or pickle (data-loader workers) open their own files.
    """

    max_open_shards = 128

    def __init__(self, folder: Path, name: str, shards: list[ShardInfo]) -> None:
        self.folder, self.name, self.shards = folder, name, shards
        self.samples_per_shard = np.array([shard.samples for shard in shards], dtype=np.int64)
        self._ends = np.cumsum(self.samples_per_shard)
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "name": self.name, "shards": self.shards}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["folder"], state["name"], state["shards"])  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, number: int) -> tuple[int, int]:
        """Sample number -> (shard number, row in that shard)."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self.samples_per_shard[shard])

    def shard(self, number: int) -> ShardFile:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            info = self.shards[number]
            opened = ShardFile(self.folder / info.file)
            if opened.index.samples != info.samples:
                raise UserError(
                    f"{opened.path}: its index holds {opened.index.samples} samples, the manifest {info.samples}; "
                    f"run: clipdist index {self.folder}"
                )
            self._open[number] = opened
            if len(self._open) > self.max_open_shards:
                # Not closed here: another thread may be reading from it. The last reference closes it.
                self._open.popitem(last=False)
            return opened

    def key(self, number: int) -> str:
        shard, row = self.locate(number)
        return self.shard(shard).index.key(row)

    def read(self, number: int) -> RawSample:
        """Sample `number`; `BadSample` when it is damaged, `UserError` when its shard is missing or stale."""
        shard, row = self.locate(number)
        return self.shard(shard).read(row)


class ShardSet:
    """A finished shard set. `ShardSet.open(folder).split("train")` gives the samples of one split."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @staticmethod
    def open(folder: str | Path) -> "ShardSet":
        folder = Path(folder)
        return ShardSet(folder, Manifest.load(folder))

    def split(self, name: str) -> Split:
        if name not in self.manifest.splits:
            raise UserError(f"{self.folder}: no split {name!r}; it has {', '.join(map(repr, self.manifest.splits))}")
        return Split(self.folder, name, self.manifest.splits[name])
