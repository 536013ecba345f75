"""Random changes of a training image, on uint8 pixels of the model's side. Only what is switched on costs time."""

import math
from typing import Annotated, NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from pydantic import AfterValidator, Field

from clipdist.data.images.geometry import upright
from clipdist.settings import settings

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the smaller number comes first")
    return pair


Probability = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Area = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]


@settings
class AugmentConfig:
    """Random changes of a training image. Off by default but for the crop: on medical images colour and margin
    carry the diagnosis.

    Where colour is diagnostic (skin, pathology, fundus), changes of light and camera are imitated safely by up to
    brightness 0.1, contrast 0.1, saturation 0.1, without hue; stain differences between laboratories take hue 0.02.
    `greyscale` and `invert` suit only pictures whose colour or polarity says nothing; flips and turns only those
    without an up or a side (not radiographs: the heart is on the left).
    """

    crop_area: Annotated[tuple[Area, Area], AfterValidator(_rising)] = (0.8, 1.0)
    """Share of the image's area that a random crop keeps, smallest and largest."""
    crop_ratio: Annotated[tuple[Ratio, Ratio], AfterValidator(_rising)] = (0.8, 1.25)
    """Width over height of the crop, relative to the image's own; as far as the area lets it fit into the image."""
    flip_horizontal: Probability = 0.0
    """Probability of exchanging left and right."""
    flip_vertical: Probability = 0.0
    """Probability of exchanging top and bottom."""
    quarter_turns: bool = False
    """Turns by 0, 90, 180 or 270 degrees, each equally likely."""
    rotate_degrees: Amount = 0.0
    """Largest rotation either way; corners are filled with the colour of the picture's own corner, as is what a shift
    or a smaller scale uncovers."""
    translate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest shift either way, of each axis, as a share of the picture's side."""
    scale: Annotated[tuple[Ratio, Ratio], AfterValidator(_rising)] = (1.0, 1.0)
    """Factor of enlargement about the centre, smallest and largest."""
    brightness: Amount = 0.0
    """Factor is drawn from 1 ± this; likewise contrast (about the picture's mean grey) and saturation."""
    contrast: Amount = 0.0
    """As brightness."""
    saturation: Amount = 0.0
    """As brightness."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest turn of the colours either way, about the grey axis (in YIQ), as a share of the circle (at most 0.5)."""
    greyscale: Probability = 0.0
    """Probability that colours are taken away."""
    invert: Probability = 0.0
    """Probability of a photographic negative."""
    blur: Probability = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: Annotated[tuple[Amount, Amount], AfterValidator(_rising)] = (0.1, 1.5)
    """Of the blur, in pixels of the model's side, smallest and largest."""
    noise: Amount = 0.0
    """Largest standard deviation of Gaussian noise, in grey levels of 255."""
    poisson: Amount = 0.0
    """Largest strength of photon noise: its variance, in squared grey levels, is this times the grey level. Drawn from
    the normal approximation, which holds for more than about ten photons: grey levels beyond ten times this."""
    speckle: Amount = 0.0
    """Largest standard deviation of speckle (multiplicative noise, as in ultrasound), as a share of the grey level."""

    @property
    def undone(self) -> dict[str, str]:
        """Of the keys that make an image another one each time, the values that would not."""
        amounts = (
            "rotate_degrees",
            "translate",
            "brightness",
            "contrast",
            "saturation",
            "hue",
            "blur",
            "noise",
            "poisson",
            "speckle",
        )
        sometimes = ("flip_horizontal", "flip_vertical", "greyscale", "invert")
        found = {key: "[1, 1]" for key in ("crop_area", "scale") if getattr(self, key) != (1.0, 1.0)}
        found |= {key: "0" for key in sometimes if 0 < getattr(self, key) < 1}
        found |= {"quarter_turns": "false"} if self.quarter_turns else {}
        return found | {key: "0" for key in amounts if getattr(self, key)}


class Choices(NamedTuple):
    """Every random choice about an image: numbers from 0 to 1, and the seed of its noise. New ones come last, so that
    the others stay what they were for the same seed."""

    area: float
    ratio: float
    right: float
    down: float
    flip_horizontal: float
    flip_vertical: float
    quarter_turns: float
    rotate: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    greyscale: float
    invert: float
    blur: float
    blur_sigma: float
    noise: float
    poisson: float
    speckle: float
    noise_seed: int
    scale: float
    translate_right: float
    translate_down: float


def draw_choices(draw: np.random.Generator) -> Choices:
    """Always the same number of draws, whatever the recipe switches on."""
    numbers = Choices._fields.index("noise_seed")
    first = [*draw.random(numbers).tolist(), int(draw.integers(1 << 62))]
    return Choices._make([*first, *draw.random(len(Choices._fields) - len(first)).tolist()])


def augment_in_place(pixels: np.ndarray, choices: Choices, augment: AugmentConfig, orientation: int = 1) -> np.ndarray:
    """Changes square uint8 pixels [side, side, 3] as drawn, and returns them. Stored pixels are made upright first, as
    their EXIF orientation asks: on the small square that costs least."""
    _turn(pixels, choices, augment, orientation)
    if augment.rotate_degrees or augment.translate or augment.scale != (1.0, 1.0):
        _move(pixels, choices, augment)
    _recolour(pixels, choices, augment)
    if choices.blur < augment.blur:
        least, most = augment.blur_sigma
        sigma = least + (most - least) * choices.blur_sigma
        pixels[...] = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))
    if augment.noise or augment.poisson or augment.speckle:
        _add_noise(pixels, choices, augment)
    return pixels


def _turn(pixels: np.ndarray, choices: Choices, augment: AugmentConfig, orientation: int) -> None:
    cells = pixels.view("V3")[..., 0]  # whole pixels move faster than their three bytes
    turned = upright(cells, orientation)
    if choices.flip_horizontal < augment.flip_horizontal:
        turned = turned[:, ::-1]
    if choices.flip_vertical < augment.flip_vertical:
        turned = turned[::-1]
    if augment.quarter_turns:
        turned = np.rot90(turned, int(4 * choices.quarter_turns))
    if turned.strides != cells.strides:
        cells[...] = turned.copy()


def _move(pixels: np.ndarray, choices: Choices, augment: AugmentConfig) -> None:
    """Turned and scaled about the centre, then shifted: one resampling for all."""
    angle = math.radians((2 * choices.rotate - 1) * augment.rotate_degrees)
    factor = augment.scale[0] + (augment.scale[1] - augment.scale[0]) * choices.scale
    side, most = len(pixels), len(pixels) * augment.translate
    shift_x, shift_y = (most * (2 * choice - 1) for choice in (choices.translate_right, choices.translate_down))
    cosine, sine = math.cos(angle) / factor, math.sin(angle) / factor
    # Where each pixel comes from: Pillow asks for the inverse. Counter-clockwise, as Image.rotate turns.
    across, down = side / 2 + shift_x, side / 2 + shift_y
    matrix = (
        cosine,
        -sine,
        side / 2 - cosine * across + sine * down,
        sine,
        cosine,
        side / 2 - sine * across - cosine * down,
    )
    corner = tuple(pixels[0, 0].tolist())
    picture = Image.fromarray(pixels)
    moved = picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=corner)
    pixels[...] = np.asarray(moved)


def _recolour(pixels: np.ndarray, choices: Choices, augment: AugmentConfig) -> None:
    """Brightness, contrast, saturation, hue, greyscale and negative are all affine in the colour: one pass does them.
    So nothing is clipped in between."""
    greyscale, invert = choices.greyscale < augment.greyscale, choices.invert < augment.invert
    if not (augment.brightness or augment.contrast or augment.saturation or augment.hue or greyscale or invert):
        return
    matrix, offset = np.eye(3), 0.0
    if augment.brightness:
        matrix *= _factor(choices.brightness, augment.brightness)
    if augment.contrast:
        factor = _factor(choices.contrast, augment.contrast)
        offset = (1 - factor) * float(_LUMA @ matrix @ _mean_colour(pixels))
        matrix *= factor
    if augment.saturation:
        factor = _factor(choices.saturation, augment.saturation)
        matrix = (factor * np.eye(3) + (1 - factor) * np.outer(np.ones(3), _LUMA)) @ matrix
    if augment.hue:
        matrix = _turn_hue(2 * math.pi * (2 * choices.hue - 1) * augment.hue) @ matrix
    if greyscale:
        matrix = np.outer(np.ones(3), _LUMA) @ matrix
    if invert:
        matrix, offset = -matrix, 255 - offset
    if np.array_equal(matrix, np.diag([matrix[0, 0]] * 3)):
        if matrix[0, 0] != 1 or offset:
            table = np.rint(np.clip(np.arange(256) * matrix[0, 0] + offset, 0, 255)).astype(np.uint8)
            changed = np.frombuffer(pixels.tobytes().translate(table.tobytes()), np.uint8)
            pixels[...] = changed.reshape(pixels.shape)
        return
    rows = [number for row in matrix for number in (*row.tolist(), offset)]
    pixels[...] = np.asarray(Image.fromarray(pixels).convert("RGB", tuple(rows)))


def _factor(choice: float, spread: float) -> float:
    return max(0.0, 1.0 + (2.0 * choice - 1.0) * spread)


def _mean_colour(pixels: np.ndarray) -> np.ndarray:
    # Rows are summed as they lie in memory: numpy is slow along an axis of three.
    sums = pixels.reshape(len(pixels), -1).sum(axis=0, dtype=np.int64)
    return sums.reshape(-1, 3).sum(axis=0) * (3 / pixels.size)


def _turn_hue(angle: float) -> np.ndarray:
    """The matrix that turns colours about the grey axis in the YIQ plane, by radians."""
    sine, cosine = math.sin(angle), math.cos(angle)
    return np.linalg.inv(_YIQ) @ np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) @ _YIQ


def _add_noise(pixels: np.ndarray, choices: Choices, augment: AugmentConfig) -> None:
    """Independent normal noises add up to one whose variance is the sum of theirs: one draw per value does for all."""
    import torch  # here, since processes that only look at pictures read this file too

    levels = np.arange(256, dtype=np.float32)
    variance = (
        (augment.noise * choices.noise) ** 2
        + augment.poisson * choices.poisson * levels
        + (augment.speckle * choices.speckle * levels) ** 2
    )
    deviation = np.sqrt(variance)
    # torch draws normal numbers three times as fast as numpy.
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(choices.noise_seed)).numpy()
    noise *= deviation.take(pixels) if augment.poisson or augment.speckle else deviation[0]
    noise += pixels
    np.rint(noise, out=noise)
    pixels[...] = np.clip(noise, 0, 255, out=noise)
