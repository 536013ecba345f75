"""A start from a published dual encoder: `model.init`.

    hf:<name or folder>     a CLIP or SigLIP of transformers: config.json, weights, tokenizer, preprocessor_config.json
    open_clip:<folder>      what open_clip pushes to a hub: open_clip_config.json, weights, tokenizer

`describe` tells what such a source is, as keys of the recipe's `model` section, which stand below those that the recipe
sets itself; so the resolved configuration says everything, and a saved model needs the source no more. `start_from`
puts its weights into a model of that shape: the image tower is timm's, the text tower that of transformers, and each
gives what the source's own code gives.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.byobnet import checkpoint_filter_fn as fit_residual
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as fit_transformer
from torch import Tensor, nn

from clipdist.errors import UserError
from clipdist.model.dual_encoder import DualEncoder
from clipdist.model.published_hugging_face import HuggingFace
from clipdist.model.published_open_clip import OpenClip
from clipdist.model.published_parts import Source
from clipdist.model.towers import ImageTower

logger = logging.getLogger(__name__)


def describe(init: str) -> dict[str, Any]:
    """What `model.init` stands for, as keys and values of the recipe's `model` section. Reads no more of the weights
    than the temperature.

    Raises `UserError` when it is not there, or of a kind that cannot be told in these keys.
    """
    return _source(init).describe()


@torch.no_grad()
def start_from(model: DualEncoder, init: str) -> None:
    """Gives a model, built as `describe` says, the published weights. Projections of another shape than the published
    ones stay as they are, which is said.

    Raises `UserError` when the recipe has changed a tower so that they do not fit.
    """
    parts = _source(init).parts()
    _take_image(model.image, parts.image, init)
    text: Any = model.text.model
    # Earlier versions of transformers have one level more.
    names = {name.removeprefix("text_model."): name for name in text.state_dict()}
    # A layer behind the last hidden state is read by nothing here, and not every source has it.
    unread = {name: tensor for name, tensor in text.state_dict().items() if name.startswith("pooler.")}
    _take(text, {**unread, **{names.get(name, name): tensor for name, tensor in parts.text.items()}}, init, "text")
    for name, layers, weights in (
        ("image", model.image_projection, parts.image_projection),
        ("text", model.text_projection, parts.text_projection),
    ):
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        own = [{key: tensor.shape for key, tensor in layer.state_dict().items()} for layer in linear]
        normed = any(isinstance(layer, nn.LayerNorm) for layer in layers)
        if not normed and own == [{key: tensor.shape for key, tensor in some.items()} for some in weights]:
            for layer, some in zip(linear, weights, strict=True):
                layer.load_state_dict(dict(some))
        else:
            logger.info("%s: the %s projection is new: the recipe asks for another one", init, name)


@torch.no_grad()
def start_image_from(tower: ImageTower, init: str) -> None:
    """Gives an image tower, built as `describe` says, the published weights; raises as `start_from` does."""
    _take_image(tower, _source(init).parts().image, init)


def _take_image(tower: ImageTower, weights: Mapping[str, Tensor], init: str) -> None:
    image: Any = tower.model
    if isinstance(image, VisionTransformer):
        weights = fit_transformer(dict(weights), image)  # fits positions to another side
    elif "visual.conv1.weight" in weights:
        fitted = fit_residual(dict(weights), image)  # from the names of CLIP's ResNets
        positions = fitted["head.pos_embed"][None]
        positions = resample_abs_pos_embed(positions, image.head.feat_size, num_prefix_tokens=1)
        weights = {**fitted, "head.pos_embed": positions[0]}
    _take(image, weights, init, "image")


def _take(module: nn.Module, weights: Mapping[str, Tensor], init: str, name: str) -> None:
    own = module.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    if missing or extra or wrong:
        shapes = "".join(f"; {key} is {tuple(weights[key].shape)}, not {tuple(own[key].shape)}" for key in wrong[:1])
        raise UserError(
            f"model.init={init}: its {name} tower does not fit model.{name} as the recipe changes it: {len(missing)} "
            f"weights missing, {len(extra)} left over, {len(wrong)} of another shape{shapes}"
        )
    module.load_state_dict(dict(weights))


def _source(init: str) -> Source:
    kind, _, place = init.partition(":")
    if kind == "hf" and place:
        return HuggingFace(init, place)
    if kind == "open_clip" and place:
        return OpenClip(init, place)
    raise UserError(f"model.init={init!r}: expected hf:<name or folder> or open_clip:<folder>")
