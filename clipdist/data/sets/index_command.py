"""Makes WebDataset tars of another tool into a shard set: writes an index beside each and a manifest; the tars stay
as they are."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder with .tar or .tar.zst files, such as train-000000.tar")
    parser.add_argument("--workers", type=int, help="processes (default: one per core; 0: none but this)")
    parser.add_argument(
        "--force", action="store_true", help="index every tar again, also those whose index fits their size and time"
    )


def run(args: argparse.Namespace) -> int:
    from clipdist.data.sets.index import index_folder
    from clipdist.errors import UserError
    from clipdist.progress import progress

    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers: found {args.workers}, expected 0 or more")
    manifest = index_folder(
        args.folder,
        workers=args.workers,
        force=args.force,
        shown=lambda items, total: progress(items, total=total, unit="shard", description="indexing", quiet=not total),
    )
    for name, shards in manifest.splits.items():
        print(f"{name}: {sum(shard.samples for shard in shards):,} samples in {len(shards):,} shards")
    return 0
