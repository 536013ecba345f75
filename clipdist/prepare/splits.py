"""Dividing samples into train, val, test: units stay whole, labels stay in proportion, rare labels break nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedShuffleSplit

from clipdist.errors import UserError

# Among this many stratified draws of a split the one nearest to its target is taken: units differ in size, and a draw
# counts units. With many units every draw is close, and one costs a pass over them.
DRAWS = 64
DRAWS_FOR_MANY_UNITS = 4
MANY_UNITS = 100_000


def split_by(
    labels: Sequence[Any] | np.ndarray | None,
    units: Sequence[Any] | np.ndarray | None,
    fractions: Mapping[str, float],
    seed: int,
    *,
    count: int | None = None,
) -> np.ndarray:
    """The name of the split of each sample, an array of strings; a function of its arguments alone.

    All samples of a unit (a patient, a slide) get the same split; `units=None` makes each sample its own unit.
    Labels are kept in proportion, a unit counting under its most frequent one; a label that a single unit holds goes
    to the largest split, where it can be learned from, as long as such units fill no more than half of it.
    Fractions are of samples; what large units make impossible is approached as nearly as 64 draws allow.

    The splits other than the largest are drawn one after another by scikit-learn's `StratifiedShuffleSplit` over
    units. By itself it counts units where samples are asked for and refuses labels with a single member, hence the
    draws and the pooled labels here; `StratifiedGroupKFold` knows equal folds only, `GroupShuffleSplit` no labels.

    `count` is the number of samples, needed only when labels and units are both None. Raises `UserError` for
    fractions that do not sum to one and for fewer units than splits.
    """
    fractions = check_fractions(fractions)
    total = _count(labels, units, count)
    unit_of = np.arange(total) if units is None else _codes(units)
    label_of = np.zeros(total, dtype=np.int64) if labels is None else _codes(labels)
    sizes = np.bincount(unit_of)
    if len(sizes) < len(fractions):
        raise UserError(
            f"split: found {len(sizes)} {'samples' if units is None else 'units'}, expected at least one for each of "
            f"the {len(fractions)} splits {', '.join(fractions)}; ask for fewer splits"
        )
    names = list(fractions)
    largest = max(range(len(names)), key=lambda number: fractions[names[number]])  # of equal ones the first named
    drawn = sorted(set(range(len(names))) - {largest}, key=lambda number: fractions[names[number]])

    holdings = _Holdings.of(unit_of, label_of)
    split_of_unit = np.full(len(sizes), -1)
    kept = _kept_back(holdings.units_with_a_lone_label(), sizes, fractions[names[largest]] * total, len(drawn), seed)
    split_of_unit[kept] = largest
    for position, number in enumerate(drawn):
        pool = np.flatnonzero(split_of_unit < 0)
        target = fractions[names[number]] * total
        # Units to be left: one for each split to come, and one for the largest unless it has some. Those larger than
        # this whole split are left in any case.
        reserve = len(drawn) - position - 1 + (len(kept) == 0)
        fitting = sizes[pool] <= max(target, sizes[pool].min())
        reserve, pool = max(0, reserve - int((~fitting).sum())), pool[fitting]
        split_of_unit[pool[_draw(holdings.main_label[pool], sizes[pool], target, reserve, [seed, position])]] = number
    split_of_unit[split_of_unit < 0] = largest
    return np.array(names)[split_of_unit][unit_of]


def check_fractions(fractions: Mapping[str, float]) -> dict[str, float]:
    """The fractions as a dict; `UserError` unless they are positive, at least one, and sum to one."""
    if not fractions or any(not 0 < value <= 1 for value in fractions.values()):
        raise UserError(f"split fractions: found {_shown(fractions)}, expected numbers above 0 and at most 1")
    if abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(
            f"split fractions: {_shown(fractions)} sum to {sum(fractions.values()):.6g}, expected 1; change one of them"
        )
    return dict(fractions)


def straddling_units(units: Sequence[Any], splits: Sequence[str]) -> list[Any]:
    """The units that lie in more than one split, in order of first appearance."""
    first: dict[Any, str] = {}
    straddling: dict[Any, None] = {}
    for unit, split in zip(units, splits, strict=True):
        if first.setdefault(unit, split) != split:
            straddling[unit] = None
    return list(straddling)


def every_label_in(
    splits: np.ndarray, labels: Sequence[Any], units: Sequence[Any], name: str
) -> tuple[np.ndarray, list[Any]]:
    """(splits, in which each label lies in the split `name` at least once; the labels that had to be moved there).

    A label without samples in `name` gives it the smallest of its units, the first of several such; none that is there
    leaves it. Arrays and sequences have a value for each sample; `splits` as `split_by` gives them.
    """
    splits = splits.astype(np.result_type(splits, np.array(name)))  # wide enough for the name
    label_of, unit_of = _codes(labels), _codes(units)
    sizes = np.bincount(unit_of)
    present = np.zeros(int(label_of.max(initial=-1)) + 1, bool)
    present[label_of[splits == name]] = True
    moved = []
    for label in np.flatnonzero(~present):
        if present[label]:  # came along with another label's unit
            continue
        rows = np.flatnonzero(label_of == label)
        smallest = unit_of[rows[np.argmin(sizes[unit_of[rows]])]]
        splits[unit_of == smallest] = name
        present[label_of[unit_of == smallest]] = True
        moved.append(labels[int(rows[0])])
    return splits, moved


def _shown(fractions: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in fractions.items()) or "none"


def _count(labels: Any, units: Any, count: int | None) -> int:
    lengths = {len(values) for values in (labels, units) if values is not None}
    if count is not None:
        lengths.add(count)
    if len(lengths) != 1:
        raise ValueError(f"labels, units and count must agree and at least one be given; found lengths {lengths}")
    return lengths.pop()


def _codes(values: Any) -> np.ndarray:
    """Integers 0..k-1, numbered by first appearance, so that equal input in equal order gives equal splits."""
    seen: dict[Any, int] = {}
    items = values.tolist() if isinstance(values, np.ndarray) else values
    return np.fromiter((seen.setdefault(value, len(seen)) for value in items), dtype=np.int64, count=len(items))


@dataclass(frozen=True)
class _Holdings:
    """Which labels each unit holds: `unit` and `label`, one entry for each pair that occurs, sorted; main labels."""

    unit: np.ndarray
    label: np.ndarray
    main_label: np.ndarray  # one per unit

    @staticmethod
    def of(unit_of: np.ndarray, label_of: np.ndarray) -> "_Holdings":
        width = int(label_of.max()) + 1
        joint, counts = np.unique(unit_of * width + label_of, return_counts=True)
        unit, label = joint // width, joint % width
        order = np.lexsort((-label, counts))  # the last assignment below wins: highest count, then lowest label
        main = np.zeros(int(unit_of.max()) + 1, dtype=np.int64)
        main[unit[order]] = label[order]
        return _Holdings(unit, label, main)

    def units_with_a_lone_label(self) -> np.ndarray:
        """Units with a label that no other unit holds; none when there is one label only."""
        holders = np.bincount(self.label)
        if len(holders) == 1:
            return np.zeros(0, dtype=np.int64)
        return np.unique(self.unit[holders[self.label] == 1])


def _kept_back(lone: np.ndarray, sizes: np.ndarray, target: float, others: int, seed: int) -> np.ndarray:
    """Those of the units `lone` that go to the largest split: in seeded order, up to half of its target in samples."""
    lone = np.random.default_rng([seed, others]).permutation(lone)[: len(sizes) - others]
    return lone[np.cumsum(sizes[lone]) <= target / 2]


def _draw(labels: np.ndarray, sizes: np.ndarray, target: float, reserve: int, seed: list[int]) -> np.ndarray:
    """Positions of the units drawn: about `target` samples, labels in proportion, at least `reserve` units left."""
    wanted = int(np.clip(round(len(sizes) * target / sizes.sum()), 1, len(sizes) - reserve))
    if wanted >= len(sizes):
        return np.arange(len(sizes))
    strata = _pooled(labels, min(wanted, len(sizes) - wanted))
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    draws = DRAWS if len(sizes) <= MANY_UNITS else DRAWS_FOR_MANY_UNITS
    splitter = StratifiedShuffleSplit(draws, test_size=wanted, random_state=state)
    shares = np.bincount(labels, weights=sizes) / sizes.sum()
    best, best_cost = np.zeros(0, dtype=np.int64), np.inf
    for _, drawn in splitter.split(np.zeros(len(sizes)), strata):
        obtained = np.bincount(labels[drawn], weights=sizes[drawn], minlength=len(shares))
        # Relative error of the size, and half the sum of differences of label shares (total variation).
        cost = abs(obtained.sum() / target - 1) + np.abs(obtained / obtained.sum() - shares).sum() / 2
        if cost < best_cost - 1e-12:
            best, best_cost = drawn, cost
    return np.sort(best)


def _pooled(labels: np.ndarray, most: int) -> np.ndarray:
    """Labels with the rare ones pooled into one, as the splitter demands: two members each, at most `most` of them."""
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    frequent = [code for code in np.argsort(-counts, kind="stable") if counts[code] >= 2]
    if len(frequent) == len(counts) <= most:
        return codes
    kept = frequent[: max(0, most - 1)]
    strata = np.where(np.isin(codes, kept), codes, -1)
    if (strata == -1).sum() == 1 and kept:
        strata[strata == -1] = kept[-1]
    return strata
