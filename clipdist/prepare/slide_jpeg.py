"""JPEG tiles of a TIFF slide, decoded at a fraction of their size: a sixth of OpenSlide's time for the same picture.

A stride of 1024 pixels stored at 299 needs a third of what is there, yet the next smaller level of most scanners has a
quarter only. JPEG can be decoded straight to a half, a quarter or an eighth (as for `data.decode: fast`), which
OpenSlide does not offer. Only plain tiled TIFF is understood here (Aperio's SVS, generic TIFF); whoever calls
compares the first tile with OpenSlide's, and leaves everything else to it.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from PIL import Image

if TYPE_CHECKING:
    from tifffile import TiffPage

# Pixels along a decoded tile for each one stored, at least. Fewer: as sharp, but not the same picture as OpenSlide's.
SPARE = 1.5
# "Adobe", transform 0: three components without this marker are taken for YCbCr.
_IS_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
_START, _END = b"\xff\xd8", b"\xff\xd9"


class NotDirect(Exception):
    """This region cannot be had here: a tile is missing from the file."""


class JpegLevel:
    """One level of a slide as a grid of JPEG tiles; lengths are pixels of this level."""

    def __init__(self, file: int, page: "TiffPage") -> None:
        from tifffile import PHOTOMETRIC

        self.file, self.tile = file, page.tilelength
        self.columns = -(-page.imagewidth // page.tilewidth)
        self.offsets, self.sizes = page.dataoffsets, page.databytecounts
        tables: bytes = page.jpegtables or b""
        rgb = page.photometric == PHOTOMETRIC.RGB
        self.before = _START + (_IS_RGB if rgb else b"") + tables[len(_START) : -len(_END)]

    def square(self, x: float, y: float, length: float, side: int) -> Image.Image:
        """The square of `length` at (x, y), RGB, `side` × `side`. Raises `NotDirect`, and ValueError for damage."""
        part = self.part_for(length, side)
        left, top = int(x) // self.tile, int(y) // self.tile
        right, bottom = (int(np.ceil(end + length)) - 1 for end in (x, y))
        small = self.tile // part
        canvas = np.empty(
            ((bottom // self.tile - top + 1) * small, (right // self.tile - left + 1) * small, 3), np.uint8
        )
        for row in range(0, canvas.shape[0], small):
            for column in range(0, canvas.shape[1], small):
                number = (top + row // small) * self.columns + left + column // small
                canvas[row : row + small, column : column + small] = self._decoded(number, small)
        begin = ((x - left * self.tile) / part, (y - top * self.tile) / part)
        box = (*begin, begin[0] + length / part, begin[1] + length / part)
        return Image.fromarray(canvas).resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)

    def part_for(self, length: float, side: int) -> int:
        """1, 2, 4 or 8: the smallest fraction of full size with enough pixels for an antialiased tile."""
        enough = SPARE * side
        return max(part for part in (1, 2, 4, 8) if part == 1 or (length / part >= enough and self.tile % part == 0))

    def _decoded(self, number: int, small: int) -> np.ndarray:
        if number >= len(self.sizes) or not self.sizes[number]:
            raise NotDirect
        data = os.pread(self.file, self.sizes[number], self.offsets[number])
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            self.before + data[len(_START) :], min_height=small, min_width=small, min_factor=self.tile / small
        )
        if pixels.shape != (small, small, 3):
            raise ValueError(f"a tile of {pixels.shape[1]} x {pixels.shape[0]} pixels, expected {small}")
        return pixels


def jpeg_levels(path: Path, file: int, dimensions: Sequence[tuple[int, int]]) -> dict[int, JpegLevel]:
    """The levels, by number, that can be read so; `dimensions` are OpenSlide's (width, height), `file` a descriptor.

    Empty without tifffile, and for files that are no TIFF.
    """
    try:
        import tifffile
    except ImportError:
        return {}
    levels: dict[int, JpegLevel] = {}
    try:
        with tifffile.TiffFile(path) as tiff:
            for page in tiff.pages:
                if not isinstance(page, tifffile.TiffPage) or not _is_plain(page):
                    continue
                size = (page.imagewidth, page.imagelength)
                if size not in dimensions:
                    continue
                number = list(dimensions).index(size)
                if number in levels:  # two focal planes, say: which one OpenSlide shows cannot be told
                    return {}
                levels[number] = JpegLevel(file, page)
    except (tifffile.TiffFileError, OSError, ValueError, KeyError, IndexError, AttributeError):
        return {}
    return levels


def _is_plain(page: "TiffPage") -> bool:
    from tifffile import COMPRESSION, PHOTOMETRIC

    return (
        page.is_tiled
        and page.tilewidth == page.tilelength
        and page.compression == COMPRESSION.JPEG
        and page.photometric in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR)
        and page.bitspersample == 8
        and page.samplesperpixel == 3
        and page.planarconfig == 1
    )
