"""One question to each shard of a set, in processes; whether an earlier answer still holds; the rows of all shards."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from clipdist.data.shard_index import MAGIC
from clipdist.data.shards import FORMAT_VERSION, BadSample, RawSample, ShardFile, ShardInfo, index_path
from clipdist.errors import UserError
from clipdist.user_cache import user_cache

Answer = TypeVar("Answer")


def state_path(folder: Path, name: str) -> Path:
    """Where answers about the shards of `folder` are kept by default: under `name` in it, or in the user's cache folder
    when it cannot be written to."""
    if os.access(folder, os.W_OK):
        return folder / name
    own = xxhash.xxh3_128_hexdigest(str(folder.absolute()).encode(errors="surrogateescape"))
    return user_cache("states") / f"{own}{name}"


def stamp(folder: Path, split: str, info: ShardInfo, version: int) -> dict[str, Any] | None:
    """What an answer is tied to; None when the shard or its index is missing."""
    try:
        tar, index = (folder / info.file).stat(), index_path(folder / info.file).stat()
    except OSError:
        return None
    return {
        "version": [version, FORMAT_VERSION, MAGIC.decode()],
        "split": split,
        "manifest": asdict(info),
        "tar": [tar.st_size, tar.st_mtime_ns],
        "index": [index.st_size, index.st_mtime_ns],
    }


def ask_each(
    folder: Path,
    shards: list[tuple[str, ShardInfo]],
    question: Callable[..., Answer],
    *arguments: Any,
    workers: int,
    total: int,
) -> Iterator[Answer]:
    """`question(folder, split, info, *arguments)` of each shard, as the answers come, by `workers` processes (up to 1:
    this one). `total` shards the set has; those that are not asked were done before."""
    if min(workers, len(shards)) <= 1:
        for split, info in shards:
            yield question(folder, split, info, *arguments)
        return
    done = total - len(shards)
    pool = ProcessPoolExecutor(min(workers, len(shards)), mp_context=get_context("spawn"))
    try:
        futures = [pool.submit(question, folder, split, info, *arguments) for split, info in shards]
        for future in as_completed(futures):
            answer = future.result()
            done += 1
            yield answer
    except BrokenProcessPool:
        raise UserError(
            f"{folder}: a process that examines shards died, most likely for lack of memory; {done:,} of {total:,} "
            f"shards are done and kept; run it again, with fewer than {workers} --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Rows:
    """All samples of a set in the order of its shards, numbered from 0; what they are called is read where it is asked.

    `shards` are (split, file, samples). `split_of`, int32 [N], numbers the names in `splits`; `whole`, bool [N], says
    which rows lie in a shard that can be opened. The others, of the files `damaged`, are named by their place in it.
    """

    def __init__(
        self, folder: Path, shards: Sequence[tuple[str, str, int]], damaged: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self._files, self.damaged = folder, [file for _, file, _ in shards], damaged or {}
        self.splits = list(dict.fromkeys(split for split, _, _ in shards))
        sizes = np.array([samples for _, _, samples in shards], np.int64)
        number = {split: place for place, split in enumerate(self.splits)}
        self.split_of = np.repeat(np.array([number[split] for split, _, _ in shards], np.int32), sizes)
        self.whole = np.repeat(np.array([file not in self.damaged for file in self._files], bool), sizes)
        self._ends, self._starts = np.cumsum(sizes), np.cumsum(sizes) - sizes
        self._open: ShardFile | None = None

    def __len__(self) -> int:
        return len(self.split_of)

    def key(self, row: int) -> str:
        """The sample's key; `shard file, sample n`, the first being 1, where the shard cannot be opened."""
        if not self.whole[row]:
            number, place = self._located(row)
            return f"{self._files[number]}, sample {place + 1:,}"
        shard, place = self._shard(row)
        return shard.index.key(place)

    def split(self, row: int) -> str:
        return self.splits[self.split_of[row]]

    def file(self, row: int) -> str:
        """The shard that it lies in."""
        return self._files[self._located(row)[0]]

    def place(self, row: int) -> str:
        """`split: key`."""
        return f"{self.split(row)}: {self.key(row)}"

    def read(self, row: int) -> RawSample:
        """Raises `BadSample`."""
        if not self.whole[row]:
            raise BadSample(self.damaged[self.file(row)])
        shard, place = self._shard(row)
        return shard.read(place)

    def _located(self, row: int) -> tuple[int, int]:
        """(number of the shard, place in it)."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        return number, int(row) - int(self._starts[number])

    def _shard(self, row: int) -> tuple[ShardFile, int]:
        number, place = self._located(row)
        path = self.folder / self._files[number]
        if self._open is None or self._open.path != path:
            self._open = ShardFile(path)
        return self._open, place
