"""How does a step grow with the number of processes, and what would 1,024 GPUs make of it?

python benchmarks/scaling.py                         # measures 1, 2 and 4 CPU processes, then computes
python benchmarks/scaling.py --pairs-per-second 337 --parameters 150e6 --rows 192 --no-measuring

First measured: training as users start it, small towers, a fixed number of rows on each process (weak scaling). Then
computed, by the model below, with every assumption printed. Its compute speed is the measured one, or a published one
given by --pairs-per-second; its links are the vendors' figures.

    step = compute + max(0, gradients − hidden · backward) + features + vectors + loss + agreement
    compute = rows / pairs_per_second of one device;  backward = ⅔ of it
    gradients = ring(2 · parameters · 4 bytes)          reduced while the backward pass runs, `hidden` of it at most
    features = ring(rows · W · 2 · width · 4 bytes)     one gather, nothing to hide behind
    vectors = ring(rows · W · 3 · 4 bytes)
    loss = 4 to 6 products of rows × (rows · W) × width, at `efficiency` of the device's peak
    ring(n) = (W − 1)/W · n / bandwidth + (W − 1) · latency       the slowest link of the ring counts

A ring over nodes is as slow as the link between nodes, shared by the GPUs that use it. Writes OUT.json and OUT.md.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
WORLDS = (1, 8, 16, 64, 256, 1024)
ROWS = 64  # of each process that is measured


class Cluster(NamedTuple):
    """Published figures. Bandwidth in bytes/s one way for each GPU, latency in seconds for each hop of a ring."""

    name: str
    gpus_per_node: int
    inside: float
    between: float
    latency_inside: float
    latency_between: float
    peak: float


# NVIDIA's data sheets: NVLink 4, 900 GB/s both ways; ConnectX-7, 400 Gbit/s for each GPU (DGX H100); NVLink 3, 600
# GB/s; ConnectX-6, 200 Gbit/s for each GPU (DGX A100). Latencies of a hop are assumptions. Peaks: dense bf16.
CLUSTERS = (
    Cluster("H100, NVLink 4, 400 Gbit/s", 8, 450e9, 50e9, 2e-6, 8e-6, 989e12),
    Cluster("A100, NVLink 3, 200 Gbit/s", 8, 300e9, 25e9, 2e-6, 8e-6, 312e12),
    Cluster("A100, NVLink 3, 25 Gbit/s Ethernet for a node", 8, 300e9, 3.1e9 / 8, 2e-6, 30e-6, 312e12),
)


class Work(NamedTuple):
    """What one process does in a step."""

    rows: int
    pairs_per_second: float
    parameters: float
    width: int


def ring(size: float, world: int, bandwidth: float, latency: float) -> float:
    """Seconds of an all-gather of `size` bytes in all; an all-reduce is two of them."""
    return (world - 1) / world * size / bandwidth + (world - 1) * latency


def predict(work: Work, cluster: Cluster, world: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step's parts, and pairs per second over all devices."""
    inside = world <= cluster.gpus_per_node
    bandwidth = cluster.inside if inside else cluster.between
    latency = cluster.latency_inside if inside else cluster.latency_between
    batch = work.rows * world
    compute = work.rows / work.pairs_per_second
    gradients = 2 * ring(work.parameters * 4, world, bandwidth, latency)
    # Products of rows × rows: four for the rank's own square, whose tiles serve both directions, six for the others.
    products = (4 + 6 * (world - 1)) / world
    parts = {
        "compute": compute,
        "gradients": max(0.0, gradients - args.hidden * compute * 2 / 3),
        "features": ring(batch * 2 * work.width * 4, world, bandwidth, latency),
        "vectors": ring(batch * 3 * 4, world, bandwidth, latency),
        "loss": products * 2 * work.rows * batch * work.width / (args.efficiency * cluster.peak),
        "agreement": 2 * ring(24, world, bandwidth, latency),
    }
    seconds = sum(parts.values())
    return {**parts, "step": seconds, "pairs_per_second": batch / seconds, "efficiency": compute / seconds}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What `step.py` finds for clipdist alone, on each number of processes."""
    found = []
    for world in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            words = ["--programs", "clipdist", "--processes", str(world), "--batch", str(ROWS * world)]
            words += ["--workers", "0", "--repetitions", "1", "--out", f"{folder}/out"]
            subprocess.run([sys.executable, HERE / "step.py", *words], check=True, stdout=subprocess.DEVNULL)
            body = json.loads(Path(folder, "out.json").read_text(encoding="utf-8"))
        speed = statistics.median(body["runs"]["clipdist"][0]["pairs_per_second"])
        found.append({"processes": world, "rows": ROWS, "pairs_per_second": speed})
        print(f"{world} processes: {speed:.1f} pairs/s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--no-measuring", action="store_true")
    # 176 A100 trained ViT-B/16 on LAION-400M at about 337 pairs/s each (open_clip's docs/PRETRAINED.md, by its hours).
    parser.add_argument("--pairs-per-second", type=float, default=337.0, help="of one GPU; default: a published A100's")
    parser.add_argument("--parameters", type=float, default=149.6e6, help="default: ViT-B/16 with its text tower")
    parser.add_argument("--rows", type=int, default=192, help="of each GPU")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=float, default=0.8, help="share of the backward pass that hides communication")
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of the peak that the loss reaches")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/scaling_<date>")
    args = parser.parse_args()
    measured = [] if args.no_measuring else measure(args)
    work = Work(args.rows, args.pairs_per_second, args.parameters, args.width)
    computed = {c.name: {world: predict(work, c, world, args) for world in WORLDS} for c in CLUSTERS}
    date = datetime.date.today().isoformat()
    lines = [f"# Scaling, {date}", ""]
    if measured:
        cores = len(os.sched_getaffinity(0))
        lines += [
            f"Measured, {cores} CPU cores, one thread and {ROWS} rows a process, `step.py`'s small towers:",
            "",
        ]
        lines += ["| processes | pairs/s | of one process × processes |", "|--:|--:|--:|"]
        alone = measured[0]["pairs_per_second"] / measured[0]["processes"]
        for row in measured:
            share = row["pairs_per_second"] / (alone * row["processes"])
            lines.append(f"| {row['processes']} | {row['pairs_per_second']:.1f} | {share:.2f} |")
        lines += ["", f"More processes than {cores} share the cores: there the last column falls as 1/processes.", ""]
    lines += ["Computed, not measured, by the model that `benchmarks/scaling.py` states, with these assumptions:", ""]
    lines += [
        f"- {key.replace('_', ' ')}: {value:g}" for key, value in {**work._asdict(), "hidden": args.hidden}.items()
    ]
    lines += [f"- the loss reaches {args.efficiency:g} of the peak", *(f"- {cluster}" for cluster in CLUSTERS), ""]
    heads = ["GPUs", "global batch", "pairs/s", "efficiency", *("gradients", "features", "loss")]
    for name, rows in computed.items():
        lines += [f"**{name}**; parts in ms of a step", "", f"| {' | '.join(heads)} |", "|" + "--:|" * len(heads)]
        for world, cell in rows.items():
            parts = [f"{cell[part] * 1e3:.2f}" for part in ("gradients", "features", "loss")]
            own = [
                f"{world:,}",
                f"{work.rows * world:,}",
                f"{cell['pairs_per_second']:,.0f}",
                f"{cell['efficiency']:.3f}",
            ]
            lines.append(f"| {' | '.join([*own, *parts])} |")
        lines.append("")
    lines.append(f"torch {torch.__version__}.")
    out = args.out or HERE / "results" / f"scaling_{date}"
    body = {"benchmark": "scaling", "date": date, "measured": measured, "work": work._asdict(), "computed": computed}
    body["assumptions"] = {"hidden": args.hidden, "efficiency": args.efficiency, "clusters": CLUSTERS}
    Path(f"{out}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    Path(f"{out}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
