"""Whether a model was trained on what it is scored on: the evaluated split beside the training split of its sets.

    none     nothing is compared
    index    keys, by the indexes; units, by the samples' JSON; images of equal bytes, of which only those are read that
             are as long and as large as one of the evaluated split
    looks    these on sets of any size, also behind URLs, and near-duplicates to the eye: every image is decoded

A key is a leak when the bytes are equal, too, or captions that one evaluated image alone has: sets whose samples are
only numbered have keys in common, and captions from a template.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.data.shards import BadSample, RawSample, ShardFile, ShardSet, Split
from clipdist.errors import UserError
from clipdist.evaluate.estimates import (
    Estimate,
    Measured,
    aligned,
    cell,
    estimates,
    unit_name,
    unit_numbers,
    without_nan,
)
from clipdist.progress import progress

LEVELS = ("none", "index", "looks")
# Up to here samples of the training split are read one by one unasked: half a minute on a local disk.
MOST_READ = 500_000
LISTED = 100
REMOTE = "behind a URL: all of it would be fetched, which --audit looks does"
# Of images as long and as large as each other, so many bytes from the middle are compared before all of them.
FINGERPRINT = 32
KINDS = {
    "samples": "are samples of the training split, too (the same key, and the same captions or bytes)",
    "bytes": "have the same bytes as an image of the training split",
    "units": "are of a {unit} that the training split has, too",
    "looks": "look the same as an image of the training split",
}


@dataclass(frozen=True)
class Trained:
    """One shard set that a model was trained on: where it lay, its digest, and the split."""

    location: str
    digest: str
    split: str


@dataclass(frozen=True)
class Evaluated:
    """What is scored: sample numbers in `split`, int64 [N], with their keys and fields; `unit` names a field."""

    shard_set: ShardSet
    split: Split
    numbers_N: np.ndarray
    keys: Sequence[str]
    fields: Sequence[Mapping[str, Any]]
    unit: str


@dataclass
class Leaks:
    """`found`: bool [N] of each kind that was compared; `not_checked`: the other kinds, and why."""

    images: int
    level: str
    unit: str = "unit"
    trained: list[Trained] = field(default_factory=list)
    training_samples: int = 0
    same_split: bool = False
    other_set: bool = False
    chose_the_model: bool = False
    found: dict[str, np.ndarray] = field(default_factory=dict)
    listed: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    keys_alone: int = 0
    not_checked: dict[str, str] = field(default_factory=dict)
    without: dict[str, tuple[Estimate, Estimate]] = field(default_factory=dict)

    @property
    def leaked_N(self) -> np.ndarray:
        """bool [N]: the images that training has seen in some way."""
        return np.logical_or.reduce([np.zeros(self.images, bool), *self.found.values()])

    def notes(self) -> list[str]:
        """What a reader must know before quoting the score; empty when nothing was found."""
        if self.same_split:
            return ["These are the images that the model was trained on: the score says how well it remembers them."]
        told = []
        if self.chose_the_model:
            told.append(
                "This split chose the model during training: quote the score of another one, which it has not seen."
            )
        for kind, words in KINDS.items():
            if count := int(self.found.get(kind, np.zeros(1)).sum()):
                # In another set the same name may be another patient's.
                named = " (by their names: it is another set)" if kind == "units" and self.other_set else ""
                told.append(
                    f"{count:,} of {self.images:,} images {words.format(unit=self.unit)}{named}: the score is too high "
                    f"for new ones. Divide the set anew: clipdist split"
                )
        return told

    def line(self) -> str:
        """One line: what was compared, and with what result."""
        if self.level == "none":
            return "leaks: not checked (--audit none)"
        if self.same_split:
            return f"leaks: all of {self.images:,} images, since this is the split that the model was trained on"
        if not self.found:
            return f"leaks: not checked: {'; '.join(dict.fromkeys(self.not_checked.values()))}"
        sets = ", ".join(f"{Path(one.location).name} {one.split}" for one in self.trained)
        count = int(self.leaked_N.sum())
        each = [f"{kind} {int(found.sum()):,}" for kind, found in self.found.items()]
        left = [f"{kind} ({why})" for kind, why in self.not_checked.items()]
        told = f"leaks: {count:,} of {self.images:,} images are in the {self.training_samples:,} of {sets}, too"
        return "; ".join([f"{told}: {', '.join(each)}", *([f"not checked: {', '.join(left)}"] if left else [])])

    def table(self) -> str:
        """Plain text: the notes, or else the line; and the scores without what leaked."""
        from clipdist.evaluate.subgroups import shown_name

        lines = self.notes() or [self.line()]
        if self.without:
            kept_images = int((~self.leaked_N).sum())
            rows = [["score", f"all {self.images:,} images", f"the {kept_images:,} that training has not seen"]]
            rows += [[shown_name(name), cell(of_all), cell(kept)] for name, (of_all, kept) in self.without.items()]
            lines += ["", *aligned(rows)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        found = {
            kind: {"images": int(rows.sum()), "listed": self.listed.get(kind, [])} for kind, rows in self.found.items()
        }
        scores = {
            name: {"all": of_all.to_dict(), "without": kept.to_dict()} for name, (of_all, kept) in self.without.items()
        }
        body = {
            "level": self.level,
            "trained_on": [vars(one) for one in self.trained],
            "training_samples": self.training_samples,
            "same_split": self.same_split,
            "other_set": self.other_set,
            "chose_the_model": self.chose_the_model,
            "images": self.images if self.same_split else int(self.leaked_N.sum()),
            "found": found,
            "keys_alone": self.keys_alone,
            "not_checked": self.not_checked,
            "line": self.line(),
            "notes": self.notes(),
            "without": {"images": int((~self.leaked_N).sum()), "scores": scores} if scores else None,
        }
        return {**without_nan(body)}

    def rescore(
        self,
        measured: Mapping[str, Measured],
        *,
        units: Sequence[Any] | None,
        bootstrap: int = 1000,
        seed: int = 0,
    ) -> None:
        """Adds each score of the queries that did not leak, galleries and classes staying whole; nothing where none
        leaked, or all."""
        from clipdist.evaluate.subgroups import within

        kept_N = ~self.leaked_N
        if kept_N.all() or not kept_N.any():
            return
        unit_N = unit_numbers(units, self.images)
        for measure, one in measured.items():
            kept_Q = kept_N[one.image_Q]
            if not kept_Q.any():
                continue
            how: dict[str, Any] = {"bootstrap": bootstrap, "seed": seed}
            of_all = estimates(one.statistics, unit_N[one.image_Q], **how)
            restricted = {name: within(statistic, kept_Q) for name, statistic in one.statistics.items()}
            kept = estimates(restricted, unit_N[one.image_Q], **how)
            self.without |= {f"{measure}/{name}": (of_all[name], kept[name]) for name in one.statistics}


def trained_on(model: Path, about: Mapping[str, Any]) -> list[Trained]:
    """The sets and the split that a model folder says it was trained on; empty when it does not say."""
    if not about.get("data_digest") or not about.get("split"):
        return []
    digests = str(about["data_digest"]).split("+")
    places: dict[str, str] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        environment = json.loads((model.resolve().parent / "environment.json").read_text(encoding="utf-8"))
        places = {one["digest"]: one["path"] for one in environment["shard_sets"]}
    named = str(about.get("data", "")).split(" + ")
    locations = named if len(named) == len(digests) else digests
    return [
        Trained(places.get(digest, location), digest, str(about["split"]))
        for digest, location in zip(digests, locations, strict=True)
    ]


def find_leaks(
    evaluated: Evaluated, trained: Sequence[Trained], val_split: str | None, *, level: str = "index", workers: int = 2
) -> Leaks:
    """Compares the evaluated split with the training split of each set that the model was trained on.

    What cannot be compared, since a set is gone or has changed, is named with the reason. Memory: the evaluated split's
    keys and sizes, its captions where sets share keys, and one training shard's; for `looks`, 1.3 kB for each sample of
    the sets.
    """
    N = len(evaluated.keys)
    leaks = Leaks(N, level, evaluated.unit, list(trained))
    if level == "none":
        return leaks
    if not trained:
        leaks.not_checked = dict.fromkeys(KINDS, "the model does not say what it was trained on")
        return leaks
    own_digest, own_split = evaluated.shard_set.manifest.digest, evaluated.split.name
    same = [one for one in trained if one.digest == own_digest]
    leaks.other_set = not same
    leaks.same_split = any(one.split == own_split for one in same)
    leaks.chose_the_model = bool(same) and own_split == val_split and not leaks.same_split
    if leaks.same_split:
        return leaks
    opened = []
    for one in trained:
        if "://" in one.location and level == "index":
            leaks.not_checked |= dict.fromkeys(KINDS, f"{one.location} is {REMOTE}")
            continue
        try:
            opened.append(_open(one, evaluated))
        except UserError as error:
            leaks.not_checked |= dict.fromkeys(KINDS, str(error))
    if opened:
        _Comparison(leaks, evaluated, opened).run(workers)
    return leaks


def _open(one: Trained, evaluated: Evaluated) -> tuple[ShardSet, Split]:
    """Raises `UserError` for a set that is gone, or another one by now."""
    shard_set = evaluated.shard_set
    if one.digest != shard_set.manifest.digest:
        shard_set = ShardSet.open(one.location)
        if shard_set.manifest.digest != one.digest:
            raise UserError(
                f"{one.location} is another version of the set now (digest {shard_set.manifest.digest}, in training "
                f"{one.digest})"
            )
    return shard_set, shard_set.split(one.split)


class _Comparison:
    """Fills `leaks` shard by shard of the training splits."""

    def __init__(self, leaks: Leaks, evaluated: Evaluated, opened: Sequence[tuple[ShardSet, Split]]) -> None:
        self.leaks, self.evaluated, self.opened = leaks, evaluated, opened
        self.row_of_key = {key.encode(): row for row, key in enumerate(evaluated.keys)}
        self.row_of_number = {int(number): row for row, number in enumerate(evaluated.numbers_N)}
        units: dict[str, list[int]] = {}
        for row, fields in enumerate(evaluated.fields):
            if (unit := unit_name(fields.get(evaluated.unit))) is not None:
                units.setdefault(unit, []).append(row)
        self.units = units

    def run(self, workers: int) -> None:
        leaks, thorough = self.leaks, self.leaks.level == "looks"
        local = [split for _, split in self.opened if thorough or not split.is_remote]
        leaks.training_samples = sum(map(len, local))
        if len(local) < len(self.opened):
            leaks.not_checked |= dict.fromkeys(KINDS, REMOTE)
        if not local:
            return
        self._each(local, "samples", self._same_keys)
        few = f"{leaks.training_samples:,} training samples would be read, which --audit looks does"
        if not self.units:
            leaks.not_checked["units"] = f"no evaluated image has the field {self.evaluated.unit!r}"
        elif thorough or leaks.training_samples <= MOST_READ:
            self._each(local, "units", self._same_units)
        else:
            leaks.not_checked["units"] = few
        if thorough or leaks.training_samples <= MOST_READ:
            self.candidates = _Candidates(self.evaluated)
            self._each(local, "bytes", self._same_bytes)
        else:
            leaks.not_checked["bytes"] = few
        if thorough and any(split.is_remote for split in (self.evaluated.split, *local)):
            leaks.not_checked["looks"] = "a set is behind a URL; copy it here"
        elif thorough:
            self._looks(workers)
        else:
            leaks.not_checked["looks"] = "--audit looks"

    def _each(self, splits: Iterable[Split], kind: str, compare: Callable[[ShardFile], Iterator[Any]]) -> None:
        """`compare` yields (evaluated row, training key) for each shard's finds of this kind."""
        found_N = np.zeros(self.leaks.images, bool)
        listed = self.leaks.listed.setdefault(kind, [])
        shards = [(split, number) for split in splits for number in range(len(split.shards))]
        for split, number in progress(shards, unit="shard", description=f"leaks: {kind}"):
            try:
                shard = split.shard(number)
                for row, key in compare(shard):
                    if not found_N[row] and len(listed) < LISTED:
                        listed.append({"key": self.evaluated.keys[row], "trained": key})
                    found_N[row] = True
            except (UserError, BadSample) as error:
                self.leaks.not_checked[kind] = f"in part: {error}"
        self.leaks.found[kind] = found_N

    def _same_keys(self, shard: ShardFile) -> Iterator[tuple[int, str]]:
        for row, key in enumerate(shard.index.keys()):
            own = self.row_of_key.get(key)
            if own is None:
                continue
            if self._same_sample(_sample(shard, row), self._own(own)):
                yield own, key.decode(errors="replace")
            else:
                self.leaks.keys_alone += 1

    def _same_sample(self, one: RawSample | None, other: RawSample | None) -> bool:
        """Whether a training sample is the evaluated one of its key: by its captions only where no other has them."""
        if one is None or other is None:
            return False
        if one.image == other.image:
            return True
        return one.texts == other.texts != [] and self._images_with[tuple(other.texts)] == 1

    @cached_property
    def _images_with(self) -> Counter[tuple[str, ...]]:
        """Captions -> how many of the evaluated images have them; reads all of these once."""
        samples = (self._own(row) for row in range(self.leaks.images))
        return Counter(tuple(one.texts) for one in samples if one is not None)

    def _own(self, row: int) -> RawSample | None:
        with suppress(BadSample):
            return self.evaluated.split.read(int(self.evaluated.numbers_N[row]))
        return None

    def _same_units(self, shard: ShardFile) -> Iterator[tuple[int, str]]:
        for row in range(shard.index.samples):
            with suppress(BadSample):  # training has left it out, too
                unit = unit_name(shard.fields(row).get(self.evaluated.unit))
                for own in self.units.get(unit, ()) if unit is not None else ():
                    yield own, shard.index.key(row)

    def _same_bytes(self, shard: ShardFile) -> Iterator[tuple[int, str]]:
        for row in np.flatnonzero(self.candidates.possible(shard.index.records)).tolist():
            with suppress(BadSample):
                for number in self.candidates.same(shard, row):
                    if number in self.row_of_number:
                        yield self.row_of_number[number], shard.index.key(row)

    def _looks(self, workers: int) -> None:
        from clipdist.data.sets.duplicates import find_duplicates
        from clipdist.data.sets.survey import survey_set

        sets = {str(one.folder): one for one in (self.evaluated.shard_set, *(one for one, _ in self.opened))}
        surveys = {folder: survey_set(Path(folder), workers=workers) for folder in sets}
        own = surveys[str(self.evaluated.shard_set.folder)]
        own_rows = np.flatnonzero(own.rows.split_of == own.rows.splits.index(self.evaluated.split.name))
        own_rows = own_rows[self.evaluated.numbers_N]
        parts, keys = [(own, own_rows)], [*self.evaluated.keys]
        for shard_set, split in self.opened:
            survey = surveys[str(shard_set.folder)]
            rows = np.flatnonzero(survey.rows.split_of == survey.rows.splits.index(split.name))
            parts.append((survey, rows))
            keys += [survey.rows.key(int(row)) for row in rows]
        digests = np.concatenate([survey.samples["image"][rows] for survey, rows in parts])
        looks = np.concatenate([survey.looks[rows] for survey, rows in parts])
        duplicates = find_duplicates(digests, looks)
        found_N = np.zeros(self.leaks.images, bool)
        N, listed = self.leaks.images, []
        copies: dict[int, list[int]] = {}
        for row, first in enumerate(duplicates.first_N.tolist()):
            copies.setdefault(first, []).append(row)
        for one, other in duplicates.pairs_P2.tolist():
            for mine, theirs in ((copies[one], copies[other]), (copies[other], copies[one])):
                seen = next((row for row in theirs if row >= N), None)
                for row in mine if seen is not None else ():
                    if row < N and not found_N[row]:
                        found_N[row] = True
                        listed.append({"key": keys[row], "trained": keys[seen or 0]})
        self.leaks.found["looks"], self.leaks.listed["looks"] = found_N, listed[:LISTED]
        if duplicates.cut_short:
            self.leaks.not_checked["looks"] = f"in part: {duplicates.cut_short:,} images look too much alike"


class _Candidates:
    """Images of the evaluated split by length and size, then by some bytes of their middle, then by all bytes."""

    def __init__(self, evaluated: Evaluated) -> None:
        self.split = evaluated.split
        codes = [_length_and_size(self.split.shard(number).index.records) for number in range(len(self.split.shards))]
        self.code_N = np.concatenate([np.zeros(0, np.uint64), *codes])
        self.codes = np.unique(self.code_N)
        order = np.argsort(self.code_N, kind="stable")
        self.order, self.ordered = order, self.code_N[order]
        self.prints: dict[int, dict[bytes, list[int]]] = {}

    def possible(self, records: np.ndarray) -> np.ndarray:
        """bool: which of a shard's samples may be equal to one of the split."""
        return np.isin(_length_and_size(records), self.codes) & (records["image_size"] > 0)

    def same(self, shard: ShardFile, row: int) -> list[int]:
        """Numbers in the split of the images with the bytes of this one. Raises `BadSample`."""
        code = int(_length_and_size(shard.index.records[row : row + 1])[0])
        if code not in self.prints:
            self.prints[code] = {}
            bounds = (
                np.searchsorted(self.ordered, np.uint64(code), "left"),
                np.searchsorted(self.ordered, np.uint64(code), "right"),
            )
            for number in self.order[slice(*bounds)].tolist():
                place, own = self.split.locate(number)
                with suppress(BadSample):
                    print_of = _fingerprint(self.split.shard(place), own)
                    self.prints[code].setdefault(print_of, []).append(number)
        numbers = self.prints[code].get(_fingerprint(shard, row), [])
        if not numbers:
            return []
        whole = shard.image(row)
        return [number for number in numbers if self._image(number) == whole]

    def _image(self, number: int) -> bytes:
        place, own = self.split.locate(number)
        with suppress(BadSample):
            return self.split.shard(place).image(own)
        return b""


def _length_and_size(records: np.ndarray) -> np.ndarray:
    """uint64: the image's bytes, width and height in one number."""
    size, width, height = (records[name].astype(np.uint64) for name in ("image_size", "width", "height"))
    return size | (width << np.uint64(32)) | (height << np.uint64(48))


def _fingerprint(shard: ShardFile, row: int) -> bytes:
    middle = int(shard.index.records["image_size"][row]) // 2
    return shard.image(row, middle, middle + FINGERPRINT)


def _sample(shard: ShardFile, row: int) -> RawSample | None:
    with suppress(BadSample):
        return shard.read(row)
    return None
