"""One node's share of a job's processes: starts `accelerate launch` for them, passes signals on to them, and tells what
they ended with.

The launcher itself says 1 whatever its processes said, and dies of the signals that SLURM announces an end with. So
each rank notes its exit code in a folder of this node's, and the launcher ignores what is meant for the ranks.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import psutil
import yaml

from clipdist import heartbeat, world
from clipdist.cluster.meeting import Meeting
from clipdist.errors import UserError

FIRST_PORT, PORTS = 20_000, 10_000  # below the range that systems give to outgoing connections
GRACE_SECONDS = 5.0
ALIVE_SECONDS = 10.0
"""How often a node gives a sign of life."""
NO_PROGRESS = "no sign of progress within train.hang_minutes"
LOGS = "logs"
STANDARD_ERROR = "2"
LINE_PREFIX = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"
"""Torch's variable for what stands before each line that a rank says; ours looks as that of `srun --label`."""
FINISHED, WRONG, STOPPED, CRASHED = 0, 2, 75, 1


class Node:
    """This node's part of one start of the job's processes, all running `clipdist.train` with `words`.

    `asked` is where the signals arrive that are to be passed on; whoever handles them appends their numbers.
    """

    def __init__(
        self, meeting: Meeting, processes: int, accelerate_config: Path, words: Sequence[str], asked: list[int]
    ) -> None:
        self.meeting, self.processes, self.asked = meeting, processes, asked
        self.accelerate_config, self.words = accelerate_config, words
        self._failed = self._stuck = False
        self._alive_at = 0.0
        self._ranks: dict[int, psutil.Process] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="clipdist-")  # of this node's own disk: no outage reaches it
        self.folder = Path(self._folder.name)

    def run(self, rendezvous_seconds: float) -> int:
        """Every node calls it. Returns 0 when all ranks here finished, 2 when one found its configuration or input
        wrong, 75 when all stopped on request, else 1; also when not all nodes came within `rendezvous_seconds`."""
        port = self._meet(rendezvous_seconds)
        if port is None:
            return CRASHED
        codes = self.folder / "codes"
        codes.mkdir()
        launcher = self._launch(port, codes, rendezvous_seconds)
        self._watch(launcher, codes)
        noted = _codes(codes)
        code = outcome(launcher.returncode, noted, self.processes)
        if code == CRASHED:
            self.meeting.came({rank: sign.exchanges for rank, sign in heartbeat.signs(codes).items()})
        if code in (WRONG, CRASHED):
            self._fail(_death(codes) if len(noted) < self.processes else f"a rank ended with exit code {code}")
        return code

    def keep_logs(self, target: Path) -> None:
        """Copies what each rank said on standard error to `target`, and forgets it here."""
        first = self.meeting.allocation.node * self.processes
        with suppress(OSError):  # the job's own output has all of it, too
            for path in self.folder.glob(f"{LOGS}/*/attempt_0/*/stderr.log"):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / f"rank-{first + int(path.parent.name)}.log")
        self._folder.cleanup()

    def _meet(self, seconds: float) -> int | None:
        """The port on the first node where the ranks meet: once all nodes have come, that node finds a free one."""
        meeting = self.meeting
        meeting.come()
        if meeting.allocation.node:
            return meeting.port(seconds + 30)  # the first node waits as long, and may have begun later
        if missing := meeting.missing(seconds):
            self._fail(f"the node did not come within {seconds:.0f} s", host=missing[0])
            return None
        port = free_port(meeting.allocation.number + meeting.attempt)
        meeting.open(port)
        return port

    def _launch(self, port: int, codes: Path, rendezvous_seconds: float) -> subprocess.Popen[bytes]:
        allocation = self.meeting.allocation
        nodes = len(allocation.nodes)
        words = [str(Path(sys.executable).with_name("accelerate")), "launch"]
        words += ["--config_file", str(self.accelerate_config)]
        words += ["--num_machines", str(nodes), "--machine_rank", str(allocation.node)]
        words += ["--num_processes", str(nodes * self.processes)]
        words += ["--main_process_ip", allocation.nodes[0], "--main_process_port", str(port)]
        words += ["--rdzv_conf", f"timeout={max(1, int(rendezvous_seconds))}"]
        words += ["--log_dir", str(self.folder / LOGS), "--tee", STANDARD_ERROR]
        return subprocess.Popen(
            [*words, "-m", "clipdist.train", *self.words],
            env={**os.environ, world.EXIT_CODES: str(codes), LINE_PREFIX: "${rank}: "},
            preexec_fn=_ignore_user_signals,  # this process has no threads that could hold a lock meanwhile
        )

    def _watch(self, launcher: subprocess.Popen[bytes], codes: Path) -> None:
        """Until the launcher has ended: passes signals on, and ends the ranks here when one of them, or one of another
        node, has failed: they would wait for it in a collective, and one that is stopped forever."""
        failing_since: float | None = None
        while launcher.poll() is None:
            time.sleep(0.1)
            ranks = self._find_ranks(launcher)
            while self.asked:
                # A rank that has only begun does not listen yet, and looks for the file when it does.
                (codes / world.STOP).touch()
                number = self.asked.pop(0)
                for rank in ranks:
                    _send(rank, number)
            self._give_sign(codes)
            why = None if self._failed else _fault(ranks, codes)
            if why is not None:
                self._fail(why)
            if failing_since is None and (self._failed or why is not None or self.meeting.failure() is not None):
                failing_since = time.monotonic()
            if failing_since is not None and time.monotonic() - failing_since > GRACE_SECONDS:
                self._note_stuck(ranks)
                for rank in ranks:
                    _send(rank, signal.SIGKILL)

    def _find_ranks(self, launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """All that have ever been seen, since one that has ended no longer shows what it was; the launcher has other
        children, too, which come and go."""
        with suppress(psutil.Error):
            for child in psutil.Process(launcher.pid).children():
                words = [] if child.pid in self._ranks else child.cmdline()
                if "clipdist.train" in words and "--config_file" not in words:  # not yet a program of its own
                    self._ranks[child.pid] = child
        return list(self._ranks.values())

    def _fail(self, why: str, host: str = "") -> None:
        with suppress(OSError):  # then once more, later
            self.meeting.fail(why, host, hung=why == NO_PROGRESS)
            self._failed = True

    def _note_stuck(self, ranks: list[psutil.Process]) -> None:
        """Ranks that wait in a collective are running or sleeping; those that a signal or a disk holds are not."""
        held = sum(_status(rank) in (psutil.STATUS_STOPPED, psutil.STATUS_DISK_SLEEP) for rank in ranks)
        if held and not self._stuck:
            self._stuck = True
            self.meeting.stuck(f"{held} of its {self.processes} ranks hung")

    def _give_sign(self, codes: Path) -> None:
        if time.monotonic() - self._alive_at < ALIVE_SECONDS:
            return
        self._alive_at = time.monotonic()
        beats = [sign.time for sign in heartbeat.signs(codes).values()]
        if len(beats) == self.processes:
            with suppress(OSError):
                self.meeting.alive(min(beats))


def _ignore_user_signals() -> None:
    """Inherited by the launcher; the ranks set handlers of their own."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _codes(folder: Path) -> list[int]:
    """Of the ranks here that have noted theirs."""
    return [int(path.read_text() or CRASHED) for path in folder.iterdir() if path.name.isdigit()]


def _fault(ranks: list[psutil.Process], codes: Path) -> str | None:
    """What went wrong with a rank here, in words; None while nothing has."""
    noted = _codes(codes)
    if bad := [code for code in noted if code in (WRONG, CRASHED)]:
        return f"a rank ended with exit code {bad[0]}"
    if len(noted) < sum(_status(rank) in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) for rank in ranks):
        return _death(codes)  # the launcher has yet to notice
    return None


def _death(codes: Path) -> str:
    """Of a rank that has noted no exit code, in words; who takes itself for hung does not either."""
    return NO_PROGRESS if any(sign.overdue() for sign in heartbeat.signs(codes).values()) else "a rank died"


def outcome(launcher: int, codes: Sequence[int], processes: int) -> int:
    """One exit code of those that the launcher and some of its processes ended with."""
    if WRONG in codes:
        return WRONG
    if len(codes) == processes and set(codes) == {FINISHED}:
        return FINISHED
    if len(codes) == processes and set(codes) <= {FINISHED, STOPPED}:
        return STOPPED
    return WRONG if launcher == WRONG and not codes else CRASHED


def _status(rank: psutil.Process) -> str:
    try:
        return str(rank.status())
    except psutil.Error:
        return psutil.STATUS_DEAD


def _send(rank: psutil.Process, number: int) -> None:
    with suppress(psutil.Error):
        rank.send_signal(number)


def check_accelerate_config(path: Path) -> None:
    """`UserError` for a file that `accelerate launch` cannot take: that would count as a crash, and be tried again."""
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--accelerate-config {path}: cannot be read ({error})") from None
    if not isinstance(body, dict) or "distributed_type" not in body:
        raise UserError(f"--accelerate-config {path}: no configuration of accelerate; see launch/accelerate")


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
