"""Folders laid out like SkinCAP (4,000 dermatological photographs with captions, arXiv:2405.18004) -> pairs.

    <raw>/skincap_v240623.csv     English captions by GPT-4, column `caption_zh_polish_en`
    <raw>/skincap_v240715.xlsx    English captions by Google Translate, column `caption_en`
    <raw>/skincap/1.png ...       the images; skincap/not_include/ holds ones that the authors left out

The English captions of the two tables agree in 8 of 4,000 rows, so a score means nothing without the table's name.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from clipdist.data.sets.pack import Pair, Rejected
from clipdist.data.sets.tables import check_columns, pairs_from_table, read_table
from clipdist.data.shards import checksum_file
from clipdist.errors import UserError

TABLES = ("skincap_v240623.csv", "skincap_v240715.xlsx")
CAPTIONS = ("caption_zh_polish_en", "caption_en")
UNITS = ("patient_id", "ori_file_path")
IMAGE, LABEL, REFUSED = "skincap_file_path", "disease", "Do not consider this image"
FIELDS = ("skin_tone", "fitzpatrick_scale", "malignant", "source")
IMAGES = "skincap"


@dataclass(frozen=True)
class SkincapPairs:
    """`pairs` and `rejected` of a SkinCAP folder; `notes` and `sources` for the manifest say what was chosen."""

    pairs: list[Pair]
    rejected: list[Rejected]
    notes: dict[str, Any]
    sources: dict[str, str]


def read_skincap(raw: Path, *, table: str | None = None, caption: str | None = None) -> SkincapPairs:
    """The usable pairs of the folder `raw`: label `disease`, unit, skin tone and origin as fields.

    `table` is a file in `raw` (by default the first that is there of the two that were published), `caption` a column
    of it (by default the English one that it has). Left out, and counted in `notes`, are images in `not_include/`
    and rows marked `Do not consider this image`. The unit is `patient_id` where there is such a column, else
    `ori_file_path`. Raises `UserError` when a file or a column is missing.
    """
    if not raw.is_dir():
        raise UserError(f"{raw}: there is no such folder; expected the downloaded SkinCAP files")
    path = _table(raw, table)
    rows = read_table(path)
    caption = caption or _first(rows, CAPTIONS, "caption", path)
    unit = _first(rows, UNITS, "unit", path)
    check_columns(rows, [IMAGE, caption, LABEL, REFUSED], str(path))
    if not (raw / IMAGES).is_dir():
        raise UserError(f"{raw / IMAGES}: there is no such folder; expected the images beside {path.name}")

    paths = rows[IMAGE].map(_below_images, na_action="ignore").astype(object)
    not_included = paths.map(lambda value: "not_include" in PurePosixPath(value).parts, na_action="ignore") == True  # noqa: E712
    refused = _marked(rows[REFUSED], path)
    usable = rows.assign(**{IMAGE: paths})[~(not_included | refused)]
    kept = [column for column in FIELDS if column in rows.columns]
    pairs, rejected = pairs_from_table(
        usable,
        images=raw / IMAGES,
        image_column=IMAGE,
        text_columns=[caption],
        label_column=LABEL,
        unit_column=unit,
        keep_columns=kept,
        name=str(path),
    )
    notes = {
        "table": path.name,
        "caption_column": caption,
        "label_column": LABEL,
        "unit_column": unit,
        "fields_absent": [column for column in FIELDS if column not in kept],
        "rows": len(rows),
        "left_out": {"not_include": int(not_included.sum()), "marked": int((refused & ~not_included).sum())},
    }
    return SkincapPairs(pairs, rejected, notes, {path.name: checksum_file(path)})


def _table(raw: Path, name: str | None) -> Path:
    if name is not None:
        return raw / name
    for candidate in TABLES:
        if (raw / candidate).is_file():
            return raw / candidate
    raise UserError(f"{raw}: found neither {' nor '.join(TABLES)}; put one there or name another with --table")


def _first(rows: pd.DataFrame, candidates: tuple[str, ...], what: str, path: Path) -> str:
    for column in candidates:
        if column in rows.columns:
            return column
    raise UserError(f"{path}: no {what} column, expected {' or '.join(candidates)}; found {', '.join(rows.columns)}")


def _below_images(value: Any) -> str:
    """`1.png`, `skincap/1.png` and `/elsewhere/skincap/1.png` all -> `1.png`."""
    parts = PurePosixPath(str(value).strip().replace("\\", "/")).parts
    if IMAGES in parts[:-1]:
        parts = parts[len(parts) - parts[::-1].index(IMAGES) :]
    return "/".join(parts)


def _marked(column: pd.Series, path: Path) -> np.ndarray:
    """True where the column holds a 1; `UserError` for anything but 0, 1 and nothing."""
    numbers = pd.to_numeric(column, errors="coerce")
    strange = column[(numbers.isna() & column.notna()) | ~(numbers.isna() | numbers.isin([0, 1]))]
    if len(strange):
        raise UserError(
            f"{path}: column {column.name!r}, row {strange.index[0]}: found {strange.iloc[0]!r}, expected 0 or 1"
        )
    return (numbers == 1).to_numpy()
