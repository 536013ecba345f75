"""Checksums of shard sets: no flipped bit passes as data, whichever file it is in, and no swapped file either."""

import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.data import shard_index, stamps
from clipdist.data.images.pillow import open_image, to_rgb
from clipdist.data.sets.index import index_folder
from clipdist.data.sets.writer import displayed_size
from clipdist.data.shard_index import RECORD, Entry, ShardIndex, index_path
from clipdist.data.shards import BadSample, Check, Manifest, RawSample, ShardFile, ShardInfo, ShardSet, checksum_file
from clipdist.errors import UserError
from tests.unit.pictures import encoded, picture
from tests.unit.shard_sets import first_shard, write_set


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CLIPDIST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def flip(path: Path, bit: int) -> None:
    """In place, as a disk would: neither size nor name changes."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def outcomes(folder: Path, check: Check = "sample") -> list[RawSample | str]:
    """Of the first shard's samples: each as read, or the message why not."""
    found: list[RawSample | str] = []
    split = ShardSet.open(folder, check=check).split("train")
    for number in range(3):
        try:
            found.append(split.read(number))
        except (BadSample, UserError) as error:
            found.append(str(error))
    assert all(error and "\n" not in error for error in found if isinstance(error, str))
    return found


@dataclass
class Kept:
    """A set, and what its first three samples are."""

    folder: Path
    samples: list[RawSample | str]


@pytest.fixture(scope="module", params=[False, True], ids=["tar", "zst"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = write_set(tmp_path_factory.mktemp("kept") / "set", samples=3, zstd=request.param)
    samples = outcomes(folder)
    assert [type(sample) for sample in samples] == [RawSample] * 3
    return Kept(folder, samples)


def test_the_record_is_64_bytes_as_documented() -> None:
    expected = {
        **{"frame_offset": (0, 8), "image_offset": (8, 8), "json_offset": (16, 8), "text_offset": (24, 8)},
        **{"key_offset": (32, 4), "frame_size": (36, 4), "image_size": (40, 4), "json_size": (44, 4)},
        **{"text_size": (48, 4), "checksum": (52, 4), "width": (56, 2), "height": (58, 2), "key_size": (60, 2)},
        **{"image_kind": (62, 1), "_": (63, 1)},
    }
    assert RECORD.fields is not None
    assert {name: (at, kind.itemsize) for name, (kind, at) in RECORD.fields.items()} == expected
    assert RECORD.itemsize == 64
    assert (*Entry._fields, "_") == RECORD.names


def test_a_record_holds_size_and_checksum_as_documented(kept: Kept) -> None:
    shard = ShardFile(first_shard(kept.folder))
    for row in range(3):
        record, entry, key = shard.index.entry(row)
        assert entry == Entry._make(shard.index.records[row].tolist()[:-1])
        sample = shard.read(row)
        assert (entry.width, entry.height) == (40, 30)
        info = f'{{"n": {row}, "text": "caption {row}"}}'.encode()
        text = f"caption {row}".encode()
        stated = record[:52] + b"\0\0\0\0" + record[56:] + key + sample.image + info + text
        assert entry.checksum == xxhash.xxh3_64_intdigest(stated, seed=row) & 0xFFFFFFFF
        assert struct.unpack_from("<I", record, 52)[0] == entry.checksum


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_flipped_bit_never_passes_as_data(kept: Kept, data: st.DataObject) -> None:
    shard = first_shard(kept.folder)
    path = data.draw(st.sampled_from([shard, index_path(shard)]))
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1))
    flip(path, bit)
    try:
        found = outcomes(kept.folder)
    finally:
        flip(path, bit)
    for was, now in zip(kept.samples, found, strict=True):
        assert isinstance(now, str) or now == was


def test_each_bit_of_a_record_its_key_and_its_members_counts(kept: Kept) -> None:
    """Exact places: there every single flip must be refused, and cost no other sample."""
    shard = first_shard(kept.folder)
    index = ShardIndex(index_path(shard))
    _, entry, key = index.entry(1)
    keys_at = 64 + 3 * 64
    begin = 8 * (64 + 64)
    places = [(index.path, bit) for bit in range(begin, begin + 8 * 64)]
    places += [(index.path, 8 * (keys_at + entry.key_offset) + bit) for bit in range(8 * len(key))]
    if not index.zstd:
        for offset, size in ((entry.image_offset, entry.image_size), (entry.json_offset, entry.json_size)):
            bits = range(8 * offset, 8 * (offset + size))
            places += [(shard, bit) for bit in random.Random(offset).sample(bits, 40)]
    for path, bit in places:
        flip(path, bit)
        found = outcomes(kept.folder)
        flip(path, bit)
        assert isinstance(found[1], str), (path.name, bit)
        assert [found[0], found[2]] == [kept.samples[0], kept.samples[2]]


def test_without_checks_the_bytes_are_trusted(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", samples=3)
    shard = first_shard(folder)
    offset = int(ShardIndex(index_path(shard)).records[1]["image_offset"])
    flip(shard, 8 * (offset + 60))
    assert "checksum differs: found " in str(outcomes(folder)[1])
    trusted = outcomes(folder, "none")[1]
    assert isinstance(trusted, RawSample)
    assert trusted.key == "s1"


def test_an_index_without_checksums_is_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", samples=3)
    index = index_path(first_shard(folder))
    index.write_bytes(b"CDINDEX1" + index.read_bytes()[8:])
    with pytest.raises(UserError, match=rf"^{index}: an index without checksums, .*; run: clipdist index {folder}"):
        ShardSet.open(folder).split("train").read(0)
    index_folder(folder)
    assert ShardSet.open(folder).split("train").read(0).key == "s0"


# Whole shards


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each file that is read whole."""
    real, calls = stamps.checksum_descriptor, []

    def note(descriptor: int) -> str:
        calls.append(descriptor)
        return real(descriptor)

    monkeypatch.setattr(stamps, "checksum_descriptor", note)
    return calls


def test_a_whole_shard_is_checked_once_per_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = write_set(tmp_path / "set", samples=6), counted(monkeypatch)
    for _ in range(2):
        split = ShardSet.open(folder, check="shard").split("train")
        assert [split.read(number).key for number in range(6)] == [f"s{number}" for number in range(6)]
    assert len(calls) == 2, "two shards, read whole once each"
    os.utime(first_shard(folder), ns=(1, 1))
    assert ShardSet.open(folder, check="shard").split("train").read(0).key == "s0"
    assert len(calls) == 3, "another time of change is another state"
    ShardSet.open(folder).split("train").read(0)
    assert len(calls) == 3


def test_a_damaged_shard_is_named_before_its_first_read(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", samples=6)
    shard = first_shard(folder)
    sound = checksum_file(shard)
    flip(shard, 8 * (shard.stat().st_size - 1))  # in the padding, where no sample is
    assert not [sample for sample in outcomes(folder) if isinstance(sample, str)]
    split = ShardSet.open(folder, check="shard").split("train")
    message = rf"^{shard}: found checksum {checksum_file(shard)}, the manifest expects {sound}: .*clipdist verify "
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            split.read(0)
    assert split.read(3).key == "s3"


@pytest.mark.parametrize("how", ["a file in the way", "no home"])
def test_without_a_cache_shards_are_checked_again(
    how: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = write_set(tmp_path / "set", samples=3), counted(monkeypatch)
    if how == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "")

        def home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", home)
    else:
        cache.write_text("")
    for _ in range(2):
        assert ShardSet.open(folder, check="shard").split("train").read(0).key == "s0"
    assert len(calls) == 2


def test_a_damaged_stamp_means_checking_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = write_set(tmp_path / "set", samples=3), counted(monkeypatch)
    for content in (b"", b"garbage", bytes(5000)):
        ShardSet.open(folder, check="shard").split("train").read(0)
        (stamp,) = [path for path in cache.rglob("*") if path.is_file()]
        stamp.write_bytes(content)
    ShardSet.open(folder, check="shard").split("train").read(0)
    ShardSet.open(folder, check="shard").split("train").read(0)
    assert len(calls) == 4


# Files that change


def overwrite(source: Path, target: Path) -> None:
    with open(target, "r+b") as file:
        file.truncate(0)
        file.write(source.read_bytes())


def rename_over(source: Path, target: Path) -> None:
    os.replace(shutil.copy(source, target.with_suffix(".new")), target)


@pytest.mark.parametrize("put", [overwrite, rename_over])
def test_a_shard_swapped_under_a_reader_gives_old_data_or_bad_samples(
    put: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    """By one of the same size, whose members lie where they lay."""
    folder = write_set(tmp_path / "set", samples=3)
    shard, other = first_shard(folder), tmp_path / "other.tar"
    data = bytearray(shard.read_bytes())
    for record in ShardIndex(index_path(shard)).records:
        start = int(record["image_offset"]) + 50
        data[start : start + 20] = bytes(20)
    other.write_bytes(data)
    split = ShardSet.open(folder).split("train")
    before = [split.read(number) for number in range(3)]
    put(other, shard)
    for number in range(3):
        if put is rename_over:
            assert split.read(number) == before[number], "an open file is still the old one"
        else:
            with pytest.raises(BadSample, match="checksum differs"):
                split.read(number)
    with pytest.raises(BadSample, match="checksum differs"):
        ShardSet.open(folder).split("train").read(0)


def test_a_tar_that_is_cut_short_under_a_reader_gives_bad_samples(kept: Kept, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kept.folder, tmp_path / "set"))
    split = ShardSet.open(folder).split("train")
    assert split.read(0) == kept.samples[0]
    _, entry, _ = split.shard(0).index.entry(1)
    os.truncate(first_shard(folder), (entry.frame_offset or entry.image_offset) + 20)
    assert split.read(0) == kept.samples[0]
    for number in (1, 2):
        with pytest.raises(BadSample, match="the shard ends at byte"):
            split.read(number)


def test_an_index_that_is_cut_short_under_a_reader_gives_bad_samples(kept: Kept, tmp_path: Path) -> None:
    """Through a memory map this would end the process."""
    folder = Path(shutil.copytree(kept.folder, tmp_path / "set"))
    split = ShardSet.open(folder).split("train")
    assert split.read(0) == kept.samples[0]
    os.truncate(index_path(first_shard(folder)), 0)
    for number in range(3):
        with pytest.raises(BadSample, match="its index was cut short"):
            split.read(number)


def test_an_index_older_than_its_tar_never_gives_wrong_data(kept: Kept, tmp_path: Path) -> None:
    """Another tar under an old index: of another size it is named, of the same size its samples are bad."""
    folder = Path(shutil.copytree(kept.folder, tmp_path / "set"))
    shard = first_shard(folder)
    longer = bytearray(shard.read_bytes())
    shard.write_bytes(longer + bytes(512))
    with pytest.raises(UserError, match="truncated, or changed after indexing"):
        ShardSet.open(folder).split("train").read(0)
    begin = ShardIndex(index_path(shard)).entry(0)[1].image_offset
    shard.write_bytes(longer[:begin] + longer[begin:][::-1])
    assert all(isinstance(found, str) for found in outcomes(folder))


# What the index says of pictures


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_the_size_is_that_of_the_upright_image(format: str, orientation: int) -> None:
    image = picture(1, (40, 30))
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encoded(image, format, exif=exif)
    assert displayed_size(data) == to_rgb(open_image(data, 10_000)).size


def test_a_size_that_cannot_be_told_is_zero() -> None:
    assert displayed_size(b"") == (0, 0)
    assert displayed_size(b"GIF89a but not really") == (0, 0)
    assert displayed_size(encoded(picture(0, (65_535, 5)))) == (65_535, 5)
    assert displayed_size(encoded(picture(0, (65_540, 5)))) == (0, 0)


# The manifest


def test_a_manifest_has_one_line_per_shard_and_comes_back(tmp_path: Path) -> None:
    splits = {"train": [ShardInfo(f"é{n}.tar", n, 5, "0" * 16) for n in range(4)], "none": []}
    manifest = Manifest(splits, "CC0", {"command": "x"}, {"a": "b"}, {"xxh3_64": {"file": "notes of a user"}})
    text = manifest.to_json()
    assert sum("xxh3_64" in line and ".tar" in line for line in text.splitlines()) == 4
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    assert Manifest.load(tmp_path) == manifest
    assert not hasattr(manifest.splits["train"][0], "__dict__")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"samples": 3', '"samples": "3"'), ('"samples": 3', '"samples": -3'), ('"file": "train', '"file": 5, "_": "')],
)
def test_a_manifest_with_impossible_shards_is_named(old: str, new: str, tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", samples=3) / "manifest.json"
    path.write_text(path.read_text().replace(f"{old}", new))
    with pytest.raises(UserError, match=r"manifest\.json: damaged \(TypeError"):
        ShardSet.open(tmp_path / "set")


def test_the_checksum_is_32_bits_of_xxh3() -> None:
    record = np.zeros((), RECORD)
    record["checksum"] = 5
    found = shard_index.sample_checksum(5, record.tobytes(), b"k", (b"i", b"", b"t"))
    assert found == xxhash.xxh3_64_intdigest(bytes(64) + b"kit", seed=5) % 2**32
