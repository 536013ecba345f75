"""An image tower and a linear head: images -> a logit for each class.

b = rows, C = width of the tower, K = classes.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from clipdist.model.dual_encoder import ModelConfig
from clipdist.model.tower_model import TowerModel, blank_images
from clipdist.model.towers import ImageTower, TextTower
from clipdist.settings import Share, settings


@settings
class ClassifyConfig:
    label: Annotated[str, Field(min_length=1)] = "label"
    """Field of a sample that names its class; the classes are the values that the training split has."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of the tower's features, before the head."""
    label_smoothing: Share = 0.0
    """ε of the targets (1 − ε)·[k is the class] + ε/K."""


class Classifier(TowerModel):
    """uint8 images [b, 3, H, W] -> logits [b, K], float32 whatever the run's precision."""

    float32_heads = ("head",)
    entries = ("encode_image", "logits")

    def __init__(self, config: ModelConfig, image: ImageTower, *, classes: int, dropout: float) -> None:
        super().__init__(config)
        self.image = image
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(image.width, classes)

    @property
    def towers(self) -> dict[str, ImageTower | TextTower]:
        return {"image": self.image}

    @property
    def joint_width(self) -> int:
        return 0

    def example(self, rows: int, tokens: int, device: torch.device | None = None) -> tuple[Tensor, ...]:
        return (blank_images(self.image.side, rows, device),)

    def encode_image(self, images_b3HW: Tensor) -> Tensor:
        """[b, C] float32 unit vectors: what the tower gives."""
        return F.normalize(self._features("image", images_b3HW).float(), dim=1)

    def logits(self, images_b3HW: Tensor) -> Tensor:
        """[b, K] float32."""
        features_bC = self.dropout(self._features("image", images_b3HW).float())
        with torch.autocast(features_bC.device.type, enabled=False):
            scores_bK: Tensor = self.head(features_bC)
        return scores_bK

    def forward(self, images_b3HW: Tensor) -> Tensor:
        return self.logits(images_b3HW)
