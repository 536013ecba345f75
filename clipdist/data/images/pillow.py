"""Any format that Pillow reads -> 8-bit sRGB, by a full decode."""

import io
import math
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from clipdist.data.images.colour import to_srgb
from clipdist.data.shards import BadSample

# The limit is checked before decoding, by `check_pixels`; Pillow's own would only warn at first.
Image.MAX_IMAGE_PIXELS = None

_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE, _MAX_SAMPLE_ANY = 258, 262, 281, 341
_WHITE_IS_ZERO = 0

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Opens an image without decoding it; `BadSample` when it is none, or has more than `max_pixels`."""
    if not data:
        raise BadSample("unreadable image: empty")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # its message names an address in memory
        raise BadSample("unreadable image: no format that Pillow knows") from None
    except Exception as error:  # Pillow raises many kinds, depending on the format
        raise BadSample(f"unreadable image: {one_line(error)}") from None
    check_pixels(*image.size, max_pixels)
    return image


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raises `BadSample` for an image of more than `max_pixels`."""
    if width * height > max_pixels:
        raise BadSample(f"image of {width}×{height} pixels, more than data.max_image_pixels={max_pixels}")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, that is still to be applied; 1 where there is none, or none that can be read."""
    if image.format == "TIFF":  # Pillow turns these when it decodes them
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except OSError as error:  # a PNG's EXIF block may follow its pixels, which are then decoded
        raise BadSample(f"unreadable image: {one_line(error)}") from None
    except Exception:  # damaged metadata of a picture that may be sound
        return 1
    return value if value in range(1, 9) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes to 8-bit sRGB, upright: EXIF orientation applied, transparency on white, wider samples scaled, not
    clipped; of an animation the first frame."""
    stored = stored_rgb(image)
    turn = _TURNS.get(orientation_of(image))
    return stored if turn is None else stored.transpose(turn)


def stored_rgb(image: Image.Image) -> Image.Image:
    """As `to_rgb`, but as stored: without the turn that EXIF asks for."""
    try:
        image.load()
        if image.mode == "F" or image.mode.startswith("I"):
            return to_srgb(Image.fromarray(_to_8_bits(image)), image.info.get("icc_profile", b""))
        profile = image.info.get("icc_profile", b"")
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = _on_white(image)
        if image.mode not in ("L", "RGB", "CMYK"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        return to_srgb(image, profile)
    except Exception as error:
        raise BadSample(f"unreadable image: {one_line(error)}") from None


def _on_white(image: Image.Image) -> Image.Image:
    grey = image.mode in ("LA", "La", "L", "1")
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("L" if grey else "RGB")


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """uint8 [h, w] of 16-bit, 32-bit and floating-point greys.

    White is the largest sample that a TIFF says it has, by MaxSampleValue or its bits per sample; without that,
    65535 for whole numbers. Floats of 0 to 1 are stretched to 0 to 255. What other floats mean is not written
    anywhere: their smallest becomes black and their largest white.
    """
    values = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})
    black, white = 0.0, _largest_sample(tags, image.mode)
    if image.mode == "F":
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        if low >= 0 and high <= 1:
            white = 1.0
        elif white is None:
            black, white = low, high
        values = np.nan_to_num(values, nan=black)
    elif white is None:
        white = 65535.0
    # float64: 32-bit integers are not all float32.
    scaled = (np.clip(values.astype(np.float64), black, white) - black) * (255 / ((white - black) or 1))
    greys = np.rint(scaled).astype(np.uint8)
    return 255 - greys if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else greys


def _largest_sample(tags: Any, mode: str) -> float | None:
    for tag in (_MAX_SAMPLE, _MAX_SAMPLE_ANY):
        value = tags.get(tag)
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, int | float) and math.isfinite(value) and value > 0:
            return float(value)
    bits = tags.get(_BITS_PER_SAMPLE)
    bits = bits[0] if isinstance(bits, tuple) and bits else bits
    # 32-bit integers hardly ever use their range; they are taken for 16-bit ones in wide words.
    return float((1 << bits) - 1) if mode.startswith("I;16") and isinstance(bits, int) and 8 < bits < 16 else None
