"""Tables of Google Landmarks v2, read in blocks: train.csv alone has 4.1 million rows.

An id of 16 hexadecimal digits is held as the number that it writes, uint64, so that millions are joined by sorting.
"""

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from clipdist.data.sets.pack import Rejected
from clipdist.data.sets.tables import check_columns, read_table
from clipdist.errors import UserError

ID = re.compile(r"[0-9a-f]{16}")
ID_DIGITS = 16
LANDMARK = r"^[0-9]{1,9}$"
BLOCK_BYTES = 1 << 20  # more than any row; eight times as much takes 350 MiB more memory and no less time
# Beyond so many faulty rows a table is another one than it is taken for, if they are most of what was read.
MANY_FAULTS = 10_000
NEVER = 255
_DIGITS = np.full(256, NEVER, np.uint8)
_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)

Ids = npt.NDArray[np.uint64]


@dataclass
class TrainTable:
    """The sound rows of train.csv that were wanted, R of them, in its order; the first below the header is row 1.

    `rows` counts all sound rows, `absent` those of them that were not wanted. `named`, ascending, are the wanted ids
    that any row names, a rejected one, too. `other_ids`, `other_rows`: the sound rows that were not wanted, where they
    were asked for.
    """

    ids_R: Ids
    landmarks_R: npt.NDArray[np.int64]
    rows_R: npt.NDArray[np.int64]
    urls_R: npt.NDArray[np.object_]
    rows: int
    absent: int
    named: Ids
    rejected: list[Rejected]
    other_ids: Ids
    other_rows: npt.NDArray[np.int64]


def id_text(number: int | np.uint64) -> str:
    return f"{int(number):0{ID_DIGITS}x}"


def ids_of(column: pa.Array) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """(uint64 [N], bool [N]: which are 16 hexadecimal digits, the others being 0) of an array of strings."""
    column = pc.fill_null(column.cast(pa.large_string()), "")
    offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)
    sound = np.diff(offsets) == ID_DIGITS
    digits = _DIGITS[data[offsets[:-1][sound][:, None] + np.arange(ID_DIGITS)]]
    good = (digits != NEVER).all(1)
    values = np.zeros(len(digits), np.uint64)
    for place in range(ID_DIGITS):
        values = (values << np.uint64(4)) | (digits[:, place] & np.uint8(15)).astype(np.uint64)
    found = np.zeros(len(column), np.uint64)
    sound[sound] = good
    found[sound] = values[good]
    return found, sound


def places_in(wanted: np.ndarray, among: np.ndarray) -> npt.NDArray[np.int64]:
    """int64 [N]: where in `among`, ascending, each of `wanted` lies; -1 for none."""
    if not len(among):
        return np.full(len(wanted), -1)
    places = np.minimum(np.searchsorted(among, wanted), len(among) - 1)
    return np.where(among[places] == wanted, places, -1)


def read_train(path: Path, wanted_W: Ids, *, others: bool = False) -> TrainTable:
    """The rows of train.csv whose ids are in `wanted_W`, ascending; of the `others` their ids, if these are asked for.

    Rejected: rows with another number of cells, an id that is none, a landmark that is no number; among the wanted, an
    id's second row and, where its rows name several landmarks, all of them, since none is likelier than the others.
    Raises `UserError` when there is no such table, or it has other columns.
    """
    kept: dict[str, list[np.ndarray]] = {
        name: [] for name in ("ids", "landmarks", "rows", "urls", "named", "others", "at")
    }
    rejected: list[Rejected] = []
    count = absent = 0
    for rows, batch in _blocks(path, ("id", "url", "landmark_id"), rejected):
        found, sound = ids_of(batch["id"])
        numbers = pc.fill_null(batch["landmark_id"], "")
        numeric = pc.match_substring_regex(numbers, LANDMARK).to_numpy(zero_copy_only=False)
        good = sound & numeric
        for place in np.flatnonzero(~good).tolist():
            row, what = int(rows[place]), f"landmark_id {numbers[place].as_py()!r}, expected a number"
            named = Rejected(row, str(batch["id"][place]), "", what)
            rejected.append(named if sound[place] else _no_id(row, batch["id"][place]))
        count += int(good.sum())
        if len(rejected) > max(MANY_FAULTS, count):
            raise UserError(
                f"{path}: {len(rejected):,} faulty rows beside {count:,} sound ones so far ({rejected[0]}); expected "
                f"the train.csv of version 2"
            )
        wanted = places_in(found, wanted_W) >= 0
        absent += int((good & ~wanted).sum())
        own = np.flatnonzero(good & wanted)
        kept["named"].append(found[sound & wanted])
        some = batch.take(pa.array(own))
        kept["ids"].append(found[own])
        kept["landmarks"].append(some["landmark_id"].cast(pa.int64()).to_numpy())
        kept["rows"].append(rows[own])
        kept["urls"].append(some["url"].to_numpy(zero_copy_only=False).astype(object))
        if others:
            rest = np.flatnonzero(good & ~wanted)
            kept["others"].append(found[rest])
            kept["at"].append(rows[rest])
    if not count and not rejected:
        raise UserError(f"{path}: the table has no rows")
    kinds = {"ids": np.uint64, "named": np.uint64, "others": np.uint64, "urls": object}
    columns = {name: np.concatenate([np.zeros(0, kinds.get(name, np.int64)), *parts]) for name, parts in kept.items()}
    once = _each_id_once(columns["ids"], columns["landmarks"], columns["rows"], rejected)
    return TrainTable(
        columns["ids"][once],
        columns["landmarks"][once],
        columns["rows"][once],
        columns["urls"][once],
        rows=count,
        absent=absent,
        named=np.unique(columns["named"]),
        rejected=rejected,
        other_ids=columns["others"],
        other_rows=columns["at"],
    )


def _each_id_once(ids: Ids, landmarks: np.ndarray, rows: np.ndarray, rejected: list[Rejected]) -> npt.NDArray[np.bool_]:
    """bool [R]: which rows stay; the others go to `rejected`."""
    kept = np.ones(len(ids), bool)
    order = np.argsort(ids, kind="stable")
    _, starts, counts = np.unique(ids[order], return_index=True, return_counts=True)
    for start, times in zip(starts[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        held = order[start : start + times]
        named = dict.fromkeys(landmarks[held].tolist())
        reason = f"its rows name the landmarks {', '.join(map(str, named))}"
        if len(named) == 1:
            held, reason = held[1:], f"row {rows[held[0]]} has the same id"
        kept[held] = False
        rejected += [Rejected(int(rows[at]), id_text(ids[at]), "", reason) for at in held]
    return kept


def read_clean(path: Path) -> tuple[Ids, npt.NDArray[np.int64]]:
    """(ids, ascending; the landmark of each) of train_clean.csv: `landmark_id` and `images`, parted by spaces."""
    ids, landmarks = [], []
    rejected: list[Rejected] = []
    for rows, batch in _blocks(path, ("landmark_id", "images"), rejected):
        lists = pc.split_pattern(pc.fill_null(batch["images"], ""), " ")
        found, sound = ids_of(lists.flatten())
        numeric = pc.match_substring_regex(pc.fill_null(batch["landmark_id"], ""), LANDMARK)
        if not sound.all() or not pc.all(numeric).as_py():
            bad = int(pc.list_parent_indices(lists)[int(np.argmin(sound))].as_py()) if not sound.all() else 0
            raise UserError(
                f"{path}: about row {rows[bad]}: expected a landmark's number, and ids of {ID_DIGITS} hexadecimal "
                f"digits parted by single spaces"
            )
        ids.append(found)
        landmarks.append(np.repeat(batch["landmark_id"].cast(pa.int64()).to_numpy(), pc.list_value_length(lists)))
    if rejected or not ids:
        raise UserError(f"{path}: {rejected[0] if rejected else 'the table has no rows'}; fetch it again")
    all_ids = np.concatenate(ids)
    order = np.argsort(all_ids, kind="stable")
    return all_ids[order], np.concatenate(landmarks)[order]


def read_attribution(path: Path, wanted_W: Ids) -> tuple[dict[int, dict[str, str]], list[Rejected]]:
    """(id -> `author` and `license`, as far as they are told, of train_attribution.csv's rows of `wanted_W`, ascending,
    of several rows the first; rows with another number of cells, or an id that is none)."""
    found: dict[int, dict[str, str]] = {}
    rejected: list[Rejected] = []
    for rows, batch in _blocks(path, ("id", "author", "license"), rejected):
        ids, sound = ids_of(batch["id"])
        for place in np.flatnonzero(~sound).tolist():
            rejected.append(_no_id(int(rows[place]), batch["id"][place]))
        own = np.flatnonzero(sound & (places_in(ids, wanted_W) >= 0))
        told = batch.take(pa.array(own)).select(["author", "license"]).to_pylist()
        for number, one in zip(ids[own].tolist(), told, strict=True):
            found.setdefault(number, {name: value for name, value in one.items() if value})
    return found, rejected


def _no_id(row: int, cell: pa.Scalar) -> Rejected:
    name = str(cell.as_py() or "")[:40]
    return Rejected(row, name, "", f"id {name!r}, expected {ID_DIGITS} hexadecimal digits")


def read_names(path: Path) -> tuple[dict[int, str], dict[int, str], list[Rejected]]:
    """(landmark -> friendly name, landmark -> category, rejected rows) of train_label_to_category.csv.

    The name is what follows `Category:` in the URL, decoded, underscores being spaces. A name that several landmarks
    share gets the landmark's number: `Castle (17)`. So names are unique, and depend on this table alone, whatever part
    of the set is packed.
    """
    table = read_table(path)
    check_columns(table, ["landmark_id", "category"], str(path))
    categories: dict[int, str] = {}
    rejected = []
    columns = (table.index, table["landmark_id"], table["category"].fillna(""))
    for row, landmark, category in zip(*(column.tolist() for column in columns), strict=True):
        reason = "" if re.fullmatch(LANDMARK, str(landmark)) else f"landmark_id {landmark!r}, expected a number"
        if not reason and not friendly(category):
            reason = f"category {category!r}, expected a URL with Category:"
        if not reason and int(landmark) in categories:
            reason = f"landmark {landmark} has the category {categories[int(landmark)]!r} already"
        if reason:
            rejected.append(Rejected(row, str(landmark), path.name, reason))
        else:
            categories[int(landmark)] = category
    return (
        unique_names({landmark: friendly(category) for landmark, category in categories.items()}),
        categories,
        rejected,
    )


def friendly(category: str) -> str:
    """`http://commons.wikimedia.org/wiki/Category:Mus%C3%A9e_d%27Orsay` -> `Musée d'Orsay`; "" for no category."""
    _, found, name = category.rpartition("Category:")
    return " ".join(unicodedata.normalize("NFC", unquote(name)).replace("_", " ").split()) if found else ""


def unique_names(names: dict[int, str]) -> dict[int, str]:
    """The same names, but for those that several landmarks share, which get the landmark's number."""
    count = Counter(names.values())
    taken = {name for name, times in count.items() if times == 1}
    found = {}
    for landmark, name in names.items():
        if count[name] > 1:
            name = f"{name} ({landmark})"
            while name in taken:  # another landmark's own name
                name += "'"
            taken.add(name)
        found[landmark] = name
    return found


def _blocks(
    path: Path, columns: Sequence[str], rejected: list[Rejected]
) -> Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]]:
    """(numbers of its rows, block) of a CSV with at least these columns, as strings. Rows with another number of cells
    go to `rejected`."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such table")
    _check_header(path, columns)
    faulty: list[int] = []

    def note(row: pa.csv.InvalidRow) -> str:
        number = (row.number or 2) - 1
        faulty.append(number)
        what = f"{row.actual_columns} cells, expected {row.expected_columns}"
        rejected.append(Rejected(number, "", (row.text or "")[:80], what))
        return "skip"

    sound = 0
    try:
        # One thread: only then it knows the numbers of faulty rows. Titles may hold line breaks.
        reader = pa.csv.open_csv(
            path,
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
            parse_options=pa.csv.ParseOptions(invalid_row_handler=note, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=list(columns),
                strings_can_be_null=True,
            ),
        )
        for batch in reader:
            # The numbers that no faulty row has, in order; the reader may be ahead and know of later ones already.
            order = sound + 1 + np.arange(len(batch))
            yield order + np.searchsorted(np.sort(faulty) - np.arange(len(faulty)), order, side="right"), batch
            sound += len(batch)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: unreadable table ({' '.join(str(error).split())[:200]}); fetch it again") from None


def _check_header(path: Path, columns: Sequence[str]) -> None:
    """The names are compared as they are written, spaces included, since that is how the reader knows its columns."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            header = next(csv.reader([file.readline()]), [])
        except csv.Error as error:
            raise UserError(f"{path}: unreadable header ({error}); fetch it again") from None
    check_columns(pd.DataFrame(columns=header), columns, str(path))
    for name in columns:
        if header.count(name) > 1:
            raise UserError(f"{path}: the column {name!r} comes {header.count(name)} times, expected once")
