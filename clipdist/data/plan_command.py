"""Prints the keys of a step's global batch, one a line, in row order: what every world size will train on.

With `data.mix` or `data.balance`, each line goes on with the sample's set and pass (how often its set, or class, has
been gone through before), between tabs.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--step", type=int, required=True, help="step of the run, counted from 0 over all epochs")


def run(args: argparse.Namespace) -> int:
    from clipdist.config import load_config
    from clipdist.data.mixing import MixedSplit, Mixture
    from clipdist.data.order import Order
    from clipdist.errors import UserError

    config = load_config(args.recipe, args.overrides)
    data = Mixture.open(config.data)
    split = data.training(config.data.train_split)
    order = config.order(split)
    if args.step < 0:
        raise UserError(f"--step {args.step}: expected 0 or more")
    numbers, passes = order.batch(args.step)
    for number, times_round in zip(numbers.tolist(), passes.tolist(), strict=True):
        if isinstance(order, Order):
            print(split.key(number))
        else:
            part = split.part(number)[0] if isinstance(split, MixedSplit) else 0
            print(split.key(number), data.names[part], times_round, sep="\t")
    return 0
