"""Tiled slides -> the same tiles with the stains of a reference tile, in folders of the same form."""

import json
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from clipdist.data.sets.pack import Rejected, available_cores, in_order
from clipdist.data.shards import checksum_file, write_atomically
from clipdist.errors import UserError, disk_errors
from clipdist.prepare.slides import (
    RECORD,
    TiledSlide,
    clear_left_over,
    save_tile,
    tiles_are_whole,
    whole_folder,
)
from clipdist.prepare.stain import Method, NoTissue, Picture, StainNormaliser, as_json
from clipdist.progress import progress

FOR_STAINS = 32  # tiles of a slide in which its stains are looked for
# What Pillow raises for files that are no pictures, damaged or of too many pixels.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def recolour_slides(
    slides: Sequence[TiledSlide],
    folder: Path,
    method: Method,
    reference: Path,
    *,
    workers: int | None = None,
    quiet: bool = False,
) -> tuple[list[TiledSlide], list[Rejected]]:
    """Each of `slides` recoloured after the picture `reference` into `folder`, and those with too little tissue for it
    or of one stain.

    Stains are found per slide in up to 32 of its tiles and kept in its `slide.json`. As in `tile_slides`, each worker
    (process) has a slide of its own, and a folder that is complete and of the same tiles, method and reference is left
    as it is. Raises `UserError` for a reference that is no picture or has no two stains, and for a damaged tile.
    """
    try:
        pixels = _pixels(reference)
    except _UNREADABLE as error:
        raise UserError(
            f"reference tile {reference}: cannot be read as a picture ({_told(error)}); name a tile in PNG or JPEG"
        ) from None
    normaliser = StainNormaliser.make(method, pixels)
    made = {"method": method, "reference": checksum_file(reference)}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        clear_left_over(folder)
        workers = min(available_cores() if workers is None else workers, len(slides))
        work = partial(_recolour_each, folder=folder, normaliser=normaliser, made=made)
        done: list[TiledSlide] = []
        rejected: list[Rejected] = []
        with closing(in_order(work, slides, workers, 1)) as results:
            shown = progress(slides, unit="slide", description=f"recolouring into {folder.name}", quiet=quiet)
            for _, result in zip(shown, results, strict=True):
                if isinstance(result, Rejected):
                    rejected.append(result)
                else:
                    done.append(result)
    return done, rejected


def _recolour_each(
    slides: list[TiledSlide], folder: Path, normaliser: StainNormaliser, made: dict[str, Any]
) -> list[TiledSlide | Rejected]:
    results: list[TiledSlide | Rejected] = []
    for slide in slides:
        try:
            results.append(_recolour(slide, folder / slide.name, normaliser, made))
        except NoTissue as error:
            results.append(Rejected(None, slide.name, str(slide.folder), f"no stains: {error}"))
    return results


def _recolour(slide: TiledSlide, final: Path, normaliser: StainNormaliser, made: dict[str, Any]) -> TiledSlide:
    made = {**made, "tiles": {tile["file"]: tile["bytes"] for tile in slide.record["tiles"]}}
    try:
        record = json.loads((final / RECORD).read_text(encoding="utf-8"))
        if record["recoloured"] == made and tiles_are_whole(final, record["tiles"]):
            return TiledSlide(slide.name, final, record, resumed=True)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    tiles = slide.tiles
    chosen = np.unique(np.linspace(0, len(tiles) - 1, min(FOR_STAINS, len(tiles))).round().astype(int))
    found = normaliser.fit([_tile(tiles[number].path) for number in chosen])
    with whole_folder(final) as fresh:
        entries = []
        for tile, entry in zip(tiles, slide.record["tiles"], strict=True):
            picture = Image.fromarray(normaliser.apply(_tile(tile.path), found))
            entries.append({**entry, "bytes": save_tile(picture, fresh / tile.path.name)})
        record = {**slide.record, "tiles": entries, "recoloured": made, "stains": as_json(found)}
        write_atomically(fresh / RECORD, json.dumps(record, indent=1).encode())
    return TiledSlide(slide.name, final, record)


def _tile(path: Path) -> Picture:
    try:
        return _pixels(path)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's own failure, which `disk_errors` tells of
        raise UserError(
            f"{path}: damaged tile ({_told(error)}); delete the folder {path.parent} and run the command again"
        ) from None


def _told(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message may name an address in memory
        return "of no format that Pillow knows"
    return " ".join(str(error).split())[:200]


def _pixels(path: Path) -> Picture:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
