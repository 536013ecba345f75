"""What an encoded image tells without a decoder. Standard library only."""

import re
import struct
from typing import NamedTuple

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# How a file begins, and the extension that it is stored under.
BEGINNINGS = ((JPEG, "jpg"), (PNG, "png"), (b"GIF8", "gif"), (b"BM", "bmp"))
# Markers that start a frame, and with it hold the size (ITU-T T.81, table B.1).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
_SCAN, _END = 0xDA, 0xD9
_ORIENTATION_TAG = 0x0112
_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_ICC = b"ICC_PROFILE\0"


class Header(NamedTuple):
    """Size in pixels as stored; EXIF orientation 1 to 8, 0 when only a full reader can tell. `whole` is false when the
    file's end is missing, as after an interrupted copy."""

    extension: str
    width: int
    height: int
    orientation: int
    whole: bool


class JpegHeader(NamedTuple):
    """Size in pixels as stored, EXIF orientation 1 to 8, colour components, bits of each, ICC profile (b"": none), and
    the byte at which the first scan begins."""

    width: int
    height: int
    components: int
    bits: int
    orientation: int
    profile: bytes
    scan: int


def extension_of(data: bytes) -> str | None:
    """The extension that an image is stored under, by its first bytes; None when they do not tell."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for beginning, extension in BEGINNINGS if data.startswith(beginning)), None)


def header_of(data: bytes) -> Header | None:
    """The header of a JPEG or PNG. None for other formats, and for what only a full reader understands."""
    if is_jpeg(data):
        jpeg = read_header(data)
        if jpeg is None or not jpeg.scan:
            return None
        # Within a scan 0xFF is always followed by 0 or a restart marker, so an end found there is the end.
        return Header("jpg", jpeg.width, jpeg.height, jpeg.orientation, data.rfind(b"\xff\xd9", jpeg.scan) > 0)
    if data.startswith(PNG) and data[12:16] == b"IHDR" and len(data) > 24:
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        return Header("png", width, height, 0, b"IEND" in data[-64:] or b"IEND" in data) if width * height else None
    return None


def is_jpeg(data: bytes) -> bool:
    return data.startswith(JPEG)


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None when it cannot be made out."""
    frame: tuple[int, int, int, int] | None = None
    exif: int | None = None
    xmp: int | None = None
    profile: dict[int, bytes] = {}
    parts = 0
    scan = 0
    for marker, place, segment in _segments(data):
        if marker == _SCAN:
            scan = place
        elif marker in _FRAMES and frame is None and len(segment) >= 6:
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
    return JpegHeader(width, height, components, bits, exif or xmp or 1, whole, scan)


def _segments(data: bytes) -> list[tuple[int, int, bytes]]:
    """(marker, its place, content) of every segment up to the first scan, which comes last."""
    found = []
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker == _END:
            break
        if marker in _ALONE:
            place += 2
            continue
        stop = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        found.append((marker, place, data[place + 4 : stop]))
        if marker == _SCAN:
            break
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
