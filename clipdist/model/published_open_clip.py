"""A model of open_clip as a start: towers of its own, of timm, or of Hugging Face."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from clipdist.errors import UserError
from clipdist.model.published_parts import (
    Parts,
    Transformer,
    below,
    identity,
    image_section,
    temperature_section,
    text_section,
)
from clipdist.model.rename import rename_text_transformer
from clipdist.model.weight_files import find_folder, open_weights, read_json

# OpenAI's, which open_clip takes where a configuration names none.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# timm's names by depths of the stages and width.
RESIDUAL = {
    ((3, 4, 6, 3), 64): "resnet50_clip",
    ((3, 4, 23, 3), 64): "resnet101_clip",
    ((4, 6, 10, 6), 80): "resnet50x4_clip",
    ((6, 8, 18, 8), 96): "resnet50x16_clip",
    ((3, 15, 36, 10), 128): "resnet50x64_clip",
}
MODES = {"shortest": "crop", "squash": "squash", "longest": "pad"}
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
    "timm_proj_bias",
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
KNOWN_HF_TEXT = (
    "context_length",
    "vocab_size",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "hf_model_name",
    "hf_model_config",
    "hf_model_pretrained",
    "hf_proj_type",
    "hf_pooler_type",
)


class Text(Protocol):
    """The text tower of a model of open_clip."""

    siglip: bool

    def describe(self) -> dict[str, Any]:
        """Keys and values of `model.text`."""

    def projection(self) -> dict[str, Any]:
        """Keys and values of a projection."""

    def parts(self, whole: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """(the tower's weights under transformers' names; those of the linear layers that follow it)."""


class OwnText:
    """open_clip's own transformer: CLIP's with a causal mask, or SigLIP's."""

    def __init__(self, init: str, folder: Path, text: Mapping[str, Any], width: int, quick: bool) -> None:
        self.init, self.folder, self.text, self.width, self.quick = init, folder, text, width, quick
        self.siglip = bool(text.get("no_causal_mask"))
        if self.siglip != (text.get("pool_type") == "last"):
            raise UserError(
                f"model.init={init}: text_cfg has no_causal_mask={self.siglip} and "
                f"pool_type={text.get('pool_type')!r}, expected CLIP's or SigLIP's"
            )

    @property
    def activation(self) -> str:
        if self.text.get("act_kwargs", {}).get("approximate") == "tanh":
            return "gelu_pytorch_tanh"
        return "quick_gelu" if self.quick else "gelu"

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
        return text_section(f"hf:{self.folder}", options, siglip=self.siglip)

    def projection(self) -> dict[str, Any]:
        return {"kind": "linear", "bias": bool(self.text.get("proj_bias"))}

    def parts(self, whole: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        projection = below("text_projection.", whole) or {"weight": whole["text_projection"].T.contiguous()}
        names = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.")
        renamed = rename_text_transformer({key: tensor for key, tensor in whole.items() if key.startswith(names)})
        if self.siglip:
            renamed |= {f"head.{key}": tensor for key, tensor in projection.items()}
        return renamed, [projection]


class HuggingFaceText:
    """An encoder of transformers, as in BiomedCLIP. Its configuration is not in the folder, but where `hf_model_name`
    points: a folder inside, or what a hub has under that name."""

    POOLERS: ClassVar = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "cls"}
    siglip = False

    def __init__(self, init: str, folder: Path, text: Mapping[str, Any], width: int, weights: Mapping[str, Tensor]):
        self.init, self.folder, self.text, self.width, self.weights = init, folder, text, width, weights
        pooler = text.get("hf_pooler_type", "mean_pooler")
        if pooler not in self.POOLERS:
            raise UserError(f"model.init={init}: hf_pooler_type={pooler!r}, expected one of {', '.join(self.POOLERS)}")
        self.pooling = self.POOLERS[pooler]
        self.kind = text.get("hf_proj_type", "mlp")
        if self.kind not in ("linear", "mlp"):
            raise UserError(f"model.init={init}: hf_proj_type={self.kind!r}, expected linear or mlp")

    def describe(self) -> dict[str, Any]:
        name = str(self.text["hf_model_name"])
        inside = (self.folder / name).is_dir()
        tokenizer = self.text.get("hf_tokenizer_name", name)
        if (self.folder / "tokenizer_config.json").exists():
            tokenizer = str(self.folder)
        words = next((key for key in self.weights if key.endswith("word_embeddings.weight")), None)
        return {
            "name": f"hf:{self.folder / name}" if inside else f"hf:{name}",
            "pretrained": False,
            "tokenizer": f"hf:{tokenizer}",
            "max_tokens": self.text.get("context_length", 77),
            "pooling": self.pooling,
            # The tokenizer may know fewer words than the tower has room for.
            "options": {"vocab_size": len(self.weights[words])} if words else {},
        }

    def projection(self) -> dict[str, Any]:
        if self.kind == "linear":
            return {"kind": "linear", "bias": False}
        return {"kind": "mlp", "hidden": len(self.weights["text.proj.0.weight"])}

    def parts(self, whole: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        tower = below("transformer.", whole)
        tower.pop("embeddings.position_ids", None)  # a buffer of earlier versions
        places = ("proj.",) if self.kind == "linear" else ("proj.0.", "proj.2.")
        return tower, [below(place, whole) for place in places]


class OpenClip:
    """A model of open_clip: either tower of its own, the image tower of timm, the text tower of Hugging Face."""

    def __init__(self, init: str, place: str) -> None:
        self.init, self.place = init, place
        self.folder = find_folder(init, place)
        body = read_json(self.folder / "open_clip_config.json", init)
        self.config, self.preparation = body.get("model_cfg", body), body.get("preprocess_cfg", {})
        try:
            self.vision, text = self.config["vision_cfg"], self.config["text_cfg"]
            self.width = int(self.config["embed_dim"])
        except (KeyError, TypeError):
            raise UserError(
                f"model.init={init}: open_clip_config.json lacks embed_dim, vision_cfg or text_cfg"
            ) from None
        known_text = KNOWN_HF_TEXT if text.get("hf_model_name") else KNOWN_TEXT
        for name, known, found in (("vision", KNOWN_VISION, self.vision), ("text", known_text, text)):
            if unknown := sorted(found.keys() - set(known)):
                raise UserError(f"model.init={init}: {name}_cfg has {', '.join(unknown)}, which is not understood here")
        self.text: Text
        if text.get("hf_model_name"):
            self.text = HuggingFaceText(init, self.folder, text, self.width, self.weights)
        else:
            self.text = OwnText(init, self.folder, text, self.width, bool(self.config.get("quick_gelu")))

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        return open_weights(self.folder, self.init)

    @property
    def residual(self) -> str | None:
        """timm's name of the image tower, where it is one of CLIP's ResNets."""
        layers, width = self.vision.get("layers"), self.vision.get("width", 64)
        if not isinstance(layers, list):
            return None
        if (name := RESIDUAL.get((tuple(layers), width))) is None:
            raise UserError(
                f"model.init={self.init}: a ResNet of {layers} blocks, {width} wide; expected one that CLIP has: "
                f"{', '.join(RESIDUAL.values())}"
            )
        return name

    def describe(self) -> dict[str, Any]:
        image, text = self._image_projection(), self.text.projection()
        return {
            "image": self._image() | self._preparation(),
            "text": self.text.describe(),
            "width": self.width,
            # A bias that only one of them has begins as zero in the other.
            "projection": image | ({"bias": bool(image["bias"] or text["bias"])} if _both_linear(image, text) else {}),
            "text_projection": {"kind": "same"} if _both_linear(image, text) else text,
            "temperature": temperature_section(self.weights, biased="logit_bias" in self.weights),
        }

    def _image_projection(self) -> dict[str, Any]:
        if self.vision.get("timm_model_name") and self.vision.get("timm_proj", "linear") == "mlp":
            return {"kind": "mlp", "hidden": len(self.weights["visual.head.mlp.fc1.weight"])}
        biased = self.residual is not None or "visual.head.proj.bias" in self.weights
        return {"kind": "linear", "bias": biased}

    def _image(self) -> dict[str, Any]:
        vision = self.vision
        side = vision.get("image_size", 224)
        if name := vision.get("timm_model_name"):
            if vision.get("timm_proj", "linear") not in ("linear", "mlp", "none"):
                raise UserError(
                    f"model.init={self.init}: timm_proj={vision['timm_proj']!r}, expected linear, mlp or none"
                )
            pool = vision.get("timm_pool", "avg")
            options: dict[str, Any] = {"global_pool": pool} if pool else {}
            norms = {name for name in ("norm", "fc_norm") if f"visual.trunk.{name}.weight" in self.weights}
            if pool == "avg" and norms == {"norm"}:
                options["fc_norm"] = False  # open_clip changes the pooling of a tower that is made, not the norm
            return {"name": f"timm:{name}", "pretrained": False, "side": side, "options": options}
        if not isinstance(side, int):
            raise UserError(f"model.init={self.init}: images of {side} pixels, expected square ones")
        if self.residual is not None:
            return {"name": f"timm:{self.residual}", "pretrained": False, "side": side, "options": {}}
        width = vision.get("width", 768)
        shape = Transformer(
            width,
            vision.get("layers", 12),
            width // vision.get("head_width", 64),
            int(width * vision.get("mlp_ratio", 4.0)),
            "quick_gelu" if self.config.get("quick_gelu") else "gelu",
        )
        return image_section(shape, self.init, side=side, patch=vision.get("patch_size", 16), eps=1e-5, siglip=False)

    def _preparation(self) -> dict[str, Any]:
        how = self.preparation.get("resize_mode", "shortest")
        if how not in MODES:
            raise UserError(f"model.init={self.init}: resize_mode={how!r}, expected one of {', '.join(MODES)}")
        return {
            "mean": list(self.preparation.get("mean", CLIP_MEAN)),
            "std": list(self.preparation.get("std", CLIP_STD)),
            "resize": MODES[how],
        }

    def parts(self) -> Parts:
        outside = ("visual.", "logit_")
        # In a part of their own, or beside the image tower.
        whole = below("text.", self.weights) or {
            key: self.weights[key].float() for key in self.weights if not key.startswith(outside)
        }
        text, text_projection = self.text.parts(whole)
        image, image_projection = self._image_parts(below("visual.", self.weights), text_projection)
        described = self.describe()
        kind = described["text_projection"]
        for layers, section in (
            (image_projection, described["projection"]),
            (text_projection, described["projection"] if kind == {"kind": "same"} else kind),
        ):
            if section["kind"] == "mlp" or section["bias"]:
                for layer in layers:
                    layer.setdefault("bias", torch.zeros_like(layer["weight"][:, 0]))
        return Parts(image, text, image_projection, text_projection)

    def _image_parts(
        self, visual: dict[str, Tensor], text_projection: list[dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """(the tower's weights under timm's names, or those that timm renames; those of its projection)."""
        if self.vision.get("timm_model_name"):
            if self._image_projection()["kind"] == "mlp":
                projection = [below(f"head.mlp.{layer}.", visual) for layer in ("fc1", "fc2")]
            else:
                projection = [below("head.proj.", visual) or identity(text_projection[-1]["weight"])]
            return below("trunk.", visual), projection
        if self.residual is not None:
            projection = [below("attnpool.c_proj.", visual)]
            kept = {key: tensor for key, tensor in visual.items() if not key.startswith("attnpool.c_proj.")}
        else:
            projection = [{"weight": visual.pop("proj").T.contiguous()}]
            kept = visual
        return {f"visual.{key}": tensor for key, tensor in kept.items()}, projection


def _both_linear(image: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    return bool(image["kind"] == text["kind"] == "linear")
