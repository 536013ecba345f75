"""Asks whoever trains a run to stop: a SLURM job through `scancel`, a process of this machine by its signal."""

import os
import re
import shutil
import signal
import socket
from pathlib import Path

from clipdist.cluster import scheduler
from clipdist.train.run_folder import LOCK


def ask(run: Path, job: str) -> str:
    """What was done, in words. `job` is SLURM's number, empty without one."""
    if job and shutil.which("scancel"):
        done = scheduler.ask("scancel", "--signal=USR1", job)
        if done.returncode == 0:
            return f"asked job {job} to save and end"
        return f"job {job} cannot be asked ({done.stderr.strip()}); it will not go back into the queue"
    held = (run / LOCK).read_text(encoding="utf-8") if (run / LOCK).exists() else ""
    holder = re.fullmatch(r"process (\d+) on (\S+)\n?", held)
    if holder and holder[2] == socket.gethostname() and _trains(int(holder[1]), run):
        os.kill(int(holder[1]), signal.SIGUSR1)
        return f"asked process {holder[1]} to save and end"
    where = f": {held.strip()}" if held else ""
    return f"nobody trains it on this machine{where}; a job of it will not go back into the queue"


def _trains(pid: int, run: Path) -> bool:
    """Whether the process still holds the run's lock, and is no other that has got its number since."""
    try:
        files = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return False
    return str((run / LOCK).resolve()) in files
