"""ISIC 2024 (SLICE-3D: 401,059 tiles of 15 x 15 mm out of photographs of whole bodies) -> pairs, from either layout:

    official   <raw>/ISIC_2024_[Permissive_]Training_GroundTruth.csv, …_Supplement.csv, …_Input/metadata.csv and *.jpg
    Kaggle     <raw>/train-metadata.csv, and <raw>/train-image.hdf5 or <raw>/train-image/image/*.jpg

Folders that were unzipped into a folder of their own name are found too.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from clipdist.data.sets.pack import Pair, Rejected
from clipdist.data.sets.recode import ImageSource
from clipdist.data.sets.tables import check_columns, read_table
from clipdist.data.shards import checksum_file
from clipdist.errors import UserError
from clipdist.prepare.hdf5 import stored_images
from clipdist.prepare.isic_captions import (
    LOOKS,
    OUTCOMES,
    Grades,
    diagnosis_sentences,
    looks_sentence,
    person_sentence,
)
from clipdist.prepare.units import joined_units

KAGGLE = "train-metadata.csv"
TRUTH = "_GroundTruth.csv"
ID, LEVELS = "isic_id", ("iddx_1", "iddx_2", "iddx_3", "iddx_4", "iddx_5")
TARGETS = ("target", "malignant")
UNITS = ("patient_id", "lesion_id")
DECIDING = (*TARGETS, LEVELS[0], UNITS[0])  # rows of one tile that differ in these are not the same again
SEX, AGE, SITE, SIZE = "sex", "age_approx", "anatom_site_general", "clin_size_long_diam_mm"
NUMBERS = (AGE, SIZE, *LOOKS)
# Columns kept as fields, and the fields' names. Licences differ between tiles, and CC-BY asks for the attribution.
FIELDS = {
    SEX: "sex",
    SITE: "site",
    "tbp_tile_type": "tile",
    "attribution": "attribution",
    "copyright_license": "license",
}
SIZES = ((3.0, "below 3 mm"), (6.0, "3 to 6 mm"), (np.inf, "6 mm and more"))
NOT_GIVEN = frozenset({"", "na", "nan", "none", "unknown"})
# Columns by which earlier challenges are told; none of them has patients and levels of the diagnosis as 2024 has.
EARLIER = {
    "2016 or 2017": {"image_id", "melanoma"},
    "2018 or 2019": {"image", "MEL"},
    "2020": {"image_name", "benign_malignant"},
}
Images = Literal["hdf5", "jpeg"]


@dataclass(frozen=True)
class IsicPairs:
    """`pairs` and `rejected` of a folder; `notes` and `sources` for the manifest say what was chosen and found."""

    pairs: list[Pair]
    rejected: list[Rejected]
    notes: dict[str, Any]
    sources: dict[str, str]

    def strata(self) -> dict[int, str]:
        """Row -> what its unit has of the rarer outcomes, such as `malignant x 2`, for `split_pairs`.

        A unit, which stays whole, counts as its most frequent label, and nearly every tile of nearly every patient is
        benign: by their labels, splits would get malignant tiles by chance.
        """
        held: dict[Any, Counter[str]] = {}
        for pair in self.pairs:
            held.setdefault(pair.fields["unit"], Counter())[pair.fields["label"]] += 1
        rare = {
            unit: next(
                (f"{label} x {min(count[label], 3)}" for label in ("malignant", "indeterminate") if count[label]), ""
            )
            for unit, count in held.items()
        }
        return {pair.row or 0: rare[pair.fields["unit"]] for pair in self.pairs}


@dataclass(frozen=True)
class _Layout:
    truth: Path
    others: tuple[Path, ...]  # tables that hold the other columns
    hdf5: Path | None
    folder: Path | None  # of JPEGs


def read_isic(raw: Path, *, metadata: bool = False, images: Images | None = None) -> IsicPairs:
    """The usable pairs of the folder `raw`.

    The caption has a sentence for each level of the diagnosis; `metadata` appends what is known of person, site, size
    and looks (see `isic_captions`). Fields: `label` (benign, malignant, indeterminate), `unit`, sex, age, site,
    size_mm, size (in three classes), the diagnosis's deepest level, tile, attribution, license. The unit is the
    patient; where none is given the lesion's patient, else the lesion, else the tile by itself (`notes["units"]` counts
    them); patients that share a lesion are one unit, under the first's name. `images` chooses among Kaggle's two forms;
    by default HDF5 where it is there.

    Rejected, each with its reason: a row without an image and an image without a row, a target that is neither 0 nor 1,
    no outcome, or one that contradicts the target, a row that the other tables lack, an identifier that came before,
    and all rows of an identifier, here or in another table, that differ in target, outcome or patient. Numbers that are
    none, or not finite, count as not given (`notes["not_numbers"]`). Raises `UserError` for missing files and columns,
    for the columns of an earlier challenge, and for `images="hdf5"` where the files are the official ones.
    """
    layout = _find(raw, images)
    rows, rejected, sources = _read_tables(layout)
    cells = {column: _cells(rows[column]) for column in rows.columns if column not in NUMBERS}
    target = next(column for column in TARGETS if column in cells)
    keys = [key or "" for key in cells[ID]]
    reasons = _reasons(keys, cells, target)
    stored, where = _images(layout)
    usable = []
    for place, (row, key) in enumerate(zip(rows.index.tolist(), keys, strict=True)):
        reason = reasons[place] or ("" if key in stored else f"no image of it in {where}")
        if reason:
            rejected.append(Rejected(row, key, str(stored.get(key, "")) if key in stored else "", reason))
        else:
            usable.append(place)
    known = {*keys, *(one.key for one in rejected)}
    rejected += [Rejected(None, key, where, "image without a row in the table") for key in stored if key not in known]
    if not usable:
        raise UserError(f"{layout.truth}: no usable row: {'; '.join(map(str, rejected[:3]))}")

    numbers = {column: _numbers(rows[column]) for column in NUMBERS if column in rows.columns}
    if metadata and not (numbers or SEX in cells or SITE in cells):
        raise UserError(
            f"{layout.truth}: no column that metadata captions are made of; found {', '.join(rows.columns)}"
        )
    units, known_by, several = _units(keys, *(cells.get(column) for column in UNITS))
    grades = Grades.of({name: values[usable] for name, values in numbers.items()}) if metadata else None
    said = _captions(cells, numbers, grades)
    pairs = []
    for place, row in zip(usable, rows.index[usable].tolist(), strict=True):
        fields = {"label": cells[LEVELS[0]][place].lower(), "unit": units[place], **_fields(place, cells, numbers)}  # type: ignore[union-attr]
        pairs.append(Pair(keys[place], stored[keys[place]], [said(place)], fields, row))
    notes = {
        "tables": [path.name for path in (layout.truth, *layout.others)],
        "images": where,
        "rows": len(rows),
        "target_column": target,
        "labels": dict(Counter(pair.fields["label"] for pair in pairs)),
        "units": dict(Counter(known_by[place] for place in usable)),
        "lesions_of_several_patients": several,
        "metadata": metadata,
        "not_numbers": {
            name: count for name in numbers if (count := int((rows[name].notna() & np.isnan(numbers[name])).sum()))
        },
        "columns_absent": [name for name in (*LEVELS[1:], *UNITS, *FIELDS, *NUMBERS) if name not in rows.columns],
        **({"limits": grades.limits} if grades else {}),
    }
    return IsicPairs(pairs, rejected, notes, sources)


def _find(raw: Path, images: Images | None) -> _Layout:
    if images is not None and images not in get_args(Images):
        raise UserError(f"images: found {images!r}, expected {' or '.join(get_args(Images))}")
    if not raw.is_dir():
        raise UserError(f"{raw}: there is no such folder; expected the unpacked files of ISIC 2024")
    truths = sorted(raw.glob(f"ISIC_2024_*{TRUTH}"))
    if (raw / KAGGLE).is_file():
        hdf5 = raw / "train-image.hdf5"
        folder = _unzipped(raw / "train-image", "image")
        chosen = images or ("hdf5" if hdf5.is_file() else "jpeg")
        if not (hdf5.is_file() if chosen == "hdf5" else folder):
            raise UserError(
                f"{raw}: found {KAGGLE}, but not its images; expected train-image.hdf5 or train-image/image/"
            )
        return _Layout(raw / KAGGLE, (), *((hdf5, None) if chosen == "hdf5" else (None, folder)))
    if len(truths) > 1:
        raise UserError(
            f"{raw}: found {', '.join(path.name for path in truths)}, expected one; put each into a folder of its own"
        )
    if not truths:
        tables = sorted(raw.glob("*.csv"))
        for path in tables:
            _refuse_earlier(path, read_table(path).columns)
        found = ", ".join(path.name for path in tables) or "no table"
        raise UserError(f"{raw}: found {found}; expected {KAGGLE} or ISIC_2024_[Permissive_]Training{TRUTH}")
    if images == "hdf5":
        raise UserError(
            f"images: found 'hdf5', but the official files are JPEGs ({truths[0].name}); leave it out or fetch Kaggle's"
        )
    stem = truths[0].name.removesuffix(TRUTH)
    folder = _unzipped(raw / f"{stem}_Input")
    if folder is None:
        raise UserError(
            f"{raw / f'{stem}_Input'}: there is no such folder with images; expected it beside {truths[0].name}"
        )
    return _Layout(truths[0], (raw / f"{stem}_Supplement.csv", _metadata(folder)), None, folder)


def _unzipped(folder: Path, inner: str | None = None) -> Path | None:
    """The first of `folder`, `folder/<its name>`, … that holds a JPEG, or has a folder `inner`, unzipped alike, that
    does; None when there is none."""
    while folder.is_dir():
        if inner and (found := _unzipped(folder / inner)):
            return found
        if next(folder.glob("*.jpg"), None):
            return folder
        folder = folder / folder.name
    return None


def _metadata(folder: Path) -> Path:
    """`metadata.csv` beside the images or, when they were unzipped twice, above them."""
    places = [folder / "metadata.csv", folder.parent / "metadata.csv"]
    return next((path for path in places if path.is_file()), places[0])


def _refuse_earlier(path: Path, columns: Sequence[str]) -> None:
    for year, telling in EARLIER.items():
        if telling <= set(columns) and ID not in columns:
            raise UserError(
                f"{path}: these are the columns of ISIC {year} ({', '.join(list(columns)[:8])}); expected those of 2024"
            )


def _read_tables(layout: _Layout) -> tuple[pd.DataFrame, list[Rejected], dict[str, str]]:
    """All columns by row of the first table; rows of it that another table lacks, or has twice and differently."""
    rows = read_table(layout.truth)
    _refuse_earlier(layout.truth, rows.columns)
    check_columns(rows, [ID], str(layout.truth))
    rejected: list[Rejected] = []
    lacking = pd.Series("", rows.index, dtype=object)
    for path in layout.others:
        other = read_table(path)
        check_columns(other, [ID], str(path))
        again = other[ID].duplicated()
        rejected += [
            Rejected(None, str(other[ID][row]), "", f"row {row} of {path.name}: {ID} again")
            for row in other.index[again]
        ]
        for key, differing in _contradicted(other[other[ID].isin(other[ID][again])]).items():
            lacking[rows[ID] == key] += f"{path.name} has it again with another {differing}; "
        other = other[~again].set_index(ID)
        lacking[~rows[ID].isin(other.index)] += f"no row in {path.name}; "
        new = [column for column in other.columns if column not in rows.columns]
        rows = rows.join(other[new], on=ID)
    told = " and ".join(path.name for path in (layout.truth, *layout.others))
    target = next((name for name in TARGETS if name in rows.columns), TARGETS[0])
    check_columns(rows, [target, LEVELS[0]], told)
    gone = lacking != ""
    rejected += [Rejected(row, str(rows[ID][row]), "", lacking[row].rstrip("; ")) for row in rows.index[gone]]
    sources = {path.name: checksum_file(path) for path in (layout.truth, *layout.others)}
    return rows[~gone], rejected, sources


def _contradicted(again: pd.DataFrame) -> dict[str, str]:
    """Identifier -> the columns in which its rows of a table differ, of those that must not."""
    found = {}
    for key, rows in again.groupby(ID):
        differing = [name for name in DECIDING if name in rows and rows[name].nunique(dropna=False) > 1]
        if differing:
            found[str(key)] = " and ".join(differing)
    return found


def _images(layout: _Layout) -> tuple[Mapping[str, ImageSource], str]:
    """Identifier -> image, and where they are."""
    if layout.hdf5 is not None:
        return stored_images(layout.hdf5), layout.hdf5.name
    assert layout.folder is not None
    return {path.stem: path for path in sorted(layout.folder.glob("*.jpg"))}, f"{layout.folder.name}/"


def _reasons(keys: Sequence[str], cells: Mapping[str, list[str | None]], target_column: str) -> list[str]:
    """Why each row is of no use; empty where it is."""
    reasons = []
    for key, target, outcome in zip(keys, cells[target_column], cells[LEVELS[0]], strict=True):
        reason = ""
        if not key:
            reason = f"no {ID}"
        elif target not in ("0", "1", "0.0", "1.0"):
            reason = f"target {target!r}, expected 0 or 1"
        elif (outcome or "").lower() not in OUTCOMES:
            reason = f"iddx_1 {outcome!r}, expected one of {', '.join(OUTCOMES)}"
        elif (target[0] == "1") != ((outcome or "").lower() == "malignant"):
            reason = f"target {target} contradicts iddx_1 {outcome!r}"
        reasons.append(reason)
    # Only rows that could be used stand for their tile; where those of one tile contradict each other, none does.
    places_of: dict[str, list[int]] = {}
    for place, (key, reason) in enumerate(zip(keys, reasons, strict=True)):
        if not reason:
            places_of.setdefault(key, []).append(place)
    said = {target_column: [(cell or "")[:1] for cell in cells[target_column]]}
    said[LEVELS[0]] = [(cell or "").lower() for cell in cells[LEVELS[0]]]
    said[UNITS[0]] = [cell or "" for cell in cells.get(UNITS[0], [None] * len(keys))]
    for places in (several for several in places_of.values() if len(several) > 1):
        differing = [name for name, column in said.items() if len({column[place] for place in places}) > 1]
        told = f" with another {' and '.join(differing)}" if differing else ""
        for place in places if differing else places[1:]:
            reasons[place] = f"{ID} again{told}"
    return reasons


def _units(
    keys: Sequence[str], patients: Sequence[str | None] | None, lesions: Sequence[str | None] | None
) -> tuple[list[str], list[str], int]:
    """The unit of each tile, and what it is known by; how many lesions belong to several patients."""
    nobody = [None] * len(keys)
    patients, lesions = patients or nobody, lesions or nobody
    # Patients are units, and what shares a lesion is joined; a unit is called after the first of its members.
    first_of: dict[str, int] = {}
    edges = [(place, first_of.setdefault(one, place)) for place, one in enumerate(lesions) if one]
    joined = joined_units(patients, np.array(edges, np.int64).reshape(-1, 2)).tolist()
    called: dict[str, dict[int, str]] = {"patient_id": {}, "lesion_id": {}}
    for unit, patient, lesion in zip(joined, patients, lesions, strict=True):
        for by, name in (("patient_id", patient), ("lesion_id", lesion)):
            if name:
                called[by].setdefault(unit, name)
    known_by = [next((by for by, names in called.items() if unit in names), "none") for unit in joined]
    units = [called[by][unit] if by in called else key for unit, by, key in zip(joined, known_by, keys, strict=True)]
    owners = {(lesion, patient) for lesion, patient in zip(lesions, patients, strict=True) if lesion and patient}
    several = sum(count > 1 for count in Counter(lesion for lesion, _ in owners).values())
    return units, known_by, several


def _captions(cells: Mapping[str, list[str | None]], numbers: Mapping[str, np.ndarray], grades: Grades | None) -> Any:
    """place -> caption."""
    nothing: list[str | None] = [None] * len(cells[ID])
    outcomes = cells[LEVELS[0]]
    deeper = list(zip(*(cells.get(level, nothing) for level in LEVELS[1:]), strict=True))
    sites, sexes = cells.get(SITE, nothing), cells.get(SEX, nothing)

    def caption(place: int) -> str:
        said = diagnosis_sentences((outcomes[place] or "").lower(), deeper[place])
        if grades is None:
            return said
        person = person_sentence(_at(numbers, SIZE, place), sites[place], sexes[place], _at(numbers, AGE, place))
        looks = looks_sentence({name: float(numbers[name][place]) for name in LOOKS if name in numbers}, grades)
        return " ".join(part for part in (said, person, looks) if part)

    return caption


def _fields(place: int, cells: Mapping[str, list[str | None]], numbers: Mapping[str, np.ndarray]) -> dict[str, Any]:
    found: dict[str, Any] = {field: cells[column][place] for column, field in FIELDS.items() if column in cells}
    deepest = [cells[level][place] for level in LEVELS if level in cells and cells[level][place]]
    size = _at(numbers, SIZE, place)
    found |= {"diagnosis": deepest[-1], "age": _at(numbers, AGE, place), "size_mm": size}
    if size is not None:
        found["size"] = next(word for limit, word in SIZES if size < limit)
    return {name: value for name, value in found.items() if value is not None}


def _at(numbers: Mapping[str, np.ndarray], column: str, place: int) -> float | None:
    value = float(numbers[column][place]) if column in numbers else math.nan
    return None if math.isnan(value) else int(value) if value.is_integer() else value


def _cells(column: pd.Series) -> list[str | None]:
    """Cells without blanks around them; None for what is not given."""
    texts = [cell.strip() if isinstance(cell, str) else "" for cell in column.tolist()]
    absent = {text for text in set(texts) if text.lower() in NOT_GIVEN}
    return [None if text in absent else text for text in texts]


def _numbers(column: pd.Series) -> np.ndarray:
    """float64; NaN for what is no number, or not a finite one."""
    values = pd.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)
