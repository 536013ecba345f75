"""Small DICOM files for tests; needs pydicom (extra: radiology)."""

import io
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

EMPTY_ELEMENT = "empty"
DIGITAL_XRAY = "1.2.840.10008.5.1.4.1.1.1.1"


def dicom_dataset(stored_HW: np.ndarray, *, bits: int = 12, kind: str = "MONOCHROME2", **elements: Any) -> Dataset:
    """A digital X-ray of these stored values, unsigned 16-bit with `bits` of them in use. `elements` are set last;
    None removes one, `EMPTY_ELEMENT` leaves it without a value."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = DIGITAL_XRAY
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid(entropy_srcs=["test"])
    dataset.Rows, dataset.Columns = stored_HW.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, kind
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, bits, bits - 1, 0
    dataset.PixelData = stored_HW.astype("<u2").tobytes()
    for name, value in elements.items():
        if value is None:
            delattr(dataset, name)
        elif value == EMPTY_ELEMENT:
            setattr(dataset, name, None)
        elif name == "PixelPaddingValue":  # whether it may be negative is the writer's affair, and often wrong
            dataset.add_new(name, "SS" if value < 0 else "US", value)
        else:
            setattr(dataset, name, value)
    return dataset


def dicom_bytes(stored_HW: np.ndarray, **options: Any) -> bytes:
    """The file of `dicom_dataset`."""
    buffer = io.BytesIO()
    dicom_dataset(stored_HW, **options).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def ramp(height: int = 20, width: int = 50, most: int = 4095) -> np.ndarray:
    """uint16 [height, width] from 0 to `most`."""
    return np.linspace(0, most, height * width).round().reshape(height, width).astype(np.uint16)
