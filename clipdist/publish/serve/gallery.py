"""What the service needs of a gallery of embeddings, and the opening of one."""

import threading
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
    def record(self, row: int) -> dict[str, Any]: ...
    def thumbnail(self, row: int, side: int) -> Image.Image: ...
    def search(self, query_QD: np.ndarray, top: int = 10) -> list[list[Any]]: ...


class Shared:
    """A gallery that several threads use: one at a time, since it reads one file and keeps what it read."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery, self._lock = gallery, threading.Lock()
        self.rows, self.width = gallery.rows, gallery.width

    def record(self, row: int) -> dict[str, Any]:
        with self._lock:
            return self._gallery.record(row)

    def thumbnail(self, row: int, side: int) -> Image.Image:
        with self._lock:
            return self._gallery.thumbnail(row, side)

    def search(self, query_QD: np.ndarray, top: int = 10) -> list[list[Any]]:
        with self._lock:
            return self._gallery.search(query_QD, top)


def open_gallery(folder: Path, saved: Any) -> Gallery:
    """Raises `UserError` when it is none, is half-written, or was made by another model."""
    import clipdist

    opened: Any = getattr(clipdist, "open_embeddings", None)
    if opened is None:
        raise UserError("--gallery: this version of clipdist cannot open embeddings")
    gallery = opened(folder)
    gallery.check_model(saved)
    if "image" not in getattr(gallery, "kinds", ["image"]):
        raise UserError(f"--gallery {folder}: no images were embedded in it; embed with images, or both")
    return Shared(gallery)
