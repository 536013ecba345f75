"""`sbatch slurm/train_skincap.sh` on two nodes: whatever happens to it, the job ends COMPLETED, with the digest of a
run that nothing happened to, and the same weights to the last bit."""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from tests.cluster.jobs import IN_BATCH, LAST, Job, assert_the_same
from tests.cluster.slurm import LocalSlurm
from tests.distributed.test_training import ROOT, column

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture
def start(
    slurm: LocalSlurm, tmp_path: Path, cluster_recipe: Callable[..., Path], raw: Path, undisturbed: Path
) -> Callable[..., Job]:
    """start(options of sbatch …): the same job in a folder of its own."""

    def begin(*options: str, words: Sequence[str] = ()) -> Job:
        if not (tmp_path / "data").exists():
            (tmp_path / "data").symlink_to(undisturbed / "data")
        return Job(slurm, tmp_path, cluster_recipe(tmp_path), raw, *options, words=words)

    return begin


def test_to_the_end(undisturbed: Path) -> None:
    run = undisturbed / "runs" / "tiny"
    assert max(column(run, "train/loss")) == LAST
    (scores,) = (json.loads(path.read_text()) for path in (run / "evaluation").glob("*.json"))
    # Recall over the whole gallery and in small batches, each of which says what it is.
    assert (scores["in_batch"]["batch"], scores["in_batch"]["gallery"]) == (IN_BATCH, IN_BATCH)
    assert scores["image_to_text"]["gallery"] > IN_BATCH
    assert f"<h2>In batches of {IN_BATCH}</h2>" in (run / "report.html").read_text(encoding="utf-8")


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
    assert "start 1 in this allocation" in job.said(whole=True)
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
    anew. How soon: benchmarks/supervision.py."""
    job = start(words=["train.hang_minutes=0.1"])
    job.reach(6)
    os.kill(job.ranks()[2].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    while job.ranks() and time.monotonic() - stopped < 60:
        time.sleep(0.1)
    assert not job.ranks()
    assert job.finish()["Restarts"] == "0"
    said = job.said(whole=True)
    assert "Timeout (0:00:06)!" in said
    assert "most recent call first" in said
    assert_the_same(job.run, undisturbed)


@pytest.mark.slow
def test_a_loader_worker_hangs(start: Callable[..., Job], undisturbed: Path) -> None:
    """Its rank waits for it as the other ranks wait for that rank, all asleep: who hung is who has not come to the
    exchange in which the others are."""
    job = start(words=["train.hang_minutes=0.1"])
    job.reach(6)
    for worker in job.ranks()[2].children():
        worker.suspend()
    assert job.finish()["Restarts"] == "0"
    assert f"crashed: rank 2 hung: the others waited there ({job.nodes()[1]}); start 1" in job.said(whole=True)
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


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["of-the-first-node", "of-the-second-node"])
def test_a_cable_is_pulled(
    which: int, tmp_path: Path, cluster_recipe: Callable[..., Path], raw: Path, undisturbed: Path
) -> None:
    """A node that nothing reaches any more: its ranks still run, and one of them may still hold the run."""
    (tmp_path / "data").symlink_to(undisturbed / "data")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        networked = LocalSlurm(Path(folder), network=True)
        try:
            networked.up()
            job = Job(networked, tmp_path, cluster_recipe(tmp_path), raw, words=["train.hang_minutes=0.1"])
            job.reach(6)
            lost = job.nodes()[which]
            networked.unplug(lost)
            found = job.finish()
            assert found["Restarts"] == "1"
            assert lost not in job.nodes()
        finally:
            networked.down()
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
def test_the_time_limit(start: Callable[..., Job], undisturbed: Path) -> None:
    """SLURM's own signal ahead of it. The ranks are held until it has come; SLURM lets them go before it sends it."""
    job = start("--time=4", "--signal=USR1@60")
    job.reach(6)
    ranks = job.ranks()
    for rank in ranks:
        rank.suspend()
    end = time.monotonic() + 270
    while any(held(rank) for rank in ranks):
        assert time.monotonic() < end, "no signal came"
        time.sleep(0.2)
    assert int(job.finish()["Restarts"]) >= 1
    starts = json.loads((job.run / "environment.json").read_text())["starts"]
    assert len(starts) >= 2
    assert all(start["lost_steps"] == 0 for start in starts)
    assert_the_same(job.run, undisturbed)


def held(rank: psutil.Process) -> bool:
    try:
        return bool(rank.status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def test_cancelled_it_stays_away(start: Callable[..., Job]) -> None:
    job = start()
    job.reach(6)
    job.slurm.run("scancel", job.number, check=True)
    found = job.slurm.wait(job.number, ("CANCELLED",))
    assert found["Restarts"] == "0"
    time.sleep(3)
    assert job.slurm.job(job.number)["JobState"] == "CANCELLED"


def test_on_fewer_nodes(start: Callable[..., Job], undisturbed: Path) -> None:
    """Submitted again with half of the nodes: the same global batches in the same order, each rank with twice the
    rows."""
    job = start()
    job.reach(6)
    (job.run / "stop").touch()
    job.slurm.run("scancel", "--signal=USR1", job.number, check=True)
    job.finish()
    (job.run / "stop").unlink()
    job = start("--nodes=1")
    job.finish()
    environment = json.loads((job.run / "environment.json").read_text())
    assert [start["world_size"] for start in environment["starts"]] == [4, 2]
    assert column(job.run, "data/digest") == column(undisturbed / "runs" / "tiny", "data/digest")
    losses, whole = column(job.run, "train/loss"), column(undisturbed / "runs" / "tiny", "train/loss")
    assert {step: losses[step] for step in range(1, 7)} == {step: whole[step] for step in range(1, 7)}


@pytest.mark.slow
def test_a_bad_node_is_left_out(start: Callable[..., Job], undisturbed: Path) -> None:
    """One on which ranks die twice without a checkpoint in between: the job goes back into the queue without it."""
    job = start(words=["checkpoint.every_steps=0"])
    bad = job.nodes_once_running()[1]
    for _ in range(2):
        ranks = job.ranks_once_there(4)
        os.kill(ranks[3].pid, signal.SIGKILL)
        for rank in ranks:
            rank.wait(60)
    found = job.finish()
    assert (found["Restarts"], found["ExcNodeList"]) == ("1", bad)
    assert bad not in job.nodes()
    assert f"a rank died ({bad}); its fault again: to go on without it" in job.said(whole=True)
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
    assert "unknown key train.epochz; did you mean epochs?" in job.said(whole=True)


def test_an_end_for_good(start: Callable[..., Job]) -> None:
    """A file named stop in the run's folder, and a signal: it saves, and does not come back."""
    job = start()
    job.reach(6)
    (job.run / "stop").touch()
    job.slurm.run("scancel", "--signal=USR1", job.number, check=True)
    assert job.finish()["Restarts"] == "0"
    assert "stopped for good" in job.said(whole=True)
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
