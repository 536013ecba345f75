"""What a simple classifier makes of image features: linear probes and k nearest neighbours, at shares of the labels.

Suffixes of names: N training rows, M evaluated rows, C classes or labels, F feature width.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from clipdist.errors import UserError
from clipdist.evaluate.classification import (
    ClassificationScores,
    auroc_of,
    classification_scores,
    log_softmax,
    mean_of_statistics,
)
from clipdist.evaluate.estimates import (
    Estimate,
    Measured,
    Statistic,
    aligned,
    cell,
    estimates,
    unit_numbers,
    without_nan,
)
from clipdist.prepare.splits import split_by

logger = logging.getLogger(__name__)

FRACTIONS = (0.01, 0.1, 1.0)
STRENGTHS = tuple(10.0**power for power in range(-5, 3))
"""scikit-learn's C, the inverse of the penalty, among which held-out training rows choose."""
NEIGHBOURS, KERNEL = 20, 0.07
HELD_OUT = 0.2


@dataclass(frozen=True)
class ProbeScores:
    """One probe at one share of the labels. `score` is AUROC for two classes and for several labels (macro mean), else
    accuracy; `C` is the regularisation that was chosen, None where no row could be held out to choose it, or for
    neighbours. `single` has all scores of a problem with one label per row, `labels` each label's AUROC of one with
    several."""

    kind: str  # linear, knn
    fraction: float
    rows: int
    classes_seen: int
    score: Estimate
    C: float | tuple[float | None, ...] | None
    single: ClassificationScores | None = None
    labels: dict[str, Estimate] = field(default_factory=dict)
    measured: Measured | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "kind": self.kind,
            "fraction": self.fraction,
            "rows": self.rows,
            "classes_seen": self.classes_seen,
            "score": self.score.to_dict(),
        }
        if self.kind == "linear":
            found["C"] = self.C
        if self.single is not None:
            found["scores"] = {name: one.to_dict() for name, one in self.single.scores.items()}
        if self.labels:
            found["labels"] = {name: one.to_dict() for name, one in self.labels.items()}
        return without_nan(found)


def probe_scores(
    train_features_NF: np.ndarray,
    train_labels: np.ndarray | Sequence[int],
    features_MF: np.ndarray,
    labels: np.ndarray | Sequence[int],
    classes: Sequence[str],
    *,
    fractions: Sequence[float] = FRACTIONS,
    train_units: Sequence[Any] | np.ndarray | None = None,
    units: Sequence[Any] | np.ndarray | None = None,
    neighbours: int = NEIGHBOURS,
    bootstrap: int = 1000,
    seed: int = 0,
) -> list[ProbeScores]:
    """A logistic regression and a vote of the nearest neighbours, fitted on shares of the training rows and scored on
    the other ones; first all linear ones, then the others.

    `labels`: int64 [rows], each row's class, negative for none; or float [rows, C] of 0, 1 and NaN (not known) for
    labels that do not exclude each other, each of which then gets a classifier of its own. Each share is drawn from
    `seed`, a class at a time and at least one row of each, so that smaller shares lie within larger ones (with several
    labels per row: from all rows).

    The linear probe is scikit-learn's L2-regularised multinomial logistic regression on features standardised by the
    training rows. Its C is the one of `STRENGTHS` with the best score (AUROC or accuracy) on a fifth of the share's own
    training rows, held out by whole units; then all of the share is fitted with it. No evaluated row takes part in any
    choice. A share too small to hold rows out takes C = 0.01. The neighbours' votes are weighted by exp(cosine / 0.07)
    (Wu et al. 2018, arXiv 1805.01978, with k = 200 there and, as is usual for small sets, 20 here).

    Time: 9 fits per share and label. Raises `UserError` when fewer than two classes have training rows.
    """
    train_y, y = np.asarray(train_labels), np.asarray(labels)
    problem: _Problem = (_Labels if train_y.ndim == 2 else _Classes)(classes, y, units, bootstrap, seed)
    problem.check(train_features_NF, train_y, features_MF)
    # Small shares of many classes are what is asked for; that there are few rows of each is no news.
    warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%", module="sklearn")
    train_unit_N = unit_numbers(train_units, len(train_y))
    found = []
    for kind in ("linear", "knn"):
        for fraction in sorted(set(fractions)):
            rows = problem.share(train_y, fraction)
            X, share_y = np.asarray(train_features_NF)[rows], train_y[rows]
            if kind == "linear":
                fit = partial(_linear, X=X, unit=train_unit_N[rows], features_MF=features_MF, seed=seed)
            else:
                fit = partial(_nearest, X=X, features_MF=features_MF, neighbours=neighbours)
            logits, C = problem.each(share_y, fit)
            found.append(problem.scored(kind, fraction, share_y, logits, C))
    return found


def label_matrix(fields: Sequence[Mapping[str, Any]], names: Sequence[str]) -> np.ndarray:
    """float64 [rows, C]: 1 where a sample's field is 1 or true, 0 where it is 0 or false, NaN for anything else.

    So CheXpert's -1 (uncertain) and its empty cells are not known. Raises `UserError` for a field without any 0 or 1.
    """
    meaning = {"1": 1.0, "1.0": 1.0, "True": 1.0, "true": 1.0, "0": 0.0, "0.0": 0.0, "False": 0.0, "false": 0.0}
    found = np.array([[meaning.get(str(one.get(name)), np.nan) for name in names] for one in fields])
    for number, name in enumerate(names):
        if np.isnan(found[:, number]).all():
            known = sorted({key for one in fields for key in one})
            raise UserError(f"field {name!r}: no sample has 0 or 1 there; the fields are: {', '.join(known) or '-'}")
    return found


def probe_table(scores: Sequence[ProbeScores], metric: str) -> str:
    """Plain text, a line per probe and share of the labels."""
    rows = [["probe", "of labels", "training rows", metric]]
    names = {"linear": "linear", "knn": "k-NN"}
    for one in scores:
        rows.append([names[one.kind], f"{one.fraction:.3g}", f"{one.rows:,}", cell(one.score)])
    return "\n".join(aligned(rows))


class _Problem:
    """What differs between one class per row and several labels per row."""

    metric = ""

    def __init__(self, classes: Sequence[str], y: np.ndarray, units: Any, bootstrap: int, seed: int) -> None:
        self.classes, self.y, self.units, self.bootstrap, self.seed = list(classes), y, units, bootstrap, seed

    def check(self, train: np.ndarray, train_y: np.ndarray, features: np.ndarray) -> None:
        for what, X, y in (("training", train, train_y), ("evaluated", features, self.y)):
            if np.ndim(X) != 2 or len(X) != len(y) or y.ndim != train_y.ndim or np.shape(X)[1] != np.shape(train)[1]:
                raise UserError(
                    f"{what} features of shape {np.shape(X)} for labels of shape {y.shape}; expected one row each, and "
                    f"the width {np.shape(train)[1]} and labels as in training"
                )

    def share(self, train_y: np.ndarray, fraction: float) -> np.ndarray:
        raise NotImplementedError

    def each(self, train_y: np.ndarray, fit: Callable[[np.ndarray], Any]) -> tuple[np.ndarray, Any]:
        raise NotImplementedError

    def scored(self, kind: str, fraction: float, train_y: np.ndarray, logits: np.ndarray, C: Any) -> ProbeScores:
        raise NotImplementedError


class _Classes(_Problem):
    def share(self, train_y: np.ndarray, fraction: float) -> np.ndarray:
        """Rows of the share, drawn class by class."""
        rng = np.random.default_rng(self.seed)
        chosen = []
        for number in np.unique(train_y[train_y >= 0]):
            rows = rng.permutation(np.flatnonzero(train_y == number))
            chosen.append(rows[: max(1, round(fraction * len(rows)))])
        if len(chosen) < 2:
            raise UserError(f"training rows hold {len(chosen)} of the classes {', '.join(self.classes)}; expected two")
        return np.sort(np.concatenate(chosen))

    def each(self, train_y: np.ndarray, fit: Callable[[np.ndarray], Any]) -> tuple[np.ndarray, Any]:
        logits, C = fit(train_y)
        seen = np.unique(train_y)
        # A class that was never seen is never given: below every other one.
        all_MC = np.full((len(logits), len(self.classes)), logits.min() - 30.0)
        all_MC[:, seen] = logits
        return all_MC, C

    def scored(self, kind: str, fraction: float, train_y: np.ndarray, logits: np.ndarray, C: Any) -> ProbeScores:
        options: dict[str, Any] = {"units": self.units, "bootstrap": self.bootstrap, "seed": self.seed}
        single = classification_scores(logits, self.y, self.classes, **options)
        binary = len(self.classes) == 2 and "auroc" in single.scores
        score = single.scores["auroc" if binary else "top-1"]
        seen = len(np.unique(train_y))
        return ProbeScores(kind, fraction, len(train_y), seen, score, C, single, measured=single.measured)


class _Labels(_Problem):
    def share(self, train_y: np.ndarray, fraction: float) -> np.ndarray:
        rows = np.random.default_rng(self.seed).permutation(len(train_y))
        return np.sort(rows[: max(2, round(fraction * len(rows)))])

    def each(self, train_y: np.ndarray, fit: Callable[[np.ndarray], Any]) -> tuple[np.ndarray, Any]:
        """[M, C] log-odds; NaN for a label of which the share holds one side alone."""
        logits_MC, strengths = np.full((len(self.y), len(self.classes)), np.nan), []
        for number in range(len(self.classes)):
            column = train_y[:, number]
            known = np.where(np.isnan(column), -1, column).astype(np.int64)
            C = None
            if {0, 1} <= set(known.tolist()):
                logits, C = fit(known)
                logits_MC[:, number] = logits[:, 1] - logits[:, 0]
            strengths.append(C)
        return logits_MC, tuple(strengths)

    def scored(self, kind: str, fraction: float, train_y: np.ndarray, logits: np.ndarray, C: Any) -> ProbeScores:
        statistics: dict[str, Statistic] = {}
        for number, name in enumerate(self.classes):
            known = ~np.isnan(self.y[:, number])
            if known.any() and not np.isnan(logits[0, number]) and len(np.unique(self.y[known, number])) == 2:
                statistics[name] = _among(auroc_of(logits[known, number], self.y[known, number] == 1), known)
        if not statistics:
            raise UserError(
                f"at {fraction:.3g} of the labels none of {', '.join(self.classes)} has both positive and negative "
                "rows, in training and among those evaluated; expected one at least: take a larger share"
            )
        statistics["macro"] = mean_of_statistics(list(statistics.values()))
        unit_M = unit_numbers(self.units, len(self.y))
        found = estimates(statistics, unit_M, bootstrap=self.bootstrap, seed=self.seed)
        macro = found.pop("macro")
        measured = Measured({"AUROC": statistics["macro"]}, np.arange(len(self.y)))
        return ProbeScores(kind, fraction, len(train_y), len(found), macro, C, labels=found, measured=measured)


def _among(statistic: Statistic, rows: np.ndarray) -> Statistic:
    return lambda times_rQ: statistic(times_rQ[:, rows])


def _linear(
    y: np.ndarray, *, X: np.ndarray, unit: np.ndarray, features_MF: np.ndarray, seed: int
) -> tuple[np.ndarray, float | None]:
    """(logits [M, classes seen] of a regression fitted on all rows with y ≥ 0, the C that was chosen)."""
    X, unit, y = X[y >= 0], unit[y >= 0], y[y >= 0]
    best, chosen = -np.inf, None
    fit, held = _hold_out(y, unit, seed)
    if len(held):
        for C in STRENGTHS:
            score = _score(_regression(X[fit], y[fit], C), X[held], y[held])
            if score > best + 1e-9:  # of equal ones the most regularised
                best, chosen = score, C
    model = _regression(X, y, 0.01 if chosen is None else chosen)
    if model[-1].n_iter_.max() >= model[-1].max_iter:
        logger.warning("a linear probe on %s rows did not converge in %d iterations", f"{len(y):,}", model[-1].max_iter)
    # Not log-probabilities: scikit-learn's are -inf, or tie at 0, for rows far from all that was fitted.
    logits = model.decision_function(features_MF)
    return np.stack([np.zeros(len(logits)), logits], axis=1) if logits.ndim == 1 else logits, chosen


def _regression(X: np.ndarray, y: np.ndarray, C: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
    with warnings.catch_warnings():  # of strengths that are tried; the one that is taken is looked at
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(X.astype(np.float64), y)


def _score(model: Any, X: np.ndarray, y: np.ndarray) -> float:
    """AUROC of two classes, accuracy of more."""
    if len(model.classes_) == 2:
        once = np.ones((1, len(y)))
        return float(auroc_of(model.decision_function(X), y == model.classes_[1])(once)[0])
    return float((model.predict(X) == y).mean())


def _hold_out(y: np.ndarray, unit: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows to choose by: a fifth, whole units, every class on both sides; none where that cannot be."""
    none = np.arange(0)
    if len(np.unique(unit)) < 5:
        return none, none
    names = split_by(y, unit, {"fit": 1 - HELD_OUT, "held": HELD_OUT}, seed)
    fit, held = np.flatnonzero(names == "fit"), np.flatnonzero(names == "held")
    classes = set(np.unique(y))
    binary_needs_both = len(classes) > 2 or set(np.unique(y[held])) == classes
    return (fit, held) if set(np.unique(y[fit])) == classes and binary_needs_both and len(held) else (none, none)


def _nearest(
    y: np.ndarray, *, X: np.ndarray, features_MF: np.ndarray, neighbours: int
) -> tuple[np.ndarray, float | None]:
    """(logarithms of the votes' shares, [M, classes seen], of the rows with y ≥ 0; None)."""
    from sklearn.neighbors import KNeighborsClassifier

    X, y = _unit(X[y >= 0]), y[y >= 0]
    # Of unit vectors at distance d the cosine is 1 − d²/2; the factor exp(1/0.07) is the same for all.
    model = KNeighborsClassifier(
        min(neighbours, len(y)), weights=lambda d: np.exp(-(d**2) / 2 / KERNEL), algorithm="brute"
    ).fit(X, y)
    return log_softmax(np.log(model.predict_proba(_unit(np.asarray(features_MF))) + 1e-9)), None


def _unit(X: np.ndarray) -> np.ndarray:
    return X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)
