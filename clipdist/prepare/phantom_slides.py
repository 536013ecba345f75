"""Slides that are paved with a patch of tissue, drawn or real, and a folder of them laid out as TCGA's breast slides.

They let tiling, filters and training be tried and measured without a download. Needs tifffile and imagecodecs.
"""

import hashlib
import io
import uuid
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipdist.errors import UserError
from clipdist.prepare.phantom_stamp import write_stamp
from clipdist.prepare.phantom_tissue import DIAGNOSES, draw_tissue

README = """SYNTHETIC DATA. These slides and reports were made by a program (clipdist). A slide repeats one patch of
tissue; patients, reports and diagnoses are invented. They are laid out like TCGA's so that programs made for it run on
them, and are of no medical use whatsoever.
"""
Picture = npt.NDArray[np.uint8]
GLASS = 243
COARSE = 16  # pixels of level 0 for each of the outline's


def write_pyramid(
    path: Path,
    patch: Picture,
    size: tuple[int, int],
    *,
    seed: int = 0,
    factors: Sequence[int] = (1, 4, 16),
    mpp: float | None = 0.25,
    tile: int = 256,
    quality: int = 85,
) -> Path:
    """A slide of `size` (width, height) pixels in Aperio's form of TIFF: tiled JPEG levels, `factors` times smaller.

    Tissue with the look of `patch`, uint8 [h, w, 3], fills a few lobes on empty glass; `seed` decides their outlines.
    `patch` repeats, so its opposite edges should fit: `mirrored` makes them. `mpp`, micrometres per pixel, is left
    out when None. Written strip by strip: besides level 1 no level is held in memory.
    """
    try:
        import imagecodecs  # noqa: F401  tifffile writes no JPEG without it
        import tifffile
    except ImportError:
        raise UserError("phantom slides need more packages; run: pip install tifffile imagecodecs") from None
    if factors[0] != 1 or any(b % a for a, b in pairwise(factors)):
        raise UserError(f"levels: found factors {list(factors)}, expected 1 first, each a multiple of the one before")
    width, height = size
    outline = _outline(size, seed)
    resolution = f"|AppMag = {round(10 / mpp)}|MPP = {mpp:g}" if mpp else ""
    below: Picture | None = None
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for number, factor in enumerate(factors):
            shape = (height // factor, width // factor)
            ratio = factors[number + 1] // factor if number + 1 < len(factors) else 0
            if number == 0:
                strips = (_paint(patch, outline, top, min(tile, height - top), width) for top in range(0, height, tile))
            else:
                assert below is not None
                level = below
                strips = (level[top : top + tile] for top in range(0, shape[0], tile))
            smaller = _Smaller(shape, ratio) if ratio else None
            words = (
                f"Aperio Image Library (synthetic)\r\n{width}x{height} ({tile}x{tile}) -> {shape[1]}x{shape[0]} JPEG"
            )
            file.write(
                _encoded(strips, tile, quality, smaller),
                shape=(*shape, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                compression="jpeg",
                photometric="ycbcr",
                subsampling=(2, 2),
                description=words + resolution,
                metadata=None,
            )
            below = smaller.pixels if smaller else None
    return path


def mirrored(picture: Picture) -> Picture:
    """`picture` and its reflections, twice as wide and high, so that opposite edges fit."""
    wide = np.concatenate([picture, picture[:, ::-1]], 1)
    return np.concatenate([wide, wide[::-1]])


class _Smaller:
    """Gathers a level `ratio` times smaller while the strips of the larger one pass by."""

    def __init__(self, shape: tuple[int, int], ratio: int) -> None:
        self.ratio, self.rest, self.row = ratio, np.zeros((0, shape[1], 3), np.uint8), 0
        self.pixels = np.full((shape[0] // ratio, shape[1] // ratio, 3), GLASS, np.uint8)

    def take(self, strip: Picture) -> None:
        rows = np.concatenate([self.rest, strip])
        count = len(rows) // self.ratio
        used, self.rest = rows[: count * self.ratio], rows[count * self.ratio :]
        if count:
            width = self.pixels.shape[1] * self.ratio
            small = Image.fromarray(used[:, :width]).reduce(self.ratio)
            self.pixels[self.row : self.row + count] = np.asarray(small)[: len(self.pixels) - self.row]
            self.row += count


def _encoded(strips: Iterator[Picture], tile: int, quality: int, smaller: _Smaller | None) -> Iterator[bytes]:
    """The JPEG of each tile, row by row."""
    for strip in strips:
        if smaller:
            smaller.take(strip)
        rows, columns = tile - strip.shape[0], -strip.shape[1] % tile
        padded = np.pad(strip, ((0, rows), (0, columns), (0, 0)), mode="edge")
        for left in range(0, padded.shape[1], tile):
            buffer = io.BytesIO()
            Image.fromarray(padded[:, left : left + tile]).save(buffer, "JPEG", quality=quality, subsampling=2)
            yield buffer.getvalue()


def _outline(size: tuple[int, int], seed: int) -> npt.NDArray[np.bool_]:
    """Where there is tissue, at 1/16 of the size: two or three lobes with wavy edges."""
    rng = np.random.default_rng([seed, 1])
    width, height = (-(-length // COARSE) for length in size)
    y, x = np.mgrid[0:height, 0:width] + 0.5
    mask = np.zeros((height, width), bool)
    for _ in range(int(rng.integers(2, 4))):
        middle_x, middle_y = rng.uniform(0.3, 0.7, 2)
        dx, dy = x / width - middle_x, y / height - middle_y
        angle = np.arctan2(dy, dx)
        radius = rng.uniform(0.18, 0.28) * sum(
            (1.0 if wave == 0 else rng.uniform(0, 0.12)) * np.cos(wave * angle + rng.uniform(0, 6.3))
            if wave
            else np.ones_like(angle)
            for wave in range(6)
        )
        mask |= np.hypot(dx, dy) < radius
    return mask


def _paint(patch: Picture, outline: npt.NDArray[np.bool_], top: int, height: int, width: int) -> Picture:
    """Rows `top` to `top + height` of level 0."""
    rows, columns = np.arange(top, top + height), np.arange(width)
    strip = patch.take(rows % patch.shape[0], 0).take(columns % patch.shape[1], 1)
    tissue = outline.take(rows // COARSE, 0).take(columns // COARSE, 1)
    strip[~tissue] = GLASS
    return strip


def write_tcga_layout(
    folder: Path,
    patients: int = 12,
    *,
    side: int = 4096,
    seed: int = 0,
    tissue: Sequence[Picture] = (),
    slides_per_patient: int = 1,
) -> Path:
    """A folder as `gdc-client` leaves it, with reports beside the slides; the path of its manifest.

    `<folder>/gdc_manifest.txt`, `slides/<UUID>/<barcode>.<UUID>.svs`, `reports/<barcode>.<UUID>.txt`. Diagnoses take
    turns, and so does what slides show: `tissue`, if given, else what `draw_tissue` draws. The patients are invented,
    and README.txt, phantom.json and every report say so.
    """
    names = random_names(seed)
    lines = ["id\tfilename\tmd5\tsize\tstate"]
    (folder / "reports").mkdir(parents=True, exist_ok=True)
    write_stamp(folder, {"what": "synthetic slides", "patients": patients, "side": side, "seed": seed}, README)
    for number in range(patients):
        kind = list(DIAGNOSES)[number % len(DIAGNOSES)]
        patient = f"TCGA-ZZ-{number:04d}"
        patch = mirrored(tissue[number % len(tissue)]) if tissue else draw_tissue(kind, seed + number)
        for slide in range(slides_per_patient):
            name, inner = next(names), next(names).upper()
            path = folder / "slides" / name / f"{patient}-01Z-00-DX{slide + 1}.{inner}.svs"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_pyramid(path, patch, (side, side), seed=seed + 100 * number + slide)
            md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            lines.append(f"{name}\t{path.name}\t{md5}\t{path.stat().st_size}\treleased")
        report = folder / "reports" / f"{patient}.{next(names).upper()}.txt"
        report.write_text(_report(kind, np.random.default_rng([seed, 2, number])), encoding="utf-8")
    manifest = folder / "gdc_manifest.txt"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def random_names(seed: int) -> Iterator[str]:
    """UUIDs, the same for the same seed."""
    rng = np.random.default_rng([seed, 3])
    while True:
        yield str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _report(kind: str, rng: np.random.Generator) -> str:
    grade, size = int(rng.integers(1, 4)), rng.uniform(0.5, 4.0)
    side: Any = rng.choice(["LEFT", "RIGHT"])
    return f"""SYNTHETIC REPORT OF AN INVENTED PATIENT

CLINICAL HISTORY: Mass of the {side.lower()} breast.

GROSS DESCRIPTION:
Received fresh is a lumpectomy specimen with a firm area of {size:.1f} cm.

FINAL DIAGNOSIS:
A. BREAST, {side}, LUMPECTOMY:
   1. {DIAGNOSES[kind]}, NOTTINGHAM GRADE {grade}.
   2. TUMOR MEASURES {size:.1f} CM IN GREATEST DIMENSION.
B. SENTINEL LYMPH NODE, EXCISION:
   1. ONE LYMPH NODE, NEGATIVE FOR METASTATIC CARCINOMA (0/1).

COMMENT: Drawn by a program; of no medical use.
"""
