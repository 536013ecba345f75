"""Each fault of a picture is named, alone, and sound pictures are not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from clipdist.data.images.quality import QUALITY, QualityLimits, blur_of, judged, quality_of
from clipdist.data.sets.survey import see
from clipdist.errors import UserError
from tests.unit.pictures import encoded, photograph


def faults_of(*images: Image.Image) -> list[set[str]]:
    quality = np.array([quality_of(see(encoded(image))) for image in images], QUALITY)
    width, height = (np.array([image.size[side] for image in images]) for side in (0, 1))
    found = QualityLimits().faults(quality, width, height)
    return [{fault for fault, badness in found.items() if not np.isnan(badness[row])} for row in range(len(images))]


PHOTOGRAPH = photograph(320, 240, 1)
WHITE_OUT = np.array(PHOTOGRAPH)
WHITE_OUT[:200] = 255
BAD = {
    "blank": Image.new("RGB", (300, 200), (3, 4, 3)),
    "blurred": PHOTOGRAPH.filter(ImageFilter.GaussianBlur(5)),
    "saturated": Image.fromarray(WHITE_OUT),
    "dark": ImageEnhance.Brightness(PHOTOGRAPH).enhance(0.15),
    "tiny": photograph(60, 40, 2),
    "long": photograph(800, 150, 3),
}


@pytest.mark.parametrize("fault", list(BAD))
def test_each_fault_is_named_alone(fault: str) -> None:
    assert faults_of(BAD[fault]) == [{fault}]


def test_sound_photographs_have_none() -> None:
    assert faults_of(*(photograph(320, 240, seed) for seed in range(20))) == [set()] * 20


def test_contrast_does_not_pass_for_sharpness() -> None:
    faint = ImageEnhance.Contrast(PHOTOGRAPH).enhance(0.4)
    strong_blur = ImageEnhance.Contrast(PHOTOGRAPH.filter(ImageFilter.GaussianBlur(5))).enhance(2)
    assert faults_of(faint, strong_blur) == [set(), {"blurred"}]


def test_blur_grows_with_blurring() -> None:
    values = [
        blur_of(np.asarray(PHOTOGRAPH.filter(ImageFilter.GaussianBlur(radius)).convert("L"))) for radius in (0, 1, 2, 4)
    ]
    assert values == sorted(values)
    assert values[0] < 0.5 < values[-1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 100))
def test_any_size_is_measured(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = quality_of(judged(Image.fromarray(pixels)))
    assert 0 <= float(found["blur"]) <= 1
    assert 0 <= float(found["clipped"]) <= 1


def test_a_picture_that_was_not_read_has_no_fault() -> None:
    found = QualityLimits().faults(np.zeros(1, QUALITY), np.zeros(1, int), np.zeros(1, int))
    assert all(np.isnan(badness).all() for badness in found.values())


def test_limits_below_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="--dark: found -1"):
        QualityLimits(dark=-1)
