"""What repacking does to single samples: decides over one, makes one ready. Light: worker processes import it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from clipdist.data.images.header import header_of
from clipdist.data.images.looks import look_of
from clipdist.data.images.pillow import open_image
from clipdist.data.sets.conditions import Condition
from clipdist.data.sets.duplicates import hashed
from clipdist.data.sets.pack import SPLIT_NAME
from clipdist.data.sets.recode import ImageOptions, UnusableImage, recode
from clipdist.data.sets.survey import see
from clipdist.data.shards import BadSample, RawSample, ShardFile
from clipdist.errors import UserError

Dedupe = Literal["exact", "near"]


@dataclass(frozen=True)
class Choice:
    """Which samples, and where they go.

    `splits`: old name -> new name of those that are taken, in this order; None takes all. `fractions` divides them
    anew, by unit and in proportion of the field `stratify_by`, with `seed`. `shuffle` is the seed of one permutation of
    the whole set. `split_table` is a table with columns `key` and `split`; what it does not name is left out.
    `min_side` counts pixels of the shorter side. Of equal or similar pictures the first is kept.
    """

    splits: dict[str, str] | None = None
    where: tuple[Condition, ...] = ()
    min_side: int = 0
    drop_bad: bool = False
    dedupe: Dedupe | None = None
    fractions: dict[str, float] | None = None
    stratify_by: str = "label"
    seed: int = 0
    split_table: str = ""
    shuffle: int | None = None

    def __post_init__(self) -> None:
        for name in [*(self.splits or {}).values(), *(self.fractions or {})]:
            if not SPLIT_NAME.fullmatch(name):
                raise UserError(f"split name: found {name!r}, expected letters, digits, _ and -")
        if self.min_side < 0 or (self.shuffle or 0) < 0:
            raise UserError("--min-side and --shuffle: expected 0 or more")
        if self.fractions and set((self.splits or {}).values()) - set(self.splits or {}):
            raise UserError("--split-fractions names the new splits, so --split only chooses; leave out its new names")
        if self.split_table and (self.fractions or self.splits):
            raise UserError("--split-table excludes --split and --split-fractions; leave it out, or them")

    @property
    def needs_survey(self) -> bool:
        return bool(self.where or self.min_side or self.dedupe or self.fractions)

    def operations(self) -> dict[str, Any]:
        """What was asked for, for the manifest."""
        return asdict(self) | {"where": [str(condition) for condition in self.where]}


class Row(NamedTuple):
    """A sample of the source: the path of its shard, and its place there."""

    path: str
    place: int


class Surveyed(NamedTuple):
    """What decides over one sample. Hashes are 0 where there is nothing; `look`, dtype `LOOK`, is there where it was
    asked for; `out` says why it is left out, and `bad` that this is because it is damaged."""

    out: str = ""
    bad: bool = False
    digest: int = 0
    unit: int = 0
    label: int = 0
    look: np.ndarray | None = None


class Taken(NamedTuple):
    """One sample as it will be written, or why it cannot be."""

    key: str
    image: bytes = b""
    extension: str = ""
    texts: Sequence[str] = ()
    fields: dict[str, Any] | None = None
    fault: str = ""


@lru_cache(maxsize=128)
def opened_shard(path: str) -> ShardFile:
    """A shard by its path, kept open for the next sample."""
    return ShardFile(Path(path))


def _read(row: Row) -> RawSample:
    sample = opened_shard(row.path).read(row.place)
    if not sample.texts:
        raise BadSample("empty caption")
    return sample


def survey(rows: list[Row], choice: Choice) -> list[Surveyed]:
    """What decides over these samples. Worker processes run it."""
    return [_surveyed(row, choice) for row in rows]


def _surveyed(row: Row, choice: Choice) -> Surveyed:
    try:
        sample = _read(row)
        fields = {"key": sample.key, **sample.fields, "text": sample.texts}
        for condition in choice.where:
            if not condition.holds(fields):
                return Surveyed(f"--where {condition}")
        if choice.min_side and min(_size(sample.image)) < choice.min_side:
            return Surveyed(f"--min-side {choice.min_side}")
        look = look_of(see(sample.image, ImageOptions.max_pixels)) if choice.dedupe == "near" else None
    except BadSample as error:
        return Surveyed(str(error), bad=True)
    unit, label = (_hash_of(sample.fields.get(name)) for name in ("unit", choice.stratify_by))
    return Surveyed("", False, hashed(sample.image), unit, label, look)


def _size(image: bytes) -> tuple[int, int]:
    if header := header_of(image):
        return header.width, header.height
    return open_image(image, ImageOptions.max_pixels).size


def _hash_of(value: Any) -> int:
    return 0 if value is None else hashed(str(value).encode(errors="surrogatepass"))


def take(rows: list[Row], options: ImageOptions) -> list[Taken]:
    """These samples as they will be written. Worker processes run it."""
    return [_taken(row, options) for row in rows]


def _taken(row: Row, options: ImageOptions) -> Taken:
    try:
        sample = _read(row)
        image, extension = recode(sample.image, options)
        # Untouched bytes keep their own name for the format, such as jpeg.
        extension = sample.extension if image is sample.image else extension
        return Taken(sample.key, image, extension, sample.texts, _finite(sample.fields))
    except (BadSample, UnusableImage) as error:
        return Taken(opened_shard(row.path).index.key(row.place), fault=str(error))
    except UserError as error:  # its shard is gone or cut short
        return Taken("", fault=str(error))


def _finite(value: Any) -> Any:
    """The same with None for NaN and the infinities: Python reads and writes them, but JSON has none of them."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
