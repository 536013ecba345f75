"""A saved model used from Python: classes by their names, and the weights by which it is known again."""

from pathlib import Path

import numpy as np
import pytest

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
    for wrong in ("square", ["square"], []):
        with pytest.raises(UserError, match="two or more different names"):
            saved.zero_shot(wrong)


@pytest.mark.parametrize("device", ["foo", "cuda"])
def test_a_device_that_cannot_be_used_is_named(device: str, trained_run: TrainedRun) -> None:
    with pytest.raises(UserError, match=f"device {device}: cannot be used"):
        load(trained_run.folder / "model", device)


def test_a_model_is_known_by_its_weights(trained_run: TrainedRun) -> None:
    folder = trained_run.folder / "model"
    assert load(folder, "cpu").digest == checksum_file(folder / "model.safetensors")
