"""How soon does a job save, notice a hang, and begin; and what does watching over it cost?

PYTHONPATH=. .venv/bin/python benchmarks/supervision.py     # as root, with the packages that make test-cluster installs

Starts the SLURM of four nodes that the tests use on this machine, and on it jobs of slurm/train_skincap.sh on 2 nodes
of 2 processes, by gloo, with a tiny model:

- a signal: from `scancel --signal=USR1` until the newest checkpoint is complete and named;
- a hang: from SIGSTOP to one rank until every rank is gone, with a limit of LIMIT seconds;
- a start: from the time that SLURM gives as the job's start to the first line of the metrics. What imports take of it
  is measured beside: the same modules, imported by one process after another, as a start does. All nodes have the same
  cores here, so that in a start two launchers, and then four ranks, import side by side, and here each has them alone;
- the cost of watching: the seconds that a sign of progress takes, of which each step gives one, as a share of the step.

Everything shares the cores of one machine: on a cluster each node has its own. Writes OUT.json and OUT.md.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from clipdist import heartbeat, world
from clipdist.prepare.phantom import write_skincap_layout
from tests.cluster.conftest import tiny_recipe
from tests.cluster.jobs import Job
from tests.cluster.slurm import LocalSlurm, missing
from tests.distributed.test_training import column

HERE = Path(__file__).resolve().parent
LIMIT = 6.0
# One after another: the script's reading of the recipe, the node's task, the launcher, the ranks.
IMPORTED = ("clipdist.config", "clipdist.cluster.job", "accelerate.commands.launch", "clipdist.train.loop")


class Bench:
    def __init__(self, slurm: LocalSlurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.raw = folder / "raw"
        write_skincap_layout(self.raw, 140, 48, 0, 1)
        self.count = 0
        self.steps: list[float] = []

    def job(self, *words: str) -> Job:
        self.count += 1
        folder = self.folder / f"job-{self.count}"
        folder.mkdir()
        if self.count > 1:
            (folder / "data").symlink_to(self.folder / "job-1" / "data")
        return Job(self.slurm, folder, tiny_recipe(folder), self.raw, words=words)

    def signal(self) -> float:
        job = self.job("train.epochs=60", "checkpoint.every_steps=0")
        job.reach(6)
        began = time.monotonic()
        self.slurm.run("scancel", "--signal=USR1", job.number, check=True)
        while not (job.run / "checkpoints" / "latest").exists():
            time.sleep(0.01)
        seconds = time.monotonic() - began
        self.end(job)
        return seconds

    def hang(self) -> float:
        job = self.job("train.epochs=60", f"train.hang_minutes={LIMIT / 60}")
        job.reach(6)
        os.kill(job.ranks()[2].pid, signal.SIGSTOP)
        began = time.monotonic()
        while job.ranks():
            time.sleep(0.1)
        seconds = time.monotonic() - began
        self.end(job)
        return seconds

    def start(self) -> float:
        job = self.job()
        job.reach(1)
        lines = (job.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        first = datetime.datetime.fromisoformat(json.loads(lines[0])["time"]).timestamp()
        started = datetime.datetime.fromisoformat(self.slurm.job(job.number)["StartTime"]).timestamp()
        job.finish()
        self.steps = list(column(job.run, "perf/step_seconds").values())[5:]
        return first - started

    def end(self, job: Job) -> None:
        self.slurm.run("scancel", job.number)
        self.slurm.wait(job.number, ("CANCELLED", "COMPLETED"))


def import_seconds() -> float:
    began = time.monotonic()
    for module in IMPORTED:
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.monotonic() - began


def beat_seconds(folder: Path, times: int = 2000) -> float:
    """Of one sign of progress, as a rank of a job gives it."""
    os.environ[world.EXIT_CODES] = str(folder)
    heartbeat.watch(30)
    began = time.perf_counter()
    for _ in range(times):
        heartbeat.beat()
    seconds = (time.perf_counter() - began) / times
    heartbeat.watch(0)
    return seconds


def measure(repetitions: int) -> dict[str, Any]:
    found: dict[str, Any] = {"load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="slurm-") as root, tempfile.TemporaryDirectory() as folder:
        slurm = LocalSlurm(Path(root))
        try:
            slurm.up()
            bench = Bench(slurm, Path(folder))
            bench.start()  # packs the set
            for name, act in (("start", bench.start), ("signal", bench.signal), ("hang", bench.hang)):
                found[name] = []
                for number in range(repetitions):
                    found[name].append(act())
                    print(f"{name} {number + 1}: {found[name][-1]:.1f} s", flush=True)
            found["imports"] = [import_seconds() for _ in range(repetitions)]
            found["step"] = statistics.median(bench.steps)
            found["beat"] = beat_seconds(Path(folder))
        finally:
            slurm.down()
    return found


def as_markdown(found: dict[str, Any], about: dict[str, Any]) -> str:
    def row(what: str, values: list[float]) -> str:
        return f"| {what} | {statistics.median(values):.1f} | {min(values):.1f}–{max(values):.1f} |"

    rows = [
        row("signal → checkpoint complete", found["signal"]),
        row(f"SIGSTOP of a rank → all ranks gone, limit {LIMIT:.0f} s", found["hang"]),
        row("job's start → first step", found["start"]),
        row("of that, the imports alone", found["imports"]),
    ]
    share = found["beat"] / found["step"]
    return "\n".join(
        [
            f"# Supervision, {about['date']}",
            "",
            f"{about['machine']}, load {found['load']:.1f} at the start; torch {about['torch']}, Python "
            f"{about['python']}; a SLURM of four nodes on this machine, 2 × 2 processes; each measured "
            f"{len(found['signal'])} times.",
            "",
            "| | median s | range |",
            "|---|---|---|",
            *rows,
            "",
            f"A sign of progress takes {found['beat'] * 1e6:.0f} µs; of these steps of "
            f"{found['step'] * 1e3:.0f} ms that is {share:.3%}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    today = datetime.date.today()
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"supervision_{os.cpu_count()}cores_{today}")
    args = parser.parse_args()
    if lacking := missing():
        raise SystemExit(lacking)
    found = measure(args.repetitions)
    about = {
        "date": str(today),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    args.out.with_suffix(".json").write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(as_markdown(found, about), encoding="utf-8")
    print(args.out.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
