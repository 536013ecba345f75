"""Temperature scaling and calibration error against plain loops and an optimiser of scipy's."""

import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import brier_score_loss, log_loss

from clipdist.errors import UserError
from clipdist.evaluate.calibration import calibration_scores, calibration_table, fit_temperature


def drawn(N=4000, C=4, seed=0, sharper=1.0):
    """Logits whose probabilities are right, times `sharper`."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(N, C))
    label = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((N, 1))).sum(axis=1)
    return sharper * logits, np.minimum(label, C - 1)


def test_agrees_with_loops_and_scikit_learn():
    logits, label = drawn(500, sharper=2.5)
    found = calibration_scores(logits, label, bootstrap=50)
    p = softmax(logits, axis=1)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == label
    ece = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.ece.value == pytest.approx(ece)
    assert found.nll.value == pytest.approx(log_loss(label, p))
    assert found.brier.value == pytest.approx(((p - np.eye(4)[label]) ** 2).sum(axis=1).mean())
    assert sum(one.rows for one in found.bins) == 500
    assert all(one.low < one.confidence <= one.high for one in found.bins)
    fullest = max(found.bins, key=lambda one: one.rows)
    assert fullest.accuracy.low < fullest.accuracy.value < fullest.accuracy.high
    json.dumps(found.to_dict(), allow_nan=False)


def test_brier_of_two_classes_is_twice_that_of_one_probability():
    logits, label = drawn(300, C=2)
    expected = 2 * brier_score_loss(label, softmax(logits, axis=1)[:, 1])
    assert calibration_scores(logits, label, bootstrap=0).brier.value == pytest.approx(expected)


@pytest.mark.parametrize("sharper", [0.2, 1.0, 3.0, 40.0])
def test_the_temperature_undoes_what_made_logits_too_sharp(sharper):
    logits, label = drawn(sharper=sharper)
    found = fit_temperature(logits, label)
    assert found == pytest.approx(sharper, rel=0.06)

    def nll(log_t):
        return -log_softmax(logits / math.exp(log_t), axis=1)[np.arange(len(label)), label].mean()

    best = minimize_scalar(nll, bounds=(-8, 8), method="bounded", options={"xatol": 1e-9})
    assert found == pytest.approx(math.exp(best.x), rel=1e-4)


def test_scaling_fitted_on_one_split_calibrates_another():
    logits, label = drawn(sharper=3.0)
    T = fit_temperature(logits[:2000], label[:2000])
    before, after = (calibration_scores(x, label[2000:], bootstrap=100) for x in (logits[2000:], logits[2000:] / T))
    assert before.ece.value > 0.15
    assert after.ece.value < 0.03
    assert after.nll.value < before.nll.value
    assert after.brier.high < before.brier.low
    table = calibration_table(before, after, T)
    assert "as trained" in table
    assert f"divided by T = {T:.3g}" in table


def test_extremes_end_at_the_bounds():
    label = np.arange(30) % 3
    assert fit_temperature(np.eye(3)[label], label) == pytest.approx(1e-3)
    assert fit_temperature(-np.eye(3)[label], label) == pytest.approx(1e3)


def test_a_certain_model_falls_into_the_last_bin_and_a_constant_one_is_wrong():
    label = np.arange(20) % 2
    (only,) = calibration_scores(1000.0 * np.eye(2)[label], label, bootstrap=0).bins
    assert (only.rows, only.high, only.accuracy.value) == (20, 1.0, 1.0)
    found = calibration_scores(np.zeros((20, 2)), label, bootstrap=0)
    assert found.ece.value == pytest.approx(0.5), "confident of one half, never counted as right"


def test_rows_without_a_label_are_left_out():
    logits, label = drawn(100)
    hidden = np.where(np.arange(100) < 40, -1, label)
    assert calibration_scores(logits, hidden, bootstrap=0) == calibration_scores(logits[40:], label[40:], bootstrap=0)
    assert fit_temperature(logits, hidden) == fit_temperature(logits[40:], label[40:])
    for call in (fit_temperature, calibration_scores):
        with pytest.raises(UserError, match="none of 100 rows"):
            call(logits, np.full(100, -1))
