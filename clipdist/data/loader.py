"""Shard set -> batches on this rank, in the planned order, whatever the ranks and workers.

b = rows on this rank, B = rows in the global batch, T = tokens of the longest caption among the b.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xxhash
from pydantic import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader, Dataset, Sampler

from clipdist.data.images.decode import AugmentConfig, ResizeMode, load_for_evaluation, load_for_training
from clipdist.data.order import Order, consumed_hash, sample_generator, share
from clipdist.data.shards import BadSample, RawSample, Split
from clipdist.data.text import Tokenizer
from clipdist.errors import UserError
from clipdist.settings import Share, field, settings

# A worker prepares this many rows at a time: small enough that the first batch is there soon and that
# all workers share a step, large enough that handing over costs nothing.
ROWS_PER_TASK = 32
MASK_64 = (1 << 64) - 1


@settings
class DataConfig:
    set: str
    """Folder of the shard set."""
    train_split: str = "train"
    val_split: str = "val"
    """Split evaluated after each epoch; empty: none."""
    lanes: NonNegativeInt = field(default=0)
    """Lanes of the sample order; 0 chooses by the set's size."""
    window: NonNegativeInt = field(default=0)
    """Samples shuffled together within a lane; 0 chooses by the shards' size."""
    caption: Literal["random", "first"] = "random"
    """Which caption of several a training step uses."""
    groups: str = "caption"
    """Pairs that are each other's positives: equal `caption`, equal value of a named field (`label`), or `none`."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    max_image_pixels: PositiveInt = 50_000_000
    max_bad_fraction: Share = 0.01
    """Share of an epoch's samples that may be unreadable before the run stops."""
    max_bad_in_a_row: NonNegativeInt = 100
    workers: NonNegativeInt = 2
    """Loader processes per rank; 0 loads in the training process."""
    prefetch: PositiveInt = 4
    """Pieces of work that each worker keeps ready."""


@dataclass(frozen=True)
class BadRecord:
    """One sample that could not be used, and the one that stood in for it."""

    step: int
    key: str
    shard: str
    reason: str
    replaced_by: str


@dataclass
class Batch:
    """The rows of one step on this rank."""

    step: int
    images_b3HW: torch.Tensor  # uint8
    token_ids_bT: torch.Tensor  # int64
    attention_mask_bT: torch.Tensor  # int64
    group_b: torch.Tensor | None  # int64
    keys: list[str]
    consumed: int  # sum over rows of hash(step, key), modulo 2^64
    bad: list[BadRecord]
    wait_seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> "Batch":
        """Moves the tensors; copies overlap with computation when the loader pinned them."""
        for name in ("images_b3HW", "token_ids_bT", "attention_mask_bT", "group_b"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.to(device, non_blocking=True))
        return self


def text_hash(text: str) -> int:
    """A signed 64-bit number for a string: equal strings, equal groups."""
    return xxhash.xxh3_64_intdigest(text.encode()) - (1 << 63)


@dataclass
class Piece:
    """What one worker call returns: some rows of one step."""

    step: int
    images: torch.Tensor
    token_ids: list[list[int]]
    groups: list[int] | None
    keys: list[str]
    bad: list[BadRecord]


@dataclass(frozen=True)
class Task:
    """Rows start..stop of the global batch of a step; steps count from the start of the run."""

    step: int
    start: int
    stop: int


class TrainRows(Dataset[Piece | UserError]):
    """`rows[task]` reads, augments and tokenises the rows of a task. Runs inside loader workers."""

    def __init__(
        self,
        split: Split,
        order: Order,
        config: DataConfig,
        *,
        side: int,
        resize: ResizeMode,
        tokenizer: Tokenizer,
    ) -> None:
        self.split, self.order, self.config = split, order, config
        self.side, self.resize, self.tokenizer = side, resize, tokenizer

    def __getitem__(self, task: Task) -> Piece | UserError:
        """The rows of a task. A user's error comes back as a value: raised in a worker, it would arrive as a
        traceback."""
        try:
            return self._piece(task)
        except UserError as error:
            return error

    def _piece(self, task: Task) -> Piece:
        epoch, step = divmod(task.step, self.order.steps_per_epoch)
        images, texts, groups, keys = [], [], [], []
        bad: list[BadRecord] = []
        for row, number in enumerate(self.order.rows(epoch, step, task.start, task.stop), task.start):
            sample, pixels, text, group = self._read(epoch, step, row, int(number), task.step, bad)
            images.append(pixels)
            texts.append(text)
            keys.append(sample.key)
            groups.append(group)
        return Piece(
            task.step,
            torch.stack(images),
            self.tokenizer.encode(texts),
            None if self.config.groups == "none" else groups,
            keys,
            bad,
        )

    def _read(
        self, epoch: int, step: int, row: int, number: int, run_step: int, bad: list[BadRecord]
    ) -> tuple[RawSample, torch.Tensor, str, int]:
        """The sample, its pixels, caption and group, or those of the next readable one of its lane; what was passed
        over is appended to `bad`."""
        passed: list[tuple[int, str]] = []
        for attempt in range(1, self.config.max_bad_in_a_row + 2):
            try:
                sample, pixels, text, group = self._prepare(epoch, number)
            except BadSample as error:
                passed.append((number, str(error)))
                number = self.order.replacement(epoch, step, row, attempt)
                continue
            for lost, reason in passed:
                shard, _ = self.split.locate(lost)
                file = self.split.shards[shard].file
                bad.append(BadRecord(run_step, self.split.key(lost), file, reason, sample.key))
            return sample, pixels, text, group
        shown = "; ".join(f"{self.split.key(n)}: {reason}" for n, reason in passed[:3])
        raise UserError(f"{self.split.folder}: {len(passed)} unreadable samples in a row ({shown}; …)")

    def _prepare(self, epoch: int, number: int) -> tuple[RawSample, torch.Tensor, str, int]:
        sample = self.split.read(number)
        if not sample.texts:
            raise BadSample("no caption")
        draw = sample_generator(self.order.seed, epoch, sample.key)
        choice = int(draw.random() * len(sample.texts)) if self.config.caption == "random" else 0
        pixels = load_for_training(
            sample.image, self.side, self.resize, self.config.max_image_pixels, self.config.augment, draw
        )
        text = sample.texts[choice]
        return sample, pixels, text, group_of(sample, text, self.config.groups)


def group_of(sample: RawSample, text: str, by: str) -> int:
    """The group number of a sample, int64 range; `BadSample` when it lacks the field that the recipe groups by."""
    if by == "none":
        return 0
    if by == "caption":
        return text_hash(text)
    if by not in sample.fields:
        raise BadSample(f"no field {by!r}, which data.groups asks for")
    return text_hash(str(sample.fields[by]))


class _Tasks(Sampler[Task]):
    """This rank's tasks from a step on, without end within `steps`."""

    def __init__(self, first_step: int, steps: int, start: int, stop: int) -> None:
        self.first_step, self.steps, self.start, self.stop = first_step, steps, start, stop

    def __iter__(self) -> Iterator[Task]:
        for step in range(self.first_step, self.steps):
            for start in range(self.start, self.stop, ROWS_PER_TASK):
                yield Task(step, start, min(start + ROWS_PER_TASK, self.stop))


class TrainLoader:
    """Iterates over this rank's batches of steps first_step..steps of a run; epochs follow without a gap.

    Raises `UserError` when the global batch does not divide by the world size: equal parts are what makes
    averaged gradients those of the global batch.
    """

    def __init__(
        self,
        rows: TrainRows,
        *,
        rank: int,
        world_size: int,
        first_step: int,
        steps: int,
        pin_memory: bool = False,
    ) -> None:
        config, order = rows.config, rows.order
        if order.global_batch % world_size:
            raise UserError(
                f"train.global_batch={order.global_batch} does not divide by {world_size} processes; "
                f"choose a multiple of {world_size}, or another number of processes"
            )
        self.rows = rows
        start, stop = share(order.global_batch, rank, world_size)
        self._loader = DataLoader(
            rows,
            batch_size=None,
            sampler=_Tasks(first_step, steps, start, stop),
            num_workers=config.workers,
            prefetch_factor=config.prefetch if config.workers else None,
            collate_fn=_unchanged,
            worker_init_fn=_quiet_worker,
        )
        self._pin_memory = pin_memory
        self._rows_per_rank = stop - start

    def __iter__(self) -> Iterator[Batch]:
        pieces: list[Piece] = []
        wait = 0.0
        source = iter(self._loader)
        while True:
            began = time.perf_counter()
            piece = next(source, None)
            if piece is None:
                assert not pieces, "the last step is incomplete"
                return
            if isinstance(piece, UserError):
                raise piece
            pieces.append(piece)
            if sum(len(part.keys) for part in pieces) == self._rows_per_rank:
                batch = self._assemble(pieces)
                batch.wait_seconds = wait + time.perf_counter() - began
                pieces, wait = [], 0.0
                yield batch
            else:
                wait += time.perf_counter() - began

    def _assemble(self, pieces: Sequence[Piece]) -> Batch:
        step = pieces[0].step
        assert all(piece.step == step for piece in pieces)
        keys = [key for piece in pieces for key in piece.keys]
        tokens, mask = self.rows.tokenizer.pad([ids for piece in pieces for ids in piece.token_ids])
        groups = None
        if pieces[0].groups is not None:
            groups = torch.tensor([group for piece in pieces for group in piece.groups or []], dtype=torch.int64)
        images = torch.cat([piece.images for piece in pieces])
        return Batch(
            step=step,
            images_b3HW=images.pin_memory() if self._pin_memory else images,
            token_ids_bT=tokens,
            attention_mask_bT=mask,
            group_b=groups,
            keys=keys,
            consumed=sum(consumed_hash(step, key) for key in keys) & MASK_64,
            bad=[record for piece in pieces for record in piece.bad],
        )


def _unchanged(item: Any) -> Any:
    return item


def _quiet_worker(worker: int) -> None:
    # Workers run side by side: threads of their own would fight over the cores.
    torch.set_num_threads(1)


@dataclass
class EvalPiece:
    """Some consecutive samples of a split, unaugmented, with all their captions."""

    images_n3HW: torch.Tensor  # uint8
    token_ids: list[list[int]]  # one per caption
    owners: list[int]  # for each caption, its sample's number in the split
    numbers: list[int]  # the samples' numbers in the split
    samples: list[RawSample]  # without pixels: `image` is empty
    bad: list[tuple[int, str, str]]  # number, key, reason


class EvalRows(Dataset[EvalPiece]):
    """Deterministic reading for evaluation: `rows[start, stop]`. Unreadable samples are named, never replaced."""

    def __init__(
        self, split: Split, *, side: int, resize: ResizeMode, tokenizer: Tokenizer, max_image_pixels: int = 50_000_000
    ) -> None:
        self.split, self.side, self.resize = split, side, resize
        self.tokenizer, self.max_image_pixels = tokenizer, max_image_pixels

    def __getitem__(self, bounds: tuple[int, int]) -> EvalPiece:
        images, texts, owners, numbers, samples, bad = [], [], [], [], [], []
        for number in range(*bounds):
            try:
                sample = self.split.read(number)
                if not sample.texts:
                    raise BadSample("no caption")
                pixels = load_for_evaluation(sample.image, self.side, self.resize, self.max_image_pixels)
            except BadSample as error:
                bad.append((number, self.split.key(number), str(error)))
                continue
            images.append(pixels)
            texts += sample.texts
            owners += [number] * len(sample.texts)
            numbers.append(number)
            samples.append(RawSample(sample.key, b"", sample.extension, sample.texts, sample.fields))
        empty = torch.zeros(0, 3, self.side, self.side, dtype=torch.uint8)
        return EvalPiece(
            torch.stack(images) if images else empty,
            self.tokenizer.encode(texts) if texts else [],
            owners,
            numbers,
            samples,
            bad,
        )


class _Ranges(Sampler[tuple[int, int]]):
    def __init__(self, start: int, stop: int) -> None:
        self.bounds = [(s, min(s + ROWS_PER_TASK, stop)) for s in range(start, stop, ROWS_PER_TASK)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds)


def evaluation_loader(rows: EvalRows, *, rank: int = 0, world_size: int = 1, workers: int = 0) -> DataLoader[EvalPiece]:
    """This rank's run of the split, in order; over all ranks every sample comes exactly once, on any world size."""
    bounds = _Ranges(*share(len(rows.split), rank, world_size))
    return DataLoader(
        rows, batch_size=None, sampler=bounds, num_workers=workers, collate_fn=_unchanged, worker_init_fn=_quiet_worker
    )
