"""A dual encoder of any timm image model and any text encoder of transformers, as one model of transformers.

This file travels with an exported model and needs torch, timm and transformers alone:

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)

b = rows, T = tokens, C = width of a tower, D = width of the joint embedding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
    SiglipTextModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


class ClipdistConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "clipdist"
    is_composition = True

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | None = None,
        projection_dim: int = 512,
        projection: dict[str, Any] | None = None,
        text_projection: dict[str, Any] | None = None,
        pooling: str = "mean",
        max_tokens: int = 77,
        fills: bool = False,
        biased: bool = False,
        logit_scale_init_value: float = 2.6592,
        **kwargs: Any,
    ) -> None:
        """`projection`, of images, and `text_projection`: kind (linear or mlp), hidden, layer_norm, bias. `pooling`:
        mean, cls, last or max over a caption's tokens. `fills`: every caption is filled up to `max_tokens`, and what
        fills counts as text. `biased`: there is a logit bias."""
        vision, text = dict(vision_config or {}), dict(text_config or {})
        vision.pop("model_type", None)
        self.vision_config = TimmWrapperConfig(**vision)
        self.text_config = CONFIG_MAPPING[text.pop("model_type", "bert")](**text)
        self.projection_dim, self.projection = projection_dim, projection or {"kind": "linear"}
        self.text_projection = text_projection or {"kind": "linear"}
        self.pooling, self.max_tokens, self.fills, self.biased = pooling, max_tokens, fills, biased
        self.logit_scale_init_value = logit_scale_init_value
        super().__init__(**kwargs)


@dataclass
class ClipdistOutput(ModelOutput):  # type: ignore[misc]
    """`logits_per_image` [images, texts] = scale · cosine, plus the bias where there is one; embeddings are unit
    vectors [b, D]."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class ClipdistModel(PreTrainedModel):  # type: ignore[misc]
    config_class = ClipdistConfig
    base_model_prefix = "clipdist"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: ClipdistConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_model = TimmWrapperModel(vision)
        self.text_model = _encoder(text)
        self.visual_projection = _projection(config.projection, vision.hidden_size, config.projection_dim)
        self.text_projection = _projection(config.text_projection, text.hidden_size, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.logit_bias = nn.Parameter(torch.zeros(())) if config.biased else None
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """`pooler_output`: [b, D], not yet of unit length."""
        seen = self.vision_model(pixel_values=pixel_values)
        features_bD = self.visual_projection(seen.pooler_output)
        return BaseModelOutputWithPooling(last_hidden_state=seen.last_hidden_state, pooler_output=features_bD)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """`pooler_output`: [b, D], not yet of unit length. Padding stands on the right."""
        if self.config.fills:
            missing = self.config.max_tokens - input_ids.shape[1]
            if missing > 0:
                input_ids = nn.functional.pad(input_ids, (0, missing), value=self.config.text_config.pad_token_id)
            attention_mask = None  # what fills counts as text
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden_bTC = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        features_bD = self.text_projection(pool(hidden_bTC, attention_mask, self.config.pooling))
        return BaseModelOutputWithPooling(last_hidden_state=hidden_bTC, pooler_output=features_bD)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> ClipdistOutput:
        """Images, texts, or both; logits need both."""
        images = texts = logits = None
        if pixel_values is not None:
            images = _unit(self.get_image_features(pixel_values))
        if input_ids is not None:
            texts = _unit(self.get_text_features(input_ids, attention_mask))
        if images is not None and texts is not None:
            logits = self.logit_scale.exp() * images @ texts.T
            if self.logit_bias is not None:
                logits = logits + self.logit_bias
        return ClipdistOutput(
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.T,
            text_embeds=texts,
            image_embeds=images,
        )


def _unit(features: BaseModelOutputWithPooling) -> Tensor:
    assert features.pooler_output is not None
    return nn.functional.normalize(features.pooler_output, dim=-1)


def pool(hidden_bTC: Tensor, mask_bT: Tensor, pooling: str) -> Tensor:
    """[b, C]: one vector per caption; padding, which stands on the right, never counts."""
    if pooling == "cls":
        return hidden_bTC[:, 0]
    mask_bT1 = mask_bT[:, :, None]
    if pooling == "last":
        last_b11 = mask_bT1.sum(1, keepdim=True) - 1
        return hidden_bTC.gather(1, last_b11.expand(-1, 1, hidden_bTC.shape[2])).squeeze(1)
    if pooling == "max":
        return hidden_bTC.masked_fill(mask_bT1 == 0, -torch.inf).amax(1)
    weights_bT1 = mask_bT1.to(hidden_bTC.dtype)
    return (hidden_bTC * weights_bT1).sum(1) / weights_bT1.sum(1)


def _projection(how: dict[str, Any], width_in: int, width_out: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.LayerNorm(width_in)] if how.get("layer_norm") else []
    layers.append(nn.Dropout(how.get("dropout", 0.0)))
    mlp = how.get("kind") == "mlp"
    if mlp:
        hidden = how.get("hidden") or width_out
        layers += [nn.Linear(width_in, hidden), nn.GELU(), nn.Dropout(how.get("dropout", 0.0))]
        width_in = hidden
    layers.append(nn.Linear(width_in, width_out, bias=mlp or bool(how.get("bias"))))
    return nn.Sequential(*layers)


def _encoder(config: Any) -> Any:
    """The text encoder alone, also of what has a decoder."""
    if config.model_type == "siglip_text_model":
        return SiglipTextModel(config)
    both = config.is_encoder_decoder or type(config)().is_encoder_decoder
    return (AutoModelForTextEncoding if both else AutoModel).from_config(config)
