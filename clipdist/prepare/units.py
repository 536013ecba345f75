"""Units that must not straddle splits, joined where they share pictures: before packing, or on a packed set.

found = duplicates_of([pair.image for pair in pairs])
units = joined_units([pair.fields.get("unit") for pair in pairs], found.edges())
splits = split_by(labels, units, {"train": 0.8, "val": 0.2}, seed)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from clipdist.data.images.looks import LOOK, look_of
from clipdist.data.sets.duplicates import CANDIDATE_BITS, Duplicates, check_bits, find_duplicates, hashed
from clipdist.data.sets.pack import available_cores, in_order
from clipdist.data.sets.recode import ImageSource
from clipdist.data.sets.survey import MAX_IMAGE_PIXELS, see
from clipdist.data.shards import BadSample
from clipdist.progress import progress


def joined_units(
    units: Sequence[Any] | np.ndarray | None, edges_E2: np.ndarray, count: int | None = None
) -> np.ndarray:
    """int64 [N], numbered by first appearance: the same for samples of one unit, and of units that an edge joins.

    `units` has a value for each sample; one with None is a unit of its own, as are all with `units=None`, where `count`
    says how many there are. `edges_E2` are pairs of rows, as `Duplicates.edges` gives them. Joined units grow: A with
    B, and B with C, put all three together.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if units is None and count is None:
        raise ValueError("units or count: expected one of them")
    total = len(units) if units is not None else int(count or 0)
    first_of: dict[Any, int] = {}
    items = [None] * total if units is None else units.tolist() if isinstance(units, np.ndarray) else units
    links = [(row, first_of.setdefault(unit, row)) for row, unit in enumerate(items) if unit is not None]
    edges = np.concatenate([np.array(links, np.int64).reshape(-1, 2), np.asarray(edges_E2, np.int64).reshape(-1, 2)])
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(total, total))
    _, labels = connected_components(graph, directed=False)
    _, first, codes = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    return order[codes].astype(np.int64)


@dataclass
class Looks:
    """What N images look like: hashes of their bytes, uint64, and looks, dtype `LOOK`; both are 0 where an image is
    `unreadable`, which says why for each such row."""

    digests_N: np.ndarray
    looks_N: np.ndarray
    unreadable: dict[int, str]


def looks_of(
    images: Sequence[ImageSource],
    *,
    workers: int | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
    quiet: bool = False,
) -> Looks:
    """Decodes each image once. `workers`: processes, None for one on each core, 0 for none but this."""
    workers = available_cores() if workers is None else workers
    found = Looks(np.zeros(len(images), np.uint64), np.zeros(len(images), LOOK), {})
    seen = in_order(partial(_look_at_all, max_pixels=max_pixels), images, workers)
    for row, (digest, look, reason) in enumerate(
        progress(seen, total=len(images), unit="image", description="looking for duplicates", quiet=quiet)
    ):
        found.digests_N[row], found.looks_N[row] = digest, look
        if reason:
            found.unreadable[row] = reason
    return found


def duplicates_of(
    images: Sequence[ImageSource],
    *,
    bits: int = CANDIDATE_BITS,
    workers: int | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
    quiet: bool = False,
) -> Duplicates:
    """What these image files, or bytes, show twice; see `find_duplicates`. Those that cannot be read are like nothing:
    packing names them. `workers` as in `looks_of`."""
    check_bits(bits)  # before anything is decoded
    found = looks_of(images, workers=workers, max_pixels=max_pixels, quiet=quiet)
    return find_duplicates(found.digests_N, found.looks_N, bits)


def _look_at_all(images: list[ImageSource], max_pixels: int) -> list[tuple[int, np.ndarray, str]]:
    return [_look_at(image, max_pixels) for image in images]


def _look_at(image: ImageSource, max_pixels: int) -> tuple[int, np.ndarray, str]:
    """(hash of the bytes, look, why it cannot be read)."""
    try:
        data = image if isinstance(image, bytes) else image.read_bytes()
    except OSError as error:
        return 0, np.zeros((), LOOK), f"unreadable image file: {error.strerror}"
    except ValueError as error:
        return 0, np.zeros((), LOOK), f"missing image file: no file can have this name ({error})"
    try:
        return hashed(data), look_of(see(data, max_pixels)), ""
    except BadSample as error:
        return 0, np.zeros((), LOOK), str(error)
