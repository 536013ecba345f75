"""Scores with bootstrap intervals that resample whole units, and how they are printed.

Suffixes of names: Q queries, U units of resampling, r resamples at once, K values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipdist.data.labels import is_absent
from clipdist.errors import UserError

CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 2**22

Statistic = Callable[[np.ndarray], np.ndarray]
"""times_rQ -> float64 [r]: a score of resamples that hold query q `times_rQ[r, q]` times; NaN where undefined."""


@dataclass(frozen=True)
class Estimate:
    """A score and its bootstrap percentile interval; `low` and `high` are None where nothing was resampled."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Measured:
    """Statistics over the same queries; query q belongs to image `image_Q[q]`, and so to that image's unit."""

    statistics: dict[str, Statistic]
    image_Q: np.ndarray


def estimates(
    statistics: Mapping[str, Statistic], unit_Q: np.ndarray, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Each statistic of all queries, with the 95 % percentile interval of resamples of units with replacement.

    `unit_Q`: int64, the unit of each query. All statistics see the same resamples. A resample that does not define a
    statistic (no positives in it, say) is left out of its interval; where that befalls more than half of them, or there
    is only one unit, the interval is None. Memory: some blocks of 4M numbers, or of one resample where that is more.
    """
    return {
        name: Estimate(value, *percentiles(drawn_R))
        for name, (value, drawn_R) in resampled(statistics, unit_Q, bootstrap=bootstrap, seed=seed).items()
    }


def resampled(
    statistics: Mapping[str, Statistic], unit_Q: np.ndarray, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, tuple[float, np.ndarray]]:
    """Each statistic of all queries, and of every resample: float64 [bootstrap], or empty with one unit alone."""
    once_1Q = np.ones((1, len(unit_Q)))
    values = {name: float(statistic(once_1Q)[0]) for name, statistic in statistics.items()}
    unit_Q = np.unique(unit_Q, return_inverse=True)[1]
    drawn: dict[str, list[np.ndarray]] = {name: [np.zeros(0)] for name in statistics}
    if unit_Q.max() > 0:
        for times_rQ in _resamples(unit_Q, bootstrap, seed):
            for name, statistic in statistics.items():
                drawn[name].append(statistic(times_rQ))
    return {name: (values[name], np.concatenate(drawn[name])) for name in statistics}


def _resamples(unit_Q: np.ndarray, bootstrap: int, seed: int) -> Iterator[np.ndarray]:
    """float64 [r, Q]: how often each query is in each resample."""
    U = int(unit_Q.max()) + 1
    rng = np.random.default_rng(seed)
    block = max(1, _DRAWS_AT_ONCE // len(unit_Q))
    for start in range(0, bootstrap, block):
        rows = min(block, bootstrap - start)
        drawn = rng.integers(U, size=(rows, U)) + U * np.arange(rows)[:, None]
        times_rU = np.bincount(drawn.ravel(), minlength=rows * U).reshape(rows, U)
        yield times_rU[:, unit_Q].astype(np.float64)


def percentiles(drawn_R: np.ndarray) -> tuple[float | None, float | None]:
    """The ends of the interval that holds 95 % of the values that are defined; None when fewer than half are."""
    defined = drawn_R[np.isfinite(drawn_R)]
    if not len(defined) or 2 * len(defined) < len(drawn_R):
        return None, None
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mean_of(values_Q: np.ndarray) -> Statistic:
    """The mean over queries."""
    return ratio_of(values_Q, np.ones(len(values_Q)))


def ratio_of(sum_Q: np.ndarray, count_Q: np.ndarray) -> Statistic:
    """The mean over events, of which query q took part in `count_Q[q]` and scored `sum_Q[q]` in all."""
    sums_Q2 = np.stack([sum_Q, count_Q], axis=1).astype(np.float64)

    def statistic(times_rQ: np.ndarray) -> np.ndarray:
        total_r, count_r = (times_rQ @ sums_Q2).T
        return divided(total_r, count_r)

    return statistic


def median_of(values_Q: np.ndarray) -> Statistic:
    """The median over queries, the mean of both middle ones where their number is even."""
    order = np.argsort(values_Q, kind="stable")
    sorted_Q = np.asarray(values_Q, np.float64)[order]

    def statistic(times_rQ: np.ndarray) -> np.ndarray:
        # Cumulated multiplicities of the sorted values give each resample's median without sorting it.
        reached_rQ = times_rQ[:, order].cumsum(axis=1)
        total_r = reached_rQ[:, -1]
        places = ((total_r - 1) // 2, total_r // 2)
        middle = [np.minimum((reached_rQ <= place[:, None]).sum(axis=1), len(sorted_Q) - 1) for place in places]
        return np.where(total_r > 0, (sorted_Q[middle[0]] + sorted_Q[middle[1]]) / 2, np.nan)

    return statistic


def divided(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, NaN where the denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator != 0, numerator / denominator, np.nan)


def unit_name(value: Any) -> str | None:
    """What a unit is compared by, wherever it was stored: 1, 1.0 and "1" are one unit; None, NaN and "" are none.

    Raises `UserError` for a list or an object.
    """
    if isinstance(value, list | tuple | Mapping):
        found = "an object" if isinstance(value, Mapping) else "a list"
        raise UserError(f"unit field: found {found}, expected one value; name another field with --unit")
    if is_absent(value):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def numbered(units: Sequence[Any] | np.ndarray) -> np.ndarray:
    """A number per distinct unit, int64; every None gets one of its own. Raises `UserError` where one is a list or an
    object."""
    numbers: dict[Any, int] = {}
    try:
        found = [
            numbers.setdefault(place if unit is None else (unit,), len(numbers)) for place, unit in enumerate(units)
        ]
    except TypeError as error:
        raise UserError(f"units: {error}; expected a plain value, or None, for each row") from None
    return np.array(found, np.int64)


def unit_numbers(units: Sequence[Any] | np.ndarray | None, rows: int) -> np.ndarray:
    """int64 [rows]; without units each row is one."""
    return np.arange(rows) if units is None else numbered(units)


def without_nan(value: Any) -> Any:
    """The same tree with None for every number that is not finite, as JSON wants it."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def cell(estimate: Estimate, form: str = ".3f") -> str:
    """`.512 [.480, .544]`, or the value alone; a dash for what is not defined."""
    if estimate.value != estimate.value:
        return "–"
    if estimate.low is None or estimate.high is None:
        return format(estimate.value, form)
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in plain text: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return lines
