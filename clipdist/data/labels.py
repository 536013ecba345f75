"""The classes of a run: a field's values in the training split, numbered once and kept with run and model."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.data.shards import BadSample, Split, write_atomically
from clipdist.errors import UserError
from clipdist.progress import progress

FORMAT = "clipdist-labels"
FORMAT_VERSION = 1
SHOWN = 3


def label_of(fields: Mapping[str, Any], field: str) -> str | None:
    """The class that a sample's fields name, as text; None where they name none, by lacking the field or an empty one.

    Raises `UserError` for a list or an object, which is no class.
    """
    value = fields.get(field)
    if isinstance(value, list | dict):
        raise UserError(
            f"field {field!r} is {json.dumps(value, ensure_ascii=False)[:80]} in a sample: expected one class, a text "
            f"or a number; name a field that every sample has one value of"
        )
    return None if is_absent(value) else str(value)


def is_absent(value: Any) -> bool:
    """Whether a field's value says nothing: none, an empty text, or the NaN that pandas writes for an empty cell."""
    return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and math.isnan(value))


def label_order(label: str) -> tuple[bool, float, str]:
    """Sorts finite numbers in their order, then words, of which `nan` is one, since it has no place among them."""
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    return (False, number, label) if math.isfinite(number) else (True, 0.0, label)


@dataclass(frozen=True)
class Labels:
    """Class k is called `names[k]`; `samples[k]` of the training split have it."""

    field: str
    names: tuple[str, ...]
    samples: tuple[int, ...]
    fields: tuple[dict[str, Any], ...]
    """Of each class, what its samples' other fields say where all of one class agree, such as a landmark_id."""

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def number(self, fields: Mapping[str, Any]) -> int:
        """Of a sample with these fields. Raises `BadSample` where it has no class, or one that training has not."""
        label = label_of(fields, self.field)
        if label is None:
            raise BadSample(f"no field {self.field!r}, which classify.label asks for")
        if label not in self.numbers:
            raise BadSample(f"{self.field}={label}: no class of the training split")
        return self.numbers[label]

    def of(self, keys: Sequence[str], fields: Sequence[Mapping[str, Any]], where: str) -> np.ndarray:
        """int64 [N]. Raises `UserError` where samples have no class, or one that training has not."""
        found = [label_of(one, self.field) for one in fields]
        unknown = [(key, label) for key, label in zip(keys, found, strict=True) if label not in self.numbers]
        if unknown:
            shown = ", ".join(f"{key} ({'none' if label is None else label})" for key, label in unknown[:SHOWN])
            raise UserError(
                f"{where}: {len(unknown):,} of {len(keys):,} samples have a {self.field} that no sample of the "
                f"training split has, such as {shown}; the model could never be right about them. Divide the set so "
                f"that each class is in the training split, or leave them out (clipdist repack --where)"
            )
        return np.array([self.numbers[label] for label in found if label is not None], np.int64)

    def save(self, path: Path) -> None:
        rows = zip(self.names, self.samples, self.fields, strict=True)
        classes = [{"label": name, "samples": samples, "fields": fields} for name, samples, fields in rows]
        body = {"format": FORMAT, "version": FORMAT_VERSION, "field": self.field, "classes": classes}
        write_atomically(path, (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())

    @staticmethod
    def load(path: Path) -> "Labels":
        """Raises `UserError` for a file that is not as `save` writes it; FileNotFoundError without one."""
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if body["format"] != FORMAT or body["version"] != FORMAT_VERSION:
                raise ValueError(f"found {body['format']!r} version {body['version']!r}")
            classes = body["classes"]
            columns = [tuple(one[name] for one in classes) for name in ("label", "samples", "fields")]
            return Labels(str(body["field"]), *columns)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: expected {FORMAT!r} version {FORMAT_VERSION} ({type(error).__name__}: {error})"
            ) from None


def read_labels(split: Split, field: str) -> Labels:
    """The classes of a split by `field`, in the order of `label_order`. Samples whose JSON cannot be read are passed
    over here, since the loader names them.

    Raises `UserError` where samples lack the field, or it has fewer than two values.
    """
    samples: dict[str, int] = {}
    agreed: dict[str, dict[str, Any]] = {}
    differing = {field, "text"}
    lacking: list[str] = []
    known: set[str] = set()
    readable = readable_fields(split)
    for number, fields in progress(readable, total=len(split), unit="sample", description=f"classes by {field}"):
        label = label_of(fields, field)
        if label is None:
            known |= fields.keys()
            lacking.append(split.key(number))
            continue
        samples[label] = samples.get(label, 0) + 1
        plain = {name: value for name, value in fields.items() if name not in differing and _is_plain(value)}
        if label not in agreed:
            agreed[label] = plain
        else:
            first = agreed[label]
            differing |= {name for name in first.keys() | plain.keys() if first.get(name) != plain.get(name)}
    if lacking:
        named = ", ".join(sorted(known - {"text"})) or "none"
        raise UserError(
            f"{split.folder}: {len(lacking):,} of {len(split):,} samples of split {split.name!r}, such as "
            f"{lacking[0]}, have no {field!r}, which classify.label names; name a field that every sample has (their "
            f"fields: {named}), or leave them out (clipdist repack --where)"
        )
    if len(samples) < 2:
        raise UserError(
            f"{split.folder}: {field!r} has {len(samples)} value in split {split.name!r}; expected two classes or more"
        )
    names = sorted(samples, key=label_order)
    shared = set.intersection(*(set(one) for one in agreed.values())) - differing
    if max(samples.values()) == 1:  # then all would agree with themselves
        shared = set()
    told = tuple({key: value for key, value in agreed[name].items() if key in shared} for name in names)
    return Labels(field, tuple(names), tuple(samples[name] for name in names), told)


def check_known(labels: Labels, split: Split) -> None:
    """Raises `UserError` where a sample of another split has a class that training has not."""
    found = [(split.key(number), fields) for number, fields in readable_fields(split)]
    labels.of([key for key, _ in found], [fields for _, fields in found], f"{split.folder}, split {split.name!r}")


def readable_fields(split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, fields) of each sample of a split whose JSON can be read."""
    for number in range(len(split)):
        with suppress(BadSample):
            yield number, split.fields(number)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
