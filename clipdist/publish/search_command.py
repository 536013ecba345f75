"""Finds images in a gallery that `clipdist embed` made, by texts or by images (any query that is an existing file).

The search is exact: no row that is not shown has a higher cosine than one that is. docs/search.md tells more.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.data.shards import write_atomically
from clipdist.errors import UserError, disk_errors

if TYPE_CHECKING:
    import numpy as np

    from clipdist.model.saved import SavedModel
    from clipdist.publish.embeddings import Hit, StoredEmbeddings

SHEET_SIDE = 176
MOST_SHOWN = 100
"""Letters of a text on the terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gallery", type=Path, help="folder that `clipdist embed` made")
    parser.add_argument("queries", nargs="+", metavar="QUERY", help="a text, or an image file")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that made the gallery")
    parser.add_argument("--top", type=int, default=20, help="how many to find; default: 20")
    parser.add_argument("--among", choices=("image", "text"), default="image", help="what is found; default: image")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there, with all fields")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write thumbnails of what was found there, as PNG")
    parser.add_argument(
        "--images", metavar="SOURCE", help="where the images lie now, if they moved: the shard set, or the paths' root"
    )
    parser.add_argument(
        "--approximate", action="store_true", help="by a faiss index, made at the first call; its recall is printed"
    )
    parser.add_argument("--device", help="cpu or cuda, for the model; default: a GPU when there is one")


def run(args: argparse.Namespace) -> int:
    from clipdist.model.saved import load_dual_encoder
    from clipdist.publish.embeddings import open_embeddings
    from clipdist.train.command import configure_logging

    configure_logging()
    if args.top < 1:
        raise UserError(f"--top: found {args.top}, expected 1 or more")
    for option in ("json", "sheet"):
        path = getattr(args, option)
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"--{option} {path}: there is no folder {path.parent}")
    stored = open_embeddings(args.gallery, args.images)
    stored.features(args.among)
    saved = load_dual_encoder(args.model, args.device)
    stored.check_model(saved)
    query_QD, pictures = _embedded(args.queries, saved, stored)
    began = time.perf_counter()
    hits, how = _searched(args, stored, query_QD)
    how = f"{how}, {(time.perf_counter() - began) * 1000:,.0f} ms"
    for query, found in zip(args.queries, hits, strict=True):
        print(_table(query, found))
        print()
    kind = "samples" if args.among == "image" else "texts"
    print(f"{len(stored.features(args.among)):,} {kind}: {how}")
    with disk_errors(args.gallery):
        if args.json:
            body = _body(args, stored, hits, how)
            write_atomically(args.json, (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())
            print(args.json)
        if args.sheet:
            missing = _write_sheet(args.sheet, args.queries, hits, pictures, stored)
            print(args.sheet)
            if missing:
                print(f"images that could not be read: {len(missing):,}; the first: {missing[0]}")
    return 0


def _embedded(
    queries: Sequence[str], saved: "SavedModel", stored: "StoredEmbeddings"
) -> tuple["np.ndarray", list[bytes | None]]:
    """(float32 [Q, D], the encoded image of each query that is one)."""
    import numpy as np

    from clipdist.publish.embeddings import query_pixels

    tower = saved.model.image
    pictures: list[bytes | None] = []
    query_QD = np.zeros((len(queries), saved.width), np.float32)
    for place, query in enumerate(queries):
        data = _image_of(query)
        pictures.append(data)
        if data is None:
            if not query.strip():
                raise UserError("query: found an empty text, expected words or an image file")
            try:
                query.encode()
            except UnicodeEncodeError:
                raise UserError("query: found bytes that are no text in UTF-8") from None
            query_QD[place] = saved.encode_text([query])[0]
            continue
        try:
            pixels = query_pixels(data, tower.side, tower.resize, exact=stored.exact_pixels)
        except UserError as error:
            raise UserError(f"{query}: {error}") from None
        query_QD[place] = saved.encode_image([pixels])[0]
    return query_QD, pictures


def _image_of(query: str) -> bytes | None:
    """The bytes of a file of that name; None for a text."""
    path = Path(query)
    try:
        return path.read_bytes() if path.is_file() else None
    except (OSError, ValueError) as error:  # too long for a name: a text
        if isinstance(error, PermissionError):
            raise UserError(f"{query}: cannot be read ({error.strerror})") from None
        return None


def _searched(
    args: argparse.Namespace, stored: "StoredEmbeddings", query_QD: "np.ndarray"
) -> tuple[list[list["Hit"]], str]:
    """What was found, and how."""
    if not args.approximate:
        return stored.search(query_QD, args.top, args.among), "exact search"
    from clipdist.publish.approximate import ApproximateIndex

    index = ApproximateIndex(stored, args.among)
    found, measured = index.search(query_QD, args.top), index.measured
    how = (
        f"approximate search in {measured.probes:,} of {measured.lists:,} lists, recall of the best {measured.top} "
        f"{measured.recall:.3f} for {measured.queries} {measured.queries_are}"
    )
    return stored.hits(found.rows, found.scores, args.among), how


def _table(query: str, found: Sequence["Hit"]) -> str:
    width = max((len(hit.key) for hit in found), default=0)
    lines = [_cut(query)]
    for rank, hit in enumerate(found, start=1):
        text = _cut(" | ".join(hit.texts))
        lines.append(f"{rank:4}  {hit.score:6.3f}  {hit.key:{width}}  {text}".rstrip())
    return "\n".join(lines)


def _cut(text: str) -> str:
    line = " ".join(text[: 10 * MOST_SHOWN].split())
    return line if len(line) <= MOST_SHOWN else f"{line[: MOST_SHOWN - 1]}…"


def _body(
    args: argparse.Namespace, stored: "StoredEmbeddings", hits: Sequence[Sequence["Hit"]], how: str
) -> dict[str, Any]:
    return {
        "gallery": str(args.gallery),
        "model_digest": stored.model_digest,
        "rows": stored.rows,
        "among": args.among,
        "search": how,
        "queries": [
            {
                "query": query,
                "hits": [
                    {"rank": rank, "row": hit.row, "score": hit.score, **stored.record(hit.row), "texts": hit.texts}
                    for rank, hit in enumerate(found, start=1)
                ],
            }
            for query, found in zip(args.queries, hits, strict=True)
        ],
    }


def _write_sheet(
    path: Path,
    queries: Sequence[str],
    hits: Sequence[Sequence["Hit"]],
    pictures: Sequence[bytes | None],
    stored: "StoredEmbeddings",
) -> list[str]:
    """Writes the picture; returns what was said of images that could not be read."""
    import io

    from clipdist.publish.contact_sheet import Block, Cell, contact_sheet
    from clipdist.publish.embeddings import thumbnail

    missing: list[str] = []

    def cell(rank: int, hit: "Hit") -> Cell:
        picture = None
        try:
            picture = stored.thumbnail(hit.row, SHEET_SIDE)
        except UserError as error:
            missing.append(str(error))
        return Cell(rank, hit.score, hit.key, " | ".join(hit.texts), picture)

    blocks = [
        Block(
            f"“{query}”" if data is None else Path(query).name,
            [cell(rank, hit) for rank, hit in enumerate(found, start=1)],
            None if data is None else thumbnail(data, SHEET_SIDE),
        )
        for query, found, data in zip(queries, hits, pictures, strict=True)
    ]
    buffer = io.BytesIO()
    contact_sheet(blocks).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
    return missing
