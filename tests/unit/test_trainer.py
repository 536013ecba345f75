"""One process: steps that are not finite change nothing; a run goes on, stops and refuses as it should."""

import json
import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdist.config import load_config
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.errors import UserError
from clipdist.train.config import check
from clipdist.train.contrastive import Contrastive
from clipdist.train.loop import train
from clipdist.train.trainer import Trainer
from tests.conftest import picture

Recipe = Callable[..., Path]
STEPS_PER_EPOCH = 7


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    values = []
    for batch in islice(trainer.batches(), count):
        trainer.enter_epoch(trainer.epoch_of(batch.step))
        values.append(trainer.step(batch))
    return values


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    kept = trainer.engine.optimizer_state()
    moments = {f"{name}.{kind}": value for name, state in kept.items() for kind, value in state.items()}
    return {name: tensor.clone() for name, tensor in (trainer.engine.weights() | moments).items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def spoil(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int], bool], value: float) -> None:
    """The loss is `value` in those calls, counted from 0, for which `wrong` holds; so are its gradients."""
    criterion, calls = trainer.objective.criterion, iter(range(1000))

    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        true: torch.Tensor = criterion(*args, **kwargs)
        return true * value if wrong(next(calls)) else true

    monkeypatch.setattr(trainer.objective, "criterion", loss)


def last_step(run: Path) -> int:
    return max(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("value", "tower"), [(float("nan"), "timm:test_convnext"), (float("inf"), "timm:test_resnet")], ids=str
)
def test_a_step_that_is_not_finite_changes_nothing_and_later_ones_go_on(
    value: float, tower: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weights, nor optimiser, nor the running statistics of a batch normalisation."""
    trainer = Trainer(load_config(recipe(model__image__name=tower), []))
    spoil(trainer, monkeypatch, lambda call: call == 2, value)
    steps(trainer, 2)
    before, digest = snapshot(trainer), trainer.progress.digest
    assert any(name.endswith("exp_avg_sq") for name in before)
    (bad,) = steps(trainer, 1)
    assert not torch.tensor(bad["train/loss"]).isfinite()
    assert equal(before, snapshot(trainer))
    assert (trainer.progress.step, trainer.progress.skipped_in_a_row, trainer.interval.skipped) == (3, 1, 1)
    assert trainer.progress.digest != digest, "its samples count as seen"
    assert trainer.log(bad)["train/skipped_steps"] == 1
    (good,) = steps(trainer, 1)
    assert torch.tensor([good["train/loss"], good["train/grad_norm"]]).isfinite().all()
    assert not equal(before, snapshot(trainer))
    assert (trainer.progress.step, trainer.progress.skipped_in_a_row) == (4, 0)
    trainer.close()


def test_several_in_a_row_stop_before_the_weights_change(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(load_config(recipe(train__max_skipped_in_a_row=2), []))
    before = snapshot(trainer)
    spoil(trainer, monkeypatch, lambda call: True, float("nan"))
    steps(trainer, 2)
    with pytest.raises(
        UserError, match=r"step 2: .* not finite for 3 steps in a row; none of them changed the weights"
    ):
        steps(trainer, 1)
    assert equal(before, snapshot(trainer))
    trainer.close()


def test_a_finished_run_says_so_and_goes_on_only_by_force(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, path = tmp_path / "runs" / "tiny", recipe(train__epochs=1)
    assert train(load_config(path, [])) == 0
    assert last_step(run) == STEPS_PER_EPOCH
    written = (run / "metrics.jsonl").read_bytes()
    with caplog.at_level(logging.INFO, "clipdist"):
        assert train(load_config(path, ["data.workers=1", "log.every_steps=5"])) == 0
    assert "is finished: step 7, nothing to do" in caplog.text
    assert (run / "metrics.jsonl").read_bytes() == written

    with pytest.raises(UserError, match="was made with another recipe") as caught:
        train(load_config(path, ["train.epochs=2", "optim.lr=0.01", "seed=4", "log.every_steps=2"]))
    for change in ("train.epochs: 1 → 2", "optim.lr: 0.002 → 0.01", "seed: 0 → 4", "resume=force"):
        assert change in str(caught.value)
    assert "log" not in str(caught.value)
    with pytest.raises(UserError, match="already holds a run; choose another name, or resume=auto"):
        train(load_config(path, ["resume=never"]))
    assert (run / "metrics.jsonl").read_bytes() == written

    assert train(load_config(path, ["train.epochs=2", "optim.lr=0.01", "resume=force"])) == 0
    assert last_step(run) == 2 * STEPS_PER_EPOCH
    with pytest.raises(UserError, match=r"step 14, beyond the 7 steps of this recipe"):
        train(load_config(path, ["resume=force"]))


def test_training_stops_early_without_improvement(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(train__epochs=5, evaluate__patience=2, evaluate__min_improvement=10.0)
    assert train(load_config(path, [])) == 0
    run = tmp_path / "runs" / "tiny"
    assert last_step(run) == 3 * STEPS_PER_EPOCH, "the first is the best, two more do not improve"
    state = json.loads((run / "checkpoints" / "step-00000021" / "state.json").read_text())
    assert (state["finished"], state["best_step"], state["validations_without_improvement"]) == (True, 7, 2)
    assert json.loads((run / "model" / "model.json").read_text())["about"]["step"] == 7


def test_too_many_bad_samples_stop_the_run_and_are_listed(recipe: Recipe, tmp_path: Path) -> None:
    folder, broken = tmp_path / "set", {3, 17, 30}
    with ShardSetWriter(folder) as out:
        for number in range(48):
            image = picture("red", "square", "left", number)
            text = {"text": f"a red square, number {number}"}
            out.write("train", f"k{number}", image[:60] if number in broken else image, "png", text)
    path = recipe(data__set=str(folder), data__val_split="", data__max_bad_fraction=0.05, train__epochs=2)
    with pytest.raises(UserError, match=r"3 unreadable samples in one epoch of 48, more than data\.max_bad_fraction"):
        train(load_config(path, []))
    listed = tmp_path / "runs" / "tiny" / "bad_samples.jsonl"
    records = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {record["key"] for record in records} == {f"k{number}" for number in broken}
    assert all(record["reason"].startswith("unreadable image") for record in records)

    assert train(load_config(path, ["data.max_bad_fraction=0.1", "checkpoint.every_steps=3"])) == 0
    assert train(load_config(path, ["data.max_bad_fraction=0.1", "name=fresh"])) == 0
    records = [json.loads(line) for line in listed.read_text().splitlines()]
    fresh = (tmp_path / "runs" / "fresh" / "bad_samples.jsonl").read_text().splitlines()
    assert records == [json.loads(line) for line in fresh], "what the first start listed is not there twice"
    with open(listed, "a", encoding="utf-8") as file:
        file.write('{"step": 2, "ke')  # torn by kill -9
    assert train(load_config(path, ["data.max_bad_fraction=0.1"])) == 0
    assert [json.loads(line) for line in listed.read_text().splitlines()] == records


def test_a_start_without_a_checkpoint_makes_its_own_tokenizer(recipe: Recipe) -> None:
    """A first start that failed must not leave its vocabulary to a corrected recipe."""
    path = recipe()
    first = Trainer(load_config(path, []))
    first.close()
    second = Trainer(load_config(path, ["model.text.vocabulary=60"]))
    second.close()
    assert isinstance(first.objective, Contrastive)
    assert isinstance(second.objective, Contrastive)
    assert len(second.objective.tokenizer) == 60 < len(first.objective.tokenizer)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.global_batch=1", "expected at least 2"),
        ("train.global_batch=500", "has 168 samples, fewer than"),
        ("evaluate.monitor=val/R@1", r"evaluate\.monitor='val/R@1', expected one of val/loss"),
        ("loss.kind=sigmoid", "needs a logit bias"),
        ("name=a/b", "expected a plain folder name"),
        ("data.val_split=test", "no split 'test'"),
        ("optim.warmup_steps=21", "the run has only 21 steps"),
        ("model.image.name=timm:test_vitt", "timm has no model 'test_vitt'"),
    ],
)
def test_recipes_that_cannot_work_are_refused_in_one_line(word: str, message: str, recipe: Recipe) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Trainer(load_config(recipe(), [word]))
    assert "\n" not in str(caught.value)


def test_a_sound_recipe_passes_the_check(recipe: Recipe) -> None:
    check(load_config(recipe(), ["loss.kind=sigmoid", "model.temperature.bias=-10"]))
