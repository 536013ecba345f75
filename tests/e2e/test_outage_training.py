"""A run whose disk is full, or gone, for some steps ends as one that nothing happened to."""

import json
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipdist import cli
from clipdist.config import load_config
from clipdist.errors import DiskError
from clipdist.model.saved import load
from clipdist.train import outage, trainer
from clipdist.train.checkpoint import newest_sound, read_checkpoint
from clipdist.train.loop import train
from clipdist.train.signals import STOP_SIGNALS
from tests.conftest import write_recipe

Recipe = Callable[..., Path]
STEPS = 21
CHANGES: dict[str, Any] = {"log__tensorboard": True, "checkpoint__every_steps": 2, "checkpoint__keep": 100}
pytestmark = pytest.mark.usefixtures("signal_handlers", "short_pauses")


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each step tries again."""
    monkeypatch.setattr(outage, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(outage, "LONGEST_PAUSE", 0.001)


class Disk:
    """A small file system under the runs."""

    def __init__(self, runs: Path, run: Path) -> None:
        self.runs, self.run = runs, run

    def fill(self) -> None:
        (self.runs / "ballast").write_bytes(bytes(shutil.disk_usage(self.runs).free))

    def empty(self) -> None:
        (self.runs / "ballast").unlink()

    def take_away(self) -> None:
        """Something else lies where the run was, and cannot be written."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(self.run)], check=True)

    def bring_back(self) -> None:
        subprocess.run(["umount", "-l", str(self.run)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    runs = tmp_path / "runs"
    runs.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(runs)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs rights that this machine does not give")
    yield Disk(runs, runs / "tiny")
    subprocess.run(["umount", "-l", str(runs / "tiny")], capture_output=True, check=False)
    subprocess.run(["umount", "-l", str(runs)], check=True)


def at_steps(monkeypatch: pytest.MonkeyPatch, events: dict[int, Callable[[], None]]) -> None:
    """Calls `events[n]` after step n, before anything of it is logged or saved."""
    real = trainer.Trainer.step

    def step(self: trainer.Trainer, batch: Any) -> dict[str, float]:
        values = real(self, batch)
        if event := events.get(self.progress.step):
            assert self.saver is not None
            self.saver.wait()  # whether the one before had been written by now would be chance
            event()
        return values

    monkeypatch.setattr(trainer.Trainer, "step", step)


@pytest.fixture(scope="module")
def undisturbed(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    assert train(load_config(write_recipe(folder, shapes, **CHANGES), ["checkpoint.every_steps=1"])) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    return folder / "runs" / "tiny"


TIMES = ("time", "perf/", "data/wait")


def lines(run: Path) -> list[dict[str, Any]]:
    """Without what the clock decides."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in found]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    board.Reload()
    found: dict[str, Any] = {
        key: [(event.step, event.value) for event in board.Scalars(key)]
        for key in board.Tags()["scalars"]
        if not key.startswith(TIMES)
    }
    found["images"] = [(event.step, event.encoded_image_string) for event in board.Images("val/retrieval")]
    found["histograms"] = [event.step for event in board.Histograms("val/cosines_of_pairs")]
    return found


def assert_equal(run: Path, expected: Path) -> None:
    """Lines, curves, weights, model, and the kinds of files."""
    assert lines(run) == lines(expected)
    assert scalars(run) == scalars(expected)
    newest, reference = newest_sound(run / "checkpoints"), newest_sound(expected / "checkpoints")
    assert newest is not None
    assert reference is not None
    assert newest.name == reference.name == f"step-{STEPS:08d}"
    one, two = read_checkpoint(newest), read_checkpoint(reference)
    assert one.state == two.state
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in two.weights)
    models = [load(folder / "model").model.state_dict() for folder in (run, expected)]
    assert all(torch.equal(models[0][name], value) for name, value in models[1].items())
    abouts = [json.loads((folder / "model" / "model.json").read_text())["about"]["step"] for folder in (run, expected)]
    assert abouts[0] == abouts[1]
    assert {path.name for path in run.iterdir()} == {path.name for path in expected.iterdir()}, "nothing torn is left"
    for folder in (run, expected):
        assert not list(folder.rglob("*.partial"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "clipdist.train.outage"]


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("how", ["full", "gone"])
def test_some_steps_on_a_bad_disk_change_nothing(
    how: str,
    in_background: bool,
    disk: Disk,
    recipe: Recipe,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From step 5 to step 16: two validations, each of a better model, and several checkpoints are refused."""
    path = recipe(**CHANGES, checkpoint__in_background=in_background)
    begin, end = (disk.fill, disk.empty) if how == "full" else (disk.take_away, disk.bring_back)
    models: list[dict[str, Any]] = []

    def look() -> None:
        about = json.loads((disk.run / "model" / "model.json").read_text())["about"]
        models.append({"step": about["step"], **load(disk.run / "model").model.state_dict()})

    at_steps(monkeypatch, {5: begin, 16: end, 19: look})
    with caplog.at_level(logging.INFO, "clipdist"):
        assert train(load_config(path, [])) == 0
    assert_equal(disk.run, undisturbed)
    (model,) = models
    assert model["step"] in (7, 14), "it is that of a validation, written some steps later"
    then = read_checkpoint(undisturbed / "checkpoints" / f"step-{model['step']:08d}").weights
    assert all(torch.equal(model[name], value) for name, value in then.items())
    kept = sorted(int(path.name[5:]) for path in (disk.run / "checkpoints").glob("step-*"))
    assert [step for step in kept if step <= 4] == [2, 4]
    assert not [step for step in kept if 5 <= step < 16]
    reason = "No space left on device" if how == "full" else "Read-only file system|No such file or directory"
    told = warnings(caplog)
    (begun,) = [line for line in told if line.startswith("checkpoint of step ") and "cannot be written" in line] or [
        line for line in told if "/model cannot be written" in line
    ]
    assert "; trying again in 0 s; the last complete checkpoint is of step 4" in begun
    assert any(reason_part in begun for reason_part in reason.split("|"))
    assert sum(line.startswith("checkpoint of step ") and "is written again" in line for line in told) == 1
    for file in ("metrics.jsonl", "tfevents"):
        assert sum(file in line and "cannot be written" in line for line in told) == 1
        assert sum(file in line and "is written again" in line for line in told) == 1


def test_the_end_of_a_run_waits_for_the_disk(
    disk: Disk, recipe: Recipe, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, report, metrics and the checkpoint that says so; a signal meanwhile does not shorten it."""
    path = recipe(**CHANGES)
    saves: list[int] = []
    real = trainer.Trainer.save

    def save(self: trainer.Trainer) -> None:
        if self.progress.finished:
            saves.append(self.progress.step)
            os.kill(os.getpid(), signal.SIGUSR1)
        if len(saves) == 4:
            disk.empty()
        real(self)

    monkeypatch.setattr(trainer.Trainer, "save", save)
    at_steps(monkeypatch, {19: disk.fill})
    assert train(load_config(path, [])) == 0
    assert saves[:4] == [STEPS] * 4
    assert_equal(disk.run, undisturbed)
    assert "</html>" in (disk.run / "report.html").read_text(encoding="utf-8")


def test_who_is_asked_to_stop_waits_for_the_disk_and_the_same_command_goes_on(
    disk: Disk, recipe: Recipe, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(**CHANGES)
    attempts: list[int] = []
    real = trainer.Trainer.save

    def save(self: trainer.Trainer) -> None:
        if self.progress.step == 9:
            attempts.append(9)
        if len(attempts) == 3:
            disk.bring_back()
            attempts.append(0)
        real(self)

    monkeypatch.setattr(trainer.Trainer, "save", save)
    at_steps(monkeypatch, {6: disk.take_away, 9: lambda: os.kill(os.getpid(), signal.SIGUSR1)})
    assert train(load_config(path, [])) == 75
    newest = newest_sound(disk.run / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000009"
    assert [line["step"] for line in lines(disk.run) if "train/loss" in line] == list(range(1, 10))
    monkeypatch.undo()
    assert train(load_config(path, [])) == 0
    assert_equal(disk.run, undisturbed)


@pytest.mark.parametrize("asked", ["to stop", "nothing"])
def test_a_disk_that_stays_bad_ends_the_run_after_a_bounded_time_and_the_same_command_goes_on(
    asked: str,
    disk: Disk,
    recipe: Recipe,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = recipe(**CHANGES, checkpoint__retry_minutes=0.01)
    last = 9 if asked == "to stop" else STEPS
    stop: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGTERM) if last == 9 else None  # noqa: E731
    at_steps(monkeypatch, {6: disk.fill, last: stop})
    with pytest.raises(DiskError, match=r"No space left on device.*\(tried for 0.01 min; the last .* is of step 4\)"):
        train(load_config(path, []))
    assert not list(disk.run.rglob("*.partial/*"))
    newest = newest_sound(disk.run / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000004"
    monkeypatch.undo()
    assert cli.main(["train", str(path)]) == 2, "it is still full"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipdist: error: ")]
    assert "cannot be written (No space left on device)" in line
    disk.empty()
    assert train(load_config(path, [])) == 0
    assert_equal(disk.run, undisturbed)
