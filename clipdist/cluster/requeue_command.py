"""For the script of a SLURM job, once the tasks of `clipdist node` have ended with another code than 0, 2 and 75: puts
the job back into the queue where none of them could decide, since a task was killed, or SLURM could not start them.

It ends with 75 when the job is back in the queue, where SLURM ends the script in a moment; 1 when the run is given up,
after too many crashes in a row without a new checkpoint, or is to stop; else with the tasks' own code: they decided.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shared", type=Path, required=True, metavar="DIR", help="as of clipdist node: runs/.jobs")
    parser.add_argument("--code", type=int, required=True, metavar="N", help="what srun ended with")
    parser.add_argument(
        "--max-crashes", type=int, default=10, metavar="N", help="so many in a row without a new checkpoint (10)"
    )


def run(args: argparse.Namespace) -> int:
    from clipdist import world
    from clipdist.cluster.job import Limits, log_to_output, undecided
    from clipdist.errors import UserError

    allocation = world.allocation()
    if allocation is None:
        raise UserError("clipdist requeue is for the script of a SLURM job, and there is no job here")
    log_to_output()
    return undecided(args.shared, allocation, args.code, Limits(args.max_crashes))
