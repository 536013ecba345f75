"""Packing: what goes in comes out, the same bytes for any number of workers, and every bad input named."""

import argparse
import csv
import errno
import json
import os
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.data.sets import pack_command
from clipdist.data.sets.pack import CHUNK, LARGEST_CHUNK, REJECTED, Pair, in_order, pack_pairs
from clipdist.data.sets.recode import ImageOptions
from clipdist.data.sets.writer import ShardSetWriter, tar_header
from clipdist.data.shards import MANIFEST, ShardSet, checksum_file
from clipdist.errors import UserError
from tests.unit.pictures import encoded, photograph, picture

PNG = encoded(picture(5, (9, 7)))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty images of twenty patients with a CSV beside them."""
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    rows = []
    for number in range(40):
        name, format = (f"a/{number:03d}.jpg", "JPEG") if number % 2 else (f"{number:03d}.png", "PNG")
        (folder / name).write_bytes(encoded(picture(number), format))
        rows.append(f'{name},"lesion, number {number}",Läsion {number},p{number // 2},{"ab"[number % 4 == 0]},{number}')
    header = "file,caption,german,patient,diagnosis,age\n"
    (tmp_path / "pairs.csv").write_text("\ufeff" + header + "\n".join(rows) + "\n", encoding="utf-8")
    return folder


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    pack_command.add_arguments(parser)
    return pack_command.run(parser.parse_args([str(argument) for argument in arguments]))


def table_arguments(photos: Path) -> list[object]:
    table = photos.parent / "pairs.csv"
    return [table, "--images", photos, "--image-column", "file", "--text-column", "caption", "--workers", 0]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def rejected_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / REJECTED, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# What goes in comes out


def test_a_packed_table_is_read_back(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [*table_arguments(photos), "--text-column", "german", "--label-column", "diagnosis"]
    split = ["--unit-column", "patient", "--split", "train=0.8", "val=0.1", "test=0.1"]
    assert run(*arguments, "--keep-columns", "age", *split, "--samples-per-shard", 10, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "rejected: none of 40"
    assert "16 units" in printed
    assert "asked for: train=0.8" in printed

    opened_set = ShardSet.open(out)
    assert opened_set.manifest.sources == {"pairs.csv": checksum_file(tmp_path / "pairs.csv")}
    seen: dict[str, set[str]] = {}
    for name, count in {"train": 32, "val": 4, "test": 4}.items():
        split_read = opened_set.split(name)
        assert len(split_read) == count
        for position in range(count):
            sample = split_read.read(position)
            number = int(sample.key[-3:])
            stored = photos / f"{sample.key}.{sample.extension}"
            assert sample.image == stored.read_bytes()  # untouched
            assert sample.texts == [f"lesion, number {number}", f"Läsion {number}"]
            assert sample.fields == {"label": "ab"[number % 4 == 0], "unit": f"p{number // 2}", "age": number}
            seen.setdefault(sample.fields["unit"], set()).add(name)
    assert len(seen) == 20
    assert all(len(names) == 1 for names in seen.values())
    assert not (out / REJECTED).exists()


@pytest.mark.parametrize("zstd", [False, True])
def test_plain_webdataset_reads_what_was_packed(photos: Path, tmp_path: Path, zstd: bool) -> None:
    out = tmp_path / "out"
    run(*table_arguments(photos), "--samples-per-shard", 25, "--out", out, *["--zstd"] * zstd)
    shards = sorted(out.glob("*.tar*"))
    assert [shard.name for shard in shards] == [f"train-00000{n}.tar{'.zst' * zstd}" for n in range(2)]
    if zstd:
        import zstandard

        for shard in shards:
            with open(shard, "rb") as file:
                shard.with_suffix("").write_bytes(zstandard.ZstdDecompressor().stream_reader(file, True).read())
        shards = [shard.with_suffix("") for shard in shards]
    found = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False, empty_check=False))
    assert len(found) == 40
    for sample in found:
        extension = "jpg" if "jpg" in sample else "png"
        assert sample[extension] == (photos / f"{sample['__key__']}.{extension}").read_bytes()
        assert json.loads(sample["json"]) == {"text": f"lesion, number {int(sample['__key__'][-3:])}"}


SLOW = 40


def of_how_many(items: list[int]) -> list[tuple[int, int]]:
    if SLOW in items:
        time.sleep(0.2)
    return [(item, len(items)) for item in items]


def test_quick_work_is_handed_over_in_larger_chunks_and_keeps_its_order() -> None:
    found = list(in_order(of_how_many, range(8000), 2))
    assert [item for item, _ in found] == list(range(8000))
    sizes = [size for _, size in found]
    assert (sizes[0], max(sizes)) == (CHUNK, LARGEST_CHUNK)
    assert CHUNK in sizes[SLOW + 1 :]


def test_any_number_of_workers_writes_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    (photos / "006.png").write_bytes(b"no image")
    for workers in (0, 1, 2):
        options = ["--workers", workers, "--side", 16, "--format", "jpg", "--samples-per-shard", 7]
        run(*table_arguments(photos), "--out", tmp_path / f"out{workers}", *options)
    first = shard_bytes(tmp_path / "out0")
    assert len(first) == 2 * 6 + 1
    assert shard_bytes(tmp_path / "out1") == first
    assert shard_bytes(tmp_path / "out2") == first


def test_samples_are_shuffled_within_their_split_by_the_seed(photos: Path, tmp_path: Path) -> None:
    def keys(name: str, *options: object) -> list[str]:
        run(*table_arguments(photos), "--out", tmp_path / name, *options)
        split = ShardSet.open(tmp_path / name).split("train")
        return [split.key(position) for position in range(len(split))]

    in_order = keys("ordered", "--keep-order")
    assert in_order == [f"a/{n:03d}" if n % 2 else f"{n:03d}" for n in range(40)]
    assert in_order != keys("zero") != keys("one", "--seed", 1)
    assert sorted(in_order) == sorted(keys("again", "--seed", 1))


def test_a_folder_with_texts_beside_its_images(photos: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "pairs.csv", photos / ".hidden.png"):
        path.write_bytes(b"not to be read")
    for number in range(0, 40, 2):
        (photos / f"{number:03d}.txt").write_text(f"\ufeffphoto {number}\n", encoding="utf-8")
    for number in range(1, 40, 2):
        fields = {"text": ["one", f"two {number}"], "split": "val" if number > 30 else "train", "unit": number // 10}
        (photos / f"a/{number:03d}.jpg.json").write_text(json.dumps(fields))
    out = tmp_path / "out"
    run(photos, "--out", out, "--unit-column", "unit", "--workers", 0)
    split = ShardSet.open(out).split("train")
    samples = {sample.key: sample for sample in map(split.read, range(len(split)))}
    assert len(samples) == 40
    assert (samples["002"].texts, samples["002"].fields) == (["photo 2"], {})
    assert samples["a/035"].texts == ["one", "two 35"]
    assert samples["a/035"].fields == {"split": "val", "unit": "3"}


def test_splits_from_a_column(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.read_csv(tmp_path / "pairs.csv")
    table["fold"] = ["train"] * 19 + ["val"] * 20 + ["a b"]  # patient p9 lies in both
    table.to_csv(tmp_path / "pairs.csv", index=False)
    run(*table_arguments(photos), "--out", tmp_path / "out", "--split-column", "fold", "--unit-column", "patient")
    sets = ShardSet.open(tmp_path / "out")
    assert {name: len(sets.split(name)) for name in sets.manifest.splits} == {"train": 19, "val": 20}
    assert [row["reason"] for row in rejected_rows(tmp_path / "out")] == [
        "split 'a b' is not a name of letters, digits, _ and -"
    ]
    assert "warning: 1 unit in more than one split" in capsys.readouterr().out


def test_rows_with_the_same_image_merge_only_when_asked_to(photos: Path, tmp_path: Path) -> None:
    rows = [f"{number:03d}.png,caption {n} of {number}" for n in range(3) for number in (0, 2)]
    (tmp_path / "pairs.csv").write_text("file,caption\n" + "\n".join([*rows, rows[0]]))
    with pytest.raises(UserError, match="duplicate key 000"):
        run(*table_arguments(photos), "--out", tmp_path / "out")
    run(*table_arguments(photos), "--out", tmp_path / "out", "--merge-captions", "--keep-order")
    sample = ShardSet.open(tmp_path / "out").split("train").read(1)
    assert sample.texts == ["caption 0 of 2", "caption 1 of 2", "caption 2 of 2"]


# Pairs that cannot be packed


def test_rows_that_cannot_be_packed_are_listed_with_reasons(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = encoded(picture(9, (90, 90)), "JPEG")
    (photos / "a/001.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "002.png").write_bytes(b"")
    (photos / "004.png").write_bytes(b"<html>not found</html>")
    (photos / "006.png").unlink()
    (photos / "008.png").write_bytes(encoded(picture(size=(120, 120))))
    (photos / "010.jpg").write_bytes(encoded(picture(), "JPEG"))
    lines = (tmp_path / "pairs.csv").read_text(encoding="utf-8-sig").splitlines()
    lines[4] = "a/003.jpg,  ,,p1,a,3"
    lines[6] = ",a caption,,p1,a,3"
    (tmp_path / "pairs.csv").write_text("\n".join([*lines, "010.jpg,same key as a png,,p5,a,3"]))
    out = tmp_path / "out"
    run(*table_arguments(photos), "--out", out, "--max-rejected", 0.3, "--max-pixels", 10_000)
    rows = rejected_rows(out)
    assert {int(row["row"]): (row["key"], row["reason"].split(":")[0]) for row in rows} == {
        2: ("a/001", "unreadable image"),
        3: ("002", "empty file"),
        4: ("a/003", "empty caption"),
        5: ("004", "unreadable image"),
        6: ("", "no image named"),
        7: ("006", "missing image file"),
        9: ("008", "too large"),
        41: ("010", "duplicate key 010"),
    }
    assert "OSError: " in next(row["reason"] for row in rows if row["row"] == "2")
    assert [int(row["row"]) for row in rows] == sorted(int(row["row"]) for row in rows)
    assert rows[0]["image"] == str(photos / "a/001.jpg")
    assert capsys.readouterr().out.splitlines()[-1] == f"rejected: 8 of 41 (19.51%), see {out / REJECTED}"
    assert len(ShardSet.open(out).split("train")) == 33
    assert ShardSet.open(out).manifest.notes["rejected"] == 8


UNWRITABLE = {
    "surrogate": (Pair("surrogate", PNG, ["half a character \ud800"]), "surrogates not allowed"),
    "field": (Pair("field", PNG, ["x"], {"site": ["\udfff"]}), "surrogates not allowed"),
    "infinite": (Pair("infinite", PNG, ["x"], {"age": float("inf")}), "Out of range float"),
    "nan": (Pair("nan", PNG, ["x"], {"box": [0.5, float("nan")]}), "Out of range float"),
    "object": (Pair("object", PNG, ["x"], {"when": object()}), "not JSON serializable"),
    "long": (Pair("k" * 5000, PNG, ["x"]), "found 5000 bytes, expected at most 4096"),
    "nul": (Pair("b\0c", PNG, ["x"]), "expected a relative name without dots"),
    "dot": (Pair("a.b", PNG, ["x"]), "expected a relative name without dots"),
    "half a key": (Pair("k\udc80", PNG, ["x"]), "cannot be written in UTF-8"),
    "nul in a path": (Pair("path", Path("a\0b.png"), ["x"]), "no file can have this name"),
    "half a path": (Pair("half", Path("a\ud800.png"), ["x"]), "no file can have this name"),
    "no such path": (Pair("gone", Path("a\udcff.png"), ["x"]), "missing image file"),
}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pair_that_no_shard_can_hold_is_rejected_and_the_others_go_on(tmp_path: Path, workers: int) -> None:
    good = [Pair(f"k{number}", PNG, ["a caption"]) for number in range(5)]
    bad = [pair for pair, _ in UNWRITABLE.values()]
    options: dict[str, Any] = {"workers": workers, "shuffle": False, "max_rejected_fraction": 0.9, "quiet": True}
    summary = pack_pairs({"train": [*good[:2], *bad, *good[2:]]}, tmp_path / "out", **options)
    assert (summary.total, len(summary.rejected)) == (5, len(bad))
    found = {one.key: one.reason for one in summary.rejected}
    for pair, reason in UNWRITABLE.values():
        assert reason in found[pair.key]
    assert len(rejected_rows(tmp_path / "out")) == len(bad)
    assert ShardSet.open(tmp_path / "out").manifest.notes["rejected"] == len(bad)
    pack_pairs({"train": good}, tmp_path / "alone", **options)
    (tmp_path / "out" / REJECTED).unlink()
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "alone")
    with pytest.raises(UserError, match=r"above the limit of 5.00%"):
        pack_pairs({"train": [*good, *bad]}, tmp_path / "strict", quiet=True, workers=0)


anything = st.characters(exclude_categories=())
values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(anything, max_size=3)
pairs = st.builds(
    Pair,
    st.text(anything, max_size=3) | st.sampled_from(["a", "b", "a/b", "k" * 5000]),
    st.sampled_from([PNG, PNG[:50], b"", b"no image"]),
    st.lists(st.text(anything, max_size=4), max_size=2),
    st.dictionaries(st.text(anything, max_size=3), values | st.lists(values, max_size=2), max_size=2),
)


@given(st.lists(pairs, max_size=8))
@settings(max_examples=30, deadline=None)
def test_any_pair_is_packed_or_stands_in_the_list_of_rejected(
    tmp_path_factory: pytest.TempPathFactory, given_pairs: list[Pair]
) -> None:
    out = tmp_path_factory.mktemp("any") / "out"
    sure = Pair("sure", PNG, ["a caption"])
    options: dict[str, Any] = {"workers": 0, "max_rejected_fraction": 1, "quiet": True}
    pairs = [*given_pairs, sure]
    summary = pack_pairs({"train": pairs}, out, **options)
    split = ShardSet.open(out).split("train")
    packed = {sample.key: sample for sample in map(split.read, range(len(split)))}
    rejected = rejected_rows(out) if summary.rejected else []
    assert len(packed) + len(rejected) == len(pairs)
    assert Counter([*packed, *(one.key for one in summary.rejected)]) == Counter(pair.key for pair in pairs)
    for sample in packed.values():
        pair = next(pair for pair in pairs if pair.key == sample.key and pair.text and any(map(str.strip, pair.text)))
        assert sample.image == pair.image
        assert sample.texts == [text.strip() for text in pair.text if text.strip()]
        assert {**sample.fields, "text": 0} == {**pair.fields, "text": 0}


@pytest.mark.parametrize(
    ("check", "found"),
    [("decode", {"cut", "grey", "text", "large"}), ("header", {"cut", "text", "large"}), ("none", {"text"})],
)
def test_each_check_finds_what_it_says(tmp_path: Path, check: str, found: set[str]) -> None:
    whole = encoded(picture(9, (90, 90)), "JPEG")
    grey = bytearray(encoded(picture(9, (90, 90))))
    grey[len(grey) // 2 : len(grey) // 2 + 20] = bytes(20)  # within the pixels: only decoding tells
    images = {"cut": whole[:-40], "grey": bytes(grey), "text": b"<html>", "large": encoded(picture(1, (200, 200)))}
    pairs = [Pair(key, data, ["caption"]) for key, data in {**images, "whole": whole}.items()]
    options = ImageOptions(max_pixels=10_000, check=check)  # type: ignore[arg-type]
    summary = pack_pairs(
        {"train": pairs}, tmp_path / "out", images=options, workers=0, max_rejected_fraction=1, quiet=True
    )
    assert {rejected.key for rejected in summary.rejected} == found
    stored = ShardSet.open(tmp_path / "out").split("train")
    for sample in map(stored.read, range(len(stored))):
        assert (sample.image, sample.extension) == (
            {**images, "whole": whole}[sample.key],
            "jpg" if sample.key in ("whole", "cut") else "png",
        )


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1), st.integers(0, 9 << 30))
def test_headers_by_hand_are_those_of_tarfile(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert tar_header(name, size) == member.tobuf(tarfile.PAX_FORMAT)


def test_too_many_rejected_is_an_error_that_names_three(photos: Path, tmp_path: Path) -> None:
    for number in range(0, 10, 2):
        (photos / f"{number:03d}.png").unlink()
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        run(*table_arguments(photos), "--out", out, "--keep-order")
    message = str(caught.value)
    assert "3 of 40 pairs rejected so far, above the limit of 5.00%" in message
    assert message.count("missing image file") == 3
    assert "row 1 (" in message
    assert "\n" not in message
    assert not (out / MANIFEST).exists()
    assert len(rejected_rows(out)) == 3
    run(*table_arguments(photos), "--out", out, "--max-rejected", 0.2)  # the unfinished set is no obstacle
    assert len(ShardSet.open(out).split("train")) == 35


def test_nothing_to_pack_is_an_error_whatever_the_limit(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    arguments = table_arguments(photos)
    arguments[2] = tmp_path / "empty"
    with pytest.raises(UserError, match=r"nothing could be packed: row \d+ .*missing image file"):
        run(*arguments, "--out", tmp_path / "out", "--max-rejected", 1)
    assert not (tmp_path / "out" / MANIFEST).exists()
    with pytest.raises(UserError, match="there were no pairs"):
        pack_pairs({"train": []}, tmp_path / "none", quiet=True)


def test_a_shrunken_list_of_rejected_pairs_replaces_the_old_one(photos: Path, tmp_path: Path) -> None:
    (photos / "000.png").rename(photos / "away")
    run(*table_arguments(photos), "--out", tmp_path / "out")
    assert len(rejected_rows(tmp_path / "out")) == 1
    (photos / "away").rename(photos / "000.png")
    run(*table_arguments(photos), "--out", tmp_path / "out", "--overwrite")
    assert not (tmp_path / "out" / REJECTED).exists()


# Errors before any work


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--image-column", "fil"], "no column 'fil'; nearest: 'file'; its columns: file, caption, german, patient"),
        (["--text-column", "Caption"], "no column 'Caption'; nearest: 'caption'"),
        (["--label-column", "zzzz"], "no column 'zzzz'; its columns"),
        (["--unit-column", "patients"], "nearest: 'patient'"),
        (["--key-column", "id"], "no column 'id'"),
        (["--keep-columns", "ages"], "nearest: 'age'"),
        (["--split-column", "fold"], "no column 'fold'"),
        (["--split", "train=0.5", "val=0.5", "--stratify-by", "diagnoses"], "nearest: 'diagnosis'"),
        (["--images", "/nowhere"], "images /nowhere: there is no such folder"),
        (["--split", "train=0.5", "val=0.4"], "sum to 0.9, expected 1"),
        (["--split", "train:0.5"], "found 'train:0.5', expected NAME=FRACTION"),
        (["--split", "train=0.5", "train=0.5"], "'train' is named twice"),
        (["--split", "train=1", "--split-column", "age"], "exclude each other"),
        (["--stratify-by", "age"], "needs --split"),
        (["--side", "0"], "image side: found 0"),
        (["--samples-per-shard", "0"], "samples per shard: found 0"),
        (["--workers", "-1"], "--workers: found -1"),
        (["--seed", "-1"], "--seed: found -1"),
        (["--max-rejected", "2"], "found 2.0, expected 0 to 1"),
        (["--license-file", "/nowhere"], "--license-file /nowhere"),
        (["--encoding", "utf-9"], "unknown encoding: utf-9"),
        (["--encoding", "ascii"], "not ascii .byte 0xef.; save it as UTF-8"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(
    photos: Path, tmp_path: Path, extra: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(*table_arguments(photos), "--out", tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


def test_the_output_folder_must_be_free(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a file; expected a folder"):
        run(*table_arguments(photos), "--out", tmp_path / "pairs.csv")
    with pytest.raises(UserError, match="cannot be written"):
        run(*table_arguments(photos), "--out", tmp_path / "pairs.csv" / "below")
    run(*table_arguments(photos), "--out", tmp_path / "out")
    before = shard_bytes(tmp_path / "out")
    with pytest.raises(UserError, match="already holds a shard set"):
        run(*table_arguments(photos), "--out", tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_folder_and_what_is_needed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write, calls = ShardSetWriter.write, []

    def fail_at_the_tenth(self: ShardSetWriter, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 10:
            raise OSError(number, os.strerror(number))
        write(self, *arguments)

    monkeypatch.setattr(ShardSetWriter, "write", fail_at_the_tenth)
    with pytest.raises(
        UserError, match=r"out: no space left .* after 9 of 40 samples; the whole set needs about \d+ MiB"
    ):
        run(*table_arguments(photos), "--out", tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_an_interrupt_leaves_no_manifest(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardSetWriter, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(*table_arguments(photos), "--out", tmp_path / "out", "--workers", 1)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_pairs_may_hold_bytes_and_repeat_no_key_across_splits(tmp_path: Path) -> None:
    data = encoded(picture())
    split = {"train": [Pair("a", data, ["one"]), Pair("b", data, ["two"])], "val": [Pair("a", data, ["three"])]}
    summary = pack_pairs(split, tmp_path / "out", workers=0, max_rejected_fraction=0.5, quiet=True)
    assert summary.samples == {"train": 2, "val": 0}
    assert rejected_rows(tmp_path / "out") == [
        {"row": "", "key": "a", "image": f"{len(data)} bytes", "reason": "duplicate key a"}
    ]


def test_files_beside_the_set_and_pairs_left_out(tmp_path: Path) -> None:
    good = [Pair(f"k{number}", encoded(picture(number)), ["text"]) for number in range(4)]
    options: dict[str, Any] = {"workers": 0, "quiet": True, "max_rejected_fraction": 0.1}
    bad = Pair("bad", b"no image", ["text"])
    with pytest.raises(UserError, match="1 of 5 pairs rejected"):
        pack_pairs({"train": [*good, bad]}, tmp_path / "out", **options)
    found = pack_pairs({"train": [*good, bad]}, tmp_path / "out", left_out=5, beside={"a.csv": b"x\n"}, **options)
    assert str(found).splitlines()[-1].startswith("rejected: 1 of 10 (10.00%)")
    assert (tmp_path / "out" / "a.csv").read_bytes() == b"x\n"
    notes = ShardSet.open(tmp_path / "out").manifest.notes
    assert notes["files"] == {"a.csv": checksum_file(tmp_path / "out" / "a.csv")}


def test_duplicates_are_kept_together_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    rows = ["image,text"]
    for number in range(12):
        whole = photograph(200, 160, number)
        files = {f"{number}.png": encoded(whole), f"{number}-small.jpg": encoded(whole.resize((150, 120)), "JPEG")}
        for name, data in files.items():
            (tmp_path / "photos" / name).write_bytes(data)
            rows.append(f"{name},a caption of {name}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    words = [tmp_path / "pairs.csv", "--images", tmp_path / "photos", "--workers", 0]
    run(*words, "--out", tmp_path / "out", "--split", "train=0.5", "test=0.5", "--join-duplicates")
    assert "the same picture again: 12 times; kept together" in capsys.readouterr().out
    opened = ShardSet.open(tmp_path / "out")
    assert opened.manifest.notes["split"]["duplicates_joined"] == 12
    where = {opened.split(name).key(row): name for name in ("train", "test") for row in range(len(opened.split(name)))}
    assert all(where[str(number)] == where[f"{number}-small"] for number in range(12))
    with pytest.raises(UserError, match="--join-duplicates needs --split"):
        run(*words, "--out", tmp_path / "other", "--join-duplicates")
