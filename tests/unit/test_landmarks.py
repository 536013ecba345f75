"""Google Landmarks v2's layout: what is used, counted, rejected and named; near-duplicates never straddle a split."""

import csv
import hashlib
import io
import json
import runpy
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipdist.data.sets.pack import Pair
from clipdist.data.shards import ShardSet
from clipdist.errors import UserError
from clipdist.prepare.landmark_splits import divide_landmarks
from clipdist.prepare.landmark_tables import friendly, id_text, ids_of, places_in, read_train, unique_names
from clipdist.prepare.landmarks import LandmarkPairs, read_landmarks
from clipdist.prepare.near_duplicates import NearDuplicates, near_duplicates
from clipdist.prepare.phantom_landmarks import BY_FEATURES, BY_LOOKS, MISLABELLED, write_landmarks_layout
from tests.unit.pictures import encoded, photograph
from tests.unit.tars import plain_tar

ROOT = Path(__file__).parents[2]
LANDMARKS = 8
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn RAW that tests must not change."""
    return write_landmarks_layout(tmp_path_factory.mktemp("landmarks") / "raw", LANDMARKS)


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    """Thirty pictures, none like another."""
    return [encoded(photograph(96, 72, number), "JPEG", quality=90) for number in range(30)]


def name_of(number: int) -> str:
    """An id; they begin with different digits."""
    return hashlib.md5(str(number).encode()).hexdigest()[:16]


def member_of(number: int) -> str:
    name = name_of(number)
    return f"{name[0]}/{name[1]}/{name[2]}/{name}.jpg"


def write_tar(raw: Path, number: int, members: Sequence[tuple[str, bytes]], *, md5: bool = True) -> Path:
    path = plain_tar(raw / "train" / f"images_{number:03d}.tar", list(members))
    if md5:
        told = hashlib.md5(path.read_bytes()).hexdigest()
        path.with_name(f"md5.{path.stem}.txt").write_text(f"{told}  {path.name}\n")
    return path


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def raw(tmp_path: Path, jpegs: list[bytes]) -> Path:
    """Landmarks 0, 1 and 2 with ten images each in two tars; three rows for images of a tar that is not there."""
    raw = tmp_path / "raw"
    for tar in (0, 7):
        write_tar(raw, tar, [(member_of(n), jpegs[n]) for n in range(30) if (n % 2 == 1) == (tar == 7)])
    rows = [(name_of(n), f"https://example.org/a,{n}.jpg", n % 3) for n in range(33)]
    write_csv(raw / "train.csv", ("id", "url", "landmark_id"), rows)
    wiki = "http://commons.wikimedia.org/wiki/Category:"
    named = [(0, f"{wiki}Mus%C3%A9e_d%27Orsay"), (1, f"{wiki}City_Gate"), (2, f"{wiki}City_Gate"), (9, f"{wiki}Other")]
    write_csv(raw / "train_label_to_category.csv", ("landmark_id", "category"), named)
    return raw


def read(raw: Path, **options: Any) -> LandmarkPairs:
    return read_landmarks(raw, workers=0, quiet=True, **options)


def rows_of(path: Path) -> Rows:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def recipe(*arguments: object) -> None:
    words = [str(argument) for argument in (*arguments, "--workers", 0)]
    runpy.run_path(str(ROOT / "shards" / "landmarks.py"))["main"](words)


# Ids, names


@settings(deadline=None)
@given(st.lists(st.one_of(st.text("0123456789abcdef", min_size=16, max_size=16), st.text(max_size=20), st.none())))
def test_ids_are_the_numbers_that_they_write(texts: list[str | None]) -> None:
    array = pa.array([None, *texts], pa.string())[1:]  # an array that begins within its buffers
    numbers, sound = ids_of(array)
    for text, number, good in zip(texts, numbers, sound, strict=True):
        assert good == (text is not None and len(text) == 16 and set(text) <= set("0123456789abcdef"))
        assert id_text(number) == (text if good else "0" * 16)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20)), st.sets(st.integers(0, 20)))
def test_places(wanted: list[int], among: set[int]) -> None:
    held = sorted(among)
    found = places_in(np.array(wanted, np.uint64), np.array(held, np.uint64))
    assert found.tolist() == [held.index(one) if one in held else -1 for one in wanted]


def test_friendly_names() -> None:
    wiki = "http://commons.wikimedia.org/wiki/Category:"
    for end, name in {
        "Eiffel_Tower": "Eiffel Tower",
        "Films_by_Luigi_Filippo_D%27Amico": "Films by Luigi Filippo D'Amico",
        "Mus%C3%A9e_d%27Orsay": "Musée d'Orsay",
        "Muse%CC%81e": "Musée",  # the accent on its own
        "A%2FB_(C):_50%25__": "A/B (C): 50%",
    }.items():
        assert friendly(wiki + end) == name
    assert friendly("http://commons.wikimedia.org/wiki/Eiffel") == friendly(wiki) == ""


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 99), st.sampled_from(["A", "B", "A (1)", "A (2)", "A (2)'"])))
def test_names_are_unique_and_end_in_the_number_only_where_shared(names: dict[int, str]) -> None:
    found = unique_names(names)
    assert len(set(found.values())) == len(names)
    count = Counter(names.values())
    for landmark, name in names.items():
        assert found[landmark].rstrip("'") == (name if count[name] == 1 else f"{name} ({landmark})").rstrip("'")


# What is read


def test_labels_captions_fields_and_absent_rows(raw: Path, jpegs: list[bytes]) -> None:
    found = read(raw)
    assert found.rejected == []
    assert found.notes["tars"] == {"count": 2, "images": 30, "md5": 2}
    assert found.notes["rows"] == {"all": 33, "absent": 3}
    assert Counter(pair.fields["label"] for pair in found.pairs) == {
        "Musée d'Orsay": 10, "City Gate (1)": 10, "City Gate (2)": 10
    }  # fmt: skip
    assert found.classes["City Gate (2)"] == (2, "http://commons.wikimedia.org/wiki/Category:City_Gate")
    assert found.notes["said"] == ["train_attribution.csv is not there: samples carry no author and no licence"]
    assert set(found.sources) == {"train.csv", "train_label_to_category.csv"}
    of_key = {pair.key: pair for pair in found.pairs}
    assert set(of_key) == {name_of(n) for n in range(30)}
    pair = of_key[name_of(12)]
    assert (pair.row, pair.text) == (13, ["a photo of Musée d'Orsay"])
    assert pair.fields == {"label": "Musée d'Orsay", "landmark_id": 0, "url": "https://example.org/a,12.jpg"}
    assert not isinstance(pair.image, bytes)
    assert pair.image.read_bytes() == jpegs[12]
    assert str(pair.image) == f"images_000.tar:{member_of(12)}"
    told = read(raw, templates=["{}", "{} in the rain"]).pairs[0]
    assert told.text == [told.fields["label"], f"{told.fields['label']} in the rain"]


def test_tables_in_metadata_tars_beside_and_md5_apart(raw: Path) -> None:
    before = read(raw).pairs
    for folder in ("metadata", "md5sum/train"):
        (raw / folder).mkdir(parents=True)
    for path in raw.glob("*.csv"):
        path.rename(raw / "metadata" / path.name)
    for path in (raw / "train").glob("md5*"):
        path.rename(raw / "md5sum" / "train" / path.name)
    for path in (raw / "train").glob("*.tar"):
        path.rename(raw / path.name)
    after = read(raw)
    assert after.notes["tars"]["md5"] == 2
    assert [(pair.key, pair.fields) for pair in after.pairs] == [(pair.key, pair.fields) for pair in before]


def test_small_classes_are_left_out(raw: Path) -> None:
    rows = [(name_of(n), "", 0 if n < 12 else 1 if n < 22 else n) for n in range(30)]
    write_csv(raw / "train.csv", ("id", "url", "landmark_id"), rows)
    found = read(raw)
    assert Counter(pair.fields["landmark_id"] for pair in found.pairs) == {0: 12, 1: 10}
    assert found.left_out == {"of too small classes": 8}
    assert found.notes["landmarks"] == {"seen": 10, "kept": 2}
    assert len(read(raw, min_images=11).pairs) == 12
    with pytest.raises(UserError, match="no landmark has 13 images; the largest of 10 has 12"):
        read(raw, min_images=13)


def test_the_cleaned_subset(raw: Path) -> None:
    chosen = {n: n % 3 for n in range(30) if n < 27} | {4: 2}
    lists = [(landmark, " ".join(name_of(n) for n, of in chosen.items() if of == landmark)) for landmark in range(3)]
    write_csv(raw / "train_clean.csv", ("landmark_id", "images"), lists)
    assert len(read(raw).pairs) == 30
    found = read(raw, clean=True, min_images=8)
    assert {pair.key for pair in found.pairs} == {name_of(n) for n in range(27) if n != 4}
    assert found.left_out["not in train_clean.csv"] == 3
    assert [(one.key, one.reason) for one in found.rejected] == [
        (name_of(4), "landmark 1 in train.csv, 2 in train_clean.csv")
    ]
    write_csv(raw / "train_clean.csv", ("landmark_id", "images"), [(0, name_of(0)), (1, f"{name_of(1)} junk")])
    with pytest.raises(UserError, match="about row 2: expected a landmark's number, and ids of 16"):
        read(raw, clean=True)


def test_authors_and_licences(raw: Path) -> None:
    rows = [(name_of(n), "u", "Ann, \nof Rome" if n else "", "CC BY", f"t{n}") for n in range(29)]
    write_csv(raw / "train_attribution.csv", ("id", "url", "author", "license", "title"), rows)
    of_key = {pair.key: pair.fields for pair in read(raw).pairs}
    assert all(of_key[name_of(n)]["author"] == "Ann, \nof Rome" for n in range(1, 29))
    assert all(of_key[name_of(n)]["license"] == "CC BY" for n in range(29))
    assert "author" not in of_key[name_of(0)]
    assert "license" not in of_key[name_of(29)]


def test_attributions_that_cannot_be_read_are_counted(raw: Path) -> None:
    rows = [f"{name_of(n)},u,Ann,CC BY,t" for n in range(28)]
    rows[4] = f"{name_of(4)},u,Ann, of Rome,CC BY,t"  # a comma without quotes
    rows[5] = f"{name_of(5).upper()},u,Ann,CC BY,t"
    rows[6] = f"{name_of(6)},u,,CC BY,t"
    (raw / "train_attribution.csv").write_text("\n".join(["id,url,author,license,title", *rows]) + "\n")
    found = read(raw)
    assert len(found.pairs) == 30
    assert found.rejected == []
    table = "train_attribution.csv: "
    assert found.notes["said"] == [
        f"{table}5 of 30 images carry no author, 4 no licence",
        f"{table}2 rows cannot be read, such as row 5 ({rows[4]}): 6 cells, expected 5",
    ]
    assert found.notes["attribution"] == {"without_author": 5, "without_license": 4, "faulty_rows": 2}
    assert "\n".join(found.notes["said"]) in str(found)
    told = [(name_of(n), "u", "Ann", "CC BY", "t") for n in range(30)]
    write_csv(raw / "train_attribution.csv", ("id", "url", "author", "license", "title"), told)
    assert read(raw).notes["said"] == []


@pytest.mark.parametrize("table", ["train.csv", "train_clean.csv", "train_attribution.csv"])
def test_names_of_columns_with_spaces_or_twice_are_refused(raw: Path, table: str) -> None:
    write_csv(raw / "train_clean.csv", ("landmark_id", "images"), [(0, name_of(0))])
    write_csv(raw / "train_attribution.csv", ("id", "author", "license"), [(name_of(0), "Ann", "CC BY")])
    header, rest = (raw / table).read_text().split("\n", 1)
    last = header.rpartition(",")[2].strip()
    (raw / table).write_text(header.replace(",", ", ") + "\n" + rest)
    with pytest.raises(UserError, match=f"{table}: no column '{header.split(',')[1].strip()}'; nearest: ' "):
        read(raw, clean=True, min_images=1)
    (raw / table).write_text(f"{header.strip()},{last}\n" + rest)
    with pytest.raises(UserError, match=f"{table}: the column '{last}' comes 2 times, expected once"):
        read(raw, clean=True, min_images=1)
    quoted = ",".join(f'"{name}"' for name in header.strip().split(","))
    (raw / table).write_text("\ufeff" + quoted + "\n" + rest, encoding="utf-8")
    assert len(read(raw, clean=True, min_images=1).pairs) == 1


def test_landmarks_without_a_category_are_their_numbers(raw: Path) -> None:
    wiki = "http://commons.wikimedia.org/wiki/"
    rows = [(0, f"{wiki}Category:Gate"), (1, f"{wiki}Gate"), (0, f"{wiki}Category:Door"), ("x", f"{wiki}Category:X")]
    write_csv(raw / "train_label_to_category.csv", ("landmark_id", "category"), rows)
    found = read(raw)
    assert set(found.classes) == {"Gate", "landmark 1", "landmark 2"}
    assert "names no category of 2 landmarks: their labels are their numbers" in found.notes["said"][0]
    assert [(one.row, one.reason.split(",")[0]) for one in found.rejected] == [
        (2, f"category '{wiki}Gate'"),
        (3, f"landmark 0 has the category '{wiki}Category:Gate' already"),
        (4, "landmark_id 'x'"),
    ]
    (raw / "train_label_to_category.csv").unlink()
    assert set(read(raw).classes) == {"landmark 0", "landmark 1", "landmark 2"}


# What is damaged


def test_a_tar_of_another_md5(raw: Path, jpegs: list[bytes]) -> None:
    md5 = raw / "train" / "md5.images_007.txt"
    md5.write_text("0" * 32 + "  images_007.tar\n")
    found = read(raw, min_images=5)
    assert {pair.key for pair in found.pairs} == {name_of(n) for n in range(0, 30, 2)}
    assert len(found.rejected) == 16
    first, *others = found.rejected
    assert (first.row, first.key) == (None, "images_007.tar")
    assert first.reason.startswith("images_007.tar has md5 ")
    assert f"expected {'0' * 32}: fetch it again" in first.reason
    assert {one.reason for one in others} == {first.reason}
    assert {(one.row, one.key) for one in others} == {(n + 1, name_of(n)) for n in range(1, 30, 2)}
    assert len(read(raw, check_md5=False).pairs) == 30
    # An image that a sound tar holds, too, is taken from there.
    write_tar(raw, 8, [(member_of(1), jpegs[1])])
    found = read(raw, min_images=5)
    assert name_of(1) in {pair.key for pair in found.pairs}
    md5.unlink()
    found = read(raw)
    assert "no md5 file for 1 of 3 tars: not compared" in found.notes["said"]


def test_a_tar_that_is_cut_short(raw: Path) -> None:
    path = raw / "train" / "images_007.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found = read(raw, min_images=5, check_md5=False)
    assert 15 < len(found.pairs) < 30
    assert [one.key for one in found.rejected] == ["images_007.tar"]
    assert "damaged or cut short after" in found.rejected[0].reason
    assert "is cut off" in found.rejected[0].reason or "unexpected end" in found.rejected[0].reason
    assert found.notes["rows"]["absent"] == 33 - len(found.pairs)
    assert len(read(raw, min_images=5).pairs) == 15  # its md5 is another, too


def test_ids_twice(raw: Path, jpegs: list[bytes]) -> None:
    write_tar(raw, 8, [(member_of(0), jpegs[5]), ("x/" + name_of(30) + ".jpg", jpegs[6]), (member_of(40), jpegs[7])])
    with open(raw / "train.csv", "a", encoding="utf-8") as file:
        file.write(f"{name_of(1)},again,1\n{name_of(2)},elsewhere,0\n{name_of(31)},absent,1\n")
    found = read(raw, min_images=9)
    assert sorted((one.row or 0, one.key, one.reason) for one in found.rejected) == sorted([
        (0, name_of(0), f"the same id as images_000.tar:{member_of(0)}"),
        (0, name_of(40), "no row of train.csv names it"),
        (34, name_of(1), "row 2 has the same id"),
        (3, name_of(2), "its rows name the landmarks 2, 0"),
        (35, name_of(2), "its rows name the landmarks 2, 0"),
    ])  # fmt: skip
    assert {pair.key for pair in found.pairs} == {name_of(n) for n in range(31) if n != 2}
    assert next(pair for pair in found.pairs if pair.key == name_of(0)).image.read_bytes() == jpegs[0]  # type: ignore[union-attr]
    assert found.notes["rows"] == {"all": 36, "absent": 3}


def test_members_that_are_no_images(raw: Path, jpegs: list[bytes]) -> None:
    members = [("README", b"x"), ("0/0/0/.DS_Store", b""), ("a/b/c/abc.jpg", jpegs[0]), (member_of(50) + ".part", b"")]
    path = write_tar(raw, 8, [*members, (member_of(30), jpegs[3])], md5=False)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo(member_of(31))
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = read(raw)
    assert {(one.image, one.reason) for one in found.rejected} == {
        *((f"images_008.tar:{name}", "no image: expected <id>.jpg") for name, _ in members),
        (f"images_008.tar:{member_of(31)}", "neither a file nor a folder"),
    }
    assert len(found.pairs) == 31


def test_rows_that_make_no_sense(raw: Path) -> None:
    text = (raw / "train.csv").read_text()
    faulty = f"{name_of(60)},u\nnot-an-id,u,3\n{name_of(61).upper()},u,3\n{name_of(62)},u,None\n{name_of(63)},u,1.5\n"
    header, *lines = text.splitlines(keepends=True)
    (raw / "train.csv").write_text(header + "".join(lines[:2]) + faulty + "".join(lines[2:]))
    found = read(raw)
    assert len(found.pairs) == 30
    assert [(one.row, one.reason.split(",")[0]) for one in sorted(found.rejected, key=lambda one: one.row or 0)] == [
        (3, "2 cells"),
        (4, "id 'not-an-id'"),
        (5, f"id '{name_of(61).upper()}'"),
        (6, "landmark_id 'None'"),
        (7, "landmark_id '1.5'"),
    ]
    assert {pair.key: pair.row for pair in found.pairs} == {
        name_of(n): n + 1 if n < 2 else n + 6 for n in range(30)
    }  # fmt: skip


def test_other_tables_are_refused(raw: Path, jpegs: list[bytes]) -> None:
    for header, message in {
        ("id", "url"): "no column 'landmark_id'; its columns: id, url",
        ("id", "url", "landmark"): "no column 'landmark_id'; nearest: 'landmark'",
        ("image", "url", "landmark_id"): "no column 'id'",
    }.items():
        write_csv(raw / "train.csv", header, [(name_of(0), "", 0)])
        with pytest.raises(UserError, match=message):
            read(raw)
    # The first version has the same columns, and other images.
    write_csv(raw / "train.csv", ("id", "url", "landmark_id"), [(name_of(n + 1000), "", n % 3) for n in range(50)])
    with pytest.raises(
        UserError, match=r"none of its 50 rows names one of the 30 images .*expected the train.csv of ver"
    ):
        read(raw)
    (raw / "train.csv").write_text("id,url,landmark_id\n")
    with pytest.raises(UserError, match="the table has no rows"):
        read(raw)
    (raw / "train.csv").write_bytes(b"id,url,landmark_id\n" + name_of(0).encode() + b",\xff\xfe,0\n")
    with pytest.raises(UserError, match="unreadable table"):
        read(raw)
    (raw / "train.csv").unlink()
    with pytest.raises(UserError, match=r"train.csv: there is no such table"):
        read(raw)
    with pytest.raises(UserError, match="there is no such folder"):
        read(raw / "none")
    for path in (raw / "train").iterdir():
        path.rename(path.with_name(path.name + ".gz"))
    with pytest.raises(UserError, match=r"found images_000.tar.gz, images_007.tar.gz, expected images_000.tar"):
        read(raw)
    (raw / "images_000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"no images in 1 tars, .*damaged or cut short after 0 files"):
        read(raw)


def test_a_table_of_faults_is_given_up_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipdist.prepare.landmark_tables.MANY_FAULTS", 10)
    write_csv(tmp_path / "train.csv", ("id", "url", "landmark_id"), [(name_of(n), "", "None") for n in range(20)])
    with pytest.raises(UserError, match="20 faulty rows beside 0 sound ones so far"):
        read_train(tmp_path / "train.csv", np.zeros(0, np.uint64))


def test_rows_keep_their_numbers_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipdist.prepare.landmark_tables.BLOCK_BYTES", 256)
    lines = [f"{name_of(n)},u{n},{n}" if n % 7 else "short" for n in range(1, 200)]
    (tmp_path / "train.csv").write_text("id,url,landmark_id\n" + "\n".join(lines) + "\n")
    wanted = np.sort(np.array([int(name_of(n), 16) for n in range(0, 200, 3)], np.uint64))
    found = read_train(tmp_path / "train.csv", wanted, others=True)
    expected = [n for n in range(1, 200) if n % 7 and not n % 3]
    assert found.landmarks_R.tolist() == expected
    assert found.urls_R.tolist() == [f"u{n}" for n in expected]
    assert [one.row for one in found.rejected] == list(range(7, 200, 7))
    assert (found.rows, found.absent) == (171, 171 - len(expected))
    assert found.rows_R.tolist() == expected
    assert found.other_rows.tolist() == [n for n in range(1, 200) if n % 7 and n % 3]


def test_rows_are_missing_once_all_tars_are_there(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipdist.prepare.landmark_tars.TARS", 2)
    found = read(raw)
    assert [(one.row, one.key) for one in found.rejected] == [(n + 1, name_of(n)) for n in (30, 31, 32)]
    assert found.notes["rows"]["absent"] == 0
    (raw / "train" / "md5.images_007.txt").write_text("junk")
    assert read(raw, min_images=5).notes["rows"]["absent"] == 3


# Splits


def found_near(contents: Sequence[int], alike: set[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(first, second, place in `HOW`) of all pairs among pictures of which the bytes are `contents`, as a search finds
    them: the first of its bytes with each copy, and the firsts of two contents that look `alike`."""
    first = {content: contents.index(content) for content in contents}
    found = [(first[content], row, 0) for row, content in enumerate(contents) if first[content] != row]
    firsts = [sorted((first[a], first[b])) for a, b in alike if a in first and b in first]
    return sorted([*found, *((one, other, 1) for one, other in firsts)])


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_near_duplicates_stay_together_and_every_class_is_learned(data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.sampled_from("AAABBCDEFG"), min_size=12, max_size=40))
    place = st.integers(0, len(labels) - 1)
    unreadable = dict.fromkeys(data.draw(st.sets(place, max_size=4)), "unreadable image")
    contents = list(range(len(labels)))
    for copies in data.draw(st.lists(st.sets(place, min_size=2, max_size=5), max_size=4)):
        for row in copies - set(unreadable):
            contents[row] = min(copies - set(unreadable))
    sound = sorted({content for row, content in enumerate(contents) if row not in unreadable})
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(sound), st.sampled_from(sound)), max_size=6))
    alike = {(min(two), max(two)) for two in drawn if two[0] != two[1]}
    count = Counter(label for n, label in enumerate(labels) if n not in unreadable)
    kept = [n for n, label in enumerate(labels) if n not in unreadable and count[label] >= 2]
    fields = [{"label": label, "landmark_id": ord(label)} for label in labels]
    pairs = [Pair(f"k{n}", b"", ["text"], one, n + 1) for n, one in enumerate(fields)]
    classes = {label: (ord(label), "") for label in dict.fromkeys(labels)}
    found = LandmarkPairs(pairs, [], {}, classes, {"min_images": 2, "landmarks": {}}, {})
    edges = found_near(contents, alike)
    near = NearDuplicates(
        np.array([edge[:2] for edge in edges], np.int64).reshape(-1, 2), np.array([edge[2] for edge in edges], int),
        np.ones(len(edges)), unreadable, {"bytes": 0, "looks": 0, "features": None, "cut_short": 0},
    )  # fmt: skip
    fractions = {"val": 0.2, "train": 0.6, "test": 0.2}
    assume(len(kept) - len(edges) >= len(fractions))  # so many units at least
    left, divided = divide_landmarks(found, near, fractions, seed=3)
    split_of = {pair.key: (name, pair.fields["unit"]) for name, held in divided.splits.items() for pair in held}
    assert set(split_of) == {f"k{n}" for n in kept} == {pair.key for pair in left.pairs}
    assert len(left.rejected) == len(unreadable)
    assert sum(left.left_out.values()) == len(labels) - len(unreadable) - len(kept)
    # Whatever was dropped, pictures of equal bytes or looks among those kept are in one unit, as if searched anew.
    anew = [(kept[a], kept[b]) for a, b, _ in found_near([contents[n] for n in kept], alike)]
    for one, other in anew:
        assert split_of[f"k{one}"] == split_of[f"k{other}"]
    assert {pair.fields["label"] for pair in divided.splits["train"]} == {labels[n] for n in kept} == set(left.classes)
    across = {(f"k{a}", f"k{b}") for a, b in anew if labels[a] != labels[b]}
    told = list(csv.DictReader(io.StringIO(divided.files["near_duplicates_across_landmarks.csv"].decode())))
    assert sorted((row["key"], row["other_key"]) for row in told) == sorted(across)
    largest = max(Counter(unit for _, unit in split_of.values()).values())
    assert ("warning: one unit holds" in str(divided)) == (largest > max(1, 0.05 * len(kept)))


def test_copies_of_a_dropped_picture_share_a_split_and_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Class A falls with its unreadable image; its first picture has the bytes of one of B and one of C."""
    labels = ["A"] * 3 + ["B"] * 6 + ["C"] * 6
    pairs = [Pair(f"k{n}", b"", ["t"], {"label": name, "landmark_id": ord(name)}) for n, name in enumerate(labels)]
    notes = {"min_images": 3, "landmarks": {}}
    told = {"bytes": 2, "looks": 0, "features": None, "cut_short": 7}
    near = NearDuplicates(np.array([[0, 3], [0, 9]]), np.zeros(2, int), np.ones(2), {1: "broken"}, told)
    for seed in range(20):
        found = LandmarkPairs(list(pairs), [], {}, {name: (ord(name), "") for name in "ABC"}, notes, {})
        _, divided = divide_landmarks(found, near, {"train": 0.5, "val": 0.25, "test": 0.25}, seed)
        where = {pair.key: name for name, held in divided.splits.items() for pair in held}
        assert where["k3"] == where["k9"]
        assert divided.notes["near_duplicates"]["across_landmarks"]["pairs"] == 1
        assert divided.notes["near_duplicates"]["images_in_shared_units"] == 2
    assert "warning: 7 pictures look like so many others that not all pairs were compared" in str(divided)


# From raw files to a set


def units_by_split(packed: ShardSet) -> dict[str, set[str]]:
    return {
        name: {packed.split(name).read(n).fields["unit"] for n in range(len(packed.split(name)))}
        for name in packed.manifest.splits
    }


def split_of_keys(packed: ShardSet) -> dict[str, str]:
    return {packed.split(name).key(n): name for name in packed.manifest.splits for n in range(len(packed.split(name)))}


def test_the_recipe_on_drawn_landmarks(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(drawn, "--out", tmp_path / "out", "--phantom", LANDMARKS)
    printed = capsys.readouterr().out
    packed = ShardSet.open(tmp_path / "out")
    units, notes = units_by_split(packed), packed.manifest.notes
    assert list(units) == ["train", "val", "test"]
    assert len(set.union(*units.values())) == sum(map(len, units.values()))
    told = json.loads((drawn / "phantom.json").read_text())
    rejected = rows_of(tmp_path / "out" / "rejected.csv")
    assert {row["key"] for row in rejected} == set(told["unreadable"])
    assert all(row["reason"].startswith("unreadable image") and row["row"] for row in rejected)
    assert notes["near_duplicates"]["features"] is None
    assert notes["synthetic"] is True
    assert "Synthetic" in packed.manifest.license
    assert "features not compared (--embed)" in printed
    assert "rows absent: their images are in none of these tars" in printed

    split_of = split_of_keys(packed)
    pairs = [pair for pair in read(drawn).pairs if pair.key in split_of]
    near = near_duplicates([pair.image for pair in pairs], workers=0, quiet=True)
    same = {frozenset(pairs[row].key for row in rows) for rows in near.pairs_P2.tolist()}
    assert all(len({split_of[key] for key in two}) == 1 for two in same)
    kinds = Counter(one["kind"] for one in told["planted"])
    recalled = Counter(one["kind"] for one in told["planted"] if {one["of"], one["copy"]} in same)
    assert all(recalled[kind] == kinds[kind] for kind in ("copied", MISLABELLED))
    # Of 96 landmarks, 32 of each kind: 29 resized, 29 brightened, 28 trimmed. A flat sky has little to compare.
    assert sum(recalled[kind] for kind in BY_LOOKS) >= 0.8 * sum(kinds[kind] for kind in BY_LOOKS)
    found = notes["near_duplicates"]
    assert found["bytes"] == kinds["copied"]
    assert found["across_landmarks"]["pairs"] == kinds[MISLABELLED]
    listed = rows_of(tmp_path / "out" / found["across_landmarks"]["listed_in"])
    across = {frozenset((row["key"], row["other_key"])) for row in listed}
    assert across == {frozenset((one["of"], one["copy"])) for one in told["planted"] if one["kind"] == MISLABELLED}
    assert all(row["label"] != row["other_label"] and row["how"] == "looks" for row in listed)

    classes = rows_of(tmp_path / "out" / notes["labels"])
    assert len(classes) == LANDMARKS == notes["landmarks"]["landmarks"]["kept"]
    assert len({row["label"] for row in classes}) == LANDMARKS
    assert all(int(row["train"]) > 0 for row in classes)
    assert sum(int(row[name]) for row in classes for name in units) == len(split_of)
    assert set(notes["files"]) == {"landmarks.csv", "near_duplicates_across_landmarks.csv"}
    sample = packed.split("test").read(0)
    row = next(row for row in classes if row["label"] == sample.fields["label"])
    assert int(row["landmark_id"]) == sample.fields["landmark_id"]
    assert sample.texts == [f"a photo of {row['label']}"]
    assert set(sample.fields) == {"label", "landmark_id", "url", "author", "license", "unit"}
    assert notes["landmarks"]["left_out"]["of too small classes"] > 0

    with pytest.raises(UserError, match="already holds a shard set"):
        recipe(drawn, "--out", tmp_path / "out")


def colour_features(images: Any) -> Any:
    """What barely changes when a picture is cut: how its colours are distributed. In place of a tower's features."""
    import torch

    codes = (images // 32).long()
    codes = (codes[:, 0] * 8 + codes[:, 1]) * 8 + codes[:, 2]
    counts = torch.stack([torch.bincount(code.flatten(), minlength=512) for code in codes]).float()
    return torch.nn.functional.normalize(counts.sqrt(), dim=1)


def test_crops_that_only_features_find_keep_together(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from clipdist.prepare.embedding import ImageEmbedder

    embedder = ImageEmbedder(colour_features, 96, "squash", 512, {"model": "colours"}, torch.device("cpu"))
    monkeypatch.setattr(ImageEmbedder, "named", staticmethod(lambda name: embedder))
    planted = json.loads((drawn / "phantom.json").read_text())["planted"]
    zoomed = [one for one in planted if one["kind"] in BY_FEATURES]
    together = {}
    for name, words in {"looks": [], "features": ["--embed", "colours", "--cosine", 0.97]}.items():
        recipe(drawn, "--out", tmp_path / name, "--split", "train=0.5", "test=0.5", *words)
        packed = ShardSet.open(tmp_path / name)
        assert all(not one & other for one, other in [list(units_by_split(packed).values())])
        unit_of = {
            sample.key: sample.fields["unit"]
            for split in packed.manifest.splits
            for sample in map(packed.split(split).read, range(len(packed.split(split))))
        }
        together[name] = sum(unit_of[one["of"]] == unit_of[one["copy"]] for one in zoomed)
    assert together["looks"] <= len(zoomed) // 2 < together["features"]
    assert packed.manifest.notes["near_duplicates"]["features"]["model"] == "colours"
    assert "by features" in capsys.readouterr().out


def test_the_limit_of_rejected_images(raw: Path, tmp_path: Path) -> None:
    (raw / "train" / "md5.images_007.txt").write_text("junk")
    with pytest.raises(UserError, match=r"16 of 31 images rejected so far, above the limit of 5.00%.*--max-rejected"):
        recipe(raw, "--out", tmp_path / "out", "--min-images", 5)
    assert len(rows_of(tmp_path / "out" / "rejected.csv")) == 16
    assert not (tmp_path / "out" / "manifest.json").exists()
    recipe(raw, "--out", tmp_path / "out", "--min-images", 5, "--max-rejected", 0.6, "--split", "train=0.5", "test=0.5")
    assert sum(len(found) for found in units_by_split(ShardSet.open(tmp_path / "out")).values()) == 15
    assert len(rows_of(tmp_path / "out" / "rejected.csv")) == 16


def test_a_class_that_unreadable_images_make_too_small(
    raw: Path, tmp_path: Path, jpegs: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = {0: b"", 3: jpegs[3][:400], 1: b"<html>"}
    for tar in (0, 7):
        members = [(member_of(n), damaged.get(n, jpegs[n])) for n in range(30) if (n % 2 == 1) == (tar == 7)]
        write_tar(raw, tar, members)
    with pytest.raises(
        UserError, match=r"3 of 30 images that were looked at rejected so far, above the limit of 5.00%"
    ):
        recipe(raw, "--out", tmp_path / "out")
    recipe(raw, "--out", tmp_path / "out", "--max-rejected", 0.2, "--min-images", 9, "--split", "train=0.5", "test=0.5")
    packed = ShardSet.open(tmp_path / "out")
    assert {row["label"] for row in rows_of(tmp_path / "out" / "landmarks.csv")} == {"City Gate (1)", "City Gate (2)"}
    assert packed.manifest.notes["landmarks"]["left_out"]["of classes too small without the unreadable"] == 8
    assert "rejected: 3 of 30" in capsys.readouterr().out
    assert {row["key"] for row in rows_of(tmp_path / "out" / "rejected.csv")} == set(map(name_of, damaged))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min-images", 0], "--min-images: found 0"),
        (["--template", "a photo"], "template 'a photo': expected exactly one {}"),
        (["--embed", "no_such_tower"], "--embed no_such_tower: .*timm has no model"),
        (["--embed", "test_vit:nowhere.pt"], "no file nowhere.pt"),
        (["--embed", "test_vit:random", "--cosine", 1.5], "--cosine: found 1.5"),
        (["--bits", -1], "--bits: found -1, expected 0 to 16"),
        (["--bits", 17], "--bits: found 17, expected 0 to 16"),
    ],
)
def test_options_that_make_no_sense(raw: Path, tmp_path: Path, words: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(raw, "--out", tmp_path / "out", *words)


# The drawn landmarks themselves


def test_drawings_depend_on_their_seed_alone(tmp_path: Path) -> None:
    draw: Callable[..., Path] = write_landmarks_layout
    one, two = draw(tmp_path / "a", 3, side=48), draw(tmp_path / "b", 3, side=48)
    other = draw(tmp_path / "c", 3, side=48, seed=1)
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert [(one / name).read_bytes() for name in names] == [(two / name).read_bytes() for name in names]
    assert all((one / name).read_bytes() != (other / name).read_bytes() for name in names if name.suffix == ".tar")
    before = (one / "train.csv").stat().st_mtime_ns
    assert draw(one, 3, side=48) == one
    assert (one / "train.csv").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds something else"):
        draw(one, 4, side=48)
    with pytest.raises(UserError, match="expected at least 2"):
        draw(tmp_path / "d", 1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "b", "c"]
    picture = Image.open(io.BytesIO(read(one).pairs[0].image.read_bytes()))  # type: ignore[union-attr]
    assert max(picture.size) <= 48
