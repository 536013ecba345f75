"""Trains a run from a recipe; the same command again goes on where it stopped.

On several processes: accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes 2 -m clipdist.train …
"""

import argparse
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

from clipdist import world
from clipdist.errors import DiskError, UserError, WorkerKilled
from clipdist.train.signals import STOP_SIGNALS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML recipe, such as launch/recipes/phantom.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.epochs=5 model.width=256")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")


def run(args: argparse.Namespace) -> int:
    # Loader workers are forked after the tokenizer was used; the warning about it would come once per worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from clipdist.config import load_config, to_yaml

    config = load_config(args.recipe, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    configure_logging()
    from clipdist.train.loop import train

    return train(config)


def configure_logging() -> None:
    """Plain lines on standard error from rank 0; warnings alone from the others."""
    import torch

    who = world.announced()
    name = "" if who.rank == 0 else f"rank {who.rank} "
    logging.basicConfig(format=f"%(asctime)s {name}%(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("clipdist").setLevel(logging.INFO if who.rank == 0 else logging.WARNING)
    for noisy in ("PIL", "timm", "transformers", "torch.distributed", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    # Accelerate imports DeepSpeed when it unwraps a model, and that warns about every host without a GPU.
    if not os.environ.get("DS_ACCELERATOR") and not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Depthwise filters come with unusual strides; the reducer copies them, which is all that the warning says.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", module=r"torch\.utils\.tensorboard|pydantic|accelerate")


def note_exit_code(code: int) -> bool:
    """For whoever started the launcher, which answers 1 whatever its processes did; whether there is anybody."""
    folder = world.exit_codes()
    if folder is not None:
        (folder / str(world.announced().rank)).write_text(f"{code}\n", encoding="utf-8")
    return folder is not None


def main(arguments: list[str] | None = None) -> int:
    """`python -m clipdist.train`: what each rank runs."""
    parser = argparse.ArgumentParser(
        prog="python -m clipdist.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    try:
        code = run(args)
        for number in STOP_SIGNALS:  # one that comes late would end the interpreter while it ends
            signal.signal(number, signal.SIG_IGN)
        # A launcher takes whatever is not 0 for a failure, and prints a page; whoever reads the note needs none.
        return 0 if note_exit_code(code) else code
    except (UserError, WorkerKilled) as error:
        # A disk that is full or failing gets better without a change of the recipe: whoever supervises starts again.
        code = 2 if isinstance(error, UserError) and not isinstance(error, DiskError) else 1
        note_exit_code(code)
        world.report_last(error)
        sys.stderr.flush()
        # Not sys.exit: other ranks may wait in a collective that this one will never join.
        os._exit(code)
