"""Augmentation: as asked, from the draws alone, and nothing that was not asked for."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tv

from clipdist.data.images.augment import AugmentConfig, augment_in_place, draw_choices
from clipdist.data.images.decode import augment_pixels, load_for_training
from tests.unit.pictures import MAX_PIXELS, STILL, encoded, photograph, picture, quadrants, smooth, trained

EVERYTHING = AugmentConfig(
    crop_area=(0.3, 1.0),
    flip_horizontal=0.5,
    flip_vertical=0.5,
    quarter_turns=True,
    rotate_degrees=20,
    translate=0.1,
    scale=(0.9, 1.1),
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.1,
    greyscale=0.3,
    invert=0.3,
    blur=0.5,
    noise=10,
    poisson=0.5,
    speckle=0.1,
)


def changed(pixels: np.ndarray, seed: int = 0, **options: Any) -> np.ndarray:
    """uint8 pixels with these options, as int."""
    choices = draw_choices(np.random.default_rng(seed))
    return augment_in_place(pixels.copy(), choices, AugmentConfig(**options)).astype(int)


def drawn(seed: int, name: str) -> float:
    return float(getattr(draw_choices(np.random.default_rng(seed)), name))


# Randomness


def test_equal_generators_give_equal_pixels() -> None:
    data = encoded(smooth(90, 70), "JPEG")
    runs = [[trained(data, 32, "crop", EVERYTHING, seed) for seed in range(8)] for _ in range(2)]
    assert all(np.array_equal(one, two) for one, two in zip(*runs, strict=True))
    assert len({pixels.tobytes() for pixels in runs[0]}) == 8


def test_every_image_and_recipe_takes_equally_many_draws() -> None:
    """Otherwise what is drawn after it would hang on the image."""
    left = []
    pixels = np.zeros((9, 9, 3), np.uint8)
    for config in (STILL, EVERYTHING):
        for data in (encoded(smooth(90, 70), "JPEG"), encoded(picture(3))):
            for exact in (False, True):
                draw = np.random.default_rng(0)
                load_for_training(data, 16, "crop", MAX_PIXELS, config, draw, exact=exact)
                left.append(draw.random())
        draw = np.random.default_rng(0)
        augment_pixels(pixels, (9, 9), 16, "pad", config, draw)
        left.append(draw.random())
    assert len(set(left)) == 1


def test_one_option_does_not_change_what_another_draws() -> None:
    pixels = np.asarray(photograph(64, 64))
    alone = changed(pixels, 4, flip_horizontal=0.5, noise=5.0)
    with_more = changed(pixels, 4, flip_horizontal=0.5, noise=5.0, blur=1e-12, greyscale=1e-12)
    assert np.array_equal(alone, with_more)


def test_half_the_images_flip_when_the_probability_is_half() -> None:
    data = encoded(quadrants((32, 32)))
    flipped = [
        trained(data, 8, augment=replace(STILL, flip_horizontal=0.5), seed=seed)[1, 1, 1] > 128 for seed in range(60)
    ]
    assert 18 < sum(flipped) < 42


# Each option


@pytest.mark.parametrize(
    "change",
    [
        {"flip_horizontal": 1.0},
        {"flip_vertical": 1.0},
        {"quarter_turns": True},
        {"rotate_degrees": 30.0},
        {"brightness": 0.5},
        {"contrast": 0.5},
        {"saturation": 0.9},
        {"hue": 0.4},
        {"greyscale": 1.0},
        {"invert": 1.0},
        {"blur": 1.0},
        {"translate": 0.2},
        {"scale": (0.7, 0.8)},
        {"noise": 20.0},
        {"poisson": 5.0},
        {"speckle": 0.3},
        {"crop_area": (0.3, 0.5)},
        {"crop_ratio": (0.3, 0.5), "crop_area": (0.3, 0.3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_option_changes_pixels_and_none_does_so_when_off(change: dict[str, Any]) -> None:
    data = encoded(picture(5, (64, 64)))
    still = trained(data, 32)
    assert all(np.array_equal(still, trained(data, 32, seed=seed)) for seed in range(3))
    result = trained(data, 32, augment=replace(STILL, **change), seed=1)
    assert np.abs(result - still).mean() > 0.5
    exact = {"flip_horizontal": still[:, ::-1], "flip_vertical": still[::-1], "invert": 255 - still}
    name = next(iter(change))
    if name in exact:
        assert np.array_equal(result, exact[name])
    if name == "greyscale":
        assert np.ptp(result, axis=2).max() == 0


def test_every_quarter_turn_comes_up() -> None:
    pixels = np.asarray(quadrants((8, 8)))
    turns = [np.rot90(pixels, k).astype(int) for k in range(4)]
    found = [
        next(k for k in range(4) if np.array_equal(changed(pixels, seed, quarter_turns=True), turns[k]))
        for seed in range(60)
    ]
    assert all(found.count(k) >= 6 for k in range(4))


def test_colours_change_as_in_torchvision() -> None:
    """Of a picture that nothing clips; torchvision rounds after each step, this once."""
    pixels = np.asarray(smooth(48, 48)) // 3 + 80
    chw = tv.to_image(pixels)
    for seed in range(4):
        for name, adjust in {
            "brightness": tv.adjust_brightness,
            "contrast": tv.adjust_contrast,
            "saturation": tv.adjust_saturation,
        }.items():
            factor = 1 + (2 * drawn(seed, name) - 1) * 0.2
            expected = adjust(chw, factor).permute(1, 2, 0).numpy().astype(int)
            assert np.abs(changed(pixels, seed, **{name: 0.2}) - expected).max() <= 2
    grey = tv.rgb_to_grayscale(chw, num_output_channels=3).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(changed(pixels, greyscale=1.0) - grey).max() <= 1


def test_hue_turns_colours_and_leaves_light_and_greys_alone() -> None:
    pixels = np.asarray(smooth(48, 48)) // 3 + 80
    luma = np.array([0.299, 0.587, 0.114])
    turned = [changed(pixels, seed, hue=0.2) for seed in range(4)]
    assert all(np.abs(one @ luma - pixels @ luma).max() <= 1 for one in turned)
    assert max(np.abs(one - pixels).mean() for one in turned) > 3
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2).reshape(16, 16, 3)
    assert np.abs(changed(greys, hue=0.5) - greys).max() <= 1
    small = [np.abs(changed(pixels, seed, hue=0.02) - pixels).mean() for seed in range(4)]
    assert max(small) < 6, "the recommended bound is a small change"


def test_colour_options_together_are_their_succession() -> None:
    pixels = np.asarray(smooth(48, 48)) // 3 + 80
    options = {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.05, "invert": 1.0}
    one_by_one = pixels
    for name, value in options.items():
        one_by_one = changed(one_by_one, 7, **{name: value}).astype(np.uint8)
    assert np.abs(changed(pixels, 7, **options) - one_by_one).max() <= 3


@pytest.mark.parametrize(
    ("option", "largest", "deviation"),
    [
        ("noise", 10.0, lambda grey, strength: strength),
        ("poisson", 2.0, lambda grey, strength: (strength * grey) ** 0.5),
        ("speckle", 0.2, lambda grey, strength: strength * grey),
    ],
)
@pytest.mark.parametrize("grey", [60, 120])
def test_noise_is_as_strong_as_its_formula_says(option: str, largest: float, deviation: Any, grey: int) -> None:
    pixels = np.full((200, 200, 3), grey, np.uint8)
    for seed in range(3):
        noise = changed(pixels, seed, **{option: largest}) - grey
        assert abs(noise.mean()) < 0.3
        expected = deviation(grey, largest * drawn(seed, option))
        assert (noise.std() ** 2 - 1 / 12) ** 0.5 == pytest.approx(expected, rel=0.03)  # 1/12: rounding
        assert abs(np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())[0, 1]) < 0.03


def test_noises_add_up() -> None:
    pixels = np.full((200, 200, 3), 100, np.uint8)
    choices = draw_choices(np.random.default_rng(2))
    noise = changed(pixels, 2, noise=8.0, poisson=0.5, speckle=0.1) - 100
    variance = (8 * choices.noise) ** 2 + 0.5 * choices.poisson * 100 + (0.1 * choices.speckle * 100) ** 2
    assert noise.var() - 1 / 12 == pytest.approx(variance, rel=0.03)
    dark = np.zeros((16, 16, 3), np.uint8)
    assert changed(dark, 2, poisson=5.0, speckle=0.5).max() == 0, "no light, no photons"


def test_corners_of_a_turned_image_have_the_borders_colour() -> None:
    framed = ImageOps.expand(Image.new("RGB", (20, 20), "white"), 22, (10, 60, 90))
    pixels = trained(encoded(framed), 64, augment=replace(STILL, rotate_degrees=45.0), seed=3)
    assert np.abs(pixels[[0, 0, -1, -1], [0, -1, 0, -1]] - (10, 60, 90)).max() <= 1


def test_a_turn_is_as_pillow_makes_it() -> None:
    pixels = np.asarray(smooth(48, 48))
    for seed in range(4):
        angle = (2 * drawn(seed, "rotate") - 1) * 30
        expected = Image.fromarray(pixels).rotate(
            angle, Image.Resampling.BILINEAR, fillcolor=tuple(pixels[0, 0].tolist())
        )
        assert np.abs(changed(pixels, seed, rotate_degrees=30.0) - np.asarray(expected)).max() <= 1


def test_moved_as_in_torchvision() -> None:
    """Within the picture; torchvision counts angles clockwise and rounds shifts to whole pixels."""
    pixels = np.asarray(smooth(64, 64))
    for seed in range(6):
        shift = [(2 * drawn(seed, f"translate_{way}") - 1) * 0.1 * 64 for way in ("right", "down")]
        factor, angle = 0.9 + 0.2 * drawn(seed, "scale"), (2 * drawn(seed, "rotate") - 1) * 20
        found = changed(pixels, seed, rotate_degrees=20.0, translate=0.1, scale=(0.9, 1.1))
        moved = tv.affine(
            tv.to_image(pixels.copy()),
            -angle,
            [round(one) for one in shift],
            factor,
            [0.0, 0.0],
            tv.InterpolationMode.BILINEAR,
        )
        middle = slice(20, 44)
        difference = np.abs(found - moved.permute(1, 2, 0).numpy().astype(int))[middle, middle]
        assert difference.mean() < 2.5, "half a pixel of waves as broad as these"
        still = np.abs(found - pixels.astype(int))[middle, middle]
        assert still.mean() > 2 * difference.mean()


def test_a_shift_leaves_the_corners_colour_behind() -> None:
    pixels = np.full((50, 50, 3), 200, np.uint8)
    pixels[0, 0] = (10, 60, 90)
    for seed in range(4):
        right = round((2 * drawn(seed, "translate_right") - 1) * 0.4 * 50)
        found = changed(pixels, seed, translate=0.4)
        uncovered = found[25, : right - 1] if right > 0 else found[25, 50 + right + 1 :]
        assert (uncovered == (10, 60, 90)).all()
        assert (found == 200).all(axis=2).any()


def test_how_strong_a_blur_may_be() -> None:
    pixels = np.asarray(picture(5, (60, 60)))
    spread = [changed(pixels, 1, blur=1.0, blur_sigma=(sigma, sigma)).std() for sigma in (0.1, 1.5, 3.0)]
    assert spread == sorted(spread, reverse=True)
    assert np.array_equal(changed(pixels, 1, blur=1.0), changed(pixels, 1, blur=1.0, blur_sigma=(0.1, 1.5)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"hue": 0.6},
        {"flip_horizontal": 1.5},
        {"quarter_turns": 0.3},
        {"blur": -0.1},
        {"noise": -1.0},
        {"translate": 1.0},
        {"scale": (1.1, 0.9)},
        {"scale": (0.0, 1.0)},
        {"blur_sigma": (2.0, 1.0)},
        {"poisson": -1.0},
        {"speckle": -1.0},
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
