"""The tile that others are recoloured after: little glass, gland beside stroma, ordinary colour and nucleus density."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipdist.errors import UserError
from clipdist.prepare.stain import EOSIN, HAEMATOXYLIN, amounts_of, optical_density, to_lab

SIDE, CELLS = 128, 8  # pixels along a tile's side when it is looked at; cells along it, for gland and stroma
LEAST_HAEMATOXYLIN = 0.25  # optical density above which a pixel counts as nucleus
GLASS = 225  # grey above which a pixel shows glass


@dataclass(frozen=True)
class TileLook:
    """What a tile looks like: shares from 0 to 1, mean colour in Reinhard's space, nuclei per cell of an 8 × 8 grid."""

    glass: float
    nuclei: float
    colour_3: npt.NDArray[np.float64]
    nuclei_by_cell: npt.NDArray[np.float64]


def look_at(picture: Image.Image) -> TileLook:
    """Nuclei are pixels with much haematoxylin, by the fixed vectors of Ruifrok and Johnston (2001)."""
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small).reshape(-1, 3)
    vectors = np.array([HAEMATOXYLIN, EOSIN])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nuclei = (amounts_of(optical_density(pixels), vectors)[:, 0] > LEAST_HAEMATOXYLIN).reshape(SIDE, SIDE)
    cell = SIDE // CELLS
    by_cell = nuclei.reshape(CELLS, cell, CELLS, cell).mean((1, 3)).ravel()
    glass = float((np.asarray(small.convert("L")) > GLASS).mean())
    return TileLook(glass, float(nuclei.mean()), to_lab(pixels).mean(0), by_cell)


def choose_reference(paths: Sequence[Path], most: int = 2000) -> tuple[Path, dict[str, float]]:
    """The most ordinary mixed tile among `paths`, and its terms; of more than `most` tiles evenly spaced ones are read.

    The sum of four terms is least: the share of glass; the distance of the mean colour, and of the share of nuclei,
    from the median of all tiles, in robust standard deviations; and a lack of mixture, 1 − 4p(1 − p), p being the share
    of cells that hold more nuclei than half of all cells do (crowded: gland or tumour; sparse: stroma). A function of
    the tiles' pixels and order alone. Raises `UserError` without tiles.
    """
    if not paths:
        raise UserError("reference tile: there are no tiles to choose from; tile slides first, or name one")
    numbers = np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int))
    looks = []
    for number in numbers:
        with Image.open(paths[number]) as picture:
            looks.append(look_at(picture))
    crowded = float(np.median(np.concatenate([look.nuclei_by_cell for look in looks])))
    colours = np.stack([look.colour_3 for look in looks])
    mixed = np.array([float((look.nuclei_by_cell > crowded).mean()) for look in looks])
    terms = {
        "glass": np.array([look.glass for look in looks]),
        "mixture": 1 - 4 * mixed * (1 - mixed),
        "colour": np.linalg.norm(_deviations(colours), axis=1) / 3,
        "nuclei": np.abs(_deviations(np.array([[look.nuclei] for look in looks]))[:, 0]),
    }
    best = int(sum(terms.values()).argmin())  # type: ignore[union-attr]
    return paths[numbers[best]], {name: round(float(values[best]), 4) for name, values in terms.items()}


def _deviations(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Distance of each row [n, k] from the median in units of the median absolute deviation, scaled to a normal's."""
    distance = values - np.median(values, axis=0)
    scale = 1.4826 * np.median(np.abs(distance), axis=0)
    return distance / np.maximum(scale, 1e-6)
