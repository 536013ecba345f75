"""A gallery: what `clipdist embed` writes and `clipdist search` looks into.

    embeddings.json       what made it: model, source, options, versions; written last
    image_features.npy    float16 [N, D], unit rows; text_features.npy [M, D] likewise, where texts were embedded
    image_coarse.npy      the same in 8 bits, and image_bounds.npy: what that leaves out (see coarse.py)
    text_owner.npy        int64 [M]: row of the sample that a text belongs to
    rows.parquet          for each row key, texts, where its image is, fields
    bad.jsonl             what could not be read; absent when there is nothing

N rows, D wide, Q queries.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipdist.data.shards import BadSample, checksum_file
from clipdist.errors import UserError

if TYPE_CHECKING:
    from clipdist.model.saved import Saved

FORMAT = "clipdist-embeddings"
FORMAT_VERSION = 1
INFO = "embeddings.json"
GROUPS_HELD = 64
"""Groups of rows that are kept decoded."""

Among = Literal["image", "text"]


@dataclass(frozen=True)
class Hit:
    """A sample that was found; `score` is the inner product with the query, in float64. Among texts, `texts` is the one
    that was found."""

    row: int
    score: float
    key: str
    texts: list[str]


def open_embeddings(folder: str | Path, images: str | Path | None = None) -> "StoredEmbeddings":
    """The gallery in `folder`; `images` is where its source (shard set or root of image paths) lies now, if it moved.

    Raises `UserError` when it is missing, unfinished, damaged or of another format version.
    """
    folder = Path(folder)
    path = folder / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["format"] != FORMAT or info["version"] != FORMAT_VERSION:
            raise UserError(
                f"{path}: found {info['format']!r} version {info['version']!r}, expected {FORMAT!r} version "
                f"{FORMAT_VERSION}; embed again with this version"
            )
        for name, file in info["files"].items():
            found, expected = (folder / name).stat().st_size, file["bytes"]
            if found != expected:
                raise UserError(f"{folder / name}: found {found:,} bytes, expected {expected:,}; embed again")
        return StoredEmbeddings(folder, info, None if images is None else str(images))
    except FileNotFoundError as error:
        name = Path(error.filename or path).name
        more = "; run the same `clipdist embed` again, which goes on" if (folder / "unfinished").exists() else ""
        raise UserError(f"{folder}: no finished embeddings: {name} is missing{more}") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged embeddings ({type(error).__name__}: {error}); embed again") from None


class StoredEmbeddings:
    """What `open_embeddings` gives; features stay on disk and are mapped."""

    def __init__(self, folder: Path, info: dict[str, Any], images: str | None = None) -> None:
        self.folder, self.info, self._images = folder, info, images
        self.rows: int = info["rows"]
        self.width: int = info["width"]
        self.model_digest: str = info["model"]["digest"]
        self.what: str = info["options"]["what"]
        self.exact_pixels: bool = info["options"]["exact_pixels"]
        self._table = pq.ParquetFile(folder / "rows.parquet")
        meta = self._table.metadata
        self._ends = np.cumsum([meta.row_group(n).num_rows for n in range(meta.num_row_groups)], dtype=np.int64)
        self._groups: OrderedDict[int, dict[str, list[Any]]] = OrderedDict()
        if meta.num_rows != self.rows:
            raise UserError(f"{folder}: rows.parquet has {meta.num_rows:,} rows, expected {self.rows:,}; embed again")
        for among in self.kinds:  # a damaged file is told of here, not in the middle of a search
            self.features(among)

    def __len__(self) -> int:
        return self.rows

    @property
    def kinds(self) -> list[Among]:
        """What of the samples was embedded."""
        return [among for among in ("image", "text") if self.what in (among, "both")]

    @property
    def features_ND(self) -> np.ndarray:
        """The images' features, read-only float16 [N, D], mapped."""
        return self.features("image")

    def features(self, among: Among) -> np.ndarray:
        """Read-only float16, mapped: of the images [N, D], or of all texts [M, D]."""
        rows = self.rows if among == "image" else int(self.info["texts"])
        return self._array(f"{among}_features.npy", np.dtype(np.float16), (rows, self.width), among)

    @property
    def text_owner_M(self) -> np.ndarray:
        """int64 [M]: the row that each text belongs to."""
        return self._array("text_owner.npy", np.dtype(np.int64), (int(self.info["texts"]),), "text")

    def coarse(self, among: Among) -> tuple[np.ndarray, np.ndarray]:
        """(int8 [N, D], float32 [3, N]): see coarse.py."""
        shape = self.features(among).shape
        return (
            # Private mappings: torch warns of memory that may not be written.
            self._array(f"{among}_coarse.npy", np.dtype(np.int8), shape, among, "c"),
            self._array(f"{among}_bounds.npy", np.dtype(np.float32), (3, shape[0]), among, "c"),
        )

    def _array(
        self, name: str, dtype: np.dtype, shape: tuple[int, ...], among: Among, mode: Literal["r", "c"] = "r"
    ) -> np.ndarray:
        if among not in self.kinds:
            raise UserError(f"{self.folder}: holds no {among} features; embed with --what {among}, or both")
        path = self.folder / name
        try:
            array: np.ndarray = (
                np.load(path, mmap_mode=mode, allow_pickle=False) if 0 not in shape else np.zeros(shape, dtype)
            )
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); embed again") from None
        if array.dtype != dtype or array.shape != shape:
            raise UserError(
                f"{path}: found {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}; embed again"
            )
        return array

    def digest(self, among: Among = "image") -> str:
        """xxh3-64 of the features' file, as it was written."""
        digest: str = self.info["files"][f"{among}_features.npy"]["xxh3_64"]
        return digest

    def verify(self) -> None:
        """Reads all files; raises `UserError` for one that does not equal its checksum."""
        for name, file in self.info["files"].items():
            found = checksum_file(self.folder / name)
            if found != file["xxh3_64"]:
                raise UserError(f"{self.folder / name}: checksum {found}, expected {file['xxh3_64']}; embed again")

    def check_model(self, saved: "Saved") -> None:
        """Raises `UserError` when the gallery is another model's, whose cosines with this one's would mean nothing."""
        if saved.digest != self.model_digest:
            raise UserError(
                f"{self.folder}: embedded by the model of digest {self.model_digest} "
                f"({self.info['model']['folder']}), the one given has {saved.digest}; use that model, or embed again"
            )

    @cached_property
    def keys(self) -> list[str]:
        """Of all rows, in memory."""
        keys: list[str] = self._table.read(["key"])["key"].to_pylist()
        return keys

    def record(self, row: int) -> dict[str, Any]:
        """What is known of a row: `key`, `texts`, where the image is (`split` and `number`, or `image`, a path), and
        `fields`. Raises `IndexError`."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        group = int(np.searchsorted(self._ends, row, side="right"))
        if group not in self._groups:
            try:
                self._groups[group] = self._table.read_row_group(group).to_pydict()
            except (OSError, ValueError, pa.ArrowException) as error:
                raise UserError(f"{self.folder / 'rows.parquet'}: damaged ({error}); embed again") from None
            if len(self._groups) > GROUPS_HELD:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        columns = self._groups[group]
        within = row - int(self._ends[group]) + len(columns["key"])
        found = {name: column[within] for name, column in columns.items()}
        other = json.loads(found.pop("other") or "{}")
        own = {name: found.pop(name) for name in ("key", "texts", "split", "number", "image")}
        fields = {name: value for name, value in found.items() if value is not None}
        return {name: value for name, value in own.items() if value is not None} | {"fields": fields | other}

    @cached_property
    def _source(self) -> Any:
        from clipdist.publish.embedding_source import SetSource

        source = self.info["source"]
        if source["kind"] == "shards":
            return SetSource(self._images or source["location"], source["splits"])
        return Path(self._images or source["root"])

    def image(self, row: int) -> bytes:
        """The image as its source holds it. Raises `UserError` when it is not there any more, or damaged."""
        from clipdist.publish.embedding_source import read_file

        record = self.record(row)
        try:
            if "number" in record:
                try:
                    sample = self._source.read_in(record["split"], record["number"])
                except IndexError:
                    raise BadSample(f"the set has no sample {record['number']} any more: it has changed") from None
                if sample.key != record["key"]:
                    raise BadSample(f"found sample {sample.key!r} there: the set has changed")
                data: bytes = sample.image
                return data
            return read_file(self._source / record["image"])
        except BadSample as error:
            raise UserError(f"{record['key']}: {error}") from None

    def thumbnail(self, row: int, side: int) -> Image.Image:
        """The whole image, its longer side `side` pixels; raises as `image` does."""
        return thumbnail(self.image(row), side)

    def search(self, query_QD: np.ndarray, top: int = 10, among: Among = "image") -> list[list[Hit]]:
        """The `top` rows for each query, best first, exactly: as float64 over all stored rows would rank them, ties by
        row. Queries are float [Q, D], unit vectors of the same model (`check_model`)."""
        from clipdist.publish.search import search_exact

        found = search_exact(self.features(among), *self.coarse(among), query_QD, top)
        return self.hits(found.rows, found.scores, among)

    def hits(self, rows: Sequence[np.ndarray], scores: Sequence[np.ndarray], among: Among = "image") -> list[list[Hit]]:
        """Names to what a search found."""
        return [
            [self._hit(int(row), float(score), among) for row, score in zip(some, their, strict=True)]
            for some, their in zip(rows, scores, strict=True)
        ]

    def _hit(self, row: int, score: float, among: Among) -> Hit:
        if among == "image":
            record = self.record(row)
            return Hit(row, score, record["key"], record["texts"])
        owner = self.text_owner_M
        sample = int(owner[row])
        record = self.record(sample)
        first = int(np.searchsorted(owner, sample, side="left"))  # texts lie in the order of their rows
        return Hit(sample, score, record["key"], [record["texts"][row - first]])


def thumbnail(data: bytes, side: int) -> Image.Image:
    """Encoded bytes -> RGB, the longer side `side` pixels. Raises `UserError` for what cannot be read."""
    from clipdist.data.images.decode import decode_rgb, image_size
    from clipdist.model.saved import MAX_IMAGE_PIXELS

    try:
        width, height = image_size(data, MAX_IMAGE_PIXELS)
        scale = side / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = decode_rgb(data, MAX_IMAGE_PIXELS, at_least=(size[1], size[0]))
    except BadSample as error:
        raise UserError(str(error)) from None
    return Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)


def query_pixels(data: bytes, side: int, resize: Any, *, exact: bool) -> Image.Image:
    """An image as the gallery's were prepared, for a model that takes `side` × `side`. Raises `UserError`."""
    from clipdist.data.images.decode import load_for_evaluation
    from clipdist.model.saved import MAX_IMAGE_PIXELS

    try:
        return Image.fromarray(load_for_evaluation(data, side, resize, MAX_IMAGE_PIXELS, exact=exact))
    except BadSample as error:
        raise UserError(str(error)) from None
