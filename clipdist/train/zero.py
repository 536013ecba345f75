"""DeepSpeed's ZeRO: optimiser state (stage 1), gradients (2) and weights (3) in parts, one on each rank.

Weights are float32 and the precision is autocast's, as in the other engines: DeepSpeed's own half-precision modes round
the weights, and would train another model. Its configuration is the launcher's JSON (launch/deepspeed/*.json), in which
what the recipe decides is `auto`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from clipdist import world
from clipdist.model.build import copy_of_shape
from clipdist.model.tower_model import TowerModel
from clipdist.train.engine import Engine, OptimizerState
from clipdist.train.optim import OptimConfig, build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Passes:
    forward: int = 0
    backward: int = 0


class ZeroEngine(Engine):
    def __init__(self, accelerator: Accelerator, model: TowerModel, optim: OptimConfig, config: dict[str, Any]) -> None:
        super().__init__(accelerator, model, optim)
        self._config = config
        self._stage = int(config["zero_optimization"]["stage"])
        self.name = f"ZeRO {self._stage}"
        self.needs_all_ranks = self._stage == 3
        self._template = copy_of_shape(model, torch.device("meta"))
        self._deepspeed: Any = None
        self._resting: OptimizerState = {}  # what the optimiser has gathered of parameters that do not train now
        self._names: dict[nn.Parameter, str] = {}
        self._passes = Passes()
        self._passes_in_step = Passes()

    def enter_stage(self) -> None:
        """DeepSpeed fixes at its start what trains. Another stage starts another, with a new copy of the model and all
        that the optimiser knows."""
        if self._deepspeed is not None:
            self._resting |= self._state(everywhere=True)
            trained = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
            weights = self._weights(everywhere=True)
            self._deepspeed.destroy()
            self._deepspeed = None
            self.model = copy_of_shape(self._template, self.accelerator.device).to(self.accelerator.device)
            self.model.load_state_dict(weights)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(trained[name])
            self.model.train()
        self._start()

    def _start(self) -> None:
        deepspeed = import_deepspeed()
        self._names = {parameter: name for name, parameter in self.model.named_parameters()}
        optimizer = build_optimizer(self.model, self.optim)
        groups = list(self._groups_of_one_age(optimizer.param_groups))
        optimizer.param_groups[:] = groups
        members = [[self._names[p] for p in group["params"]] for group in groups]
        # DeepSpeed turns autocast off around the model, so it has to be on within.
        self.model.forward = self._autocast(self.model.forward)  # type: ignore[method-assign]
        self._deepspeed, _, _, _ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=self._config, dist_init_required=False
        )
        # It wraps parameters of stage 3 in the same objects, so names stay theirs.
        self._group_of = {name: number for number, names in enumerate(members) for name in names}
        self._put_state({name: self._resting.pop(name) for name in list(self._resting) if name in self._group_of})

    def _groups_of_one_age(self, groups: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Groups of what trains, each of parameters that have trained for equally many steps: ZeRO keeps one number of
        steps for a group, and AdamW's correction of its moments depends on it."""
        for group in groups:
            ages: dict[int, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.requires_grad:
                    kept = self._resting.get(self._names[parameter])
                    ages.setdefault(int(kept["step"]) if kept else 0, []).append(parameter)
            for parameters in ages.values():
                yield {**group, "params": parameters}

    def _autocast(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*inputs: Tensor) -> Any:
            with self.accelerator.autocast():
                return forward(*inputs)

        return inner

    @property
    def _zero(self) -> Any:
        """The optimiser of DeepSpeed around the one of torch."""
        return self._deepspeed.optimizer

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        self._passes.forward += 1
        return self._deepspeed(*inputs)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._passes.backward += 1
        self._deepspeed.backward(loss)

    def gradient_norms(self) -> dict[str, float]:
        squares = {"image": 0.0, "text": 0.0, "head": 0.0}
        for group, norm in self._norms():
            norm = float(norm)
            # DeepSpeed says −1 for what is not finite.
            squares[group["part"]] += norm**2 if norm >= 0 else math.inf
        return {part: math.sqrt(square) for part, square in squares.items()}

    def _norms(self) -> Iterator[tuple[dict[str, Any], Any]]:
        zero = self._zero
        groups = self.param_groups
        if self._stage == 3:
            for number, norm in enumerate(zero._get_norm_groups()):
                yield groups[zero.sub_group_to_group_id[number]], norm
            return
        for number, group in enumerate(groups):
            own = zero.params_in_partition[number]
            if zero.cpu_offload:
                yield group, zero.complete_grad_norm_calculation_for_cpu_offload(own)
            else:
                yield group, zero.get_grad_norm_direct(zero.averaged_gradients[number], own)

    def update(self, total_norm: float, max_norm: float, finite: bool) -> None:
        zero = self._zero
        zero.clip_grad = max_norm
        if finite:
            self._deepspeed.step()
        else:
            # With a norm that is not finite, DeepSpeed forgets the gradient and leaves everything as it was.
            name = "_get_norm_groups" if self._stage == 3 else "scaled_global_norm"
            infinite = torch.tensor(math.inf, device=self.accelerator.device)
            setattr(zero, name, lambda: [infinite] if self._stage == 3 else infinite)
            try:
                self._deepspeed.step()
            finally:
                delattr(zero, name)  # the method of its class shows again
        self._passes_in_step, self._passes = self._passes, Passes()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        parameter = self._temperature.log_scale
        lowest, highest = self._temperature.bounds()
        with self._gathered([parameter]):
            value = float(parameter)
        clamped = min(max(value, lowest), highest)
        if clamped == value:
            return
        with self._gathered([parameter], written_by=0):
            parameter.fill_(clamped)
        self._put(parameter, torch.tensor([clamped]))

    def temperature(self) -> tuple[float, float | None]:
        temperature = self._temperature
        with self._gathered(list(temperature.parameters())):
            bias = None if temperature.bias is None else temperature.bias.item()
            return temperature.log_scale.exp().item(), bias

    @contextmanager
    def _gathered(self, parameters: list[nn.Parameter], written_by: int | None = None) -> Iterator[None]:
        """Within, these parameters are whole. All ranks call it; what the rank `written_by` makes of them then counts
        on all."""
        if self._stage < 3:
            yield
            return
        deepspeed = import_deepspeed()
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=written_by):
            yield

    def gradient_bytes(self) -> float:
        size = world.connected().world_size
        others = (size - 1) / size
        everything = [(getattr(p, "ds_numel", p.numel()) * p.element_size(), p.requires_grad) for p in self._names]
        trained = sum(amount for amount, trains in everything if trains)
        passes = self._passes_in_step
        # Gradients go to their owners: from stage 2 on with each backward pass, since nobody has room for all of them.
        reduced = trained * (passes.backward if self._stage > 1 else 1)
        if self._stage < 3:
            return others * (reduced + trained)  # and the updated weights come back
        return others * (sum(amount for amount, _ in everything) * (passes.forward + passes.backward) + reduced)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._zero.param_groups
        return groups

    def weights(self) -> dict[str, Tensor]:
        return self._weights(everywhere=False)

    def _weights(self, everywhere: bool) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        found = {}
        for name, tensor in self.model.state_dict().items():
            with self._gathered([parameters[name]] if name in parameters else []):
                if everywhere or self.accelerator.is_main_process:
                    found[name] = parameters.get(name, tensor).detach().cpu().clone()
        return found

    def optimizer_state(self) -> OptimizerState:
        found = self._state(everywhere=False)
        return {**self._resting, **found} if self.accelerator.is_main_process else {}

    def _state(self, everywhere: bool) -> OptimizerState:
        """Of what trains now and has trained for a step; on rank 0, or on every rank."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found: OptimizerState = {}
        for parameter, name in self._names.items():
            if name not in self._group_of or not (step := self._steps(name)):
                continue
            moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
            if everywhere or self.accelerator.is_main_process:
                kept = {kind: value.cpu().view(self._shape(parameter)) for kind, value in moments.items()}
                found[name] = {"step": torch.tensor(float(step)), **kept}
        return found

    def _flat_parts(self) -> list[tuple[int, Tensor]]:
        """(number of its group, this rank's part) of each tensor that torch's optimiser steps."""
        zero = self._zero
        if self._stage == 3:
            return [(zero.sub_group_to_group_id[n], flat) for n, flat in enumerate(zero.fp32_partitioned_groups_flat)]
        return list(enumerate(zero.single_partition_of_fp32_groups))

    def _steps(self, name: str) -> int:
        """How many steps a parameter has been trained for."""
        kept = [self._zero.optimizer.state.get(flat) for n, flat in self._flat_parts() if n == self._group_of[name]]
        return int(kept[0]["step"]) if kept and kept[0] else 0

    def _put_state(self, state: OptimizerState) -> None:
        """Every parameter gets a state, new ones one of zeros: DeepSpeed looks at what there is in the first step, when
        torch has made that of the first group alone."""
        steps = {self._group_of[name]: kept["step"] for name, kept in state.items()}
        for number, flat in self._flat_parts():
            step = steps.get(number, torch.tensor(0.0)).to(flat.device, torch.float32, copy=True)
            self._zero.optimizer.state[flat] = {"step": step, **{kind: torch.zeros_like(flat) for kind in MOMENTS}}
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()
        for parameter, name in self._names.items():
            for kind in MOMENTS if name in state else ():
                self._put(parameter, state[name][kind], kind)

    def _put(self, parameter: nn.Parameter, whole: Tensor, kind: str | None = None) -> None:
        """Writes this rank's part of a moment, or, without a kind, of the weights that the optimiser steps."""
        from deepspeed import utils

        part, span = whole.to(self.accelerator.device).flatten(), "full"
        if self._stage == 3:
            # The setter of whole tensors fails where the last rank's part is filled up.
            span, size = "local", getattr(parameter, "ds_tensor").numel()  # noqa: B009  (DeepSpeed adds it)
            part = nn.functional.pad(part, (0, size * world.connected().world_size - part.numel()))
            part = part.narrow(0, size * world.connected().rank, size)
        if kind is None:
            getattr(utils, f"safe_set_{span}_fp32_param")(parameter, part)
        else:
            getattr(utils, f"safe_set_{span}_optimizer_state")(parameter, part, kind)

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Mapping[str, Tensor]]) -> None:
        assert self._deepspeed is None, "before the first stage"
        self.model.load_state_dict(dict(weights))
        self._resting = {name: dict(kept) for name, kept in optimizer.items()}


def import_deepspeed() -> Any:
    """DeepSpeed, which by itself would first compile an exchange by shared memory for CPUs, which only its inference
    uses."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
