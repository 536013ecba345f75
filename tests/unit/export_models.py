"""Small models for the tests of exports: made in a moment, no weight at its starting value."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter

from clipdist.data.labels import Labels
from clipdist.data.text import Tokenizer, train_wordpiece
from clipdist.model.build import build_classifier, build_model
from clipdist.model.classifier import ClassifyConfig
from clipdist.model.dual_encoder import ModelConfig
from clipdist.model.saved import SavedModel
from clipdist.model.saved_classifier import SavedClassifier
from tests.conftest import TINY

TEXTS = ["A red square at the left.", "A blue circle.", "Two bars and a triangle at the bottom.", "green"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
CLIP: dict[str, Any] = {
    "image": {"name": "timm:vit_base_patch32_clip_224", "side": 32, "options": {**VIT, "act_layer": "quick_gelu"}},
    "text": {
        "name": "hf:clip_text_model",
        "pretrained": False,
        "max_tokens": 12,
        "pooling": "last",
        "options": {**SMALL, "max_position_embeddings": 16, "hidden_act": "quick_gelu"},
    },
}
SIGLIP: dict[str, Any] = {
    "image": {"name": "timm:test_vit", "side": 160, "resize": "squash"},
    "text": {
        "name": "hf:siglip_text_model",
        "pretrained": False,
        "max_tokens": 16,
        "pooling": "last",
        "padding": "max_tokens",
        "options": {**SMALL, "max_position_embeddings": 16, "projection_size": 32, "hidden_act": "gelu_pytorch_tanh"},
    },
    "projection": {"kind": "linear", "bias": True},
    "temperature": {"initial": 0.1, "bias": -10.0},
}
ABOUT = {
    "data": "/somewhere/shapes",
    "data_digest": "0123456789abcdef",
    "split": "train",
    "step": 28,
    "val_split": "val",
    "epoch": 4.0,
    "license": "CC0-1.0, drawn by the tests",
    "notes": {},
}
RECALL = {"value": 0.125, "low": 0.05, "high": 0.22, "chance": 0.03125}
SCORES = {"val": {"image_to_text": {"R@1": RECALL, "queries": 32, "gallery": 32}}}


def words(fill: bool = False, max_tokens: int = 16) -> Tokenizer:
    return train_wordpiece([text for text in TEXTS for _ in range(2)], 120, max_tokens, fill)


@torch.no_grad()
def shaken(model: Any) -> Any:
    """No bias zero and no scale one, so that each weight shows."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def encoder(base: dict[str, Any] | None = None, **changes: dict[str, Any]) -> SavedModel:
    """By default the tiny recipe's; `changes` go into its sections, over `base`."""
    tree: dict[str, Any] = json.loads(json.dumps({**TINY["model"], "temperature": {}, **(base or {})}))
    for section, values in changes.items():
        tree[section] = {**tree[section], **values}
    text = tree["text"]
    tokenizer = words(text.get("padding") == "max_tokens", text["max_tokens"])
    if text["name"] == "hf:clip_text_model":
        end = tokenizer.tokenizer.sep_token_id
        text["options"] = {**text["options"], "eos_token_id": end, "bos_token_id": 2}
    config = TypeAdapter(ModelConfig).validate_python(tree)
    model = shaken(build_model(config, tokenizer, seed=0))
    return SavedModel(model, tokenizer, dict(ABOUT), SCORES, torch.device("cpu"), "00112233445566ff")


def classifier(**image: Any) -> SavedClassifier:
    """Of three classes, at temperature 1.7."""
    config = TypeAdapter(ModelConfig).validate_python({"image": {**TINY["model"]["image"], **image}})
    model = shaken(build_classifier(config, ClassifyConfig(), 3, seed=0))
    names = ("bar", "circle", "a long name, with comma")
    labels = Labels("shape", names, (3, 4, 5), ({}, {}, {}))
    temperature = {"value": 1.7, "fitted_on": "val", "at_bound": False}
    return SavedClassifier(model, labels, temperature, dict(ABOUT), {}, torch.device("cpu"), "00112233445566ff")


def pictures(number: int = 5) -> list[Image.Image]:
    """Smooth, of several shapes."""
    rng = np.random.default_rng(3)
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)) for _ in range(number)]
    return [one.resize((60 + 13 * n, 90 - 11 * n), Image.Resampling.BICUBIC) for n, one in enumerate(coarse)]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
