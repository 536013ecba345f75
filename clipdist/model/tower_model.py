"""What every model that is trained here has: towers, heads over them, and one way of keeping a tower locked.

b = rows, T = tokens, C = width of a tower.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from clipdist.model.towers import ImageTower, TextTower

if TYPE_CHECKING:
    from clipdist.model.dual_encoder import ModelConfig


class FeatureSource(Protocol):
    """Gives what `tower(*inputs)` would give, [b, C]; no gradient is wanted."""

    def __call__(self, tower: nn.Module, *inputs: Tensor) -> Tensor: ...


class TowerModel(nn.Module, ABC):
    """A tower that trains nowhere runs in evaluation mode and without a graph, so that neither its dropout nor its
    batch statistics move, and it costs one forward pass alone."""

    heads: ClassVar[tuple[str, ...]] = ()
    """Names of the submodules beside the towers that compute in the run's precision."""
    float32_heads: ClassVar[tuple[str, ...]] = ()
    """Of those that compute in float32 whatever the run's precision."""
    entries: ClassVar[tuple[str, ...]] = ()
    """Methods, beside `forward`, that a pass may begin with."""
    image: ImageTower

    def __init__(self, config: "ModelConfig") -> None:
        super().__init__()
        self.config = config
        self.feature_sources: Mapping[str, FeatureSource] = {}
        """`image` or `text` -> where, in training, its features come from while that tower trains nowhere."""

    @property
    @abstractmethod
    def towers(self) -> dict[str, ImageTower | TextTower]:
        """`image`, and `text` where there is one; submodules of those names."""

    @property
    @abstractmethod
    def joint_width(self) -> int:
        """Width of the features by which rows are contrasted with the whole global batch; 0: they are not."""

    @abstractmethod
    def example(self, rows: int, tokens: int, device: torch.device | None = None) -> tuple[Tensor, ...]:
        """What `forward` takes, for blank images and captions of `tokens` tokens; for measuring."""

    def _features(self, name: str, *inputs: Tensor) -> Tensor:
        """[b, C] of the tower of that name."""
        tower, source = self.towers[name], self.feature_sources.get(name)
        learns = trains(tower)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            if source is not None and self.training and not learns:
                return source(tower, *inputs)
            features_bC: Tensor = tower(*inputs)
        return features_bC

    def train(self, mode: bool = True) -> "TowerModel":
        super().train(mode)
        if mode:
            for tower in self.towers.values():
                if not trains(tower):
                    tower.eval()
            if self.image.batch_norm == "frozen":
                for module in self.image.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.eval()
        return self

    def compile_towers(self) -> None:
        self.image.compile()
        if "text" in self.towers:
            # Captions are as long as a batch's longest: one graph for every length, the same wherever a run goes on.
            self.towers["text"].compile(dynamic=True)


def blank_images(side: int, rows: int, device: torch.device | None) -> Tensor:
    return torch.zeros(rows, 3, side, side, dtype=torch.uint8, device=device)


def trains(tower: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in tower.parameters())


def total_of(made: Any) -> Tensor:
    """The sum of all that a forward pass gave: what a gradient of everything is taken of."""
    tensors: Iterable[Any] = (made,) if isinstance(made, Tensor) else made
    return torch.stack([tensor.sum() for tensor in tensors if tensor is not None]).sum()
