"""Every engine trains the model that one process trains, and goes on with what another has left."""

import json
import math
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdist.config import load_config
from clipdist.loss import ContrastiveLoss
from clipdist.train.checkpoint import newest_sound, read_checkpoint
from clipdist.train.engine import Engine, Inputs
from clipdist.train.launched import make_accelerator, make_engine
from clipdist.train.loop import train
from clipdist.train.step import compute_gradient
from clipdist.train.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.test_step import ROWS, model_and_rows, seed
from tests.distributed.test_training import LAUNCH, ROOT, column, weights

Recipe = Callable[..., Path]
DEEPSPEED = ROOT / "launch" / "deepspeed"
SHARDING = ["fsdp2", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
STEPS = 10


def ask_for(name: str) -> None:
    """Says through the environment what `accelerate launch` with launch/accelerate/<name>.yaml says."""
    said = {"ACCELERATE_USE_FSDP": str(name == "fsdp2").lower(), "FSDP_VERSION": "2"}
    said["ACCELERATE_USE_DEEPSPEED"] = str(name.startswith("zero")).lower()
    said["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(DEEPSPEED / f"{name}.json")
    os.environ.update(said)


def called(name: str) -> str:
    return {"none": "replicas", "fsdp2": "FSDP2"}.get(name, f"ZeRO {name[4:5]}")


Taken = tuple[list[dict[str, float]], dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]


def take_steps(
    rank: int, world_size: int, name: str, recipe: str, kind: str, dropout: float, micro_batch: int, nan_at: int
) -> Taken:
    """(what each step told, weights, optimiser state), the latter two on rank 0."""
    ask_for(name)
    config = load_config(Path(recipe), [])
    model, inputs, group = model_and_rows(recipe, dropout, bias=kind == "sigmoid")
    model.train()
    engine: Engine = make_engine(make_accelerator("fp32"), model, config)
    assert engine.name == called(name)
    engine.enter_stage()
    mine = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    own = Inputs(*(tensor[mine] for tensor in inputs))
    criterion: Any = ContrastiveLoss(kind=kind)  # type: ignore[arg-type]
    backward, told = engine.backward, []
    for step in range(STEPS):
        # One rank alone; averaged with the others', its gradient spoils all of them.
        spoiled = step == nan_at and rank == world_size - 1
        engine.backward = (lambda loss: backward(loss * math.nan)) if spoiled else backward  # type: ignore[method-assign]
        found = compute_gradient(
            engine, criterion, own, group[mine], micro_batch, lambda number, step=step: seed(rank + 10 * step, number)
        )
        norms = engine.gradient_norms()
        total = math.sqrt(sum(norm**2 for norm in norms.values()))
        assert math.isfinite(total) == (step != nan_at)
        engine.update(total, 1.0, math.isfinite(total))
        engine.clamp_temperature()
        told.append({"loss": found.loss, "scale": engine.temperature()[0], **norms})
    return told, engine.weights(), engine.optimizer_state()


@pytest.fixture(scope="module")
def taken_by_one() -> dict[Any, Taken]:
    return {}


def assert_equal(found: Taken, truth: Taken, nan_at: int = -1) -> None:
    (told, made, state), (true_told, true_made, true_state) = found, truth
    for step, (one, other) in enumerate(zip(told, true_told, strict=True)):
        for key in other if step != nan_at else ("loss", "scale"):
            assert one[key] == pytest.approx(other[key], rel=2e-4), f"{key} of step {step}"
    assert made.keys() == true_made.keys()
    for name, value in true_made.items():
        assert (made[name] - value).abs().max() < 2e-5, name
    assert state.keys() == true_state.keys()
    for name, kept in true_state.items():
        assert state[name].keys() == kept.keys()
        for what, value in kept.items():
            assert (state[name][what] - value).norm() <= 1e-3 * value.norm() + 1e-7, f"{what} of {name}"


def some(names: list[str], *quick: str) -> list[Any]:
    """As parameters of a test, of which these are of the quick suite."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(SHARDING, "fsdp2", "zero2"))
def test_ten_steps_are_those_of_one_process(name: str, recipe: Recipe, taken_by_one: dict[Any, Taken]) -> None:
    """Weights, moments, norms and the temperature, which meets its bound; clipped, and in micro-batches on the second
    of the two losses, on three ranks, whose parts are of unequal sizes."""
    path = str(recipe(model__temperature__maximum=0.0703))
    for kind, world_size, micro_batch in (("infonce", 2, ROWS), ("sigmoid", 3, 4)):
        if kind not in taken_by_one:
            (taken_by_one[kind],) = run_ranks(1, take_steps, "none", path, kind, 0.0, ROWS, -1)
        truth = taken_by_one[kind]
        ranks = run_ranks(world_size, take_steps, name, path, kind, 0.0, micro_batch, -1)
        assert all(rank[0] == ranks[0][0] for rank in ranks), "what a step tells is equal on all ranks"
        assert ranks[1][1] == {}
        assert_equal(ranks[0], truth)
        assert any(step["scale"] == pytest.approx(1 / 0.0703) for step in truth[0])


@pytest.mark.parametrize("name", some(["fsdp2", "zero2", "zero3"], "zero3"))
def test_micro_batches_with_dropout_and_a_step_that_is_not_finite(name: str, recipe: Recipe) -> None:
    """As replicas on as many ranks, which draw the same. The step that is not finite changes nothing, the next one is
    unaffected."""
    path = str(recipe())
    words = (path, "infonce", 0.1, 4, 3)
    truth = run_ranks(2, take_steps, "none", *words)[0]
    found = run_ranks(2, take_steps, name, *words)[0]
    assert_equal(found, truth, nan_at=3)
    assert float(truth[2]["temperature.log_scale"]["step"]) == STEPS - 1


def train_part(rank: int, world_size: int, name: str, recipe: str, overrides: list[str], steps: int) -> tuple[int, str]:
    """Trains until `steps` more steps are taken, or to the end; (exit code, engine)."""
    ask_for(name)
    take, taken, engines = Trainer.step, 0, []

    def counted(self: Trainer, batch: Any) -> dict[str, float]:
        nonlocal taken
        taken += 1
        engines.append(self.engine.name)
        if taken == steps and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, batch)

    Trainer.step = counted  # type: ignore[method-assign]
    torch.manual_seed(rank)
    return train(load_config(Path(recipe), overrides)), engines[0]


STAGES = [{"from_epoch": 0, "image": 2, "text": "none"}, {"from_epoch": 1}]


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ([("zero2", 2), ("fsdp2", 3), ("none", 2), ("zero1", 2)], ["train.ema=0.9"]),
        ([("none", 1), ("zero3", 2), ("fsdp2", 2), ("zero3", 3)], ["train.micro_batch=4"]),
    ],
)
@pytest.mark.slow
def test_a_run_goes_on_with_another_engine_and_world(
    chain: list[tuple[str, int]], words: list[str], recipe: Recipe, tmp_path: Path
) -> None:
    """Four engines train a run one after the other, with a change of stage and validations of unequal shares; it is the
    run of one process."""
    path = str(recipe(train__stages=STAGES))
    assert run_ranks(1, train_part, "none", path, [*words, "name=whole"], 0) == [(0, "replicas")]
    for number, (name, world_size) in enumerate(chain):
        last = number == len(chain) - 1
        ranks = run_ranks(world_size, train_part, name, path, [*words, "name=chain"], 0 if last else 5)
        assert [code for code, _ in ranks] == [0 if last else 75] * world_size
        assert ranks[0][1] == called(name)
    whole, chained = tmp_path / "runs" / "whole", tmp_path / "runs" / "chain"
    assert column(chained, "data/digest") == column(whole, "data/digest")
    for key in ("train/loss", "train/grad_norm", "train/logit_scale"):
        true, found = column(whole, key), column(chained, key)
        assert len(true) == 21
        assert found == pytest.approx(true, rel=2e-2), key
    for key in ("val/loss", "val/cosine_pos"):
        assert column(chained, key) == pytest.approx(column(whole, key), abs=1e-2), key
    apart = {name: float((weights(chained)[name] - value).abs().max()) for name, value in weights(whole).items()}
    assert max(apart.values()) < 5e-3, "of weights that the run has moved by more than 0.02"


@pytest.mark.parametrize("name", some(["fsdp2", "zero2", "zero3"]))
def test_bfloat16_is_that_of_replicas(name: str, recipe: Recipe, tmp_path: Path) -> None:
    """Float32 weights under autocast in every engine, so that they differ by roundings only."""
    path = str(recipe(train__epochs=1))
    for engine in ("none", name):
        run_ranks(2, train_part, engine, path, ["train.precision=bf16", f"name={engine}"], 0)
    runs = [tmp_path / "runs" / engine for engine in ("none", name)]
    replicas, found = (column(run, "train/loss") for run in runs)
    assert found == pytest.approx(replicas, abs=0.05)
    scales = [column(run, "train/logit_scale")[7] for run in runs]
    assert scales[1] == pytest.approx(scales[0], rel=2e-3), "the temperature is not rounded to bfloat16"


@pytest.mark.parametrize("name", some(["none", "fsdp2", "zero2", "zero3"], "none"))
def test_three_ranks_go_on_to_the_same_bits(name: str, recipe: Recipe, tmp_path: Path) -> None:
    """Three numbers add up otherwise in another order, and so does what an engine sums in another layout."""
    path = str(recipe(train__epochs=1, model__projection__dropout=0.1))
    assert run_ranks(3, train_part, name, path, ["name=whole"], 0)[0][0] == 0
    assert run_ranks(3, train_part, name, path, ["name=parts"], 3)[0][0] == 75
    assert run_ranks(3, train_part, name, path, ["name=parts"], 0)[0][0] == 0
    whole, parts = (tmp_path / "runs" / run for run in ("whole", "parts"))
    assert column(parts, "train/loss") == column(whole, "train/loss")
    found = read(parts)
    for part, tensor in read(whole).items():
        assert torch.equal(tensor, found[part]), part


def read(run: Path) -> Mapping[str, torch.Tensor]:
    newest = newest_sound(run / "checkpoints")
    assert newest is not None
    return read_checkpoint(newest).weights


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDING)
def test_the_launcher_starts_it(name: str, recipe: Recipe, tmp_path: Path) -> None:
    """`accelerate launch` with our file trains with that engine, and its profile tells where the time goes."""
    path = recipe(train__epochs=1)
    launch = [LAUNCH[0], "launch", "--config_file", str(ROOT / "launch" / "accelerate" / f"{name}.yaml")]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m"]
    words = ["clipdist.train", str(path)]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"processes: 2 ({called(name)}), from step 0" in done.stderr
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "environment.json").read_text())["starts"][0]["engine"] == called(name)
    assert len(column(run, "train/loss")) == 7
    if name in ("fsdp2", "zero3"):
        words = ["clipdist.cli", "profile", str(path), "--steps", "2"]
        done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=240, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "image tower" in done.stdout
        assert "gradients:" in done.stdout
