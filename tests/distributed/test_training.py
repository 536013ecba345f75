"""A run is the same for every number of processes, and the same whether or not it was killed."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from clipdist.errors import UserError
from clipdist.train.run_folder import hold
from tests.distributed.ranks import run_ranks

ROOT = Path(__file__).parents[2]
LAUNCH = [str(Path(sys.executable).with_name("accelerate")), "launch"]
LAUNCH += ["--config_file", str(ROOT / "launch" / "accelerate" / "cpu.yaml"), "--main_process_port", "0"]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def column(run: Path, key: str) -> dict[int, Any]:
    """step -> value. A step that stands there twice fails the test."""
    found: dict[int, Any] = {}
    for record in metrics(run):
        if key in record:
            assert record["step"] not in found, f"step {record['step']} was logged twice"
            found[record["step"]] = record[key]
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoints = run / "checkpoints"
    return load_file(checkpoints / (checkpoints / "latest").read_text().strip() / "model.safetensors")


def train_rank(rank: int, world_size: int, recipe: str, overrides: list[str]) -> int:
    from clipdist.config import load_config
    from clipdist.train.loop import train

    torch.manual_seed(rank)  # nothing may hang on what a process drew before
    return train(load_config(Path(recipe), overrides))


def test_one_two_and_three_processes_train_the_same(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(train__stages=[{"from_epoch": 0, "image": 2, "text": "none"}, {"from_epoch": 1}])
    for world_size in (1, 2, 3):
        codes = run_ranks(world_size, train_rank, str(path), [f"name=w{world_size}"])
        assert codes == [0] * world_size
    runs = [tmp_path / "runs" / f"w{world_size}" for world_size in (1, 2, 3)]
    digests = [column(run, "data/digest") for run in runs]
    assert len(digests[0]) == 21
    assert len(set(digests[0].values())) == 21
    assert digests[0] == digests[1] == digests[2]
    losses = [column(run, "train/loss") for run in runs]
    for other in losses[1:]:
        assert max(abs(other[step] - losses[0][step]) for step in losses[0]) < 1e-4
    assert losses[0][21] < losses[0][1] - 0.3, "the loss went down, so these are no constants"
    for key in ("val/loss", "val/image_to_text/R@1"):
        values = [list(column(run, key).values()) for run in runs]
        torch.testing.assert_close(torch.tensor(values[1]), torch.tensor(values[0]), atol=0.05, rtol=0)
        assert len(values[0]) == 3


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_bits(processes: int, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """kill -9 of every process in mid-epoch; the same command again ends in the same weights and metrics."""
    path = recipe(
        checkpoint__every_steps=2,
        model__projection__dropout=0.2,
        data__workers=1,
        train__epochs=2,
        log__tensorboard=True,
    )
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    run_to_end(processes, path, "name=whole")
    kill_after(3, processes, path, "name=killed", run=killed, saved=True)
    assert 3 <= max(column(killed, "train/loss")) < 14, "the kill came in the middle"
    run_to_end(processes, path, "name=killed")
    assert column(killed, "train/loss") == column(whole, "train/loss")
    assert column(killed, "data/digest") == column(whole, "data/digest")
    assert column(killed, "val/loss") == column(whole, "val/loss")
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(killed)[name]), name
    assert json.loads((killed / "environment.json").read_text())["starts"][1]["step"] > 0


def command(processes: int, *words: str | Path) -> list[str]:
    tail = ["-m", "clipdist.train", *map(str, words)]
    return [sys.executable, *tail] if processes == 1 else [*LAUNCH, "--num_processes", str(processes), *tail]


def run_to_end(processes: int, *words: str | Path) -> None:
    done = subprocess.run(command(processes, *words), capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def kill_after(
    step: int, processes: int, *words: str | Path, run: Path, launcher_alone: bool = False, saved: bool = False
) -> None:
    """Starts a run, waits until it has logged a step, and a checkpoint is complete if `saved`, and kills it: launcher,
    ranks and loader workers, or the launcher alone."""
    process = subprocess.Popen(
        command(processes, *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    family = [psutil.Process(process.pid)]
    try:
        end = time.monotonic() + 120
        while not (
            (run / "metrics.jsonl").exists()
            and max(column(run, "train/loss"), default=0) >= step
            and (not saved or (run / "checkpoints" / "latest").exists())
        ):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.005)
    finally:
        # Ranks are in sessions of their own, so a signal to the launcher's group would miss them.
        family += [] if launcher_alone else family[0].children(recursive=True)
        for one in family:
            one.suspend()  # none may act on the death of another
        for one in family:
            one.kill()
        process.wait()
    _, alive = psutil.wait_procs(family[1:], timeout=20)
    assert not alive


@pytest.mark.slow
def test_ranks_whose_launcher_was_killed_give_the_run_back(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Otherwise they would train on, and write, beside those of the next start."""
    path = recipe(checkpoint__every_steps=3, train__epochs=4)
    run = tmp_path / "runs" / "tiny"
    run_to_end(1, path, "name=whole")
    kill_after(3, 2, path, run=run, launcher_alone=True)
    run_to_end(2, path)
    assert column(run, "data/digest") == column(tmp_path / "runs" / "whole", "data/digest")
    assert len(json.loads((run / "environment.json").read_text())["starts"]) == 2


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from clipdist.train.run_folder import hold;"
    code += "held = hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another process is training this run \(process {other.pid} on "):
            hold(tmp_path, wait_seconds=0.5)
        other.kill()
    hold(tmp_path, wait_seconds=5).close()


def test_a_signal_leaves_a_checkpoint_and_exit_code_75(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(train__epochs=50)
    run = tmp_path / "runs" / "tiny"
    process = subprocess.Popen(command(1, path), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    end = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and max(column(run, "train/loss"), default=0) >= 2):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "the same command goes on" in errors
    step = max(column(run, "train/loss"))
    assert (run / "checkpoints" / f"step-{step:08d}" / "state.json").exists()


def test_a_launcher_that_starts_too_few_processes_is_stopped(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """`--cpu --num_processes 2` silently starts one process."""
    words = [LAUNCH[0], "launch", "--cpu", "--num_processes", "2", "-m", "clipdist.train", str(recipe())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode != 0
    assert "accelerate launch asks for 2 processes, but 1 are connected" in done.stderr
    assert not (tmp_path / "runs").exists()


def average_rank(rank: int, world_size: int, recipe: str, overrides: list[str], steps: int) -> dict[str, torch.Tensor]:
    """The averages that this rank has after `steps` steps; its run is left with a checkpoint of them."""
    from clipdist.config import load_config
    from clipdist.train.trainer import Trainer

    trainer = Trainer(load_config(Path(recipe), overrides))
    for batch in islice(trainer.batches(), steps):
        trainer.enter_epoch(trainer.epoch_of(batch.step))
        trainer.step(batch)
    trainer.save()
    trainer.close()
    assert trainer.average is not None
    assert trainer.average.steps == trainer.progress.step
    return trainer.average.averages


@pytest.mark.slow
def test_averages_of_two_ranks_are_those_of_one_process(recipe: Callable[..., Path]) -> None:
    """And are the same bits after a start from a checkpoint; one process takes over what two have averaged."""
    path = str(recipe(train__ema=0.9, train__stages=[{"from_epoch": 0, "text": "none"}, {"from_epoch": 1}]))
    (alone,) = run_ranks(1, average_rank, path, ["name=alone"], 10)
    ranks = run_ranks(2, average_rank, path, ["name=two"], 10)
    begun = run_ranks(2, average_rank, path, ["name=resumed"], 5)
    resumed = run_ranks(2, average_rank, path, ["name=resumed"], 5)
    (elsewhere,) = run_ranks(1, average_rank, path, ["name=two"], 0)
    for name, average in alone.items():
        for one in (*ranks, *resumed, elsewhere):
            assert torch.equal(one[name], ranks[0][name]), name
        torch.testing.assert_close(ranks[0][name], average, atol=1e-4, rtol=1e-3, msg=name)
    assert any(not torch.equal(begun[0][name], average) for name, average in ranks[0].items())
