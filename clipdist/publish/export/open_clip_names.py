"""Towers of CLIP and SigLIP under open_clip's own names: the way back of `clipdist.model.rename`."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from clipdist.errors import UserError
from clipdist.model.rename import TEXT_INSIDE, TEXT_OUTSIDE

VISION_OUTSIDE = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj.weight": "conv1.weight",
    "norm_pre.weight": "ln_pre.weight",
    "norm_pre.bias": "ln_pre.bias",
    "norm.weight": "ln_post.weight",
    "norm.bias": "ln_post.bias",
}
VISION_INSIDE = {
    "norm1.weight": "ln_1.weight",
    "norm1.bias": "ln_1.bias",
    "norm2.weight": "ln_2.weight",
    "norm2.bias": "ln_2.bias",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj.weight": "attn.out_proj.weight",
    "attn.proj.bias": "attn.out_proj.bias",
    "mlp.fc1.weight": "mlp.c_fc.weight",
    "mlp.fc1.bias": "mlp.c_fc.bias",
    "mlp.fc2.weight": "mlp.c_proj.weight",
    "mlp.fc2.bias": "mlp.c_proj.bias",
}
VISION_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
TEXT_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
TEXT_QKV = re.compile(r"self_attn\.([qkv])_proj")
_OUTSIDE_BACK = {theirs: ours for ours, theirs in TEXT_OUTSIDE.items()}
_INSIDE_BACK = {theirs: ours for ours, theirs in TEXT_INSIDE.items()}


def named_as_vision(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """From timm's vision transformer of CLIP; None where any weight is none of such a one."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = VISION_BLOCK.fullmatch(key)
        if match and match[2] in VISION_INSIDE:
            renamed[f"transformer.resblocks.{match[1]}.{VISION_INSIDE[match[2]]}"] = tensor
        elif key in VISION_OUTSIDE:
            renamed[VISION_OUTSIDE[key]] = tensor
        else:
            return None
    if not set(VISION_OUTSIDE.values()) <= renamed.keys():
        return None
    renamed["class_embedding"] = renamed["class_embedding"].reshape(-1)
    renamed["positional_embedding"] = renamed["positional_embedding"][0]
    return renamed


def named_as_text(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From the text tower of transformers' CLIP or SigLIP, without SigLIP's head, which nothing here reads. Raises
    `UserError` for any other key."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for whole, tensor in state.items():
        key = whole.removeprefix("text_model.")  # of earlier transformers
        match = TEXT_LAYER.fullmatch(key)
        if key in _OUTSIDE_BACK:
            renamed[_OUTSIDE_BACK[key]] = tensor
        elif match and (which := TEXT_QKV.fullmatch(match[2])):
            parts.setdefault(f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}", {})[which[1]] = tensor
        elif match and match[2] in _INSIDE_BACK:
            renamed[f"transformer.resblocks.{match[1]}.{_INSIDE_BACK[match[2]]}.{match[3]}"] = tensor
        elif not key.startswith("head.") and key != "embeddings.position_ids":
            raise UserError(f"weights: found key {key!r}, expected those of a text tower of CLIP or SigLIP")
    for key, three in parts.items():
        renamed[key] = torch.cat([three[which] for which in "qkv"])
    return renamed
