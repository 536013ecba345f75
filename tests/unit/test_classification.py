"""Scores of classifiers against scikit-learn, against open_clip's zero-shot code, and in cases with a known answer."""

import json
import math

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score, top_k_accuracy_score

from clipdist.errors import UserError
from clipdist.evaluate.classification import auroc_of, classification_scores
from clipdist.evaluate.plots import plain
from clipdist.evaluate.score_plots import confusion
from clipdist.evaluate.zero_shot import (
    class_features,
    class_logits,
    labels_of,
    read_classes,
    read_templates,
    zero_shot_scores,
)


def problem(N=300, C=8, seed=0, signal=1.5):
    rng = np.random.default_rng(seed)
    label = rng.integers(C, size=N)
    return rng.normal(size=(N, C)) + signal * np.eye(C)[label], label, [f"class {c}" for c in range(C)]


def test_agrees_with_scikit_learn():
    logits, label, names = problem()
    found = classification_scores(logits, label, names, bootstrap=50)
    value = {name: one.value for name, one in found.scores.items()}
    assert value["top-1"] == pytest.approx((logits.argmax(1) == label).mean())
    assert value["top-5"] == pytest.approx(top_k_accuracy_score(label, logits, k=5))
    assert value["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(label, logits.argmax(1)))
    p = softmax(logits, axis=1)
    assert value["auroc"] == pytest.approx(roc_auc_score(label, p, multi_class="ovr"))
    for number, name in enumerate(names):
        assert found.auroc[name].value == pytest.approx(roc_auc_score(label == number, p[:, number]))
    np.testing.assert_array_equal(found.confusion_CC, confusion_matrix(label, logits.argmax(1)))
    assert all(one.low < one.value < one.high for one in found.scores.values())


def test_two_classes_have_one_auroc_whichever_comes_first():
    logits, label, names = problem(C=2)
    found = classification_scores(logits, label, names, bootstrap=0)
    assert found.scores["auroc"].value == pytest.approx(roc_auc_score(label, logits[:, 1] - logits[:, 0]))
    turned = classification_scores(logits[:, ::-1], 1 - label, names[::-1], bootstrap=0)
    assert turned.scores["auroc"].value == pytest.approx(found.scores["auroc"].value)
    assert "top-5" not in found.scores
    assert found.auroc == {}


def test_classes_that_are_absent_compete_but_count_in_no_mean():
    logits, label, names = problem(C=6)
    kept = ~np.isin(label, [2, 5])
    found = classification_scores(logits[kept], label[kept], names, bootstrap=30)
    assert found.absent == ["class 2", "class 5"]
    assert "without a row, so without scores of their own: class 2, class 5" in found.table()
    assert set(found.recall) == set(found.auroc) == {"class 0", "class 1", "class 3", "class 4"}
    given = logits[kept].argmax(1)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = balanced_accuracy_score(label[kept], given)
    assert found.scores["balanced_accuracy"].value == pytest.approx(expected)
    p = softmax(logits[kept], axis=1)
    each = [roc_auc_score(label[kept] == c, p[:, c]) for c in (0, 1, 3, 4)]
    assert found.scores["auroc"].value == pytest.approx(np.mean(each))
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["classes"]["class 2"] == {"rows": 0}
    assert stored["absent"] == ["class 2", "class 5"]


def test_a_model_that_cannot_tell_classes_apart_is_never_right_and_at_chance():
    found = classification_scores(np.full((40, 4), 0.3), np.arange(40) % 4, list("abcd"), bootstrap=0)
    assert found.scores["top-1"].value == found.scores["balanced_accuracy"].value == 0
    assert found.scores["auroc"].value == 0.5
    assert np.trace(found.confusion_CC) == 0
    assert found.confusion_CC.sum() == 40
    # The same through features at widths at which equal products are not bitwise equal, at CLIP's largest scale.
    image, prompts = np.tile(np.random.default_rng(0).normal(size=(1, 100)), (33, 1)), np.ones((7, 100))
    shot = zero_shot_scores(image, prompts, np.arange(33) % 7, list("abcdefg"), scale=100.0, bootstrap=0)
    assert shot.scores["top-1"].value == shot.scores["top-5"].value == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.booleans())
def test_auroc_with_ties_and_weights_is_scikit_learns(seed, Q, tied):
    rng = np.random.default_rng(seed)
    score = rng.integers(4, size=Q).astype(float) if tied else rng.normal(size=Q)
    positive, times = rng.random(Q) < 0.4, rng.integers(0, 4, size=(3, Q))
    found = auroc_of(score, positive)(times.astype(float))
    for row, value in zip(times, found, strict=True):
        kept = row > 0
        if len(set(positive[kept].tolist())) < 2:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(roc_auc_score(positive[kept], score[kept], sample_weight=row[kept]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_the_order_of_rows_and_classes_changes_nothing_and_duplicates_neither(seed, C):
    rng = np.random.default_rng(seed)
    logits, label, names = problem(30, C, seed)
    first = classification_scores(logits, label, names, bootstrap=0)
    rows, columns = rng.permutation(30), rng.permutation(C)
    again = classification_scores(
        np.repeat(logits[rows][:, columns], 2, axis=0),
        np.repeat(np.argsort(columns)[label[rows]], 2),
        [names[c] for c in columns],
        bootstrap=0,
    )
    for name, one in first.scores.items():
        assert again.scores[name].value == pytest.approx(one.value)
    assert {n: e.value for n, e in again.recall.items()} == pytest.approx({n: e.value for n, e in first.recall.items()})


def test_intervals_resample_units():
    logits, label, names = problem(400, 3)
    repeated, labels = np.repeat(logits, 4, axis=0), np.repeat(label, 4)
    by_row = classification_scores(repeated, labels, names, bootstrap=300)
    by_unit = classification_scores(repeated, labels, names, units=np.repeat(np.arange(400), 4), bootstrap=300)
    for name in ("top-1", "balanced_accuracy", "auroc"):
        one, other = by_row.scores[name], by_unit.scores[name]
        assert one.value == other.value
        assert (other.high - other.low) / (one.high - one.low) == pytest.approx(2, rel=0.3)
    assert by_unit.units == 400


def test_rows_without_a_label_are_left_out():
    logits, label, names = problem(50, 3)
    unknown = np.where(np.arange(50) < 20, -1, label)
    found = classification_scores(logits, unknown, names, bootstrap=20, units=np.arange(50) // 2)
    assert (
        found.scores
        == classification_scores(logits[20:], label[20:], names, bootstrap=20, units=np.arange(20, 50) // 2).scores
    )
    assert found.measured.image_Q.tolist() == list(range(20, 50))


def test_with_many_classes_the_single_ones_have_no_interval():
    logits, label, names = problem(200, 60)
    found = classification_scores(logits, label, names, bootstrap=20)
    assert all(one.low is None for one in found.recall.values())
    assert found.scores["top-5"].low is not None


class Words:
    """A text encoder with the interface of open_clip's, one fixed vector per sentence."""

    def __call__(self, texts):
        return list(texts)

    def encode_text(self, texts, normalize=False):
        seeds = [int.from_bytes(text.encode()[-6:], "big") % 2**31 for text in texts]
        features = torch.stack([torch.randn(24, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features


class Tokens(list):
    def to(self, device):
        return self


def test_agrees_with_open_clip_on_the_same_embeddings():
    words, names = Words(), [f"thing{n}" for n in range(12)]
    templates = ["a photo of {}.", "{}", "art of {}"]
    theirs = open_clip.build_zero_shot_classifier(
        words, lambda texts: Tokens(texts), classnames=names, templates=templates, num_classes_per_batch=5
    )
    ours = class_features(words.encode_text, [[name] for name in names], templates)
    np.testing.assert_allclose(ours, theirs.T.numpy(), atol=1e-6)
    rng = np.random.default_rng(0)
    label = rng.integers(12, size=500)
    image = ours[label] + 0.35 * rng.normal(size=(500, 24))
    image = torch.nn.functional.normalize(torch.from_numpy(image).float(), dim=-1)
    # As its trainer and CLIP_benchmark count; their function itself fails with numpy 2.4.
    among = (100.0 * image @ theirs).topk(5, dim=1).indices.numpy() == label[:, None]
    top1, top5 = among[:, 0].sum(), among.sum()
    found = zero_shot_scores(image, ours, label, names, scale=100.0, bootstrap=0)
    assert found.scores["top-1"].value == pytest.approx(top1 / 500)
    assert found.scores["top-5"].value == pytest.approx(top5 / 500)
    assert 0.2 < top1 / 500 < 0.95
    np.testing.assert_allclose(class_logits(image, ours, 100.0), (100.0 * image @ theirs).numpy(), atol=1e-4)


def test_a_class_with_several_names_takes_all_their_prompts():
    words = Words()
    ours = class_features(words.encode_text, [["mole", "nevus"], ["melanoma"]], ["a {}", "{}"])
    prompts = words.encode_text(["a mole", "mole", "a nevus", "nevus"], normalize=True)
    expected = torch.nn.functional.normalize(prompts.mean(dim=0), dim=0)
    np.testing.assert_allclose(ours[0], expected.numpy(), atol=1e-6)


def test_files_of_classes_and_templates(tmp_path):
    lines = tmp_path / "classes.txt"
    lines.write_text("nv\tmelanocytic nevus\tmole\nmel\tmelanoma\nother\n\n")
    assert read_classes(lines) == {"nv": ["melanocytic nevus", "mole"], "mel": ["melanoma"], "other": ["other"]}
    body = tmp_path / "classes.json"
    body.write_text(json.dumps({"0": "benign lesion", "1": ["malignant lesion", "cancer"]}))
    assert read_classes(body) == {"0": ["benign lesion"], "1": ["malignant lesion", "cancer"]}
    templates = tmp_path / "templates.txt"
    templates.write_text("a photo of {}.\n\n{}\n")
    assert read_templates(templates) == ["a photo of {}.", "{}"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "one\n", "found 1 classes"),
        ("c.txt", "a\tx\na\ty\n", "'a' stands in it twice"),
        ("c.json", "[1]", "found list, expected an object"),
        ("c.json", "{", "no valid JSON"),
        ("c.json", '{"a": [], "b": "x"}', "expected a name or a list of names"),
        ("c.json", '{"a": 3, "b": "x"}', "expected a name or a list of names"),
    ],
)
def test_damaged_files_of_classes_are_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_classes(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_templates(tmp_path / "absent.txt")


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_needs_one_place_for_the_name(template):
    with pytest.raises(UserError, match="expected exactly one"):
        class_features(Words().encode_text, [["a"], ["b"]], [template])


def test_labels_come_from_a_field_and_what_is_left_out_is_counted():
    fields = [{"grade": 10}, {"grade": 9}, {"grade": "9"}, {}, {"grade": None}, {"grade": "x"}]
    label, classes, left_out = labels_of(fields, "grade")
    assert (label.tolist(), classes, left_out) == ([1, 0, 0, -1, -1, 2], ["9", "10", "x"], {"no grade": 2})
    label, classes, left_out = labels_of(fields, "grade", ["10", "9", "8"])
    assert label.tolist() == [0, 1, 1, -1, -1, -1]
    assert left_out == {"no grade": 2, "grade=x": 1}
    with pytest.raises(UserError, match=r"field 'sex': fewer than two classes occur .*there are: grade"):
        labels_of(fields, "sex")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_NC": np.full((4, 2), np.nan)}, "NaN or infinity"),
        ({"logits_NC": np.ones((4, 3))}, "logits of shape"),
        ({"label_N": [0, 1, 2, 0]}, "up to 2"),
        ({"label_N": [-1] * 4}, "none of 4 rows"),
        ({"classes": ["a", "a"]}, "a name twice"),
    ],
)
def test_contradictions_are_refused(change, message):
    arguments = {"logits_NC": np.ones((4, 2)), "label_N": [0, 1, 0, 1], "classes": ["a", "b"]} | change
    with pytest.raises(UserError, match=message):
        classification_scores(**arguments)


def test_auroc_tells_rows_apart_of_which_the_model_is_sure():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 400)
    margin = 45 + 3 * rng.normal(size=400) + 3 * label  # 1 + exp(-45) is 1 in float64
    scores = classification_scores(np.stack([np.zeros(400), margin], axis=1), label, ["a", "b"], bootstrap=0)
    assert scores.scores["auroc"].value == pytest.approx(roc_auc_score(label, margin), abs=1e-12)


def test_a_label_that_is_nan_is_no_class_and_a_list_is_refused():
    fields = [{"c": "x"}, {"c": "y"}, {"c": float("nan")}, {"c": ""}, {"c": None}]
    label, classes, left_out = labels_of(fields, "c")
    assert (label.tolist(), classes, left_out) == ([0, 1, -1, -1, -1], ["x", "y"], {"no c": 3})
    with pytest.raises(UserError, match="expected one class"):
        labels_of([*fields, {"c": ["x", "y"]}], "c")


@pytest.mark.parametrize("name", ["a $5^$ b", r"$\frac$", "$x$"])
def test_names_with_dollars_are_drawn_as_they_are(name):
    counts = [[1, 2], [3, 4]]
    assert confusion({"zero_shot": {"confusion": {"classes": [name, "b"], "counts": counts}}})
    assert Text(text=plain(name))._preprocess_math(plain(name)) == (name, False)  # what is drawn, and as no formula
