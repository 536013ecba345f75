"""What a classifier answers on a split, and how good its answers and their probabilities are.

N = images, K = classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from clipdist import world
from clipdist.data.evaluation import EvalPiece
from clipdist.data.labels import Labels
from clipdist.data.shards import Split
from clipdist.errors import UserError
from clipdist.evaluate.calibration import calibrated, calibration_scores, ends_at_bound, fit_temperature
from clipdist.evaluate.classification import classification_scores, confused_classes, log_softmax
from clipdist.evaluate.embed import encode_all, reading, warn_of_bad
from clipdist.evaluate.estimates import Measured
from clipdist.model.classifier import Classifier

MOST_IN_MATRIX = 200
"""Classes of which a confusion matrix is kept; of more, the pairs that are confused most."""


@dataclass
class Predictions:
    """A split's logits, in the split's order."""

    logits_NK: np.ndarray  # float32
    numbers_N: np.ndarray  # int64: the images' sample numbers in the split
    keys: list[str]
    fields: list[dict[str, Any]]
    bad: list[tuple[int, str, str]]  # number, key and reason of each unreadable sample


@torch.no_grad()
def predict_split(
    model: Classifier,
    split: Split,
    *,
    workers: int = 0,
    precision: torch.dtype = torch.float32,
    max_image_pixels: int = 50_000_000,
    quiet: bool = False,
    in_step: bool = False,
) -> Predictions:
    """The logits of every readable sample exactly once, as `embed_split` gives features."""
    device = next(model.parameters()).device
    numbers: list[int] = []
    samples: list[tuple[str, dict[str, Any]]] = []
    bad: list[tuple[int, str, str]] = []

    def images(pieces: Iterator[EvalPiece]) -> Iterator[torch.Tensor]:
        for piece in pieces:
            bad.extend(piece.bad)
            if piece.numbers:
                numbers.extend(piece.numbers)
                samples.extend((sample.key, sample.fields) for sample in piece.samples)
                yield piece.images_n3HW

    blank = model.example(1, 0)[0]
    with reading(
        model,
        split,
        None,
        workers=workers,
        precision=precision,
        max_image_pixels=max_image_pixels,
        quiet=quiet,
        description=f"classifying {split.name}",
    ) as pieces:
        made = encode_all(lambda pixels: model.logits(pixels.to(device)), images(pieces), blank, device, in_step)
    K = model.head.out_features
    logits = torch.cat(made).float().numpy() if made else np.zeros((0, K), np.float32)
    parts = world.gather_objects((logits, numbers, samples, bad))
    found = Predictions(
        np.concatenate([part[0] for part in parts]).reshape(-1, K),
        np.array([number for part in parts for number in part[1]], np.int64),
        [key for part in parts for key, _ in part[2]],
        [fields for part in parts for _, fields in part[2]],
        [record for part in parts for record in part[3]],
    )
    warn_of_bad(split, found.bad)
    if not found.keys:
        raise UserError(f"{split.folder}, split {split.name}: no readable sample; run: clipdist verify {split.folder}")
    return found


@dataclass(frozen=True)
class Temperature:
    """What logits are divided by before the softmax."""

    value: float
    fitted_on: str | None
    at_bound: bool
    """Whether none could be fitted, so that it is 1."""


class Classified:
    """Answers beside the truth: `label_N` holds the class of each row, negative for one without."""

    def __init__(
        self,
        logits_NK: np.ndarray,
        label_N: np.ndarray,
        labels: Labels,
        *,
        units: Sequence[Any] | None = None,
        bootstrap: int = 1000,
        seed: int = 0,
        left_out: dict[str, int] | None = None,
    ) -> None:
        self.logits_NK, self.label_N, self.labels, self.left_out = logits_NK, label_N, labels, left_out or {}
        self.how: dict[str, Any] = {"units": units, "bootstrap": bootstrap, "seed": seed}
        self.scores = classification_scores(logits_NK, label_N, labels.names, **self.how)

    @property
    def measured(self) -> dict[str, Measured]:
        return {"classification": self.scores.measured}

    @cached_property
    def confidence_N(self) -> np.ndarray:
        """float64 [N]: the probability of the class decided on, as trained."""
        return np.exp(log_softmax(self.logits_NK).max(axis=1))

    @cached_property
    def confused(self) -> list[dict[str, Any]]:
        """The pairs of classes that are mistaken most."""
        return confused_classes(self.scores)

    def probabilities(self, temperature: Temperature) -> np.ndarray:
        """float64 [N, K]"""
        return np.exp(log_softmax(self.logits_NK / temperature.value))

    def values(self) -> dict[str, float]:
        """As a validation logs them; the loss is without label smoothing."""
        as_trained = calibration_scores(self.logits_NK, self.label_N, **self.how)
        names = {"top-1": "top1", "top-5": "top5"}
        found = {f"val/{names.get(name, name)}": one.value for name, one in self.scores.scores.items()}
        loss, ece, images = as_trained.nll.value, as_trained.ece.value, float(self.scores.rows)
        return {"val/loss": loss, **found, "val/ece": ece, "val/images": images}

    def fitted(self, split: str) -> Temperature:
        """Of these rows, those of `split`. Where the likelihood has no maximum it is 1: the bound would make every
        probability 1, or all of them equal."""
        T = fit_temperature(self.logits_NK, self.label_N)
        at_bound = ends_at_bound(T)
        return Temperature(1.0 if at_bound else T, split, at_bound)

    def calibration(self, temperature: Temperature) -> tuple[dict[str, Any], str]:
        """As JSON and as a table: the probabilities as trained, and with the temperature."""
        return calibrated(
            self.logits_NK,
            self.label_N,
            temperature.value,
            fitted_on=temperature.fitted_on,
            at_bound=temperature.at_bound,
            **self.how,
        )

    def classification(self) -> dict[str, Any]:
        body = self.scores.to_dict()
        if len(self.labels) > MOST_IN_MATRIX:
            del body["confusion"]
        return {**body, "field": self.labels.field, "confused": self.confused, "left_out": self.left_out}

    def body(self, temperature: Temperature) -> dict[str, Any]:
        """What `scores.json` and the JSON of an evaluation hold."""
        return {"classification": self.classification(), "calibration": self.calibration(temperature)[0]}
