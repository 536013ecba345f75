"""What is computed for a request, by the thread that owns the model. Knows nothing of HTTP.

Suffixes of names: n images of one pass, D width of the embedding, K classes, C captions.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clipdist.errors import UserError
from clipdist.evaluate.classification import log_softmax
from clipdist.evaluate.zero_shot import TEMPLATES, class_features, class_logits
from clipdist.model.saved import SavedModel
from clipdist.model.saved_classifier import SavedClassifier
from clipdist.publish.serve.gallery import Gallery

TOP_CAPTIONS = 5
IMAGES, TEXTS, CALLS = "images", "texts", "calls"


@dataclass(frozen=True)
class Look:
    """An image to be embedded: uint8 [3, side, side], and how many neighbours in the gallery are wanted."""

    pixels_3SS: torch.Tensor
    neighbours: int


@dataclass(frozen=True)
class Seen:
    """What became of it. `probability_K` is None where no classes were named."""

    features_D: np.ndarray
    probability_K: np.ndarray | None
    captions: list[tuple[str, float]]
    hits: list[Any]


class Engine:
    """A model with the classes, captions and gallery that it is asked about.

    `names` are the classes' names, `prompts` (of a dual encoder) the names that stand in their prompts. Cosines are
    divided by `temperature`; of a classifier, logits are. Raises `UserError` for what does not fit together.
    """

    def __init__(
        self,
        saved: SavedModel | SavedClassifier,
        *,
        prompts: Sequence[Sequence[str]] = (),
        templates: Sequence[str] = (),
        temperature: float | None = None,
        captions: Sequence[str] = (),
        gallery: Gallery | None = None,
    ) -> None:
        self.saved, self.gallery, self.captions = saved, gallery, list(captions)
        self.templates = list(templates) or list(TEMPLATES)
        self.temperature = saved.temperature if temperature is None else temperature
        if not self.temperature > 0:
            raise UserError(f"temperature: found {self.temperature}, expected a number above 0")
        self.texts = isinstance(saved, SavedModel)
        if not self.texts and (prompts or captions):
            raise UserError("found a classifier, which has its own classes and knows no texts")
        if gallery is not None and gallery.width != saved.width:
            raise UserError(f"gallery: found embeddings of width {gallery.width}, expected {saved.width}")
        self._class_features_KD = self.class_features(prompts) if prompts else None
        self._caption_features_CD = self._encode_texts(self.captions) if captions else None

    @property
    def side(self) -> int:
        return int(self.saved.model.image.side)

    def compute(self, kind: Hashable, items: Sequence[Any]) -> Sequence[Any]:
        """`Batcher` calls it: images are `Look`s and become `Seen`; texts become a list of hits in the gallery for
        each (text, top); calls are functions without arguments."""
        if kind == IMAGES:
            return self._look(items)
        if kind == TEXTS:
            return self._find(items)
        return [call() for call in items]

    def class_features(self, prompts: Sequence[Sequence[str]]) -> np.ndarray:
        """float32 [K, D]: where classes of these names lie. Dual encoders only."""
        return class_features(self._encode_texts, prompts, self.templates)

    def probabilities(self, features_D: np.ndarray, class_features_KD: np.ndarray) -> np.ndarray:
        """float32 [K], of an image that is embedded already."""
        logits_1K = class_logits(features_D[None], class_features_KD, 1 / self.temperature)
        return np.exp(log_softmax(logits_1K))[0].astype(np.float32)

    def _encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        assert isinstance(self.saved, SavedModel)
        return self.saved.encode_text(texts)

    @torch.inference_mode()
    def _look(self, looks: Sequence[Look]) -> list[Seen]:
        saved = self.saved
        pixels_n3SS = torch.stack([look.pixels_3SS for look in looks]).to(saved.device)
        probability_nK: np.ndarray | None = None
        if isinstance(saved, SavedClassifier):
            logits_nK = saved.model.logits(pixels_n3SS).cpu().numpy() / self.temperature
            probability_nK = np.exp(log_softmax(logits_nK)).astype(np.float32)
            # A second pass, which only a gallery needs.
            needed = self.gallery is not None and any(look.neighbours for look in looks)
            features_nD = saved.model.encode_image(pixels_n3SS).cpu().numpy() if needed else np.zeros((len(looks), 0))
        else:
            features_nD = saved.model.encode_image(pixels_n3SS).cpu().numpy()
            if self._class_features_KD is not None:
                logits_nK = class_logits(features_nD, self._class_features_KD, 1 / self.temperature)
                probability_nK = np.exp(log_softmax(logits_nK)).astype(np.float32)
        return [
            Seen(features_nD[n], None if probability_nK is None else probability_nK[n], captions, hits)
            for n, (captions, hits) in enumerate(
                zip(self._captions(features_nD), self._neighbours(looks, features_nD), strict=True)
            )
        ]

    def _captions(self, features_nD: np.ndarray) -> list[list[tuple[str, float]]]:
        if self._caption_features_CD is None:
            return [[] for _ in features_nD]
        cosine_nC = features_nD @ self._caption_features_CD.T
        best_nC = np.argsort(-cosine_nC, axis=1, kind="stable")[:, :TOP_CAPTIONS]
        return [
            [(self.captions[c], float(row[c])) for c in best]
            for row, best in zip(cosine_nC, best_nC.tolist(), strict=True)
        ]

    def _neighbours(self, looks: Sequence[Look], features_nD: np.ndarray) -> list[list[Any]]:
        found: list[list[Any]] = [[] for _ in looks]
        asking = [n for n, look in enumerate(looks) if look.neighbours]
        if self.gallery is not None and asking:
            top = max(looks[n].neighbours for n in asking)
            hits = self.gallery.search(np.ascontiguousarray(features_nD[asking], np.float32), top)
            for n, some in zip(asking, hits, strict=True):
                found[n] = some[: looks[n].neighbours]
        return found

    def _find(self, asked: Sequence[tuple[str, int]]) -> list[list[Any]]:
        assert self.gallery is not None
        features_nD = self._encode_texts([text for text, _ in asked])
        hits = self.gallery.search(features_nD, max(top for _, top in asked))
        return [some[:top] for some, (_, top) in zip(hits, asked, strict=True)]
