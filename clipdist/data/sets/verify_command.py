"""Reads a whole shard set and says what is damaged and what leaks between its splits. Exit code 1 on damage."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder of a shard set")
    parser.add_argument("--workers", type=int, default=2, help="processes; default: 2")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON instead of a summary")


def run(args: argparse.Namespace) -> int:
    from clipdist.data.sets.verify import Facts, verify_set
    from clipdist.progress import progress

    def shown(facts: Iterable[Facts], total: int) -> Iterable[Facts]:
        return progress(facts, total=total, unit="shard", description="verifying")

    diagnosis = verify_set(args.folder, workers=args.workers, shown=shown)
    print(json.dumps(diagnosis.to_dict(), indent=1, ensure_ascii=False) if args.json else diagnosis.summary())
    return 1 if diagnosis.damaged else 0
