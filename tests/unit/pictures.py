"""Small pictures for tests."""

import io
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms

from clipdist.data.images.augment import AugmentConfig
from clipdist.data.images.decode import load_for_evaluation, load_for_training
from clipdist.data.images.geometry import ResizeMode

MAX_PIXELS = 10_000_000
# The whole image, unchanged.
STILL = AugmentConfig(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))


def picture(number: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """Random blocks of colour, in pixels (width, height)."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size).convert(mode)


def smooth(width: int, height: int) -> Image.Image:
    """Broad waves of colour; no edge that a JPEG would blur."""
    y, x = np.mgrid[0:height, 0:width] / 40.0
    waves = [np.sin(x + phase) + np.cos(1.3 * y - phase) + np.sin(0.3 * x * phase + y) for phase in (0.3, 1.1, 2.4)]
    return Image.fromarray((127 + 40 * np.stack(waves, 2)).clip(0, 255).astype(np.uint8))


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Light and colour with the 1/f spectrum of photographs, hard-edged discs, and a camera's noise."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    frequency[0, 0] = 1

    def field(slope: float) -> np.ndarray:
        noise = np.fft.rfft2(draw.standard_normal((height, width))) / frequency**slope
        values = np.fft.irfft2(noise, (height, width))
        return (values - values.mean()) / values.std()

    light = 128 + 38 * field(1.6) + 5 * field(1.0)
    pixels = np.stack([light + 14 * field(1.9) for _ in range(3)], axis=-1)
    y, x = np.mgrid[0:height, 0:width]
    for _ in range(14):
        (middle_x, middle_y), radius = draw.random(2) * (width, height), draw.uniform(0.03, 0.25) * min(width, height)
        pixels[np.hypot(x - middle_x, y - middle_y) < radius] += draw.normal(0, 30, 3)
    pixels += draw.normal(0, 1.5, (height, width, 1))
    return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))


def hashed_alike(seed: int) -> Image.Image:
    """Light that rises to the right above and to the left below: one difference hash, and details of its own."""
    rise = np.tile(np.linspace(40, 215, 288), (256, 1))
    rise[128:] = rise[128:, ::-1]
    details = np.random.default_rng(seed).normal(0, 12, (64, 72)).repeat(4, 0).repeat(4, 1)
    return Image.fromarray((rise + details).clip(0, 255).astype(np.uint8)).convert("RGB")


def quadrants(size: tuple[int, int] = (80, 40)) -> Image.Image:
    """red, green above blue, white: every turn of it looks different."""
    image = Image.new("RGB", (2, 2))
    image.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)])
    return image.resize(size, Image.Resampling.NEAREST)


def encoded(image: Image.Image, format: str = "PNG", **parameters: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **parameters)
    return buffer.getvalue()


def with_orientation(image: Image.Image, orientation: int, format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(image, format, exif=exif, **({"quality": 98, "subsampling": 0} if format == "JPEG" else {}))


# An EXIF orientation -> how an upright picture is turned to be stored under it.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(upright: Image.Image, orientation: int) -> Image.Image:
    return upright.transpose(STORED[orientation]) if orientation > 1 else upright


def evaluated(data: bytes, side: int = 32, mode: ResizeMode = "squash", exact: bool = True) -> np.ndarray:
    pixels = load_for_evaluation(data, side, mode, MAX_PIXELS, exact=exact)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (side, side, 3)
    return pixels.astype(int)


def trained(
    data: bytes,
    side: int = 32,
    mode: ResizeMode = "squash",
    augment: AugmentConfig = STILL,
    seed: int = 0,
    exact: bool = False,
) -> np.ndarray:
    pixels = load_for_training(data, side, mode, MAX_PIXELS, augment, np.random.default_rng(seed), exact=exact)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (side, side, 3)
    return pixels.astype(int)


def swapped_profile() -> bytes:
    """An RGB profile with the red and the green primary exchanged: nobody overlooks it."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)
