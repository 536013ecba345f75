"""Mean average precision and Precision@k against scikit-learn and against plain loops in float64."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from clipdist.evaluate import cosines
from clipdist.evaluate.cosines import TIE_TOLERANCE
from clipdist.evaluate.retrieval import retrieval_scores


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def loops(cosine: np.ndarray, positive: np.ndarray, k: int) -> tuple[list[float], list[float]]:
    """Average precision and Precision@k of each row that has a positive: the worst order that ties allow."""
    averages, precisions = [], []
    for row, right in zip(cosine, positive, strict=True):
        if not right.any():
            continue
        best = np.sort(row[right])[::-1]
        ranks = [i + 1 + (row[~right] >= one - TIE_TOLERANCE).sum() for i, one in enumerate(best)]
        averages.append(np.mean([(i + 1) / rank for i, rank in enumerate(ranks)]))
        precisions.append(sum(rank <= k for rank in ranks) / k)
    return averages, precisions


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14), st.integers(1, 20), st.booleans(), st.booleans(), st.integers(1, 6))
def test_agrees_with_loops_over_the_whole_matrix(seed, N, M, grouped, tied, at_once):
    rng = np.random.default_rng(seed)
    draw = (lambda rows: rng.choice([-1.0, 1.0], (rows, 16))) if tied else (lambda rows: rng.normal(size=(rows, 6)))
    image, text, owner = draw(N), draw(M), rng.integers(N, size=M)
    group = rng.integers(3, size=N) if grouped else np.arange(N)
    before = cosines._RANKED_AT_ONCE
    cosines._RANKED_AT_ONCE = at_once * M
    try:
        scores = retrieval_scores(image, text, owner, group_N=group, ks=(1, 3), precision=True, bootstrap=0)
    finally:
        cosines._RANKED_AT_ONCE = before
    cosine, positive = unit(image) @ unit(text).T, group[:, None] == group[owner][None]
    for direction, c, p in ((scores.image_to_text, cosine, positive), (scores.text_to_image, cosine.T, positive.T)):
        averages, precisions = loops(c, p, 3)
        assert direction.mean_average_precision.value == pytest.approx(np.mean(averages))
        assert direction.precision[3].value == pytest.approx(np.mean(precisions))
        assert direction.positives == pytest.approx(p.sum(axis=1)[p.any(axis=1)].mean())


def test_agrees_with_scikit_learn_where_nothing_is_tied():
    rng = np.random.default_rng(0)
    image, text, label = rng.normal(size=(200, 8)), rng.normal(size=(200, 8)), rng.integers(5, size=200)
    scores = retrieval_scores(image, text, np.arange(200), group_N=label, precision=True, bootstrap=50)
    cosine = unit(image) @ unit(text).T
    expected = [average_precision_score(label == label[i], cosine[i]) for i in range(200)]
    found = scores.image_to_text.mean_average_precision
    assert found.value == pytest.approx(np.mean(expected), abs=1e-5), "but for pairs within the tolerance"
    assert found.low < found.value < found.high
    top = np.argsort(-cosine, axis=1)[:, :10]
    assert scores.image_to_text.precision[10].value == pytest.approx((label[top] == label[:, None]).mean())


def test_recall_with_several_captions_is_clip_benchmarks():
    """Its `recall_at_k > 0`: the share of queries with any of their own among the first k."""
    rng = np.random.default_rng(3)
    image, owner = rng.normal(size=(60, 8)), np.arange(300) % 60
    text = image[owner] + 2 * rng.normal(size=(300, 8))
    found = retrieval_scores(image, text, owner, ks=(5,), bootstrap=0)
    cosine, own = unit(text) @ unit(image).T, owner[:, None] == np.arange(60)
    for direction, c, p in ((found.text_to_image, cosine, own), (found.image_to_text, cosine.T, own.T)):
        among = np.take_along_axis(p, np.argsort(-c, axis=1)[:, :5], axis=1)
        assert direction.recall[5].value == (among.sum(axis=1) / p.sum(axis=1) > 0).mean()
        assert 0.1 < direction.recall[5].value < 0.9


def test_mean_average_precision_of_class_prompts_is_clip_benchmarks():
    """Its `average_precision_per_class`: the mean precision at the images of a class, in the order of their scores."""
    rng = np.random.default_rng(4)
    classes, label = rng.normal(size=(7, 8)), rng.integers(7, size=300)
    image = classes[label] + 2 * rng.normal(size=(300, 8))
    owner = np.array([np.flatnonzero(label == one)[0] for one in range(7)])
    scores = retrieval_scores(image, classes, owner, group_N=label, precision=True, bootstrap=0)
    theirs = []
    for number in range(7):
        right = (label == number)[np.argsort(-(unit(image) @ unit(classes)[number]))]
        theirs.append((right.cumsum() / np.arange(1, 301))[right].sum() / right.sum())
    assert scores.text_to_image.mean_average_precision.value == pytest.approx(np.mean(theirs), abs=1e-5)


def test_with_one_right_answer_it_says_what_the_rank_says():
    rng = np.random.default_rng(1)
    scores = retrieval_scores(rng.normal(size=(60, 4)), rng.normal(size=(60, 4)), np.arange(60), precision=True)
    for direction in (scores.image_to_text, scores.text_to_image):
        assert direction.mean_average_precision.value == pytest.approx(direction.mean_reciprocal_rank)
        assert direction.precision[5].value == pytest.approx(direction.recall[5].value / 5)
    assert "mAP" not in scores.table()


def test_a_constant_model_has_the_worst_precision():
    label = np.arange(20) % 4
    ones = np.ones((20, 37))
    scores = retrieval_scores(ones, ones, np.arange(20), group_N=label, precision=True, bootstrap=0).image_to_text
    assert scores.precision[10].value == 0
    assert scores.mean_average_precision.value == pytest.approx(np.mean([i / (15 + i) for i in range(1, 6)]))


def test_it_stands_in_table_and_json_only_when_asked_for():
    rng = np.random.default_rng(2)
    arrays = (rng.normal(size=(40, 4)), rng.normal(size=(40, 4)), np.arange(40))
    scores = retrieval_scores(*arrays, group_N=np.arange(40) % 4, precision=True, bootstrap=20)
    assert {"mAP", "P@1", "P@5", "P@10"} < json.loads(json.dumps(scores.to_dict(), allow_nan=False))[
        "image_to_text"
    ].keys()
    lines = scores.table().splitlines()
    assert any(line.split()[:3] == ["right", "answers", "mAP"] for line in lines)
    without = retrieval_scores(*arrays, group_N=np.arange(40) % 4, bootstrap=20)
    assert "mAP" not in without.to_dict()["image_to_text"]
