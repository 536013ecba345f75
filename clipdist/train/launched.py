"""The engine that the launcher asks for: `accelerate launch --config_file launch/accelerate/<engine>.yaml`.

The launcher tells through the environment. Accelerate would take its word only on GPUs, and on CPUs train replicas
without a word; so Accelerate is asked for the process group, the precision and the scaler of fp16 alone, and the engine
is ours to make: the same one with and without GPUs.
"""

import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from clipdist import world
from clipdist.errors import UserError
from clipdist.model.tower_model import TowerModel
from clipdist.train.engine import Engine, Precision

if TYPE_CHECKING:
    from clipdist.config import RunConfig

logger = logging.getLogger(__name__)

Kind = Literal["replicated", "fsdp", "deepspeed"]
USES = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
# What the recipe decides, or what would train another model than the other engines.
NOT_OURS = ("optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast", "data_types", "compression_training")


def kind() -> Kind:
    """What the launcher asks for; `replicated` without one."""
    asked: list[Any] = [name for variable, name in USES.items() if _true(variable)]
    if len(asked) > 1:
        raise UserError("the launcher asks for FSDP and DeepSpeed at once; use one file of launch/accelerate")
    return asked[0] if asked else "replicated"


def _true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def make_accelerator(precision: Precision, tf32: bool = False, hang_minutes: float = 0.0) -> Accelerator:
    """Accelerate's state for this process; `tf32` allows it to GPUs, or forbids it. A collective fails after twice
    `hang_minutes`, by when the process should have ended itself (see heartbeat.py)."""
    use_cpu = not torch.cuda.is_available()
    # The older of torch's two ways: it sets both, and setting the newer one makes reading this one an error.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    # Buffers need no broadcast: batch statistics are synchronised or frozen, so ranks never differ in them.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    mixed = "no" if precision == "fp32" else precision
    handlers: list[Any] = [ddp]
    if hang_minutes:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=2 * hang_minutes)))
    with _without(USES):
        return Accelerator(mixed_precision=mixed, cpu=use_cpu, kwargs_handlers=handlers)


@contextmanager
def _without(variables: dict[str, str]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def make_engine(accelerator: Accelerator, model: TowerModel, config: "RunConfig") -> Engine:
    """All ranks call it with equal models, in a process group if there are several."""
    from clipdist.train.replicated import ReplicatedEngine

    asked = kind()
    if asked != "replicated" and not torch.distributed.is_initialized():
        logger.warning("the launcher asks for %s, and one process has nobody to share with: trained without", asked)
        asked = "replicated"
    if asked == "replicated":
        return ReplicatedEngine(accelerator, model, config.optim)
    if asked == "fsdp":
        from clipdist.train.fully_sharded import FullyShardedEngine, ShardingOptions

        options = ShardingOptions(
            reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false",
            offload_to_cpu=_true("FSDP_OFFLOAD_PARAMS"),
        )
        return FullyShardedEngine(accelerator, model, config.optim, options)
    from clipdist.train.zero import ZeroEngine

    return ZeroEngine(accelerator, model, config.optim, deepspeed_config(config))


def check_engine(config: "RunConfig") -> None:
    """Refuses what the engine cannot do, with a `UserError`; before anything is loaded."""
    from clipdist.train.feature_cache import cached_towers

    asked = kind()
    if asked == "fsdp":
        _check_fsdp(config)
    elif asked == "deepspeed":
        _check_deepspeed(config)
    gathers = asked == "fsdp" or (asked == "deepspeed" and _stage(config) == 3)
    if gathers and (cached := cached_towers(config.model)):
        raise UserError(
            f"model.{cached[0]}.cache_features needs towers that a rank can run by itself, and FSDP2 and ZeRO 3 gather "
            f"their weights from all; set it to false, or use gpu.yaml, zero1.yaml or zero2.yaml"
        )


def _stage(config: "RunConfig") -> int:
    return int(deepspeed_config(config)["zero_optimization"]["stage"])


def _check_fsdp(config: "RunConfig") -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the launcher asks for FSDP 1; set fsdp_version: 2, as launch/accelerate/fsdp2.yaml does")
    for variable, key, instead in (
        ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing", "checkpoint_activations in the recipe"),
        ("FSDP_IGNORED_MODULES", "fsdp_ignored_modules", "nothing: all weights are sharded"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "fsdp_transformer_layer_cls_to_wrap", "nothing: each block is a unit"),
    ):
        if os.environ.get(variable, "").lower() not in ("", "false", "none"):
            raise UserError(f"the launcher's {key} is not followed here; remove it, and set {instead}")
    if _true("FSDP_OFFLOAD_PARAMS") and not torch.cuda.is_available():
        raise UserError("the launcher's fsdp_offload_params needs GPUs; set it to false")


def _check_deepspeed(config: "RunConfig") -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("the launcher asks for DeepSpeed, which is not installed; run: pip install deepspeed")
    if config.train.precision == "fp16":
        raise UserError("train.precision=fp16 is not trained with DeepSpeed; use bf16 or fp32, or another engine")
    if _stage(config) == 3 and config.train.ema:
        raise UserError("train.ema is not kept with ZeRO stage 3; set it to 0, or use zero2.yaml or fsdp2.yaml")
    if config.train.compile:
        raise UserError("train.compile is not supported with DeepSpeed; set it to false, or use another engine")


def deepspeed_config(config: "RunConfig") -> dict[str, Any]:
    """What DeepSpeed gets: the launcher's file, completed by the recipe.

    Raises `UserError` where the file is missing or damaged, says what the recipe says, or asks for what is not ZeRO.
    """
    name = os.environ.get(CONFIG_FILE, "")
    if name in ("", "none", "None"):
        raise UserError("the launcher names no deepspeed_config_file; use launch/accelerate/zero2.yaml, or another")
    try:
        made = json.loads(Path(name).read_text(encoding="utf-8"))
        stage = made["zero_optimization"]["stage"]
    except OSError as error:
        raise UserError(
            f"deepspeed_config_file {name}: cannot be read ({error.strerror}); give a path that can"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"deepspeed_config_file {name}: expected JSON with zero_optimization.stage ({error!r})"
        ) from None
    if stage not in (1, 2, 3):
        raise UserError(f"{name}: zero_optimization.stage={stage}, expected 1, 2 or 3; for 0 use gpu.yaml")
    if extra := [key for key in NOT_OURS if key in made]:
        raise UserError(f"{name}: {', '.join(extra)}: the recipe's optim and train.precision decide; remove them")
    for part in ("offload_optimizer", "offload_param"):
        device = (made["zero_optimization"].get(part) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"{name}: zero_optimization.{part}.device={device}, expected cpu or none")
    ranks = world.announced().world_size
    rows = config.train.global_batch // ranks
    ours = {
        "gradient_clipping": config.train.max_grad_norm,  # left out, it would be 1.0
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": rows,
        "train_batch_size": rows * ranks,
    }
    for key, value in ours.items():
        if made.get(key, "auto") not in ("auto", value):
            raise UserError(f"{name}: {key}={made[key]}, but the recipe makes it {value}; write auto")
    return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **made, **ours}
