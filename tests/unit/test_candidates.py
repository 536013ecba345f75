"""Queries against labelled candidates, in the columns that ConVIRT published, against plain loops in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.cli import main
from clipdist.errors import UserError
from clipdist.evaluate.candidates import query_scores, read_queries

CLASSES = ["Atelectasis", "Edema", "No Finding"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10), st.integers(6, 40))
def test_agrees_with_loops(seed, Q, G):
    rng = np.random.default_rng(seed)
    query, candidate = rng.normal(size=(Q, 6)), rng.normal(size=(G, 6))
    asked, has = rng.integers(3, size=Q), rng.random((G, 3)) < 0.4
    has[0] = True
    found = query_scores(query, asked, candidate, has, CLASSES, ks=(1, 5), bootstrap=0)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, candidate)]
    cosine = unit[0] @ unit[1].T
    for k in (1, 5):
        each = [has[np.argsort(-row)[:k], c].mean() for row, c in zip(cosine, asked, strict=True)]
        assert found.precision[k].value == pytest.approx(np.mean(each))
        for c in np.unique(asked):
            of_class = np.mean([value for value, one in zip(each, asked, strict=True) if one == c])
            assert found.classes[CLASSES[c]][f"P@{k}"]["value"] == pytest.approx(of_class)
    assert found.chance == pytest.approx(has.mean(axis=0)[asked].mean())


def test_a_random_order_scores_at_chance_and_a_constant_one_below():
    rng = np.random.default_rng(0)
    has = np.repeat(np.eye(8, dtype=bool), 200, axis=0)
    asked = np.repeat(np.arange(8), 10)
    names = [f"c{n}" for n in range(8)]
    found = query_scores(rng.normal(size=(80, 32)), asked, rng.normal(size=(1600, 32)), has, names, bootstrap=300)
    assert found.chance == 0.125, "as ConVIRT's table has it for 8 × 200"
    assert found.precision[50].value == pytest.approx(0.125, abs=0.02)
    assert found.precision[50].low < found.precision[50].value < found.precision[50].high
    assert (found.queries, found.candidates) == (80, 1600)
    constant = query_scores(np.ones((80, 5)), asked, np.ones((1600, 5)), has, names, bootstrap=0)
    assert constant.precision[50].value == 0
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.table().splitlines()[1].split()[:2] == ["80", "1,600"]


def write(folder: Path, *, kind: str = "image") -> tuple[Path, Path]:
    """The two files, and empty files where images would be."""
    (folder / "train").mkdir(parents=True)
    for name in ("q0", "q1", *(f"c{n}" for n in range(6))):
        (folder / "train" / f"{name}.jpg").touch()
    query = folder / "query.csv"
    rows = (
        ["Edema,train/q0.jpg", "No Finding,train/q1.jpg"]
        if kind == "image"
        else ["Edema,Edema is seen.", "No Finding,Clear."]
    )
    query.write_text("\n".join([f"Variable,{'Path' if kind == 'image' else 'Text'}", *rows]) + "\n")
    candidate = folder / "candidate.csv"
    labels = ["1.0,0.0", "1.0,", "-1.0,1.0", "0.0,1.0", ",1", ",0.0"]
    body = [f"train/c{n}.jpg,Male,{one}" for n, one in enumerate(labels)]
    candidate.write_text("\n".join(["Path,Sex,Edema,No Finding", *body]) + "\n")
    return query, candidate


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_published_columns_are_read(tmp_path, kind):
    query, candidate = write(tmp_path, kind=kind)
    found = read_queries(query, candidate, tmp_path)
    assert (found.kind, found.classes, found.class_Q.tolist()) == (kind, ["Edema", "No Finding"], [0, 1])
    assert found.has_GC.tolist() == [
        [True, False],
        [True, False],
        [False, True],
        [False, True],
        [False, True],
        [False] * 2,
    ]
    assert found.candidates[0] == tmp_path / "train" / "c0.jpg"
    assert found.items[0] == (tmp_path / "train" / "q0.jpg" if kind == "image" else "Edema is seen.")
    assert found.shared == 0


def test_images_that_are_both_query_and_candidate_are_counted(tmp_path):
    query, candidate = write(tmp_path)
    query.write_text("Variable,Path\nEdema,train/c0.jpg\n")
    assert read_queries(query, candidate, tmp_path).shared == 1


def test_damage_is_named(tmp_path):
    query, candidate = write(tmp_path)
    (tmp_path / "train" / "c3.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of the images .* are not there, such as .*c3\.jpg"):
        read_queries(query, candidate, tmp_path)
    query.write_text("Variable,Sentence\nEdema,x\n")
    with pytest.raises(UserError, match="no column 'Text'"):
        read_queries(query, candidate, tmp_path)
    query.write_text("Variable,Text\nFracture,x\n")
    with pytest.raises(UserError, match="no column 'Fracture'"):
        read_queries(query, candidate, tmp_path)
    arguments = (np.eye(3), [0, 1, 1], np.eye(3))
    with pytest.raises(UserError, match="no candidate has Edema"):
        query_scores(*arguments, np.array([[1, 0]] * 3), CLASSES[:2], ks=(1,))
    with pytest.raises(UserError, match="needs 50 candidates; found 3"):
        query_scores(*arguments, np.ones((3, 2)), CLASSES[:2])
    with pytest.raises(UserError, match="expected one class per query"):
        query_scores(*arguments, np.ones((2, 2)), CLASSES[:2], ks=(1,))


def test_queries_without_a_unit_are_units_of_their_own():
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(20, 4)), [0] * 20, rng.normal(size=(60, 4)), rng.random((60, 1)) > 0.5, ["a"])
    alone = query_scores(*data, bootstrap=50)
    assert alone.precision[5].low is not None
    assert query_scores(*data, units=[None] * 20, bootstrap=50).precision == alone.precision


def test_a_query_without_a_text_is_refused(tmp_path):
    (tmp_path / "query.csv").write_text("Variable,Text\nEdema,there is edema\nEdema,\n")
    (tmp_path / "candidate.csv").write_text("Path,Edema\na.jpg,1\n")
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="1 rows without a text, such as row 2"):
        read_queries(tmp_path / "query.csv", tmp_path / "candidate.csv", tmp_path)


def test_files_of_queries_whose_scores_would_replace_each_other_are_refused(tmp_path, capsys):
    images = ["--images", str(tmp_path)]
    same = [str(tmp_path / place / "image" / "query.csv") for place in ("a", "b")]
    for queries, candidates in ((same, ["c.csv"]), (same[:1] * 2, ["c.csv", "d.csv"])):
        call = ["eval", str(tmp_path / "model"), "--queries", *queries, "--candidates", *candidates, *images]
        assert main(call) == 2
        assert "image-query.json" in capsys.readouterr().err
