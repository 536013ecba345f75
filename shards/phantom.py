"""Dermoscopy phantoms, drawn on the spot, in SkinCAP's layout -> shards: the whole path without a download.

    python shards/phantom.py --out data/phantom
    python shards/phantom.py --draw lesions --images 1200      # pictures and a table, nothing packed

Entirely synthetic: for tests, demonstrations and speed, never for a claim about skin. A second call with the same
settings finds the set and returns at once.
"""

import argparse
import tempfile
from pathlib import Path

from clipdist.cli import run_script
from clipdist.data.sets.pack import pack_pairs
from clipdist.data.sets.pack_command import add_packing_arguments, packing_options, parse_fractions
from clipdist.data.sets.tables import split_pairs
from clipdist.data.shards import MANIFEST, Manifest
from clipdist.errors import UserError
from clipdist.prepare.phantom import VERSION, write_skincap_layout
from clipdist.prepare.skincap import read_skincap

LICENSE = "Synthetic pictures and captions drawn by clipdist; public domain (CC0-1.0). They show no real skin."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/phantom"), help="default: data/phantom")
    parser.add_argument(
        "--draw", type=Path, metavar="DIR", help="only draw: pictures and their table into DIR, and pack nothing"
    )
    parser.add_argument("--images", type=int, default=4000, help="default: 4000")
    parser.add_argument("--split", nargs="+", default=["train=0.8", "val=0.1", "test=0.1"], metavar="NAME=FRACTION")
    add_packing_arguments(parser, side=224, format="jpg", quality=95)
    args = parser.parse_args(arguments)
    workers = None if args.workers is None else max(1, args.workers)
    if args.draw:
        table = write_skincap_layout(args.draw, args.images, args.side, args.seed, workers)
        print(f"{args.images:,} pictures in {args.draw}; their table: {table}")
        return

    options, fractions = packing_options(args), parse_fractions(args.split)
    settings = {name: getattr(args, name) for name in ("images", "side", "seed", "format", "quality", "zstd")}
    settings |= {"split": fractions, "samples_per_shard": args.samples_per_shard, "drawing": VERSION}
    if (args.out / MANIFEST).exists() and not args.overwrite:
        there = Manifest.load(args.out).notes.get("phantom", {})
        if there == settings:
            print(f"{args.out}: already there, made with the same settings")
            return
        differing = [name for name in settings if there.get(name) != settings[name]]
        raise UserError(
            f"{args.out}: holds a set that differs in {', '.join(differing)}; pass --overwrite or another --out"
        )

    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".phantom-") as raw:
        folder = Path(raw) / "phantom"
        write_skincap_layout(folder, args.images, args.side, args.seed, workers)
        found = read_skincap(folder)
        summary = pack_pairs(
            split_pairs(found.pairs, fractions, args.seed),
            args.out,
            rejected=found.rejected,
            license_text=LICENSE,
            sources=found.sources,
            notes={"synthetic": True, "phantom": settings, "skincap": found.notes},
            **options,
        )
    print(summary)


if __name__ == "__main__":
    run_script(main)
