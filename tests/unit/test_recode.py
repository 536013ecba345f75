"""Images on their way into a shard: untouched where possible, else resized and encoded as asked; damage is named."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipdist.data.sets.recode import ImageOptions, UnusableImage, recode
from clipdist.errors import UserError
from tests.unit.pictures import encoded, picture


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(("size", "expected"), [((100, 60), (53, 32)), ((60, 100), (32, 53)), ((31, 99), (31, 99))])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_shorter_side_becomes_exact_and_smaller_images_stay(
    size: tuple[int, int], expected: tuple[int, int], format: str
) -> None:
    data = encoded(picture(1, size), format)
    result, extension = recode(data, ImageOptions(side=32))
    assert opened(result).size == expected
    if size == expected:
        assert result == data
    else:
        assert extension == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "png"}[format]


def test_shrinking_is_antialiased() -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (256, 128)))
    result, _ = recode(encoded(stripes), ImageOptions(side=32))
    inner = np.asarray(opened(result))[2:-2, 2:-2].astype(float)
    assert abs(inner.mean() - 127.5) < 3
    assert inner.std() < 3


def test_large_jpegs_shrink_to_what_a_full_decode_gives() -> None:
    data = encoded(picture(3, (800, 640)), "JPEG", quality=95)
    result, _ = recode(data, ImageOptions(side=64, format="png"))
    reference = opened(data).resize((80, 64), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(opened(result)).astype(int) - np.asarray(reference).astype(int)).mean() < 3


def test_orientation_is_applied_when_encoding_anew_and_metadata_dropped() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its left side: what is left in the file belongs on top
    exif[0x010F] = "maker"
    dark_left = Image.fromarray(np.tile(np.linspace(0, 255, 80).astype(np.uint8), (40, 1)))
    data = encoded(dark_left, "JPEG", exif=exif)
    assert recode(data, ImageOptions()) == (data, "jpg")
    result, _ = recode(data, ImageOptions(side=20))
    assert opened(result).size == (20, 40)
    assert not opened(result).getexif()
    rows = np.asarray(opened(result)).mean(axis=1)
    assert rows[0] < 10
    assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_every_mode_can_be_encoded(mode: str, format: str) -> None:
    data = encoded(picture(5, (64, 64), mode), "TIFF")
    result, extension = recode(data, ImageOptions(side=32, format=format))  # type: ignore[arg-type]
    image = opened(result)
    assert (extension, image.size) == (format, (32, 32))
    assert image.mode in ("L", "RGB", "RGBA")


def test_transparency_becomes_white_in_jpeg_and_stays_in_png() -> None:
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    jpeg, _ = recode(encoded(clear), ImageOptions(format="jpg"))
    assert np.asarray(opened(jpeg)).min() == 255
    png, _ = recode(encoded(clear), ImageOptions(side=32))
    assert opened(png).mode == "RGBA"


def test_sixteen_bits_stay_in_png_and_are_scaled_for_jpeg() -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    data = encoded(Image.fromarray(ramp))
    png, _ = recode(data, ImageOptions(side=32))
    deep = np.asarray(opened(png)).astype(int)
    assert deep.max() > 60000
    assert len(np.unique(deep)) >= 32
    jpeg, _ = recode(data, ImageOptions(format="jpg", quality=100))
    assert np.abs(np.asarray(opened(jpeg)).astype(int) - (ramp >> 8)).max() <= 3


def test_formats_are_told_by_content_and_others_become_png() -> None:
    assert recode(encoded(picture(), "BMP"), ImageOptions())[1] == "bmp"
    assert recode(encoded(picture(), "PPM"), ImageOptions())[1] == "png"
    jpeg = encoded(picture(), "JPEG")
    assert recode(jpeg, ImageOptions(format="jpg")) == (jpeg, "jpg")
    assert recode(jpeg, ImageOptions(format="webp"))[1] == "webp"


def with_size(png: bytes, width: int, height: int) -> bytes:
    """The PNG with another size in its header, which is all that a decompression bomb needs to show."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def test_the_limit_on_pixels_holds_before_decoding_and_for_what_pillow_would_refuse() -> None:
    bomb = with_size(encoded(picture()), 30_000, 30_000)
    with pytest.raises(UnusableImage, match="too large: 30000 x 30000 pixels, above the limit of 89478485"):
        recode(bomb, ImageOptions())
    with pytest.raises(UnusableImage, match="unreadable image: OSError"):  # Pillow's own limit is not in the way
        recode(with_size(encoded(picture()), 14_000, 14_000), ImageOptions(max_pixels=14_000**2))
    small = encoded(picture(size=(50, 50)))
    with pytest.raises(UnusableImage, match="above the limit of 2499"):
        recode(small, ImageOptions(max_pixels=2499))
    before = Image.MAX_IMAGE_PIXELS
    assert recode(small, ImageOptions(max_pixels=2500))[0] == small
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 0}, "image side: found 0"),
        ({"quality": 0}, "image quality: found 0"),
        ({"format": "gif"}, "image format: found 'gif'"),
        ({"max_pixels": 0}, "largest image"),
    ],
)
def test_wrong_image_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageOptions(**options)
