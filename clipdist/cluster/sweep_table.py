"""What came of a sweep so far: one table, as text, CSV and JSON, and beside them the plot."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.cluster import scheduler
from clipdist.cluster.runs import read_run
from clipdist.cluster.runs_command import aligned, number
from clipdist.cluster.sweep import Record, held, read_record
from clipdist.cluster.sweep_epochs import epochs_of
from clipdist.cluster.sweep_words import in_a_cell, short, shown
from clipdist.data.shards import write_atomically
from clipdist.errors import disk_errors
from clipdist.evaluate.plots import series
from clipdist.train.objective import HIGHER_IS_BETTER
from clipdist.train.records import METRICS, read_records

CSV, JSON, PLOT = "sweep.csv", "sweep.json", "sweep.png"
EPOCHS_CSV, EPOCHS_PLOT = "sweep_epochs.csv", "sweep_epochs.png"


@dataclass(frozen=True)
class Row:
    """One run. What is not known yet is None."""

    run: str
    values: dict[str, Any]
    """Key that varies -> value."""
    state: str
    """As `clipdist runs` has it; besides, where SLURM answers: queued, and ended, which is neither finished nor in the
    queue any more."""
    step: int
    epoch: int | None
    """That the last step lies in, from 1."""
    score: float | None
    """The best validation's."""
    gallery: int | None
    """Of that validation: what its retrieval ranked against."""
    loss: float | None
    """In training, at the last step."""
    seconds: float
    """Of all steps, without validations and pauses."""
    starts: int
    job: str
    epochs: Sequence[Mapping[str, float]] = ()
    """Training and validation, epoch by epoch; `sweep_epochs.epochs_of`."""


@dataclass(frozen=True)
class Results:
    name: str
    keys: dict[str, str]
    """Key that varies -> grid, log, uniform, choice or range."""
    monitor: str
    """What `score` is: `evaluate.monitor`."""
    rows: list[Row]
    """The best first, those without a score last."""

    @property
    def higher_is_better(self) -> bool:
        return HIGHER_IS_BETTER[self.monitor]

    def numeric(self, key: str) -> bool:
        values = [row.values.get(key) for row in self.rows]
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)

    def labels(self, key: str) -> dict[str, str]:
        """Each value of a key, by its JSON text, as short as it can be told from the others."""
        texts = {json.dumps(row.values[key]): row.values[key] for row in self.rows if key in row.values}
        brief = [shown(value) for value in texts.values()]
        if len(set(brief)) == len(brief):
            return dict(zip(texts, brief, strict=True))
        return {text: value if isinstance(value, str) else text for text, value in texts.items()}


def read_results(folder: Path) -> Results:
    """Raises `UserError` where there is no sweep."""
    record = read_record(folder)
    queue = scheduler.queue() if record.jobs else None
    monitor = record.base["evaluate"]["monitor"]
    rows = [_row(folder, name, values, record, queue, monitor) for name, values in record.runs.items()]
    sign = -1.0 if HIGHER_IS_BETTER[monitor] else 1.0
    rows.sort(key=lambda row: (row.score is None, sign * (row.score or 0.0), np.inf if row.loss is None else row.loss))
    return Results(folder.resolve().name, record.keys, monitor, rows)


def _row(
    folder: Path, name: str, values: dict[str, Any], record: Record, queue: dict[str, str] | None, monitor: str
) -> Row:
    run = folder / name
    records, _ = read_records(run / METRICS)
    state = read_run(run, records)
    word = state.state
    if queue is not None and name in record.jobs and word not in ("finished", "stopping", "stopped"):
        found = queue.get(record.jobs[name])
        word = "ended" if found is None else "queued" if found == "PENDING" else word
    steps, scores = series(records, monitor)
    best = gallery = None
    if len(steps):
        place = int(scores.argmax() if HIGHER_IS_BETTER[monitor] else scores.argmin())
        best = float(scores[place])
        sizes = dict(zip(*series(records, "val/gallery"), strict=True))
        gallery = int(sizes[steps[place]]) if steps[place] in sizes else None
    at, per_step = series(records, "perf/step_seconds")
    return Row(
        run=name,
        values=values,
        state=word,
        step=state.step,
        epoch=max((int(one["epoch"]) + 1 for one in records if "train/loss" in one), default=None),
        score=best,
        gallery=gallery,
        loss=state.loss if state.loss is not None and np.isfinite(state.loss) else None,
        seconds=float((np.diff(at, prepend=0.0) * per_step).sum()),
        starts=state.starts,
        job=state.job or record.jobs.get(name, ""),
        epochs=epochs_of(records),
    )


def write_results(folder: Path) -> Results:
    """Brings tables and plots of runs and of their epochs up to date. What has no score and no loss yet has no plot."""
    from clipdist.cluster import sweep_epochs, sweep_plot

    read_record(folder)  # a folder of another kind gets nothing written into it
    with held(folder):
        results = read_results(folder)
        plots = {PLOT: sweep_plot.draw(results), EPOCHS_PLOT: sweep_epochs.draw(results)}
        texts = {CSV: as_csv(results), JSON: as_json(results), EPOCHS_CSV: sweep_epochs.as_csv(results)}
        with disk_errors(folder):
            for name, data in {**{name: text.encode() for name, text in texts.items()}, **plots}.items():
                if data:
                    write_atomically(folder / name, data)
    return results


def as_csv(results: Results) -> str:
    """One line per run, under dotted keys and the names of metrics."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measures = (results.monitor, "val/gallery", "train/loss", "training_seconds")
    writer.writerow(("run", *results.keys, "state", "step", "epoch", *measures, "starts", "job"))
    for row in results.rows:
        values = [in_a_cell(row.values.get(key)) for key in results.keys]
        measured = (row.score, row.gallery, row.loss, round(row.seconds, 1))
        writer.writerow((row.run, *values, row.state, row.step, row.epoch, *measured, row.starts, row.job))
    return text.getvalue()


def as_json(results: Results) -> str:
    rows = [asdict(row) for row in results.rows]
    head = {"sweep": results.name, "monitor": results.monitor, "higher_is_better": results.higher_is_better}
    return json.dumps({**head, "keys": results.keys, "runs": rows}, indent=1, ensure_ascii=False) + "\n"


def as_text(results: Results) -> str:
    """For a terminal. A run is told by its values; its name, which is made of them, comes last."""
    labels = {key: results.labels(key) for key in results.keys}
    heads = (results.monitor.removeprefix("val/"), "gallery")
    rows: list[Sequence[str]] = [
        (*map(short, results.keys), "state", *heads, "loss", "step", "epoch", "training", "starts", "run")
    ]
    for row in results.rows:
        values = [labels[key].get(json.dumps(row.values.get(key)), "") for key in results.keys]
        score = (number(row.score, ".4f"), number(row.gallery, ",d"), number(row.loss, ".4f"))
        done = (f"{row.step:,}", number(row.epoch, "d"), duration(row.seconds), str(row.starts))
        rows.append((*values, row.state, *score, *done, row.run))
    texts = {column for column, key in enumerate(results.keys) if not results.numeric(key)}
    return aligned(rows, left={*texts, len(results.keys), len(rows[0]) - 1})


def duration(seconds: float) -> str:
    """Readable: 0:07, 12:30, 3:05:00; hours, minutes, seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
