"""What a recipe's `train` section can say, and what of a recipe is checked before anything is loaded."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from clipdist import world
from clipdist.errors import UserError
from clipdist.loss import ContrastiveLoss
from clipdist.model.freeze import StageConfig
from clipdist.settings import settings
from clipdist.train.engine import Precision
from clipdist.train.launched import check_engine
from clipdist.train.objective import IGNORED, MONITORS

if TYPE_CHECKING:
    from clipdist.config import RunConfig


@settings
class TrainConfig:
    global_batch: int
    """Pairs per step over all ranks: each is contrasted with all the others. Images, for a classifier."""
    epochs: int
    """Passes over the training split."""
    micro_batch: NonNegativeInt | Literal["auto"] = 0
    """Pairs per rank that are in memory at a time, at most; 0: all of the rank's share; auto: as many as fit, by what a
    row is measured to need. Less than the rank's share changes no gradient; it costs a second forward pass, but for a
    classifier."""
    precision: Precision = "fp32"
    """Of the forward and backward passes; weights stay float32. bf16 and fp16 are autocast."""
    tf32: bool = False
    """Lets GPUs round the factors of float32 matrix products to 10 bits: faster, and no longer float32's precision."""
    max_grad_norm: NonNegativeFloat = 1.0
    """0: gradients are not clipped."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an average of the weights over steps, which is then what is validated, kept and reported; such as 0.999.
    0: none."""
    stages: tuple[StageConfig, ...] = ()
    """What trains when; everything from the start when empty."""
    compile: bool = False
    """torch.compile for the towers."""
    processes: NonNegativeInt = 0
    """How many processes the run must have; 0: as many as are launched."""
    hang_minutes: NonNegativeFloat = 30.0
    """Without a step, or a batch of a validation, for so long, every rank writes its stacks and ends. 0: never. The
    longest step counts: the first, where torch.compile works, or one that waits for a slow disk."""
    max_skipped_in_a_row: NonNegativeInt = 5
    """Steps with a non-finite loss or gradient, which change nothing, before the run stops."""


def check(config: "RunConfig", processes: int | None = None, gpus: bool | None = None) -> None:
    """What types cannot say; `UserError` before anything is loaded. `processes` and `gpus` are those that it is going
    to run on; None: what is here."""
    train = config.train
    if train.global_batch < 2 or train.epochs < 1:
        raise UserError(
            f"train.global_batch={train.global_batch} and train.epochs={train.epochs}: expected at least 2 and 1"
        )
    ranks = world.announced().world_size if processes is None else processes
    gpus = torch.cuda.is_available() if gpus is None else gpus
    if train.global_batch % ranks:
        raise UserError(
            f"train.global_batch={train.global_batch} does not divide by {ranks} processes; choose a multiple of "
            f"{ranks}, or another number of processes"
        )
    towers = (config.model.image, config.model.text)
    if train.micro_batch == "auto" and any(tower.checkpoint_activations for tower in towers):
        raise UserError(
            "train.micro_batch=auto cannot tell what blocks need whose activations are computed twice; set a number, "
            "or checkpoint_activations to false"
        )
    _check_cached_features(config)
    if train.precision == "fp16" and not gpus:
        raise UserError("train.precision=fp16 needs a GPU; without one use bf16 or fp32")
    monitors = MONITORS[config.objective]
    if config.evaluate.monitor not in monitors:
        raise UserError(f"evaluate.monitor={config.evaluate.monitor!r}, expected one of {', '.join(monitors)}")
    _check_ignored(config)
    if config.loss.kind == "sigmoid" and config.model.temperature.bias is None:
        raise UserError("loss.kind=sigmoid needs a logit bias: set model.temperature.bias=-10")
    if config.loss.kind == "infonce" and config.model.temperature.bias is not None:
        raise UserError("loss.kind=infonce has no logit bias, it would cancel out: leave model.temperature.bias away")
    if "/" in config.name or config.name in ("", ".", ".."):
        raise UserError(f"name={config.name!r}: expected a plain folder name")
    ContrastiveLoss(**asdict(config.loss))
    check_engine(config)


def _check_ignored(config: "RunConfig") -> None:
    """`UserError` where a recipe sets what its objective never reads: whoever did so expects something of it."""
    from clipdist.config import flat

    own, found = flat(config), []
    for key in IGNORED[config.objective]:
        section = key.split(".")[0]
        default: Any = type(getattr(config, section))()
        standing = {f"{section}.{name}": value for name, value in flat(default).items()}
        found += [name for name in own if name.startswith(key) and own[name] != standing.get(name)]
    if config.objective == "classify" and any(stage.text != "all" for stage in config.train.stages):
        found.append("train.stages: text")
    if found:
        raise UserError(
            f"objective={config.objective} does not read {', '.join(found)}; leave it out of the recipe, or choose "
            f"another objective"
        )


def _check_cached_features(config: "RunConfig") -> None:
    """`UserError` where features kept on disk would never be read again."""
    for name, tower in (("image", config.model.image), ("text", config.model.text)):
        stages = [stage for stage in config.train.stages if stage.from_epoch < config.train.epochs]
        if tower.cache_features and not any(getattr(stage, name) in ("none", 0) for stage in stages):
            raise UserError(
                f"model.{name}.cache_features: the {name} tower trains in every stage, and its features change with "
                f"each step; set train.stages=[{{from_epoch: 0, {name}: none}}], or model.{name}.cache_features=false"
            )
    if not config.model.image.cache_features:
        return
    settings = {f"data.augment.{key}": value for key, value in config.data.augment.undone.items()}
    if config.model.image.resize == "crop":  # of an image that is not square, it lies elsewhere each time
        settings["model.image.resize"] = "squash"
    if config.data.caption_augment.mixgen:
        settings["data.caption_augment.mixgen"] = "0"
    if settings:
        raise UserError(
            f"model.image.cache_features: no image is ever the same twice; set "
            f"{' '.join(f'{key}={value}' for key, value in settings.items())}, or model.image.cache_features=false"
        )
