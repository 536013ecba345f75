"""Where a run's numbers go: `metrics.jsonl` and TensorBoard, from rank 0; and what only a GPU can tell."""

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt

from clipdist.data.shards import write_atomically
from clipdist.settings import settings

# Dense bf16 tensor-core peaks in FLOP/s, without sparsity, from the vendors' data sheets; matched by device name.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
}


@settings
class LogConfig:
    every_steps: PositiveInt = 10
    tensorboard: bool = True


def peak_flops(device_name: str) -> float | None:
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard. Resuming at a step removes what was logged after it, so that no step
    is there twice."""

    def __init__(self, folder: Path, config: LogConfig, resumed_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            self._forget_after(resumed_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
        self._board = None
        if config.tensorboard:
            # Imported here: it takes a second, and only rank 0 needs it.
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def _forget_after(self, step: int) -> None:
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # a line torn by a kill
        write_atomically(self.path, "".join(kept).encode())

    def write(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        """One line; numbers also go to TensorBoard. A number that is not finite is written as null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        time = datetime.now(UTC).isoformat(timespec="seconds")
        self._file.write(json.dumps({"step": step, "epoch": epoch, "time": time, **plain}) + "\n")
        self._file.flush()
        if self._board:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, step)

    def image(self, name: str, pixels_HW3: np.ndarray, step: int) -> None:
        if self._board:
            self._board.add_image(name, pixels_HW3, step, dataformats="HWC")

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        if self._board:
            self._board.add_histogram(name, values, step)

    def hyper_parameters(self, config: dict[str, Any], scores: dict[str, float]) -> None:
        """The run's row in TensorBoard's table of hyper-parameters."""
        if self._board:
            plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in config.items()}
            self._board.add_hparams(plain, {f"best/{k}": v for k, v in scores.items()}, run_name=".")

    def sync(self) -> None:
        """Puts everything so far on disk; called before a checkpoint is taken for good."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board:
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the device for a GPU, of this process for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
