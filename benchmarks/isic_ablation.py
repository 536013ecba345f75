"""What makes learning from ISIC 2024 work? Zero-shot AUROC of benign against malignant, one step at a time, as JSON.

python benchmarks/isic_ablation.py --folder /scratch/isic --seeds 0 1 2

Draws invented tiles as `shards/isic.py --phantom` does: a training set at the published rate, one malignant tile in a
thousand (its validation split comes from other patients), and a test set of other patients at a higher, declared rate
(--test-malignant), since an AUROC of three malignant tiles tells nothing. Trains launch/recipes/isic.yaml small=true
once for each arm and seed, from random weights: the recipe first without what it adds, then with one more of it each
time. Scores the prompts `A benign skin lesion.` and `A malignant skin lesion.`; intervals resample test patients. The
folder keeps sets and finished runs: the same command goes on where it stopped. One process, one thread.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "launch/recipes/isic.yaml"
CLASSES, TEMPLATES = (ROOT / "launch/prompts" / name for name in ("isic_classes.json", "isic_templates.txt"))
SIDE = 48  # pixels, as the small recipe's image tower takes them
PLAIN = {
    "set": "plain",
    "data.groups": "none",
    "data.balance": '""',
    "train.stages": "[]",
    "train.epochs": "1",
    "optim.warmup_steps": "20",
}
# Each arm is the one before it and the keys given here; `set` is a folder of packed tiles.
ARMS: dict[str, dict[str, str]] = {
    "plain": PLAIN,
    "+ groups": {"data.groups": "label"},
    "+ balance": {"data.balance": "label"},
    "+ metadata captions": {"set": "metadata"},
    # An epoch with frozen towers comes before the one that all arms have.
    "+ stages": {
        "train.stages": "[{from_epoch: 0, image: none, text: none}, {from_epoch: 1, image: all, text: all}]",
        "train.epochs": "2",
    },
}


def make_sets(folder: Path, args: argparse.Namespace) -> None:
    """The sets `plain` and `metadata`, of the same tiles, and `test`."""
    side = ("--phantom-side", SIDE)
    drawn = ("--phantom", args.tiles, *side, "--split", "train=0.95", "val=0.05")
    tested = (
        "--phantom",
        args.test_tiles,
        *side,
        "--malignant",
        args.test_malignant,
        "--seed",
        1,
        "--split",
        "test=1.0",
    )
    for name, raw, words in (
        ("plain", "raw", drawn),
        ("metadata", "raw", (*drawn, "--metadata")),
        ("test", "raw-test", (*tested, "--metadata")),
    ):
        if not (folder / name / "manifest.json").exists():
            command = [sys.executable, ROOT / "shards/isic.py", folder / raw, "--out", folder / name, *words]
            subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)


def keys_of(arm: str) -> dict[str, str]:
    """What is set for an arm: its own keys over those of the arms before it."""
    keys: dict[str, str] = {}
    for name, own in ARMS.items():
        keys |= own
        if name == arm:
            break
    return keys


def trained(folder: Path, name: str, keys: dict[str, str], seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run, and its scores on the test set."""
    from clipdist.config import load_config
    from clipdist.data.shards import ShardSet
    from clipdist.evaluate.suite import Asked, Suite, embed_for
    from clipdist.evaluate.zero_shot import read_templates
    from clipdist.model.saved import load
    from clipdist.train.loop import train

    before = _cpu_seconds()
    run = f"{name.replace('+ ', '').replace(' ', '-')}-{seed}"
    words = [f"{key}={value}" for key, value in keys.items() if key != "set"]
    words += [f"data.set={folder / keys['set']}", f"name={run}", f"runs={folder / 'runs'}", f"seed={seed}"]
    config = load_config(RECIPE, ["small=true", *words, *overrides])
    if code := train(config):
        sys.exit(code)  # stopped by a signal: the same command goes on
    saved, tested = load(config.folder / "model", "cpu"), ShardSet.open(folder / "test")
    templates = read_templates(TEMPLATES)
    asked = Asked("test", "none", zero_shot="label", classes=CLASSES, templates=templates, workers=0)
    scores = Suite(asked, saved, tested, embed_for(asked, saved, tested, "test"), None).zero_shot("label")[0].body
    return {
        "arm": name,
        "seed": seed,
        "auroc": scores["auroc"],
        "balanced_accuracy": scores["balanced_accuracy"],
        "units": scores["units"],
        "cpu_seconds": round(_cpu_seconds() - before, 1),
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for sets and runs; kept")
    parser.add_argument("--tiles", type=int, default=80000, help="of training and validation")
    parser.add_argument("--test-tiles", type=int, default=3000)
    parser.add_argument("--test-malignant", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run")
    args = parser.parse_intermixed_args()
    from clipdist.train.command import configure_logging

    configure_logging()
    make_sets(args.folder, args)
    done = args.folder / "done"
    done.mkdir(exist_ok=True)
    found = []
    for seed in args.seeds:
        for name in args.arms:
            path = done / f"{name}-{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(trained(args.folder, name, keys_of(name), seed, args.overrides)))
            found.append(json.loads(path.read_text()))
            print(f"{name:22} seed {seed}: {found[-1]['auroc']}", file=sys.stderr)
    results = []
    for name in args.arms:
        runs = [one for one in found if one["arm"] == name]
        values = [one["auroc"]["value"] for one in runs]
        spread = round(statistics.stdev(values), 4) if len(values) > 1 else None
        results.append(
            {
                "arm": name,
                "keys": keys_of(name),
                "mean_auroc": round(statistics.mean(values), 4),
                "sd": spread,
                "runs": runs,
            }
        )
    labels = {
        name: json.loads((args.folder / name / "manifest.json").read_text())["notes"]["split"]["labels"]
        for name in ("metadata", "test")
    }
    machine = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "timm", "transformers", "numpy")},
    }
    described = {"labels": labels, "overrides": args.overrides, "seeds": args.seeds}
    print(json.dumps({"benchmark": "isic_ablation", **described, "results": results} | machine, indent=1))


if __name__ == "__main__":
    main()
