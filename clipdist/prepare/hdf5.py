"""Encoded images in an HDF5 file, one dataset for each, such as ISIC 2024's `train-image.hdf5`.

HDF5's own handles cannot be handed to other processes. But a dataset that is neither chunked nor compressed is one run
of bytes in the file, and the library tells where; with that, any process reads an image by one positioned read.
"""

from pathlib import Path
from typing import Any

import numpy as np
import psutil

from clipdist.data.sets.recode import FilePart
from clipdist.errors import UserError

BLOCK = 8 << 20


def stored_images(path: Path) -> dict[str, bytes | FilePart]:
    """What the top-level datasets of the file `path` hold, by name: where it lies, or the bytes themselves of datasets
    that HDF5 has chunked, compressed, or put elsewhere, which thus take memory.

    Names that are not UTF-8 have their bytes written out, as `\\xff`. Datasets may be of strings, opaque values or
    single bytes. The file is read through once from front to end, if half of the free memory holds it, so that what is
    read later in another order comes from memory. Raises `UserError` for a file that is missing, damaged or no HDF5,
    for a dataset of other values or of several images, and without h5py.
    """
    try:
        import h5py
    except ImportError:
        raise UserError(f'{path}: reading HDF5 needs h5py; run: pip install "clipdist[isic]"') from None
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    _read_through(path)
    found: dict[str, bytes | FilePart] = {}
    try:
        with h5py.File(path, "r") as file:
            for name in file.id:
                image = _stored(h5py, file, name, path)
                if image is not None:
                    found[_readable(name)] = image
    except (OSError, RuntimeError, KeyError) as error:
        # KeyError is h5py's word for an entry whose header cannot be read.
        why = " ".join(str(error).split())
        raise UserError(f"{path}: damaged, cut short or no HDF5 file ({why}); fetch it again") from None
    return found


def _stored(h5py: Any, file: Any, name: bytes, path: Path) -> bytes | FilePart | None:
    """One dataset's bytes, or their place; None for a group."""
    thing = h5py.h5o.open(file.id, name)
    if not isinstance(thing, h5py.h5d.DatasetID):
        return None
    kind = thing.get_type()
    varies = isinstance(kind, h5py.h5t.TypeVlenID) or (
        isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str()
    )
    single_bytes = isinstance(kind, h5py.h5t.TypeIntegerID) and kind.get_size() == 1
    if not (varies or single_bytes or isinstance(kind, h5py.h5t.TypeStringID | h5py.h5t.TypeOpaqueID)):
        raise UserError(
            f"{path}: dataset {_readable(name)!r} holds values of type {thing.dtype}, expected the bytes of an encoded "
            f"image"
        )
    offset = None if varies else thing.get_offset()
    if offset is not None:
        return FilePart(path, offset, thing.get_storage_size(), _readable(name))
    value = h5py.Dataset(thing)[()]
    if isinstance(value, h5py.Empty):
        return b""
    if varies and isinstance(value, np.ndarray) and value.dtype == object:
        # An array of values of any length holds pointers to them.
        if value.size != 1:
            raise UserError(
                f"{path}: dataset {_readable(name)!r} holds {value.size:,} values, expected the bytes of one encoded "
                f"image"
            )
        value = value.item()
    return value if isinstance(value, bytes) else np.asarray(value).tobytes()


def _readable(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


def _read_through(path: Path) -> None:
    if path.stat().st_size > psutil.virtual_memory().available // 2:
        return
    buffer = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
