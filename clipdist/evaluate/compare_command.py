"""Compares runs with the first: scores and their differences on the same queries, curves, settings, machines and data.

Evaluate each run with the same options first: clipdist eval RUN/model --data SET --split test. What was measured on
other data, another split, gallery or other groups is named, and not compared.
"""

import argparse
import json
from pathlib import Path

from clipdist.errors import UserError, disk_errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs; the first is the reference")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="a page with curves, which needs no network")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of tables")
    parser.add_argument("--bootstrap", type=int, default=10_000, help="resamples; 0: no intervals; default: 10000")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples; default: 0")


def run(args: argparse.Namespace) -> int:
    for name in ("bootstrap", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name}: found {getattr(args, name)}, expected 0 or more")
    from clipdist.evaluate.compare import compare_runs, read_run
    from clipdist.evaluate.compare_page import summary, write_page

    comparison = compare_runs([read_run(folder) for folder in args.runs], bootstrap=args.bootstrap, seed=args.seed)
    print(json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False) if args.json else summary(comparison))
    if args.out:
        with disk_errors(args.out.absolute().parent):
            path = write_page(comparison, args.out)
        if not args.json:
            print(path)
    return 0
