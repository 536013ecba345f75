"""Radiographs and reports of invented patients, in MIMIC-CXR-JPG's own layout, and queries for them like ConVIRT's.

They let packing, training and evaluation be tried, tested and measured without a download. They are synthetic, and
README.txt beside them says so; they are of no medical use.
"""

import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from clipdist.errors import UserError
from clipdist.prepare.mimic_cxr import LABELS, ZIP
from clipdist.prepare.phantom_chest_draw import draw_radiograph
from clipdist.prepare.phantom_chest_findings import invent_studies, study_with
from clipdist.prepare.phantom_chest_words import Report, query_sentences
from clipdist.prepare.phantom_stamp import write_stamp
from clipdist.progress import progress

SIDE = 128
QUERY_CLASSES = (
    "Atelectasis", "Cardiomegaly", "Edema", "Fracture", "No Finding", "Pleural Effusion", "Pneumonia", "Pneumothorax",
)  # fmt: skip
"""The eight of CheXpert 8×200."""
VERSION = "2.0.0"
SPLITS = {"validate": 0.1, "test": 0.15}
README = """SYNTHETIC DATA. These radiographs and reports were made by a program (clipdist, chest phantoms). They show
no person and no disease; labels and reports describe what was drawn. They are laid out like MIMIC-CXR-JPG so that
programs made for it run on them, and are of no medical use whatsoever.
"""


def write_mimic_cxr_layout(
    folder: Path, patients: int = 400, *, side: int = SIDE, seed: int = 0, per_class: int = 50, quiet: bool = False
) -> Path:
    """A folder as the two data sets of PhysioNet leave it; returns it. It appears whole or not at all.

    `files/p1x/p…/s…/<dicom_id>.jpg`, `mimic-cxr-reports.zip`, and the tables metadata, split, chexpert and negbio.
    README.txt and phantom.json say what it is. `retrieval/` holds the four files of ConVIRT's 8×200 sets, with
    `per_class` candidates, ten pictures and up to five sentences for each of its eight classes; their paths start from
    `folder`, and their patients are in no table. Bytes depend on `patients`, `side`, `seed` and `per_class` alone.

    Raises `UserError` for impossible sizes and when `folder` is there.
    """
    if patients < 3 or side < 32 or seed < 0 or per_class < 1:
        found = f"patients={patients}, side={side}, seed={seed}, per_class={per_class}"
        raise UserError(f"{found}: expected patients >= 3, one for each split, side >= 32, seed >= 0, per_class >= 1")
    if folder.exists():
        raise UserError(f"{folder}: is there already; delete it or name another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had this number
    try:
        partial.mkdir()
        _write_patients(partial, patients, side, seed, quiet)
        _write_retrieval(partial / "retrieval", per_class, side, seed)
        write_stamp(partial, {"what": "synthetic chest", "patients": patients, "side": side, "seed": seed}, README)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_patients(folder: Path, patients: int, side: int, seed: int, quiet: bool) -> None:
    split_of = _splits(patients, seed)
    metadata, split, labels = [], [], []
    with zipfile.ZipFile(folder / ZIP, "w", zipfile.ZIP_DEFLATED) as reports:
        numbers = progress(range(patients), unit="patient", description="drawing radiographs", quiet=quiet)
        for number in numbers:
            rng = np.random.default_rng([seed, 1, number])
            # Numbers as PhysioNet gives them, in any order: eight digits, the first two name the folder.
            subject = f"{10_000_000 + (number * 7_368_787 + 3_101 * seed) % 9_999_991}"
            for place, study in enumerate(invent_studies(rng)):
                name = f"{50_000_000 + (number * 10 + place) * 999_983 % 9_999_991}"
                report = Report(study, rng)
                home = f"files/p{subject[:2]}/p{subject}/s{name}"
                # A fixed time, so that equal phantoms are equal archives.
                reports.writestr(zipfile.ZipInfo(f"{home}.txt", (1980, 1, 1, 0, 0, 0)), report.text)
                labels.append({"subject_id": subject, "study_id": name, **report.labels})
                for view, dicom in zip(study.views, _dicom_ids(rng), strict=False):
                    picture = draw_radiograph(study, view, side, [seed, 2, number, place, len(view)])
                    _save(folder / home / f"{dicom}.jpg", picture)
                    metadata.append(_metadata(dicom, subject, name, view, side, place))
                    split.append([dicom, name, subject, split_of[number]])
    columns = ["subject_id", "study_id", *LABELS]
    tables = {
        "metadata": pd.DataFrame(metadata),
        "split": pd.DataFrame(split, columns=["dicom_id", "study_id", "subject_id", "split"]),
        "chexpert": pd.DataFrame(labels, columns=columns),
        "negbio": pd.DataFrame(labels, columns=columns),
    }
    for kind, table in tables.items():
        path, how = folder / f"mimic-cxr-{VERSION}-{kind}.csv.gz", {"method": "gzip", "mtime": 0}
        table.to_csv(path, index=False, float_format="%.1f", compression=how)


def _splits(patients: int, seed: int) -> dict[int, str]:
    """At least one patient in each split."""
    order = np.random.default_rng([seed, 3]).permutation(patients).tolist()
    found, start = dict.fromkeys(order, "train"), 0
    for name, share in SPLITS.items():
        count = max(1, round(share * patients))
        found.update(dict.fromkeys(order[start : start + count], name))
        start += count
    return found


def _metadata(dicom: str, subject: str, study: str, view: str, side: int, place: int) -> dict[str, Any]:
    return {
        "dicom_id": dicom,
        "subject_id": subject,
        "study_id": study,
        "PerformedProcedureStepDescription": "CHEST (PORTABLE AP)" if view == "AP" else "CHEST (PA AND LAT)",
        "ViewPosition": view,
        "Rows": side,
        "Columns": side,
        "StudyDate": 21_800_101 + place,
        "StudyTime": "120000.0",
    }


def _dicom_ids(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield "-".join(f"{part:08x}" for part in rng.integers(0, 1 << 32, 5).tolist())


def _write_retrieval(folder: Path, per_class: int, side: int, seed: int) -> None:
    """Pictures that show one finding each, of patients that are nowhere else."""
    queries, candidates, sentences = [], [], []
    for number, label in enumerate(QUERY_CLASSES):
        for place in range(per_class + 10):
            rng = np.random.default_rng([seed, 4, number, place])
            study = study_with(label, rng)
            name = f"{label.lower().replace(' ', '-')}-{place:03d}.jpg"
            _save(folder / "images" / name, draw_radiograph(study, study.view, side, [seed, 5, number, place]))
            path = f"retrieval/images/{name}"
            if place < per_class:
                candidates.append({"Path": path, **{one: float(one == label) for one in LABELS}})
            else:
                queries.append([label, path])
        rng = np.random.default_rng([seed, 6, number])
        sentences += [[label, text] for text in query_sentences(label, rng, 5)]
    for kind, rows in (("image", pd.DataFrame(queries, columns=["Variable", "Path"])),
                       ("text", pd.DataFrame(sentences, columns=["Variable", "Text"]))):  # fmt: skip
        (folder / f"{kind}-retrieval").mkdir()
        rows.to_csv(folder / f"{kind}-retrieval" / "query.csv", index=False)
        pd.DataFrame(candidates).to_csv(folder / f"{kind}-retrieval" / "candidate.csv", index=False)


def _save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95)
    path.write_bytes(buffer.getvalue())
