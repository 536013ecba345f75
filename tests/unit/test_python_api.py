"""A saved model used from Python: classes by their names, and the weights by which it is known again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdist.data.shards import ShardSet, checksum_file
from clipdist.errors import UserError
from clipdist.model.saved import load, load_dual_encoder
from tests.conftest import SHAPES, TrainedRun


def test_a_dual_encoder_classifies_by_names(trained_run: TrainedRun, shapes: Path) -> None:
    saved = load_dual_encoder(trained_run.folder / "model", "cpu")
    split = ShardSet.open(shapes).split("val")
    images = [split.read(number).image for number in range(32)]
    classifier = saved.zero_shot({shape: [shape, f"{shape} shape"] for shape in SHAPES}, ["A red {} at the left."])
    probability_NK = classifier.predict_proba(images)
    assert probability_NK.dtype == np.float32
    # By the definition: prompts averaged as unit vectors, cosines over the temperature, a softmax.
    logits_NK = np.zeros((32, len(SHAPES)))
    for k, shape in enumerate(SHAPES):
        prompts_PD = saved.encode_text([f"A red {name} at the left." for name in (shape, f"{shape} shape")])
        mean_D = prompts_PD.mean(axis=0)
        logits_NK[:, k] = saved.encode_image(images) @ (mean_D / np.linalg.norm(mean_D)) / saved.temperature
    expected_NK = np.exp(logits_NK) / np.exp(logits_NK).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probability_NK, expected_NK, atol=1e-5)
    order_NK = np.argsort(-expected_NK, axis=1)
    for row, answers in enumerate(classifier.classify(images, top=2)):
        assert [name for name, _ in answers] == [SHAPES[k] for k in order_NK[row, :2]]
    cooler = saved.zero_shot(SHAPES, temperature=saved.temperature / 2)
    assert cooler.predict_proba(images).max(axis=1).mean() > saved.zero_shot(SHAPES).predict_proba(images).max(1).mean()
    for wrong in ("square", ["square"], [], ["square", "circle", "square"]):
        with pytest.raises(UserError, match="expected two or more names, each once"):
            saved.zero_shot(wrong)
    with pytest.raises(UserError, match="top: found 0"):
        classifier.classify(images, top=0)


def test_what_is_no_list_of_images_or_texts_is_named(trained_run: TrainedRun) -> None:
    saved = load_dual_encoder(trained_run.folder / "model", "cpu")
    for single in ("a.jpg", Path("a.jpg"), b"bytes", Image.new("RGB", (8, 8))):
        with pytest.raises(UserError, match="found a single one, expected a list"):
            saved.encode_image(single)  # type: ignore[arg-type]
    for text in ("\ud800", None):
        with pytest.raises(UserError, match="caption 1: found"):
            saved.encode_text(["a", text])  # type: ignore[list-item]
    for call in (saved.encode_image, saved.encode_text):
        with pytest.raises(UserError, match="micro_batch: found 0, expected 1 or more"):
            call([], micro_batch=0)


def test_the_preprocessing_is_the_one_that_the_model_was_trained_with(trained_run: TrainedRun, tmp_path: Path) -> None:
    """Not what the tower's library has by default: that may be another version of it."""
    folder = tmp_path / "model"
    shutil.copytree(trained_run.folder / "model", folder)
    body = json.loads((folder / "model.json").read_text())
    body["preprocessing"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "model.json").write_text(json.dumps(body))
    tower = load(folder, "cpu").model.image
    assert tower.mean == (0.1, 0.2, 0.3)
    assert tower._std.flatten().tolist() == pytest.approx([255 * 0.4, 255 * 0.5, 255 * 0.6])
    del body["preprocessing"]
    (folder / "model.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="damaged model"):
        load(folder, "cpu")


@pytest.mark.parametrize("device", ["foo", "cuda"])
def test_a_device_that_cannot_be_used_is_named(device: str, trained_run: TrainedRun) -> None:
    with pytest.raises(UserError, match=f"device {device}: cannot be used"):
        load(trained_run.folder / "model", device)


def test_a_model_is_known_by_its_weights(trained_run: TrainedRun) -> None:
    folder = trained_run.folder / "model"
    assert load(folder, "cpu").digest == checksum_file(folder / "model.safetensors")
