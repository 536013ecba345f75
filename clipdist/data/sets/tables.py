"""Tables (CSV, TSV, JSONL, Parquet, XLSX) and folders with sidecar texts -> pairs ready to be packed."""

import datetime
import difflib
import errno
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import xxhash

from clipdist.data.sets.pack import SPLIT_NAME, Pair, Rejected
from clipdist.errors import UserError

TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".parquet", ".xlsx")
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".dcm"})
# How a number is written when nothing is lost by reading it as one: no leading zeros, no exponent.
INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d{1,15})?")


def read_table(path: Path, encoding: str | None = None) -> pd.DataFrame:
    """The table at `path`, told by its suffix; the index is the number of the data row, the first being 1.

    Cells of CSV and TSV are strings exactly as written (`007` stays `007`, `NA` stays `NA`), empty ones NaN; the
    separator of a `.csv` without a comma in its header may be `;` or a tab. Other formats keep their types. Of a
    workbook the first sheet is read. A byte order mark is dropped. `encoding`, UTF-8 where it is None, is that of CSV,
    TSV and JSONL. Raises `UserError` when there is no such file, no rows, a file that does not parse, or two columns
    whose names differ in nothing but the blanks around them.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such table; expected a file ending in {', '.join(TABLES)}")
    kind = "".join(path.suffixes[-2:]).lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if kind not in TABLES:
        raise UserError(f"{path}: found the suffix {kind!r}, expected one of {', '.join(TABLES)}")
    try:
        table = _READERS[kind.removesuffix(".gz")](path, encoding or "utf-8-sig")
    except UnicodeDecodeError as error:
        # Who names no encoding has no option for it.
        other = ", or name its encoding (--encoding cp1252, gb18030, utf-16, ...)" if encoding else ""
        raise UserError(
            f"{path}: not {encoding or 'UTF-8'} (byte 0x{error.object[error.start]:02x}); save it as UTF-8{other}"
        ) from None
    except LookupError as error:
        raise UserError(f"{path}: {error}") from None
    except UserError:
        raise
    except Exception as error:  # each reader has exceptions of its own for files that are not what they claim to be
        raise UserError(f"{path}: unreadable table ({type(error).__name__}: {_one_line(error)})") from None
    if not len(table):
        raise UserError(f"{path}: the table has no rows")
    names = [str(name).strip() for name in table.columns]
    for name, times in Counter(names).items():
        if times > 1:
            often = "twice" if times == 2 else f"{times} times"
            raise UserError(f"{path}: column {name!r} is there {often}; expected each name once: rename the others")
    table.columns = names
    table.index = pd.RangeIndex(1, len(table) + 1)
    return table


def read_folder(folder: Path) -> tuple[pd.DataFrame, list[Rejected]]:
    """Images anywhere below `folder` with the text beside them: columns `image` (relative path) and `text`.

    The text of `x.jpg` is `x.txt` or `x.jpg.txt`, the whole file being one caption; or it is the field `text`, a
    string or a list of strings, of the object in `x.json` or `x.jpg.json`, whose other fields become columns.
    Also returns the images whose text is missing or unreadable. The row is the place in the sorted list of images.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    images = images_below(folder)
    if not images:
        raise UserError(f"{folder}: no images in it; expected files ending in {', '.join(sorted(IMAGES))}")
    records, rows, rejected = [], [], []
    for row, path in enumerate(images, start=1):
        name = path.relative_to(folder).as_posix()
        try:
            records.append({**sidecar(path), "image": name})
            rows.append(row)
        except ValueError as error:
            rejected.append(Rejected(row, key_from(name), str(path), str(error)))
    frame = pd.DataFrame(records, index=pd.Index(rows, dtype=int), dtype=object)
    return (frame if records else pd.DataFrame({"image": [], "text": []}, dtype=object)), rejected


def images_below(folder: Path) -> list[Path]:
    """Files anywhere below `folder` that are images by their suffix, sorted; none that are hidden."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGES and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def pairs_from_table(
    table: pd.DataFrame,
    *,
    images: Path,
    image_column: str,
    text_columns: Sequence[str],
    key_column: str | None = None,
    label_column: str | None = None,
    unit_column: str | None = None,
    keep_columns: Sequence[str] = (),
    merge_captions: bool = False,
    captions_needed: bool = True,
    name: str = "table",
) -> tuple[list[Pair], list[Rejected]]:
    """One pair for each row that names an image and, where `captions_needed`, a caption; the other rows, with reasons.

    Image cells are paths relative to `images` (or absolute). The captions of a pair are its non-empty `text_columns`,
    a cell holding a string or a list of strings; where it holds anything deeper the row is rejected. The key comes from
    `key_column` or else from the image's path.
    `label_column` and `unit_column` become the fields `label` and `unit`, as strings; `keep_columns` keep their names,
    and columns of text that holds nothing but plain numbers become numbers. `merge_captions` makes rows with the same
    image one pair with all their captions and the first row's fields. Whether an image exists shows when it is packed.
    """
    if not images.is_dir():
        raise UserError(f"images {images}: there is no such folder; expected the one that the image paths start from")
    named = [image_column, *text_columns, key_column, label_column, unit_column, *keep_columns]
    check_columns(table, [column for column in named if column is not None], name)
    fields = _fields(table, label_column, unit_column, keep_columns)
    texts = [table[column].tolist() for column in text_columns]
    keys = table[key_column].tolist() if key_column else [None] * len(table)
    pairs: dict[str | int, Pair] = {}
    rejected: list[Rejected] = []
    for place, (row, cell) in enumerate(zip(table.index.tolist(), table[image_column].tolist(), strict=True)):
        image = _text(cell).replace("\\", "/")
        key = key_from(image) if key_column is None else key_from(_text(keys[place]), is_path=False)
        captions, nested = _captions([column[place] for column in texts])
        reason = "no image named" if not image else "no key" if not key else nested
        if not reason and captions_needed and not captions:
            reason = "empty caption"
        if reason:
            rejected.append(Rejected(row, key, image, reason))
        elif merge_captions and image in pairs:
            pairs[image].text.extend(caption for caption in captions if caption not in pairs[image].text)
        else:
            values = {field: column[place] for field, column in fields.items() if column[place] is not None}
            pairs[image if merge_captions else row] = Pair(key, images / image, captions, values, row)
    return list(pairs.values()), rejected


def split_pairs(
    pairs: Sequence[Pair],
    fractions: Mapping[str, float],
    seed: int,
    stratify: Mapping[int, Any] | None = None,
    together_E2: np.ndarray | None = None,
) -> dict[str, list[Pair]]:
    """The pairs of each split, in the order of `fractions`; see `split_by`.

    Units are the field `unit`; a pair without one is its own unit. `together_E2` are places in `pairs` of which the
    units are joined: the `edges()` of `duplicates_of([pair.image for pair in pairs])` keep near-duplicates together.
    Proportions are kept of the field `label`, or of `stratify`, which maps a pair's row to a label.
    """
    from clipdist.prepare.splits import check_fractions, split_by  # brings scikit-learn, which takes seconds
    from clipdist.prepare.units import joined_units

    fractions = check_fractions(fractions)
    if len(pairs) < len(fractions):
        raise UserError(f"split: found {len(pairs)} usable pairs for the splits {', '.join(fractions)}")
    none = np.zeros((0, 2), np.int64)
    units = joined_units([pair.fields.get("unit") for pair in pairs], none if together_E2 is None else together_E2)
    labels = [pair.fields.get("label") if stratify is None else stratify.get(pair.row or 0) for pair in pairs]
    names = split_by(labels, units, fractions, seed)
    split: dict[str, list[Pair]] = {name: [] for name in fractions}
    for pair, name in zip(pairs, names.tolist(), strict=True):
        split[name].append(pair)
    return split


def split_by_column(
    pairs: Sequence[Pair], table: pd.DataFrame, column: str, name: str = "table"
) -> tuple[dict[str, list[Pair]], list[Rejected]]:
    """The pairs of each split that `column` names, in order of first appearance; and those it names none for."""
    check_columns(table, [column], name)
    of_row = {row: _text(cell) for row, cell in zip(table.index.tolist(), table[column].tolist(), strict=True)}
    split: dict[str, list[Pair]] = {}
    rejected = []
    for pair in pairs:
        assert pair.row is not None
        if SPLIT_NAME.fullmatch(of_row[pair.row]):
            split.setdefault(of_row[pair.row], []).append(pair)
        else:
            rejected.append(Rejected.of(pair, f"split {of_row[pair.row]!r} is not a name of letters, digits, _ and -"))
    return split, rejected


def check_columns(table: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    """`UserError` for the first of `columns` that the table does not have, with the nearest one and all of them."""
    known = list(table.columns)
    for column in columns:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1, cutoff=0.5)
            nearest = f"; nearest: {near[0]!r}" if near else ""
            raise UserError(f"{name}: no column {column!r}{nearest}; its columns: {', '.join(map(str, known))}")


def key_from(name: str, *, is_path: bool = True) -> str:
    """A sample key of letters, digits, `_`, `-` and `/` out of a relative path (its suffix dropped) or any other name.

    No dots, because in a WebDataset one starts the extension. A name with letters beyond ASCII keeps itself apart by
    a checksum at its end, since all of them turn into `_`. Empty for an empty name.
    """
    path = PurePosixPath(name.strip())
    stem = str(path.with_suffix("")) if is_path and path.name else str(path)
    stem = "" if stem == "." else stem.strip("/")
    key = re.sub(r"[^A-Za-z0-9_\-/]", "_", stem)
    # Names of files that are no UTF-8, and tables in JSON, hold half characters.
    return key if stem.isascii() else f"{key}-{xxhash.xxh3_64_hexdigest(stem.encode(errors='surrogatepass'))[:8]}"


def _read_csv(path: Path, encoding: str, separator: str = ",") -> pd.DataFrame:
    if separator == "," and path.suffix != ".gz":
        with open(path, encoding=encoding) as file:
            header = file.readline()
        if "," not in header:
            separator = max(";\t", key=header.count) if any(mark in header for mark in ";\t") else ","
    with warnings.catch_warnings():
        # With more cells than columns pandas would drop the surplus with no more than a warning.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(
            path,
            sep=separator,
            dtype=str,
            encoding=encoding,
            keep_default_na=False,
            na_values=[""],
            index_col=False,
        )


def _read_jsonl(path: Path, encoding: str) -> pd.DataFrame:
    records = []
    with open(path, encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error.msg})") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}: line {number} holds a {type(record).__name__}, expected an object")
            records.append(record)
    return pd.DataFrame(records, dtype=object)


def _read_parquet(path: Path, encoding: str) -> pd.DataFrame:
    import pyarrow.parquet

    # Without this a column of integers with gaps becomes one of floats.
    return pyarrow.parquet.read_table(path).to_pandas(integer_object_nulls=True)


def _read_xlsx(path: Path, encoding: str) -> pd.DataFrame:
    return pd.read_excel(path, dtype=object, keep_default_na=False, na_values=[""])


_READERS = {
    ".csv": _read_csv,
    ".tsv": lambda path, encoding: _read_csv(path, encoding, "\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".xlsx": _read_xlsx,
}


def sidecar(image: Path, *, text_needed: bool = True) -> dict[str, Any]:
    """The text and further fields that lie beside an image; `ValueError` says what is wrong with them, or that there is
    no text though it is needed."""
    found: dict[str, Any] = {}
    for suffix in (".txt", ".json"):
        for path in (image.with_suffix(suffix), image.with_name(image.name + suffix)):
            try:
                if not path.is_file():
                    continue
                text = path.read_text(encoding="utf-8-sig")
                fields = json.loads(text) if suffix == ".json" else {"text": text}
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{path.name}: not {'JSON' if suffix == '.json' else 'UTF-8'} ({error})") from None
            except RecursionError:
                raise ValueError(f"{path.name}: JSON that is nested too deeply") from None
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    continue  # so there is none
                raise
            if not isinstance(fields, dict):
                raise ValueError(f"{path.name}: holds a {type(fields).__name__}, expected an object")
            found.update(fields)
            break
    if text_needed and "text" not in found:
        raise ValueError("no text: neither a .txt nor a .json with `text` beside the image")
    return found


def _fields(
    table: pd.DataFrame, label_column: str | None, unit_column: str | None, keep_columns: Sequence[str]
) -> dict[str, list[Any]]:
    """The fields to store, each a list with one value for each row, None where there is none."""
    fields = {column: _json_column(table[column]) for column in keep_columns}
    for field, column in (("text", None), ("label", label_column), ("unit", unit_column)):
        if field in fields and (field == "text" or column not in (None, field)):
            raise UserError(
                f"column {field!r} cannot be kept: the field {field!r} is made from other columns; rename the column"
            )
        if column is not None:
            fields[field] = [_text(cell) or None for cell in table[column].tolist()]
    return fields


def _json_column(column: pd.Series) -> list[Any]:
    values = [_json(cell) for cell in column.tolist()]
    written = [value for value in values if value is not None]
    if not all(isinstance(value, str) for value in written):
        return values
    for pattern, number in ((INTEGER, int), (NUMBER, float)):
        if all(pattern.fullmatch(value) for value in written):
            return [None if value is None else number(value) for value in values]
    return values


def _json(value: Any) -> Any:
    """A cell as JSON can hold it; None for a missing one."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_json(inner) for inner in value]
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if isinstance(value, str | int | float | bool) else str(value)


def _text(cell: Any) -> str:
    """A cell as text; a whole number without `.0`; empty for a missing one."""
    value = _json(cell)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def _captions(cells: Sequence[Any]) -> tuple[list[str], str]:
    """What these cells say, and what is wrong with the first of them that is neither a text nor a list of texts."""
    texts: list[str] = []
    for value in map(_json, cells):
        inner = value if isinstance(value, list) else [value]
        if any(isinstance(one, list | dict) for one in inner):
            shown = json.dumps(value, ensure_ascii=False)[:80]
            return [], f"caption {shown}: expected a text or a list of texts"
        texts += [text for text in map(_text, inner) if text]
    return texts, ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
