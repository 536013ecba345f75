"""One whole-slide image through OpenSlide: its levels and resolution, an overview, and tiles read at the right level.

Needs openslide-python and openslide-bin (extra: pathology). Lengths called `x`, `y` and `stride` are pixels of level 0.
"""

import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipdist.errors import UserError
from clipdist.prepare.slide_jpeg import NotDirect, jpeg_levels

logger = logging.getLogger(__name__)

BLOCK = 2048  # pixels of a level read at once for an overview: 16 MiB
MOST_DIFFERENT = 5.0  # grey levels of 255, mean: JPEG at a fraction differs by 0.1 to 3, other colours by far more


class UnusableSlide(Exception):
    """This slide cannot be tiled; the message says why."""


class SlideReader:
    """An open slide; a context manager. `mpp`: micrometres per pixel of level 0, of the file or else `assume_mpp`.

    Raises `UnusableSlide` for a file that is missing, cut short or no slide, for one without smaller levels (every tile
    would cost a read at full resolution) and for one that does not tell its resolution (what a stride covers would be
    unknown).
    """

    def __init__(self, path: Path, *, assume_mpp: float | None = None) -> None:
        try:
            import openslide
        except ImportError:
            raise UserError('slides need OpenSlide; run: pip install "clipdist[pathology]"') from None
        if not path.is_file():
            raise UnusableSlide("missing file")
        try:
            self.slide = openslide.OpenSlide(path)
        except openslide.OpenSlideUnsupportedFormatError:
            raise UnusableSlide("no slide format that OpenSlide knows, or cut short") from None
        except openslide.OpenSlideError as error:
            raise UnusableSlide(f"damaged or cut short: {error}") from None
        self.path, self._error = path, openslide.OpenSlideError
        self.width, self.height = self.slide.dimensions
        self.downsamples: tuple[float, ...] = self.slide.level_downsamples
        try:
            self.mpp = _mpp(self.slide.properties) or assume_mpp
            if len(self.downsamples) < 2:
                raise UnusableSlide(f"no smaller levels: {self.width} x {self.height} pixels in one level")
            if self.mpp is None:
                raise UnusableSlide(
                    "no resolution: neither openslide.mpp-x nor another way to know micrometres per pixel"
                )
        except UnusableSlide:
            self.slide.close()
            raise
        background = self.slide.properties.get("openslide.background-color", "FFFFFF")
        self.background = f"#{background}"
        self._file = os.open(path, os.O_RDONLY)
        self._direct = jpeg_levels(path, self._file, self.slide.level_dimensions)
        self._compared: set[int] = set()

    def __enter__(self) -> "SlideReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.slide.close()
        os.close(self._file)

    def level_for(self, downsample: float) -> int:
        """The smallest level that still has one pixel for each `downsample` pixels of level 0."""
        return max(number for number, there in enumerate(self.downsamples) if there <= max(1.0, downsample * 1.001))

    def tile(self, x: int, y: int, stride: int, side: int) -> Image.Image:
        """The square of `stride` pixels at (x, y), RGB, `side` × `side`; never enlarged from its level."""
        level = self.level_for(stride / side)
        if level in self._direct:
            try:
                direct = self._directly(level, x, y, stride, side)
            except NotDirect:
                direct = None
            if direct is not None:
                return direct
        return self._by_openslide(level, x, y, stride, side)

    @property
    def direct(self) -> bool:
        """Whether tiles were decoded at a fraction of their size (see `slide_jpeg`)."""
        return bool(self._compared & set(self._direct))

    def _by_openslide(self, level: int, x: int, y: int, stride: int, side: int) -> Image.Image:
        length = round(stride / self.downsamples[level])
        region = self.region(x, y, level, length, length)
        return region.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0)

    def _directly(self, level: int, x: int, y: int, stride: int, side: int) -> Image.Image | None:
        """None, and never again, when the first tile of a level differs from what OpenSlide makes of it."""
        there = self.downsamples[level]
        try:
            tile = self._direct[level].square(x / there, y / there, stride / there, side)
        except ValueError as error:
            raise UnusableSlide(f"damaged or cut short at x {x}, y {y}, level {level}: {error}") from None
        if level not in self._compared:
            other = self._by_openslide(level, x, y, stride, side)
            difference = np.abs(np.asarray(tile, np.int16) - np.asarray(other, np.int16)).mean()
            if difference > MOST_DIFFERENT:
                logger.info(
                    "%s: level %d is left to OpenSlide, the pictures differ by %.1f", self.path, level, difference
                )
                del self._direct[level]
                return None
            self._compared.add(level)
        return tile

    def region(self, x: int, y: int, level: int, width: int, height: int) -> Image.Image:
        """RGB, `width` × `height` pixels of `level`; what was never scanned has the slide's background colour."""
        try:
            pixels = self.slide.read_region((x, y), level, (width, height))
        except self._error as error:
            raise UnusableSlide(f"damaged or cut short at x {x}, y {y}, level {level}: {error}") from None
        if pixels.getchannel("A").getextrema()[0] == 255:  # opaque, as nearly always: the quick way
            return pixels.convert("RGB")
        whole = Image.new("RGBA", pixels.size, self.background)
        whole.alpha_composite(pixels)
        return whole.convert("RGB")

    def overview(self, downsample: float) -> Image.Image:
        """The whole slide, RGB, `downsample` times smaller, each pixel a mean; read in blocks that fit into memory."""
        level = self.level_for(downsample)
        there = self.downsamples[level]
        size = (max(1, round(self.width / downsample)), max(1, round(self.height / downsample)))
        step = max(1, int(BLOCK * there / downsample))
        whole = Image.new("RGB", size)
        for top in range(0, size[1], step):
            for left in range(0, size[0], step):
                columns, rows = min(step, size[0] - left), min(step, size[1] - top)
                wide, high = columns * downsample / there, rows * downsample / there
                block = self.region(
                    round(left * downsample), round(top * downsample), level, max(1, round(wide)), max(1, round(high))
                )
                whole.paste(block.resize((columns, rows), Image.Resampling.BOX), (left, top))
        return whole


def otsu(grey: npt.NDArray[np.uint8]) -> int:
    """The grey level that parts `grey` into two classes of the largest variance between them; tissue is at or below it.

    Otsu, "A threshold selection method from gray-level histograms", IEEE SMC 9 (1979), equation 18. A picture of one
    grey level has no two classes; its level is returned.
    """
    counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below, total = np.cumsum(counts), counts.sum()
    sums = np.cumsum(counts * np.arange(256))
    above = total - below
    both = (below > 0) & (above > 0)
    if not both.any():
        return int(grey.flat[0])
    means = sums[both] / below[both] - (sums[-1] - sums[both]) / above[both]
    between = np.zeros(256)
    between[both] = below[both] * above[both] * means**2
    return int(between.argmax())


def _mpp(properties: Any) -> float | None:
    """Mean of both directions; None where it is missing or makes no sense."""
    try:
        values = [float(properties[f"openslide.mpp-{axis}"]) for axis in "xy"]
    except (KeyError, ValueError):
        return None
    return sum(values) / 2 if all(0 < value < 1000 for value in values) else None
