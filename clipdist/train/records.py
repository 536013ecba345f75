"""Files of a run with one JSON object per line, to which training appends: `metrics.jsonl` and `bad_samples.jsonl`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipdist.data.shards import write_atomically

METRICS, BAD_SAMPLES = "metrics.jsonl", "bad_samples.jsonl"


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of such a file and the number of lines that are none, such as one torn by a crash; ([], 0) where
    there is no file."""
    if not path.exists():
        return [], 0
    records, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            damaged += 1
    return records, damaged


def keep_records(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Leaves only the lines that are wanted; one without its end, torn by a kill, never is."""
    if not path.exists():
        return
    kept = []
    # At line feeds alone: what `splitlines` takes for line ends besides may stand within a string.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            if wanted(json.loads(line)):
                kept.append(f"{line}\n")
        except (ValueError, KeyError, TypeError):
            continue  # damaged
    write_atomically(path, "".join(kept).encode())
