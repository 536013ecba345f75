"""The whole path through the command line on the small set of shapes: train, go on, plan, eval, report, load."""

import contextlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clipdist
from clipdist import cli
from clipdist.config import load_config, read_config
from clipdist.data.order import consumed_hash
from clipdist.data.shards import ShardSet
from tests.conftest import TrainedRun

STEPS = 28  # 168 pairs, 24 a step, 4 epochs

TRAIN_KEYS = {"train/loss", "train/lr", "train/logit_scale", "train/grad_norm"}
DATA_KEYS = {"data/wait_fraction"}
PERF_KEYS = {
    *("perf/samples_per_second", "perf/samples_per_second_per_device", "perf/step_seconds", "perf/memory_gib"),
}
RECALLS = {f"val/{way}/R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
VAL_KEYS = {"val/loss", "val/gallery", "val/cosine_pos", "val/cosine_neg", *RECALLS}


def main(*words: str | Path) -> tuple[int, str]:
    """Exit code and what stands on standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = cli.main([str(word) for word in words])
    return code, output.getvalue()


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_what_the_manual_lists(trained_run: TrainedRun) -> None:
    run = trained_run.folder
    names = {path.name for path in run.iterdir()}
    expected = {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "tokenizer", "checkpoints", "model"}
    assert names == {*expected, "report.html", ".lock"}, "and no bad_samples.jsonl, since all could be read"
    assert not list(run.rglob("*.partial"))
    assert not list(run.rglob("*.old"))
    checkpoints = run / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {f"step-{STEPS:08d}", "latest"}
    assert (checkpoints / "latest").read_text() == f"step-{STEPS:08d}\n"
    model = {path.name for path in (run / "model").iterdir()}
    assert model == {"model.json", "model.safetensors", "text_config", "tokenizer", "scores.json"}
    assert read_config(run / "config.yaml") == load_config(trained_run.recipe, [])


def test_the_environment_is_written_down(trained_run: TrainedRun) -> None:
    environment = json.loads((trained_run.folder / "environment.json").read_text(encoding="utf-8"))
    assert environment["world_size"] == 1
    assert environment["clipdist"] == environment["versions"]["clipdist"] == clipdist.__version__
    assert environment["torch"].startswith(environment["versions"]["torch"])
    assert len(environment["hosts"]) == 1
    assert environment["hosts"][0]
    (shard_set,) = environment["shard_sets"]
    assert shard_set["digest"] == ShardSet.open(trained_run.shapes).manifest.digest
    assert shard_set["splits"] == {"train": 168, "val": 32}
    assert shard_set["license"] == "CC0-1.0, drawn by the tests"
    assert [(start["step"], start["world_size"]) for start in environment["starts"]] == [(0, 1)]
    parameters = environment["parameters"]
    assert parameters["total"] > parameters["image tower"] + parameters["text tower"] > 0


def test_the_metrics_hold_every_promised_key(trained_run: TrainedRun) -> None:
    lines = records(trained_run.folder)
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert {*TRAIN_KEYS, *DATA_KEYS, *PERF_KEYS, "data/digest"} <= line.keys()
        assert all(math.isfinite(line[key]) for key in TRAIN_KEYS | PERF_KEYS)
        assert 0 <= line["data/wait_fraction"] <= 1
        assert re.fullmatch("[0-9a-f]{16}", line["data/digest"])
        assert line["perf/samples_per_second"] == pytest.approx(24 / line["perf/step_seconds"])
    validations = [line for line in lines if "val/loss" in line]
    assert [line["step"] for line in validations] == [7, 14, 21, 28]
    for line in validations:
        assert line.keys() >= VAL_KEYS
        assert line["val/gallery"] == 32
        assert all(0 <= line[key] <= 1 for key in RECALLS)
    assert validations[-1]["val/loss"] < math.log(24) - 0.25, "it has learned something"
    assert validations[-1]["val/cosine_pos"] > validations[-1]["val/cosine_neg"]


def test_tensorboard_shows_the_same_numbers_a_panel_and_hyper_parameters(trained_run: TrainedRun) -> None:
    board = EventAccumulator(str(trained_run.folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    tags = board.Tags()
    assert {*TRAIN_KEYS, *DATA_KEYS, *PERF_KEYS, *VAL_KEYS} <= set(tags["scalars"])
    written = {line["step"]: line["train/loss"] for line in records(trained_run.folder) if "train/loss" in line}
    shown = {event.step: event.value for event in board.Scalars("train/loss")}
    assert shown == pytest.approx(written)
    panels = board.Images("val/retrieval")
    assert [panel.step for panel in panels] == [7, 14, 21, 28]
    picture = Image.open(io.BytesIO(panels[-1].encoded_image_string))
    assert picture.size == (panels[-1].width, panels[-1].height)
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 50, "photographs and words, not a blank"
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= board.PluginTagToContent("hparams").keys()
    scores = json.loads((trained_run.folder / "model" / "scores.json").read_text(encoding="utf-8"))["val"]
    mean = (scores["image_to_text"]["R@1"]["value"] + scores["text_to_image"]["R@1"]["value"]) / 2
    assert board.Scalars("best/val/mean_R@1")[-1].value == pytest.approx(mean)


def test_what_training_says(trained_run: TrainedRun) -> None:
    said = trained_run.said
    assert f"{STEPS} steps of 24 pairs, 7 per epoch, processes: 1, from step 0" in said
    assert f"step {STEPS}/{STEPS} epoch 4/4 loss " in said
    assert "epoch 4 validation: loss " in said
    assert "gallery 32" in said
    assert "finished: model in " in said
    assert "Traceback" not in said
    assert "Warning" not in said, said


def test_a_second_train_says_finished_and_changes_no_weight(
    trained_run: TrainedRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(trained_run.folder, tmp_path / "runs" / "tiny"))
    before = contents(run)
    with caplog.at_level("INFO", logger="clipdist"):
        assert main("train", trained_run.recipe, f"runs={tmp_path / 'runs'}") == (0, "")
    assert f"{run} is finished: step {STEPS}, nothing to do" in caplog.text
    after = contents(run)
    for name in before:
        # The first two count the starts and name the latest; the third says where the runs lie.
        if name not in ("environment.json", ".lock", "config.yaml"):
            assert after[name] == before[name], name
    new = {name for name in after if name not in before}
    assert all(name.startswith("tensorboard/") for name in new), new


def test_print_config_prints_what_the_run_wrote_down(trained_run: TrainedRun) -> None:
    code, text = main("train", "--print-config", trained_run.recipe)
    assert (code, text) == (0, (trained_run.folder / "config.yaml").read_text(encoding="utf-8"))
    code, text = main("train", trained_run.recipe, "optim.lr=1e-4", "--print-config", "train.epochs=9")
    assert code == 0
    tree = yaml.safe_load(text)
    assert (tree["train"]["epochs"], tree["optim"]["lr"]) == (9, 1e-4)


def test_the_plan_is_what_training_consumed(trained_run: TrainedRun) -> None:
    digests = {line["step"]: line["data/digest"] for line in records(trained_run.folder) if "data/digest" in line}
    digest, seen = 0, []
    for step in range(STEPS):
        code, text = main("plan", trained_run.recipe, "--step", str(step))
        keys = text.splitlines()
        assert code == 0
        assert len(keys) == len(set(keys)) == 24
        seen += keys
        digest = (digest + sum(consumed_hash(step, key) for key in keys)) % 2**64
        assert f"{digest:016x}" == digests[step + 1], f"step {step}"
    split = ShardSet.open(trained_run.shapes).split("train")
    every = sorted(split.key(number) for number in range(len(split)))
    for epoch in range(4):
        assert sorted(seen[epoch * 168 : (epoch + 1) * 168]) == every, "each once an epoch: 168 divides by 24"
    assert seen[:168] != seen[168:336]
    assert main("plan", trained_run.recipe, "--step", "0", "seed=1")[1].splitlines() != seen[:24]


def test_a_closed_pipe_is_no_error(trained_run: TrainedRun) -> None:
    """`clipdist plan … | head`, with a reader that is gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as output:
        with contextlib.redirect_stdout(output):
            assert cli.main(["plan", str(trained_run.recipe), "--step", "0"]) == 0
        output.flush()  # as Python does at its end: what is left must not raise again


@pytest.fixture(scope="module")
def evaluated(trained_run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of the run after `clipdist eval`, and what was printed."""
    run = tmp_path_factory.mktemp("evaluated") / "tiny"
    shutil.copytree(trained_run.folder, run)
    (run / "report.html").unlink()
    words = ("eval", run / "model", "--data", trained_run.shapes, "--split", "val", "--bootstrap", "200")
    code, text = main(*words, "--workers", "0", "--examples", "3")
    assert code == 0
    return run, text


def test_eval_prints_a_table_with_the_gallery(evaluated: tuple[Path, str]) -> None:
    run, text = evaluated
    lines = text.splitlines()
    assert re.match(r"\s+queries\s+gallery\s+R@1\s+R@5\s+R@10", lines[0])
    assert re.match(r"image → text\s+32\s+32\s+\d\.\d{3}", lines[1])
    assert any(re.match(r"text → image\s+32\s+32\s+\d\.\d{3}", line) for line in lines)
    named = [Path(line) for line in lines if line.startswith(str(run))]
    assert {path.name for path in named} == {
        *("shapes-val.json", "shapes-val.npz", "shapes-val-recall.png", "shapes-val-cosines.png", "report.html")
    }
    assert all(path.is_file() for path in named)


def test_eval_writes_scores_and_plots(evaluated: tuple[Path, str], trained_run: TrainedRun) -> None:
    run, _ = evaluated
    scores = json.loads((run / "evaluation" / "shapes-val.json").read_text(encoding="utf-8"))
    assert scores["image_to_text"]["gallery"] == scores["text_to_image"]["gallery"] == 32
    assert scores["split"] == "val"
    assert scores["data_digest"] == ShardSet.open(trained_run.shapes).manifest.digest
    assert scores["groups"] == "none", "as in training"
    assert scores["unit"] == "unit"
    assert 16 <= scores["units"] <= 32
    assert scores["left_out"] == []
    kept = json.loads((run / "model" / "scores.json").read_text(encoding="utf-8"))["val"]
    for way in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            estimate = scores[way][f"R@{k}"]
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
            assert estimate["value"] == kept[way][f"R@{k}"]["value"], "validation found the same for the best model"
    for name in ("recall", "cosines"):
        with Image.open(run / "evaluation" / f"shapes-val-{name}.png") as plot:
            assert plot.format == "PNG"
            assert min(plot.size) > 100
            assert np.asarray(plot.convert("L")).min() < 128, "not a blank"


def test_eval_and_report_write_a_page_that_needs_no_network(evaluated: tuple[Path, str]) -> None:
    run, _ = evaluated
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "data:image/" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    value = json.loads((run / "evaluation" / "shapes-val.json").read_text(encoding="utf-8"))["image_to_text"]["R@1"]
    assert f">{value['value']:.3f} <small" in page
    assert page.count("among 32 ") == 2, "the size of the gallery stands beside both scores"
    (run / "report.html").unlink()
    assert main("report", run) == (0, f"{run / 'report.html'}\n")
    assert (run / "report.html").stat().st_size > 10_000


def test_eval_writes_where_it_is_told(trained_run: TrainedRun, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained_run.folder / "model", model)
    words = ("eval", model, "--data", trained_run.shapes, "--split", "val", "--bootstrap", "0", "--workers", "0")
    code, _ = main(*words, "--groups", "label", "--out", tmp_path / "out")
    assert code == 0
    assert not (tmp_path / "evaluation").exists()
    assert not (tmp_path / "report.html").exists(), "this model lies in no run"
    scores = json.loads((tmp_path / "out" / "shapes-val.json").read_text(encoding="utf-8"))
    assert (scores["groups"], scores["grouped"]) == ("label", True)
    assert scores["image_to_text"]["R@1"]["low"] is None
    single = json.loads((trained_run.folder / "model" / "scores.json").read_text(encoding="utf-8"))["val"]
    assert scores["image_to_text"]["R@1"]["value"] >= single["image_to_text"]["R@1"]["value"]


def test_the_loaded_model_reaches_the_written_score(trained_run: TrainedRun, tmp_path: Path) -> None:
    model = clipdist.load(trained_run.folder / "model", device="cpu")
    split = ShardSet.open(trained_run.shapes).split("val")
    samples = [split.read(number) for number in range(len(split))]
    images = model.encode_image([sample.image for sample in samples], micro_batch=5)
    texts = model.encode_text([sample.texts[0] for sample in samples], micro_batch=7)
    assert images.shape == texts.shape == (32, model.width) == (32, 32)
    assert images.dtype == texts.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)
    cosines = images @ texts.T
    found = {
        "image_to_text": float((cosines.argmax(1) == np.arange(32)).mean()),
        "text_to_image": float((cosines.argmax(0) == np.arange(32)).mean()),
    }
    assert found == {way: model.scores["val"][way]["R@1"]["value"] for way in found}
    assert max(found.values()) > 2 / 32, "better than chance"
    path = tmp_path / "one.png"
    path.write_bytes(samples[0].image)
    with Image.open(path) as picture:
        for same in (path, str(path), picture):
            np.testing.assert_allclose(model.encode_image([same])[0], images[0], atol=1e-5)
    assert model.encode_text([]).shape == model.encode_image([]).shape == (0, 32)
    assert model.about["split"] == "train"
    assert model.about["license"] == "CC0-1.0, drawn by the tests"


@pytest.mark.usefixtures("signal_handlers")
def test_a_start_that_failed_leaves_nothing_that_the_next_one_uses(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """A recipe with two faults, mended one after the other: the first start had made a tokenizer already."""
    broken = recipe(model__image__name="timm:no_such_model", model__text__vocabulary=60, train__epochs=1)
    assert main("train", broken)[0] == 2
    assert not (tmp_path / "runs" / "tiny" / "checkpoints").exists()
    mended = recipe(train__epochs=1)
    assert main("train", mended)[0] == 0
    model = clipdist.load(tmp_path / "runs" / "tiny" / "model", device="cpu")
    vocabulary = len(model.tokenizer)
    fresh = recipe("fresh", train__epochs=1, runs=str(tmp_path / "others"))
    assert main("train", fresh)[0] == 0
    assert vocabulary == len(clipdist.load(tmp_path / "others" / "fresh" / "model", device="cpu").tokenizer)


def test_help_and_version() -> None:
    code, text = main("--help")
    assert code == 0
    for verb in cli.VERBS:
        assert f"clipdist {verb} " in text
        with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()) as output:
            cli.main([verb, "--help"])
        assert ended.value.code == 0
        assert output.getvalue().startswith(f"usage: clipdist {verb}")
    assert main() == (0, text)
    assert main("--version") == (0, f"clipdist {clipdist.__version__}\n")


@pytest.mark.usefixtures("signal_handlers")
def test_a_run_cut_short_where_it_already_stands_is_finished(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(train__epochs=2, checkpoint__every_steps=7, checkpoint__keep=5)
    assert cli.main(["train", str(path)]) == 0
    run = tmp_path / "runs" / "tiny"
    shutil.rmtree(run / "checkpoints" / "step-00000014")
    assert cli.main(["train", str(path), "train.epochs=1", "resume=force"]) == 0
    assert (run / "report.html").exists()
    assert cli.main(["train", str(path), "train.epochs=1", "resume=force"]) == 0, "finished, nothing to do"
