"""One node's share of a job: starts `accelerate launch` for the node's processes, passes signals on to them, and ends
with the exit code that they had.

The launcher itself says 1 whatever its processes said, and dies of the signals that SLURM announces an end with. So
each rank notes its exit code in a folder of this node's, and the launcher ignores what is meant for the ranks.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType

import psutil

from clipdist import world
from clipdist.data.shards import write_atomically
from clipdist.errors import UserError
from clipdist.world import Allocation

PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
FIRST_PORT, PORTS = 20_000, 10_000  # below the range that systems give to outgoing connections
GRACE_SECONDS = 5.0
FINISHED, WRONG, STOPPED, CRASHED = 0, 2, 75, 1


def run_node(
    allocation: Allocation,
    processes: int,
    accelerate_config: Path,
    words: Sequence[str],
    *,
    attempt: int,
    shared: Path,
    rendezvous_seconds: float,
) -> int:
    """Runs `clipdist.train` with `words` in `processes` processes of this node, and joins them with the other nodes'.

    Every node of the allocation calls it. `attempt` counts the starts within one allocation; `shared` is a folder that
    all nodes see. Returns 0 when all ranks here finished, 2 when one found its configuration or input wrong, 75 when
    all stopped on request, else 1. Raises `UserError` when the first node does not say within `rendezvous_seconds`
    where to meet.
    """
    meeting = f"rendezvous-{allocation.job}-{allocation.restarts}-{attempt}"
    port = _meet(allocation, attempt, shared / meeting, rendezvous_seconds)
    nodes = len(allocation.nodes)
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(accelerate_config)]
    launch += ["--num_machines", str(nodes), "--machine_rank", str(allocation.node)]
    launch += ["--num_processes", str(nodes * processes)]
    launch += ["--main_process_ip", allocation.nodes[0], "--main_process_port", str(port)]
    with tempfile.TemporaryDirectory(prefix="clipdist-") as folder:
        codes = Path(folder)
        environment = {**os.environ, world.EXIT_CODES: folder}
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # inherited by the launcher; the ranks set handlers of their own
        launcher = subprocess.Popen([*launch, "-m", "clipdist.train", *words], env=environment)
        asked: list[int] = []

        def note(number: int, frame: FrameType | None) -> None:
            asked.append(number)

        for number in PASSED_ON:
            signal.signal(number, note)
        failed = shared / (meeting + ".failed")
        _watch(launcher, codes, asked, failed)
        code = outcome(launcher.returncode, _codes(codes), processes)
        if code == CRASHED:
            failed.touch()
    return code


def _codes(folder: Path) -> list[int]:
    """Of the ranks here that have noted theirs."""
    return [int(path.read_text() or CRASHED) for path in folder.iterdir() if path.name.isdigit()]


def outcome(launcher: int, codes: Sequence[int], processes: int) -> int:
    """One exit code of those that the launcher and some of its processes ended with."""
    if WRONG in codes:
        return WRONG
    if len(codes) == processes and set(codes) == {FINISHED}:
        return FINISHED
    if len(codes) == processes and set(codes) <= {FINISHED, STOPPED}:
        return STOPPED
    return WRONG if launcher == WRONG and not codes else CRASHED


def _watch(launcher: subprocess.Popen[bytes], codes: Path, asked: list[int], failed: Path) -> None:
    """Until the launcher has ended: passes signals on, and ends the ranks here when one of them, or one of another node
    (then `failed` exists), has failed: they would wait for it in a collective, and one that is stopped forever."""
    failing_since: float | None = None
    while launcher.poll() is None:
        time.sleep(0.1)
        ranks = _ranks(launcher)
        while asked:
            # A rank that has only begun does not listen yet, and looks for the file when it does.
            (codes / world.STOP).touch()
            number = asked.pop(0)
            for rank in ranks:
                _send(rank, number)
        bad = failed.exists() or any(code in (WRONG, CRASHED) for code in _codes(codes))
        dead = len(_codes(codes)) < sum(_ended(rank) for rank in ranks)
        if (bad or dead) and failing_since is None:
            failing_since = time.monotonic()
            failed.touch()
        if failing_since is not None and time.monotonic() - failing_since > GRACE_SECONDS:
            for rank in ranks:
                _send(rank, signal.SIGKILL)


def _ranks(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(launcher.pid).children()
    except psutil.Error:
        return []


def _ended(rank: psutil.Process) -> bool:
    """Whether it is a zombie; then the launcher has yet to notice."""
    try:
        return bool(rank.status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True


def _send(rank: psutil.Process, number: int) -> None:
    try:
        rank.send_signal(number)
    except psutil.Error:
        return


def _meet(allocation: Allocation, attempt: int, path: Path, seconds: float) -> int:
    """The port on the first node where the ranks meet: that node finds a free one, and tells by a file that all see."""
    if allocation.node == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        port = free_port(int(allocation.job.split("_")[0]) + attempt)
        write_atomically(path, f"{port}\n".encode())
        return port
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists():
            return int(path.read_text(encoding="utf-8"))
        time.sleep(0.2)
    raise UserError(
        f"{path}: the first node, {allocation.nodes[0]}, has not said within {seconds:.0f} s where to meet; see its "
        f"output, and whether {path.parent} is a folder that all nodes share"
    )


def free_port(job: int) -> int:
    """One that nothing listens on here; the first that is tried follows from the job's number, so that jobs which share
    a node seldom try the same."""
    for number in range(PORTS):
        port = FIRST_PORT + (job * 101 + number) % PORTS
        with closing(socket.socket()) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError(f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS} is free on this node")
