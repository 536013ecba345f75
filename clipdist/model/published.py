"""A start from a published dual encoder: `model.init`.

    hf:<name or folder>     a CLIP or SigLIP of transformers: config.json, weights, tokenizer, preprocessor_config.json
    open_clip:<folder>      what open_clip pushes to a hub: open_clip_config.json, weights, tokenizer

`describe` tells what such a source is, as keys of the recipe's `model` section, which stand below those that the recipe
sets itself; so the resolved configuration says everything, and a saved model needs the source no more. `start_from`
puts its weights into a model of that shape: the image tower is timm's vision transformer, the text tower that of
transformers, and each gives what the source's own code gives.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from clipdist.errors import UserError
from clipdist.model.dual_encoder import DualEncoder
from clipdist.model.rename import rename_text_transformer, rename_vision_transformer
from clipdist.model.towers import ImageTower
from clipdist.model.weight_files import find_folder, open_weights, read_json

logger = logging.getLogger(__name__)
# OpenAI's, which open_clip takes where a configuration names none.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
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
    image_projection: Mapping[str, Tensor]
    """weight [D, C], and bias [D] where the model has one."""
    text_projection: Mapping[str, Tensor]


class Source(Protocol):
    def describe(self) -> dict[str, Any]:
        """Keys and values of the recipe's `model` section."""

    def parts(self) -> Parts: ...


def describe(init: str) -> dict[str, Any]:
    """What `model.init` stands for, as keys and values of the recipe's `model` section. Reads no more of the weights
    than the temperature.

    Raises `UserError` when it is not there, or is something else than a CLIP or a SigLIP with vision transformers.
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
    _take(text, {names.get(name, name): tensor for name, tensor in parts.text.items()}, init, "text")
    for name, layers, weights in (
        ("image", model.image_projection, parts.image_projection),
        ("text", model.text_projection, parts.text_projection),
    ):
        last = layers[-1]
        own = {key: tensor.shape for key, tensor in last.state_dict().items()}
        if len(layers) == 2 and own == {key: tensor.shape for key, tensor in weights.items()}:
            last.load_state_dict(dict(weights))
        else:
            logger.info("%s: the %s projection is new: the recipe asks for another one", init, name)


@torch.no_grad()
def start_image_from(tower: ImageTower, init: str) -> None:
    """Gives an image tower, built as `describe` says, the published weights; raises as `start_from` does."""
    _take_image(tower, _source(init).parts().image, init)


def _take_image(tower: ImageTower, weights: Mapping[str, Tensor], init: str) -> None:
    image: Any = tower.model
    if isinstance(image, VisionTransformer):
        weights = checkpoint_filter_fn(dict(weights), image)  # fits positions to another side
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


class HuggingFace:
    """A `CLIPModel` or `SiglipModel`."""

    def __init__(self, init: str, place: str) -> None:
        self.init, self.place = init, place
        self.folder = find_folder(init, place)
        self.config = read_json(self.folder / "config.json", init)
        self.kind = self.config.get("model_type")
        if self.kind not in ("clip", "siglip"):
            raise UserError(f"model.init={init}: found a model of type {self.kind!r}, expected clip or siglip")

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        return open_weights(self.folder, self.init)

    @cached_property
    def towers(self) -> tuple[Any, Any]:
        """(vision, text) configurations, with what their files leave away."""
        import transformers

        whole: Any = transformers.AutoConfig.from_pretrained(self.folder)
        return whole.vision_config, whole.text_config

    def describe(self) -> dict[str, Any]:
        vision, text = self.towers
        siglip = self.kind == "siglip"
        if siglip and not getattr(vision, "vision_use_head", True):
            raise UserError(f"model.init={self.init}: its image tower has no pooling head, expected SigLIP's")
        image = _image_section(
            Transformer(
                vision.hidden_size,
                vision.num_hidden_layers,
                vision.num_attention_heads,
                vision.intermediate_size,
                vision.hidden_act,
            ),
            self.init,
            side=vision.image_size,
            patch=vision.patch_size,
            eps=vision.layer_norm_eps,
            siglip=siglip,
        )
        options = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "max_position_embeddings": text.max_position_embeddings,
            "hidden_act": text.hidden_act,
            "layer_norm_eps": text.layer_norm_eps,
        }
        if siglip:
            options["projection_size"] = text.projection_size
        return {
            "image": image | self._preparation(),
            "text": _text_section(f"hf:{self.place}", options, siglip=siglip),
            "width": text.projection_size if siglip else self.config.get("projection_dim", 512),
            "projection": {"kind": "linear", "bias": siglip},
            "temperature": _temperature_section(self.weights, biased=siglip),
        }

    def _preparation(self) -> dict[str, Any]:
        path = self.folder / "preprocessor_config.json"
        if path.exists():
            body = read_json(path, self.init)
        else:
            body = read_json(self.folder / "processor_config.json", self.init).get("image_processor", {})
        if "image_mean" not in body or "image_std" not in body:
            raise UserError(f"model.init={self.init}: {path} does not say image_mean and image_std")
        size = body.get("size")
        crop = body.get("do_center_crop") or (isinstance(size, dict) and "shortest_edge" in size)
        return {"mean": body["image_mean"], "std": body["image_std"], "resize": "crop" if crop else "squash"}

    def parts(self) -> Parts:
        vision, text = _below("vision_model.", self.weights), _below("text_model.", self.weights)
        text.pop("embeddings.position_ids", None)
        if self.kind == "clip":
            projections = [_below(f"{name}_projection.", self.weights) for name in ("visual", "text")]
        else:
            # The head stays in the tower, too, which computes what nothing here reads.
            head = _below("head.", text)
            projections = [_identity(head["bias"]), head]
        return Parts(rename_vision_transformer(vision), text, projections[0], projections[1])


class OpenClip:
    """A model of open_clip with its own transformers, or with an image tower of timm."""

    KNOWN_VISION = (
        "image_size",
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_size",
        "patch_dropout",
        "timm_model_name",
        "timm_model_pretrained",
        "timm_pool",
        "timm_proj",
        "timm_drop",
        "timm_drop_path",
    )
    KNOWN_TEXT = (
        "context_length",
        "vocab_size",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
        "hf_tokenizer_name",
        "tokenizer_kwargs",
        "no_causal_mask",
        "proj_bias",
        "pool_type",
        "norm_kwargs",
        "act_kwargs",
    )

    def __init__(self, init: str, place: str) -> None:
        self.init, self.place = init, place
        self.folder = find_folder(init, place)
        body = read_json(self.folder / "open_clip_config.json", init)
        self.config, self.preparation = body.get("model_cfg", body), body.get("preprocess_cfg", {})
        try:
            self.vision, self.text = self.config["vision_cfg"], self.config["text_cfg"]
            self.width = int(self.config["embed_dim"])
        except (KeyError, TypeError):
            raise UserError(
                f"model.init={init}: open_clip_config.json lacks embed_dim, vision_cfg or text_cfg"
            ) from None
        for name, known, found in (("vision", self.KNOWN_VISION, self.vision), ("text", self.KNOWN_TEXT, self.text)):
            if unknown := sorted(found.keys() - set(known)):
                raise UserError(f"model.init={init}: {name}_cfg has {', '.join(unknown)}, which is not understood here")
        self.siglip = bool(self.text.get("no_causal_mask"))
        if self.siglip != (self.text.get("pool_type") == "last"):
            raise UserError(
                f"model.init={init}: text_cfg has no_causal_mask={self.siglip} and "
                f"pool_type={self.text.get('pool_type')!r}, expected CLIP's or SigLIP's"
            )

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        return open_weights(self.folder, self.init)

    @property
    def activation(self) -> str:
        if self.text.get("act_kwargs", {}).get("approximate") == "tanh":
            return "gelu_pytorch_tanh"
        return "quick_gelu" if self.config.get("quick_gelu") else "gelu"

    def describe(self) -> dict[str, Any]:
        text = self.text
        width, heads = text.get("width", 512), text.get("heads", 8)
        options = {
            "vocab_size": text.get("vocab_size", 49408),
            "hidden_size": width,
            "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": heads,
            "max_position_embeddings": text.get("context_length", 77),
            "hidden_act": self.activation,
            "layer_norm_eps": text.get("norm_kwargs", {}).get("eps", 1e-5),
        }
        if self.siglip:
            options["projection_size"] = self.width
        return {
            "image": self._image() | self._preparation(),
            "text": _text_section(f"hf:{self.folder}", options, siglip=self.siglip),
            "width": self.width,
            "projection": {"kind": "linear", "bias": bool(text.get("proj_bias"))},
            "temperature": _temperature_section(self.weights, biased="logit_bias" in self.weights),
        }

    def _image(self) -> dict[str, Any]:
        vision = self.vision
        side = vision.get("image_size", 224)
        if name := vision.get("timm_model_name"):
            if vision.get("timm_proj", "linear") not in ("linear", "none"):
                raise UserError(f"model.init={self.init}: timm_proj={vision['timm_proj']!r}, expected linear or none")
            pool = vision.get("timm_pool", "avg")
            options: dict[str, Any] = {"global_pool": pool} if pool else {}
            norms = {name for name in ("norm", "fc_norm") if f"visual.trunk.{name}.weight" in self.weights}
            if pool == "avg" and norms == {"norm"}:
                options["fc_norm"] = False  # open_clip changes the pooling of a tower that is made, not the norm
            return {"name": f"timm:{name}", "pretrained": False, "side": side, "options": options}
        if not isinstance(vision.get("layers"), int) or not isinstance(side, int):
            raise UserError(
                f"model.init={self.init}: vision_cfg is that of a ResNet, or of images that are not square; expected a "
                f"vision transformer or an image tower of timm"
            )
        width = vision.get("width", 768)
        shape = Transformer(
            width,
            vision["layers"],
            width // vision.get("head_width", 64),
            int(width * vision.get("mlp_ratio", 4.0)),
            "quick_gelu" if self.config.get("quick_gelu") else "gelu",
        )
        return _image_section(shape, self.init, side=side, patch=vision.get("patch_size", 16), eps=1e-5, siglip=False)

    def _preparation(self) -> dict[str, Any]:
        how = self.preparation.get("resize_mode", "shortest")
        modes = {"shortest": "crop", "squash": "squash", "longest": "pad"}
        return {
            "mean": list(self.preparation.get("mean", CLIP_MEAN)),
            "std": list(self.preparation.get("std", CLIP_STD)),
            "resize": modes[how],
        }

    def parts(self) -> Parts:
        visual = _below("visual.", self.weights)
        outside = ("visual.", "logit_")
        # In a part of their own, or beside the image tower.
        whole = _below("text.", self.weights) or {
            key: self.weights[key].float() for key in self.weights if not key.startswith(outside)
        }
        projection = _below("text_projection.", whole) or {"weight": whole["text_projection"].T.contiguous()}
        names = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.")
        text = {key: tensor for key, tensor in whole.items() if key.startswith(names)}
        if "trunk.patch_embed.proj.weight" in visual or self.vision.get("timm_model_name"):
            image = _below("trunk.", visual)
            image_projection = _below("head.proj.", visual) or _identity(projection["weight"])
        else:
            image_projection = {"weight": visual.pop("proj").T.contiguous()}
            image = {f"visual.{key}": tensor for key, tensor in visual.items()}
        if "bias" in projection and "bias" not in image_projection:
            image_projection = {**image_projection, "bias": torch.zeros_like(projection["bias"])}
        renamed = rename_text_transformer(text)
        if self.siglip:
            renamed |= {f"head.{key}": tensor for key, tensor in projection.items()}
        return Parts(image, renamed, image_projection, projection)


def _image_section(shape: Transformer, init: str, *, side: int, patch: int, eps: float, siglip: bool) -> dict[str, Any]:
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


def _text_section(tokenizer: str, options: dict[str, Any], *, siglip: bool) -> dict[str, Any]:
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


def _temperature_section(weights: Mapping[str, Tensor], *, biased: bool) -> dict[str, Any]:
    if "logit_scale" not in weights:
        raise UserError("model.init: the weights have no logit_scale; expected those of a whole dual encoder")
    initial = math.exp(-weights["logit_scale"].item())
    bounds = {"minimum": min(1 / LARGEST_SCALE, initial), "maximum": max(1.0, initial)}
    section: dict[str, Any] = {"initial": initial, **bounds}
    if biased:
        section["bias"] = weights["logit_bias"].item()
    return section


def _identity(like: Tensor) -> dict[str, Tensor]:
    """A projection that changes nothing, to the width of the first dimension; SigLIP's images have none."""
    weights = {"weight": torch.eye(len(like), dtype=like.dtype)}
    return weights | ({"bias": torch.zeros_like(like)} if like.ndim == 1 else {})


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): state[key].float() for key in state if key.startswith(prefix)}
