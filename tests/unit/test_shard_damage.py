"""Shard sets: what is damaged is named, and a full disk is one line."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from clipdist.data import shards
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shards import (
    BadSample,
    ShardFile,
    ShardSet,
    index_path,
    write_atomically,
)
from clipdist.errors import UserError, disk_errors
from tests.unit.shard_sets import first_shard, write_set


def test_a_truncated_shard_is_named(copy: Path) -> None:
    shard = first_shard(copy)
    size = shard.stat().st_size
    os.truncate(shard, size - 700)
    with pytest.raises(UserError, match=rf"{shard.name}: found {size - 700} bytes where its index expects {size}"):
        ShardSet.open(copy).split("train").read(0)


def test_an_index_of_another_size_is_named(copy: Path) -> None:
    index = index_path(first_shard(copy))
    os.truncate(index, index.stat().st_size - 1)
    with pytest.raises(UserError, match=rf"{index.name}: found .* expected .*run: clipdist index"):
        ShardSet.open(copy).split("train").read(0)
    index.write_bytes(b"\0" * 200)
    with pytest.raises(UserError, match=r"not a shard index; run: clipdist index"):
        ShardSet.open(copy).split("train").read(0)
    index.write_bytes(b"short")
    with pytest.raises(UserError, match=r"not a shard index; run: clipdist index"):
        ShardSet.open(copy).split("train").read(0)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_missing_shard_or_index_is_named(copy: Path) -> None:
    shard = first_shard(copy)
    shard.rename(copy / "aside")
    split = ShardSet.open(copy).split("train")
    with pytest.raises(UserError, match=f"{shard.name}: named by the manifest but missing"):
        split.read(0)
    assert split.read(3).key == "s3"
    index_path(shard).unlink()
    with pytest.raises(UserError, match=r"000\.idx: the index is missing; run: clipdist index"):
        split.read(0)


def test_a_refused_shard_closes_its_file_once(copy: Path) -> None:
    """A second close would hit whichever file got the same number meanwhile."""
    shard = first_shard(copy)
    os.truncate(shard, 100)
    with pytest.raises(UserError, match="truncated") as caught:
        ShardFile(shard)
    with open(copy / "manifest.json", "rb") as other:
        caught.value.__traceback__ = None
        del caught
        os.fstat(other.fileno())


def test_an_index_of_another_shard_is_named(copy: Path) -> None:
    shard = first_shard(copy)
    last = shard.with_name(shard.name.replace("000000", "000002"))
    shutil.copy(last, shard)
    shutil.copy(index_path(last), index_path(shard))
    with pytest.raises(UserError, match=r"its index holds 1 samples, the manifest 3; run: clipdist index"):
        ShardSet.open(copy).split("train").read(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"version": 1', '"version": 2'), "version 2, expected 'clipdist-shards' version 1"),
        (lambda text: text.replace("clipdist-shards", "other"), "found format 'other'"),
        (lambda text: text[: len(text) // 2], r"damaged \(JSONDecodeError"),
        (lambda text: "[]", r"damaged \(TypeError"),
        (lambda text: text.replace('"license"', '"licence"'), r"damaged \(KeyError"),
        (lambda text: text.replace('"samples": 3,', '"sample": 3,'), r"damaged \(TypeError"),
        (lambda text: '{"format": "clipdist-shards", "version": 1, "splits": []}', r"damaged \(AttributeError"),
    ],
)
def test_a_damaged_manifest_is_named(change: Callable[[str], str], message: str, copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        ShardSet.open(copy)


def test_a_manifest_that_is_no_text_is_named(copy: Path) -> None:
    (copy / "manifest.json").write_bytes(b'{"format": "\xff\xfe"}')
    with pytest.raises(UserError, match=r"manifest.json: damaged \(UnicodeDecodeError"):
        ShardSet.open(copy)


def test_a_folder_or_a_split_that_is_not_there_is_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no split 'test'; it has 'train', 'val'"):
        ShardSet.open(made).split("test")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (b'{"text": ', "unreadable caption"),
        (b"[1]", "holds a list, expected an object"),
        (b'{"text": 5}', "must be a string or a list of strings"),
        (b'{"text": ["a", 5]}', "must be a string or a list of strings"),
        (b'{"text": "\xff"}', "unreadable caption"),
        (b'{"n": ' + b"1" * 5000 + b"}", "unreadable caption"),
        (b"[" * 100_000, "unreadable caption"),
    ],
)
def test_an_unreadable_caption_is_a_bad_sample(info: bytes, message: str) -> None:
    with pytest.raises(BadSample, match=message):
        shards._parse_texts(info, b"")


def test_captions_come_from_json_or_else_from_text() -> None:
    assert shards._parse_texts(b'{"text": " a ", "x": 1}', b"b") == ({"x": 1}, ["a"])
    assert shards._parse_texts(b'{"text": ["a", " ", "b"]}', b"") == ({}, ["a", "b"])
    assert shards._parse_texts(b'{"text": ""}', b" b\n") == ({}, ["b"])
    assert shards._parse_texts(b"", b"") == ({}, [])


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small file system needs rights that this machine does not give")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("size", [100, 3_000, 100_000])
def test_a_really_full_disk_is_one_line_for_the_user(size: int, small_disk: Path) -> None:
    """With small images the failing write comes late, out of a buffer; closing the file then fails once more."""
    noise = np.random.default_rng(0).bytes(size)

    def fill() -> None:
        with ShardSetWriter(small_disk / "set", zstd=True) as out:
            for number in range(700):
                out.write("train", f"s{number}", noise, "png", {"text": "x"})

    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free some space"):
        fill()
    assert not (small_disk / "set" / "manifest.json").exists()
    # Space again: the same call clears the rest and succeeds.
    write_set(small_disk / "set", samples=1)


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"), (errno.EROFS, "choose another folder")],
)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_disk_errors_at_any_sync_are_one_line(
    number: int, message: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, iter(range(1000))

    def fsync(descriptor: int) -> None:
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=message):
        write_set(tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.json").exists()
    monkeypatch.undo()
    assert len(ShardSet.open(write_set(tmp_path / "set")).split("train")) == 7


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("")
    with pytest.raises(UserError, match=r"set: cannot be written \(File exists\); choose another folder"):
        write_set(tmp_path / "set")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="boom"), disk_errors(tmp_path):
        raise OSError(errno.EINTR, "boom")


def test_a_record_in_anothers_place_is_found(copy: Path) -> None:
    index = index_path(first_shard(copy))
    data = bytearray(index.read_bytes())
    data[128:192] = data[64:128]
    index.write_bytes(data)
    split = ShardSet.open(copy).split("train")
    assert split.read(0).key == "s0"
    with pytest.raises(BadSample, match="checksum differs"):
        split.read(1)
