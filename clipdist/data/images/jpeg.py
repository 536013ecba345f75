"""What a JPEG's header says, and its pixels at a fraction of their size.

libjpeg-turbo, through simplejpeg, decodes at 1/2, 1/4 and 1/8 for less than the full price. At other eighths it leaves
its vector code and is slower than a full decode.
"""

import re
import struct
from dataclasses import dataclass

import numpy as np
import simplejpeg

from clipdist.data.images.geometry import reduced

_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ORIENTATION_TAG = 0x0112
_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_ICC = b"ICC_PROFILE\0"


@dataclass(frozen=True)
class JpegHeader:
    """Size in pixels as stored, EXIF orientation 1 to 8, colour components, bits of each, ICC profile (b"": none)."""

    width: int
    height: int
    components: int
    bits: int
    orientation: int
    profile: bytes


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None when it cannot be made out."""
    frame: tuple[int, int, int, int] | None = None
    exif: int | None = None
    xmp: int | None = None
    profile: dict[int, bytes] = {}
    parts = 0
    for marker, segment in _segments(data):
        if marker in _FRAMES and frame is None and len(segment) >= 6:
            frame = struct.unpack_from(">BHHB", segment)
        elif marker == 0xE1 and exif is None and segment.startswith(_EXIF):
            exif = _exif_orientation(segment[len(_EXIF) :])
        elif marker == 0xE1 and segment.startswith(_XMP) and (found := _XMP_ORIENTATION.search(segment)):
            xmp = int(found[1])
        elif marker == 0xE2 and segment.startswith(_ICC) and len(segment) > len(_ICC) + 2:
            profile[segment[len(_ICC)]] = segment[len(_ICC) + 2 :]
            parts = segment[len(_ICC) + 1]
    if frame is None or not (frame[1] and frame[2]):
        return None
    bits, height, width, components = frame
    whole = b"".join(profile[number] for number in sorted(profile)) if len(profile) == parts else b""
    return JpegHeader(width, height, components, bits, exif or xmp or 1, whole)


def _segments(data: bytes) -> list[tuple[int, bytes]]:
    """(marker, content) of every segment before the pixels."""
    found = []
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker in (0xD9, 0xDA):
            break
        if marker in _ALONE:
            place += 2
            continue
        stop = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        found.append((marker, data[place + 4 : stop]))
        place = max(stop, place + 4)
    return found


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation that the first directory of an EXIF block names; None when there is none, or it is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == _ORIENTATION_TAG:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), exif, entry + 8)
                return value if 1 <= value <= 8 else None
    except struct.error:
        return None
    return None


def decode_reduced(data: bytes, header: JpegHeader, reduction: int) -> np.ndarray | None:
    """Pixels as stored, uint8 [ceil(height / reduction), ceil(width / reduction), 3]; reduction 1, 2, 4 or 8.

    None for what libjpeg-turbo does not turn into RGB (CMYK, more than 8 bits), and for whatever it warns of:
    truncated files, which it would fill with grey, and harmless oddities alike.
    """
    if header.components not in (1, 3) or header.bits != 8:
        return None
    height, width = reduced(header.height, reduction), reduced(header.width, reduction)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None
