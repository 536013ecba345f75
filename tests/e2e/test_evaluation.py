"""`clipdist eval` with everything that it measures, on the small set of shapes and its tiny model."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import clipdist
from clipdist import cli
from clipdist.data.shards import ShardSet
from tests.conftest import COLOURS, SHAPES, TrainedRun, picture


def main(*words: str | Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert cli.main([str(word) for word in words]) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def evaluated(trained_run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of the run after an evaluation of everything, and what was printed."""
    run = tmp_path_factory.mktemp("measured") / "tiny"
    shutil.copytree(trained_run.folder, run)
    classes = run.parent / "classes.txt"
    classes.write_text("".join(f"{shape}\t{shape} shape\n" for shape in SHAPES))
    templates = run.parent / "templates.txt"
    templates.write_text("A red {} at the top.\nA blue {} at the left.\n")
    # The smaller split is trained on here, and the larger one scored, so that there is enough of everything.
    words = ["eval", run / "model", "--data", trained_run.shapes, "--split", "train", "--bootstrap", "100"]
    words += ["--workers", "0", "--examples", "2", "--groups", "label", "--in-batch", "16", "--pool", "5"]
    words += ["--zero-shot", "label", "--classes", classes, "--templates", templates, "--calibrate", "val"]
    words += ["--probe", "label", "--probe-train", "val", "--fractions", "0.5", "1", "--by", "label"]
    return run, main(*words)


@pytest.fixture(scope="module")
def body(evaluated: tuple[Path, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((evaluated[0] / "evaluation" / "shapes-train.json").read_text(encoding="utf-8"))
    return found


def test_every_table_names_its_gallery(evaluated: tuple[Path, str]) -> None:
    text = evaluated[1]
    assert re.search(r"^image → text\s+168\s+168\s+\d\.\d{3} \[", text, re.M), "the full gallery"
    assert re.search(r"^in batches\s+queries\s+gallery.*\nimage → text\s+168\s+16\s+\d", text, re.M)
    assert re.search(r"^in pools\s+queries\s+gallery.*\nimage → text\s+168\s+5\s+\d", text, re.M)
    assert re.search(r"^\s+right answers\s+mAP\s+P@1", text, re.M)
    assert "loss in batches of 16: " in text
    assert "zero-shot by label" in text
    assert "divided by T = " in text
    assert "by label" in text
    named = {Path(line).name for line in text.splitlines() if line.startswith(str(evaluated[0]))}
    kinds = {
        f"shapes-train-{kind}.png" for kind in ("recall", "cosines", "confusion", "reliability", "probes", "subgroups")
    }
    assert named == {"shapes-train.json", "shapes-train.npz", "report.html", *kinds}
    for name in kinds:
        with Image.open(evaluated[0] / "evaluation" / name) as plot:
            assert np.asarray(plot.convert("L")).min() < 160, f"{name} is blank"


def test_small_galleries_stand_apart_from_the_full_one(body: dict[str, Any]) -> None:
    galleries = [body["image_to_text"]["gallery"], body["in_batch"]["gallery"], body["pool"]["gallery"]]
    assert galleries == [168, 16, 5]
    assert body["in_batch"]["unknowing_loss"] == pytest.approx(np.log(16))
    for part in (body["in_batch"]["loss"], body["pool"]["top-1"], body["image_to_text"]["mAP"]):
        assert part["low"] <= part["value"] <= part["high"]


def test_zero_shot_is_what_the_loaded_model_says(
    evaluated: tuple[Path, str], body: dict[str, Any], shapes: Path
) -> None:
    model = clipdist.load(evaluated[0] / "model", device="cpu")
    split = ShardSet.open(shapes).split("train")
    samples = [split.read(number) for number in range(len(split))]
    images = model.encode_image([sample.image for sample in samples])
    prompts = [[f"A red {shape} shape at the top.", f"A blue {shape} shape at the left."] for shape in SHAPES]
    means = np.stack([model.encode_text(some).mean(axis=0) for some in prompts])
    classes = means / np.linalg.norm(means, axis=1, keepdims=True)
    given = (images @ classes.T).argmax(axis=1)
    truth = np.array([SHAPES.index(sample.fields["label"]) for sample in samples])
    found = body["zero_shot"]
    assert found["top-1"]["value"] == pytest.approx((given == truth).mean(), abs=1 / 168)
    assert list(found["classes"]) == [f"{shape} shape" for shape in SHAPES]
    assert found["templates"] == ["A red {} at the top.", "A blue {} at the left."]
    assert found["scale"] == pytest.approx(1 / model.temperature)
    assert body["calibration"]["fitted_on"] == "val"
    assert body["calibration"]["temperature"] == pytest.approx(body["calibration"]["divided_by"] * model.temperature)


def test_probes_are_fitted_on_the_towers_features_of_the_other_split(
    evaluated: tuple[Path, str], body: dict[str, Any], shapes: Path
) -> None:
    probe = body["probe"]
    assert (probe["fitted_on"], probe["features"], probe["metric"]) == ("val", "tower", "accuracy")
    assert [(one["kind"], one["fraction"]) for one in probe["scores"]] == [
        *(("linear", 0.5), ("linear", 1.0), ("knn", 0.5), ("knn", 1.0))
    ]
    saved, parts = clipdist.load(evaluated[0] / "model", device="cpu"), []
    for name in ("val", "train"):
        split = ShardSet.open(shapes).split(name)
        samples = [split.read(number) for number in range(len(split))]
        pixels = torch.stack([saved.preprocess(sample.image) for sample in samples])
        with torch.inference_mode():
            features = saved.model.image(pixels).double().numpy()
        parts.append((features, [sample.fields["label"] for sample in samples]))
    (X, y), (other, truth) = parts
    assert probe["scores"][1]["rows"] == len(X) == 32
    # The strength that was chosen, or the one that stands in where a fifth of so few rows cannot hold every class.
    C = probe["scores"][1]["C"] or 0.01
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000)).fit(X, y)
    accuracy = np.mean(model.predict(other) == np.array(truth))
    assert probe["scores"][1]["score"]["value"] == pytest.approx(accuracy, abs=2 / 168)


def test_subgroups_have_the_scores_of_all_parts(body: dict[str, Any]) -> None:
    (field,) = body["subgroups"]
    assert {one["value"] for one in field["values"]} == set(SHAPES)
    assert sum(one["images"] for one in field["values"]) == 168
    assert {"image_to_text/R@1", "zero_shot/top-1", "linear_probe/top-1", "knn_probe/top-1"} <= field["overall"].keys()
    mean = sum(one["images"] * one["scores"]["zero_shot/top-1"]["value"] for one in field["values"]) / 168
    assert mean == pytest.approx(body["zero_shot"]["top-1"]["value"])


def test_the_report_shows_all_parts(evaluated: tuple[Path, str], body: dict[str, Any]) -> None:
    page = (evaluated[0] / "report.html").read_text(encoding="utf-8")
    titles = ("Several right answers", "In batches of 16", "One image against 5 captions", "Zero-shot classification")
    for title in (*titles, "Each class", "Calibration", "Probes", "By label"):
        assert f"<h2>{title}</h2>" in page
    assert f"{body['zero_shot']['top-1']['value']:.3f}" in page
    assert "These are the images that the model was trained on" in page
    assert body["leaks"]["same_split"]
    assert "Not in this report" not in page
    assert "Made by Grad-CAM" in page
    assert page.count("<figcaption>for its own text</figcaption>") == 2 + 6, "of each image that is shown"
    main("report", evaluated[0])
    again = (evaluated[0] / "report.html").read_text(encoding="utf-8")
    assert again.count("<h2>") == page.count("<h2>") - 3, "all but the examples and the worst, which need the data"


def test_the_same_seed_gives_the_same_scores(
    evaluated: tuple[Path, str], trained_run: TrainedRun, tmp_path: Path, body: dict[str, Any]
) -> None:
    words = ["eval", evaluated[0] / "model", "--data", trained_run.shapes, "--split", "train", "--bootstrap", "100"]
    words += ["--workers", "0", "--groups", "label", "--in-batch", "16", "--pool", "5", "--out", tmp_path]
    main(*words)
    again = json.loads((tmp_path / "shapes-train.json").read_text(encoding="utf-8"))
    for name in ("image_to_text", "in_batch", "pool"):
        assert again[name] == body[name]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Shapes in the layout of CheXpert 8×200 as ConVIRT published it: two classes × 30 candidates, two queries each."""
    folder = tmp_path / "chexpert"
    for kind in ("image-retrieval", "text-retrieval", "pictures"):
        (folder / kind).mkdir(parents=True)
    rows = []
    for number in range(60):
        shape, colour = SHAPES[number % 2], COLOURS[number % len(COLOURS)]
        (folder / "pictures" / f"{number}.png").write_bytes(picture(colour, shape, "centre", seed=number))
        rows.append(f"pictures/{number}.png,{float(number % 2 == 0)},{float(number % 2 == 1)}")
    for kind in ("image-retrieval", "text-retrieval"):
        text = "\n".join([f"Path,{SHAPES[0]},{SHAPES[1]}", *rows])
        (folder / kind / "candidate.csv").write_text(f"{text}\n")
    queries = []
    for number in range(4):
        name = f"pictures/query-{number}.png"
        (folder / name).write_bytes(picture("red", SHAPES[number % 2], "left", seed=50 + number))
        queries.append(f"{SHAPES[number % 2]},{name}")
    (folder / "image-retrieval" / "query.csv").write_text("\n".join(["Variable,Path", *queries]) + "\n")
    texts = [f"{SHAPES[number % 2]},A red {SHAPES[number % 2]} at the left." for number in range(4)]
    (folder / "text-retrieval" / "query.csv").write_text("\n".join(["Variable,Text", *texts]) + "\n")
    return folder


def test_queries_need_no_shard_set(evaluated: tuple[Path, str], published: Path) -> None:
    files = [published / kind / "query.csv" for kind in ("image-retrieval", "text-retrieval")]
    offered = [published / kind / "candidate.csv" for kind in ("image-retrieval", "text-retrieval")]
    run = evaluated[0]
    text = main(
        *("eval", run / "model", "--queries", *files, "--candidates", *offered, "--images", published),
        *("--bootstrap", "50"),
    )
    assert re.search(r"^image → image\s+queries\s+candidates\s+P@5\s+P@10\s+P@50\n\s+4\s+60\s+\d", text, re.M)
    assert re.search(r"^text → image\s+queries", text, re.M)
    for kind in ("image", "text"):
        found = json.loads((run / "evaluation" / f"{kind}-retrieval-query.json").read_text(encoding="utf-8"))
        part = found["query_candidates"]
        assert (part["kind"], part["queries"], part["gallery"]) == (f"{kind}-image", 4, 60)
        assert part["P@50"]["chance"] == 0.5
        assert re.fullmatch(r"[0-9a-f]{16}\+[0-9a-f]{16}", found["queries_digest"])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Queries against 60 candidates, image → image" in page
    assert "Queries against 60 candidates, text → image" in page
