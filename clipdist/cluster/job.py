"""A job from its first start to its end: what becomes of it after each way in which its processes can end.

Every node runs this; the first one decides, since one has to, and tells the others.
"""

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from clipdist.cluster import scheduler
from clipdist.cluster.logs import note_output
from clipdist.cluster.meeting import Crash, Meeting, latest
from clipdist.cluster.node import CRASHED, FINISHED, GRACE_SECONDS, STOPPED, WRONG, Node
from clipdist.cluster.runs import LOGS, STOP
from clipdist.world import Allocation

LOST = 70
"""Exit code of a node that waited for the first one's verdict in vain, or has no GPUs where the job asks for some."""
KILLED = 128
"""Exit codes from here on are those of signals: what was killed has decided nothing, whatever it knew."""
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
BLAMED_TWICE = 2
PAUSE_SECONDS = 60.0
END_SECONDS = GRACE_SECONDS + 25.0
"""How long the first node waits for the others once its own ranks have ended. All end theirs after `GRACE_SECONDS`."""
AGAIN, REQUEUE = "again", "requeue"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    crashes: int = 10
    """So many in a row without a new checkpoint, and the job is given up."""
    rendezvous_seconds: float = 300.0
    """How long nodes wait for each other at a start."""


@dataclass(frozen=True)
class Training:
    """What a job trains: `clipdist.train` with `words` in `processes` processes on each node; `run` is its folder."""

    words: Sequence[str]
    run: Path
    processes: int
    accelerate_config: Path
    shared: Path
    """A folder that all nodes see."""
    limits: Limits = Limits()
    preflight: bool = True
    """Whether `clipdist doctor` looks at the nodes before the job's first start, and ends it where that finds an
    error."""


def run_job(training: Training, allocation: Allocation) -> int:
    """Trains until the run is finished, stopped, or given up, through crashes; every node of the allocation calls it.

    After a crash all start anew in the same allocation, after a pause that grows; where one node was to blame twice, or
    says nothing any more, the job goes back into the queue without it. Asked to stop, by a signal, it saves and goes
    back into the queue, unless the run's folder holds a file `stop`.

    Returns 0 when finished; 2 when the configuration or the input is wrong; 75 when stopped with a good checkpoint, or
    when the job is back in the queue; 1 when given up; 70 on another node than the first when that one was lost, and
    where SLURM has lost the job's GPUs.
    """
    if allocation.slurm and not allocation.gpus and scheduler.gpus_lost(allocation.job):
        logger.info("SLURM has started the job without the GPUs that it asks for")
        return LOST
    asked: list[int] = []
    ever_asked = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        ever_asked.set()

    for signal_number in PASSED_ON:
        signal.signal(signal_number, note)
    attempt = 0
    while True:
        meeting = Meeting(training.shared, allocation, attempt)
        if allocation.node == 0 and attempt == 0:
            note_output(training.run, scheduler.job(allocation.job).get("StdOut", "") if allocation.slurm else "")
            meeting.note_run(training.run)
        first_start = attempt == 0 and allocation.restarts == 0
        unwanted = allocation.node == 0 and attempt == 0 and (training.run / STOP).exists()
        if unwanted:  # stopped while the job was waiting in the queue
            logger.info(f"not started, since {training.run / STOP} exists; remove it and submit again to go on")
            code = STOPPED
            meeting.fail("the run was stopped")
        elif training.preflight and first_start and (code := _preflight(training)) and allocation.node == 0:
            meeting.fail("the preflight found errors")
        else:
            node = Node(meeting, training.processes, training.accelerate_config, training.words, asked)
            code = node.run(training.limits.rendezvous_seconds)
            node.keep_logs(training.run / LOGS / f"{allocation.job}-{allocation.restarts}-{attempt}")
        meeting.end(code)
        if allocation.node == 0:
            verdict = str(STOPPED) if unwanted else _decide(training, meeting, code, ever_asked)
            meeting.decide(verdict)
        else:
            verdict = meeting.verdict(END_SECONDS + PAUSE_SECONDS + 60) or str(LOST)
        if verdict == AGAIN:
            attempt += 1
            continue
        if verdict.startswith(REQUEUE):
            if allocation.node == 0:
                logger.info(scheduler.requeue(allocation.job, verdict.removeprefix(REQUEUE).strip()))
            return STOPPED
        return int(verdict)


def _preflight(training: Training) -> int:
    """Exit code of `clipdist doctor` on this node: of the first one, what is found on all of them. In a process of its
    own, since it looks at GPUs, and this one lives as long as the job."""
    words = [*training.words, "--processes-per-node", str(training.processes), "--shared", str(training.shared)]
    # Nothing in such a file can say so: with `use_cpu` the launcher starts a single process.
    words += ["--cpu"] if training.accelerate_config.stem == "cpu" else []
    code = subprocess.run([sys.executable, "-m", "clipdist.cli", "doctor", *words], check=False).returncode
    return WRONG if code else FINISHED


def log_to_output() -> None:
    """What a job says of itself goes to its output, bare, beside what the ranks say."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("clipdist").setLevel(logging.INFO)


def judge(ends: dict[str, int], nodes: int, first: int) -> int:
    """One code of those that the nodes' ranks ended with; `first` is the first node's."""
    codes = [*ends.values(), first]
    if WRONG in codes:
        return WRONG
    if set(codes) == {FINISHED}:
        return FINISHED  # what is done is done, whatever became of a node that has not said so
    if len(ends) == nodes and set(codes) <= {FINISHED, STOPPED}:
        return STOPPED
    return CRASHED


def _decide(training: Training, meeting: Meeting, first: int, asked: threading.Event) -> str:
    """The first node's verdict, once its own ranks have ended with `first`. `asked` tells whether a signal has come."""
    allocation = meeting.allocation
    ends = meeting.ends(END_SECONDS)
    code = judge(ends, len(allocation.nodes), first)
    if code in (FINISHED, WRONG):
        return str(code)
    for_good = (training.run / STOP).exists()
    if code == STOPPED:
        if for_good:
            logger.info(f"stopped for good, since {training.run / STOP} exists; remove it and submit again to go on")
            return str(STOPPED)
        logger.info("stopped with a good checkpoint")
        return REQUEUE if allocation.slurm else str(STOPPED)
    blamed = meeting.blamed(ends)
    crash = Crash(time.time(), blamed.host, blamed.why, _newest(training.run))
    meeting.note_crash(crash)
    crashes = in_a_row(meeting.crashes())
    told = f"crashed: {blamed.why}{f' ({blamed.host})' if blamed.host else ''}"
    if for_good:
        logger.info(f"{told}; not started anew, since {training.run / STOP} exists")
        return str(CRASHED)
    if len(crashes) > training.limits.crashes:
        logger.info(
            f"{told}; {len(crashes)} times in a row without a new checkpoint: giving up; see above, and {training.run}"
        )
        return str(CRASHED)
    lost = len(ends) < len(allocation.nodes) or bool(meeting.missing(0))
    if allocation.slurm and (lost or sum(past.host == blamed.host for past in crashes) >= BLAMED_TWICE):
        enough = scheduler.others(allocation.job, blamed.host) >= len(allocation.nodes)
        if enough and blamed.host:
            logger.info(f"{told}; its fault {'now' if lost else 'again'}: to go on without it")
            return f"{REQUEUE} {blamed.host}"
        if lost:
            logger.info(f"{told}; there is no other node to go on with")
            return REQUEUE
    if asked.is_set():
        logger.info(f"{told}, asked to stop: no start in what is left of this allocation")
        return REQUEUE if allocation.slurm else str(CRASHED)
    pause = min(PAUSE_SECONDS, float(len(crashes) ** 2))
    logger.info(
        f"{told}; start {meeting.attempt + 1} in this allocation follows in {pause:.0f} s, from the last checkpoint"
    )
    if asked.wait(pause):
        return REQUEUE if allocation.slurm else str(STOPPED)
    return AGAIN


def undecided(shared: Path, allocation: Allocation, code: int, limits: Limits) -> int:
    """For the script around the nodes' tasks, which have ended with `code`: puts the job back into the queue where
    nobody among them could decide, since a task was killed, or SLURM could not start them.

    Returns 75 when it is back there, else 1 or `code`: it was decided, the run's folder holds a file `stop`, or too
    many crashes in a row have led to no new checkpoint.
    """
    meeting = latest(shared, allocation)
    verdict = meeting.verdict(0)
    if verdict and verdict.isdecimal() and (int(verdict) != FINISHED or code < KILLED):
        return code
    run = meeting.run()
    told = f"the nodes' tasks ended with {code}, and none of them has decided"
    if run and (run / STOP).exists():
        logger.info(f"{told}; not started anew, since {run / STOP} exists")
        return CRASHED
    meeting.note_crash(Crash(time.time(), "", told, _newest(run) if run else ""))
    if (number := len(in_a_row(meeting.crashes()))) > limits.crashes:
        logger.info(f"{told}; {number} times in a row without a new checkpoint: giving up")
        return CRASHED
    logger.info(f"{told}: {scheduler.requeue(allocation.job)}")
    return STOPPED


def in_a_row(crashes: Sequence[Crash]) -> list[Crash]:
    """The latest crashes between which no checkpoint was made: those that got nowhere."""
    return [crash for crash in crashes if crash.checkpoint == crashes[-1].checkpoint]


def _newest(run: Path) -> str:
    from clipdist.train.checkpoint import newest_step  # brings the towers, for which a start need not wait

    step = newest_step(run / "checkpoints")
    return "" if step is None else str(step)
