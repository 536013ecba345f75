"""What one shard tells the shard doctor: its damage, and hashes by which samples of all shards are compared."""

import base64
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.data.images.looks import difference_hash
from clipdist.data.images.pillow import open_image, to_rgb
from clipdist.data.sets.duplicates import hashed
from clipdist.data.sets.tar_samples import index_tar
from clipdist.data.shard_index import MEMBERS
from clipdist.data.shards import BadSample, ShardFile, ShardInfo, checksum_file
from clipdist.errors import UserError

MAX_IMAGE_PIXELS = 89_478_485
# Findings of one kind that are kept of a shard, and in all; the counts are always exact.
LISTED_OF_SHARD, LISTED = 200, 10_000


@dataclass(frozen=True, slots=True)
class Finding:
    """`kind` is one of `verify.KINDS`; `where` names shard and key."""

    kind: str
    where: str
    what: str


class Findings:
    """Findings, counted by kind; of each kind at most `limit` are kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.counts: Counter[str] = Counter()
        self.listed: list[Finding] = []
        self._kept: Counter[str] = Counter()

    def add(self, kind: str, where: str, what: str) -> None:
        self.counts[kind] += 1
        self._keep(Finding(kind, where, what))

    def merge(self, counts: dict[str, int], listed: list[Finding]) -> None:
        self.counts.update(counts)
        for finding in listed:
            self._keep(finding)

    def is_full(self, kind: str) -> bool:
        """Whether another finding of this kind would be counted only."""
        return self._kept[kind] >= self.limit

    def _keep(self, finding: Finding) -> None:
        if self._kept[finding.kind] < self.limit:
            self._kept[finding.kind] += 1
            self.listed.append(finding)


def _no_hashes() -> np.ndarray:
    return np.zeros(0, np.uint64)


@dataclass
class Facts:
    """What one shard told. Arrays are uint64, one value per sample: hashes of keys; of units and of the images' bytes,
    0 where there is none; difference hashes of the pictures, 0 where nothing was decoded."""

    split: str
    file: str
    samples: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    listed: list[Finding] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=_no_hashes)
    units: np.ndarray = field(default_factory=_no_hashes)
    images: np.ndarray = field(default_factory=_no_hashes)
    looks: np.ndarray = field(default_factory=_no_hashes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; arrays in base 64, little endian."""
        body = {item.name: getattr(self, item.name) for item in fields(self)}
        arrays = {name: base64.b64encode(body[name].astype("<u8").tobytes()).decode() for name in ARRAYS}
        return body | arrays | {"listed": [asdict(finding) for finding in self.listed]}

    @staticmethod
    def from_dict(body: dict[str, Any]) -> "Facts":
        """The reverse; KeyError, TypeError or ValueError when it is not what `to_dict` made."""
        arrays = {name: np.frombuffer(base64.b64decode(body[name], validate=True), "<u8") for name in ARRAYS}
        if {len(array) for array in arrays.values()} != {body["samples"]}:
            raise ValueError("arrays of different lengths")
        return Facts(**body | arrays | {"listed": [Finding(**finding) for finding in body["listed"]]})


ARRAYS = ("keys", "units", "images", "looks")


def examine(folder: Path, split: str, info: ShardInfo, quick: bool = False) -> Facts:
    """Everything about one shard; `quick` decodes no image."""
    facts, findings, path = Facts(split, info.file), Findings(LISTED_OF_SHARD), folder / info.file
    try:
        shard = ShardFile(path)
        if shard.index.samples != info.samples:
            what = f"{shard.index.samples} samples in the index, {info.samples} in the manifest"
            findings.add("structure", info.file, what)
        found = _compare_with_archive(path, shard, findings)
        if found != info.xxh3_64:
            findings.add("checksum", info.file, f"found {found}, the manifest has {info.xxh3_64}")
    except (UserError, OSError) as error:
        findings.add("structure", info.file, str(error))
    else:
        _examine_samples(shard, facts, findings, quick)
        shard.close()
    facts.counts, facts.listed = dict(findings.counts), findings.listed
    return facts


def _compare_with_archive(path: Path, shard: ShardFile, findings: Findings) -> str:
    """Compares the index with what the archive itself says; the checksum of the file."""
    try:
        records, keys, checksum = index_tar(path)
    except UserError as error:
        findings.add("structure", path.name, str(error))
        return checksum_file(path)
    indexed = shard.index.records
    if len(keys) != len(indexed) or any(shard.index.key(row) != key for row, key in enumerate(keys)):
        what = f"the archive holds {len(keys)} samples that its index does not match"
        findings.add("structure", path.name, what)
        return checksum
    places = [f"{member}_{what}" for member in MEMBERS for what in ("offset", "size")]
    for name in (*places, "image_kind", "width", "height"):
        for row in np.flatnonzero(records[name] != indexed[name]):
            what = f"{name}: {indexed[name][row]} in the index, {records[name][row]} in the archive"
            findings.add("structure", f"{path.name}: {keys[row]}", what)
    return checksum


def _examine_samples(shard: ShardFile, facts: Facts, findings: Findings, quick: bool) -> None:
    facts.samples = shard.index.samples
    for name in ARRAYS:
        setattr(facts, name, np.zeros(facts.samples, np.uint64))
    for row in range(facts.samples):
        key = shard.index.key(row)
        facts.keys[row] = hashed(key.encode())
        try:
            sample = shard.read(row)
            if not sample.texts:
                findings.add("caption", f"{facts.file}: {key}", "missing or empty")
            if sample.fields.get("unit") is not None:
                facts.units[row] = hashed(str(sample.fields["unit"]).encode(errors="surrogatepass"))
            if not quick:
                facts.looks[row] = difference_hash(to_rgb(open_image(sample.image, MAX_IMAGE_PIXELS)))
            facts.images[row] = hashed(sample.image)
        except BadSample as error:
            findings.add(kind_of(error), f"{facts.file}: {key}", str(error))


def kind_of(error: BadSample) -> str:
    """What of a sample is damaged."""
    words = {"caption": "caption", "checksum": "checksum", "image": "image"}
    return next((kind for word, kind in words.items() if word in str(error)), "structure")
