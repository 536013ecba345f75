"""What a run says of its communication is what it sent."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clipdist import world
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import metrics, train_rank, weights

ROWS, WIDTH, FLOAT = 12, 32, 4  # of each rank


def collectives(rank: int, world_size: int) -> tuple[dict[str, float], dict[str, float]]:
    world.traffic.take()
    world.gather_rows(torch.zeros(5, 3), purpose="ours")
    world.gather_rows(torch.zeros(rank + 1, 2), equal=False, purpose="uneven")
    world.sum_over_ranks(torch.zeros(8, dtype=torch.int64))
    taken = world.traffic.take()
    assert world.traffic.take() == ({}, {})
    return taken


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_are_those_of_a_ring(world_size: int) -> None:
    for sent, seconds in run_ranks(world_size, collectives):
        assert sent["ours"] == (world_size - 1) * 5 * 3 * FLOAT
        assert sent["uneven"] == (world_size - 1) * world_size * 2 * FLOAT, "padded to the longest"
        assert sent["other"] == pytest.approx(2 * (world_size - 1) / world_size * 64)
        assert seconds.keys() == sent.keys()
        assert min(seconds.values()) > 0


def test_a_run_tells_what_it_sends_in_a_step(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = str(recipe(train__epochs=1))
    assert run_ranks(2, train_rank, path, []) == [0, 0]
    run = tmp_path / "runs" / "tiny"
    records = [record for record in metrics(run) if "train/loss" in record]
    trained = sum(tensor.numel() for name, tensor in weights(run).items())
    for record in records:
        assert record["perf/bytes_sent_features"] == ROWS * 2 * WIDTH * FLOAT
        assert record["perf/bytes_sent_vectors"] == ROWS * 3 * FLOAT
        assert record["perf/bytes_sent_agreement"] == 3 * 8
        assert 0.5 * trained * FLOAT < record["perf/bytes_sent_gradients"] <= trained * FLOAT
        assert 0 < record["perf/seconds_features"] < record["perf/step_seconds"]
    assert any("perf/checkpoint_stall_seconds" in record for record in records) is False, "the only one is at the end"


def test_one_process_sends_nothing(recipe: Callable[..., Path], tmp_path: Path) -> None:
    assert run_ranks(1, train_rank, str(recipe(train__epochs=1, checkpoint__every_steps=3)), []) == [0]
    records = [record for record in metrics(tmp_path / "runs" / "tiny") if "train/loss" in record]
    assert not [key for record in records for key in record if key.startswith(("perf/bytes", "perf/seconds"))]
    stalls = [
        record["perf/checkpoint_stall_seconds"] for record in records if "perf/checkpoint_stall_seconds" in record
    ]
    assert len(stalls) == 2
    assert min(stalls) > 0
