"""Where a run's numbers go: `metrics.jsonl` and TensorBoard, from rank 0; and what only a GPU can tell."""

import json
import math
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt

from clipdist import world
from clipdist.errors import disk_errors
from clipdist.settings import settings
from clipdist.train.outage import AppendedFile
from clipdist.train.records import METRICS, keep_records, read_records

if TYPE_CHECKING:
    from clipdist.train.engine import Engine
    from clipdist.train.event_file import EventFile


class Peak(NamedTuple):
    """FLOP/s of a GPU without sparsity, by its data sheet: on tensor cores in half precision, on tensor cores in TF32,
    and in float32 proper. None: it has none."""

    half: float
    tf32: float | None
    fp32: float
    has_bf16: bool = True


# By the word that the device's name holds. Of a card in several forms the longer name stands first.
PEAKS = {
    "GB200": Peak(2.5e15, 1.25e15, 90e12),
    "B200": Peak(2.25e15, 1.1e15, 80e12),
    "GH200": Peak(989e12, 494e12, 67e12),
    "H200": Peak(989e12, 494e12, 67e12),
    "H100 PCIe": Peak(756e12, 378e12, 51e12),
    "H100 NVL": Peak(835e12, 417e12, 60e12),
    "H100": Peak(989e12, 494e12, 67e12),
    "A100": Peak(312e12, 156e12, 19.5e12),
    "A40": Peak(149.7e12, 74.8e12, 37.4e12),
    "A30": Peak(165e12, 82e12, 10.3e12),
    "A10G": Peak(70e12, 35e12, 35e12),
    "A10": Peak(125e12, 62.5e12, 31.2e12),
    "L40S": Peak(362e12, 183e12, 91.6e12),
    "L4": Peak(121e12, 60e12, 30.3e12),
    "V100-PCIE": Peak(112e12, None, 14e12, has_bf16=False),
    "V100": Peak(125e12, None, 15.7e12, has_bf16=False),
    "T4": Peak(65e12, None, 8.1e12, has_bf16=False),
}


@settings
class LogConfig:
    every_steps: PositiveInt = 10
    """Steps between two lines of metrics."""
    tensorboard: bool = True
    """Writes the same numbers for TensorBoard."""


def peak_flops(device_name: str, precision: str, tf32: bool = False) -> float | None:
    """The peak, in FLOP/s, that a run in `precision` (fp32, bf16, fp16) can be measured by; `tf32` says whether fp32
    products are taken in TF32.

    None, so that no share of it is reported, for a device that is not listed (every CPU), and for bf16 on one without
    it, where it is emulated.
    """
    found = next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)
    if found is None or (precision == "bf16" and not found.has_bf16):
        return None
    if precision == "fp32":
        return found.tf32 if tf32 and found.tf32 else found.fp32
    return found.half


def device_peak(device: torch.device, precision: str) -> float | None:
    """`peak_flops` of this rank's device, as torch is set now."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_flops(torch.cuda.get_device_name(device), precision, tf32)


def last_step(run: Path) -> int:
    """The last step that a run has logged; 0 before the first."""
    records, _ = read_records(run / METRICS)
    return max((int(record.get("step", 0)) for record in records), default=0)


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard's event file. Resuming at a step removes what was logged after it, so
    that no step is there twice.

    While the disk refuses to be written, what belongs there is kept in memory; it follows, in order, with a later line.
    """

    def __init__(self, folder: Path, config: LogConfig, resumed_step: int) -> None:
        path = folder / METRICS
        self._board: EventFile | None = None
        with disk_errors(folder):
            keep_records(path, lambda record: record["step"] <= resumed_step)
            if config.tensorboard:
                # Imported here: it takes a second, and only rank 0 needs it.
                from clipdist.train import event_file

                self._board = event_file.EventFile(folder / "tensorboard", resumed_step + 1)
        self._lines = AppendedFile(path)

    def write(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        """One line; numbers also go to TensorBoard. A number that is not finite is written as null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        time = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"step": step, "epoch": epoch, "time": time, **plain}) + "\n"
        self._lines.append(line.encode())
        if self._board:
            self._board.scalars({k: v for k, v in values.items() if isinstance(v, int | float)}, step)

    def image(self, name: str, pixels_HW3: np.ndarray, step: int) -> None:
        if self._board:
            self._board.image(name, pixels_HW3, step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        if self._board:
            self._board.histogram(name, values, step)

    def hyper_parameters(self, config: dict[str, Any], scores: dict[str, float]) -> None:
        """The run's row in TensorBoard's table of hyper-parameters."""
        if self._board:
            self._board.hyper_parameters(config, scores)

    def sync(self) -> None:
        """Puts everything so far on disk; called before a checkpoint is taken for good, and at the end.

        Raises `DiskError` while the disk refuses; nothing is lost by that.
        """
        self._lines.sync()
        if self._board:
            self._board.file.sync()


def memory(device: torch.device, *, start_anew: bool = True) -> dict[str, float]:
    """Peak memory in GiB, as `perf/` keys.

    Of a GPU: what tensors held at most since this was last called with `start_anew`, and what torch reserved for them,
    so that the curve shows when the peak came. Of a CPU: the most that this process ever held; it cannot start anew.
    """
    if device.type == "cuda":
        found = {
            "perf/memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "perf/memory_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
        if start_anew:
            torch.cuda.reset_peak_memory_stats(device)
        return found
    return {"perf/memory_gib": _peak_bytes() / 2**30}


def _peak_bytes() -> int:
    """The most that this process ever held, as Linux keeps it of each program. getrusage's answer, for systems without
    that record, may be the peak of whoever started the process."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    if kib := next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None):
        return int(kib) * 1024
    import resource  # there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def communication(engine: "Engine", steps: int) -> dict[str, float]:
    """Bytes sent by this rank and seconds spent, per step and collective, over the `steps` since the last call; {} in
    one process. Bytes are by formula, seconds are measured: see `world.Traffic` and the engine."""
    taken = world.traffic.take()
    if world.connected().world_size == 1:
        return {}
    found: dict[str, float] = {}
    for purpose, sent in taken.items():
        found[f"perf/bytes_sent_{purpose}"] = sent.bytes / max(1, steps)
        found[f"perf/seconds_{purpose}"] = sent.seconds / max(1, steps)
    found["perf/bytes_sent_gradients"] = engine.gradient_bytes()
    if exchange := engine.gradient_exchange():
        found["perf/seconds_gradients"] = exchange.seconds
    return found


def arithmetic(flops_per_step: float, step_seconds: float, devices: int, peak: float | None) -> dict[str, float]:
    """Operations of the global batch, TFLOP/s of each device, and its share of the `peak` (FLOP/s) if that is known."""
    speed = flops_per_step / devices / step_seconds
    found = {"perf/flops_per_step": flops_per_step, "perf/tflops_per_device": speed / 1e12}
    return found | ({"perf/mfu": speed / peak} if peak else {})
