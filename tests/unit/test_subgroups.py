"""Scores per value of a field: equal to those of its rows alone; gaps that are flagged, and those that are not."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.errors import UserError
from clipdist.evaluate.classification import classification_scores
from clipdist.evaluate.estimates import Measured, estimates, mean_of, median_of, ratio_of, unit_name
from clipdist.evaluate.retrieval import retrieval_scores
from clipdist.evaluate.subgroups import NOT_GIVEN, subgroup_scores


def right(N=600, share=(0.9, 0.6), seed=0):
    """A field of two values, and for each row whether a model is right, more often for the first value."""
    rng = np.random.default_rng(seed)
    value = rng.integers(2, size=N)
    return value, rng.random(N) < np.array(share)[value]


def scored(value, correct, **options):
    measured = {"model": Measured({"accuracy": mean_of(correct)}, np.arange(len(value)))}
    return subgroup_scores(measured, value.tolist(), field="skin_tone", **options)


def test_a_real_gap_is_flagged_and_one_that_is_not_there_is_not():
    value, correct = right()
    found = scored(value, correct)
    for one, sign in zip(found.subgroups, (1, -1), strict=True):
        inside = value == int(one.value)
        assert one.images == one.units == inside.sum()
        assert one.scores["model/accuracy"].value == pytest.approx(correct[inside].mean())
        gap = one.gaps["model/accuracy"]
        assert gap.value == pytest.approx(correct[inside].mean() - correct[~inside].mean())
        assert sign * gap.value > 0.2
        assert gap.low < gap.value < gap.high
        assert one.flagged == ["model/accuracy"]
    assert "2 of 2 gaps to all other images have an interval without zero, marked *; about 0.1 would by chance" in (
        found.table()
    )
    equal = scored(*right(share=(0.7, 0.7), seed=3))
    assert not any(one.flagged for one in equal.subgroups)


def test_images_of_a_unit_count_as_one_so_a_gap_of_few_patients_is_not_flagged():
    rng = np.random.default_rng(4)
    patient = np.repeat(np.arange(12), 50)
    value, correct = patient % 2, rng.random(12)[patient] < 0.5
    by_image, by_patient = scored(value, correct), scored(value, correct, units=patient)
    assert (
        by_image.subgroups[0].scores["model/accuracy"].value == by_patient.subgroups[0].scores["model/accuracy"].value
    )
    widths = [one.subgroups[0].gaps["model/accuracy"] for one in (by_image, by_patient)]
    assert (widths[1].high - widths[1].low) > 4 * (widths[0].high - widths[0].low)
    assert by_patient.subgroups[0].units == 6


def test_a_value_that_is_never_right_is_flagged_only_when_it_has_enough_units():
    """0 right of 40 against 70 % is a gap; 0 of 12 against 15 % may be none, though no resample shows any error."""
    for few, share, flagged in ((40, 0.7, True), (12, 0.15, False)):
        value = np.array([0] * few + [1] * 400)
        correct = np.concatenate([np.zeros(few), np.random.default_rng(0).random(400) < share])
        one = scored(value, correct).subgroups[0]
        assert bool(one.flagged) == flagged
        assert one.scores["model/accuracy"].high == 0
        assert one.gaps["model/accuracy"].high - 3 / few < 0


def test_where_there_is_no_gap_about_one_in_twenty_is_flagged():
    rng = np.random.default_rng(11)
    flagged = 0
    for _ in range(200):
        unit = np.arange(160) // 4
        correct = rng.random(160) < 0.3 + 0.4 * (rng.random(40) < 0.5)[unit]
        flagged += bool(scored(unit % 2, correct, units=unit, bootstrap=200).subgroups[0].flagged)
    assert 2 <= flagged <= 22


def test_retrieval_and_classification_share_one_table():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(120, 8))
    text = np.concatenate([image + 0.5 * rng.normal(size=image.shape), rng.normal(size=(10, 8))])
    owner = np.concatenate([np.arange(120), np.arange(10)])
    site = np.array(["arm", "leg", "back"])[np.arange(120) % 3]
    retrieval = retrieval_scores(image, text, owner, bootstrap=0)
    classes = classification_scores(rng.normal(size=(120, 4)), np.arange(120) % 4, list("abcd"), bootstrap=0)
    measured = {**retrieval.measured(owner), "zero_shot": classes.measured}
    found = subgroup_scores(measured, site.tolist(), field="site", bootstrap=50)
    arm = found.subgroups[0]
    assert arm.value == "arm"
    inside = site == "arm"
    ranks = retrieval.image_to_text.ranks_Q[inside]
    assert arm.scores["image_to_text/R@5"].value == pytest.approx((ranks <= 5).mean())
    ranks = retrieval.text_to_image.ranks_Q[inside[owner]]
    assert arm.scores["text_to_image/R@1"].value == pytest.approx((ranks <= 1).mean())
    assert {"zero_shot/top-1", "zero_shot/balanced_accuracy", "zero_shot/auroc"} <= arm.scores.keys()
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [one["value"] for one in stored["values"]] == ["arm", "back", "leg"]
    assert found.overall["image_to_text/R@1"].value == retrieval.image_to_text.recall[1].value
    header, everything, first, *_ = found.table().splitlines()
    assert header.startswith("by site")
    assert "image → text R@1" in header
    assert everything.split()[:2] == ["all", "120"]
    assert first.split()[:3] == ["arm", "40", "40"]


def test_what_is_not_given_is_a_group_and_what_is_rare_is_counted():
    value = np.array([None] * 30 + ["f"] * 40 + [""] * 5 + ["m"] * 9, dtype=object)
    found = scored(value, np.arange(84) % 2 == 0, bootstrap=20)
    assert [(one.value, one.images) for one in found.subgroups] == [("f", 40), (NOT_GIVEN, 35)]
    assert found.few == {"m": 9}
    assert "m: 9 images, too few to score" in found.table()


@pytest.mark.parametrize("values", [["only"] * 100, list(range(100))])
def test_fields_that_do_not_divide_are_refused(values):
    with pytest.raises(UserError, match="expected 2 to 50"):
        scored(np.array(values), np.ones(100))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 25))
def test_statistics_of_a_resample_are_those_of_its_repeated_rows(seed, Q):
    rng = np.random.default_rng(seed)
    values, counts = rng.integers(6, size=Q).astype(float), rng.integers(1, 4, size=Q)
    times = rng.integers(0, 4, size=(4, Q)).astype(float)
    found = [make(times) for make in (mean_of(values), median_of(values), ratio_of(values, counts))]
    for row, mean, median, ratio in zip(times.astype(int), *found, strict=True):
        repeated = np.repeat(values, row)
        if not len(repeated):
            assert np.isnan([mean, median, ratio]).all()
        else:
            assert mean == pytest.approx(repeated.mean())
            assert median == np.median(repeated)
            assert ratio == pytest.approx(repeated.sum() / np.repeat(counts, row).sum())


def test_a_statistic_that_most_resamples_leave_undefined_has_no_interval():
    values = np.arange(30.0)
    found = estimates(
        {"rare": lambda times: np.where(times[:, 0] > 2, times @ values, np.nan), "all": mean_of(values)},
        np.arange(30),
        bootstrap=100,
    )
    assert found["rare"].low is None
    assert found["all"].low is not None


def test_a_gap_to_few_units_is_not_flagged_from_either_side():
    rng = np.random.default_rng(0)
    # 100 patients of the one value, right in half of the cases; one of the other, always right.
    right = np.concatenate([rng.random(100) < 0.5, np.ones(20)])
    values, units = ["a"] * 100 + ["b"] * 20, [*range(100), *[100] * 20]
    measured = {"m": Measured({"top-1": mean_of(right)}, np.arange(120))}
    found = subgroup_scores(measured, values, field="f", units=units, bootstrap=500)
    assert [one.flagged for one in found.subgroups] == [[], []]
    assert found.compared == 0
    a, b = (one.gaps["m/top-1"] for one in found.subgroups)
    assert (a.low, a.high) == pytest.approx((-b.high, -b.low))


def test_units_of_images_that_a_measure_leaves_out_do_not_count():
    # 20 images of each value, but of the one only two with a class, both wrong.
    asked = np.array([0, 1, *range(20, 40)])
    right = np.array([0, 1] + [1, 1, 1, 0] * 5, float)
    measured = {"all": Measured({"R@1": mean_of(np.tile([0.0, 1], 20))}, np.arange(40))}
    measured["few"] = Measured({"top-1": mean_of(right)}, asked)
    found = subgroup_scores(measured, ["a"] * 20 + ["b"] * 20, field="f", bootstrap=200)
    assert [one.compared for one in found.subgroups] == [["all/R@1"], ["all/R@1"]]


def test_nan_is_a_value_that_is_not_given():
    measured = {"m": Measured({"top-1": mean_of(np.ones(30))}, np.arange(30))}
    found = subgroup_scores(measured, ["a"] * 15 + [float("nan")] * 15, field="f", bootstrap=0)
    assert [one.value for one in found.subgroups] == ["a", NOT_GIVEN]


def test_units_that_are_nan_are_no_common_unit():
    assert [unit_name(value) for value in (float("nan"), 1.0, "nan", None, "")] == [None, "1", "nan", None, None]
