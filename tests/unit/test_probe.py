"""Probes against scikit-learn on the same rows; shares of labels, and what may choose the regularisation."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clipdist.errors import UserError
from clipdist.evaluate import probe
from clipdist.evaluate.probe import STRENGTHS, probe_scores, probe_table


def clusters(N=400, C=3, seed=0, noise=1.6, F=10):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(C, F))
    label = rng.integers(C, size=N)
    return (centres[label] + noise * rng.normal(size=(N, F))).astype(np.float32), label


def by(scores, kind, fraction):
    (found,) = [one for one in scores if (one.kind, one.fraction) == (kind, fraction)]
    return found


def test_the_linear_probe_is_scikit_learns_with_the_strength_that_held_out_rows_choose():
    X, y = clusters()
    test, truth = clusters(seed=1)
    scores = probe_scores(X, y, test, truth, ["a", "b", "c"], bootstrap=50)
    found = by(scores, "linear", 1.0)
    assert found.C in STRENGTHS
    model = make_pipeline(StandardScaler(), LogisticRegression(C=found.C, max_iter=1000)).fit(X.astype(float), y)
    assert found.score.value == pytest.approx((model.predict(test) == truth).mean())
    assert found.score.low < found.score.value < found.score.high
    assert found.single.scores["auroc"].value == pytest.approx(
        roc_auc_score(truth, model.predict_proba(test), multi_class="ovr")
    )
    assert [(one.kind, one.fraction) for one in scores] == [(k, f) for k in ("linear", "knn") for f in (0.01, 0.1, 1.0)]
    assert [one.rows for one in scores[:3]] == [
        sum(max(1, round(f * n)) for n in np.bincount(y)) for f in (0.01, 0.1, 1)
    ]
    json.dumps([one.to_dict() for one in scores], allow_nan=False)
    assert len(probe_table(scores, "accuracy").splitlines()) == 7


def test_neighbours_vote_by_cosine():
    X, y = clusters()
    test, truth = clusters(seed=1, N=60)
    found = by(probe_scores(X, y, test, truth, ["a", "b", "c"], fractions=[1.0], bootstrap=0), "knn", 1.0)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (X.astype(float), test.astype(float))]
    votes = []
    for row in unit[1] @ unit[0].T:
        near = np.argsort(-row)[:20]
        votes.append(np.bincount(y[near], weights=np.exp(row[near] / 0.07), minlength=3))
    assert found.score.value == pytest.approx((np.argmax(votes, axis=1) == truth).mean())


def test_nothing_of_the_evaluated_rows_takes_part(monkeypatch):
    """The fitted models, and so their decisions on a row, do not depend on the other evaluated rows or on labels."""
    X, y = clusters(N=200)
    test, truth = clusters(seed=1, N=100)
    seen = []
    fit = probe._regression
    monkeypatch.setattr(probe, "_regression", lambda X, y, C: seen.append((X.copy(), C)) or fit(X, y, C))
    probe_scores(X, y, test, truth, ["a", "b", "c"], fractions=[1.0], bootstrap=0)
    first, seen[:] = list(seen), []
    probe_scores(X, y, test[::-1][:40] * 5, (truth[::-1][:40] + 1) % 3, ["a", "b", "c"], fractions=[1.0], bootstrap=0)
    assert [C for _, C in first] == [C for _, C in seen]
    assert [C for _, C in first][:-1] == list(STRENGTHS)
    assert all((a == b).all() for (a, _), (b, _) in zip(first, seen, strict=True))
    assert len(first[0][0]) == 160, "a fifth is held out"
    assert len(first[-1][0]) == 200, "and takes part again once the strength is chosen"


def test_held_out_rows_share_no_unit_with_those_fitted(monkeypatch):
    X, y = clusters(N=120)
    unit = np.arange(120) // 4
    parts = []
    hold_out = probe._hold_out
    monkeypatch.setattr(probe, "_hold_out", lambda *words: parts.append(hold_out(*words)) or parts[-1])
    probe_scores(X, y, X, y, ["a", "b", "c"], fractions=[1.0], train_units=unit, bootstrap=0)
    ((fit, held),) = parts
    assert len(held)
    assert not set(unit[fit]) & set(unit[held])


def test_shares_are_nested_stratified_and_seeded():
    y = np.repeat([0, 1, 2], [1000, 100, 3])
    problem = probe._Classes(list("abc"), y, None, 0, 5)
    shares = [problem.share(y, fraction) for fraction in (0.01, 0.1, 1.0)]
    assert [np.bincount(y[rows]).tolist() for rows in shares] == [[10, 1, 1], [100, 10, 1], [1000, 100, 3]]
    assert set(shares[0]) < set(shares[1]) < set(shares[2])
    assert (problem.share(y, 0.1) == shares[1]).all()
    assert (probe._Classes(list("abc"), y, None, 0, 6).share(y, 0.1) != shares[1]).any()


def test_two_classes_are_scored_by_auroc_and_a_share_too_small_says_so():
    X, y = clusters(C=2, noise=3)
    test, truth = clusters(C=2, seed=1, noise=3)
    scores = probe_scores(X, y, test, truth, ["benign", "malignant"], fractions=[0.005, 1.0], bootstrap=0)
    assert by(scores, "linear", 1.0).score == by(scores, "linear", 1.0).single.scores["auroc"]
    assert by(scores, "linear", 0.005).C is None, "two rows: none can be held out"
    assert by(scores, "linear", 0.005).rows == 2
    assert by(scores, "linear", 1.0).score.value > by(scores, "linear", 0.005).score.value


def test_a_class_that_training_never_saw_is_never_given():
    X, y = clusters(C=3)
    test, truth = clusters(C=3, seed=1)
    scores = probe_scores(X[y != 1], y[y != 1], test, truth, ["a", "b", "c"], fractions=[1.0], bootstrap=0)
    for one in scores:
        assert one.classes_seen == 2
        assert one.single.recall["b"].value == 0
        assert one.single.confusion_CC[:, 1].sum() == 0


def test_several_labels_each_have_a_probe_and_unknown_ones_take_no_part():
    rng = np.random.default_rng(0)
    X, test = rng.normal(size=(300, 6)), rng.normal(size=(200, 6))

    def truth(x):
        return np.stack([x[:, 0] + x[:, 1] > 0, x[:, 2] > 1, np.zeros(len(x))], axis=1).astype(float)

    y, expected = truth(X + 0.3 * rng.normal(size=X.shape)), truth(test)
    y[:30, 0] = expected[:50, 1] = np.nan
    names = ["Edema", "Fracture", "Never"]
    scores = probe_scores(X, y, test, expected, names, fractions=[1.0], bootstrap=100)
    found = by(scores, "linear", 1.0)
    assert set(found.labels) == {"Edema", "Fracture"}, "a label without positives has no AUROC"
    known = y[:, 0] == y[:, 0]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=found.C[0], max_iter=1000)).fit(X[known], y[known, 0])
    assert found.labels["Edema"].value == pytest.approx(
        roc_auc_score(expected[:, 0], model.decision_function(test)), abs=1e-9
    )
    assert found.score.value == pytest.approx(np.mean([one.value for one in found.labels.values()]))
    assert found.score.low < found.score.value < found.score.high
    assert found.C[2] is None


def test_contradictions_are_refused():
    X, y = clusters(N=20)
    with pytest.raises(UserError, match="training rows hold 1 of the classes"):
        probe_scores(X, np.zeros(20, int), X, y, list("abc"))
    with pytest.raises(UserError, match="evaluated features of shape"):
        probe_scores(X, y, X[:, :3], y, list("abc"))
    with pytest.raises(UserError, match="none of Edema has both positive and negative"):
        probe_scores(X, np.zeros((20, 1)), X, np.zeros((20, 1)), ["Edema"], fractions=[1.0])


def test_rows_far_from_all_that_was_fitted_are_scored_by_their_margin():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 3))
    label = (X[:, 0] > 0).astype(int)
    far = 1e4 * X + 1e5  # their probabilities are 0 or 1 in float64
    truth = (far[:, 0] > 1e5).astype(int)
    found = probe_scores(X, label, far, truth, ["a", "b"], fractions=[1.0], bootstrap=0)[0]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=found.C, max_iter=1000)).fit(X, label)
    assert found.score.value == pytest.approx(roc_auc_score(truth, model.decision_function(far)), abs=1e-12)
