"""Is a probability of 0.8 right in eight of ten cases: temperature scaling, calibration error, reliability.

Suffixes of names: N rows, C classes, Q rows with a known label, M bins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipdist.errors import UserError
from clipdist.evaluate.classification import log_softmax, ranks_and_decisions
from clipdist.evaluate.cosines import TIE_TOLERANCE
from clipdist.evaluate.estimates import (
    Estimate,
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

BINS = 15
BOUNDS = 1e-3, 1e3
AT_BOUND = (
    "the temperature fitted stands at its bound: on the split it was fitted on the model is always right, or its "
    "probabilities say nothing"
)


def ends_at_bound(temperature: float) -> bool:
    """Whether what `fit_temperature` gave is one of its bounds, where the likelihood has no maximum between them."""
    return not BOUNDS[0] < temperature < BOUNDS[1]


def at_bound(divided_by: float) -> str:
    """What to say of a fit that ended at a bound, where logits are divided by so much all the same."""
    return AT_BOUND + ("; so none is applied" if divided_by == 1 else "")


@dataclass(frozen=True)
class Bin:
    """Rows whose confidence lies in (low, high]: how many, their mean confidence, and the share that is right."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: Estimate


@dataclass(frozen=True)
class CalibrationScores:
    """Expected calibration error, negative log-likelihood (nats) and Brier score of the probabilities; `bins` without
    rows are left out."""

    ece: Estimate
    nll: Estimate
    brier: Estimate
    rows: int
    bins: tuple[Bin, ...]

    def to_dict(self) -> dict[str, Any]:
        found = {
            **{name: getattr(self, name).to_dict() for name in ("ece", "nll", "brier")},
            "rows": self.rows,
            "bins": [
                {
                    "low": b.low,
                    "high": b.high,
                    "rows": b.rows,
                    "confidence": b.confidence,
                    "accuracy": b.accuracy.to_dict(),
                }
                for b in self.bins
            ],
        }
        return without_nan(found)


def fit_temperature(logits_NC: np.ndarray, label_N: np.ndarray | Sequence[int]) -> float:
    """T > 0 such that softmax(logits / T) has the least negative log-likelihood of the labels (Guo et al. 2017, "On
    calibration of modern neural networks", section 4.2). Rows with a negative label are left out.

    Fit it on other rows than those whose calibration is then measured. The likelihood is convex in 1/T; where it has no
    minimum between T = 0.001 and T = 1000 (every row right, or the logits worse than none), the nearer end is given.
    Raises `UserError` when no row has a label.
    """
    label_N = np.asarray(label_N)
    logits = np.asarray(logits_NC, np.float64)[label_N >= 0]
    label = label_N[label_N >= 0]
    if not len(label):
        raise UserError(f"none of {len(label_N):,} rows has a label, so no temperature can be fitted; expected some")
    true = logits[np.arange(len(label)), label]

    def slope(inverse: float) -> float:
        """The derivative of the negative log-likelihood by 1/T."""
        return float(((np.exp(log_softmax(inverse * logits)) * logits).sum(axis=1) - true).mean())

    lowest, highest = BOUNDS
    if slope(1 / highest) >= 0:
        return highest
    if slope(1 / lowest) <= 0:
        return lowest
    low, high = -math.log(highest), -math.log(lowest)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def calibration_scores(
    logits_NC: np.ndarray,
    label_N: np.ndarray | Sequence[int],
    *,
    tolerance: float = TIE_TOLERANCE,
    units: Sequence[Any] | np.ndarray | None = None,
    bins: int = BINS,
    bootstrap: int = 1000,
    seed: int = 0,
) -> CalibrationScores:
    """How far the confidence of decisions is from their accuracy; a class's probability is the softmax of the logits.

        ECE = Σ_m |B_m| / Q · |acc(B_m) − conf(B_m)|

    over `bins` bins of equal width of the confidence, the probability of the class decided on (Guo et al. 2017,
    equation 3, after Naeini et al. 2015); with two classes it lies above ½. ECE is never negative and so too high on
    average, most in small sets, and higher still in resamples: its interval leans upwards and may lie above the value.
    Brier score: Σ_c (p_c − [c is true])², mean over rows (Brier 1950), between 0 and 2.

    Intervals resample units. Rows with a negative label are left out. Decisions that tie within `tolerance` are wrong.
    """
    label_N = np.asarray(label_N)
    asked_Q = np.flatnonzero(label_N >= 0)
    if not len(asked_Q):
        raise UserError(f"none of {len(label_N):,} rows has a label; expected some")
    label_Q, logits_QC = label_N[asked_Q], np.asarray(logits_NC)[asked_Q]
    log_p = log_softmax(logits_QC)
    rank_Q, given_Q = ranks_and_decisions(logits_QC, label_Q, tolerance)
    rows = np.arange(len(label_Q))
    confidence_Q, right_Q = np.exp(log_p[rows, given_Q]), rank_Q == 1
    bin_Q = np.clip(np.ceil(confidence_Q * bins).astype(int) - 1, 0, bins - 1)
    p_QC = np.exp(log_p)
    p_QC[rows, label_Q] -= 1
    statistics: dict[str, Statistic] = {
        "ece": _ece_of(confidence_Q, right_Q, bin_Q, bins),
        "nll": mean_of(-log_p[rows, label_Q]),
        "brier": mean_of((p_QC**2).sum(axis=1)),
    }
    held = [m for m in range(bins) if (bin_Q == m).any()]
    statistics |= {str(m): ratio_of(right_Q & (bin_Q == m), bin_Q == m) for m in held}
    unit_Q = unit_numbers(units, len(label_N))[asked_Q]
    found = estimates(statistics, unit_Q, bootstrap=bootstrap, seed=seed)
    shown = tuple(
        Bin(m / bins, (m + 1) / bins, int((bin_Q == m).sum()), float(confidence_Q[bin_Q == m].mean()), found[str(m)])
        for m in held
    )
    return CalibrationScores(found["ece"], found["nll"], found["brier"], len(label_Q), shown)


def calibrated(
    logits_NC: np.ndarray,
    label_N: np.ndarray | Sequence[int],
    T: float,
    *,
    fitted_on: str | None,
    at_bound: bool,
    tolerance: float = TIE_TOLERANCE,
    **resampled: Any,
) -> tuple[dict[str, Any], str]:
    """(as JSON, as a table) the probabilities as they are, and of logits divided by `T`, which was fitted on the split
    `fitted_on` (None: on none); `at_bound` says that nothing could be fitted there. `resampled`: as for
    `calibration_scores`."""
    before = calibration_scores(logits_NC, label_N, tolerance=tolerance, **resampled)
    after = calibration_scores(logits_NC / T, label_N, tolerance=tolerance / T, **resampled)
    body = {
        "fitted_on": fitted_on,
        "divided_by": T,
        "at_bound": at_bound,
        "as_trained": before.to_dict(),
        "scaled": after.to_dict(),
    }
    return body, calibration_table(before, after, T, at_bound)


def calibration_table(
    before: CalibrationScores, after: CalibrationScores | None, temperature: float | None, bound: bool = False
) -> str:
    """Plain text: the probabilities as they are, and after temperature scaling."""
    rows = [["calibration", "rows", "ECE", "NLL", "Brier"]]
    for name, one in (("as trained", before), (f"divided by T = {temperature or 1:.3g}", after)):
        if one is not None:
            rows.append([f"  {name}", f"{one.rows:,}", *(cell(score) for score in (one.ece, one.nll, one.brier))])
    told = bound or (temperature is not None and ends_at_bound(temperature))
    return "\n".join([*aligned(rows), *([at_bound(temperature or 1)] if told else [])])


def _ece_of(confidence_Q: np.ndarray, right_Q: np.ndarray, bin_Q: np.ndarray, bins: int) -> Statistic:
    gap_QM = np.zeros((len(bin_Q), bins))
    gap_QM[np.arange(len(bin_Q)), bin_Q] = right_Q - confidence_Q

    def statistic(times_rQ: np.ndarray) -> np.ndarray:
        return divided(np.abs(times_rQ @ gap_QM).sum(axis=1), times_rQ.sum(axis=1))

    return statistic
