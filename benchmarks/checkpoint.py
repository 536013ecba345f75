"""How long does training stand still for a checkpoint, and what does it cost in all?

python benchmarks/checkpoint.py              # two CPU processes, some minutes; data as benchmarks/step.py makes it

Runs of equal length, in turn: without checkpoints, with one every EVERY steps written in the background, and the same
written while training waits. "stall" is what training logs as standing still, as a share of its time; "longer" compares
the whole time of the steps with the run without checkpoints, so it also counts what writing takes from the cores that
train. Checkpoints here come every few seconds; a recipe's default is a quarter of an hour. JSON and Markdown.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from step import PRESETS, ROOT, prepare, recipe_of, train_clipdist

HERE = Path(__file__).resolve().parent
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "in the background": {"in_background": True},
    "waited for": {"in_background": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128, help="global")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/checkpoint_<preset>_<date>")
    args = parser.parse_args()
    args.workers, args.micro_batches, args.log_every = 1, 1, 4
    folder = (ROOT / "data" / f"benchmark-step-{args.preset}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    text = prepare(folder, PRESETS[args.preset])
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for turn in range(args.repetitions):
        for kind, options in KINDS.items():
            recipe = recipe_of(folder, text, f"checkpoints-{turn}", args)
            recipe["checkpoint"] |= {**options, "every_steps": args.every} if options else {}
            records = [r for r in train_clipdist(recipe, folder, args.processes) if r["step"] > args.every // 2]
            seconds = sum(r["perf/step_seconds"] * args.log_every for r in records)
            stall = sum(r.get("perf/checkpoint_stall_seconds", 0.0) for r in records)
            runs[kind].append({"seconds": seconds, "stall_seconds": stall, "stall": stall / seconds})
            print(f"{turn + 1}: {kind:18s} {seconds:6.1f} s, stall {stall / seconds:.2%}", file=sys.stderr, flush=True)
    medians = {kind: {key: statistics.median(run[key] for run in own) for key in own[0]} for kind, own in runs.items()}
    newest = max((folder / "runs").glob("checkpoints-*/checkpoints/step-*"), key=lambda path: path.stat().st_mtime)
    size = sum(path.stat().st_size for path in newest.iterdir())
    machine = {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "torch": torch.__version__}
    machine["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    date = datetime.date.today().isoformat()
    settings = {key: getattr(args, key) for key in ("preset", "processes", "batch", "steps", "every", "repetitions")}
    body = {"benchmark": "checkpoint", "date": date, "settings": settings, "machine": machine, "bytes": size}
    lines = [f"# Checkpoints, {args.preset}, {date}", "", "| checkpoints | s | stall | longer |", "|---|--:|--:|--:|"]
    for kind, own in medians.items():
        longer = own["seconds"] / medians["none"]["seconds"] - 1
        lines.append(f"| {kind} | {own['seconds']:.1f} | {own['stall']:.2%} | {longer:+.1%} |")
    each = medians["none"]["seconds"] / (args.steps - args.every // 2) * args.every
    lines += ["", f"A checkpoint of {size / 2**20:.0f} MiB every {args.every} steps, about {each:.0f} s.", ""]
    lines += [f"{settings}; {machine}.", ""]
    out = args.out or HERE / "results" / f"checkpoint_{args.preset}_{date}"
    Path(f"{out}.json").write_text(json.dumps(body | {"runs": runs}, indent=1) + "\n", encoding="utf-8")
    Path(f"{out}.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
