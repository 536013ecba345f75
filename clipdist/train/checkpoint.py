"""Checkpoints: complete or absent, checksummed, and small in number.

    checkpoints/step-00001200/model.safetensors  optimizer.safetensors  state.json  checksums.json
    checkpoints/latest                           the name of the newest complete one

Weights and what the optimiser keeps (`exp_avg/<parameter>`, …) are stored whole and by the parameters' names, so any
engine on any number of processes reads them.

No random states are kept, because none exist between steps: every step seeds its generators from (seed, step, rank).
"""

import json
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipdist.data.shards import checksum_file, fsync_folder, write_atomically
from clipdist.errors import UserError, disk_errors
from clipdist.model.saved import plain
from clipdist.settings import settings
from clipdist.train.engine import OptimizerState

logger = logging.getLogger(__name__)

NAME = re.compile(r"^step-(\d{8,})$")
LATEST = "latest"
FILES = {"model.safetensors", "optimizer.safetensors", "state.json"}


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


class CheckpointSaver:
    """Saves the checkpoints of a run, in a thread of its own if so configured. One rank has one.

    At most one is being written: `save` waits for the one before. What went wrong in the thread, the `UserError` of a
    full disk above all, is raised by whichever of the methods is called next.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self._pool = ThreadPoolExecutor(1, "checkpoint") if config.in_background else None
        self._pending: Future[Path] | None = None

    def save(self, step: int, model: dict[str, Tensor], optimizer: OptimizerState, state: dict[str, Any]) -> None:
        """Takes a copy of everything, and returns as soon as that is made, or, without a thread, when it is written."""
        self.wait()
        words = (self.folder, step, checkpoint_files(model, optimizer), state, self.config.keep)
        if self._pool is None:
            save_checkpoint(*words)
        else:
            self._pending = self._pool.submit(save_checkpoint, *words)

    def check(self) -> None:
        """Raises what a save that has ended by now failed with."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def checkpoint_files(model: dict[str, Tensor], optimizer: OptimizerState) -> dict[str, dict[str, Tensor]]:
    """What `save_checkpoint` writes: copies on the CPU, by file."""
    moments = {f"{kind}/{name}": value for name, kept in optimizer.items() for kind, value in kept.items()}
    files = {"model.safetensors": model, "optimizer.safetensors": moments}
    return {file: {name: plain(tensor) for name, tensor in tensors.items()} for file, tensors in files.items()}


def save_checkpoint(
    folder: Path, step: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Writes `folder/step-…` beside, syncs and renames it, then points `latest` at it and removes older ones.

    One rank calls it. `state` is JSON. Raises `UserError` when the disk is full or cannot be written; the checkpoints
    before it stay as they are.
    """
    target = folder / f"step-{step:08d}"
    partial = target.with_name(target.name + ".partial")
    for stale in folder.glob("step-*.partial"):  # of a run that was killed while it saved
        shutil.rmtree(stale, ignore_errors=True)
    try:
        with disk_errors(folder):
            _write(partial, step, files, state)
            if target.exists():  # the same step again, after a forced resume
                shutil.rmtree(target)
            os.replace(partial, target)
            fsync_folder(folder)
            write_atomically(folder / LATEST, (target.name + "\n").encode())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    # What is newer than this step was passed over as damaged; counted among those to keep, it would push this one out.
    complete = _complete(folder)
    place = complete.index(target)
    for old in [*complete[: max(0, place + 1 - keep)], *complete[place + 1 :]]:
        shutil.rmtree(old)
    return target


def _write(partial: Path, step: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    partial.mkdir(parents=True)
    for file, tensors in files.items():
        save_file(tensors, partial / file)
    (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
    sums = {path.name: checksum_file(path) for path in sorted(partial.iterdir())}
    (partial / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    for path in partial.iterdir():
        with open(path, "rb") as written:
            os.fsync(written.fileno())


def _complete(folder: Path) -> list[Path]:
    """Checkpoints that carry a finished name, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def newest_step(folder: Path) -> int | None:
    """The step of the newest complete checkpoint."""
    complete = _complete(folder)
    return int(complete[-1].name.removeprefix("step-")) if complete else None


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums hold; says so when it has to pass over a damaged one.

    Raises `UserError` when there are checkpoints and all are damaged.
    """
    candidates = _complete(folder)[::-1]
    for path in candidates:
        fault = _fault(path)
        if fault is None:
            return path
        logger.warning("checkpoint %s is damaged (%s); trying the one before", path, fault)
    if candidates:
        raise UserError(f"{folder}: all {len(candidates)} checkpoints are damaged; remove the folder to start anew")
    return None


def _fault(path: Path) -> str | None:
    try:
        sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        if lacking := FILES - sums.keys():
            return f"checksums.json does not name {', '.join(sorted(lacking))}"
        for name, expected in sums.items():
            if (found := checksum_file(path / name)) != expected:
                return f"{name} has checksum {found}, expected {expected}"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], OptimizerState, dict[str, Any]]:
    """(model weights, optimiser state, state) on the CPU; nothing in it is unpickled."""
    optimizer: OptimizerState = {}
    for key, value in load_file(path / "optimizer.safetensors").items():
        kind, _, name = key.partition("/")
        optimizer.setdefault(name, {})[kind] = value
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return load_file(path / "model.safetensors"), optimizer, state
