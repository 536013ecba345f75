"""MIMIC-CXR and MIMIC-CXR-JPG as PhysioNet hands them out -> pairs of a radiograph and its report.

    <raw>/mimic-cxr-2.0.0-{metadata,split,chexpert,negbio}.csv.gz     tables of MIMIC-CXR-JPG, compressed or not
    <raw>/files/p10/p10000032/s50414267/<dicom_id>.jpg|.dcm            pictures of MIMIC-CXR-JPG, or of MIMIC-CXR
    <raw>/files/p10/p10000032/s50414267.txt                            reports, from MIMIC-CXR; or in a folder of their
    <raw>/mimic-cxr-reports.zip                                        own, or in this archive, which stays as it is

Johnson et al. 2019, arXiv 1901.07042 and doi 10.1038/s41597-019-0322-0. The unit that no split may part is the
patient, `subject_id`.
"""

import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from clipdist.data.images.dicom import require_pydicom
from clipdist.data.sets.pack import SPLIT_NAME, Pair, Rejected
from clipdist.data.sets.tables import check_columns, key_from, read_table
from clipdist.data.shards import checksum_file
from clipdist.errors import UserError
from clipdist.prepare.radiology_reports import CAPTIONS, LAST_PARAGRAPH, MIN_TOKENS, report_captions
from clipdist.prepare.report_text import UnusableReport, decoded
from clipdist.progress import progress

LABELS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion",
    "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices",
)  # fmt: skip
IDS = ("dicom_id", "subject_id", "study_id")
FRONTAL = ("PA", "AP")
SUFFIXES = (".jpg", ".dcm", ".png")
ZIP = "mimic-cxr-reports.zip"
LARGEST_REPORT = 1 << 20
"""Bytes; the longest published one has a few thousand."""
_TABLE = re.compile(r"mimic-cxr-(\d+\.\d+\.\d+)-([a-z]+)\.csv(?:\.gz)?")


@dataclass(frozen=True)
class CxrPairs:
    """`pairs` in the order of the metadata, `split_of` each pair's published split, by key; what was `rejected`;
    `notes` and `sources`, for the manifest, say what was chosen."""

    pairs: list[Pair]
    split_of: dict[str, str]
    rejected: list[Rejected]
    notes: dict[str, Any]
    sources: dict[str, str]

    def by_split(self) -> dict[str, list[Pair]]:
        """The pairs of each published split: train, validate, test."""
        found: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            found.setdefault(self.split_of[pair.key], []).append(pair)
        order = {"train": 0, "validate": 1, "test": 2}
        return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


@dataclass(frozen=True)
class CxrOptions:
    """`views`: values of ViewPosition to take, `unknown` for pictures without one, none for all; `labels`: chexpert,
    negbio or none; `sections` and `min_tokens`: see `report_captions`; `published_split`: whether the split table is
    read."""

    views: tuple[str, ...] = FRONTAL
    labels: str = "chexpert"
    sections: tuple[str, ...] = CAPTIONS
    min_tokens: int = MIN_TOKENS
    published_split: bool = True


def read_mimic_cxr(
    raw: Path, options: CxrOptions | None = None, *, images: Path | None = None, reports: Path | None = None
) -> CxrPairs:
    """A pair for each picture of `options.views` whose study has a report.

    `images` and `reports` are folders that hold `p10/`, … or `files/p10/`, …; `reports` may also be the archive. By
    default both lie in `raw`. Captions are the report's sections. Fields: unit (the patient), study, view, sections
    (the names of the captions), and those of the fourteen labels that are not blank: 1, 0 or -1 (uncertain).

    Rejected, with the row of the metadata: a picture whose file is missing, that the split table does not know or knows
    under another study, whose report is missing or damaged or has neither findings nor impression nor a last paragraph.
    Other views are left out and counted. Raises `UserError` when a table or a column is missing, tables are of
    different versions, or the split table is that of another set.
    """
    options = options or CxrOptions()
    if not raw.is_dir():
        raise UserError(f"{raw}: there is no such folder; expected the downloaded files of MIMIC-CXR-JPG or MIMIC-CXR")
    kinds = ["metadata"] + ["split"] * options.published_split + [options.labels] * (options.labels != "none")
    tables = find_tables(raw, kinds)
    metadata = _table(tables["metadata"], [*IDS, "ViewPosition"])
    if double := metadata["dicom_id"][metadata["dicom_id"].duplicated()].tolist():
        raise UserError(f"{tables['metadata']}: {double[0]} is there twice; expected one row for each picture")
    views, left_out = _of_views(metadata, options.views, tables["metadata"])
    split_of = _splits(tables["split"], views) if options.published_split else {}
    labels_of = _labels(tables[options.labels]) if options.labels != "none" else {}
    pictures = _root(images or raw)
    read, opened = open_reports(reports or find_reports(raw, pictures))
    with opened:
        found = _Studies(read, options)
        made = [
            _pair(row, pictures, split_of, found)
            for row in progress(
                views.reset_index(names="row").to_dict("records"), unit="picture", description="reading reports"
            )
        ]
    pairs = [one for one in made if isinstance(one, Pair)]
    if any(Path(str(pair.image)).suffix == ".dcm" for pair in pairs):
        require_pydicom()  # said now, rather than by a process that decodes
    for pair in pairs:
        pair.fields.update(labels_of.get(pair.fields["study"], {}))
    notes = {
        "tables": {kind: path.name for kind, path in tables.items()},
        "views": sorted(options.views) or "all",
        "left_out": left_out,
        "labels": options.labels,
        "sections": list(options.sections),
        "min_tokens": options.min_tokens,
        "studies": len({pair.fields["study"] for pair in pairs}),
        "captions": dict(Counter(name for pair in pairs for name in pair.fields["sections"])),
        "without_labels": sum(pair.fields["study"] not in labels_of for pair in pairs) if labels_of else None,
    }
    rejected = [one for one in made if isinstance(one, Rejected)]
    splits = {pair.key: split_of[pair.key.rpartition("/")[2]][0] for pair in pairs} if split_of else {}
    return CxrPairs(pairs, splits, rejected, notes, {path.name: checksum_file(path) for path in tables.values()})


def find_tables(raw: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """`mimic-cxr-<version>-<kind>.csv[.gz]` in `raw` for each kind. `UserError` unless there is one of each, all of
    one version."""
    found: dict[str, Path] = {}
    versions: dict[str, str] = {}
    names = sorted(path for path in raw.iterdir() if _TABLE.fullmatch(path.name))
    for kind in kinds:
        of_kind = {match[1]: path for path in names if (match := _TABLE.fullmatch(path.name)) and match[2] == kind}
        if len(of_kind) != 1:
            there = ", ".join(path.name for path in of_kind.values() or names) or "none of its tables"
            cure = "; --labels none does without" if kind in ("chexpert", "negbio") else ""
            cure = "; --split train=0.8 val=0.2 makes a new one" if kind == "split" else cure
            raise UserError(f"{raw}: found {there}, expected one mimic-cxr-2.0.0-{kind}.csv.gz{cure}")
        (versions[kind], found[kind]), = of_kind.items()  # fmt: skip
    if len(set(versions.values())) > 1:
        told = ", ".join(f"{kind} {version}" for kind, version in versions.items())
        raise UserError(f"{raw}: found tables of several versions ({told}); expected those of one release")
    return found


def find_reports(raw: Path, pictures: Path) -> Path:
    """Where the reports are, when that is not said: the archive, a folder of their own, or beside the pictures."""
    for name in (ZIP, ZIP.removesuffix(".zip"), "files"):
        if (raw / name).exists():
            return raw / name
    return pictures


def open_reports(source: Path) -> tuple[Callable[[str, str], str], AbstractContextManager[Any]]:
    """(subject, study) -> the report's text, from a folder or a zip archive; and what closes it.

    The function raises `UnusableReport` for one that is missing or damaged. Raises `UserError` when there is no such
    folder or archive, or no report in it.
    """
    if source.suffix == ".zip":
        try:
            archive = zipfile.ZipFile(source)
        except FileNotFoundError:
            raise UserError(f"{source}: there is no such archive of reports") from None
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{source}: unreadable archive ({error}); fetch it again") from None
        members = {name.rpartition("/")[2]: name for name in archive.namelist() if name.endswith(".txt")}
        if not members:
            archive.close()
            raise UserError(f"{source}: no reports in it; expected files such as files/p10/p10000032/s50414267.txt")
        return lambda subject, study: _from_archive(archive, members.get(f"s{study}.txt")), archive
    root = _root(source)
    return lambda subject, study: _from_file(root / _folder_of(subject) / f"s{study}.txt"), nullcontext()


def _from_archive(archive: zipfile.ZipFile, name: str | None) -> str:
    if name is None:
        raise UnusableReport("missing report")
    try:
        if archive.getinfo(name).file_size > LARGEST_REPORT:
            raise UnusableReport(f"{name}: more than {LARGEST_REPORT} bytes, which is no report")
        return decoded(archive.read(name))
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise UnusableReport(f"damaged report: {error}") from None


def _from_file(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_REPORT:
            raise UnusableReport(f"{path.name}: more than {LARGEST_REPORT} bytes, which is no report")
        return decoded(path.read_bytes())
    except FileNotFoundError:
        raise UnusableReport("missing report") from None
    except OSError as error:
        raise UnusableReport(f"unreadable report: {error.strerror}") from None


class _Studies:
    """The captions of each study, read once."""

    def __init__(self, read: Callable[[str, str], str], options: CxrOptions) -> None:
        self.read, self.options = read, options
        self.known: dict[str, dict[str, str] | str] = {}

    def captions(self, subject: str, study: str) -> dict[str, str]:
        """Raises `UnusableReport`, for each picture of the study."""
        if study not in self.known:
            try:
                text = self.read(subject, study)
                self.known[study] = report_captions(text, self.options.sections, self.options.min_tokens)
            except UnusableReport as error:
                self.known[study] = str(error)
        captions = self.known[study]
        if isinstance(captions, str):
            raise UnusableReport(captions)
        return captions


def _pair(
    row: dict[str, Any], pictures: Path, split_of: dict[str, tuple[str, str, str]], studies: _Studies
) -> Pair | Rejected:
    dicom, subject, study = (row[name] for name in IDS)
    place = f"{_folder_of(subject)}/s{study}/{dicom}"
    key = key_from(place, is_path=False)
    try:
        if split_of:
            split, *owner = split_of.get(dicom, ("", subject, study))
            if not SPLIT_NAME.fullmatch(split):
                raise ValueError("no split: the split table does not name this picture")
            if owner != [subject, study]:
                raise ValueError(f"the split table has it in study {owner[1]} of patient {owner[0]}")
        image = next((found for suffix in SUFFIXES if (found := pictures / f"{place}{suffix}").is_file()), None)
        if image is None:
            raise ValueError(f"missing image file, neither {' nor '.join(SUFFIXES)}")
        captions = studies.captions(subject, study)
    except ValueError as error:
        return Rejected(row["row"], key, str(pictures / place), str(error))
    fields = {"unit": subject, "study": study, "view": row["ViewPosition"] or "unknown", "sections": list(captions)}
    return Pair(key, image, list(captions.values()), fields, row["row"])


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The columns as strings, empty ones for what is missing; identifiers without a decimal point."""
    table = read_table(path)
    check_columns(table, columns, str(path))
    table = table[list(columns)].fillna("").astype(str)
    for name, shape in (("subject_id", r"\d+"), ("study_id", r"\d+"), ("dicom_id", r"[\w-]+")):
        if name in columns:
            table[name] = table[name].str.removesuffix(".0")  # of tables that passed through a spreadsheet
            if strange := table.index[~table[name].str.fullmatch(shape)].tolist():
                raise UserError(f"{path}: row {strange[0]}: found the {name} {table.loc[strange[0], name]!r}")
    return table


def _of_views(metadata: pd.DataFrame, views: Sequence[str], path: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    named = metadata["ViewPosition"].replace("", "unknown")
    wanted = named.isin([*views]) if views else pd.Series(True, metadata.index)
    there = Counter(named.tolist())
    if not wanted.any():
        told = ", ".join(f"{view} ({count:,})" for view, count in there.most_common())
        raise UserError(f"{path}: no picture of the views {', '.join(views)}; found {told}; name others with --views")
    left_out = Counter(named[~wanted].tolist())
    return metadata[wanted], {f"view {view}": count for view, count in left_out.most_common()}


def _splits(path: Path, metadata: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """dicom_id -> (split, subject_id, study_id)."""
    table = _table(path, [*IDS, "split"])
    columns = (table[name].tolist() for name in ("split", "subject_id", "study_id"))
    found = dict(zip(table["dicom_id"].tolist(), zip(*columns, strict=True), strict=True))
    if not any(name in found for name in metadata["dicom_id"]):
        raise UserError(f"{path}: names none of the pictures of the metadata; expected the split table of this release")
    return found


def _labels(path: Path) -> dict[str, dict[str, int]]:
    """study_id -> label -> 1, 0 or -1, where it is not blank."""
    table = _table(path, ["subject_id", "study_id", *LABELS])
    meaning = {"1.0": 1, "0.0": 0, "-1.0": -1, "1": 1, "0": 0, "-1": -1}
    found: dict[str, dict[str, int]] = {}
    for row, record in zip(table.index, table.to_dict("records"), strict=True):
        named = {label: record[label].strip() for label in LABELS if record[label].strip()}
        if strange := [f"{label} {value!r}" for label, value in named.items() if value not in meaning]:
            raise UserError(f"{path}: row {row}: found {strange[0]}, expected 1.0, 0.0, -1.0 or nothing")
        found[record["study_id"]] = {label: meaning[value] for label, value in named.items()}
    return found


def _folder_of(subject: str) -> str:
    """`p10/p10000032`, as both data sets lay patients out."""
    return f"p{subject[:2]}/p{subject}"


def _root(folder: Path) -> Path:
    """The folder in which `p10/`, … lie: `folder` or `folder/files`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; expected one with files/p10/, …, or with p10/, …")
    return folder / "files" if (folder / "files").is_dir() else folder


def told(found: CxrPairs) -> str:
    """A line or two for people: how many pictures and studies, from which sections, what was left out."""
    captions = found.notes["captions"]
    sections = ", ".join(f"{count:,} with {name}" for name, count in captions.items())
    left_out = ", ".join(f"{count:,} of {why}" for why, count in found.notes["left_out"].items()) or "nothing"
    lines = [
        f"{found.notes['tables']['metadata']}: {len(found.pairs):,} pictures of {found.notes['studies']:,} studies; "
        f"{sections or 'no captions'}; left out: {left_out}"
    ]
    if captions.get(LAST_PARAGRAPH):
        lines.append(
            f"{captions[LAST_PARAGRAPH]:,} pictures have reports with neither findings nor impression; their captions "
            f"are last paragraphs"
        )
    return "\n".join(lines)
