"""Where what a run's jobs and ranks said lies."""

import os
import re
from contextlib import suppress
from pathlib import Path

from clipdist.cluster.runs import LOGS
from clipdist.errors import UserError

OUTPUTS = "outputs"
"""A file beside the folders of the starts: the paths of the jobs' own output, one on a line."""


def find_log(run: Path, rank: int | None = None, start: str | None = None) -> Path:
    """The output of the run's latest job; of one rank alone, that of its latest start, or of `start`.

    Raises `UserError` where there is none, with the names of those that there are.
    """
    _check_run(run)
    if rank is None:
        if found := _outputs(run):
            return found[-1]
        raise UserError(f"{run}: no job of it has left its output anywhere; a run without a job prints to its terminal")
    starts = _starts(run)
    if start is not None:
        starts = [folder for folder in starts if folder.name == start]
    if not starts:
        there = ", ".join(folder.name for folder in _starts(run)) or "none: they are kept when a start has ended"
        raise UserError(f"{run / LOGS}: {f'no start {start}' if start else 'no start'}; there are: {there}")
    path = starts[-1] / f"rank-{rank}.log"
    if not path.exists():
        there = ", ".join(sorted(other.stem.removeprefix("rank-") for other in starts[-1].glob("rank-*.log")))
        raise UserError(f"{path}: no rank {rank} there; there are: {there}")
    return path


def _check_run(run: Path) -> None:
    if not run.is_dir():
        raise UserError(f"{run}: no run there; expected runs/<name>")


def listed(run: Path) -> list[str]:
    """Paths of all output that is left, jobs' first; each in the order of time. `UserError` where there is no run."""
    _check_run(run)
    files = [path for folder in _starts(run) for path in sorted(folder.glob("rank-*.log"), key=_number)]
    return [str(path) for path in [*_outputs(run), *files]]


def note_output(run: Path, path: str) -> None:
    """Notes the file that a job's output goes to: `path`, or, where that is empty, what this process writes to."""
    path = path or os.path.realpath("/proc/self/fd/1")
    if not Path(path).is_file():
        return  # a terminal, a pipe
    with suppress(OSError):  # a convenience: nothing of the run hangs on it
        (run / LOGS).mkdir(parents=True, exist_ok=True)
        with open(run / LOGS / OUTPUTS, "a", encoding="utf-8") as file:
            file.write(f"{path}\n")


def _outputs(run: Path) -> list[Path]:
    """Of the run's jobs, oldest first, each once."""
    noted = run / LOGS / OUTPUTS
    lines = noted.read_text(encoding="utf-8").splitlines() if noted.exists() else []
    return [Path(line) for line in dict.fromkeys(lines[::-1])][::-1]


def _number(path: Path) -> int:
    found = re.search(r"(\d+)$", path.stem)
    return int(found[1]) if found else 0


def _starts(run: Path) -> list[Path]:
    """Folders with the ranks' own, oldest first."""
    return sorted((path for path in (run / LOGS).glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
