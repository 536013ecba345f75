"""Checkpoints: complete or absent, checksummed, and small in number.

    checkpoints/step-00001200/model.safetensors  optimizer.safetensors  state.json  checksums.json
                        or/shard-00001-….safetensors shard-00002-… …    state.json  checksums.json
    checkpoints/latest                           the name of the newest complete one

Weights and what the optimiser keeps (`exp_avg/<parameter>`, …) are stored by the parameters' names: whole, or, where
the engine holds its state in parts, in the part that each rank has, by torch.distributed.checkpoint. Any engine on any
number of processes reads either.

No random states are kept, because none exist between steps: every step seeds its generators from (seed, step, rank).
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from clipdist import world
from clipdist.data.shards import checksum_file, fsync_folder, write_atomically
from clipdist.errors import DiskError, UserError, disk_errors, disk_outages
from clipdist.model.saved import plain
from clipdist.model.stored import Stored
from clipdist.settings import settings
from clipdist.train.engine import OptimizerState
from clipdist.train.outage import Outage

logger = logging.getLogger(__name__)

NAME = re.compile(r"^step-(\d{8,})$")
LATEST = "latest"
STATE, CHECKSUMS = "state.json", "checksums.json"
WHOLE = ("model.safetensors", "optimizer.safetensors")
PARTS = "shard-*.safetensors"
MODEL, OPTIMIZER = "model/", "optimizer/"  # how names begin that lie in one file
AVERAGE = "average"
"""The kind of optimiser state under which an average of the weights is stored (see ema.py)."""


@settings
class CheckpointConfig:
    every_steps: NonNegativeInt = 0
    """0: not by steps."""
    every_minutes: NonNegativeFloat = 15.0
    """0: not by time."""
    keep: PositiveInt = 2
    """How many of the newest stay."""
    in_background: bool = True
    """Training goes on while a checkpoint is written; it takes as much memory more as weights and optimiser have."""
    retry_minutes: NonNegativeFloat = 4.0
    """At the end, or when asked to stop, a disk that refuses the last checkpoint is waited for so long. In between,
    training goes on without, however long it takes."""


class Checkpoint(NamedTuple):
    """What is read back; tensors are read from the disk when they are asked for."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    averages: Mapping[str, Tensor]
    """Of the weights; empty where the run keeps none."""
    state: dict[str, Any]


class CheckpointSaver:
    """Saves the checkpoints of a run, in a thread of its own if so configured, and outlives a disk that refuses them.

    Rank 0 has one; where the engine holds its state in parts, every rank has one and calls its methods together with
    the others. At most one checkpoint is being written: `save` waits for the one before.

    What the disk refuses is no exception: rank 0 warns, `error` says it on every rank that has a saver, and `wants`
    asks for another checkpoint after a pause. Any other failure in the thread is raised by whichever of the methods is
    called next. `before` is called by rank 0 at each save: what must be on the disk first.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, before: Callable[[], None] | None = None) -> None:
        self.folder, self.config, self.before = folder, config, before
        self.main = world.connected().is_main
        self.outage = Outage(tells=self.main)
        self._pool = ThreadPoolExecutor(1, "checkpoint") if config.in_background else None
        self._pending: tuple[int, Future[Any]] | None = None
        self._group: Any = None
        self._owed: dict[str, Callable[[], object]] = {}
        self._newest: int | None = newest_step(folder)

    @property
    def error(self) -> DiskError | None:
        """Why there is no checkpoint that holds all up to the last save; None when there is, or it is being written."""
        return self.outage.error

    def save(self, step: int, model: dict[str, Tensor], optimizer: OptimizerState, state: dict[str, Any]) -> None:
        """Takes a copy of everything, and returns as soon as that is made, or, without a thread, when it is written."""
        self.wait()
        if self._prepare(step) is None:
            files = checkpoint_files(model, optimizer)
            self._run(step, lambda: save_checkpoint(self.folder, step, files, state, self.config.keep))

    def save_parts(self, step: int, model: dict[str, Tensor], optimizer: OptimizerState, state: dict[str, Any]) -> None:
        """The same of tensors that lie in parts on the ranks: each writes its own, and rank 0 completes the checkpoint
        when all have."""
        self.wait()
        parts = {f"{MODEL}{name}": tensor for name, tensor in model.items()}
        parts |= {f"{OPTIMIZER}{name}": tensor for name, tensor in _moments(optimizer).items()}
        if self._group is None:  # its own: collectives of a thread must not meet those of the training
            self._group = dist.new_group(backend="gloo")
        refused = world.broadcast_object(self._prepare(step, begin=True) if self.main else None)
        if refused is not None:
            if not self.main:
                self._refused(step, refused)
            return
        writer = HuggingFaceStorageWriter(str(_partial(self.folder, step)), save_distributed=True)
        words: dict[str, Any] = {"storage_writer": writer, "process_group": self._group}
        written = dcp.async_save(parts, **words) if self._pool else None

        def finish() -> None:
            with _removed_on_error(self.folder, step, self.main), _unwrapped():
                if written is None:
                    dcp.save(parts, **words)
                else:
                    written.result()  # type: ignore[union-attr]
                # Torch gathers what all ranks have written at rank 0, so here all of it is there.
                if self.main:
                    _complete(self.folder, step, state)
            if self.main:
                _remove_old(self.folder, step, self.config.keep)

        self._run(step, finish)

    def first(self, what: str, work: Callable[[], object], keep: Callable[[], object] | None = None) -> None:
        """Does `work`, which writes into the run's folder and may be done twice; what the disk refuses is done again
        before the next checkpoint, and of the same `what` the last alone. `keep` is then called at once: it copies what
        will have changed by that time. Rank 0 calls it."""
        self._owed.pop(what, None)
        try:
            with disk_outages(self.folder):
                work()
        except DiskError as error:
            if keep:
                keep()
            self._owed[what] = work
            self.outage.failed(error, what, self._last())

    def wants(self, due: bool) -> bool:
        """Whether rank 0 is to ask for a save now: when one is `due`, but while the disk refuses, after each pause."""
        self.check()
        if self.error is None:
            return due
        return self._pending is None and self.outage.pause_left == 0

    def check(self) -> None:
        """Takes note of a save that has ended by now."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Returns when this process writes nothing any more."""
        if self._pending is not None:
            (step, pending), self._pending = self._pending, None
            self._settle(step, pending.result)

    def given_up(self) -> DiskError | None:
        """`error`, for when there will be no further attempt: it tells what is there."""
        if self.error is None:
            return None
        return DiskError(f"{self.error} (tried for {self.config.retry_minutes:g} min; {self._last()})")

    def _prepare(self, step: int, begin: bool = False) -> DiskError | None:
        """Puts on the disk what belongs there before the checkpoint of `step`; what the disk refused it with."""
        try:
            with disk_outages(self.folder):
                if self.before:
                    self.before()
                for what in list(self._owed):
                    self._owed[what]()
                    del self._owed[what]
                if begin:
                    _begin(self.folder, step)
        except DiskError as error:
            self._refused(step, error)
            return error
        return None

    def _run(self, step: int, work: Callable[[], object]) -> None:
        if self._pool is None:
            self._settle(step, work)
        else:
            self._pending = step, self._pool.submit(work)

    def _settle(self, step: int, work: Callable[[], object]) -> None:
        try:
            with disk_outages(self.folder):
                work()
        except DiskError as error:
            self._refused(step, error)
        else:
            self._newest = step
            self.outage.over(f"checkpoint of step {step:,}")

    def _refused(self, step: int, error: DiskError) -> None:
        self.outage.failed(error, f"checkpoint of step {step:,}", self._last())

    def _last(self) -> str:
        if self._newest is None:
            return "no checkpoint is complete yet"
        return f"the last complete checkpoint is of step {self._newest:,}"


def checkpoint_files(model: dict[str, Tensor], optimizer: OptimizerState) -> dict[str, dict[str, Tensor]]:
    """What `save_checkpoint` writes: copies on the CPU, by file."""
    files = dict(zip(WHOLE, (model, _moments(optimizer)), strict=True))
    return {file: {name: plain(tensor) for name, tensor in tensors.items()} for file, tensors in files.items()}


def _moments(optimizer: OptimizerState) -> dict[str, Tensor]:
    """By the names that they are stored under."""
    return {f"{kind}/{name}": value for name, kept in optimizer.items() for kind, value in kept.items()}


def save_checkpoint(
    folder: Path, step: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Writes `folder/step-…` beside, syncs and renames it, then points `latest` at it and removes older ones.

    One rank calls it. `state` is JSON. Raises `UserError` when the disk is full or cannot be written; the checkpoints
    before it stay as they are.
    """
    with _removed_on_error(folder, step), disk_errors(folder):
        partial = _begin(folder, step)
        for file, tensors in files.items():
            save_file(tensors, partial / file)
        _complete(folder, step, state)
    return _remove_old(folder, step, keep)


def _partial(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.partial"


@contextmanager
def _removed_on_error(folder: Path, step: int, ours: bool = True) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if ours:
            shutil.rmtree(_partial(folder, step), ignore_errors=True)
        raise


@contextmanager
def _unwrapped() -> Iterator[None]:
    """The first error of a rank instead of torch's list of all ranks', which is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        first = min(error.failures)
        raise RuntimeError(f"rank {first} could not write its part of the checkpoint") from error.failures[first][0]


def _begin(folder: Path, step: int) -> Path:
    for stale in folder.glob("step-*.partial"):  # of a run that was killed while it saved
        shutil.rmtree(stale, ignore_errors=True)
    partial = _partial(folder, step)
    folder.mkdir(exist_ok=True)  # not the run's own: where that is gone, something else lies in its place
    partial.mkdir()
    return partial


def _complete(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Adds state and checksums to the tensors that were written, and makes a checkpoint of them."""
    partial, target = _partial(folder, step), folder / f"step-{step:08d}"
    (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
    sums = {path.name: checksum_file(path) for path in sorted(partial.iterdir())}
    (partial / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    for path in partial.iterdir():
        with open(path, "rb") as written:
            os.fsync(written.fileno())
    aside = folder / f"{target.name}.old.partial"
    if target.exists():  # the same step again, after a forced resume, or because something failed behind this line
        os.replace(target, aside)
    os.replace(partial, target)
    shutil.rmtree(aside, ignore_errors=True)
    fsync_folder(folder)
    write_atomically(folder / LATEST, (target.name + "\n").encode())


def _remove_old(folder: Path, step: int, keep: int) -> Path:
    # What is newer than this step was passed over as damaged; counted among those to keep, it would push this one out.
    target, complete = folder / f"step-{step:08d}", _finished(folder)
    place = complete.index(target)
    for old in [*complete[: max(0, place + 1 - keep)], *complete[place + 1 :]]:
        try:
            shutil.rmtree(old)
        except OSError as error:  # the new one is complete all the same
            logger.warning("%s cannot be removed (%s); the next checkpoint tries again", old, error.strerror)
    return target


def _finished(folder: Path) -> list[Path]:
    """Checkpoints that carry a finished name, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def newest_step(folder: Path) -> int | None:
    """The step of the newest complete checkpoint."""
    complete = _finished(folder)
    return int(complete[-1].name.removeprefix("step-")) if complete else None


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums hold; says so when it has to pass over a damaged one.

    Raises `UserError` when there are checkpoints and all are damaged.
    """
    candidates = _finished(folder)[::-1]
    for path in candidates:
        fault = fault_of(path)
        if fault is None:
            return path
        logger.warning("checkpoint %s is damaged (%s); trying the one before", path, fault)
    if candidates:
        raise UserError(f"{folder}: all {len(candidates)} checkpoints are damaged; remove the folder to start anew")
    return None


def fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint; None when its checksums hold."""
    try:
        sums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        in_parts = any(fnmatch(name, PARTS) for name in sums)
        if lacking := {STATE, *(() if in_parts else WHOLE)} - sums.keys():
            return f"{CHECKSUMS} does not name {', '.join(sorted(lacking))}"
        for name, expected in sums.items():
            if (found := checksum_file(path / name)) != expected:
                return f"{name} has checksum {found}, expected {expected}"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def unseen_files(path: Path) -> list[str]:
    """Which files of a sound checkpoint this process does not see, or not yet."""
    try:
        names = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    except OSError:
        return [CHECKSUMS]
    return [name for name in names if not (path / name).is_file()]


def read_checkpoint(path: Path) -> Checkpoint:
    """Opens a sound checkpoint; nothing in it is unpickled."""
    if parts := sorted(path.glob(PARTS)):
        stored = Stored.open(parts)
        weights, moments = stored.below(MODEL), stored.below(OPTIMIZER)
    else:
        weights, moments = (Stored.open([path / name]) for name in WHOLE)
    kinds: dict[str, dict[str, str]] = {}
    for key in moments:
        kind, _, name = key.partition("/")
        kinds.setdefault(name, {})[kind] = key
    averages = {name: keys.pop(AVERAGE) for name, keys in kinds.items() if AVERAGE in keys}
    optimizer = {name: moments.select(keys) for name, keys in kinds.items() if keys}
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return Checkpoint(weights, optimizer, moments.select(averages), state)
