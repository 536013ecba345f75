"""launch/sweep.py on the real SLURM: one array of whole jobs, each of which comes back by itself."""

import csv
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clipdist.cluster.logs import find_log
from clipdist.cluster.sweep import read_record
from tests.cluster.slurm import LocalSlurm
from tests.distributed.test_training import ROOT, column

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
RESOURCES = (
    *("--gpus-per-node", "1", "--processes-per-node", "1", "--at-once", "2", "--no-preflight"),
    *("--accelerate-config", "launch/accelerate/cpu.yaml"),
)
RATES = "optim.lr=1e-3,2e-3,5e-3,1e-2"
LAST = 84


@pytest.fixture
def sweep(slurm: LocalSlurm, recipe: Callable[..., Path]) -> Callable[..., subprocess.CompletedProcess[str]]:
    path = recipe(train__epochs=12, checkpoint__every_steps=4)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/sweep.py", str(path), "--name", "rates", *RESOURCES, *words]
        environment = {**slurm.environment, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        return done

    return run


class Array:
    """The jobs of an array; whenever it is asked about them, it notes how many run, and lets none wait needlessly."""

    def __init__(self, slurm: LocalSlurm, number: str, folder: Path) -> None:
        self.slurm, self.number = slurm, number
        self.runs = {job: folder / name for name, job in read_record(folder).jobs.items()}
        self.most_at_once = 0

    def look(self) -> dict[str, str]:
        lines = self.slurm.run("squeue", "--noheader", "--array", f"--job={self.number}", "--format=%i %T").splitlines()
        found = dict(line.split() for line in lines)
        self.most_at_once = max(self.most_at_once, list(found.values()).count("RUNNING"))
        for job, state in found.items():
            if state == "PENDING" and (self.runs[job] / "checkpoints" / "latest").exists():
                self.slurm.hasten(job)
        time.sleep(0.2)
        return found

    def until(self, there: Callable[[dict[str, str]], bool], seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while not there(self.look()):
            assert time.monotonic() < end, self.slurm.logs()


def reached(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and max(column(run, "train/loss"), default=0) >= step


def test_an_array(slurm: LocalSlurm, sweep: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    told = re.match(r"job (\d+): 4 runs, at most 2 at once; output in (\S+)\n", sweep(RATES).stdout)
    assert told
    folder = tmp_path / "runs" / "rates"
    array = Array(slurm, told[1], folder)
    assert sorted(array.runs) == [f"{told[1]}_{place}" for place in range(4)]

    # The job that has the number of all of them: a signal or a requeue by that number would reach the others.
    def named_as_all(found: dict[str, str]) -> str:
        running = [job for job, state in found.items() if state == "RUNNING"]
        return next((job for job in running if slurm.job(job).get("JobId") == told[1]), "")

    array.until(lambda found: bool(named_as_all(found)))
    victim = named_as_all(array.look())
    array.until(lambda _: reached(array.runs[victim], 6))
    # At once: it trains for seconds only.
    slurm.run("scancel", "--signal=USR1", victim, check=True)
    array.until(lambda _: slurm.job(victim)["Restarts"] == "1")
    assert max(column(array.runs[victim], "train/loss")) < LAST
    again = sweep(RATES)
    assert "job" not in again.stdout.splitlines()[0]
    assert re.search(r"4 runs, .*\d in the queue", again.stdout)
    assert "new" not in again.stdout
    assert "goes on" not in again.stdout
    array.until(lambda found: not found)

    restarts = {job: slurm.job(job)["Restarts"] for job in array.runs}
    assert restarts == {job: "1" if job == victim else "0" for job in array.runs}
    assert array.most_at_once == 2
    for job, run in array.runs.items():
        assert slurm.job(job)["JobState"] == "COMPLETED", find_log(run).read_text()
        assert find_log(run) == Path(told[2]) / f"{job}_0_log.out"
        assert list(column(run, "train/loss")) == list(range(1, LAST + 1))
        assert list((run / "evaluation").glob("*.json"))
    assert "stopped with a good checkpoint" in find_log(array.runs[victim]).read_text()

    # The last one to finish left table and plot.
    with open(folder / "sweep.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished"] * 4
    assert sorted(float(row["optim.lr"]) for row in rows) == [1e-3, 2e-3, 5e-3, 1e-2]
    scores = [float(row["val/mean_R@1"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")

    before = slurm.run("squeue", "--noheader", "--states=all", "--format=%i")
    assert "4 runs, 4 finished" in sweep(RATES).stdout
    assert slurm.run("squeue", "--noheader", "--states=all", "--format=%i") == before
    more = sweep(f"{RATES},2e-2")
    assert re.match(r"job \d+: 1 run, ", more.stdout)
    assert "5 runs, 4 finished, 1 new" in more.stdout
    slurm.run("scancel", re.match(r"job (\d+)", more.stdout)[1], check=True)  # type: ignore[index]
