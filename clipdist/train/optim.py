"""Optimiser and learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from clipdist.errors import UserError
from clipdist.model.tower_model import TowerModel
from clipdist.settings import Share, settings

Beta = Annotated[float, Field(ge=0, lt=1)]


@settings
class OptimConfig:
    lr: NonNegativeFloat = 5e-4
    """Learning rate after the warm-up, of AdamW."""
    image_lr_scale: NonNegativeFloat = 1.0
    """Multiplies `lr` for the image tower; likewise for the text tower. What stands over them uses `lr`."""
    text_lr_scale: NonNegativeFloat = 1.0
    """As `image_lr_scale`."""
    weight_decay: NonNegativeFloat = 0.1
    """On matrices; never on biases, norms and the temperature."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """AdamW's decays of the mean gradient and of its square."""
    eps: NonNegativeFloat = 1e-6
    """AdamW's, added to the root of the mean square."""
    schedule: Literal["cosine", "constant", "plateau"] = "cosine"
    """After the warm-up. cosine: falls until the last step; constant: stays; plateau: falls when validation no longer
    improves."""
    warmup_steps: NonNegativeInt = 0
    """Linear from 0; a number of steps."""
    min_lr_fraction: Share = 0.0
    """Where the cosine ends and below which the plateau does not go, as a share of `lr`."""
    plateau_factor: Share = 0.5
    """What the learning rate is multiplied by then."""
    plateau_patience: NonNegativeInt = 2
    """Validations without improvement before the learning rate is multiplied by `plateau_factor`."""


def build_optimizer(model: TowerModel, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over all parameters, frozen ones too: a frozen one has no gradient and is passed over, so stages need
    no rebuilding. Each group carries `lr_scale` and `part`."""
    scales = {"image": config.image_lr_scale, "text": config.text_lr_scale}
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and not name.startswith("temperature.")
        groups.setdefault((part_of(name), decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr_scale": scales.get(part, 1.0),
                "part": part,
            }
            for (part, decays), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


class Schedule:
    """The learning rate as a function of the step; only the plateau schedule remembers anything."""

    def __init__(self, config: OptimConfig, steps: int) -> None:
        if config.warmup_steps >= steps > 0:
            raise UserError(
                f"optim.warmup_steps={config.warmup_steps}, but the run has only {steps} steps; warm up for fewer"
            )
        self.config, self.steps = config, steps
        self.plateau_factor = 1.0
        self.best: float | None = None
        self.waited = 0

    def lr(self, step: int) -> float:
        """For step number `step`, counted from 0."""
        config = self.config
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        if config.schedule == "cosine":
            done = (step - config.warmup_steps) / max(1, self.steps - config.warmup_steps)
            floor = config.min_lr_fraction
            return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        return config.lr * max(config.min_lr_fraction, self.plateau_factor)

    def apply(self, param_groups: list[dict[str, Any]], step: int) -> float:
        """Sets every group's learning rate and returns the unscaled one."""
        lr = self.lr(step)
        for group in param_groups:
            group["lr"] = lr * group["lr_scale"]
        return lr

    def observe(self, value: float, higher_is_better: bool) -> None:
        """Tells the plateau schedule the outcome of a validation."""
        if self.config.schedule != "plateau":
            return
        value = value if higher_is_better else -value
        if self.best is None or value > self.best:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.config.plateau_patience:
            self.plateau_factor, self.waited = self.plateau_factor * self.config.plateau_factor, 0

    def state_dict(self) -> dict[str, Any]:
        return {"plateau_factor": self.plateau_factor, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plateau_factor, self.best, self.waited = state["plateau_factor"], state["best"], state["waited"]


def part_of(name: str) -> str:
    """Of a parameter's name: `image`, `text`, or `head`, which is all that stands over the towers."""
    part = name.split(".")[0]
    return part if part in ("image", "text") else "head"


def gradient_norms(gradients: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """L2 norm of the gradient of each part: image, text, and head; 0 of one that has none."""
    parts: dict[str, list[torch.Tensor]] = {"image": [], "text": [], "head": []}
    for name, gradient in gradients:
        parts[part_of(name)].append(gradient)
    return {part: float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0 for part, grads in parts.items()}


def moving_statistics(model: TowerModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(buffer, copy of it) of every batch normalisation that is about to update its running statistics."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training]
    return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
