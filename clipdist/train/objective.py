"""What a run learns, and all that depends on it: which part of a sample is looked at, the model, the gradient of a
global batch, what a validation measures, and what the finished model folder holds. The trainer does the rest.

b = rows on this rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from clipdist import world
from clipdist.data.shards import Split
from clipdist.settings import settings
from clipdist.train.engine import PRECISIONS, Engine

if TYPE_CHECKING:
    from clipdist.config import RunConfig
    from clipdist.data.images.geometry import ResizeMode
    from clipdist.data.loader import Batch
    from clipdist.data.order import SampleOrder
    from clipdist.data.rows import TrainRows
    from clipdist.model.tower_model import TowerModel
    from clipdist.train.run_folder import RunFolder

Name = Literal["contrastive", "classify"]
# What may choose the best model, and whether more of it is better.
MONITORS: dict[Name, dict[str, bool]] = {
    "contrastive": {
        "val/loss": False,
        "val/mean_R@1": True,
        "val/image_to_text/R@1": True,
        "val/text_to_image/R@1": True,
    },
    "classify": {"val/loss": False, "val/top1": True, "val/top5": True, "val/balanced_accuracy": True},
}
DEFAULT_MONITOR: dict[Name, str] = {"contrastive": "val/mean_R@1", "classify": "val/top1"}
HIGHER_IS_BETTER = {name: higher for monitors in MONITORS.values() for name, higher in monitors.items()}
# Keys of a recipe that an objective does not read: they must stand at their defaults.
IGNORED: dict[Name, tuple[str, ...]] = {
    "contrastive": ("classify",),
    "classify": (
        "loss",
        "model.text",
        "model.width",
        "model.projection",
        "model.text_projection",
        "model.temperature",
        "data.groups",
        "data.caption",
        "data.caption_augment",
        "optim.text_lr_scale",
    ),
}


@settings
class EvaluateConfig:
    every_epochs: PositiveInt = 1
    """Epochs between two validations."""
    monitor: str = ""
    """What decides which model is the best. contrastive: val/mean_R@1 (the default), val/loss, val/image_to_text/R@1 or
    val/text_to_image/R@1; classify: val/top1 (the default), val/loss, val/top5 or val/balanced_accuracy."""
    patience: NonNegativeInt = 0
    """Validations without improvement before training stops early; 0: never."""
    min_improvement: NonNegativeFloat = 0.0
    """What the monitored value must gain to count as better."""
    workers: NonNegativeInt = 2
    """Loader processes per rank while validating; 0 loads in the training process."""
    panels: NonNegativeInt = 4
    """Images shown in TensorBoard's retrieval panel."""


class Step(NamedTuple):
    """What a step knows after its backward pass, equal on all ranks."""

    loss: float
    values: dict[str, float]
    """What it logs besides, as `train/` keys."""


@dataclass
class Validation:
    """What rank 0 found."""

    values: dict[str, float]
    """As `val/` keys."""
    scores: Callable[[], dict[str, Any]]
    """What the model folder says of a model that is kept; asked only then."""
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    panels: dict[str, np.ndarray] = field(default_factory=dict)


class Objective(ABC):
    """All ranks construct it, and call each method together."""

    what: ClassVar[str]
    """What the rows of a batch are, in messages."""
    absent_parts: ClassVar[tuple[str, ...]] = ()
    """Parts of a step, as a profile tells them apart, that there are not."""
    criterion: Any
    """The loss."""

    def __init__(self, config: "RunConfig", order: "SampleOrder") -> None:
        self.config, self.order = config, order

    @abstractmethod
    def prepare(self, folder: "RunFolder", split: Split, val_split: Split | None) -> None:
        """What is made of the training split once, kept with the run, and read back by everyone."""

    @abstractmethod
    def build(self) -> "TowerModel":
        """The model at step 0; `prepare` comes first, here and below."""

    @abstractmethod
    def rows(self, split: Split, *, side: int, resize: "ResizeMode") -> "TrainRows":
        """What loader workers read."""

    @abstractmethod
    def gradient(self, engine: Engine, batch: "Batch", micro_batch: int, seed: Callable[[int], None]) -> Step:
        """Leaves the gradient of the global batch's loss in the engine; `batch` is this rank's b rows of it.

        `seed` is called with the number of a micro-batch before each of its passes, and sets the random state it has.
        """

    def after_update(self, engine: Engine) -> None:
        """Puts back what a step may not move further."""
        return None

    def measured(self) -> dict[str, float]:
        """What a logged step's line has besides; of the latest step."""
        return {}

    def warning(self, values: Mapping[str, Any]) -> str | None:
        """What is wrong with a run that logs these values, in words."""
        return None

    @abstractmethod
    def validate(self, engine: Engine, split: Split) -> Validation | None:
        """Measures the split; None on all ranks but 0."""

    @abstractmethod
    def save(
        self,
        folder: Path,
        model: "TowerModel",
        weights: dict[str, Tensor],
        scores: dict[str, Any],
        about: dict[str, Any],
    ) -> None:
        """Writes the finished model; rank 0 alone calls it."""

    @abstractmethod
    def timed(self, model: "TowerModel") -> list[tuple[Any, str, str]]:
        """(owner, its method, part of a step) of the work that a profile tells apart."""

    @abstractmethod
    def describe(self, record: Mapping[str, Any]) -> str:
        """What the line of a logged step says beside loss and learning rate."""

    @abstractmethod
    def describe_validation(self, values: Mapping[str, float]) -> str:
        """What the line of a validation says."""

    def _reading(self, engine: Engine) -> dict[str, Any]:
        """How a validation reads and passes through the model, for `embed_split` and its like."""
        config = self.config
        return {
            "workers": config.evaluate.workers,
            "precision": PRECISIONS[config.train.precision],
            "max_image_pixels": config.data.max_image_pixels,
            "quiet": True,
            "in_step": engine.needs_all_ranks,
        }

    def _make_once(self, folder: "RunFolder", complete: Path, make: Callable[[], None]) -> None:
        """`make` on rank 0, unless a start that this one goes on from has left `complete`."""
        # What a start without a checkpoint left may come from another recipe.
        if world.connected().is_main and not (folder.checkpoint and complete.exists()):
            make()
        world.barrier()


def make_objective(config: "RunConfig", order: "SampleOrder") -> Objective:
    if config.objective == "classify":
        from clipdist.train.classify import Classify

        return Classify(config, order)
    from clipdist.train.contrastive import Contrastive

    return Contrastive(config, order)
