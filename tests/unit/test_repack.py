"""Repacking: keys, fields, captions and untouched bytes stay; choices are exact; what is damaged is named."""

import csv
import errno
import io
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.cli import main
from clipdist.data.images.looks import difference_hash
from clipdist.data.sets.conditions import parse_condition
from clipdist.data.sets.duplicates import NEAR_BITS, Duplicates, near_pairs
from clipdist.data.sets.pack import REJECTED
from clipdist.data.sets.repack import repack
from clipdist.data.sets.repack_samples import Choice
from clipdist.data.sets.verify import verify_set
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shards import MANIFEST, RawSample, ShardSet
from clipdist.errors import UserError
from tests.unit.pictures import encoded, hashed_alike, picture


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twenty samples of ten units in train, six in val; sizes, formats, labels and captions of several kinds."""
    folder = tmp_path / "source"
    with ShardSetWriter(folder, samples_per_shard=6, license_text="CC0") as writer:
        for number in range(26):
            format, extension = [("PNG", "png"), ("JPEG", "jpeg")][number % 2]
            image = encoded(picture(number, (40 + 10 * (number % 3), 30 + 10 * (number % 3))), format)
            text: Any = [f"one {number}", f"two {number}"] if number % 4 == 0 else f"caption {number}"
            fields = {"text": text, "unit": f"u{number // 2}", "label": "abc"[number % 3], "age": number}
            writer.write("train" if number < 20 else "val", f"a/{number:03d}", image, extension, fields)
    return folder


def samples(folder: Path, split: str = "train") -> list[RawSample]:
    opened = ShardSet.open(folder).split(split)
    return [opened.read(number) for number in range(len(opened))]


def keys(folder: Path, split: str = "train") -> list[str]:
    return [sample.key for sample in samples(folder, split)]


def set_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def rejected_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / REJECTED, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_what_json_cannot_hold_is_one_bad_sample_or_not_given(tmp_path: Path) -> None:
    image, folder = encoded(picture()), tmp_path / "foreign"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for key, info in {
            "a": b'{"text": "x", "age": NaN, "box": [1, -Infinity], "more": {"n": 1e999}}',
            "b": b'{"text": "half \\ud800"}',
            "c": b'{"text": "y"}',
        }.items():
            for name, data in ((f"{key}.png", image), (f"{key}.json", info)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match=r"a.tar: sample 'b' cannot be used: .*surrogates.*pass --drop-bad"):
        repack(folder, tmp_path / "out", workers=0, quiet=True)
    repack(folder, tmp_path / "out", Choice(drop_bad=True), max_rejected_fraction=0.5, workers=0, quiet=True)
    assert [(sample.key, sample.fields) for sample in samples(tmp_path / "out", "a")] == [
        ("a", {"age": None, "box": [1, None], "more": {"n": None}}),
        ("c", {}),
    ]
    assert [row["key"] for row in rejected_rows(tmp_path / "out")] == ["b"]


# What stays


@pytest.mark.parametrize("zstd", [False, True])
def test_untouched_samples_are_what_they_were(source: Path, tmp_path: Path, zstd: bool) -> None:
    words = [
        "repack",
        str(source),
        str(tmp_path / "out"),
        "--samples-per-shard",
        "4",
        "--zstd" if zstd else "--no-zstd",
    ]
    assert main([*words, "--workers", "0"]) == 0
    for split in ("train", "val"):
        assert samples(tmp_path / "out", split) == samples(source, split)
    old, new = ShardSet.open(source).manifest, ShardSet.open(tmp_path / "out").manifest
    assert len(new.splits["train"]) == 5
    assert new.splits["train"][0].file.endswith(".zst") == zstd
    assert (new.license, new.sources) == ("CC0", {"source": old.digest})
    assert new.notes["source"]["digest"] == old.digest
    assert new.notes["operations"]["shuffle"] is None
    assert verify_set(tmp_path / "out", workers=1).counts()["structure"] == 0


def test_a_shard_ends_at_its_size(source: Path, tmp_path: Path) -> None:
    repack(source, tmp_path / "out", samples_per_shard=1000, shard_mib=0.02, workers=0, quiet=True)
    shards = ShardSet.open(tmp_path / "out").manifest.splits["train"]
    assert len(shards) > 2
    assert all(shard.bytes > 0.02 * 2**20 for shard in shards[:-1])
    assert keys(tmp_path / "out") == keys(source)


def test_any_number_of_workers_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        words = ["--side", "20", "--format", "jpg", "--dedupe", "exact", "--shuffle", "3", "--workers", str(workers)]
        assert main(["repack", str(source), str(tmp_path / f"out{workers}"), *words]) == 0
    assert set_bytes(tmp_path / "out0") == set_bytes(tmp_path / "out2")
    assert {sample.extension for sample in samples(tmp_path / "out0")} == {"jpg"}


# Choosing


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("age >= 17", [17, 18, 19]),
        ("age<2", [0, 1]),
        ("age == 7", [7]),
        ('age == "7"', [7]),
        ("age in 3, 4,99", [3, 4]),
        ('label in ["a"]', [0, 3, 6, 9, 12, 15, 18]),
        ("label not in a,b", [2, 5, 8, 11, 14, 17]),
        ("unit == u4", [8, 9]),
        ("key == a/005", [5]),
        ("text == two 8", [8]),
        ("missing == 1", []),
        ("missing != 1", list(range(20))),
        ("label > 5", []),
    ],
)
def test_conditions(source: Path, condition: str, expected: list[int]) -> None:
    found = parse_condition(condition)
    kept = [s for s in samples(source) if found.holds({"key": s.key, **s.fields, "text": s.texts})]
    assert [sample.fields["age"] for sample in kept] == expected


@pytest.mark.parametrize("text", ["", "age", "age = 3", "age ~ 3", "== 3", "age < [1]", "age < true"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--where"):
        parse_condition(text)


def test_conditions_and_sizes_are_joined(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--where", "age > 3", "--where", "label != a", "--min-side", "50", "--split", "train", "--workers", "0"]
    assert main(["repack", str(source), str(tmp_path / "out"), *words]) == 0
    assert [sample.fields["age"] for sample in samples(tmp_path / "out")] == [5, 8, 11, 14, 17]
    assert list(ShardSet.open(tmp_path / "out").manifest.splits) == ["train"]
    printed = capsys.readouterr().out
    assert "left out: 4 for --where age > 3" in printed
    assert "left out: 6 for --min-side 50" in printed


def test_splits_are_renamed_and_joined(source: Path, tmp_path: Path) -> None:
    repack(source, tmp_path / "out", Choice(splits={"val": "all", "train": "all"}), workers=0, quiet=True)
    assert keys(tmp_path / "out", "all") == keys(source, "val") + keys(source, "train")
    with pytest.raises(UserError, match="no split 'test'"):
        repack(source, tmp_path / "other", Choice(splits={"test": "test"}), workers=0, quiet=True)


def test_new_splits_keep_units_whole(source: Path, tmp_path: Path) -> None:
    fractions = ["--split-fractions", "train=0.5", "val=0.25", "test=0.25"]
    assert main(["repack", str(source), str(tmp_path / "out"), *fractions, "--workers", "0"]) == 0
    units = {s: {sample.fields["unit"] for sample in samples(tmp_path / "out", s)} for s in ("train", "val", "test")}
    assert sum(map(len, units.values())) == 13
    everything = [key for split in units for key in keys(tmp_path / "out", split)]
    assert sorted(everything) == sorted(keys(source) + keys(source, "val"))


def test_a_shuffle_is_one_permutation_of_the_whole_set(source: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        choice = Choice(splits={"train": "all", "val": "all"}, shuffle=seed)
        repack(source, tmp_path / name, choice, workers=0, quiet=True)
    assert keys(tmp_path / "one", "all") == keys(tmp_path / "again", "all") != keys(tmp_path / "two", "all")
    in_order = keys(source) + keys(source, "val")
    expected = np.random.default_rng(1).permutation(26)
    assert keys(tmp_path / "one", "all") == [in_order[number] for number in expected]


# Duplicates


def test_the_first_of_equal_pictures_is_kept(tmp_path: Path) -> None:
    same, near = encoded(picture(1), "PNG"), encoded(picture(1), "JPEG", quality=95)
    images = {"first": same, "other": encoded(picture(2)), "copy": same, "near": near, "last": encoded(picture(3))}
    with ShardSetWriter(tmp_path / "set") as writer:
        for key, image in images.items():
            writer.write("train", key, image, "jpg" if key == "near" else "png", {"text": key})
    kept = {"exact": ["first", "other", "near", "last"], "near": ["first", "other", "last"]}
    for how, expected in kept.items():
        repack(tmp_path / "set", tmp_path / how, Choice(dedupe=how), workers=0, quiet=True)  # type: ignore[arg-type]
        assert keys(tmp_path / how) == expected
    reasons = {row["key"]: row["reason"] for row in rejected_rows(tmp_path / "near")}
    assert reasons == {"copy": "same picture as first", "near": "looks like first"}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_near_pairs_are_all_those_within_the_distance(data: st.DataObject) -> None:
    base = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8))
    flips = st.lists(st.integers(0, 63), max_size=5)
    looks = [base[data.draw(st.integers(0, len(base) - 1))] for _ in range(data.draw(st.integers(0, 12)))]
    looks = base + [look ^ sum({1 << bit for bit in data.draw(flips)}) for look in looks]
    found = {
        pair for f, s in near_pairs(np.array(looks, np.uint64)) for pair in zip(f.tolist(), s.tolist(), strict=True)
    }
    numbered = list(enumerate(looks))
    assert found == {(i, j) for i, a in numbered for j, b in numbered if i < j and (a ^ b).bit_count() <= NEAR_BITS}


def test_a_picture_goes_only_for_one_that_is_kept() -> None:
    near_P2 = np.array([[1, 2], [0, 1]])  # the third is near the second alone, and the last a copy of the second
    assert Duplicates(np.array([0, 1, 2, 1]), near_P2, np.ones(2, np.float32)).keep_first().tolist() == [0, 0, 2, 0]


def test_pictures_that_only_hash_alike_are_kept(tmp_path: Path) -> None:
    images = [hashed_alike(seed) for seed in range(2)]
    assert len({difference_hash(image) for image in images}) == 1
    with ShardSetWriter(tmp_path / "set") as writer:
        for key, image in zip("ab", images, strict=True):
            writer.write("train", key, encoded(image, "PNG"), "png", {"text": key})
    repack(tmp_path / "set", tmp_path / "near", Choice(dedupe="near"), workers=0, quiet=True)
    assert keys(tmp_path / "near") == ["a", "b"]
    assert not any(verify_set(tmp_path / "set", workers=1).counts().values())


# Splits by a table


def split_table(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("key,split\n" + "".join(f"{key},{split}\n" for key, split in rows), encoding="utf-8")
    return path


def test_a_table_names_the_splits_and_leaves_out_the_rest(source: Path, tmp_path: Path) -> None:
    rows = [("a/003", "test"), ("a/021", "train"), ("a/000", "train"), ("a/001", "")]
    table = split_table(tmp_path / "splits.csv", rows)
    assert main(["repack", str(source), str(tmp_path / "new"), "--split-table", str(table)]) == 0
    assert keys(tmp_path / "new", "test") == ["a/003"]
    assert keys(tmp_path / "new", "train") == ["a/000", "a/021"]
    manifest = ShardSet.open(tmp_path / "new").manifest
    assert manifest.notes["left_out"] == {f"--split-table {table}": 23}
    assert "splits.csv" in manifest.sources


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a/000", "train"), ("a/000", "test")], "1 keys come more than once"),
        ([("a/000", "train"), ("other", "test")], "1 of 2 keys, such as 'other', are not in"),
        ([("a/000", "a b")], "found the split 'a b', expected letters"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    source: Path, tmp_path: Path, rows: list[tuple[str, str]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = split_table(tmp_path / "splits.csv", rows)
    assert main(["repack", str(source), str(tmp_path / "new"), "--split-table", str(table)]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="--split-table excludes"):
        Choice(split_table=str(table), splits={"train": "train"})


# Tars of other tools


def foreign_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("packed", ["", ".zst", ".gz"])
def test_foreign_tars_are_read_and_left_alone(tmp_path: Path, packed: str) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    images = [encoded(picture(number)) for number in range(6)]
    members = [(f"{n:03d}.{e}", d) for n, i in enumerate(images) for e, d in (("png", i), ("txt", b"text %d" % n))]
    foreign_tar(folder / "train-000000.tar", members)
    data = (folder / "train-000000.tar").read_bytes()
    if packed:
        import gzip

        compressed = zstandard.compress(data) if packed == ".zst" else gzip.compress(data)
        (folder / f"train-000000.tar{packed}").write_bytes(compressed)
        (folder / "train-000000.tar").unlink()
    before = set_bytes(folder)
    repack(folder, tmp_path / "out", Choice(shuffle=5), zstd=False, workers=0, quiet=True)
    assert set_bytes(folder) == before
    assert sorted((s.key, s.image, s.texts[0]) for s in samples(tmp_path / "out")) == [
        (f"{number:03d}", image, f"text {number}") for number, image in enumerate(images)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "out"]
    read = webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False, empty_check=False)
    assert len(list(read)) == 6


def test_scattered_members_and_missing_images_are_named(tmp_path: Path) -> None:
    folder, image = tmp_path / "foreign", encoded(picture())
    folder.mkdir()
    whole = [(f"{key}.{e}", d) for key in "abcd" for e, d in (("png", image), ("txt", b"text"))]
    foreign_tar(folder / "t-0.tar", [*whole, ("e.txt", b"no image"), ("a.json", b"{}")])
    with pytest.raises(UserError, match=r"t-0.tar: sample 'e' cannot be used: 0 images, expected one; .*--drop-bad"):
        repack(folder, tmp_path / "out", workers=0, quiet=True)
    assert not (tmp_path / "out" / MANIFEST).exists()
    repack(folder, tmp_path / "out", Choice(drop_bad=True), max_rejected_fraction=0.5, workers=0, quiet=True)
    assert keys(tmp_path / "out", "t") == list("abcd")
    assert [row["key"] for row in rejected_rows(tmp_path / "out")] == ["e", "a"]


def test_a_cut_tar_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    foreign_tar(folder / "t-0.tar", [(f"{n}.png", encoded(picture(n))) for n in range(5)])
    whole = (folder / "t-0.tar").read_bytes()
    (folder / "t-0.tar").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(UserError, match=r"t-0.tar: damaged tar after \d samples"):
        repack(folder, tmp_path / "out", workers=0, quiet=True)
    assert not (tmp_path / "out" / MANIFEST).exists()


# Faults


def damage(source: Path, key: str) -> None:
    """Turns over a byte within the image of a sample."""
    opened = ShardSet.open(source).split("train")
    number = next(number for number in range(len(opened)) if opened.key(number) == key)
    shard, row = opened.locate(number)
    path = source / opened.shards[shard].file
    offset = int(opened.shard(shard).index.records[row]["image_offset"])
    data = bytearray(path.read_bytes())
    data[offset + 60] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize("options", [[], ["--dedupe", "exact"], ["--workers", "2"]])
def test_damaged_samples_are_named_and_dropped_only_when_asked(
    source: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(source, "a/008")
    words = ["repack", str(source), str(tmp_path / "out"), "--check", "none", *options]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "train-000001.tar: sample 'a/008' cannot be used: checksum differs" in said
    assert "--drop-bad" in said
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert main([*words, "--drop-bad"]) == 0
    assert keys(tmp_path / "out") == [key for key in keys_of_order(source) if key != "a/008"]
    (row,) = rejected_rows(tmp_path / "out")
    assert (row["row"], row["key"], row["image"]) == ("9", "a/008", "train-000001.tar")
    assert main([*words, "--drop-bad", "--max-rejected", "0.01", "--overwrite"]) == 2
    assert "above the limit of 1.00%" in capsys.readouterr().err


def keys_of_order(folder: Path) -> list[str]:
    opened = ShardSet.open(folder).split("train")
    return [opened.key(number) for number in range(len(opened))]


def test_a_full_disk_leaves_no_manifest(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = ShardSetWriter.write, []

    def fail_at_the_tenth(self: ShardSetWriter, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, *arguments)

    monkeypatch.setattr(ShardSetWriter, "write", fail_at_the_tenth)
    with pytest.raises(UserError, match=r"out: no space left .* after 9 of 26 samples; the whole set needs about"):
        repack(source, tmp_path / "out", workers=0, quiet=True)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_an_interrupt_leaves_no_manifest_and_the_next_run_is_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = ShardSetWriter.write, []

    def interrupt_at_the_fifteenth(self: ShardSetWriter, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 15:
            raise KeyboardInterrupt
        write(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ShardSetWriter, "write", interrupt_at_the_fifteenth)
        with pytest.raises(KeyboardInterrupt):
            repack(source, tmp_path / "out", samples_per_shard=4, workers=0, quiet=True)
    assert not (tmp_path / "out" / MANIFEST).exists()
    repack(source, tmp_path / "out", samples_per_shard=4, workers=0, quiet=True)
    repack(source, tmp_path / "other", samples_per_shard=4, workers=0, quiet=True)
    assert set_bytes(tmp_path / "out") == set_bytes(tmp_path / "other")


def test_wrong_places_and_wishes_are_refused(source: Path, tmp_path: Path) -> None:
    for folder, choice, message in (
        (source, Choice(), "is the source"),
        (tmp_path / "out", Choice(where=(parse_condition("age > 99"),)), "nothing is left"),
    ):
        with pytest.raises(UserError, match=message):
            repack(source, folder, choice, workers=0, quiet=True)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with pytest.raises(UserError, match="split name"):
        Choice(splits={"train": "a b"})
    with pytest.raises(UserError, match="no such folder"):
        repack(tmp_path / "nothing", tmp_path / "out", workers=0, quiet=True)
