"""One image file's bytes -> the bytes to store: verified as asked, resized and re-encoded only where asked.

Light on purpose (Pillow and the standard library): every worker process imports it. DICOM needs pydicom besides.
"""

import errno
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from PIL import Image, ImageOps

from clipdist.data.images.header import extension_of, header_of
from clipdist.data.sets.writer import unlimited_pillow
from clipdist.errors import UserError

# Pillow's name of a format -> the extension it is stored under. MPO is what some phones write: JPEGs in a row, which
# any JPEG decoder reads as the first of them.
STORED_AS_IT_IS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "TIFF": "tif",
    "BMP": "bmp",
    "GIF": "gif",
}
ENCODERS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # older Pillow opens a 16-bit PNG as I


Check = Literal["decode", "header", "none"]


class UnusableImage(Exception):
    """This image cannot be packed; the message says why."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """`size` bytes at `offset` of a file, such as a member of a tar, read where they lie; `name` is for people."""

    path: Path
    offset: int
    size: int
    name: str

    def read_bytes(self) -> bytes:
        """The bytes; `OSError` where the file has become shorter."""
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise OSError(errno.EIO, f"{self.path.name} ends early")
        return data

    def __str__(self) -> str:
        return f"{self.path.name}:{self.name}"


ImageSource = Path | bytes | FilePart


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored.

    `side`: a shorter side above this becomes exactly this, antialiased, aspect kept; smaller images stay as they are.
    `format`: `keep` stores the format that came (JPEG, PNG, WebP, TIFF, BMP, GIF; anything else becomes PNG, DICOM too,
    at the grey levels of its first window).
    `quality`: of JPEG and WebP. `max_pixels`: larger images are refused before they are decoded.

    An image that needs neither resizing nor another format keeps its bytes, metadata included. One that is encoded
    anew is first turned upright by its EXIF orientation, and loses all metadata; in JPEG transparency becomes white.
    Of 16 bits of grey PNG keeps all, JPEG and WebP the upper 8.

    `check` is for images that keep their bytes: `decode` finds all damage, `header` what is no image, too large or cut
    short, `none` looks at the first bytes for the format alone. Those encoded anew are decoded in any case.
    """

    side: int | None = None
    format: Literal["keep", "jpg", "png", "webp"] = "keep"
    quality: int = 92
    max_pixels: int = 89_478_485  # where Pillow, too, begins to suspect a decompression bomb
    check: Check = "decode"

    def __post_init__(self) -> None:
        if self.side is not None and self.side < 1:
            raise UserError(f"image side: found {self.side}, expected at least 1 pixel")
        if self.format not in ("keep", *ENCODERS):
            raise UserError(f"image format: found {self.format!r}, expected one of keep, {', '.join(ENCODERS)}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"image quality: found {self.quality}, expected 1 to 100")
        if self.check not in get_args(Check):
            raise UserError(f"check of images: found {self.check!r}, expected one of {', '.join(get_args(Check))}")
        if self.max_pixels < 1:
            raise UserError(f"largest image: found {self.max_pixels} pixels, expected at least 1")

    @property
    def decodes(self) -> bool:
        """Whether images are decoded, so that more processes help."""
        return self.check == "decode" or self.side is not None or self.format != "keep"


def recode(source: ImageSource, options: ImageOptions) -> tuple[bytes, str]:
    """The bytes to store and their extension; `UnusableImage` when the file is missing, damaged or too large."""
    data = source if isinstance(source, bytes) else _read(source)
    if not data:
        raise UnusableImage("empty file")
    if not options.decodes and (extension := _as_it_is(data, options)):
        return data, extension
    with unlimited_pillow():
        try:
            return _recode(data, options)
        except (UnusableImage, UserError):
            raise
        except Image.UnidentifiedImageError:
            # Pillow's own message holds an address in memory.
            raise UnusableImage("unreadable image: no format that Pillow knows") from None
        except MemoryError:
            raise UnusableImage("not enough memory to decode it") from None
        except Exception as error:  # damaged files make decoders raise nearly anything
            raise UnusableImage(f"unreadable image: {type(error).__name__}: {error}") from None


def recode_all(sources: list[ImageSource], options: ImageOptions) -> list[tuple[bytes, str] | UnusableImage]:
    """`recode` of each source, in order; what is unusable is returned, not raised. What worker processes run."""
    results: list[tuple[bytes, str] | UnusableImage] = []
    for source in sources:
        try:
            results.append(recode(source, options))
        except UnusableImage as error:
            results.append(error)
    return results


def _read(source: Path | FilePart) -> bytes:
    try:
        if isinstance(source, FilePart):
            return source.read_bytes()
        with open(source, "rb", buffering=0) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableImage("missing image file") from None
    except OSError as error:
        raise UnusableImage(f"unreadable image file: {error.strerror}") from None
    except ValueError as error:
        raise UnusableImage(f"missing image file: no file can have this name ({error})") from None


def _as_it_is(data: bytes, options: ImageOptions) -> str | None:
    """The extension of an image that passes without a decoder; None where Pillow must have a look."""
    if options.check == "none":
        return extension_of(data)
    header = header_of(data)
    if header is None:
        return None
    _check_size(header.width, header.height, options)
    if not header.whole:
        raise UnusableImage("cut short: its end is missing")
    return header.extension


def _check_size(width: int, height: int, options: ImageOptions) -> None:
    if width * height > options.max_pixels:
        raise UnusableImage(f"too large: {width} x {height} pixels, above the limit of {options.max_pixels}")


def _recode(data: bytes, options: ImageOptions) -> tuple[bytes, str]:
    image = _opened(data, options)
    width, height = image.size
    stored = STORED_AS_IT_IS.get(image.format or "")
    resize = options.side is not None and min(width, height) > options.side
    if not resize and stored and options.format in ("keep", stored):
        if options.check == "decode":
            # A JPEG at an eighth of its size: all its data is read and decoded, only pixels are fewer.
            image.draft(None, (1, 1))
            image.load()
        return data, stored
    if options.format == "keep":
        extension = stored if stored in ENCODERS else "png"
    else:
        extension = options.format
    assert extension is not None
    if image.mode == "F":
        raise UnusableImage(
            "floating-point values: which range to show is a choice, so convert it to 8 or 16 bits first"
        )
    if resize:
        assert options.side is not None
        scale = options.side / min(width, height)
        # JPEGs decode straight to half, quarter or eighth size; two times the target leaves the filter enough detail.
        image.draft(None, (round(width * scale) * 2, round(height * scale) * 2))
    ImageOps.exif_transpose(image, in_place=True)  # in place: no copy of the large image where nothing is to turn
    image = _plain(image, opaque=extension == "jpg")
    if resize:
        image = _resize(image, options.side or 1)
    if image.mode == "I":
        # Scaled, not clipped, as decoding for training does it.
        image = (
            image.convert("I;16") if extension == "png" else image.point(lambda value: value * (1 / 256)).convert("L")
        )
    buffer = io.BytesIO()
    parameters = {} if extension == "png" else {"quality": options.quality}
    image.save(buffer, ENCODERS[extension], **parameters)
    return buffer.getvalue(), extension


def _opened(data: bytes, options: ImageOptions) -> Image.Image:
    """Not decoded yet, but for DICOM, of which only 8-bit grey is left."""
    if data[128:132] == b"DICM":
        from clipdist.data.images.dicom import UnusableDicom, dicom_picture

        try:
            return dicom_picture(data, options.max_pixels)
        except UnusableDicom as error:
            raise UnusableImage(str(error)) from None
    image: Image.Image = Image.open(io.BytesIO(data))
    _check_size(*image.size, options)
    return image


def _plain(image: Image.Image, *, opaque: bool) -> Image.Image:
    """Mode L or RGB, RGBA where there was any transparency and not `opaque`, I for 16 bits; without metadata."""
    image.load()
    alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if image.mode in SIXTEEN_BIT:
        image, alpha = image.convert("I"), False
    elif image.mode == "1" and not alpha:
        image = image.convert("L")
    elif alpha:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if alpha and opaque:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    image.info = {}
    return image


def _resize(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    if width <= height:
        size = (side, max(side, round(height * side / width)))
    else:
        size = (max(side, round(width * side / height)), side)
    # Very large images are first averaged over whole pixels, down to three times the target: much faster, same looks.
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
