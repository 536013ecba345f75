"""Reads a whole shard set and says what is damaged, what leaks between its splits, and what it holds twice. Exit code 1
on damage. Interrupted, it goes on where it stopped; run again, it examines only shards that are new or changed."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from clipdist.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder of a shard set")
    parser.add_argument("--workers", type=int, default=2, help="processes; default: 2")
    parser.add_argument("--quick", action="store_true", help="structure and checksums only: no image is decoded")
    parser.add_argument("--again", action="store_true", help="examine every shard, also those done by an earlier run")
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="where results are kept (default: in the set's folder, or the user's cache when that is read-only)",
    )
    parser.add_argument("--json", action="store_true", help="print findings as JSON instead of a summary")


def run(args: argparse.Namespace) -> int:
    from clipdist.data.sets.examine import Facts
    from clipdist.data.sets.verify import verify_set
    from clipdist.progress import progress

    if args.workers < 1:
        raise UserError(f"--workers: found {args.workers}, expected at least 1")

    def shown(facts: Iterable[Facts], total: int) -> Iterable[Facts]:
        return progress(facts, total=total, unit="shard", description="verifying")

    diagnosis = verify_set(
        args.folder, workers=args.workers, quick=args.quick, state=args.state, again=args.again, shown=shown
    )
    if diagnosis.resumed:
        done = f"{diagnosis.resumed:,} of {diagnosis.shards:,} shards were examined before and have not changed since"
        print(f"{done} (--again examines them too)", file=sys.stderr)
    print(json.dumps(diagnosis.to_dict(), indent=1, ensure_ascii=False) if args.json else diagnosis.summary())
    return 1 if diagnosis.damaged else 0
