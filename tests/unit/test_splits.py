"""Splits: whole units, fractions near what was asked for, labels in proportion, rare labels handled."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.errors import UserError
from clipdist.prepare.splits import check_fractions, every_label_in, split_by, straddling_units

THREE = {"train": 0.8, "val": 0.1, "test": 0.1}


@st.composite
def fractions(draw: st.DrawFn) -> dict[str, float]:
    weights = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    return {f"s{number}": weight / sum(weights) for number, weight in enumerate(weights)}


@st.composite
def units_and_labels(draw: st.DrawFn) -> tuple[list[int], list[str]]:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=60))
    units = [unit for unit, size in enumerate(sizes) for _ in range(size)]
    labels = draw(st.lists(st.sampled_from("aaaaabbbccdefg"), min_size=len(units), max_size=len(units)))
    order = draw(st.randoms(use_true_random=False)).sample(range(len(units)), len(units))
    return [units[place] for place in order], [labels[place] for place in order]


@settings(max_examples=80, deadline=None)
@given(units_and_labels(), fractions(), st.integers(0, 2**40))
def test_every_sample_gets_one_split_and_no_unit_straddles(
    samples: tuple[list[int], list[str]], asked: dict[str, float], seed: int
) -> None:
    units, labels = samples
    if len(set(units)) < len(asked):
        with pytest.raises(UserError, match="expected at least one for each"):
            split_by(labels, units, asked, seed)
        return
    splits = split_by(labels, units, asked, seed)
    assert splits.shape == (len(units),)
    assert set(splits.tolist()) == set(asked)  # none is empty, none is invented
    assert straddling_units(units, splits.tolist()) == []
    assert splits.tolist() == split_by(labels, units, asked, seed).tolist()


@settings(max_examples=40, deadline=None)
@given(fractions(), st.integers(0, 1000), st.integers(200, 600), st.integers(1, 4), st.integers(1, 12))
def test_fractions_are_near_when_units_are_small(
    asked: dict[str, float], seed: int, count: int, largest_unit: int, kinds: int
) -> None:
    rng = np.random.default_rng(seed)
    units = np.repeat(np.arange(count), rng.integers(1, largest_unit + 1, count))
    labels = rng.zipf(1.7, len(units)) % kinds
    obtained = Counter(split_by(labels.tolist(), units.tolist(), asked, seed).tolist())
    for name, fraction in asked.items():
        assert abs(obtained[name] - fraction * len(units)) <= max(0.02 * len(units), largest_unit), (name, obtained)


def test_fractions_are_exact_to_a_sample_without_units() -> None:
    labels = (np.random.default_rng(1).zipf(1.5, 1000) % 187).tolist()
    assert Counter(split_by(labels, None, THREE, 0).tolist()) == {"train": 800, "val": 100, "test": 100}
    odd = {"train": 0.857, "val": 0.0715, "test": 0.0715}
    assert Counter(split_by(labels, None, odd, 0).tolist())["train"] in range(856, 859)


def test_labels_keep_their_proportions_within_units() -> None:
    rng = np.random.default_rng(2)
    units = np.repeat(np.arange(600), rng.integers(1, 5, 600))
    labels = np.array(["common"] * 5 + ["middle"] * 3 + ["rare"] * 2)[units % 10]
    splits = split_by(labels, units, THREE, 3)
    for name in THREE:
        held = labels[splits == name]
        for label, share in (("common", 0.5), ("middle", 0.3), ("rare", 0.2)):
            assert abs((held == label).mean() - share) < 0.06, (name, label)


def test_a_label_of_one_unit_goes_to_the_largest_split() -> None:
    labels = ["a"] * 90 + ["b"] * 3 + ["c", "d"]
    units = [*range(90), 90, 90, 90, 91, 92]  # b: three samples of one patient
    for seed in range(10):
        splits = split_by(labels, units, THREE, seed)
        assert set(splits[90:].tolist()) == {"train"}


def test_labels_that_are_all_different_do_not_upset_the_fractions() -> None:
    splits = split_by([f"label {number}" for number in range(200)], None, THREE, 0)
    assert Counter(splits.tolist()) == {"train": 160, "val": 20, "test": 20}


def test_a_label_with_fewer_members_than_splits() -> None:
    splits = split_by(["a"] * 40 + ["b"] * 2, None, THREE, 5)
    assert set(splits.tolist()) == set(THREE)
    assert Counter(splits.tolist())["train"] in (33, 34)


def test_a_giant_unit_lands_where_it_does_least_harm() -> None:
    units = [0] * 60 + list(range(1, 41))
    for seed in range(5):
        splits = split_by(None, units, THREE, seed)
        assert set(splits[:60].tolist()) == {"train"}
        assert Counter(splits.tolist()) == {"train": 80, "val": 10, "test": 10}


def test_the_seed_matters_and_unit_names_do_not() -> None:
    units = [number // 3 for number in range(300)]
    first = split_by(None, units, THREE, 0)
    assert (first == split_by(None, [f"patient {unit}" for unit in units], THREE, 0)).all()
    assert (first != split_by(None, units, THREE, 1)).any()


def test_only_a_count_is_enough() -> None:
    assert Counter(split_by(None, None, {"train": 0.75, "val": 0.25}, 0, count=8).tolist()) == {"train": 6, "val": 2}
    with pytest.raises(ValueError, match="must agree"):
        split_by(["a"], None, {"train": 1}, 0, count=2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "found none"),
        ({"train": 0.8, "val": 0.3}, "sum to 1.1, expected 1"),
        ({"train": 1.0, "val": 0.0}, "above 0"),
        ({"train": 1.5, "val": -0.5}, "above 0"),
        ({"train": float("nan")}, "above 0"),
    ],
)
def test_wrong_fractions_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_fractions(wrong)


def test_straddling_units_are_named_once() -> None:
    assert straddling_units(["p", "q", "p", "q", "r", "q"], ["a", "a", "b", "a", "a", "b"]) == ["p", "q"]


@settings(max_examples=80, deadline=None)
@given(units_and_labels(), st.integers(0, 2**40))
def test_every_label_is_in_one_split_with_its_units_whole(samples: tuple[list[int], list[str]], seed: int) -> None:
    units, labels = samples
    before = {unit: ("train", "val", "test")[np.random.default_rng([seed, unit]).integers(3)] for unit in set(units)}
    given_splits = np.array([before[unit] for unit in units])
    splits, moved = every_label_in(given_splits, labels, units, "train")
    assert straddling_units(units, splits.tolist()) == []
    assert {label for label, split in zip(labels, splits, strict=True) if split == "train"} == set(labels)
    assert set(moved) <= set(labels) - {
        label for label, unit in zip(labels, units, strict=True) if before[unit] == "train"
    }
    changed = {unit for unit, was, now in zip(units, given_splits, splits, strict=True) if was != now}
    assert len(changed) == len(moved)
    assert all(split == "train" for unit, split in zip(units, splits, strict=True) if unit in changed)


def test_the_smallest_unit_is_moved() -> None:
    splits, moved = every_label_in(np.array(list("vvvvtv")), list("aaabbb"), [0, 0, 1, 2, 3, 4], "t")
    assert ("".join(splits), moved) == ("vvtvtv", ["a"])
    assert every_label_in(splits, list("aaabbb"), [0, 0, 1, 2, 3, 4], "t")[1] == []
