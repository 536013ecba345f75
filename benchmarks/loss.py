"""How long, in how much memory and with how many bytes sent is the contrastive loss computed, with its gradients?

benchmarks/peers/setup.sh open_clip
python benchmarks/loss.py                       # CPU, some minutes
python benchmarks/loss.py --device cuda         # one GPU, bfloat16, up to a million rows
python benchmarks/loss.py --quick               # shows that everything runs; its figures mean nothing

B rows in the global batch, D wide, W processes with B/W rows and one thread each, joined by gloo. Contestants take
turns; each measurement is a fresh set of processes: one step on a few rows, then timed ones, forward and backward.

    clipdist          ContrastiveLoss as training uses it (on a GPU: the kernel)
    clipdist_tiles    the same without the kernel (GPU only)
    open_clip_local   its ClipLoss(local_loss, gather_with_grad)
    open_clip         its ClipLoss(gather_with_grad): all logits on every process
    materialised      PyTorch: all logits, two cross-entropies (one process)

Time is the slowest rank's, median over steps and repetitions; memory the largest growth of a rank's peak (resident
set, or device memory) over the features and the first, small step. Bytes sent are read off the loopback interface, so
nothing else may use it meanwhile. Losses and gradient norms must agree, or the benchmark stops. A contestant that would
not fit is left out. Writes OUT.json, OUT.md and OUT.png.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CPU = ["clipdist", "open_clip_local", "open_clip"]
CUDA = ["clipdist", "clipdist_tiles", "materialised", "open_clip_local"]
COLOURS = {"clipdist": "#0b6e99", "clipdist_tiles": "#5fb3d4", "open_clip_local": "#d1495b", "open_clip": "#edae49"}
GIB = 1 << 30
# What a contestant needs beside the features, in b × B matrices of four bytes: not started where it would not fit.
MATRICES = {"open_clip_local": 4.2, "open_clip": 4.2, "materialised": 4.2, "clipdist": 0, "clipdist_tiles": 0}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def fits(contestant: str, rows: int, processes: int, memory: float) -> bool:
    own = rows if contestant in ("open_clip", "materialised") else rows // processes
    return MATRICES[contestant] * own * rows * 4 * processes < memory


def measure(contestant: str, rows: int, processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """One set of processes; every rank's answer, or what went wrong."""
    words = [contestant, str(rows // processes), str(args.width), str(args.steps), args.device, args.dtype]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [args.python, HERE / "peers" / "loss_rank.py", *words],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [rank.communicate() for rank in ranks]
    failed = [
        errors.strip().splitlines()[-1:] for rank, (_, errors) in zip(ranks, said, strict=True) if rank.returncode
    ]
    if failed:
        return {"error": " ".join(failed[0]) or "killed"}
    answers = [json.loads(out.splitlines()[-1]) for out, _ in said]
    return {
        "seconds": [max(step) for step in zip(*(answer["seconds"] for answer in answers), strict=True)],
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
        "sent_bytes_per_step": answers[0]["sent_bytes_per_step"] if processes > 1 else 0,
        # A rank's own loss is a part of the whole with open_clip's local form.
        "loss": statistics.mean(answer["loss"] for answer in answers),
        "gradient_norm": math.hypot(*(answer["gradient_norm"] for answer in answers)),
    }


def agree(runs: dict[str, dict[str, Any]], tolerance: float) -> None:
    sound = {name: run for name, run in runs.items() if "error" not in run}
    for quantity in ("loss", "gradient_norm"):
        values = [run[quantity] for run in sound.values()]
        if values and max(values) - min(values) > tolerance * max(values):
            raise SystemExit(f"the contestants disagree on the {quantity}: {dict(zip(sound, values, strict=True))}")


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    records: dict[tuple[int, int, str], dict[str, Any]] = {}
    memory = args.memory_gib * GIB
    for repetition in range(args.repetitions):
        for processes in args.processes:
            for rows in args.rows:
                if rows > args.largest_rows.get(processes, rows):
                    continue
                runs = {}
                for name in args.contestants:
                    if (name == "materialised" and processes > 1) or not fits(name, rows, processes, memory):
                        continue
                    runs[name] = run = measure(name, rows, processes, args)
                    place = {"processes": processes, "rows": rows, "contestant": name}
                    records.setdefault((processes, rows, name), {**place, "runs": []})["runs"].append(run)
                    shown = (
                        run.get("error")
                        or f"{statistics.median(run['seconds']):9.3f} s {run['peak_bytes'] / GIB:7.3f} GiB"
                    )
                    print(
                        f"{repetition + 1}: W {processes}, B {rows:8,d}, {name:16s} {shown}",
                        file=sys.stderr,
                        flush=True,
                    )
                agree(runs, args.tolerance)
    return list(records.values())


def summary(records: list[dict[str, Any]]) -> dict[tuple[int, int], dict[str, dict[str, float]]]:
    """(W, B) -> contestant -> medians."""
    found: dict[tuple[int, int], dict[str, dict[str, float]]] = {}
    for record in records:
        sound = [run for run in record["runs"] if "error" not in run]
        if sound:
            found.setdefault((record["processes"], record["rows"]), {})[record["contestant"]] = {
                "seconds": statistics.median(second for run in sound for second in run["seconds"]),
                "peak_bytes": statistics.median(run["peak_bytes"] for run in sound),
                "sent": statistics.median(run["sent_bytes_per_step"] for run in sound),
            }
    return dict(sorted(found.items()))


def table(cells: dict[tuple[int, int], dict[str, dict[str, float]]], against: str) -> str:
    lines = [
        f"| W | B | contestant | s | of {against} | peak MiB | of {against} | MiB sent per rank | of {against} |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (processes, rows), cell in cells.items():
        for name, own in cell.items():
            peer = cell.get(against)
            ratios = [
                f"**{own[key] / peer[key]:.3g}**" if peer and peer[key] and name != against else ""
                for key in ("seconds", "peak_bytes", "sent")
            ]
            sizes = [f"{own['seconds']:.3f}", f"{own['peak_bytes'] / 2**20:,.0f}", f"{own['sent'] / 2**20:,.1f}"]
            mixed = " | ".join(part for pair in zip(sizes, ratios, strict=True) for part in pair)
            lines.append(f"| {processes} | {rows:,} | {name} | {mixed} |")
    return "\n".join(lines)


def plot(cells: dict[tuple[int, int], dict[str, dict[str, float]]], path: Path) -> None:
    worlds = sorted({processes for processes, _ in cells})
    figure, axes = plt.subplots(2, len(worlds), figsize=(4 * len(worlds), 7), squeeze=False, sharex=True, sharey="row")
    for column, world in enumerate(worlds):
        for line, (quantity, unit, label) in enumerate((("seconds", 1.0, "seconds"), ("peak_bytes", GIB, "peak, GiB"))):
            axis = axes[line][column]
            for name in dict.fromkeys(name for cell in cells.values() for name in cell):
                points = [
                    (b, cell[name][quantity] / unit) for (w, b), cell in cells.items() if w == world and name in cell
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", label=name, color=COLOURS.get(name))
            axis.set(xscale="log", yscale="log", title=f"W = {world}" if not line else "", xlabel="B" if line else "")
            axis.grid(alpha=0.3)
            if not column:
                axis.set_ylabel(label)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def versions(python: str) -> dict[str, str]:
    code = "import importlib.metadata as m; print(m.version('open_clip_torch'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    found = {"torch": torch.__version__, "clipdist": importlib.metadata.version("clipdist")}
    return found | ({"open_clip_torch": done.stdout.strip()} if done.returncode == 0 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--rows", type=int, nargs="+", help="global batches B")
    parser.add_argument("--processes", type=int, nargs="+", help="default: 1 2 4 on a CPU, 1 on a GPU")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--contestants", nargs="+")
    parser.add_argument("--memory-gib", type=float, help="what may be used; default: nine tenths of what is free")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/loss_<device>_<date>")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.tolerance = 0.02 if args.dtype == "bfloat16" else 1e-3
    args.contestants = args.contestants or (CUDA if on_gpu else CPU)
    args.processes = args.processes or ([1] if on_gpu else [1, 2, 4])
    args.rows = args.rows or ([4096, 16384, 65536, 262144, 1048576] if on_gpu else [1024, 4096, 8192, 32768])
    args.largest_rows = {} if on_gpu else {1: 8192, 4: 8192}
    if args.quick:
        args.rows, args.processes, args.repetitions = [512, 1024], [1, 2][: 1 if on_gpu else 2], 1
    args.steps = 10 if on_gpu and args.steps == 1 else args.steps
    peer = HERE / "peers" / ".venv-open_clip" / "bin" / "python"
    args.python = str(peer) if peer.exists() else sys.executable
    if not peer.exists():
        args.contestants = [name for name in args.contestants if not name.startswith("open_clip")]
        print("open_clip is left out; make its environment with benchmarks/peers/setup.sh open_clip", file=sys.stderr)
    if args.memory_gib is None:
        import psutil

        free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
        args.memory_gib = 0.9 * free / GIB
    load = os.getloadavg()[0]
    records = measure_all(args)
    cells = summary(records)
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    machine = {
        "cpu": next(line.split(":")[1].strip() for line in cpu if line.startswith("model name")),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "kernel": platform.release(),
        "load": [load, os.getloadavg()[0]],
        "python": platform.python_version(),
    }
    date = datetime.date.today().isoformat()
    out = args.out or HERE / "results" / f"loss_{args.device}_{date}"
    settings = {key: getattr(args, key) for key in ("device", "dtype", "width", "steps", "repetitions", "memory_gib")}
    body = {"benchmark": "loss", "date": date, "machine": machine, "versions": versions(args.python)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.json", "w", encoding="utf-8") as file:
        json.dump(body | {"settings": settings, "results": records}, file, indent=1)
        file.write("\n")
    against = "materialised" if on_gpu else "open_clip_local"
    page = f"# The contrastive loss, {args.device}, {date}\n\nforward + backward, D = {args.width}, {args.dtype}; "
    page += f"{body['versions']}; {machine}.\n\n{table(cells, against)}\n\n![time and memory]({out.name}.png)\n"
    Path(f"{out}.md").write_text(page, encoding="utf-8")
    plot(cells, Path(f"{out}.png"))
    print(page)


if __name__ == "__main__":
    main()
