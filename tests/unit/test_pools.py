"""Small galleries: batches of k against plain loops, pools that hold one right caption."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.errors import UserError
from clipdist.evaluate.pools import _WrongTexts, in_batch_scores, pool_scores
from clipdist.evaluate.retrieval import retrieval_scores
from clipdist.loss.reference import infonce_reference


def noisy(n: int, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(n, 8))
    return image, image + noise * rng.normal(size=(n, 8))


@pytest.mark.parametrize("group", [None, np.arange(24) % 7])
def test_one_batch_of_everything_is_the_loss_and_the_full_gallery(group):
    image, text = noisy(24)
    found = in_batch_scores(image, text, np.arange(24), batch=24, scale=7.0, group_N=group, repeats=2, bootstrap=0)
    unit = [torch.nn.functional.normalize(torch.from_numpy(x), dim=1) for x in (image, text)]
    groups = None if group is None else torch.from_numpy(group)
    expected = infonce_reference(*unit, torch.tensor(7.0, dtype=torch.float64), groups)
    assert found.loss.value == pytest.approx(float(expected), abs=1e-6)
    full = retrieval_scores(image, text, np.arange(24), group_N=group, bootstrap=0)
    for way in ("image_to_text", "text_to_image"):
        assert {k: one.value for k, one in found.recall[way].items()} == pytest.approx(
            {k: one.value for k, one in getattr(full, way).recall.items()}
        )
    assert found.chance == pytest.approx(full.image_to_text.chance)


def test_batches_are_what_plain_loops_over_the_same_shuffle_find():
    image, text = noisy(100)
    found = in_batch_scores(image, text, np.arange(100), batch=32, scale=10.0, repeats=1, bootstrap=0, seed=4)
    rng = np.random.default_rng(4)
    rng.permutation(100)  # which text goes with an image: each has one
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
    hits, losses = [], []
    for rows in rng.permutation(100)[:96].reshape(3, 32):
        logits = 10 * unit[0][rows] @ unit[1][rows].T
        hits += (logits.argmax(axis=1) == np.arange(32)).tolist()
        log_p = [np.diag(x) - np.log(np.exp(x).sum(axis=1)) for x in (logits, logits.T)]
        losses.append(-np.mean(log_p))
    assert found.recall["image_to_text"][1].value == pytest.approx(np.mean(hits))
    assert found.loss.value == pytest.approx(np.mean(losses), abs=1e-5)
    assert (found.batches, found.queries) == (3, 100)


def test_a_model_that_knows_nothing_scores_ln_k_and_is_never_first():
    ones = np.ones((70, 5))
    found = in_batch_scores(ones, ones, np.arange(70), batch=32, scale=14.0, bootstrap=0)
    assert found.loss.value == pytest.approx(math.log(32), abs=1e-6)
    assert found.unknowing_loss == pytest.approx(3.4657, abs=1e-4)
    assert found.recall["image_to_text"][10].value == 0
    assert found.chance[1] == pytest.approx(1 / 32)


def test_a_smaller_gallery_is_an_easier_one_and_says_its_size():
    image, text = noisy(400, noise=1.5)
    small = in_batch_scores(image, text, np.arange(400), batch=8, scale=10.0)
    large = in_batch_scores(image, text, np.arange(400), batch=32, scale=10.0)
    whole = retrieval_scores(image, text, np.arange(400))
    recalls = [one.recall["image_to_text"][1].value for one in (small, large)]
    assert recalls[0] > recalls[1] > whole.image_to_text.recall[1].value
    estimate = large.recall["text_to_image"][1]
    assert estimate.low < estimate.value < estimate.high
    stored = json.loads(json.dumps(large.to_dict(), allow_nan=False))
    assert (stored["gallery"], stored["batch"], stored["batches"]) == (32, 32, 120)
    line = next(line for line in large.table().splitlines() if line.startswith("image → text"))
    assert line.split()[3:5] == ["400", "32"]
    assert set(small.chance) == {1, 5}, "a batch of 8 has no R@10"


def test_several_texts_of_an_image_take_turns():
    image = np.eye(6)
    text = np.concatenate([np.eye(6), np.roll(np.eye(6), 1, axis=0)])
    found = in_batch_scores(image, text, np.arange(12) % 6, batch=2, scale=1.0, repeats=200, bootstrap=0)
    # One of the two texts is right always, the other never.
    assert found.recall["image_to_text"][1].value == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_alone_decides(seed):
    image, text = noisy(80)
    texts = [f"text {n}" for n in range(80)]
    again = [in_batch_scores(image, text, np.arange(80), scale=5.0, repeats=2, seed=seed) for _ in range(2)]
    assert again[0] == again[1]
    pools = [pool_scores(image, text, np.arange(80), texts, pool=20, repeats=2, seed=seed) for _ in range(2)]
    assert pools[0] == pools[1]
    assert again[0] != in_batch_scores(image, text, np.arange(80), scale=5.0, repeats=2, seed=2)


def test_the_largest_pool_is_the_full_gallery():
    image, text = noisy(50, noise=1.5)
    texts = [f"text {n}" for n in range(50)]
    found = pool_scores(image, text, np.arange(50), texts, pool=50, bootstrap=0)
    full = retrieval_scores(image, text, np.arange(50), bootstrap=0).image_to_text
    assert {k: one.value for k, one in found.top.items()} == pytest.approx({k: full.recall[k].value for k in (1, 5)})
    assert found.chance == {1: 1 / 50, 5: 5 / 50}


def test_random_features_score_at_chance_in_pools():
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(500, 16)), rng.normal(size=(500, 16))
    found = pool_scores(image, text, np.arange(500), [str(n) for n in range(500)], pool=10, bootstrap=200)
    assert found.top[1].value == pytest.approx(0.1, abs=0.03)
    assert found.top[1].low < 0.1 < found.top[1].high
    assert found.to_dict()["gallery"] == 10
    assert found.table().splitlines()[1].split()[3:5] == ["500", "10"]


def test_a_text_that_the_group_bears_is_never_wrong():
    """Images of a class share a direction, and their texts too: only texts of other classes may stand in a pool."""
    label = np.arange(60) % 6
    image = np.eye(6)[label]
    texts = [f"class {one}" for one in label]
    found = pool_scores(image, image, np.arange(60), texts, pool=6, group_N=label, bootstrap=0)
    assert found.top[1].value == 1
    with pytest.raises(
        UserError, match="found 6 distinct texts, of which an image's group bears up to 1; expected 2 to 6"
    ):
        pool_scores(image, image, np.arange(60), texts, pool=7, group_N=label)
    # The same text on another image is no wrong answer either, with or without groups.
    assert pool_scores(image, image, np.arange(60), texts, pool=6, bootstrap=0).top[1].value == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 12), st.integers(1, 4))
def test_wrong_texts_are_distinct_and_wrong_and_all_of_them_come_up(seed, M, T, groups):
    rng = np.random.default_rng(seed)
    group_N = rng.integers(groups, size=8)
    owner, distinct = rng.integers(8, size=M), rng.integers(T, size=M)
    borne = {g: set(distinct[group_N[owner] == g].tolist()) for g in range(groups)}
    count = T - max(map(len, borne.values()))
    if count < 1:
        return
    wrong = _WrongTexts(group_N, group_N[owner], distinct, T, count)
    seen: set[int] = set()
    for _ in range(60):
        drawn = wrong.draw(3, rng).tolist()
        assert len(set(drawn)) == count
        seen |= set(drawn)
    assert seen <= set(range(T)) - borne[group_N[3]]
    if count * 60 > 30 * T:
        assert seen == set(range(T)) - borne[group_N[3]]


def test_contradictions_are_refused():
    image, text = noisy(10)
    with pytest.raises(UserError, match="batches of 32: found 10 images"):
        in_batch_scores(image, text, np.arange(10), scale=1.0)
    with pytest.raises(UserError, match="texts has 1 entries, expected 10"):
        pool_scores(image, text, np.arange(10), ["a"])
    with pytest.raises(UserError, match="spans 0 to 10"):
        pool_scores(image, text, np.arange(1, 11) * (np.arange(10) > 0), ["a"] * 10)
