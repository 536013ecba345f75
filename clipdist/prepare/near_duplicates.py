"""Pictures that show the same: by their bytes, by how they look, and by what an image tower makes of them.

Looks find copies that were encoded anew, resized, brightened or cut by some percent; features also find larger crops,
and, at too low a cosine, other photographs of the same thing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipdist.data.sets.duplicates import CANDIDATE_BITS, check_bits, cosine_pairs, find_duplicates
from clipdist.data.sets.recode import ImageSource
from clipdist.data.sets.survey import MAX_IMAGE_PIXELS
from clipdist.errors import UserError
from clipdist.prepare.units import joined_units, looks_of

if TYPE_CHECKING:
    from clipdist.prepare.embedding import ImageEmbedder

HOW = ("bytes", "looks", "features")


@dataclass
class NearDuplicates:
    """Pairs of rows of N images, int64 [P, 2], first < second, each pair once; `how_P`, places in `HOW`, by which it
    was found first; `scores_P`, float32: 1 for equal bytes, correlation of details, cosine. `notes` for a manifest."""

    pairs_P2: np.ndarray
    how_P: np.ndarray
    scores_P: np.ndarray
    unreadable: dict[int, str]
    notes: dict[str, Any]

    def how(self, place: int) -> str:
        return HOW[int(self.how_P[place])]

    def among(self, kept_K: np.ndarray) -> "NearDuplicates":
        """The pairs of which both rows are in `kept_K`, ascending; rows are then places in it.

        A search names the first of equal bytes for all of them. Where that one is not kept, the first kept one with its
        bytes takes its part, so that the pairs are those of a search among the kept alone.
        """
        count = max(int(self.pairs_P2.max(initial=-1)), int(kept_K.max(initial=-1))) + 1
        equal = joined_units(None, self.pairs_P2[self.how_P == HOW.index("bytes")], count)
        first_of = np.full(count, -1)
        groups, places_in_kept = np.unique(equal[kept_K], return_index=True)
        first_of[groups] = places_in_kept
        place_of = first_of[equal]
        place_of[kept_K] = np.arange(len(kept_K))
        places = np.sort(place_of[self.pairs_P2], axis=1)
        rows = np.flatnonzero((places[:, 0] >= 0) & (places[:, 0] != places[:, 1]))
        rows = rows[np.argsort(self.how_P[rows], kind="stable")]  # of a pair that comes twice, how it was found first
        _, once = np.unique(places[rows, 0] * count + places[rows, 1], return_index=True)
        rows = rows[once]
        return NearDuplicates(places[rows], self.how_P[rows], self.scores_P[rows], {}, self.notes)


def near_duplicates(
    images: Sequence[ImageSource],
    *,
    bits: int = CANDIDATE_BITS,
    embedder: "ImageEmbedder | None" = None,
    cosine: float = 0.9,
    workers: int | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
    quiet: bool = False,
) -> NearDuplicates:
    """All pairs of equal bytes, all whose looks `find_duplicates` confirms, and with an `embedder` all whose features
    have at least this `cosine`: N · (1,168 + 4 · width) bytes of memory, N² · width operations for the features.

    Raises `UserError` for a cosine that is none, and as `check_bits` does.
    """
    check_bits(bits)
    if embedder is not None and not 0 < cosine <= 1:
        raise UserError(f"--cosine: found {cosine}, expected more than 0 and at most 1")
    seen = looks_of(images, workers=workers, max_pixels=max_pixels, quiet=quiet)
    found = find_duplicates(seen.digests_N, seen.looks_N, bits)
    copies = np.flatnonzero(found.first_N != np.arange(len(images)))
    parts = [np.stack([found.first_N[copies], copies], 1), found.pairs_P2]
    scores = [np.ones(len(copies), np.float32), found.scores_P]
    notes: dict[str, Any] = {"bits": bits, "bytes": len(copies), "looks": len(found.pairs_P2), "features": None}
    notes["cut_short"] = found.cut_short
    if embedder is not None:
        readable = np.array([row for row in range(len(images)) if row not in seen.unreadable], np.int64)
        chosen = [images[row] for row in readable]
        features = embedder.features(chosen, workers=workers, max_pixels=max_pixels, quiet=quiet)
        pairs, cosines = cosine_pairs(features, cosine)
        parts.append(readable[pairs])
        scores.append(cosines)
        notes["features"] = {**embedder.source, "cosine": cosine, "pairs": len(pairs)}
    joined, how = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    _, first = np.unique(joined[:, 0] * len(images) + joined[:, 1], return_index=True)
    return NearDuplicates(joined[first], how[first], np.concatenate(scores)[first], seen.unreadable, notes)
