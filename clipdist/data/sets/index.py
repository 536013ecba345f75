"""Index and manifest for tars of other tools, and for shards that lost theirs; the tars stay as they are."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.data.sets.tar_samples import index_tar
from clipdist.data.sets.writer import UNFINISHED, made_by
from clipdist.data.shard_index import ShardIndex, index_bytes, index_path
from clipdist.data.shards import MANIFEST, Check, Manifest, ShardInfo, ShardSet, write_atomically
from clipdist.errors import UserError, disk_errors
from clipdist.progress import progress

if TYPE_CHECKING:
    from clipdist.data.remote import RemoteConfig

logger = logging.getLogger(__name__)

# Below this much to read, starting processes costs more than it saves.
SMALL_BYTES = 64 << 20
# How often rank 0 tells the others that it still indexes.
REPORT_SECONDS = 5.0

Shown = Callable[[Iterable[Any], int], Iterable[Any]]


def index_folder(
    folder: Path,
    *,
    workers: int | None = None,
    force: bool = False,
    shown: Shown = lambda items, total: items,
) -> Manifest:
    """Indexes every tar of a folder and writes the manifest, last. A split is what stands before a shard's number.

    A tar that the manifest already names, with its size, and whose index is not older, is passed over unless `force`.
    `workers`: processes; by default one per core, or none but this when there is little to read. `shown` wraps the
    stream of finished shards, with their number, to report progress. Raises `UserError` when there is no tar, and for
    those that it cannot index, naming the first; an old manifest then still stands.
    """
    tars = _tars(folder)
    old = _old_manifest(folder)
    known = {shard.file: shard for shards in old.splits.values() for shard in shards} if old else {}
    infos = {path.name: known[path.name] for path in tars if not force and _is_indexed(path, known.get(path.name))}
    stale = [path for path in tars if path.name not in infos]
    with disk_errors(folder):
        for info in shown(_each(stale, workers), len(stale)):
            infos[info.file] = info
        splits: dict[str, list[ShardInfo]] = {}
        for path in tars:
            splits.setdefault(split_name(path.name), []).append(infos[path.name])
        if old and not stale and {info.file for info in known.values()} == infos.keys():
            return old
        manifest = Manifest(splits, made_by=made_by(), notes={"indexed": made_by()})
        if old:
            manifest = Manifest(splits, old.license, old.made_by, old.sources, old.notes | manifest.notes)
        write_atomically(folder / MANIFEST, manifest.to_json().encode())
    return manifest


def _tars(folder: Path) -> list[Path]:
    """The tars of a folder in the order of their names, plain and compressed."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    if (folder / UNFINISHED).exists():
        raise UserError(f"{folder}: a packing run was interrupted here; run it again instead of indexing what it left")
    tars = sorted(path for path in folder.iterdir() if path.name.endswith((".tar", ".tar.zst")))
    if not tars:
        raise UserError(f"{folder}: holds no .tar or .tar.zst file")
    indexes: dict[Path, Path] = {}
    for path in tars:
        if index_path(path) in indexes:
            first = indexes[index_path(path)].name
            raise UserError(f"{folder}: {first} and {path.name} would share one index; rename or remove one of them")
        indexes[index_path(path)] = path
    return tars


def _old_manifest(folder: Path) -> Manifest | None:
    if not (folder / MANIFEST).exists():
        return None
    try:
        return Manifest.load(folder)
    except UserError as error:
        # Indexing is how a damaged manifest is mended; what it said of licence and origin is beyond reading.
        logger.warning("%s; made anew, without what it said of licence and sources", error)
        return None


def _is_indexed(path: Path, known: ShardInfo | None) -> bool:
    if known is None:
        return False
    try:
        tar, index, header = path.stat(), index_path(path).stat(), ShardIndex(index_path(path))
    except (OSError, UserError):
        return False
    if (header.tar_bytes, header.samples) != (tar.st_size, known.samples):
        return False
    return known.bytes == tar.st_size and index.st_mtime_ns >= tar.st_mtime_ns


def _each(tars: list[Path], workers: int | None) -> Iterator[ShardInfo]:
    if workers is None:
        small = sum(path.stat().st_size for path in tars) < SMALL_BYTES
        workers = 1 if small else len(os.sched_getaffinity(0))
    workers = min(workers, len(tars))
    if workers <= 1:
        yield from map(_index_one, tars)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_index_one, tars)


def _index_one(path: Path) -> ShardInfo:
    """Writes the index of one tar."""
    before = path.stat()
    records, keys, checksum = index_tar(path)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path}: changed while it was indexed; wait until it is written, then index again")
    zstd = path.name.endswith(".zst")
    write_atomically(index_path(path), index_bytes(records, keys, after.st_size, zstd))
    return ShardInfo(path.name, len(keys), after.st_size, checksum)


def split_name(file: str) -> str:
    """`train-000000.tar` -> `train`; a name that is a bare number -> `train`."""
    return re.sub(r"[-_.]?\d+$", "", re.sub(r"\.tar(\.zst)?$", "", file)) or "train"


def open_or_index(folder: str | Path, *, check: Check = "sample", remote: "RemoteConfig | None" = None) -> ShardSet:
    """Opens a shard set for training; all ranks call it together.

    A folder with tars and no manifest is indexed first, by rank 0 while the others wait. Raises `UserError`, on all
    ranks, when that cannot be done.
    """
    from clipdist import world  # brings torch, which `clipdist index` can do without

    if "://" not in str(folder):
        wrong = ""
        if world.connected().world_size == 1:
            wrong = _index_if_needed(Path(folder))
        else:
            with ThreadPoolExecutor(1) as pool:
                work = pool.submit(_index_if_needed, Path(folder)) if world.connected().is_main else None
                # Rank 0 reports every few seconds: a collective that waits for hours would be taken for a hung one.
                while (wrong := world.broadcast_object(_outcome(work))) is None:
                    pass
        if wrong:
            raise UserError(wrong)
    return ShardSet.open(folder, check=check, remote=remote)


def _index_if_needed(folder: Path) -> str:
    """What is wrong; empty: nothing."""
    if not folder.is_dir() or (folder / MANIFEST).exists() or (folder / UNFINISHED).exists():
        return ""  # opening it says what there is to say
    number = sum(path.name.endswith((".tar", ".tar.zst")) for path in folder.iterdir())
    if not number:
        return ""
    if not os.access(folder, os.W_OK):
        return (
            f"{folder}: holds {number} tars without an index, and cannot be written; "
            f"run clipdist index on it with the rights to, or on a copy"
        )
    logger.warning("%s: holds %d tars without an index; indexing them first, as clipdist index does", folder, number)
    try:
        index_folder(
            folder, shown=lambda items, total: progress(items, total=total, unit="shard", description="indexing")
        )
    except UserError as error:
        return str(error)
    return ""


def _outcome(work: Future[str] | None) -> str | None:
    """What `work` returned; None while it goes on, or when it is another rank's."""
    if work is None:
        return None
    wait([work], timeout=REPORT_SECONDS)
    return work.result() if work.done() else None
