"""The collectives, through real processes; and what they answer in a single one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from clipdist import world
from tests.distributed.ranks import run_ranks


def collect_rows(rank: int, world_size: int) -> dict[str, Any]:
    here = world.connected()
    assert (here.rank, here.world_size, here.is_main) == (rank, world_size, rank == 0)
    assert world.check_size(world_size) == here
    equal = torch.full((2, 3), float(rank), requires_grad=True)
    uneven = torch.arange(rank * 2, dtype=torch.int64).view(rank, 2) + 100 * rank
    return {
        "equal": world.gather_rows(equal),
        "strided": world.gather_rows(torch.arange(6.0).view(2, 3).T + rank),
        "vector": world.gather_rows(torch.tensor([rank], dtype=torch.int64)),
        "uneven": world.gather_rows(uneven, equal=False),
        "uneven, in truth equal": world.gather_rows(equal, equal=False),
        "uneven and empty": world.gather_rows(torch.zeros(0, 4), equal=False),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gather_rows_joins_in_rank_order(world_size: int) -> None:
    answers = run_ranks(world_size, collect_rows)
    ranks = range(world_size)
    expected = {
        "equal": torch.cat([torch.full((2, 3), float(rank)) for rank in ranks]),
        "strided": torch.cat([torch.arange(6.0).view(2, 3).T + rank for rank in ranks]),
        "vector": torch.arange(world_size),
        "uneven": torch.cat([torch.arange(rank * 2).view(rank, 2) + 100 * rank for rank in ranks]),
        "uneven, in truth equal": torch.cat([torch.full((2, 3), float(rank)) for rank in ranks]),
        "uneven and empty": torch.zeros(0, 4),
    }
    for answer in answers:
        for name, tensor in expected.items():
            assert torch.equal(answer[name], tensor), name
            assert answer[name].dtype == tensor.dtype
            assert not answer[name].requires_grad, "no gradient flows through"


HASHES = [2**64 - 1, 2**63, 2**63 + 12345]


def reduce(rank: int, world_size: int) -> dict[str, Any]:
    signed = torch.from_numpy(np.array([HASHES[rank], 1], np.uint64).astype(np.int64))
    values = torch.tensor([rank, -rank, 0.5], dtype=torch.float64)
    summed = world.sum_over_ranks(values.clone())
    given = values.clone()
    assert world.sum_over_ranks(given) is given, "in place"
    world.barrier()
    return {
        "hash": [int(number) & (2**64 - 1) for number in world.sum_over_ranks(signed)],
        "sum": summed.tolist(),
        "max": world.max_over_ranks(values).tolist(),
        "objects": world.gather_objects({"rank": rank, "text": "x" * 1000 * rank}),
        "told": world.broadcast_object(f"rank {rank}"),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sums_wrap_and_objects_arrive(world_size: int) -> None:
    for answer in run_ranks(world_size, reduce):
        assert answer["hash"] == [sum(HASHES[:world_size]) % 2**64, world_size]
        assert answer["sum"] == [sum(range(world_size)), -sum(range(world_size)), 0.5 * world_size]
        assert answer["max"] == [world_size - 1, 0, 0.5]
        assert answer["objects"] == [{"rank": rank, "text": "x" * 1000 * rank} for rank in range(world_size)]
        assert answer["told"] == "rank 0"


@pytest.mark.parametrize("part", [collect_rows, reduce])
def test_without_a_group_one_process_answers_for_itself(part: Callable[..., dict[str, Any]]) -> None:
    assert not torch.distributed.is_initialized()
    (among_one,) = run_ranks(1, part)
    for name, value in part(0, 1).items():
        assert torch.equal(value, among_one[name]) if isinstance(value, torch.Tensor) else value == among_one[name]


def ask_for_more(rank: int, world_size: int) -> str:
    try:
        world.check_size(5)
    except ValueError as error:
        return str(error)
    return ""


def test_a_wrong_size_is_seen_by_every_rank() -> None:
    answers = run_ranks(2, ask_for_more)
    assert all(answer.startswith("train.processes=5, but 2 are connected") for answer in answers)
    assert len(answers) == 2
