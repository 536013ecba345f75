"""`clipdist eval` of a classifier, and the report of its run."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import clipdist
from clipdist.cli import main
from clipdist.config import load_config
from clipdist.data.labels import Labels
from clipdist.data.shards import ShardSet
from clipdist.evaluate import plots
from clipdist.evaluate.classification import classification_scores, confused_classes
from clipdist.evaluate.classifier import Classified, predict_split
from clipdist.evaluate.report import write_report
from clipdist.evaluate.score_plots import FEW_CLASSES, confusion
from clipdist.train.loop import train
from tests.conftest import write_recipe
from tests.labelled import TINY_CLASSIFIER, write_labelled


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a set and of a run on it; tests copy what they change."""
    folder = tmp_path_factory.mktemp("evaluated")
    changes: dict[str, Any] = {"train__epochs": 5, "optim__lr": 1e-2, "model__image__name": "timm:test_resnet"}
    path = write_recipe(folder, write_labelled(folder / "colours"), "tiny", TINY_CLASSIFIER, **changes)
    assert train(load_config(path, [])) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained / "runs" / "tiny", tmp_path / "tiny")


def evaluate(run: Path, data: Path, *words: str) -> dict[str, Any]:
    """The JSON of what the command found on the test split, or that of `--split`."""
    arguments = ["eval", str(run / "model"), "--data", str(data), "--workers", "0", "--bootstrap", "50", *words]
    assert main(arguments) == 0
    split = words[words.index("--split") + 1] if "--split" in words else "test"
    body: dict[str, Any] = json.loads((run / "evaluation" / f"{data.name}-{split}.json").read_text())
    return body


def text_of(page: Path) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))).split())


def test_scores_are_those_of_the_answers(trained: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = evaluate(run, trained / "colours", "--by", "shape")
    said = capsys.readouterr().out
    saved, split = clipdist.load(run / "model", "cpu"), ShardSet.open(trained / "colours").split("test")
    samples = [split.read(number) for number in range(len(split))]
    answers = saved.classify([sample.image for sample in samples], top=5)
    own = [sample.fields["colour"] for sample in samples]
    part = body["classification"]
    assert part["rows"] == 40
    assert part["top-1"]["value"] == pytest.approx(np.mean([a[0][0] == c for a, c in zip(answers, own, strict=True)]))
    first_five = [c in [name for name, _ in a] for a, c in zip(answers, own, strict=True)]
    assert part["top-5"]["value"] == pytest.approx(np.mean(first_five))
    assert part["top-1"]["low"] <= part["top-1"]["value"] <= part["top-1"]["high"]
    assert 0.5 < part["auroc"]["value"] <= 1
    assert np.sum(part["confusion"]["counts"]) == 40
    assert {one["field"] for one in body["subgroups"]} == {"shape"}
    assert body["unit"] == "unit"
    for words in (
        "classification by colour",
        "balanced accuracy",
        "mistaken most often",
        "divided by T = ",
        "by shape",
    ):
        assert words in said


def test_the_temperature_comes_with_the_model_whatever_the_split_says(trained: Path, run: Path, tmp_path: Path) -> None:
    """Test labels that are all wrong change the score, and not the temperature."""
    true = evaluate(run, trained / "colours")
    split = ShardSet.open(trained / "colours").split("test")
    colours = [split.fields(number)["colour"] for number in range(40)]
    turned = {split.key(number): {"colour": colours[(number + 3) % 40]} for number in range(40)}
    wrong = write_labelled(tmp_path / "wrong", **turned)
    false = evaluate(run, wrong)
    saved = clipdist.load(run / "model", "cpu")
    for body in (true, false):
        assert body["calibration"]["divided_by"] == saved.temperature
        assert body["calibration"]["fitted_on"] == "val"
    assert false["classification"]["top-1"]["value"] < true["classification"]["top-1"]["value"]
    scaled, plain = (true["calibration"][key]["nll"]["value"] for key in ("scaled", "as_trained"))
    found = predict_split(saved.model, ShardSet.open(trained / "colours").split("test"))
    label_N = saved.labels.of(found.keys, found.fields, "test")
    for value, T in ((scaled, saved.temperature), (plain, 1.0)):
        logits = torch.from_numpy(found.logits_NK / T)
        assert value == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.from_numpy(label_N)).item(), 1e-4)


def test_what_makes_a_score_not_independent_is_told(
    trained: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = evaluate(run, trained / "colours", "--split", "val")
    remembered = evaluate(run, trained / "colours", "--split", "train")
    fresh = evaluate(run, trained / "colours", "--unit", "shape")
    assert any("chose the model during training" in note for note in chosen["leaks"]["notes"])
    assert any("of a unit that the training split has, too" in note for note in chosen["leaks"]["notes"])
    assert remembered["leaks"]["notes"] == [
        "These are the images that the model was trained on: the score says how well it remembers them."
    ]
    assert fresh["leaks"]["notes"][0].startswith("40 of 40 images are of a shape that the training split has, too")
    assert fresh["leaks"]["notes"][0] in capsys.readouterr().out
    assert fresh["leaks"]["notes"][0] in text_of(run / "report.html")


def test_images_without_a_class_of_the_models_are_left_out_and_counted(
    trained: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = ShardSet.open(trained / "colours").split("test")
    changed = {split.key(0): {"colour": "mauve"}, split.key(1): {"colour": None}}
    body = evaluate(run, write_labelled(tmp_path / "more", **changed))
    assert body["classification"]["rows"] == 38
    assert body["classification"]["left_out"] == {"colour=mauve": 1, "no colour": 1}
    assert "left out, 2: " in capsys.readouterr().out
    (note,) = body["leaks"]["notes"]
    assert "training split has, too (by their names: it is another set)" in note
    assert "Images left out, since the model has no such class or they name none: 2" in text_of(run / "report.html")


@pytest.mark.parametrize(
    "words",
    [
        ["--zero-shot", "colour"],
        ["--in-batch", "8"],
        ["--pool", "8"],
        ["--groups", "label"],
        ["--probe", "shape"],
        ["--zero-shot", "colour", "--calibrate", "val"],
    ],
)
def test_options_that_say_nothing_of_it_are_refused(
    words: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained / "runs" / "tiny" / "model"
    assert main(["eval", str(model), "--data", str(trained / "colours"), *words]) == 2
    assert re.search(rf"{words[0]}: \S+ is a classifier: .*; leave it out", capsys.readouterr().err)


def test_a_map_that_the_tower_cannot_have_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained / "runs" / "tiny" / "model"
    assert main(["eval", str(model), "--data", str(trained / "colours"), "--relevance", "rollout"]) == 2
    assert re.search(r"--relevance rollout: .*ResNet.*gradient or grad-cam.*--relevance off", capsys.readouterr().err)


def test_the_report_shows_curves_calibration_and_mistakes(trained: Path, run: Path) -> None:
    text = text_of(run / "report.html")
    for words in (
        "Top-1",
        "Balanced accuracy",
        "the validation that chose the model",
        "These scores come from the split that chose the model and its temperature",
        "Calibration",
        "fitted on the split val",
        "Accuracy",
        "Classes confused most",
    ):
        assert words in text, words
    assert "no retrieval scores" not in text
    body = evaluate(run, trained / "colours", "--examples", "3")
    page = run / "report.html"
    text = text_of(page)
    assert f"{body['classification']['top-1']['value']:.3f}" in text
    assert "These scores come from the split that chose" not in text
    assert "Wrong, and sure of it" in text
    assert page.read_text(encoding="utf-8").count('class="card mistake"') == 3
    assert page.read_text(encoding="utf-8").count("<figcaption>for ") == 3 * 2, "the class given, and the right one"
    assert "Made by Grad-CAM" in text
    evaluate(run, trained / "colours", "--examples", "3", "--relevance", "off")
    assert "<figcaption>for " not in page.read_text(encoding="utf-8")
    assert "resample" in text
    assert text_of(write_report(run)).count("Each class") == 1, "and without the command it shows what it had found"


def test_mistakes_are_those_of_the_highest_probability(trained: Path, run: Path) -> None:
    evaluate(run, trained / "colours")
    shown = re.findall(r"says (.+?) ([\d.]+) is (.+?) ([\d.]+) shape-", text_of(run / "report.html"))
    assert shown
    assert all(given != label and float(high) >= float(low) for given, high, label, low in shown)
    assert [float(high) for _, high, _, _ in shown] == sorted((float(high) for _, high, _, _ in shown), reverse=True)


@given(st.integers(0, 2**32 - 1))
def test_confused_classes_are_the_matrix_off_its_diagonal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, label = rng.integers(-2, 3, (12, 4)).astype(np.float32), rng.integers(0, 4, 12)
    scores = classification_scores(logits, label, "abcd", bootstrap=0)
    found = confused_classes(scores, most=100)
    wrong = scores.confusion_CC.sum() - np.trace(scores.confusion_CC)
    assert sum(one["rows"] for one in found) == wrong
    assert [one["rows"] for one in found] == sorted((one["rows"] for one in found), reverse=True)
    for one in found:
        i, j = "abcd".index(one["class"]), "abcd".index(one["taken_for"])
        assert i != j
        assert one["rows"] == scores.confusion_CC[i, j] <= one["of"] == scores.counts[i]


def test_of_many_classes_those_confused_most_are_drawn() -> None:
    rng, K = np.random.default_rng(0), 300
    names = tuple(f"class {number}" for number in range(K))
    labels = Labels("x", names, (1,) * K, ({},) * K)
    for classes in (40, K):
        label = rng.integers(0, classes, 600)
        one = Classified(rng.normal(size=(600, K)).astype(np.float32), label, labels, bootstrap=0)
        body = {"classification": one.classification()}
        assert len(body["classification"]["confused"]) == 20
        assert "confusion" not in body["classification"], "90,000 numbers"
        assert confusion(body) is None
    few = Labels("x", names[:40], (1,) * 40, ({},) * 40)
    one = Classified(rng.normal(size=(600, 40)).astype(np.float32), rng.integers(0, 40, 600), few, bootstrap=0)
    picture = confusion({"classification": one.classification()})
    assert picture is not None
    assert FEW_CLASSES == 12
    assert confusion({"zero_shot": one.classification() | {"confused": []}}) is None, "too many to read"


def test_the_curve_of_accuracy_needs_a_classifier() -> None:
    assert plots.accuracy([{"step": 1, "train/loss": 2.0}]) is None
    records = [{"step": 1, "train/top1": 0.2}, {"step": 2, "train/top1": 0.3, "val/top1": 0.1}]
    assert plots.accuracy(records) is not None
