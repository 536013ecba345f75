"""Trains one recipe many times with other values of some keys, as one array of SLURM, and compares what comes of it:

python launch/sweep.py launch/recipes/skincap.yaml --name towers --partition gpu --gpus-per-node 1 --at-once 8 \\
    model.image.name=timm:resnet50,timm:convnext_tiny optim.lr=1e-4,3e-4,1e-3 train.epochs=20
python launch/sweep.py launch/recipes/skincap.yaml --name chance --partition gpu --random 20 --sweep-seed 0 \\
    "optim.lr=log(1e-5,1e-2)" "model.projection.dropout=uniform(0,0.5)" "model.width=choice(256,512)"
python launch/sweep.py @launch/sweeps/skincap_towers.txt --partition gpu --gpus-per-node 1
python launch/sweep.py --show runs/towers

@FILE stands for the words and options in that file, one to a line; lines that begin with # are left out. A word gives
a key its values:

  key=a              one value for all runs, in YAML, as on the command line of a training
  key=a,b,c          a grid: every value, combined with every value of the other grids
  key=log(a,b)       drawn between a and b, evenly by its logarithm    } --random N times;
  key=uniform(a,b)   drawn evenly between a and b                      } a decimal number of six digits
  key=choice(a,b,…)  one of the values
  key=range(a,b,s)   one of a, a+s, a+2s, … up to b; whole numbers where all three are
  one+two=[a,b],[c,d]  keys that take their values together: here two runs, not four

Commas in brackets or quotes part nothing: train.stages=[{from_epoch: 0, image: none}] is one value, and so is
key='a,b'. Where some keys are a grid and others are drawn, every combination of the grid runs with every draw. Draw
number i depends on --sweep-seed, i and the key alone: --random 40 after --random 20 adds twenty to the same twenty.

All combinations are checked first: a wrong key, type, batch or shard set ends this with code 2, and nothing is queued.
Each run is a job as launch/submit.py sends it, in a folder named after its values, runs/<name>/<values>. The same
command again sends what is neither finished, nor in the queue, nor stopped for good (`clipdist stop`); more values add
runs. runs/<name>/sweep.yaml records recipe and values; a recipe that differs in what defines the maths is refused,
unless --force.

When a run finishes, and with --show, runs/<name> gets sweep.csv, sweep.json and sweep.png: the runs by their best
validation, in one table and one plot; and sweep_epochs.csv and sweep_epochs.png: training loss, validation loss, recall
and cosine of all runs, epoch by epoch.

--cluster local runs them on this machine, one after another; --dry-run prints the runs and what sbatch would get.
"""

import argparse
import logging
import sys
from pathlib import Path

from clipdist.cli import run_script


def main(arguments: list[str] | None = None) -> None:
    from clipdist.cluster import submit, sweep

    args = parse(arguments)
    logging.basicConfig(format="%(message)s")
    if args.show:
        show(args.show)
        return
    resources = submit.resources_of(args)
    slurm = args.cluster == "slurm"
    planned = sweep.plan(args.recipe, args.words, args.name, args.random, args.sweep_seed, args.max_runs)
    record = sweep.resumed(planned, args.random, args.sweep_seed, args.force)
    found = sweep.states(planned, record)
    jobs = sweep.prepare(planned, found, args)
    if args.dry_run:
        for name, state in found.items():
            print(f"{state:12}  {name}")
        if jobs and slurm:
            first, logs = next(iter(jobs.values())), planned.folder / submit.LOGS
            print(submit.sbatch_text(first, args.name, resources, logs, len(jobs), args.at_once))
        return
    with sweep.held(planned.folder):
        # Once more: another command may have sent some of them meanwhile.
        record = sweep.resumed(planned, args.random, args.sweep_seed, args.force)
        found = sweep.states(planned, record, sending=slurm)
        jobs = sweep.write(planned, record, {name: job for name, job in jobs.items() if found[name] in sweep.TO_SEND})
        if jobs and slurm:
            number = sweep.send(planned, record, jobs, resources, args.at_once)
            told = f", at most {args.at_once} at once" if args.at_once else ""
            print(
                f"job {number}: {len(jobs)} run{'s'[: len(jobs) - 1]}{told}; output in {planned.folder / submit.LOGS}"
            )
    print(sweep.summary(planned, found))
    if not slurm:
        sys.exit(run_here(planned.folder, jobs, resources))
    print(f"what comes of it: python launch/sweep.py --show {planned.folder}")


class Parser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, line: str) -> list[str]:
        line = line.strip()
        return [line] if line and not line.startswith("#") else []


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from clipdist.cluster import submit

    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    parser.add_argument("recipe", nargs="?", type=Path, help="YAML recipe, such as launch/recipes/skincap.yaml")
    parser.add_argument("words", nargs="*", metavar="key=value", help="one value, several, or what they are drawn from")
    parser.add_argument("--name", help="of the sweep, and of its folder among the runs")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="draws of the keys that are drawn")
    parser.add_argument("--sweep-seed", type=int, default=0, metavar="S", help="another one, other draws (0)")
    parser.add_argument("--at-once", type=int, default=0, metavar="M", help="so many jobs at a time (0: no limit)")
    parser.add_argument("--max-runs", type=int, default=200, metavar="N", help="more are refused as a slip (200)")
    parser.add_argument("--force", action="store_true", help="go on with a sweep that another recipe began")
    parser.add_argument(
        "--show", type=Path, metavar="DIR", help="table and plot of a sweep, also half done; sends nothing"
    )
    submit.add_resource_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    if args.show and args.recipe:
        parser.error("--show shows a sweep that there is, and takes no recipe")
    if not args.show and not (args.recipe and args.name):
        parser.error("expected a recipe, and --name, or --show")
    if args.at_once < 0 or (args.cluster == "local" and args.at_once > 1):
        parser.error(f"--at-once {args.at_once}: expected 0 or more, and with --cluster local 1")
    return args


def show(folder: Path) -> None:
    from clipdist.cluster.sweep_table import CSV, EPOCHS_CSV, EPOCHS_PLOT, JSON, PLOT, as_text, write_results

    results = write_results(folder)
    print(as_text(results))
    names = [name for name in (CSV, JSON, PLOT, EPOCHS_CSV, EPOCHS_PLOT) if (folder / name).exists()]
    print(f"written: {', '.join(str(folder / name) for name in names)}")


def run_here(folder: Path, jobs: dict, resources: object) -> int:
    """0 when all finished, 75 when one was asked to stop, else 1."""
    from clipdist.cluster import sweep
    from clipdist.cluster.job import FINISHED, STOPPED

    codes = {}
    for name, code in sweep.run_here(jobs, resources, tell):
        codes[name] = code
        told = {FINISHED: "done", STOPPED: "stopped; the same command goes on"}.get(code, f"failed with code {code}")
        print(f"{len(codes)}/{len(jobs)} {name}: {told}", flush=True)
    show(folder)
    return STOPPED if STOPPED in codes.values() else int(any(codes.values()))


def tell(process: str, output: Path) -> None:
    print(f"process {process}, output in {output}", flush=True)


if __name__ == "__main__":
    run_script(main)
