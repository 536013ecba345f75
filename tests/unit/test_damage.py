"""Thousands of damaged shards: nobody crashes or hangs, what is delivered is what was packed, the rest is named."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import struct
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zstandard
from PIL import Image

from clipdist.data.config import DataConfig
from clipdist.data.order import Order
from clipdist.data.rows import BadRecord, Piece, Task, TrainRows
from clipdist.data.sets.index import index_folder
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shard_index import HEADER, RECORD, ShardIndex, index_path
from clipdist.data.shards import BadSample, Check, RawSample, ShardSet, Split
from clipdist.data.text import Tokenizer, train_wordpiece
from clipdist.errors import UserError
from tests.unit.pictures import encoded, picture
from tests.unit.tars import Members, cut, frames, pairs, plain_tar, starts

PER_SHARD, SIDE = 6, 16
FORMATS = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))
KINDS = ("tar", "zst", "foreign", "foreign zst")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([f"caption {number} a b c é" for number in range(12)] * 2, 120, 8)


@dataclass
class Sound:
    """A set of two shards: its files, another shard's bytes of the first one's size, what its samples are, and what
    training makes of each: pixels, tokens and group by key."""

    files: dict[str, bytes]
    shard: str
    index: str
    other: dict[str, bytes]
    samples: list[RawSample]
    trained: dict[str, tuple[np.ndarray, list[int], int]]
    tokenizer: Tokenizer


def image_of(number: int, version: int) -> tuple[bytes, str]:
    """A JPEG, PNG or WebP of a few hundred bytes to a few kB; every version of it has the same size."""
    format, extension = FORMATS[number % 3]
    size = (20 + 15 * (number % 4), 20 + 10 * (number % 3))
    versions = [encoded(picture(number + 100 * version, size), format) for version in range(2)]
    return versions[version].ljust(max(map(len, versions)), b"\0"), extension


def members_of(number: int, version: int) -> Members:
    image, extension = image_of(number, version)
    key, text = f"k{number}", f"caption {number}"
    info = json.dumps({"text": [text, "a é"] if number % 2 else text, "label": number}, ensure_ascii=False).encode()
    captions = [(f"{key}.json", info), (f"{key}.txt", text.encode())]
    # JSON alone, text alone, both.
    return [(f"{key}.{extension}", image), *captions[number % 3 == 1 : 1 + (number % 3 > 0)]]


def write_sound(folder: Path, kind: str, version: int) -> Path:
    """Two shards of `PER_SHARD` samples."""
    if kind.startswith("foreign"):
        for shard in range(2):
            numbers = range(PER_SHARD * shard, PER_SHARD * (shard + 1))
            members = [member for number in numbers for member in members_of(number, version)]
            tar = plain_tar(folder / f"train-{shard:06d}.tar", members)
            if kind.endswith("zst"):
                sample_starts = [starts(tar)[place] for place, (name, _) in enumerate(members) if ".json" not in name]
                places = [at for at in sample_starts if at and _begins(tar, at)]
                frames(tar.with_name(tar.name + ".zst"), cut(tar, *places))
                tar.unlink()
        index_folder(folder)
        return folder
    with ShardSetWriter(folder, samples_per_shard=PER_SHARD, zstd=kind == "zst", command=["a test"]) as out:
        for number in range(2 * PER_SHARD):
            image, extension = image_of(number, version)
            text = f"caption {number}"
            out.write(
                "train", f"k{number}", image, extension, {"text": [text, "a é"] if number % 2 else text, "n": number}
            )
    return folder


def _begins(tar: Path, at: int) -> bool:
    """Whether the member whose header is there is an image, with which each sample begins."""
    name = tar.read_bytes()[at : at + 100].rstrip(b"\0").decode()
    return name.endswith(tuple(extension for _, extension in FORMATS))


def train_rows(folder: Path, tokenizer: Tokenizer, check: Check = "sample") -> TrainRows:
    split = ShardSet.open(folder, check=check).split("train")
    order = Order(split.samples_per_shard, seed=3, global_batch=len(split), lanes=1)
    config = DataConfig(set=str(folder), workers=0, checksums=check, max_image_pixels=1_000_000)
    return TrainRows(split, order, config, side=SIDE, resize="crop", tokenizer=tokenizer)


def trained(folder: Path, tokenizer: Tokenizer, check: Check = "sample") -> tuple[TrainRows, Piece | UserError]:
    """Every row of the first epoch, as the loader asks for it."""
    rows = train_rows(folder, tokenizer, check)
    return rows, rows[Task(0, 0, rows.order.global_batch)]


@pytest.fixture(scope="module", params=KINDS)
def sound(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = write_sound(tmp_path_factory.mktemp("sound") / "set", request.param, 0)
    another = write_sound(folder.parent / "other", request.param, 1)
    rows, piece = trained(folder, tokenizer)
    assert isinstance(piece, Piece)
    assert piece.images is not None
    assert piece.groups is not None
    assert piece.bad == []
    made = zip(piece.images, piece.token_ids, piece.groups, strict=True)
    (shard, index) = sorted(path.name for path in folder.glob("train-000000*"))[::-1]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert 2_000 < len(files[shard]) < 40_000
    return Sound(
        files,
        shard,
        index,
        {name: (another / name).read_bytes()[: len(data)].ljust(len(data), b"\0") for name, data in files.items()},
        [rows.split.read(number) for number in range(2 * PER_SHARD)],
        dict(zip(piece.keys, made, strict=True)),
        tokenizer,
    )


# How one file is damaged: each takes the bytes and gives others. Blocks are up to a third of the file.


def block(draw: random.Random, data: bytearray) -> slice:
    size = draw.randint(1, draw.choice([1, 8, 64, 512, max(1, len(data) // 3)]))
    start = draw.randrange(max(1, len(data) - size + 1))
    return slice(start, start + size)


def flip_bits(draw: random.Random, data: bytearray) -> None:
    for _ in range(draw.choice([1, 1, 2, 5, 40])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def truncate(draw: random.Random, data: bytearray) -> None:
    del data[draw.randrange(len(data)) :]


def zero(draw: random.Random, data: bytearray) -> None:
    place = block(draw, data)
    data[place] = bytes(len(data[place]))


def randomise(draw: random.Random, data: bytearray) -> None:
    place = block(draw, data)
    data[place] = draw.randbytes(len(data[place]))


def swap_blocks(draw: random.Random, data: bytearray) -> None:
    one = block(draw, data)
    size = len(data[one])
    start = draw.randrange(len(data) - size + 1)
    two = slice(start, start + size)
    first, second = bytes(data[one]), bytes(data[two])
    data[one], data[two] = second, first


def delete(draw: random.Random, data: bytearray) -> None:
    del data[block(draw, data)]


def duplicate(draw: random.Random, data: bytearray) -> None:
    copied = bytes(data[block(draw, data)])
    at = draw.randrange(len(data) + 1)
    data[at:at] = copied


def append(draw: random.Random, data: bytearray) -> None:
    size = draw.choice([1, 64, 512, 5000])
    data += draw.choice([bytes(size), draw.randbytes(size)])


OneFile = Callable[[random.Random, bytearray], None]
ONE_FILE: list[OneFile] = [
    flip_bits,
    truncate,
    zero,
    randomise,
    swap_blocks,
    delete,
    duplicate,
    append,
]


# How a set is damaged where that takes more than one file's bytes.


def swap_samples(draw: random.Random, sound: Sound, files: dict[str, bytearray]) -> None:
    """The tar's bytes of two samples' images, or their frames, change places, as far as the shorter one goes."""
    zstd = sound.shard.endswith(".zst")
    at, size = ("frame_offset", "frame_size") if zstd else ("image_offset", "image_size")
    records = np.frombuffer(sound.files[sound.index], RECORD, PER_SHARD, HEADER.itemsize)
    one, two = (records[row] for row in draw.sample(range(PER_SHARD), 2))
    length, data = min(int(one[size]), int(two[size])), sound.files[sound.shard]
    for a, b in ((one, two), (two, one)):
        files[sound.shard][int(a[at]) : int(a[at]) + length] = data[int(b[at]) : int(b[at]) + length]


def absurd_record(draw: random.Random, sound: Sound, files: dict[str, bytearray]) -> None:
    """A field of a record that speaks of any place or size."""
    records = np.frombuffer(sound.files[sound.index], RECORD, PER_SHARD, HEADER.itemsize).copy()
    assert RECORD.names is not None
    name = draw.choice(RECORD.names[:-1])
    largest = int(np.iinfo(RECORD[name]).max)
    records[name][draw.randrange(PER_SHARD)] = draw.choice([0, 1, 64, largest, largest // 2, draw.randint(0, largest)])
    files[sound.index][HEADER.itemsize : HEADER.itemsize + records.nbytes] = records.tobytes()


def absurd_header(draw: random.Random, sound: Sound, files: dict[str, bytearray]) -> None:
    offset = draw.choice([8, 16, 24])
    value = draw.choice([0, 1, PER_SHARD + 1, 2**32, 2**63, 2**64 - 1, draw.getrandbits(64)])
    struct.pack_into("<Q", files[sound.index], offset, value)


def another_shard(draw: random.Random, sound: Sound, files: dict[str, bytearray]) -> None:
    files[sound.shard][:] = sound.other[sound.shard]


def another_index(draw: random.Random, sound: Sound, files: dict[str, bytearray]) -> None:
    """That of the other set, or of the second shard."""
    beside = sound.files[sound.index.replace("000000", "000001")]
    files[sound.index][:] = draw.choice([sound.other[sound.index], beside])


def another_count(draw: random.Random, sound: Sound, files: dict[str, bytearray]) -> None:
    manifest = json.loads(files["manifest.json"])
    manifest["splits"]["train"]["shards"][0]["samples"] = draw.choice([1, 5, 7, 100])
    files["manifest.json"][:] = json.dumps(manifest).encode()


SEVERAL: list[Callable[[random.Random, Sound, dict[str, bytearray]], None]] = [
    swap_samples,
    absurd_record,
    absurd_header,
    another_shard,
    another_index,
    another_count,
]


def damage(seed: int, sound: Sound) -> tuple[str, dict[str, bytearray]]:
    """What was done, and the files after it."""
    draw = random.Random(seed)
    files = {name: bytearray(data) for name, data in sound.files.items()}
    kind = draw.randrange(len(SEVERAL) + 2 * len(ONE_FILE))
    if kind < len(SEVERAL):
        SEVERAL[kind](draw, sound, files)
        return SEVERAL[kind].__name__, files
    change, name = ONE_FILE[(kind - len(SEVERAL)) // 2], (sound.shard, sound.index)[kind % 2]
    change(draw, files[name])
    return f"{change.__name__} {name}", files


def read_all(split: Split, sound: Sound) -> dict[int, BadSample | UserError]:
    """Why samples are not delivered, by their number. Those that are, are as they were packed."""
    faults: dict[int, BadSample | UserError] = {}
    for number in range(len(split)):
        shard, row = split.locate(number)
        try:
            found = split.read(number)
        except BadSample as error:
            faults[number] = error
        except UserError as error:
            faults[number] = error
        else:
            assert found == sound.samples[PER_SHARD * shard + row], "as it was packed"
    for fault in faults.values():
        message = str(fault)
        assert "\n" not in message
        named = sound.shard in message or sound.index in message
        assert named if isinstance(fault, UserError) else message, "a refusal names the file"
    assert all(split.locate(number)[0] == 0 for number in faults), "the other shard was not touched"
    return faults


def expected_records(rows: TrainRows, faults: dict[int, Any], keys: list[str], step: int = 0) -> list[BadRecord]:
    """What a step must say of its bad samples, from the plan; `keys` are those of its rows."""
    records: list[BadRecord] = []
    for row, number in enumerate(rows.order.batch(step).numbers.tolist()):
        attempt = 0
        while number in faults:
            shard = rows.split.shards[rows.split.locate(number)[0]].file
            records.append(BadRecord(step, rows.split.key(number), shard, str(faults[number]), keys[row]))
            attempt += 1
            number, _ = rows.order.replacement(step, row, attempt)
    return records


def examine(folder: Path, sound: Sound) -> int:
    """Reads and trains on a damaged set; `AssertionError` for what must not happen. Samples lost."""
    split = ShardSet.open(folder).split("train")
    faults = read_all(split, sound)
    rows, piece = trained(folder, sound.tokenizer)
    refused = [error for error in faults.values() if isinstance(error, UserError)]
    if refused:
        assert len(refused) == split.shards[0].samples, "a refused shard is refused whole"
        assert isinstance(piece, UserError)
        assert str(piece) in {str(error) for error in refused}
    else:
        assert isinstance(piece, Piece)
        assert piece.images is not None
        assert piece.groups is not None
        for key, *made in zip(piece.keys, piece.images, piece.token_ids, piece.groups, strict=True):
            pixels, tokens, group = sound.trained[key]
            assert np.array_equal(made[0], pixels)
            assert (made[1], made[2]) == (tokens, group)
        planned = zip(rows.order.batch(0).numbers.tolist(), piece.keys, strict=True)
        assert all(key == sound.samples[number].key for number, key in planned if number not in faults)
        assert piece.bad == expected_records(rows, faults, piece.keys)
    # Bytes that are trusted: whatever they say, no exception but the two that are promised.
    unchecked = ShardSet.open(folder, check="none").split("train")
    for number in range(len(unchecked)):
        try:
            unchecked.read(number)
        except (BadSample, UserError):
            continue
    trained(folder, sound.tokenizer, "none")
    return len(faults)


def examine_many(seeds: range, sound: Sound, folder: Path) -> None:
    """In a process of its own: writes down which seed is at work, and every one that failed."""
    room = psutil.Process().memory_info().vms + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (room, room))  # what a damaged index speaks of must not be allocated
    lost = 0
    with open(folder / "failures", "w") as failures:
        for seed in seeds:
            (folder / "seed").write_text(str(seed))
            what, files = damage(seed, sound)
            place = folder / "set"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            for name, data in files.items():
                (place / name).write_bytes(data)
            try:
                lost += examine(place, sound)
            except BaseException:
                failures.write(f"seed {seed}: {what}\n{traceback.format_exc()}\n")
    (folder / "lost").write_text(str(lost))


def survive(seeds: range, sound: Sound, folder: Path, seconds: float) -> None:
    """Examines every seed's damage within the time; a crash, a hang and a failure are each named with their seed."""
    child = multiprocessing.get_context("fork").Process(target=examine_many, args=(seeds, sound, folder))
    child.start()
    child.join(seconds)
    hung = child.is_alive()
    child.kill()
    child.join()
    at_work = (
        f"{sound.shard}, seed {(folder / 'seed').read_text()} ({damage(int((folder / 'seed').read_text()), sound)[0]})"
    )
    assert not hung, f"not done after {seconds} s, at {at_work}"
    assert child.exitcode == 0, f"ended with {child.exitcode} at {at_work}"
    failures = (folder / "failures").read_text()
    assert not failures, failures[:5000]
    assert int((folder / "lost").read_text()) > len(seeds) / 2, "the damage is felt"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads, as loader workers are made
def test_damaged_shards_are_survived(sound: Sound, tmp_path: Path) -> None:
    survive(range(60), sound, tmp_path, 60)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_thousands_of_damaged_shards_are_survived(sound: Sound, tmp_path: Path) -> None:
    survive(range(1_000, 1_900), sound, tmp_path, 250)


# Single faults that random damage seldom meets


def reasons(piece: Piece | UserError) -> dict[str, str]:
    assert isinstance(piece, Piece), piece
    return {record.key: record.reason for record in piece.bad}


def foreign_set(folder: Path, members: Members) -> Path:
    plain_tar(folder / "train-000000.tar", members)
    index_folder(folder)
    return folder


@pytest.mark.parametrize(
    "info", [b'{"text": "half \\ud800 a character"}', b'{"text": "a", "label": ["\\uDfFf"]}'], ids=["text", "field"]
)
def test_half_a_character_is_a_bad_sample(info: bytes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """JSON can spell what no text can hold; tokenizers and hashes raise at it."""
    image, extension = image_of(0, 0)
    whole = json.dumps({"text": "é \N{GRINNING FACE}", "label": "\N{GRINNING FACE}"}).encode()
    assert b"\\ud83d\\ude00" in whole
    odd = [(f"odd.{extension}", image), ("odd.json", info), (f"fine.{extension}", image), ("fine.json", whole)]
    rows, piece = trained(foreign_set(tmp_path, [*pairs("a"), *odd]), tokenizer)
    assert reasons(piece).keys() == {"odd"}
    assert reasons(piece)["odd"].startswith("unreadable caption: ")
    assert rows.split.read(2).texts == ["é \N{GRINNING FACE}"]


@pytest.mark.parametrize("failing", ["tar", "idx"])
def test_a_disk_that_fails_gives_bad_samples(
    failing: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, piece = trained(foreign_set(tmp_path, pairs("a", "b", "c")), tokenizer)
    assert reasons(piece) == {}
    index = ShardIndex(tmp_path / "train-000000.idx")
    offset = index.entry(1)[1].image_offset if failing == "tar" else HEADER.itemsize + RECORD.itemsize
    real = os.pread

    def pread(descriptor: int, size: int, at: int) -> bytes:
        if at == offset and os.readlink(f"/proc/self/fd/{descriptor}").endswith(failing):
            raise OSError(5, "Input/output error")
        return real(descriptor, size, at)

    monkeypatch.setattr(os, "pread", pread)
    name = "b" if failing == "tar" else "sample 1"
    assert reasons(rows[Task(0, 0, 3)]) == {name: "cannot be read (Input/output error)"}


def test_an_index_cut_short_under_training_gives_bad_samples(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Their keys are gone with it: they are named by their place."""
    rows, _ = trained(foreign_set(tmp_path, pairs("a", "b", "c")), tokenizer)
    os.truncate(tmp_path / "train-000000.idx", HEADER.itemsize + 2 * RECORD.itemsize)
    piece = rows[Task(0, 0, 3)]
    assert isinstance(piece, UserError), "the keys of a and b are cut off as well"
    assert "unreadable samples in a row (sample " in str(piece) or "checksum differs" in str(piece)
    with open(tmp_path / "train-000000.idx", "ab") as file:
        file.write(bytes(RECORD.itemsize) + b"ab")
    assert reasons(rows[Task(0, 0, 3)]) == {"": "no image, or an empty one"}


@pytest.mark.parametrize("how", ["says so", "is so"])
def test_a_frame_of_terabytes_is_a_bad_sample(how: str, tmp_path: Path) -> None:
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (250, 250, 3), np.uint8)))
    with ShardSetWriter(tmp_path / "set", zstd=True) as out:
        for key in "ab":
            out.write("train", key, noise, "png", {"text": key})
    shard = tmp_path / "set" / "train-000000.tar.zst"
    _, entry, _ = ShardIndex(index_path(shard)).entry(1)
    if how == "says so":
        # RFC 8878: single segment, eight bytes of content size; then one raw block.
        bomb = b"\x28\xb5\x2f\xfd\xe0" + (1 << 42).to_bytes(8, "little") + b"\x08\x00\x00x"
    else:
        bomb = zstandard.ZstdCompressor().compress(bytes(3 << 30))
    assert len(bomb) <= entry.frame_size
    with open(shard, "r+b") as file:
        file.seek(entry.frame_offset)
        file.write(bomb)
    split = ShardSet.open(tmp_path / "set").split("train")
    before = psutil.Process().memory_info().vms
    resource_before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (before + (1 << 28), resource_before[1]))
    try:
        with pytest.raises(BadSample, match=r"damaged Zstandard frame|checksum differs"):
            split.read(1)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, resource_before)
    assert split.read(0).image == noise
