"""Queries with what the model answered, drawn at random for a report: never picked by how well they went."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from clipdist.evaluate.cosines import Array, top_matches
from clipdist.evaluate.retrieval import RetrievalScores


@dataclass(frozen=True)
class Example:
    """An image (bytes of a file that Pillow reads), its own texts, and the texts ranked for it, best first.

    `ranked` holds (cosine, text, whether it is right); `rank` is that of the best right text in the whole gallery.
    """

    image: bytes
    key: str
    true_texts: Sequence[str]
    ranked: Sequence[tuple[float, str, bool]]
    rank: int


@dataclass(frozen=True)
class CaptionExample:
    """A text and the images ranked for it, best first: (cosine, bytes of the image file, whether it is right)."""

    text: str
    key: str
    ranked: Sequence[tuple[float, bytes, bool]]
    rank: int


@dataclass(frozen=True)
class Mistake:
    """An image that a classifier is wrong about: its class, the one that was given, and the probabilities of both."""

    image: bytes
    key: str
    label: str
    given: str
    probability: float
    of_the_label: float


def draw_examples(
    image_features_ND: Array,
    text_features_MD: Array,
    text_owner_M: Sequence[int] | np.ndarray,
    scores: RetrievalScores,
    *,
    texts: Sequence[str],
    keys: Sequence[str],
    load_image: Callable[[int], bytes],
    group_N: Sequence[int] | np.ndarray | None = None,
    images: int = 20,
    captions: int = 8,
    top: int = 5,
    seed: int = 0,
) -> tuple[list[Example], list[CaptionExample]]:
    """`images` images and `captions` texts drawn uniformly without replacement, in the order of the gallery.

    `scores` are those of the same features. `load_image(i)` gives the encoded file of image i; only the images shown
    are loaded. Images without a text are not drawn, since no answer to them could be right.
    """
    owner_M = np.asarray(text_owner_M)
    group = np.arange(len(keys)) if group_N is None else np.asarray(group_N)
    rng = np.random.default_rng(seed)
    asked_N = np.flatnonzero(scores.image_to_text.ranks_Q)
    drawn_images = np.sort(rng.choice(asked_N, min(images, len(asked_N)), replace=False))
    drawn_texts = np.sort(rng.choice(len(owner_M), min(captions, len(owner_M)), replace=False))
    shown, shown_texts = [], []
    cosines, found = top_matches(image_features_ND[drawn_images], text_features_MD, top)
    for i, row, matches in zip(drawn_images.tolist(), cosines.tolist(), found.tolist(), strict=True):
        ranked = [(c, texts[j], bool(group[owner_M[j]] == group[i])) for c, j in zip(row, matches, strict=True)]
        own = [texts[j] for j in np.flatnonzero(owner_M == i).tolist()]
        own = own or [texts[j] for j in np.flatnonzero(group[owner_M] == group[i])[:1].tolist()]
        shown.append(Example(load_image(i), keys[i], own, ranked, int(scores.image_to_text.ranks_Q[i])))
    cosines, found = top_matches(text_features_MD[drawn_texts], image_features_ND, top)
    for j, row, matches in zip(drawn_texts.tolist(), cosines.tolist(), found.tolist(), strict=True):
        right = [bool(group[i] == group[owner_M[j]]) for i in matches]
        pictures = [(c, load_image(i), is_right) for c, i, is_right in zip(row, matches, right, strict=True)]
        shown_texts.append(CaptionExample(texts[j], keys[owner_M[j]], pictures, int(scores.text_to_image.ranks_Q[j])))
    return shown, shown_texts


def thumbnail_uri(image: bytes, side: int) -> str | None:
    """A JPEG of at most `side` pixels as a data URI, upright, on white; None when the bytes cannot be decoded."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            opened.draft("RGB", (side, side))
            picture: Any = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):
                # 16-bit greys: converting to RGB would clip them instead of scaling.
                greys = np.asarray(picture, dtype=np.float64)
                picture = Image.fromarray((255 * (greys / max(greys.max(), 1.0))).astype(np.uint8))
            picture = picture.convert("RGBA")
            picture.thumbnail((side, side), Image.Resampling.LANCZOS)
            flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    file = io.BytesIO()
    flat.save(file, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
