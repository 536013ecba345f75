"""Writes the weights of a run's checkpoint as one safetensors file, by the parameters' names: whatever engine saved it,
on however many ranks. A finished run's best weights are in its `model` folder already."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="runs/<name>, or one of runs/<name>/checkpoints/step-…")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, .safetensors")
    parser.add_argument("--averaged", action="store_true", help="the average of the weights that train.ema keeps")


def run(args: argparse.Namespace) -> int:
    from safetensors.torch import save_file

    from clipdist.errors import UserError, disk_errors
    from clipdist.train.checkpoint import fault_of, newest_sound, read_checkpoint

    if args.out.exists():
        raise UserError(f"{args.out}: exists; choose another name, or remove it")
    path = args.checkpoint
    if (path / "checkpoints").is_dir():
        path = newest_sound(path / "checkpoints")
        if path is None:
            raise UserError(f"{args.checkpoint}: the run has no checkpoint yet")
    elif (fault := fault_of(path)) is not None:
        raise UserError(f"{path}: not a sound checkpoint ({fault}); give runs/<name>, or another of its checkpoints")
    saved = read_checkpoint(path)
    if args.averaged and not saved.averages:
        raise UserError(f"{path}: holds no average of the weights; leave --averaged out")
    weights = {**saved.weights, **saved.averages} if args.averaged else dict(saved.weights)
    partial = args.out.with_name(args.out.name + ".partial")
    with disk_errors(args.out.parent):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial)
        partial.replace(args.out)
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{args.out}: {len(weights)} tensors, {count:,} numbers, of step {saved.state['step']:,}")
    return 0
