"""Comparisons of runs, against numpy, scipy and scikit-learn on the same outcomes."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import permutation_test
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from clipdist import cli
from clipdist.errors import UserError
from clipdist.evaluate import plots
from clipdist.evaluate.compare import Run, compare_runs, holm, paired_differences, read_run, why_not
from clipdist.evaluate.compare_page import overlay
from clipdist.evaluate.compare_settings import common_order, differing, settings_of
from clipdist.evaluate.outcomes import Outcomes, outcomes_of_classes
from tests.conftest import TrainedRun


def ranked(rank_N: np.ndarray, units: list[Any] | None = None) -> Outcomes:
    """One text an image, found at the same rank both ways."""
    N = len(rank_N)
    arrays: dict[str, np.ndarray] = {
        "text/owner": np.arange(N, dtype=np.int32),
        "text/hash": np.arange(N, dtype=np.uint64),
    }
    arrays |= {f"{way}/rank": rank_N.astype(np.int32) for way in ("image_to_text", "text_to_image")}
    return Outcomes([f"s{number}" for number in range(N)], units, arrays)


def pair(N: int = 240, per_unit: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Ranks of two models of which the second is a little better, correlated within units of four."""
    rng = np.random.default_rng(seed)
    hard = np.repeat(rng.normal(size=N // per_unit), per_unit)
    ranks = [1 + np.floor(np.exp(hard + rng.normal(size=N) + shift)).astype(int) for shift in (0.4, 0.0)]
    return ranks[0], ranks[1], [f"p{number // per_unit}" for number in range(N)]


def test_difference_interval_and_p_are_those_of_numpy_and_scipy() -> None:
    one, other, units = pair()
    (estimate, p) = paired_differences(ranked(one, units), ranked(other, units))["image_to_text/R@1"]
    change_N = (other <= 1).astype(float) - (one <= 1)
    assert estimate.value == pytest.approx(change_N.mean())
    by_unit = change_N.reshape(-1, 4).mean(axis=1)
    drawn = by_unit[np.random.default_rng(5).integers(len(by_unit), size=(20_000, len(by_unit)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    width = high - low
    assert estimate.low == pytest.approx(low, abs=0.05 * width)
    assert estimate.high == pytest.approx(high, abs=0.05 * width)
    assert p == pytest.approx(2 * min((drawn <= 0).mean(), (drawn >= 0).mean()), rel=0.2, abs=0.002)
    flipped = permutation_test(
        (by_unit, np.zeros(len(by_unit))),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        n_resamples=9999,
        rng=np.random.default_rng(0),
    )
    assert p is not None
    assert abs(p - flipped.pvalue) < 0.02 + 0.5 * flipped.pvalue, "another test of the same hypothesis"


def test_pairing_tells_what_two_separate_intervals_do_not() -> None:
    one, other, units = pair(seed=3)
    estimate, p = paired_differences(ranked(one, units), ranked(other, units))["image_to_text/mean_reciprocal_rank"]
    shuffled = np.random.default_rng(0).permutation(60)
    apart = other.reshape(60, 4)[shuffled].ravel()  # the same score, of queries that no longer match
    unpaired = paired_differences(ranked(one, units), ranked(apart, units))["image_to_text/mean_reciprocal_rank"][0]
    assert estimate.value == pytest.approx(unpaired.value)
    assert estimate.low is not None
    assert estimate.high is not None
    assert unpaired.low is not None
    assert unpaired.high is not None
    assert estimate.high - estimate.low < 0.9 * (unpaired.high - unpaired.low)
    assert p is not None
    assert p < 0.05


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(12, 40))
def test_equal_runs_do_not_differ_and_exchanged_runs_differ_the_other_way(seed: int, N: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = (ranked(rng.integers(1, 6, N)) for _ in range(2))
    for estimate, p in paired_differences(one, one, bootstrap=200).values():
        assert (estimate.value, estimate.low, estimate.high, p) == (0, 0, 0, 1)
    there = paired_differences(one, other, bootstrap=200)
    back = paired_differences(other, one, bootstrap=200)
    for name, (estimate, p) in there.items():
        mirrored, q = back[name]
        assert mirrored.value == -estimate.value
        assert mirrored.low == pytest.approx(-estimate.high, abs=1e-12)  # type: ignore[operator]
        assert mirrored.high == pytest.approx(-estimate.low, abs=1e-12)  # type: ignore[operator]
        assert p == q


def test_scores_of_classes_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(3, size=90)
    logits: list[Any] = [np.float32(rng.normal(size=(90, 3)) + shift * np.eye(3)[label]) for shift in (0.5, 1.5)]
    both = [
        Outcomes([str(n) for n in range(90)], None, outcomes_of_classes("zero_shot", one, label, 1e-6))
        for one in logits
    ]
    found = paired_differences(*both, bootstrap=500)
    given_by = [one.argmax(axis=1) for one in logits]
    chances = [np.exp(one) / np.exp(one).sum(axis=1, keepdims=True) for one in logits]
    truth = {
        "zero_shot/top-1": [(given == label).mean() for given in given_by],
        "zero_shot/balanced_accuracy": [balanced_accuracy_score(label, given) for given in given_by],
        "zero_shot/auroc": [roc_auc_score(label, chance, multi_class="ovr", average="macro") for chance in chances],
    }
    for name, (one, other) in truth.items():
        estimate, p = found[name]
        assert estimate.value == pytest.approx(other - one, abs=1e-6), name
        assert p is not None
        assert p < 0.05


def test_few_units_have_no_p() -> None:
    found = paired_differences(
        ranked(np.arange(1, 37), ["a", "b", "c"] * 12), ranked(np.ones(36), ["a", "b", "c"] * 12)
    )
    assert all(p is None and estimate.value > 0 for estimate, p in found.values())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (Outcomes(["x"], None, ranked(np.ones(1)).arrays), "galleries differ: 1 images are only in the one"),
        (Outcomes(["s0"], ["p"], ranked(np.ones(1)).arrays), "units differ"),
        (Outcomes(["s0"], None, {**ranked(np.ones(1)).arrays, "text/hash": np.array([9])}), "captions differ"),
    ],
)
def test_outcomes_of_other_queries_are_refused(changed: Outcomes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        paired_differences(ranked(np.ones(1)), changed)


def test_units_that_are_stored_otherwise_are_the_same() -> None:
    ranks = np.arange(1, 25)
    written: list[list[Any]] = [[float(n // 2) for n in range(24)], [str(n // 2) for n in range(24)]]
    one, other = (ranked(ranks, units) for units in written)
    assert paired_differences(one, other, bootstrap=50) == paired_differences(other, other, bootstrap=50)
    with pytest.raises(UserError, match="found a list, expected one value"):
        paired_differences(ranked(ranks, [["a"]] * 24), ranked(ranks, [["a"]] * 24))


def test_other_classes_leave_out_their_own_part_alone() -> None:
    ranks, classes = np.arange(1, 25), [np.arange(24) % 2, np.arange(24) % 3 % 2]
    both = [
        Outcomes(one.keys, None, {**one.arrays, "zero_shot/rank": np.ones(24), "zero_shot/label": label})
        for one, label in zip([ranked(ranks)] * 2, classes, strict=True)
    ]
    found = paired_differences(*both, bootstrap=50)
    assert "image_to_text/R@1" in found
    assert not any(name.startswith("zero_shot") for name in found)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(p: list[float], level: float) -> None:
    adjusted = holm(p)
    order, rejected = sorted(range(len(p)), key=lambda i: p[i]), set()
    for place, number in enumerate(order):
        if p[number] * (len(p) - place) > level:
            break
        rejected.add(number)
    assert {number for number, value in enumerate(adjusted) if value <= level} == rejected


BODY: dict[str, Any] = {
    **{way: {"gallery": 30} for way in ("image_to_text", "text_to_image")},
    **{"split_digest": "a", "data_digest": "d", "split": "test", "groups": "caption", "unit": None, "left_out": []},
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"data_digest": "e"}, None),  # the training split grew; what is scored is the same
        ({"split_digest": "b"}, "other data"),
        ({"split": "val"}, "other split"),
        ({"groups": "none"}, "other groups"),
        ({"unit": "patient"}, "other unit"),
        ({"left_out": [{"key": "x"}]}, "another gallery"),
        ({"image_to_text": {"gallery": 31}}, "another gallery"),
        ({"classification": {}}, "one ranks, the other classifies"),
    ],
)
def test_only_the_same_measurement_is_compared(change: dict[str, Any], why: str | None) -> None:
    found = why_not(BODY, {**BODY, **change})
    assert found is None if why is None else found is not None and found.startswith(why)


ZERO_SHOT = {"field": "label", "classes": {"0": {}}, "prompts": [["no"]], "templates": ["{}"], "top-1": {"value": 0.5}}
PARTS = {"zero_shot": ZERO_SHOT, "calibration": {"fitted_on": "val", "ece": {"value": 0.1}}}


@pytest.mark.parametrize("change", [{"field": "sex"}, {"templates": ["a {}"]}, {"prompts": [["none"]]}])
def test_other_classes_are_not_compared_nor_is_their_calibration(change: dict[str, Any]) -> None:
    bodies = [{**BODY, **PARTS}, {**BODY, **PARTS, "zero_shot": {**ZERO_SHOT, **change}}]
    runs = [Run(f"run{n}", Path(f"run{n}"), evaluations={"x": body}) for n, body in enumerate(bodies)]
    compared = compare_runs(runs)
    assert [name for name, _, _ in compared.refused] == ["x, zero_shot", "x, calibration"]
    assert all("run1" not in row for row in compared.measurements[0].scores.values())
    assert not compare_runs([runs[0], Run("same", Path("same"), evaluations=runs[0].evaluations)]).refused


def test_queries_are_the_same_by_content_and_size_not_by_path() -> None:
    part = {"kind": "image-image", "queries": 4, "gallery": 60}
    one = {"query_candidates": part, "data": "a/query.csv", "queries_digest": "1+2"}
    assert why_not(one, {**one, "data": "b/query.csv"}) is None
    assert why_not(one, {**one, "queries_digest": "1+3"}) == "other queries or candidates"
    assert why_not(one, {**one, "query_candidates": {**part, "gallery": 61}}) == "other queries or candidates"
    old = {name: value for name, value in one.items() if name != "queries_digest"}
    assert "run clipdist eval again" in str(why_not(old, old))


def test_damaged_runs_are_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "x.json").write_text(json.dumps(BODY))
    (tmp_path / "config.yaml").write_text("")
    assert read_run(tmp_path).config == {}
    (tmp_path / "environment.json").write_text("[]")
    with pytest.raises(UserError, match=r"environment\.json: found a list, expected names with values"):
        read_run(tmp_path)
    none = {**BODY, "image_to_text": {"R@1": {"value": 0.5}}}
    assert why_not(BODY, none) == "another gallery (30 and unknown)"
    runs = [Run(name, Path(name), evaluations={"x": none}) for name in ("a", "b")]
    assert "gallery" not in compare_runs(runs).measurements[0].about


def test_settings_that_differ() -> None:
    one = {"name": "a", "train": {"epochs": 3, "stages": [1]}, "model": {"width": 8}}
    other = {"name": "b", "train": {"epochs": 4, "stages": [1]}, "model": {"width": 8, "new": None}}
    assert differing([settings_of(one), settings_of(other)]) == {"train.epochs": ["3", "4"]}
    records = [[{"step": s, "data/digest": f"{s * d}"} for s in range(1, 5 + d)] for d in (1, 2)]
    assert common_order([records[0], records[0][:2], records[1], []])["order of samples"] == [
        *("to step 5", "the same samples to step 2", "others, by step 5", "no step in common")
    ]


def main(*words: str | Path, code: int = 0) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert cli.main([str(word) for word in words]) == code
    return output.getvalue()


@pytest.fixture(scope="module")
def two_runs(trained_run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The trained run, and one whose weights were shaken and whose recipe says another width, both evaluated."""
    folder = tmp_path_factory.mktemp("compared")
    runs = folder / "good", folder / "shaken"
    for run in runs:
        shutil.copytree(trained_run.folder, run, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    weights = runs[1] / "model" / "model.safetensors"
    generator = torch.manual_seed(0)
    shaken = {
        name: tensor * (1 + 0.3 * torch.randn(tensor.shape, generator=generator))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in load_file(weights).items()
    }
    save_file({name: tensor.contiguous() for name, tensor in shaken.items()}, weights)
    recipe = runs[1] / "config.yaml"
    recipe.write_text(recipe.read_text().replace("epochs: 4", "epochs: 9"))
    for run in runs:
        words: list[str | Path] = ["--workers", "0", "--bootstrap", "100", "--examples", "1", "--audit", "none"]
        main("eval", run / "model", "--data", trained_run.shapes, "--split", "train", "--zero-shot", "label", *words)
    main("eval", runs[0] / "model", "--data", trained_run.shapes, "--split", "val", *words)
    main("eval", runs[1] / "model", "--data", trained_run.shapes, "--split", "val", "--groups", "label", *words)
    return runs


def test_two_runs_side_by_side(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    text = main("compare", *two_runs, "--out", tmp_path / "page.html", "--bootstrap", "500")
    assert re.search(r"^image → text R@5 +0?\.\d+ \[.*\] +0?\.\d+ \[.*\] +[+−]0?\.\d+ \[.*\] +0?\.\d+ +\d", text, re.M)
    assert re.search(r"^zero shot top-1 .*\[.*\[.*\[", text, re.M)
    assert "gallery 168 texts, 168 images" in text
    assert "shapes-val, shaken: other groups (none and label)" in text
    assert re.search(r"^train\.epochs +4 +9$", text, re.M)
    assert re.search(r"the same samples to step \d+", text)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<figure") >= 5, "curves of training and validation"
    assert not re.search(r"(?:src|href|srcset)=\"(?!data:)", page), "nothing is fetched"
    body = json.loads(main("compare", *two_runs, "--json", "--bootstrap", "500"))
    (measured,) = body["evaluations"]
    by_name = {one["metric"]: one for one in measured["differences"]}
    for name, one in by_name.items():
        scores = measured["scores"][name]
        assert one["estimate"]["value"] == pytest.approx(scores["shaken"]["value"] - scores["good"]["value"], abs=1e-6)
        assert one["p"] <= one["adjusted"]
    assert {"image_to_text/R@1", "text_to_image/R@10", "zero_shot/top-1", "zero_shot/auroc"} <= by_name.keys()
    assert body["comparisons"] == len(by_name)


def test_a_run_beside_its_copy_does_not_differ(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(two_runs[0], tmp_path / "copy")
    body = json.loads(main("compare", two_runs[0], copy, "--json", "--bootstrap", "200"))
    assert body["settings"] == body["environment"] == {}
    for one in body["evaluations"]:
        assert "copy and good have the same weights" in one["notes"]
        assert all((d["estimate"]["value"], d["p"]) == (0, 1) for d in one["differences"])


def test_outcomes_that_do_not_belong_to_the_scores_are_told(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(two_runs[1], tmp_path / "copy")
    outcomes = copy / "evaluation" / "shapes-train.npz"
    outcomes.write_bytes(outcomes.read_bytes()[:-1])
    text = main("compare", two_runs[0], copy)
    assert "not the file that its evaluation wrote; run clipdist eval again" in text
    assert "comparisons with" not in text


def test_what_is_no_run_is_refused(
    two_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([two_runs[0], tmp_path], [two_runs[0], tmp_path / "none"], [two_runs[0]], [two_runs[0], two_runs[0]]):
        assert cli.main(["compare", *map(str, words)]) == 2
    said = capsys.readouterr().err
    assert "expected the folder of a run" in said
    assert "no such folder" in said
    assert said.count("expected two or more, each once") == 2


def test_a_curve_of_any_name_has_its_line_in_the_legend(tmp_path, monkeypatch):
    records = [{"step": step, "train/loss": 1.0} for step in range(3)]
    names = ["_base", "a$^$b"]
    seen = []
    monkeypatch.setattr(plots, "render", lambda figure, form: seen.append(figure) or b"")
    overlay([Run(name, tmp_path, records=records) for name in names], "train/loss", "loss")
    drawn = seen[0].axes[0].get_legend().get_texts()
    assert [text._preprocess_math(text.get_text()) for text in drawn] == [(" _base", False), ("a$^$b", False)]
