"""The all-reduce that is timed, over real processes; and what is said of ranks that do not come."""

import os
import socket
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clipdist import world
from clipdist.cluster.doctor import links as module
from clipdist.cluster.doctor.links import FAILED, Links, measure_all_reduce, measure_links
from clipdist.cluster.node import free_port
from clipdist.errors import UserError
from tests.distributed.ranks import run_ranks


def timed(rank: int, world_size: int) -> dict[str, Any]:
    clock = iter([100.0, 102.0 + rank])  # two repetitions in 2 and 3 seconds
    module.time.perf_counter = lambda: next(clock)  # type: ignore[assignment]
    world.traffic.counted = lambda *words: nullcontext()  # type: ignore[method-assign]
    reduced = dist.all_reduce
    calls = []
    dist.all_reduce = lambda values, operation: (calls.append(values.numel()), reduced(values, operation))
    return {"rate": measure_all_reduce(torch.device("cpu"), mebibytes=3, repetitions=2), "calls": calls}


def test_the_formula_and_the_slowest_rank() -> None:
    """2(W − 1)/W × bytes / seconds: with two ranks, the bytes once in the 1.5 s of rank 1."""
    first, second = run_ranks(2, timed)
    assert first["rate"] == second["rate"] == pytest.approx(3 * (1 << 20) / 1.5 / 1e9)
    numbers = 3 * (1 << 18)
    assert first["calls"] == [numbers, numbers, 1, numbers, numbers, 1], "warm-ups, barrier, timed ones, the seconds"


def measured(rank: int, world_size: int) -> float:
    return measure_all_reduce(torch.device("cpu"), mebibytes=4)


def test_real_processes_get_one_plausible_answer() -> None:
    answers = run_ranks(2, measured)
    assert answers[0] == answers[1]
    assert 0.001 < answers[0] < 1000


def test_one_process_has_no_links(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least two processes, found one"):
        measure_all_reduce(torch.device("cpu"))
    alone = measure_links(Links(tmp_path, ["n1"], 1, "127.0.0.1", 1, True, 5.0))
    assert (alone.level, alone.says) == ("ok", "one process alone has none to measure")


@pytest.fixture
def links(tmp_path: Path) -> Links:
    return Links(tmp_path / "links", ["n1"], 2, "127.0.0.1", free_port(os.getpid()), True, 90.0)


def test_ranks_of_this_machine(links: Links) -> None:
    found = measure_links(links)
    assert found.level == "ok", found
    assert found.says.startswith("all-reduce of 64 MiB over 2 processes on one node: ")
    assert found.says.endswith(" GB/s (bus bandwidth, gloo)")


def test_ranks_that_do_not_come_are_named(links: Links) -> None:
    """Two nodes, of which the second starts nothing."""
    found = measure_links(replace(links, nodes=["n1", "n2"], processes=1, seconds=15.0))
    assert found.level == "error"
    assert "did not come within 15 s: rank 1 (n2)" in found.says


def test_a_rank_that_fails_says_why_and_ends_the_others(links: Links) -> None:
    with socket.socket() as taken:  # by somebody else, since the port was found free
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", links.port))
        taken.listen()
        began = time.monotonic()
        found = measure_links(links)
    assert time.monotonic() - began < links.seconds / 2
    assert found.level == "error"
    assert "rank 0 says: " in found.says
    assert "EADDRINUSE" in found.says
    assert (links.folder / FAILED).exists()
