"""Runs this node's processes of a SLURM job, one task on each node: srun --ntasks-per-node=1 clipdist node RECIPE …

It starts `accelerate launch` with the node's number, the first node's address and a free port, passes SIGUSR1, SIGUSR2
and SIGTERM on to the ranks, starts all anew after a crash, and puts the job back into the queue where that helps. It
ends with 0 finished, 2 wrong configuration or input, 75 stopped with a good checkpoint or back in the queue, 1 given
up after too many crashes, 70 the first node was lost, or SLURM has lost the job's GPUs.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--run", type=Path, metavar="DIR", help="the run's folder, where that is known: starts sooner")
    parser.add_argument(
        "--shared", type=Path, metavar="DIR", help="folder that all nodes see (default: .jobs beside the run)"
    )
    add_running_arguments(parser)


def add_running_arguments(parser: argparse._ActionsContainer) -> None:
    """How a job runs on the nodes that it has: the same words for whoever submits one."""
    parser.add_argument(
        "--processes-per-node",
        type=int,
        default=0,
        metavar="N",
        help="default: one for each GPU of the job there",
    )
    parser.add_argument("--accelerate-config", type=Path, default=Path("launch/accelerate/gpu.yaml"), metavar="FILE")
    parser.add_argument(
        "--max-crashes", type=int, default=10, metavar="N", help="so many in a row without a new checkpoint (10)"
    )
    parser.add_argument(
        "--preflight",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="clipdist doctor looks at the nodes before the job's first start, and an error ends the job with code 2",
    )
    parser.add_argument(
        "--rendezvous-seconds", type=float, default=300.0, metavar="S", help="how long nodes wait for each other (300)"
    )


def run(args: argparse.Namespace) -> int:
    from clipdist import world
    from clipdist.cluster import scheduler
    from clipdist.cluster.job import Limits, Training, log_to_output, run_job
    from clipdist.cluster.node import check_accelerate_config
    from clipdist.cluster.runs import JOBS
    from clipdist.errors import UserError

    allocation = world.allocation()
    if allocation is None:
        raise UserError(
            "clipdist node runs as a task of a SLURM job; elsewhere use accelerate launch -m clipdist.train"
        )
    processes = args.processes_per_node or allocation.gpus
    if processes < 1 and not scheduler.gpus_lost(allocation.job):
        raise UserError("the job has no GPUs on this node; ask for some, or set --processes-per-node")
    check_accelerate_config(args.accelerate_config)
    run_folder = args.run
    if run_folder is None:
        from clipdist.config import load_config  # brings the towers, which takes seconds

        run_folder = load_config(args.recipe, args.overrides).folder
    training = Training(
        words=[str(args.recipe), *args.overrides],
        run=run_folder,
        processes=processes,
        accelerate_config=args.accelerate_config,
        shared=args.shared or run_folder.parent / JOBS,
        limits=Limits(args.max_crashes, args.rendezvous_seconds),
        preflight=args.preflight,
    )
    log_to_output()
    return run_job(training, allocation)
