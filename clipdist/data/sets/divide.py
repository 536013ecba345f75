"""New splits for a packed set: units and near-duplicates stay whole, labels in proportion."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.data.classes import field_values
from clipdist.data.sets.duplicates import Duplicates, cut_short_warning
from clipdist.data.sets.survey import Survey
from clipdist.data.shards import write_atomically
from clipdist.errors import UserError, disk_errors
from clipdist.prepare.splits import split_by
from clipdist.prepare.units import joined_units

# A unit of more than this share of a set leaves little to choose; duplicates that chain through a whole set make such.
LARGE_UNIT = 0.05


@dataclass
class Division:
    """`rows` of the survey that are divided, and the `splits`, strings, and `units`, int64, of each. `joined` counts
    units that duplicates put together with others; `left_out`, samples that cannot be read; `notes` are for the
    manifest of a set that is made by it."""

    survey: Survey
    fractions: dict[str, float]
    rows: np.ndarray
    splits: np.ndarray
    units: np.ndarray
    joined: int
    left_out: int
    labels: list[str | None] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """A table of `key`, `split` and `unit`, the number of the joined unit."""
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(["key", "split", "unit"])
        for row, split, unit in zip(self.rows.tolist(), self.splits.tolist(), self.units.tolist(), strict=True):
            table.writerow([self.survey.rows.key(row), split, unit])
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.getvalue().encode())

    def __str__(self) -> str:
        sizes = np.bincount(self.units)
        lines = [f"{self.survey.folder}: {len(self.rows):,} samples in {len(sizes):,} units"]
        if self.joined:
            lines[0] += f"; duplicates joined {self.joined:,} with others"
        labels = np.array([label or "" for label in self.labels])
        for name, asked in self.fractions.items():
            own = self.splits == name
            classes = len(set(labels[own].tolist()) - {""})
            lines.append(
                f"  {name:<10} {int(own.sum()):>9,}  {own.mean():7.2%} (asked for {asked:.2%}), "
                f"{len(np.unique(self.units[own])):,} units, {classes:,} classes"
            )
        if len(sizes) and sizes.max() > max(1, LARGE_UNIT * len(self.rows)):
            lines.append(
                f"warning: one unit holds {int(sizes.max()):,} samples ({sizes.max() / len(self.rows):.1%}); "
                f"clipdist audit shows what joins them"
            )
        lines += cut_short_warning(self.notes.get("cut_short", 0))
        if self.left_out:
            lines.append(f"left out: {self.left_out:,} samples that cannot be read (clipdist verify tells more)")
        return "\n".join(lines)


def divide(
    survey: Survey,
    fractions: Mapping[str, float],
    *,
    stratify_by: str = "label",
    seed: int = 0,
    duplicates: Duplicates | None = None,
) -> Division:
    """A split for every sample that can be read, whatever split it is in; a function of its arguments alone.

    Units are the samples' field `unit`, joined by `duplicates`. Raises `UserError` as `split_by` does, and for a key
    that several samples have: no table could tell them apart.
    """
    units = survey.samples["unit"]
    own = [int(unit) if unit else None for unit in units]
    before = len(np.unique(units[units != 0])) + int((units == 0).sum())
    edges = duplicates.edges() if duplicates else np.zeros((0, 2), np.int64)
    together = joined_units(own, edges)
    rows = np.array([row for row in range(len(survey.rows)) if row not in survey.bad], np.int64)
    if not len(rows):
        raise UserError(f"{survey.folder}: no sample can be read; run: clipdist verify {survey.folder}")
    keys = [survey.rows.key(row) for row in rows.tolist()]
    if len(set(keys)) < len(keys):
        twice = len(keys) - len(set(keys))
        raise UserError(f"{survey.folder}: {twice:,} keys are used twice; clipdist verify names them")
    labels = _labels(survey, stratify_by)
    chosen = [labels[row] for row in rows.tolist()]
    splits = split_by(chosen, together[rows], fractions, seed)
    joined = before - (int(together.max()) + 1)
    _, codes = np.unique(together[rows], return_inverse=True)
    notes: dict[str, Any] = {"fractions": dict(fractions), "stratify_by": stratify_by, "seed": seed}
    notes["duplicates_joined"] = None  # not looked for
    if duplicates:
        notes |= {"duplicates_joined": joined, "cut_short": duplicates.cut_short}
    left_out = len(survey.rows) - len(rows)
    return Division(survey, dict(fractions), rows, splits, codes, joined, left_out, chosen, notes)


def _labels(survey: Survey, field_name: str) -> list[str | None]:
    labels: list[str | None] = [None] * len(survey.rows)
    for name in survey.rows.splits:
        split, rows = survey.readable(name)
        values = field_values(split, field_name)
        for row, code in zip(rows.tolist(), values.codes.tolist(), strict=True):
            labels[row] = values.names[code] if code >= 0 else None
    return labels
