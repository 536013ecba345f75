"""Every format, sample type, orientation and colour space comes out as the picture that viewers show."""

import io
import struct
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image, ImageCms

from clipdist.data.images import decode
from clipdist.data.images.augment import AugmentConfig
from clipdist.data.images.decode import decode_rgb, image_size
from clipdist.data.images.geometry import ResizeMode
from clipdist.data.images.header import read_header
from clipdist.data.images.jpeg import decode_reduced
from clipdist.data.images.pillow import open_image, orientation_of, to_rgb
from tests.unit.pictures import (
    MAX_PIXELS,
    encoded,
    evaluated,
    photograph,
    picture,
    quadrants,
    smooth,
    stored,
    swapped_profile,
    trained,
    with_orientation,
)

MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)


def grey_row(data: bytes) -> list[int]:
    return decode_rgb(data, MAX_PIXELS)[0, :, 0].tolist()


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
    shown = (image.convert("1" if mode == "1" else "L") if grey else image).convert("RGB")
    expected = np.asarray(shown.resize((32, 32)))
    inner = np.s_[4:12, 4:12] if mode != "1" else np.s_[20:28, 20:28]
    assert np.abs(load(data) - expected)[inner].max() <= 3
    assert np.abs(load(data) - expected).mean() <= (12 if mode == "1" else 3)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_both_paths_decode_every_kind_of_jpeg(mode: str, progressive: bool) -> None:
    data = encoded(smooth(200, 160).convert(mode), "JPEG", quality=95, progressive=progressive)
    fast, exact = (decode_rgb(data, MAX_PIXELS, exact=exact).astype(int) for exact in (False, True))
    assert np.abs(fast - exact).mean() < 0.5
    shown = np.asarray(smooth(200, 160).convert(mode).convert("RGB"))
    assert np.abs(fast - shown).mean() < 3
    assert np.abs(trained(data, 48) - trained(data, 48, exact=True)).mean() < 1


# Samples of more than eight bits


def tiff(values: np.ndarray, bits: int = 16, kind: int = 1, photometric: int = 1, **tags: int) -> bytes:
    """A little-endian greyscale TIFF of one strip; `kind`: 1 unsigned, 2 signed, 3 floating point."""
    largest = tags.get("max_sample")
    body = values.tobytes()
    entries = [
        (256, 3, values.shape[1]),
        (257, 3, values.shape[0]),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, values.shape[0]),
        (279, 4, len(body)),
        *([(281, 3, largest)] if largest else []),
        (339, 3, kind),
    ]
    listed = b"".join(struct.pack("<HHII", tag, type_, 1, value) for tag, type_, value in entries)
    return struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(entries)) + listed + bytes(4)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    for data in (encoded(Image.fromarray(ramp)), encoded(Image.fromarray(ramp), "TIFF"), tiff(ramp)):
        assert np.abs(np.array(grey_row(data)) - np.linspace(0, 255, 64)).max() <= 1


def test_values_below_zero_are_black() -> None:
    signed = Image.fromarray(np.array([[-1000, 0, 65535, 70_000]], np.int32).repeat(2, 0))
    assert grey_row(encoded(signed, "TIFF")) == [0, 0, 255, 255]


def test_twelve_bits_in_sixteen_are_stretched_when_the_file_says_so() -> None:
    values = np.array([[0, 2048, 4095]], np.uint16)
    assert grey_row(tiff(values, max_sample=4095)) == [0, 128, 255]
    assert grey_row(tiff(values)) == [0, 8, 16], "nothing says that they are twelve bits"
    packed = np.array([[0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00]], np.uint8)  # 0, 2048, 4095, 0
    twelve = tiff(packed, bits=12).replace(struct.pack("<HHII", 256, 3, 1, 6), struct.pack("<HHII", 256, 3, 1, 4))
    assert grey_row(twelve) == [0, 128, 255, 0]


def test_where_white_is_zero_sixteen_bits_are_inverted() -> None:
    assert grey_row(tiff(np.array([[0, 65535]], np.uint16), photometric=0)) == [255, 0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.2, 0.4, 0.4], [51, 102, 102]),
        ([-100.0, 0.0, 100.0], [0, 128, 255]),
        ([0.0, 2000.0, 4000.0], [0, 128, 255]),
        ([float("nan"), 0.5, 1.0], [0, 128, 255]),
        ([float("inf"), 0.0, 1.0], [255, 0, 255]),
        ([7.0, 7.0, 7.0], [0, 0, 0]),
    ],
)
def test_floats_are_scaled(values: list[float], expected: list[int]) -> None:
    array = np.array([values], np.float32)
    for data in (tiff(array, bits=32, kind=3), encoded(Image.fromarray(array), "TIFF")):
        assert np.abs(np.array(grey_row(data)) - expected).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pngs_of_few_bits(bits: int) -> None:
    levels = 1 << bits
    image = Image.fromarray((np.arange(levels) * 255 // (levels - 1)).astype(np.uint8)[None])
    if bits == 1:
        data = encoded(image.convert("1"))
    else:
        palette = image.convert("P")
        data = encoded(palette, bits=8)
    assert grey_row(data) == np.asarray(image)[0].tolist()


# Transparency and animation


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
    pixels = decode_rgb(data, MAX_PIXELS)
    assert pixels[:, :10].min() == 255
    assert pixels[:, 10:].max() == 0


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(format: str) -> None:
    red, blue = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    data = encoded(red, format, save_all=True, append_images=[blue])
    assert np.abs(decode_rgb(data, MAX_PIXELS).mean(axis=(0, 1)) - (255, 0, 0)).max() < 4


# Orientation


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", MODES)
def test_a_turned_picture_gives_the_pixels_of_the_upright_one(orientation: int, mode: ResizeMode, format: str) -> None:
    upright = quadrants((160, 80))
    data = with_orientation(stored(upright, orientation), orientation, format)
    plain = encoded(upright)
    for exact in (False, True):
        expected = evaluated(plain, 16, mode, exact)
        assert np.abs(evaluated(data, 16, mode, exact) - expected).mean() < 3
        for augment in (AugmentConfig(crop_area=(0.3, 0.6)), AugmentConfig(quarter_turns=True, flip_horizontal=1.0)):
            for seed in range(3):
                expected = trained(plain, 16, mode, augment, seed, exact)
                assert np.abs(trained(data, 16, mode, augment, seed, exact) - expected).mean() < 8


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_picture(orientation: int, format: str) -> None:
    upright = quadrants((60, 20))
    data = with_orientation(stored(upright, orientation), orientation, format)
    assert image_size(data) == (60, 20)
    pixels = decode_rgb(data, MAX_PIXELS)
    assert pixels.shape == (20, 60, 3)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert np.abs(pixels.astype(int) - np.asarray(upright)).mean() < 8
    assert np.array_equal(np.asarray(to_rgb(open_image(data, MAX_PIXELS))).shape, pixels.shape)


def exif_block(order: str, orientation: int, kind: int = 3) -> bytes:
    """As cameras write it: other tags before the orientation."""
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8)
    value = struct.pack(order + "I", orientation) if kind == 4 else struct.pack(order + "HH", orientation, 0)
    entries = [struct.pack(order + "HHII", 0x0100, 4, 1, 99), struct.pack(order + "HHI", 0x0112, kind, 1) + value]
    return b"Exif\0\0" + head + struct.pack(order + "H", 2) + b"".join(entries) + bytes(4)


def with_segment(marker: int, content: bytes, image: Image.Image | None = None) -> bytes:
    plain = encoded(image or quadrants((64, 32)), "JPEG")
    return plain[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + plain[2:]


XMP = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="%d"/>'


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged EXIF
@pytest.mark.parametrize(
    ("content", "orientation"),
    [
        *((exif_block(order, number), number) for order in "<>" for number in range(1, 9)),
        (exif_block(">", 6, kind=4), 6),
        (XMP % 8, 8),
        (exif_block("<", 0), 1),
        (exif_block("<", 9), 1),
        (exif_block("<", 6)[:20], 1),
        (b"Exif\0\0", 1),
        (b"Exif\0\0II*\0\xff\xff\xff\xff", 1),
        (b"no exif", 1),
    ],
    ids=str,
)
def test_the_orientation_of_a_jpeg_is_read_as_pillow_reads_it(content: bytes, orientation: int) -> None:
    data = with_segment(0xE1, content)
    header = read_header(data)
    assert header is not None
    assert header.orientation == orientation
    assert orientation_of(open_image(data, MAX_PIXELS)) == orientation


def test_the_header_of_a_jpeg() -> None:
    header = read_header(encoded(picture(1, (50, 40)).convert("L"), "JPEG", progressive=True))
    assert header is not None
    assert (header.width, header.height, header.components, header.bits, header.profile) == (50, 40, 1, 8, b"")
    assert read_header(b"\xff\xd8\xff") is None
    assert read_header(encoded(picture(), "JPEG")[:20]) is None


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(64, 64), (65, 63), (7, 9), (1, 500)])
def test_a_jpeg_is_decoded_at_the_reduction_asked_for(size: tuple[int, int], reduction: int) -> None:
    data = encoded(smooth(*size), "JPEG")
    header = read_header(data)
    assert header is not None
    pixels = decode_reduced(data, header, reduction)
    assert pixels is not None
    assert pixels.shape == (-(-size[1] // reduction), -(-size[0] // reduction), 3)


def test_at_least_is_covered_by_the_smallest_decode() -> None:
    data = with_orientation(stored(smooth(800, 640), 6), 6)
    for wanted, got in [
        ((80, 100), (80, 100)),
        ((80, 101), (160, 200)),
        ((161, 1), (320, 400)),
        ((999, 1), (640, 800)),
    ]:
        assert decode_rgb(data, MAX_PIXELS, at_least=wanted).shape[:2] == got
        assert decode_rgb(data, MAX_PIXELS, at_least=wanted, exact=True).shape[:2] == (640, 800)
    small = decode_rgb(data, MAX_PIXELS, at_least=(80, 100)).astype(int)
    assert np.abs(small - np.asarray(smooth(800, 640).resize((100, 80), Image.Resampling.BOX))).mean() < 3


# Colour profiles


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_other_colour_spaces_become_srgb(format: str) -> None:
    lossless = {} if format in ("PNG", "TIFF") else {"quality": 98}
    data = encoded(quadrants(), format, icc_profile=swapped_profile(), **lossless)
    for pixels in (evaluated(data), evaluated(data, exact=False), trained(data), trained(data, exact=True)):
        corners = pixels[[4, 4, -5, -5], [4, -5, 4, -5]]
        expected = np.array([[0, 255, 0], [255, 0, 0], [0, 0, 255], [255, 255, 255]])
        assert np.abs(corners - expected).max() < 25
        assert np.abs(decode_rgb(data, MAX_PIXELS)[5, 5] - expected[0]).max() < 25


def test_srgb_under_another_name_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = smooth(60, 40)
    assert np.array_equal(decode_rgb(encoded(image, icc_profile=profile), MAX_PIXELS), np.asarray(image))


@pytest.mark.parametrize("profile", [b"broken", bytes(200), swapped_profile()[:300]], ids=len)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_broken_profile_is_ignored(profile: bytes, format: str) -> None:
    plain = encoded(smooth(60, 40), format)
    broken = encoded(smooth(60, 40), format, icc_profile=profile)
    for exact in (False, True):
        assert np.array_equal(trained(broken, exact=exact), trained(plain, exact=exact))


def test_a_profile_for_another_kind_of_image_is_ignored() -> None:
    grey = smooth(60, 40).convert("L")
    data = encoded(grey, "JPEG", icc_profile=swapped_profile())
    for exact in (False, True):
        pixels = trained(data, exact=exact)
        assert np.ptp(pixels, axis=2).max() == 0
        assert np.abs(pixels - trained(encoded(grey, "JPEG"), exact=exact)).max() == 0


def test_a_profile_in_several_segments_is_joined() -> None:
    profile = swapped_profile() + bytes(100_000)
    header = read_header(encoded(quadrants(), "JPEG", icc_profile=profile))
    assert header is not None
    assert header.profile == profile


# What the fast decoder does not take


def test_what_the_fast_decoder_warns_of_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photograph(300, 200), "JPEG", quality=90)
    monkeypatch.setattr(decode, "decode_reduced", lambda *_: None)
    without = trained(data, 48)
    monkeypatch.undo()
    assert np.abs(without - trained(data, 48)).mean() < 2
    assert np.array_equal(without, trained(encoded(Image.open(io.BytesIO(data))), 48))
