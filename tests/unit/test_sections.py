"""What the report shows of an evaluation: figures of each part, tables, hostile names, parts that are damaged."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from clipdist.evaluate.calibration import calibration_scores
from clipdist.evaluate.candidates import query_scores
from clipdist.evaluate.classification import classification_scores
from clipdist.evaluate.pools import in_batch_scores, pool_scores
from clipdist.evaluate.probe import probe_scores
from clipdist.evaluate.report import write_report
from clipdist.evaluate.retrieval import retrieval_scores
from clipdist.evaluate.sections import FIGURES, sections
from clipdist.evaluate.subgroups import subgroup_scores

ATTACK = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def body() -> dict[str, Any]:
    """All parts of an evaluation, as JSON; a class and a value of the field have a hostile name."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(120, 8))
    text, label = image + rng.normal(size=image.shape), np.arange(120) % 3
    classes = ["nevus", "melanoma", ATTACK]
    retrieval = retrieval_scores(image, text, np.arange(120), group_N=label, precision=True, bootstrap=20)
    logits = rng.normal(size=(120, 3)) + np.eye(3)[label]
    shot = classification_scores(logits, label, classes, bootstrap=20)
    calibration = {key: calibration_scores(logits, label, bootstrap=20).to_dict() for key in ("as_trained", "scaled")}
    probes = probe_scores(image, label, image, label, classes, fractions=[0.1, 1.0], bootstrap=20)
    sex = [("f", "m", ATTACK)[n // 40] for n in range(120)]
    measured = {**retrieval.measured(np.arange(120)), "zero_shot": shot.measured}
    texts = [f"text {n}" for n in range(120)]
    found = {
        **retrieval.to_dict(),
        "in_batch": in_batch_scores(image, text, np.arange(120), batch=16, scale=9.0, bootstrap=20).to_dict(),
        "pool": pool_scores(image, text, np.arange(120), texts, pool=20, bootstrap=20).to_dict(),
        "zero_shot": {
            **shot.to_dict(),
            **{"field": "label", "prompts": [[c] for c in classes], "templates": ["a {}"], "left_out": {"no label": 3}},
        },
        "calibration": {**calibration, "fitted_on": "val", "divided_by": 1.3, "temperature": 0.1, "at_bound": False},
        "probe": {
            **{"fields": ["label"], "classes": classes, "metric": "accuracy", "fitted_on": "train", "left_out": {}},
            **{"features": "tower", "scores": [one.to_dict() for one in probes]},
        },
        "query_candidates": query_scores(
            image[:9], label[:9], image[9:], np.eye(3)[label[9:]], classes, bootstrap=20
        ).to_dict(),
        "subgroups": [subgroup_scores(measured, sex, field="sex", bootstrap=20).to_dict()],
    }
    return json.loads(json.dumps(found, allow_nan=False))


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_in_both_formats_and_none_without_data(name: str, body: dict[str, Any]) -> None:
    _, draw = FIGURES[name]
    assert ElementTree.fromstring(draw(body)).tag.endswith("svg")
    assert draw(body) == draw(body)
    assert draw(body, form="png").startswith(b"\x89PNG")
    assert draw({}) is None


def test_sections_come_in_order_and_every_row_fills_its_head(body: dict[str, Any]) -> None:
    found = list(sections(body))
    titles = [one.title.split(" by")[0] for one in found]
    assert titles == [
        *("Several right answers", "In batches of 16", "One image against 20 captions", "Zero-shot classification"),
        *("Each class", "Calibration", "Probes", "Queries against 111 candidates, image → image", "By sex"),
    ]
    for one in found:
        assert all(len(row) == len(one.head) for row in one.rows), one.title
    assert list(sections({})) == []


def test_hostile_names_stay_text(body: dict[str, Any], tmp_path: Path) -> None:
    page = write_report(tmp_path, scores=body).read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r"<img src=x", page)
    assert page.count("alert(1)") >= 4


def test_a_part_that_is_damaged_is_named_and_the_rest_is_shown(body: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    damaged = {"query_candidates": {"P@5": 3}, "data": "query.csv"}
    (tmp_path / "evaluation" / "queries.json").write_text(json.dumps(damaged))
    (tmp_path / "evaluation" / "whole.json").write_text(json.dumps({"query_candidates": body["query_candidates"]}))
    page = write_report(tmp_path, scores=body).read_text(encoding="utf-8")
    assert "query.csv: a part of this evaluation is not as `clipdist eval` writes it" in page
    assert "Evaluation: queries" in page, "the JSON can still be read"
    assert page.count("<h2>Queries against 111 candidates") == 2
    assert "Evaluation: whole" not in page


def test_with_many_classes_there_is_no_matrix_to_look_at() -> None:
    rng = np.random.default_rng(0)
    scores = classification_scores(
        rng.normal(size=(90, 30)), np.arange(90) % 30, list(map(str, range(30))), bootstrap=0
    )
    assert FIGURES["confusion"][1]({"zero_shot": scores.to_dict()}) is None
