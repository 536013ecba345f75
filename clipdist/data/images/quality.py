"""What is wrong with a picture that decodes: blank, blurred, clipped to white, too dark, tiny, or too long."""

from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageChops

from clipdist.errors import UserError

# Shorter side at which pictures are judged, near what image towers see: blur that is gone at this size does
# little harm.
JUDGED_SIDE = 192
WHITE = 250
QUALITY = np.dtype([("spread", "<f4"), ("bright", "<f4"), ("clipped", "<f4"), ("blur", "<f4")])
"""What is measured of one picture: grey levels between the 1st and the 99th percentile of the channel where that is
most; the 95th percentile of brightness; the share of pixels that are white; `blur_of`."""


@dataclass(frozen=True)
class QualityLimits:
    """Beyond which a picture is named. Grey levels count 0 to 255, sides in pixels.

    `blank`: spread below. `blurred`: blur above; .53 lies above the sharp photographs, drawings and phantoms that it
    was measured on (at most .49), and below 99 % of the photographs after a Gaussian blur of 2 pixels at the size
    judged. `saturated`: share of white above; drawings on white have much of it. `dark`: bright below. `tiny`: shorter
    side below. `long`: aspect above.
    """

    blank: float = 10.0
    blurred: float = 0.53
    saturated: float = 0.6
    dark: float = 48.0
    tiny: int = 64
    long: float = 4.0

    def __post_init__(self) -> None:
        for item in fields(self):
            if not getattr(self, item.name) >= 0:
                raise UserError(f"--{item.name}: found {getattr(self, item.name)}, expected 0 or more")

    def faults(self, quality: np.ndarray, width: np.ndarray, height: np.ndarray) -> dict[str, np.ndarray]:
        """fault -> how bad each picture is by it, float [N], NaN where it is not; the larger the worse.

        `quality` has dtype `QUALITY`, width and height are int [N]. A blank picture is neither blurred, nor saturated,
        nor dark, and one without a size has no fault.
        """
        shorter, longer = np.minimum(width, height).astype(float), np.maximum(width, height).astype(float)
        there = shorter > 0
        blank = there & (quality["spread"] < self.blank)
        shown = there & ~blank
        aspect = longer / np.maximum(shorter, 1)
        return {
            "blank": np.where(blank, -quality["spread"], np.nan),
            "blurred": np.where(shown & (quality["blur"] > self.blurred), quality["blur"], np.nan),
            "saturated": np.where(shown & (quality["clipped"] > self.saturated), quality["clipped"], np.nan),
            "dark": np.where(shown & (quality["bright"] < self.dark), -quality["bright"], np.nan),
            "tiny": np.where(there & (shorter < self.tiny), -shorter, np.nan),
            "long": np.where(there & (aspect > self.long), aspect, np.nan),
        }


def judged(image: Image.Image) -> Image.Image:
    """The picture with its shorter side brought down to `JUDGED_SIDE`; smaller ones stay as they are."""
    scale = JUDGED_SIDE / min(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BOX)


def quality_of(image: Image.Image) -> np.ndarray:
    """What is measured of an RGB image of the size that `judged` gives, dtype `QUALITY`, shape ()."""
    quality, grey = np.zeros((), QUALITY), image.convert("L")
    shares = np.cumsum(np.array(image.histogram(), float).reshape(3, 256), 1) / (image.width * image.height)
    low, high = (shares < 0.01).sum(1), (shares < 0.99).sum(1)
    quality["spread"] = (high - low).max()
    quality["bright"] = (np.cumsum(grey.histogram()) < 0.95 * image.width * image.height).sum()
    red, green, blue = image.split()
    darkest = ImageChops.darker(ImageChops.darker(red, green), blue).histogram()
    quality["clipped"] = sum(darkest[WHITE:]) / (image.width * image.height)
    quality["blur"] = blur_of(np.asarray(grey))
    return quality


def blur_of(grey: np.ndarray, width: int = 9) -> float:
    """0 (sharp) to 1: the share of the differences between neighbouring pixels that a mean over `width` pixels leaves.

    F. Crété et al. 2007, "The blur effect: perception and estimation with a new no-reference perceptual blur metric".
    What was blurred already loses little by blurring it again. Unlike the variance of the Laplacian it does not grow
    with contrast, so that one limit serves skin and streets. Grey is [h, w]; the blurrier axis counts.
    """
    found = []
    for plane in (grey.astype(np.int16), grey.T.astype(np.int16)):
        if plane.shape[1] <= width:
            continue
        # Differences of means over `width` pixels are those of the pixel that comes in and the one that goes.
        after = np.abs(plane[:, width:] - plane[:, :-width])
        start = width // 2
        before = width * np.abs(np.diff(plane[:, start : start + after.shape[1] + 1], axis=1))
        total = int(before.sum(dtype=np.int64))
        found.append(1 - int(np.maximum(before - after, 0).sum(dtype=np.int64)) / max(total, 1))
    return max(found, default=0.0)
