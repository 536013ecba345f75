"""Antialiased bicubic resizing of uint8 RGB: by torch, which is fast, and by Pillow, which is the reference.

The two differ by at most a rounding: mean absolute difference about 0.005 grey levels of 255.
"""

import numpy as np
from PIL import Image

from clipdist.data.images.geometry import Crop, ResizeMode, overlap


def resize_rgb(pixels: np.ndarray, size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [*size, 3] by torch, into `out` when given. `pixels` are to be writable."""
    # Not at the file's top: processes that only look at pictures read this file too, and torch takes a second.
    import torch
    from torch.nn import functional

    if out is None:
        out = np.empty((*size, 3), np.uint8)
    if pixels.shape[:2] == size:
        np.copyto(out, pixels)
        return out
    # Contiguous rows seen as channels-last: torch's vector code takes them without rearranging.
    image_13HW = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    resized_13HW = functional.interpolate(image_13HW, size, mode="bicubic", antialias=True)
    torch.from_numpy(out).copy_(resized_13HW[0].permute(1, 2, 0))
    return out


def resize_exact(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """As `resize_rgb`, by Pillow."""
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def resize_box(
    pixels: np.ndarray,
    finer: int,
    crop: Crop,
    extent: tuple[int, int],
    side: int,
    out: np.ndarray | None,
    *,
    exact: bool,
) -> np.ndarray:
    """The crop as uint8 [side, side, 3], into `out` when given, from pixels [h, w, 3], `finer` times as fine as
    the crop's.

    `extent` (width, height) is the image's, in whole pixels of the crop's reduction. What lies outside is white; the
    border falls between two pixels, so that no white bleeds into the image.
    """
    x, stop_x, to_x, to_stop_x = overlap(crop.left, crop.width, extent[0], side)
    y, stop_y, to_y, to_stop_y = overlap(crop.top, crop.height, extent[1], side)
    if out is None:
        out = np.empty((side, side, 3), np.uint8)
    shown = out[to_y:to_stop_y, to_x:to_stop_x]
    if shown.size < out.size:
        out.fill(255)
    if not shown.size:
        return out
    part = pixels[y * finer : stop_y * finer, x * finer : stop_x * finer]
    # torch warns of memory that may not be written; Pillow's pictures and mapped files are such.
    part = part if part.flags.c_contiguous and part.flags.writeable else part.copy()
    if exact:
        shown[...] = resize_exact(part, shown.shape[:2])
    else:
        resize_rgb(part, shown.shape[:2], shown)
    return out


def fit(image: Image.Image, side: int, mode: ResizeMode, extent: tuple[float, float] | None = None) -> Image.Image:
    """Resizes an RGB image to side × side by `mode`, by Pillow. `extent` (width, height): the part of it that counts,
    from its upper left corner; a reduced JPEG's last pixels stand for less than the others."""
    width, height = extent or image.size
    if mode == "pad":
        longer = max(width, height)
        size = max(1, round(width / longer * side)), max(1, round(height / longer * side))
        square = Image.new("RGB", (side, side), "white")
        place = round((side - size[0]) / 2), round((side - size[1]) / 2)
        square.paste(image.resize(size, Image.Resampling.BICUBIC, box=(0, 0, width, height)), place)
        return square
    left, top = 0.0, 0.0
    if mode == "crop":
        left, top = max(0.0, (width - height) / 2), max(0.0, (height - width) / 2)
    box = (left, top, width - left, height - top)
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)
