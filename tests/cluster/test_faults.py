"""`sbatch slurm/train_skincap.sh` on two nodes: whatever happens to it, the job ends COMPLETED, with the digest of a
run that nothing happened to, and the same weights to the last bit."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.cluster.slurm import LocalSlurm
from tests.distributed.test_training import ROOT, column, weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
LAST = 36


class Job:
    """A job of slurm/train_skincap.sh on 2 nodes × 2 tasks."""

    def __init__(self, slurm: LocalSlurm, folder: Path, recipe: Path, raw: Path, *options: str, **more: str) -> None:
        self.slurm, self.run, self.log = slurm, folder / "runs" / "tiny", folder / "job.log"
        variables = {
            "RECIPE": str(recipe),
            "SKINCAP_RAW": str(raw),
            "ACCELERATE_CONFIG": "launch/accelerate/cpu.yaml",
            "OMP_NUM_THREADS": "1",
            **more,
        }
        words = ["--nodes=2", "--gpus-per-node=2", f"--output={self.log}", *options, "slurm/train_skincap.sh"]
        self.number = slurm.submit(*words, cwd=ROOT, **variables)

    def reach(self, step: int, seconds: float = 120) -> None:
        """Until the run has logged this step."""
        end = time.monotonic() + seconds
        while not ((self.run / "metrics.jsonl").exists() and max(column(self.run, "train/loss"), default=0) >= step):
            state = self.slurm.job(self.number)
            assert state["JobState"] in ("RUNNING", "PENDING"), f"{state['JobState']}: {self.said()}"
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, in the order of their ranks; they are this machine's, too."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
            ours = environment.get("SLURM_JOB_ID") == self.number and "RANK" in environment
            if ours and "clipdist.train" in words and "--config_file" not in words:
                found.append((int(environment["RANK"]), process.pid, process))
        first = {}
        for rank, _, process in sorted(found, key=lambda item: item[:2]):
            first.setdefault(rank, process)  # loader workers are forked from a rank later
        return list(first.values())

    def finish(self, seconds: float = 240) -> dict[str, str]:
        try:
            return self.slurm.wait(self.number, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-6000:] if self.log.exists() else ""


@pytest.fixture(scope="session")
def undisturbed(
    slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory, cluster_recipe: Callable[..., Path], raw: Path
) -> Path:
    """The folder of the run that nothing happened to; its set is packed by the job."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Job(slurm, folder, cluster_recipe(folder), raw)
    found = job.finish()
    assert found["Restarts"] == "0"
    return folder


@pytest.fixture
def start(
    slurm: LocalSlurm, tmp_path: Path, cluster_recipe: Callable[..., Path], raw: Path, undisturbed: Path
) -> Callable[..., Job]:
    """start(options of sbatch …): the same job in a folder of its own."""

    def begin(*options: str, **more: Any) -> Job:
        (tmp_path / "data").symlink_to(undisturbed / "data")
        return Job(slurm, tmp_path, cluster_recipe(tmp_path), raw, *options, **more)

    return begin


def assert_the_same(run: Path, undisturbed: Path) -> None:
    whole = undisturbed / "runs" / "tiny"
    assert column(run, "data/digest") == column(whole, "data/digest")
    assert len(column(run, "data/digest")) == LAST
    assert column(run, "train/loss") == column(whole, "train/loss")
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(run)[name]), name
    assert (run / "report.html").exists()


def test_to_the_end(undisturbed: Path) -> None:
    run = undisturbed / "runs" / "tiny"
    assert max(column(run, "train/loss")) == LAST
    assert list((run / "evaluation").glob("*.json"))
    assert (run / "report.html").exists()


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_signal(number: str, start: Callable[..., Job], undisturbed: Path) -> None:
    """As SLURM sends it ahead of the time limit, or a user by scancel: it saves, and goes on after a requeue."""
    job = start()
    job.reach(6)
    job.slurm.run("scancel", f"--signal={number}", job.number, check=True)
    found = job.finish()
    assert found["Restarts"] == "1"
    assert_the_same(job.run, undisturbed)


def test_a_rank_is_killed(start: Callable[..., Job], undisturbed: Path) -> None:
    """The others are ended, and all start anew in the same allocation."""
    job = start()
    job.reach(6)
    os.kill(job.ranks()[3].pid, signal.SIGKILL)
    found = job.finish()
    assert found["Restarts"] == "0"
    assert "start 1 in this allocation" in job.said()
    assert_the_same(job.run, undisturbed)


def test_requeued_by_hand(start: Callable[..., Job], undisturbed: Path) -> None:
    job = start()
    job.reach(6)
    job.slurm.run("scontrol", "requeue", job.number, check=True)
    assert job.finish()["Restarts"] == "1"
    assert_the_same(job.run, undisturbed)
