"""Two towers, two projections and a temperature: images and captions -> unit vectors in one space.

b = rows, T = tokens, C = width of a tower, D = width of the joint embedding.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from clipdist.errors import UserError
from clipdist.model.tower_model import TowerModel, blank_images
from clipdist.model.towers import ImageTower, ImageTowerConfig, TextTower, TextTowerConfig
from clipdist.settings import Share, field, settings


@settings
class ProjectionConfig:
    kind: Literal["linear", "mlp"] = "linear"
    """mlp: two layers with a GELU between, as ConVIRT has."""
    hidden: NonNegativeInt = 0
    """Width between the two layers; 0: the joint width."""
    layer_norm: bool = False
    """Normalises the tower's features first."""
    dropout: Share = 0.0
    """After the normalisation, and after the GELU of an mlp."""
    bias: bool = False
    """Of a linear one; an mlp has biases always."""


@settings
class TextProjectionConfig:
    """The text tower's projection; its keys are read where it is not `same`."""

    kind: Literal["same", "linear", "mlp"] = "same"
    """same: as `projection` says."""
    hidden: NonNegativeInt = 0
    """As `projection.hidden`."""
    layer_norm: bool = False
    """As `projection.layer_norm`."""
    dropout: Share = 0.0
    """As `projection.dropout`."""
    bias: bool = False
    """As `projection.bias`."""

    def beside(self, other: ProjectionConfig) -> ProjectionConfig:
        """What is built, where the image tower has the other one. Raises `UserError` for keys that would be ignored."""
        if self.kind == "same":
            if self != TextProjectionConfig():
                raise UserError(
                    "model.text_projection: found keys beside kind=same, expected none; set kind to linear or mlp"
                )
            return other
        return ProjectionConfig(
            kind=self.kind, hidden=self.hidden, layer_norm=self.layer_norm, dropout=self.dropout, bias=self.bias
        )


@settings
class TemperatureConfig:
    initial: float = 0.07
    """What cosines are divided by at the start."""
    learned: bool = True
    """false: it stays as it is."""
    minimum: float = 0.01
    """Bounds of a learned temperature; CLIP's scale of at most 100 is 0.01."""
    maximum: float = 1.0
    """Likewise."""
    bias: float | None = None
    """Initial logit bias, for the sigmoid loss; SigLIP starts at −10."""


@settings
class ModelConfig:
    init: str = ""
    """A published dual encoder to start from: `hf:<name or folder>` of a CLIP or SigLIP, `open_clip:<folder>`. It sets
    all keys of this section that the recipe does not set."""
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    width: PositiveInt = 512
    """Of the joint embedding."""
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    text_projection: TextProjectionConfig = field(default_factory=TextProjectionConfig)
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)


class Encoded(NamedTuple):
    """What one forward pass gives; features are float32 unit vectors, the scale is 1/temperature."""

    image_features_bD: Tensor
    text_features_bD: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None


class Temperature(nn.Module):
    """Holds log(1/temperature) and the bias, as shape-[1] parameters of a submodule: sharding engines refuse scalars
    and parameters of the root."""

    def __init__(self, config: TemperatureConfig) -> None:
        super().__init__()
        if not 0 < config.minimum <= config.initial <= config.maximum:
            raise UserError(
                f"model.temperature: initial={config.initial} must lie between minimum={config.minimum} "
                f"and maximum={config.maximum}, all above 0"
            )
        self.config = config
        self.log_scale = nn.Parameter(torch.tensor([-math.log(config.initial)]), requires_grad=config.learned)
        self.bias = None if config.bias is None else nn.Parameter(torch.tensor([float(config.bias)]))

    def forward(self) -> tuple[Tensor, Tensor | None]:
        # Not the parameter itself: a sharding engine lets its memory go when this returns.
        return self.log_scale.exp(), None if self.bias is None else self.bias.clone()

    @torch.no_grad()
    def clamp(self) -> None:
        """Puts a learned temperature back between its bounds; called after each optimiser step."""
        self.log_scale.clamp_(*self.bounds())

    def bounds(self) -> tuple[float, float]:
        """Of the logarithm of the scale."""
        return -math.log(self.config.maximum), -math.log(self.config.minimum)


def projection(config: ProjectionConfig, width_in: int, width_out: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.LayerNorm(width_in)] if config.layer_norm else []
    layers.append(nn.Dropout(config.dropout))
    if config.kind == "mlp":
        hidden = config.hidden or width_out
        layers += [nn.Linear(width_in, hidden), nn.GELU(), nn.Dropout(config.dropout)]
        width_in = hidden
    layers.append(nn.Linear(width_in, width_out, bias=config.kind == "mlp" or config.bias))
    return nn.Sequential(*layers)


class DualEncoder(TowerModel):
    """uint8 images [b, 3, H, W] and tokens [b, T] -> `Encoded`."""

    heads = ("image_projection", "text_projection")
    float32_heads = ("temperature",)  # in bfloat16 the logarithm of a scale of 100 would move in steps of 3 %
    entries = ("encode_image", "encode_text")

    def __init__(self, config: ModelConfig, image: ImageTower, text: TextTower) -> None:
        super().__init__(config)
        self.image, self.text = image, text
        self.image_projection = projection(config.projection, image.width, config.width)
        self.text_projection = projection(config.text_projection.beside(config.projection), text.width, config.width)
        self.temperature = Temperature(config.temperature)

    @property
    def towers(self) -> dict[str, ImageTower | TextTower]:
        return {"image": self.image, "text": self.text}

    @property
    def joint_width(self) -> int:
        return self.config.width

    def example(self, rows: int, tokens: int, device: torch.device | None = None) -> tuple[Tensor, ...]:
        token_ids = torch.ones(rows, tokens, dtype=torch.int64, device=device)
        return blank_images(self.image.side, rows, device), token_ids, torch.ones_like(token_ids)

    def encode_image(self, images_b3HW: Tensor) -> Tensor:
        """[b, D] float32 unit vectors."""
        features_bC = self._features("image", images_b3HW)
        return F.normalize(self.image_projection(features_bC).float(), dim=1)

    def encode_text(self, token_ids_bT: Tensor, attention_mask_bT: Tensor) -> Tensor:
        """[b, D] float32 unit vectors."""
        features_bC = self._features("text", token_ids_bT, attention_mask_bT)
        return F.normalize(self.text_projection(features_bC).float(), dim=1)

    def forward(self, images_b3HW: Tensor, token_ids_bT: Tensor, attention_mask_bT: Tensor) -> Encoded:
        scale, bias = self.temperature()
        return Encoded(self.encode_image(images_b3HW), self.encode_text(token_ids_bT, attention_mask_bT), scale, bias)
