"""Writes a run's report.html anew from what lies in its folder. With example images: clipdist eval."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/phantom")


def run(args: argparse.Namespace) -> int:
    from clipdist.evaluate.report import write_report

    print(write_report(args.run))
    return 0
