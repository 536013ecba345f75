"""What the service needs of a gallery of embeddings, and the opening of one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from clipdist.errors import UserError


class Hit(Protocol):
    @property
    def row(self) -> int: ...
    @property
    def score(self) -> float: ...
    @property
    def key(self) -> str: ...
    @property
    def texts(self) -> Sequence[str]: ...


class Gallery(Protocol):
    """Images embedded before, by the model that is served."""

    @property
    def rows(self) -> int: ...
    @property
    def width(self) -> int: ...
    def check_model(self, saved: Any) -> None: ...
    def record(self, row: int) -> dict[str, Any]: ...
    def thumbnail(self, row: int, side: int) -> Image.Image: ...
    def search(self, query_QD: np.ndarray, top: int = 10) -> list[list[Any]]: ...


def open_gallery(folder: Path, saved: Any) -> Gallery:
    """Raises `UserError` when it is none, is half-written, or was made by another model."""
    import clipdist

    opened = getattr(clipdist, "open_embeddings", None)
    if opened is None:
        raise UserError("--gallery: this version of clipdist cannot open embeddings")
    gallery: Gallery = opened(folder)
    gallery.check_model(saved)
    return gallery
