"""Shard sets: what is written is read back, by us and by others; what is foreign stays."""

import json
import os
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.data import shards
from clipdist.data.sets.writer import UNFINISHED, ShardSetWriter
from clipdist.data.shards import (
    Manifest,
    ShardSet,
    Split,
    checksum_file,
    index_path,
)
from clipdist.errors import UserError
from tests.unit.pictures import encoded, picture
from tests.unit.shard_sets import PNG, first_shard, plain_tar, write_set

LONG = "folder/" * 20 + "x" * 120


def break_off(folder: Path, error: Exception, **options: Any) -> None:
    """A packing run that dies after its second shard has begun."""
    with ShardSetWriter(folder, samples_per_shard=2, **options) as out:
        for number in range(3):
            out.write("train", f"old{number}", PNG, "png", {"text": "x"})
        raise error


def test_every_sample_comes_back(made: Path) -> None:
    opened = ShardSet.open(str(made))
    assert list(opened.manifest.splits) == ["train", "val"]
    assert [shard.samples for shard in opened.manifest.splits["train"]] == [3, 3, 1]
    train = opened.split("train")
    assert len(train) == 7
    for number in range(7):
        sample = train.read(number)
        assert (sample.key, sample.extension, sample.texts) == (f"s{number}", "png", [f"caption {number}"])
        assert sample.fields == {"n": number}
        assert sample.image == encoded(picture(number))
        assert train.key(number) == sample.key
    assert opened.split("val").read(1).texts == ["één 1", "zwei"]


def test_the_manifest_states_sizes_checksums_and_origin(made: Path) -> None:
    body = json.loads((made / "manifest.json").read_text())
    assert body["license"] == "CC0-1.0"
    assert body["made_by"]["command"] == "'a test'"
    assert body["splits"]["train"]["samples"] == 7
    for split in body["splits"].values():
        for shard in split["shards"]:
            path = made / shard["file"]
            assert shard["bytes"] == path.stat().st_size
            assert shard["xxh3_64"] == checksum_file(path)
    assert {path.name for path in made.iterdir()} == {"manifest.json"} | {
        name
        for split in body["splits"].values()
        for shard in split["shards"]
        for name in (shard["file"], index_path(made / shard["file"]).name)
    }


def test_python_and_gnu_tar_read_a_shard(made: Path) -> None:
    expected = [f"s{n}.{suffix}" for n in range(3) for suffix in ("png", "json", "txt")]
    shard = first_shard(made)
    with tarfile.open(fileobj=plain_tar(shard), mode="r:") as tar:
        assert tar.getnames() == expected
        member = tar.extractfile("s1.png")
        assert member is not None
        assert member.read() == encoded(picture(1))
    if shutil.which("tar") is None or (shard.suffix == ".zst" and shutil.which("zstd") is None):
        pytest.skip("no tar, or no zstd, on this machine")
    words = ["tar", *(["--zstd"] if shard.suffix == ".zst" else []), "-tf", str(shard)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected
    assert done.stderr == ""


def test_webdataset_reads_a_shard(made: Path, tmp_path: Path) -> None:
    shard = first_shard(made)
    if shard.suffix == ".zst":
        unpacked = tmp_path / "unpacked.tar"
        unpacked.write_bytes(plain_tar(shard).getvalue())
        shard = unpacked
    read = list(webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in read] == ["s0", "s1", "s2"]
    assert read[2]["png"] == encoded(picture(2))
    assert json.loads(read[2]["json"]) == {"text": "caption 2", "n": 2}


@pytest.mark.parametrize("zstd", [False, True])
def test_equal_calls_give_equal_bytes(zstd: bool, tmp_path: Path) -> None:
    one, two = (write_set(tmp_path / name, zstd=zstd) for name in "ab")
    assert [p.name for p in sorted(one.iterdir())] == [p.name for p in sorted(two.iterdir())]
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    assert Manifest.load(one).digest == Manifest.load(two).digest
    assert Manifest.load(write_set(tmp_path / "c", samples=6)).digest != Manifest.load(one).digest


def test_files_are_whole_when_they_appear_and_the_manifest_is_last(tmp_path: Path, appeared: list[str]) -> None:
    write_set(tmp_path / "set", samples=4, per_shard=3)
    assert appeared[0] == UNFINISHED
    assert appeared[-1] == "manifest.json"
    for name in ("train-000000", "train-000001", "val-000000"):
        assert appeared.index(f"{name}.idx") < appeared.index(f"{name}.tar")
    assert not (tmp_path / "set" / UNFINISHED).exists()


def test_an_interrupted_run_leaves_no_manifest_and_the_same_call_clears_it(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError, match="power cut"):
        break_off(folder, RuntimeError("power cut"))
    assert {path.name for path in folder.iterdir()} == {UNFINISHED, "notes.txt", "train-000000.tar", "train-000000.idx"}
    with pytest.raises(UserError, match=r"no manifest\.json, so it is unfinished"):
        ShardSet.open(folder)
    (folder / "train-000001.tar.partial").write_bytes(b"left by kill -9")
    write_set(folder, samples=2)
    assert {path.name for path in folder.iterdir()} == {
        *("manifest.json", "notes.txt", "train-000000.tar", "train-000000.idx", "val-000000.tar", "val-000000.idx")
    }
    assert ShardSet.open(folder).split("train").key(0) == "s0"
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_existing_set_is_replaced_only_when_asked(copy: Path) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(UserError, match="already holds a shard set; choose another folder or pass --overwrite"):
        write_set(copy, samples=1)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    write_set(copy, samples=1, overwrite=True)
    assert len(ShardSet.open(copy).split("train")) == 1
    assert not (copy / "train-000001.idx").exists()


@pytest.mark.parametrize(
    "name", ["photos-000001.tar", "train-000000.tar.zst", "x-000000.idx", "train-000009.tar.partial"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_shards_of_others_are_never_deleted(name: str, overwrite: bool, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    if overwrite:
        write_set(folder)
    (folder / name).write_bytes(b"years of work")
    with pytest.raises(UserError, match=f"holds {name} that no manifest names; choose an empty folder"):
        write_set(folder, overwrite=overwrite)
    assert (folder / name).read_bytes() == b"years of work"
    assert (folder / "manifest.json").exists() == overwrite, "the set that stood there still stands"


def test_a_set_of_another_version_can_be_overwritten(copy: Path) -> None:
    body = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**body, "version": 0}))
    with pytest.raises(UserError, match="pack the set again with this version"):
        ShardSet.open(copy)
    write_set(copy, samples=1, overwrite=True)
    assert len(ShardSet.open(copy).split("train")) == 1


@pytest.mark.parametrize(
    "key", ["", "a.b", "a/b.c", "../a", "a/../b", "/a", "a/", "a\0b", "a\udc80", "k" * 70_000], ids=lambda k: k[:8]
)
def test_keys_that_a_tar_would_change_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^key "), ShardSetWriter(tmp_path / "set") as out:
        out.write("train", key, PNG, "png", {"text": "x"})


@pytest.mark.parametrize("split", ["", "a/b", "../x", "a\0"])
def test_split_names_that_are_no_file_names_are_refused(split: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^split "), ShardSetWriter(tmp_path / "set") as out:
        out.write(split, "a", PNG, "png", {"text": "x"})
    assert not (tmp_path / "x-000000.tar.partial").exists()


def test_duplicate_keys_are_refused_also_across_splits(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path / "set") as out:
        out.write("train", "a", PNG, "png", {"text": "x"})
        for split in ("train", "val"):
            with pytest.raises(UserError, match="key 'a' is used twice"):
                out.write(split, "a", PNG, "png", {"text": "x"})


@pytest.mark.parametrize("extension", ["", "svg", "json", "jp2", "tar.png"])
def test_odd_extensions_are_refused(extension: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one of jpg, jpeg, png"), ShardSetWriter(tmp_path / "set") as out:
        out.write("train", "a", PNG, extension, {"text": "x"})


def test_a_refused_sample_does_not_use_up_its_key(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path / "set") as out:
        with pytest.raises(UserError, match=r"^a: .*surrogates"):
            out.write("train", "a", PNG, "png", {"text": "\ud800"})
        with pytest.raises(UserError, match=r"^a: .*not JSON serializable"):
            out.write("train", "a", PNG, "png", {"text": "x", "when": object()})
        with pytest.raises(UserError, match=r"^a: .*Out of range float"):
            out.write("train", "a", PNG, "png", {"text": "x", "age": float("inf")})
        out.write("train", "a", PNG, "png", {"text": "x"})
    assert ShardSet.open(tmp_path / "set").split("train").read(0).texts == ["x"]


def test_shards_hold_at_least_one_sample(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found 0, expected at least 1"):
        ShardSetWriter(tmp_path, samples_per_shard=0)


# Splits


def test_locating_samples_across_shards(made: Path) -> None:
    split = ShardSet.open(made).split("train")
    assert [split.locate(n) for n in range(7)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    for outside in (-1, 7):
        with pytest.raises(IndexError):
            split.locate(outside)
    assert len(Split(made, "none", [])) == 0


def test_empty_shards_are_passed_over(made: Path) -> None:
    infos = ShardSet.open(made).manifest.splits["train"]
    empty = shards.ShardInfo("empty.tar", 0, 0, "")
    split = Split(made, "train", [empty, infos[0], empty, empty, infos[2]])
    assert [split.locate(n) for n in range(4)] == [(1, 0), (1, 1), (1, 2), (4, 0)]
    assert [split.key(n) for n in range(4)] == ["s0", "s1", "s2", "s6"]


def test_a_pickled_split_opens_its_own_files(made: Path) -> None:
    split = ShardSet.open(made).split("train")
    first = split.read(0)
    copied = pickle.loads(pickle.dumps(split))
    assert not copied._open
    assert copied.read(0) == first
    assert len(copied) == 7


def test_few_shards_stay_open_and_evicted_ones_close(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", samples=12, per_shard=1)
    split = ShardSet.open(folder).split("train")
    split.max_open_shards = 3
    before = len(os.listdir("/proc/self/fd"))
    held = split.shard(0)
    for number in [*range(12), 0, 5, 11, *range(12)]:
        assert split.read(number).key == f"s{number}"
        assert len(split._open) <= 3
    # Each open shard costs three descriptors: its own and those of its two memory maps.
    assert len(os.listdir("/proc/self/fd")) <= before + 3 * (3 + 1)
    assert held.read(0).key == "s0", "whoever holds an evicted shard may go on reading"


# Any key, any caption

names = st.text(
    st.characters(codec="utf-8", exclude_characters="./\0", exclude_categories=["Cs"]), min_size=1, max_size=12
) | st.text("ab/é", min_size=101, max_size=140).filter(lambda k: not k.startswith("/") and not k.endswith("/"))
captions = st.text(st.characters(codec="utf-8"), max_size=30)


@given(
    st.dictionaries(names, st.lists(captions, min_size=1, max_size=3), min_size=1, max_size=6),
    st.booleans(),
    st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_any_key_and_caption_survive(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, list[str]], zstd: bool, per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("any") / "set"
    with ShardSetWriter(folder, samples_per_shard=per_shard, zstd=zstd) as out:
        for key, texts in samples.items():
            out.write("train", key, PNG, "png", {"text": texts, "note": texts[0]})
    split = ShardSet.open(folder).split("train")
    assert [split.key(n) for n in range(len(split))] == list(samples)
    for number, (key, texts) in enumerate(samples.items()):
        sample = split.read(number)
        assert (sample.key, sample.image, sample.fields) == (key, PNG, {"note": texts[0]})
        assert sample.texts == [text.strip() for text in texts if text.strip()]
    found = [
        name
        for info in split.shards
        for name in tarfile.open(fileobj=plain_tar(folder / info.file), mode="r:").getnames()  # noqa: SIM115
    ]
    expected = []
    for key, texts in samples.items():
        expected += [f"{key}.png", f"{key}.json", *([f"{key}.txt"] if any(map(str.strip, texts)) else [])]
    assert found == expected


def test_a_very_long_key_survives_in_every_reader(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path / "set") as out:
        out.write("train", LONG, PNG, "png", {"text": "x"})
    shard = first_shard(tmp_path / "set")
    assert ShardSet.open(tmp_path / "set").split("train").key(0) == LONG
    read = list(webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in read] == [LONG]
