"""Which implementation of the loss' tiles runs: PyTorch everywhere (`tiles.py`), Triton where it can (`kernel.py`)."""

import functools
import importlib.util
import logging
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from clipdist.errors import UserError
from clipdist.loss import tiles

logger = logging.getLogger(__name__)

Backend = Literal["auto", "tiles", "kernel"]
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)


def choose(wanted: Backend, features_bD: Tensor) -> ModuleType:
    """`clipdist.loss.kernel` or `clipdist.loss.tiles`, which have the same functions, for features such as these.

    `auto` says once, by the log, when features on a GPU have to do without the kernel. Raises `UserError` where
    `kernel` cannot run; on a CPU it can when Triton interprets its kernels (TRITON_INTERPRET=1).
    """
    if wanted == "tiles" or (wanted == "auto" and not features_bD.is_cuda):
        return tiles
    obstacle = _obstacle(features_bD.device, features_bD.dtype)
    if obstacle is None:
        from clipdist.loss import kernel  # needs Triton, which not every machine has

        return kernel
    if wanted == "kernel":
        raise UserError(f"loss.backend=kernel cannot run here: {obstacle}; use loss.backend=auto or tiles")
    _say_once(obstacle)
    return tiles


@functools.cache
def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run on features of this kind; None if it can."""
    if dtype not in KERNEL_DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in KERNEL_DTYPES)
        return f"the features are {str(dtype).removeprefix('torch.')}, expected one of {names}"
    if device.type != "cuda" and not _interpreted():
        return f"the features are on the device {device.type}, expected an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        return f"the GPU has compute capability {found}, expected at least {least}"
    return _cannot_start()


def _interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, as tests do."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _cannot_start() -> str | None:
    """What Triton says when it cannot reach the driver; the first time on a machine it needs a C compiler for that."""
    from triton.runtime import driver

    try:
        driver.active.utils  # noqa: B018
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"Triton does not start ({reason[0]})"
    return None


@functools.cache
def _say_once(obstacle: str) -> None:
    logger.warning("the contrastive loss runs without its GPU kernel: %s", obstacle)
