"""A dual encoder as a classifier of images: classes are prompts, embedded once.

Suffixes of names: N images, K classes, D width of the joint embedding.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from clipdist.errors import UserError
from clipdist.evaluate.classification import log_softmax
from clipdist.evaluate.zero_shot import TEMPLATES, class_features, class_logits
from clipdist.model.saved import ImageLike, SavedModel, likeliest

Classes = Sequence[str] | Mapping[str, str | Sequence[str]]


class ZeroShotClassifier:
    """A dual encoder's answers about a fixed list of classes; made by `SavedModel.zero_shot`.

    `names[k]` is what class k is called, `class_features_KD` (float32 unit vectors) where its prompts lie;
    `temperature` is what cosines are divided by. The probabilities are shares among the classes given: they say nothing
    of what is none of them.
    """

    def __init__(
        self, saved: SavedModel, classes: Classes, templates: Sequence[str] = (), temperature: float | None = None
    ) -> None:
        named = dict(classes) if isinstance(classes, Mapping) else {name: name for name in classes}
        if isinstance(classes, str) or len(named) < max(2, len(classes)):
            raise UserError(f"zero-shot classes: found {classes!r}, expected two or more names, each once")
        if temperature is not None and not temperature > 0:
            raise UserError(f"temperature: found {temperature}, expected a number above 0")
        prompts = [[words] if isinstance(words, str) else list(words) for words in named.values()]
        self.saved, self.names = saved, list(named)
        self.temperature = saved.temperature if temperature is None else temperature
        self.class_features_KD = class_features(saved.encode_text, prompts, list(templates) or TEMPLATES)

    def probabilities(self, image_features_ND: np.ndarray) -> np.ndarray:
        """float32 [N, K], as `predict_proba`, of images that are embedded already; features [N, D] of any length."""
        if not len(image_features_ND):
            return np.zeros((0, len(self.names)), np.float32)
        logits_NK = class_logits(image_features_ND, self.class_features_KD, 1 / self.temperature)
        return np.exp(log_softmax(logits_NK)).astype(np.float32)

    def predict_proba(self, images: Iterable[ImageLike], micro_batch: int = 64) -> np.ndarray:
        """float32 [N, K]: the softmax, over the classes, of cosine / temperature, in the order of `names`.

        Images as for `SavedModel.encode_image`. Raises `UserError` for the first that cannot be read.
        """
        return self.probabilities(self.saved.encode_image(images, micro_batch))

    def classify(
        self, images: Iterable[ImageLike], top: int = 5, micro_batch: int = 64
    ) -> list[list[tuple[str, float]]]:
        """For each image its `top` likeliest classes, (name, probability), the likeliest first."""
        return likeliest(self.predict_proba(images, micro_batch), self.names, top)
