"""TCGA's slides as the GDC hands them out, and reports of the same patients -> pairs of a tile and a diagnosis.

    <manifest>       tab-separated: id, filename, md5 (may be empty), size, state
    <slides>         <id>/<filename> as gdc-client writes them, or all files in one folder; `.partial`: still coming
    <reports>        a folder of PDF or text files whose names begin with a patient's barcode; or the table of
                     TCGA-Reports (Kefeli and Tatonetti 2024), CSV with `patient_filename` and `text`

A barcode TCGA-XX-YYYY-01Z-00-DX1 names project, tissue source site, patient (its first twelve characters), sample and
vial, portion, and slide: DX diagnostic, from paraffin; TS and BS frozen.
"""

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipdist.data.sets.pack import Pair, Rejected
from clipdist.data.sets.tables import check_columns, read_table
from clipdist.errors import UserError
from clipdist.prepare.reports import NoDiagnosis, diagnosis_section, diagnosis_sentences, entities, read_report
from clipdist.prepare.slides import SlideFile, TiledSlide

MANIFEST_COLUMNS = ("id", "filename", "md5", "size", "state")
REPORTS = (".txt", ".pdf")
_PATIENT = r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}"
_BARCODE = re.compile(rf"({_PATIENT})-(\d\d)([A-Z]?)-(\d\d)-((DX|TS|BS|MS)[A-Z0-9]*)(?![A-Za-z0-9])")


@dataclass(frozen=True)
class Barcode:
    """A slide's barcode in its parts; `str` joins them."""

    patient: str
    sample: str
    vial: str
    portion: str
    slide: str

    @staticmethod
    def parse(filename: str) -> "Barcode":
        """The barcode at the beginning of a slide's file name. `ValueError` for any other name."""
        match = _BARCODE.match(filename)
        if not match:
            raise ValueError(
                f"no barcode of a slide in {filename!r}, expected TCGA-XX-YYYY-01Z-00-DX1 at its beginning"
            )
        return Barcode(*match.group(1, 2, 3, 4, 5))

    @property
    def kind(self) -> str:
        """DX, TS, BS or MS."""
        return self.slide[:2]

    def __str__(self) -> str:
        return f"{self.patient}-{self.sample}{self.vial}-{self.portion}-{self.slide}"


@dataclass(frozen=True)
class ManifestRow:
    """A line of a manifest; the first below the header is row 1. `size` None: not told."""

    row: int
    id: str
    filename: str
    md5: str
    size: int | None


@dataclass(frozen=True)
class Diagnosis:
    """What a patient's report says: its telling sentences, and the entities that they name (see `reports`)."""

    sentences: list[str]
    entities: list[str]


@dataclass(frozen=True)
class FoundSlides:
    """Slides by name (barcode), what was rejected, and how many lines were left out on purpose, by reason."""

    slides: dict[str, SlideFile]
    rejected: list[Rejected]
    left_out: dict[str, int]

    @property
    def patients(self) -> set[str]:
        return {name[:12] for name in self.slides}


def find_manifest(raw: Path, *, draw: int | None = None) -> Path:
    """The manifest `gdc_manifest*.txt` in `raw`; `UserError` unless there is exactly one.

    `draw`: where there is no folder `raw`, it is first made of so many invented patients (see `write_tcga_layout`).
    """
    if draw is not None and not raw.exists():
        from clipdist.prepare.phantom_slides import write_tcga_layout

        write_tcga_layout(raw, draw)
    found = sorted(raw.glob("gdc_manifest*.txt"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{raw}: found {names}, expected one gdc_manifest*.txt; name it with --manifest")
    return found[0]


def find_reports(raw: Path) -> Path:
    """`reports/` in `raw`, else `TCGA_Reports.csv` there; `UserError` when there is neither."""
    for path in (raw / "reports", raw / "TCGA_Reports.csv"):
        if path.exists():
            return path
    raise UserError(f"{raw}: found neither reports/ nor TCGA_Reports.csv; name the reports with --reports")


def read_manifest(path: Path) -> list[ManifestRow]:
    """The lines of a GDC manifest. `UserError` when it is missing, has other columns, or a line that makes no sense."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            columns = table.fieldnames or []
            if missing := [column for column in MANIFEST_COLUMNS if column not in columns]:
                raise UserError(
                    f"{path}: no column {missing[0]!r}; found {', '.join(columns)[:200]!r}, expected a GDC manifest "
                    f"with {', '.join(MANIFEST_COLUMNS)}, parted by tabs"
                )
            lines = list(table)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such manifest; download one from the GDC's cart") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: unreadable manifest ({error})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        values = {column: (line[column] or "").strip() for column in MANIFEST_COLUMNS}
        size, md5 = values["size"], values["md5"]
        if not values["filename"] or Path(values["filename"]).name != values["filename"] or "/" in values["id"]:
            raise UserError(f"{path}: row {number}: found the file name {values['filename']!r}, expected a bare name")
        if (size and not re.fullmatch("[0-9]{1,18}", size)) or (md5 and not re.fullmatch("[0-9a-fA-F]{32}", md5)):
            raise UserError(
                f"{path}: row {number}: found size {size!r} and md5 {md5!r}, expected bytes and 32 hexadecimal digits; "
                f"either may be empty"
            )
        rows.append(ManifestRow(number, values["id"], values["filename"], md5, int(size) if size else None))
    if not rows:
        raise UserError(f"{path}: the manifest has no lines")
    return rows


def find_slides(
    rows: Sequence[ManifestRow], folder: Path, *, kinds: Sequence[str] = ("DX",), check_md5: bool = True
) -> FoundSlides:
    """The slides that a manifest names, found below `folder`; sizes are compared here, md5 when a slide is tiled.

    Left out: files that are no `.svs`, and slides of other `kinds`. Rejected: a line whose file is missing, still being
    fetched, of another size, or without a slide's barcode, and a second file of one barcode.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; expected the slides that gdc-client fetched")
    found: dict[str, SlideFile] = {}
    rejected: list[Rejected] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        if not row.filename.lower().endswith(".svs"):
            left_out["no .svs"] += 1
            continue
        try:
            barcode = Barcode.parse(row.filename)
            if barcode.kind not in kinds:
                left_out[f"{barcode.kind} slides"] += 1
                continue
            path = _located(row, folder)
            if str(barcode) in found:
                raise ValueError(f"another file of the slide {barcode}")
        except ValueError as error:
            rejected.append(Rejected(row.row, row.id, row.filename, str(error)))
            continue
        found[str(barcode)] = SlideFile(str(barcode), path, row.md5 if check_md5 else "", row.row)
    return FoundSlides(found, rejected, dict(left_out))


def read_diagnoses(source: Path, patients: set[str]) -> tuple[dict[str, Diagnosis], list[Rejected]]:
    """What the reports of `patients` say, and the reports from which no diagnosis can be had.

    Of a patient's several reports the sentences are joined. Patients without any report are in neither.
    """
    sentences: dict[str, dict[str, None]] = {}
    rejected = []
    for row, name, text in _reports(source, patients):
        patient = name[:12].upper()
        try:
            section = diagnosis_section(read_report(text) if isinstance(text, Path) else text)
            sentences.setdefault(patient, {}).update(dict.fromkeys(diagnosis_sentences(section)))
        except NoDiagnosis as error:
            rejected.append(Rejected(row, patient, str(text) if isinstance(text, Path) else name, str(error)))
    return {patient: Diagnosis(list(found), entities(list(found))) for patient, found in sentences.items()}, rejected


def with_diagnosis(found: FoundSlides, diagnoses: Mapping[str, Diagnosis]) -> tuple[list[SlideFile], list[Rejected]]:
    """The slides whose patients have a diagnosis, and those whose patients have none."""
    slides, rejected = [], []
    for slide in found.slides.values():
        if slide.name[:12] in diagnoses:
            slides.append(slide)
        else:
            rejected.append(slide.rejected(f"no diagnosis of {slide.name[:12]} in the reports"))
    return slides, rejected


def tile_pairs(slides: Sequence[TiledSlide], diagnoses: Mapping[str, Diagnosis]) -> list[Pair]:
    """A pair for each tile, with its patient's sentences as captions, and the patient as unit.

    Fields: label (the entities, such as `DCIS+IDC`; none where the sentences name none), unit, slide, x, y, stride
    (pixels of level 0) and mpp (micrometres per pixel of level 0).
    """
    pairs = []
    for slide in slides:
        patient = slide.name[:12]
        diagnosis = diagnoses[patient]
        label = {"label": "+".join(diagnosis.entities)} if diagnosis.entities else {}
        stride = slide.record["options"]["stride"]
        for tile in slide.tiles:
            place = {"slide": slide.name, "x": tile.x, "y": tile.y, "stride": stride, "mpp": slide.mpp}
            key = f"{slide.name}/{tile.x}_{tile.y}"
            pairs.append(Pair(key, tile.path, diagnosis.sentences, {**label, "unit": patient, **place}))
    return pairs


def _located(row: ManifestRow, folder: Path) -> Path:
    """Where a manifest's file lies. `ValueError` when it does not, or not yet in full."""
    places = [folder / row.id / row.filename, folder / row.filename]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        if any(place.with_name(place.name + ".partial").is_file() for place in places):
            raise ValueError("still being fetched: there is a .partial")
        raise ValueError("missing file")
    if row.size is not None and path.stat().st_size != row.size:
        raise ValueError(f"{path.stat().st_size} bytes, expected {row.size}: fetch it again")
    return path


def _reports(source: Path, patients: set[str]) -> list[tuple[int | None, str, str | Path]]:
    """(row, name, text or file) of each report of one of `patients`."""
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in REPORTS)
        named = [(None, path.name, path) for path in files if re.match(_PATIENT, path.name, re.IGNORECASE)]
        if not named:
            raise UserError(
                f"{source}: no reports in it; expected files such as TCGA-A1-A0SB.<UUID>.PDF, ending in "
                f"{' or '.join(REPORTS)}"
            )
        return [report for report in named if report[1][:12].upper() in patients]
    if not source.is_file():
        raise UserError(f"{source}: there are no such reports; expected a folder of them, or TCGA-Reports' table")
    table = read_table(source)
    check_columns(table, ["patient_filename", "text"], str(source))
    rows = zip(table.index.tolist(), table["patient_filename"].tolist(), table["text"].tolist(), strict=True)
    return [(row, str(name), str(text)) for row, name, text in rows if str(name)[:12].upper() in patients]
