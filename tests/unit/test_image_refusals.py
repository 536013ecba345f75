"""Nothing too large, broken or cut short is let in, by either path; what is odd but whole is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipdist.data.images.decode import decode_rgb, image_size, load_for_evaluation, load_for_training
from clipdist.data.images.pillow import open_image
from clipdist.data.shards import BadSample
from tests.unit.pictures import MAX_PIXELS, STILL, encoded, evaluated, picture, trained, with_orientation


def load_every_way(data: bytes, max_pixels: int = MAX_PIXELS) -> list[np.ndarray | BadSample]:
    """What each way of loading gives: pixels, or why not."""
    found: list[np.ndarray | BadSample] = []
    for exact in (False, True):
        for load in (
            lambda: load_for_evaluation(data, 32, "crop", max_pixels, exact=exact),  # noqa: B023
            lambda: load_for_training(data, 32, "crop", max_pixels, STILL, np.random.default_rng(0), exact=exact),  # noqa: B023
            lambda: decode_rgb(data, max_pixels, at_least=(8, 8), exact=exact),  # noqa: B023
        ):
            try:
                found.append(load())
            except BadSample as error:
                found.append(error)
    return found


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_a_bomb_is_refused_before_it_is_decoded(format: str) -> None:
    data = encoded(Image.new("L", (1_500, 1_500)), format, **({"compression": "tiff_lzw"} if format == "TIFF" else {}))
    assert len(data) < 100_000
    for refusal in load_every_way(data, 2_249_999):
        assert str(refusal) == "image of 1500×1500 pixels, more than data.max_image_pixels=2249999"
    assert open_image(data, 21_500_000).size == (1_500, 1_500)
    assert image_size(data) == (1_500, 1_500)


@pytest.mark.parametrize(("format", "head"), [("PNG", 60), ("JPEG", 620)])
def test_the_size_is_checked_while_the_pixels_are_still_encoded(format: str, head: int) -> None:
    """Only the header is there: whoever decoded first would fail for another reason."""
    header = encoded(Image.new("L", (5_000, 5_000)), format)[:head]
    for refusal in load_every_way(header, 1_000):
        assert isinstance(refusal, BadSample)
        assert "pixels, more than" in str(refusal)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 5}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_lacks_its_end_does_not_pass_as_half_grey(mode: str, options: dict[str, int]) -> None:
    data = encoded(picture(0, (200, 150), mode), "JPEG", **options)
    for missing in (1, 2, 3, 50, len(data) // 2, len(data) - 700):
        for refusal in load_every_way(data[:-missing]):
            assert isinstance(refusal, BadSample)
            assert str(refusal).startswith("unreadable image: ")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_truncated_image_is_a_bad_sample(format: str) -> None:
    data = encoded(picture(0, (200, 150)), format)
    assert all(isinstance(pixels, np.ndarray) for pixels in load_every_way(data))
    for share in (0.0, 0.1, 0.5, 0.8):
        for refusal in load_every_way(data[: int(len(data) * share)]):
            assert isinstance(refusal, BadSample)
            assert str(refusal).startswith("unreadable image: ")


@pytest.mark.parametrize("data", [b"", b"not an image", b"<svg/>", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_a_bad_sample(data: bytes) -> None:
    for refusal in load_every_way(data):
        assert isinstance(refusal, BadSample)
        assert str(refusal).startswith("unreadable image: ")
        assert "0x" not in str(refusal), "an address differs between ranks"
    with pytest.raises(BadSample, match=r"^unreadable image: .+"):
        image_size(data)


def test_harmless_oddities_of_a_jpeg_are_let_in() -> None:
    data = encoded(picture(0, (200, 150)), "JPEG")
    plain = load_every_way(data)
    for odd in (data + b"after the end", data[:-2] + b"\x00\x12" + data[-2:], data[:2] + b"\xff\xff\xff" + data[3:]):
        for expected, pixels in zip(plain, load_every_way(odd), strict=True):
            assert isinstance(expected, np.ndarray)
            assert isinstance(pixels, np.ndarray)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow says what it found
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF"]), st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_damaged_image_is_read_or_is_a_bad_sample(format: str, place: int, value: int) -> None:
    """Headers and metadata, where decoders raise everything from SyntaxError to struct.error."""
    data = bytearray(with_orientation(picture(0, (20, 20)), 6, format))
    data[place % min(len(data), 400)] = value
    load_every_way(bytes(data))
    try:
        width, height = image_size(bytes(data))
    except BadSample:
        return
    assert min(width, height) > 0


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (1, 400), (400, 1), (3, 2_000), (100_000, 1), (1, 100_000)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_the_thinnest_images_work(size: tuple[int, int], format: str) -> None:
    if format == "JPEG" and max(size) > 65_500:
        size = (size[0] * 65_500 // 100_000 or 1, size[1] * 65_500 // 100_000 or 1)
    data = encoded(Image.new("RGB", size, (200, 10, 10)), format)
    assert image_size(data) == size
    for exact in (False, True):
        for mode in ("crop", "squash", "pad"):
            assert evaluated(data, 32, mode, exact).max() >= 200
            for seed in range(3):
                assert trained(data, 32, mode, seed=seed, exact=exact).max() >= 200
