"""Shows the end of what a run's latest job said; with --rank, of what one of its ranks said, which is kept for each
start once that has ended."""

import argparse
import time
from collections import deque
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/skincap")
    parser.add_argument("--rank", type=int, metavar="R", help="of this rank alone")
    parser.add_argument("--start", metavar="NAME", help="with --rank: of which start (the latest); --list names them")
    parser.add_argument("--list", action="store_true", help="name the starts and files that there are")
    parser.add_argument("--lines", "-n", type=int, default=50, metavar="N", help="how many of the last (50)")
    parser.add_argument("--follow", "-f", action="store_true", help="and what is added, until Ctrl-C")


def run(args: argparse.Namespace) -> int:
    from clipdist.cluster.logs import find_log, listed
    from clipdist.errors import UserError

    if args.lines < 0:
        raise UserError(f"--lines: found {args.lines}, expected 0 or more")
    if args.start is not None and args.rank is None:
        raise UserError("--start is of one rank's output; add --rank R")
    if args.list:
        for line in listed(args.run):
            print(line)
        return 0
    path = find_log(args.run, args.rank, args.start)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            print(f"== {path}")
            print("".join(deque(file, args.lines)), end="", flush=True)
            while args.follow:
                if line := file.readline():
                    print(line, end="", flush=True)
                else:
                    time.sleep(0.5)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except KeyboardInterrupt:
        print()
    return 0
