"""Figures of a run and of its scores, as SVG or PNG bytes.

Every function takes the records of `metrics.jsonl` or one evaluation, and returns None where these hold nothing to
draw. Colours are those of Okabe and Ito (2008), told apart with any colour vision; lines also differ in dash or marker.
Figures are made without pyplot, so nothing is shared between calls; equal input gives equal bytes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter

Records = Sequence[Mapping[str, Any]]
Form = Literal["svg", "png"]

# A screen is no wider than this many points; more would only make the file larger.
_POINTS = 400
_SIZE = (5.6, 3.1)


INK, MUTED, GRID = "#24292f", "#6b737c", "#e3e6ea"
BLUE, VERMILLION, GREEN = "#0072b2", "#d55e00", "#009e73"
_DARK = {INK: "#e6e9ee", MUTED: "#98a2ad", GRID: "#353c45", BLUE: "#56b4e9", VERMILLION: "#f0a04b", GREEN: "#3ecf9f"}


def dark(svg: bytes) -> bytes:
    """The same SVG figure in colours for a dark ground; its own ground is transparent."""
    for light, other in _DARK.items():
        svg = svg.replace(light.encode(), other.encode())
    return svg


def series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that hold a finite number under `key`, in order of steps.

    A step logged twice, as after a resume from an older checkpoint, counts once, as logged last.
    """
    found = {}
    for record in records:
        value = record.get(key)
        if isinstance(value, int | float) and np.isfinite(value) and "step" in record:
            found[record["step"]] = float(value)
    steps = sorted(found)
    return np.array(steps, dtype=np.float64), np.array([found[step] for step in steps])


def loss(records: Records, *, form: Form = "svg") -> bytes | None:
    """Training loss, raw and smoothed, and validation loss."""
    if not len(series(records, "train/loss")[0]) and not len(series(records, "val/loss")[0]):
        return None
    figure, axes = new_figure()
    _noisy(axes, records, "train/loss", "training", BLUE)
    _dots(axes, records, "val/loss", "validation", VERMILLION, "o-")
    return finish(figure, axes, form, "loss", x="step")


def recall(records: Records, *, form: Form = "svg") -> bytes | None:
    """R@1 of each validation in both directions, with chance, 1 / gallery, where it can be told."""
    return _validation(
        records,
        {"val/image_to_text/R@1": "image → text", "val/text_to_image/R@1": "text → image"},
        "R@1",
        form,
        chance=True,
    )


def accuracy(records: Records, *, form: Form = "svg") -> bytes | None:
    """Of a classifier: the share of training batches that is right, raw and smoothed, and that of each validation."""
    if not len(series(records, "val/top1")[0]) and not len(series(records, "train/top1")[0]):
        return None
    figure, axes = new_figure()
    _noisy(axes, records, "train/top1", "training, top-1", BLUE)
    _dots(axes, records, "val/top1", "validation, top-1", VERMILLION, "o-")
    _dots(axes, records, "val/balanced_accuracy", "balanced", GREEN, "s--")
    axes.set_ylim(bottom=0)
    return finish(figure, axes, form, "share that is right", x="step")


def cosines(records: Records, *, form: Form = "svg") -> bytes | None:
    """Mean cosine of positive and of negative pairs at each validation."""
    names = {"val/cosine_pos": "positive pairs", "val/cosine_neg": "negative pairs"}
    return _validation(records, names, "mean cosine", form)


def learning_rate(records: Records, *, form: Form = "svg") -> bytes | None:
    """Learning rate over steps."""
    return _plain(records, "train/lr", "learning rate", form)


def temperature(records: Records, *, form: Form = "svg") -> bytes | None:
    """Temperature of the softmax over steps."""
    return _plain(records, "train/temperature", "temperature", form)


def gradient_norm(records: Records, *, form: Form = "svg") -> bytes | None:
    """Norm of the gradient, whole and of each tower, raw and smoothed, on a logarithmic scale unless some are zero."""
    names = {"train/grad_norm": "all", "train/grad_norm_image": "image tower", "train/grad_norm_text": "text tower"}
    values = [series(records, key)[1] for key in names]
    if not any(map(len, values)):
        return None
    figure, axes = new_figure()
    for (key, label), colour, style in zip(names.items(), (BLUE, VERMILLION, GREEN), ("-", "--", "-."), strict=True):
        _noisy(axes, records, key, label, colour, style)
    if all((one > 0).all() for one in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    return finish(figure, axes, form, "gradient norm", x="step")


def throughput(records: Records, *, form: Form = "svg") -> bytes | None:
    """Samples per second over all devices, and below it the share of time spent waiting for data."""
    if not len(series(records, "perf/samples_per_second")[0]):
        return None
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    _noisy(upper, records, "perf/samples_per_second", "samples per second", BLUE)
    _noisy(lower, records, "data/wait_fraction", "waiting for data", VERMILLION)
    upper.set_ylim(bottom=0)
    lower.set_ylim(0, max(0.1, lower.get_ylim()[1]))
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lower.yaxis.set_major_locator(MaxNLocator(2))
    upper.yaxis.set_major_locator(MaxNLocator(4))
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    style(upper, "samples/s", "")
    style(lower, "wait", "step")
    return render(figure, form)


def cosine_histogram(scores: Mapping[str, Any], *, form: Form = "svg") -> bytes | None:
    """Densities of the cosines of positive and of negative pairs, from `RetrievalScores.to_dict()`."""
    histogram = scores.get("cosine_histogram")
    if not histogram:
        return None
    # Few positives in narrow bins make a comb instead of a shape.
    together = next(n for n, few in ((5, 1000), (2, 10_000), (1, np.inf)) if sum(histogram["positive"]) < few)
    edges = np.asarray(histogram["edges"])[::together]
    figure, axes = new_figure()
    seen = []
    for name, colour, hatch in (("negative", VERMILLION, "//"), ("positive", BLUE, None)):
        counts = np.asarray(histogram[name], dtype=np.float64).reshape(-1, together).sum(axis=1)
        if not counts.sum():
            continue
        density = counts / counts.sum() / np.diff(edges)
        axes.stairs(density, edges, fill=True, color=colour, alpha=0.28, hatch=hatch)
        axes.stairs(density, edges, color=colour, linewidth=1.6, label=f"{name} pairs ({int(counts.sum()):,})")
        seen += [edges[:-1][counts > 0].min(), edges[1:][counts > 0].max()]
    margin = 0.05 * (max(seen) - min(seen))
    axes.set_xlim(max(-1, min(seen) - margin), min(1, max(seen) + margin))
    axes.set_ylim(bottom=0)
    return finish(figure, axes, form, "density", x="cosine")


def recall_bars(scores: Mapping[str, Any], *, form: Form = "svg") -> bytes | None:
    """R@k in both directions with intervals, and chance as a mark, from `RetrievalScores.to_dict()`."""
    names = [name for name in scores.get("image_to_text") or {} if name.startswith("R@")]
    if not names or not scores.get("text_to_image"):
        return None
    figure, axes = new_figure()
    directions = (
        ("image_to_text", "image → text", BLUE, -0.2),
        ("text_to_image", "text → image", VERMILLION, 0.2),
    )
    for direction, label, colour, shift in directions:
        hatch = "///" if shift > 0 else None
        for place, name in enumerate(names):
            cell, x = scores[direction].get(name) or {}, place + shift
            value, low, high, chance = (cell.get(key) for key in ("value", "low", "high", "chance"))
            if value is None:
                continue
            axes.bar(x, value, 0.36, color=colour, alpha=0.85, hatch=hatch, edgecolor="white", linewidth=0)
            if low is not None and high is not None:
                axes.vlines(x, low, high, color=INK, linewidth=1.4)
            if chance is not None:
                axes.hlines(chance, x - 0.2, x + 0.2, color=INK, linewidth=1.2, linestyle=":")
            above: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8.5, "color": INK}
            axes.annotate(f"{value:.3f}", (x, value if high is None else high), (0, 3), **above)
        axes.bar(0, 0, color=colour, alpha=0.85, hatch=hatch, edgecolor="white", linewidth=0, label=label)
    axes.bar(0, 0, color="none", edgecolor=INK, linestyle=":", linewidth=1.2, label="chance")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, min(1.12, 1.2 * axes.get_ylim()[1]))
    return finish(figure, axes, form, "share of queries")


CURVES: dict[str, tuple[str, Callable[..., bytes | None]]] = {
    "loss": ("Loss", loss),
    "accuracy": ("Accuracy", accuracy),
    "recall": ("R@1 in validation", recall),
    "cosines": ("Mean cosine in validation", cosines),
    "learning_rate": ("Learning rate", learning_rate),
    "temperature": ("Temperature", temperature),
    "gradient_norm": ("Gradient norm", gradient_norm),
    "throughput": ("Throughput and data wait", throughput),
}


def new_figure(height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    """A figure as wide as all others, `height` inches high."""
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _validation(
    records: Records, names: Mapping[str, str], y: str, form: Form, *, chance: bool = False
) -> bytes | None:
    """One line per name over epochs, where each validation closes an epoch of its own, else over steps."""
    validations = [record for record in records if any(name in record for name in names)]
    epochs = [record.get("epoch") for record in validations]
    by_epoch = None not in epochs and len(set(epochs)) == len({record.get("step") for record in validations}) > 1
    if by_epoch:
        validations = [{**record, "step": record["epoch"]} for record in validations]
    if not any(len(series(validations, name)[0]) for name in names):
        return None
    figure, axes = new_figure()
    styles = ((BLUE, "o-"), (VERMILLION, "s--"))
    for (key, label), (colour, style) in zip(names.items(), styles, strict=True):
        _dots(axes, validations, key, label, colour, style)
    if chance:
        steps, gallery = series(validations, "val/gallery")
        if len(steps):
            axes.plot(steps, 1 / gallery, ":", color=MUTED, linewidth=1.4, label=f"chance, 1 in {gallery[-1]:,.0f}")
        axes.set_ylim(bottom=0)
    return finish(figure, axes, form, y, x="epoch" if by_epoch else "step")


def _plain(records: Records, key: str, y: str, form: Form) -> bytes | None:
    steps, values = series(records, key)
    if not len(steps):
        return None
    figure, axes = new_figure()
    axes.plot(*_thinned(steps, values)[:2], "o-" if len(steps) == 1 else "-", color=BLUE, linewidth=1.7)
    return finish(figure, axes, form, y, x="step", legend=False)


def _noisy(axes: Axes, records: Records, key: str, label: str, colour: str, style: str = "-") -> None:
    """A faint band or line of what was logged, and its exponential mean over a fiftieth of the run."""
    noisy(axes, *series(records, key), label, colour, style)


def noisy(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str, style: str = "-") -> None:
    """The same of values at steps."""
    if not len(steps):
        return
    at, _, low, high = _thinned(steps, values)
    if len(at) < len(steps):
        axes.fill_between(at, low, high, color=colour, alpha=0.22, linewidth=0)
    else:
        axes.plot(steps, values, "-", color=colour, alpha=0.3, linewidth=1)
    marked = "o" if len(steps) == 1 else ""
    axes.plot(*_thinned(steps, _smoothed(values))[:2], style + marked, color=colour, linewidth=1.8, label=label)


def _dots(axes: Axes, records: Records, key: str, label: str, colour: str, style: str) -> None:
    steps, values = series(records, key)
    if len(steps):
        size = 4.0 if len(steps) <= 60 else 0.0
        axes.plot(steps, values, style, color=colour, linewidth=1.8, markersize=size, label=label)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential mean over a fiftieth of the values, weighted so that the first values are not pulled to zero."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    smooth, total, weight = np.empty_like(values), 0.0, 0.0
    for place, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        smooth[place] = total / weight
    return smooth


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean step, mean, smallest and largest value in each of at most `_POINTS` runs of neighbours."""
    if len(steps) <= _POINTS:
        return steps, values, values, values
    cuts = np.linspace(0, len(steps), _POINTS + 1).astype(int)[:-1]
    sizes = np.diff(np.append(cuts, len(steps)))
    means = (np.add.reduceat(array, cuts) / sizes for array in (steps, values))
    return *means, np.minimum.reduceat(values, cuts), np.maximum.reduceat(values, cuts)  # type: ignore[return-value]


def plain(name: str) -> str:
    """A name from outside, to be drawn as it is: Matplotlib would set what stands between dollars as a formula, or fail
    at it, and leave a name with `_` at its front out of the legend."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def style(axes: Axes, y: str, x: str) -> None:
    """What all figures have in common: a grid, no frame, muted labels."""
    axes.set_facecolor("none")
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, which="both")
    axes.set_ylabel(y, color=MUTED, fontsize=9.5)
    if x:
        axes.set_xlabel(x, color=MUTED, fontsize=9.5)
    if x in ("step", "epoch", "samples seen"):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def finish(figure: Figure, axes: Axes, form: Form, y: str, *, x: str = "", legend: bool = True) -> bytes:
    """The figure in the common style, its legend above the axes."""
    style(axes, y, x)
    if legend:
        handles = axes.get_legend_handles_labels()[0]
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=max(1, len(handles)),
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            handlelength=1.6,
            columnspacing=1.4,
        )
    return render(figure, form)


def render(figure: Figure, form: Form) -> bytes:
    """An SVG with a transparent ground, or a PNG with a white one."""
    file = io.BytesIO()
    if form == "png":
        figure.savefig(file, format="png", dpi=160, facecolor="white")
    else:
        with matplotlib.rc_context({"svg.hashsalt": "clipdist", "svg.fonttype": "path"}):
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()
