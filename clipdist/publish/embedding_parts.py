"""What `clipdist embed` has on disk before the gallery is finished: one folder for each chunk of consecutive samples,
complete or absent; and how all of them become the gallery.

    parts/000007/
      part.json       rows, captions, unreadable samples, kinds of values in each field
      image.npy       float16 [n, D]; where images are embedded
      text.npy        float16 [m, D], and owner.npy, int64 [m], rows of the part; where texts are embedded
      rows.parquet    key, texts, where the image is, and the fields as JSON
      bad.jsonl       what could not be read

The folder is renamed into place when all of it is on disk, so its presence is the note that its chunk is done.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipdist.data.shards import fsync_folder
from clipdist.publish.coarse import write_coarse

ROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("texts", pa.list_(pa.string())),
        ("split", pa.string()),
        ("number", pa.int64()),
        ("image", pa.string()),
        ("fields", pa.string()),
    ]
)
OWN_COLUMNS = ("key", "texts", "split", "number", "image")
OTHER = "other"
"""Column of the finished table with all that has no column of its own, a JSON object."""
MOST_COLUMNS = 200
ROWS_TOGETHER = 512
"""In the finished table, the most rows of a group."""
KINDS = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}


@dataclass
class Part:
    """A chunk's samples. n readable ones, m captions."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """As `ROW_SCHEMA` has them, but for `fields`, which is a dictionary."""
    bad: list[dict[str, Any]] = field(default_factory=list)
    image_features_nD: np.ndarray | None = None
    text_features_mD: np.ndarray | None = None
    owner_m: np.ndarray | None = None


def part_path(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}"


def write_part(parts: Path, number: int, part: Part) -> None:
    """Puts the part on disk whole or not at all. Another process may write the same one at the same time."""
    target = part_path(parts, number)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    arrays = {"image": part.image_features_nD, "text": part.text_features_mD, "owner": part.owner_m}
    for name, array in arrays.items():
        if array is not None:
            np.save(partial / f"{name}.npy", array)
    table = pa.Table.from_pylist(
        [{**row, "fields": json.dumps(row["fields"], sort_keys=True)} for row in part.rows], ROW_SCHEMA
    )
    pq.write_table(table, partial / "rows.parquet", compression="zstd")
    (partial / "bad.jsonl").write_bytes(_lines(part.bad))
    about = {
        "rows": len(part.rows),
        "texts": 0 if part.owner_m is None else len(part.owner_m),
        "bad": len(part.bad),
        "kinds": _kinds(row["fields"] for row in part.rows),
    }
    (partial / "part.json").write_text(json.dumps(about), encoding="utf-8")
    for path in partial.iterdir():
        sync(path)
    if target.exists():
        shutil.rmtree(partial)
        return
    os.rename(partial, target)
    fsync_folder(parts)


def sync(path: Path) -> None:
    """Returns when the file's bytes are on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _lines(records: Iterable[dict[str, Any]]) -> bytes:
    """JSON lines; what UTF-8 cannot hold is escaped."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return lines.encode("utf-8", "backslashreplace")


def _kinds(fields: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Field -> the kinds of its values, none for null."""
    found: dict[str, set[str]] = {}
    for one in fields:
        for name, value in one.items():
            kinds = found.setdefault(name, set())
            if value is not None:
                fits = not isinstance(value, int) or -(2**63) <= value < 2**63
                kinds.add(type(value).__name__ if fits else "large")
    return {name: sorted(kinds) for name, kinds in sorted(found.items())}


def clear_partial(parts: Path) -> None:
    """Removes what killed processes have left."""
    for path in parts.glob("*.partial-*"):
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Joined:
    """What the parts hold together."""

    rows: int
    texts: int
    bad: int
    columns: list[str]
    """Fields with a column of their own."""
    files: list[str]


def join(parts: Sequence[Path], folder: Path, *, width: int, image: bool, text: bool) -> Joined:
    """Writes the gallery's files, but for `embeddings.json`, from the parts in order. In memory is one part at a time.

    A second call after one that was killed writes them anew.
    """
    about = [json.loads((part / "part.json").read_text(encoding="utf-8")) for part in parts]
    rows, texts, bad = (sum(one[name] for one in about) for name in ("rows", "texts", "bad"))
    schema = _schema(one["kinds"] for one in about)
    partial = [_join_rows(parts, folder, schema)]
    if image:
        partial += _join_features(parts, folder, "image", (rows, width))
    if text:
        partial += _join_features(parts, folder, "text", (texts, width))
        partial.append(_join_owners(parts, folder, texts))
    if bad:
        partial.append(_join_bad(parts, folder))
    else:
        (folder / "bad.jsonl").unlink(missing_ok=True)
    for path in partial:
        sync(path)
        os.replace(path, path.with_suffix(""))
    fsync_folder(folder)
    columns = [name for name in schema.names if name not in (*OWN_COLUMNS, OTHER)]
    return Joined(rows, texts, bad, columns, sorted(path.stem for path in partial))


def _partial(folder: Path, name: str) -> Path:
    return folder / f"{name}.partial"


def _schema(kinds_of_parts: Iterable[dict[str, list[str]]]) -> pa.Schema:
    """The finished table's columns: a field whose values are all of one simple kind has one of its own."""
    kinds: dict[str, set[str]] = {}
    for one in kinds_of_parts:
        for name, found in one.items():
            kinds.setdefault(name, set()).update(found)
    simple = []
    for name in sorted(kinds):
        if len(kinds[name]) == 1 and kinds[name] <= KINDS.keys() and name not in (*OWN_COLUMNS, OTHER):
            simple.append((name, KINDS[next(iter(kinds[name]))]))
    own = [ROW_SCHEMA.field(name) for name in OWN_COLUMNS]
    return pa.schema([*own, *simple[:MOST_COLUMNS], (OTHER, pa.string())])


def _join_rows(parts: Sequence[Path], folder: Path, schema: pa.Schema) -> Path:
    partial = _partial(folder, "rows.parquet")
    columns = [name for name in schema.names if name not in (*OWN_COLUMNS, OTHER)]
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for part in parts:
            table = pq.read_table(part / "rows.parquet", schema=ROW_SCHEMA)
            if not len(table):
                continue
            fields = [json.loads(text) for text in table["fields"].to_pylist()]
            made = {name: table[name] for name in OWN_COLUMNS}
            for name in columns:
                made[name] = pa.array([one.pop(name, None) for one in fields], schema.field(name).type)
            made[OTHER] = pa.array([json.dumps(one, ensure_ascii=False) if one else None for one in fields])
            # Small groups, however large the parts: a single row is read by decoding one, and readers hold several.
            writer.write_table(pa.table(made, schema=schema), row_group_size=ROWS_TOGETHER)
    return partial


def _join_features(parts: Sequence[Path], folder: Path, name: str, shape: tuple[int, int]) -> list[Path]:
    """The features and their coarse copy."""
    partial = _partial(folder, f"{name}_features.npy")
    features = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    start = 0
    for part in _arrays(parts, name):
        features[start : start + len(part)] = part
        start += len(part)
    features.flush()
    assert start == len(features)
    return [partial, *write_coarse(features, _partial(folder, f"{name}_coarse.npy"))]


def _join_owners(parts: Sequence[Path], folder: Path, texts: int) -> Path:
    partial = _partial(folder, "text_owner.npy")
    owner = np.lib.format.open_memmap(partial, mode="w+", dtype=np.int64, shape=(texts,))
    start = first_row = 0
    for part in parts:
        own = np.load(part / "owner.npy")
        owner[start : start + len(own)] = own + first_row
        start += len(own)
        first_row += json.loads((part / "part.json").read_text(encoding="utf-8"))["rows"]
    owner.flush()
    return partial


def _join_bad(parts: Sequence[Path], folder: Path) -> Path:
    partial = _partial(folder, "bad.jsonl")
    with open(partial, "wb") as file:
        for part in parts:
            file.write((part / "bad.jsonl").read_bytes())
    return partial


def _arrays(parts: Sequence[Path], name: str) -> Iterator[np.ndarray]:
    for part in parts:
        yield np.load(part / f"{name}.npy")
