"""What every kind of published dual encoder is told in: its shape as sections of a recipe, its weights by module."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import timm
import torch
from torch import Tensor

from clipdist.errors import UserError

# timm's names by width and depth.
SIZES = {(384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge", (1408, 40): "giant"}
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class Transformer:
    """One tower's shape, in transformers' terms."""

    width: int
    depth: int
    heads: int
    hidden: int
    """Width inside an MLP."""
    activation: str
    """As transformers calls it."""


@dataclass(frozen=True)
class Parts:
    """Weights by the module that takes them."""

    image: Mapping[str, Tensor]
    """Under timm's names."""
    text: Mapping[str, Tensor]
    """Under transformers' names."""
    image_projection: Sequence[Mapping[str, Tensor]]
    """Of each linear layer, from the tower on: weight [D, C], and bias [D] where the model has one."""
    text_projection: Sequence[Mapping[str, Tensor]]


class Source(Protocol):
    def describe(self) -> dict[str, Any]:
        """Keys and values of the recipe's `model` section."""

    def parts(self) -> Parts: ...


def image_section(shape: Transformer, init: str, *, side: int, patch: int, eps: float, siglip: bool) -> dict[str, Any]:
    """timm's vision transformer of that shape."""
    expected = 1e-6 if siglip else 1e-5
    if not math.isclose(eps, expected) or shape.activation not in ACTIVATIONS:
        raise UserError(
            f"model.init={init}: its image tower has layer_norm_eps={eps} and activation {shape.activation}, expected "
            f"{expected} and one of {', '.join(ACTIVATIONS)}"
        )
    ratio = shape.hidden / shape.width
    if int(shape.width * ratio) != shape.hidden:  # timm rounds down
        ratio = (shape.hidden + 0.5) / shape.width
    family = f"vit_{SIZES.get((shape.width, shape.depth), 'base')}_patch{patch}_{'siglip' if siglip else 'clip'}_{side}"
    names = {"clip": "vit_base_patch32_clip_224", "siglip": "vit_base_patch16_siglip_224"}
    name = family if timm.is_model(family) else names["siglip" if siglip else "clip"]
    return {
        "name": f"timm:{name}",
        "pretrained": False,
        "side": side,
        "options": {
            "patch_size": patch,
            "embed_dim": shape.width,
            "depth": shape.depth,
            "num_heads": shape.heads,
            "mlp_ratio": ratio,
            "act_layer": ACTIVATIONS[shape.activation],
        },
    }


def text_section(tokenizer: str, options: dict[str, Any], *, siglip: bool) -> dict[str, Any]:
    return {
        "name": "hf:siglip_text_model" if siglip else "hf:clip_text_model",
        "pretrained": False,
        "tokenizer": tokenizer,
        "max_tokens": options["max_position_embeddings"],
        # CLIP takes the end token, which a causal mask keeps from what follows; SigLIP the last position of all.
        "pooling": "last",
        "padding": "max_tokens" if siglip else "longest",
        "options": options,
    }


def temperature_section(weights: Mapping[str, Tensor], *, biased: bool) -> dict[str, Any]:
    if "logit_scale" not in weights:
        raise UserError("model.init: the weights have no logit_scale; expected those of a whole dual encoder")
    initial = math.exp(-weights["logit_scale"].item())
    bounds = {"minimum": min(1 / LARGEST_SCALE, initial), "maximum": max(1.0, initial)}
    section: dict[str, Any] = {"initial": initial, **bounds}
    if biased:
        section["bias"] = weights["logit_bias"].item()
    return section


def identity(like: Tensor) -> dict[str, Tensor]:
    """A projection that changes nothing, to the width of the first dimension; SigLIP's images have none."""
    weights = {"weight": torch.eye(len(like), dtype=like.dtype)}
    return weights | ({"bias": torch.zeros_like(like)} if like.ndim == 1 else {})


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): state[key].float() for key in state if key.startswith(prefix)}
