"""The same scores for each value of a field, such as skin tone, sex or site, and the gaps between them.

Suffixes of names: N images, Q queries.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipdist.data.labels import is_absent
from clipdist.errors import UserError
from clipdist.evaluate.estimates import (
    CONFIDENCE,
    Estimate,
    Measured,
    Statistic,
    aligned,
    cell,
    estimates,
    percentiles,
    resampled,
    unit_numbers,
    without_nan,
)

MOST_VALUES = 50
FEWEST_ROWS = 10
FEWEST_UNITS = 10
NOT_GIVEN = "not given"
# The scores of a measure that a page has room for; the JSON has all.
LEADING = ("R@1", "top-1", "auroc", "AUROC")


@dataclass(frozen=True)
class Subgroup:
    """Scores of the images that have one value, and each score's gap: theirs less that of all other images. `fewer`:
    by score, the units of its queries on the side of the gap that has fewer."""

    value: str
    images: int
    units: int
    scores: dict[str, Estimate]
    gaps: dict[str, Estimate]
    fewer: dict[str, int]

    @property
    def compared(self) -> list[str]:
        """The scores whose gap has an interval, with 10 units or more on both sides."""
        return [name for name, gap in self.gaps.items() if self.fewer[name] >= FEWEST_UNITS and gap.low is not None]

    @property
    def flagged(self) -> list[str]:
        """Of those compared, the scores whose gap has an interval without zero."""
        return [name for name in self.compared if not _holds_zero(self.gaps[name])]


@dataclass(frozen=True)
class SubgroupScores:
    """All values of `field`, and the scores of all images. `few` counts images of values with too few to be scored."""

    field: str
    images: int
    overall: dict[str, Estimate]
    subgroups: tuple[Subgroup, ...]
    few: dict[str, int]

    @property
    def compared(self) -> int:
        """How many gaps have an interval, of values with enough units."""
        return sum(len(one.compared) for one in self.subgroups)

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
        overall = {name: score.to_dict() for name, score in self.overall.items()}
        found = {"field": self.field, "images": self.images, "compared": self.compared, "overall": overall}
        return without_nan({**found, "values": values, "few": self.few, "note": self.note()})

    def table(self) -> str:
        """Plain text, for each measure a line per value; * marks a score whose gap to all others excludes zero."""
        lines = []
        for measure in dict.fromkeys(name.partition("/")[0] for name in self.overall):
            names = [name for name in self.overall if name.startswith(f"{measure}/")]
            rows = [[f"by {self.field}", "images", "units", *map(shown_name, names)]]
            rows.append(["  all", f"{self.images:,}", "", *(cell(self.overall[name]) + " " for name in names)])
            for one in self.subgroups:
                cells = [cell(one.scores[name]) + ("*" if name in one.flagged else " ") for name in names]
                rows.append([f"  {one.value}", f"{one.images:,}", f"{one.units:,}", *cells])
            lines += aligned(rows)
        lines += [f"  {value}: {images} images, too few to score" for value, images in self.few.items()]
        return "\n".join([*lines, self.note()])

    def note(self) -> str:
        """What the marks mean, and how many would come by chance."""
        found = sum(len(one.flagged) for one in self.subgroups)
        expected = (1 - CONFIDENCE) * self.compared
        return (
            f"{found} of {self.compared} gaps to all other images have an interval without zero, marked *; "
            f"about {expected:.1f} would by chance. Gaps with fewer than {FEWEST_UNITS} units on either side are not "
            "compared"
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
    Scores are named `measure/statistic`. Values with fewer than 10 images are counted, not scored.

    Each gap, the subgroup's score less that of all other images, is resampled as one number, whole units at a time, so
    a unit with images on both sides moves both. Among many gaps some have an interval without zero by chance: one in
    twenty, which `note` says; with few units more, so no gap is flagged that has queries of fewer than 10 units with
    the value, or without it. Where one of these sides is always or never right, its resamples are too, and tell no
    error: the interval of the gap is then widened by 3 over its units, the rule of three (Hanley and Lippman-Hand
    1983). Each value is compared with all others together, so the gaps of two values mirror each other.

    Raises `UserError` for a field with more than 50 values or with a single one.
    """
    check_values(values_N, field)
    names = _names(values_N)
    counts = Counter(names)
    value_N, unit_N = np.array(names), unit_numbers(units, len(names))
    shown = [value for value in sorted(counts, key=lambda one: (one == NOT_GIVEN, one)) if counts[value] >= FEWEST_ROWS]
    scores: dict[str, dict[str, Estimate]] = {value: {} for value in shown}
    gaps: dict[str, dict[str, Estimate]] = {value: {} for value in shown}
    fewer: dict[str, dict[str, int]] = {value: {} for value in shown}
    overall: dict[str, Estimate] = {}
    for measure, one in measured.items():
        value_Q, unit_Q = value_N[one.image_Q], unit_N[one.image_Q]
        of_all = estimates(one.statistics, unit_Q, bootstrap=bootstrap, seed=seed)
        overall |= {f"{measure}/{name}": estimate for name, estimate in of_all.items()}
        for value in shown:
            inside = value_Q == value
            statistics: dict[str, Statistic] = {}
            for name, statistic in one.statistics.items():
                statistics[f"inside {name}"] = within(statistic, inside)
                statistics[f"outside {name}"] = within(statistic, ~inside)
            found = resampled(statistics, unit_Q, bootstrap=bootstrap, seed=seed)
            for name in one.statistics:
                (own, own_R), (other, other_R) = (found[f"{side} {name}"] for side in ("inside", "outside"))
                scores[value][f"{measure}/{name}"] = Estimate(own, *percentiles(own_R))
                units_of = len(np.unique(unit_Q[inside])), len(np.unique(unit_Q[~inside]))
                fewer[value][f"{measure}/{name}"] = min(units_of)
                gaps[value][f"{measure}/{name}"] = _gap(own, own_R, other, other_R, *units_of)
    return SubgroupScores(
        field,
        len(names),
        overall,
        tuple(
            Subgroup(
                value,
                counts[value],
                len(np.unique(unit_N[value_N == value])),
                scores[value],
                gaps[value],
                fewer[value],
            )
            for value in shown
        ),
        {value: counts[value] for value in sorted(counts) if counts[value] < FEWEST_ROWS},
    )


def shown_name(name: str) -> str:
    """`image → text R@1` for `image_to_text/R@1`."""
    return name.replace("_to_", " → ").replace("/", " ").replace("_", "-").replace("auroc", "AUROC")


def _gap(
    own: float, own_R: np.ndarray, other: float, other_R: np.ndarray, own_units: int, other_units: int
) -> Estimate:
    low, high = percentiles(own_R - other_R)
    if low is not None and high is not None:
        own_down, own_up = _untold(own, own_R, own_units)
        other_down, other_up = _untold(other, other_R, other_units)
        low, high = low - own_down - other_up, high + own_up + other_down
    return Estimate(own - other, low, high)


def _holds_zero(gap: Estimate) -> bool:
    return gap.low is None or gap.high is None or gap.low <= 0 <= gap.high


def _untold(value: float, drawn_R: np.ndarray, units: int) -> tuple[float, float]:
    """How far below and above a score may lie that is 0 or 1 in every resample, so that these tell no error."""
    if value not in (0, 1) or not (drawn_R[np.isfinite(drawn_R)] == value).all():
        return 0.0, 0.0
    return (0.0, 3 / units) if value == 0 else (3 / units, 0.0)


def check_values(values_N: Sequence[Any], field: str) -> None:
    """`UserError` unless the field divides the images into 2 to 50 values."""
    counts = Counter(_names(values_N))
    if not 2 <= len(counts) <= MOST_VALUES:
        only = f" (all {next(iter(counts))})" if len(counts) == 1 else ""
        raise UserError(
            f"subgroups by {field!r}: found {len(counts)} values{only}, expected 2 to {MOST_VALUES}: choose a field "
            "that divides the images, or make ranges of its numbers"
        )


def _names(values_N: Sequence[Any]) -> list[str]:
    return [NOT_GIVEN if is_absent(value) else str(value) for value in values_N]


def within(statistic: Statistic, rows: np.ndarray) -> Statistic:
    """The statistic of these queries alone, bool [Q]; what they rank stays whole."""
    return lambda times_rQ: statistic(times_rQ * rows)
