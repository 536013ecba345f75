"""Runs this node's processes of a SLURM job, one task on each node: srun --ntasks-per-node=1 clipdist node RECIPE …

It starts `accelerate launch` with the node's number, the first node's address and a free port, passes SIGUSR1, SIGUSR2
and SIGTERM on to the ranks, and ends with the code that they had: 0 finished, 2 wrong configuration or input,
75 stopped on request with a good checkpoint, 1 anything else.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--processes-per-node", type=int, default=0, metavar="N", help="default: one for each GPU that the job has here"
    )
    parser.add_argument("--accelerate-config", type=Path, default=Path("launch/accelerate/gpu.yaml"), metavar="FILE")
    parser.add_argument(
        "--shared", type=Path, default=Path("runs/.jobs"), metavar="DIR", help="folder that all nodes see (runs/.jobs)"
    )
    parser.add_argument("--attempt", type=int, default=0, metavar="N", help="which start within this allocation (0)")
    parser.add_argument(
        "--rendezvous-seconds", type=float, default=300.0, metavar="S", help="how long to wait for the first node (300)"
    )


def run(args: argparse.Namespace) -> int:
    from clipdist import world
    from clipdist.cluster.node import run_node
    from clipdist.errors import UserError

    allocation = world.allocation()
    if allocation is None:
        raise UserError(
            "clipdist node runs as a task of a SLURM job; elsewhere use accelerate launch -m clipdist.train"
        )
    processes = args.processes_per_node or allocation.gpus
    if processes < 1:
        raise UserError("the job has no GPUs on this node; ask for some, or set --processes-per-node")
    return run_node(
        allocation,
        processes,
        args.accelerate_config,
        [str(args.recipe), *args.overrides],
        attempt=args.attempt,
        shared=args.shared,
        rendezvous_seconds=args.rendezvous_seconds,
    )
