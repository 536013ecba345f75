"""Where crops lie and how they are resized: as the recipe allows, and the same for the fast and the exact path."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from clipdist.data.images import decode
from clipdist.data.images.augment import AugmentConfig
from clipdist.data.images.decode import augment_pixels, decode_rgb, load_for_evaluation, load_for_training
from clipdist.data.images.geometry import ENOUGH, Box, ResizeMode, crop_size, place_crop, stored_box, whole_pixels
from clipdist.data.images.header import JpegHeader
from clipdist.data.images.jpeg import decode_reduced
from clipdist.data.images.resize import resize_exact, resize_rgb
from tests.unit.pictures import (
    MAX_PIXELS,
    STILL,
    encoded,
    evaluated,
    photograph,
    quadrants,
    smooth,
    stored,
    trained,
    with_orientation,
)

MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)
LENGTHS = st.integers(1, 3_000)
CHOICE = st.floats(0, 1, exclude_max=True)


# Modes


@pytest.mark.parametrize("exact", [False, True])
def test_squash_crop_and_pad_differ_as_they_should(exact: bool) -> None:
    data = encoded(quadrants((80, 40)))
    red, green, blue, white = ([255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255])
    squash, crop, pad = (evaluated(data, 40, mode, exact) for mode in ("squash", "crop", "pad"))
    for pixels in (squash, crop):
        assert [pixels[y, x].tolist() for y in (2, 37) for x in (2, 37)] == [red, green, blue, white]
    assert np.abs(crop[10, 15] - red).max() <= 2, "the middle square, unsquashed"
    assert pad[2, 20].tolist() == white
    assert [pad[y, x].tolist() for y in (12, 27) for x in (2, 37)] == [red, green, blue, white]
    third = encoded(Image.fromarray(np.kron([[0, 100, 200]], np.ones((20, 20))).astype(np.uint8)))
    assert np.unique(evaluated(third, 20, "crop", exact)).tolist() == [100], "only the middle third is kept"


@pytest.mark.parametrize("mode", MODES)
def test_without_changes_training_pixels_are_evaluation_pixels(mode: ResizeMode) -> None:
    wide, square = encoded(smooth(96, 64)), encoded(smooth(64, 64))
    assert np.array_equal(trained(square, 32, mode, exact=True), evaluated(square, 32, mode))
    if mode == "squash":  # a crop's place is drawn; padding falls on whole pixels of the reduced image
        assert np.abs(trained(wide, 32, mode, exact=True) - evaluated(wide, 32, mode)).mean() < 1


@given(LENGTHS, LENGTHS, st.sampled_from(MODES), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_evaluation_resizes_as_pillow_does(width: int, height: int, mode: ResizeMode, side: int) -> None:
    width, height = width // 10 + 1, height // 10 + 1
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    size, how = (side, side), Image.Resampling.BICUBIC
    if mode == "pad":
        assume(round(min(width, height) / max(width, height) * side) > 0)  # Pillow would show nothing
        expected = ImageOps.pad(image, size, how, color="white")
    else:
        expected = ImageOps.fit(image, size, how) if mode == "crop" else image.resize(size, how)
    assert np.array_equal(evaluated(encoded(image), side, mode), np.asarray(expected))


@pytest.mark.parametrize("exact", [False, True])
def test_padding_is_white_on_the_short_sides(exact: bool) -> None:
    data = encoded(Image.new("RGB", (60, 30), "black"))
    for pixels in (trained(data, 32, "pad", exact=exact), evaluated(data, 32, "pad", exact)):
        # A crop lies on whole pixels of the reduced image: its border may move by one.
        assert pixels[:8].min() == 255
        assert pixels[9:23].max() == 0
        assert pixels[25:].min() == 255
    nothing = AugmentConfig(crop_area=(0.01, 0.01), crop_ratio=(1, 1))
    thin = encoded(Image.new("RGB", (600, 90), "black"))
    whites = [trained(thin, 16, "pad", nothing, seed, exact).min() == 255 for seed in range(20)]
    assert any(whites), "a small crop may lie beside the image"
    assert not all(whites)


# Crops


@given(
    LENGTHS,
    LENGTHS,
    st.tuples(CHOICE, CHOICE, CHOICE, CHOICE),
    st.sampled_from(MODES),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair))),
    st.tuples(st.floats(0.1, 1), st.floats(1, 10)),
)
@settings(max_examples=400, deadline=None)
def test_a_crop_keeps_the_area_that_the_recipe_allows(
    width: int,
    height: int,
    chosen: tuple[float, float, float, float],
    mode: ResizeMode,
    areas: tuple[float, float],
    ratios: tuple[float, float],
) -> None:
    frame_width, frame_height = (max(width, height),) * 2 if mode == "pad" else (width, height)
    crop_width, crop_height = crop_size(frame_width, frame_height, *chosen[:2], mode, areas, ratios)
    assert 1 <= crop_width <= frame_width
    assert 1 <= crop_height <= frame_height
    base_width, base_height = (min(width, height),) * 2 if mode == "crop" else (frame_width, frame_height)
    kept = crop_width * crop_height / (base_width * base_height)
    if min(crop_width, crop_height) > 1:  # a crop has at least a pixel
        assert areas[0] * (1 - 1e-9) <= kept <= areas[1] * (1 + 1e-9)
        stretch = (crop_width / base_width) / (crop_height / base_height)
        assert ratios[0] * (1 - 1e-9) <= stretch <= ratios[1] * (1 + 1e-9)
    box = place_crop(width, height, mode, chosen, areas, ratios)
    assert box.right - box.left == pytest.approx(crop_width)
    assert box.left >= -(frame_width - width) / 2 - 1e-6
    assert box.bottom <= height + (frame_height - height) / 2 + 1e-6


@given(LENGTHS, LENGTHS, st.tuples(CHOICE, CHOICE, CHOICE, CHOICE), st.sampled_from(MODES), st.integers(1, 400))
@settings(max_examples=400, deadline=None)
def test_whole_pixels_stay_where_the_crop_was(
    width: int, height: int, chosen: tuple[float, float, float, float], mode: ResizeMode, side: int
) -> None:
    box = place_crop(width, height, mode, chosen, (0.3, 1.0), (0.5, 2.0))
    crop = whole_pixels(box, width, height, side, mode)
    r = crop.reduction
    assert (r == 1) or min(crop.width, crop.height) >= int(side * ENOUGH)
    for start, length, low, high, limit in (
        (crop.left, crop.width, box.left, box.right, width),
        (crop.top, crop.height, box.top, box.bottom, height),
    ):
        assert length >= 1
        assert abs(start * r - low) <= 2 * r
        assert abs((start + length) * r - high) <= 2 * r
        if mode != "pad":
            assert start >= 0
            assert (start + length) * r <= limit


@given(LENGTHS, LENGTHS, st.integers(1, 8), st.tuples(CHOICE, CHOICE, CHOICE, CHOICE))
@settings(max_examples=100, deadline=None)
def test_a_box_of_the_upright_image_is_found_in_the_stored_one(
    width: int, height: int, orientation: int, edges: tuple[float, float, float, float]
) -> None:
    """The box in an array that holds each pixel's own coordinates."""
    left, right = sorted(round(e * width) for e in edges[:2])
    top, bottom = sorted(round(e * height) for e in edges[2:])
    stored_width, stored_height = (height, width) if orientation > 4 else (width, height)
    box = stored_box(Box(left, top, right, bottom), stored_width, stored_height, orientation)
    flat = np.zeros((height, width), bool)
    flat[top:bottom, left:right] = True
    turned = np.asarray(stored(Image.fromarray(flat), orientation))
    assert turned.shape == (stored_height, stored_width)
    inside = turned[int(box.top) : int(box.bottom), int(box.left) : int(box.right)]
    assert inside.all()
    assert inside.sum() == turned.sum()


def test_crops_spread_over_the_whole_image() -> None:
    """Grey levels tell where a crop lies."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 256).astype(np.uint8), (256, 1)))
    data, config = encoded(ramp), AugmentConfig(crop_area=(0.25, 0.25), crop_ratio=(1, 1))
    middles = np.array([trained(data, 16, "squash", config, seed).mean() for seed in range(60)])
    assert middles.min() < 80
    assert middles.max() > 175
    assert abs(middles.mean() - 127.5) < 15


# The fast path and the exact one


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    return [
        encoded(photograph(*size, seed), "JPEG", quality=quality)
        for seed, (size, quality) in enumerate([((512, 384), 85), ((771, 1013), 90), ((1030, 517), 88)])
    ]


@pytest.mark.parametrize("mode", MODES)
def test_the_fast_path_is_close_to_the_exact_one(mode: ResizeMode, photographs: list[bytes]) -> None:
    """Half a pixel of shift between the two would show as three grey levels and more."""
    for data in photographs:
        for side in (56, 100, 224):
            assert np.abs(evaluated(data, side, mode, exact=False) - evaluated(data, side, mode)).mean() <= 2
            for seed in range(2):
                fast = trained(data, side, mode, AugmentConfig(), seed)
                exact = trained(data, side, mode, AugmentConfig(), seed, exact=True)
                assert np.abs(fast - exact).mean() <= 2
                assert abs((fast - exact).mean()) <= 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_they_are_close_in_every_orientation(orientation: int) -> None:
    data = with_orientation(stored(photograph(421, 307), orientation), orientation)
    for seed in range(2):
        augment = AugmentConfig(crop_area=(0.3, 1.0), quarter_turns=True, flip_horizontal=0.5)
        fast, exact = (trained(data, 56, "crop", augment, seed, exact) for exact in (False, True))
        assert np.abs(fast - exact).mean() <= 2


@pytest.mark.parametrize("mode", MODES)
def test_pixels_decoded_earlier_give_the_same_picture(mode: ResizeMode, photographs: list[bytes]) -> None:
    for data in photographs[:2]:
        full = decode_rgb(data, MAX_PIXELS)
        size = full.shape[:2]
        half = resize_rgb(full, (size[0] // 2, size[1] // 2))
        half.flags.writeable = False  # as mapped from a file
        for seed in range(2):
            direct = trained(data, 112, mode, AugmentConfig(), seed)
            for pixels, limit in ((full, 2), (half, 4)):  # the edges of the crop move by half a pixel of `pixels`
                draw = np.random.default_rng(seed)
                cached = augment_pixels(pixels, size, 112, mode, AugmentConfig(), draw)
                assert np.abs(cached - direct).mean() <= limit


def test_pixels_smaller_than_the_model_are_enlarged() -> None:
    pixels = np.full((5, 9, 3), 77, np.uint8)
    for mode in MODES:
        result = augment_pixels(pixels, (500, 900), 32, mode, AugmentConfig(), np.random.default_rng(0))
        assert result[16, 16].tolist() == [77, 77, 77]
        assert result.shape == (32, 32, 3)


def test_a_jpeg_is_decoded_no_smaller_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    reductions: list[int] = []

    def note(data: bytes, header: JpegHeader, reduction: int) -> np.ndarray | None:
        reductions.append(reduction)
        return decode_reduced(data, header, reduction)

    monkeypatch.setattr(decode, "decode_reduced", note)
    data = encoded(smooth(800, 640), "JPEG")
    for side in (32, 64, 91, 92, 100, 182, 183, 365, 366, 640):
        trained(data, side, "squash", STILL)
    assert reductions == [8, 8, 8, 4, 4, 4, 2, 2, 1, 1]


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_torch_resizes_as_pillow_does(height: int, width: int, to_height: int, to_width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    fast, exact = (resize(pixels, (to_height, to_width)).astype(int) for resize in (resize_rgb, resize_exact))
    assert np.abs(fast - exact).mean() <= 1


@pytest.mark.parametrize("exact", [False, True])
def test_pixels_are_written_where_they_are_wanted(exact: bool) -> None:
    batch = np.zeros((3, 32, 32, 3), np.uint8)
    profiled = encoded(quadrants(), "JPEG", icc_profile=b"broken")
    for data in (encoded(smooth(90, 70), "JPEG"), encoded(smooth(90, 70)), profiled):
        for mode in MODES:
            expected = trained(data, 32, mode, AugmentConfig(noise=9.0), 3, exact)
            batch[:] = 0
            draw = np.random.default_rng(3)
            config = AugmentConfig(noise=9.0)
            row = load_for_training(data, 32, mode, MAX_PIXELS, config, draw, exact=exact, out=batch[1])
            assert np.shares_memory(row, batch)
            assert np.array_equal(batch[1], expected)
            row = load_for_evaluation(data, 32, mode, MAX_PIXELS, exact=exact, out=batch[2])
            assert np.shares_memory(row, batch)
            assert np.array_equal(batch[2], evaluated(data, 32, mode, exact))
            assert batch[0].max() == 0


def test_the_same_part_is_seen_at_every_size_of_the_model(photographs: list[bytes]) -> None:
    """One crop, drawn once: decoded at different fractions, it shows the same."""
    augment = replace(AugmentConfig(), crop_area=(0.4, 0.4))
    large = trained(photographs[1], 336, "crop", augment, 5)
    for side in (84, 168):
        small = trained(photographs[1], side, "crop", augment, 5)
        shrunk = resize_exact(large.astype(np.uint8), (side, side)).astype(int)
        assert np.abs(small - shrunk).mean() < 3
