"""Sends a training to SLURM, through submitit:

python launch/submit.py launch/recipes/skincap.yaml --partition gpu --nodes 2 --gpus-per-node 4 train.epochs=20

The recipe, the data and the words for SLURM are checked first: what is wrong ends this with code 2, and nothing is
queued. The resolved configuration is written into the run's folder, and only that file is submitted. The job saves and
goes back into the queue at its time limit and when it is preempted, and starts anew after a crash. The same command
again goes on with the run.

--cluster local runs it on this machine, and --dry-run prints what sbatch would get.
"""

import argparse
import sys
from pathlib import Path

from clipdist.cli import run_script


def main(arguments: list[str] | None = None) -> None:
    from clipdist.cluster import submit
    from clipdist.config import load_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML recipe, such as launch/recipes/skincap.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.epochs=5 model.width=256")
    submit.add_resource_arguments(parser)
    args = parser.parse_intermixed_args(arguments)

    config = load_config(args.recipe, args.overrides)
    resources = submit.resources_of(args)
    job = submit.prepare(config, args)
    if args.dry_run:
        print(submit.sbatch_text(job, config.name, resources))
        return
    job = submit.write_submitted(config, job)
    if args.cluster == "local":
        sys.exit(submit.run_here(job, resources, tell))
    number, output = submit.send(job, config.name, resources)
    print(f"job {number}: {config.folder}, output in {output}")


def tell(process: str, output: Path) -> None:
    print(f"process {process}, output in {output}", flush=True)


if __name__ == "__main__":
    run_script(main)
