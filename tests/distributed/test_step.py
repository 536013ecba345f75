"""The gradient of a batch embedded in parts is that of the batch embedded at once, on any number of ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdist.config import load_config
from clipdist.data.text import train_wordpiece
from clipdist.errors import UserError
from clipdist.loss import ContrastiveLoss
from clipdist.loss.reference import infonce_reference, sigmoid_reference
from clipdist.model.build import build_model
from clipdist.model.dual_encoder import DualEncoder, Encoded
from clipdist.model.freeze import StageConfig, apply_stage, unused_parameters
from clipdist.train.config import check
from clipdist.train.engine import Inputs
from clipdist.train.launched import make_accelerator
from clipdist.train.optim import OptimConfig
from clipdist.train.replicated import ReplicatedEngine
from clipdist.train.step import compute_gradient
from clipdist.train.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import column, train_rank, weights

Recipe = Callable[..., Path]
ROWS = 24  # of the global batch
TEXTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("disc", "cross", "bar", "ring")]


def model_and_rows(recipe: str, dropout: float, bias: bool) -> tuple[DualEncoder, Inputs, torch.Tensor]:
    """The model at step 0, and the global batch; every process makes the same."""
    changes = [f"model.projection.dropout={dropout}", f"model.text.options.hidden_dropout_prob={dropout}"]
    changes += ["model.temperature.bias=-3"] if bias else []
    config = load_config(Path(recipe), changes)
    tokenizer = train_wordpiece(TEXTS * 2, 100, 16)
    model = build_model(config.model, tokenizer, seed=1)
    apply_stage(model, StageConfig(), unused_parameters(model))
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens, mask = tokenizer.pad(tokenizer.encode(TEXTS * 2))
    return model, Inputs(images, tokens, mask), torch.arange(ROWS) % len(TEXTS)


def seed(rank: int, micro_batch: int) -> None:
    torch.manual_seed(100 * rank + micro_batch)


def gradients(
    rank: int, world_size: int, recipe: str, micro_batch: int, dropout: float, kind: str
) -> dict[str, torch.Tensor]:
    """Of every parameter, averaged over ranks, and the loss."""
    model, inputs, group = model_and_rows(recipe, dropout, bias=kind == "sigmoid")
    accelerator = make_accelerator("fp32")
    engine = ReplicatedEngine(accelerator, model, OptimConfig())
    model.train()
    engine.enter_stage()
    mine = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    own = Inputs(*(tensor[mine] for tensor in inputs))
    criterion = ContrastiveLoss(kind=kind)  # type: ignore[arg-type]
    found = compute_gradient(engine, criterion, own, group[mine], micro_batch, lambda number: seed(rank, number))
    norms = engine.gradient_norms()
    assert norms["head"] > 0
    answer = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return answer | {"loss": torch.tensor(found.loss)}


def expected(recipe: str, world_size: int, micro_batch: int, dropout: float, kind: str) -> dict[str, torch.Tensor]:
    """The same by one process: every micro-batch with its graph and random state, one reference loss over all."""
    model, inputs, group = model_and_rows(recipe, dropout, bias=kind == "sigmoid")
    model.train()
    parts: list[Encoded] = []
    per_rank = ROWS // world_size
    for rank in range(world_size):
        own = Inputs(*(tensor[rank * per_rank : (rank + 1) * per_rank] for tensor in inputs))
        for number, part in enumerate(own.split(micro_batch)):
            seed(rank, number)
            parts.append(model(*part))
    image, text = torch.cat([p.image_features_bD for p in parts]), torch.cat([p.text_features_bD for p in parts])
    scale, bias = model.temperature()
    if kind == "sigmoid":
        assert bias is not None
        loss = sigmoid_reference(image, text, scale, bias, group)
    else:
        loss = infonce_reference(image, text, scale, group)
    loss.backward()
    answer = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return answer | {"loss": loss.detach()}


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 24), (1, 5), (2, 4), (3, 8)])
def test_gradients_equal_those_of_one_process_that_holds_all(
    world_size: int, micro_batch: int, kind: str, recipe: Recipe
) -> None:
    """With dropout, temperature (and bias) included. The last micro-batch may be smaller."""
    path = str(recipe())
    truth = expected(path, world_size, micro_batch, 0.1, kind)
    for found in run_ranks(world_size, gradients, path, micro_batch, 0.1, kind):
        assert found.keys() == truth.keys()
        assert {"temperature.log_scale"} | ({"temperature.bias"} if kind == "sigmoid" else set()) <= found.keys()
        for name, value in truth.items():
            error = (found[name] - value).norm() / value.norm().clamp_min(1e-4)
            assert error < 2e-4, f"{name}: off by {error:.1e}"


def test_dropout_is_at_work(recipe: Recipe) -> None:
    """Otherwise the test above would not tell whether random states are restored."""
    path = str(recipe())
    one, two = expected(path, 1, 24, 0.1, "infonce"), expected(path, 1, 5, 0.1, "infonce")
    assert abs(one["loss"] - two["loss"]) > 1e-4


def test_training_in_micro_batches_is_training(recipe: Recipe, tmp_path: Path) -> None:
    """Without dropout, whole and in parts, on one and two processes: equal losses and weights."""
    path = str(recipe(train__epochs=1))
    for name, world_size, micro_batch in (("whole", 1, 0), ("parts", 1, 6), ("both", 2, 3)):
        codes = run_ranks(world_size, train_rank, path, [f"name={name}", f"train.micro_batch={micro_batch}"])
        assert codes == [0] * world_size
    whole = tmp_path / "runs" / "whole"
    for name in ("parts", "both"):
        run = tmp_path / "runs" / name
        assert column(run, "data/digest") == column(whole, "data/digest")
        losses = column(whole, "train/loss")
        assert max(abs(loss - losses[step]) for step, loss in column(run, "train/loss").items()) < 1e-4
        for key, tensor in weights(whole).items():
            torch.testing.assert_close(weights(run)[key], tensor, atol=2e-4, rtol=1e-3, msg=key)


def test_a_step_in_parts_that_is_not_finite_changes_nothing(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(load_config(recipe(), ["train.micro_batch=8"]))
    batches = iter(trainer.batches())
    trainer.enter_epoch(0)
    trainer.step(next(batches))
    before = {name: tensor.clone() for name, tensor in trainer.engine.weights().items()}
    criterion: Any = trainer.objective.criterion
    monkeypatch.setattr(
        trainer.objective, "criterion", lambda *args, **kwargs: criterion(*args, **kwargs) * float("nan")
    )
    trainer.step(next(batches))
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.engine.weights().items())
    monkeypatch.setattr(trainer.objective, "criterion", criterion)
    assert trainer.step(next(batches))["train/grad_norm"] > 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.engine.weights().items())
    trainer.close()


def test_a_batch_that_does_not_divide_is_refused_at_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match=r"global_batch=24 does not divide by 5 processes; choose a multiple of 5"):
        check(load_config(recipe(), ["train.micro_batch=4"]))


def test_batch_statistics_of_a_part_are_refused(recipe: Recipe) -> None:
    path = recipe(model__image__name="timm:test_resnet", train__micro_batch=8)
    with pytest.raises(UserError, match=r"batch normalisation, .* train\.micro_batch never has in memory"):
        Trainer(load_config(path, []))
    Trainer(load_config(path, ["model.image.batch_norm=frozen"])).close()
