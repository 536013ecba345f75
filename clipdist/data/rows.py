"""What loader workers do: read, decode, augment and tokenise the rows of a step."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from clipdist.data.caching import cache_side
from clipdist.data.captions import augment_caption, choose
from clipdist.data.config import DataConfig
from clipdist.data.images.cache import DecodedCache, cached_size
from clipdist.data.images.decode import augment_pixels, decode_rgb, image_size, load_for_training
from clipdist.data.images.geometry import ResizeMode
from clipdist.data.images.resize import resize_exact, resize_rgb
from clipdist.data.labels import is_absent
from clipdist.data.order import SampleOrder, philox, sample_generator
from clipdist.data.shards import BadSample, RawSample, Split
from clipdist.data.staging import Pixels
from clipdist.data.text import Tokenizer
from clipdist.errors import UserError


@dataclass(frozen=True)
class BadRecord:
    """One sample that could not be used, and the one that stood in for it."""

    step: int
    key: str
    shard: str
    reason: str
    replaced_by: str


@dataclass(frozen=True)
class Task:
    """Rows start..stop of the global batch of a step; steps count from the start of the run."""

    step: int
    start: int
    stop: int


@dataclass
class Piece:
    """The rows of a task. `images` is None when they were put into `TrainRows.staging`."""

    step: int
    images: np.ndarray | None  # uint8 [n, side, side, 3]
    token_ids: list[list[int]]
    groups: list[int] | None
    keys: list[str]
    bad: list[BadRecord]


class Row(NamedTuple):
    """One sample, but for its pixels."""

    key: str
    text: str
    tokens: list[int] | None  # of `text`, where they are known already
    group: int


class TrainRows(Dataset[Piece | UserError]):
    """`rows[task]` gives the rows of a task, augmented and tokenised. Runs inside loader workers. Only a subclass that
    reads no captions does without a tokenizer.

    `staging`, when set before the workers are forked, takes the pixels; its row 0 is row `first_row` of the global
    batch.
    """

    def __init__(
        self,
        split: Split,
        order: SampleOrder,
        config: DataConfig,
        *,
        side: int,
        resize: ResizeMode,
        tokenizer: Tokenizer | None,
        cache: DecodedCache | None = None,
    ) -> None:
        self.split, self.order, self.config = split, order, config
        self.side, self.resize, self.tokenizer, self.cache = side, resize, tokenizer, cache
        self.staging: Pixels | None = None
        self.first_row = 0

    def __getitem__(self, task: Task) -> Piece | UserError:
        """The rows of a task. A user's error comes back as a value: raised in a worker, it would arrive as a
        traceback."""
        try:
            return self._piece(task)
        except UserError as error:
            return error

    def _piece(self, task: Task) -> Piece:
        numbers, passes = self.order.rows(task.step, task.start, task.stop)
        if self.staging is None:
            images = np.empty((task.stop - task.start, self.side, self.side, 3), np.uint8)
        else:
            images = self.staging.rows(task.step, task.start - self.first_row, task.stop - self.first_row)
        rows: list[Row] = []
        bad: list[BadRecord] = []
        for row, (number, times_round) in enumerate(zip(numbers.tolist(), passes.tolist(), strict=True)):
            rows.append(self._read(task.step, task.start + row, number, times_round, images[row], bad))
        return Piece(
            task.step,
            images if self.staging is None else None,
            self._encode(rows),
            [row.group for row in rows] if self.has_groups else None,
            [row.key for row in rows],
            bad,
        )

    @property
    def has_groups(self) -> bool:
        return self.config.groups != "none"

    def pad(self, token_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the rows of a batch: (token_ids_bT, attention_mask_bT), int64."""
        assert self.tokenizer is not None
        return self.tokenizer.pad(token_ids)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        assert self.tokenizer is not None
        return self.tokenizer.encode(texts)

    def _captions(self, sample: RawSample) -> list[str]:
        if not sample.texts:
            raise BadSample("no caption")
        return sample.texts

    def _value(self, sample: RawSample) -> Any:
        """What `_row` makes the group of."""
        return group_value(sample, self.config.groups)

    def _encode(self, rows: list[Row]) -> list[list[int]]:
        """Token ids of every row; those not known yet are found together."""
        missing = [row.text for row in rows if row.tokens is None]
        found = iter(self._tokens(missing) if missing else [])
        return [next(found) if row.tokens is None else row.tokens for row in rows]

    def _read(self, step: int, row: int, number: int, times_round: int, out: np.ndarray, bad: list[BadRecord]) -> Row:
        """The sample, its pixels put to `out`, or those of the next readable one of its lane and source; what was
        passed over is appended to `bad`."""
        passed: list[tuple[int, str]] = []
        for attempt in range(1, self.config.max_bad_in_a_row + 2):
            try:
                found = self._prepare(number, times_round, out)
            except BadSample as error:
                passed.append((number, str(error)))
                number, times_round = self.order.replacement(step, row, attempt)
                continue
            for lost, reason in passed:
                bad.append(BadRecord(step, *self._name(lost), reason, found.key))
            return self._mix(step, row, attempt, found, out)
        shown = "; ".join(f"{self.split.key(n)}: {reason}" for n, reason in passed[:3])
        raise UserError(f"{self.split.folder}: {len(passed)} unreadable samples in a row ({shown}; …)")

    def _name(self, number: int) -> tuple[str, str]:
        """(key, shard) of a sample that cannot be read."""
        shard, _ = self.split.locate(number)
        return self.split.key(number), self.split.shards[shard].file

    def _mix(self, step: int, row: int, attempt: int, found: Row, out: np.ndarray) -> Row:
        """MixGen: `found` joined with the next readable pair of its lane, where the recipe asks for it."""
        share = self.config.caption_augment.mixgen
        number, times_round = self.order.replacement(step, row, attempt) if share else (0, 0)
        if not share or philox("mixgen", self.order.seed, step, row).random_raw() >= share * 2.0**64:
            return found
        other = np.empty_like(out)
        try:
            partner = self._prepare(number, times_round, other)
        except BadSample:  # it is named when its own turn comes
            return found
        np.copyto(out, ((out.astype(np.uint16) + other + 1) >> 1).astype(np.uint8))
        text = f"{found.text} {partner.text}"
        return Row(found.key, text, None, text_hash(text) if self.config.groups == "caption" else found.group)

    def _prepare(self, number: int, times_round: int, out: np.ndarray) -> Row:
        if self.cache is not None:
            return self._prepare_cached(self.cache, number, times_round, out)
        config, sample = self.config, self.split.read(number)
        texts = self._captions(sample)
        draw = sample_generator(self.order.seed, times_round, sample.key)
        text = choose(texts, config.caption, draw)
        load_for_training(
            sample.image,
            self.side,
            self.resize,
            config.max_image_pixels,
            config.augment,
            draw,
            exact=config.decode == "exact",
            out=out,
        )
        return self._row(sample.key, text, None, self._value(sample), times_round)

    def _prepare_cached(self, cache: DecodedCache, number: int, times_round: int, out: np.ndarray) -> Row:
        """Like `_prepare`, from pixels decoded earlier. They are the same whether they come from the cache or are put
        there now, so that no result depends on what the cache held."""
        stored = cache.get(number)
        if stored is None:
            stored = self._decode(number)
            cache.put(number, *stored)
        pixels, payload = stored
        told = json.loads(payload)
        draw = sample_generator(self.order.seed, times_round, told["key"])
        text = choose(told["texts"], self.config.caption, draw)
        augment_pixels(pixels, tuple(told["size"]), self.side, self.resize, self.config.augment, draw, out=out)
        tokens = told["tokens"][told["texts"].index(text)] if self.config.caption != "sentence" else None
        return self._row(told["key"], text, tokens, told["group"], times_round)

    def _decode(self, number: int) -> tuple[np.ndarray, bytes]:
        """A sample's pixels at the cache's size, and what else training needs of it."""
        config, sample = self.config, self.split.read(number)
        texts = self._captions(sample)
        exact, (width, height) = config.decode == "exact", image_size(sample.image, config.max_image_pixels)
        size = cached_size(width, height, cache_side(config, self.side))
        pixels = decode_rgb(sample.image, config.max_image_pixels, at_least=None if exact else size, exact=exact)
        told = {
            "key": sample.key,
            "texts": texts,
            "size": (height, width),
            "group": self._value(sample),
            "tokens": self._tokens(texts),
        }
        payload = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
        return (resize_exact if exact else resize_rgb)(pixels, size), payload

    def _row(self, key: str, text: str, tokens: list[int] | None, value: Any, times_round: int) -> Row:
        changes = self.config.caption_augment
        group = text_hash(text if self.config.groups == "caption" else str(value))
        if changes.changes_text:
            # A generator of its own: what is done to the caption must not change the pixels.
            draw = np.random.Generator(philox("caption", self.order.seed, times_round, key))
            text, tokens = augment_caption(text, changes, draw), None
        return Row(key, text, tokens, group)


def text_hash(text: str) -> int:
    """A signed 64-bit number for a string: equal strings, equal groups."""
    return xxhash.xxh3_64_intdigest(text.encode()) - (1 << 63)


def group_value(sample: RawSample, by: str) -> Any:
    """What a sample is grouped by, but for its caption; `BadSample` when it lacks the field that the recipe names."""
    if by in ("none", "caption"):
        return None
    if is_absent(sample.fields.get(by)):  # all such samples would count as one group
        raise BadSample(f"no field {by!r}, which data.groups asks for")
    return sample.fields[by]
