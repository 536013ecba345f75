"""Makes WebDataset tars of another tool into a shard set: writes an index beside each and a manifest; the tars stay
as they are."""

import argparse
from functools import partial
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder with .tar files, such as train-000000.tar")


def run(args: argparse.Namespace) -> int:
    from clipdist.data.sets.index import index_folder
    from clipdist.progress import progress

    manifest = index_folder(args.folder, shown=partial(progress, unit="shard", description="indexing"))
    for name, shards in manifest.splits.items():
        print(f"{name}: {sum(shard.samples for shard in shards):,} samples in {len(shards):,} shards")
    return 0
