"""How long does training stand still for a checkpoint, and what do checkpoints cost in all?

python benchmarks/checkpoint.py                  # one CPU process, 35 M parameters, some ten minutes

Trains the same run with checkpoints every EVERY steps that are written in the background, with such that are written in
the foreground, and without, taking turns in an order that changes. Two measures:

- the stall, as each run's metrics tell it (`perf/checkpoint_stall_seconds`), for each save and as a share of the time;
- the time of all steps after the first WARMUP, against that of the run without checkpoints in the same turn. This also
  has what a writing thread takes from the steps beside it, and the noise of the machine: how far the runs without
  checkpoints differ from each other is given beside.

What the stall would be at intervals of minutes is the stall of a save divided by the interval. The checkpoint at a
run's end counts for neither. Writes OUT.json and OUT.md.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODES = {"in the background": True, "in the foreground": False, "none": None}
NONE = "none"
MINUTES = (1, 5, 15)
KEPT = ("image", "side", "images", "batch", "every", "steps", "warmup", "repetitions")
TEXT = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}


def recipe_of(folder: Path, name: str, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    pairs = int(args.images * 0.9)
    checkpoint = {"every_minutes": 0, "every_steps": 0 if mode == NONE else args.every}
    return {
        "name": name,
        "runs": str(folder / "runs"),
        "resume": "never",
        "data": {"set": str(folder / "set"), "val_split": "", "groups": "none", "workers": 1},
        "model": {
            "image": {"name": f"timm:{args.image}", "side": args.side},
            "text": {
                "name": "hf:bert",
                "pretrained": False,
                "tokenizer": "captions",
                "max_tokens": 64,
                "options": {**TEXT, "max_position_embeddings": 64},
            },
        },
        "optim": {"lr": 1e-4, "warmup_steps": 10},
        "train": {"global_batch": args.batch, "epochs": -(-args.steps // (pairs // args.batch))},
        "checkpoint": {**checkpoint, "in_background": bool(MODES[mode])},
        "log": {"every_steps": 1, "tensorboard": False},
    }


def measure(folder: Path, turn: int, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run: its stalls in seconds, the seconds of the steps that count, and those of the whole process."""
    name = f"turn-{turn}-{mode.replace(' ', '-')}"
    run, path = folder / "runs" / name, folder / f"{name}.yaml"
    shutil.rmtree(run, ignore_errors=True)
    path.write_text(yaml.safe_dump(recipe_of(folder, name, mode, args)), encoding="utf-8")
    os.sync()
    load, began = os.getloadavg()[0], time.perf_counter()
    start([sys.executable, "-m", "clipdist.train", path], folder)
    whole = time.perf_counter() - began
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    counted = [record for record in records if record["step"] > args.warmup and "train/loss" in record]
    checkpoint = next(iter(sorted((run / "checkpoints").glob("step-*"))))
    found = {
        "load": load,
        "stalls": [r["perf/checkpoint_stall_seconds"] for r in counted if "perf/checkpoint_stall_seconds" in r],
        "steps": [record["perf/step_seconds"] for record in counted],
        "whole_seconds": whole,
        "bytes": sum(file.stat().st_size for file in checkpoint.iterdir()),
        "parameters": json.loads((run / "environment.json").read_text(encoding="utf-8"))["parameters"]["total"],
        "last_loss": records[-1]["train/loss"],
    }
    shutil.rmtree(run)
    return found


def start(command: list[Any], folder: Path) -> None:
    shared = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    shared |= {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | shared, capture_output=True, text=True)
    if done.returncode:
        (folder / "failed.log").write_text(done.stderr, encoding="utf-8")
        raise SystemExit(f"{command[0]} ended with {done.returncode}; see {folder / 'failed.log'}")


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of each mode, medians over the runs; `longer` compares with the run without checkpoints of the same turn."""
    found = {}
    for mode, own in runs.items():
        totals = [sum(run["steps"]) for run in own]
        without = [sum(run["steps"]) for run in runs[NONE]]
        found[mode] = {
            "train_seconds": statistics.median(totals),
            "spread": (max(totals) - min(totals)) / statistics.median(totals),
            "longer": statistics.median(mine / other - 1 for mine, other in zip(totals, without, strict=True)),
            "whole_seconds": statistics.median(run["whole_seconds"] for run in own),
        }
        if stalls := [stall for run in own for stall in run["stalls"]]:
            median = statistics.median(stalls)
            shares = [sum(run["stalls"]) / total for run, total in zip(own, totals, strict=True)]
            found[mode] |= {"saves": len(stalls), "stall_median": median, "stall_longest": max(stalls)}
            found[mode] |= {"stall_share": statistics.median(shares)}
            found[mode] |= {f"share_at_{minutes}_min": median / (60 * minutes + median) for minutes in MINUTES}
    return found


def page_of(body: dict[str, Any]) -> str:
    found, settings = body["summary"], body["settings"]
    lines = [f"# The price of a checkpoint, {body['date']}", ""]
    lines += [f"{body['parameters'] / 1e6:.1f} M parameters, {body['bytes'] / 1e6:.0f} MB a checkpoint, written every "]
    lines[-1] += f"{settings['every']} steps of {settings['batch']} pairs."
    columns = ["saves", "stall, s", "longest, s", "share of training", *(f"at {m} min" for m in MINUTES)]
    lines += ["", f"| checkpoints | {' | '.join([*columns, 'steps, s', 'longer'])} |", "|---|" + "--:|" * 9]
    for mode, one in found.items():
        cells = [""] * 7
        if "saves" in one:
            cells = [f"{one['saves']}", f"{one['stall_median']:.3f}", f"{one['stall_longest']:.3f}"]
            cells += [f"{one[key]:.2%}" for key in ("stall_share", *(f"share_at_{m}_min" for m in MINUTES))]
        cells += [f"{one['train_seconds']:.1f}", "" if mode == NONE else f"{one['longer']:+.1%}"]
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    spread = f"{found[NONE]['spread']:.1%}"
    lines += [
        "",
        "Stall: how long the steps stood still for a save, median and longest; its share of the time as measured,",
        "and what share the median would be at an interval of so many minutes. Steps: all that count, median of the",
        "turns. Longer: against the run without checkpoints of the same turn, median; those without differ by",
        f"{spread} from each other.",
        "",
        f"{settings}",
        "",
        f"{body['machine']}; {body['versions']}.",
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder for what is made; default: data/benchmark-checkpoint")
    parser.add_argument("--image", default="vit_small_patch16_224", help="of timm")
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16, help="global")
    parser.add_argument("--steps", type=int, default=44, help="about; whole epochs are trained")
    parser.add_argument("--warmup", type=int, default=4, help="steps that do not count")
    parser.add_argument("--every", type=int, default=8, help="steps from one checkpoint to the next")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/checkpoint_<cores>cores_<date>")
    args = parser.parse_args()
    folder = (args.data or ROOT / "data" / "benchmark-checkpoint").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    drawing = [sys.executable, ROOT / "shards" / "phantom.py", "--out", folder / "set", "--images", args.images]
    start([*drawing, "--side", args.side, "--split", "train=0.9", "val=0.1"], folder)
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for turn in range(args.repetitions):
        order = list(MODES)
        for mode in order[turn % 3 :] + order[: turn % 3]:
            runs[mode].append(measure(folder, turn, mode, args))
            last = runs[mode][-1]
            said = f"{sum(last['steps']):7.1f} s, stalls {sum(last['stalls']):6.2f} s, load {last['load']:.1f}"
            print(f"{turn + 1}: {mode:18s} {said}", file=sys.stderr, flush=True)
    losses = {run["last_loss"] for own in runs.values() for run in own}
    if len(losses) > 1:
        raise SystemExit(f"the runs did not train the same: last losses {losses}")
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    date, cores = datetime.date.today().isoformat(), len(os.sched_getaffinity(0))
    body = {
        "benchmark": "checkpoint",
        "date": date,
        "machine": {
            "cpu": next(line.split(":")[1].strip() for line in cpu if line.startswith("model name")),
            "cores": cores,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "kernel": platform.release(),
            "load": [run["load"] for own in runs.values() for run in own],
        },
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "timm", "transformers", "safetensors")
        },
        "settings": {key: getattr(args, key) for key in KEPT},
        "parameters": runs[NONE][0]["parameters"],
        "bytes": runs[NONE][0]["bytes"],
        "summary": summary(runs),
        "runs": runs,
    }
    out = args.out or HERE / "results" / f"checkpoint_{cores}cores_{date}"
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    page = page_of(body)
    Path(f"{out}.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
