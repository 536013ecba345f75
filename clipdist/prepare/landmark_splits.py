"""Landmarks into splits: near-duplicates together whatever their labels, classes in proportion and all of them learned.

Near-duplicates are joined across landmarks as well as within one. A picture that lies under two labels, one on either
side of a split, is a leak for every score of retrieval, and an error for classification that no model can avoid. Such
pairs are listed: many are faults of labelling.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from clipdist.data.sets.divide import LARGE_UNIT
from clipdist.data.sets.duplicates import cut_short_warning
from clipdist.data.sets.pack import Pair, Rejected
from clipdist.errors import UserError
from clipdist.prepare.landmarks import LandmarkPairs
from clipdist.prepare.near_duplicates import NearDuplicates
from clipdist.prepare.splits import every_label_in, split_by
from clipdist.prepare.units import joined_units

CLASSES_FILE, CONFLICTS_FILE = "landmarks.csv", "near_duplicates_across_landmarks.csv"


@dataclass
class DividedLandmarks:
    """Pairs by split, whose field `unit` names the near-duplicates they belong to; `files` to put beside the set."""

    splits: dict[str, list[Pair]]
    files: dict[str, bytes]
    notes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        near, split = self.notes["near_duplicates"], self.notes["split"]
        features = near["features"]
        lines = [
            f"the same picture again: {near['bytes']:,} equal bytes, {near['looks']:,} pairs by looks, "
            + (f"{features['pairs']:,} by features" if features else "features not compared (--embed)")
            + f"; {near['images_in_shared_units']:,} images share a unit, the largest unit has {near['largest_unit']:,}"
        ]
        lines += cut_short_warning(near["cut_short"])
        total = sum(map(len, self.splits.values()))
        if near["largest_unit"] > max(1, LARGE_UNIT * total):
            lines.append(f"warning: one unit holds {near['largest_unit'] / total:.1%} of all images; raise --cosine")
        if across := near["across_landmarks"]["pairs"]:
            lines.append(f"{across:,} pairs have two labels: see {CONFLICTS_FILE}")
        lines.append("classes: " + ", ".join(f"{count:,} in {name}" for name, count in split["classes"].items()))
        return "\n".join(lines)


def divide_landmarks(
    found: LandmarkPairs, near: NearDuplicates, fractions: Mapping[str, float], seed: int
) -> tuple[LandmarkPairs, DividedLandmarks]:
    """Splits in which near-duplicates stay together, whatever their labels, and classes in proportion; every class is
    in the largest split.

    `near` is about `found.pairs`. Images that it could not read are rejected, and then classes with fewer than
    `min_images`, as `found` has it, left out: the first value returned is `found` without them. A pair's field `unit`
    is the key of the first image of its near-duplicates.
    """
    # Joined before anything is dropped: two pictures that are kept may be linked by one that is not.
    units = joined_units(None, near.pairs_P2, len(found.pairs))
    found, kept = _readable(found, near.unreadable)
    near, pairs = near.among(kept), found.pairs
    labels = [pair.fields["label"] for pair in pairs]
    units = joined_units(units[kept], np.zeros((0, 2), np.int64))
    largest = max(fractions, key=lambda name: fractions[name])
    splits, moved = every_label_in(split_by(labels, units, fractions, seed), labels, units.tolist(), largest)
    _, first = np.unique(units, return_index=True)
    divided: dict[str, list[Pair]] = {name: [] for name in fractions}
    for pair, unit, name in zip(pairs, units.tolist(), splits.tolist(), strict=True):
        divided[name].append(replace(pair, fields={**pair.fields, "unit": pairs[first[unit]].key}))
    across = [place for place, (one, two) in enumerate(near.pairs_P2.tolist()) if labels[one] != labels[two]]
    sizes = np.bincount(units)
    notes = {
        "near_duplicates": {
            **near.notes,
            "pairs": len(near.pairs_P2),
            "across_landmarks": {"pairs": len(across), "listed_in": CONFLICTS_FILE},
            "images_in_shared_units": int(sizes[sizes > 1].sum()),
            "largest_unit": int(sizes.max()),
        },
        "split": {
            "fractions": dict(fractions),
            "seed": seed,
            "classes": {name: len({pair.fields["label"] for pair in held}) for name, held in divided.items()},
            "classes_moved": moved,
        },
        "labels": CLASSES_FILE,
    }
    files = {CLASSES_FILE: _class_table(found, divided), CONFLICTS_FILE: _conflict_table(pairs, near, across)}
    return found, DividedLandmarks(divided, files, notes)


def _readable(found: LandmarkPairs, unreadable: Mapping[int, str]) -> tuple[LandmarkPairs, npt.NDArray[np.int64]]:
    """(`found` without unreadable images and the classes that become too small by it, places of the pairs kept)."""
    rejected = [Rejected.of(found.pairs[row], reason) for row, reason in unreadable.items()]
    sound = [row for row in range(len(found.pairs)) if row not in unreadable]
    count = Counter(found.pairs[row].fields["label"] for row in sound)
    least = found.notes["min_images"]
    kept = [row for row in sound if count[found.pairs[row].fields["label"]] >= least]
    if not kept:
        raise UserError(f"no landmark has {least} readable images; {rejected[0] if rejected else ''}")
    left_out = Counter(found.left_out)
    left_out["of classes too small without the unreadable"] += len(sound) - len(kept)
    classes = {label: told for label, told in found.classes.items() if count[label] >= least}
    notes = {**found.notes, "landmarks": {**found.notes["landmarks"], "kept": len(classes)}}
    remaining = [found.pairs[row] for row in kept]
    left = replace(
        found,
        pairs=remaining,
        rejected=[*found.rejected, *rejected],
        left_out=dict(left_out),
        classes=classes,
        notes=notes,
    )
    return left, np.array(kept, np.int64)


def _class_table(found: LandmarkPairs, divided: Mapping[str, Sequence[Pair]]) -> bytes:
    counts = {name: Counter(pair.fields["label"] for pair in held) for name, held in divided.items()}
    rows = (
        [label, landmark, category, *(counts[name][label] for name in divided)]
        for label, (landmark, category) in found.classes.items()
    )
    return _csv(["label", "landmark_id", "category", *divided], rows)


def _conflict_table(pairs: Sequence[Pair], near: NearDuplicates, across: Sequence[int]) -> bytes:
    rows = []
    for place in across:
        one, two = (pairs[row] for row in near.pairs_P2[place].tolist())
        told = (value for pair in (one, two) for value in (pair.key, pair.fields["label"], pair.fields["landmark_id"]))
        rows.append([*told, near.how(place), f"{near.scores_P[place]:.3f}"])
    named = ("key", "label", "landmark_id")
    return _csv([*named, *(f"other_{name}" for name in named), "how", "score"], rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(header)
    table.writerows(rows)
    return text.getvalue().encode()
