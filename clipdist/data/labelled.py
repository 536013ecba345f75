"""What loader workers do for a classifier: rows whose group is the number of their class. Captions are not read."""

from typing import Any

import torch

from clipdist.data.config import DataConfig
from clipdist.data.images.cache import DecodedCache
from clipdist.data.images.geometry import ResizeMode
from clipdist.data.labels import Labels
from clipdist.data.order import SampleOrder
from clipdist.data.rows import Row, TrainRows
from clipdist.data.shards import RawSample, Split


class LabelledRows(TrainRows):
    """Raises and replaces as `TrainRows` does; a sample without a class is a bad one."""

    has_groups = True

    def __init__(
        self,
        split: Split,
        order: SampleOrder,
        config: DataConfig,
        *,
        side: int,
        resize: ResizeMode,
        labels: Labels,
        cache: DecodedCache | None = None,
    ) -> None:
        super().__init__(split, order, config, side=side, resize=resize, tokenizer=None, cache=cache)
        self.labels = labels

    def pad(self, token_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        nothing = torch.zeros(len(token_ids), 0, dtype=torch.int64)
        return nothing, nothing

    def _captions(self, sample: RawSample) -> list[str]:
        return [""]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return [[] for _ in texts]

    def _value(self, sample: RawSample) -> int:
        return self.labels.number(sample.fields)

    def _row(self, key: str, text: str, tokens: list[int] | None, value: Any, times_round: int) -> Row:
        return Row(key, "", [], int(value))
