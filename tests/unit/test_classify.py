"""A classifier: what it learns from, its gradient, what a run of it leaves, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy

import clipdist
from clipdist.cluster.doctor.recipe import run_model_size
from clipdist.config import load_config, to_yaml
from clipdist.data.labels import Labels, read_labels
from clipdist.data.shards import ShardSet, Split
from clipdist.errors import UserError
from clipdist.evaluate.calibration import fit_temperature
from clipdist.evaluate.classifier import Classified, predict_split
from clipdist.model.build import build_classifier, build_model, build_tokenizer
from clipdist.model.classifier import Classifier
from clipdist.train.classify import Classify
from clipdist.train.config import check
from clipdist.train.loop import train
from clipdist.train.profile import measure
from clipdist.train.trainer import Trainer
from tests.conftest import COLOURS, write_recipe
from tests.labelled import TINY_CLASSIFIER, write_labelled
from tests.unit.test_published import write_hugging_face

Recipe = Callable[..., Path]


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("sets") / "colours")


@pytest.fixture
def classify(colours: Path, tmp_path: Path) -> Recipe:
    return partial(write_recipe, tmp_path, colours, base=TINY_CLASSIFIER)


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six epochs, in which no sample of the test split was read."""
    folder = tmp_path_factory.mktemp("classified")
    changes: dict[str, Any] = {"train__epochs": 6, "optim__lr": 1e-2, "classify__dropout": 0.1}
    changes["model__image__name"] = "timm:test_resnet"
    path = write_recipe(folder, colours, "tiny", TINY_CLASSIFIER, **changes)
    read: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        for method in ("read", "fields"):
            whole = getattr(Split, method)

            def noted(self: Split, number: int, whole: Any = whole) -> Any:
                read.add(self.name)
                return whole(self, number)

            patch.setattr(Split, method, noted)
        assert train(load_config(path, [])) == 0
    assert read == {"train", "val"}, "nothing of a run depends on the test split"
    return folder / "runs" / "tiny"


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    values = []
    for batch in islice(trainer.batches(), count):
        trainer.enter_epoch(trainer.epoch_of(batch.step))
        values.append(trainer.step(batch))
    return values


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def validation_logits(run: Path, colours: Path) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """(logits, classes, images) of the validation split, by the weights that were kept."""
    saved, split = clipdist.load(run / "model", "cpu"), ShardSet.open(colours).split("val")
    found = predict_split(saved.model, split)
    label_N = saved.labels.of(found.keys, found.fields, "val")
    return found.logits_NK, label_N, [split.read(int(number)).image for number in found.numbers_N]


def test_it_learns_without_captions_and_its_metrics_say_so(run: Path) -> None:
    found = records(run)
    validations = [one for one in found if "val/top1" in one]
    assert len(validations) == 6
    assert max(one["val/top1"] for one in validations) > 0.5 > 1 / len(COLOURS)
    assert validations[-1]["val/top5"] >= validations[-1]["val/top1"]
    assert {"val/loss", "val/balanced_accuracy", "val/ece"} <= validations[-1].keys()
    assert found[0]["train/loss"] == pytest.approx(np.log(8), abs=0.5)
    assert {"train/top1", "train/grad_norm_image", "train/grad_norm_head"} <= found[0].keys()
    assert not any("text" in key or "temperature" in key for one in found for key in one)
    best = max(range(6), key=lambda n: validations[n]["val/top1"])
    about = json.loads((run / "model" / "model.json").read_text())["about"]
    assert about["step"] == validations[best]["step"]


def test_labels_are_kept_with_run_and_model(run: Path) -> None:
    labels = Labels.load(run / "labels.json")
    assert labels == Labels.load(run / "model" / "labels.json")
    assert labels.names == tuple(sorted(COLOURS))
    assert sum(labels.samples) == 120
    assert [one["colour_id"] for one in labels.fields] == [COLOURS.index(name) for name in labels.names]
    assert all(one.keys() == {"colour_id"} for one in labels.fields), "on shape and unit no class agrees"


def test_what_is_loaded_answers_as_validation_did(run: Path, colours: Path) -> None:
    """The same pixels and the same probabilities, whatever mode somebody has left the model in."""
    saved = clipdist.load(run / "model", "cpu")
    logits_NK, label_N, images = validation_logits(run, colours)
    seen: list[torch.Tensor] = []
    saved.model.train()
    hook = saved.model.image.register_forward_pre_hook(lambda tower, given: seen.append(given[0].clone()))
    probability_NK = saved.predict_proba(images)
    hook.remove()
    rows = load_pixels(colours, saved.model)
    assert torch.equal(torch.cat(seen), rows)
    expected = torch.softmax(torch.from_numpy(logits_NK) / saved.temperature, dim=1).numpy()
    np.testing.assert_allclose(probability_NK, expected, atol=1e-5)
    kept = saved.scores["val"]["classification"]
    assert (probability_NK.argmax(1) == label_N).mean() == pytest.approx(kept["top-1"]["value"])
    top = saved.classify(images[:3], top=2)
    assert [name for name, _ in (row[0] for row in top)] == [
        saved.labels.names[k] for k in probability_NK[:3].argmax(1)
    ]
    assert all(len(row) == 2 and row[0][1] >= row[1][1] for row in top)
    features_NC = saved.encode_image(images[:3])
    assert features_NC.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features_NC, axis=1), 1, atol=1e-5)
    assert saved.predict_proba([]).shape == (0, 8)


def load_pixels(colours: Path, model: Classifier) -> torch.Tensor:
    """What validation feeds the tower."""
    seen: list[torch.Tensor] = []
    hook = model.image.register_forward_pre_hook(lambda tower, given: seen.append(given[0].clone()))
    predict_split(model, ShardSet.open(colours).split("val"))
    hook.remove()
    return torch.cat(seen)


def test_the_temperature_is_that_of_validation(run: Path, colours: Path) -> None:
    saved = clipdist.load(run / "model", "cpu")
    logits_NK, label_N, _ = validation_logits(run, colours)
    assert saved.temperature == pytest.approx(fit_temperature(logits_NK, label_N), rel=1e-3)
    assert saved.temperature != 1
    told = saved.scores["val"]["calibration"]
    assert (told["fitted_on"], told["divided_by"], saved.fitted_on) == ("val", saved.temperature, "val")
    assert told["scaled"]["nll"]["value"] <= told["as_trained"]["nll"]["value"]


def test_where_no_temperature_can_be_fitted_none_is_applied() -> None:
    """A split on which every answer is right would make every probability 1."""
    labels = Labels("x", ("a", "b"), (1, 1), ({}, {}))
    right = Classified(np.array([[3.0, 0], [0, 2]], np.float32), np.array([0, 1]), labels, bootstrap=0)
    found = right.fitted("val")
    assert (found.value, found.at_bound) == (1.0, True)
    body, table = right.calibration(found)
    assert body["at_bound"]
    assert "stands at its bound" in table


def test_without_a_validation_split_there_is_no_temperature(classify: Recipe, tmp_path: Path) -> None:
    assert train(load_config(classify(data__val_split="", train__epochs=1), [])) == 0
    saved = clipdist.load(tmp_path / "runs" / "tiny" / "model", "cpu")
    assert (saved.temperature, saved.fitted_on, saved.scores) == (1.0, None, {})


def test_the_configuration_is_written_without_what_is_not_read(run: Path, tmp_path: Path) -> None:
    text = (run / "config.yaml").read_text()
    for key in ("projection", "tokenizer", "groups:", "caption", "text_lr_scale"):
        assert key not in text
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert to_yaml(load_config(again, ["name=tiny"])) == text


def test_micro_batches_give_the_gradient_of_the_whole(classify: Recipe) -> None:
    """Which is that of the mean cross-entropy over the batch."""
    found = []
    for micro_batch in (0, 8, 5):
        config = load_config(classify(classify__label_smoothing=0.1), [f"train.micro_batch={micro_batch}"])
        trainer = Trainer(config)
        batch = next(iter(trainer.batches()))
        trainer.enter_epoch(0)
        with torch.no_grad():
            logits_bK = trainer.model(batch.images_b3HW)
        told = trainer.objective.gradient(trainer.engine, batch, trainer.micro_batch, lambda number: None)
        assert batch.group_b is not None
        assert told.loss == pytest.approx(cross_entropy(logits_bK, batch.group_b, label_smoothing=0.1).item(), rel=1e-5)
        assert told.values["train/top1"] == pytest.approx((logits_bK.argmax(1) == batch.group_b).float().mean().item())
        found.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
        trainer.close()
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("words", [[], ["train.ema=0.9", "train.micro_batch=8"]], ids=["plain", "averaged"])
def test_a_run_goes_on_in_mid_epoch_to_the_same_bits(words: list[str], classify: Recipe) -> None:
    path = classify(
        classify__dropout=0.3, train__stages=[{"from_epoch": 0, "image": "none"}, {"from_epoch": 1, "image": 1}]
    )
    whole = Trainer(load_config(path, ["name=whole", *words]))
    expected = steps(whole, 8)
    parts = Trainer(load_config(path, ["name=parts", *words]))
    steps(parts, 3)
    parts.save()
    parts.close()
    resumed = Trainer(load_config(path, ["name=parts", *words]))
    assert resumed.progress.step == 3
    assert steps(resumed, 5) == expected[3:]
    for name, tensor in whole.engine.weights().items():
        assert torch.equal(tensor, resumed.engine.weights()[name]), name
    for one in (whole, resumed):
        one.close()


def test_stages_thaw_the_last_blocks_and_the_head_always_trains(classify: Recipe) -> None:
    stages = [{"from_epoch": 0, "image": "none"}, {"from_epoch": 1, "image": 1}, {"from_epoch": 2}]
    trainer = Trainer(load_config(classify(train__stages=stages), []))
    trainable = []
    for epoch in (0, 1, 2):
        trainer.enter_epoch(epoch)
        trainable.append({name for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert trainable[0] == {"head.weight", "head.bias"}
    assert trainable[0] < trainable[1] < trainable[2]
    assert "image.model.stem.0.weight" not in trainable[1]
    trainer.close()


def test_a_step_that_is_not_finite_changes_nothing(classify: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(load_config(classify(), []))
    steps(trainer, 1)
    before = {name: tensor.clone() for name, tensor in trainer.engine.weights().items()}
    criterion: Any = trainer.objective.criterion
    monkeypatch.setattr(trainer.objective, "criterion", lambda *given: criterion(*given) * float("nan"))
    steps(trainer, 1)
    assert trainer.progress.skipped_in_a_row == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.engine.weights().items())
    trainer.close()


def test_a_locked_towers_features_are_kept(classify: Recipe) -> None:
    """And the losses are those of a run that computes them each time."""
    path = classify(
        train__stages=[{"from_epoch": 0, "image": "none"}],
        data__augment={"crop_area": [1.0, 1.0]},
        model__image__resize="squash",
    )
    told = {}
    for switch in ("true", "false"):
        trainer = Trainer(load_config(path, [f"name=cache-{switch}", f"model.image.cache_features={switch}"]))
        told[switch] = [values["train/loss"] for values in steps(trainer, 10)]
        if switch == "true":
            steps(trainer, 4)
            assert trainer.features.shares(4)["image"] < 1
        trainer.close()
    assert told["true"] == pytest.approx(told["false"], rel=1e-5)


def test_decoded_pixels_are_cached(classify: Recipe, tmp_path: Path) -> None:
    path = classify(data__cache_folder=str(tmp_path / "cache"))
    told = []
    for words in (["name=one"], ["name=again"], ["name=shape", "classify.label=shape"]):
        trainer = Trainer(load_config(path, ["data.cache=decoded", *words]))
        told.append([values["train/loss"] for values in steps(trainer, 2)])
        trainer.close()
    assert told[0] == told[1]
    assert len(list((tmp_path / "cache").glob("*/train-*"))) == 2, "other classes, another cache"


def test_bf16_computes_the_head_in_float32(classify: Recipe) -> None:
    AcceleratorState._reset_state()
    try:
        trainer = Trainer(load_config(classify(), ["train.precision=bf16"]))
        batch = next(iter(trainer.batches()))
        trainer.enter_epoch(0)
        logits = trainer.engine.forward((batch.images_b3HW,))
        assert logits.dtype == torch.float32
        assert torch.isfinite(torch.tensor(trainer.step(batch)["train/loss"]))
        trainer.close()
    finally:
        AcceleratorState._reset_state()


def test_a_published_dual_encoder_gives_its_image_tower(classify: Recipe, recipe: Recipe, tmp_path: Path) -> None:
    published = tmp_path / "published"
    write_hugging_face(published, "clip")
    config = load_config(classify(model={"init": f"hf:{published}"}), ["model.image.side=48"])
    check(config)
    model = build_classifier(config.model, config.classify, 8, seed=0)
    whole = recipe(model={"init": f"hf:{published}"})
    both = load_config(whole, ["model.image.side=48"]).model
    truth = build_model(both, build_tokenizer(both, []), seed=0)
    assert (model.image.side, model.image.mean, config.model.image.resize) == (48, truth.image.mean, "crop")
    for name, tensor in truth.image.state_dict().items():
        assert torch.equal(model.image.state_dict()[name], tensor), name


def test_profile_and_doctor_know_it(classify: Recipe) -> None:
    config = load_config(classify(), [])
    trainer = Trainer(config)
    (profile,) = measure(trainer, steps=2)
    assert {"text tower", "gather"}.isdisjoint(profile.parts)
    assert sum(profile.parts.values()) == pytest.approx(profile.step_seconds)
    assert profile.parts["image tower"] > 0 < profile.parts["loss"]
    assert trainer.step_flops
    assert run_model_size(config) == (trainer.parameters["image tower"], "")
    trainer.close()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["data.groups=label"], "data.groups"),
        (["loss.label_smoothing=0.1", "data.caption=first"], "loss.label_smoothing, data.caption;"),
        (["model.text.name=hf:gpt2"], "model.text.name"),
        (["model.temperature.initial=0.1", "optim.text_lr_scale=0"], "model.temperature.initial, optim.text_lr_scale"),
        (["train.stages=[{text: none}]"], "train.stages: text"),
        (["objective=contrastive"], "objective=contrastive does not read classify.label, classify.dropout"),
    ],
)
def test_keys_that_are_not_read_are_refused_by_name(words: list[str], named: str, classify: Recipe) -> None:
    with pytest.raises(UserError, match="does not read") as caught:
        check(load_config(classify(), words))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("evaluate.monitor=val/mean_R@1", "expected one of val/loss, val/top1, val/top5, val/balanced_accuracy"),
        ("classify.label=''", "should have at least 1 character"),
        (
            "classify.label=diagnosis",
            r"120 of 120 samples .* have no 'diagnosis', .* \(their fields: colour, colour_id, ",
        ),
        ("objective=detect", "objective='detect'"),
        ("classify.dropout=1", "classify.dropout=1"),
    ],
)
def test_recipes_that_cannot_work_are_refused(word: str, message: str, classify: Recipe) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(load_config(classify(), [word]))


def test_top5_of_five_classes_chooses_nothing(classify: Recipe) -> None:
    with pytest.raises(UserError, match=r"five of 5 classes always hold the right one"):
        Trainer(load_config(classify(), ["classify.label=shape", "evaluate.monitor=val/top5"]))
    Trainer(load_config(classify(), ["classify.label=shape", "evaluate.monitor=val/top1"])).close()


def key_in(colours: Path, split: str) -> str:
    return ShardSet.open(colours).split(split).key(0)


def test_a_sample_without_a_class_is_named(colours: Path, tmp_path: Path) -> None:
    key = key_in(colours, "train")
    for fields, message in (
        ({"colour": None}, rf"1 of 120 samples of split 'train', such as {key}, have no 'colour'"),
        ({"colour": ""}, rf"1 of 120 samples .* such as {key}"),
        ({"colour": ["red", "blue"]}, r"field 'colour' is \[\"red\", \"blue\"\] in a sample: expected one class"),
    ):
        folder = write_labelled(tmp_path / str(len(list(tmp_path.iterdir()))), **{key: fields})
        with pytest.raises(UserError, match=message):
            read_labels(ShardSet.open(folder).split("train"), "colour")


def test_one_class_is_none(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "set", **{f"shape-{n:03d}": {"only": 1} for n in range(200)})
    with pytest.raises(UserError, match=r"'only' has 1 value in split 'train'; expected two classes or more"):
        read_labels(ShardSet.open(folder).split("train"), "only")


def test_a_class_that_training_has_not_is_refused_before_training(colours: Path, tmp_path: Path) -> None:
    key = key_in(colours, "val")
    folder = write_labelled(tmp_path / "set", **{key: {"colour": "mauve"}})
    path = write_recipe(tmp_path, folder, "tiny", TINY_CLASSIFIER)
    with pytest.raises(UserError, match=rf"split 'val': 1 of 40 samples .* such as {key} \(mauve\)"):
        Trainer(load_config(path, []))


def test_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "set")
    labels = read_labels(ShardSet.open(folder).split("train"), "colour_id")
    assert labels.names == tuple(map(str, range(8)))
    assert [one["colour"] for one in labels.fields] == COLOURS
    again = tmp_path / "labels.json"
    labels.save(again)
    assert Labels.load(again) == labels
    again.write_text("{}")
    with pytest.raises(UserError, match="expected 'clipdist-labels' version 1"):
        Labels.load(again)


def test_a_folder_that_is_damaged_says_so(run: Path, tmp_path: Path) -> None:
    for name, message in (("labels.json", "labels.json is missing"), ("model.safetensors", "is missing")):
        folder = tmp_path / name
        shutil.copytree(run / "model", folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=message):
            clipdist.load(folder, "cpu")
    body = json.loads((run / "model" / "labels.json").read_text())
    body["classes"].pop()
    folder = tmp_path / "fewer"
    shutil.copytree(run / "model", folder)
    (folder / "labels.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=r"damaged model .*state_dict for Classifier"):
        clipdist.load(folder, "cpu")


def test_early_stopping_and_the_plateau_follow_the_monitor(classify: Recipe, tmp_path: Path) -> None:
    path = classify(
        optim__schedule="plateau",
        optim__plateau_patience=0,
        optim__lr=0.0,
        optim__warmup_steps=0,
        evaluate__patience=2,
        train__epochs=9,
    )
    assert train(load_config(path, ["evaluate.monitor=val/loss"])) == 0
    assert max(one["step"] for one in records(tmp_path / "runs" / "tiny")) == 3 * 5, "two that do not improve"
    state = json.loads((tmp_path / "runs" / "tiny" / "checkpoints" / "step-00000015" / "state.json").read_text())
    assert state["schedule"]["plateau_factor"] == 0.25


def test_the_objective_is_the_classifiers(classify: Recipe) -> None:
    trainer = Trainer(load_config(classify(), []))
    assert isinstance(trainer.objective, Classify)
    assert isinstance(trainer.model, Classifier)
    trainer.close()
