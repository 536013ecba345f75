"""Runs are listed by what lies in their folders, and stopped by whoever trains them."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clipdist.cli import main
from clipdist.cluster.runs import QUIET_SECONDS, read_run, read_runs
from clipdist.cluster.runs_command import ago
from clipdist.errors import UserError
from tests.conftest import TrainedRun
from tests.distributed.test_training import column


@pytest.fixture
def finished(trained_run: TrainedRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run.folder, tmp_path / "runs" / "tiny"))


def age(run: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(run / "metrics.jsonl", (then, then))


def unfinished(run: Path) -> None:
    path = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))


def test_a_finished_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = read_run(finished)
    losses = column(finished, "train/loss")
    assert (state.name, state.state, state.step, state.starts) == ("tiny", "finished", 28, 1)
    assert state.loss == losses[28]
    assert state.score == max(column(finished, "val/mean_R@1").values())
    assert main(["runs", str(finished.parent)]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["run", "state", "step", "loss"]
    assert line.split()[:4] == ["tiny", "finished", "28", f"{losses[28]:.4f}"]


def test_states(finished: Path) -> None:
    unfinished(finished)
    age(finished, 5)
    assert read_run(finished).state == "training"
    with open(finished / "metrics.jsonl", "a") as file:
        file.write('{"step": 29, "train/lo')
    assert read_run(finished).step == 28, "a line that is being written"
    age(finished, QUIET_SECONDS + 5)
    assert read_run(finished).state == "quiet"
    (finished / "stop").touch()
    assert read_run(finished).state == "stopped"
    new = finished.parent / "new"
    new.mkdir()
    (new / "config.yaml").touch()
    assert [(run.name, run.state) for run in read_runs([finished.parent])] == [("tiny", "stopped"), ("new", "new")]


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run there; expected runs/<name>, or a folder of runs"):
        read_runs([tmp_path])
    assert main(["stop", str(tmp_path)]) == 2


@pytest.mark.parametrize(("seconds", "said"), [(3, "3 s"), (700, "12 min"), (7_300, "2 h"), (200_000, "2 d")])
def test_ages(seconds: float, said: str) -> None:
    assert ago(seconds) == said


def test_a_run_of_this_machine_is_stopped(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It saves and ends with 75, which a job would take for the last word."""
    path, run = recipe(train__epochs=200), tmp_path / "runs" / "tiny"
    trained = subprocess.Popen([sys.executable, "-m", "clipdist.train", str(path)], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not ((run / "metrics.jsonl").exists() and column(run, "train/loss")):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert main(["stop", str(run)]) == 0
        assert f"asked process {trained.pid} to save and end" in capsys.readouterr().out
        assert trained.wait(30) == 75
    finally:
        trained.kill()
        trained.wait()
    assert (run / "checkpoints" / "latest").exists()
    assert main(["stop", str(run)]) == 0
    assert "nobody trains it on this machine" in capsys.readouterr().out
