"""SkinCAP's layout: which table, which rows are left out, which image a path means, and the two recipes."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from clipdist.cli import main
from clipdist.data.shards import ShardSet, checksum_file
from clipdist.errors import UserError
from clipdist.prepare.skincap import SkincapPairs, read_skincap
from tests.unit.pictures import encoded, photograph, picture

ROOT = Path(__file__).parents[2]
CSV, XLSX = "skincap_v240623.csv", "skincap_v240715.xlsx"


def write_layout(raw: Path, rows: int = 30) -> pd.DataFrame:
    """A small folder with the real columns; returns its table."""
    (raw / "skincap" / "not_include").mkdir(parents=True)
    table = pd.DataFrame(
        {
            "id": range(1, rows + 1),
            "skincap_file_path": [f"{number}.png" for number in range(1, rows + 1)],
            "ori_file_path": [f"source/{number}.jpg" for number in range(1, rows + 1)],
            "disease": [["psoriasis", "acne", "melanoma"][number % 3] for number in range(rows)],
            "caption_zh": "皮疹",
            "caption_zh_polish_en": [f"A red plaque, number {number}." for number in range(1, rows + 1)],
            "source": ["ddi", "fitzpatrick17k"] * (rows // 2),
            "skin_tone": ["12", None] * (rows // 2),
            "malignant": ["0", None] * (rows // 2),
            "fitzpatrick_scale": [None, "3"] * (rows // 2),
            "Do not consider this image": ["1" if number == 4 else "0" for number in range(1, rows + 1)],
        }
    )
    for number in range(1, rows + 1):
        (raw / "skincap" / f"{number}.png").write_bytes(encoded(picture(number, (60, 50))))
    (raw / "skincap" / "not_include" / "9.png").write_bytes(encoded(picture(9)))
    table.to_csv(raw / CSV, index=False, encoding="utf-8-sig")
    return table


def rewrite(raw: Path, table: pd.DataFrame) -> SkincapPairs:
    table.to_csv(raw / CSV, index=False, encoding="utf-8-sig")
    return read_skincap(raw)


def test_labels_units_fields_and_what_is_left_out(tmp_path: Path) -> None:
    table = write_layout(tmp_path)
    table.loc[8, "skincap_file_path"] = "skincap/not_include/9.png"
    found = rewrite(tmp_path, table)
    assert len(found.pairs) == 28
    assert found.rejected == []
    assert found.notes["left_out"] == {"not_include": 1, "marked": 1}
    assert (found.notes["table"], found.notes["caption_column"]) == (CSV, "caption_zh_polish_en")
    assert found.sources == {CSV: checksum_file(tmp_path / CSV)}
    assert not {"4", "9"} & {pair.key for pair in found.pairs}
    first, second = found.pairs[:2]
    assert (first.row, first.key, first.text) == (1, "1", ["A red plaque, number 1."])
    fields = {"label": "psoriasis", "unit": "source/1.jpg", "source": "ddi", "skin_tone": 12, "malignant": 0}
    assert first.fields == fields
    assert second.fields["fitzpatrick_scale"] == 3
    assert "skin_tone" not in second.fields


@pytest.mark.parametrize("written", ["{}", "skincap/{}", "./skincap/{}", "/data/x/skincap/{}", r"skincap\{}", " {} "])
def test_every_way_of_writing_an_image_path(tmp_path: Path, written: str) -> None:
    table = write_layout(tmp_path)
    table["skincap_file_path"] = table["skincap_file_path"].map(written.format)
    found = rewrite(tmp_path, table)
    assert [pair.key for pair in found.pairs[:4]] == ["1", "2", "3", "5"]
    assert all(Path(str(pair.image)).is_file() for pair in found.pairs)


def test_the_workbook_has_its_own_caption_column(tmp_path: Path) -> None:
    table = write_layout(tmp_path).rename(columns={"caption_zh_polish_en": "caption_en"})
    table.to_excel(tmp_path / XLSX, index=False)
    both = read_skincap(tmp_path)
    assert both.notes["table"] == CSV
    named = read_skincap(tmp_path, table=XLSX)
    (tmp_path / CSV).unlink()
    alone = read_skincap(tmp_path)
    for found in (named, alone):
        assert (found.notes["table"], found.notes["caption_column"]) == (XLSX, "caption_en")
        assert [(pair.key, pair.fields) for pair in found.pairs] == [(pair.key, pair.fields) for pair in both.pairs]
    assert read_skincap(tmp_path, caption="caption_zh").pairs[0].text == ["皮疹"]


def test_patients_are_units_where_they_are_known(tmp_path: Path) -> None:
    table = write_layout(tmp_path)
    table["patient_id"] = [f"P{number // 2}" for number in range(len(table))]
    found = rewrite(tmp_path, table)
    assert found.notes["unit_column"] == "patient_id"
    assert found.pairs[1].fields["unit"] == "P0"


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("skincap_file_path", "no column 'skincap_file_path'; nearest: 'skincap_file_path_'; its columns: id, "),
        ("disease", "no column 'disease'; nearest: 'disease_'"),
        ("caption_zh_polish_en", "no caption column, expected caption_zh_polish_en or caption_en; found id, "),
        ("ori_file_path", "no unit column, expected patient_id or ori_file_path"),
        ("Do not consider this image", "no column 'Do not consider this image'; nearest"),
    ],
)
def test_a_renamed_column_is_one_line(tmp_path: Path, column: str, message: str) -> None:
    table = write_layout(tmp_path).rename(columns={column: column + "_"})
    with pytest.raises(UserError, match=message) as caught:
        rewrite(tmp_path, table)
    assert "\n" not in str(caught.value)


def test_fields_that_a_table_lacks_are_noted(tmp_path: Path) -> None:
    found = rewrite(tmp_path, write_layout(tmp_path).drop(columns="skin_tone"))
    assert found.notes["fields_absent"] == ["skin_tone"]


def test_missing_parts_and_strange_marks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        read_skincap(tmp_path / "none")
    with pytest.raises(UserError, match=r"found neither skincap_v240623.csv nor skincap_v240715.xlsx"):
        read_skincap(tmp_path)
    table = write_layout(tmp_path)
    table.loc[6, "Do not consider this image"] = "yes"
    with pytest.raises(UserError, match="'Do not consider this image', row 7: found 'yes', expected 0 or 1"):
        rewrite(tmp_path, table)
    with pytest.raises(UserError, match="there is no such table"):
        read_skincap(tmp_path, table="other.csv")
    (tmp_path / "skincap").rename(tmp_path / "images")
    with pytest.raises(UserError, match=r"skincap: there is no such folder; expected the images beside"):
        rewrite(tmp_path, table.drop(index=6))


def recipe(name: str, *arguments: object) -> None:
    runpy.run_path(str(ROOT / "shards" / name))["main"]([str(argument) for argument in arguments])


def test_the_recipe_packs_and_says_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_layout(tmp_path / "raw")
    recipe("skincap.py", tmp_path / "raw", "--out", tmp_path / "out", "--side", 32, "--workers", 0)
    printed = capsys.readouterr().out
    assert "left out: 0 not_include, 1 marked" in printed
    assert printed.splitlines()[-1] == "rejected: none of 29"
    packed = ShardSet.open(tmp_path / "out")
    assert {name: len(packed.split(name)) for name in packed.manifest.splits} == {"train": 23, "val": 6}
    assert packed.manifest.notes["skincap"]["caption_column"] == "caption_zh_polish_en"
    assert packed.manifest.sources == {CSV: checksum_file(tmp_path / "raw" / CSV)}
    assert "Fitzpatrick17k" in packed.manifest.license
    sample = packed.split("val").read(0)
    assert sample.extension == "jpg"
    assert sample.fields["label"] == table["disease"][int(sample.key) - 1]


def write_copies(raw: Path) -> None:
    """The layout with 15 photographs, each a second time at another size under a path of its own."""
    table = write_layout(raw).assign(**{"Do not consider this image": "0"})
    table.to_csv(raw / CSV, index=False, encoding="utf-8-sig")
    for number in range(1, 16):
        image = photograph(120, 90, number)
        (raw / "skincap" / f"{number}.png").write_bytes(encoded(image))
        (raw / "skincap" / f"{number + 15}.png").write_bytes(encoded(image.resize((100, 75))))


def split_by_key(folder: Path) -> dict[str, str]:
    packed = ShardSet.open(folder)
    return {packed.split(name).key(n): name for name in packed.manifest.splits for n in range(len(packed.split(name)))}


def test_the_same_photograph_under_two_names_is_in_one_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_copies(tmp_path / "raw")
    words = (tmp_path / "raw", "--side", 32, "--workers", 0, "--split", "train=0.6", "val=0.4")
    recipe("skincap.py", *words, "--out", tmp_path / "out")
    assert "the same picture again: 15 times; kept together" in capsys.readouterr().out
    where = split_by_key(tmp_path / "out")
    assert [number for number in range(1, 16) if where[str(number)] != where[str(number + 15)]] == []
    assert set(where.values()) == {"train", "val"}
    notes = ShardSet.open(tmp_path / "out").manifest.notes["split"]
    assert notes == {"fractions": {"train": 0.6, "val": 0.4}, "seed": 0, "duplicates_joined": 15, "cut_short": 0}

    recipe("skincap.py", *words, "--out", tmp_path / "apart", "--no-join-duplicates")
    assert "the same picture again" not in capsys.readouterr().out
    where = split_by_key(tmp_path / "apart")
    assert any(where[str(number)] != where[str(number + 15)] for number in range(1, 16))
    assert "duplicates_joined" not in ShardSet.open(tmp_path / "apart").manifest.notes["split"]


def test_a_search_that_was_cut_short_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipdist.data.sets.duplicates.MOST_NEIGHBOURS", 0)
    raw = tmp_path / "raw"
    write_copies(raw)
    split = ("--workers", "0", "--split", "train=0.6", "val=0.4")
    recipe("skincap.py", raw, "--out", tmp_path / "recipe", "--side", 32, *split)
    columns = ("--image-column", "skincap_file_path", "--text-column", "caption_zh_polish_en", "--join-duplicates")
    source = (str(raw / CSV), "--images", str(raw / "skincap"))
    assert main(["pack", *source, "--out", str(tmp_path / "pack"), *columns, *split]) == 0
    warned = re.findall(
        r"warning: (\d+) pictures look like so many others that not all pairs were compared", capsys.readouterr().out
    )
    notes = [ShardSet.open(tmp_path / name).manifest.notes["split"] for name in ("recipe", "pack")]
    assert [int(count) for count in warned] == [note["cut_short"] for note in notes]
    assert all(note["cut_short"] > 0 for note in notes)


def test_a_recipe_run_as_a_script_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    write_layout(tmp_path).drop(columns="disease").to_csv(tmp_path / CSV, index=False)
    command = [sys.executable, str(ROOT / "shards/skincap.py"), str(tmp_path), "--out", str(tmp_path / "out")]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("clipdist: error: ")
    assert failed.stderr.count("\n") == 1


def test_the_phantom_recipe_runs_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", tmp_path / "out", "--images", 40, "--side", 32, "--workers", 0]
    recipe("phantom.py", *arguments)
    packed = ShardSet.open(tmp_path / "out")
    assert list(packed.manifest.splits) == ["train", "val", "test"]
    assert packed.manifest.notes["synthetic"] is True
    assert "synthetic" in packed.manifest.license.lower()
    splits = [packed.split(name) for name in packed.manifest.splits]
    units = [{split.read(number).fields["unit"] for number in range(len(split))} for split in splits]
    assert len(set.union(*units)) == sum(map(len, units))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left of what was drawn

    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    recipe("phantom.py", *arguments)
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="differs in seed"):
        recipe("phantom.py", *arguments, "--seed", 1)


def test_phantoms_as_files_are_packed_as_anyones_table(tmp_path: Path) -> None:
    """What docs/train.md begins with: pictures and a table, and `clipdist pack` alone."""
    raw, out = tmp_path / "lesions", tmp_path / "set"
    recipe("phantom.py", "--draw", raw, "--images", 12, "--side", 48, "--workers", 1, "--out", out)
    assert not out.exists()
    columns = ("--image-column", "skincap_file_path", "--text-column", "caption_zh_polish_en", "--workers", "0")
    source = (str(raw / CSV), "--images", str(raw / "skincap"), "--out", str(out), "--keep-order")
    assert main(["pack", *source, *columns, "--group-by", "patient_id"]) == 0
    table, split = pd.read_csv(raw / CSV, encoding="utf-8-sig"), ShardSet.open(out).split("train")
    samples = [split.read(number) for number in range(len(split))]
    assert [sample.texts for sample in samples] == [[text] for text in table["caption_zh_polish_en"]]
    assert [sample.fields["unit"] for sample in samples] == list(table["patient_id"])
    assert samples[0].image == (raw / "skincap" / "1.png").read_bytes()
