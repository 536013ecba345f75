"""The shard doctor: what is damaged in a set, and what leaks between its splits.

Damage: a checksum, an index or an archive that does not hold, an image that does not decode, a missing caption, a key
used twice. Leaks: a unit, or a picture (equal bytes, or equal to the eye), on both sides of a split.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from clipdist.data.images.decode import open_image, to_rgb
from clipdist.data.sets.index import index_tar
from clipdist.data.shards import BadSample, ShardFile, ShardInfo, ShardSet, checksum_file
from clipdist.errors import UserError

logger = logging.getLogger(__name__)

# Bits in which two 64-bit difference hashes may differ and still count as one picture to the eye.
NEAR_BITS = 3
# A bucket of the near-duplicate search beyond this holds flat pictures whose hash says nothing.
MAX_BUCKET = 2000
MAX_IMAGE_PIXELS = 89_478_485


@dataclass(frozen=True)
class Finding:
    """`kind` is one of `KINDS`; `where` names shard and key."""

    kind: str
    where: str
    what: str


# kind: is it damage (True) or a leak between splits (False)
KINDS = {
    "checksum": True,
    "structure": True,
    "image": True,
    "caption": True,
    "duplicate key": True,
    "unit straddles": False,
    "duplicate image straddles": False,
    "near-duplicate image straddles": False,
}


@dataclass
class Facts:
    """What one shard told."""

    split: str
    findings: list[Finding] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    units: list[str | None] = field(default_factory=list)
    image_hashes: list[int] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)


@dataclass
class Diagnosis:
    samples: int
    shards: int
    findings: list[Finding]

    @property
    def damaged(self) -> bool:
        return any(KINDS[finding.kind] for finding in self.findings)

    def counts(self) -> dict[str, int]:
        return {kind: sum(finding.kind == kind for finding in self.findings) for kind in KINDS}

    def to_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "shards": self.shards,
            "damaged": self.damaged,
            "counts": self.counts(),
            "findings": [vars(finding) for finding in self.findings],
        }

    def summary(self, shown: int = 5) -> str:
        lines = [f"{self.samples:,} samples in {self.shards:,} shards"]
        for kind, number in self.counts().items():
            if number:
                lines.append(f"{'damage' if KINDS[kind] else 'leak'}: {kind}: {number:,}")
                some = [finding for finding in self.findings if finding.kind == kind][:shown]
                lines += [f"    {finding.where}: {finding.what}" for finding in some]
                lines += [f"    … and {number - shown:,} more"] if number > shown else []
        if len(lines) == 1:
            lines.append("sound: nothing damaged, nothing on both sides of a split")
        return "\n".join(lines)


def verify_set(
    folder: Path, *, workers: int = 2, shown: Callable[[Iterable[Facts], int], Iterable[Facts]] = lambda f, n: f
) -> Diagnosis:
    """Reads and decodes everything once. `shown` wraps the stream of shard results to report progress.

    Raises `UserError` when there is no manifest to compare with.
    """
    shard_set = ShardSet.open(folder)
    shards = [(split, info) for split, infos in shard_set.manifest.splits.items() for info in infos]
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            facts = list(shown(pool.map(examine, *_columns(folder, shards)), len(shards)))
    else:
        facts = list(shown(map(examine, *_columns(folder, shards)), len(shards)))
    findings = [finding for one in facts for finding in one.findings]
    findings += _twice(facts)
    findings += _straddling(facts)
    return Diagnosis(sum(len(one.keys) for one in facts), len(shards), findings)


def _columns(folder: Path, shards: list[tuple[str, ShardInfo]]) -> tuple[list[Path], list[str], list[ShardInfo]]:
    return [folder] * len(shards), [split for split, _ in shards], [info for _, info in shards]


def examine(folder: Path, split: str, info: ShardInfo) -> Facts:
    """Everything about one shard."""
    facts, path = Facts(split), folder / info.file
    try:
        if (found := checksum_file(path)) != info.xxh3_64:
            facts.findings.append(Finding("checksum", info.file, f"found {found}, the manifest has {info.xxh3_64}"))
        shard = ShardFile(path)
    except (UserError, OSError) as error:
        facts.findings.append(Finding("structure", info.file, str(error)))
        return facts
    if shard.index.samples != info.samples:
        what = f"{shard.index.samples} samples in the index, {info.samples} in the manifest"
        facts.findings.append(Finding("structure", info.file, what))
    if not shard.index.zstd:
        facts.findings += _index_faults(path, shard)
    for row in range(shard.index.samples):
        _examine_sample(shard, row, info.file, facts)
    return facts


def _index_faults(path: Path, shard: ShardFile) -> Iterator[Finding]:
    """Compares the index with what the archive itself says."""
    try:
        records, keys = index_tar(path)
    except UserError as error:
        yield Finding("structure", path.name, str(error))
        return
    indexed = [shard.index.key(row) for row in range(shard.index.samples)]
    if keys != indexed:
        yield Finding("structure", path.name, f"the archive holds {len(keys)} samples that its index does not match")
        return
    for name in ("image_offset", "image_size", "json_offset", "json_size", "text_offset", "text_size"):
        wrong = np.flatnonzero(records[name] != shard.index.records[name])
        if len(wrong):
            yield Finding("structure", f"{path.name}: {keys[wrong[0]]}", f"{name} differs from the archive")
            return


def _examine_sample(shard: ShardFile, row: int, file: str, facts: Facts) -> None:
    key, unit, digest, look = shard.index.key(row), None, 0, -1
    where = f"{file}: {key}"
    try:
        sample = shard.read(row)
        if not sample.texts:
            facts.findings.append(Finding("caption", where, "missing or empty"))
        unit = sample.fields.get("unit")
        digest = xxhash.xxh3_64_intdigest(sample.image)
        look = difference_hash(to_rgb(open_image(sample.image, MAX_IMAGE_PIXELS)))
    except BadSample as error:
        kind = "caption" if "caption" in str(error) else "image"
        facts.findings.append(Finding(kind, where, str(error)))
    facts.keys.append(key)
    facts.units.append(None if unit is None else str(unit))
    facts.image_hashes.append(digest)
    facts.looks.append(look)


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each of 8 × 8 grey cells is brighter than its left neighbour (the dHash of N. Krawetz, 2013)."""
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def _twice(facts: list[Facts]) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for one in facts:
        for key in one.keys:
            if key in seen:
                yield Finding("duplicate key", key, f"in {seen[key]} and in {one.split}")
            seen[key] = one.split


def _straddling(facts: list[Facts]) -> Iterator[Finding]:
    units: dict[str, set[str]] = defaultdict(set)
    images: dict[int, dict[str, str]] = defaultdict(dict)
    for one in facts:
        for key, unit, digest in zip(one.keys, one.units, one.image_hashes, strict=True):
            if unit is not None:
                units[unit].add(one.split)
            if digest:
                images[digest].setdefault(one.split, key)
    for unit, splits in units.items():
        if len(splits) > 1:
            yield Finding("unit straddles", unit, " and ".join(sorted(splits)))
    for holders in images.values():
        if len(holders) > 1:
            yield Finding("duplicate image straddles", *_pair(holders))
    yield from _near(facts)


def _pair(holders: dict[str, str]) -> tuple[str, str]:
    (split, key), *others = holders.items()
    return f"{split}: {key}", "same as " + ", ".join(f"{s}: {k}" for s, k in others)


def _near(facts: list[Facts]) -> Iterator[Finding]:
    """Pairs across splits whose hashes differ in at most `NEAR_BITS`: then one of four 16-bit parts is equal."""
    items = [
        (one.split, key, digest, look)
        for one in facts
        for key, digest, look in zip(one.keys, one.image_hashes, one.looks, strict=True)
        # Hashes of nearly one value come from flat pictures and say nothing.
        if look >= 0 and 6 <= look.bit_count() <= 58
    ]
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (_, _, _, look) in enumerate(items):
        for part in range(4):
            buckets[part, look >> 16 * part & 0xFFFF].append(number)
    reported: set[tuple[int, int]] = set()
    for members in buckets.values():
        if len(members) > MAX_BUCKET:
            logger.warning("near-duplicate search: %d pictures look too much alike to be compared", len(members))
            continue
        for first, second in combinations(members, 2):
            a, b = items[first], items[second]
            if a[0] == b[0] or a[2] == b[2] or (first, second) in reported:
                continue
            if (a[3] ^ b[3]).bit_count() <= NEAR_BITS:
                reported.add((first, second))
                yield Finding("near-duplicate image straddles", f"{a[0]}: {a[1]}", f"looks like {b[0]}: {b[1]}")
