"""Which parameters train in which epochs."""

import logging
from typing import Literal

from clipdist.errors import UserError
from clipdist.model.tower_model import TowerModel, total_of
from clipdist.model.towers import ImageTower, TextTower
from clipdist.settings import settings

logger = logging.getLogger(__name__)

Part = int | Literal["all", "none"]


@settings
class StageConfig:
    """From an epoch on, what of each tower trains. What stands over the towers always does."""

    from_epoch: int = 0
    """First epoch of the stage, counted from 0; the first stage begins with 0."""
    image: Part = "all"
    """all, none, or a number: the last so many blocks."""
    text: Part = "all"
    """Likewise."""


def stage_of(stages: tuple[StageConfig, ...], epoch: int) -> StageConfig:
    """The stage in force in an epoch; everything trains when the recipe names no stages.

    Raises `UserError` unless stages begin at epoch 0 and follow in order.
    """
    starts = [stage.from_epoch for stage in stages]
    if stages and (starts[0] != 0 or sorted(set(starts)) != starts):
        raise UserError(f"train.stages: from_epoch is {starts}, expected to begin with 0 and to rise")
    in_force = StageConfig()
    for stage in stages:
        if stage.from_epoch <= epoch:
            in_force = stage
    return in_force


def apply_stage(model: TowerModel, stage: StageConfig, unused: frozenset[str]) -> None:
    """Sets `requires_grad` of every parameter; `unused` names those that never reach the output and stay frozen."""
    for prefix, tower in model.towers.items():
        used = {name for name, _ in tower.named_parameters() if f"{prefix}.{name}" not in unused}
        chosen = _chosen(tower, getattr(stage, prefix), used)
        for name, parameter in tower.named_parameters():
            parameter.requires_grad_(name in chosen)
    model.train(model.training)


def _chosen(tower: ImageTower | TextTower, part: Part, used: set[str]) -> set[str]:
    if part == "none" or part == 0:
        return set()
    if part == "all":
        return used
    # A pooler that is not used must not count as the last block.
    blocks = [names for block in tower.blocks() if (names := used.intersection(block))]
    if part < 0 or part > len(blocks):
        raise UserError(f"train.stages: {part} blocks asked for, the {type(tower).__name__} has {len(blocks)}")
    return {name for block in blocks[-part:] for name in block}


def unused_parameters(model: TowerModel) -> frozenset[str]:
    """Names of parameters that no gradient reaches, such as the pooler of a BERT whose tokens are averaged.

    Found by one small step, because a list of architectures would never be complete. Left trainable, they would make
    distributed data parallelism wait for gradients that never come.
    """
    was_training, device = model.training, next(model.parameters()).device
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(True)
    model.eval()
    total_of(model(*model.example(1, 4, device))).backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(needed[name])
    model.train(was_training)
    if unused:
        logger.info("%d parameters never reach the output and stay frozen: %s", len(unused), ", ".join(sorted(unused)))
    return frozenset(unused)
