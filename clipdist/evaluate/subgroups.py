"""The same scores for each value of a field, such as skin tone, sex or site, and the gaps between them.

Suffixes of names: N images, Q queries.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipdist.errors import UserError
from clipdist.evaluate.estimates import (
    CONFIDENCE,
    Estimate,
    Measured,
    Statistic,
    aligned,
    cell,
    estimates,
    unit_numbers,
    without_nan,
)

MOST_VALUES = 50
FEWEST_ROWS = 10
NOT_GIVEN = "not given"


@dataclass(frozen=True)
class Subgroup:
    """Scores of the images that have one value, and each score's gap: theirs less that of all other images."""

    value: str
    images: int
    units: int
    scores: dict[str, Estimate]
    gaps: dict[str, Estimate]

    @property
    def flagged(self) -> list[str]:
        """The scores whose gap has an interval without zero."""
        return [
            name
            for name, gap in self.gaps.items()
            if gap.low is not None and gap.high is not None and (gap.low > 0 or gap.high < 0)
        ]


@dataclass(frozen=True)
class SubgroupScores:
    """All values of `field`. `few` counts the images of values with too few to be scored."""

    field: str
    subgroups: tuple[Subgroup, ...]
    few: dict[str, int]

    @property
    def compared(self) -> int:
        """How many gaps have an interval."""
        return sum(gap.low is not None for one in self.subgroups for gap in one.gaps.values())

    def to_dict(self) -> dict[str, Any]:
        values = [
            {
                "value": one.value,
                "images": one.images,
                "units": one.units,
                "scores": {name: score.to_dict() for name, score in one.scores.items()},
                "gaps": {name: gap.to_dict() for name, gap in one.gaps.items()},
                "flagged": one.flagged,
            }
            for one in self.subgroups
        ]
        return without_nan({"field": self.field, "compared": self.compared, "values": values, "few": self.few})

    def table(self) -> str:
        """Plain text: a line per value; * marks a score whose gap to the other images excludes zero."""
        names = list(self.subgroups[0].scores) if self.subgroups else []
        rows = [[f"by {self.field}", "images", "units", *names]]
        for one in self.subgroups:
            marks = {name: "*" if name in one.flagged else " " for name in names}
            cells = [cell(one.scores[name]) + marks[name] for name in names]
            rows.append([f"  {one.value}", f"{one.images:,}", f"{one.units:,}", *cells])
        lines = aligned(rows)
        lines += [f"  {value}: {images} images, too few to score" for value, images in self.few.items()]
        return "\n".join([*lines, self.note()])

    def note(self) -> str:
        """What the marks mean, and how many would come by chance."""
        found = sum(len(one.flagged) for one in self.subgroups)
        expected = (1 - CONFIDENCE) * self.compared
        return (
            f"{found} of {self.compared} gaps to all other images have an interval without zero, marked *; "
            f"about {expected:.1f} would by chance"
        )


def subgroup_scores(
    measured: Mapping[str, Measured],
    values_N: Sequence[Any],
    *,
    field: str,
    units: Sequence[Any] | np.ndarray | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> SubgroupScores:
    """Every statistic of every `Measured` for each value of a field, queries being those of the value's images.

    Galleries and classes stay whole: a query of a subgroup ranks what it ranks in the score of all. `values_N[i]` is
    the value of image i, None (or an empty string) where it is not known, which is shown as a subgroup of its own.
    Scores are named `measure: statistic`. Values with fewer than 10 images are counted, not scored.

    Each gap, the subgroup's score less that of all other images, is resampled as one number, whole units at a time, so
    a unit with images on both sides moves both. Among many gaps some have an interval without zero by chance: one in
    twenty, which `note` says. Two values of one field are compared with the rest, not with each other, so with two
    values their gaps mirror each other.

    Raises `UserError` for a field with more than 50 values or with a single one.
    """
    names = [NOT_GIVEN if value in (None, "") else str(value) for value in values_N]
    counts = Counter(names)
    if len(counts) > MOST_VALUES or len(counts) < 2:
        raise UserError(
            f"subgroups by {field!r}: found {len(counts)} values"
            + (f" (all {next(iter(counts))})" if len(counts) == 1 else "")
            + f", expected 2 to {MOST_VALUES}: choose a field that divides the images, or make ranges of its numbers"
        )
    value_N, unit_N = np.array(names), unit_numbers(units, len(names))
    shown = [value for value in sorted(counts, key=lambda one: (one == NOT_GIVEN, one)) if counts[value] >= FEWEST_ROWS]
    scores: dict[str, dict[str, Estimate]] = {value: {} for value in shown}
    gaps: dict[str, dict[str, Estimate]] = {value: {} for value in shown}
    for measure, one in measured.items():
        value_Q, unit_Q = value_N[one.image_Q], unit_N[one.image_Q]
        for value in shown:
            inside = value_Q == value
            statistics: dict[str, Statistic] = {}
            for name, statistic in one.statistics.items():
                statistics[f"score {name}"] = _within(statistic, inside)
                statistics[f"gap {name}"] = _gap(statistic, inside)
            found = estimates(statistics, unit_Q, bootstrap=bootstrap, seed=seed)
            for name in one.statistics:
                scores[value][f"{measure}: {name}"] = found[f"score {name}"]
                gaps[value][f"{measure}: {name}"] = found[f"gap {name}"]
    return SubgroupScores(
        field,
        tuple(
            Subgroup(value, counts[value], len(np.unique(unit_N[value_N == value])), scores[value], gaps[value])
            for value in shown
        ),
        {value: counts[value] for value in sorted(counts) if counts[value] < FEWEST_ROWS},
    )


def _within(statistic: Statistic, rows: np.ndarray) -> Statistic:
    return lambda times_rQ: statistic(times_rQ * rows)


def _gap(statistic: Statistic, rows: np.ndarray) -> Statistic:
    return lambda times_rQ: statistic(times_rQ * rows) - statistic(times_rQ * ~rows)
