"""MIMIC-CXR -> shards: radiographs with the findings and impressions of their reports. Both sets need a credentialed
account on PhysioNet: fetch MIMIC-CXR-JPG (or MIMIC-CXR's DICOMs and the tables of MIMIC-CXR-JPG) into RAW, put
mimic-cxr-reports.zip of MIMIC-CXR beside the tables, then

python shards/mimic_cxr.py RAW --out data/mimic_cxr                       # frontal views, published splits
python shards/mimic_cxr.py RAW --out data/mimic_cxr --views all           # every view, as ConVIRT trained on
python shards/mimic_cxr.py RAW --phantom 400 --out data/mimic_cxr         # draws invented patients into RAW first
"""

import argparse
from pathlib import Path

from clipdist.cli import run_script
from clipdist.data.sets.pack import pack_pairs
from clipdist.data.sets.pack_command import add_packing_arguments, packing_options, parse_fractions
from clipdist.data.sets.tables import split_pairs
from clipdist.prepare.mimic_cxr import FRONTAL, CxrOptions, read_mimic_cxr, told
from clipdist.prepare.phantom_stamp import is_phantom
from clipdist.prepare.radiology_reports import CAPTIONS, MIN_TOKENS

LICENSE = (
    "MIMIC-CXR and MIMIC-CXR-JPG, https://physionet.org/content/mimic-cxr-jpg, under the PhysioNet Credentialed Health "
    "Data Use Agreement accepted there: not to be shared with anyone who has not accepted it."
)
SYNTHETIC = "Synthetic radiographs and reports drawn by clipdist; public domain (CC0-1.0). They show no real chest."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, metavar="RAW", help="folder with the tables, and files/ or the folders below")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="holds p10/, ... (default: RAW/files)")
    parser.add_argument(
        "--reports",
        type=Path,
        metavar="FOLDER|ZIP",
        help="default: RAW/mimic-cxr-reports.zip, RAW/mimic-cxr-reports or RAW/files",
    )
    parser.add_argument(
        "--views",
        nargs="+",
        default=[*FRONTAL],
        metavar="VIEW",
        help="of ViewPosition, unknown, or all (default: PA AP)",
    )
    parser.add_argument("--labels", choices=("chexpert", "negbio", "none"), default="chexpert", help="as fields")
    parser.add_argument("--sections", nargs="+", choices=CAPTIONS, default=[*CAPTIONS], help="default: both")
    parser.add_argument(
        "--min-tokens", type=int, default=MIN_TOKENS, help=f"shorter sentences are left out (default: {MIN_TOKENS})"
    )
    parser.add_argument(
        "--split", nargs="+", metavar="NAME=FRACTION", help="new splits, patients whole (default: the published ones)"
    )
    parser.add_argument("--phantom", type=int, metavar="PATIENTS", help="draw a RAW of invented patients, if not there")
    add_packing_arguments(parser, side=256, format="jpg", quality=95)
    args = parser.parse_args(arguments)

    options, fractions = packing_options(args), parse_fractions(args.split) if args.split else None
    if args.phantom is not None and not args.raw.exists():
        from clipdist.prepare.phantom_chest import write_mimic_cxr_layout

        write_mimic_cxr_layout(args.raw, args.phantom, seed=args.seed)
    synthetic = is_phantom(args.raw)
    chosen = CxrOptions(
        views=() if args.views == ["all"] else tuple(args.views),
        labels=args.labels,
        sections=tuple(args.sections),
        min_tokens=args.min_tokens,
        published_split=fractions is None,
    )
    found = read_mimic_cxr(args.raw, chosen, images=args.images, reports=args.reports)
    print(told(found))
    summary = pack_pairs(
        found.by_split() if fractions is None else split_pairs(found.pairs, fractions, args.seed),
        args.out,
        rejected=found.rejected,
        license_text=SYNTHETIC if synthetic else LICENSE,
        sources=found.sources,
        notes={
            "mimic_cxr": {**found.notes, "synthetic": synthetic},
            "split": "published" if fractions is None else {"fractions": fractions, "seed": args.seed},
        },
        **options,
    )
    print(summary)


if __name__ == "__main__":
    run_script(main)
