"""How the copies of the model on all ranks act as one: what they exchange, and how their state is read.

`launched.py` makes the one that the launcher asks for. Weights and optimiser state leave an engine under the
parameters' own names, whole, so that a run may go on with another.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from clipdist.model.dual_encoder import DualEncoder, Temperature
from clipdist.model.tower_model import TowerModel
from clipdist.train.optim import OptimConfig

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter's name -> what the optimiser keeps of it (`exp_avg`, `exp_avg_sq`, `step`), whole tensors on the CPU."""


class Inputs(NamedTuple):
    """What a dual encoder's forward pass takes: uint8 [n, 3, H, W] and int64 [n, T] twice."""

    images_n3HW: Tensor
    token_ids_nT: Tensor
    attention_mask_nT: Tensor

    def split(self, rows: int) -> list["Inputs"]:
        """Runs of `rows` rows, in order, each padded to its own longest caption."""
        parts = []
        for images, tokens, mask in zip(*(tensor.split(rows) for tensor in self), strict=True):
            longest = int(mask.sum(1).max())  # captions are padded on the right
            # Copies: compiled towers have a graph for each layout and offset of views.
            words = (captions[:, :longest].clone(memory_format=torch.contiguous_format) for captions in (tokens, mask))
            parts.append(Inputs(images, *words))
        return parts


class Exchange(NamedTuple):
    """Seconds of an exchange of gradients, and how many of them came after the backward pass had done its work."""

    seconds: float
    exposed_seconds: float


class Engine(ABC):
    """All ranks construct it with equal models, and call each method together.

    `model` is what computes now; a change of stage may put another object there.
    """

    name = "replicas"
    """What the run's environment calls it."""
    in_parts = False
    """Whether each rank has a part of weights and optimiser state alone, which `state_in_parts` gives."""
    needs_all_ranks = False
    """Whether each pass through a tower is a collective, in which all ranks must take part."""

    def __init__(self, accelerator: Accelerator, model: TowerModel, optim: OptimConfig) -> None:
        self.accelerator, self.model, self.optim = accelerator, model, optim

    @property
    def scaler(self) -> Any:
        """The gradient scaler of fp16; None without."""
        return self.accelerator.scaler

    @abstractmethod
    def enter_stage(self) -> None:
        """Takes note that other parameters train now; called before the first step, and after each change."""

    @abstractmethod
    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        """One forward pass of the model, in the run's precision."""

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass of one of several micro-batches: gradients are exchanged with the last."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients."""

    @abstractmethod
    def gradient_norms(self) -> dict[str, float]:
        """L2 norms of the averaged gradient of `image`, `text` and `head` (what stands over the towers), equal on all
        ranks; 0 of what the model has not."""

    @abstractmethod
    def update(self, total_norm: float, max_norm: float, finite: bool) -> None:
        """Clips to `max_norm` (0: not), takes the optimiser's step unless the gradient is not finite, and forgets the
        gradient."""

    @abstractmethod
    def gradient_bytes(self) -> float:
        """Bytes that this rank sends in one step so that all ranks have the averaged gradient; by formula.

        Each engine answers for what it exchanges, over W ranks and N bytes of gradients: replicas all-reduce them,
        2(W − 1)/W · N; shards (ZeRO 2 and 3, FSDP2) reduce-scatter them, (W − 1)/W · N in the gradient's type, and
        besides gather the weights, (W − 1)/W of their bytes each time that a pass needs them. ZeRO 1 all-reduces and
        gathers the updated weights.
        """

    def clamp_temperature(self) -> None:
        """Puts a learned temperature back between its bounds; called after `update`."""
        self._temperature.clamp()

    @property
    def _temperature(self) -> Temperature:
        assert isinstance(self.model, DualEncoder), "no other model has one"
        return self.model.temperature

    def temperature(self) -> tuple[float, float | None]:
        """(logit scale, logit bias) as they are now."""
        with torch.no_grad():
            scale, bias = self._temperature()
        return float(scale), None if bias is None else float(bias)

    def gradient_exchange(self) -> Exchange | None:
        """How long the exchange of gradients took in the step before the last forward pass; None where nothing
        measures it, and in one process."""
        return None

    def measure_each_exchange(self) -> None:
        """Has every step measured, not now and then one; for a profile."""
        return None

    @property
    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups, whose `lr` the schedule sets; each has `lr_scale`."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The whole model's state on rank 0, on the CPU; other ranks get {}."""

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """The whole optimiser's state on rank 0; other ranks get {}. Parameters that never trained are left out."""

    def state_in_parts(self) -> tuple[dict[str, Tensor], OptimizerState]:
        """Weights and optimiser state as they lie, in DTensors; for torch.distributed.checkpoint."""
        raise NotImplementedError

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over what `weights` and `optimizer_state` of any engine gave; every rank passes all of it, and takes
        one tensor at a time, so that it may be read from a disk on the way."""

    def whole(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are laid out as the parameters of those names, whole, on the CPU of rank 0; other ranks get
        {}."""
        return {name: part.detach().cpu() for name, part in parts.items()} if self.accelerator.is_main_process else {}

    def fill(self, part: Tensor, whole: Tensor) -> None:
        """The way back: this rank's part of `whole`, which every rank passes, into `part`."""
        part.copy_(whole)
