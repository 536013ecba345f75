"""Colours as an ICC profile describes them -> sRGB."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# Profiles that change no colour of a coarse grid by more than this, in grey levels of 255, are sRGB under another name.
_SAME = 3
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An L, RGB or CMYK image in sRGB, of mode RGB. A profile that is damaged, or one for another kind of image, is
    ignored, as viewers do."""
    transform = srgb_transform(profile, image.mode) if profile else None
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    return ImageCms.applyTransform(image, transform) or image


@lru_cache(maxsize=16)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion to sRGB of images of a mode; None when it changes nothing, or the profile is of no use."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC if mode != "CMYK" else ImageCms.Intent.PERCEPTUAL
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    grid = Image.fromarray(_grid(mode))
    seen = ImageCms.applyTransform(grid, transform)
    change = np.abs(np.asarray(seen, np.int16) - np.asarray(grid.convert("RGB"), np.int16)).max()
    return None if change <= _SAME else transform


def _grid(mode: str) -> np.ndarray:
    levels = np.linspace(0, 255, 18).astype(np.uint8)
    if mode == "L":
        return levels[None]
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
