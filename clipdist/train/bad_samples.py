"""`bad_samples.jsonl`: the samples of a run that could not be read, and which stood in for them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipdist import world
from clipdist.errors import UserError, disk_errors
from clipdist.train.outage import AppendedFile
from clipdist.train.records import BAD_SAMPLES, keep_records


class BadSamples:
    """The file of a run that goes on from `step`: what was noted at that step or later, which is about to be trained
    again, is removed. Every rank constructs it, rank 0 writes."""

    def __init__(self, run: Path, step: int) -> None:
        self.path = run / BAD_SAMPLES
        self._file: AppendedFile | None = None
        if world.connected().is_main:
            with disk_errors(run):
                keep_records(self.path, lambda record: record["step"] < step)
            self._file = AppendedFile(self.path)

    def note(self, own: Sequence[Any], in_epoch: int, used: int, most: float, shard_set: Any) -> None:
        """Adds a step's records. All ranks call it with their own.

        Raises `UserError` when the epoch, of `used` samples, now has more than the share `most` of bad ones (or than
        one).
        """
        records = [record for part in world.gather_objects(own) for record in part]
        if self._file:
            lines = (json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
            self._file.append("".join(lines).encode())
        if in_epoch > max(1, most * used):
            shown = "; ".join(f"{record.key}: {record.reason}" for record in records[:3])
            raise UserError(
                f"{shard_set}: {in_epoch} unreadable samples in one epoch of {used}, more than "
                f"data.max_bad_fraction={most} allows ({shown}; all are listed in {self.path}); "
                f"run: clipdist verify {shard_set}"
            )

    def sync(self) -> None:
        """Rank 0: as `AppendedFile.sync`."""
        if self._file:
            self._file.sync()
