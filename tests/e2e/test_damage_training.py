"""Training over damaged data: every bad sample is named at each meeting, and a run that lost a worker goes on."""

import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from clipdist import cli
from clipdist.config import load_config
from clipdist.data.config import DataConfig
from clipdist.data.images import cache
from clipdist.data.loader import Batch, TrainLoader, worker_errors
from clipdist.data.mixing import Mixture
from clipdist.data.order import Order
from clipdist.data.rows import TrainRows
from clipdist.data.sets.index import index_folder
from clipdist.data.shard_index import ShardIndex
from clipdist.data.shards import ShardSet
from clipdist.data.text import Tokenizer, train_wordpiece
from clipdist.errors import UserError, WorkerKilled
from clipdist.train.loop import train
from tests.conftest import picture
from tests.unit.pictures import encoded
from tests.unit.tars import Members, plain_tar
from tests.unit.test_damage import SIDE, members_of

Recipe = Callable[..., Path]
SAMPLES = 48
# A PNG that says it has 60000 × 60000 pixels; nobody may believe it far enough to ask for the memory.
BOMB = bytearray(encoded(Image.new("L", (9, 9))))
BOMB[16:24] = (60_000).to_bytes(4, "big") * 2
BOMB[29:33] = zlib.crc32(BOMB[12:29]).to_bytes(4, "big")
# Number of a sample -> what its entry in the list of bad samples begins with.
BAD = {
    3: "no image, or an empty one",
    7: "no caption",
    11: "no caption",
    15: "unreadable caption: 'utf-8' codec can't decode",
    19: "unreadable caption: 'utf-8' codec can't encode",
    23: "image of 60000×60000 pixels, more than data.max_image_pixels",
    27: "unreadable image",
    31: "checksum differs",
    39: "no image, or an empty one",
}
THIN = 35  # 100,000 × 1 pixels, which trains


def members(number: int) -> Members:
    key, image, text = f"k{number:02d}", picture("red", "square", "left", number), f"a red square {number}".encode()
    files = {f"{key}.png": image, f"{key}.txt": text}
    odd: dict[int, dict[str, bytes]] = {
        3: {f"{key}.png": b"", f"{key}.txt": text},
        7: {f"{key}.png": image},
        11: {f"{key}.png": image, f"{key}.txt": b" \n"},
        15: {f"{key}.png": image, f"{key}.txt": b"caf\xe9"},
        19: {f"{key}.png": image, f"{key}.json": b'{"text": "half \\ud800"}'},
        23: {f"{key}.png": bytes(BOMB), f"{key}.txt": text},
        27: {f"{key}.png": image[: len(image) // 2], f"{key}.txt": text},
        THIN: {f"{key}.png": encoded(Image.new("RGB", (100_000, 1), "red")), f"{key}.txt": text},
        39: {f"{key}.txt": text},
    }
    return list(odd.get(number, files).items())


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A tar of another tool with all kinds of faulty samples, one of which lost a bit since it was indexed."""
    folder = tmp_path / "damaged"
    tar = plain_tar(folder / "train-000000.tar", [member for number in range(SAMPLES) for member in members(number)])
    index_folder(folder)
    offset = ShardIndex(folder / "train-000000.idx").entry(31)[1].image_offset
    with open(tar, "r+b") as file:
        file.seek(offset + 300)
        (byte,) = file.read(1)
        file.seek(offset + 300)
        file.write(bytes([byte ^ 4]))
    return folder


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def column(run: Path, key: str) -> dict[int, Any]:
    return {record["step"]: record[key] for record in lines_of(run / "metrics.jsonl") if key in record}


def planned_meetings(recipe: Path, epochs: int) -> list[tuple[int, str, str]]:
    """(step, key, stand-in) of every bad sample, in the order of the plan."""
    config = load_config(recipe, [])
    split = Mixture.open(config.data).training("train")
    order = config.order(split)
    assert order.steps_per_epoch * order.global_batch == SAMPLES
    found = []
    for step in range(order.steps_per_epoch * epochs):
        for row, number in enumerate(order.batch(step).numbers.tolist()):
            passed, attempt = [], 0
            while number in BAD:
                passed.append(number)
                attempt += 1
                number, _ = order.replacement(step, row, attempt)
            found += [(step, f"k{lost:02d}", f"k{number:02d}") for lost in passed]
    return found


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize(("kind", "workers"), [("none", 2), ("decoded", 0)])
def test_every_bad_sample_is_named_at_each_meeting(
    kind: str, workers: int, damaged: Path, recipe: Recipe, tmp_path: Path
) -> None:
    path = recipe(
        data__set=str(damaged),
        data__val_split="",
        data__workers=workers,
        data__cache=kind,
        data__cache_folder=str(tmp_path / "cache"),
        data__max_bad_fraction=0.5,
        train__global_batch=12,
        train__epochs=2,
    )
    assert cli.main(["train", str(path)]) == 0
    records = lines_of(tmp_path / "runs" / "tiny" / "bad_samples.jsonl")
    expected = planned_meetings(path, 2)
    assert [(record["step"], record["key"], record["replaced_by"]) for record in records] == expected
    assert len(expected) >= 2 * len(BAD)
    assert {record["key"] for record in records} == {f"k{number:02d}" for number in BAD}
    for record in records:
        assert record.keys() == {"step", "key", "shard", "reason", "replaced_by"}
        assert record["shard"] == "train-000000.tar"
        assert record["reason"].startswith(BAD[int(record["key"][1:])])


@pytest.mark.usefixtures("signal_handlers")
def test_more_bad_samples_than_allowed_are_one_line_and_exit_code_2(
    damaged: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(
        data__set=str(damaged), data__val_split="", data__max_bad_fraction=0.1, train__global_batch=12, train__epochs=2
    )
    assert cli.main(["train", str(path)]) == 2
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("clipdist: error: ")]
    assert "Traceback" not in errors
    assert f"clipdist: error: {damaged}: " in line
    assert "unreadable samples in one epoch of 48, more than data.max_bad_fraction=0.1 allows (k" in line
    records = lines_of(tmp_path / "runs" / "tiny" / "bad_samples.jsonl")
    assert [(r["step"], r["key"]) for r in records] == [
        (step, key) for step, key, _ in planned_meetings(path, 1) if step <= records[-1]["step"]
    ], "up to the step that was too much"


def cached_recipe(recipe: Recipe, tmp_path: Path, **changes: Any) -> Path:
    return recipe(data__cache="decoded", data__cache_folder=str(tmp_path / "cache"), data__val_split="", **changes)


@pytest.mark.usefixtures("signal_handlers")
def test_a_disk_that_fills_up_under_the_decoded_cache_changes_no_result(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = cached_recipe(recipe, tmp_path, train__epochs=2)
    real, written = cache._pwrite, iter(range(10_000))

    def pwrite(*args: Any) -> None:
        if next(written) >= 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)

    monkeypatch.setattr(cache, "_pwrite", pwrite)
    with caplog.at_level(logging.WARNING, "clipdist"):
        assert train(load_config(path, ["name=full"])) == 0
    told = [
        record.message
        for record in caplog.records
        if "cannot be written (No space left on device)" in str(record.message)
    ]
    assert len(told) == 1
    monkeypatch.undo()
    assert train(load_config(path, ["name=roomy", f"data.cache_folder={tmp_path / 'another'}"])) == 0
    for key in ("train/loss", "data/digest"):
        assert column(tmp_path / "runs" / "full", key) == column(tmp_path / "runs" / "roomy", key)


def command(*words: str | Path) -> list[str]:
    return [str(Path(sys.executable).with_name("clipdist")), "train", *map(str, words)]


@pytest.mark.slow
def test_two_jobs_build_one_decoded_cache_together(recipe: Recipe, tmp_path: Path) -> None:
    path = cached_recipe(recipe, tmp_path, train__epochs=2)
    jobs = [subprocess.Popen(command(path, f"name={name}"), stderr=subprocess.PIPE, text=True) for name in "ab"]
    said = [job.communicate(timeout=200)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    for key in ("train/loss", "data/digest"):
        assert column(tmp_path / "runs" / "a", key) == column(tmp_path / "runs" / "b", key)
    (made,) = (tmp_path / "cache").glob("**/layout.json")
    done = subprocess.run(command(path, "name=c"), capture_output=True, text=True, timeout=200, check=True)
    assert "168 of 168 samples stored" in done.stderr
    assert len(list((tmp_path / "cache").glob("**/layout.json"))) == 1
    assert column(tmp_path / "runs" / "c", "train/loss") == column(tmp_path / "runs" / "a", "train/loss")
    assert made.exists()


@pytest.mark.slow
def test_a_killed_worker_ends_the_command_with_one_line_and_the_same_command_goes_on(
    recipe: Recipe, tmp_path: Path
) -> None:
    path = recipe(data__workers=2, data__val_split="", train__epochs=8, checkpoint__every_steps=2)
    run = tmp_path / "runs" / "killed"
    words = command(path, "name=killed")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and max(column(run, "train/loss"), default=0) >= 3):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    workers[0].kill()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert (output, "Traceback" in errors) == ("", False)
    (line,) = [line for line in errors.splitlines() if "error" in line]
    assert line.startswith("clipdist: error: a loader worker was ended from outside (signal: Killed)")
    assert errors.splitlines()[-1] == line
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    stopped = max(column(run, "train/loss"))
    assert 3 <= stopped < 56

    for name in ("killed", "whole"):
        done = subprocess.run(command(path, f"name={name}"), capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "going on from" not in done.stderr
    for key in ("train/loss", "data/digest"):
        assert column(run, key) == column(tmp_path / "runs" / "whole", key)


def test_a_request_to_stop_that_reaches_workers_too_leaves_a_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    """As launchers and SLURM send it: to every process at once."""
    path = recipe(data__workers=2, data__val_split="", train__epochs=200)
    run = tmp_path / "runs" / "tiny"
    process = subprocess.Popen(command(path), stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and max(column(run, "train/loss"), default=0) >= 3):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75, errors
    assert (run / "checkpoints" / "latest").exists()
    assert "Traceback" not in errors


class _Struck(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() > 1000:
            raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")
        return super().write(data)


def test_a_worker_that_dies_while_a_checkpoint_is_written_is_told_of_alike() -> None:
    """PyTorch raises its notice in whatever runs; torch.save then fails again, with words of its own."""
    with pytest.raises(RuntimeError, match="unexpected pos"):
        torch.save(torch.ones(10_000), _Struck())
    with pytest.raises(WorkerKilled, match=r"ended from outside \(signal: Killed\)"), worker_errors(), worker_errors():
        torch.save(torch.ones(10_000), _Struck())
    with pytest.raises(ValueError, match=r"^own$"), worker_errors():
        raise ValueError("own") from KeyError("a")


# Shards that change under a running job


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([f"caption {number} a é" for number in range(40)] * 2, 120, 8)


def swapped_sets(folder: Path) -> tuple[Path, Path]:
    """Two sets of eight tars whose members lie in the same places, with other pictures."""
    for version in range(2):
        for shard in range(8):
            numbers = range(5 * shard, 5 * shard + 5)
            members = [member for number in numbers for member in members_of(number, version)]
            plain_tar(folder / f"{version}" / f"train-{shard:06d}.tar", members)
        index_folder(folder / f"{version}")
    return folder / "0", folder / "1"


def running(folder: Path, tokenizer: Tokenizer, workers: int) -> TrainLoader:
    """Two epochs of ten steps that go through the shards one after the other."""
    split = ShardSet.open(folder).split("train")
    order = Order(split.samples_per_shard, seed=3, global_batch=4, lanes=1, window=5)
    config = DataConfig(set=str(folder), workers=workers, prefetch=1)
    rows = TrainRows(split, order, config, side=SIDE, resize="crop", tokenizer=tokenizer)
    return TrainLoader(rows, rank=0, world_size=1, first_step=0, steps=20)


def rename_over(source: Path, target: Path, more: bytes = b"") -> None:
    new = target.with_suffix(".new")
    new.write_bytes(source.read_bytes() + more)
    os.replace(new, target)


def pictures_of(batches: list[Batch]) -> dict[tuple[int, str], np.ndarray]:
    """Pixels by epoch and key."""
    return {
        (batch.step // 10, key): image.numpy().copy()
        for batch in batches
        for key, image in zip(batch.keys, batch.images_b3HW, strict=True)
    }


def test_shards_of_equal_size_swapped_under_a_job_cost_samples_and_no_more(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder, other = swapped_sets(tmp_path)
    expected = pictures_of(list(running(folder, tokenizer, workers=0)))
    assert len(expected) == 80
    loader = running(folder, tokenizer, workers=2)
    names = [f"train-{shard:06d}.tar" for shard in range(1, 8, 2)]
    batches = []
    for batch in loader:
        if batch.step == 0:
            for name in names:
                rename_over(other / name, folder / name)
        batches.append(batch)
    assert [batch.step for batch in batches] == list(range(20))
    found = pictures_of(batches)
    assert all(np.array_equal(image, expected[place]) for place, image in found.items())
    bad = [record for batch in batches for record in batch.bad]
    assert len(bad) >= 10
    assert {record.shard for record in bad} <= set(names)
    assert all(record.reason.startswith("checksum differs") for record in bad)
    lost = {(record.step, record.key) for record in bad}
    for batch in batches:
        planned = [f"k{number}" for number in loader.rows.order.batch(batch.step).numbers]
        for key, used in zip(planned, batch.keys, strict=True):
            assert used == key or (batch.step, key) in lost


def test_a_shard_of_another_size_under_a_job_ends_it_with_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder, other = swapped_sets(tmp_path)
    before = {child.pid for child in psutil.Process().children()}

    def train() -> None:
        for batch in running(folder, tokenizer, workers=2):
            if batch.step == 0:
                for shard in range(8):
                    name = f"train-{shard:06d}.tar"
                    rename_over(other / name, folder / name, more=bytes(512))

    message = rf"^{folder}/train-00000\d\.tar: found \d+ bytes where its index expects \d+: truncated, or changed after"
    with pytest.raises(UserError, match=message) as caught:
        train()
    assert "\n" not in str(caught.value)
    traceback.clear_frames(caught.tb)  # they held the iterator
    assert {child.pid for child in psutil.Process().children()} <= before
