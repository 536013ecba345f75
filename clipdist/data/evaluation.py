"""Shard set -> unaugmented samples in order, for evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from clipdist.data.images.decode import load_for_evaluation
from clipdist.data.images.geometry import ResizeMode
from clipdist.data.loader import ROWS_PER_TASK, quiet_worker, unchanged
from clipdist.data.order import share
from clipdist.data.shards import BadSample, RawSample, Split
from clipdist.data.text import Tokenizer
from clipdist.errors import UserError


@dataclass
class EvalPiece:
    """Some consecutive samples of a split, unaugmented, with all their captions."""

    images_n3HW: torch.Tensor  # uint8, channels last in memory
    token_ids: list[list[int]]  # one per caption
    owners: list[int]  # for each caption, its sample's number in the split
    numbers: list[int]  # the samples' numbers in the split
    samples: list[RawSample]  # without pixels: `image` is empty
    bad: list[tuple[int, str, str]]  # number, key, reason


class EvalRows(Dataset[EvalPiece | UserError]):
    """Deterministic reading for evaluation: `rows[start, stop]`. Unreadable samples are named, never replaced.

    Without a tokenizer a sample needs no caption, and nothing is made of one."""

    def __init__(
        self,
        split: Split,
        *,
        side: int,
        resize: ResizeMode,
        tokenizer: Tokenizer | None,
        max_image_pixels: int = 50_000_000,
    ) -> None:
        self.split, self.side, self.resize = split, side, resize
        self.tokenizer, self.max_image_pixels = tokenizer, max_image_pixels

    def __getitem__(self, bounds: tuple[int, int]) -> EvalPiece | UserError:
        """A user's error comes back as a value: raised in a worker, it would arrive as a traceback."""
        try:
            return self.piece(*bounds)
        except UserError as error:
            return error

    def piece(self, start: int, stop: int) -> EvalPiece:
        images, texts, owners, numbers, samples, bad = [], [], [], [], [], []
        for number in range(start, stop):
            try:
                sample = self.split.read(number)
                if self.tokenizer and not sample.texts:
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
        pixels_nHW3 = np.stack(images) if images else np.zeros((0, self.side, self.side, 3), np.uint8)
        return EvalPiece(
            torch.from_numpy(pixels_nHW3).permute(0, 3, 1, 2),
            self.tokenizer.encode(texts) if self.tokenizer and texts else [],
            owners,
            numbers,
            samples,
            bad,
        )


class _Ranges(Sampler[tuple[int, int]]):
    def __init__(self, total: int, rank: int, world_size: int) -> None:
        starts = range(0, total, ROWS_PER_TASK)
        first, end = share(len(starts), rank, world_size)
        self.bounds = [(start, min(start + ROWS_PER_TASK, total)) for start in starts[first:end]]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds)


def evaluation_loader(
    rows: EvalRows, *, rank: int = 0, world_size: int = 1, workers: int = 0
) -> DataLoader[EvalPiece | UserError]:
    """This rank's run of the split, in order; over all ranks every sample comes exactly once, on any world size.

    Ranks take whole pieces, which are cut alike for any number of them: what a matrix product answers may hang, in its
    last bits, on how many rows it is given."""
    bounds = _Ranges(len(rows.split), rank, world_size)
    return DataLoader(
        rows, batch_size=None, sampler=bounds, num_workers=workers, collate_fn=unchanged, worker_init_fn=quiet_worker
    )
