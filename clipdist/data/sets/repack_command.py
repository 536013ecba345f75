"""`clipdist repack`: one shard set out of another."""

import argparse
from pathlib import Path

from clipdist.data.sets.pack_command import add_packing_arguments, packing_options, parse_fractions
from clipdist.errors import UserError

DESCRIPTION = """\
Write a shard set anew: other shards, other images, fewer samples, another order, other splits. Keys, fields and
captions stay, and images that need neither another size nor format keep their bytes.

  clipdist repack data/mine data/small --side 224 --format jpg --shard-mib 256 --shuffle 0
  clipdist repack data/mine data/clean --drop-bad --dedupe near --where 'age >= 18' --where 'source in a,b'
  clipdist repack data/mine data/divided --split-fractions train=0.8 val=0.2

The source may also be a folder of WebDataset tars (.tar, .tar.zst, .tar.gz) of another tool. Damaged samples stop the
run unless --drop-bad is given; they and duplicates are listed in DST/rejected.csv.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `clipdist repack`."""
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", type=Path, metavar="SRC", help="a shard set, or a folder of tars")
    parser.add_argument("folder", type=Path, metavar="DST", help="where the new set goes")
    chosen = parser.add_argument_group("which samples")
    chosen.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="FIELD OPERATOR VALUE with == != < <= > >= in, 'not in'; several must all hold; `key` and `text` are "
        "fields, too",
    )
    chosen.add_argument("--min-side", type=int, default=0, metavar="PIXELS", help="of the shorter side")
    chosen.add_argument("--drop-bad", action="store_true", help="leave unreadable samples out instead of stopping")
    chosen.add_argument(
        "--dedupe",
        choices=("exact", "near"),
        help="keep the first of pictures with equal bytes, or that `clipdist audit` calls near-duplicates",
    )
    order = parser.add_argument_group("order and splits")
    order.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the whole set (default: keep the order)")
    order.add_argument("--split", nargs="+", metavar="NAME[=NEW]", help="take these splits, under new names if given")
    order.add_argument(
        "--split-fractions", nargs="+", metavar="NAME=FRACTION", help="divide the samples anew, units staying whole"
    )
    order.add_argument(
        "--split-table", type=Path, metavar="FILE", help="columns `key` and `split`, as clipdist split writes it"
    )
    order.add_argument("--stratify-by", default="label", metavar="FIELD", help="keep its values in proportion")
    add_packing_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Repacks and prints a summary; 0. Raises `UserError` for what the user can change."""
    from clipdist.data.sets.conditions import parse_condition
    from clipdist.data.sets.repack import repack
    from clipdist.data.sets.repack_samples import Choice

    options = packing_options(args)
    choice = Choice(
        splits=_renamed(args.split) if args.split else None,
        where=tuple(parse_condition(text) for text in args.where),
        min_side=args.min_side,
        drop_bad=args.drop_bad,
        dedupe=args.dedupe,
        fractions=parse_fractions(args.split_fractions) if args.split_fractions else None,
        stratify_by=args.stratify_by,
        seed=options.pop("seed"),
        shuffle=args.shuffle,
        split_table=str(args.split_table or ""),
    )
    print(repack(args.source, args.folder, choice, **options | {"zstd": args.zstd}))
    return 0


def _renamed(items: list[str]) -> dict[str, str]:
    splits: dict[str, str] = {}
    for item in items:
        old, _, new = item.partition("=")
        if old in splits:
            raise UserError(f"--split: {old!r} is named twice")
        splits[old] = new or old
    return splits
