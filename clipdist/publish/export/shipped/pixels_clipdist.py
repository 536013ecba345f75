"""A picture -> the square of pixels that the model was trained and measured on. Needs Pillow and NumPy alone.

This file travels with an exported model.
"""

import numpy as np
from PIL import Image, ImageOps


def square(image: Image.Image, side: int, resize: str) -> np.ndarray:
    """uint8 [side, side, 3]: upright, on white where it is transparent, resized by an antialiased bicubic filter.

    `resize` says what becomes of a picture that is not square: `crop` cuts its middle out, `squash` distorts it, `pad`
    fills up with white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    width, height = image.size
    if resize == "pad":
        longer = max(width, height)
        size = max(1, round(width / longer * side)), max(1, round(height / longer * side))
        padded = Image.new("RGB", (side, side), "white")
        place = round((side - size[0]) / 2), round((side - size[1]) / 2)
        padded.paste(image.resize(size, Image.Resampling.BICUBIC), place)
        return np.asarray(padded)
    if resize not in ("crop", "squash"):
        raise ValueError(f"resize: found {resize!r}, expected crop, squash or pad")
    excess = abs(width - height) / 2 if resize == "crop" else 0.0
    left, top = (excess, 0.0) if width > height else (0.0, excess)
    box = (left, top, width - left, height - top)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))
