"""One shard set out of another: other shards, other images, fewer samples, another order, other splits."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.data.images.looks import LOOK
from clipdist.data.sets.duplicates import cut_short_warning, find_duplicates, first_of_equal
from clipdist.data.sets.pack import (
    SPLIT_NAME,
    PackSummary,
    Pair,
    Refused,
    Rejected,
    Tally,
    available_cores,
    in_order,
    needed,
)
from clipdist.data.sets.recode import ImageOptions
from clipdist.data.sets.repack_samples import Choice, Dedupe, Row, opened_shard, survey, take
from clipdist.data.sets.source import opened_source
from clipdist.data.sets.writer import ShardSetWriter, UnusableSample
from clipdist.data.shards import ShardInfo, ShardSet, checksum_file
from clipdist.errors import UserError, disk_errors
from clipdist.progress import progress


class _Rows:
    """The samples of the chosen splits, numbered in order."""

    def __init__(self, source: ShardSet, splits: dict[str, str]) -> None:
        self.folder = source.folder
        self.shards = [(split, info) for split in splits for info in source.manifest.splits[split]]
        self.ends = np.cumsum([info.samples for _, info in self.shards], dtype=np.int64)
        self.names = list(dict.fromkeys(splits.values()))
        codes = [self.names.index(splits[split]) for split, _ in self.shards]
        self.split_of = np.repeat(np.array(codes, np.int32), [info.samples for _, info in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def info(self, number: int) -> tuple[ShardInfo, int]:
        shard = int(np.searchsorted(self.ends, number, side="right"))
        info = self.shards[shard][1]
        return info, int(number) - int(self.ends[shard]) + info.samples

    def row(self, number: int) -> Row:
        info, place = self.info(number)
        return Row(str(self.folder / info.file), place)

    def key(self, number: int) -> str:
        row = self.row(number)
        return opened_shard(row.path).index.key(row.place)

    def rejected(self, number: int, reason: str) -> Rejected:
        return Rejected(int(number) + 1, self.key(number), self.info(number)[0].file, reason)


class _Numbers(Sequence[Row]):
    """The rows of an array of numbers, made only when they are asked for."""

    def __init__(self, rows: _Rows, numbers: np.ndarray) -> None:
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: Any) -> Any:
        found = self.numbers[at]
        return [self.rows.row(number) for number in found] if isinstance(at, slice) else self.rows.row(found)


@dataclass
class RepackSummary:
    """`left_out`: how many samples each condition took away; `cut_short`: how many pictures were not compared with all
    that look like them."""

    packed: PackSummary
    left_out: dict[str, int] = field(default_factory=dict)
    cut_short: int = 0

    def __str__(self) -> str:
        lines = str(self.packed).splitlines()
        out = [f"left out: {number:,} for {reason}" for reason, number in self.left_out.items() if number]
        out += cut_short_warning(self.cut_short, "copies of them may be left")
        return "\n".join([*lines[:-1], *out, lines[-1]])


@dataclass
class _Plan:
    """`numbers`: rows of the source in the order of writing; `splits`: the split of each, by its place in `names`."""

    names: list[str]
    numbers: np.ndarray
    splits: np.ndarray
    left_out: dict[str, int]
    bad: list[Rejected]
    duplicates: list[Rejected]
    cut_short: int = 0


def _plan(rows: _Rows, choice: Choice, workers: int, quiet: bool) -> _Plan:
    count = len(rows)
    plan = _Plan(rows.names, np.arange(count), rows.split_of, {}, [], [])
    if choice.needs_survey:
        columns = {name: np.zeros(count, np.uint64) for name in ("digest", "unit", "label")}
        looks = np.zeros(count if choice.dedupe == "near" else 0, LOOK)
        kept = np.zeros(count, bool)
        found = in_order(partial(survey, choice=choice), _Numbers(rows, plan.numbers), workers)
        with closing(found):
            for number, one in enumerate(
                progress(found, total=count, unit="pair", description="choosing", quiet=quiet)
            ):
                kept[number] = not one.out
                if one.bad:
                    _note_bad(rows, number, one.out, choice, plan.bad)
                elif one.out:
                    plan.left_out[one.out] = plan.left_out.get(one.out, 0) + 1
                for name, column in columns.items():
                    column[number] = getattr(one, name)
                if one.look is not None:
                    looks[number] = one.look
        plan.numbers = np.flatnonzero(kept)
        if choice.dedupe:
            _drop_duplicates(rows, choice.dedupe, plan, columns["digest"], looks)
        plan.splits = rows.split_of[plan.numbers]
        if choice.fractions:
            _divide(choice, choice.fractions, plan, columns)
    if choice.split_table:
        _assign(rows, Path(choice.split_table), plan)
    if choice.shuffle is not None:
        shuffled = np.random.default_rng(choice.shuffle).permutation(len(plan.numbers))
        plan.numbers, plan.splits = plan.numbers[shuffled], plan.splits[shuffled]
    by_split = np.argsort(plan.splits, kind="stable")
    plan.numbers, plan.splits = plan.numbers[by_split], plan.splits[by_split]
    return plan


def _note_bad(rows: _Rows, number: int, reason: str, choice: Choice, bad: list[Rejected]) -> None:
    rejected = rows.rejected(number, reason)
    if not choice.drop_bad:
        raise UserError(
            f"{rejected.image}: sample {rejected.key!r} cannot be used: {reason}; restore it, or pass --drop-bad to "
            f"leave such samples out"
        )
    bad.append(rejected)


def _drop_duplicates(rows: _Rows, dedupe: Dedupe, plan: _Plan, digests: np.ndarray, looks: np.ndarray) -> None:
    digests = digests[plan.numbers]
    if dedupe == "near":
        found = find_duplicates(digests, looks[plan.numbers])
        first, plan.cut_short = found.keep_first(), found.cut_short
    else:
        first = first_of_equal(digests)
    gone = np.flatnonzero(first != np.arange(len(first)))
    for place in gone:
        kept = rows.row(plan.numbers[first[place]])
        how = "same picture as" if digests[place] == digests[first[place]] else "looks like"
        reason = f"{how} {opened_shard(kept.path).index.key(kept.place)}"
        plan.duplicates.append(rows.rejected(plan.numbers[place], reason))
    plan.left_out[f"--dedupe {dedupe}"] = len(gone)
    plan.numbers = np.delete(plan.numbers, gone)


def _divide(choice: Choice, fractions: dict[str, float], plan: _Plan, columns: dict[str, np.ndarray]) -> None:
    from clipdist.prepare.splits import split_by  # brings scikit-learn, which takes seconds

    units, labels = (columns[name][plan.numbers] for name in ("unit", "label"))
    # Whoever has no unit is one; small numbers are kept apart from hashes by standing beyond their codes.
    codes = np.unique(units, return_inverse=True)[1].astype(np.int64)
    codes[units == 0] = len(codes) + np.flatnonzero(units == 0)
    if not len(codes):
        raise UserError("split: no sample is left to divide; loosen --where, --min-side or --dedupe")
    names = split_by(labels if labels.any() else None, codes, fractions, choice.seed)
    plan.names = list(fractions)
    plan.splits = np.array([plan.names.index(name) for name in names.tolist()], np.int32)


def _assign(rows: _Rows, table: Path, plan: _Plan) -> None:
    """The splits that a table names; samples that it does not name are left out."""
    from clipdist.data.sets.tables import check_columns, read_table  # brings pandas

    read = read_table(table)
    check_columns(read, ["key", "split"], str(table))
    read = read.dropna(subset=["key", "split"])
    split_of = dict(zip(read["key"].astype(str).tolist(), read["split"].astype(str).tolist(), strict=True))
    if len(split_of) < len(read):
        raise UserError(f"{table}: {len(read) - len(split_of):,} keys come more than once; expected each once")
    plan.names = list(dict.fromkeys(split_of.values()))
    for name in plan.names:
        if not SPLIT_NAME.fullmatch(name):
            raise UserError(f"{table}: found the split {name!r}, expected letters, digits, _ and -")
    keys = [rows.key(number) for number in range(len(rows))]
    if unknown := split_of.keys() - set(keys):
        raise UserError(
            f"{table}: {len(unknown):,} of {len(split_of):,} keys, such as {min(unknown)!r}, are not in {rows.folder}; "
            f"expected a table made of this set"
        )
    number_of = {name: number for number, name in enumerate(plan.names)}
    codes = np.array([number_of.get(split_of.get(keys[number], ""), -1) for number in plan.numbers], np.int32)
    plan.left_out[f"--split-table {table}"] = int((codes < 0).sum())
    plan.numbers, plan.splits = plan.numbers[codes >= 0], codes[codes >= 0]


def repack(
    source: Path,
    folder: Path,
    choice: Choice | None = None,
    *,
    images: ImageOptions | None = None,
    samples_per_shard: int = 1000,
    shard_mib: float | None = None,
    zstd: bool | None = None,
    workers: int | None = None,
    max_rejected_fraction: float = 0.05,
    command: list[str] | None = None,
    notes: dict[str, Any] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> RepackSummary:
    """Writes the samples of `source` into `folder` as a new shard set; the same bytes for any number of workers.

    `source` is a shard set, or a folder of tars. Keys, fields and captions stay, but numbers that are not finite, which
    JSON has none of, become null; images that need neither another size nor format keep their bytes. `zstd=None` keeps
    what the source has. What is damaged stops the run, or with `choice.drop_bad` is listed in `folder/rejected.csv`, as
    are duplicates. `notes` are added to those of the manifest. Raises `UserError`, and leaves no manifest, when nothing
    is left, when more than `max_rejected_fraction` is damaged, and when the disk is full.
    """
    choice, images = choice or Choice(), images or ImageOptions()
    if folder.exists() and (not folder.is_dir() or folder.samefile(source)):
        raise UserError(f"{folder}: is {'the source' if folder.is_dir() else 'a file'}; choose another folder")
    with opened_source(source, folder) as (opened, unread), _shards_closed():
        splits = _chosen(opened, choice)
        rows = _Rows(opened, splits)
        workers = available_cores() if workers is None else workers
        surveyors = workers if choice.dedupe == "near" else 0
        if unread and not choice.drop_bad:
            file, key, reason = unread[0]
            raise UserError(
                f"{file}: sample {key!r} cannot be used: {reason}; pass --drop-bad to leave such samples out"
            )
        plan = _plan(rows, choice, surveyors, quiet)
        plan.bad += [Rejected(None, key, file, reason) for file, key, reason in unread]
        writer = ShardSetWriter(
            folder,
            samples_per_shard=samples_per_shard,
            shard_mib=shard_mib,
            zstd=_is_zstd(rows) if zstd is None else zstd,
            license_text=opened.manifest.license,
            command=command,
            sources={source.resolve().name: opened.manifest.digest, **_checksum_of(choice.split_table)},
            notes={
                **(notes or {}),
                "source": {"digest": opened.manifest.digest, "notes": opened.manifest.notes},
                "operations": choice.operations(),
                "images": asdict(images),
            },
            overwrite=overwrite,
        )
        refused = Refused(folder, plan.bad, max_rejected_fraction)
        refused.total = len(rows) + len(unread)
        packed = _write(writer, rows, plan, choice, images, refused, workers if images.decodes else 0, quiet)
    return RepackSummary(packed, plan.left_out, plan.cut_short)


@contextmanager
def _shards_closed() -> Iterator[None]:
    """Shards opened by this process are closed in the end: the next call may find others under their names."""
    try:
        yield
    finally:
        opened_shard.cache_clear()


def _chosen(source: ShardSet, choice: Choice) -> dict[str, str]:
    splits = choice.splits or {name: name for name in source.manifest.splits}
    for name in splits:
        source.split(name)  # names the ones there are
    return splits


def _checksum_of(table: str) -> dict[str, str]:
    return {Path(table).name: checksum_file(Path(table))} if table else {}


def _is_zstd(rows: _Rows) -> bool:
    return bool(rows.shards) and rows.shards[0][1].file.endswith(".zst")


def _write(
    writer: ShardSetWriter,
    rows: _Rows,
    plan: _Plan,
    choice: Choice,
    images: ImageOptions,
    refused: Refused,
    workers: int,
    quiet: bool,
) -> PackSummary:
    folder, total = writer.folder, len(plan.numbers)
    tally = Tally(dict.fromkeys(plan.names, 0))
    results = in_order(partial(take, options=images), _Numbers(rows, plan.numbers), workers)
    with disk_errors(folder, lambda: needed(tally.total, total, tally.bytes)), writer, closing(results):
        refused.check()
        shown = progress(results, total=total, unit="pair", description=f"packing {folder.name}", quiet=quiet)
        for number, code, one in zip(plan.numbers, plan.splits, shown, strict=True):
            if one.fault:
                _note_bad(rows, int(number), one.fault, choice, refused.found)
                refused.check()
                continue
            split, text = plan.names[code], one.texts[0] if len(one.texts) == 1 else list(one.texts)
            try:
                writer.write(split, one.key, one.image, one.extension, {**(one.fields or {}), "text": text})
            except UnusableSample as error:
                _note_bad(rows, int(number), str(error), choice, refused.found)
                refused.check()
                continue
            tally.add(split, Pair(one.key, b"", [], one.fields or {}), len(one.image))
        if not tally.total:
            refused.fail("nothing is left to be written")
        damaged = len(refused.found)
        refused.found += plan.duplicates
        refused.save()
        writer.manifest.notes |= {"rejected": damaged, "left_out": plan.left_out, "cut_short": plan.cut_short}
    shards = {name: len(writer.manifest.splits.get(name, [])) for name in plan.names}
    written = sum(shard.bytes for found in writer.manifest.splits.values() for shard in found)
    return PackSummary(folder, tally.samples, shards, written, tally.units(), tally.straddling(), refused.found)
