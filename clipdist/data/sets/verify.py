"""The shard doctor: what is damaged in a set, what leaks between its splits, and what is in it twice.

Damage: a checksum, an index or an archive that does not hold, an image that does not decode, a missing caption, a key
used twice. Leaks: a unit, or a picture (equal bytes, or equal to the eye), on both sides of a split. Notes: pictures
that a split holds more than once. Of pictures whose hashes are near, a closer look decides, as in `clipdist audit`.

What each shard told is appended to a state file as soon as it is known, so that the next run examines only shards that
are new, changed or unfinished. Of each sample 32 bytes are held, whatever the size of the set.
"""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipdist.data.images.looks import LOOK, look_of
from clipdist.data.sets.duplicates import groups_of_equal, search_near
from clipdist.data.sets.each_shard import Rows, ask_each, stamp, state_path
from clipdist.data.sets.examine import LISTED, Facts, Finding, Findings, examine
from clipdist.data.sets.survey import see
from clipdist.data.shards import BadSample, ShardInfo, ShardSet
from clipdist.errors import UserError, disk_errors

STATE = ".verify.jsonl"
STATE_VERSION = 1

Severity = Literal["damage", "leak", "note"]
KINDS: dict[str, Severity] = {
    "checksum": "damage",
    "structure": "damage",
    "image": "damage",
    "caption": "damage",
    "duplicate key": "damage",
    "unit straddles": "leak",
    "duplicate image straddles": "leak",
    "near-duplicate image straddles": "leak",
    "duplicate image": "note",
    "near-duplicate image": "note",
    "too many look alike": "note",
}

Shown = Callable[[Iterable[Facts], int], Iterable[Facts]]


@dataclass
class Diagnosis:
    """What was found. `listed` holds at most 10,000 findings of a kind, 200 of a kind and shard; counts are exact.
    `resumed` shards had been examined by an earlier run."""

    samples: int
    shards: int
    found: dict[str, int]
    listed: list[Finding]
    resumed: int = 0
    quick: bool = False

    @property
    def damaged(self) -> bool:
        return any(KINDS[kind] == "damage" for kind, number in self.counts().items() if number)

    def counts(self) -> dict[str, int]:
        return {kind: self.found.get(kind, 0) for kind in KINDS}

    def to_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "shards": self.shards,
            "quick": self.quick,
            "damaged": self.damaged,
            "counts": self.counts(),
            "severity": KINDS,
            "findings": [asdict(finding) for finding in self.listed],
        }

    def summary(self, shown: int = 5) -> str:
        examined = " (structure and checksums only)" if self.quick else ""
        lines = [f"{self.samples:,} samples in {self.shards:,} shards{examined}"]
        for kind, number in self.counts().items():
            if number:
                lines.append(f"{KINDS[kind]}: {kind}: {number:,}")
                some = [finding for finding in self.listed if finding.kind == kind][:shown]
                lines += [f"    {finding.where}: {finding.what}" for finding in some]
                lines += [f"    … and {number - len(some):,} more"] if number > len(some) else []
        if all(KINDS[kind] == "note" for kind, number in self.counts().items() if number):
            lines.append("sound: nothing damaged, nothing on both sides of a split")
        return "\n".join(lines)


def verify_set(
    folder: Path,
    *,
    workers: int = 2,
    quick: bool = False,
    state: Path | None = None,
    again: bool = False,
    shown: Shown = lambda facts, total: facts,
) -> Diagnosis:
    """Reads and decodes everything once; `quick` leaves out decoding, and with it damaged images and looks-alike.

    Shards whose results stand in the state file, and that are unchanged since, are not read; `again` examines them
    too. `state` is by default `.verify.jsonl` in the folder, or lies in the user's cache folder when the set cannot be
    written to. `shown` wraps the stream of results, with their number, to report progress. Raises `UserError` when
    there is no manifest to compare with, and when a worker process is killed; what was done is kept.
    """
    shard_set = ShardSet.open(folder)
    shards = [(split, info) for split, infos in shard_set.manifest.splits.items() for info in infos]
    path = state_path(folder, STATE) if state is None else state
    facts = {} if again else _resumed(path, folder, shards, quick)
    resumed = len(facts)
    left = [shard for shard in shards if shard[1].file not in facts]
    infos = {info.file: info for _, info in left}
    with _State(path, folder) as results:
        asked = ask_each(folder, left, examine, quick, workers=workers, total=len(shards))
        for one in shown(asked, len(left)):
            facts[one.file] = one
            results.append(one, infos[one.file], quick)
    in_order = [facts[info.file] for _, info in shards]
    findings = _compared(folder, in_order, quick)
    samples = sum(one.samples for one in in_order)
    return Diagnosis(samples, len(shards), dict(findings.counts), findings.listed, resumed, quick)


# The state file: one line of JSON for each shard.


def _resumed(path: Path, folder: Path, shards: list[tuple[str, ShardInfo]], quick: bool) -> dict[str, Facts]:
    """Results of shards that are what they were; a full examination serves a quick one, not the other way round."""
    stamps = {info.file: stamp(folder, split, info, STATE_VERSION) for split, info in shards}
    found: dict[str, Facts] = {}
    try:
        with open(path, "rb") as lines:
            for line in lines:
                # A line that an interrupt cut short, or that two runs wrote into each other, is no result.
                try:
                    body = json.loads(line)
                    facts = Facts.from_dict(body["facts"])
                    tied, was_quick = body["stamp"], body["quick"]
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
                if stamps.get(facts.file) == tied and (quick or not was_quick):
                    found[facts.file] = facts
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name another file with --state") from None
    return found


class _State:
    """The state file, open for appending."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder

    def __enter__(self) -> "_State":
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab+", buffering=0)
            if self._file.seek(0, os.SEEK_END):
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":
                    self._file.write(b"\n")
        return self

    def append(self, facts: Facts, info: ShardInfo, quick: bool) -> None:
        tied = stamp(self.folder, facts.split, info, STATE_VERSION)
        if tied is not None:
            body = {"stamp": tied, "quick": quick, "facts": facts.to_dict()}
            with disk_errors(self.path):
                self._file.write(json.dumps(body, ensure_ascii=False).encode(errors="surrogateescape") + b"\n")

    def __exit__(self, *_: object) -> None:
        self._file.close()


# What samples of all shards are compared by.


class _Rows(Rows):
    """All samples of a set, with what the shards told of them."""

    def __init__(self, folder: Path, facts: list[Facts]) -> None:
        super().__init__(folder, [(one.split, one.file, one.samples) for one in facts])
        self.facts = facts

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(one, name) for one in self.facts]) if self.facts else np.zeros(0, np.uint64)

    def unit(self, row: int) -> str:
        try:
            return str(self.read(row).fields["unit"])
        except (BadSample, KeyError):  # its picture is damaged, or it was exchanged while this runs
            return f"unit of {self.key(row)}"


def _compared(folder: Path, facts: list[Facts], quick: bool) -> Findings:
    """The findings of all shards, and those that show only when they are compared."""
    findings = Findings(LISTED)
    for one in facts:
        findings.merge(one.counts, one.listed)
    rows = _Rows(folder, facts)
    for group in groups_of_equal(rows.column("keys")):
        _add_equal_keys(findings, rows, group)
    for group in groups_of_equal(rows.column("units")):
        splits = np.unique(rows.split_of[group])
        if len(splits) > 1:
            names = " and ".join(sorted(rows.splits[split] for split in splits))
            findings.add("unit straddles", _if_listed(findings, "unit straddles", rows.unit, int(group[0])), names)
    images = rows.column("images")
    for group in groups_of_equal(images):
        _add_equal_images(findings, rows, group)
    if not quick:
        _add_near(findings, rows, images)
    return findings


def _if_listed(findings: Findings, kind: str, name: Callable[[int], str], row: int) -> str:
    """A sample's name, read from its shard only when the finding will be kept."""
    return "" if findings.is_full(kind) else name(int(row))


def _add_equal_keys(findings: Findings, rows: _Rows, group: np.ndarray) -> None:
    first = int(group[0])
    for row in group[1:]:
        key = _if_listed(findings, "duplicate key", rows.key, row)
        splits = rows.splits[rows.split_of[first]], rows.splits[rows.split_of[row]]
        findings.add("duplicate key", key, f"in {splits[0]} and in {splits[1]}")


def _add_equal_images(findings: Findings, rows: _Rows, group: np.ndarray) -> None:
    """One finding when the picture lies in several splits, and one for each split that holds it more than once."""
    splits, first = np.unique(rows.split_of[group], return_index=True)
    if len(splits) > 1:
        kind = "duplicate image straddles"
        places = [_if_listed(findings, kind, rows.place, row) for row in np.sort(group[first])]
        findings.add(kind, places[0], "same as " + ", ".join(places[1:]))
    for split in splits if len(splits) < len(group) else []:
        held = group[rows.split_of[group] == split]
        if len(held) > 1:
            others = f" and {len(held) - 2} more" if len(held) > 2 else ""
            places = [_if_listed(findings, "duplicate image", rows.place, row) for row in held[:2]]
            findings.add("duplicate image", places[0], f"same as {places[1]}{others}")


def _add_near(findings: Findings, rows: _Rows, images: np.ndarray) -> None:
    def look(chosen: np.ndarray) -> np.ndarray:
        looks = np.zeros(len(chosen), LOOK)
        for place, row in enumerate(chosen.tolist()):
            with suppress(BadSample):  # exchanged while this runs: it looks like nothing
                looks[place] = look_of(see(rows.read(row).image))
        return looks

    found = search_near(rows.column("looks"), images, rows.split_of, look)
    for kind, earlier in (("near-duplicate image straddles", found.across), ("near-duplicate image", found.within)):
        for row in np.flatnonzero(earlier < len(earlier)):
            places = [_if_listed(findings, kind, rows.place, int(one)) for one in (row, earlier[row])]
            findings.add(kind, places[0], f"looks like {places[1]}")
    if found.cut_short:
        what = f"{found.cut_short:,} pictures look like so many others that some pairs were not compared"
        findings.add("too many look alike", "near-duplicate search", what)
