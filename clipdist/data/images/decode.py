"""Encoded image bytes -> uint8 pixels at the model's side, exactly for evaluation, augmented for training."""

import io
import math
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from pydantic import AfterValidator, Field
from torchvision.transforms.v2 import functional as tv

from clipdist.data.shards import BadSample
from clipdist.settings import settings

# The limit is checked before decoding, by `open_image`; Pillow's own would only warn at first.
Image.MAX_IMAGE_PIXELS = None


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
    carry the diagnosis."""

    crop_area: Annotated[tuple[Area, Area], AfterValidator(_rising)] = (0.8, 1.0)
    """Share of the image's area that a random crop keeps, smallest and largest."""
    crop_ratio: Annotated[tuple[Ratio, Ratio], AfterValidator(_rising)] = (0.8, 1.25)
    """Width over height of the crop, relative to the image's own; as far as the area lets it fit into the image."""
    flip_horizontal: Probability = 0.0
    flip_vertical: Probability = 0.0
    rotate_degrees: Amount = 0.0
    """Largest rotation either way; corners are filled with the image's border colour."""
    brightness: Amount = 0.0
    """Factor is drawn from 1 ± this; likewise contrast and saturation."""
    contrast: Amount = 0.0
    saturation: Amount = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift either way, as a share of the colour circle (at most 0.5)."""
    greyscale: Probability = 0.0
    invert: Probability = 0.0
    """Probability of a photographic negative."""
    blur: Probability = 0.0
    """Probability of a Gaussian blur, sigma 0.1 to 1.5 pixels."""
    noise: Amount = 0.0
    """Largest standard deviation of Gaussian noise, in grey levels of 255."""


ResizeMode = Literal["crop", "squash", "pad"]


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Opens an image without decoding it; `BadSample` when it is none, or has more than `max_pixels`."""
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:  # Pillow raises many kinds, depending on the format
        raise BadSample(f"unreadable image: {_line(error)}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample(f"image of {width}×{height} pixels, more than data.max_image_pixels={max_pixels}")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes to 8-bit RGB, upright: EXIF orientation applied, transparency on white, 16-bit scaled, not clipped."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "I;16", "I;16B", "I;16L"):
            wide = np.asarray(image).clip(0, 65535)
            return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except Exception as error:
        raise BadSample(f"unreadable image: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_for_evaluation(data: bytes, side: int, mode: ResizeMode, max_pixels: int) -> torch.Tensor:
    """Pixels without any randomness, uint8 [3, side, side]: antialiased bicubic over a full decode.

    `crop` scales the shorter side and keeps the centre, `squash` ignores the aspect, `pad` adds white margins.
    """
    return _to_tensor(fit(to_rgb(open_image(data, max_pixels)), side, mode))


def fit(image: Image.Image, side: int, mode: ResizeMode) -> Image.Image:
    """Resizes an RGB image to side × side by `mode`."""
    if mode == "squash":
        return image.resize((side, side), Image.Resampling.BICUBIC)
    if mode == "pad":
        return ImageOps.pad(image, (side, side), Image.Resampling.BICUBIC, color="white")
    return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def load_for_training(
    data: bytes, side: int, mode: ResizeMode, max_pixels: int, augment: AugmentConfig, draw: np.random.Generator
) -> torch.Tensor:
    """Augmented pixels, uint8 [3, side, side]; every random choice comes from `draw`.

    All draws happen before decoding and always in the same number, so that no property of the image, and no
    shortcut of the decoder, changes which choices a sample gets.
    """
    area, ratio, left, top = draw.random(4)
    choices = draw.random(16)
    noise_seed = int(draw.integers(1 << 62))
    image = open_image(data, max_pixels)
    width, height = _upright_size(image)
    if mode == "pad":
        width = height = max(width, height)
    crop_width, crop_height = _crop_size(width, height, area, ratio, mode, augment)
    # A JPEG decodes at 1/2, 1/4 or 1/8 for less than the full price; never below the resolution that is needed.
    scale = max(side / crop_width, side / crop_height)
    if scale < 1:
        image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    image = to_rgb(image)
    if mode == "pad":
        image = ImageOps.pad(image, (max(image.size),) * 2, color="white")
    crop_width, crop_height = crop_width * image.width / width, crop_height * image.height / height
    x, y = left * (image.width - crop_width), top * (image.height - crop_height)
    box = (x, y, min(x + crop_width, image.width), min(y + crop_height, image.height))
    image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    return _recolour(_turn(image, choices, augment), choices, noise_seed, augment)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    try:
        quarter_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception as error:  # for some formats this reads the whole file
        raise BadSample(f"unreadable image: {_line(error)}") from None
    return (height, width) if quarter_turned else (width, height)


def _crop_size(
    width: int, height: int, area: float, ratio: float, mode: ResizeMode, augment: AugmentConfig
) -> tuple[float, float]:
    """Crop in pixels of the upright image. Squashing and padding keep the image's aspect, cropping makes a square."""
    low, high = augment.crop_area
    share = (low + (high - low) * area) ** 0.5
    narrow, wide = np.log(augment.crop_ratio)
    stretch = float(np.exp(narrow + (wide - narrow) * ratio)) ** 0.5
    base_width, base_height = (min(width, height),) * 2 if mode == "crop" else (width, height)
    # A crop that is to keep much of the image cannot be much wider or narrower: the area is kept, the ratio gives way.
    stretch = min(max(stretch, base_height * share / height), width / (base_width * share))
    return (
        min(float(width), max(1.0, base_width * share * stretch)),
        min(float(height), max(1.0, base_height * share / stretch)),
    )


def _turn(image: Image.Image, choices: np.ndarray, augment: AugmentConfig) -> Image.Image:
    if choices[0] < augment.flip_horizontal:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if choices[1] < augment.flip_vertical:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if augment.rotate_degrees:
        corner = image.getpixel((0, 0))
        angle = (2 * choices[2] - 1) * augment.rotate_degrees
        image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=corner)
    return image


def _recolour(image: Image.Image, choices: np.ndarray, noise_seed: int, augment: AugmentConfig) -> torch.Tensor:
    pixels = _to_tensor(image)
    if augment.brightness:
        pixels = tv.adjust_brightness(pixels, _factor(choices[3], augment.brightness))
    if augment.contrast:
        pixels = tv.adjust_contrast(pixels, _factor(choices[4], augment.contrast))
    if augment.saturation:
        pixels = tv.adjust_saturation(pixels, _factor(choices[5], augment.saturation))
    if augment.hue:
        pixels = tv.adjust_hue(pixels, (2 * choices[6] - 1) * augment.hue)
    if choices[7] < augment.greyscale:
        pixels = tv.rgb_to_grayscale(pixels, num_output_channels=3)
    if choices[8] < augment.invert:
        pixels = 255 - pixels
    if choices[9] < augment.blur:
        pixels = tv.gaussian_blur(pixels, [5, 5], [0.1 + 1.4 * float(choices[10])])
    if augment.noise:
        deviation = augment.noise * choices[11]
        noise = np.random.Generator(np.random.Philox(noise_seed)).standard_normal(pixels.shape, np.float32)
        pixels = (pixels + torch.from_numpy(noise) * deviation).round().clamp(0, 255).to(torch.uint8)
    return pixels


def _factor(choice: float, spread: float) -> float:
    return max(0.0, 1.0 + (2.0 * choice - 1.0) * spread)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
