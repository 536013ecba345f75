"""Bytes that somebody sent -> the pixels that the model takes, or a reason why not.

Only the formats below reach a decoder: Pillow knows more, and hands some (PostScript) to other programs.
"""

import sys

import numpy as np
import torch

from clipdist.data.images.decode import load_for_evaluation
from clipdist.data.images.geometry import ResizeMode
from clipdist.data.images.header import extension_of
from clipdist.data.images.pillow import open_image
from clipdist.data.shards import BadSample
from clipdist.publish.serve.limits import Refused

FORMATS = "JPEG, PNG, WebP, TIFF, GIF or BMP"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DAMAGED = "this image cannot be read: it is damaged, cut short, or of an unusual kind"


def pixels_of(data: bytes, side: int, resize: ResizeMode, max_pixels: int) -> torch.Tensor:
    """uint8 [3, side, side], as in evaluation during training. Raises `Refused`: 415 for what is none of the formats,
    413 for more than `max_pixels`, told by the header before anything is decoded, 422 for what cannot be read."""
    if not data:
        raise Refused(422, f"this file is empty; expected {FORMATS}")
    if extension_of(data) is None and not data.startswith(_TIFF):
        raise Refused(415, f"this is no image of a known format; expected {FORMATS}")
    try:
        # Not `image_size`: a PNG's EXIF may follow its pixels, which would be decoded to find it.
        width, height = open_image(data, sys.maxsize).size
    except BadSample:
        raise Refused(422, _DAMAGED) from None
    if width * height > max_pixels:
        raise Refused(413, f"this image has {width:,} × {height:,} pixels, more than the {max_pixels:,} that are taken")
    try:
        pixels_SS3 = load_for_evaluation(data, side, resize, max_pixels)
    except (BadSample, MemoryError):
        raise Refused(422, _DAMAGED) from None
    return torch.from_numpy(np.ascontiguousarray(pixels_SS3.transpose(2, 0, 1)))
