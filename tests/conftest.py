"""Shared by all tests: a small shard set of coloured shapes, and a recipe that trains on it in seconds."""

import atexit
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

# Ranks and loader workers inherit these: several threads each would fight over the cores.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
# There transformers copies code that travels with a model before it loads it: a place for each run of the tests. A rank
# that a test spawns imports this file too, and ends without its last steps: it takes its parent's place.
if not Path(os.environ.get("HF_MODULES_CACHE", "")).name.startswith("clipdist-tests-"):
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="clipdist-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

import torch

from clipdist.data.sets.writer import ShardSetWriter
from clipdist.train.signals import STOP_SIGNALS

torch.set_num_threads(1)

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "cyan"]
SHAPES = ["square", "circle", "triangle", "cross", "bar"]
PLACES = ["left", "right", "top", "bottom", "centre"]


def picture(colour: str, shape: str, place: str, seed: int = 0, side: int = 40) -> bytes:
    """A PNG of a coloured shape on a light, faintly noisy ground."""
    noise = np.random.default_rng(seed).integers(225, 256, (side, side, 3), np.uint8)
    image = Image.fromarray(noise)
    draw = ImageDraw.Draw(image)
    x, y = {"left": (9, 20), "right": (31, 20), "top": (20, 9), "bottom": (20, 31), "centre": (20, 20)}[place]
    corners = {"square": [(-7, -7), (7, -7), (7, 7), (-7, 7)], "triangle": [(0, -8), (8, 7), (-8, 7)]}
    corners["bar"] = [(-8, -3), (8, -3), (8, 3), (-8, 3)]
    if shape == "circle":
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=colour)
    elif shape == "cross":
        draw.line((x - 7, y - 7, x + 7, y + 7), fill=colour, width=4)
        draw.line((x - 7, y + 7, x + 7, y - 7), fill=colour, width=4)
    else:
        draw.polygon([(x + dx, y + dy) for dx, dy in corners[shape]], fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_shapes(folder: Path, **options: Any) -> Path:
    """168 training and 32 validation pairs in shards of 50; every colour, shape and place, no caption twice."""
    combinations = list(itertools.product(COLOURS, SHAPES, PLACES))
    order = np.random.default_rng(0).permutation(len(combinations))
    with ShardSetWriter(folder, samples_per_shard=50, license_text="CC0-1.0, drawn by the tests", **options) as writer:
        for position, number in enumerate(order):
            colour, shape, place = combinations[number]
            text = f"A {colour} {shape} at the {place}."
            fields = {"text": text, "label": shape, "unit": f"unit-{number // 2}"}
            split = "train" if position < 168 else "val"
            writer.write(split, f"shape-{number:03d}", picture(colour, shape, place, int(number)), "png", fields)
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the shard set; tests must not change it (`write_shapes` makes another)."""
    return write_shapes(tmp_path_factory.mktemp("sets") / "shapes")


TINY: dict[str, Any] = {
    "data": {"groups": "none", "workers": 0, "augment": {"flip_horizontal": 0.0, "noise": 8.0}},
    "model": {
        "image": {"name": "timm:test_convnext", "side": 32},
        "text": {
            "name": "hf:bert",
            "pretrained": False,
            "tokenizer": "captions",
            "vocabulary": 200,
            "max_tokens": 16,
            "options": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "max_position_embeddings": 16,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
        },
        "width": 32,
        "projection": {"dropout": 0.0},
    },
    "optim": {"lr": 2e-3, "warmup_steps": 2},
    "train": {"global_batch": 24, "epochs": 3},
    "evaluate": {"workers": 0, "panels": 2},
    "checkpoint": {"every_minutes": 0},
    "log": {"every_steps": 1, "tensorboard": False},
}


def write_recipe(folder: Path, shapes: Path, name: str = "tiny", base: dict[str, Any] = TINY, **changes: Any) -> Path:
    """`folder/name.yaml`, which trains on `shapes` into `folder/runs`; a double underscore in `changes` is a dot."""
    tree = yaml.safe_load(yaml.safe_dump(base))
    tree["data"]["set"], tree["runs"] = str(shapes), str(folder / "runs")
    for key, value in changes.items():
        section = tree
        *parents, last = key.split("__")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture
def recipe(shapes: Path, tmp_path: Path) -> Callable[..., Path]:
    """recipe(key=value …, dots written as double underscores) -> path of a YAML recipe in a folder of its own."""
    return partial(write_recipe, tmp_path, shapes)


@dataclass(frozen=True)
class TrainedRun:
    """What one `clipdist train` on the shapes left and said. Tests must not change the folder."""

    folder: Path
    recipe: Path
    shapes: Path
    said: str


@pytest.fixture(scope="session")
def trained_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A finished run with TensorBoard's files, trained by the command in a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_recipe(folder, shapes, log__tensorboard=True, train__epochs=4, optim__lr=5e-3)
    command = [str(Path(sys.executable).with_name("clipdist")), "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "", "what training says goes to standard error"
    return TrainedRun(folder / "runs" / "tiny", path, shapes, done.stderr)


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Training takes over signals; whoever trains within the tests' own process gives them back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=15_000)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM_FLAGS)
        yield browser
        browser.close()
