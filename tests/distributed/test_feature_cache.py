"""Features kept on disk change no bit of a run that is killed and goes on, on any number of processes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import column, kill_after, run_to_end, train_rank, weights

Recipe = Callable[..., Path]
LOCKED = {"train__stages": [{"from_epoch": 0, "text": "none"}], "model__text__cache_features": True}


def names(run: Path) -> set[str]:
    (folder,) = (run / "features" / "text").iterdir()
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kill"), [(1, 3), (2, 9)])
def test_a_killed_run_goes_on_to_the_same_bits(processes: int, kill: int, recipe: Recipe, tmp_path: Path) -> None:
    """kill -9 in the first epoch, while features are computed, and in the second, when they are read."""
    path = recipe(**LOCKED, checkpoint__every_steps=2, train__epochs=3, train__micro_batch=6, data__val_split="")
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    run_to_end(processes, path, "name=whole")
    kill_after(kill, processes, path, "name=killed", run=killed)
    assert max(column(killed, "train/loss")) < 21, "the kill came in the middle"
    run_to_end(processes, path, "name=killed")
    assert column(killed, "train/loss") == column(whole, "train/loss")
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(killed)[name]), name
    assert names(whole) == {f"epoch-0-rank-{rank}.bin" for rank in range(processes)} == names(killed)
    shares = column(whole, "perf/text_features_computed")
    assert [shares[step] for step in (1, 7, 8, 21)] == [1, 1, 0, 0]


@pytest.mark.slow
def test_another_number_of_processes_uses_what_is_there(recipe: Recipe, tmp_path: Path) -> None:
    """Two, killed in the first epoch; three end it. The losses are those of one process without features on disk."""
    path = recipe(**LOCKED, checkpoint__every_steps=2, train__epochs=3, data__val_split="")
    run = tmp_path / "runs" / "tiny"
    assert run_ranks(1, train_rank, str(path), ["name=plain", "model.text.cache_features=false"]) == [0]
    plain = column(tmp_path / "runs" / "plain", "train/loss")
    kill_after(3, 2, path, run=run)
    assert run_ranks(3, train_rank, str(path), []) == [0] * 3
    losses = column(run, "train/loss")
    assert losses.keys() == plain.keys()
    assert max(abs(losses[step] - plain[step]) for step in plain) < 1e-4
    assert names(run) == {f"epoch-0-rank-{rank}.bin" for rank in range(3)}
    assert set(list(column(run, "perf/text_features_computed").values())[14:]) == {0.0}
