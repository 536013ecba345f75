"""Chest phantoms: pictures show what labels and reports say, and the layout is one that MIMIC-CXR's reader takes."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clipdist.errors import UserError
from clipdist.evaluate.candidates import read_queries
from clipdist.prepare.mimic_cxr import LABELS, CxrOptions, read_mimic_cxr
from clipdist.prepare.phantom_chest import QUERY_CLASSES, write_mimic_cxr_layout
from clipdist.prepare.phantom_chest_draw import draw_radiograph
from clipdist.prepare.phantom_chest_findings import ODDS, Study, invent_studies, study_with
from clipdist.prepare.phantom_chest_words import Report, query_sentences
from clipdist.prepare.radiology_reports import report_captions


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve patients; tests must not change it."""
    folder = tmp_path_factory.mktemp("chest") / "raw"
    return write_mimic_cxr_layout(folder, 12, side=64, per_class=8, quiet=True)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_equal_seeds_give_equal_bytes(layout: Path, tmp_path: Path) -> None:
    again = write_mimic_cxr_layout(tmp_path / "again", 12, side=64, per_class=8, quiet=True)
    assert files(again) == files(layout)
    other = write_mimic_cxr_layout(tmp_path / "other", 12, side=64, seed=1, per_class=8, quiet=True)
    assert not set(files(other)) & {name for name in files(layout) if name.startswith("files/")}
    with pytest.raises(UserError, match="is there already"):
        write_mimic_cxr_layout(layout, 12)
    with pytest.raises(UserError, match="patients=2"):
        write_mimic_cxr_layout(tmp_path / "few", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_the_reader_takes_all_of_it(layout: Path) -> None:
    found = read_mimic_cxr(layout, CxrOptions(views=()))
    assert found.rejected == []
    assert len(found.pairs) == len(list((layout / "files").rglob("*.jpg")))
    assert set(found.by_split()) == {"train", "validate", "test"}
    splits: dict[str, set[str]] = {}
    for name, pairs in found.by_split().items():
        for pair in pairs:
            splits.setdefault(pair.fields["unit"], set()).add(name)
    assert len(splits) == 12
    assert all(len(names) == 1 for names in splits.values())
    assert {pair.fields["view"] for pair in found.pairs} == {"PA", "AP", "LATERAL"}
    assert read_mimic_cxr(layout, CxrOptions(labels="negbio")).pairs == read_mimic_cxr(layout).pairs
    assert "SYNTHETIC" in (layout / "README.txt").read_text()


def test_queries_and_candidates(layout: Path) -> None:
    for kind, each in (("image", 10), ("text", None)):
        folder = layout / "retrieval" / f"{kind}-retrieval"
        found = read_queries(folder / "query.csv", folder / "candidate.csv", layout)
        assert (found.kind, found.classes, found.shared) == (kind, sorted(QUERY_CLASSES), 0)
        assert found.has_GC.sum(axis=0).tolist() == [8] * 8
        assert found.has_GC.sum(axis=1).tolist() == [1] * 64
        counts = np.bincount(found.class_Q).tolist()
        assert counts == [each] * 8 if each else all(4 <= count <= 5 for count in counts)
    assert list(pd.read_csv(folder / "candidate.csv").columns) == ["Path", *LABELS]


def drawn(label: str, seed: int, **changes: object) -> tuple[Study, np.ndarray]:
    """A study that shows a finding, and how its picture differs from that of the same chest without it."""
    study = study_with(label, np.random.default_rng([7, seed]))
    study = replace(study, view="PA", findings=tuple(replace(one, **changes) for one in study.findings))  # type: ignore[arg-type]
    bare = replace(study, findings=())
    with_it, without = (draw_radiograph(one, "PA", 96, [seed]).astype(int) for one in (study, bare))
    return study, with_it - without


@pytest.mark.parametrize("label", list(ODDS))
def test_every_finding_shows(label: str) -> None:
    for seed in range(4):
        _, difference = drawn(label, seed)
        assert (np.abs(difference) > 12).sum() > 12, f"{label}: a dozen pixels at least"


@pytest.mark.parametrize(
    "label", ["Pleural Effusion", "Pneumonia", "Atelectasis", "Lung Lesion", "Pneumothorax", "Fracture"]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_shows_on_its_side(label: str, side: str) -> None:
    _, difference = drawn(label, 3, side=side)
    amount = np.where(np.abs(difference) > 12, np.abs(difference), 0).sum(axis=0)
    halves = {"right": amount[:48].sum(), "left": amount[48:].sum()}  # the patient's right is at the picture's left
    other = {"left": "right", "right": "left"}[side]
    assert halves[side] > 5 * halves[other]


def test_it_shows_at_its_size_and_height() -> None:
    sizes = [(np.abs(drawn("Pleural Effusion", 1, size=size)[1]) > 12).sum() for size in ("small", "moderate", "large")]
    assert sizes == sorted(sizes)
    hearts = [(drawn("Cardiomegaly", 1, grade=grade)[1] > 12).sum() for grade in ("mild", "moderate", "severe")]
    assert hearts == sorted(hearts)
    rows = np.arange(96)[:, None]
    middles = []
    for zone in ("upper", "mid", "lower"):
        amount = drawn("Lung Lesion", 1, zone=zone, side="left", centimetres=2.0)[1].clip(12) - 12
        middles.append(float((amount * rows).sum() / amount.sum()))
    assert middles == sorted(middles)
    assert (drawn("Pneumothorax", 1, side="left")[1] < -12).sum() > 100, "air is dark"


def test_reports_say_what_is_drawn() -> None:
    kinds = set()
    for seed in range(150):
        rng = np.random.default_rng([9, seed])
        for study in invent_studies(rng):
            report = Report(study, rng)
            certain = {one.label for one in study.findings if one.certain}
            for label in ODDS:
                assert (report.labels.get(label) == 1) == (label in certain or label == "Support Devices" in [
                    one.label for one in study.findings
                ]), (label, study)  # fmt: skip
            doubted = {one.label for one in study.findings if not one.certain} - {"Support Devices"}
            assert {label for label, value in report.labels.items() if value == -1} == doubted
            assert (report.labels.get("No Finding") == 1) == (not certain - {"Support Devices"})
            assert set(report.labels) <= set(LABELS)
            captions = report_captions(report.text)
            kinds.add(tuple(captions))
            words = " ".join(captions.values())
            assert not re.search(r"[{}]|__", words)
            for one in study.findings:
                if (
                    one.certain
                    and one.label == "Pleural Effusion"
                    and one.side != "bilateral"
                    and "findings" in captions
                ):
                    assert f"{one.side}" in words
    assert kinds == {("findings", "impression"), ("findings",), ("impression",), ("last_paragraph",)}


@pytest.mark.parametrize("label", QUERY_CLASSES)
def test_sentences_to_ask_with(label: str) -> None:
    found = query_sentences(label, np.random.default_rng(0), 5)
    assert len(set(found)) == len(found) >= 4
    assert all(sentence[0].isupper() and sentence.endswith(".") and "{" not in sentence for sentence in found)
