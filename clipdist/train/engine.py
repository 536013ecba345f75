"""How the copies of the model on all ranks act as one: what they exchange, and how their state is read.

An engine reaches the launcher's choice (launch/accelerate/*.yaml) through Accelerate. Weights and optimiser state leave
it under the parameters' own names, whole, so that a run may go on with another.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipdist import world
from clipdist.errors import UserError
from clipdist.model.dual_encoder import DualEncoder, Encoded
from clipdist.train.optim import OptimConfig, build_optimizer, gradient_norms

Precision = Literal["fp32", "bf16", "fp16"]
OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter's name -> what the optimiser keeps of it (`exp_avg`, `exp_avg_sq`, `step`), whole tensors on the CPU."""


class Inputs(NamedTuple):
    """What a forward pass takes: uint8 [n, 3, H, W] and int64 [n, T] twice."""

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


def make_accelerator(precision: Precision, tf32: bool = False) -> Accelerator:
    """Accelerate's state for this process, by what its launcher said through the environment; `tf32` allows it to GPUs,
    or forbids it.

    Raises `UserError` when the launcher asks for an engine that there is none for: on a machine without GPUs Accelerate
    would leave it out without a word.
    """
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise UserError(
                f"the launcher asks for {name}, which this version does not train with; use "
                f"launch/accelerate/gpu.yaml, or cpu.yaml without GPUs"
            )
    use_cpu = not torch.cuda.is_available()
    # The older of torch's two ways: it sets both, and setting the newer one makes reading this one an error.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    # Buffers need no broadcast: batch statistics are synchronised or frozen, so ranks never differ in them.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    mixed = "no" if precision == "fp32" else precision
    return Accelerator(mixed_precision=mixed, cpu=use_cpu, kwargs_handlers=[ddp])


class Exchange(NamedTuple):
    """Seconds of an exchange of gradients, and how many of them came after the backward pass had done its work."""

    seconds: float
    exposed_seconds: float


class Engine(ABC):
    """All ranks construct it with equal models, and call each method together."""

    def __init__(self, accelerator: Accelerator, model: DualEncoder, optim: OptimConfig) -> None:
        self.accelerator, self.model, self.optim = accelerator, model, optim

    @property
    def scaler(self) -> Any:
        """The gradient scaler of fp16; None without."""
        return self.accelerator.scaler

    @abstractmethod
    def enter_stage(self) -> None:
        """Takes note that other parameters train now; called before the first step, and after each change."""

    @abstractmethod
    def forward(self, inputs: Inputs) -> Encoded:
        """One forward pass, in the run's precision."""

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass of one of several micro-batches: gradients are exchanged with the last."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients."""

    @abstractmethod
    def gradient_norms(self) -> dict[str, float]:
        """L2 norms of the averaged gradient of `image`, `text` and `head` (projections and temperature), equal on all
        ranks."""

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

    @abstractmethod
    def load(self, weights: dict[str, Tensor], optimizer: OptimizerState) -> None:
        """Takes over what `weights` and `optimizer_state` of any engine gave; every rank passes all of it."""


class ReplicatedEngine(Engine):
    """A whole copy of model and optimiser on each rank: one process, or distributed data parallelism."""

    def __init__(self, accelerator: Accelerator, model: DualEncoder, optim: OptimConfig) -> None:
        super().__init__(accelerator, model, optim)
        self.optimizer: Any = accelerator.prepare_optimizer(build_optimizer(model, optim))
        self._wrapped: nn.Module | None = None

    def enter_stage(self) -> None:
        if self._wrapped is not None:
            self.accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
            self.accelerator.free_memory()
        self._wrapped = self.accelerator.prepare_model(self.model)

    def forward(self, inputs: Inputs) -> Encoded:
        assert self._wrapped is not None, "enter_stage comes first"
        with self.accelerator.autocast():
            encoded: Encoded = self._wrapped(*inputs)
        return encoded

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(self._wrapped)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def gradient_norms(self) -> dict[str, float]:
        self.accelerator.unscale_gradients(self.optimizer)
        return gradient_norms(self.model)

    def update(self, total_norm: float, max_norm: float, finite: bool) -> None:
        if finite or self.scaler is not None:  # a scaler passes over such a step by itself, and must hear of it
            if max_norm and finite:
                torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, torch.tensor(total_norm))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_bytes(self) -> float:
        return world.all_reduce_bytes(sum(p.nbytes for p in self.model.parameters() if p.requires_grad))

    def gradient_exchange(self) -> Exchange | None:
        """As DDP's own clock tells it, which runs in its first ten steps and in every hundredth."""
        if not isinstance(self._wrapped, DistributedDataParallel):
            return None
        told = self._wrapped._get_ddp_logging_data()
        seconds = told.get("backward_comm_time", 0) / 1e9
        return Exchange(seconds, max(0.0, seconds - told.get("backward_compute_comm_overlap_time", 0) / 1e9))

    def measure_each_exchange(self) -> None:
        if isinstance(self._wrapped, DistributedDataParallel):
            self._wrapped._set_ddp_runtime_logging_sample_rate(1)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict()) if self.accelerator.is_main_process else {}

    def optimizer_state(self) -> OptimizerState:
        return dict(self._states()) if self.accelerator.is_main_process else {}

    def _states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.model.named_parameters():
            if kept := self.optimizer.optimizer.state.get(parameter):
                yield name, kept

    def load(self, weights: dict[str, Tensor], optimizer: OptimizerState) -> None:
        self.model.load_state_dict(weights)
        inner = self.optimizer.optimizer
        numbers = {id(p): n for n, p in enumerate(p for group in inner.param_groups for p in group["params"])}
        state = {numbers[id(p)]: optimizer[name] for name, p in self.model.named_parameters() if name in optimizer}
        # The groups' settings are the recipe's, set anew at every step; only the moments are the run's.
        inner.load_state_dict({"state": state, "param_groups": inner.state_dict()["param_groups"]})
