"""Where a crop lies: in the upright image, in the stored one, and in pixels decoded at a fraction of their size."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

ResizeMode = Literal["crop", "squash", "pad"]

REDUCTIONS = (8, 4, 2, 1)
# A crop may be decoded to this share of the model's side: its mean difference from the exact path stays about one grey
# level of 255, and images of twice or four times the side need not be decoded in full for crops a little smaller.
ENOUGH = 7 / 8

# EXIF orientation -> how the stored image becomes upright: mirrored in x, mirrored in y, then x and y exchanged.
_UPRIGHT = {
    1: (False, False, False),
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}


class Box(NamedTuple):
    """Edges of a rectangle in pixels; parts of it may lie outside the image."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Crop:
    """A rectangle of whole pixels of the image decoded at 1/reduction of its stored size."""

    left: int
    top: int
    width: int
    height: int
    reduction: int


def reduced(length: int, reduction: int) -> int:
    """Pixels that a JPEG of `length` pixels has when decoded at 1/reduction."""
    return -(-length // reduction)


def upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    return (height, width) if _UPRIGHT[orientation][2] else (width, height)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of stored pixels [h, w, ...] that shows them as their EXIF orientation asks."""
    mirror_x, mirror_y, exchange = _UPRIGHT[orientation]
    pixels = pixels[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]
    return pixels.swapaxes(0, 1) if exchange else pixels


def stored_box(box: Box, width: int, height: int, orientation: int) -> Box:
    """The box of the upright image in coordinates of the stored one, which is `width` × `height`."""
    mirror_x, mirror_y, exchange = _UPRIGHT[orientation]
    left, top, right, bottom = box if not exchange else (box.top, box.left, box.bottom, box.right)
    if mirror_x:
        left, right = width - right, width - left
    if mirror_y:
        top, bottom = height - bottom, height - top
    return Box(left, top, right, bottom)


def crop_size(
    width: int,
    height: int,
    area: float,
    ratio: float,
    mode: ResizeMode,
    areas: tuple[float, float],
    ratios: tuple[float, float],
) -> tuple[float, float]:
    """Width and height of a crop, in pixels of the upright image (with mode `pad`: of the padded one).

    `area` and `ratio`, from 0 to 1, choose between the ends of `areas` and `ratios`. Squashing and padding keep the
    image's aspect, cropping makes a square.
    """
    low, high = areas
    share = (low + (high - low) * area) ** 0.5
    narrow, wide = math.log(ratios[0]), math.log(ratios[1])
    stretch = math.exp(narrow + (wide - narrow) * ratio) ** 0.5
    base_width, base_height = (min(width, height),) * 2 if mode == "crop" else (width, height)
    # A crop that is to keep much of the image cannot be much wider or narrower: the area is kept, the ratio gives way.
    stretch = min(max(stretch, base_height * share / height), width / (base_width * share))
    return (
        min(float(width), max(1.0, base_width * share * stretch)),
        min(float(height), max(1.0, base_height * share / stretch)),
    )


def place_crop(
    width: int,
    height: int,
    mode: ResizeMode,
    chosen: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.5),
    areas: tuple[float, float] = (1.0, 1.0),
    ratios: tuple[float, float] = (1.0, 1.0),
) -> Box:
    """The crop of an upright image that four numbers from 0 to 1 choose: its area, its ratio, how far it lies to the
    right and how far down. Without any: the whole image, or its middle square with mode `crop`."""
    frame_width, frame_height = (max(width, height),) * 2 if mode == "pad" else (width, height)
    area, ratio, right, down = chosen
    crop_width, crop_height = crop_size(frame_width, frame_height, area, ratio, mode, areas, ratios)
    left = right * (frame_width - crop_width) - (frame_width - width) / 2
    top = down * (frame_height - crop_height) - (frame_height - height) / 2
    return Box(left, top, left + crop_width, top + crop_height)


def whole_pixels(box: Box, width: int, height: int, side: int, mode: ResizeMode) -> Crop:
    """The box of a stored image moved to whole pixels of the largest reduction that leaves `ENOUGH` of side × side.

    Whatever is then decoded, at this reduction or in full, the same part of the image is seen, unshifted. A JPEG's last
    reduced pixel stands for fewer than `reduction` stored ones, so it is left out of crops that stay inside.
    """
    box_width, box_height = box.right - box.left, box.bottom - box.top
    # Sizes are products of floats: a hair below a whole number is meant to be that number.
    fitting = (r for r in REDUCTIONS if min(box_width, box_height) / r + 1e-6 >= side * ENOUGH)
    reduction = next(fitting, 1)
    left, crop_width = _snapped(box.left, box_width, width, reduction, free=mode == "pad")
    top, crop_height = _snapped(box.top, box_height, height, reduction, free=mode == "pad")
    return Crop(left, top, crop_width, crop_height, reduction)


def _snapped(start: float, length: float, limit: int, reduction: int, *, free: bool) -> tuple[int, int]:
    size = max(1, int(length / reduction + 1e-6))
    # The middle stays where it was, so that a mirrored image gives the mirrored crop.
    first = round((start + length / 2) / reduction - size / 2)
    return (first if free else max(0, min(first, limit // reduction - size))), size


def overlap(start: int, length: int, limit: int, side: int) -> tuple[int, int, int, int]:
    """Along one axis of a crop scaled to `side`: (first, stop) of its pixels inside an image of `limit` pixels, and
    (first, stop) of those of `side` that show them; both empty when nothing of the image is in the crop."""
    first, stop = max(0, start), min(limit, start + length)
    if first >= stop:
        return 0, 0, 0, 0
    shown = min(side - 1, round((first - start) * side / length))
    return first, stop, shown, max(shown + 1, round((stop - start) * side / length))
