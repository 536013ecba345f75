"""Switches of training that change its price and not its result, or both in a known way."""

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from clipdist.config import load_config
from clipdist.errors import UserError
from clipdist.model.build import build_model
from clipdist.model.towers import _checkpoint_hugging_face
from clipdist.train.ema import WeightAverage
from clipdist.train.loop import train
from clipdist.train.trainer import Trainer
from tests.distributed.test_training import column, weights
from tests.unit.test_model import CAPTIONS, train_wordpiece

Recipe = Callable[..., Path]
CHECKPOINTED = ["model.image.checkpoint_activations=true", "model.text.checkpoint_activations=true"]


def losses_and_weights(path: Path, words: list[str], steps: int = 4) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = Trainer(load_config(path, words))
    trainer.enter_epoch(0)
    losses = [trainer.step(batch)["train/loss"] for batch in islice(trainer.batches(), steps)]
    weights = {name: tensor.clone() for name, tensor in trainer.engine.weights().items()}
    trainer.close()
    return losses, weights


@pytest.mark.parametrize("more", [[], ["train.micro_batch=8"]], ids=["at-once", "in-parts"])
@pytest.mark.parametrize("tower", ["timm:test_vit", "timm:test_convnext"])
def test_activations_computed_twice_give_the_same_training(tower: str, more: list[str], recipe: Recipe) -> None:
    """With dropout: the second time must draw what the first did."""
    path = recipe(model__image__name=tower, model__text__options__hidden_dropout_prob=0.1)
    plain = losses_and_weights(path, ["name=plain", *more])
    again = losses_and_weights(path, ["name=again", *CHECKPOINTED, *more])
    assert again[0] == pytest.approx(plain[0], abs=1e-6)
    for name, tensor in plain[1].items():
        torch.testing.assert_close(again[1][name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_activations_are_not_kept(recipe: Recipe) -> None:
    """Bytes that wait for the backward pass; otherwise the test above shows nothing."""
    kept = {}
    for name, words in (("plain", []), ("again", CHECKPOINTED)):
        config = load_config(recipe(model__image__name="timm:test_vit"), words)
        model = build_model(config.model, train_wordpiece(CAPTIONS, 100, 16), 0).train()
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        tokens = torch.ones(8, 12, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), tokens, tokens)
        kept[name] = sum(sizes)
    assert kept["again"] < 0.6 * kept["plain"]


def test_patches_are_left_out_while_training_alone(recipe: Recipe) -> None:
    config = load_config(recipe(model__image__name="timm:test_vit"), ["model.image.patch_dropout=0.5"])
    model = build_model(config.model, train_wordpiece(CAPTIONS, 100, 16), 0)
    seen: list[int] = []
    tower: Any = model.image.model
    tower.blocks[0].register_forward_hook(lambda module, given, made: seen.append(given[0].shape[1]))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model.train()
    torch.manual_seed(1)
    first = model.encode_image(images)
    torch.manual_seed(1)
    assert torch.equal(model.encode_image(images), first), "a function of the step's seed"
    torch.manual_seed(2)
    assert not torch.equal(model.encode_image(images), first)
    model.eval()
    assert torch.equal(model.encode_image(images), model.encode_image(images))
    patches = (32 // tower.patch_embed.patch_size[0]) ** 2
    assert [count - tower.num_prefix_tokens for count in seen] == [patches // 2] * 3 + [patches] * 2


@pytest.mark.parametrize(
    ("tower", "word", "message"),
    [
        ("timm:test_convnext", "model.image.patch_dropout=0.5", r"patch_dropout: timm:test_convnext has no patches"),
        ("timm:test_vit", "model.image.patch_dropout=1.0", r"model\.image\.patch_dropout"),
    ],
)
def test_what_a_tower_cannot_do_is_refused_in_one_line(tower: str, word: str, message: str, recipe: Recipe) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Trainer(load_config(recipe(model__image__name=tower), [word]))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_hugging_face_is_asked_by_the_name_of_its_version(recipe: Recipe) -> None:
    """The older name warns where there is the newer one, and is all there is in earlier versions."""
    tokenizer = train_wordpiece(CAPTIONS, 100, 16)
    text: Any = build_model(load_config(recipe(), [CHECKPOINTED[1]]).model, tokenizer, 0).text
    assert any(getattr(module, "gradient_checkpointing", False) for module in text.model.modules())
    asked: list[Any] = []
    old = SimpleNamespace(supports_gradient_checkpointing=True)
    old.gradient_checkpointing_enable = lambda gradient_checkpointing_kwargs: asked.append(
        gradient_checkpointing_kwargs
    )
    _checkpoint_hugging_face(old)
    assert asked == [{"use_reentrant": False}]


def test_a_tower_that_cannot_compute_twice_says_so(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, enable: bool = True) -> None:
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr(timm.models.convnext.ConvNeXt, "set_grad_checkpointing", refuse)
    config = load_config(recipe(), [CHECKPOINTED[0]])
    with pytest.raises(UserError, match=r"model\.image\.checkpoint_activations: timm:test_convnext cannot"):
        build_model(config.model, train_wordpiece(CAPTIONS, 100, 16), 0)


def test_a_memory_that_cannot_be_reckoned_is_not(recipe: Recipe) -> None:
    words = ["train.micro_batch=auto", "model.text.checkpoint_activations=true"]
    with pytest.raises(
        UserError, match=r"train\.micro_batch=auto cannot tell .*; set a number, or checkpoint_activations"
    ):
        Trainer(load_config(recipe(), words))


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_both_ways(allowed: bool, recipe: Recipe) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not allowed
    Trainer(load_config(recipe(), [f"train.tf32={str(allowed).lower()}"])).close()
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def test_the_average_is_the_one_that_the_formula_gives() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    engine: Any = SimpleNamespace(model=model)
    average, expected = WeightAverage(engine, 0.5), float(model.weight.detach())
    for step in range(12):
        with torch.no_grad():
            model.weight.fill_(step)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.in_place():
        assert float(model.weight.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(model.weight.detach()) == 11


def test_the_kept_model_is_the_average_and_training_goes_on_from_the_weights(
    recipe: Recipe, tmp_path: Path, signal_handlers: None
) -> None:
    path = recipe(train__epochs=2, checkpoint__every_steps=4)
    for words in (["name=plain"], ["name=averaged", "train.ema=0.9"]):
        assert train(load_config(path, words)) == 0
    plain, averaged = tmp_path / "runs" / "plain", tmp_path / "runs" / "averaged"
    assert column(plain, "train/loss") == column(averaged, "train/loss"), "the weights themselves are untouched"
    assert column(plain, "val/loss") != column(averaged, "val/loss")
    assert weights(plain).keys() == weights(averaged).keys()
    assert all(torch.equal(weights(plain)[name], tensor) for name, tensor in weights(averaged).items())
    kept = load_file(averaged / "model" / "model.safetensors")
    assert any(not torch.equal(tensor, weights(averaged)[name]) for name, tensor in kept.items())


def test_an_average_goes_on_to_the_same_bits(recipe: Recipe, tmp_path: Path, signal_handlers: None) -> None:
    """A run stopped in its middle, in a stage with a frozen tower too."""
    stages = [{"from_epoch": 0, "text": "none"}, {"from_epoch": 1}]
    path = recipe(train__epochs=2, train__ema=0.9, train__stages=stages, checkpoint__every_steps=5)
    assert train(load_config(path, ["name=whole"])) == 0
    assert train(load_config(path, ["name=halved"])) == 0
    run = tmp_path / "runs" / "halved"
    shutil.rmtree(run / "checkpoints" / "step-00000014")
    (run / "checkpoints" / "latest").write_text("step-00000010\n")
    assert train(load_config(path, ["name=halved"])) == 0
    whole = tmp_path / "runs" / "whole"
    assert column(run, "val/loss") == column(whole, "val/loss")
    found, expected = (load_file(one / "model" / "model.safetensors") for one in (run, whole))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_average_is_switched_on_and_off_by_force(recipe: Recipe, tmp_path: Path, signal_handlers: None) -> None:
    path, run = recipe(train__epochs=1), tmp_path / "runs" / "tiny"
    assert train(load_config(path, [])) == 0
    on = Trainer(load_config(path, ["train.ema=0.9", "train.epochs=2", "resume=force"]))
    assert on.average is not None
    assert on.average.steps == 0
    trained = weights(run)
    assert all(torch.equal(average, trained[name]) for name, average in on.average.averages.items())
    on.enter_epoch(1)
    on.step(next(iter(on.batches())))
    on.save()
    on.close()
    moments = load_file(run / "checkpoints" / "step-00000008" / "optimizer.safetensors")
    assert any(key.startswith("average/") for key in moments)
    off = Trainer(load_config(path, ["train.epochs=2", "resume=force"]))
    assert {kind for kept in off.engine.optimizer_state().values() for kind in kept} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    off.close()


def test_a_skipped_step_is_not_averaged(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(load_config(recipe(), ["train.ema=0.9"]))
    trainer.enter_epoch(0)
    batches = iter(trainer.batches())
    trainer.step(next(batches))
    assert trainer.average is not None
    before = {name: tensor.clone() for name, tensor in trainer.average.averages.items()}
    criterion: Any = trainer.objective.criterion
    monkeypatch.setattr(
        trainer.objective, "criterion", lambda *args, **kwargs: criterion(*args, **kwargs) * float("nan")
    )
    trainer.step(next(batches))
    assert trainer.average.steps == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.average.averages.items())
    trainer.close()
