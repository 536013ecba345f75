"""Encoded bytes -> pixels: every mode upright and right, nothing too large or broken let in, augmentation as asked."""

import io
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from clipdist.data.images.decode import (
    AugmentConfig,
    ResizeMode,
    _crop_size,
    load_for_evaluation,
    load_for_training,
    open_image,
    to_rgb,
)
from clipdist.data.shards import BadSample
from tests.unit.pictures import encoded, picture

MAX = 10_000_000
MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)
# The whole image, unchanged.
STILL = AugmentConfig(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))


def smooth(width: int, height: int) -> Image.Image:
    """Broad waves of colour, as in a photograph; no edge that a JPEG would blur."""
    y, x = np.mgrid[0:height, 0:width] / 40.0
    waves = [np.sin(x + phase) + np.cos(1.3 * y - phase) + np.sin(0.3 * x * phase + y) for phase in (0.3, 1.1, 2.4)]
    return Image.fromarray((127 + 40 * np.stack(waves, 2)).clip(0, 255).astype(np.uint8))


def quadrants(size: tuple[int, int] = (80, 40)) -> Image.Image:
    """red, green above blue, white: every turn of it looks different."""
    image = Image.new("RGB", (2, 2))
    image.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)])
    return image.resize(size, Image.Resampling.NEAREST)


def evaluated(data: bytes, side: int = 32, mode: ResizeMode = "squash") -> np.ndarray:
    pixels = load_for_evaluation(data, side, mode, MAX)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, side, side)
    return pixels.numpy().astype(int)


def trained(
    data: bytes, side: int = 32, mode: ResizeMode = "squash", augment: AugmentConfig = STILL, seed: int = 0
) -> np.ndarray:
    pixels = load_for_training(data, side, mode, MAX, augment, np.random.default_rng(seed))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, side, side)
    return pixels.numpy().astype(int)


def with_orientation(image: Image.Image, orientation: int, format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(image, format, exif=exif, **({"quality": 98, "subsampling": 0} if format == "JPEG" else {}))


# Modes


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16", "CMYK"])
@pytest.mark.parametrize("load", [evaluated, trained])
def test_every_mode_comes_out_as_the_colours_it_shows(mode: str, load: Any) -> None:
    image = quadrants()
    if mode == "CMYK":
        data = encoded(image.convert("CMYK"), "JPEG", quality=98)
    elif mode == "I;16":
        data = encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257))
    else:
        data = encoded(image.convert(mode))
    grey = mode in ("1", "L", "LA", "I;16")
    expected = np.asarray(
        (image.convert("1" if mode == "1" else "L") if grey else image).convert("RGB").resize((32, 32))
    )
    inner = np.s_[:, 4:12, 4:12] if mode != "1" else np.s_[:, 20:28, 20:28]
    assert np.abs(load(data) - expected.transpose(2, 0, 1))[inner].max() <= 3
    assert np.abs(load(data) - expected.transpose(2, 0, 1)).mean() <= (12 if mode == "1" else 3)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    row = np.asarray(to_rgb(open_image(encoded(Image.fromarray(ramp)), MAX)))[0, :, 0].astype(int)
    assert np.abs(row - np.linspace(0, 255, 64)).max() <= 1


def test_values_below_zero_are_black() -> None:
    signed = Image.fromarray(np.array([[-1000, 0, 65535, 70_000]], np.int32).repeat(2, 0))
    assert np.asarray(to_rgb(open_image(encoded(signed, "TIFF"), MAX)))[0, :, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "L", "RGB", "1"])
def test_transparency_is_white(mode: str) -> None:
    black = Image.new("RGB", (20, 20), "black")
    if mode in ("RGBA", "LA"):
        black.putalpha(Image.fromarray(np.kron([[0, 255]], np.ones((20, 10))).astype(np.uint8)))
        data = encoded(black.convert(mode))
    else:
        black.paste((10, 10, 10) if mode != "1" else (255, 255, 255), (0, 0, 10, 20))
        colour = {"P": 1, "RGB": (10, 10, 10), "L": 10, "1": 255}[mode]
        flat = black.convert(mode) if mode != "P" else black.quantize(2)
        if mode == "P":
            colour = flat.getpixel((0, 0))
        data = encoded(flat, transparency=colour)
    pixels = np.asarray(to_rgb(open_image(data, MAX)))
    assert pixels[:, :10].min() == 255
    assert pixels[:, 10:].max() == 0


# Orientation


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", MODES)
def test_training_and_evaluation_agree_on_upright(orientation: int, mode: ResizeMode, format: str) -> None:
    """A picture stored turned, with the tag that says so, gives the pixels of the picture stored upright."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = quadrants((160, 80))
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    data = with_orientation(stored, orientation, format)
    expected = evaluated(encoded(upright), 16, mode)
    assert np.abs(evaluated(data, 16, mode) - expected).mean() < 3
    if mode != "crop":  # where the crop lies is drawn
        assert np.abs(trained(data, 16, mode) - expected).mean() < 6
    augment = AugmentConfig(crop_area=(0.3, 0.6))
    plain = trained(encoded(upright), 16, mode, augment)
    assert np.abs(trained(data, 16, mode, augment) - plain).mean() < 8


# Refusals


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    data = encoded(Image.new("L", (5_000, 5_000)))
    assert len(data) < 100_000
    for load in (load_for_evaluation, load_for_training):
        more = (STILL, np.random.default_rng(0)) if load is load_for_training else ()
        with pytest.raises(BadSample, match=r"5000×5000 pixels, more than data\.max_image_pixels=24999999"):
            load(data, 32, "crop", 24_999_999, *more)  # type: ignore[operator]
    assert open_image(data, 25_000_000).size == (5_000, 5_000)


def test_the_size_is_checked_while_the_pixels_are_still_encoded() -> None:
    """Only the header is there: whoever decoded first would fail for another reason."""
    header = encoded(Image.new("L", (5_000, 5_000)))[:60]
    with pytest.raises(BadSample, match="pixels, more than"):
        open_image(header, 1_000)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_truncated_image_is_a_bad_sample(format: str) -> None:
    data = encoded(picture(0, (200, 150)), format)
    for load in (evaluated, trained):
        assert load(data).shape == (3, 32, 32)
        for share in (0.0, 0.1, 0.5, 0.8):
            with pytest.raises(BadSample, match=r"^unreadable image: .+"):
                load(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"", b"not an image", b"<svg/>", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_a_bad_sample(data: bytes) -> None:
    for load in (evaluated, trained):
        with pytest.raises(BadSample, match=r"^unreadable image: .+"):
            load(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow says what it found
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF"]), st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_damaged_image_is_read_or_is_a_bad_sample(format: str, place: int, value: int) -> None:
    """Headers and metadata, where decoders raise everything from SyntaxError to struct.error."""
    data = bytearray(with_orientation(picture(0, (20, 20)), 6, format))
    data[place % min(len(data), 300)] = value
    for load in (evaluated, trained):
        try:
            load(bytes(data))
        except BadSample:
            continue


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (1, 400), (400, 1), (3, 2_000)])
@pytest.mark.parametrize("mode", MODES)
def test_the_thinnest_images_work(size: tuple[int, int], mode: ResizeMode) -> None:
    data = encoded(Image.new("RGB", size, (200, 10, 10)))
    for load in (evaluated, trained):
        assert load(data, 32, mode).max() >= 200
    assert trained(data, 32, mode, AugmentConfig()).max() >= 200


# Resizing


def test_squash_crop_and_pad_differ_as_they_should() -> None:
    data = encoded(quadrants((80, 40)))
    squash, crop, pad = (evaluated(data, 40, mode) for mode in ("squash", "crop", "pad"))
    red, green, blue, white = ([255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255])
    for pixels in (squash, crop):
        corners = [pixels[:, y, x].tolist() for y in (2, 37) for x in (2, 37)]
        assert corners == [red, green, blue, white]
    assert np.abs(crop[:, 10, 15] - red).max() <= 2, "the middle square, unsquashed"
    assert pad[:, 2, 20].tolist() == white
    assert [pad[:, y, x].tolist() for y in (12, 27) for x in (2, 37)] == [red, green, blue, white]
    third = encoded(Image.fromarray(np.kron([[0, 100, 200]], np.ones((20, 20))).astype(np.uint8)))
    assert np.unique(evaluated(third, 20, "crop")).tolist() == [100], "only the middle third is kept"


@pytest.mark.parametrize("mode", ["squash", "pad"])
def test_without_changes_training_pixels_are_evaluation_pixels(mode: ResizeMode) -> None:
    data = encoded(smooth(96, 64))
    # Training pads before it resizes, so that the white edges are interpolated.
    assert np.abs(trained(data, 32, mode) - evaluated(data, 32, mode)).mean() <= (0 if mode == "squash" else 7)
    square = encoded(smooth(64, 64))
    assert np.array_equal(trained(square, 32, "crop"), evaluated(square, 32, "crop"))


def test_padding_in_training_is_white_on_the_short_sides() -> None:
    pixels = trained(encoded(Image.new("RGB", (60, 30), "black")), 32, "pad")
    assert pixels[:, :7].min() == 255
    assert pixels[:, 9:23].max() == 0
    assert pixels[:, 25:].min() == 255


@given(
    st.integers(1, 3_000),
    st.integers(1, 3_000),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(MODES),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair))),
    st.tuples(st.floats(0.1, 1), st.floats(1, 10)),
)
@settings(max_examples=400, deadline=None)
def test_a_crop_keeps_the_area_that_the_recipe_allows(
    width: int,
    height: int,
    area: float,
    ratio: float,
    mode: ResizeMode,
    areas: tuple[float, float],
    ratios: tuple[float, float],
) -> None:
    config = AugmentConfig(crop_area=areas, crop_ratio=ratios)
    crop_width, crop_height = _crop_size(width, height, area, ratio, mode, config)
    assert 1 <= crop_width <= width
    assert 1 <= crop_height <= height
    base_width, base_height = (min(width, height),) * 2 if mode == "crop" else (width, height)
    kept = crop_width * crop_height / (base_width * base_height)
    if min(crop_width, crop_height) > 1:  # a crop has at least a pixel
        assert areas[0] * (1 - 1e-9) <= kept <= areas[1] * (1 + 1e-9)
        stretch = (crop_width / base_width) / (crop_height / base_height)
        assert ratios[0] * (1 - 1e-9) <= stretch <= ratios[1] * (1 + 1e-9)


def test_crops_spread_over_the_whole_image() -> None:
    """Grey levels tell where a crop lies."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 256).astype(np.uint8), (256, 1)))
    data, config = encoded(ramp), AugmentConfig(crop_area=(0.25, 0.25), crop_ratio=(1, 1))
    middles = np.array([trained(data, 16, "squash", config, seed).mean() for seed in range(60)])
    assert middles.min() < 80
    assert middles.max() > 175
    assert abs(middles.mean() - 127.5) < 15


# Randomness


def test_equal_generators_give_equal_pixels() -> None:
    everything = AugmentConfig(
        crop_area=(0.3, 1.0),
        flip_horizontal=0.5,
        flip_vertical=0.5,
        rotate_degrees=20,
        brightness=0.3,
        contrast=0.3,
        saturation=0.3,
        hue=0.1,
        greyscale=0.3,
        invert=0.3,
        blur=0.5,
        noise=10,
    )
    data = encoded(smooth(90, 70), "JPEG")
    runs = [[trained(data, 32, "crop", everything, seed) for seed in range(8)] for _ in range(2)]
    assert all(np.array_equal(one, two) for one, two in zip(*runs, strict=True))
    assert len({pixels.tobytes() for pixels in runs[0]}) == 8


def test_every_image_and_recipe_takes_equally_many_draws() -> None:
    """Otherwise what is drawn after it would hang on the image."""
    left = []
    for data in (encoded(smooth(90, 70), "JPEG"), encoded(picture(3))):
        for config in (STILL, AugmentConfig(noise=5, blur=0.5)):
            draw = np.random.default_rng(0)
            load_for_training(data, 16, "crop", MAX, config, draw)
            left.append(draw.random())
    assert len(set(left)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"flip_horizontal": 1.0},
        {"flip_vertical": 1.0},
        {"rotate_degrees": 30.0},
        {"brightness": 0.5},
        {"contrast": 0.5},
        {"saturation": 0.9},
        {"hue": 0.4},
        {"greyscale": 1.0},
        {"invert": 1.0},
        {"blur": 1.0},
        {"noise": 20.0},
        {"crop_area": (0.3, 0.5)},
        {"crop_ratio": (0.3, 0.5), "crop_area": (0.3, 0.3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_option_changes_pixels_and_none_does_so_when_off(change: dict[str, Any]) -> None:
    data = encoded(picture(5, (64, 64)))
    still = trained(data, 32)
    assert all(np.array_equal(still, trained(data, 32, seed=seed)) for seed in range(3))
    changed = trained(data, 32, augment=replace(STILL, **change))
    assert np.abs(changed - still).mean() > 0.5
    exact = {"flip_horizontal": still[:, :, ::-1], "flip_vertical": still[:, ::-1], "invert": 255 - still}
    name = next(iter(change))
    if name in exact:
        assert np.array_equal(changed, exact[name])
    if name == "greyscale":
        assert np.ptp(changed, axis=0).max() == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"hue": 0.6},
        {"flip_horizontal": 1.5},
        {"blur": -0.1},
        {"noise": -1.0},
        {"crop_area": (0.9, 0.8)},
        {"crop_area": (0.5, 1.5)},
        {"crop_area": (0.0, 1.0)},
        {"crop_ratio": (0.0, 1.0)},
        {"crop_ratio": (2.0, 1.0)},
    ],
    ids=str,
)
def test_options_outside_their_range_are_refused_when_read(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentConfig(**wrong)


def test_half_the_images_flip_when_the_probability_is_half() -> None:
    data = encoded(quadrants((32, 32)))
    flipped = [
        trained(data, 8, augment=replace(STILL, flip_horizontal=0.5), seed=seed)[1, 1, 1] > 128 for seed in range(60)
    ]
    assert 18 < sum(flipped) < 42


def test_corners_of_a_turned_image_have_the_borders_colour() -> None:
    framed = ImageOps.expand(Image.new("RGB", (20, 20), "white"), 22, (10, 60, 90))
    pixels = trained(encoded(framed), 64, augment=replace(STILL, rotate_degrees=45.0), seed=3)
    assert np.abs(pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]] - np.array([[10], [60], [90]])).max() <= 1


@pytest.mark.parametrize("mode", MODES)
def test_the_shortcut_through_a_jpeg_stays_close_to_a_full_decode(mode: ResizeMode) -> None:
    image = smooth(960, 640)
    full = encoded(image, "JPEG", quality=95)
    decoded = encoded(Image.open(io.BytesIO(full)).convert("RGB"))
    for orientation in (1, 6):
        data = with_orientation(Image.open(io.BytesIO(full)), orientation)
        png = with_orientation(Image.open(io.BytesIO(decoded)), orientation, "PNG")
        for seed in range(3):
            quick = trained(data, 64, mode, AugmentConfig(), seed)
            slow = trained(png, 64, mode, AugmentConfig(), seed)
            assert np.abs(quick - slow).mean() < 1.5
            assert quick.std() > 20


def test_the_shortcut_is_taken_only_while_enough_pixels_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, int]] = []

    def note(image: Image.Image) -> Image.Image:
        image = to_rgb(image)
        decoded.append(image.size)
        return image

    monkeypatch.setattr("clipdist.data.images.decode.to_rgb", note)
    data = encoded(smooth(800, 640), "JPEG")
    for side in (32, 64, 100, 200, 300, 640):
        trained(data, side, "squash", STILL)
    assert all(min(size) >= side for size, side in zip(decoded, (32, 64, 100, 200, 300, 640), strict=True))
    assert decoded[0] == (100, 80)
    assert decoded[-1] == (800, 640)
