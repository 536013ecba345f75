"""Ends a run for good: it finishes its step, saves, and its job does not go back into the queue. Start it again, after
removing the file `stop` from its folder, to go on."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/skincap")


def run(args: argparse.Namespace) -> int:
    from clipdist.cluster.runs import STOP, read_run
    from clipdist.cluster.stop import ask
    from clipdist.errors import UserError, disk_errors

    if not (args.run / "config.yaml").exists():
        raise UserError(f"{args.run}: no run there; expected runs/<name>")
    state = read_run(args.run)
    if state.state == "finished":
        print(f"{args.run} is finished: nothing to stop")
        return 0
    with disk_errors(args.run):
        (args.run / STOP).touch()
    print(ask(args.run, state.job))
    return 0
