"""Radiographs in DICOM: what is shown of stored values, and which files are refused."""

import io
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("pydicom", reason="pydicom (extra: radiology) is not installed")

from clipdist.data.images import dicom
from clipdist.data.images.dicom import UnusableDicom, dicom_picture
from clipdist.data.sets.pack import Pair, pack_pairs
from clipdist.data.sets.recode import ImageOptions, UnusableImage, recode
from clipdist.data.sets.tables import read_folder
from clipdist.data.shards import ShardSet
from clipdist.errors import UserError
from tests.unit.dicoms import EMPTY_ELEMENT, dicom_bytes, dicom_dataset, ramp

MOST = 1_000_000


def shown(data: bytes) -> np.ndarray:
    image = dicom_picture(data, MOST)
    assert image.mode == "L"
    return np.asarray(image).astype(int)


def bundled(name: str) -> bytes:
    from pydicom.data import get_testdata_file

    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), f"{name} comes with pydicom"
    return Path(path).read_bytes()


def test_without_a_window_the_smallest_value_is_black() -> None:
    stored = ramp() // 2 + 100
    grey = shown(dicom_bytes(stored))
    expected = np.rint((stored - stored.min()) / np.ptp(stored) * 255)
    assert np.array_equal(grey, expected)
    assert np.array_equal(
        shown(dicom_bytes(stored, kind="MONOCHROME1")), np.rint(255 - (stored - 100.0) / np.ptp(stored) * 255)
    )


def test_a_window_clips_at_its_ends() -> None:
    stored = ramp()
    # PS3.3 C.11.2.1.2.1: below centre − 0.5 − (width − 1)/2 black, above centre − 0.5 + (width − 1)/2 white.
    grey = shown(dicom_bytes(stored, WindowCenter=2048, WindowWidth=1001))
    assert grey[stored <= 1547].max() == 0
    assert grey[stored > 2547.5].min() == 255
    between = (stored > 1547.5) & (stored <= 2547.5)
    assert np.abs(grey[between] - ((stored[between] - 2047.5) / 1000 + 0.5) * 255).max() <= 0.5
    inverted = shown(dicom_bytes(stored, kind="MONOCHROME1", WindowCenter=2048, WindowWidth=1001))
    assert np.abs(grey + inverted - 255).max() <= 1


def test_the_first_of_several_windows_counts_whatever_the_picture_holds() -> None:
    stored = ramp() // 4 + 1000  # 1000 to 2023, the middle of the window alone: neither black nor white appears
    grey = shown(dicom_bytes(stored, WindowCenter=[1500, 40], WindowWidth=[4000, 400]))
    assert (grey.min(), grey.max()) == (96, 161)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
    st.sampled_from([10, 12, 16]),
    st.integers(1, 60_000),
    st.integers(2, 60_000),
    st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    st.sampled_from([None, (1.0, -1024.0), (2.5, 7.0), (-1.0, 4095.0)]),
)
def test_looked_up_values_are_those_of_pydicom(
    kind: str, bits: int, centre: int, width: int, function: str, rescale: tuple[float, float] | None
) -> None:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    options: dict[str, Any] = {"WindowCenter": centre, "WindowWidth": width, "VOILUTFunction": function}
    if rescale:
        options |= {"RescaleSlope": rescale[0], "RescaleIntercept": rescale[1]}
    dataset = dicom_dataset(ramp(most=2**bits - 1), bits=bits, kind=kind, **options)
    with np.errstate(over="ignore"):
        windowed = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    slope, intercept = rescale or (1.0, 0.0)
    black, white = intercept, (2**bits - 1) * slope + intercept
    share = (windowed - black) / (white - black)
    expected = 255 * np.clip(1 - share if kind == "MONOCHROME1" else share, 0, 1)
    found = shown(dicom_bytes(ramp(most=2**bits - 1), bits=bits, kind=kind, **options))
    assert np.abs(found - expected).max() <= 0.5 + 1e-6


def test_a_lookup_table_comes_before_a_window() -> None:
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor, table.LUTData = [256, 1000, 16], (np.arange(256)[::-1] * 100).astype("<u2").tobytes()
    stored = ramp(most=3000)
    grey = shown(dicom_bytes(stored, VOILUTSequence=[table], WindowCenter=2048, WindowWidth=1000))
    assert grey[stored <= 1000].min() == 255
    assert grey[stored >= 1255].max() == 0
    middle = (stored > 1000) & (stored < 1255)
    assert np.array_equal(grey[middle], 255 - (stored[middle].astype(int) - 1000))


EMPTY: dict[str, dict[str, Any]] = {
    "window": {"WindowCenter": EMPTY_ELEMENT, "WindowWidth": EMPTY_ELEMENT},
    "width": {"WindowCenter": 2000, "WindowWidth": EMPTY_ELEMENT},
    "centre": {"WindowCenter": EMPTY_ELEMENT, "WindowWidth": 2000},
    "no width": {"WindowCenter": 2000},
    "width of zero": {"WindowCenter": 2000, "WindowWidth": 0},
    "negative width": {"WindowCenter": 2000, "WindowWidth": -5, "VOILUTFunction": "LINEAR_EXACT"},
    "rescale": {"RescaleSlope": EMPTY_ELEMENT, "RescaleIntercept": EMPTY_ELEMENT, "RescaleType": EMPTY_ELEMENT},
    "slope of zero": {"RescaleSlope": 0, "RescaleIntercept": 5},
    "tables": {"VOILUTSequence": [], "ModalityLUTSequence": []},
    "padding": {"PixelPaddingValue": EMPTY_ELEMENT},
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_and_senseless_elements_count_as_absent(name: str) -> None:
    assert np.array_equal(shown(dicom_bytes(ramp(), **EMPTY[name])), shown(dicom_bytes(ramp())))


def test_the_first_window_that_makes_sense_and_half_a_rescaling() -> None:
    windowed = shown(dicom_bytes(ramp(), WindowCenter=2000, WindowWidth=1000))
    assert not np.array_equal(windowed, shown(dicom_bytes(ramp())))
    for more in (
        {"WindowCenter": [40, 2000], "WindowWidth": [0, 1000]},
        {"WindowCenter": ["", "2000"], "WindowWidth": ["400", "1000"]},
        {"WindowCenter": [2000, 40], "WindowWidth": 1000},
        {"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": EMPTY_ELEMENT},
        {"WindowCenter": 1000, "WindowWidth": 1000, "RescaleIntercept": -1000, "RescaleSlope": EMPTY_ELEMENT},
        {"WindowCenter": 1000, "WindowWidth": 1000, "RescaleIntercept": -1000},
        {"WindowCenter": 4000, "WindowWidth": 2000, "RescaleSlope": 2, "RescaleIntercept": EMPTY_ELEMENT},
    ):
        assert np.abs(shown(dicom_bytes(ramp(), **more)) - windowed).max() <= 1, more


def lookup(entries: int, first: int, bits: int, data: Any) -> Any:
    from pydicom.dataset import Dataset

    table = Dataset()
    table.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [entries, first, bits])
    table.add_new("LUTData", "OW" if isinstance(data, bytes) else "US", data)
    return [table]


def test_tables_of_eight_bits_in_words_of_sixteen_or_in_bytes() -> None:
    stored = np.array([[0, 1000, 2000, 3000], [4095, 500, 100, 50]], np.uint16)
    values = np.arange(4096) >> 4
    words = values.astype("<u2")
    expected = [[0, 62, 125, 187], [255, 31, 6, 3]]
    forms = {
        "words": words.tobytes(),
        "numbers": words.tolist(),
        "garbage above": (words | 0xAB00).tobytes(),
        "bytes": values.astype(np.uint8).tobytes(),
    }
    for name, data in forms.items():
        grey = shown(dicom_bytes(stored, VOILUTSequence=lookup(4096, 0, 8, data)))
        assert np.array_equal(grey, expected), name
    odd = shown(dicom_bytes(stored, VOILUTSequence=lookup(255, 1000, 8, bytes(range(255)) + b"\0")))
    assert odd.tolist() == [[0, 0, 255, 255], [255, 0, 0, 0]]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 300), st.integers(-200, 4000), st.sampled_from([8, 10, 12, 16]), st.data())
def test_a_lookup_table_is_looked_up(entries: int, first: int, bits: int, data: st.DataObject) -> None:
    table = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=entries, max_size=entries))
    stored = ramp()
    found = dicom_bytes(stored, VOILUTSequence=lookup(entries, first, bits, np.array(table, "<u2").tobytes()))
    if min(table) == max(table):
        with pytest.raises(UnusableDicom, match="one level"):
            shown(found)
        return
    raw = np.array([table[min(max(value - first, 0), entries - 1)] for value in stored.ravel().tolist()])
    expected = (raw - min(table)) / (max(table) - min(table)) * 255
    assert np.abs(shown(found).ravel() - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ((4096, 0, 12, bytes(4000)), r"VOI LUT of 4000 bytes, expected 8192 for 4096 entries of 12 bits"),
        ((4096, 0, 8, bytes(4000)), r"VOI LUT of 4000 bytes, expected 8192 or 4096 for 4096 entries of 8 bits"),
        ((0, 0, 16, bytes(400)), r"VOI LUT of 400 bytes, expected 131072 for 65536 entries of 16 bits"),
        ((256, 0, 9, bytes(512)), r"VOI LUT of 9 bits, expected 8 or 10 to 16"),
        ((256, 0, 16, b""), r"VOI LUT of 0 bytes"),
    ],
)
def test_tables_of_another_length_are_refused(table: tuple[int, int, int, bytes], reason: str) -> None:
    with pytest.raises(UnusableDicom, match=reason):
        dicom_picture(dicom_bytes(ramp(), VOILUTSequence=lookup(*table)), MOST)
    with pytest.raises(UnusableDicom, match=r"cannot be shown"):
        dicom_picture(dicom_bytes(ramp(), ModalityLUTSequence=lookup(4096, 0, 16, bytes(400))), MOST)


def test_padding_is_none_of_the_values_between_black_and_white() -> None:
    stored = np.array([[63536, 1000, 2000, 3000]], np.uint16)
    assert shown(dicom_bytes(stored, bits=16, PixelPaddingValue=63536)).tolist() == [[255, 0, 128, 255]]
    low = np.array([[0, 7, 1000, 2000, 3000]], np.uint16)
    padded = {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 10}
    assert shown(dicom_bytes(low, **padded)).tolist() == [[0, 0, 0, 128, 255]]
    assert shown(dicom_bytes(low, kind="MONOCHROME1", **padded)).tolist() == [[255, 255, 255, 128, 0]]
    signed = np.array([[-2000, 0, 500, 1000]], np.int16)
    for value in (-2000, 63536):  # the same sixteen bits, whichever kind of number they were written as
        element = {"PixelPaddingValue": value}
        data = dicom_bytes(signed.view(np.uint16), bits=16, PixelRepresentation=1, **element)
        assert shown(data).tolist() == [[0, 0, 128, 255]], value
    windowed = {"WindowCenter": 2000, "WindowWidth": 2000}
    assert np.array_equal(shown(dicom_bytes(low, **windowed, **padded)), shown(dicom_bytes(low, **windowed)))
    with pytest.raises(UnusableDicom, match="all pixels are 7 or padding"):
        dicom_picture(dicom_bytes(np.array([[0, 7]]), PixelPaddingValue=0), MOST)
    with pytest.raises(UnusableDicom, match="all pixels are padding"):
        dicom_picture(dicom_bytes(np.array([[0, 7]]), **padded), MOST)


def test_signed_values() -> None:
    stored = ramp(most=2000).astype(np.int16) - 1000
    grey = shown(dicom_bytes(stored, bits=16, PixelRepresentation=1, WindowCenter=0, WindowWidth=1000))
    assert grey[0, 0] == 0
    assert grey[-1, -1] == 255
    assert abs(grey[10, 0] - 128) <= 1


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("CT_small.dcm", (128, 128)),
        ("MR_small.dcm", (64, 64)),
        ("MR_small_RLE.dcm", (64, 64)),
        ("693_J2KI.dcm", (512, 512)),
    ],
)
def test_files_that_come_with_pydicom(name: str, size: tuple[int, int]) -> None:
    image = dicom_picture(bundled(name), MOST)
    assert (image.mode, image.size) == ("L", size)
    assert np.asarray(image).std() > 10


def test_compressed_and_plain_files_show_the_same() -> None:
    plain = shown(bundled("MR_small.dcm"))
    for name in ("MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"):
        assert np.array_equal(shown(bundled(name)), plain), name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MR_truncated.dcm", "damaged DICOM: .*less than expected"),
        ("SC_rgb_jpeg.dcm", r"in colour \(RGB\), expected MONOCHROME1 or 2"),
        ("examples_palette.dcm", r"in colour \(PALETTE COLOR\)"),
        ("rtdose.dcm", "15 frames, expected one"),
        ("rtdose_1frame.dcm", "32 bits a pixel"),
        ("rtplan.dcm", "DICOM without pixels"),
        ("reportsi.dcm", "DICOM without pixels"),
        ("badVR.dcm", "damaged DICOM: ValueError"),
        ("JPEG-lossy.dcm", r"cannot be decompressed \(JPEG Extended.*pylibjpeg"),
    ],
)
def test_what_is_refused_says_why(name: str, reason: str) -> None:
    if name == "JPEG-lossy.dcm" and find_spec("libjpeg"):
        pytest.skip("its decoder is installed")
    with pytest.raises(UnusableDicom, match=reason):
        dicom_picture(bundled(name), MOST)


def test_files_that_are_cut_short_or_show_nothing() -> None:
    data = dicom_bytes(ramp())
    for end in (0, 100, 132, 200, 400, len(data) - 100):
        with pytest.raises(UnusableDicom, match=r"damaged DICOM|without pixels|no named kind|too large"):
            dicom_picture(data[:end], MOST)
    with pytest.raises(UnusableDicom, match="all pixels are 7"):
        dicom_picture(dicom_bytes(np.full((4, 4), 7)), MOST)
    with pytest.raises(UnusableDicom, match="too large: 50 x 20 pixels, expected 1 to 999"):
        dicom_picture(data, 999)
    with pytest.raises(UnusableDicom, match="DICOM of no named kind"):
        dicom_picture(dicom_bytes(ramp(), PhotometricInterpretation=None), MOST)


def test_without_pydicom_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r'pip install "clipdist\[radiology\]"'):
        dicom.dicom_picture(b"", MOST)
    with pytest.raises(UserError, match=r"clipdist\[radiology\]"):
        recode(bytes(128) + b"DICM", ImageOptions())


def test_packed_as_any_other_picture(tmp_path: Path) -> None:
    data = dicom_bytes(ramp(100, 200), kind="MONOCHROME1", WindowCenter=2048, WindowWidth=4096)
    stored, extension = recode(data, ImageOptions())
    assert extension == "png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), shown(data))
    stored, extension = recode(data, ImageOptions(side=32, format="jpg", quality=95, check="none"))
    assert extension == "jpg"
    assert Image.open(io.BytesIO(stored)).size == (64, 32)
    with pytest.raises(UnusableImage, match="too large: 200 x 100 pixels"):
        recode(data, ImageOptions(max_pixels=100))

    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in (("a", data), ("b", data[:-10]), ("c", bundled("rtplan.dcm"))):
        (folder / f"{name}.dcm").write_bytes(content)
        (folder / f"{name}.txt").write_text(f"Picture {name}")
    assert read_folder(folder)[0]["image"].tolist() == ["a.dcm", "b.dcm", "c.dcm"]
    pairs = [Pair(path.stem, path, ["text"], row=row) for row, path in enumerate(sorted(folder.glob("*.dcm")), start=1)]
    summary = pack_pairs({"train": pairs}, tmp_path / "out", workers=0, max_rejected_fraction=0.9, quiet=True)
    assert [(one.row, one.reason.split(":")[0]) for one in summary.rejected] == [
        (2, "damaged DICOM"),
        (3, "DICOM without pixels"),
    ]
    assert ShardSet.open(tmp_path / "out").split("train").read(0).extension == "png"
