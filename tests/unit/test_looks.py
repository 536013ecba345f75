"""Copies of a picture are found however they were made, other pictures are not, and no pair is missed or doubled."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from clipdist.data.images.looks import LOOK, difference_hash, look_of, same_pictures
from clipdist.data.sets import duplicates
from clipdist.data.sets.duplicates import Duplicates, bit_counts, cosine_pairs, find_duplicates, near_pairs
from clipdist.data.sets.survey import see
from clipdist.errors import UserError
from tests.unit.pictures import encoded, photograph

COUNT = 40


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [photograph(320, 240, seed) for seed in range(COUNT)]


def recompressed(image: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=25)))


def resized(image: Image.Image) -> Image.Image:
    return image.resize((144, 120), Image.Resampling.BICUBIC)


def cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop((round(0.03 * width), 0, round(0.99 * width), round(0.96 * height)))


def brightened(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.25)


def all_at_once(image: Image.Image) -> Image.Image:
    return recompressed(brightened(resized(cropped(image))))


def looks_of(images: list[Image.Image]) -> np.ndarray:
    return np.array([look_of(see(encoded(image, "PNG"))) for image in images], LOOK)


def found_in(looks: np.ndarray, bits: int = 10) -> Duplicates:
    return find_duplicates(np.arange(1, len(looks) + 1).astype(np.uint64), looks, bits)


@pytest.mark.parametrize(
    ("change", "share"), [(recompressed, 1), (resized, 1), (cropped, 0.95), (brightened, 1), (all_at_once, 0.9)]
)
def test_a_changed_copy_is_found_and_nothing_else(photographs: list[Image.Image], change: object, share: float) -> None:
    looks = looks_of([*photographs, *map(change, photographs)])  # type: ignore[arg-type]
    found = found_in(looks)
    pairs = set(map(tuple, found.pairs_P2.tolist()))
    right = {(number, COUNT + number) for number in range(COUNT)}
    assert pairs <= right
    assert len(pairs & right) >= share * COUNT
    assert (found.scores_P >= 0.65).all()
    assert found.cut_short == 0


def test_unrelated_pictures_are_never_the_same_even_when_compared(photographs: list[Image.Image]) -> None:
    looks = looks_of(photographs)
    pairs = np.stack(np.triu_indices(COUNT, 1), 1)
    assert not same_pictures(looks, pairs).any()


def in_a_dermoscope(image: Image.Image) -> Image.Image:
    square = np.array(image.resize((240, 240)))
    y, x = np.mgrid[-1:1:240j, -1:1:240j]
    square[np.hypot(x, y) > 0.97] = 0
    return Image.fromarray(square)


def test_a_border_that_all_share_makes_no_duplicates(photographs: list[Image.Image]) -> None:
    looks = looks_of([in_a_dermoscope(image) for image in photographs])
    pairs = np.stack(np.triu_indices(COUNT, 1), 1)
    assert not same_pictures(looks, pairs).any()
    again = looks_of([recompressed(in_a_dermoscope(image)) for image in photographs])
    rows = np.arange(COUNT)
    assert (same_pictures(np.concatenate([looks, again]), np.stack([rows, COUNT + rows], 1)) > 0).all()


def test_another_colour_is_another_picture(photographs: list[Image.Image]) -> None:
    vivid = ImageEnhance.Color(photographs[0]).enhance(3)
    looks = looks_of([vivid, vivid, Image.merge("RGB", vivid.split()[::-1])])
    looks["grey"] = looks["grey"][0]  # the same light, so that colour alone can tell
    same, swapped = same_pictures(looks, np.array([[0, 1], [0, 2]])).tolist()
    assert (same > 0.99, swapped) == (True, 0)


def test_flat_pictures_are_no_duplicates_of_each_other() -> None:
    looks = looks_of([Image.new("RGB", (300, 200), grey) for grey in ((10,) * 3, (90,) * 3, (200, 10, 10))])
    assert len(found_in(looks).pairs_P2) == 0


def test_equal_bytes_are_joined_through_the_first_of_them(photographs: list[Image.Image]) -> None:
    looks = looks_of([photographs[0], photographs[1], photographs[0], recompressed(photographs[0])])
    found = find_duplicates(np.array([7, 8, 7, 9], np.uint64), looks)
    assert found.first_N.tolist() == [0, 1, 0, 3]
    assert found.pairs_P2.tolist() == [[0, 3]]
    assert sorted(map(tuple, found.edges().tolist())) == [(0, 2), (0, 3)]


def test_what_cannot_be_read_is_like_nothing(photographs: list[Image.Image]) -> None:
    looks = np.zeros(4, LOOK)
    looks[0] = looks_of(photographs[:1])[0]
    found = find_duplicates(np.array([5, 0, 0, 0], np.uint64), looks)
    assert len(found.edges()) == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_near_pairs_are_all_those_within_any_distance_once(data: st.DataObject) -> None:
    bits = data.draw(st.integers(0, 12))
    base = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6))
    flips = st.lists(st.integers(0, 63), max_size=bits + 3)
    looks = base + [
        base[data.draw(st.integers(0, len(base) - 1))] ^ sum({1 << bit for bit in data.draw(flips)}) for _ in range(10)
    ]
    found = [
        pair
        for first, second in near_pairs(np.array(looks, np.uint64), None, bits)
        for pair in zip(first.tolist(), second.tolist(), strict=True)
    ]
    numbered = list(enumerate(looks))
    assert len(found) == len(set(found))
    assert set(found) == {(i, j) for i, a in numbered for j, b in numbered if i < j and (a ^ b).bit_count() <= bits}


@pytest.mark.parametrize("few", [0, 10**9], ids=["parts by trial", "one part"])
def test_long_runs_lose_and_double_nothing(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(duplicates, "FEW_ROWS", few)
    draw = np.random.default_rng(3)
    # Two crowds that agree in most bits, each longer than `LONG_RUN`, among hashes of no kind.
    crowds = [
        np.uint64(base) ^ (draw.integers(0, 2, (200, 12)) << draw.integers(0, 64, 12)).sum(1, dtype=np.uint64)
        for base in (0x0123456789ABCDEF, 0x0F1E2D3C4B5A6978)
    ]
    looks = np.concatenate([*crowds, draw.integers(0, 2**64, 100, dtype=np.uint64)])
    found = [pair for one in near_pairs(looks, None, 4) for pair in zip(*map(np.ndarray.tolist, one), strict=True)]
    rows, columns = np.nonzero(np.triu(bit_counts(looks[:, None] ^ looks[None]) <= 4, 1))
    assert len(found) == len(set(found)) > 1000
    assert set(found) == set(zip(rows.tolist(), columns.tolist(), strict=True))


def test_crowds_are_counted_when_they_are_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST_NEIGHBOURS", 3)
    looks = np.zeros(9, LOOK)
    looks["whole"] = looks["middle"] = 0x0123456789ABCDEF
    assert found_in(looks, 3).cut_short > 0


def test_bits_are_counted() -> None:
    words = np.array([0, 1, 2**64 - 1, 0x8000000000000001], np.uint64)
    assert bit_counts(words).tolist() == [0, 1, 64, 2]


def test_a_hash_of_a_part_is_that_of_the_part_alone(photographs: list[Image.Image]) -> None:
    image = photographs[0]
    box = (32.0, 24.0, 288.0, 216.0)
    assert difference_hash(image, box) == difference_hash(image.crop((32, 24, 288, 216)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 60), st.floats(0.2, 0.99))
def test_cosine_pairs_are_all_those_above(seed: int, count: int, least: float) -> None:
    vectors = np.random.default_rng(seed).standard_normal((count, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs, cosines = cosine_pairs(vectors, least)
    product = vectors @ vectors.T
    expected = [(i, j) for i in range(count) for j in range(i + 1, count) if product[i, j] >= least]
    assert list(map(tuple, pairs.tolist())) == expected
    assert cosines.tolist() == pytest.approx([product[pair] for pair in expected])


def test_too_many_neighbours_are_refused() -> None:
    with pytest.raises(UserError, match="more than 10 pairs of pictures have a cosine of"):
        cosine_pairs(np.ones((9, 1), np.float32), 0.5, most=10)
