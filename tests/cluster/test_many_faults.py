"""Ten random faults in one run, and it still ends with the digest and the weights of a run that nothing happened to.

CLIPDIST_FAULT_RUNS says how many such runs, each with a seed of its own (1); each takes some minutes.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from clipdist.train.metrics import last_step
from tests.cluster.jobs import Job, assert_the_same
from tests.cluster.slurm import NODES, LocalSlurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(3600)]
RUNS = int(os.environ.get("CLIPDIST_FAULT_RUNS", "1"))
FAULTS, EPOCHS, STEPS = 10, 40, 240
WORDS = ("train.hang_minutes=0.15", f"train.epochs={EPOCHS}", "evaluate.every_epochs=8")


@pytest.fixture(scope="session")
def long_and_undisturbed(
    slurm: LocalSlurm,
    tmp_path_factory: pytest.TempPathFactory,
    cluster_recipe: Callable[..., Path],
    raw: Path,
    undisturbed: Path,
) -> Path:
    folder = tmp_path_factory.mktemp("long")
    (folder / "data").symlink_to(undisturbed / "data")
    Job(slurm, folder, cluster_recipe(folder), raw, words=WORDS).finish(seconds=900)
    return folder


class Faults:
    """What can happen to a job; each answers what it did, or nothing where it could not."""

    def __init__(self, job: Job, dice: random.Random) -> None:
        self.job, self.dice = job, dice
        self.crashed: list[str] = []

    def _some_rank(self) -> psutil.Process | None:
        ranks = self.job.ranks()
        return self.dice.choice(ranks) if ranks else None

    def kill_a_rank(self) -> str:
        if (rank := self._some_rank()) is None:
            return ""
        rank.kill()
        return "SIGKILL to a rank"

    def stop_a_rank(self) -> str:
        if (rank := self._some_rank()) is None:
            return ""
        rank.suspend()
        return "SIGSTOP to a rank"

    def signal(self) -> str:
        number = self.dice.choice(("USR1", "USR2", "TERM"))
        # To a job on its way into the queue, scancel would try to bring the signal for longer than a minute.
        if self.job.slurm.job(self.job.number)["JobState"] != "RUNNING":
            return ""
        with suppress(subprocess.TimeoutExpired):
            self.job.slurm.run("scancel", f"--signal={number}", self.job.number)
            return f"scancel --signal={number}"
        return ""

    def requeue(self) -> str:
        self.job.slurm.run("scontrol", "requeue", self.job.number)
        return "scontrol requeue"

    def crash_a_node(self) -> str:
        self.heal()
        nodes = self.job.nodes()
        if not nodes:
            return ""
        node = self.dice.choice(nodes)
        self.job.slurm.crash_node(node)
        self.crashed.append(node)
        return f"{node} crashes"

    def heal(self) -> None:
        while self.crashed:
            self.job.slurm.start_node(self.crashed.pop())

    def kill_a_task(self) -> str:
        if (rank := self._some_rank()) is None:
            return ""
        with suppress(psutil.Error, StopIteration):
            task = next(parent for parent in rank.parents() if "node" in parent.cmdline()[2:3])
            task.kill()
            return "SIGKILL to a node's task"
        return ""

    def damage_the_newest_checkpoint(self) -> str:
        rank = self._some_rank()
        folder = self.job.run / "checkpoints"
        with suppress(OSError):
            newest = folder / (folder / "latest").read_text().strip()
            if rank is not None and len(list(folder.glob("step-*[0-9]"))) > 1:
                (newest / "model.safetensors").write_bytes(b"torn")
                rank.kill()
                return f"{newest.name} is torn, SIGKILL to a rank"
        return ""

    def preempt(self) -> str:
        # All cores, but not --exclusive, which takes GPUs that SLURM may hold for lost.
        words = ("--partition=high", f"--nodes={NODES}", "--ntasks-per-node=8", "--wrap=sleep 1", "--output=/dev/null")
        self.heal()
        self.job.slurm.wait(self.job.slurm.submit(*words, cwd=Path("/")), seconds=300)
        return "preempted"

    def any(self) -> str:
        kinds = (
            self.kill_a_rank,
            self.stop_a_rank,
            self.signal,
            self.requeue,
            self.crash_a_node,
            self.kill_a_task,
            self.damage_the_newest_checkpoint,
            self.preempt,
        )
        while not (done := self.dice.choice(kinds)()):
            time.sleep(0.1)
        return done


@pytest.mark.parametrize("seed", range(RUNS))
def test_ten_random_faults(
    seed: int,
    slurm: LocalSlurm,
    tmp_path: Path,
    cluster_recipe: Callable[..., Path],
    raw: Path,
    long_and_undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "data").symlink_to(long_and_undisturbed / "data")
    slurm.restart_controller()
    dice = random.Random(seed)
    job = Job(slurm, tmp_path, cluster_recipe(tmp_path), raw, words=WORDS)
    faults, told = Faults(job, dice), []
    began = time.monotonic()
    try:
        for number in range(FAULTS):
            # Not always in the middle of training: some come while the job starts, or is about to.
            if dice.random() < 0.8:
                reach(job, number * (STEPS - 20) // FAULTS + dice.randrange(1, 15))
            told.append((faults.any(), last_step(job.run)))
        faults.heal()
        found = job.finish(seconds=900)
    except BaseException:
        with capsys.disabled():
            print(f"\nseed {seed} failed after: {told}")
        raise
    finally:
        faults.heal()
        for rank in job.ranks():
            with suppress(psutil.Error):
                rank.send_signal(signal.SIGCONT)
        job.leave()
    starts = json.loads((job.run / "environment.json").read_text())["starts"]
    with capsys.disabled():
        print(f"\nseed {seed}: {time.monotonic() - began:.0f} s, {len(starts)} starts, {found['Restarts']} requeues")
        print("  " + "; ".join(f"{what} after step {step}" for what, step in told))
        print(f"  {sum(start['lost_steps'] for start in starts)} steps done twice")
    # Several may strike the same start, but not all of them.
    assert len(starts) > FAULTS // 4
    assert_the_same(job.run, long_and_undisturbed, last=STEPS)


def reach(job: Job, step: int, seconds: float = 400) -> None:
    """Until the run has logged this step, hastening the job where it waits in the queue."""
    end = time.monotonic() + seconds
    pending_since = time.monotonic()
    while last_step(job.run) < step:
        state = job.slurm.job(job.number)["JobState"]
        assert state in ("RUNNING", "PENDING", "COMPLETING", "PREEMPTED", "REQUEUED", "NODE_FAIL"), (
            f"{state}: {job.said()}"
        )
        if state != "PENDING":
            pending_since = time.monotonic()
        elif time.monotonic() - pending_since > 3:
            job.slurm.hasten(job.number)
            pending_since = time.monotonic()
        assert time.monotonic() < end, f"step {step} not reached, {state}: {job.said()}"
        time.sleep(0.02)
