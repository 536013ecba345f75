"""Trains open_clip, with its own main program, on a shard set that clipdist packed.

python shards/phantom.py --out data/phantom-small --images 1000 --side 96
benchmarks/peers/.venv-open_clip/bin/python benchmarks/peers/train_open_clip.py data/phantom-small

One process on the CPU, a tiny model, about a hundred steps; nothing of open_clip is adapted. A Markdown page with the
versions, the settings and the losses goes to standard output; open_clip's log to standard error.
"""

import argparse
import contextlib
import importlib.metadata
import json
import logging
import math
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import open_clip
import torch
from open_clip_train.main import main as open_clip_main

MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 192, "patch_size": 16, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
PACKAGES = ["open_clip_torch", "webdataset", "torch", "torchvision"]
LINE = re.compile(r"Train Epoch: (\d+) .*Contrastive_loss: ([\d.]+)")


class Losses(logging.Handler):
    """Keeps (epoch, loss) of each logged step."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if found := LINE.search(record.getMessage()):
            self.found.append((int(found[1]), float(found[2])))


def run(shards: list[Path], samples: int, args: argparse.Namespace) -> tuple[list[tuple[int, float]], list[str]]:
    """Losses of the steps, and the options that open_clip's main program was given."""
    options = ["--dataset-type", "webdataset", "--train-num-samples", str(samples), "--model", "tiny"]
    options += ["--batch-size", str(args.batch), "--epochs", str(args.epochs), "--lr", "3e-4", "--wd", "0.1"]
    options += ["--warmup", "10", "--workers", "1", "--precision", "fp32", "--device", "cpu"]
    options += ["--log-every-n-steps", "1", "--seed", "0", "--aug-cfg", "scale=(0.8, 1.0)"]
    losses = Losses()
    logging.getLogger().addHandler(losses)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        (Path(folder) / "tiny.json").write_text(json.dumps(MODEL))
        open_clip.add_model_config(folder)
        where = ["--train-data", "::".join(map(str, shards)), "--logs", folder, "--name", "run"]
        status = open_clip_main([*where, *options])
        assert not status, f"open_clip ended with {status}"
    return losses.found, options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, help="folder of a shard set that clipdist packed, uncompressed")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    manifest = json.loads((args.set / "manifest.json").read_text(encoding="utf-8"))
    split = manifest["splits"]["train"]
    shards = [args.set / shard["file"] for shard in split["shards"]]
    began = time.perf_counter()
    losses, options = run(shards, split["samples"], args)
    seconds = time.perf_counter() - began
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    packed = manifest["made_by"]["versions"]["clipdist"]
    print(f"# open_clip trained on a set packed by clipdist, {time.strftime('%Y-%m-%d')}\n")
    print(f"{split['samples']:,} training pairs in {len(shards)} tars, packed by clipdist {packed}; {versions}; one")
    print(f"process on the CPU, one thread, {seconds:.0f} s with start. Model `tiny`: `{json.dumps(MODEL)}`.")
    print(f"By chance the loss is ln {args.batch} = {math.log(args.batch):.3f}.\n")
    print(f"Options: `{' '.join(options)}`.\n")
    print("| epoch | steps | first loss | last loss | mean loss |\n|--:|--:|--:|--:|--:|")
    for epoch in range(args.epochs):
        values = [loss for number, loss in losses if number == epoch]
        print(f"| {epoch} | {len(values)} | {values[0]:.4f} | {values[-1]:.4f} | {statistics.mean(values):.4f} |")


if __name__ == "__main__":
    main()
