"""A whole copy of model and optimiser on each rank."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipdist import world
from clipdist.model.tower_model import TowerModel
from clipdist.train.engine import Engine, Exchange, OptimizerState
from clipdist.train.optim import OptimConfig, build_optimizer, gradient_norms


class ReplicatedEngine(Engine):
    """One process, or distributed data parallelism (DDP)."""

    def __init__(self, accelerator: Accelerator, model: TowerModel, optim: OptimConfig) -> None:
        super().__init__(accelerator, model, optim)
        self.optimizer: Any = accelerator.prepare_optimizer(build_optimizer(model, optim))
        self._wrapped: nn.Module | None = None

    def enter_stage(self) -> None:
        if self._wrapped is not None:
            self.accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
            self.accelerator.free_memory()
        self._wrapped = self.accelerator.prepare_model(self.model)
        self._settle_buckets()

    def _settle_buckets(self) -> None:
        """After its first step DDP deals gradients to buckets anew, by the order in which they came, and where in a
        bucket a number lies decides in which order three ranks or more add it up. The first step after a restart would
        round otherwise than that step in a run that was not stopped; so the first one is an empty one."""
        if not isinstance(self._wrapped, DistributedDataParallel):
            return
        own = vars(self.model).get("forward")  # Accelerate's, for half precision
        parameters = [p for p in self.model.parameters() if p.requires_grad]

        def nothing() -> Tensor:
            return torch.stack([p.sum() * 0 for p in parameters]).sum()

        self.model.forward = nothing  # type: ignore[method-assign,assignment]
        try:
            self._wrapped().backward()
        finally:
            if own is None:
                del self.model.forward
            else:
                self.model.forward = own  # type: ignore[method-assign]
        self._wrapped.zero_grad(set_to_none=True)

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        assert self._wrapped is not None, "enter_stage comes first"
        with self.accelerator.autocast():
            return self._wrapped(*inputs)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(self._wrapped)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def gradient_norms(self) -> dict[str, float]:
        self.accelerator.unscale_gradients(self.optimizer)
        return gradient_norms((n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None)

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

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.model.load_state_dict(dict(weights))
        inner = self.optimizer.optimizer
        numbers = {id(p): n for n, p in enumerate(p for group in inner.param_groups for p in group["params"])}
        known = [(name, p) for name, p in self.model.named_parameters() if name in optimizer]
        state = {numbers[id(p)]: dict(optimizer[name]) for name, p in known}
        # The groups' settings are the recipe's, set anew at every step; only the moments are the run's.
        inner.load_state_dict({"state": state, "param_groups": inner.state_dict()["param_groups"]})
