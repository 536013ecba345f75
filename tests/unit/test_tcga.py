"""TCGA's layout: manifests, barcodes, reports, patients as units; the recipe from raw files to a shard set."""

import csv
import runpy
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("openslide", reason="openslide-python (extra: pathology) is not installed")
pytest.importorskip("imagecodecs", reason="tifffile writes JPEG with it")

from clipdist.data.shards import ShardSet
from clipdist.errors import UserError
from clipdist.prepare.phantom_slides import write_tcga_layout
from clipdist.prepare.phantom_tissue import DIAGNOSES
from clipdist.prepare.tcga import (
    Barcode,
    ManifestRow,
    find_manifest,
    find_slides,
    read_diagnoses,
    read_manifest,
    with_diagnosis,
)
from clipdist.prepare.tile_stages import AttentionOptions, StainOptions, choose_tiles
from tests.unit.tissue import h_and_e, ihc

ROOT = Path(__file__).parents[2]
NAME = "TCGA-A1-A0SB-01Z-00-DX1.B34A5C6D-0E8F-4A1B-9C2D-3E4F5A6B7C8D.svs"
HEADER = "id\tfilename\tmd5\tsize\tstate\n"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients with two slides each; tests must not change it (`copied` makes another)."""
    folder = tmp_path_factory.mktemp("tcga") / "raw"
    write_tcga_layout(folder, 6, side=1536, slides_per_patient=2)
    return folder


@pytest.fixture
def copied(layout: Path, tmp_path: Path) -> Path:
    shutil.copytree(layout, tmp_path / "raw")
    return tmp_path / "raw"


def recipe(*arguments: object) -> None:
    runpy.run_path(str(ROOT / "shards" / "tcga.py"))["main"]([str(argument) for argument in arguments])


def test_barcodes() -> None:
    barcode = Barcode.parse(NAME)
    assert barcode == Barcode("TCGA-A1-A0SB", "01", "Z", "00", "DX1")
    assert (str(barcode), barcode.kind) == ("TCGA-A1-A0SB-01Z-00-DX1", "DX")
    assert Barcode.parse("TCGA-BH-A0B3-11A-03-TSC.svs").kind == "TS"
    for wrong in ("", "slide.svs", "TCGA-A1-A0SB.pdf", "TCGA-A1-A0SB-01Z-00.svs", "xTCGA-A1-A0SB-01Z-00-DX1.svs"):
        with pytest.raises(ValueError, match="no barcode of a slide"):
            Barcode.parse(wrong)


CODE = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=4, max_size=4)


@given(CODE, st.sampled_from(["DX1", "DX2", "TSA", "BS3"]), st.sampled_from(["", "A", "Z"]))
def test_a_barcode_that_is_written_is_read(patient: str, slide: str, vial: str) -> None:
    barcode = Barcode(f"TCGA-{patient[:2]}-{patient}", "01", vial, "00", slide)
    assert Barcode.parse(f"{barcode}.some-uuid.svs") == barcode
    assert str(barcode)[:12] == barcode.patient


def test_manifests(tmp_path: Path) -> None:
    path = tmp_path / "gdc_manifest.txt"
    path.write_text(f"\ufeff{HEADER}a-b\t{NAME}\t{'0' * 32}\t12\treleased\nc\tx.svs\t\t\tlive\n", encoding="utf-8")
    assert read_manifest(path) == [ManifestRow(1, "a-b", NAME, "0" * 32, 12), ManifestRow(2, "c", "x.svs", "", None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'id'"),
        ("id,filename,md5,size,state\n", "no column 'id'; found 'id,filename,md5,size,state', expected"),
        ("id\tfilename\tmd5\tsize\n", "no column 'state'"),
        (HEADER, "the manifest has no lines"),
        (HEADER + "a\t\t\t1\tlive\n", "row 1: found the file name ''"),
        (HEADER + "a\t../x.svs\t\t1\tlive\n", r"row 1: found the file name '../x.svs', expected a bare name"),
        (HEADER + "../a\tx.svs\t\t1\tlive\n", "row 1"),
        (HEADER + "a\tx.svs\t\tmany\tlive\n", "row 1: found size 'many' and md5 ''"),
        (HEADER + "a\tx.svs\tabc\t1\tlive\n", "row 1: found size '1' and md5 'abc'"),
        (HEADER + "a\tx.svs\t\t²\tlive\n", "row 1: found size '²' and md5 ''"),
        (HEADER + "a\tx.svs\t\t١\tlive\n", "row 1: found size '١' and md5 ''"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "manifest.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_manifest(path)


def test_quotes_in_a_manifest_are_letters(tmp_path: Path) -> None:
    path = tmp_path / "manifest.txt"
    path.write_text(HEADER + 'a\t"x.svs\t\t1\tlive\nb\ty".svs\t\t2\tlive\n')
    assert [(row.filename, row.size) for row in read_manifest(path)] == [('"x.svs', 1), ('y".svs', 2)]


def test_a_manifest_is_found_when_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found none, expected one gdc_manifest\*.txt; name it with --manifest"):
        find_manifest(tmp_path)
    (tmp_path / "gdc_manifest.2026-01-01.txt").touch()
    assert find_manifest(tmp_path).name == "gdc_manifest.2026-01-01.txt"
    (tmp_path / "gdc_manifest.2026-01-02.txt").touch()
    with pytest.raises(
        UserError, match=r"found gdc_manifest.2026-01-01.txt, gdc_manifest.2026-01-02.txt, expected one"
    ):
        find_manifest(tmp_path)


def test_each_line_of_a_manifest_is_found_rejected_or_left_out(tmp_path: Path) -> None:
    def row(number: int, name: str, size: int | None = 4, id: str = "u") -> ManifestRow:
        return ManifestRow(number, id, name, "", size)

    def slide(patient: str, rest: str = "01Z-00-DX1.svs") -> str:
        return f"TCGA-A1-{patient}-{rest}"

    for path in (
        tmp_path / "u" / slide("0001"),
        tmp_path / slide("0002"),
        tmp_path / "u" / slide("0003"),
        tmp_path / "v" / slide("0001", "01Z-00-DX1.other.svs"),
        tmp_path / "u" / "slide.svs",
        tmp_path / "u" / f"{slide('0005')}.partial",
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"four")
    rows = [
        row(1, slide("0001")),
        row(2, slide("0002"), size=None),
        row(3, slide("0003"), size=5),
        row(4, slide("0001", "01Z-00-DX1.other.svs"), id="v"),
        row(5, slide("0004")),
        row(6, slide("0005")),
        row(7, "slide.svs"),
        row(8, slide("0006", "01A-01-TSA.svs")),
        row(9, "report.PDF"),
    ]
    found = find_slides(rows, tmp_path)
    assert {name: file.path.name for name, file in found.slides.items()} == {
        "TCGA-A1-0001-01Z-00-DX1": slide("0001"),
        "TCGA-A1-0002-01Z-00-DX1": slide("0002"),
    }
    assert {one.row: one.reason.split(",")[0] for one in found.rejected} == {
        3: "4 bytes",
        4: "another file of the slide TCGA-A1-0001-01Z-00-DX1",
        5: "missing file",
        6: "still being fetched: there is a .partial",
        7: "no barcode of a slide in 'slide.svs'",
    }
    assert found.left_out == {"TS slides": 1, "no .svs": 1}
    assert found.patients == {"TCGA-A1-0001", "TCGA-A1-0002"}
    with pytest.raises(UserError, match="there is no such folder"):
        find_slides(rows, tmp_path / "none")


def test_reports_by_patient(tmp_path: Path) -> None:
    telling = "FINAL DIAGNOSIS: Invasive ductal carcinoma."
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "TCGA-A1-0001.uuid.txt").write_text(telling)
    (tmp_path / "TCGA-A1-0001.second.txt").write_text("DIAGNOSIS: Ductal carcinoma in situ.\n")
    (tmp_path / "tcga-a1-0002.txt").write_text("GROSS DESCRIPTION: nothing more")
    (tmp_path / "TCGA-A1-0003.txt").write_text(telling)
    (tmp_path / "readme.txt").write_text(telling)
    patients = {"TCGA-A1-0001", "TCGA-A1-0002", "TCGA-A1-0004"}
    found, rejected = read_diagnoses(tmp_path, patients)
    assert set(found) == {"TCGA-A1-0001"}
    assert sorted(found["TCGA-A1-0001"].sentences) == ["Ductal carcinoma in situ.", "Invasive ductal carcinoma."]
    assert found["TCGA-A1-0001"].entities == ["DCIS", "IDC"]
    assert [(one.key, one.reason) for one in rejected] == [("TCGA-A1-0002", "no diagnosis section")]

    table = pd.DataFrame(
        {"patient_filename": ["TCGA-A1-0001.x", "TCGA-A1-0002.y", "TCGA-ZZ-0009.z"], "text": [telling, "none", telling]}
    )
    table.to_csv(tmp_path / "TCGA_Reports.csv", index=False)
    found, rejected = read_diagnoses(tmp_path / "TCGA_Reports.csv", patients)
    assert {name: one.sentences for name, one in found.items()} == {"TCGA-A1-0001": ["Invasive ductal carcinoma."]}
    assert [(one.row, one.key) for one in rejected] == [(2, "TCGA-A1-0002")]
    table.rename(columns={"text": "report"}).to_csv(tmp_path / "TCGA_Reports.csv", index=False)
    with pytest.raises(UserError, match="no column 'text'"):
        read_diagnoses(tmp_path / "TCGA_Reports.csv", patients)
    with pytest.raises(UserError, match="there are no such reports"):
        read_diagnoses(tmp_path / "none", patients)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no reports in it"):
        read_diagnoses(tmp_path / "empty", patients)


def test_reports_encrypted_without_a_password_are_read(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf", reason="pypdf (extra: pathology) is not installed")
    pytest.importorskip("cryptography", reason="cryptography (extra: pathology) is not installed")
    from tests.unit.test_reports import pdf

    (tmp_path / "plain.pdf").write_bytes(pdf("FINAL DIAGNOSIS:", "Invasive lobular carcinoma."))
    writer = pypdf.PdfWriter(clone_from=tmp_path / "plain.pdf")
    writer.encrypt("", owner_password="owner", algorithm="AES-256")
    (tmp_path / "reports").mkdir()
    writer.write(tmp_path / "reports" / "TCGA-A1-0001.pdf")
    found, rejected = read_diagnoses(tmp_path / "reports", {"TCGA-A1-0001"})
    assert rejected == []
    assert found["TCGA-A1-0001"].entities == ["ILC"]


OPTIONS = ("--stride", 256, "--tile-side", 96, "--workers", 0)


def test_the_recipe_packs_patients_whole(layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = ("--split", "train=0.6", "val=0.2", "test=0.2")
    recipe(layout, "--work", tmp_path / "work", "--out", tmp_path / "out", *OPTIONS, *split)
    printed = capsys.readouterr().out
    assert "gdc_manifest.txt: 12 slides with a diagnosis of their patient; left out: nothing" in printed
    packed = ShardSet.open(tmp_path / "out")
    units: dict[str, set[str]] = {}
    for name in packed.manifest.splits:
        for number in range(len(packed.split(name))):
            sample = packed.split(name).read(number)
            fields = sample.fields
            units.setdefault(fields["unit"], set()).add(name)
            kind = list(DIAGNOSES)[int(fields["unit"][-4:]) % 4]
            assert sample.texts[0].startswith(DIAGNOSES[kind])
            assert fields["label"] == kind.upper()
            assert fields["slide"].startswith(fields["unit"])
            assert (fields["stride"], fields["mpp"]) == (256, 0.25)
            assert sample.key == f"{fields['slide']}/{fields['x']}_{fields['y']}"
    assert len(units) == 6
    assert all(len(splits) == 1 for splits in units.values())
    notes = packed.manifest.notes["tcga"]
    assert notes["synthetic"] is True
    assert notes["tiling"]["stride"] == 256
    assert notes["tiles"] == sum(len(packed.split(name)) for name in packed.manifest.splits)
    assert "Synthetic" in packed.manifest.license
    assert "Genomic Data Commons" not in packed.manifest.license


def test_the_recipe_names_what_is_missing_and_goes_on(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slides = sorted(copied.glob("slides/*/*.svs"), key=lambda path: path.name)
    slides[0].unlink()
    data = bytearray(slides[1].read_bytes())
    data[5000] ^= 1  # of the right size, but another md5
    slides[1].write_bytes(data)
    slides[3].write_bytes(slides[3].read_bytes()[:-10])
    (copied / "phantom.json").unlink()
    report = next(copied.glob("reports/TCGA-ZZ-0004*"))
    report.write_text(report.read_text().replace("FINAL DIAGNOSIS", "FINAL REMARKS"))
    with pytest.raises(UserError, match=r"above the limit of 5.00%"):
        recipe(copied, "--out", copied / "out", *OPTIONS)
    recipe(copied, "--out", copied / "out", *OPTIONS, "--max-rejected", 0.5)
    rows = list(csv.DictReader((copied / "out" / "rejected.csv").open(encoding="utf-8")))
    reasons = {(row["key"] if row["key"].startswith("TCGA") else row["image"][:23]): row["reason"] for row in rows}
    assert reasons.pop("TCGA-ZZ-0000-01Z-00-DX1") == "missing file"
    assert "expected" in (md5 := reasons.pop("TCGA-ZZ-0000-01Z-00-DX2"))
    assert md5.startswith("md5 ")
    assert "bytes, expected" in reasons.pop("TCGA-ZZ-0001-01Z-00-DX2")
    for slide in (1, 2):
        assert reasons.pop(f"TCGA-ZZ-0004-01Z-00-DX{slide}") == "no diagnosis of TCGA-ZZ-0004 in the reports"
    assert reasons.pop("TCGA-ZZ-0004") == "no diagnosis section"
    assert reasons == {}
    assert "rejected: 6 of " in capsys.readouterr().out
    manifest = ShardSet.open(copied / "out").manifest
    assert manifest.notes["tcga"]["synthetic"] is False
    assert "Genomic Data Commons" in manifest.license


def test_stages_are_kept_and_filtered_tiles_left_out(
    layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipdist.prepare import saliency
    from clipdist.prepare.slides import TilingOptions

    found = find_slides(read_manifest(layout / "gdc_manifest.txt"), layout / "slides")
    slides, _ = with_diagnosis(found, read_diagnoses(layout / "reports", found.patients)[0])
    slides = slides[:3]
    asked: list[int] = []

    def shares(self: Any, paths: list[Path]) -> list[float]:
        """Of the first slide all tiles fall out, of the others the first one."""
        asked.append(len(paths))
        first = paths[0].parent.name == slides[0].name
        return [0.1 if first or number == 0 else 0.9 for number in range(len(paths))]

    monkeypatch.setattr(saliency.AttentionFilter, "shares", shares)
    options: dict[str, Any] = {
        "stain": StainOptions("macenko"),
        "attention": AttentionOptions("test_vit", False),
        "workers": 0,
        "quiet": True,
        "max_rejected_fraction": 0.5,
    }
    tiling = TilingOptions(stride=256, side=96)
    chosen = choose_tiles(slides, tmp_path, tiling, **options)
    assert [slide.name for slide in chosen.slides] == [slide.name for slide in slides[1:]]
    assert [one.reason for one in chosen.rejected] == ["no tile passes the attention filter; the highest share is 0.10"]
    assert chosen.notes["attention"]["kept"] == sum(asked[1:]) - 2
    assert chosen.notes["attention"]["given"] == sum(asked)
    assert all(slide.folder.parent.name == "tiles-256-96-macenko" for slide in chosen.slides)
    assert chosen.notes["stain"]["reference"].split("/")[0] in {slide.name for slide in slides}
    assert f"{sum(asked[1:]) - 2} of {sum(asked)} tiles kept" in str(chosen)

    table = tmp_path / "tiles-256-96" / "rejected.csv"
    assert f"rejected: 1 of 3, see {table}" in str(chosen)
    assert "rejected: none" not in str(chosen)
    (row,) = csv.DictReader(table.open(encoding="utf-8"))
    assert (row["key"], row["reason"]) == (slides[0].name, chosen.rejected[0].reason)

    again = choose_tiles(slides, tmp_path, tiling, **options)
    assert len(asked) == 3
    with pytest.raises(UserError, match=r"1 of 3 slides rejected so far, above the limit of 20.00%.*attention filter"):
        choose_tiles(slides, tmp_path, tiling, **{**options, "max_rejected_fraction": 0.2})
    assert [slide.record for slide in again.slides] == [slide.record for slide in chosen.slides]
    with pytest.raises(UserError, match="lower one of these, or check the weights"):
        choose_tiles(
            slides, tmp_path, tiling, **{**options, "attention": AttentionOptions("test_vit", False, 0.5, 1.0)}
        )
    with pytest.raises(UserError, match="there is no such file"):
        choose_tiles(slides, tmp_path, tiling, stain=StainOptions("macenko", tmp_path / "none.png"), **{
            "workers": 0, "quiet": True
        })  # fmt: skip


def test_slides_that_cannot_be_recoloured_count_as_rejected(
    layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipdist.prepare import recolour
    from clipdist.prepare.slides import SlideFile, TilingOptions
    from clipdist.prepare.stain import NoTissue, StainNormaliser

    slides = list(find_slides(read_manifest(layout / "gdc_manifest.txt"), layout / "slides").slides.values())[:2]
    Image.fromarray(h_and_e()).save(tmp_path / "reference.png")
    asked: list[None] = []

    def fit(self: Any, tiles: list[Any]) -> Any:
        asked.append(None)
        if len(asked) % 2:
            raise NoTissue("one stain only")
        return once(self, tiles)

    once = StainNormaliser.fit
    monkeypatch.setattr(recolour.StainNormaliser, "fit", fit)
    before = [SlideFile("a", tmp_path / "none.svs").rejected("missing file")]
    options: dict[str, Any] = {
        "stain": StainOptions("macenko", tmp_path / "reference.png"),
        "workers": 0,
        "quiet": True,
        "rejected": before,
    }
    tiling = TilingOptions(stride=256, side=96, most=2)
    with pytest.raises(UserError, match=r"2 of 3 slides rejected so far, above the limit of 50.00%"):
        choose_tiles(slides, tmp_path, tiling, max_rejected_fraction=0.5, **options)
    rows = list(csv.DictReader((tmp_path / "tiles-256-96" / "rejected.csv").open(encoding="utf-8")))
    assert [row["reason"] for row in rows] == ["missing file", "no stains: one stain only"]
    shutil.rmtree(tmp_path / "tiles-256-96-macenko")
    chosen = choose_tiles(slides, tmp_path, tiling, max_rejected_fraction=0.7, **options)
    assert [slide.name for slide in chosen.slides] == [slides[1].name]
    assert "rejected: 2 of 3, see" in str(chosen)


@pytest.mark.slow
def test_from_slides_to_a_report_in_minutes(tmp_path: Path) -> None:
    """Both recipes, small, on slides of real tissue."""
    from clipdist.cli import main

    write_tcga_layout(tmp_path / "raw", 8, side=2048, tissue=[ihc(), h_and_e()])
    stages = {"clippath_baseline": (), "clippath": ("--stain", "vahadane", "--attention", "test_vit",
                                                    "--attention-weights", "random")}  # fmt: skip
    for name, more in stages.items():
        recipe(tmp_path / "raw", "--out", tmp_path / name, *OPTIONS[:-2], "--workers", 1, *more)
        words = ["small=true", f"data.set={tmp_path / name}", f"runs={tmp_path / 'runs'}", "train.epochs=1"]
        assert main(["train", str(ROOT / "launch" / "recipes" / f"{name}.yaml"), *words]) == 0
        assert (tmp_path / "runs" / name / "report.html").is_file()
