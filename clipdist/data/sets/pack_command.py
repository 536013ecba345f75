"""`clipdist pack`: a table, or a folder of images with texts beside them, becomes a shard set."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from clipdist.data.sets.pack import Pair, Rejected

DESCRIPTION = """\
Pack image-text pairs into WebDataset shards with an index and a manifest.

  clipdist pack pairs.csv --images photos --image-column file --text-column caption --out data/mine \\
      --split train=0.8 val=0.1 test=0.1 --unit-column patient --label-column diagnosis --side 256 --format jpg
  clipdist pack photos --out data/mine        photos/**/x.jpg with x.txt, or x.json with a field `text`, beside it

Pairs that cannot be packed are listed in OUT/rejected.csv (row 1 is the first below the header); the last line
printed says how many there were. Keys are made from image paths: letters, digits, _, - and /.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `clipdist pack`."""
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "source", type=Path, metavar="TABLE|FOLDER", help="CSV, TSV (also .gz), JSONL, Parquet or XLSX; or a folder"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the shard set goes")
    table = parser.add_argument_group("what is read")
    table.add_argument("--images", type=Path, metavar="ROOT", help="where image paths start (default: TABLE's folder)")
    table.add_argument("--image-column", metavar="COLUMN", help="image path (default: image)")
    table.add_argument(
        "--text-column", action="append", metavar="COLUMN", help="caption (default: text); repeat it for several"
    )
    table.add_argument("--key-column", metavar="COLUMN", help="sample keys (default: made from image paths)")
    table.add_argument("--label-column", metavar="COLUMN", help="class name, stored as the field `label`")
    table.add_argument(
        "--unit-column",
        "--group-by",
        metavar="COLUMN",
        help="what must not straddle splits (patient, slide), stored as the field `unit`",
    )
    table.add_argument(
        "--keep-columns", nargs="+", metavar="COLUMN", help="further fields (default: none of a table, all of a folder)"
    )
    table.add_argument("--merge-captions", action="store_true", help="rows with the same image become one sample")
    table.add_argument("--encoding", default="utf-8-sig", help="of CSV, TSV and JSONL (default: UTF-8)")
    split = parser.add_argument_group("splits")
    split.add_argument("--split", nargs="+", metavar="NAME=FRACTION", help="default: all in train")
    split.add_argument("--split-column", metavar="COLUMN", help="holds the names of splits that are fixed already")
    split.add_argument(
        "--stratify-by", metavar="COLUMN", help="keep its values in proportion (default: the label column, if any)"
    )
    split.add_argument(
        "--join-duplicates", action="store_true", help="look at all images first; near-duplicates share a split"
    )
    split.add_argument("--keep-order", action="store_true", help="do not shuffle samples within their split")
    add_packing_arguments(parser)
    parser.add_argument("--license-file", type=Path, metavar="FILE", help="licence text for the manifest")


def add_packing_arguments(
    parser: argparse.ArgumentParser, *, side: int | None = None, format: str = "keep", quality: int = 92
) -> None:
    """Declares how images and shards are written, shared by `clipdist pack` and recipes, which choose defaults."""
    images = parser.add_argument_group("how images are stored")
    images.add_argument(
        "--side", type=int, default=side, help=f"shrink shorter sides above this to this (default: {side or 'never'})"
    )
    images.add_argument("--format", choices=("keep", "jpg", "png", "webp"), default=format, help=f"default: {format}")
    images.add_argument("--quality", type=int, default=quality, help=f"of JPEG and WebP (default: {quality})")
    images.add_argument(
        "--check",
        choices=("decode", "header", "none"),
        default="decode",
        help="of images that keep their bytes: decode them, read their header and look for their end, or nothing "
        "(default: decode, which alone finds all damage, and once is cheaper than in every epoch)",
    )
    images.add_argument("--max-pixels", type=int, default=89_478_485, help="larger images are rejected undecoded")
    shards = parser.add_argument_group("how shards are written")
    shards.add_argument("--samples-per-shard", type=int, help="default: 1000, or as many as --shard-mib allows")
    shards.add_argument("--shard-mib", type=float, metavar="MIB", help="a shard ends when it has reached this size")
    shards.add_argument("--zstd", action=argparse.BooleanOptionalAction, help="compress each sample: .tar.zst")
    shards.add_argument("--workers", type=int, help="processes (default: one per core; 0: none but this)")
    shards.add_argument("--seed", type=int, default=0, help="of splits and of the order within them (default: 0)")
    shards.add_argument(
        "--max-rejected", type=float, default=0.05, metavar="FRACTION", help="above it nothing is made (default: 0.05)"
    )
    shards.add_argument("--overwrite", action="store_true", help="replace a shard set that is there")


def packing_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `pack_pairs` out of what `add_packing_arguments` declared."""
    from clipdist.data.sets.recode import ImageOptions

    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers: found {args.workers}, expected 0 or more")
    if args.seed < 0:
        raise UserError(f"--seed: found {args.seed}, expected 0 or more")
    samples = args.samples_per_shard
    if samples is None:
        samples = 1000 if args.shard_mib is None else 1 << 40
    return {
        "images": ImageOptions(args.side, args.format, args.quality, args.max_pixels, args.check),
        "samples_per_shard": samples,
        "shard_mib": args.shard_mib,
        "zstd": bool(args.zstd),
        "workers": args.workers,
        "seed": args.seed,
        "max_rejected_fraction": args.max_rejected,
        "overwrite": args.overwrite,
    }


def parse_fractions(items: list[str]) -> dict[str, float]:
    """`["train=0.8", "val=0.2"]` -> fractions by name; `UserError` unless they are well formed and sum to one."""
    from clipdist.prepare.splits import check_fractions

    fractions: dict[str, float] = {}
    for item in items:
        match = re.fullmatch(r"([A-Za-z0-9_-]+)=(\d*\.?\d+(?:[eE][-+]?\d+)?)", item)
        if not match:
            raise UserError(f"--split: found {item!r}, expected NAME=FRACTION such as train=0.8")
        if match[1] in fractions:
            raise UserError(f"--split: {match[1]!r} is named twice")
        fractions[match[1]] = float(match[2])
    return check_fractions(fractions)


def run(args: argparse.Namespace) -> int:
    """Packs and prints a summary; 0. Raises `UserError` for what the user can change."""
    from clipdist.data.sets.pack import pack_pairs
    from clipdist.data.shards import checksum_file

    if args.split and args.split_column:
        raise UserError("--split and --split-column exclude each other; leave one out")
    if args.stratify_by and not args.split:
        raise UserError("--stratify-by needs --split NAME=FRACTION ...")
    if args.join_duplicates and not args.split:
        raise UserError("--join-duplicates needs --split NAME=FRACTION ...")
    fractions = parse_fractions(args.split) if args.split else {"train": 1.0}
    options = packing_options(args)
    try:
        license_text = args.license_file.read_text(encoding="utf-8") if args.license_file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--license-file {args.license_file}: {error}") from None
    pairs_by_split, rejected, notes = _read(args, fractions)
    summary = pack_pairs(
        pairs_by_split,
        args.out,
        rejected=rejected,
        shuffle=not args.keep_order,
        license_text=license_text,
        sources={args.source.name: checksum_file(args.source)} if args.source.is_file() else {},
        notes=notes,
        **options,
    )
    if len(fractions) > 1:
        print("asked for: " + " ".join(f"{name}={fraction:g}" for name, fraction in fractions.items()))
    print(summary)
    return 0


def _read(
    args: argparse.Namespace, fractions: dict[str, float]
) -> tuple[dict[str, list["Pair"]], list["Rejected"], dict[str, Any]]:
    """Pairs by split, what was rejected on the way, and what the manifest should say about the choice."""
    from clipdist.data.sets import tables

    rejected: list[Rejected] = []
    if args.source.is_dir():
        table, rejected = tables.read_folder(args.source)
        images = args.source if args.images is None else args.images
    else:
        table = tables.read_table(args.source, args.encoding)
        images = args.source.parent if args.images is None else args.images
    columns = {
        "image_column": args.image_column or "image",
        "text_columns": args.text_column or ["text"],
        "key_column": args.key_column,
        "label_column": args.label_column,
        "unit_column": args.unit_column,
    }
    name = str(args.source)
    tables.check_columns(table, [c for c in (args.split_column, args.stratify_by) if c], name)
    keep = args.keep_columns
    if keep is None:
        used = {columns["image_column"], *columns["text_columns"], args.label_column, args.unit_column}
        keep = [column for column in table.columns if column not in used] if args.source.is_dir() else []
    pairs, refused = tables.pairs_from_table(
        table, images=images, keep_columns=keep, merge_captions=args.merge_captions, name=name, **columns
    )
    rejected += refused
    notes: dict[str, Any] = {"columns": columns}
    if args.split_column:
        split, refused = tables.split_by_column(pairs, table, args.split_column, name)
        return split, rejected + refused, {**notes, "split_column": args.split_column}
    if len(fractions) == 1:
        return {next(iter(fractions)): pairs}, rejected, notes
    stratify = None
    if args.stratify_by:
        stratify = dict(zip(table.index.tolist(), table[args.stratify_by].astype(str).tolist(), strict=True))
    together, joined = joined_duplicates(args, pairs) if args.join_duplicates else (None, {})
    split = tables.split_pairs(pairs, fractions, args.seed, stratify, together)
    stratified = args.stratify_by or args.label_column
    notes["split"] = {"fractions": fractions, "seed": args.seed, "stratify_by": stratified, **joined}
    return split, rejected, notes


def joined_duplicates(args: argparse.Namespace, pairs: list["Pair"]) -> tuple["np.ndarray", dict[str, int]]:
    """(int64 [E, 2], places of pairs with the same picture; what the notes on the split say of it), which it prints.

    `args` are those of `add_packing_arguments`; every image is decoded once.
    """
    from clipdist.data.sets.duplicates import cut_short_warning
    from clipdist.prepare.units import duplicates_of

    found = duplicates_of([pair.image for pair in pairs], workers=args.workers, max_pixels=args.max_pixels)
    edges = found.edges()
    print(f"the same picture again: {len(edges):,} times; kept together")
    for line in cut_short_warning(found.cut_short):
        print(line)
    return edges, {"duplicates_joined": len(edges), "cut_short": found.cut_short}
