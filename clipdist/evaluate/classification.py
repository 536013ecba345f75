"""Scores of a classifier from its logits: top-k, balanced accuracy, AUROC, confusion; every one with an interval.

Suffixes of names: N rows, C classes, Q queries (the rows with a known label), r resamples at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipdist.errors import UserError
from clipdist.evaluate.cosines import TIE_TOLERANCE
from clipdist.evaluate.estimates import (
    Estimate,
    Measured,
    Statistic,
    aligned,
    cell,
    divided,
    estimates,
    mean_of,
    ratio_of,
    unit_numbers,
    without_nan,
)

# With more classes than this, each class's own recall and AUROC come without an interval.
_CLASSES_WITH_INTERVALS = 50
_ROWS_IN_TABLE = 20
_NAMED = 20


@dataclass(frozen=True)
class ClassificationScores:
    """`scores` holds top-1, top-5 (with more than five classes), balanced_accuracy and auroc, by name.

    `auroc` of two classes is that of the binary problem; of more, the macro mean of one-vs-rest over the classes that
    occur and are not all there is. `absent` classes have no row: they compete in every decision, but have neither
    recall nor AUROC and count in no mean. `majority` is the accuracy of always naming the most frequent class.
    """

    classes: tuple[str, ...]
    rows: int
    counts: tuple[int, ...]
    scores: dict[str, Estimate]
    recall: dict[str, Estimate]
    auroc: dict[str, Estimate]
    confusion_CC: np.ndarray = field(repr=False, compare=False)  # int64: rows of class i that were given class j
    units: int | None
    bootstrap: int
    measured: Measured = field(repr=False, compare=False)

    @property
    def absent(self) -> list[str]:
        return [name for name, count in zip(self.classes, self.counts, strict=True) if not count]

    @property
    def majority(self) -> float:
        return max(self.counts) / self.rows

    def to_dict(self) -> dict[str, Any]:
        per_class = {
            name: {"rows": count}
            | ({"recall": self.recall[name].to_dict()} if name in self.recall else {})
            | ({"auroc": self.auroc[name].to_dict()} if name in self.auroc else {})
            for name, count in zip(self.classes, self.counts, strict=True)
        }
        found = {
            "rows": self.rows,
            "classes": per_class,
            "absent": self.absent,
            "majority": self.majority,
            **{name: estimate.to_dict() for name, estimate in self.scores.items()},
            "confusion": {"classes": list(self.classes), "counts": self.confusion_CC.tolist()},
            "units": self.units,
            "bootstrap": self.bootstrap,
        }
        return without_nan(found)

    def table(self, title: str = "classification") -> str:
        """Plain text: all scores in one line, then each class."""
        rows = [
            [title, "rows", "classes", *(name.replace("_", " ") for name in self.scores), "majority class"],
            ["", f"{self.rows:,}", str(len(self.classes)), *map(cell, self.scores.values()), f"{self.majority:.3f}"],
        ]
        lines = aligned(rows)
        shown = [name for name in self.classes if name in self.recall]
        if len(shown) <= _ROWS_IN_TABLE:
            nothing = Estimate(float("nan"))
            counts = dict(zip(self.classes, self.counts, strict=True))
            each = [
                [f"  {name}", f"{counts[name]:,}", cell(self.recall[name]), cell(self.auroc.get(name, nothing))]
                for name in shown
            ]
            lines += aligned([["  class", "rows", "recall", "AUROC"], *each])
        if self.absent:
            more = f" and {len(self.absent) - _NAMED:,} more" if len(self.absent) > _NAMED else ""
            named = ", ".join(self.absent[:_NAMED]) + more
            lines.append(f"without a row, so without scores of their own: {named}")
        return "\n".join(lines)


def classification_scores(
    logits_NC: np.ndarray,
    label_N: np.ndarray | Sequence[int],
    classes: Sequence[str],
    *,
    tolerance: float = TIE_TOLERANCE,
    units: Sequence[Any] | np.ndarray | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> ClassificationScores:
    """Scores of `logits_NC` (float [N, C]; a class's probability is their softmax) against the true class of each row.

    `label_N`: int64, 0 ≤ label < C; a negative one leaves the row out. A row is right within the first k when fewer
    than k other classes score at least as high as the true one: ties, within `tolerance` of the logits, count against
    the model, so the row of the confusion matrix shows a tied rival. Balanced accuracy is the mean recall of the
    classes that occur. AUROC is the chance that a row of the class has a higher log-probability of it than one of
    another class, ties counting half (Hanley and McNeil 1982).

    Intervals resample units, as in `retrieval_scores`; a resample without some class takes its means over the others.
    Time: `bootstrap` passes over N x C numbers. Memory beyond the logits is O(N + C²).

    Raises `UserError` for logits that are not finite, labels out of range, or when no row has a label.
    """
    logits_NC, label_N = _checked(logits_NC, label_N, classes)
    asked_Q = np.flatnonzero(label_N >= 0)
    if not len(asked_Q):
        raise UserError(f"none of {len(label_N):,} rows has a label; expected some of 0 to {len(classes) - 1}")
    label_Q, C = label_N[asked_Q], len(classes)
    counts = np.bincount(label_Q, minlength=C)
    rank_Q, given_Q = ranks_and_decisions(logits_NC[asked_Q], label_Q, tolerance)
    statistics: dict[str, Statistic] = {"top-1": mean_of(rank_Q == 1)}
    if C > 5:
        statistics["top-5"] = mean_of(rank_Q <= 5)
    statistics["balanced_accuracy"] = balanced_accuracy_of(rank_Q == 1, label_Q)
    log_probability_QC = log_softmax(logits_NC[asked_Q])
    binary = C == 2
    per_class = {
        name: auroc_of(log_probability_QC[:, number], label_Q == number)
        for number, name in enumerate(classes)
        if 0 < counts[number] < len(label_Q) and not (binary and number == 0)
    }
    if per_class:
        statistics["auroc"] = mean_of_statistics(list(per_class.values()))
    unit_Q = unit_numbers(units, len(label_N))[asked_Q]
    how_often = bootstrap if C <= _CLASSES_WITH_INTERVALS else 0
    recalls = {
        name: ratio_of((rank_Q == 1) & (label_Q == number), label_Q == number)
        for number, name in enumerate(classes)
        if counts[number]
    }
    confusion_CC = np.zeros((C, C), np.int64)
    np.add.at(confusion_CC, (label_Q, given_Q), 1)
    return ClassificationScores(
        classes=tuple(classes),
        rows=len(label_Q),
        counts=tuple(counts.tolist()),
        scores=estimates(statistics, unit_Q, bootstrap=bootstrap, seed=seed),
        recall=estimates(recalls, unit_Q, bootstrap=how_often, seed=seed),
        auroc=estimates({} if binary else per_class, unit_Q, bootstrap=how_often, seed=seed),
        confusion_CC=confusion_CC,
        units=None if units is None else len(np.unique(unit_Q)),
        bootstrap=bootstrap,
        measured=Measured(statistics, asked_Q),
    )


def confused_classes(scores: ClassificationScores, most: int = 20) -> list[dict[str, Any]]:
    """The pairs of classes most of whose rows are mistaken, the most first: the class, what it was taken for, how many
    of its rows were, and how many it has. Of equally many, the classes' order decides."""
    wrong_CC = np.array(scores.confusion_CC)
    np.fill_diagonal(wrong_CC, 0)
    order = np.argsort(-wrong_CC, axis=None, kind="stable")[:most]
    names = scores.classes
    return [
        {
            "class": names[i],
            "taken_for": names[j],
            "rows": int(wrong_CC[i, j]),
            "of": scores.counts[i],
        }
        for i, j in zip(*(place.tolist() for place in np.unravel_index(order, wrong_CC.shape)), strict=True)
        if wrong_CC[i, j]
    ]


def ranks_and_decisions(
    logits_QC: np.ndarray, label_Q: np.ndarray, tolerance: float = TIE_TOLERANCE
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [Q]: the rank of the true class, and the class that is decided on: the true one only when nothing ties."""
    rows = np.arange(len(label_Q))
    true_Q = logits_QC[rows, label_Q]
    reached_QC = logits_QC >= (true_Q - tolerance)[:, None]
    rank_Q = reached_QC.sum(axis=1)  # the true class itself is one of them
    rivals_QC = np.array(logits_QC, copy=True)
    rivals_QC[rows, label_Q] = -np.inf
    return rank_Q, np.where(rank_Q == 1, label_Q, rivals_QC.argmax(axis=1))


def log_softmax(logits_NC: np.ndarray) -> np.ndarray:
    """float64 [N, C]; distinct for the highest logit of a row too, however near to 0 it comes."""
    logits = logits_NC.astype(np.float64)
    rows, highest = np.arange(len(logits)), logits.argmax(axis=1)
    logits -= logits[rows, highest][:, None]
    others = np.exp(logits)
    # 1 + the others would swallow those below 1e-16, and AUROC would take sure rows for ties.
    others[rows, highest] = 0
    return logits - np.log1p(others.sum(axis=1, keepdims=True))


def auroc_of(score_Q: np.ndarray, positive_Q: np.ndarray) -> Statistic:
    """The area under the ROC curve of a score; undefined without positives or without negatives."""
    order = np.argsort(score_Q, kind="stable")
    sorted_Q, right = np.asarray(score_Q)[order], np.flatnonzero(np.asarray(positive_Q)[order])
    # Where each positive's ties begin and end, among all and among the positives alone.
    bounds_2P = [np.searchsorted(sorted_Q, sorted_Q[right], side=side) for side in ("left", "right")]
    among_2P = [np.searchsorted(sorted_Q[right], sorted_Q[right], side=side) for side in ("left", "right")]

    def statistic(times_rQ: np.ndarray) -> np.ndarray:
        times_rQ = times_rQ[:, order]
        positive_rP = times_rQ[:, right]
        everything, positives = _cumulated(times_rQ), _cumulated(positive_rP)
        below_rP = sum(everything[:, b] for b in bounds_2P) - sum(positives[:, b] for b in among_2P)
        P_r = positives[:, -1]
        return divided((positive_rP * below_rP).sum(axis=1) / 2, P_r * (everything[:, -1] - P_r))

    return statistic


def _cumulated(times_rQ: np.ndarray) -> np.ndarray:
    """[r, Q + 1]: the sum of all entries before each place."""
    found = np.zeros((len(times_rQ), times_rQ.shape[1] + 1))
    np.cumsum(times_rQ, axis=1, out=found[:, 1:])
    return found


def balanced_accuracy_of(correct_Q: np.ndarray, label_Q: np.ndarray) -> Statistic:
    """The mean, over the classes that a resample holds, of the share of their rows that are right."""
    order = np.argsort(label_Q, kind="stable")
    sorted_Q = np.asarray(label_Q)[order]
    starts = np.flatnonzero(np.concatenate([[True], sorted_Q[1:] != sorted_Q[:-1]]))
    correct_Q = np.asarray(correct_Q, np.float64)[order]

    def statistic(times_rQ: np.ndarray) -> np.ndarray:
        times_rQ = times_rQ[:, order]
        held_rC = np.add.reduceat(times_rQ, starts, axis=1)
        return _defined_mean(divided(np.add.reduceat(times_rQ * correct_Q, starts, axis=1), held_rC))

    return statistic


def mean_of_statistics(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of those that a resample defines."""
    return lambda times_rQ: _defined_mean(np.stack([one(times_rQ) for one in statistics], axis=1))


def _defined_mean(values_rC: np.ndarray) -> np.ndarray:
    defined = np.isfinite(values_rC)
    return divided(np.where(defined, values_rC, 0).sum(axis=1), defined.sum(axis=1))


def _checked(
    logits_NC: np.ndarray, label_N: np.ndarray | Sequence[int], classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    logits_NC, label_N = np.asarray(logits_NC), np.asarray(label_N)
    C = len(classes)
    if logits_NC.ndim != 2 or logits_NC.shape[1] != C or len(logits_NC) != len(label_N) or C < 2:
        raise UserError(
            f"logits of shape {logits_NC.shape} for {len(label_N):,} labels and {C} classes; expected (labels, "
            "classes), and two classes or more"
        )
    if len(set(classes)) < C:
        raise UserError(f"{C} classes, of which {C - len(set(classes))} have a name twice; expected distinct names")
    if not np.isfinite(logits_NC).all():
        raise UserError("logits hold NaN or infinity: the weights have diverged, or were read in too low a precision")
    if label_N.dtype.kind not in "iu" or label_N.max() >= C:
        raise UserError(f"labels of type {label_N.dtype} up to {label_N.max()}; expected integers below {C}")
    return logits_NC, label_N.astype(np.int64)
