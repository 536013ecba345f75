"""Batches are the planned ones, whatever the ranks and workers; unreadable samples are replaced alike everywhere."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipdist.data.config import DataConfig
from clipdist.data.evaluation import EvalRows, evaluation_loader
from clipdist.data.images.augment import AugmentConfig
from clipdist.data.loader import MASK_64, ROWS_PER_TASK, Batch, TrainLoader
from clipdist.data.order import Order, consumed_hash
from clipdist.data.rows import Task, TrainRows, text_hash
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shards import ShardSet
from clipdist.data.text import Tokenizer, train_wordpiece
from clipdist.errors import UserError
from tests.unit.pictures import encoded, picture

BATCH, SIDE, SAMPLES = 12, 16, 60
# Numbers in the training split; two are neighbours.
BROKEN = {7: "image", 20: "image", 21: "caption", 40: "json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 samples in shards of 9; four of them are broken, one of five has three captions."""
    path = tmp_path_factory.mktemp("loader") / "set"
    with ShardSetWriter(path, samples_per_shard=9) as out:
        for number in range(SAMPLES):
            image = encoded(picture(number, (20, 20)))
            text: Any = f"number {number}" if number % 5 else [f"number {number} {way}" for way in "abc"]
            fields = {"text": text, "label": f"label {number % 3}"}
            fault = BROKEN.get(number)
            if fault == "image":
                image = image[:70]
            elif fault:
                fields["text"] = "  " if fault == "caption" else 5
            out.write("train", f"k{number}", image, "png", fields)
        for number in range(5):
            out.write("ragged", f"r{number}", encoded(picture(number, (20, 20))), "png", {"text": "x", "label": "y"})
        for number in range(5, 10):
            out.write("ragged", f"r{number}", encoded(picture(number, (20, 20))), "png", {"text": "x"})
        for number in range(20):
            out.write("hopeless", f"h{number}", b"nothing", "png", {"text": "x"})
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([f"number {number} a b c" for number in range(SAMPLES)] * 2, 100, 8)


Make = Callable[..., TrainRows]


@pytest.fixture(scope="module")
def make(folder: Path, tokenizer: Tokenizer) -> Make:
    def rows(split: str = "train", lanes: int = 2, batch: int = BATCH, **options: Any) -> TrainRows:
        config = DataConfig(
            set=str(folder), **{"workers": 0, "augment": AugmentConfig(flip_horizontal=0.5, noise=5), **options}
        )
        opened = ShardSet.open(folder).split(split)
        order = Order(opened.samples_per_shard, seed=3, global_batch=batch, lanes=lanes, window=10)
        return TrainRows(opened, order, config, side=SIDE, resize="crop", tokenizer=tokenizer)

    return rows


def batches(rows: TrainRows, rank: int = 0, world_size: int = 1, first_step: int = 0, steps: int = 10) -> list[Batch]:
    return list(TrainLoader(rows, rank=rank, world_size=world_size, first_step=first_step, steps=steps))


@pytest.fixture(scope="module")
def reference(make: Make) -> list[Batch]:
    """Two epochs of one process without workers."""
    return batches(make())


def same(one: Batch, two: Batch) -> None:
    assert one.step == two.step
    assert one.keys == two.keys
    assert torch.equal(one.images_b3HW, two.images_b3HW)
    assert one.group_b is not None
    assert two.group_b is not None
    assert torch.equal(one.group_b, two.group_b)
    assert one.bad == two.bad
    assert one.consumed == two.consumed
    width = max(one.token_ids_bT.shape[1], two.token_ids_bT.shape[1])
    for name in ("token_ids_bT", "attention_mask_bT"):
        a, b = (torch.nn.functional.pad(getattr(x, name), (0, width - getattr(x, name).shape[1])) for x in (one, two))
        assert torch.equal(a, b), "equal but for the width of the padding"


def joined(parts: list[Batch]) -> Batch:
    """The global batch of the ranks' batches."""
    width = max(part.token_ids_bT.shape[1] for part in parts)

    def wide(name: str) -> torch.Tensor:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors])

    return Batch(
        step=parts[0].step,
        images_b3HW=torch.cat([part.images_b3HW for part in parts]),
        token_ids_bT=wide("token_ids_bT"),
        attention_mask_bT=wide("attention_mask_bT"),
        group_b=torch.cat([part.group_b for part in parts if part.group_b is not None]),
        keys=[key for part in parts for key in part.keys],
        consumed=sum(part.consumed for part in parts) & MASK_64,
        bad=[record for part in parts for record in part.bad],
    )


def test_a_batch_has_the_promised_shapes(reference: list[Batch]) -> None:
    batch = reference[0]
    assert len(batch) == BATCH
    assert batch.images_b3HW.shape == (BATCH, 3, SIDE, SIDE)
    assert batch.images_b3HW.dtype == torch.uint8
    assert batch.token_ids_bT.dtype == batch.attention_mask_bT.dtype == torch.int64
    assert (
        batch.token_ids_bT.shape == batch.attention_mask_bT.shape == (BATCH, int(batch.attention_mask_bT.sum(1).max()))
    )
    assert batch.group_b is not None
    assert batch.group_b.shape == (BATCH,)
    assert batch.group_b.dtype == torch.int64
    assert batch.consumed == sum(consumed_hash(0, key) for key in batch.keys) % 2**64


def test_batches_follow_the_order_and_epochs_follow_each_other(make: Make, reference: list[Batch]) -> None:
    order = make().order
    assert order.steps_per_epoch == 5
    assert [batch.step for batch in reference] == list(range(10))
    for batch in reference:
        planned = [f"k{number}" for number in order.batch(batch.step).numbers]
        stand_ins = {record.replaced_by for record in batch.bad}
        assert [key for key in batch.keys if key not in stand_ins] == [
            key for key in planned if int(key[1:]) not in BROKEN and key not in stand_ins
        ]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_workers_change_nothing(world_size: int, workers: int, make: Make, reference: list[Batch]) -> None:
    parts = [batches(make(workers=workers), rank, world_size, steps=10) for rank in range(world_size)]
    for expected, *ranks in zip(reference, *parts, strict=True):
        assert {len(batch) for batch in ranks} == {BATCH // world_size}
        same(joined(ranks), expected)


def test_bad_samples_are_named_with_reason_and_stand_in(reference: list[Batch]) -> None:
    for epoch in range(2):
        records = [record for batch in reference[5 * epoch : 5 * epoch + 5] for record in batch.bad]
        assert {record.key for record in records} == {f"k{number}" for number in BROKEN}
        for record in records:
            number = int(record.key[1:])
            assert record.shard == f"train-{number // 9:06d}.tar"
            expected = {"image": "unreadable image", "caption": "no caption", "json": "unreadable caption"}
            assert record.reason.startswith(expected[BROKEN[number]])
            assert record.replaced_by in reference[record.step].keys
            assert int(record.replaced_by[1:]) not in BROKEN


def test_neighbouring_bad_samples_are_both_passed_over(make: Make) -> None:
    """In one lane and one window of one, the order is the split's own, but for its rotation."""
    rows = make(lanes=1, batch=10)
    rows.order = Order(np.array([SAMPLES]), seed=3, global_batch=10, lanes=1, window=1)
    records = [record for batch in batches(rows, steps=6) for record in batch.bad]
    stand_in = {record.key: record.replaced_by for record in records}
    assert stand_in == {"k7": "k8", "k20": "k22", "k21": "k22", "k40": "k41"}
    assert len(records) == len(BROKEN) + 1, "20 passes over 21, which is also passed over on its own"


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_in_a_row_stop_with_one_line(workers: int, make: Make) -> None:
    rows = make("hopeless", batch=4, lanes=1, max_bad_in_a_row=6, workers=workers)
    with pytest.raises(UserError, match=r"7 unreadable samples in a row \(h\d+: unreadable image: .*; …\)") as caught:
        batches(rows, steps=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_stops_with_one_line(workers: int, make: Make) -> None:
    rows = make(workers=workers)
    rows.split.shards[3] = rows.split.shards[3].__class__("gone.tar", 9, 1, "")
    with pytest.raises(UserError, match=r"gone\.(idx|tar): .* missing"):
        batches(rows, steps=5)


def test_each_step_may_use_another_caption(make: Make, folder: Path) -> None:
    split, rows = ShardSet.open(folder).split("train"), make(groups="caption")
    used: dict[str, set[int]] = {}
    for batch in batches(rows, steps=30):
        assert batch.group_b is not None
        for key, group in zip(batch.keys, batch.group_b.tolist(), strict=True):
            used.setdefault(key, set()).add(group)
    several = [number for number in range(0, SAMPLES, 5) if number not in BROKEN]
    for number in several:
        assert used[f"k{number}"] <= {text_hash(text) for text in split.read(number).texts}
    assert sum(len(used[f"k{number}"]) for number in several) > 2.2 * len(several), "of three captions each"
    for batch in batches(make(caption="first"), steps=5):
        assert batch.group_b is not None
        for key, group in zip(batch.keys, batch.group_b.tolist(), strict=True):
            assert group == text_hash(split.read(int(key[1:])).texts[0])


def test_tokens_are_those_of_the_caption_that_makes_the_group(make: Make, tokenizer: Tokenizer) -> None:
    batch = batches(make(), steps=1)[0]
    assert batch.group_b is not None
    for row in range(BATCH):
        ids = batch.token_ids_bT[row][batch.attention_mask_bT[row] == 1]
        text = str(tokenizer.tokenizer.decode(ids, skip_special_tokens=True))
        assert text_hash(text) == batch.group_b[row]


def test_groups_by_field_and_none(make: Make) -> None:
    batch = batches(make(groups="label"), steps=1)[0]
    assert batch.group_b is not None
    assert batch.group_b.tolist() == [text_hash(f"label {int(key[1:]) % 3}") for key in batch.keys]
    assert batches(make(groups="none"), steps=1)[0].group_b is None


def test_a_sample_without_the_grouping_field_is_a_bad_sample(make: Make) -> None:
    for workers in (0, 1):
        batch = batches(make("ragged", batch=10, lanes=1, groups="label", workers=workers), steps=1)[0]
        assert {record.key for record in batch.bad} == {f"r{number}" for number in range(5, 10)}
        assert all(record.reason == "no field 'label', which data.groups asks for" for record in batch.bad)
        assert {int(key[1:]) for key in batch.keys} == set(range(5))


def test_a_later_first_step_gives_the_tail_of_the_whole(make: Make, reference: list[Batch]) -> None:
    for first_step in (1, 4, 5, 9):
        tail = batches(make(), first_step=first_step)
        assert len(tail) == 10 - first_step
        for one, two in zip(tail, reference[first_step:], strict=True):
            same(one, two)
    assert batches(make(), first_step=10) == []


def test_a_step_of_more_rows_than_a_worker_takes_at_once(make: Make) -> None:
    assert SAMPLES > ROWS_PER_TASK
    batch = batches(make(batch=SAMPLES, lanes=1), steps=1)[0]
    assert len(batch) == SAMPLES
    again = batches(make(batch=SAMPLES, lanes=1, workers=2), steps=1)[0]
    same(batch, again)


def test_a_world_that_does_not_divide_the_batch_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"global_batch=12 does not divide by 5 processes; choose a multiple of 5"):
        TrainLoader(make(), rank=0, world_size=5, first_step=0, steps=1)


def test_waiting_is_measured_and_work_on_a_batch_is_not(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    read = TrainRows.__getitem__

    def slow(self: TrainRows, task: Task) -> Any:
        time.sleep(0.03)
        return read(self, task)

    monkeypatch.setattr(TrainRows, "__getitem__", slow)
    waits = []
    for batch in TrainLoader(make(batch=SAMPLES, lanes=1), rank=0, world_size=1, first_step=0, steps=2):
        waits.append(batch.wait_seconds)
        time.sleep(0.5)
    assert all(0.06 <= wait < 0.5 for wait in waits), "two pieces of a batch, each slow"


# Evaluation


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (7, 0), (64, 0), (1, 1), (2, 2)])
def test_evaluation_sees_every_sample_once(world_size: int, workers: int, folder: Path, tokenizer: Tokenizer) -> None:
    rows = EvalRows(ShardSet.open(folder).split("train"), side=SIDE, resize="crop", tokenizer=tokenizer)
    pieces = [
        piece
        for rank in range(world_size)
        for piece in evaluation_loader(rows, rank=rank, world_size=world_size, workers=workers)
    ]
    good = [number for number in range(SAMPLES) if number not in BROKEN]
    assert [number for piece in pieces for number in piece.numbers] == good
    assert sorted(number for piece in pieces for number, _, _ in piece.bad) == sorted(BROKEN)
    owners = [owner for piece in pieces for owner in piece.owners]
    assert owners == [number for number in good for _ in range(1 if number % 5 else 3)]
    assert sum(len(piece.token_ids) for piece in pieces) == len(owners)
    for piece in pieces:
        assert piece.images_n3HW.shape == (len(piece.numbers), 3, SIDE, SIDE)
        assert piece.images_n3HW.dtype == torch.uint8
        assert [sample.key for sample in piece.samples] == [f"k{number}" for number in piece.numbers]
        assert all(sample.image == b"" for sample in piece.samples)


def test_evaluation_has_nothing_random(folder: Path, tokenizer: Tokenizer) -> None:
    rows = EvalRows(ShardSet.open(folder).split("train"), side=SIDE, resize="squash", tokenizer=tokenizer)
    one, two = rows[0, 5], rows[0, 5]
    assert torch.equal(one.images_n3HW, two.images_n3HW)
    expected = np.asarray(picture(3, (20, 20)).resize((SIDE, SIDE), 3)).transpose(2, 0, 1)
    assert np.array_equal(one.images_n3HW[3].numpy(), expected)


def test_equal_strings_are_equal_groups_within_int64() -> None:
    numbers = [text_hash(text) for text in ("a", "b", "", "é", "a")]
    assert numbers[0] == numbers[4]
    assert len(set(numbers)) == 4
    assert all(-(2**63) <= number < 2**63 for number in numbers)
    assert min(numbers) < 0 < max(numbers)


def test_a_batch_stays_as_it_was_when_the_loader_is_iterated_again(make: Make) -> None:
    """Without workers a batch is handed over, not copied: its memory must not be filled a second time."""
    loader = TrainLoader(make(), rank=0, world_size=1, first_step=3, steps=4)
    (first,) = loader
    before = first.images_b3HW.clone()
    loader.rows.order = make(lanes=1).order  # other samples for the same step
    (second,) = loader
    assert torch.equal(first.images_b3HW, before)
    assert not torch.equal(first.images_b3HW, second.images_b3HW)
