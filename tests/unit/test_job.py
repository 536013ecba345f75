"""What the nodes of a job tell each other, and what the first one decides; the same on a real SLURM: tests/cluster."""

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from clipdist.cluster import job, meeting, scheduler
from clipdist.cluster.job import LOST, Limits, Training, in_a_row, judge, run_job, undecided
from clipdist.cluster.meeting import Crash, Failure, Meeting
from clipdist.cluster.node import Node
from clipdist.cluster.runs import STOP
from clipdist.world import Allocation

HOSTS = ("n1", "n2", "n3")


def allocation(node: int, restarts: int = 0, slurm: bool = True) -> Allocation:
    return Allocation("12", restarts, HOSTS, node, 2, slurm=slurm)


def nodes(shared: Path, attempt: int = 0) -> list[Meeting]:
    return [Meeting(shared, allocation(number), attempt) for number in range(3)]


def test_nodes_meet_when_all_have_come(tmp_path: Path) -> None:
    first, second, third = nodes(tmp_path)
    first.come()
    third.come()
    assert first.missing(0.2) == ["n2"]
    assert second.port(0.2) is None
    threading.Timer(0.3, second.come).start()
    assert first.missing(10) == []
    first.open(20_123)
    assert (second.port(1), third.port(1)) == (20_123, 20_123)
    assert nodes(tmp_path, attempt=1)[1].port(0.1) is None, "the next start has a place of its own"


def test_who_waits_for_a_port_hears_of_a_failure(tmp_path: Path) -> None:
    first, second, _ = nodes(tmp_path)
    threading.Timer(0.2, lambda: first.fail("the node did not come", "n3")).start()
    assert second.port(30) is None
    assert second.failure() == Failure("n3", "the node did not come")


def test_the_first_failure_counts(tmp_path: Path) -> None:
    first, second, third = nodes(tmp_path)
    assert first.failure() is None
    second.fail("a rank died")
    third.fail("a rank ended with exit code 1")
    assert first.failure() == Failure("n2", "a rank died")
    ends = {"n1": 1, "n2": 1, "n3": 1}
    assert first.blamed(ends) == Failure("n2", "a rank died")
    third.stuck("1 of its 2 ranks hung")
    assert first.blamed(ends) == Failure("n3", "1 of its 2 ranks hung"), "the others only waited for it"
    assert first.blamed({"n1": 1, "n3": 1}).host == "n2", "and one that is gone did not even say so"


@pytest.mark.parametrize(
    ("came", "blamed"),
    [
        ([{0: 9, 1: 9}, {2: 9, 3: 8}, {4: 9, 5: 9}], Failure("n2", "rank 3 hung: the others waited there")),
        ([{0: 9, 1: 9}, {2: 9, 3: 9}, {4: 8, 5: 8}], Failure("n3", "ranks 4, 5 hung: the others waited there")),
        ([{0: 9, 1: 8}, {2: 8, 3: 9}, {4: 9, 5: 9}], Failure("", "ranks 1, 2 hung: the others waited there (n1, n2)")),
        ([{0: 9, 1: 9}, {2: 9, 3: 9}, {4: 9, 5: 9}], Failure("", "no sign; no rank is behind the others")),
        ([{0: 9, 1: 9}, {}, {4: 9, 5: 8}], Failure("", "no sign; no rank is behind the others")),
    ],
)
def test_who_the_others_waited_for_is_to_blame_for_a_hang(
    came: list[dict[int, int]], blamed: Failure, tmp_path: Path
) -> None:
    meetings = nodes(tmp_path)
    meetings[0].fail("no sign", hung=True)
    for node, exchanges in zip(meetings, came, strict=True):
        node.came(exchanges)
    ends = {"n1": 1, "n2": 1, "n3": 1}
    assert meetings[0].blamed(ends) == blamed
    meetings[2].stuck("1 of its 2 ranks hung")
    assert meetings[0].blamed(ends).host == "n3", "a process that is stopped needs no guess"


def test_a_node_that_is_alone_hung_by_itself(tmp_path: Path) -> None:
    node = Meeting(tmp_path, Allocation("12", 0, ("n1",), 0, 2), 0)
    node.fail("no sign", hung=True)
    node.came({0: 9, 1: 9})
    assert node.blamed({"n1": 1}) == Failure("n1", "no sign", hung=True)
    node.came({0: 9, 1: 8})
    assert node.blamed({"n1": 1}) == Failure("n1", "rank 1 hung: the others waited there")


def test_ends_are_waited_for_a_while(tmp_path: Path) -> None:
    first, second, third = nodes(tmp_path)
    first.end(75)
    second.end(0)
    assert first.ends(0.2) == {"n1": 75, "n2": 0}
    threading.Timer(0.2, lambda: third.end(1)).start()
    assert first.ends(10) == {"n1": 75, "n2": 0, "n3": 1}
    assert third.verdict(0.1) is None
    first.decide("again")
    assert third.verdict(0.1) == "again"


def test_an_outage_of_the_shared_folder_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = nodes(tmp_path)[0]
    real, failures = meeting.write_atomically, [OSError(30, "Read-only file system"), OSError(116, "Stale file handle")]

    def away(path: Path, data: bytes) -> None:
        if failures:
            raise failures.pop()
        real(path, data)

    monkeypatch.setattr(meeting, "write_atomically", away)
    first.end(0)
    assert first.ends(0) == {"n1": 0}


@pytest.mark.parametrize(
    ("ends", "first", "expected"),
    [
        ({"n1": 0, "n2": 0, "n3": 0}, 0, 0),
        ({"n1": 0}, 0, 0),  # the first one has finished: the model is there
        ({"n1": 75, "n2": 75, "n3": 0}, 75, 75),
        ({"n1": 75, "n2": 75}, 75, 1),  # the third may have been saving its part
        ({"n1": 1, "n2": 2, "n3": 1}, 1, 2),
        ({"n1": 1, "n2": 1, "n3": 1}, 1, 1),
        ({"n1": 75, "n2": 1, "n3": 75}, 75, 1),
        ({}, 1, 1),
    ],
)
def test_one_code_of_many_nodes(ends: dict[str, int], first: int, expected: int) -> None:
    assert judge(ends, 3, first) == expected


def test_crashes_in_a_row_got_nowhere() -> None:
    crashes = [Crash(n, "n1", "", checkpoint) for n, checkpoint in enumerate(["", "8", "8", "16", "16", "16"])]
    assert len(in_a_row(crashes)) == 3
    assert len(in_a_row(crashes[:1])) == 1


@pytest.fixture
def decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """decide(host -> code, slurm=…, free=…, crashes=…): the first node's verdict."""
    monkeypatch.setattr(job, "END_SECONDS", 0.1)
    attempts = iter(range(100))

    def verdict(
        ends: dict[str, int], *, slurm: bool = True, free: int = 9, culprit: str = "n2", asked: float | None = None
    ) -> str:
        monkeypatch.setattr(job, "PAUSE_SECONDS", 30.0 if asked else 0.0)
        monkeypatch.setattr(scheduler, "others", lambda number, without: free)
        attempt = next(attempts)
        met = [Meeting(tmp_path / "shared", allocation(number, slurm=slurm), attempt) for number in range(3)]
        for node in met:
            node.come()
            if node.host in ends:
                node.end(ends[node.host])
        if 1 in ends.values():
            met[0].fail("a rank died", culprit)
        training = Training([], tmp_path / "run", 2, Path("gpu.yaml"), tmp_path / "shared", Limits(crashes=3))
        signal = threading.Event()
        if asked is not None:
            threading.Timer(asked, signal.set).start() if asked else signal.set()
        return job._decide(training, met[0], ends["n1"], signal)

    return verdict


def all_end(code: int) -> dict[str, int]:
    return dict.fromkeys(HOSTS, code)


def test_plain_ends(decide: Callable[..., str]) -> None:
    assert decide(all_end(0)) == "0"
    assert decide(all_end(2)) == "2"
    assert decide(all_end(75)) == "requeue"
    assert decide(all_end(75), slurm=False) == "75", "there is no queue"


def test_a_node_that_is_to_blame_twice_is_left_out(decide: Callable[..., str]) -> None:
    assert decide(all_end(1)) == "again"
    assert decide(all_end(1), culprit="n3") == "again"
    assert decide(all_end(1)) == "requeue n2"


def test_no_node_is_left_out_where_none_can_take_its_place(decide: Callable[..., str]) -> None:
    assert decide(all_end(1), free=2) == "again"
    assert decide(all_end(1), free=2) == "again"


def test_a_node_that_is_gone_is_left_out_at_once(decide: Callable[..., str], tmp_path: Path) -> None:
    assert decide({"n1": 1, "n2": 1}) == "requeue n3"
    assert decide({"n1": 1, "n2": 1}, free=2) == "requeue", "SLURM knows when there is another"


def test_crashes_that_get_nowhere_end_the_job(decide: Callable[..., str], tmp_path: Path) -> None:
    for culprit in HOSTS:
        assert decide(all_end(1), culprit=culprit) == "again"
    (tmp_path / "run" / "checkpoints" / "step-00000004").mkdir(parents=True)
    for culprit in HOSTS:
        assert decide(all_end(1), culprit=culprit) == "again", "there is a new checkpoint"
    assert decide(all_end(1)) == "1"


def test_asked_to_stop_while_it_pauses(decide: Callable[..., str]) -> None:
    assert decide(all_end(1), asked=0.2) == "requeue"


def test_a_crash_after_it_was_asked_to_stop(decide: Callable[..., str]) -> None:
    """Near the time limit, say: a new start would be cut off, and not be queued again."""
    assert decide(all_end(1), asked=0.0) == "requeue"
    assert decide(all_end(1), asked=0.0, slurm=False) == "1"


def test_a_stop_for_good(decide: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / STOP).touch()
    assert decide(all_end(75)) == "75"
    assert decide(all_end(1)) == "1"


@pytest.mark.parametrize(
    ("verdict", "code", "expected"),
    [
        (None, 137, 75),  # the first node's task was killed
        (None, 1, 75),  # srun itself failed, with the code that means given up
        ("again", 233, 75),
        ("requeue n2", 137, 75),
        ("1", 1, 1),
        ("2", 2, 2),
        ("0", 1, 1),  # the scores failed, which they would again
        ("0", 137, 75),  # they were killed
    ],
)
def test_a_script_asks_what_becomes_of_a_job_whose_tasks_are_gone(
    verdict: str | None, code: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requeued: list[str] = []
    monkeypatch.setattr(scheduler, "requeue", requeued.append)
    Meeting(tmp_path, allocation(0, restarts=2), 0).decide("again")
    meeting = Meeting(tmp_path, allocation(0, restarts=2), 1)
    Meeting(tmp_path, allocation(0, restarts=1), 10).decide("1")
    if verdict:
        meeting.decide(verdict)
    assert undecided(tmp_path, allocation(0, restarts=2), code, Limits()) == expected
    assert requeued == ["12"] * (expected == 75)
    assert len(meeting.crashes()) == (expected == 75)


def test_so_many_requeues_as_get_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is not given up for having been requeued often, by its time limit, say."""
    monkeypatch.setattr(scheduler, "requeue", lambda number: "")
    shared, run = tmp_path / "shared", tmp_path / "run"
    Meeting(shared, allocation(0), 0).note_run(run)
    codes = []
    for restarts in range(20):
        if restarts % 3 == 0 and restarts <= 12:
            (run / "checkpoints" / f"step-{restarts:08}").mkdir(parents=True)
        codes.append(undecided(shared, allocation(0, restarts), 137, Limits(crashes=3)))
    assert codes == [75] * 15 + [1] * 5
    (run / "checkpoints" / "step-00000099").mkdir()
    (run / STOP).touch()
    assert undecided(shared, allocation(0, 20), 137, Limits(crashes=3)) == 1, "it is not to come back"


def test_a_job_whose_gpus_slurm_has_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SLURM tells it; whoever asks for none has lost none."""
    said = ""
    monkeypatch.setattr(scheduler, "ask", lambda *words: subprocess.CompletedProcess(words, 0, said, ""))
    for said, lost in (
        ("JobId=12 JOB_GRES=(null) Nodes=n[3-4] GRES= TresPerNode=gres:gpu:2", True),
        ("JobId=12 JOB_GRES=gpu:4 Nodes=n[3-4] GRES=gpu:2(IDX:2-3) TresPerNode=gres:gpu:2", False),
        ("JobId=12 JOB_GRES=(null) TresPerJob=gres/gpu:4", True),
        ("JobId=12 JOB_GRES=(null) Nodes=n[3-4] GRES=", False),
        ("", False),
    ):
        assert scheduler.gpus_lost("12") is lost, said
    said = "JOB_GRES=(null) TresPerNode=gres:gpu:2"
    training = Training([], tmp_path / "run", 2, Path("gpu.yaml"), tmp_path / "shared")
    assert run_job(training, Allocation("12", 1, HOSTS, 1, 0)) == LOST
    assert not (tmp_path / "shared").exists()


def run_nodes(training: Training, *allocations: Allocation) -> dict[int, int]:
    """The exit code of each node, by its number; of those that have ended within two minutes."""
    codes: dict[int, int] = {}

    def node(own: Allocation) -> None:
        codes[own.node] = run_job(training, own)

    threads = [threading.Thread(target=node, args=(own,)) for own in allocations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return codes


def test_all_nodes_do_what_the_first_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_handlers: None
) -> None:
    """Three nodes whose ranks crash once and then finish."""
    started: list[tuple[str, int]] = []

    def ranks(node: Node, seconds: float) -> int:
        started.append((node.meeting.host, node.meeting.attempt))
        node.meeting.come()
        if node.meeting.attempt == 0:
            node.meeting.fail("a rank died")
            return 1
        return 0

    monkeypatch.setattr(Node, "run", ranks)
    monkeypatch.setattr(job.signal, "signal", lambda number, handler: None)  # these nodes are threads
    training = Training([], tmp_path / "run", 2, Path("gpu.yaml"), tmp_path / "shared", preflight=False)
    codes = run_nodes(training, *map(allocation, range(3)))
    assert codes == {0: 0, 1: 0, 2: 0}
    assert sorted(started) == sorted((host, attempt) for host in HOSTS for attempt in (0, 1))
    assert len(Meeting(tmp_path / "shared", allocation(0), 0).crashes()) == 1


def test_a_run_that_was_stopped_while_its_job_waited_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.signal, "signal", lambda number, handler: None)  # these nodes are threads
    monkeypatch.setattr(Node, "_launch", lambda *_: pytest.fail("it was started"))
    training = Training([], tmp_path / "run", 2, Path("gpu.yaml"), tmp_path / "shared", preflight=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    codes = run_nodes(training, *map(allocation, range(3)))
    assert codes == dict.fromkeys(range(3), 75)
    assert not Meeting(tmp_path / "shared", allocation(0), 0).crashes()


def test_an_error_of_the_preflight_ends_the_job_on_all_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before anything is launched; what was found is in the job's output."""
    monkeypatch.setattr(job.signal, "signal", lambda number, handler: None)  # these nodes are threads
    monkeypatch.setattr(job, "END_SECONDS", 1.0)
    recipe, cpu = tmp_path / "wrong.yaml", Path(__file__).parents[2] / "launch" / "accelerate" / "cpu.yaml"
    recipe.write_text("train: {global_batch: 4, epochz: 1}\n")
    training = Training([str(recipe)], tmp_path / "run", 2, cpu, tmp_path / "shared", Limits(rendezvous_seconds=60))
    codes = run_nodes(training, *(Allocation("12", 0, ("n1", "n2"), number, 2) for number in range(2)))
    assert codes == {0: 2, 1: 2}
    assert "unknown key train.epochz; did you mean epochs?" in " ".join(capfd.readouterr().out.split())
