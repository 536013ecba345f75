"""Small pictures for tests."""

import io
from typing import Any

import numpy as np
from PIL import Image


def picture(number: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """Random blocks of colour, in pixels (width, height)."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **parameters: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **parameters)
    return buffer.getvalue()
