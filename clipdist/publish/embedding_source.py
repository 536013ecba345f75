"""What `clipdist embed` reads: a shard set, a folder of images, or a table of image paths; numbered from 0.

Files are listed once, into a Parquet file that every process reads a piece of at a time, so that no process but the one
that lists holds anything for each image.
"""

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from clipdist.data.shards import MANIFEST, BadSample, RawSample, ShardSet, checksum_file
from clipdist.errors import DiskError, UserError

if TYPE_CHECKING:
    import pandas as pd

LISTING_SCHEMA = pa.schema(
    [
        ("image", pa.string()),  # relative to the root, or absolute
        ("key", pa.string()),
        ("texts", pa.list_(pa.string())),  # null: whatever lies beside the image
        ("fields", pa.string()),  # JSON object
        ("problem", pa.string()),  # why there is nothing to read; else null
    ]
)
LISTED_TOGETHER = 4096
"""Rows of a listing that are read at once."""
PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT),  # the disk, or the way to it
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),  # this machine
}
"""What stops reading for reasons that are not the file's, and may be gone when it is tried again."""


class Place(NamedTuple):
    """Where a sample is: in a split of a shard set, or in a file."""

    key: str
    split: str | None
    number: int | None
    """In the split."""
    image: str | None
    """Path, relative to the source's root unless it is absolute."""


class Source(Protocol):
    """Samples that every process can read; instances are pickled to reach them."""

    digest: str
    """Equal for equal data."""

    def __len__(self) -> int: ...

    def place(self, number: int) -> Place: ...

    def read(self, number: int) -> RawSample:
        """Raises `BadSample` for what cannot be read."""

    def about(self) -> dict[str, Any]:
        """What `open_source` needs to find the images again, and the digest."""


class SetSource:
    """Splits of a shard set, one after another. Raises `UserError` when the set has no such split."""

    def __init__(self, location: str, splits: Sequence[str] = ()) -> None:
        self.shard_set = ShardSet.open(location)
        self.location = self.shard_set.location
        if "://" not in self.location:
            self.location = str(Path(self.location).absolute())
        self.names = list(dict.fromkeys(splits)) or list(self.shard_set.manifest.splits)
        self._splits = [self.shard_set.split(name) for name in self.names]
        self._ends = np.cumsum([len(split) for split in self._splits])
        hasher = xxhash.xxh3_64()
        for name, split in zip(self.names, self._splits, strict=True):
            hasher.update(f"{name}\0{split.digest}\n".encode())
        self.digest = hasher.hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _at(self, number: int) -> tuple[int, int]:
        place = int(np.searchsorted(self._ends, number, side="right"))
        return place, number - int(self._ends[place]) + len(self._splits[place])

    def place(self, number: int) -> Place:
        split, within = self._at(number)
        try:
            key = self._splits[split].key(within)
        except BadSample:
            key = ""
        return Place(key, self.names[split], within, None)

    def read(self, number: int) -> RawSample:
        split, within = self._at(number)
        try:
            return self._splits[split].read(within)
        except OSError as error:  # the shard's, never a sample's
            raise _stopped(Path(error.filename or self.location), error.strerror or str(error)) from error
        except BadSample as error:
            behind = error.__context__
            if isinstance(behind, OSError) and behind.errno in PASSING:
                raise _stopped(Path(self.location), str(behind.strerror)) from behind
            raise

    def read_in(self, split: str, number: int) -> RawSample:
        """A sample by its split and its number there."""
        return self.shard_set.split(split).read(number)

    def about(self) -> dict[str, Any]:
        return {"kind": "shards", "location": self.location, "splits": self.names, "digest": self.digest}


@dataclass
class FileSource:
    """Images of a listing; paths in it start from `root`."""

    kind: str
    location: str
    root: Path
    listing: Path
    digest: str
    rows: int
    _held: tuple[int, dict[str, list[Any]]] = field(default=(-1, {}), repr=False)

    def __len__(self) -> int:
        return self.rows

    def _entry(self, number: int) -> dict[str, Any]:
        group, row = divmod(number, LISTED_TOGETHER)
        held = self._held  # read and replaced as one: several threads come here
        if group != held[0]:
            held = self._held = group, pq.ParquetFile(self.listing).read_row_group(group).to_pydict()
        return {name: column[row] for name, column in held[1].items()}

    def place(self, number: int) -> Place:
        entry = self._entry(number)
        return Place(entry["key"], None, None, entry["image"])

    def read(self, number: int) -> RawSample:
        entry = self._entry(number)
        if entry["problem"]:
            raise BadSample(entry["problem"])
        path = self.root / entry["image"]
        data = read_file(path, self.root)
        texts, fields = entry["texts"], json.loads(entry["fields"])
        if texts is None:
            texts, fields = _beside(path, self.root)
        return RawSample(entry["key"], data, path.suffix[1:].lower(), texts, fields)

    def about(self) -> dict[str, Any]:
        return {"kind": self.kind, "location": self.location, "root": str(self.root), "digest": self.digest}


def read_file(path: Path, root: Path | None = None) -> bytes:
    """An image's bytes. Raises `BadSample` when it cannot be read, `DiskError` when nothing can: for a failure that may
    pass, or when `root`, the folder that all images are in, is gone."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(error, path, root) from None
    except ValueError as error:  # a path with a zero byte
        raise BadSample(f"cannot be read ({error})") from None


def _unreadable(error: OSError, path: Path, root: Path | None) -> Exception:
    """`DiskError` or `BadSample`, as `read_file` has it."""
    reason = error.strerror or str(error)
    if error.errno in PASSING:
        return _stopped(path, reason)
    if root is not None and (gone := _gone(root)):
        return _stopped(root, gone)
    if isinstance(error, FileNotFoundError):
        return BadSample("there is no such file")
    return BadSample(f"cannot be read ({reason})")


def _stopped(path: Path, reason: str) -> DiskError:
    return DiskError(
        f"{path}: cannot be read ({reason}), which may be the disk's failure and not the file's; try again when it "
        f"can be read (`clipdist embed` goes on where it stopped)",
        reason,
    )


def _gone(root: Path) -> str:
    """Why nothing in `root` can be read; empty when something may be. An empty folder is where a disk was mounted."""
    try:
        with os.scandir(root) as entries:
            return "" if next(entries, None) else "the folder is empty"
    except PermissionError as error:  # a folder that cannot be listed may still be entered
        return "" if os.access(root, os.X_OK) else str(error.strerror)
    except OSError as error:
        return error.strerror or str(error)


def _beside(image: Path, root: Path) -> tuple[list[str], dict[str, Any]]:
    """Texts and fields that lie beside an image; none when nothing does."""
    from clipdist.data.sets.tables import sidecar

    try:
        fields = sidecar(image, text_needed=False)
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadSample("unreadable caption or field: half a character (a surrogate), which is no text") from None
    except RecursionError:
        raise BadSample("unreadable caption: JSON that is nested too deeply") from None
    except ValueError as error:
        raise BadSample(str(error)) from None
    except OSError as error:
        beside = Path(error.filename or image)
        problem = _unreadable(error, beside, root)
        raise BadSample(f"{beside.name}: {problem}") if isinstance(problem, BadSample) else problem from None
    found = fields.pop("text", None) or []
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadSample("unreadable caption: `text` must be a string or a list of strings")
    return [text.strip() for text in texts if text.strip()], fields


TEXT_FIELD = "text\0"
"""For a while, the name of a column `text` that does not hold the captions."""


@dataclass(frozen=True)
class TableColumns:
    """Which columns of a table hold what. Without `texts`, the column `text` where there is one."""

    image: str = "image"
    texts: Sequence[str] = ()
    key: str | None = None
    root: Path | None = None
    """Where image paths start; by default the table's folder."""


def kind_of(data: str) -> str:
    """`shards`, `folder` or `table`; `UserError` when there is nothing of that name."""
    path = Path(data)
    if "://" in data or (path / MANIFEST).exists():
        return "shards"
    if path.is_dir():
        tars = any(entry.name.endswith((".tar", ".tar.zst")) for entry in path.iterdir())
        return "shards" if tars else "folder"
    if path.is_file():
        return "table"
    raise UserError(f"--data {data}: there is no such shard set, folder or table")


def list_files(data: str, listing: Path, columns: TableColumns, *, captions: bool = False) -> FileSource:
    """Lists the images of a folder or table into `listing`. Raises `UserError` when there are none. With `captions`,
    the digest tells texts beside a folder's images that have changed."""
    if Path(data).is_dir():
        root, entries, extra = Path(data).absolute(), _folder_entries(Path(data)), ""
        if captions:
            _note_sidecars(Path(data), entries)
    else:
        root, entries = _table_entries(Path(data), columns)
        extra = checksum_file(Path(data))
    hasher = xxhash.xxh3_64(extra.encode())
    partial = listing.with_name(listing.name + ".partial")
    with pq.ParquetWriter(partial, LISTING_SCHEMA, compression="zstd") as writer:
        for start in range(0, len(entries), LISTED_TOGETHER):
            some = entries[start : start + LISTED_TOGETHER]
            for entry in some:
                hasher.update(json.dumps(entry, sort_keys=True).encode())
                entry.pop("bytes", None)
                entry.pop("beside", None)
            writer.write_table(pa.Table.from_pylist(some, LISTING_SCHEMA))
    partial.replace(listing)
    kind = "folder" if Path(data).is_dir() else "table"
    return FileSource(kind, str(Path(data).absolute()), root, listing, hasher.hexdigest(), len(entries))


def _folder_entries(folder: Path) -> list[dict[str, Any]]:
    from clipdist.data.sets.tables import images_below, key_from

    found = images_below(folder)
    if not found:
        raise UserError(f"{folder}: no images in it; expected a shard set, image files, or a table")
    entries = []
    for path in found:
        name = path.relative_to(folder).as_posix()
        readable = name.encode("utf-8", "backslashreplace").decode()
        entry: dict[str, Any] = {"image": readable, "key": key_from(readable), "texts": None, "fields": "{}"}
        entries.append(entry)
        if readable != name:
            entry["problem"] = "the file's name is not UTF-8; rename it"
        try:
            entry["bytes"] = path.stat().st_size
        except OSError as error:  # most often a link that leads nowhere
            problem = _unreadable(error, path, folder)
            if not isinstance(problem, BadSample):
                raise problem from None
            entry["problem"] = str(problem)
    return entries


def _note_sidecars(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Adds to each entry `beside`: name, size and time of what may hold its texts."""
    held: dict[Path, set[str]] = {}
    for entry in entries:
        image = folder / entry["image"]
        if entry.get("problem"):
            continue
        if image.parent not in held:
            held[image.parent] = {name for name in os.listdir(image.parent) if name.endswith((".txt", ".json"))}
        names = {image.stem + suffix for suffix in (".txt", ".json")} | {image.name + s for s in (".txt", ".json")}
        beside = []
        for name in sorted(names & held[image.parent]):
            try:
                found = (image.parent / name).stat()
            except OSError as error:
                problem = _unreadable(error, image.parent / name, folder)
                if not isinstance(problem, BadSample):
                    raise problem from None
                continue
            beside.append([name, found.st_size, found.st_mtime_ns])
        if beside:
            entry["beside"] = beside


def _table_entries(path: Path, columns: TableColumns) -> tuple[Path, list[dict[str, Any]]]:
    from clipdist.data.sets.tables import check_columns, pairs_from_table, read_table

    table = read_table(path)
    halves = _take_out_halves(table) if path.suffix == ".jsonl" else set()
    root = (columns.root or path.parent).absolute()
    texts = list(columns.texts) or [name for name in ("text",) if name in table.columns]
    key_column = columns.key
    check_columns(table, [name for name in (columns.image, *texts, key_column) if name is not None], str(path))
    used = {columns.image, *texts}
    if "text" in table.columns and "text" not in used:
        # Here a field like any other, though `pairs_from_table` keeps that name for captions.
        table = table.rename(columns={"text": TEXT_FIELD})
        key_column = TEXT_FIELD if key_column == "text" else key_column
    pairs, rejected = pairs_from_table(
        table,
        images=root,
        image_column=columns.image,
        text_columns=texts,
        key_column=key_column,
        keep_columns=[name for name in table.columns if name not in used],
        captions_needed=False,
        name=str(path),
    )
    entries = {
        pair.row: {
            "image": _relative(pair.image, root),
            "key": pair.key,
            "texts": pair.text,
            "fields": json.dumps({"text" if name == TEXT_FIELD else name: one for name, one in pair.fields.items()}),
        }
        for pair in pairs
    }
    for one in rejected:
        entries[one.row] = {"image": one.image, "key": one.key, "texts": [], "fields": "{}", "problem": one.reason}
    for row in halves:
        entries[row] |= {"texts": [], "fields": "{}", "problem": "half a character (a surrogate), which is no text"}
    return root, [entries[row] for row in sorted(entries, key=lambda row: row or 0)]


def _take_out_halves(table: "pd.DataFrame") -> set[int]:
    """Escapes in columns' names, and removes from cells, what UTF-8 cannot hold; of JSON alone. Returns the rows."""
    table.columns = [name.encode("utf-8", "backslashreplace").decode() for name in table.columns]
    found = set()
    for place in range(table.shape[1]):
        for row, cell in enumerate(table.iloc[:, place].tolist()):
            if not isinstance(cell, str | list | dict) or (isinstance(cell, str) and cell.isascii()):
                continue
            text = cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)
            try:
                text.encode()
            except UnicodeEncodeError:
                table.iat[row, place] = text.encode("utf-8", "backslashreplace").decode()
                found.add(row + 1)
    return found


def _relative(image: Any, root: Path) -> str:
    path = Path(image)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
