"""Retrieval scores against a reference that sorts whole rows, and against cases whose answer is known."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.errors import UserError
from clipdist.evaluate.cosines import TIE_TOLERANCE, top_matches
from clipdist.evaluate.retrieval import RetrievalScores, retrieval_scores


def reference_ranks(image, text, owner, group):
    """Ranks by plain loops in float64: (per image, per text), 0 where a query has no positive."""
    image, text = (np.asarray(x, dtype=np.float64) for x in (image, text))
    image, text = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (image, text))
    cosine = image @ text.T
    positive = np.array([[group[i] == group[owner[j]] for j in range(len(text))] for i in range(len(image))])

    def ranks(scores, is_positive):
        found = []
        for row, right in zip(scores, is_positive, strict=True):
            if not right.any():
                found.append(0)
                continue
            best = max(row[right])
            found.append(1 + sum(score >= best - TIE_TOLERANCE for score in row[~right]))
        return found

    return ranks(cosine, positive), ranks(cosine.T, positive.T), cosine, positive


@st.composite
def problems(draw):
    N, M = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Signs of width 16 have cosines that are multiples of 1/8, exact in float32: many ties.
    if draw(st.booleans()):
        image, text = (rng.choice([-1.0, 1.0], size=(rows, 16)) for rows in (N, M))
    else:
        image, text = (rng.normal(size=(rows, 7)) for rows in (N, M))
    owner = rng.integers(N, size=M)
    group = rng.integers(max(1, N // 2), size=N) if draw(st.booleans()) else None
    return image.astype(np.float32), text.astype(np.float32), owner, group, draw(st.integers(1, 25))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_agrees_with_a_reference_that_holds_the_whole_matrix(problem):
    image, text, owner, group, chunk = problem
    scores = retrieval_scores(image, text, owner, group_N=group, ks=(1, 3), bootstrap=0, chunk=chunk)
    expected_N, expected_M, cosine, positive = reference_ranks(
        image, text, owner, np.arange(len(image)) if group is None else group
    )
    for direction, expected in ((scores.image_to_text, expected_N), (scores.text_to_image, expected_M)):
        assert direction.ranks_Q.tolist() == expected
        asked = [rank for rank in expected if rank]
        assert direction.queries == len(asked)
        assert direction.recall[3].value == pytest.approx(np.mean([rank <= 3 for rank in asked]))
        assert direction.median_rank.value == np.median(asked)
        assert direction.mean_rank == pytest.approx(np.mean(asked))
        assert direction.mean_reciprocal_rank == pytest.approx(np.mean([1 / rank for rank in asked]))
    assert scores.cosine_pos == pytest.approx(cosine[positive].mean(), abs=1e-6)
    if positive.all():
        assert math.isnan(scores.cosine_neg)
        assert scores.to_dict()["cosine_neg"] is None
    else:
        assert scores.cosine_neg == pytest.approx(cosine[~positive].mean(), abs=1e-6)
    histogram = scores.cosine_histogram
    assert sum(histogram.positive) == positive.sum()
    assert sum(histogram.negative) == (~positive).sum()


@settings(max_examples=50, deadline=None)
@given(problems(), st.integers(1, 5))
def test_top_matches_are_the_best_of_the_whole_row(problem, k):
    image, text, _, _, chunk = problem
    scores, indices = top_matches(image, torch.from_numpy(text), k, chunk)
    _, _, cosine, _ = reference_ranks(image, text, np.zeros(len(text), dtype=int), np.arange(len(image)))
    assert scores.shape == indices.shape == (len(image), min(k, len(text)))
    np.testing.assert_allclose(scores, -np.sort(-cosine, axis=1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(cosine, indices, axis=1), scores, atol=1e-6)
    assert all(len(set(row)) == len(row) for row in indices.tolist())


def test_features_that_match_are_all_right():
    features = torch.randn(50, 8, generator=torch.manual_seed(0))
    flat = retrieval_scores(features, 3 * features, torch.arange(50)).flat()
    assert flat["image_to_text/R@1"] == flat["text_to_image/R@1"] == 1
    assert flat["cosine_pos"] == pytest.approx(1)
    assert (flat["gallery"], flat["gallery_texts"]) == (50, 50)


@pytest.mark.parametrize("D", [5, 64, 100, 512])
def test_a_constant_model_is_ranked_last(D):
    # Products of equal rows are not bitwise equal at these widths: an exact comparison would score some of them.
    image, text = (
        torch.randn(1, D, generator=torch.manual_seed(seed)).repeat(rows, 1) for seed, rows in ((1, 33), (2, 50))
    )
    owner = torch.arange(50) % 33
    scores = retrieval_scores(image, text, owner, bootstrap=0, chunk=7)
    assert scores.flat()["image_to_text/R@10"] == scores.flat()["text_to_image/R@10"] == 0
    assert (scores.text_to_image.ranks_Q == 33).all()


def test_random_features_score_at_chance_and_chance_is_exact():
    rng = np.random.default_rng(3)
    scores = retrieval_scores(rng.normal(size=(2000, 32)), rng.normal(size=(2000, 32)), np.arange(2000), bootstrap=0)
    assert scores.image_to_text.chance[1] == pytest.approx(1 / 2000)
    assert scores.image_to_text.chance[10] == pytest.approx(10 / 2000)
    assert scores.image_to_text.recall[10].value == pytest.approx(0.005, abs=0.006)
    assert scores.image_to_text.median_rank.value == pytest.approx(1000, rel=0.1)
    # Five texts an image: among 50 texts, R@2 of a random order is 1 - (45/50)(44/49).
    five = retrieval_scores(
        rng.normal(size=(10, 4)), rng.normal(size=(50, 4)), np.arange(50) % 10, ks=(2,), bootstrap=0
    )
    assert five.image_to_text.chance[2] == pytest.approx(1 - 45 / 50 * 44 / 49)
    assert five.text_to_image.chance[2] == pytest.approx(2 / 10)


def test_groups_make_repeated_texts_positives_of_each_other():
    rng = np.random.default_rng(0)
    concept = rng.normal(size=(4, 16))
    label = np.arange(12) % 4
    texts = [f"label {one}" for one in label]
    image = concept[label] + 0.01 * rng.normal(size=(12, 16))
    alone = retrieval_scores(image, concept[label], np.arange(12), texts=texts, bootstrap=0)
    assert alone.flat()["image_to_text/R@1"] == 0
    assert alone.duplicate_texts == 12
    assert "12 of 12 texts also belong to another image, so cannot be ranked first" in alone.table()
    grouped = retrieval_scores(image, concept[label], np.arange(12), texts=texts, group_N=label, bootstrap=0)
    assert grouped.flat()["image_to_text/R@1"] == grouped.flat()["text_to_image/R@1"] == 1
    assert grouped.image_to_text.chance[1] == pytest.approx(3 / 12)


def test_a_text_repeated_for_one_image_is_no_duplicate():
    image, text = np.eye(3), np.eye(3)[[0, 0, 1, 2]]
    scores = retrieval_scores(image, text, [0, 0, 1, 2], texts=["a", "a", "b", "c"], bootstrap=0)
    assert scores.duplicate_texts == 0


def test_images_without_a_text_only_stand_in_the_gallery():
    scores = retrieval_scores(np.eye(4), np.eye(4)[:2], [0, 1], bootstrap=10)
    assert scores.image_to_text.queries == 2
    assert scores.text_to_image.gallery == 4
    assert scores.image_to_text.ranks_Q.tolist() == [1, 1, 0, 0]


def noisy(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(n, 8))
    return image, image + rng.normal(size=(n, 8))


def test_intervals_contain_the_estimate_and_narrow_with_the_number_of_queries():
    widths = []
    for n in (50, 200, 800):
        scores = retrieval_scores(*noisy(n), np.arange(n), ks=(n // 20, n // 4), bootstrap=500)
        for direction in (scores.image_to_text, scores.text_to_image):
            for estimate in (*direction.recall.values(), direction.median_rank):
                assert estimate.low is not None
                assert estimate.high is not None
                assert estimate.low <= estimate.value <= estimate.high
        recall = scores.image_to_text.recall[n // 20]
        widths.append(recall.high - recall.low)
        # The normal approximation of a share: four standard errors wide, roughly.
        assert widths[-1] == pytest.approx(3.92 * math.sqrt(recall.value * (1 - recall.value) / n), rel=0.25)
    assert widths[0] > widths[1] > widths[2]


def test_the_interval_of_recall_is_that_of_a_binomial_share():
    recall = retrieval_scores(*noisy(900), np.arange(900), ks=(40,), bootstrap=4000).image_to_text.recall[40]
    low, high = np.quantile(np.random.default_rng(9).binomial(900, recall.value, 100_000) / 900, [0.025, 0.975])
    assert recall.low == pytest.approx(low, abs=0.06 * (high - low))
    assert recall.high == pytest.approx(high, abs=0.06 * (high - low))


def test_the_interval_of_the_median_is_that_of_medians_of_resamples():
    scores = retrieval_scores(*noisy(301), np.arange(301), bootstrap=2000, seed=1)
    ranks = scores.image_to_text.ranks_Q
    rng = np.random.default_rng(5)
    medians = np.median(ranks[rng.integers(301, size=(2000, 301))], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    assert scores.image_to_text.median_rank.low == pytest.approx(low, abs=0.15 * (high - low) + 0.5)
    assert scores.image_to_text.median_rank.high == pytest.approx(high, abs=0.15 * (high - low) + 0.5)


def test_resampling_units_widens_the_interval_when_images_of_a_unit_succeed_together():
    rng = np.random.default_rng(0)
    hard = np.repeat(rng.integers(2, size=40), 10).astype(bool)
    image = rng.normal(size=(400, 16))
    text = np.where(hard[:, None], rng.normal(size=(400, 16)), image)
    by_image = retrieval_scores(image, text, np.arange(400), bootstrap=400)
    patients = [f"patient {number // 10}" for number in range(400)]
    by_unit = retrieval_scores(image, text, np.arange(400), units=patients, bootstrap=400)
    one, other = (scores.image_to_text.recall[1] for scores in (by_image, by_unit))
    assert one.value == other.value
    # Ten images that stand or fall together are worth one: √10 times as wide.
    assert (other.high - other.low) / (one.high - one.low) == pytest.approx(math.sqrt(10), rel=0.25)
    assert other.low <= other.value <= other.high
    assert by_unit.units == 40
    assert "the 40 units" in by_unit.table()


def test_an_image_without_a_unit_is_a_unit_of_its_own():
    alone = retrieval_scores(*noisy(20), np.arange(20), units=[None] * 20, bootstrap=100)
    assert alone.units == 20
    mixed = retrieval_scores(*noisy(20), np.arange(20), units=["a", 7, None, None] * 5, bootstrap=100)
    assert mixed.units == 12
    assert alone.image_to_text == retrieval_scores(*noisy(20), np.arange(20), bootstrap=100).image_to_text


def test_a_unit_is_a_plain_value():
    with pytest.raises(UserError, match=r"units: .*list.*; expected a plain value"):
        retrieval_scores(*noisy(20), np.arange(20), units=[["a"]] * 20)


def test_one_unit_has_no_interval():
    scores = retrieval_scores(*noisy(20), np.arange(20), units=["only"] * 20)
    assert scores.image_to_text.recall[1].low is None
    assert "[" not in scores.table()


def test_the_seed_alone_decides_the_interval():
    first, again, other = (
        retrieval_scores(*noisy(100), np.arange(100), seed=seed, bootstrap=200) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_half_precision_and_training_switches_leave_the_scores_alone():
    image, text = (torch.from_numpy(x) for x in noisy(64))
    expected = retrieval_scores(image, text, torch.arange(64), bootstrap=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_scores(image, text, torch.arange(64), bootstrap=0) == expected
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert retrieval_scores(image.requires_grad_(), text, torch.arange(64), bootstrap=0) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert retrieval_scores(image.half(), text.bfloat16(), torch.arange(64), bootstrap=0).images == 64


def test_json_holds_intervals_and_galleries_and_the_table_is_aligned():
    scores: RetrievalScores = retrieval_scores(*noisy(30), np.arange(30), texts=["one"] * 30, bootstrap=50)
    stored = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert set(stored["image_to_text"]["R@5"]) == {"value", "low", "high", "chance"}
    assert stored["image_to_text"]["gallery"] == stored["texts"] == 30
    assert len(stored["cosine_histogram"]["edges"]) == len(stored["cosine_histogram"]["positive"]) + 1
    flat = scores.flat()
    assert {"image_to_text/R@1", "text_to_image/R@10", "gallery", "gallery_texts", "cosine_pos", "cosine_neg"} <= set(
        flat
    )
    assert flat["text_to_image/R@5"] == stored["text_to_image"]["R@5"]["value"]
    header, first, *_ = scores.table().splitlines()
    assert first.startswith("image → text")
    assert header.index("R@1") + len("R@1") == first.index("]") + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_features_ND": np.full((4, 3), np.nan)}, "4 of 4 image feature rows hold NaN"),
        ({"text_features_MD": np.ones((4, 2))}, "3 wide, text features 2"),
        ({"text_owner_M": [0, 1, 2]}, "3 entries, expected 4"),
        ({"text_owner_M": [0, 1, 2, 4]}, "spans 0 to 4"),
        ({"text_owner_M": [0.0, 1.0, 2.0, 3.0]}, "float64"),
        ({"group_N": [1, 2]}, "group_N has 2 entries, expected 4"),
        ({"units": ["a"]}, "units has 1 entries, expected 4"),
        ({"texts": ["a"] * 5}, "texts has 5 entries, expected 4"),
        ({"image_features_ND": np.ones((0, 3))}, "image features have shape"),
        ({"ks": ()}, "at least one k"),
    ],
)
def test_contradictions_are_refused(change, message):
    arguments = {
        "image_features_ND": np.ones((4, 3)),
        "text_features_MD": np.ones((4, 3)),
        "text_owner_M": [0, 1, 2, 3],
    }
    with pytest.raises(UserError, match=message):
        retrieval_scores(**(arguments | change))
