"""Encoded image bytes -> uint8 pixels at the model's side, as they are for evaluation, augmented for training.

The fast path decodes a JPEG at the smallest of 1, 1/2, 1/4 and 1/8 that leaves enough pixels, cuts whole pixels out
and resizes once with torch. The exact path decodes in full with Pillow and resizes the same cut with Pillow. What the
fast decoder does not read, or warns of, goes to Pillow: both paths accept the same files.
"""

import sys
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clipdist.data.images.augment import AugmentConfig, augment_in_place, draw_choices
from clipdist.data.images.colour import srgb_transform, to_srgb
from clipdist.data.images.geometry import (
    REDUCTIONS,
    Box,
    Crop,
    ResizeMode,
    place_crop,
    reduced,
    stored_box,
    upright,
    upright_size,
    whole_pixels,
)
from clipdist.data.images.header import JpegHeader, is_jpeg, read_header
from clipdist.data.images.jpeg import decode_reduced
from clipdist.data.images.pillow import check_pixels, open_image, orientation_of, stored_rgb
from clipdist.data.images.resize import fit, resize_box
from clipdist.data.shards import BadSample


@dataclass
class _Source:
    """An image of which only the header has been read. Sizes are as stored, in pixels."""

    data: bytes
    width: int
    height: int
    orientation: int
    max_pixels: int
    jpeg: JpegHeader | None
    image: Image.Image | None

    @property
    def upright_size(self) -> tuple[int, int]:
        return upright_size(self.width, self.height, self.orientation)

    def pixels(self, reduction: int, exact: bool) -> tuple[np.ndarray, int, bytes]:
        """(uint8 [h, w, 3] as stored, its reduction, the colour profile still to be applied)."""
        if self.jpeg and not exact:
            pixels = decode_reduced(self.data, self.jpeg, reduction)
            if pixels is not None:
                return pixels, reduction, self.jpeg.profile
        image = stored_rgb(self.image or open_image(self.data, self.max_pixels))
        if image.size != (self.width, self.height):
            raise BadSample(f"unreadable image: {self.width}×{self.height} and {image.size[0]}×{image.size[1]} pixels")
        return np.asarray(image), 1, b""

    def in_srgb(self, pixels: np.ndarray, profile: bytes) -> np.ndarray:
        grey = self.jpeg is not None and self.jpeg.components == 1
        if not profile or srgb_transform(profile, "L" if grey else "RGB") is None:
            return pixels
        return np.asarray(to_srgb(Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels), profile))


def _open(data: bytes, max_pixels: int) -> _Source:
    header = read_header(data) if is_jpeg(data) else None
    if header is not None:
        check_pixels(header.width, header.height, max_pixels)
        return _Source(data, header.width, header.height, header.orientation, max_pixels, header, None)
    image = open_image(data, max_pixels)
    return _Source(data, *image.size, orientation_of(image), max_pixels, None, image)


def image_size(data: bytes, max_pixels: int = sys.maxsize) -> tuple[int, int]:
    """(width, height) as displayed, with EXIF applied, from the header alone, but for a PNG: there EXIF may follow the
    pixels. `BadSample` when it cannot be read, and for more than `max_pixels`."""
    return _open(data, max_pixels).upright_size


def decode_rgb(
    data: bytes, max_pixels: int, *, at_least: tuple[int, int] | None = None, exact: bool = False
) -> np.ndarray:
    """The picture as displayed: uint8 [h, w, 3] sRGB, contiguous and writable.

    `at_least` (height, width) lets a JPEG be decoded at a fraction of its size that still covers it. Raises `BadSample`
    for what cannot be read and for more than `max_pixels`.
    """
    source = _open(data, max_pixels)
    reduction = 1
    if at_least is not None:
        width, height = source.upright_size
        covers = (r for r in REDUCTIONS if reduced(height, r) >= at_least[0] and reduced(width, r) >= at_least[1])
        reduction = next(covers, 1)
    pixels, _, profile = source.pixels(reduction, exact)
    pixels = upright(source.in_srgb(pixels, profile), source.orientation)
    # A mirrored axis of one pixel counts as contiguous, but torch refuses its negative stride.
    plain = pixels.flags.c_contiguous and pixels.flags.writeable and min(pixels.strides) > 0
    return pixels if plain else pixels.copy(order="C")


def load_for_training(
    data: bytes,
    side: int,
    mode: ResizeMode,
    max_pixels: int,
    augment: AugmentConfig,
    draw: np.random.Generator,
    *,
    exact: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Augmented pixels, uint8 [side, side, 3], written to `out` when given; every random choice comes from `draw`.

    All draws happen before decoding and always in the same number, so that no property of the image, and no
    shortcut of the decoder, changes which choices a sample gets. Raises `BadSample`.
    """
    choices = draw_choices(draw)
    source = _open(data, max_pixels)
    box = place_crop(*source.upright_size, mode, choices[:4], augment.crop_area, augment.crop_ratio)
    pixels = _render(source, box, side, mode, exact, out)
    return augment_in_place(pixels, choices, augment, source.orientation)


def load_for_evaluation(
    data: bytes, side: int, mode: ResizeMode, max_pixels: int, *, exact: bool = True, out: np.ndarray | None = None
) -> np.ndarray:
    """Pixels without any randomness, uint8 [side, side, 3], written to `out` when given. Raises `BadSample`.

    `crop` scales the shorter side and keeps the centre, `squash` ignores the aspect, `pad` adds white margins. `exact`:
    antialiased bicubic over a full decode, by Pillow; else over a JPEG decoded at the smallest size that suffices.
    """
    source = _open(data, max_pixels)
    box = place_crop(source.width, source.height, mode)
    reduction = whole_pixels(box, source.width, source.height, side, mode).reduction
    stored, reduction, profile = source.pixels(reduction, exact)
    extent = source.width / reduction, source.height / reduction
    pixels = np.asarray(fit(Image.fromarray(stored), side, mode, extent))
    return _put(upright(source.in_srgb(pixels, profile), source.orientation), out)


def augment_pixels(
    pixels: np.ndarray,
    original_hw: tuple[int, int],
    side: int,
    mode: ResizeMode,
    augment: AugmentConfig,
    draw: np.random.Generator,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """What `load_for_training` makes of an image that was decoded, and perhaps resized as a whole, earlier.

    `pixels` are upright sRGB, uint8 [h, w, 3], of an image whose upright size is `original_hw`. The crop is the same,
    in relative coordinates, moved to whole pixels of `pixels`.
    """
    choices = draw_choices(draw)
    height, width = original_hw
    box = place_crop(width, height, mode, choices[:4], augment.crop_area, augment.crop_ratio)
    crop = whole_pixels(box, width, height, side, mode)
    horizontal = crop.reduction * pixels.shape[1] / width
    vertical = crop.reduction * pixels.shape[0] / height
    left, right = round(crop.left * horizontal), round((crop.left + crop.width) * horizontal)
    top, bottom = round(crop.top * vertical), round((crop.top + crop.height) * vertical)
    if mode != "pad":
        left, top = min(left, pixels.shape[1] - 1), min(top, pixels.shape[0] - 1)
    in_pixels = Crop(left, top, max(1, right - left), max(1, bottom - top), 1)
    extent = round(width // crop.reduction * horizontal), round(height // crop.reduction * vertical)
    return augment_in_place(resize_box(pixels, 1, in_pixels, extent, side, out, exact=False), choices, augment)


def _render(source: _Source, box: Box, side: int, mode: ResizeMode, exact: bool, out: np.ndarray | None) -> np.ndarray:
    """The box of the upright image as side × side pixels that lie as stored."""
    in_stored = stored_box(box, source.width, source.height, source.orientation)
    crop = whole_pixels(in_stored, source.width, source.height, side, mode)
    pixels, reduction, profile = source.pixels(crop.reduction, exact)
    extent = max(1, source.width // crop.reduction), max(1, source.height // crop.reduction)
    resized = resize_box(pixels, crop.reduction // reduction, crop, extent, side, out, exact=exact)
    converted = source.in_srgb(resized, profile)
    return resized if converted is resized else _put(converted, resized)


def _put(pixels: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return pixels if pixels.flags.writeable and pixels.flags.c_contiguous else pixels.copy(order="C")
    np.copyto(out, pixels)
    return out
