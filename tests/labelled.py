"""A small shard set whose classes are the colours of shapes, and a recipe that learns them in seconds."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.data.sets.writer import ShardSetWriter
from tests.conftest import COLOURS, PLACES, SHAPES, picture

TINY_CLASSIFIER: dict[str, Any] = {
    "objective": "classify",
    "data": {"workers": 0, "augment": {"flip_horizontal": 0.0, "noise": 8.0}},
    "model": {"image": {"name": "timm:test_convnext", "side": 32}},
    "classify": {"label": "colour", "dropout": 0.0},
    "optim": {"lr": 5e-3, "warmup_steps": 2},
    "train": {"global_batch": 24, "epochs": 3},
    "evaluate": {"workers": 0},
    "checkpoint": {"every_minutes": 0},
    "log": {"every_steps": 1, "tensorboard": False},
}


def write_labelled(folder: Path, **more: dict[str, Any]) -> Path:
    """200 pictures without captions, 120 of them for training, 40 each in val and test. `colour` has 8 values, and with
    each of them goes a `colour_id`; every tenth is mislabelled, so that no model is always right. `more` maps a key to
    fields that are set otherwise (None: left out)."""
    combinations = list(itertools.product(COLOURS, SHAPES, PLACES))
    order = np.random.default_rng(0).permutation(len(combinations))
    with ShardSetWriter(folder, samples_per_shard=50, license_text="CC0-1.0, drawn by the tests") as writer:
        for position, number in enumerate(order):
            colour, shape, place = combinations[number]
            key, split = f"shape-{number:03d}", "train" if position < 120 else "val" if position < 160 else "test"
            said = COLOURS[(COLOURS.index(colour) + (position % 10 == 9)) % len(COLOURS)]
            fields = {"colour": said, "colour_id": COLOURS.index(said), "shape": shape, "unit": f"u{number // 2}"}
            fields = {name: value for name, value in (fields | more.get(key, {})).items() if value is not None}
            writer.write(split, key, picture(colour, shape, place, int(number)), "png", fields)
    return folder
