"""The shard doctor finds what is damaged and what leaks, and nothing in a sound set."""

import json
import shutil
from pathlib import Path

import pytest

from clipdist.cli import main
from clipdist.data.sets.verify import verify_set
from clipdist.data.sets.writer import ShardSetWriter
from tests.conftest import picture


def counted(folder: Path) -> dict[str, int]:
    return {kind: number for kind, number in verify_set(folder, workers=1).counts().items() if number}


@pytest.mark.parametrize("zstd", [False, True])
def test_a_sound_set_is_sound(tmp_path: Path, zstd: bool) -> None:
    with ShardSetWriter(tmp_path / "set", samples_per_shard=2, zstd=zstd) as writer:
        for number, colour in enumerate(["red", "green", "blue"]):
            writer.write("train", f"k{number}", picture(colour, "cross", "left", number), "png", {"text": colour})
    assert counted(tmp_path / "set") == {}


def test_every_kind_is_found_once(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path / "set", samples_per_shard=10) as writer:
        same = picture("red", "circle", "left")
        writer.write("train", "first", same, "png", {"text": "a", "unit": "p1"})
        writer.write("test", "copy", same, "png", {"text": "a copy", "unit": "p2"})
        writer.write("train", "near", picture("red", "triangle", "top", 1), "png", {"text": "near"})
        writer.write("test", "near too", picture("red", "triangle", "top", 1)[:-12] + b"\0" * 12, "png", {"text": "n"})
        writer.write("test", "patient", picture("blue", "bar", "top"), "png", {"text": "b", "unit": "p1"})
        writer.write("train", "no image", b"GIF89a but not really", "png", {"text": "c"})
        writer.write("train", "no caption", picture("green", "square", "bottom"), "png", {"text": " "})
    assert counted(tmp_path / "set") == {
        "image": 1,
        "caption": 1,
        "unit straddles": 1,
        "duplicate image straddles": 1,
        "near-duplicate image straddles": 1,
    }


def test_a_flipped_byte_breaks_the_checksum(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    shutil.copytree(shapes, folder)
    shard = folder / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert main(["verify", str(folder), "--workers", "1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["checksum"] == 1
    assert found["samples"] == 200


def test_a_truncated_shard_is_named_and_the_rest_examined(shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(shapes, folder)
    shard = folder / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    diagnosis = verify_set(folder, workers=2)
    assert diagnosis.counts()["structure"] == 1
    assert diagnosis.samples == 150
    assert "train-000000.tar" in diagnosis.summary()
