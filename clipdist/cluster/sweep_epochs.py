"""A sweep epoch by epoch: training loss and validations of all runs beside each other, as CSV and as a plot."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from clipdist.cluster.sweep_plot import LINES, NAMES, TITLE, cut
from clipdist.cluster.sweep_words import in_a_cell, short
from clipdist.evaluate.plots import MUTED, render, style

if TYPE_CHECKING:
    from clipdist.cluster.sweep_table import Results, Row

TRAINING = "train/loss"
MEASURES = {TRAINING: "training loss", **NAMES, "val/cosine_pos": "mean cosine of pairs"}
PANELS = (TRAINING, "val/loss", "val/mean_R@1", "val/cosine_pos", "val/top1", "val/balanced_accuracy")
COLUMNS = 2
NAMED = 2 * len(LINES)
"""So many runs have a colour of their own, the best first; the others are grey."""


def epochs_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """One for each epoch in which something was logged, as it is named, from 1: the mean of its logged training losses,
    and its last validation. A step logged twice, as after a resume, counts once, as logged last."""
    found: dict[str, dict[int, tuple[int, float]]] = {name: {} for name in MEASURES}
    for record in records:
        for name in MEASURES.keys() & record.keys():
            value = record[name]
            if isinstance(value, int | float) and np.isfinite(value) and {"step", "epoch"} <= record.keys():
                found[name][record["step"]] = (record["epoch"] + 1, float(value))
    measured: dict[int, dict[str, list[float]]] = {}
    for name, steps in found.items():
        for _, (epoch, value) in sorted(steps.items()):
            measured.setdefault(epoch, {}).setdefault(name, []).append(value)
    return [
        {"epoch": epoch}
        | {name: float(np.mean(values)) if name == TRAINING else values[-1] for name, values in several.items()}
        for epoch, several in sorted(measured.items())
    ]


def as_csv(results: "Results") -> str:
    """One line per run and epoch, under dotted keys and the names of metrics."""
    measures = [name for name in MEASURES if any(name in epoch for row in results.rows for epoch in row.epochs)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", *results.keys, "epoch", *measures))
    for row in results.rows:
        values = [in_a_cell(row.values.get(key)) for key in results.keys]
        for epoch in row.epochs:
            writer.writerow((row.run, *values, epoch["epoch"], *(epoch.get(name) for name in measures)))
    return text.getvalue()


def draw(results: "Results") -> bytes | None:
    """PNG: a panel for each measure, a line for each run. None where nothing was logged yet."""
    rows = [row for row in results.rows if row.epochs]
    panels = [name for name in PANELS if any(name in epoch for row in rows for epoch in row.epochs)]
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    down = -(-len(panels) // columns)
    names = cut([_label(results, row) for row in rows[:NAMED]])
    width = max(6.4, 4.6 * columns)
    beside = max(1, min(4, int(width / (0.085 * max(map(len, names)) + 0.7))))
    size = (width, 2.8 * down + 0.5 + 0.2 * -(-min(len(rows), NAMED + 1) // beside))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, columns, squeeze=False)
    for axes, name in zip(grid.flat, panels, strict=False):
        for place, row in reversed(list(enumerate(rows))):  # the best on top
            points = [(epoch["epoch"], epoch[name]) for epoch in row.epochs if name in epoch]
            if points:
                axes.plot(*zip(*points, strict=True), **_look(place, names))
        style(axes, _y_label(name, rows), "epoch")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles = [line for line in grid.flat[0].get_lines()[::-1] if not str(line.get_label()).startswith("_")]
    figure.legend(
        handles=handles, title=f"{results.name}, the best runs first", ncols=beside, **TITLE | {"handlelength": 2.6}
    )
    return render(figure, "png")


def _label(results: "Results", row: "Row") -> str:
    """The values that tell a run from the others."""
    parts = []
    for key in results.keys:
        labels = results.labels(key)
        if len(labels) > 1:
            value = labels.get(json.dumps(row.values.get(key)), "–")
            parts.append(f"{short(key)} {value}" if results.numeric(key) else value)
    return ", ".join(parts) or row.run


def _look(place: int, names: Sequence[str]) -> dict[str, Any]:
    if place >= NAMED:
        label = "all others" if place == NAMED else "_other"
        return {"color": MUTED, "linewidth": 0.8, "alpha": 0.5, "zorder": 1, "label": label}
    colour, marker = LINES[place % len(LINES)]
    again = place >= len(LINES)
    return {
        "color": colour,
        "marker": marker,
        "markersize": 4.5,
        "markerfacecolor": "white" if again else colour,
        "linestyle": "--" if again else "-",
        "linewidth": 1.5,
        "label": names[place],
    }


def _y_label(name: str, rows: Sequence["Row"]) -> str:
    galleries = {row.gallery for row in rows}
    one = "R@" in name and len(galleries) == 1 and None not in galleries
    return f"{MEASURES[name]} (gallery {galleries.pop():,})" if one else MEASURES[name]
