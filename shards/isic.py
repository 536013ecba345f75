"""ISIC 2024 (SLICE-3D) -> shards: tiles of skin lesions with their diagnoses in sentences. Unpack the official files or
Kaggle's into RAW (the tables, and the JPEGs or train-image.hdf5, which needs clipdist[isic]), then

python shards/isic.py RAW --out data/isic --metadata          # age, sex, site, size and looks in the captions too
python shards/isic.py RAW --out data/isic-plain               # the diagnosis alone: nearly all captions are equal
python shards/isic.py RAW --phantom 20000 --metadata --out data/isic     # draws invented tiles into RAW first

Images keep their bytes. Patients are whole in one split, and each split gets its share of the malignant.
"""

import argparse
from collections import Counter
from pathlib import Path

from clipdist.cli import run_script
from clipdist.data.sets.pack import pack_pairs
from clipdist.data.sets.pack_command import add_packing_arguments, packing_options, parse_fractions
from clipdist.prepare.phantom_isic import LAYOUTS, PhantomOptions, write_isic_layout
from clipdist.prepare.phantom_stamp import is_phantom

LICENSE = (
    "ISIC 2024 / SLICE-3D, https://doi.org/10.34970/2024-slice-3d: CC-BY-NC-4.0 as a whole, CC-BY-4.0 or CC-0 for the "
    "permissive part; each sample's field `license` holds its own, `attribution` whom to name."
)
SYNTHETIC = "Synthetic tiles and diagnoses drawn by clipdist; public domain (CC0-1.0). They show no real skin."


def main(arguments: list[str] | None = None) -> None:
    # Not at the file's top: each process that packs reads this file again, and has no need of torch and pandas.
    from clipdist.data.sets.tables import split_pairs
    from clipdist.prepare.isic import read_isic

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, metavar="RAW", help="folder with the tables and the images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--metadata", action="store_true", help="captions also tell person, site, size and looks")
    parser.add_argument("--images", choices=("hdf5", "jpeg"), help="default: HDF5 where it is there")
    parser.add_argument("--split", nargs="+", default=["train=0.8", "val=0.1", "test=0.1"], metavar="NAME=FRACTION")
    phantom = parser.add_argument_group("invented tiles")
    phantom.add_argument("--phantom", type=int, metavar="TILES", help="draw a RAW of so many, if not there")
    phantom.add_argument("--phantom-layout", choices=LAYOUTS, default="hdf5", help="default: hdf5")
    phantom.add_argument("--phantom-side", type=int, default=64, help="pixels (default: 64)")
    phantom.add_argument("--malignant", type=float, default=0.001, help="share of the malignant (default: 0.001)")
    add_packing_arguments(parser)
    args = parser.parse_args(arguments)

    options, fractions = packing_options(args), parse_fractions(args.split)
    if args.phantom is not None:
        drawn = PhantomOptions(args.phantom, args.phantom_layout, args.phantom_side, args.malignant, args.seed)
        write_isic_layout(args.raw, drawn, args.workers)
    synthetic = is_phantom(args.raw)
    found = read_isic(args.raw, metadata=args.metadata, images=args.images)
    told = ", ".join(f"{count:,} {label}" for label, count in found.notes["labels"].items())
    units = ", ".join(f"{count:,} by {name}" for name, count in found.notes["units"].items())
    print(f"{' + '.join(found.notes['tables'])}, {found.notes['images']}: {told}; kept together: {units}")
    if several := found.notes["lesions_of_several_patients"]:
        print(f"lesions of several patients, who are kept together: {several:,}")
    if found.notes["columns_absent"]:
        print(f"columns that are not there: {', '.join(found.notes['columns_absent'])}")
    splits = split_pairs(found.pairs, fractions, args.seed, found.strata())
    shares = {name: Counter(pair.fields["label"] for pair in pairs) for name, pairs in splits.items()}
    print("malignant: " + ", ".join(f"{count['malignant']:,} in {name}" for name, count in shares.items()))
    summary = pack_pairs(
        splits,
        args.out,
        rejected=found.rejected,
        license_text=SYNTHETIC if synthetic else LICENSE,
        sources=found.sources,
        notes={
            "isic": found.notes,
            "synthetic": synthetic,
            "split": {"fractions": fractions, "seed": args.seed, "labels": shares},
        },
        **options,
    )
    print(summary)


if __name__ == "__main__":
    run_script(main)
