"""Prints the keys of a step's global batch, one a line, in row order: what every world size will train on."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--step", type=int, required=True, help="step of the run, counted from 0 over all epochs")


def run(args: argparse.Namespace) -> int:
    from clipdist.config import load_config
    from clipdist.data.shards import ShardSet
    from clipdist.errors import UserError

    config = load_config(args.recipe, args.overrides)
    split = ShardSet.open(config.data.set).split(config.data.train_split)
    order = config.order(split)
    if args.step < 0:
        raise UserError(f"--step {args.step}: expected 0 or more")
    for number in order.batch(*divmod(args.step, order.steps_per_epoch)):
        print(split.key(int(number)))
    return 0
