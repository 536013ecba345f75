"""The rank that the others wait for is named, and how long they do."""

import time
from typing import Any

import torch

from clipdist import world
from clipdist.train.stragglers import Stragglers
from tests.distributed.ranks import run_ranks

STEPS, SLOW = 4, 2


def slow_rank(rank: int, world_size: int) -> Any:
    stragglers = Stragglers(torch.device("cpu"))
    stragglers._node_of = [0, 0, 1, 1][:world_size]
    world.traffic.take()
    for _ in range(STEPS):
        time.sleep(0.15 if rank == SLOW else 0.01)
        world.gather_rows(torch.zeros(2, 8), purpose="features")
        world.sum_over_ranks(torch.zeros(3), "agreement")
    taken = {f"perf/seconds_{purpose}": sent.seconds / STEPS for purpose, sent in world.traffic.take().items()}
    return stragglers.compare(float(rank), taken)


def test_who_is_waited_for() -> None:
    answers = run_ranks(3, slow_rank)
    for mean, found in answers:
        assert mean == 1.0
        assert found == answers[0][1], "all ranks say the same"
        assert (found["perf/slowest_rank"], found["perf/slowest_node"]) == (SLOW, 1)
        assert 0.05 < found["perf/straggler_seconds"] < 0.5


def alone(rank: int, world_size: int) -> Any:
    return Stragglers(torch.device("cpu")).compare(3.0, {})


def test_nobody_waits_alone() -> None:
    assert run_ranks(1, alone) == [(3.0, {})]
