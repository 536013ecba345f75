"""A disk that refuses for a while: files that are appended to lose nothing, checkpoints are saved later."""

import errno
import json
import logging
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipdist.errors import DiskError, UserError, disk_errors, disk_outages
from clipdist.train import checkpoint, command, outage
from clipdist.train.checkpoint import CheckpointConfig, CheckpointSaver, newest_sound, read_checkpoint
from clipdist.train.metrics import LogConfig, MetricsWriter
from clipdist.train.outage import AppendedFile, Outage


def run(*words: str | Path) -> None:
    subprocess.run([*map(str, words)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 pages."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs rights that this machine does not give")
    yield folder
    run("umount", "-l", folder)


def fill(disk: Path) -> Path:
    """A file that takes all room."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
    return ballast


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "FIRST_PAUSE", 0.0)


def refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))


# What kind of error it is


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN]
)
def test_a_condition_of_the_disk_is_told_apart(number: int, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"cannot be written \(") as caught, disk_errors(tmp_path):
        raise refused(number)
    assert caught.value.reason == os.strerror(number)
    copy = pickle.loads(pickle.dumps(caught.value))  # as it goes from rank to rank
    assert (str(copy), copy.reason) == (str(caught.value), caught.value.reason)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_folder_that_is_wrong_is_the_users(number: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose another folder") as caught, disk_errors(tmp_path):
        raise refused(number)
    assert not isinstance(caught.value, DiskError)
    with pytest.raises(DiskError), disk_outages(tmp_path), disk_errors(tmp_path):  # but not while it is being used
        raise refused(number)


def test_what_needs_room_says_so_as_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="no space left on this disk"), disk_errors(tmp_path, lambda: "half done"):
        raise refused(errno.ENOSPC)


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (TypeError("own"), UserError("said already")):
        with pytest.raises(type(error)) as caught, disk_outages(tmp_path):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("error", "code"), [(DiskError("full"), 1), (UserError("typo"), 2)], ids=["the disk's", "the user's"]
)
def test_exit_codes(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 is started again by whoever supervises, 2 is not."""

    def fails(args: Any) -> int:
        raise error

    ended: list[int] = []
    monkeypatch.setattr(command, "run", fails)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setenv("CLIPDIST_EXIT_CODES", str(tmp_path))
    command.main(["recipe.yaml"])
    assert ended == [code]
    assert (tmp_path / "0").read_text() == f"{code}\n"
    assert capsys.readouterr().err == f"clipdist: error: {error}\n"


# Files that are appended to


@pytest.mark.usefixtures("no_pause")
def test_lines_follow_in_order_when_there_is_room_again(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The last page has room for a part of a line: it must not stay there torn, nor come twice."""
    file = AppendedFile(disk / "lines")
    line = [f"{number:03d} ".encode() + b"x" * 995 + b"\n" for number in range(20)]
    for one in line[:3]:
        file.append(one)
    ballast = fill(disk)
    with caplog.at_level(logging.INFO, "clipdist"):
        for one in line[3:15]:
            file.append(one)
            written = file.path.read_bytes()
            assert written == b"".join(line[: len(written) // 1000]), "whole lines alone, as far as they fit"
        assert 3 <= len(written) // 1000 < 5
        with pytest.raises(DiskError, match="No space left on device"):
            file.sync()
        ballast.unlink()
        for one in line[15:]:
            file.append(one)
    assert file.path.read_bytes() == b"".join(line)
    file.sync()
    assert file.path.read_bytes() == b"".join(line)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2, told
    assert "lines cannot be written (No space left on device); trying again in 0 s; what belongs there is k" in told[0]
    assert "lines is written again, after 0 s" in told[1]


@pytest.mark.usefixtures("no_pause")
def test_a_disk_that_becomes_read_only_and_back(disk: Path) -> None:
    file = AppendedFile(disk / "lines")
    file.append(b"one\n")
    run("mount", "-o", "remount,ro", disk)
    file.append(b"two\n")
    file.append(b"three\n")
    with pytest.raises(DiskError, match="Read-only file system"):
        file.sync()
    assert file.path.read_bytes() == b"one\n"
    run("mount", "-o", "remount,rw", disk)
    file.append(b"four\n")
    assert file.path.read_bytes() == b"one\ntwo\nthree\nfour\n"


@pytest.mark.usefixtures("no_pause")
def test_what_a_failed_sync_may_have_lost_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot bring its pages to the disk drops them, and has nothing to say at the next sync."""
    file = AppendedFile(tmp_path / "lines")
    file.append(b"one\n")
    file.sync()
    file.append(b"two\n")

    def fails(descriptor: int) -> None:
        file.path.write_bytes(b"one\n\0\0\0\0")
        raise refused(errno.EIO)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(DiskError, match="Input/output error"):
        file.sync()
    monkeypatch.undo()
    monkeypatch.setattr(outage, "FIRST_PAUSE", 0.0)
    file.append(b"three\n")
    assert file.path.read_bytes() == b"one\ntwo\nthree\n"


def test_what_is_kept_in_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "UNSYNCED_BYTES", 1000)
    file = AppendedFile(tmp_path / "lines")
    for number in range(500):
        file.append(f"{number:09d}\n".encode())
        assert len(file._kept) <= 1000
    assert file.path.read_text().split() == [f"{number:09d}" for number in range(500)]


def test_pauses_grow_up_to_a_bound_and_only_then_is_anything_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(outage.time, "monotonic", lambda: now)
    found, error = Outage(), DiskError("x", "why")
    pauses = []
    for _ in range(5):
        found.failed(error, "it", "")
        pauses.append(found.pause_left)
    assert pauses == [10, 20, 40, 60, 60]
    now += 59
    assert found.pause_left == 1
    now += 2
    assert found.pause_left == 0
    found.over("it")
    assert (found.error, found.pause_left) == (None, 0)

    file, attempts = AppendedFile(tmp_path / "gone" / "lines"), []
    real = os.open
    monkeypatch.setattr(outage.os, "open", lambda *words: (attempts.append(now), real(*words))[1])
    for _ in range(12):
        file.append(b"x\n")
        now += 5
    assert np.diff(attempts).tolist() == [10, 20], "a folder that is gone is not made anew, and not asked at each line"


@pytest.mark.usefixtures("no_pause")
def test_metrics_and_tensorboard_hold_everything_once(disk: Path) -> None:
    run_folder = disk / "run"
    run_folder.mkdir()
    writer = MetricsWriter(run_folder, LogConfig(), 0)
    values = np.linspace(0, 1, 50)
    ballast = None
    for step in range(1, 41):
        if step == 10:
            ballast = fill(disk)
        if step == 30:
            assert ballast is not None
            ballast.unlink()
        writer.write(step, 0, {f"train/{name}": step / 7 for name in ("loss", "lr", "grad_norm")})
        if step % 10 == 5:
            writer.histogram("val/cosines", values + step, step)
            writer.image("val/panel", np.full((8, 8, 3), step, np.uint8), step)
    writer.sync()
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(step, step / 7) for step in range(1, 41)]
    board = EventAccumulator(
        str(run_folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0}
    )
    board.Reload()
    for name in ("loss", "lr", "grad_norm"):
        shown = [(event.step, event.value) for event in board.Scalars(f"train/{name}")]
        assert shown == [(step, pytest.approx(step / 7)) for step in range(1, 41)]
    assert [event.step for event in board.Histograms("val/cosines")] == [5, 15, 25, 35]
    assert [event.step for event in board.Images("val/panel")] == [5, 15, 25, 35]
    assert len(list((run_folder / "tensorboard").iterdir())) == 1


def test_a_resumed_run_hides_what_tensorboard_had_of_later_steps(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path, LogConfig(), 0)
    for step in range(1, 7):
        first.write(step, 0, {"train/loss": 1.0})
    second = MetricsWriter(tmp_path, LogConfig(), 3)
    for step in range(4, 7):
        second.write(step, 0, {"train/loss": 2.0})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/loss")] == [1, 1, 1, 2, 2, 2]


# Checkpoints


STATE = {"digest": "00ff"}
WEIGHTS = {"w": torch.ones(3)}
MOMENTS = {"w": {"exp_avg": torch.ones(3)}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_checkpoint_that_is_refused_is_saved_later(
    how: str, in_background: bool, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = disk / "checkpoints"
    saver = CheckpointSaver(folder, CheckpointConfig(keep=3, in_background=in_background))
    large = {"w": torch.ones(2000)}
    saver.save(1, large, MOMENTS, STATE)
    assert not saver.wants(False)
    saver.wait()
    if how == "full":
        fill(disk)
    else:
        run("mount", "-o", "remount,ro", disk)
    with caplog.at_level(logging.INFO, "clipdist"):
        for step in (2, 3):
            saver.save(step, large, MOMENTS, STATE)
            saver.wait()
            assert isinstance(saver.error, DiskError)
            assert names(folder) == ["latest", "step-00000001"]
            assert saver.wants(False), "after the pause, whether one is due or not"
        given_up = saver.given_up()
        assert isinstance(given_up, DiskError)
        assert str(given_up).endswith("(tried for 4 min; the last complete checkpoint is of step 1)")
        if how == "full":
            (disk / "ballast").unlink()
        else:
            run("mount", "-o", "remount,rw", disk)
        saver.save(4, large, MOMENTS, STATE)
        saver.wait()
    assert saver.error is None
    assert not saver.wants(False)
    assert saver.wants(True)
    assert names(folder) == ["latest", "step-00000001", "step-00000004"]
    told = [record.getMessage() for record in caplog.records]
    reason = "No space left on device" if how == "full" else "Read-only file system"
    assert told == [
        f"checkpoint of step 2 cannot be written ({reason}); trying again in 0 s; the last complete checkpoint is of "
        f"step 1",
        "checkpoint of step 4 is written again, after 0 s",
    ]


def test_nothing_is_asked_for_before_the_pause_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = CheckpointSaver(tmp_path / "gone" / "checkpoints", CheckpointConfig(in_background=False))
    saver.save(1, WEIGHTS, MOMENTS, STATE)
    assert isinstance(saver.error, DiskError), "the run's own folder is not made anew"
    assert not saver.wants(True)
    saver.outage._next = 0.0
    assert saver.wants(False)


@pytest.mark.usefixtures("no_pause")
def test_what_belongs_on_the_disk_first_is_written_before_the_checkpoint(tmp_path: Path) -> None:
    """Of what is replaced, the last alone; and no checkpoint without it."""
    well, done, kept = False, [], []

    def write(what: str) -> None:
        if not well:
            raise refused(errno.EROFS)
        done.append(what)

    saver = CheckpointSaver(tmp_path / "c", CheckpointConfig(in_background=False), before=lambda: write("metrics"))
    saver.first("model", lambda: write("model of step 1"), keep=lambda: kept.append(1))
    saver.first("model", lambda: write("model of step 2"), keep=lambda: kept.append(2))
    saver.first("report", lambda: write("report"))
    assert kept == [1, 2]
    assert saver.wants(False)
    saver.save(3, WEIGHTS, MOMENTS, STATE)
    assert done == []
    assert newest_sound(tmp_path / "c") is None
    well = True
    saver.save(4, WEIGHTS, MOMENTS, STATE)
    assert done == ["metrics", "model of step 2", "report"]
    assert newest_sound(tmp_path / "c") == tmp_path / "c" / "step-00000004"
    saver.save(5, WEIGHTS, MOMENTS, STATE)
    assert done == ["metrics", "model of step 2", "report", "metrics"]
    saver.first("model", lambda: write("model of step 6"), keep=lambda: kept.append(6))
    assert done[-1] == "model of step 6"
    assert kept == [1, 2], "not copied where it is written at once"


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("fails", ["write_atomically", "fsync_folder"])
def test_the_same_step_again_after_something_failed_behind_its_last_rename(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointSaver(tmp_path, CheckpointConfig(in_background=False))

    def stale(*words: Any) -> None:
        raise refused(errno.ESTALE)

    monkeypatch.setattr(checkpoint, fails, stale)
    saver.save(1, WEIGHTS, MOMENTS, STATE)
    assert isinstance(saver.error, DiskError)
    assert newest_sound(tmp_path) == tmp_path / "step-00000001"
    monkeypatch.undo()
    saver.save(1, {"w": torch.zeros(3)}, MOMENTS, STATE)
    assert saver.error is None
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert (read_checkpoint(tmp_path / "step-00000001").weights["w"] == 0).all()


def test_an_old_one_that_cannot_be_removed_spoils_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = CheckpointSaver(tmp_path, CheckpointConfig(keep=1, in_background=False))
    saver.save(1, WEIGHTS, MOMENTS, STATE)

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise refused(errno.EBUSY)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    saver.save(2, WEIGHTS, MOMENTS, STATE)
    assert saver.error is None
    assert "step-00000001 cannot be removed (Device or resource busy)" in caplog.text
    monkeypatch.undo()
    saver.save(3, WEIGHTS, MOMENTS, STATE)
    assert names(tmp_path) == ["latest", "step-00000003"]
