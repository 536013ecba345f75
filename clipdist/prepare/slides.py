"""Whole-slide images -> square tiles of tissue, one folder per slide, made once and never half.

    OUT/<slide>/001024_002048.png    x and y of the upper left corner, pixels of level 0
    OUT/<slide>/slide.json           what was read and with which options, and the share of tissue of each tile
    OUT/<slide>/overview.png         the slide with its kept tiles outlined, and the mask
    OUT/slides-01.png, …             twelve of these on each
    OUT/slides.csv, rejected.csv     a line per slide; what could not be tiled, with the reason

A tile counts as tissue when enough of its pixels are at or below the slide's Otsu threshold and few enough are above a
fixed grey, both judged on the tile as it is stored. Otsu alone calls part of an empty slide tissue. An overview from a
small level tells which places are too empty to be worth reading.
"""

import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image

from clipdist.data.sets.pack import REJECTED, Refused, Rejected, available_cores, in_order
from clipdist.data.shards import fsync_folder, write_atomically
from clipdist.errors import UserError, disk_errors
from clipdist.prepare.png import png_bytes
from clipdist.prepare.slide_pictures import contact_sheets, draw_choice
from clipdist.prepare.slide_reader import SlideReader, UnusableSlide, otsu
from clipdist.progress import progress

logger = logging.getLogger(__name__)

RECORD, OVERVIEW, TABLE = "slide.json", "overview.png", "slides.csv"
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
# Pixels of the overview for each tile and for the slide, at least. More would be read for no other decision.
PER_TILE, PER_SLIDE = 16, 512
# A place is read unless its overview misses a limit by half: averaging makes thin tissue in fat look emptier.
SLACK = 0.5


@dataclass(frozen=True)
class TilingOptions:
    """How slides are cut. `stride` is a tile's side and its distance from the next, in pixels of level 0; `side` what
    it is stored at. `min_tissue`: least share of pixels at or below the Otsu threshold; `max_white`: the share of
    pixels above `white_above` (grey of 255) must stay under it. `most`: tiles kept of a slide, drawn at random but the
    same each time; None keeps all. `assume_mpp`: micrometres per pixel of slides that do not tell."""

    stride: int = 1024
    side: int = 299
    min_tissue: float = 0.3
    max_white: float = 0.5
    white_above: int = 225
    most: int | None = None
    format: Literal["png", "jpg"] = "png"
    assume_mpp: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.side <= self.stride:
            raise UserError(f"tiles: found stride {self.stride} and side {self.side}, expected 1 <= side <= stride")
        if not (0 <= self.min_tissue <= 1 and 0 < self.max_white <= 1 and 0 <= self.white_above <= 255):
            raise UserError(
                f"tiles: found min_tissue {self.min_tissue}, max_white {self.max_white}, white_above "
                f"{self.white_above}, expected shares from 0 to 1 and a grey level from 0 to 255"
            )
        if self.most is not None and self.most < 1:
            raise UserError(f"tiles of a slide: found at most {self.most}, expected 1 or more")
        if self.assume_mpp is not None and not 0 < self.assume_mpp < math.inf:
            raise UserError(f"micrometres per pixel: found {self.assume_mpp}, expected more than 0, such as 0.25")
        if self.format not in ("png", "jpg"):
            raise UserError(f"tiles: found the format {self.format!r}, expected png or jpg")


@dataclass(frozen=True)
class SlideFile:
    """A slide to be tiled. `md5`, if any, is compared before it is read; `row` is where it was named, if in a table."""

    name: str
    path: Path
    md5: str = ""
    row: int | None = None

    def rejected(self, reason: str) -> Rejected:
        return Rejected(self.row, self.name, str(self.path), reason)


@dataclass(frozen=True)
class Tile:
    """One stored tile: upper left corner in pixels of level 0, shares of tissue and of white pixels."""

    path: Path
    x: int
    y: int
    tissue: float
    white: float


@dataclass(frozen=True)
class TiledSlide:
    """A finished slide: its folder and what `slide.json` holds; `resumed` when it was there before."""

    name: str
    folder: Path
    record: dict[str, Any]
    resumed: bool = False

    @property
    def tiles(self) -> list[Tile]:
        return [
            Tile(self.folder / one["file"], one["x"], one["y"], one["tissue"], one["white"])
            for one in self.record["tiles"]
        ]

    @property
    def mpp(self) -> float:
        return float(self.record["mpp"])


@dataclass(frozen=True)
class TilingSummary:
    """What a call of `tile_slides` left in `folder`; `str` says it in a few lines for people."""

    folder: Path
    slides: list[TiledSlide]
    rejected: list[Rejected]
    sheets: list[Path]

    @property
    def tiles(self) -> int:
        return sum(len(slide.record["tiles"]) for slide in self.slides)

    def __str__(self) -> str:
        return self.told(self.rejected)

    def told(self, rejected: Sequence[Rejected]) -> str:
        """`str`, with `rejected` in the place of its own: those that later stages have added to `rejected.csv`, too."""
        places = sum(slide.record["places"] for slide in self.slides)
        read = sum(slide.record["read"] for slide in self.slides)
        before = sum(slide.resumed for slide in self.slides)
        given = len(self.slides) + len(self.rejected)
        refused = f"{len(rejected):,} of {given:,}, see {self.folder / REJECTED}" if rejected else "none"
        mpps = sorted({round(slide.mpp, 3) for slide in self.slides})
        spread = f"{mpps[0]:g}" if len(mpps) == 1 else f"{mpps[0]:g} to {mpps[-1]:g}" if mpps else "unknown"
        return (
            f"{self.folder}: {self.tiles:,} tiles of {len(self.slides):,} slides ({before:,} there before), of "
            f"{places:,} places, {read:,} of them read\n"
            f"  {spread} µm per pixel; to look at: {self.sheets[0] if self.sheets else 'nothing'}\n"
            f"rejected: {refused}"
        )


def tile_slides(
    slides: Sequence[SlideFile],
    folder: Path,
    options: TilingOptions | None = None,
    *,
    workers: int | None = None,
    rejected: Sequence[Rejected] = (),
    max_rejected_fraction: float = 0.05,
    quiet: bool = False,
) -> TilingSummary:
    """Tiles of all `slides` below `folder`, the same bytes for any number of `workers` (processes, each with a slide of
    its own; None: one for each available core; 0: this process).

    A slide whose folder is complete, and whose file has neither another size nor another time of change, is not read
    again; one that was interrupted starts anew. Slides that are missing, damaged, without smaller levels, resolution or
    tissue, or of another md5, are left out and listed in `folder/rejected.csv`, after the ones given as `rejected`.
    Raises `UserError` when more than `max_rejected_fraction` of all are rejected, when none is left, when a slide was
    tiled with other options, and when the disk is full. A worker takes 0.1 to 0.3 GiB, whatever the slide's size.

    As with any use of processes, a script that calls this with workers needs `if __name__ == "__main__":`.
    """
    options = options or TilingOptions()
    refused = Refused(folder, list(rejected), max_rejected_fraction, "slides")
    refused.total = len(refused.found) + len(slides)
    names: set[str] = set()
    usable: list[SlideFile] = []
    for slide in slides:
        if not NAME.fullmatch(slide.name):
            raise UserError(f"name of a slide: found {slide.name!r}, expected letters, digits, dots, _ and -")
        if slide.name in names:
            refused.found.append(slide.rejected(f"another slide is named {slide.name}, too"))
        else:
            names.add(slide.name)
            usable.append(slide)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        clear_left_over(folder)
        refused.check()
        workers = available_cores() if workers is None else workers
        results = in_order(partial(_tile_each, folder=folder, options=options), usable, min(workers, len(usable)), 1)
        done = []
        with closing(results):
            shown = progress(usable, unit="slide", description=f"tiling into {folder.name}", quiet=quiet)
            for _, result in zip(shown, results, strict=True):
                if isinstance(result, Rejected):
                    refused.add(result)
                else:
                    done.append(result)
        if not done:
            refused.fail("nothing could be tiled")
        refused.save()
        _write_table(folder, done)
        sheets = contact_sheets([slide.folder / OVERVIEW for slide in done], folder)
    return TilingSummary(folder, done, refused.found, sheets)


def _tile_each(slides: list[SlideFile], folder: Path, options: TilingOptions) -> list[TiledSlide | Rejected]:
    """What worker processes run."""
    results: list[TiledSlide | Rejected] = []
    for slide in slides:
        try:
            results.append(tile_slide(slide, folder, options))
        except UnusableSlide as error:
            results.append(slide.rejected(str(error)))
    return results


def tile_slide(slide: SlideFile, folder: Path, options: TilingOptions) -> TiledSlide:
    """One slide, as `tile_slides` does it in a worker. Raises `UnusableSlide` and leaves nothing when it cannot be."""
    final = folder / slide.name
    try:
        status = slide.path.stat()
    except OSError:
        raise UnusableSlide("missing file") from None
    source = {"file": slide.path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    if there := _finished(final, source, options):
        return TiledSlide(slide.name, final, there, resumed=True)
    if slide.md5 and (found := _md5(slide.path)) != slide.md5.lower():
        raise UnusableSlide(f"md5 {found}, expected {slide.md5}: fetch it again")
    with whole_folder(final) as fresh:
        began = time.monotonic()
        with SlideReader(slide.path, assume_mpp=options.assume_mpp) as reader:
            record = _cut(reader, fresh, options, slide.name)
        record = {"options": asdict(options), "source": source, **record, "seconds": round(time.monotonic() - began, 3)}
        # Last, and on the disk before the folder gets its name: it vouches for the sizes of all tiles.
        write_atomically(fresh / RECORD, json.dumps(record, indent=1).encode())
    return TiledSlide(slide.name, final, record)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A fresh folder that becomes `final`, in the place of what is there, unless an exception ends the block."""
    fresh = final.with_name(f".{final.name}.partial-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if final.exists():  # incomplete, or of a file that has changed
            shutil.rmtree(final)
        os.rename(fresh, final)
        fsync_folder(final.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _cut(reader: SlideReader, folder: Path, options: TilingOptions, name: str) -> dict[str, Any]:
    """Writes the tiles and the overview's picture into `folder`."""
    stride = options.stride
    columns, rows = reader.width // stride, reader.height // stride
    if not columns * rows:
        raise UnusableSlide(f"{reader.width} x {reader.height} pixels: smaller than a tile of {stride}")
    downsample = max(1.0, min(stride / PER_TILE, max(reader.width, reader.height) / PER_SLIDE))
    overview = reader.overview(downsample)
    grey = np.asarray(overview.convert("L"))
    threshold = otsu(grey)
    mask, white = grey <= threshold, grey > options.white_above
    step = stride / downsample
    tissue_shares = _shares(mask, columns, rows, step)
    white_shares = _shares(white, columns, rows, step)
    worth = (tissue_shares >= options.min_tissue * SLACK) & (white_shares <= 1 - (1 - options.max_white) * SLACK)
    places = np.argwhere(worth)
    if options.most is not None:
        places = np.random.default_rng(list(name.encode())).permutation(places)
    tiles: list[dict[str, Any]] = []
    read = 0
    for row, column in places.tolist():
        if options.most is not None and len(tiles) == options.most:
            break
        x, y = column * stride, row * stride
        tile = reader.tile(x, y, stride, options.side)
        read += 1
        tissue, pale = judge(tile, threshold, options.white_above)
        if tissue >= options.min_tissue and pale < options.max_white:
            path = folder / f"{x:06d}_{y:06d}.{options.format}"
            size = save_tile(tile, path)
            tiles.append({"file": path.name, "x": x, "y": y, "tissue": tissue, "white": pale, "bytes": size})
    if not tiles:
        raise UnusableSlide(f"no tissue: none of {columns * rows} tiles passes the limits, {read} of them were read")
    tiles.sort(key=lambda tile: (tile["y"], tile["x"]))
    kept = [(tile["x"] / downsample, tile["y"] / downsample) for tile in tiles]
    caption = f"{name}: {len(tiles)} of {columns * rows} tiles, Otsu {threshold}"
    draw_choice(overview, mask, white, kept, step, caption).save(folder / OVERVIEW)
    return {
        "width": reader.width,
        "height": reader.height,
        "downsamples": [round(value, 4) for value in reader.downsamples],
        "level": reader.level_for(stride / options.side),
        "direct": reader.direct,
        "mpp": reader.mpp,
        "otsu": threshold,
        "places": columns * rows,
        "read": read,
        "tiles": tiles,
    }


def judge(tile: Image.Image, threshold: int, white_above: int) -> tuple[float, float]:
    """(share of pixels at or below `threshold`, share above `white_above`) of a tile's grey, ITU-R 601-2 luma."""
    counts = tile.convert("L").histogram()
    total = tile.width * tile.height
    return sum(counts[: threshold + 1]) / total, sum(counts[white_above + 1 :]) / total


def _shares(mask: npt.NDArray[np.bool_], columns: int, rows: int, step: float) -> npt.NDArray[np.float64]:
    """float [rows, columns]: how much of each place on the grid is True, to 1/255."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    box = (0, 0, min(picture.width, columns * step), min(picture.height, rows * step))
    return np.asarray(picture.resize((columns, rows), Image.Resampling.BOX, box=box)) / 255


def save_tile(tile: Image.Image, path: Path) -> int:
    """Writes an RGB tile in the format of the path's suffix; its size in bytes."""
    if path.suffix == ".png":
        path.write_bytes(png_bytes(np.asarray(tile)))  # a sixth of Pillow's time, 4 % more bytes
    else:
        tile.save(path, quality=92)
    return path.stat().st_size


def _finished(folder: Path, source: dict[str, Any], options: TilingOptions) -> dict[str, Any] | None:
    """The record of a complete folder made of this very file; `UserError` where it was made with other options."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        options_there, source_there, tiles = record["options"], record["source"], record["tiles"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    wanted = asdict(options)
    if differing := [key for key in wanted if options_there.get(key) != wanted[key]]:
        key = differing[0]
        raise UserError(
            f"{folder}: tiled with other options ({', '.join(differing)}: {key} was {options_there.get(key)!r}, now "
            f"{wanted[key]!r}); delete that folder or choose another one"
        )
    if source_there != source or not (folder / OVERVIEW).is_file():
        return None
    return record if tiles_are_whole(folder, tiles) else None


def tiles_are_whole(folder: Path, tiles: Sequence[dict[str, Any]]) -> bool:
    """Whether each tile that a record names has the size that it had when it was written."""
    try:
        return all((folder / tile["file"]).stat().st_size == tile["bytes"] for tile in tiles)
    except OSError:
        return False


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def clear_left_over(folder: Path) -> None:
    """Removes what processes of this machine left behind that are no longer there."""
    mark = f".partial-{socket.gethostname()}-"
    for path in folder.glob(f".*{mark}*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            logger.info("%s: left by an interrupted process, removed", path)
            shutil.rmtree(path, ignore_errors=True)


def _write_table(folder: Path, slides: Sequence[TiledSlide]) -> None:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    columns = ("width", "height", "mpp", "level", "otsu", "places", "read", "seconds")
    table.writerow(["slide", "tiles", *columns])
    for slide in slides:
        table.writerow([slide.name, len(slide.record["tiles"]), *(slide.record[column] for column in columns)])
    write_atomically(folder / TABLE, text.getvalue().encode())
