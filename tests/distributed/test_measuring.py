"""What ranks say of their exchanges, of their time and of their memory is true on two of them."""

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdist import world
from clipdist.config import load_config
from clipdist.loss import ContrastiveLoss
from clipdist.train import micro_batch
from clipdist.train.profile import Profile, measure
from clipdist.train.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import LAUNCH, ROOT, metrics, train_rank

Recipe = Callable[..., Path]


def exchange(rank: int, world_size: int) -> dict[str, Any]:
    world.traffic.take()
    if rank == 0:
        time.sleep(0.2)
    world.gather_rows(torch.zeros(3, 5), purpose="features")
    world.gather_rows(torch.zeros(3, 5), purpose="features")
    world.sum_over_ranks(torch.zeros(10, dtype=torch.float64), "agreement")
    world.max_over_ranks(torch.zeros(2))
    world.gather_rows(torch.zeros(rank + 1, 2), equal=False, purpose="uneven")
    first, second = world.traffic.take(), world.traffic.take()
    return {"first": first, "second": second}


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_and_seconds_are_counted_by_purpose(world_size: int) -> None:
    found = run_ranks(world_size, exchange)
    others, share = world_size - 1, 2 * (world_size - 1) / world_size
    for rank, answer in enumerate(found):
        first = answer["first"]
        sent = {purpose: what.bytes for purpose, what in first.items()}
        assert sent == {
            "features": 2 * others * 3 * 5 * 4,
            "agreement": share * 80,
            "other": share * 8,
            "uneven": others * (8 + world_size * 2 * 4),  # the number of rows, then rows padded to the longest
        }
        assert answer["second"] == {}
        assert all(what.seconds > 0 for what in first.values())
        waited = first["features"].seconds
        assert (waited < 0.15) if rank == 0 else (waited > 0.15), "the others wait for the slow one"


def lose(rank: int, world_size: int, kind: str, group: bool) -> dict[str, float]:
    features = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(rank)), dim=1)
    world.traffic.take()
    bias = torch.zeros(1) if kind == "sigmoid" else None
    groups = torch.arange(6) if group else None
    ContrastiveLoss(kind=kind)(features, features, torch.ones(1), bias, groups)  # type: ignore[arg-type]
    return {purpose: what.bytes for purpose, what in world.traffic.take().items()}


def test_a_loss_sends_features_and_vectors_once() -> None:
    for group in (False, True):
        for sent in run_ranks(2, lose, "infonce", group):
            assert sent == {"features": 6 * (2 * 8 * 4 + (8 if group else 0)), "vectors": 6 * 3 * 4}
    for sent in run_ranks(2, lose, "sigmoid", False):
        assert sent == {"features": 6 * 2 * 8 * 4, "vectors": 4}


def test_a_run_logs_what_it_sends(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(train__epochs=1)
    assert run_ranks(2, train_rank, str(path), ["log.every_steps=3"]) == [0, 0]
    records = [record for record in metrics(tmp_path / "runs" / "tiny") if "train/loss" in record]
    trained = sum(p.numel() for p in Trainer(load_config(path, ["name=other"])).model.parameters() if p.requires_grad)
    for record in records:
        assert record["perf/bytes_sent_features"] == 12 * 2 * 32 * 4
        assert record["perf/bytes_sent_vectors"] == 12 * 3 * 4
        assert record["perf/bytes_sent_agreement"] == 3 * 8
        assert 0.9 * 4 * trained < record["perf/bytes_sent_gradients"] <= 4 * trained, "a pooler does not train"
        for name in ("features", "vectors", "agreement", "gradients"):
            assert 0 < record[f"perf/seconds_{name}"] < record["perf/step_seconds"], name
        assert record["perf/flops_per_step"] > 0


def profiled(rank: int, world_size: int, recipe: str, delay: float) -> list[Profile]:
    trainer = Trainer(load_config(Path(recipe), []))
    if rank == 1:
        image: Any = trainer.model.image
        given = image.normalise

        def slow(images: torch.Tensor) -> Any:
            time.sleep(delay)
            return given(images)

        image.normalise = slow
    return measure(trainer, steps=3)


def test_a_profile_shows_which_rank_is_slow(recipe: Recipe) -> None:
    """Rank 1 takes 80 ms longer for its images; rank 0 waits as long in the loss' gather."""
    for profiles in run_ranks(2, profiled, str(recipe()), 0.08):
        slow, waiting = profiles[1].parts, profiles[0].parts
        assert slow["image tower"] > 0.08
        assert slow["image tower"] - waiting["image tower"] > 0.05
        assert waiting["gather"] > 0.05 > slow["gather"]
        for profile in profiles:
            assert sum(profile.parts.values()) == pytest.approx(profile.step_seconds)
            assert profile.parts["gradient exchange"] > 0
            assert profile.figures["perf/bytes_sent_features"] == 12 * 2 * 32 * 4
            assert profile.figures["perf/bytes_sent_gradients"] > 1e5


@pytest.mark.slow
def test_the_command_profiles_two_processes(recipe: Recipe, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    command = [*LAUNCH, "--num_processes", "2", "-m", "clipdist.cli", "profile", str(recipe()), "--steps", "2"]
    done = subprocess.run(
        [*command, "--trace", str(trace)], capture_output=True, text=True, timeout=180, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ms a step") == 1, "one table"
    assert re.search(r"^gradient exchange +[\d.]+ +[\d.]+% +[\d.]+ \(rank [01]\)", done.stdout, re.M)
    assert re.search(r"^a step +[\d.]+ +100\.0%", done.stdout, re.M)
    assert re.search(r"features: 3\.1 kB in [\d.]+ ms", done.stdout)
    assert trace.exists()
    assert list((tmp_path / "runs").iterdir()) == []


def choose(rank: int, world_size: int, recipe: str, usable_rows: list[int]) -> int | str:
    """As if each rank had room for so many rows."""
    from clipdist.errors import UserError

    kept: list[int] = []
    true = micro_batch.estimate_step

    def estimate(*args: Any, **kwargs: Any) -> micro_batch.Estimate:
        found = true(*args, **kwargs)
        kept.append(found.of(usable_rows[rank]) + 10)
        return found

    micro_batch.estimate_step = estimate
    micro_batch.free_bytes = lambda device: int(kept[-1] / micro_batch.SAFE_SHARE) + 1
    try:
        trainer = Trainer(load_config(Path(recipe), ["train.micro_batch=auto"]))
    except UserError as error:
        return str(error)
    finally:
        micro_batch.estimate_step = true
    return trainer.micro_batch


def test_ranks_agree_on_the_smallest_micro_batch(recipe: Recipe) -> None:
    path = str(recipe())
    assert run_ranks(2, choose, path, [12, 12]) == [12, 12]
    path = str(recipe(name="less"))
    assert run_ranks(2, choose, path, [12, 5]) == [4, 4]
    path = str(recipe(name="none"))
    for told in run_ranks(2, choose, path, [12, 0]):
        assert isinstance(told, str)
        assert told.startswith("train.micro_batch=auto: a step with 1 rows at a time needs about")
