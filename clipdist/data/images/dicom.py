"""Radiographs in DICOM -> 8-bit pictures, as a workstation would show them first. Needs pydicom (extra: radiology)."""

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clipdist.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset

MOST_BITS = 16
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
    and C.11.2), or else lie between their smallest and largest; MONOCHROME1, in which low values are bright, is
    inverted.
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
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError) as error:
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
    lowest, highest = int(stored_HW.min()), int(stored_HW.max())
    if lowest == highest:
        raise ValueError(f"all pixels are {lowest}")
    levels = _levels(np.arange(lowest, highest + 1), dataset)
    return levels.take(stored_HW.astype(np.int32) - lowest)


def _levels(stored_V: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """uint8 [V]: what is shown for each of the values [V]."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing

    values = apply_modality_lut(stored_V, dataset)
    if dataset.get("VOILUTSequence"):
        entries, first = dataset.VOILUTSequence[0].LUTDescriptor[:2]
        shown, ends = (
            apply_voi_lut(values, dataset),
            apply_voi_lut(np.arange(first, first + (entries or 65536)), dataset),
        )
        black, white = float(ends.min()), float(ends.max())
    elif "WindowCenter" in dataset and "WindowWidth" in dataset:
        with np.errstate(over="ignore"):
            black, white = apply_windowing(np.array([-_FAR, _FAR]), dataset).tolist()
            shown = apply_windowing(values, dataset)
    else:
        shown, black, white = values, float(values.min()), float(values.max())
    if black == white:
        raise ValueError("its window shows one level")
    share = (shown.astype(np.float64) - black) / (white - black)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
