"""What an index finds in a tar, plain or compressed, and what it refuses, by name."""

import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from clipdist.cli import main
from clipdist.data.sets import tar_samples
from clipdist.data.sets.index import index_folder
from clipdist.data.sets.tar_samples import index_tar, key_and_extension
from clipdist.data.shards import ShardSet
from clipdist.errors import UserError
from tests.unit.shard_sets import write_set
from tests.unit.tars import JPEG, PNG, cut, frames, pairs, plain_tar, starts


def test_members_that_are_not_adjacent_are_refused(tmp_path: Path) -> None:
    path = plain_tar(tmp_path / "x.tar", [("a.png", PNG), ("b.png", PNG), ("a.txt", b"x")])
    with pytest.raises(UserError, match=r"x\.tar: the members of sample 'a' are not adjacent; .*clipdist repack$"):
        index_tar(path)


@pytest.mark.parametrize(("one", "two"), [("a.png", "a.jpg"), ("a.png", "a.png"), ("a.json", "a.JSON")])
def test_two_members_of_one_kind_are_refused(one: str, two: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"sample of '{two}' has two (image|json) members; expected one"):
        index_tar(plain_tar(tmp_path / "x.tar", [(one, b"1"), (two, b"2")]))


def test_a_tar_that_ends_early_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    path = plain_tar(tmp_path / "x.tar", pairs("a", "b", "c"))
    whole = path.read_bytes()
    keys = index_tar(path).keys
    assert keys == ["a", "b", "c"]
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
        end = tar.offset
    for size in [0, 100, *starts[1:], *(start + 200 for start in starts[1:]), starts[2] + 600, end]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"x\.tar: damaged tar after \d samples .*; restore or repack it"):
            index_tar(path)
    path.write_bytes(whole[: end + 512])
    assert index_tar(path).keys == keys, "one block of zeros is an end, too"


def test_a_damaged_header_does_not_end_a_tar_unseen(tmp_path: Path) -> None:
    path = plain_tar(tmp_path / "x.tar", pairs("a", "b", "c"))
    with tarfile.open(path) as tar:
        third = list(tar)[2].offset
    data = bytearray(path.read_bytes())
    data[third + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged tar after 1 samples"):
        index_tar(path)


@given(st.text("a./é", max_size=12).filter(lambda name: not name.rpartition("/")[2].startswith(".")))
def test_keys_are_those_of_webdataset(name: str) -> None:
    key, extension = base_plus_ext(name)
    if key is not None:
        assert key_and_extension(name) == (key, extension)
    else:
        assert "." not in name.rpartition("/")[2]


# Compressed tars of others


@pytest.mark.parametrize("take", [slice(0, 0), slice(2, None, 2), slice(4, None, 4)])
def test_frames_of_whole_samples_are_read_in_place(take: slice, tmp_path: Path) -> None:
    """One frame for all, one for each sample, one for two; skippable frames between."""
    tar = plain_tar(tmp_path / "x", pairs("a", "b", "c", "d"))
    parts = cut(tar, *starts(tar)[take])
    path = frames(tmp_path / "train-0.tar.zst", parts)
    skippable = (0x184D2A5E).to_bytes(4, "little") + (9).to_bytes(4, "little") + b"seektable"
    for extra in (b"", skippable):
        path.write_bytes(extra + path.read_bytes() + extra)
        assert main(["index", "--force", str(tmp_path)]) == 0
        split = ShardSet.open(tmp_path).split("train")
        for number, key in enumerate("abcd"):
            sample = split.read(number)
            assert (sample.key, sample.image, sample.texts) == (key, PNG, [f"text {key}"])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (lambda tar: starts(tar)[1], "sample 'a' lie in several frames"),
        (lambda tar: starts(tar)[2] + 512, "the frame at byte 0 holds a part of a tar"),
        (lambda tar: starts(tar)[2] + 100, "the frame at byte 0 holds a part of a tar"),
    ],
)
def test_frames_that_split_samples_are_refused(place: Callable[[Path], int], message: str, tmp_path: Path) -> None:
    tar = plain_tar(tmp_path / "x", pairs("a", "b"))
    path = frames(tmp_path / "train-0.tar.zst", cut(tar, place(tar)))
    with pytest.raises(UserError, match=rf"^{path}: .*{message}.*clipdist repack$"):
        index_folder(tmp_path)


def test_frames_without_random_access_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = plain_tar(tmp_path / "x", pairs("a", "b"))
    path = frames(tmp_path / "train-0.tar.zst", [tar.read_bytes()], write_content_size=False)
    with pytest.raises(UserError, match=r"the frame at byte 0 does not state its size; .*clipdist repack$"):
        index_tar(path)
    frames(path, [tar.read_bytes()])
    monkeypatch.setattr(tar_samples, "MAX_SHARED_FRAME_BYTES", 1000)
    with pytest.raises(UserError, match=r"the frame at byte 0 holds 10,240 bytes of many samples; .*repack$"):
        index_tar(path)
    monkeypatch.setattr(tar_samples, "MAX_FRAME_BYTES", 1000)
    with pytest.raises(UserError, match=r"the frame at byte 0 holds 10,240 bytes; .*repack$"):
        index_tar(path)


def test_a_compressed_tar_that_is_cut_or_damaged_is_refused_wherever(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", zstd=True)
    path = folder / "train-000000.tar.zst"
    whole, keys = path.read_bytes(), index_tar(path).keys
    for size in (0, 3, 10, *range(20, len(whole), 101), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"^[^\n]*000\.tar\.zst: [^\n]*$"):
            index_tar(path)
    for place in random.Random(0).sample(range(len(whole) * 8), 300):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert index_tar(path).keys == keys
        except UserError as error:
            message = str(error)
            assert "\n" not in message


# Odd members


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/a.png", r"the name '/etc/a\.png' points outside the archive"),
        ("x/../../a.png", r"the name 'x/\.\./\.\./a\.png' points outside the archive"),
        ("\udcff.png", r"the name '\\udcff\.png' is not UTF-8"),
        ("k" * 5000 + ".png", r"has 5000 bytes, expected at most 4096"),
    ],
    ids=["absolute", "upward", "no UTF-8", "long"],
)
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_no_sample_can_have_are_refused(name: str, message: str, format: int, tmp_path: Path) -> None:
    path = plain_tar(tmp_path / "x.tar", [*pairs("a"), (name, PNG)], format)
    with pytest.raises(UserError, match=rf"^{path}: .*{message}.*clipdist repack$"):
        index_tar(path)


def test_odd_names_beside_the_samples_are_left_alone(tmp_path: Path) -> None:
    path = plain_tar(tmp_path / "x.tar", [("/etc/passwd", b"x"), ("\udcff", b"x"), *pairs("./dir/a"), ("../b.c", b"")])
    assert index_tar(path).keys == ["./dir/a"]


def test_an_empty_image_counts_as_one(tmp_path: Path) -> None:
    path = plain_tar(tmp_path / "x.tar", [("a.png", b""), ("a.jpg", JPEG), ("a.txt", b"x")])
    with pytest.raises(UserError, match="has two image members"):
        index_tar(path)


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    """Its bytes do not lie in the tar as they are in the file."""
    if shutil.which("tar") is None:
        pytest.skip("no tar on this machine")
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(1 << 20)
    words = ["tar", "-C", str(tmp_path), "--sparse", "-cf", str(tmp_path / "x.tar"), "a.png"]
    subprocess.run(words, check=True)
    with pytest.raises(UserError, match=r"'a\.png' is stored with holes"):
        index_tar(tmp_path / "x.tar")
