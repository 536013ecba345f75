"""A CLIP or a SigLIP of transformers as a start."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

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
from clipdist.model.rename import rename_vision_transformer
from clipdist.model.weight_files import find_folder, open_weights, read_json


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
        image = image_section(
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
            "text": text_section(f"hf:{self.place}", options, siglip=siglip),
            "width": text.projection_size if siglip else self.config.get("projection_dim", 512),
            "projection": {"kind": "linear", "bias": siglip},
            "temperature": temperature_section(self.weights, biased=siglip),
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
        vision, text = below("vision_model.", self.weights), below("text_model.", self.weights)
        text.pop("embeddings.position_ids", None)
        if self.kind == "clip":
            projections = [below(f"{name}_projection.", self.weights) for name in ("visual", "text")]
        else:
            # The head stays in the tower, too, which computes what nothing here reads.
            head = below("head.", text)
            projections = [identity(head["bias"]), head]
        return Parts(rename_vision_transformer(vision), text, projections[:1], projections[1:])
