"""Radiographs in DICOM -> 8-bit pictures, as a workstation would show them first. Needs pydicom (extra: radiology)."""

import io
import math
import struct
import warnings
from collections.abc import MutableSequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clipdist.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset

MOST_BITS = 16
_OPTIONAL = (
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "VOILUTFunction", "WindowCenter",
    "WindowWidth", "PixelPaddingValue", "PixelPaddingRangeLimit",
)  # fmt: skip
# What pydicom raises for elements that contradict each other.
_SENSELESS = (ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError, struct.error)
_FAR = 1e12  # a stored value beyond any window


class UnusableDicom(ValueError):
    """A DICOM file that holds no single radiograph, or a damaged one; the message says why."""


def require_pydicom() -> Any:
    """The module; `UserError` when it is not installed."""
    try:
        import pydicom
    except ImportError:
        raise UserError('DICOM files need pydicom; run: pip install "clipdist[radiology]"') from None
    return pydicom


def dicom_picture(data: bytes, max_pixels: int) -> Image.Image:
    """A picture of mode L, black to white over what the file's first VOI LUT or window shows.

    Stored values pass the modality LUT or rescaling, then the VOI LUT, or else the first window (DICOM PS3.3, C.11.1
    and C.11.2), or else lie between their smallest and largest, padding left out; MONOCHROME1, in which low values are
    bright, is inverted. Elements without a value, or with one that makes no sense (a width of zero), count as absent;
    of slope and intercept, where one is there, as 1 and 0.
    Raises `UnusableDicom` for files without pixels or that are cut short, of several frames, in colour, of more than
    `max_pixels` pixels or 16 bits, compressed in a way for which no decoder is installed, and of one value all over.
    """
    pydicom = require_pydicom()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd values in fields that have no say here
        try:
            dataset = pydicom.dcmread(io.BytesIO(data))
            _check(dataset, max_pixels)
            stored_HW = dataset.pixel_array
        except UnusableDicom:
            raise
        except (RuntimeError, NotImplementedError) as error:
            kind = dataset.file_meta.TransferSyntaxUID.name
            raise UnusableDicom(
                f"cannot be decompressed ({kind}); pydicom knows more kinds with pylibjpeg-libjpeg and "
                f"pylibjpeg-openjpeg: {_told(error)}"
            ) from None
        except Exception as error:  # damaged files make parsers raise nearly anything
            raise UnusableDicom(f"damaged DICOM: {_told(error)}") from None
        try:
            return Image.fromarray(_shown(stored_HW, dataset))
        except _SENSELESS as error:
            raise UnusableDicom(f"cannot be shown: {_told(error)}") from None


def _check(dataset: "Dataset", max_pixels: int) -> None:
    """`UnusableDicom` unless this is one grey picture of a size that may be decoded."""
    if "PixelData" not in dataset:
        raise UnusableDicom("DICOM without pixels")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise UnusableDicom(f"DICOM of {frames} frames, expected one")
    kind = str(dataset.get("PhotometricInterpretation", ""))
    if dataset.get("SamplesPerPixel", 1) != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnusableDicom(f"DICOM {f'in colour ({kind})' if kind else 'of no named kind'}, expected MONOCHROME1 or 2")
    width, height, bits = (int(dataset.get(name) or 0) for name in ("Columns", "Rows", "BitsAllocated"))
    if not 0 < width * height <= max_pixels:
        raise UnusableDicom(f"too large: {width} x {height} pixels, expected 1 to {max_pixels}")
    if bits > MOST_BITS:
        raise UnusableDicom(f"DICOM of {bits} bits a pixel, expected at most {MOST_BITS}")


def _shown(stored_HW: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """uint8 [H, W]. Each stored value is looked up, since there are far fewer values than pixels."""
    _drop_senseless(dataset)
    lowest, highest = int(stored_HW.min()), int(stored_HW.max())
    if lowest == highest:
        raise ValueError(f"all pixels are {lowest}")
    levels = _levels(np.arange(lowest, highest + 1), dataset, _without_padding(stored_HW, dataset))
    return levels.take(stored_HW.astype(np.int32) - lowest)


def _levels(stored_V: np.ndarray, dataset: "Dataset", seen: tuple[int, int]) -> np.ndarray:
    """uint8 [V]: what is shown for each of the values [V], of which those of a picture begin and end at `seen`."""
    from pydicom.pixels import apply_modality_lut, apply_windowing

    values = apply_modality_lut(stored_V, dataset)
    if "VOILUTSequence" in dataset:
        first, table = _table(dataset)
        shown = table[np.clip(values.astype(np.int64) - first, 0, len(table) - 1)]
        black, white = float(table.min()), float(table.max())
    elif "WindowCenter" in dataset:
        with np.errstate(over="ignore"):
            black, white = apply_windowing(np.array([-_FAR, _FAR]), dataset).tolist()
            shown = apply_windowing(values, dataset)
    else:
        shown, of_picture = values, values[(stored_V >= seen[0]) & (stored_V <= seen[1])]
        black, white = float(of_picture.min()), float(of_picture.max())
    if black == white:
        raise ValueError("its window shows one level")
    share = (shown.astype(np.float64) - black) / (white - black)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)


def _drop_senseless(dataset: "Dataset") -> None:
    """Removes what has no value or a senseless one, and leaves one window, the first that is one."""
    values = {name: _values(dataset, name) for name in _OPTIONAL}
    for name, value in values.items():
        if not value:
            dataset.pop(name, None)
    least = 1.0 if str(dataset.get("VOILUTFunction", "LINEAR")).upper() == "LINEAR" else math.ulp(0.0)
    pairs = list(zip(values["WindowCenter"], values["WindowWidth"], strict=False))
    window = next((pair for pair in pairs if _finite(pair[0]) and _finite(pair[1]) and float(pair[1]) >= least), None)
    for name in ("WindowCenter", "WindowWidth"):
        dataset.pop(name, None)
    if window:
        dataset.WindowCenter, dataset.WindowWidth = window
    sloping = any(_finite(value) and float(value) for value in values["RescaleSlope"][:1])
    shifting = any(map(_finite, values["RescaleIntercept"][:1]))
    for name, there, other, neutral in (
        ("RescaleSlope", sloping, shifting, 1.0),
        ("RescaleIntercept", shifting, sloping, 0.0),
    ):
        if not there:
            dataset.pop(name, None)
            if other:
                setattr(dataset, name, neutral)


def _values(dataset: "Dataset", name: str) -> list[Any]:
    """All values of an element; none where it is missing, empty or unreadable."""
    try:
        value = dataset.get(name)
    except ValueError:
        return []
    several = list(value) if isinstance(value, MutableSequence) else [value]
    return [] if several in ([None], [""]) else several


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _without_padding(stored_HW: np.ndarray, dataset: "Dataset") -> tuple[int, int]:
    """The smallest and the largest stored value that is not PixelPaddingValue, nor between it and
    PixelPaddingRangeLimit (DICOM PS3.3, C.7.5.1.1.2)."""
    bounds = [int(dataset[name].value) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit") if name in dataset]
    if "PixelPaddingValue" not in dataset:
        return int(stored_HW.min()), int(stored_HW.max())
    least = int(np.iinfo(stored_HW.dtype).min)
    if stored_HW.dtype.itemsize == 2:  # often written as the other kind of number of the same sixteen bits
        bounds = [(bound - least) % 65536 + least for bound in bounds]
    within = stored_HW[(stored_HW < min(bounds)) | (stored_HW > max(bounds))]
    if not within.size:
        raise ValueError("all pixels are padding")
    if (lowest := int(within.min())) == (highest := int(within.max())):
        raise ValueError(f"all pixels are {lowest} or padding")
    return lowest, highest


def _table(dataset: "Dataset") -> tuple[int, np.ndarray]:
    """The stored value that the first VOI LUT begins with, and its entries [n]. pydicom's own function
    takes a value modulo 256 where entries have 8 bits."""
    item = dataset.VOILUTSequence[0]
    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    entries = entries % 65536 or 65536  # written as a signed number where the first value is one
    if bits != 8 and not 10 <= bits <= 16:
        raise ValueError(f"VOI LUT of {bits} bits, expected 8 or 10 to 16")
    word = "<u2" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">u2"
    data = item.get("LUTData") or b""
    data = data if isinstance(data, bytes) else np.array(data, word).tobytes()
    if len(data) == 2 * entries:
        return first, np.frombuffer(data, word) & (255 if bits == 8 else 65535)
    if bits == 8 and len(data) == entries + entries % 2:
        # Two entries to a word, the first in its low byte.
        return first, np.frombuffer(data, word).astype("<u2").view(np.uint8)[:entries]
    also = f" or {entries + entries % 2}" if bits == 8 else ""
    raise ValueError(f"VOI LUT of {len(data)} bytes, expected {2 * entries}{also} for {entries} entries of {bits} bits")


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
