"""Queries with what the model answered, for a report: drawn at random, or the worst of all, and never mixed."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from clipdist.evaluate.cosines import Array, top_matches
from clipdist.evaluate.retrieval import RetrievalScores

if TYPE_CHECKING:
    from clipdist.data.shards import Split
    from clipdist.evaluate.embed import Embeddings


class Look(NamedTuple):
    """What the tower sees of an image, coloured by what speaks for something (`relevance.overlay`)."""

    speaks_for: str
    picture: Image.Image


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
    looks: Sequence[Look] = ()


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
    looks: Sequence[Look] = ()


@dataclass(frozen=True)
class Gallery:
    """Images and texts with their features and `scores`. Text j belongs to image `text_owner_M[j]`; images of equal
    `group_N` are each other's right answers. `load_image(i)` gives the encoded file of image i; only the images shown
    are loaded."""

    image_features_ND: Array
    text_features_MD: Array
    text_owner_M: np.ndarray
    scores: RetrievalScores
    texts: Sequence[str]
    keys: Sequence[str]
    load_image: Callable[[int], bytes]
    group_N: np.ndarray | None = None

    @staticmethod
    def of(embeddings: "Embeddings", scores: RetrievalScores, split: "Split", group_N: np.ndarray | None) -> "Gallery":
        """The gallery of an embedded split, whose images are read from it again."""
        return Gallery(
            embeddings.image_features_ND,
            embeddings.text_features_MD,
            embeddings.text_owner_M,
            scores,
            texts=embeddings.texts,
            keys=embeddings.keys,
            load_image=lambda row: split.read(int(embeddings.numbers_N[row])).image,
            group_N=group_N,
        )

    def draw(
        self, images: int = 20, captions: int = 8, top: int = 5, seed: int = 0
    ) -> tuple[list[Example], list[CaptionExample]]:
        """`images` images and `captions` texts drawn uniformly without replacement, in the order of the gallery.

        Images without a text are not drawn, since no answer to them could be right.
        """
        rng = np.random.default_rng(seed)
        asked_N = np.flatnonzero(self.scores.image_to_text.ranks_Q)
        drawn_images = np.sort(rng.choice(asked_N, min(images, len(asked_N)), replace=False))
        texts = len(self.text_owner_M)
        drawn_texts = np.sort(rng.choice(texts, min(captions, texts), replace=False))
        return self._images(drawn_images, top), self._captions(drawn_texts, top)

    def worst(self, images: int = 6, top: int = 5) -> list[Example]:
        """The images whose best right text ranks lowest, the lowest first; only such as have a wrong text before it."""
        ranks_N = self.scores.image_to_text.ranks_Q
        lowest = np.argsort(-ranks_N, kind="stable")[:images]
        return self._images(lowest[ranks_N[lowest] > 1], top)

    @property
    def _groups(self) -> np.ndarray:
        return np.arange(len(self.keys)) if self.group_N is None else self.group_N

    def _images(self, rows: np.ndarray, top: int) -> list[Example]:
        shown, owner_M, group, texts = [], self.text_owner_M, self._groups, self.texts
        if not len(rows):
            return []
        cosines, found = top_matches(self.image_features_ND[rows], self.text_features_MD, top)
        for i, row, matches in zip(rows.tolist(), cosines.tolist(), found.tolist(), strict=True):
            ranked = [(c, texts[j], bool(group[owner_M[j]] == group[i])) for c, j in zip(row, matches, strict=True)]
            own = [texts[j] for j in np.flatnonzero(owner_M == i).tolist()]
            own = own or [texts[j] for j in np.flatnonzero(group[owner_M] == group[i])[:1].tolist()]
            rank = int(self.scores.image_to_text.ranks_Q[i])
            shown.append(Example(self.load_image(i), self.keys[i], own, ranked, rank))
        return shown

    def _captions(self, rows: np.ndarray, top: int) -> list[CaptionExample]:
        shown, owner_M, group = [], self.text_owner_M, self._groups
        cosines, found = top_matches(self.text_features_MD[rows], self.image_features_ND, top)
        for j, row, matches in zip(rows.tolist(), cosines.tolist(), found.tolist(), strict=True):
            right = [bool(group[i] == group[owner_M[j]]) for i in matches]
            pictures = [(c, self.load_image(i), is_right) for c, i, is_right in zip(row, matches, right, strict=True)]
            rank = int(self.scores.text_to_image.ranks_Q[j])
            shown.append(CaptionExample(self.texts[j], self.keys[owner_M[j]], pictures, rank))
        return shown


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
    return picture_uri(flat)


def picture_uri(picture: Image.Image) -> str:
    """A JPEG of an RGB picture as a data URI."""
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def look_uris(looks: Sequence[Look], side: int) -> list[dict[str, str]]:
    """What each speaks for, and its picture as a JPEG of at most `side` pixels."""
    found = []
    for look in looks:
        small = look.picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        found.append({"speaks_for": look.speaks_for, "image": picture_uri(small)})
    return found
