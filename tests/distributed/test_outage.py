"""A disk that refuses one of several ranks for a while: all of them go on, and none waits for another forever."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from clipdist import world
from clipdist.config import load_config
from clipdist.errors import DiskError
from clipdist.train import outage
from clipdist.train.checkpoint import Checkpoint, CheckpointConfig, CheckpointSaver, newest_sound, read_checkpoint
from clipdist.train.loop import train
from clipdist.train.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engines import ask_for
from tests.distributed.test_training import column

Recipe = Callable[..., Path]
STEPS = 14


def limit_files(size: int) -> None:
    """No file may grow beyond so many bytes, which takes lines of metrics and no checkpoint; -1: any may."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def train_disturbed(
    rank: int, world_size: int, engine: str, recipe: str, bad: int, until: int, stop_at: int
) -> tuple[int | str, int]:
    """(exit code or what was raised, how often a save was asked for). From step 3 to step `until` the disk takes no
    checkpoint of rank `bad`; at step `stop_at` rank 1 is asked to stop."""
    ask_for(engine)
    outage.FIRST_PAUSE = outage.LONGEST_PAUSE = 0.001
    real_step, real_save = Trainer.step, Trainer.save
    saves = []

    def step(self: Trainer, batch: Any) -> dict[str, float]:
        values = real_step(self, batch)
        if rank == bad and self.progress.step in (3, until):
            limit_files(30_000 if self.progress.step == 3 else -1)
        if rank == 1 and self.progress.step == stop_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return values

    def save(self: Trainer) -> None:
        saves.append(self.progress.step)
        if len(saves) >= 3 and saves[-3:] == [saves[-1]] * 3:  # the third attempt at the end
            limit_files(-1)
        real_save(self)

    Trainer.step, Trainer.save = step, save  # type: ignore[method-assign]
    try:
        return train(load_config(Path(recipe), [])), len(saves)
    except DiskError as error:
        return str(error), len(saves)
    finally:
        limit_files(-1)


WHILE, END, STOP, GO_ON = ("while", 10, 0), ("end", 0, 0), ("stop", 0, 9), ("stop", 3, 0)


@pytest.mark.parametrize(
    ("engine", "bad", "starts"),
    [
        ("none", 0, (WHILE,)),
        pytest.param("fsdp2", 1, (WHILE,), marks=pytest.mark.slow),
        pytest.param("none", 0, (END, STOP, GO_ON), marks=pytest.mark.slow),
        pytest.param("fsdp2", 0, (WHILE, END, STOP, GO_ON), marks=pytest.mark.slow),
        pytest.param("fsdp2", 1, (END, STOP, GO_ON), marks=pytest.mark.slow),
    ],
)
def test_a_run_of_two_processes_ends_as_one_that_nothing_happened_to(
    engine: str, bad: int, starts: tuple[tuple[str, int, int], ...], recipe: Recipe, tmp_path: Path
) -> None:
    """Refused over a validation and some steps; refused at the end; refused when asked to stop, and started again."""
    options = {"train__epochs": 2, "checkpoint__every_steps": 2, "checkpoint__keep": 100}
    for name, until, stop_at in (("well", 3, 0), *starts):
        path = str(recipe(name, **options))
        code = 75 if stop_at else 0
        for found, _ in run_ranks(2, train_disturbed, engine, path, -1 if name == "well" else bad, until, stop_at):
            assert found == code
    runs = tmp_path / "runs"
    expected = sound(runs / "well")
    for run in {runs / name for name, _, _ in starts}:
        for key in ("train/loss", "data/digest", "val/loss"):
            assert column(run, key) == column(runs / "well", key)
        found = sound(run)
        assert found.state == expected.state
        assert found.weights.keys() == expected.weights.keys()
        assert all(torch.equal(found.weights[name], expected.weights[name]) for name in expected.weights)
        assert not list(run.rglob("*.partial"))
        saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
        first_again = {"while": 10, "end": STEPS, "stop": 9}[run.name]
        assert saved[0] == 2
        # A rank may hear a step later than it failed that its part of the save before did.
        assert saved[1] in (range(10, 13) if run.name == "while" else [first_again])


def sound(run: Path) -> Checkpoint:
    """The newest, which is that of the last step."""
    newest = newest_sound(run / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{STEPS:08d}"
    return read_checkpoint(newest)


@pytest.mark.parametrize("engine", ["none", "fsdp2"])
def test_all_processes_give_up_together(engine: str, recipe: Recipe, tmp_path: Path) -> None:
    path = str(recipe(train__epochs=1, checkpoint__every_steps=2, checkpoint__retry_minutes=0, data__val_split=""))
    for told, saves in run_ranks(2, train_disturbed, engine, path, 0, 0, 0):
        assert "cannot be written (File too large)" in told
        assert told.endswith("(tried for 0 min; the last complete checkpoint is of step 2)")
        assert saves > 2
    newest = newest_sound(tmp_path / "runs" / "tiny" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000002"


def save_where_nothing_can_begin(rank: int, world_size: int, folder: str, in_background: bool) -> list[bool]:
    """Whether each of three saves was refused. In the second, rank 0 cannot make the folder."""
    outage.FIRST_PAUSE = outage.LONGEST_PAUSE = 0.0
    place = Path(folder)
    saver = CheckpointSaver(place / "checkpoints", CheckpointConfig(keep=9, in_background=in_background))
    parts = {"w": distribute_tensor(torch.arange(100.0), init_device_mesh("cpu", (world_size,)), [Shard(0)])}
    refused = []
    for step in (1, 2, 3):
        world.barrier()
        if rank == 0 and step > 1:
            moves = (place, place.with_name("away"))
            os.rename(*(moves if step == 2 else moves[::-1]))
        saver.save_parts(step, parts, {}, {"digest": "0"})
        saver.wait()
        refused.append(saver.error is not None)
        assert saver.wants(False) == refused[-1]
    return refused


@pytest.mark.parametrize("in_background", [True, False])
def test_ranks_do_not_wait_for_parts_of_a_save_that_cannot_begin(in_background: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for refused in run_ranks(2, save_where_nothing_can_begin, str(folder), in_background):
        assert refused == [False, True, False]
    newest = newest_sound(folder / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000003"
    assert torch.equal(read_checkpoint(newest).weights["w"], torch.arange(100.0))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "latest",
        "step-00000001",
        "step-00000003",
    ]
