"""MIMIC-CXR's layout: tables, pictures, reports in files or in the archive; what is damaged; the recipe."""

import csv
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from clipdist.data.sets.pack import Rejected
from clipdist.data.shards import ShardSet, checksum_file
from clipdist.errors import UserError
from clipdist.evaluate.probe import label_matrix
from clipdist.prepare.mimic_cxr import LABELS, CxrOptions, CxrPairs, open_reports, read_mimic_cxr, told
from clipdist.prepare.phantom_chest import write_mimic_cxr_layout
from tests.unit.pictures import encoded, picture

ROOT = Path(__file__).parents[2]
TABLES = {kind: f"mimic-cxr-2.0.0-{kind}.csv.gz" for kind in ("metadata", "split", "chexpert", "negbio")}
SPLITS = ("train", "train", "train", "train", "validate", "test")


def name(subject: int, study: int, view: int) -> tuple[str, str, str]:
    return f"{10000000 + subject}", f"{50000000 + 10 * subject + study}", f"{subject:04x}{study:02x}-{view:08x}"


def report(subject: int, study: int) -> str:
    return (
        f" FINAL REPORT\n INDICATION: ___\n \n FINDINGS:\n \n The heart is of size {subject}. No effusion is\n seen.\n"
        f" \n IMPRESSION:\n \n Normal chest number {study}.\n"
    )


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Six patients with two studies each, a frontal and a lateral view of each study: 12 frontal pictures."""
    return write_layout(tmp_path / "raw")


def write_layout(folder: Path) -> Path:
    metadata, split, labels = [], [], []
    for subject in range(6):
        for study in range(2):
            values = [1.0, 0.0, -1.0, None, *[None] * 10]
            labels.append([*name(subject, study, 0)[:2], *values])
            for view, position in enumerate(["PA" if study else "AP", "LATERAL"]):
                patient, number, dicom = name(subject, study, view)
                metadata.append([dicom, patient, number, "CHEST", position, 2500])
                split.append([dicom, number, patient, SPLITS[subject]])
                image = folder / f"files/p10/p{patient}/s{number}/{dicom}.jpg"
                image.parent.mkdir(parents=True, exist_ok=True)
                image.write_bytes(encoded(picture(subject * 4 + study * 2 + view, (60, 50), "L"), "JPEG"))
            (image.parent.parent / f"s{number}.txt").write_text(report(subject, study), encoding="utf-8")
    columns = {
        "metadata": ["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows"],
        "split": ["dicom_id", "study_id", "subject_id", "split"],
        "chexpert": ["subject_id", "study_id", *LABELS],
    }
    for kind, rows in (("metadata", metadata), ("split", split), ("chexpert", labels)):
        pd.DataFrame(rows, columns=columns[kind]).to_csv(folder / TABLES[kind], index=False)
    shutil.copy(folder / TABLES["chexpert"], folder / TABLES["negbio"])
    return folder


def change(raw: Path, kind: str, **columns: Any) -> None:
    """Columns of a table become other ones; `None` drops one, a dictionary sets cells by row."""
    table = pd.read_csv(raw / TABLES[kind], dtype=str)
    for column, value in columns.items():
        if value is None:
            table = table.drop(columns=column)
        else:
            table.loc[list(value), column] = list(value.values())
    table.to_csv(raw / TABLES[kind], index=False)


def image_of(raw: Path, subject: int, study: int, view: int = 0) -> Path:
    patient, number, dicom = name(subject, study, view)
    return raw / f"files/p10/p{patient}/s{number}/{dicom}.jpg"


def report_of(raw: Path, subject: int, study: int) -> Path:
    folder = image_of(raw, subject, study).parent
    return folder.with_name(folder.name + ".txt")


def reasons(found: CxrPairs) -> dict[str, str]:
    return {one.key.rpartition("/")[2]: one.reason for one in found.rejected}


def test_frontal_views_in_the_published_splits(raw: Path) -> None:
    found = read_mimic_cxr(raw)
    assert found.rejected == []
    assert [pair.row for pair in found.pairs] == [*range(1, 25, 2)]
    assert {name: len(pairs) for name, pairs in found.by_split().items()} == {"train": 8, "validate": 2, "test": 2}
    assert list(found.by_split()) == ["train", "validate", "test"]
    pair = found.pairs[1]
    assert pair.key == "p10/p10000000/s50000001/000001-00000000"
    assert pair.image == image_of(raw, 0, 1)
    assert pair.text == ["The heart is of size 0. No effusion is seen.", "Normal chest number 1."]
    assert pair.fields == {
        "unit": "10000000",
        "study": "50000001",
        "view": "PA",
        "sections": ["findings", "impression"],
        "Atelectasis": 1,
        "Cardiomegaly": 0,
        "Consolidation": -1,
    }
    matrix = label_matrix([pair.fields for pair in found.pairs], ["Atelectasis", "Cardiomegaly"])
    assert matrix[0].tolist() == [1.0, 0.0]
    assert found.notes["left_out"] == {"view LATERAL": 12}
    assert found.notes["captions"] == {"findings": 12, "impression": 12}
    assert found.sources == {TABLES[kind]: checksum_file(raw / TABLES[kind]) for kind in list(TABLES)[:3]}
    assert told(found) == (
        "mimic-cxr-2.0.0-metadata.csv.gz: 12 pictures of 12 studies; 12 with findings, 12 with impression; "
        "left out: 12 of view LATERAL"
    )


def test_other_views_labels_and_sections(raw: Path) -> None:
    change(raw, "metadata", ViewPosition={3: None})
    everything = read_mimic_cxr(raw, CxrOptions(views=(), labels="none", sections=("impression",)))
    assert len(everything.pairs) == 24
    assert everything.pairs[0].text == ["Normal chest number 0."]
    assert everything.pairs[3].fields == {
        "unit": "10000000",
        "study": "50000001",
        "view": "unknown",
        "sections": ["impression"],
    }
    assert len(read_mimic_cxr(raw, CxrOptions(views=("LATERAL",), labels="negbio")).pairs) == 11
    unnamed = read_mimic_cxr(raw, CxrOptions(views=("unknown",)))
    assert [pair.fields["view"] for pair in unnamed.pairs] == ["unknown"]
    assert "view unknown" not in unnamed.notes["left_out"]
    assert len(read_mimic_cxr(raw, CxrOptions(views=("LATERAL", "unknown"))).pairs) == 12
    with pytest.raises(UserError, match=r"no picture of the views pa; found LATERAL \(11\), .*--views"):
        read_mimic_cxr(raw, CxrOptions(views=("pa",)))


def test_reports_in_an_archive_or_a_folder_of_their_own(raw: Path, tmp_path: Path) -> None:
    beside = read_mimic_cxr(raw)
    with zipfile.ZipFile(tmp_path / "reports.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(raw.rglob("s*.txt")):
            archive.write(path, f"mimic-cxr-reports/{path.relative_to(raw)}")
            moved = tmp_path / "apart" / path.relative_to(raw / "files")
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.rename(moved)
    assert set(reasons(read_mimic_cxr(raw)).values()) == {"missing report"}
    for source in (tmp_path / "reports.zip", tmp_path / "apart"):
        assert read_mimic_cxr(raw, reports=source).pairs == beside.pairs
    (raw / "mimic-cxr-reports.zip").symlink_to(tmp_path / "reports.zip")
    assert read_mimic_cxr(raw).pairs == beside.pairs

    data = bytearray((tmp_path / "reports.zip").read_bytes())
    data[60:90] = bytes(30)  # within the first report
    (tmp_path / "reports.zip").write_bytes(data)
    assert {one.reason.split(":")[0] for one in read_mimic_cxr(raw).rejected} == {"damaged report"}
    (tmp_path / "reports.zip").write_bytes(data[:500])
    with pytest.raises(UserError, match="unreadable archive"):
        read_mimic_cxr(raw)
    with zipfile.ZipFile(tmp_path / "reports.zip", "w") as archive:
        archive.writestr("other/readme.md", "nothing")
    with pytest.raises(UserError, match="no reports in it"):
        read_mimic_cxr(raw)
    for name_, message in (("none.zip", "no such archive"), ("none", "no such folder")):
        with pytest.raises(UserError, match=message):
            open_reports(tmp_path / name_)


def test_pictures_elsewhere(raw: Path, tmp_path: Path) -> None:
    expected = read_mimic_cxr(raw)
    shutil.copytree(raw / "files", tmp_path / "jpg" / "files")
    for path in (raw / "files").rglob("*.jpg"):
        path.unlink()
    assert set(reasons(read_mimic_cxr(raw)).values()) == {"missing image file, neither .jpg nor .dcm nor .png"}
    for images in (tmp_path / "jpg", tmp_path / "jpg" / "files"):
        found = read_mimic_cxr(raw, images=images)
        assert [(pair.key, pair.text) for pair in found.pairs] == [(pair.key, pair.text) for pair in expected.pairs]


def test_what_is_missing_is_named_and_the_rest_goes_on(raw: Path) -> None:
    image_of(raw, 0, 0).unlink()
    report_of(raw, 1, 0).unlink()
    report_of(raw, 1, 1).write_text(" FINAL REPORT\n HISTORY: Cough.\n")
    report_of(raw, 2, 0).write_text(" FINAL REPORT\n HISTORY: Cough.\n \n The lungs are clear.\n")
    report_of(raw, 2, 1).write_bytes(b"x" * (1 << 20) + b"x")
    change(raw, "split", split={12: None}, study_id={14: "50999999"}, subject_id={16: "10999999"})
    found = read_mimic_cxr(raw)
    dicom = {f"{subject} {study}": name(subject, study, 0)[2] for subject in range(6) for study in range(2)}
    assert reasons(found) == {
        dicom["0 0"]: "missing image file, neither .jpg nor .dcm nor .png",
        dicom["1 0"]: "missing report",
        dicom["1 1"]: "no findings or impression in the report",
        dicom["2 1"]: "s50000021.txt: more than 1048576 bytes, which is no report",
        dicom["3 0"]: "no split: the split table does not name this picture",
        dicom["3 1"]: "the split table has it in study 50999999 of patient 10000003",
        dicom["4 0"]: "the split table has it in study 50000040 of patient 10999999",
    }
    place = image_of(raw, 0, 0).with_suffix("")
    assert found.rejected[0] == Rejected(
        1, f"p10/p10000000/s50000000/{place.name}", str(place), reasons(found)[place.name]
    )
    assert len(found.pairs) == 5
    assert found.notes["captions"]["last_paragraph"] == 1
    assert "1 pictures have reports with neither findings nor impression" in told(found)


@pytest.mark.parametrize(
    ("kind", "column"),
    [("metadata", "ViewPosition"), ("metadata", "dicom_id"), ("split", "split"), ("chexpert", "Pleural Effusion")],
)
def test_a_missing_column_is_one_line(raw: Path, kind: str, column: str) -> None:
    change(raw, kind, **{column: None})
    with pytest.raises(UserError, match=f"{TABLES[kind]}: no column '{column}'") as caught:
        read_mimic_cxr(raw)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("metadata", {"subject_id": {2: "p10"}}, "row 3: found the subject_id 'p10'"),
        ("metadata", {"dicom_id": {0: "../../etc"}}, "row 1: found the dicom_id '../../etc'"),
        ("metadata", {"dicom_id": {2: name(0, 0, 0)[2]}}, "000000-00000000 is there twice"),
        ("chexpert", {"Edema": {4: "yes"}}, "row 5: found Edema 'yes', expected 1.0, 0.0, -1.0 or nothing"),
        (
            "split",
            {"dicom_id": {row: f"other{row}" for row in range(24)}},
            "names none of the pictures of the metadata",
        ),
    ],
)
def test_tables_that_make_no_sense(raw: Path, kind: str, columns: dict[str, Any], message: str) -> None:
    change(raw, kind, **columns)
    with pytest.raises(UserError, match=message):
        read_mimic_cxr(raw)


def test_which_tables(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        read_mimic_cxr(tmp_path / "none")
    (raw / TABLES["chexpert"]).rename(raw / "labels.csv.gz")
    with pytest.raises(UserError, match=r"expected one mimic-cxr-2.0.0-chexpert.csv.gz; --labels none does without"):
        read_mimic_cxr(raw)
    assert read_mimic_cxr(raw, CxrOptions(labels="none")).notes["without_labels"] is None
    shutil.copy(raw / TABLES["split"], raw / "mimic-cxr-2.1.0-split.csv.gz")
    with pytest.raises(UserError, match=r"found mimic-cxr-2.0.0-split.csv.gz, mimic-cxr-2.1.0-split"):
        read_mimic_cxr(raw, CxrOptions(labels="none"))
    (raw / TABLES["split"]).unlink()
    with pytest.raises(UserError, match=r"several versions \(metadata 2.0.0, split 2.1.0\)"):
        read_mimic_cxr(raw, CxrOptions(labels="none"))
    (raw / "mimic-cxr-2.1.0-split.csv.gz").unlink()
    with pytest.raises(UserError, match=r"--split train=0.8 val=0.2 makes a new one"):
        read_mimic_cxr(raw, CxrOptions(labels="none"))
    found = read_mimic_cxr(raw, CxrOptions(labels="none", published_split=False))
    assert len(found.pairs) == 12
    (raw / TABLES["metadata"]).unlink()
    pd.DataFrame({"subject_id": ["10000000.0"]}).to_csv(raw / "mimic-cxr-2.0.0-metadata.csv", index=False)
    with pytest.raises(UserError, match="no column 'dicom_id'"):
        read_mimic_cxr(raw, CxrOptions(labels="none", published_split=False))


def recipe(*arguments: object) -> None:
    runpy.run_path(str(ROOT / "shards" / "mimic_cxr.py"))["main"]([str(argument) for argument in arguments])


def test_the_recipe_packs_and_says_what_it_chose(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(raw, "--out", tmp_path / "out", "--workers", 0, "--side", 40)
    printed = capsys.readouterr().out
    assert "12 pictures of 12 studies" in printed
    assert printed.splitlines()[-1] == "rejected: none of 12"
    packed = ShardSet.open(tmp_path / "out")
    assert {name: len(packed.split(name)) for name in packed.manifest.splits} == {"train": 8, "validate": 2, "test": 2}
    sample = packed.split("test").read(0)
    assert sample.extension == "jpg"
    assert sample.texts == ["The heart is of size 5. No effusion is seen.", f"Normal chest number {sample.key[22]}."]
    assert sample.fields["unit"] == "10000005"
    assert packed.manifest.notes["split"] == "published"
    assert "PhysioNet" in packed.manifest.license

    recipe(raw, "--out", tmp_path / "new", "--workers", 0, "--split", "train=0.5", "val=0.5", "--views", "all")
    packed = ShardSet.open(tmp_path / "new")
    units = {n: {packed.split(n).read(k).fields["unit"] for k in range(len(packed.split(n)))} for n in ("train", "val")}
    assert len(units["train"]) == len(units["val"]) == 3
    assert not units["train"] & units["val"]


def test_the_recipe_asks_the_folder_whether_its_patients_are_invented(raw: Path, tmp_path: Path) -> None:
    write_mimic_cxr_layout(tmp_path / "drawn", 4, side=32, per_class=1, quiet=True)
    for folder, drawn, more in ((tmp_path / "drawn", True, []), (raw, False, ["--phantom", 4])):
        recipe(folder, "--out", tmp_path / f"out-{drawn}", "--workers", 0, "--split", "train=0.5", "val=0.5", *more)
        manifest = ShardSet.open(tmp_path / f"out-{drawn}").manifest
        assert manifest.notes["mimic_cxr"]["synthetic"] is drawn
        assert ("PhysioNet" in manifest.license, "Synthetic" in manifest.license) == (not drawn, drawn)


def test_damaged_pictures_are_listed(raw: Path, tmp_path: Path) -> None:
    path = image_of(raw, 0, 0)
    path.write_bytes(path.read_bytes()[:-200])
    image_of(raw, 0, 1).write_bytes(b"")
    report_of(raw, 1, 0).unlink()
    with pytest.raises(UserError, match=r"above the limit of 5.00%: row 5 .*missing report"):
        recipe(raw, "--out", tmp_path / "out", "--workers", 0)
    recipe(raw, "--out", tmp_path / "out", "--workers", 0, "--max-rejected", 0.5)
    rows = list(csv.DictReader((tmp_path / "out" / "rejected.csv").open(encoding="utf-8")))
    assert [(row["row"], row["reason"].split(":")[0]) for row in rows] == [
        ("1", "unreadable image"),
        ("3", "empty file"),
        ("5", "missing report"),
    ]


def test_pictures_in_dicom(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydicom", reason="pydicom (extra: radiology) is not installed")
    from tests.unit.dicoms import dicom_bytes, ramp

    for path in (raw / "files").rglob("*.jpg"):
        path.with_suffix(".dcm").write_bytes(dicom_bytes(ramp(80, 60), kind="MONOCHROME1"))
        path.unlink()
    broken = image_of(raw, 0, 0).with_suffix(".dcm")
    broken.write_bytes(dicom_bytes(ramp(), PixelData=None))
    recipe(raw, "--out", tmp_path / "out", "--side", 32, "--workers", 0, "--max-rejected", 0.2)
    packed = ShardSet.open(tmp_path / "out")
    assert len(packed.split("train")) == 7
    assert packed.split("train").read(0).extension == "jpg"
    rows = list(csv.DictReader((tmp_path / "out" / "rejected.csv").open(encoding="utf-8")))
    assert [(row["row"], row["image"], row["reason"]) for row in rows] == [("1", str(broken), "DICOM without pixels")]
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"clipdist\[radiology\]"):
        read_mimic_cxr(raw)


def test_run_as_a_script_it_ends_with_one_line_and_code_2(raw: Path) -> None:
    change(raw, "split", split=None)
    command = [sys.executable, str(ROOT / "shards/mimic_cxr.py"), str(raw), "--out", str(raw / "out")]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("clipdist: error: ")
    assert failed.stderr.count("\n") == 1
