"""TCGA slides and reports -> shards: tiles of tissue with the diagnoses of their patients. Fetch the slides of a GDC
manifest with gdc-client into RAW/slides, put the reports into RAW/reports (or TCGA-Reports' table beside them), then

python shards/tcga.py RAW --stride 3072 --out data/clippath-baseline
python shards/tcga.py RAW --stride 1024 --stain vahadane --attention vit_small_patch16_224.dino --out data/clippath
python shards/tcga.py RAW --phantom 12 --stride 1024 --out data/clippath    # draws invented patients into RAW first

Tiles lie in RAW/tiles-… afterwards, with slides-01.png, … to look at; the same command again goes on where it stopped.
"""

import argparse
from pathlib import Path

from clipdist.cli import run_script
from clipdist.data.sets.pack import pack_pairs
from clipdist.data.sets.pack_command import add_packing_arguments, packing_options, parse_fractions
from clipdist.data.sets.tables import split_pairs
from clipdist.data.shards import checksum_file
from clipdist.prepare.phantom_stamp import is_phantom
from clipdist.prepare.slides import TilingOptions
from clipdist.prepare.tcga import (
    find_manifest,
    find_reports,
    find_slides,
    read_diagnoses,
    read_manifest,
    tile_pairs,
    with_diagnosis,
)
from clipdist.prepare.tile_stages import AttentionOptions, StainOptions, choose_tiles

LICENSE = (
    "Slides and reports of The Cancer Genome Atlas, by the NCI's Genomic Data Commons, https://gdc.cancer.gov, under "
    "the data access policies accepted there; no attempt may be made to identify patients."
)
SYNTHETIC = "Synthetic slides and reports drawn by clipdist; public domain (CC0-1.0). They show no real patient."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, metavar="RAW", help="folder with the manifest, slides/ and reports/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, help="default: RAW/gdc_manifest*.txt")
    parser.add_argument("--reports", type=Path, help="folder or table (default: RAW/reports, or RAW/TCGA_Reports.csv)")
    parser.add_argument(
        "--kinds", nargs="+", default=["DX"], help="of slides: DX paraffin, TS and BS frozen (default: DX)"
    )
    parser.add_argument("--md5", action=argparse.BooleanOptionalAction, default=True, help="compare where one is given")
    parser.add_argument("--stride", type=int, default=1024, help="pixels of level 0 along a tile (default: 1024)")
    parser.add_argument("--tile-side", type=int, default=299, help="pixels that a tile is stored at (default: 299)")
    parser.add_argument("--tiles-per-slide", type=int, metavar="N", help="at most, drawn at random (default: all)")
    parser.add_argument("--min-tissue", type=float, default=0.3, help="least share of a tile (default: 0.3)")
    parser.add_argument(
        "--max-white", type=float, default=0.5, help="share above grey 225 stays below it (default: 0.5)"
    )
    parser.add_argument("--mpp", type=float, help="micrometres per pixel of slides that do not tell")
    parser.add_argument("--stain", choices=("none", "macenko", "reinhard", "vahadane"), default="none")
    parser.add_argument("--reference", type=Path, help="tile whose stains are taken (default: chosen among all)")
    parser.add_argument("--attention", metavar="NAME", help="timm transformer that filters tiles (default: no filter)")
    parser.add_argument("--attention-weights", default="pretrained", metavar="FILE", help="default: what timm names")
    parser.add_argument("--attention-threshold", type=float, default=0.5, help="in even shares (default: 0.5)")
    parser.add_argument("--attention-share", type=float, default=0.7, help="of patches above it (default: 0.7)")
    parser.add_argument("--work", type=Path, help="folder for tiles (default: RAW)")
    parser.add_argument("--phantom", type=int, metavar="PATIENTS", help="draw a RAW of invented patients, if not there")
    parser.add_argument("--split", nargs="+", default=["train=0.8", "val=0.1", "test=0.1"], metavar="NAME=FRACTION")
    add_packing_arguments(parser, format="jpg", quality=95)
    args = parser.parse_args(arguments)

    options, fractions = packing_options(args), parse_fractions(args.split)
    tiling = TilingOptions(
        stride=args.stride,
        side=args.tile_side,
        min_tissue=args.min_tissue,
        max_white=args.max_white,
        most=args.tiles_per_slide,
        assume_mpp=args.mpp,
    )
    manifest = args.manifest or find_manifest(args.raw, draw=args.phantom)
    synthetic = is_phantom(args.raw)
    found = find_slides(read_manifest(manifest), args.raw / "slides", kinds=args.kinds, check_md5=args.md5)
    diagnoses, mute = read_diagnoses(args.reports or find_reports(args.raw), found.patients)
    slides, unpaired = with_diagnosis(found, diagnoses)
    left_out = ", ".join(f"{count} {why}" for why, count in found.left_out.items()) or "nothing"
    print(f"{manifest.name}: {len(slides):,} slides with a diagnosis of their patient; left out: {left_out}")

    weights = {"pretrained": True, "random": False}.get(args.attention_weights, args.attention_weights)
    looks = AttentionOptions(args.attention or "", weights, args.attention_threshold, args.attention_share)
    chosen = choose_tiles(
        slides,
        args.work or args.raw,
        tiling,
        stain=None if args.stain == "none" else StainOptions(args.stain, args.reference),
        attention=looks if args.attention else None,
        workers=args.workers,
        rejected=[*found.rejected, *unpaired],
        max_rejected_fraction=args.max_rejected,
    )
    print(chosen)
    summary = pack_pairs(
        split_pairs(tile_pairs(chosen.slides, diagnoses), fractions, args.seed),
        args.out,
        rejected=[*chosen.rejected, *mute],
        license_text=SYNTHETIC if synthetic else LICENSE,
        sources={manifest.name: checksum_file(manifest)},
        notes={
            "tcga": {**chosen.notes, "left_out": found.left_out, "synthetic": synthetic},
            "split": {"fractions": fractions, "seed": args.seed},
        },
        **options,
    )
    print(summary)


if __name__ == "__main__":
    run_script(main)
