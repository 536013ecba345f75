"""Loader workers: shared memory that is never overwritten in use, a clean end, and a clear word when one is killed."""

import gc
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from clipdist.data.caching import open_cache
from clipdist.data.captions import CaptionAugmentConfig
from clipdist.data.config import DataConfig
from clipdist.data.loader import Batch, TrainLoader, worker_errors
from clipdist.data.order import Order
from clipdist.data.rows import TrainRows
from clipdist.data.shards import ShardSet
from clipdist.data.text import Tokenizer, captions_of, train_wordpiece
from clipdist.errors import UserError, WorkerKilled

SIDE, BATCH = 32, 40


@pytest.fixture(scope="module")
def tokenizer(shapes: Path) -> Tokenizer:
    return train_wordpiece(captions_of(ShardSet.open(shapes).split("train")), 200, 24)


def loader(shapes: Path, tokenizer: Tokenizer, rank: int = 0, world_size: int = 1, **options: Any) -> TrainLoader:
    split = ShardSet.open(shapes).split("train")
    config = DataConfig(set=str(shapes), **{"workers": 2, "prefetch": 2, **options})
    order = Order(split.samples_per_shard, seed=1, global_batch=BATCH)
    rows = TrainRows(split, order, config, side=SIDE, resize="crop", tokenizer=tokenizer)
    return TrainLoader(rows, rank=rank, world_size=world_size, first_step=0, steps=12)


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def test_batches_in_use_are_never_overwritten(shapes: Path, tokenizer: Tokenizer) -> None:
    expected = list(loader(shapes, tokenizer, workers=0))
    kept: list[Batch] = []
    for batch in loader(shapes, tokenizer, prefetch=8):
        kept.append(batch)
        time.sleep(0.02)  # workers run ahead as far as they may
    assert len(kept) == len(expected) == 12
    for one, two in zip(kept, expected, strict=True):
        assert one.keys == two.keys
        assert torch.equal(one.images_b3HW, two.images_b3HW)


def test_workers_end_with_the_iterator(shapes: Path, tokenizer: Tokenizer) -> None:
    before = len(children())
    batches: Iterator[Batch] = iter(loader(shapes, tokenizer))
    next(batches)
    assert len(children()) == before + 2
    batches.close()  # type: ignore[attr-defined]
    assert len(children()) == before


def test_a_killed_worker_is_an_error_not_a_hang(shapes: Path, tokenizer: Tokenizer) -> None:
    before = {child.pid for child in children()}

    @worker_errors()
    def train() -> None:
        for batch in loader(shapes, tokenizer, prefetch=1):
            if batch.step == 0:
                workers = [child.pid for child in children() if child.pid not in before]
                os.kill(workers[0], signal.SIGKILL)
            time.sleep(0.05)

    with pytest.raises(WorkerKilled, match=r"a loader worker was ended from outside \(.+\), .*: lower data\.workers"):
        train()
    gc.collect()  # the traceback held the iterator
    assert {child.pid for child in children()} <= before


def test_workers_outlive_a_request_to_stop(shapes: Path, tokenizer: Tokenizer) -> None:
    """Launchers send SIGTERM to all processes; the rank needs batches until the step at which it stops."""
    before = {child.pid for child in children()}
    seen = 0
    for batch in loader(shapes, tokenizer):
        if batch.step == 0:
            for child in children():
                if child.pid not in before:
                    # By somebody else than the parent, whom workers obey.
                    subprocess.run(["kill", "-TERM", str(child.pid)], check=True)
        seen += 1
    assert seen == 12


def test_an_error_of_the_training_step_passes_unchanged(shapes: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"), worker_errors():
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("options", [{"caption": "sentence"}, {"mixgen": 0.5}, {"word_dropout": 0.3}])
def test_caption_options_do_not_depend_on_ranks_and_workers(
    options: dict[str, Any], shapes: Path, tokenizer: Tokenizer
) -> None:
    if "caption" not in options:
        options = {"caption_augment": CaptionAugmentConfig(**options)}
    whole = list(loader(shapes, tokenizer, workers=0, **options))
    plain = list(loader(shapes, tokenizer, workers=0))
    halves = [list(loader(shapes, tokenizer, rank, 2, **options)) for rank in range(2)]
    for batch, one, two in zip(whole, *halves, strict=True):
        assert batch.keys == one.keys + two.keys
        assert torch.equal(batch.images_b3HW, torch.cat([one.images_b3HW, two.images_b3HW]))
        assert batch.group_b is not None
        assert one.group_b is not None
        assert two.group_b is not None
        assert torch.equal(batch.group_b, torch.cat([one.group_b, two.group_b]))
        tokens = [row[mask == 1].tolist() for b in (one, two) for row, mask in _rows(b)]
        assert tokens == [row[mask == 1].tolist() for row, mask in _rows(batch)]
    if options.get("caption") != "sentence":
        lengths = [[batch.attention_mask_bT.sum(1).tolist() for batch in run] for run in (whole, plain)]
        assert lengths[0] != lengths[1], "the option did something"


def _rows(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(batch.token_ids_bT, batch.attention_mask_bT, strict=True)


def test_mixgen_joins_a_pair_with_another(shapes: Path, tokenizer: Tokenizer) -> None:
    plain = next(iter(loader(shapes, tokenizer, workers=0)))
    mixed = next(iter(loader(shapes, tokenizer, workers=0, caption_augment=CaptionAugmentConfig(mixgen=1.0))))
    assert mixed.keys == plain.keys
    lengths = mixed.attention_mask_bT.sum(1), plain.attention_mask_bT.sum(1)
    assert (lengths[0] > lengths[1]).all()
    # A mean lies half way to something: no pixel moved by more than half of the range.
    moved = (mixed.images_b3HW.int() - plain.images_b3HW.int()).abs()
    assert 0 < moved.max() <= 128


# The decoded cache


def cached(shapes: Path, tokenizer: Tokenizer, folder: Path, rank: int = 0, world_size: int = 1) -> TrainLoader:
    made = loader(shapes, tokenizer, rank, world_size, cache="decoded", cache_folder=str(folder), cache_side=36)
    made.rows.cache = open_cache(made.rows.config, made.rows.split, tokenizer, SIDE)
    return made


def test_the_cache_changes_no_result_whatever_it_holds(shapes: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    cold = list(cached(shapes, tokenizer, tmp_path / "one"))
    opened = cached(shapes, tokenizer, tmp_path / "one")
    assert opened.rows.cache is not None
    assert opened.rows.cache.stored() == len(opened.rows.split), "the first epochs have met every sample"
    warm = list(opened)
    # Half of it is there already when two ranks begin, and they fill one cache together.
    for number, _ in enumerate(cached(shapes, tokenizer, tmp_path / "two")):
        if number == 1:
            break
    halves = [list(cached(shapes, tokenizer, tmp_path / "two", rank, 2)) for rank in range(2)]
    plain = list(loader(shapes, tokenizer, workers=0))
    for first, again, one, two, uncached in zip(cold, warm, *halves, plain, strict=True):
        assert first.keys == again.keys == one.keys + two.keys == uncached.keys
        assert torch.equal(first.images_b3HW, again.images_b3HW)
        assert torch.equal(first.images_b3HW, torch.cat([one.images_b3HW, two.images_b3HW]))
        assert torch.equal(first.token_ids_bT, uncached.token_ids_bT)
        assert torch.equal(first.group_b, uncached.group_b)  # type: ignore[arg-type]
        difference = (first.images_b3HW.float() - uncached.images_b3HW.float()).abs().mean()
        assert difference < 6, "the same crops, of images that were scaled down once more"


def test_cached_samples_are_not_read_again(
    shapes: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(cached(shapes, tokenizer, tmp_path))

    def read(self: Any, number: int) -> None:
        raise AssertionError(f"sample {number} was read")

    monkeypatch.setattr("clipdist.data.shards.Split.read", read)
    assert len(list(cached(shapes, tokenizer, tmp_path))) == 12


def test_a_cache_that_does_not_fit_says_what_to_do(shapes: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    split = ShardSet.open(shapes).split("train")
    config = DataConfig(set=str(shapes), cache="decoded", cache_folder=str(tmp_path), cache_gib=1e-4)
    with pytest.raises(UserError, match=r"needs .* GiB, more than .*; choose a smaller data\.cache_side"):
        open_cache(config, split, tokenizer, SIDE)
