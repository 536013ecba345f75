"""A picture -> the square of pixels that the model was trained and measured on. Needs Pillow and NumPy alone.

This file travels with an exported model.
"""

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps

SAME = 3
"""Colour profiles that move no colour of a coarse grid by more grey levels than this are sRGB under another name."""
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


def square(image: Image.Image, side: int, resize: str) -> np.ndarray:
    """uint8 [side, side, 3]: upright, on white where it is transparent, resized by an antialiased bicubic filter.

    `resize` says what becomes of a picture that is not square: `crop` cuts its middle out, `squash` distorts it, `pad`
    fills up with white. Raises `ValueError` for greys of more than 8 bits, which have to be scaled first.
    """
    image = in_srgb(ImageOps.exif_transpose(image))
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


def in_srgb(image: Image.Image) -> Image.Image:
    """8 bits of RGB: on white where it is transparent, colours as a profile in the file describes them."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"found a picture of mode {image.mode}, expected 8 bits: scale its greys to 0..255 first")
    profile = image.info.get("icc_profile", b"")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        grey = image.mode in ("LA", "La", "L", "1")
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L" if grey else "RGB")
    if image.mode not in SPACES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = _to_srgb(profile, image.mode) if profile else None
    return image.convert("RGB") if transform is None else ImageCms.applyTransform(image, transform) or image


def _to_srgb(profile: bytes, mode: str) -> "ImageCms.ImageCmsTransform | None":
    """None where it changes nothing, or is damaged or of another kind of picture, and so is left aside."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != SPACES[mode]:
            return None
        intent = ImageCms.Intent.PERCEPTUAL if mode == "CMYK" else ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 18).astype(np.uint8)
    colours = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
    grid = Image.fromarray(colours)
    moved = np.asarray(ImageCms.applyTransform(grid, transform), np.int16) - np.asarray(grid.convert("RGB"), np.int16)
    return None if np.abs(moved).max() <= SAME else transform
