"""What the samples of a shard set look like and say, in columns: one pass over all of it, kept shard by shard.

Of each sample about 1.3 kB are held and kept. Answers lie in `.audit/` in the set's folder, one file a shard, or in the
user's cache folder when the set cannot be written to; a shard that is as it was is not read again.
"""

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipdist.data.images.decode import decode_rgb, image_size
from clipdist.data.images.looks import LOOK, look_of
from clipdist.data.images.quality import JUDGED_SIDE, QUALITY, judged, quality_of
from clipdist.data.sets.duplicates import hashed
from clipdist.data.sets.each_shard import Rows, ask_each, stamp, state_path
from clipdist.data.shards import BadSample, RawSample, ShardFile, ShardInfo, ShardSet, Split, write_atomically
from clipdist.errors import UserError, disk_errors

STATE = ".audit"
STATE_VERSION = 1
MAX_IMAGE_PIXELS = 89_478_485
SAMPLE = np.dtype(
    [
        ("image", "<u8"),  # hash of its bytes; 0: it cannot be read, or does not decode
        ("unit", "<u8"),  # hash of the unit, 0: none
        ("width", "<u4"),
        ("height", "<u4"),
        ("captions", "<u4"),
    ]
)
CAPTION = np.dtype([("text", "<u8"), ("words", "<u4"), ("letters", "<u4")])
"""`text`: hash of the caption without regard to case and spaces."""

Shown = Callable[[Iterable["ShardSurvey"], int], Iterable["ShardSurvey"]]


@dataclass
class ShardSurvey:
    """One shard: `samples`, `quality` and `looks` have a row for each sample, `captions` one for each caption, in the
    samples' order; `bad` holds (row, reason), the row being -1 where the shard cannot be opened."""

    split: str
    file: str
    samples: np.ndarray
    quality: np.ndarray
    looks: np.ndarray
    captions: np.ndarray
    bad: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Survey:
    """A whole set. N samples, M captions, which `owner_M` gives to their samples; `bad`: row -> reason, all rows of a
    shard that cannot be opened among them, the last of all."""

    folder: Path
    rows: Rows
    samples: np.ndarray
    quality: np.ndarray
    looks: np.ndarray
    captions: np.ndarray
    owner_M: np.ndarray
    bad: dict[int, str]
    resumed: int
    shards: int

    def readable(self, split: str) -> tuple[Split, np.ndarray]:
        """A split without the shards that cannot be opened, and the rows of its samples, int64."""
        infos = ShardSet.open(self.folder).manifest.splits[split]
        whole = [info for info in infos if info.file not in self.rows.damaged]
        own = self.rows.split_of == self.rows.splits.index(split)
        return Split(self.folder, split, whole), np.flatnonzero(own & self.rows.whole)

    def unit(self, row: int) -> str:
        try:
            return str(self.rows.read(row).fields["unit"])
        except (BadSample, KeyError):
            return f"unit of {self.rows.key(row)}"


def normal(text: str) -> str:
    """A caption as it is compared with others: without regard to case and to how words are spaced."""
    return " ".join(text.casefold().split())


def see(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The picture, upright, at the size at which it is judged; a JPEG is decoded at the fraction of its size that this
    needs. Raises `BadSample`."""
    return judged(Image.fromarray(decode_rgb(data, max_pixels, at_least=(JUDGED_SIDE, JUDGED_SIDE))))


def survey_shard(folder: Path, split: str, info: ShardInfo) -> ShardSurvey:
    """Reads and decodes one shard. One that cannot be opened has no samples that can be read."""
    try:
        shard = ShardFile(folder / info.file)
        if shard.index.samples != info.samples:
            shard.close()
            raise UserError(
                f"{shard.path}: its index holds {shard.index.samples} samples, the manifest {info.samples}; "
                f"run: clipdist index {folder}"
            )
    except UserError as error:
        samples, quality, looks = (np.zeros(info.samples, kind) for kind in (SAMPLE, QUALITY, LOOK))
        return ShardSurvey(split, info.file, samples, quality, looks, np.zeros(0, CAPTION), [(-1, str(error))])
    count = shard.index.samples
    samples, quality, looks = (np.zeros(count, kind) for kind in (SAMPLE, QUALITY, LOOK))
    captions: list[tuple[int, int, int]] = []
    bad = []
    for row in range(count):
        try:
            sample = shard.read(row)
            captions += [_caption(text) for text in sample.texts]
            samples[row]["captions"] = len(sample.texts)
            if sample.fields.get("unit") is not None:
                samples[row]["unit"] = hashed(str(sample.fields["unit"]).encode(errors="surrogatepass"))
            image = see(sample.image)
            samples[row]["width"], samples[row]["height"] = _size(shard, row, sample)
            quality[row], looks[row] = quality_of(image), look_of(image)
            samples[row]["image"] = hashed(sample.image)
        except BadSample as error:
            bad.append((row, str(error)))
    shard.close()
    return ShardSurvey(split, info.file, samples, quality, looks, np.array(captions, CAPTION), bad)


def _caption(text: str) -> tuple[int, int, int]:
    return hashed(normal(text).encode(errors="surrogatepass")), len(text.split()), len(text)


def _size(shard: ShardFile, row: int, sample: RawSample) -> tuple[int, int]:
    width, height = (int(shard.index.records[name][row]) for name in ("width", "height"))
    return (width, height) if width and height else image_size(sample.image)


def survey_set(
    folder: Path,
    *,
    workers: int = 2,
    state: Path | None = None,
    again: bool = False,
    shown: Shown = lambda surveys, total: surveys,
) -> Survey:
    """Every sample of the set, decoded at a fraction of its size. What was surveyed before and has not changed is taken
    from `state`, a folder; `again` takes nothing. Raises `UserError` when there is no manifest."""
    shard_set = ShardSet.open(folder)
    shards = [(split, info) for split, infos in shard_set.manifest.splits.items() for info in infos]
    place = state_path(folder, STATE) if state is None else state
    stamps = {info.file: stamp(folder, split, info, STATE_VERSION) for split, info in shards}
    done = {} if again else {info.file: kept for _, info in shards if (kept := _kept(place, info, stamps[info.file]))}
    resumed = len(done)
    left = [shard for shard in shards if shard[1].file not in done]
    with disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        asked = ask_each(folder, left, survey_shard, workers=workers, total=len(shards))
        for one in shown(asked, len(left)):
            done[one.file] = one
            if (tied := stamps[one.file]) is not None:
                _keep(place, one, tied)
    return _joined(folder, [done[info.file] for _, info in shards], resumed)


def _joined(folder: Path, parts: list[ShardSurvey], resumed: int) -> Survey:
    damaged = {part.file: reason for part in parts for row, reason in part.bad if row < 0}
    rows = Rows(folder, [(part.split, part.file, len(part.samples)) for part in parts], damaged)
    kinds = {"samples": SAMPLE, "quality": QUALITY, "looks": LOOK, "captions": CAPTION}
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts] or [np.zeros(0, kind)])
        for name, kind in kinds.items()
    }
    owners = np.repeat(np.arange(len(rows)), columns["samples"]["captions"])
    starts = np.cumsum([0, *(len(part.samples) for part in parts)]).tolist()
    told = list(zip(starts, parts, strict=False))
    bad = {start + row: reason for start, part in told for row, reason in part.bad if row >= 0}
    for start, part in told:
        if part.file in damaged:
            bad |= dict.fromkeys(range(start, start + len(part.samples)), damaged[part.file])
    return Survey(folder, rows, **columns, owner_M=owners, bad=bad, resumed=resumed, shards=len(parts))


# One file for each shard: arrays as NumPy writes them, never pickled, and one of the bytes of a JSON object.


def _file(place: Path, shard: str) -> Path:
    return place / f"{shard}.npz"


def _keep(place: Path, one: ShardSurvey, tied: dict[str, Any]) -> None:
    told = json.dumps({"stamp": tied, "split": one.split, "bad": one.bad}, ensure_ascii=True).encode()
    buffer = io.BytesIO()
    np.savez(
        buffer,
        told=np.frombuffer(told, np.uint8),
        samples=one.samples,
        quality=one.quality,
        looks=one.looks,
        captions=one.captions,
    )
    write_atomically(_file(place, one.file), buffer.getvalue())


def _kept(place: Path, info: ShardInfo, tied: dict[str, Any] | None) -> ShardSurvey | None:
    """What was kept of a shard, None when there is nothing that holds."""
    try:
        with np.load(_file(place, info.file), allow_pickle=False) as kept:
            told = json.loads(kept["told"].tobytes())
            if tied is None or told["stamp"] != tied:
                return None
            columns = {name: kept[name] for name in ("samples", "quality", "looks", "captions")}
    except FileNotFoundError:
        return None
    except Exception:  # cut short, or of another program: NumPy raises many kinds
        return None
    if [column.dtype for column in columns.values()] != [SAMPLE, QUALITY, LOOK, CAPTION]:
        return None
    return ShardSurvey(told["split"], info.file, **columns, bad=[(row, reason) for row, reason in told["bad"]])
