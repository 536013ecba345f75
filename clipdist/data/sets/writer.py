"""Writing shard sets: deterministic bytes, every file whole or absent, the manifest last."""

import contextlib
import importlib.metadata
import io
import json
import os
import shlex
import sys
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
import zstandard

from clipdist.data.shards import (
    IMAGE_EXTENSIONS,
    MANIFEST,
    RECORD,
    SHARD_NAME,
    Manifest,
    ShardInfo,
    fsync_folder,
    index_bytes,
    index_path,
    write_atomically,
)
from clipdist.errors import UserError, disk_errors

UNFINISHED = ".unfinished"
BLOCK = 512
END_OF_ARCHIVE = b"\0" * (2 * BLOCK)
LONGEST_KEY = 4096  # bytes; what file systems take for a path, far below the index's 16 bits


def made_by(command: list[str] | None = None) -> dict[str, Any]:
    """The command line and the versions of the packages that shaped the bytes, for the manifest."""
    versions = {name: importlib.metadata.version(name) for name in ("pillow", "numpy", "zstandard")}
    from clipdist import __version__

    return {"command": shlex.join(command or sys.argv), "versions": {"clipdist": __version__, **versions}}


class ShardSetWriter:
    """Writes a shard set into `folder`; a context manager. On a clean exit the manifest is written, last.

    After an exception there is no manifest, so what was written is never taken for a whole set; the same
    call again clears it away. Equal calls of `write` give equal bytes.

    Raises `UserError` when `folder` already holds a set and `overwrite` is false, when a key is used twice,
    and when the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        *,
        samples_per_shard: int = 1000,
        zstd: bool = False,
        license_text: str = "",
        command: list[str] | None = None,
        sources: dict[str, str] | None = None,
        notes: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        if samples_per_shard < 1:
            raise UserError(f"samples per shard: found {samples_per_shard}, expected at least 1")
        self.folder, self.samples_per_shard, self.zstd, self.overwrite = folder, samples_per_shard, zstd, overwrite
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
        if manifest.exists() and not self.overwrite:
            raise UserError(f"{self.folder}: already holds a shard set; choose another folder or pass --overwrite")
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
        return self._manifest

    def write(self, split: str, key: str, image: bytes, extension: str, fields: dict[str, Any]) -> None:
        """Appends one sample; all of `fields` goes to `<key>.json`, `fields["text"]` is its caption or captions."""
        extension = extension.lower().lstrip(".")
        if extension not in IMAGE_EXTENSIONS:
            raise UserError(f"{key}: image extension {extension!r}, expected one of {', '.join(IMAGE_EXTENSIONS)}")
        _check_key(key)
        if key in self._keys:
            raise UserError(f"key {key!r} is used twice; keys must be unique in a shard set")
        if not split or "/" in split or "\0" in split:
            raise UserError(f"split {split!r}: expected a name that can begin a file's name")
        try:
            info = json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()
        except (TypeError, ValueError) as error:
            raise UserError(f"{key}: its fields cannot be written as JSON in UTF-8 ({error})") from None
        self._keys.add(key)
        if split not in self._manifest.splits:
            self._manifest.splits[split] = []
        with disk_errors(self.folder):
            if split not in self._open:
                number = len(self._manifest.splits[split])
                suffix = ".tar.zst" if self.zstd else ".tar"
                self._open[split] = _OpenShard(self.folder / f"{split}-{number:06d}{suffix}", self.zstd)
            shard = self._open[split]
            shard.append(key, image, extension, info)
            if len(shard.keys) >= self.samples_per_shard:
                self.close_shard(split)

    def close_shard(self, split: str) -> None:
        """Finishes the split's open shard, if any; the next `write` starts another."""
        if split in self._open:
            self._manifest.splits[split].append(self._open.pop(split).finish())


def _check_key(key: str) -> None:
    *folders, last = key.split("/")
    if "." in last or ".." in folders or key.startswith("/") or not last or "\0" in key:
        raise UserError(f"key {key!r}: expected a relative name without dots (a dot starts the extension in a tar)")
    try:
        size = len(key.encode())
    except UnicodeEncodeError as error:
        raise UserError(f"key {key!r}: cannot be written in UTF-8 ({error.reason})") from None
    if size > LONGEST_KEY:
        raise UserError(f"key {key[:40]!r}…: found {size} bytes, expected at most {LONGEST_KEY}")


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


class _OpenShard:
    """One shard being written under a temporary name."""

    def __init__(self, path: Path, zstd: bool) -> None:
        self.path, self.position = path, 0
        self.keys: list[str] = []
        self._records = io.BytesIO()
        self._hasher = xxhash.xxh3_64()
        # The checksum inside each frame makes a flipped bit an error instead of another picture.
        self._compressor = zstandard.ZstdCompressor(level=3, write_checksum=True) if zstd else None
        self._temporary = path.with_name(path.name + ".partial")
        self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed by finish or abandon)

    def append(self, key: str, image: bytes, extension: str, info: bytes) -> None:
        record = np.zeros(1, RECORD)
        block = io.BytesIO()
        base = 0 if self._compressor else self.position
        members = (("image", extension, image), ("json", "json", info))
        for name, suffix, data in members:
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size, header.mode = len(data), 0o644
            block.write(header.tobuf(tarfile.PAX_FORMAT))
            record[f"{name}_offset"], record[f"{name}_size"] = base + block.tell(), len(data)
            block.write(data + b"\0" * (-len(data) % BLOCK))
        record["image_kind"] = IMAGE_EXTENSIONS.index(extension)
        frame_offset, written = self.position, self._write(block.getvalue())
        if self._compressor:
            record["frame_offset"], record["frame_size"] = frame_offset, written
        self._records.write(record.tobytes())
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
