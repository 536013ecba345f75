"""Google Landmarks v2 -> shards, out of its tars as they are published. Fetch any of train/images_000.tar … and
md5sum/train/md5.images_000.txt …, and of metadata/ train.csv, train_label_to_category.csv and train_attribution.csv
from https://s3.amazonaws.com/google-landmark into RAW, then

python shards/landmarks.py RAW --side 256 --out data/landmarks
python shards/landmarks.py RAW --side 256 --embed resnet50 --out data/landmarks    # finds larger crops, too
python shards/landmarks.py RAW --phantom 24 --out data/landmarks         # draws invented landmarks into RAW first
"""

import argparse
from pathlib import Path

from clipdist.cli import run_script
from clipdist.data.sets.pack import pack_pairs
from clipdist.data.sets.pack_command import add_packing_arguments, packing_options, parse_fractions
from clipdist.data.sets.writer import check_free
from clipdist.prepare.phantom_landmarks import write_landmarks_layout
from clipdist.prepare.phantom_stamp import is_phantom

LICENSE = (
    "Google Landmarks Dataset v2, https://github.com/cvdfoundation/google-landmark. Annotations: CC BY 4.0, Google. "
    "Images: of their authors, each under the licence that the sample's field `license` names (train_attribution.csv)."
)

SYNTHETIC = "Synthetic pictures and names drawn by clipdist; public domain (CC0-1.0). They show no real landmark."


def main(arguments: list[str] | None = None) -> None:
    # Not at the file's top: each process that packs reads this file again, and has no need of torch and pandas.
    from clipdist.data.sets.duplicates import check_bits
    from clipdist.prepare.landmark_splits import divide_landmarks
    from clipdist.prepare.landmarks import TEMPLATES, read_landmarks
    from clipdist.prepare.near_duplicates import near_duplicates

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, metavar="RAW", help="folder with the tars and the tables")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clean", action="store_true", help="only the images of train_clean.csv")
    parser.add_argument("--md5", action=argparse.BooleanOptionalAction, default=True, help="compare where one is given")
    parser.add_argument("--min-images", type=int, default=10, help="smaller classes are left out (default: 10)")
    parser.add_argument("--template", action="append", metavar="TEXT", help="with {} for the name; repeat for several")
    embed = "compare features, too, of a timm model or a model's folder; WEIGHTS: a file or package://… (default: none)"
    parser.add_argument("--embed", metavar="NAME[:WEIGHTS]", help=embed)
    parser.add_argument("--bits", type=int, default=10, help="in which hashes of looks may differ (default: 10)")
    parser.add_argument(
        "--cosine", type=float, default=0.9, help="features as near as this are one picture (default: 0.9)"
    )
    parser.add_argument("--phantom", type=int, metavar="N", help="draw a RAW of N invented landmarks, if not there")
    parser.add_argument("--split", nargs="+", default=["train=0.8", "val=0.1", "test=0.1"], metavar="NAME=FRACTION")
    add_packing_arguments(parser, format="jpg", quality=95)
    args = parser.parse_args(arguments)

    options, fractions = packing_options(args), parse_fractions(args.split)
    check_bits(args.bits)
    check_free(args.out, args.overwrite)
    if args.phantom is not None:
        write_landmarks_layout(args.raw, args.phantom)
    synthetic = is_phantom(args.raw)
    embedder = None
    if args.embed:
        from clipdist.prepare.embedding import ImageEmbedder  # brings torch, which takes seconds

        embedder = ImageEmbedder.named(args.embed)
    found = read_landmarks(
        args.raw,
        min_images=args.min_images,
        clean=args.clean,
        check_md5=args.md5,
        templates=args.template or TEMPLATES,
        workers=args.workers,
    )
    print(found)
    found.check(args.out, args.max_rejected)
    near = near_duplicates(
        [pair.image for pair in found.pairs],
        bits=args.bits,
        embedder=embedder,
        cosine=args.cosine,
        workers=args.workers,
        max_pixels=args.max_pixels,
    )
    found.check(args.out, args.max_rejected, near.unreadable)
    found, divided = divide_landmarks(found, near, fractions, args.seed)
    print(divided)
    summary = pack_pairs(
        divided.splits,
        args.out,
        rejected=found.rejected,
        left_out=sum(found.left_out.values()),
        beside=divided.files,
        license_text=SYNTHETIC if synthetic else LICENSE,
        sources=found.sources,
        notes={"synthetic": synthetic, "landmarks": {**found.notes, "left_out": found.left_out}, **divided.notes},
        **options,
    )
    print(summary)


if __name__ == "__main__":
    run_script(main)
