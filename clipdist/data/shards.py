"""Shard sets on disk: ordinary WebDataset tars, an index beside each, and a manifest that is written last.

    manifest.json         splits, shards, samples, bytes, checksums, what made it, licence
    train-000000.tar      members of one sample adjacent: <key>.<image extension>, <key>.json
    train-000000.idx      where each sample's members lie, so that any sample is one positioned read away

A `.tar.zst` holds one independent Zstandard frame per sample: a plain `.tar.zst` for every tool, and yet
randomly addressable. Offsets of members then count within the decompressed frame.

The index's format is in `shard_index.py`. A checksum in it, over a sample's record, key and members, finds a flipped
bit in any of them when the sample is read.
"""

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
import zstandard

from clipdist.data.shard_index import IMAGE_EXTENSIONS, BadSample, ShardIndex, index_path, read_at, sample_checksum
from clipdist.data.stamps import check_once, checksum_descriptor
from clipdist.errors import UserError

if TYPE_CHECKING:
    from clipdist.data.remote import RemoteConfig, RemoteShards
    from clipdist.data.shard_cache import Held

FORMAT = "clipdist-shards"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"^(?P<split>.+)-(?P<number>\d{6,})\.tar(\.zst)?$")


Check = Literal["none", "sample", "shard"]
"""none: trust the bytes; sample: each sample's checksum at each read; shard: besides, each file's checksum once per
machine before its first read."""


@dataclass(frozen=True)
class RawSample:
    """One sample as stored: `image` as encoded bytes of the kind that `extension` names (`jpg`, without a dot), `texts`
    its captions, `fields` everything else that its JSON says. `texts` may be empty: whoever needs a caption checks."""

    key: str
    image: bytes
    extension: str
    texts: list[str]
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What the manifest says of one shard."""

    file: str
    samples: int
    bytes: int
    xxh3_64: str


@dataclass
class Manifest:
    """What `manifest.json` holds. `splits` maps a split's name to its shards in order; `made_by` has the command and
    the packages' versions, `sources` checksums of what was packed, `notes` what the packing recipe had to say."""

    splits: dict[str, list[ShardInfo]]
    license: str = ""
    made_by: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line per shard: readable, and small however many there are."""
        rest = {
            "license": self.license,
            "made_by": self.made_by,
            "sources": self.sources,
            "notes": self.notes,
        }
        splits = [
            f"  {_json(name)}: {{\n   "
            f'"samples": {sum(shard.samples for shard in shards)},\n   "shards": [\n    '
            + ",\n    ".join(_json({name: getattr(shard, name) for name in _SHARD_FIELDS}) for shard in shards)
            + "\n   ]\n  }"
            for name, shards in self.splits.items()
        ]
        return (
            f'{{\n "format": "{FORMAT}",\n "version": {FORMAT_VERSION},\n "splits": {{\n'
            + ",\n".join(splits)
            + "\n },\n"
            + json.dumps(rest, indent=1, ensure_ascii=False, default=asdict)[2:]
            + "\n"
        )

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Reads `folder/manifest.json`; `UserError` when it is missing, damaged or of another format version."""
        path = folder / MANIFEST
        if not folder.is_dir():
            raise UserError(f"shard set {folder}: there is no such folder")
        try:
            body = json.loads(path.read_text(encoding="utf-8"), object_hook=_shard_info)
            if body["format"] != FORMAT or body["version"] != FORMAT_VERSION:
                raise UserError(
                    f"{path}: found format {body['format']!r} version {body['version']!r}, "
                    f"expected {FORMAT!r} version {FORMAT_VERSION}; pack the set again with this version"
                )
            splits = {name: split["shards"] for name, split in body["splits"].items()}
            for shards in splits.values():
                if not isinstance(shards, list) or not all(isinstance(shard, ShardInfo) for shard in shards):
                    raise TypeError("a shard without its file, samples, bytes and xxh3_64")
            return Manifest(splits, body["license"], body["made_by"], body["sources"], body["notes"])
        except FileNotFoundError:
            raise UserError(
                f"shard set {folder}: no {MANIFEST}, so it is unfinished (pack it again) "
                f"or made by another tool (run: clipdist index {folder})"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); pack the set again") from None

    @cached_property
    def digest(self) -> str:
        """xxh3-64 over what decides the sample order: split names, shard files, counts and checksums."""
        hasher = xxhash.xxh3_64()
        for name in sorted(self.splits):
            for shard in self.splits[name]:
                hasher.update(f"{name}\0{shard.file}\0{shard.samples}\0{shard.xxh3_64}\n".encode())
        return hasher.hexdigest()


_SHARD_FIELDS = ("file", "samples", "bytes", "xxh3_64")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shard_info(found: dict[str, Any]) -> Any:
    """Turns each shard's object into its compact form while the rest is still being read."""
    if len(found) != 4 or "xxh3_64" not in found:
        return found
    info = ShardInfo(**found)
    if not isinstance(info.file, str) or not isinstance(info.samples, int) or info.samples < 0:
        raise TypeError(f"file {info.file!r} with {info.samples!r} samples")
    return info


def checksum_file(path: Path) -> str:
    """xxh3-64 of a file's bytes, 16 hexadecimal digits."""
    with open(path, "rb") as file:
        return checksum_descriptor(file.fileno())


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


class ShardFile:
    """One open shard: reads samples by row number. Thread-safe, because positioned reads share no file position.

    `check`: what is compared with its checksum. `checksum` is the manifest's, which "shard" needs.
    """

    held: "Held | None" = None
    """Keeps a remote set's shard in the cache while this one is open."""

    def __init__(self, path: Path, *, check: Check = "sample", checksum: str = "") -> None:
        self.path, self.check = path, check
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
        if check == "shard":
            check_once(path, self._descriptor, checksum)

    def close(self) -> None:
        self.index.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, row: int) -> RawSample:
        """Sample number `row` of this shard; `BadSample` when its bytes are not those that were indexed."""
        record, entry, key = self.index.entry(row)
        if not entry.image_size:
            raise BadSample("no image, or an empty one")
        if entry.image_kind >= len(IMAGE_EXTENSIONS):
            raise BadSample(f"image kind {entry.image_kind}, unknown to this version")
        members = (
            (entry.image_offset, entry.image_size),
            (entry.json_offset, entry.json_size),
            (entry.text_offset, entry.text_size),
        )
        start = min(offset for offset, size in members if size)
        end = max(offset + size for offset, size in members if size)
        if self.index.zstd:
            block, base = self._frame(entry.frame_offset, entry.frame_size, end), 0
        else:
            block, base = self._pread(start, end - start), start
        image, info, text = (block[o - base : o - base + s] if s else b"" for o, s in members)
        if self.check != "none":
            found = sample_checksum(row, record, key, (image, info, text))
            if found != entry.checksum:
                raise BadSample(f"checksum differs: found {found:08x}, its index has {entry.checksum:08x}")
        fields, texts = _parse_texts(info, text)
        return RawSample(key.decode(errors="replace"), image, IMAGE_EXTENSIONS[entry.image_kind], texts, fields)

    def image(self, row: int, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start..stop of sample `row`'s image, by default all; no checksum is compared. Raises `BadSample`."""
        _, entry, _ = self.index.entry(row)
        stop = entry.image_size if stop is None else min(stop, entry.image_size)
        at = entry.image_offset
        if self.index.zstd and entry.image_size:
            return self._frame(entry.frame_offset, entry.frame_size, at + stop)[at + start : at + stop]
        return self._pread(at + start, max(0, stop - start))

    def fields(self, row: int) -> dict[str, Any]:
        """The JSON member of sample `row` alone, `text` included; its checksum, which is the whole sample's, is not
        compared. Raises `BadSample`."""
        _, entry, _ = self.index.entry(row)
        end = entry.json_offset + entry.json_size
        if self.index.zstd and entry.json_size:
            info = self._frame(entry.frame_offset, entry.frame_size, end)[entry.json_offset : end]
        else:
            info = self._pread(entry.json_offset, entry.json_size)
        try:
            return json_fields(info)
        except ValueError as error:
            raise BadSample(f"unreadable JSON: {error}") from None

    def _pread(self, offset: int, size: int) -> bytes:
        # Asked before reading: a damaged index may speak of many gigabytes.
        if offset + size > self.index.tar_bytes:
            raise BadSample(f"the shard ends at byte {self.index.tar_bytes}, its index puts this sample beyond")
        data = read_at(self._descriptor, size, offset)
        if len(data) != size:
            raise BadSample(f"the shard ends at byte {offset + len(data)}, inside this sample")
        return data

    def _frame(self, offset: int, size: int, end: int) -> bytes:
        """A decompressed frame, at least up to byte `end`, where the sample's last member ends."""
        frame = self._pread(offset, size)
        try:
            # A damaged index or frame may speak of any size: both must agree before anything is allocated.
            found = zstandard.frame_content_size(frame)
            if not end <= found:
                raise BadSample(f"damaged Zstandard frame: of {found} bytes, expected at least {end}")
            if found < end + 512:  # but for the padding, the whole frame
                return zstandard.ZstdDecompressor().decompress(frame)
            with zstandard.ZstdDecompressor().stream_reader(frame) as reader:
                block = reader.read(end)
        except (zstandard.ZstdError, MemoryError) as error:
            raise BadSample(f"damaged Zstandard frame: {error}") from None
        if len(block) != end:
            raise BadSample(f"damaged Zstandard frame: it ends after {len(block)} bytes, expected {end}")
        return block


def json_fields(info: bytes) -> dict[str, Any]:
    """The fields of a JSON member; none when it is empty. ValueError says why it cannot be used."""
    try:
        fields = json.loads(info) if info else {}
        if b"\\u" in info:  # an escape may stand for half a character, which is no text
            json.dumps(fields, ensure_ascii=False).encode()
    except RecursionError as error:  # endless nesting
        raise ValueError(str(error)) from None
    if not isinstance(fields, dict):
        raise ValueError(f"the JSON member holds a {type(fields).__name__}, expected an object")
    return fields


def _parse_texts(info: bytes, text: bytes) -> tuple[dict[str, Any], list[str]]:
    try:
        fields, plain = json_fields(info), text.decode()
    except ValueError as error:  # no JSON, no UTF-8, endless digits
        raise BadSample(f"unreadable caption: {error}") from None
    found = fields.pop("text", None) or plain
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise BadSample("unreadable caption: `text` must be a string or a list of strings")
    return fields, [t.strip() for t in texts if t.strip()]


class Split:
    """One split of a shard set as a sequence of samples, numbered from 0 in shard order; `len` says how many.

    Holds one 64-bit count per shard and a bounded number of open shards, nothing per sample. Copies made by
    fork or pickle (data-loader workers) open their own files.
    """

    max_open_shards = 128

    def __init__(
        self,
        folder: Path,
        name: str,
        shards: list[ShardInfo],
        *,
        check: Check = "sample",
        remote: "RemoteShards | None" = None,
    ) -> None:
        self.folder, self.name, self.shards, self.check, self.remote = folder, name, shards, check, remote
        self._process = os.getpid()
        self.samples_per_shard = np.array([shard.samples for shard in shards], dtype=np.int64)
        self._ends = np.cumsum(self.samples_per_shard)
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("folder", "name", "shards", "check", "remote")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def digest(self) -> str:
        """xxh3-64 over its shards' files, counts and checksums, 16 hexadecimal digits."""
        hasher = xxhash.xxh3_64()
        for shard in self.shards:
            hasher.update(f"{shard.file}\0{shard.samples}\0{shard.xxh3_64}\n".encode())
        return hasher.hexdigest()

    def locate(self, number: int) -> tuple[int, int]:
        """Sample number -> (shard number, row in that shard)."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self.samples_per_shard[shard])

    @property
    def is_remote(self) -> bool:
        return self.remote is not None

    def hold(self, number: int, stopped: Callable[[], bool] = lambda: False) -> "Held | None":
        """Brings a shard of a remote set onto this machine, where it stays until the result is closed; None for a set
        that is here. Raises as `RemoteShards.hold` does."""
        return self.remote.hold(self.shards[number], stopped) if self.remote else None

    def _let_go(self) -> bool:
        """Closes the shard unused for longest, for a cache that is full; False when none is open."""
        return bool(self._open) and bool(self._open.popitem(last=False))

    def shard(self, number: int) -> ShardFile:
        with self._lock:
            if self.remote and self._process != os.getpid():
                # Those of the parent: what keeps them in the cache stayed there.
                self._open.clear()
                self._process = os.getpid()
            if self.remote and len(self._open) > 1 and self.remote.cache.room_wanted():
                kept = {number: self._open[number]} if number in self._open else {}
                self._open = OrderedDict(kept)
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            info = self.shards[number]
            held = self.remote.hold(info, let_go=self._let_go) if self.remote else None
            opened = ShardFile(self.folder / info.file, check=self.check, checksum=info.xxh3_64)
            opened.held = held
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

    def records(self, number: int) -> np.ndarray:
        """The index records of a shard, dtype `RECORD`; keeps neither the shard nor its index open."""
        with self.hold(number) or nullcontext():
            index = ShardIndex(index_path(self.folder / self.shards[number].file))
            records = index.records.copy()
            index.close()
        return records

    def let_go(self) -> None:
        """Closes the shards that this process has open."""
        with self._lock:
            self._open.clear()

    def key(self, number: int) -> str:
        """The key of sample `number`, without reading the sample."""
        shard, row = self.locate(number)
        return self.shard(shard).index.key(row)

    def read(self, number: int) -> RawSample:
        """Sample `number`, 0 ≤ number < len: one positioned read. Safe to call from several threads.

        Raises `BadSample` when it is damaged, `UserError` when its shard is missing or stale, `IndexError`.
        """
        shard, row = self.locate(number)
        return self.shard(shard).read(row)

    def fields(self, number: int) -> dict[str, Any]:
        """The JSON member of sample `number` alone, `text` included; raises as `ShardFile.fields` and `read` do."""
        shard, row = self.locate(number)
        return self.shard(shard).fields(row)


class ShardSet:
    """A finished shard set. `ShardSet.open(folder).split("train")` gives the samples of one split.

    `folder` of a set behind a URL is its place in the cache; `location` is what was opened.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, check: Check = "sample", remote: "RemoteShards | None" = None
    ) -> None:
        self.folder, self.manifest, self.check, self.remote = folder, manifest, check, remote
        self.location = remote.files.url if remote else str(folder)

    @staticmethod
    def open(folder: str | Path, *, check: Check = "sample", remote: "RemoteConfig | None" = None) -> "ShardSet":
        """A folder, or a URL that fsspec knows (`s3://…`), which `remote` says how to fetch.

        Reads the manifest alone, whatever the size of the set. `check` says what later reads compare with its checksum:
        nothing (`none`), each `sample`, or besides each `shard`'s file once per machine. Raises `UserError` for a
        folder that is missing, unfinished or not yet indexed.
        """
        if isinstance(folder, str) and "://" in folder:
            # Only here: fsspec and what it brings take time to import.
            from clipdist.data.remote import open_remote

            fetched, manifest = open_remote(folder, remote)
            return ShardSet(fetched.folder, manifest, check=check, remote=fetched)
        folder = Path(folder)
        return ShardSet(folder, Manifest.load(folder), check=check)

    def split(self, name: str) -> Split:
        """The samples of one split; opens no file yet. Raises `UserError` naming the splits that there are."""
        if name not in self.manifest.splits:
            raise UserError(f"{self.folder}: no split {name!r}; it has {', '.join(map(repr, self.manifest.splits))}")
        return Split(self.folder, name, self.manifest.splits[name], check=self.check, remote=self.remote)
