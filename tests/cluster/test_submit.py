"""launch/submit.py on the real SLURM: the same run as by slurm/train_skincap.sh, through the same faults, and nothing
that is wrong gets into the queue."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.jobs import Job, assert_the_same
from tests.cluster.slurm import LocalSlurm
from tests.distributed.test_training import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
RESOURCES = (
    "--nodes",
    "2",
    "--gpus-per-node",
    "2",
    "--accelerate-config",
    "launch/accelerate/cpu.yaml",
    "--no-preflight",
)


@pytest.fixture
def submit(
    slurm: LocalSlurm, tmp_path: Path, cluster_recipe: Callable[..., Path], undisturbed: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """submit(words …): launch/submit.py, of the run that `undisturbed` made, in a folder of its own."""
    (tmp_path / "data").symlink_to(undisturbed / "data")
    recipe = cluster_recipe(tmp_path)

    def send(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/submit.py", str(recipe), *RESOURCES, *words]
        environment = {**slurm.environment, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment)

    return send


@pytest.fixture
def start(
    slurm: LocalSlurm, submit: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> Callable[..., Job]:
    def begin(*words: str) -> Job:
        done = submit(*words)
        assert done.returncode == 0, done.stderr
        told = re.fullmatch(r"job (\d+): (\S+), output in (\S+)\n", done.stdout)
        assert told, done.stdout
        return Job.of(slurm, told[1], Path(told[2]), Path(told[3]))

    return begin


def test_a_crash_and_a_time_out(start: Callable[..., Job], undisturbed: Path) -> None:
    job = start()
    job.reach(6)
    os.kill(job.ranks()[3].pid, signal.SIGKILL)
    job.reach(14)
    job.slurm.run("scancel", "--signal=USR2", job.number, check=True)
    assert job.finish()["Restarts"] == "1"
    said = job.said(whole=True)
    assert "start 1 in this allocation" in said
    assert "stopped with a good checkpoint" in said
    assert_the_same(job.run, undisturbed)
    assert list((job.run / "evaluation").glob("*.json"))


@pytest.mark.slow
def test_preempted(start: Callable[..., Job], slurm: LocalSlurm, undisturbed: Path) -> None:
    job = start("--partition", "kind")
    job.reach(6)
    words = ("--partition=high", "--nodes=4", "--exclusive", "--wrap=sleep 3", "--output=/dev/null")
    other = slurm.submit(*words, cwd=ROOT)
    assert int(job.finish()["Restarts"]) >= 1
    slurm.wait(other)
    assert_the_same(job.run, undisturbed)


@pytest.mark.slow
def test_a_task_itself_is_killed(start: Callable[..., Job], undisturbed: Path) -> None:
    """Then nobody decides but the script around it, once the other node has waited for a verdict long enough."""
    job = start()
    job.reach(6)
    task = job.ranks()[0].parents()[1]
    assert "submitit.core._submit" in task.cmdline()
    task.kill()
    assert job.finish(seconds=400)["Restarts"] == "1"
    assert_the_same(job.run, undisturbed)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--partition", "gpuu"), "SLURM refuses the job: sbatch: error: .*invalid partition"),
        (
            ("--partition", "closed", "--account", "mine"),
            "SLURM would never start the job, so it is not in the queue: .*account",
        ),
        (("--nodes", "8"), "SLURM refuses the job: .*node configuration is not available"),
        (("data.set=nowhere",), "shard set nowhere: there is no such folder"),
        (("train.epochz=1",), "unknown key train.epochz"),
    ],
    ids=["partition", "account", "nodes", "data", "recipe"],
)
def test_what_is_wrong_is_not_queued(
    words: tuple[str, ...], said: str, submit: Callable[..., subprocess.CompletedProcess[str]], slurm: LocalSlurm
) -> None:
    before = slurm.run("squeue", "--noheader", "--format=%i")
    done = submit(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(said, done.stderr), done.stderr
    assert slurm.run("squeue", "--noheader", "--format=%i") == before
