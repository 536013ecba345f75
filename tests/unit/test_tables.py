"""Tables and folders of every kind become the same pairs; what cannot be read is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from clipdist.data.sets.tables import key_from, pairs_from_table, read_folder, read_table, split_pairs
from clipdist.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The names of forty images, which need not be images here, with a CSV beside them."""
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    rows = []
    for number in range(40):
        name = f"a/{number:03d}.jpg" if number % 2 else f"{number:03d}.png"
        (folder / name).touch()
        rows.append(f'{name},"lesion, number {number}",Läsion {number},p{number // 2},{"ab"[number % 4 == 0]},{number}')
    header = "file,caption,german,patient,diagnosis,age\n"
    (tmp_path / "pairs.csv").write_text("\ufeff" + header + "\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "jsonl", "parquet", "xlsx"])
def test_every_kind_of_table_gives_the_same_pairs(photos: Path, tmp_path: Path, kind: str) -> None:
    table = pd.read_csv(tmp_path / "pairs.csv", dtype={"patient": str})
    table["code"] = [f"{number:04d}" for number in range(40)]
    table["gap"] = pd.array([None if number == 3 else number for number in range(40)], dtype="Int64")
    table.loc[5, "caption"] = "NA"
    path = tmp_path / f"table.{kind}"
    writers = {
        "csv": lambda: table.to_csv(path, index=False, encoding="utf-8-sig"),
        "csv.gz": lambda: table.to_csv(path, index=False),
        "tsv": lambda: table.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True, force_ascii=False),
        "parquet": lambda: table.to_parquet(path),
        "xlsx": lambda: table.to_excel(path, index=False),
    }
    writers[kind]()
    pairs, rejected = pairs_from_table(
        read_table(path),
        images=photos,
        image_column="file",
        text_columns=["caption", "german"],
        label_column="gap",
        keep_columns=["code", "age"],
    )
    assert rejected == []
    assert [pair.row for pair in pairs] == list(range(1, 41))
    assert pairs[5].text == ["NA", "Läsion 5"]
    assert pairs[3].fields == {"code": "0003", "age": 3}
    assert pairs[4].fields == {"label": "4", "code": "0004", "age": 4}
    assert pairs[4].image == photos / "004.png"


def test_captions_in_lists_and_values_of_every_type_become_json(photos: Path, tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "image": ["000.png", "002.png"],
            "text": [["one", " ", "two"], ["three"]],
            "when": [pd.Timestamp("2024-05-01"), pd.NaT],
            "box": [np.array([1.5, 2.0]), None],
            "flag": [True, False],
            "size": [float("nan"), 2.5],
        }
    )
    table.to_parquet(tmp_path / "t.parquet")
    pairs, _ = pairs_from_table(
        read_table(tmp_path / "t.parquet"),
        images=photos,
        image_column="image",
        text_columns=["text"],
        keep_columns=["when", "box", "flag", "size"],
    )
    assert pairs[0].text == ["one", "two"]
    assert pairs[0].fields == {"when": "2024-05-01T00:00:00", "box": [1.5, 2.0], "flag": True}
    assert json.loads(json.dumps(pairs[1].fields)) == {"flag": False, "size": 2.5}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "unreadable table .EmptyDataError"),
        ("t.csv", b"file,caption\n", "has no rows"),
        ("t.csv", b"a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("t.csv", b"a,b\n1,2,3\n", "unreadable table .ParserWarning"),
        ("t.csv", b'a,b\n1,"open\n', "EOF inside string"),
        ("t.csv", "a,b\n1,ö\n".encode("latin-1"), "not UTF-8 .byte 0xf6.; save it as UTF-8$"),
        ("t.csv", b"a,b,a \n1,2,3\n", "column 'a' is there twice; expected each name once"),
        ("t.csv", b"a, b,b,b \n1,2,3,4\n", "column 'b' is there 3 times; expected each name once"),
        ("t.jsonl", b'{"a": 1, "a ": 2}\n', "column 'a' is there twice"),
        ("t.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("t.jsonl", b"[1]\n", "line 1 holds a list, expected an object"),
        ("t.parquet", b"PAR1 not really", "unreadable table"),
        ("t.xlsx", b"not a zip", "unreadable table"),
        ("t.docx", b"", "found the suffix '.docx', expected one of .csv"),
    ],
)
def test_unreadable_tables(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_tables_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such table"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(UserError, match="no images in it"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        read_folder(tmp_path / "none")


def test_a_folder_lists_images_without_a_readable_text(photos: Path) -> None:
    for number in range(4, 40, 2):
        (photos / f"{number:03d}.txt").write_text(f"photo {number}")
    (photos / "000.txt").write_bytes(b"\xff\xfe\xfa")
    (photos / "002.json").write_text("{broken")
    (photos / "a/001.json").write_text('["a list"]')
    table, rejected = read_folder(photos)
    assert len(table) == 18
    assert table.index.tolist() == list(range(3, 21))
    reasons = {item.key: item.reason for item in rejected}
    assert "000.txt: not UTF-8" in reasons["000"]
    assert "002.json: not JSON" in reasons["002"]
    assert "holds a list, expected an object" in reasons["a/001"]
    assert reasons["a/003"].startswith("no text")


def test_a_folder_without_any_text_gives_an_empty_table(photos: Path) -> None:
    table, rejected = read_folder(photos)
    assert len(rejected) == 40
    pairs, refused = pairs_from_table(table, images=photos, image_column="image", text_columns=["text"])
    assert (pairs, refused) == ([], [])


def test_other_separators_and_encodings(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image;text\n1.png;ein Fleck, rot\n", encoding="cp1252")
    assert read_table(tmp_path / "t.csv")["text"].tolist() == ["ein Fleck, rot"]
    (tmp_path / "u.tsv").write_text("image\ttext\n1.png\tröd\n", encoding="utf-16")
    assert read_table(tmp_path / "u.tsv", "utf-16")["text"].tolist() == ["röd"]


def test_another_encoding_is_offered_where_one_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("a,b\n1,ö\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"not ascii .*; save it as UTF-8, or name its encoding \(--encoding cp1252"):
        read_table(tmp_path / "t.csv", "ascii")
    with pytest.raises(UserError, match=r"save it as UTF-8$"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("text", [{"en": "a"}, [{"en": "a"}], ["a", ["b"]], {}])
def test_a_caption_that_is_no_text_is_rejected(photos: Path, tmp_path: Path, text: Any) -> None:
    rows = [
        {"image": "000.png", "text": text},
        {"image": "002.png", "text": ["a", "b"]},
        {"image": "004.png", "text": 5},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns: dict[str, Any] = {"images": photos, "image_column": "image", "text_columns": ["text"]}
    pairs, rejected = pairs_from_table(read_table(tmp_path / "t.jsonl"), **columns)
    assert [pair.text for pair in pairs] == [["a", "b"], ["5"]]
    assert [(one.row, one.key, one.reason) for one in rejected] == [
        (1, "000", f"caption {json.dumps(text)}: expected a text or a list of texts")
    ]


def test_reserved_fields_are_not_overwritten(photos: Path) -> None:
    table = read_table(photos.parent / "pairs.csv").rename(columns={"german": "text", "age": "label"})
    columns: dict[str, Any] = {"images": photos, "image_column": "file", "text_columns": ["caption"]}
    with pytest.raises(UserError, match="column 'text' cannot be kept"):
        pairs_from_table(table, **columns, keep_columns=["text"])
    with pytest.raises(UserError, match="column 'label' cannot be kept"):
        pairs_from_table(table, **columns, keep_columns=["label"], label_column="diagnosis")
    assert pairs_from_table(table, **columns, keep_columns=["label"])[0][7].fields == {"label": 7}


def test_pairs_are_split_by_unit_and_label(photos: Path) -> None:
    columns: dict[str, Any] = {"images": photos, "image_column": "file", "text_columns": ["caption"]}
    table = read_table(photos.parent / "pairs.csv")
    pairs, _ = pairs_from_table(table, **columns, unit_column="patient", label_column="diagnosis")
    split = split_pairs(pairs, {"train": 0.5, "val": 0.5}, 0)
    assert {name: len(found) for name, found in split.items()} == {"train": 20, "val": 20}
    units = [{pair.fields["unit"] for pair in found} for found in split.values()]
    assert not units[0] & units[1]
    without, _ = pairs_from_table(table, **columns)
    by_age = split_pairs(without, {"train": 0.5, "val": 0.5}, 0, {row: row % 2 for row in range(1, 41)})
    assert sum((pair.row or 0) % 2 for pair in by_age["val"]) == 10
    with pytest.raises(UserError, match="found 1 usable pairs for the splits train, val"):
        split_pairs(pairs[:1], {"train": 0.5, "val": 0.5}, 0)


# Keys


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a/b.c/img 1.final.JPG", "a/b_c/img_1_final"),
        ("../up.png", "__/up"),
        ("/abs/x.png", "abs/x"),
        ("./1.png", "1"),
        ("plain", "plain"),
        ("", ""),
        (".", ""),
    ],
)
def test_keys_from_paths(name: str, key: str) -> None:
    assert key_from(name) == key


def test_keys_of_other_scripts_stay_apart() -> None:
    assert key_from("照片.jpg") != key_from("图像.jpg")
    assert key_from("照片.jpg") == key_from("照片.png")
    assert key_from("naïve.jpg").startswith("na_ve-")
    assert key_from("id.1", is_path=False) == "id_1"
    halves = {key_from("a\ud800.jpg"), key_from("a\udcff.jpg")}
    assert len(halves) == 2
    assert all(key.isascii() and key.startswith("a_-") for key in halves)
