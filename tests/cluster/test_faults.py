"""`sbatch slurm/train_skincap.sh` on two nodes: whatever happens to it, the job ends COMPLETED, with the digest of a
run that nothing happened to, and the same weights to the last bit."""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch

from tests.cluster.slurm import LocalSlurm
from tests.distributed.test_training import ROOT, column, weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
LAST = 36


class Job:
    """A job of slurm/train_skincap.sh on 2 nodes × 2 tasks."""

    def __init__(
        self, slurm: LocalSlurm, folder: Path, recipe: Path, raw: Path, *options: str, words: Sequence[str] = ()
    ) -> None:
        self.slurm, self.run, self.log = slurm, folder / "runs" / "tiny", folder / "job.log"
        variables = {
            "RECIPE": str(recipe),
            "SKINCAP_RAW": str(raw),
            "ACCELERATE_CONFIG": "launch/accelerate/cpu.yaml",
            "OMP_NUM_THREADS": "1",
        }
        options = ("--nodes=2", "--gpus-per-node=2", f"--output={self.log}", *options)
        self.number = slurm.submit(*options, "slurm/train_skincap.sh", *words, cwd=ROOT, **variables)

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

    def nodes(self) -> list[str]:
        return self.slurm.run("scontrol", "show", "hostnames", self.slurm.job(self.number)["NodeList"]).split()

    def said(self, whole: bool = False) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text if whole else text[-6000:]


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

    def begin(*options: str, words: Sequence[str] = ()) -> Job:
        (tmp_path / "data").symlink_to(undisturbed / "data")
        return Job(slurm, tmp_path, cluster_recipe(tmp_path), raw, *options, words=words)

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


@pytest.mark.parametrize("number", ["USR1", pytest.param("TERM", marks=pytest.mark.slow)])
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


@pytest.mark.slow
def test_requeued_by_hand(start: Callable[..., Job], undisturbed: Path) -> None:
    job = start()
    job.reach(6)
    job.slurm.run("scontrol", "requeue", job.number, check=True)
    assert job.finish()["Restarts"] == "1"
    assert_the_same(job.run, undisturbed)


def test_a_rank_hangs(start: Callable[..., Job], undisturbed: Path) -> None:
    """SIGSTOP: the others wait for it in a collective until they take it for hung, write their stacks, and all start
    anew; within the limit, and the seconds that the killing takes."""
    job = start(words=["train.hang_minutes=0.1"])
    job.reach(6)
    os.kill(job.ranks()[2].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    while job.ranks() and time.monotonic() - stopped < 60:
        time.sleep(0.1)
    assert time.monotonic() - stopped < 6 + 10
    assert job.finish()["Restarts"] == "0"
    said = job.said(whole=True)
    assert "Timeout (0:00:06)!" in said
    assert "most recent call first" in said
    assert_the_same(job.run, undisturbed)


def test_a_node_crashes(slurm: LocalSlurm, start: Callable[..., Job], undisturbed: Path) -> None:
    """SLURM notices, requeues the job, and it goes on elsewhere."""
    job = start()
    job.reach(6)
    lost = job.nodes()[1]
    slurm.crash_node(lost)
    try:
        found = job.finish()
        assert found["Restarts"] == "1"
        assert lost not in job.nodes()
    finally:
        slurm.start_node(lost)
    assert_the_same(job.run, undisturbed)


@pytest.mark.parametrize("partition", [pytest.param("low", marks=pytest.mark.slow), "kind"])
def test_preempted(partition: str, slurm: LocalSlurm, start: Callable[..., Job], undisturbed: Path) -> None:
    """By a job that may: killed at once, or after a grace in which the run saves."""
    job = start(f"--partition={partition}", "--nodelist=n1,n2")
    job.reach(6)
    other = slurm.submit(
        "--partition=high", "--nodes=4", "--exclusive", "--wrap=sleep 3", "--output=/dev/null", cwd=ROOT
    )
    found = job.finish()
    assert int(found["Restarts"]) >= 1
    slurm.wait(other)
    starts = json.loads((job.run / "environment.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[1]["job"] == job.number
    assert starts[1]["lost_steps"] <= (4 if partition == "low" else 0)
    assert_the_same(job.run, undisturbed)


@pytest.mark.slow
def test_the_newest_checkpoint_is_damaged(start: Callable[..., Job], undisturbed: Path) -> None:
    job = start()
    job.reach(14)
    for rank in job.ranks():
        os.kill(rank.pid, signal.SIGSTOP)
    newest = job.run / "checkpoints" / (job.run / "checkpoints" / "latest").read_text().strip()
    (newest / "model.safetensors").write_bytes(b"torn")
    for rank in job.ranks():
        os.kill(rank.pid, signal.SIGKILL)
    job.finish()
    assert f"checkpoint {newest} is damaged" in job.said(whole=True)
    assert_the_same(job.run, undisturbed)


def test_a_wrong_recipe_is_not_tried_again(start: Callable[..., Job]) -> None:
    job = start(words=["train.epochz=3"])
    found = job.slurm.wait(job.number, ("FAILED",))
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")
    assert "unknown key train.epochz; did you mean epochs?" in job.said()


def test_an_end_for_good(start: Callable[..., Job]) -> None:
    """A file named stop in the run's folder, and a signal: it saves, and does not come back."""
    job = start()
    job.reach(6)
    (job.run / "stop").touch()
    job.slurm.run("scancel", "--signal=USR1", job.number, check=True)
    assert job.finish()["Restarts"] == "0"
    assert "stopped for good" in job.said()
    assert (job.run / "checkpoints" / "latest").exists()


def test_packing_and_scoring_are_jobs_of_their_own(
    slurm: LocalSlurm, undisturbed: Path, raw: Path, tmp_path: Path
) -> None:
    options = (f"--output={tmp_path / 'log'}", "--cpus-per-task=2")
    words = ["shards/skincap.py", str(raw), "--out", str(tmp_path / "set"), "--side", "48"]
    slurm.wait(slurm.submit(*options, "slurm/pack.sh", *words, cwd=ROOT))
    assert (tmp_path / "set" / "manifest.json").exists()
    model = undisturbed / "runs" / "tiny" / "model"
    words = ["--data", str(tmp_path / "set"), "--split", "val", "--out", str(tmp_path / "scores")]
    slurm.wait(slurm.submit(*options, "slurm/evaluate.sh", str(model), *words, cwd=ROOT))
    assert list((tmp_path / "scores").glob("*.json"))
