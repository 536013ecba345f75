"""What TensorBoard reads, written so that a disk may fail.

torch's `SummaryWriter` writes in a thread of its own, which ends at the first error of the disk, with what it had still
to write. So torch only makes the summaries here; the file is ours, and keeps what the disk refuses.
"""

import io
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from clipdist.train.outage import AppendedFile

VERSION = "brain.Event:2"
BINS = 64


class EventFile:
    """An event file in `folder`, which is made. TensorBoard hides what files before it hold of `first_step` and later.

    Events are written as they come. A kill loses what a disk was refusing at that time, which `metrics.jsonl`, on the
    same disk, lacks too.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()  # to the nanosecond: two starts within a second must not meet in one file
        name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now % 10**9}"
        self.file = AppendedFile(folder / name)
        start = SessionLog(status=SessionLog.START)
        self._add(
            Event(file_version=VERSION),
            Event(step=first_step, file_version=VERSION),
            Event(step=first_step, session_log=start),
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._add(*(Event(step=step, summary=summary.scalar(key, value)) for key, value in values.items()))

    def image(self, name: str, pixels_HW3: np.ndarray, step: int) -> None:
        """uint8 [H, W, 3]"""
        self._add(Event(step=step, summary=summary.image(name, pixels_HW3, dataformats="HWC")))

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Values in any shape, at least one."""
        self._add(Event(step=step, summary=summary.histogram(name, values, bins=BINS)))

    def hyper_parameters(self, config: dict[str, Any], scores: dict[str, float]) -> None:
        """The run's row in the table of hyper-parameters."""
        plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in config.items()}
        best = {f"best/{k}": v for k, v in scores.items()}
        self._add(*(Event(summary=one) for one in summary.hparams(plain, best)))
        self.scalars(best, 0)

    def _add(self, *events: Event) -> None:
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        self.file.append(records.getvalue())
