"""What a node of a job makes of its ranks' exit codes, and how a hang ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from clipdist import heartbeat, world
from clipdist.cluster.node import FIRST_PORT, PORTS, free_port, outcome
from clipdist.train.command import note_exit_code
from clipdist.train.signals import StopRequest


@pytest.mark.parametrize(
    ("launcher", "codes", "expected"),
    [
        (0, [0, 0], 0),
        (0, [75, 75], 75),
        (1, [75, 75], 75),
        (0, [0, 75], 75),  # the last step was under way when the signal came
        (1, [75], 1),  # the other one died without a word
        (1, [], 1),
        (-9, [], 1),
        (1, [2, 1], 2),
        (1, [2], 2),
        (1, [1, 75], 1),
        (2, [], 2),  # the launcher itself found its words wrong
        (0, [], 1),  # what has not noted its end has not trained
        (0, [0], 1),
    ],
)
def test_one_exit_code_of_many(launcher: int, codes: Sequence[int], expected: int) -> None:
    assert outcome(launcher, codes, processes=2) == expected


def test_a_port_that_is_taken_is_passed_over() -> None:
    first = free_port(7)
    assert FIRST_PORT <= first < FIRST_PORT + PORTS
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert free_port(7) not in (first, None)
    assert free_port(7) == first, "otherwise it follows from the job"
    assert free_port(8) != first


def test_exit_codes_are_noted_where_somebody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not note_exit_code(75)
    monkeypatch.setenv(world.EXIT_CODES, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    assert note_exit_code(75)
    assert (tmp_path / "3").read_text() == "75\n"


def test_a_stop_from_before_anybody_listened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_handlers: None
) -> None:
    monkeypatch.setenv(world.EXIT_CODES, str(tmp_path))
    assert not StopRequest().requested
    (tmp_path / world.STOP).touch()
    assert StopRequest().requested


HANG = """
import time
from clipdist import heartbeat
heartbeat.watch(0.5 / 60)
for _ in range(4):
    time.sleep(0.3)
    heartbeat.beat()
print("alive", flush=True)
{then}
time.sleep(20)
"""


def test_no_progress_ends_a_process_with_its_stacks() -> None:
    words = [sys.executable, "-c", HANG.format(then="")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "alive\n")
    assert "Timeout" in done.stderr
    assert 'File "<string>", line 10' in done.stderr


def test_who_is_not_watched_any_more_may_take_its_time() -> None:
    words = [sys.executable, "-c", HANG.format(then="heartbeat.watch(0); time.sleep(1); raise SystemExit(7)")]
    assert subprocess.run(words, capture_output=True, timeout=60).returncode == 7


def test_a_rank_tells_its_node_how_far_it_has_come(tmp_path: Path) -> None:
    """Until the end, and beyond: what a killed rank has written stays."""
    code = HANG.format(then="from clipdist import world; world.traffic.on_entry(); world.traffic.on_entry()")
    environment = {**os.environ, world.EXIT_CODES: str(tmp_path), "RANK": "5"}
    began = time.time()
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, env=environment)
    (rank, sign), *others = heartbeat.signs(tmp_path).items()
    assert (rank, sign.limit, sign.exchanges, others) == (5, 0.5, 2, [])
    assert began < sign.time < time.time() - 0.5
    assert sign.overdue()
    assert not sign._replace(time=time.time()).overdue()
    assert not sign._replace(limit=0).overdue()


def test_signals_that_the_launcher_ignores_reach_the_ranks() -> None:
    """They are inherited as ignored, and a rank's own handler counts all the same."""
    code = "import signal,os; from clipdist.train.signals import StopRequest; r = StopRequest(); "
    code += "os.kill(os.getpid(), signal.SIGUSR1); print(r.requested)"
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert done.stdout == "True\n"
