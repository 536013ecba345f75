"""How many pairs a second does a whole training run take in, against open_clip with the same towers and data?

benchmarks/peers/setup.sh open_clip
python benchmarks/step.py                    # two CPU processes, small towers, some ten minutes
python benchmarks/step.py --preset base --processes 1 --batch 1024      # ViT-B/16 and 12 layers of text on a GPU

Both programs are started as their users start them, by their own launchers and from the same tars: image tower of timm,
text tower of Hugging Face, the same tokenizer, precision, global batch, crops, AdamW, clipping. Captions have 8 to 40
tokens; open_clip pads them to 77, as its configurations say, clipdist to the longest of a batch. They take turns, and
every line that they log after the first WARMUP steps counts; the median is compared. Data loading is a part of it.
Writes OUT.json and OUT.md.
"""

import argparse
import datetime
import io
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import BertConfig, BertModel

from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shards import ShardSet
from clipdist.data.text import captions_of, train_wordpiece

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEER = HERE / "peers" / ".venv-open_clip" / "bin" / "python"
TOKENS = (8, 40)
PARTS = 8  # micro-batches of the cached-gradient step
IN_PARTS = f"clipdist, {PARTS} micro-batches"
PROGRAMS = ["clipdist", "open_clip", IN_PARTS]
WORDS = (
    *("red", "blue", "small", "large", "round", "oval", "rough", "smooth", "lesion", "border", "centre", "upper"),
    *("lower", "left", "right", "thin", "thick", "pale", "dark", "brown", "black", "pink", "scale", "crust", "plaque"),
    *("nodule", "network", "dots", "globules", "streaks", "veil", "vessel", "regular", "irregular", "with", "near"),
)
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "image": "convnext_atto",
        "side": 112,
        "text": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
        "width": 256,
        "precision": "fp32",
        "compile": False,
        "pairs": 4096,
    },
    "base": {
        "image": "vit_base_patch16_224",
        "side": 224,
        "text": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048},
        "width": 512,
        "precision": "bf16",
        "compile": True,
        "pairs": 32768,
    },
}
LINE = re.compile(r"Batch \(t\): ([\d.]+), .*Loss: ([\d.]+)")


def make_set(folder: Path, side: int, pairs: int) -> None:
    """Random pictures, stored a little larger than the towers take them, under captions of 8 to 40 tokens."""
    draw = np.random.default_rng(0)
    with ShardSetWriter(folder, samples_per_shard=512, overwrite=True) as out:
        for number in range(pairs):
            small = Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            small.resize((side * 8 // 7,) * 2, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            words = draw.choice(WORDS, int(draw.integers(TOKENS[0] - 2, TOKENS[1] - 1)))
            out.write("train", f"{number:06d}", buffer.getvalue(), "jpg", {"text": " ".join(words)})


def prepare(folder: Path, preset: dict[str, Any]) -> Path:
    """The set, and a folder with tokenizer and configuration of the text tower that both programs load."""
    data, text = folder / "set", folder / "text"
    if not (text / "model.safetensors").exists():
        make_set(data, preset["side"], preset["pairs"])
        tokenizer = train_wordpiece(captions_of(ShardSet.open(data).split("train")), 1000, 77)
        tokenizer.save(text)
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **preset["text"])
        BertModel(config, add_pooling_layer=False).save_pretrained(text)  # open_clip loads weights from there
    return text


def recipe_of(folder: Path, text: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    preset = PRESETS[args.preset]
    return {
        "name": name,
        "runs": str(folder / "runs"),
        "resume": "never",
        "data": {
            "set": str(folder / "set"),
            "val_split": "",
            "groups": "none",
            "workers": args.workers,
            "augment": {"crop_area": [0.8, 1.0]},
        },
        "model": {
            "image": {"name": f"timm:{preset['image']}", "side": preset["side"]},
            "text": {"name": f"hf:{text}", "max_tokens": 77},
            "width": preset["width"],
        },
        "optim": {"lr": 1e-4, "warmup_steps": 10},
        "train": {
            "global_batch": args.batch,
            "epochs": -(-args.steps * args.batch // preset["pairs"]),
            "precision": preset["precision"],
            "compile": preset["compile"],
            "micro_batch": args.batch // args.processes // args.micro_batches if args.micro_batches > 1 else 0,
        },
        "checkpoint": {"every_minutes": 0},
        "log": {"every_steps": args.log_every, "tensorboard": False},
    }


def train_clipdist(recipe: dict[str, Any], folder: Path, processes: int) -> list[dict[str, Any]]:
    """What a run logged of its training, line by line."""
    run = Path(recipe["runs"]) / recipe["name"]
    shutil.rmtree(run, ignore_errors=True)
    path = folder / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    config = ROOT / "launch" / "accelerate" / ("gpu.yaml" if torch.cuda.is_available() else "cpu.yaml")
    launcher = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", config]
    launcher += ["--main_process_port", "0", "--num_processes", str(processes)]
    start([*(launcher if processes > 1 else [sys.executable]), "-m", "clipdist.train", path], folder)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if "train/loss" in (record := json.loads(line))]


def run_clipdist(folder: Path, text: Path, turn: int, args: argparse.Namespace) -> dict[str, list[float]]:
    name = f"turn-{turn}-{args.micro_batches}"
    records = train_clipdist(recipe_of(folder, text, name, args), folder, args.processes)
    kept = [record for record in records if record["step"] > args.warmup]
    return {
        "pairs_per_second": [record["perf/samples_per_second"] for record in kept],
        "loss": [record["train/loss"] for record in kept],
        "mfu": [record["perf/mfu"] for record in kept if "perf/mfu" in record],
    }


def run_open_clip(folder: Path, text: Path, turn: int, args: argparse.Namespace) -> dict[str, list[float]]:
    preset = PRESETS[args.preset]
    model = {
        "embed_dim": preset["width"],
        "vision_cfg": {"timm_model_name": preset["image"], "timm_pool": "", "image_size": preset["side"]},
        "text_cfg": {
            "hf_model_name": str(text),
            "hf_tokenizer_name": str(text),
            "hf_model_pretrained": False,
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
            "context_length": 77,
        },
    }
    models = folder / "models"
    models.mkdir(exist_ok=True)
    (models / "same.json").write_text(json.dumps(model), encoding="utf-8")
    shards = "::".join(map(str, sorted((folder / "set").glob("train-*.tar"))))
    own = args.batch // args.processes
    words = ["--dataset-type", "webdataset", "--train-data", shards, "--model", "same", "--batch-size", str(own)]
    words += ["--train-num-samples", str(args.steps * args.batch), "--dataset-resampled", "--epochs", "1"]
    words += ["--workers", str(args.workers), "--lr", "1e-4", "--warmup", "10", "--wd", "0.1", "--beta1", "0.9"]
    words += ["--beta2", "0.98", "--eps", "1e-6", "--grad-clip-norm", "1.0", "--aug-cfg", "scale=(0.8, 1.0)"]
    words += ["--precision", {"fp32": "fp32", "bf16": "amp_bf16"}[preset["precision"]], "--local-loss"]
    words += ["--gather-with-grad", "--log-every-n-steps", str(args.log_every), "--seed", "0", "--save-frequency", "0"]
    words += ["--logs", str(folder / "logs"), "--name", f"run-{os.getpid()}-{turn}"]
    words += ["--torchcompile"] if preset["compile"] else []
    words += [] if torch.cuda.is_available() else ["--device", "cpu"]
    command = [PEER, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    (folder / "options.json").write_text(json.dumps(words), encoding="utf-8")
    said = start([*command, HERE / "peers" / "step_open_clip.py", models, folder / "options.json"], folder)
    found = [(float(line[1]), float(line[2])) for line in LINE.finditer(said)]
    steps = [number * args.log_every for number in range(len(found))]
    kept = [pair for step, pair in zip(steps, found, strict=True) if step > args.warmup]
    return {"pairs_per_second": [args.batch / seconds for seconds, _ in kept], "loss": [loss for _, loss in kept]}


def start(command: list[Any], folder: Path) -> str:
    shared = {"OMP_NUM_THREADS": str(1 if not torch.cuda.is_available() else 4), "TOKENIZERS_PARALLELISM": "false"}
    shared |= {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | shared, capture_output=True, text=True)
    if done.returncode:
        (folder / "failed.log").write_text(done.stderr, encoding="utf-8")
        raise SystemExit(f"{command[0]} ended with {done.returncode}; see {folder / 'failed.log'}")
    return done.stderr + done.stdout


def peer_version() -> str | None:
    if not PEER.exists():
        return None
    code = "import importlib.metadata as m; print(m.version('open_clip_torch'))"
    return subprocess.run([PEER, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--data", type=Path, help="folder for what is made; default: data/benchmark-step-<preset>")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128, help="global")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each rank")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=8, help="steps that do not count")
    parser.add_argument("--log-every", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/step_<preset>_<date>")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    args = parser.parse_args()
    args.micro_batches = 1
    if "open_clip" in args.programs and not PEER.exists():
        raise SystemExit("no environment of open_clip; make it with benchmarks/peers/setup.sh open_clip")
    folder = (args.data or ROOT / "data" / f"benchmark-step-{args.preset}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    text = prepare(folder, PRESETS[args.preset])
    in_parts = argparse.Namespace(**{**vars(args), "micro_batches": PARTS})
    programs = {"clipdist": (run_clipdist, args), "open_clip": (run_open_clip, args)}
    programs[IN_PARTS] = (run_clipdist, in_parts)
    programs = {name: programs[name] for name in args.programs}
    runs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in programs}
    load = os.getloadavg()[0]
    for turn in range(args.repetitions):
        for name, (run, options) in programs.items():
            runs[name].append(run(folder, text, turn, options))
            speed = statistics.median(runs[name][-1]["pairs_per_second"])
            print(f"{turn + 1}: {name:28s} {speed:8.1f} pairs/s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(v for run in own for v in run["pairs_per_second"]) for name, own in runs.items()}
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    date = datetime.date.today().isoformat()
    body = {
        "benchmark": "step",
        "date": date,
        "machine": {
            "cpu": next(line.split(":")[1].strip() for line in cpu if line.startswith("model name")),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "kernel": platform.release(),
            "load": [load, os.getloadavg()[0]],
        },
        "versions": {"torch": torch.__version__, "open_clip_torch": peer_version()},
        "settings": {**PRESETS[args.preset], **{key: getattr(args, key) for key in ("preset", "processes", "batch")}},
        "medians": medians,
        "runs": runs,
    }
    out = args.out or HERE / "results" / f"step_{args.preset}_{date}"
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    lines = [f"# A whole training step, {args.preset}, {date}", "", "| | pairs/s | of the first |", "|---|--:|--:|"]
    first = next(iter(medians.values()))
    lines += [f"| {name} | {speed:.1f} | {speed / first:.2f} |" for name, speed in medians.items()]
    if IN_PARTS in medians and "clipdist" in medians:
        longer = medians["clipdist"] / medians[IN_PARTS]
        lines += ["", f"In {PARTS} micro-batches a step takes {longer:.2f} times as long as at once."]
    lines.append("")
    page = "\n".join([*lines, f"{body['settings']}", "", f"{body['machine']}; {body['versions']}.", ""])
    Path(f"{out}.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
