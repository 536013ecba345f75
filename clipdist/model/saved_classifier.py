"""A finished classifier as a folder: what decides its answers, and what they mean, in one place.

model.json            configuration of the model, preprocessing, temperature, data set
model.safetensors     weights
labels.json           class number -> name, and what else its samples agree on
scores.json           what it reached, on which data
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from clipdist.data.labels import Labels
from clipdist.model.build import rebuild_classifier
from clipdist.model.classifier import Classifier, ClassifyConfig
from clipdist.model.dual_encoder import ModelConfig
from clipdist.model.saved import ImageLike, Saved, likeliest, save_folder

LABELS = "labels.json"


def save_classifier(
    folder: Path,
    model: Classifier,
    labels: Labels,
    config: ClassifyConfig,
    *,
    scores: dict[str, Any],
    about: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """As `save_model`. The temperature is that of the calibration in `scores["val"]`; 1 without one."""
    calibration = scores.get("val", {}).get("calibration", {})
    temperature = {
        "value": calibration.get("divided_by", 1.0),
        "fitted_on": calibration.get("fitted_on"),
        "at_bound": calibration.get("at_bound", False),
    }
    settings = {"image": asdict(model.config.image), "init": model.config.init}
    body = {
        "objective": "classify",
        "model": settings,
        "classify": asdict(config),
        "temperature": temperature,
        "about": about,
    }
    save_folder(folder, model, body, scores, weights, lambda partial: labels.save(partial / LABELS))


def rebuild_saved(
    folder: Path, body: dict[str, Any], scores: dict[str, Any], device: torch.device, digest: str
) -> "SavedClassifier":
    """`load` calls it, and turns what goes wrong into its errors."""
    config = TypeAdapter(ModelConfig).validate_python(body["model"])
    classify = TypeAdapter(ClassifyConfig).validate_python(body["classify"])
    labels = Labels.load(folder / LABELS)
    model = rebuild_classifier(config, classify, len(labels))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return SavedClassifier(model.to(device).eval(), labels, body["temperature"], body["about"], scores, device, digest)


class SavedClassifier(Saved):
    """A trained classifier with its own preprocessing, labels and temperature, as `clipdist.load` gives it.

    `scores` (what it reached, on which data) and `about` (what it was trained on) are what training wrote down;
    `digest` is the xxh3-64 of its weights' file; `labels` are its classes with what else is known of them. Suffixes of
    shapes: N images, K classes, C = `width`.
    """

    model: Classifier

    def __init__(
        self,
        model: Classifier,
        labels: Labels,
        temperature: dict[str, Any],
        about: dict[str, Any],
        scores: dict[str, Any],
        device: torch.device,
        digest: str = "",
    ) -> None:
        super().__init__(model, about, scores, device, digest)
        self.labels, self._temperature = labels, temperature

    @property
    def names(self) -> list[str]:
        """The classes' names; `names[k]` belongs to column k of `predict_proba`."""
        return list(self.labels.names)

    @property
    def temperature(self) -> float:
        """What logits are divided by before the softmax; 1 where none could be fitted."""
        return float(self._temperature["value"])

    @property
    def fitted_on(self) -> str | None:
        """The split that the temperature was fitted on; None without one."""
        found: str | None = self._temperature["fitted_on"]
        return found

    @property
    def at_bound(self) -> bool:
        """Whether no temperature could be fitted there."""
        return bool(self._temperature["at_bound"])

    @property
    def width(self) -> int:
        """Width of the tower's features."""
        return self.model.image.width

    def predict_proba(self, images: Iterable[ImageLike], micro_batch: int = 64) -> np.ndarray:
        """float32 [N, K]: each image's probability of each class, in the order of `names`; rows sum to 1.

        Images as for `SavedModel.encode_image`. Raises `UserError` for the first that cannot be read.
        """
        logits_NK = self._each(self.model.logits, images, micro_batch, len(self.labels))
        return torch.softmax(torch.from_numpy(logits_NK) / self.temperature, dim=1).numpy()

    def classify(
        self, images: Iterable[ImageLike], top: int = 5, micro_batch: int = 64
    ) -> list[list[tuple[str, float]]]:
        """For each image its `top` likeliest classes, (name, probability), the likeliest first."""
        return likeliest(self.predict_proba(images, micro_batch), self.names, top)

    def encode_image(self, images: Iterable[ImageLike], micro_batch: int = 64) -> np.ndarray:
        """float32 [N, C] unit vectors: what the image tower gives before the head; images as for `predict_proba`."""
        return self._each(self.model.encode_image, images, micro_batch, self.width)
