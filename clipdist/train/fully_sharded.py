"""Weights, gradients and optimiser state in parts, one on each rank: torch's fully sharded data parallelism (FSDP2).

A block's weights are gathered when a pass comes to it, and let go after it. The maths is that of replicas: float32
weights, and the same autocast around them. What is sent in half precision is the gathered weights, which autocast would
round to it anyway (for norms and embeddings, which it would not, this rounds by 2⁻⁹ more).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from posixpath import commonpath
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from clipdist import world
from clipdist.model.tower_model import TowerModel
from clipdist.model.towers import ImageTower, TextTower
from clipdist.train.engine import PRECISIONS, Engine, OptimizerState
from clipdist.train.optim import OptimConfig, build_optimizer, gradient_norms


@dataclass(frozen=True)
class ShardingOptions:
    """What a launcher's FSDP section says."""

    reshard_after_forward: bool = True
    """Lets a block's weights go after the forward pass and gathers them again for the backward pass."""
    offload_to_cpu: bool = False
    """Weights, gradients and optimiser state live in the CPU's memory, where the optimiser's step is then computed."""


class FullyShardedEngine(Engine):
    name = "FSDP2"
    in_parts = True
    needs_all_ranks = True

    def __init__(
        self, accelerator: Accelerator, model: TowerModel, optim: OptimConfig, options: ShardingOptions
    ) -> None:
        super().__init__(accelerator, model, optim)
        self._mesh = init_device_mesh(accelerator.device.type, (world.connected().world_size,))
        self._options = options
        self._half = PRECISIONS.get(accelerator.mixed_precision)  # which says "no" for float32
        self._shard()
        self.optimizer = build_optimizer(model, optim)
        self._gathers, self._gathers_in_step = 0, 0

    def _shard(self) -> None:
        offload = CPUOffloadPolicy() if self._options.offload_to_cpu else OffloadPolicy()
        common: dict[str, Any] = {
            "mesh": self._mesh,
            "offload_policy": offload,
            "reshard_after_forward": self._options.reshard_after_forward,
        }
        # Inputs stay as autocast makes them: cast here, the residual stream would lose bits that replicas keep.
        policy = MixedPrecisionPolicy(self._half, torch.float32, cast_forward_inputs=False)
        model = self.model
        towers = [unit for tower in model.towers.values() for unit in (*units(tower), tower)]
        for unit in (*towers, *map(model.get_submodule, model.heads)):
            unit.register_forward_hook(own_memory)
            fully_shard(unit, mp_policy=policy, **common)
        for unit in map(model.get_submodule, model.float32_heads):
            fully_shard(unit, mp_policy=MixedPrecisionPolicy(), **common)
        fully_shard(model, **common)  # it has no parameters of its own; a pass of any kind must begin with it
        for method in model.entries:
            register_fsdp_forward_method(model, method)

    def enter_stage(self) -> None:
        """Nothing to do: sharded parameters hand their `requires_grad` on when they are gathered."""

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        self._gathers += 1
        with self.accelerator.autocast():
            return self.model(*inputs)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        root: Any = self.model
        root.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._gathers += self._options.reshard_after_forward
        self.accelerator.backward(loss)

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter's name, this rank's part of its gradient)"""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                yield name, local(parameter.grad)

    def gradient_norms(self) -> dict[str, float]:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        own = gradient_norms(self._gradients())
        squares = torch.tensor(list(own.values()), device=self.accelerator.device).square()
        return dict(zip(own, world.sum_over_ranks(squares, "norms").sqrt().tolist(), strict=True))

    def update(self, total_norm: float, max_norm: float, finite: bool) -> None:
        if finite and max_norm and total_norm > max_norm:
            own = [gradient for _, gradient in self._gradients()]
            torch._foreach_mul_(own, max_norm / (total_norm + 1e-6))
        if self.scaler is not None:  # it passes over a step that is not finite by itself, and must hear of it
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._gathers_in_step, self._gathers = self._gathers, 0

    def gradient_bytes(self) -> float:
        others = (self._mesh.size() - 1) / self._mesh.size()
        parameters = list(self.model.parameters())
        gathered = sum(p.numel() * (self._half or p.dtype).itemsize for p in parameters)
        reduced = sum(p.numel() * torch.float32.itemsize for p in parameters if p.requires_grad)
        return others * (gathered * self._gathers_in_step + reduced)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def whole(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, part in parts.items():  # one at a time: together they are what no rank has room for
            tensor = part.detach()
            if isinstance(tensor, DTensor):
                sharded: Any = tensor.to(self.accelerator.device)
                tensor = sharded.full_tensor()
            if self.accelerator.is_main_process:
                found[name] = tensor.cpu()
        return found

    @torch.no_grad()
    def fill(self, part: Tensor, whole: Tensor) -> None:
        if isinstance(part, DTensor):
            whole = whole.to(self._mesh.device_type)
            whole = local(distribute_tensor(whole, self._mesh, part.placements, src_data_rank=None))
        local(part).copy_(whole)

    def weights(self) -> dict[str, Tensor]:
        return self.whole(self.model.state_dict())

    def optimizer_state(self) -> OptimizerState:
        _, parts = self.state_in_parts()
        found = {name: self.whole(kept) for name, kept in parts.items()}
        return found if self.accelerator.is_main_process else {}

    def state_in_parts(self) -> tuple[dict[str, Tensor], OptimizerState]:
        states = {name: self.optimizer.state.get(parameter) for name, parameter in self.model.named_parameters()}
        return self.model.state_dict(), {name: dict(kept) for name, kept in states.items() if kept}

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Mapping[str, Tensor]]) -> None:
        own = self.model.state_dict()
        assert own.keys() == weights.keys(), "a checkpoint of another model"
        for name, part in own.items():
            self.fill(part, weights[name])
        for name, parameter in self.model.named_parameters():
            if name in optimizer:
                self.optimizer.state[parameter] = {
                    kind: self._part_of_state(parameter, value) for kind, value in optimizer[name].items()
                }

    def _part_of_state(self, parameter: Tensor, value: Tensor) -> Tensor:
        if not value.ndim:  # the step's number
            return value.to(local(parameter).device, copy=True)
        part = torch.zeros_like(parameter, requires_grad=False)
        self.fill(part, value)
        return part


@torch.compiler.disable
def own_memory(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """A copy of each output that is a view: whoever changes a view in place drops the hook by which FSDP2 gathers the
    module's weights for the backward pass."""
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor._is_view() else tensor, outputs)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def units(tower: ImageTower | TextTower) -> list[nn.Module]:
    """The modules that are gathered one after the other, inner ones first: for each of the tower's blocks, the smallest
    module that holds all of it. Blocks that nothing smaller than the tower holds, or a mere list, are the tower's own.
    """
    found: dict[str, nn.Module] = {}
    for names in tower.blocks():
        path = commonpath([name.rpartition(".")[0].replace(".", "/") for name in names]).replace("/", ".")
        module = tower.get_submodule(path)
        if path.count(".") and not isinstance(module, nn.ModuleList | nn.ModuleDict | FSDPModule):
            found[path] = module
    return [found[path] for path in sorted(found, key=lambda path: -path.count("."))]
