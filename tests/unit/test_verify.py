"""The shard doctor finds what is damaged and what leaks, and nothing in a sound set."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from clipdist.cli import main
from clipdist.data.sets import examine, verify
from clipdist.data.sets.examine import LISTED_OF_SHARD
from clipdist.data.sets.verify import STATE, verify_set
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shard_index import HEADER, RECORD
from clipdist.data.shards import ShardInfo
from clipdist.errors import UserError
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
    assert found["counts"]["checksum"] == 2  # the file's, and the sample's
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


# Going on where an earlier run stopped


def state_lines(folder: Path) -> list[bytes]:
    return (folder / STATE).read_bytes().splitlines(keepends=True)


@pytest.fixture
def copied(shapes: Path, tmp_path: Path) -> Path:
    shutil.copytree(shapes, tmp_path / "set", ignore=shutil.ignore_patterns(STATE))
    return tmp_path / "set"


def test_a_second_run_reads_no_shard_and_says_the_same(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = verify_set(copied, workers=1)
    with monkeypatch.context() as patched:
        patched.setattr(verify, "examine", None)
        second = verify_set(copied, workers=1)
    assert (first.resumed, second.resumed) == (0, 5)
    assert second.to_dict() == first.to_dict()
    assert second.summary() == first.summary()
    assert verify_set(copied, workers=1, again=True).resumed == 0


def test_what_was_done_before_an_interrupt_is_kept(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = verify_set(copied, workers=1, state=copied.parent / "other.jsonl")
    examine, calls = verify.examine, []

    def interrupt_at_the_third(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return examine(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(verify, "examine", interrupt_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            verify_set(copied, workers=1)
    resumed = verify_set(copied, workers=1)
    assert resumed.resumed == 2
    assert resumed.to_dict() == whole.to_dict()


def test_a_torn_last_line_is_done_again(copied: Path) -> None:
    whole = verify_set(copied, workers=1)
    lines = state_lines(copied)
    (copied / STATE).write_bytes(b"".join(lines[:4]) + lines[4][: len(lines[4]) // 2])
    again = verify_set(copied, workers=1)
    assert again.resumed == 4
    assert again.to_dict() == whole.to_dict()
    assert verify_set(copied, workers=1).resumed == 5  # the new line does not hang on the torn one


def test_a_changed_shard_is_examined_anew(copied: Path) -> None:
    assert not verify_set(copied, workers=1).damaged
    shard = copied / "train-000002.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    index = copied / "val-000000.idx"
    os.utime(index, ns=(0, 0))
    found = verify_set(copied, workers=1)
    assert found.resumed == 3
    assert found.counts()["checksum"] == 2
    assert verify_set(copied, workers=1).to_dict() == found.to_dict()


def test_a_quick_run_decodes_nothing_and_does_not_stand_in_for_a_full_one(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path / "set") as writer:
        writer.write("train", "no image", b"GIF89a but not really", "gif", {"text": "c"})
        writer.write("train", "no caption", picture("red", "bar", "top"), "png", {"text": " "})
    quick = verify_set(tmp_path / "set", workers=1, quick=True)
    assert {kind for kind, number in quick.counts().items() if number} == {"caption"}
    full = verify_set(tmp_path / "set", workers=1)
    assert (full.resumed, full.counts()["image"]) == (0, 1)
    assert verify_set(tmp_path / "set", workers=1, quick=True).resumed == 1


def test_results_of_a_set_that_cannot_be_written_to_go_to_the_cache(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != copied)
    before = sorted(copied.iterdir())
    assert verify_set(copied, workers=1).resumed == 0
    assert verify_set(copied, workers=1).resumed == 5
    assert sorted(copied.iterdir()) == before
    assert len(list((tmp_path / "cache").rglob("*.jsonl"))) == 1


def killed(folder: Path, split: str, info: ShardInfo, quick: bool) -> None:
    """In place of `examine` in a worker process: one that the kernel ends at the third shard."""
    if info.file == "train-000002.tar":
        os.kill(os.getpid(), signal.SIGKILL)
    return examine.examine(folder, split, info, quick)  # type: ignore[return-value]


@pytest.mark.slow
def test_a_killed_worker_is_told_of_and_what_was_done_stays(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(verify, "examine", killed)
        with pytest.raises(UserError, match=r"process .* died, .* of 5 shards are done and kept; .*--workers"):
            verify_set(copied, workers=2)
    done = len(state_lines(copied)) if (copied / STATE).exists() else 0
    assert verify_set(copied, workers=1).resumed == done


# What is in a set twice


def test_repeated_pictures_within_a_split_are_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = picture("red", "circle", "left")
    with ShardSetWriter(tmp_path / "set", samples_per_shard=2) as writer:
        for key in ("a", "b", "c"):
            writer.write("train", key, same, "png", {"text": key})
        writer.write("train", "other bytes", same + b"\0", "png", {"text": "d"})
    assert main(["verify", str(tmp_path / "set"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "note: duplicate image: 1\n    train: a: same as train: b and 1 more" in printed
    assert "note: near-duplicate image: 1\n    train: other bytes: looks like train: a" in printed
    assert printed.endswith("sound: nothing damaged, nothing on both sides of a split\n")


def test_keys_used_twice_and_scattered_members_are_damage(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with ShardSetWriter(tmp_path / name) as writer:
            writer.write("train", "k", picture("red", "bar", (name == "one" and "top") or "left"), "png", {"text": "a"})
    shutil.copy(tmp_path / "two" / "train-000000.tar", tmp_path / "one" / "train-000001.tar")
    assert main(["index", str(tmp_path / "one")]) == 0
    assert counted(tmp_path / "one")["duplicate key"] == 1


def test_a_wrong_index_is_damage(copied: Path) -> None:
    index = copied / "train-000000.idx"
    data = bytearray(index.read_bytes())
    width = RECORD.fields["width"][1]  # type: ignore[index]
    data[HEADER.itemsize + width] ^= 1
    index.write_bytes(data)
    found = verify_set(copied, workers=1)
    assert found.counts()["structure"] == 1
    assert "width: 41 in the index, 40 in the archive" in found.summary()


def test_many_findings_are_counted_and_some_listed(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path / "set") as writer:
        for number in range(LISTED_OF_SHARD + 50):
            writer.write("train", f"k{number}", picture("red", "bar", "top", number % 3), "png", {"text": ""})
    found = verify_set(tmp_path / "set", workers=1, quick=True)
    assert found.counts()["caption"] == LISTED_OF_SHARD + 50
    assert sum(finding.kind == "caption" for finding in found.listed) == LISTED_OF_SHARD
    assert f"… and {LISTED_OF_SHARD + 45} more" in found.summary()
