"""`train.compile`: the same training from compiled towers, few compilations, and files that do not tell.

Most leave out Inductor's code, a minute of a C++ compiler for the smallest tower: what makes towers compile again, and
what their weights are called, is decided before.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import clipdist
from clipdist.config import load_config
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.train.loop import train
from clipdist.train.trainer import Trainer
from tests.conftest import COLOURS, PLACES, SHAPES, picture
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import column, train_rank, weights

Recipe = Callable[..., Path]
ROWS = 8  # of the global batch
TOWERS = {"model__image__name": "timm:test_vit", "model__image__options": {"depth": 1}, "train__global_batch": ROWS}


@pytest.fixture(scope="module")
def of_many_lengths(tmp_path_factory: pytest.TempPathFactory) -> str:
    """48 training pairs, whose captions have 5 to 14 tokens, and 12 of validation."""
    draw = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("sets") / "lengths"
    with ShardSetWriter(folder, samples_per_shard=20, license_text="CC0-1.0, drawn by the tests") as writer:
        for number in range(60):
            colour, shape, place = (str(draw.choice(words)) for words in (COLOURS, SHAPES, PLACES))
            text = " ".join(["very", *["very"] * int(draw.integers(0, 3) * draw.integers(0, 5)), colour, shape])
            split = "train" if number < 48 else "val"
            writer.write(split, f"{number:03d}", picture(colour, shape, place, number), "png", {"text": text})
    return str(folder)


@pytest.fixture
def varied(recipe: Recipe, of_many_lengths: str) -> Recipe:
    return partial(recipe, data__set=of_many_lengths, **TOWERS)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, to compile is to trace and to guard; a tower that is compiled too often fails, where torch would say so
    and go on uncompiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many have been compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def test_captions_of_any_length_need_no_new_graph(varied: Recipe, compiled: None) -> None:
    """Each tower has one for the pass with gradients, one for that without, and validation's; then no more come."""
    trainer = Trainer(load_config(varied(), ["train.compile=true", "train.micro_batch=4"]))
    trainer.enter_epoch(0)
    batches = list(islice(trainer.batches(), 6))
    assert len({batch.token_ids_bT.shape[1] for batch in batches}) >= 3, "otherwise nothing is shown"
    for batch in batches:
        trainer.step(batch)
    assert graphs() == 4
    trainer.validate()
    after = graphs()
    assert after <= 4 + 3, "the last images of a split are fewer"
    trainer.step(batches[0])
    trainer.validate()
    assert graphs() == after
    assert not counters["graph_break"]
    trainer.close()


@pytest.mark.slow
def test_a_compiled_run_trains_the_same_and_its_files_do_not_tell(
    varied: Recipe, tmp_path: Path, compiled: None, signal_handlers: None
) -> None:
    """Each stage begins without the graphs of the one before, so that however many there are, no tower comes to the
    limit, which is lowered here to what one stage needs."""
    stages = [{"from_epoch": 0, "image": "none"}, {"from_epoch": 1}]
    path = varied(train__stages=stages, train__epochs=2, train__micro_batch=4, train__ema=0.9)
    assert train(load_config(path, ["name=plain", "checkpoint.every_steps=6"])) == 0
    with torch._dynamo.config.patch(recompile_limit=4):
        words = ["name=compiled", "train.compile=true", "checkpoint.every_steps=6"]
        assert train(load_config(path, words)) == 0
    plain, run = tmp_path / "runs" / "plain", tmp_path / "runs" / "compiled"
    for key in ("train/loss", "val/loss"):
        assert column(run, key) == pytest.approx(column(plain, key), abs=1e-4)
    checkpoint = run / "checkpoints" / "step-00000012"
    for name in ("model", "optimizer"):
        file = f"checkpoints/step-00000012/{name}.safetensors"
        assert load_file(run / file).keys() == load_file(plain / file).keys()
    assert load_file(run / "model" / "model.safetensors").keys() == weights(plain).keys()
    features = [clipdist.load(one / "model").encode_text(["very red circle"]) for one in (plain, run)]
    np.testing.assert_allclose(features[1], features[0], atol=1e-3)

    trained = weights(run)
    shutil.rmtree(checkpoint)
    (run / "checkpoints" / "latest").write_text("step-00000006\n")
    compilations = graphs()
    assert train(load_config(path, ["name=compiled", "checkpoint.every_steps=6"])) == 0, "goes on uncompiled"
    assert graphs() == compilations
    for key, tensor in weights(run).items():
        torch.testing.assert_close(tensor, trained[key], atol=1e-4, rtol=1e-3, msg=key)


def compiled_rank(rank: int, world_size: int, recipe: str, overrides: list[str]) -> int:
    compiler: Any = torch.compile
    torch.compile = partial(compiler, backend="eager")  # type: ignore[assignment]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        return train_rank(rank, world_size, recipe, overrides)


@pytest.mark.slow
def test_two_ranks_train_compiled_towers(varied: Recipe, tmp_path: Path) -> None:
    """In stages, for which the towers are wrapped anew."""
    path = varied(train__epochs=2, train__stages=[{"from_epoch": 0, "text": "none"}, {"from_epoch": 1}])
    assert run_ranks(1, train_rank, str(path), ["name=plain"]) == [0]
    assert run_ranks(2, compiled_rank, str(path), ["name=compiled", "train.compile=true"]) == [0, 0]
    plain, run = tmp_path / "runs" / "plain", tmp_path / "runs" / "compiled"
    losses = column(plain, "train/loss")
    assert column(run, "train/loss") == pytest.approx(losses, abs=1e-4)
    assert len(losses) == 12
    assert weights(run).keys() == weights(plain).keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_inductors_code_trains_the_same(varied: Recipe) -> None:
    torch._dynamo.reset()
    path, losses = varied(data__val_split=""), []
    for words in (["name=plain"], ["name=compiled", "train.compile=true", "train.micro_batch=4"]):
        trainer = Trainer(load_config(path, words))
        trainer.enter_epoch(0)
        losses.append([trainer.step(batch)["train/loss"] for batch in islice(trainer.batches(), 6)])
        trainer.close()
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert max(losses[0]) - min(losses[0]) > 0.05, "no constants"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_passes_of_inductors_code_draw_the_same(varied: Recipe) -> None:
    """It draws its own random numbers, in each graph anew. The passes over a micro-batch must agree on them, or the
    gradient is that of other features."""
    torch._dynamo.reset()
    trainer = Trainer(load_config(varied(model__text__options__hidden_dropout_prob=0.3), ["train.compile=true"]))
    trainer.enter_epoch(0)
    batch = next(iter(trainer.batches()))
    features = []
    for grad, seed in ((False, 1), (True, 1), (False, 2)):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(grad):
            features.append(trainer.model.text(batch.token_ids_bT, batch.attention_mask_bT).detach())
    torch.testing.assert_close(features[0], features[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(features[0], features[2], atol=0.1), "dropout is at work"
    trainer.close()
