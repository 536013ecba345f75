"""What an encoded image tells without a decoder. Standard library only."""

from typing import NamedTuple

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# How a file begins, and the extension that it is stored under.
BEGINNINGS = ((JPEG, "jpg"), (PNG, "png"), (b"GIF8", "gif"), (b"BM", "bmp"))
# Markers that start a frame, and with it hold the size (ITU-T T.81, table B.1).
FRAMES = frozenset({*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)})
SCAN, APP1, END = 0xDA, 0xE1, b"\xff\xd9"  # APP1 holds EXIF and XMP
ALONE = frozenset({0x00, 0x01, 0xFF, *range(0xD0, 0xDA)})  # no marker, or one without a length


class Header(NamedTuple):
    """Size in pixels as stored. `plain`: nothing in the file turns the picture."""

    extension: str
    width: int
    height: int
    plain: bool
    whole: bool


def extension_of(data: bytes) -> str | None:
    """The extension that an image is stored under, by its first bytes; None when they do not tell."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for beginning, extension in BEGINNINGS if data.startswith(beginning)), None)


def header_of(data: bytes) -> Header | None:
    """The header of a JPEG or PNG. None for other formats, and for what only a full reader understands.

    `whole` is false when the file's end is missing, as after an interrupted copy.
    """
    if data.startswith(JPEG):
        return _jpeg(data)
    if data.startswith(PNG) and data[12:16] == b"IHDR" and len(data) > 24:
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        return Header("png", width, height, False, b"IEND" in data[-64:] or b"IEND" in data) if width * height else None
    return None


def _jpeg(data: bytes) -> Header | None:
    width = height = 0
    plain, at, last = True, 2, len(data) - 9
    while at < last and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in ALONE:
            return None
        if marker == SCAN:
            # Within a scan 0xFF is always followed by 0 or a restart marker, so the first end found is the end.
            return Header("jpg", width, height, plain, data.rfind(END, at) > 0) if width * height else None
        if marker in FRAMES:
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        plain = plain and marker != APP1
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
