"""A classifier is the same for every number of processes, and in every engine."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdist.config import load_config
from clipdist.train.trainer import Trainer
from tests.conftest import write_recipe
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engines import SHARDING, ask_for, called, some
from tests.distributed.test_training import column, train_rank, weights
from tests.labelled import TINY_CLASSIFIER, write_labelled

Recipe = Callable[..., Path]
STAGES = [{"from_epoch": 0, "image": "none"}, {"from_epoch": 1, "image": 1}, {"from_epoch": 2}]


@pytest.fixture
def classify(tmp_path: Path) -> Recipe:
    return partial(write_recipe, tmp_path, write_labelled(tmp_path / "colours"), base=TINY_CLASSIFIER)


def test_two_processes_train_what_one_does(classify: Recipe, tmp_path: Path) -> None:
    """In micro-batches, through three stages, with validations of unequal shares."""
    path = str(classify(train__stages=STAGES))
    for name, world_size, micro_batch in (("one", 1, 0), ("two", 2, 5)):
        words = [f"name={name}", f"train.micro_batch={micro_batch}"]
        assert run_ranks(world_size, train_rank, path, words) == [0] * world_size
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    assert column(two, "data/digest") == column(one, "data/digest")
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        true = column(one, key)
        assert column(two, key) == pytest.approx(true, rel=2e-3), key
        assert len(true) == (3 if key == "val/loss" else 15)
    assert column(two, "train/top1") == pytest.approx(column(one, "train/top1"), abs=1.5 / 24)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, atol=1e-3, rtol=1e-2, msg=name)
    assert (one / "labels.json").read_bytes() == (two / "labels.json").read_bytes()


def take_steps(rank: int, world_size: int, name: str, recipe: str, words: list[str]) -> Any:
    """What each of four steps told, the validation after them, and rank 0's weights."""
    ask_for(name)
    trainer = Trainer(load_config(Path(recipe), words))
    assert trainer.engine.name == called(name)
    told = []
    batches = iter(trainer.batches())
    for _ in range(4):
        batch = next(batches)
        trainer.enter_epoch(trainer.epoch_of(batch.step))
        told.append(trainer.step(batch))
    values, _ = trainer.validate()
    weights = {name: tensor.clone() for name, tensor in trainer.engine.weights().items()}
    trainer.save()
    trainer.close()
    os.environ.update(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_DEEPSPEED="false")
    return told, values, weights


@pytest.mark.parametrize("name", some(SHARDING, "fsdp2"))
def test_every_engine_trains_it(name: str, classify: Recipe) -> None:
    path = str(classify())
    (truth,) = run_ranks(1, take_steps, "none", path, ["name=one"])
    found = run_ranks(2, take_steps, name, path, [f"name={name}", "train.micro_batch=6"])
    assert found[0][0] == found[1][0], "what a step tells is equal on all ranks"
    for step, (one, other) in enumerate(zip(found[0][0], truth[0], strict=True)):
        for key in ("train/loss", "train/grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-3), f"{key} of step {step}"
    assert found[0][1]["val/loss"] == pytest.approx(truth[1]["val/loss"], rel=1e-3)
    for key, tensor in truth[2].items():
        torch.testing.assert_close(found[0][2][key], tensor, atol=1e-3, rtol=1e-2, msg=key)
