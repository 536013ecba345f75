"""Index and manifest for WebDataset tars of other tools, made in one pass without touching the tars."""

import contextlib
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.tariterators import base_plus_ext

from clipdist.data.sets.writer import BLOCK, UNFINISHED, made_by
from clipdist.data.shards import (
    IMAGE_EXTENSIONS,
    MANIFEST,
    RECORD,
    Manifest,
    ShardInfo,
    checksum_file,
    index_bytes,
    index_path,
    write_atomically,
)
from clipdist.errors import UserError

MAX_MEMBER_BYTES = (1 << 32) - 1


def index_tar(path: Path) -> tuple[np.ndarray, list[str]]:
    """(records, keys) of a plain tar's samples; members are grouped by WebDataset's own rule.

    Members other than one image, one `.json` and one `.txt` per key are left alone. Raises `UserError` for a tar that
    ends early, a key whose members are not adjacent, and members that the format cannot hold.
    """
    rows: list[np.ndarray] = []
    keys: list[str] = []
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, extension = base_plus_ext(member.name)
                kind = _kind(extension)
                if key is None or kind is None:
                    continue
                if not keys or keys[-1] != key:
                    if key in seen:
                        raise UserError(f"{path}: the members of sample {key!r} are not adjacent; repack this shard")
                    seen.add(key)
                    keys.append(key)
                    rows.append(np.zeros(1, RECORD))
                _note(rows[-1], kind, str(extension), member, path)
            # Python's tarfile takes a damaged header for the end; the true end is a block of zeros.
            with open(path, "rb") as file:
                file.seek(tar.offset)
                end = file.read(BLOCK)
            if end != bytes(BLOCK):
                raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: damaged tar after {len(keys)} samples ({error}); restore or repack it") from None
    return (np.concatenate(rows) if rows else np.zeros(0, RECORD)), keys


def _kind(extension: str | None) -> str | None:
    lower = (extension or "").lower()
    if lower in IMAGE_EXTENSIONS:
        return "image"
    return {"json": "json", "txt": "text"}.get(lower)


def _note(record: np.ndarray, kind: str, extension: str, member: tarfile.TarInfo, path: Path) -> None:
    if record[f"{kind}_size"][0]:
        raise UserError(f"{path}: sample of {member.name!r} has two {kind} members; expected one")
    if member.size > MAX_MEMBER_BYTES:
        raise UserError(f"{path}: {member.name!r} has {member.size} bytes; the index holds less than 4 GiB a member")
    record[f"{kind}_offset"], record[f"{kind}_size"] = member.offset_data, member.size
    if kind == "image":
        record["image_kind"] = IMAGE_EXTENSIONS.index(extension.lower())


def index_folder(folder: Path, *, shown: Any = iter) -> Manifest:
    """Indexes every `*.tar` of a folder and writes the manifest, last. A split is what stands before a shard's number.

    `shown` wraps the iteration over tars to report progress. Raises `UserError` when there is no tar, and for those
    that it cannot index, naming the first.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    if (folder / UNFINISHED).exists():
        raise UserError(f"{folder}: a packing run was interrupted here; run it again instead of indexing what it left")
    packed = sorted(folder.glob("*.tar.zst"))
    if packed:
        raise UserError(f"{packed[0]}: a compressed tar cannot be indexed afterwards; unpack it, or pack the set again")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: holds no .tar file")
    splits: dict[str, list[ShardInfo]] = {}
    for path in shown(tars):
        records, keys = index_tar(path)
        size = path.stat().st_size
        write_atomically(index_path(path), index_bytes(records, keys, size, zstd=False))
        splits.setdefault(split_name(path.name), []).append(ShardInfo(path.name, len(keys), size, checksum_file(path)))
    licence, sources = "", {}
    if (folder / MANIFEST).exists():
        with contextlib.suppress(UserError):  # indexing is how a damaged manifest is mended
            old = Manifest.load(folder)
            licence, sources = old.license, old.sources
    manifest = Manifest(splits, licence, made_by(), sources, {"indexed": "in place"})
    write_atomically(folder / MANIFEST, manifest.to_json().encode())
    return manifest


def split_name(file: str) -> str:
    """`train-000000.tar` -> `train`; a name that is a bare number -> `train`."""
    return re.sub(r"[-_.]?\d+$", "", file.removesuffix(".tar")) or "train"
