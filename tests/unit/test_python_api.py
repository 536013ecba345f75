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
    samples = [ShardSet.open(shapes).split("val").read(number) for number in range(32)]
    images, labels = [sample.image for sample in samples], [sample.fields["label"] for sample in samples]
    classifier = saved.zero_shot({shape: [shape, f"{shape} shape"] for shape in SHAPES}, ["A red {} at the left."])
    probability_NK = classifier.predict_proba(images)
    assert probability_NK.dtype == np.float32
    assert probability_NK.shape == (32, len(SHAPES))
    np.testing.assert_allclose(probability_NK.sum(axis=1), 1, atol=1e-5)
    best = [answers[0][0] for answers in classifier.classify(images, top=2)]
    assert np.mean([found == label for found, label in zip(best, labels, strict=True)]) > 1.5 / len(SHAPES)
    cooler = saved.zero_shot(SHAPES, temperature=saved.temperature / 2)
    assert cooler.predict_proba(images).max(axis=1).mean() > saved.zero_shot(SHAPES).predict_proba(images).max(1).mean()
    for wrong in ("square", ["square"], []):
        with pytest.raises(UserError, match="two or more different names"):
            saved.zero_shot(wrong)


def test_a_model_is_known_by_its_weights(trained_run: TrainedRun) -> None:
    folder = trained_run.folder / "model"
    assert load(folder, "cpu").digest == checksum_file(folder / "model.safetensors")
