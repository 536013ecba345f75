"""The plot of a sweep: the score of each run against each key that varies."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from clipdist.cluster.sweep_words import short, shown
from clipdist.evaluate.plots import BLUE, GREEN, INK, MUTED, VERMILLION, render, style

if TYPE_CHECKING:
    from clipdist.cluster.sweep_table import Results, Row

NAMES = {
    "val/mean_R@1": "mean R@1",
    "val/image_to_text/R@1": "R@1, image → text",
    "val/text_to_image/R@1": "R@1, text → image",
    "val/loss": "validation loss",
    "val/top1": "top-1",
    "val/top5": "top-5",
    "val/balanced_accuracy": "balanced accuracy",
}
# Okabe and Ito's, the darkest first; each line also has a marker of its own.
LINES = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P"), (INK, "X"))
TITLE: dict[str, Any] = {
    "title_fontproperties": {"size": 10.5},
    "alignment": "left",
    "loc": "outside upper left",
    "frameon": False,
    "fontsize": 9,
    "labelcolor": INK,
    "handlelength": 1.6,
    "columnspacing": 1.4,
}
COLUMNS = 3
LONGEST = 26
"""Letters of a value that are shown."""
FEW = 12
"""So many values of a key at most have a tick, and a mark for their median, each."""
_LOG_RATIO = 10.0


def draw(results: "Results") -> bytes | None:
    """PNG. With one key, or two of which one has few values, everything in one panel, a line for each of the few; else
    a panel for each key, in which the others vary, too. Runs that are not finished are hollow. None where no run has a
    score yet, nor a loss."""
    scored = any(row.score is not None for row in results.rows)
    height: Callable[[Row], float | None] = (lambda row: row.score) if scored else (lambda row: row.loss)
    rows = [row for row in results.rows if height(row) is not None]
    if not rows:
        return None
    keys = [key for key in results.keys if _distinct(rows, key) > 1] or list(results.keys)[:1]
    lines = _line_key(results, rows, keys)
    panels = [key for key in keys if key != lines]
    labels = [results.labels(key) for key in panels]
    # Names of towers are long: they stand at a slant, and need room below and to the left.
    slanted = [not results.numeric(key) and _crowded(label) for key, label in zip(panels, labels, strict=True)]
    columns = min(COLUMNS, len(panels))
    down = -(-len(panels) // columns)
    width = max(6.4, 3.9 * columns)
    medians = not lines and any(_has_medians(rows, key) for key in panels)
    handles = _handles(results, rows, lines, medians, height(rows[0]) or 0.0)
    longest = max(len(str(handle.get_label())) for handle in handles)
    beside = max(1, min(len(handles), int(width / (0.085 * longest + 0.5))))
    above = 0.4 + 0.2 * -(-len(handles) // beside)
    size = (width, above + down * (3.0 + 0.9 * any(slanted)))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, columns, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        key = panels[place]
        _panel(axes, results, rows, key, lines, height, alone=len(panels) == 1)
        style(axes, _y_label(results, rows, scored) if place % columns == 0 else "", short(key))
        if slanted[place]:
            axes.tick_params(axis="x", labelrotation=30)
            for text in axes.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
    done = sum(row.state == "finished" for row in results.rows)
    figure.legend(
        handles=handles,
        title=f"{results.name}: {len(results.rows):,} runs, {done:,} finished{f', by {short(lines)}' if lines else ''}",
        ncols=beside,
        **TITLE,
    )
    return render(figure, "png")


def _distinct(rows: Sequence["Row"], key: str) -> int:
    return len({json.dumps(row.values.get(key)) for row in rows})


def _line_key(results: "Results", rows: Sequence["Row"], keys: Sequence[str]) -> str:
    """Of two keys the one that has a line for each value, because it is no number or has fewer values; else none."""
    if len(keys) != 2:
        return ""
    few = [key for key in keys if _distinct(rows, key) <= len(LINES)]
    few.sort(key=lambda key: (results.numeric(key), _distinct(rows, key)))
    return few[0] if few else ""


def _panel(
    axes: Axes,
    results: "Results",
    rows: Sequence["Row"],
    key: str,
    lines: str,
    height: Callable[["Row"], float | None],
    alone: bool,
) -> None:
    numeric = results.numeric(key)
    x_of = _numbers(axes, results, rows, key) if numeric else _categories(axes, results, rows, key)
    groups = _groups(rows, lines)
    by_value: dict[float, list[float]] = {}
    for group, (members, (colour, marker)) in enumerate(zip(groups, LINES, strict=False)):
        points = sorted(((x_of(row), height(row) or 0.0, row) for row in members), key=lambda point: point[:2])
        if numeric and alone and results.keys[key] == "grid":
            tops = {x: y for x, y, _ in points}  # the highest of each
            axes.plot(list(tops), list(tops.values()), "-", color=colour, linewidth=1.4, alpha=0.8)
        # Within a category the lines' marks stand side by side.
        beside = 0.0 if numeric else 0.5 * (group - (len(groups) - 1) / 2) / len(groups)
        log = axes.get_xscale() == "log"
        low, high = np.log(axes.get_xlim()) if log else axes.get_xlim()
        room = 0.05 * (high - low) if numeric else 0.44 / len(groups)
        for x, (value, y, row) in zip(_spread([x for x, _, _ in points], room, log), points, strict=True):
            face = colour if row.state == "finished" else "white"
            axes.plot(x + beside, y, marker, color=colour, markerfacecolor=face, markersize=5.5, alpha=0.85)
            by_value.setdefault(value, []).append(y)
            if row is rows[0]:
                axes.plot(x + beside, y, "o", color=INK, markerfacecolor="none", markersize=11, zorder=5)
    if not lines and _has_medians(rows, key):
        _medians(axes, by_value, numeric)


def _has_medians(rows: Sequence["Row"], key: str) -> bool:
    counts = Counter(json.dumps(row.values.get(key)) for row in rows)
    return len(counts) <= FEW and max(counts.values()) > 2


def _medians(axes: Axes, by_value: dict[float, list[float]], numeric: bool) -> None:
    middles = sorted((x, float(np.median(values))) for x, values in by_value.items())
    if numeric:
        axes.plot(*zip(*middles, strict=True), "--", color=INK, linewidth=1.2, zorder=1)
    else:
        for x, y in middles:
            axes.hlines(y, x - 0.32, x + 0.32, color=INK, linewidth=1.6, linestyle="--")


def _groups(rows: Sequence["Row"], lines: str) -> list[list["Row"]]:
    if not lines:
        return [list(rows)]
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: _order(row.values.get(lines))):
        found.setdefault(json.dumps(row.values.get(lines)), []).append(row)
    return list(found.values())


def _spread(places: Sequence[float], room: float, log: bool) -> list[float]:
    """Those that lie on each other beside each other, so that equal scores do not hide each other, in as much `room` on
    the axis."""
    seen: dict[float, int] = {}
    spread = []
    for x in places:
        number = seen[x] = seen.get(x, 0) + 1
        # By the golden ratio: in the order of the scores they would make a slanted line.
        shift = ((number * 0.618) % 1 - 0.5) * room if places.count(x) > 1 else 0.0
        spread.append(x * float(np.exp(shift)) if log else x + shift)
    return spread


def _numbers(axes: Axes, results: "Results", rows: Sequence["Row"], key: str) -> Callable[["Row"], float]:
    values = sorted({float(row.values[key]) for row in rows})
    search = results.keys[key]
    log = values[0] > 0 and (search == "log" or (search != "uniform" and values[-1] / values[0] >= _LOG_RATIO))
    if log:
        axes.set_xscale("log")
    places = np.log(values) if log else np.asarray(values)
    span = float(places[-1] - places[0])
    low, high = places[0] - 0.07 * (span or 1.0), places[-1] + 0.07 * (span or 1.0)
    axes.set_xlim(*(np.exp([low, high]) if log else (low, high)))
    names = [shown(value) for value in values]
    # A tick at each value where their names have room beside each other, at about 0.024 of the axis a letter.
    if len(values) <= FEW and (
        not span or np.diff(places).min(initial=span) / span > 0.024 * max(map(len, names)) + 0.02
    ):
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(float(value))))
    elif log:
        decades = (places[-1] - places[0]) / np.log(10)
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1.0,) if decades > 2 else (1.0, 3.0) if decades > 1 else (1, 2, 5))
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    return lambda row: float(row.values[key])


def _categories(axes: Axes, results: "Results", rows: Sequence["Row"], key: str) -> Callable[["Row"], float]:
    labels = results.labels(key)
    found = {json.dumps(row.values.get(key)): row.values.get(key) for row in rows}
    places = {text: place for place, text in enumerate(sorted(found, key=lambda text: _order(found[text])))}
    names = [labels.get(text, "–") for text in places]
    axes.set_xticks(range(len(places)), cut(names))
    axes.set_xlim(-0.6, len(places) - 0.4)
    return lambda row: float(places[json.dumps(row.values.get(key))])


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size before everything else by its text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0, float(value), ""
    return 1, 0.0, json.dumps(value)


def _crowded(labels: dict[str, str]) -> bool:
    """Whether a panel's width is too little for these names in one line."""
    return sum(min(LONGEST, len(label)) + 2 for label in labels.values()) > 34


def _y_label(results: "Results", rows: Sequence["Row"], scored: bool) -> str:
    if not scored:
        return "training loss, last step"
    galleries = sorted({row.gallery for row in rows if row.gallery})
    if not galleries:
        return NAMES[results.monitor]
    size = f"gallery {galleries[0]:,}" if len(galleries) == 1 else f"galleries {galleries[0]:,} to {galleries[-1]:,}"
    chance = f", chance {1 / galleries[0]:.2g}" if results.higher_is_better and len(galleries) == 1 else ""
    return f"{NAMES[results.monitor]}\n({size}{chance})"


def _handles(results: "Results", rows: Sequence["Row"], lines: str, medians: bool, best: float) -> list[Line2D]:
    """What the legend explains."""
    handles = []
    if lines:
        labels = results.labels(lines)
        groups = _groups(rows, lines)
        names = cut([labels.get(json.dumps(members[0].values.get(lines)), "–") for members in groups])
        for name, (colour, marker) in zip(names, LINES, strict=False):
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=name))
    if any(row.state != "finished" for row in rows):
        handles.append(Line2D([], [], color=MUTED, marker="o", mfc="white", linestyle="none", label="not finished"))
    if medians:
        handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=1.4, label="median"))
    label = f"best: {best:.4f}"
    return [*handles, Line2D([], [], color=INK, marker="o", mfc="none", markersize=10, linestyle="none", label=label)]


def cut(names: Sequence[str]) -> list[str]:
    """Long ones without their middle, unless they would become each other."""
    start = LONGEST * 3 // 5
    cut = [name if len(name) <= LONGEST else f"{name[:start]}…{name[start + 1 - LONGEST :]}" for name in names]
    return cut if len(set(cut)) == len(set(names)) else list(names)
