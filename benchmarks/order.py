"""How long, and with how much memory, does a process take from nothing to the keys of any batch?

Makes shard sets of 10^6, 10^8 and 10^9 samples in a temporary folder: the manifest is whole, all shards are links to
one archive. Each measurement runs in a process of its own: it reads the manifest, lays the order and finds the keys of
one global batch. Memory is the growth of the process's peak over what it holds after its imports. A mixture names the
set twice, so it has twice the samples. Needs Linux.

    python benchmarks/order.py                                # a table on standard error, JSON on standard output
    python benchmarks/order.py --samples 1000000 --kinds plain
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.data.config import DataConfig
from clipdist.data.mixing import MixEntry, Mixture, order_of
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shards import Manifest, ShardInfo, ShardSet, index_path, write_atomically

SAMPLES_PER_SHARD = 10_000
STEPS = ("first", "middle", "last")


def make_set(folder: Path, samples: int) -> None:
    """A set whose shards are all the same archive of 10,000 samples without pictures."""
    with ShardSetWriter(folder, samples_per_shard=SAMPLES_PER_SHARD) as out:
        for number in range(SAMPLES_PER_SHARD):
            out.write("train", f"sample-{number:08d}", b"picture", "png", {"text": "x"})
    manifest = ShardSet.open(folder).manifest
    (only,) = manifest.splits["train"]
    stub = folder / only.file
    shards = []
    for number in range(samples // SAMPLES_PER_SHARD):
        path = folder / f"train-{number:06d}.tar"
        if number:
            path.symlink_to(stub.name)
            index_path(path).symlink_to(index_path(stub).name)
        shards.append(ShardInfo(path.name, only.samples, only.bytes, only.xxh3_64))
    write_atomically(folder / "manifest.json", Manifest({"train": shards}).to_json().encode())


def measure(folder: Path, kind: str, step: str, global_batch: int) -> dict[str, Any]:
    """In a fresh process: seconds of each stage, and MiB."""
    config = DataConfig(set=str(folder))
    if kind == "mixture":
        entries = [MixEntry(set=str(folder), name=name, weight=weight) for name, weight in (("a", 2.0), ("b", 1.0))]
        config = DataConfig(mix=tuple(entries))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = peak_mib()
    times = [time.perf_counter()]
    split = Mixture.open(config).training("train")
    times.append(time.perf_counter())
    after_open = peak_mib()
    order = order_of(split, config, seed=0, global_batch=global_batch)
    last = 10 * order.steps_per_epoch - 1
    numbers = order.batch({"first": 0, "middle": last // 2, "last": last}[step]).numbers.tolist()
    times.append(time.perf_counter())
    keys = [split.key(number) for number in numbers]
    times.append(time.perf_counter())
    assert len(keys) == global_batch
    stages = dict(zip(("open", "order", "keys"), np.diff(times).tolist(), strict=True))
    return {
        "seconds": stages | {"all": times[-1] - times[0]},
        "mib": {"open": after_open - before, "all": peak_mib() - before},
    }


def peak_mib() -> float:
    """Not `getrusage`, whose peak a process inherits from its parent."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**6, 10**8, 10**9])
    parser.add_argument("--kinds", nargs="+", default=["plain", "mixture"], choices=["plain", "mixture"])
    parser.add_argument("--global-batch", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts; all are written down")
    parser.add_argument(
        "--measure", nargs=3, metavar=("FOLDER", "KIND", "STEP"), help="one measurement, in this process"
    )
    args = parser.parse_args()
    if args.measure:
        folder, kind, step = args.measure
        print(json.dumps(measure(Path(folder), kind, step, args.global_batch)))
        return
    results = []
    print("| samples | order | step of 10 epochs | seconds: open + order + keys | MiB: open, all |", file=sys.stderr)
    print("|---|---|---|---|---|", file=sys.stderr)
    for samples in args.samples:
        with tempfile.TemporaryDirectory() as parent:
            make_set(Path(parent) / "set", samples)
            for kind in args.kinds:
                for step in STEPS:
                    command = [sys.executable, __file__, "--global-batch", str(args.global_batch)]
                    command += ["--measure", f"{parent}/set", kind, step]
                    runs = [
                        json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
                        for _ in range(args.repeats)
                    ]
                    best = min(runs, key=lambda run: run["seconds"]["all"])
                    results.append({"samples": samples, "order": kind, "step": step, **best, "all": runs})
                    seconds = " + ".join(f"{best['seconds'][stage]:.2f}" for stage in ("open", "order", "keys"))
                    mib = f"{best['mib']['open']:.0f}, {best['mib']['all']:.0f}"
                    print(f"| {samples:,} | {kind} | {step} | {seconds} | {mib} |", file=sys.stderr)
    machine = {"cores": os.cpu_count(), "platform": platform.platform(), "load_at_end": os.getloadavg()[0]}
    print(json.dumps({"benchmark": "order", "global_batch": args.global_batch, "results": results} | machine, indent=1))


if __name__ == "__main__":
    main()
