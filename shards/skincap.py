"""SkinCAP -> shards. SkinCAP is gated: accept its terms on its page, download the files, then

python shards/skincap.py RAW --out data/skincap                                        # GPT-4's English captions
python shards/skincap.py RAW --out data/skincap-google --table skincap_v240715.xlsx    # Google Translate's
python shards/skincap.py RAW --out data/skincap-77 --condense 77                       # by T5-small, to 77 tokens
"""

import argparse
from pathlib import Path

from clipdist.cli import run_script
from clipdist.data.sets.pack import pack_pairs
from clipdist.data.sets.pack_command import (
    add_packing_arguments,
    joined_duplicates,
    packing_options,
    parse_fractions,
)

LICENSE = (
    "SkinCAP, https://huggingface.co/datasets/joshuachou/SkinCAP, under the terms accepted there and those of "
    "Fitzpatrick17k and DDI, from which its images come. Not for redistribution without checking them."
)


def main(arguments: list[str] | None = None) -> None:
    # Not at the file's top: each process that packs reads this file again, and has no need of torch and pandas.
    from clipdist.data.sets.tables import split_pairs
    from clipdist.prepare.captions import add_condensing_arguments, condensed_by
    from clipdist.prepare.skincap import read_skincap

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, metavar="RAW", help="folder with the table and the folder skincap/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", help="default: skincap_v240623.csv, or skincap_v240715.xlsx if only that is there")
    parser.add_argument("--caption", help="default: caption_zh_polish_en, or caption_en of the workbook")
    parser.add_argument("--split", nargs="+", default=["train=0.8", "val=0.2"], metavar="NAME=FRACTION")
    parser.add_argument(
        "--join-duplicates",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="look at all images first; near-duplicates share a split (default: yes)",
    )
    add_condensing_arguments(parser)
    add_packing_arguments(parser, side=256, format="jpg", quality=95)
    args = parser.parse_args(arguments)

    options, fractions = packing_options(args), parse_fractions(args.split)
    found = read_skincap(args.raw, table=args.table, caption=args.caption)
    print(f"{found.notes['table']}, {found.notes['caption_column']}: {found.notes['rows']} rows; ", end="")
    print("left out: " + ", ".join(f"{count} {why}" for why, count in found.notes["left_out"].items()))
    pairs, condensed = condensed_by(args, found.pairs)
    # Each row names an original of its own, and Fitzpatrick17k holds some photographs twice.
    together, joined = joined_duplicates(args, pairs) if args.join_duplicates else (None, {})
    summary = pack_pairs(
        split_pairs(pairs, fractions, args.seed, together_E2=together),
        args.out,
        rejected=found.rejected,
        license_text=LICENSE,
        sources=found.sources,
        notes={"skincap": found.notes, "split": {"fractions": fractions, "seed": args.seed, **joined}, **condensed},
        **options,
    )
    print(summary)


if __name__ == "__main__":
    run_script(main)
