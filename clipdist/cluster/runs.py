"""What the folders of runs tell about them, without asking the processes that train."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdist.cluster.meeting import last_beat
from clipdist.errors import UserError
from clipdist.train.records import METRICS, read_records

STOP = "stop"
"""A file of this name in a run's folder: the next stop on request is for good, and no job goes back into the queue."""
JOBS = ".jobs"
"""The folder beside the runs in which the nodes of jobs leave notes for each other (see meeting.py)."""
LOGS = "logs"
"""The folder in a run's own with what each rank said, below one for each start: <job>-<requeues>-<attempt>."""
QUIET_SECONDS = 300.0


@dataclass(frozen=True)
class RunState:
    """`state`: new, training, quiet (no sign of life for a while: waiting in a queue, validating, stopped or dead),
    stopping or finished."""

    name: str
    state: str
    step: int
    loss: float | None
    pairs_per_second: float | None
    score: float | None
    """What `evaluate.monitor` chose the best model by."""
    seconds_since: float | None
    """Since the last sign of life: a line of the metrics, or a step that all ranks of its job have made."""
    starts: int
    lost_steps: int
    job: str
    """SLURM's number of the last start's job; empty without."""


def read_runs(folders: list[Path]) -> list[RunState]:
    """Of each folder that is a run, and of the runs in each that holds some; the latest last.

    Raises `UserError` where there is none.
    """
    return sorted(map(read_run, find_runs(folders)), key=lambda run: -(run.seconds_since or 0.0))


def find_runs(folders: list[Path]) -> list[Path]:
    """Each folder that is a run, and the runs in each that holds some. Raises `UserError` where there is none."""
    found = [path for folder in folders for path in _runs_in(folder)]
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: no run there; expected runs/<name>, or a folder of runs")
    return found


def _runs_in(folder: Path) -> list[Path]:
    if (folder / "config.yaml").exists():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/config.yaml"))


def read_run(folder: Path, records: list[dict[str, Any]] | None = None) -> RunState:
    """`records`: those of its metrics, where they have been read already."""
    training: dict[str, Any] = {}
    metrics = folder / METRICS
    for record in read_records(metrics)[0] if records is None else records:
        training = record if "train/loss" in record else training
    state = newest_state(folder)
    environment = folder / "environment.json"
    starts = json.loads(environment.read_text(encoding="utf-8"))["starts"] if environment.exists() else []
    job = str(starts[-1].get("job", "")) if starts else ""
    signs = [metrics.stat().st_mtime] if metrics.exists() else []
    if job and (beat := last_beat(folder.parent / JOBS / job)):
        signs.append(beat)
    since = time.time() - max(signs) if signs else None
    if state.get("finished"):
        word = "finished"
    elif (folder / STOP).exists():
        word = "stopping" if since is not None and since < QUIET_SECONDS else "stopped"
    elif since is None:
        word = "new"
    else:
        word = "training" if since < QUIET_SECONDS else "quiet"
    return RunState(
        name=folder.name,
        state=word,
        step=int(training.get("step", 0)),
        loss=training.get("train/loss"),
        pairs_per_second=training.get("perf/samples_per_second"),
        score=state.get("best"),
        seconds_since=since,
        starts=len(starts),
        lost_steps=sum(start.get("lost_steps", 0) for start in starts),
        job=job,
    )


def newest_state(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run says about it; empty without one."""
    try:
        latest = (folder / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
        state: dict[str, Any] = json.loads((folder / "checkpoints" / latest / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state
