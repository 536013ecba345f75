"""Features of a locked tower: what is written is found again, bit for bit, and nothing else is."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipdist.config import RunConfig, differences, load_config
from clipdist.errors import UserError
from clipdist.train.config import check
from clipdist.train.feature_cache import FeatureCache, cached_towers, content_keys, identity
from clipdist.train.feature_file import Index, Layout, OwnFile, pack, read_records
from clipdist.train.loop import train
from clipdist.train.trainer import Trainer
from tests.distributed.test_training import column, weights

Recipe = Callable[..., Path]
LAYOUT = Layout("float32", 2, 8)
LOCKED = [{"from_epoch": 0, "text": "none"}]
STEPS_PER_EPOCH = 7


def key(number: int, high: int | None = None) -> bytes:
    """Of 16 bytes; `high` is its first half."""
    return (number if high is None else high).to_bytes(8, "little") + number.to_bytes(8, "little")


def rows_of(numbers: list[int]) -> np.ndarray:
    return np.array([[n, -n] for n in numbers], np.float32).view(np.uint8).reshape(len(numbers), 8)


def value(row: bytes | memoryview) -> list[float]:
    return np.frombuffer(row, np.float32).tolist()


def write(path: Path, *records: list[int]) -> Path:
    own = OwnFile(path)
    for numbers in records:
        own.append([key(n) for n in numbers], rows_of(numbers), LAYOUT)
    own.close()
    return path


def test_what_was_written_is_found_again(tmp_path: Path) -> None:
    path = write(tmp_path / "new" / "a.bin", [1, 2, 3], [7])
    again = OwnFile(path)
    assert {k: value(again.row(k)) for k in again.offsets} == {key(n): [n, -n] for n in (1, 2, 3, 7)}
    again.append([key(9)], rows_of([9]), LAYOUT)
    assert value(again.row(key(9))) == [9, -9]
    again.close()
    index = Index()
    index.add([path])
    places = index.find([key(9), key(4), key(2)])
    assert places[1] == -1
    assert [value(row) for row in index.rows(places[[0, 2]])] == [[9, -9], [2, -2]]
    assert index.layout == LAYOUT


def test_a_file_that_nothing_was_put_into_is_not_made(tmp_path: Path) -> None:
    OwnFile(tmp_path / "a.bin").close()
    assert not list(tmp_path.iterdir())
    assert Index().find([key(1)]).tolist() == [-1]


@pytest.mark.parametrize("bytes_left", range(0, 2 * (40 + 2 * 16 + 2 * 16), 7))
def test_a_torn_record_counts_as_a_whole_or_not_at_all(bytes_left: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [1, 2], [3, 4])
    record = path.stat().st_size // 2
    os.truncate(path, bytes_left)
    kept = [1, 2] if bytes_left >= record else []
    index = Index()
    index.add([path])  # how another rank sees it
    assert (index.find([key(n) for n in (1, 2, 3, 4)]) >= 0).tolist() == [bool(kept), bool(kept), False, False]
    own = OwnFile(path)
    assert list(own.offsets) == [key(n) for n in kept]
    assert path.stat().st_size == record * bool(kept)
    own.append([key(3), key(4)], rows_of([3, 4]), LAYOUT)
    own.close()
    assert list(OwnFile(path).offsets) == [key(n) for n in [*kept, 3, 4]]


def test_a_row_that_a_crash_did_not_bring_to_disk_ends_the_rank_s_own_file(tmp_path: Path) -> None:
    """Its length is right and its content is not."""
    path = write(tmp_path / "a.bin", [1, 2], [3, 4], [5, 6])
    record = path.stat().st_size // 3
    data = bytearray(path.read_bytes())
    data[2 * record - 8 : 2 * record] = bytes(8)
    path.write_bytes(data)
    own = OwnFile(path)
    assert list(own.offsets) == [key(1), key(2)]
    own.close()
    assert path.stat().st_size == record


def test_a_damaged_row_of_an_earlier_epoch_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "text" / "a.bin", [1, 2])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    index = Index()
    index.add([path])
    places = index.find([key(1), key(2)])
    assert value(index.rows(places[:1])[0]) == [1, -1]
    with pytest.raises(UserError, match=r"a\.bin: a row .* does not equal its checksum; remove .*text and start"):
        index.rows(places[1:])


@pytest.mark.parametrize("at", [0, 8, 16, 20, 24, 30, 40, 60])
def test_a_changed_header_or_key_makes_it_no_record(at: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [1, 2])
    data = bytearray(path.read_bytes())
    data[at] ^= 2
    path.write_bytes(data)
    found = read_records(path, check_rows=False)
    assert (found.keys, found.end) == (b"", 0)


# Few halves, so that equal ones, and equal keys, come often.
some_keys = st.lists(st.builds(key, st.integers(0, 6), st.integers(0, 2)), max_size=12)


@given(st.lists(some_keys, max_size=5), some_keys)
@settings(max_examples=150, deadline=None)
def test_the_index_is_a_dictionary_in_which_the_first_counts(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[bytes]], asked: list[bytes]
) -> None:
    folder, expected, number = tmp_path_factory.mktemp("index"), {}, 0
    index = Index()
    for n, keys in enumerate(files):
        path = folder / f"{n}.bin"
        path.write_bytes(b"")
        for start in range(0, len(keys), 3):
            part = list(dict.fromkeys(keys[start : start + 3]))
            numbers = list(range(number, number + len(part)))
            number += len(part)
            with open(path, "ab") as file:
                file.write(pack(part, rows_of(numbers), LAYOUT))
            for one, its in zip(part, numbers, strict=True):
                expected.setdefault(one, its)
        index.add([path])
    assert len(index) == len(expected)
    places = index.find(asked)
    assert [bool(place >= 0) for place in places] == [one in expected for one in asked]
    there = [one for one in asked if one in expected]
    if there:
        assert [value(row)[0] for row in index.rows(places[places >= 0])] == [expected[one] for one in there]


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = OwnFile(tmp_path / "a.bin")
    own.append([key(1)], rows_of([1]), LAYOUT)
    true, calls = os.pwrite, iter(range(10))

    def full(descriptor: int, data: Any, at: int) -> int:
        if next(calls):
            raise OSError(errno.ENOSPC, "No space left on device")
        return true(descriptor, data[:20], at)  # as much as there was room for

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free some space") as caught:
        own.append([key(2)], rows_of([2]), LAYOUT)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert list(OwnFile(tmp_path / "a.bin").offsets) == [key(1)]


class Counting(nn.Module):
    """A tower that notes the rows it sees, and gives features that tell of the batch they were computed in."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.seen: list[list[int]] = []
        self.dtype = dtype

    def forward(self, tokens_bT: torch.Tensor, mask_bT: torch.Tensor) -> torch.Tensor:
        first = (tokens_bT * mask_bT).sum(1)
        self.seen.append(first.tolist())
        return torch.stack([first, torch.full_like(first, len(first))], 1).to(self.dtype)


def captions(*numbers: int, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Each of two tokens, padded to `width` by something that must not count."""
    tokens = torch.full((len(numbers), width), 99)
    mask = torch.zeros(len(numbers), width, dtype=torch.int64)
    tokens[:, 0], tokens[:, 1], mask[:, :2] = torch.tensor(numbers), 1, 1
    return tokens, mask


def cache_of(folder: Path, epoch: int, rank: int = 0) -> FeatureCache:
    index = Index()
    index.add(sorted(path for path in folder.glob("epoch-*") if int(path.name.split("-")[1]) < epoch))
    return FeatureCache(OwnFile(folder / f"epoch-{epoch}-rank-{rank}.bin"), index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_only_rows_that_nobody_has_are_computed_and_each_once(dtype: torch.dtype, tmp_path: Path) -> None:
    tower, cache = Counting(dtype), cache_of(tmp_path, 0)
    first = cache(tower, *captions(5, 6, 5))
    assert tower.seen == [[6, 7]]
    assert first.tolist() == [[6, 2], [7, 2], [6, 2]], "equal rows have equal features"
    assert first.dtype == dtype
    second = cache(tower, *captions(8, 6, width=5))
    assert tower.seen[1:] == [[9]]
    assert second.tolist() == [[9, 1], [7, 2]], "as they were computed, whatever the padding"
    assert cache.computed == 3
    cache.own.close()
    later = cache_of(tmp_path, 1)
    third = later(tower, *captions(8, 9, 5, 6))
    assert tower.seen[2:] == [[10]]
    assert third.tolist() == [[9, 1], [10, 1], [6, 2], [7, 2]]
    assert torch.equal(later(tower, *captions(8, 9, 5, 6)), third)
    assert third.dtype == dtype
    assert len(tower.seen) == 3


def test_rows_of_another_rank_show_in_the_next_epoch(tmp_path: Path) -> None:
    tower = Counting()
    for rank in (0, 1):
        cache = cache_of(tmp_path, 0, rank)
        cache(tower, *captions(5, 6 + rank))
        cache.own.close()
    assert tower.seen == [[6, 7], [6, 8]], "not in the running one"
    cache_of(tmp_path, 1)(tower, *captions(5, 6, 7))
    assert len(tower.seen) == 2


def test_keys_are_those_of_what_is_seen() -> None:
    tokens, mask = captions(5, 6, 5)
    one, two, three = content_keys(tokens, mask)
    assert one == three != two
    assert content_keys(*captions(5, width=9)) == [one]
    mask[2, 2] = 1
    assert content_keys(tokens, mask)[2] != one, "the same tokens, one more of which counts"
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    images[2] = images[0]
    keys = content_keys(images)
    assert keys[0] == keys[2] != keys[1]
    assert content_keys(images.contiguous(memory_format=torch.channels_last)) == keys
    images[2, 0, 0, 0] ^= 1
    assert content_keys(images)[2] != keys[2]


def test_a_tower_is_known_by_its_weights_buffers_and_settings() -> None:
    tower = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    known = identity(tower, {"side": 32}, "fp32")
    assert identity(tower, {"side": 32}, "fp32") == known
    assert identity(tower, {"side": 32}, "bf16") != known
    with torch.no_grad():
        tower[1].running_mean[0] += 1e-6
        buffer = identity(tower, {"side": 32}, "fp32")
        tower[0].weight[1, 1] += 1e-6
    assert len({known, buffer, identity(tower, {"side": 32}, "fp32")}) == 3


def steps(trainer: Trainer, count: int) -> list[float]:
    losses = []
    for batch in islice(trainer.batches(), count):
        trainer.enter_epoch(trainer.epoch_of(batch.step))
        losses.append(trainer.step(batch)["train/loss"])
    return losses


def watched(trainer: Trainer, name: str = "text") -> list[int]:
    """Rows of each forward pass of a tower, from now on."""
    rows: list[int] = []
    getattr(trainer.model, name).register_forward_hook(lambda tower, inputs, output: rows.append(len(output)))
    return rows


@pytest.fixture
def any_precision() -> Iterator[None]:
    """Accelerate otherwise keeps the precision that a process used first."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


STILL = {"crop_area": [1.0, 1.0], "noise": 0.0}


@pytest.mark.parametrize(
    ("tower", "micro_batch", "precision"),
    [("text", 0, "fp32"), ("text", 8, "fp32"), ("image", 8, "fp32"), ("text", 0, "bf16"), ("image", 0, "bf16")],
)
def test_from_the_second_epoch_on_the_tower_is_not_run(
    tower: str, micro_batch: int, precision: str, recipe: Recipe, any_precision: None
) -> None:
    """And the losses are those of a run that computes everything each time."""
    path = recipe(
        train__stages=[{"from_epoch": 0, tower: "none"}],
        train__micro_batch=micro_batch,
        train__precision=precision,
        data__augment=STILL,
        model__image__resize="squash",
        model__projection__dropout=0.1,
    )
    plain = Trainer(load_config(path, ["name=plain"]))
    expected = steps(plain, 3 * STEPS_PER_EPOCH)
    plain.close()
    cached = Trainer(load_config(path, ["name=cached", f"model.{tower}.cache_features=true"]))
    rows = watched(cached, tower)
    found = steps(cached, 3 * STEPS_PER_EPOCH)
    assert sum(rows) == 168, "each pair once, in the first epoch, in spite of micro-batches"
    assert len(rows) == STEPS_PER_EPOCH * (3 if micro_batch else 1)
    assert found[:STEPS_PER_EPOCH] == expected[:STEPS_PER_EPOCH], "the same rows together: the same bits"
    assert found == pytest.approx(expected, abs=1e-4 if precision == "fp32" else 0.05)
    assert found[-1] < found[0] - 0.2
    cached.close()


def test_rows_of_another_rank_are_not_seen_in_the_epoch_that_they_were_written_in(
    recipe: Recipe, tmp_path: Path
) -> None:
    """A start that goes on in mid-epoch finds files of it that other ranks wrote before."""
    config = load_config(recipe(train__stages=LOCKED), ["model.text.cache_features=true"])
    first = Trainer(config)
    steps(first, STEPS_PER_EPOCH)
    first.save()
    first.close()
    (folder,) = (tmp_path / "runs" / "tiny" / "features" / "text").iterdir()
    (folder / "epoch-0-rank-0.bin").rename(folder / "epoch-1-rank-1.bin")
    second = Trainer(config)
    rows = watched(second)
    steps(second, STEPS_PER_EPOCH)
    assert sum(rows) == 168
    steps(second, STEPS_PER_EPOCH)
    assert sum(rows) == 168
    second.close()


def test_validation_leaves_the_cache_alone(recipe: Recipe) -> None:
    trainer = Trainer(load_config(recipe(train__stages=LOCKED), ["model.text.cache_features=true"]))
    steps(trainer, 1)
    rows = watched(trainer)
    before = trainer.features.open["text"].own.offsets.copy()
    trainer.validate()
    assert sum(rows) == 32
    assert trainer.features.open["text"].own.offsets == before
    trainer.close()


def test_captions_drawn_at_random_have_features_of_their_own(recipe: Recipe) -> None:
    words = ["model.text.cache_features=true", "data.caption_augment.word_dropout=0.3"]
    trainer = Trainer(load_config(recipe(train__stages=LOCKED), words))
    rows = watched(trainer)
    steps(trainer, 2 * STEPS_PER_EPOCH)
    assert 168 < sum(rows) < 336
    trainer.close()


def features(run: Path, tower: str = "text") -> dict[str, list[str]]:
    """identity -> files"""
    return {folder.name: sorted(p.name for p in folder.iterdir()) for folder in (run / "features" / tower).iterdir()}


def test_a_tower_that_trained_in_between_is_another(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, signal_handlers: None
) -> None:
    """Locked for two epochs, trained for one, locked again."""
    stages = [*LOCKED, {"from_epoch": 2}, {"from_epoch": 3, "text": "none"}]
    path = recipe(train__stages=stages, train__epochs=6, checkpoint__every_steps=2)
    run = tmp_path / "runs" / "cached"
    with caplog.at_level(logging.INFO, "clipdist"):
        assert train(load_config(path, ["name=cached", "model.text.cache_features=true"])) == 0
    (known,) = features(run)
    assert features(run)[known] == ["epoch-3-rank-0.bin"]
    assert caplog.text.count("features of a text tower with other weights or settings") == 1
    for line in ("epoch 0: text features on disk: 0", "epoch 1: text features on disk: 168"):
        assert line in caplog.text
    assert "epoch 3: text features on disk: 0" in caplog.text
    assert "epoch 5: text features on disk: 168" in caplog.text
    assert train(load_config(path, ["name=plain"])) == 0
    plain = column(tmp_path / "runs" / "plain", "train/loss")
    for step, loss in column(run, "train/loss").items():
        assert loss == pytest.approx(plain[step], abs=1e-3), step
    shares = column(run, "perf/text_features_computed")
    assert [step for step, share in shares.items() if share] == [*range(1, 8), *range(22, 29)]
    flops, all_flops = column(run, "perf/flops_per_step"), column(tmp_path / "runs" / "plain", "perf/flops_per_step")
    assert flops[7] == all_flops[7]
    assert all_flops[8] - flops[8] == all_flops[29] - flops[29] > 0
    assert flops[15] == all_flops[15]


def test_features_of_a_stage_stay_while_a_start_may_go_on_from_it(recipe: Recipe, tmp_path: Path) -> None:
    """That is, until there is a checkpoint of the stage that follows."""
    stages = [*LOCKED, {"from_epoch": 1}]
    trainer = Trainer(load_config(recipe(train__stages=stages), ["model.text.cache_features=true"]))
    assert trainer.saver is not None
    for count, kept in ((STEPS_PER_EPOCH - 1, 1), (2, 1), (1, 0)):
        steps(trainer, count)
        trainer.save()
        trainer.saver.wait()
        trainer.enter_epoch(trainer.epoch_of(trainer.progress.step) + (kept == 0))
        assert len(features(tmp_path / "runs" / "tiny")) == kept, trainer.progress.step
    trainer.close()


def test_a_start_without_a_checkpoint_begins_with_none(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(train__stages=LOCKED)
    for word in ("train.global_batch=24", "train.global_batch=12"):
        trainer = Trainer(load_config(path, ["model.text.cache_features=true", word]))
        assert not (tmp_path / "runs" / "tiny" / "features").exists()
        steps(trainer, 2)
        trainer.close()
    assert features(tmp_path / "runs" / "tiny")


def refused(path: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        check(load_config(path, list(words)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_would_never_be_read_again_is_refused(recipe: Recipe) -> None:
    on = {name: f"model.{name}.cache_features=true" for name in ("image", "text")}
    told = refused(recipe(), on["text"])
    assert "the text tower trains in every stage" in told
    assert "train.stages=[{from_epoch: 0, text: none}]" in told
    refused(recipe(train__stages=[{"from_epoch": 0}, {"from_epoch": 9, "text": "none"}]), on["text"])
    refused(recipe(train__stages=LOCKED), on["image"])
    path = recipe(train__stages=[{"from_epoch": 0, "image": "none"}])
    told = refused(path, on["image"], "data.augment.flip_vertical=0.5", "data.caption_augment.mixgen=0.1")
    settings = ("data.augment.crop_area=[1, 1]", "data.augment.noise=0", "data.augment.flip_vertical=0")
    for setting in (*settings, "model.image.resize=squash", "data.caption_augment.mixgen=0"):
        assert setting in told
    check(load_config(path, [on["image"], "data.augment={crop_area: [1, 1], invert: 1}", "model.image.resize=pad"]))
    check(load_config(recipe(train__stages=LOCKED), [on["text"]]))


def test_it_may_be_switched_when_a_run_goes_on(recipe: Recipe) -> None:
    config = load_config(recipe(), [])
    other: RunConfig = replace(
        config, model=replace(config.model, text=replace(config.model.text, cache_features=True))
    )
    assert differences(config, other) == []
    assert cached_towers(other.model) == ["text"]
    assert cached_towers(config.model) == []


def test_weights_are_equal_whether_steps_are_repeated_or_not(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_handlers: None
) -> None:
    """Ended in each of several steps after the last checkpoint, with the features of later steps on disk."""
    path = recipe(
        train__stages=LOCKED,
        train__epochs=2,
        train__micro_batch=8,
        model__text__cache_features=True,
        checkpoint__every_steps=3,
        checkpoint__in_background=False,
        data__val_split="",
    )
    assert train(load_config(path, ["name=whole"])) == 0
    whole = tmp_path / "runs" / "whole"
    killed = tmp_path / "runs" / "killed"

    for stop in (5, 8, 11):
        true = Trainer.step

        def step(trainer: Trainer, batch: Any, stop: int = stop, true: Any = true) -> dict[str, float]:
            values: dict[str, float] = true(trainer, batch)
            if batch.step == stop:
                raise KeyboardInterrupt
            return values

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", step)
            with pytest.raises(KeyboardInterrupt):
                train(load_config(path, ["name=killed"]))
        (folder,) = (killed / "features" / "text").iterdir()
        newest = folder / f"epoch-{stop // STEPS_PER_EPOCH}-rank-0.bin"
        if newest.exists():
            os.truncate(newest, newest.stat().st_size - 5)  # torn, too
    assert train(load_config(path, ["name=killed"])) == 0
    assert column(killed, "train/loss") == column(whole, "train/loss")
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(killed)[name]), name
    (one,), (two,) = ((run / "features" / "text").iterdir() for run in (whole, killed))
    assert [p.read_bytes() for p in sorted(one.iterdir())] == [p.read_bytes() for p in sorted(two.iterdir())]
