"""Figures of what `clipdist eval` measures beside retrieval: confusion, reliability, probes, queries, subgroups.

Each function takes the JSON of one evaluation and returns SVG or PNG bytes, or None where it holds nothing to draw.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from clipdist.evaluate.plots import (
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    VERMILLION,
    Form,
    finish,
    new_figure,
    plain,
    render,
    style,
)
from clipdist.evaluate.subgroups import LEADING, shown_name

# More classes than this are too small to read; the numbers stand in the JSON.
MOST_CLASSES = 24
FEW_CLASSES = 12
_MOST_SCORES = 4  # side by side
_COLOURS = (BLUE, VERMILLION, GREEN)


def confusion(scores: Mapping[str, Any], *, form: Form = "svg") -> bytes | None:
    """What the rows of each class were taken for, as shares of the class; of too many classes to draw, where they are
    named, those that are confused most."""
    part = scores.get("classification") or scores.get("zero_shot") or {}
    matrix = part.get("confusion")
    if not matrix:
        return None
    chosen = _drawn(matrix["classes"], part.get("confused") or [])
    if not chosen:
        return None
    whole = np.asarray(matrix["counts"], np.float64)
    counts, held = whole[np.ix_(chosen, chosen)], whole.sum(axis=1, keepdims=True)[chosen]
    names, C = [_short(matrix["classes"][place]) for place in chosen], len(chosen)
    figure, axes = new_figure(max(2.6, min(5.6, 1.3 + 0.42 * C)))
    shares = np.divide(counts, held, out=np.zeros_like(counts), where=held > 0)
    for i in range(C):
        for j in range(C):
            colour = BLUE if i == j else VERMILLION
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=colour, alpha=0.06 + 0.62 * shares[i, j], linewidth=0))
            if counts[i, j] and C <= 12:
                at = (j + 0.5, i + 0.5)
                axes.annotate(f"{counts[i, j]:,.0f}", at, ha="center", va="center", color=INK, fontsize=9 - C / 6)
    style(axes, "class", "taken for")
    axes.grid(False)
    axes.set_xlim(0, C)
    axes.set_ylim(C, 0)
    places = [place + 0.5 for place in range(C)]
    long = max(map(len, names)) * C > 60
    axes.set_xticks(places, names, rotation=40 if long else 0, ha="right" if long else "center")
    axes.set_yticks(places, names)
    return render(figure, form)


def _drawn(classes: Sequence[str], confused: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of the classes that a matrix shows, ascending."""
    if len(classes) <= MOST_CLASSES:
        return list(range(len(classes)))
    place = {name: number for number, name in enumerate(classes)}
    both = dict.fromkeys(place[one[side]] for one in confused for side in ("class", "taken_for"))
    return sorted(list(both)[:FEW_CLASSES])


def reliability(scores: Mapping[str, Any], *, form: Form = "svg") -> bytes | None:
    """Accuracy against confidence, with intervals, as trained and after temperature scaling."""
    calibration = scores.get("calibration")
    if not calibration:
        return None
    figure, axes = new_figure(3.6)
    axes.plot([0, 1], [0, 1], ":", color=MUTED, linewidth=1.4, label="exact")
    drawn = (("as_trained", "as trained", VERMILLION, "s"), ("scaled", "temperature fitted", BLUE, "o"))
    for key, label, colour, marker in drawn:
        bins = calibration[key]["bins"]
        largest = max(one["rows"] for one in bins)
        for one in bins:
            if one["accuracy"]["low"] is not None:
                ends = one["accuracy"]["low"], one["accuracy"]["high"]
                axes.vlines(one["confidence"], *ends, color=colour, alpha=0.45, linewidth=1.4)
        x, y = [one["confidence"] for one in bins], [one["accuracy"]["value"] for one in bins]
        axes.plot(x, y, "-", color=colour, linewidth=1.2, alpha=0.6)
        sizes = [12 + 60 * one["rows"] / largest for one in bins]
        ece = calibration[key]["ece"]["value"]
        axes.scatter(x, y, s=sizes, color=colour, marker=marker, label=f"{label}, ECE {ece:.3f}", zorder=3)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    return finish(figure, axes, form, "share that is right", x="confidence")


def probes(scores: Mapping[str, Any], *, form: Form = "svg") -> bytes | None:
    """Score of probes over the share of labels."""
    probe = scores.get("probe")
    if not probe:
        return None
    figure, axes = new_figure()
    shares = sorted({one["fraction"] for one in probe["scores"]})
    kinds = (("linear", "linear probe", BLUE, "o-"), ("knn", "nearest neighbours", VERMILLION, "s--"))
    for shift, (kind, label, colour, line) in zip((0.97, 1.03), kinds, strict=True):
        own = [one for one in probe["scores"] if one["kind"] == kind]
        x = [one["fraction"] * shift for one in own]
        axes.plot(x, [one["score"]["value"] for one in own], line, color=colour, linewidth=1.8, label=label)
        for at, one in zip(x, own, strict=True):
            if one["score"]["low"] is not None:
                axes.vlines(at, one["score"]["low"], one["score"]["high"], color=colour, linewidth=1.4)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(shares))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{share:.3g}" for share in shares]))
    axes.xaxis.set_minor_locator(NullLocator())
    return finish(figure, axes, form, probe["metric"], x="share of the labels")


def queries(scores: Mapping[str, Any], *, form: Form = "svg") -> bytes | None:
    """Precision@k of queries against labelled candidates, with intervals and chance."""
    found = scores.get("query_candidates")
    names = [name for name in found or {} if name.startswith("P@")]
    if not found or not names:
        return None
    figure, axes = new_figure(2.6)
    for place, name in enumerate(names):
        one = found[name]
        axes.bar(place, one["value"], 0.5, color=BLUE, alpha=0.85)
        high = one["value"] if one["high"] is None else one["high"]
        if one["low"] is not None:
            axes.vlines(place, one["low"], high, color=INK, linewidth=1.4)
        axes.annotate(
            f"{one['value']:.3f}",
            (place, high),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=INK,
        )
    axes.axhline(found[names[0]]["chance"], color=INK, linewidth=1.2, linestyle=":", label="chance")
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0, min(1.12, 1.2 * axes.get_ylim()[1]))
    return finish(figure, axes, form, "share that is right")


def subgroups(scores: Mapping[str, Any], *, form: Form = "svg") -> bytes | None:
    """For each field and value the leading scores with intervals; filled where the gap to the others is flagged."""
    fields = [one for one in scores.get("subgroups") or [] if one["values"]]
    if not fields:
        return None
    names = [
        name
        for name in fields[0]["overall"]
        if name.rpartition("/")[2] in LEADING
        and any(value["scores"][name]["value"] is not None for one in fields for value in one["values"])
    ][:_MOST_SCORES]
    if not names:
        return None
    rows = [len(one["values"]) for one in fields]
    figure = Figure(figsize=(5.6, 1.1 + 0.27 * sum(rows) + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(fields), len(names), squeeze=False, sharex="col", height_ratios=[n + 1 for n in rows])
    for line, one in zip(grid, fields, strict=True):
        for column, (axes, name) in enumerate(zip(line, names, strict=True)):
            _one_field(axes, one, name, _COLOURS[column % 3])
            if column:
                axes.set_yticklabels([])
            if axes is grid[0][column]:
                axes.set_title("\n".join(map(shown_name, name.split("/"))), fontsize=8.5, color=MUTED)
    return render(figure, form)


def _one_field(axes: Axes, field: Mapping[str, Any], name: str, colour: str) -> None:
    values: Sequence[Mapping[str, Any]] = field["values"]
    overall = field["overall"][name]["value"]
    if overall is not None:
        axes.axvline(overall, color=MUTED, linewidth=1.2, linestyle=":")
    for place, value in enumerate(values):
        score = value["scores"][name]
        if score["value"] is None:
            continue
        flagged = name in value["flagged"]
        if score["low"] is not None:
            axes.hlines(place, score["low"], score["high"], color=colour, linewidth=1.6)
        # What is hollow shows the page's ground, which may be dark.
        marker: dict[str, Any] = {
            "markersize": 6,
            "markeredgewidth": 1.5,
            "markerfacecolor": colour if flagged else "none",
        }
        axes.plot(score["value"], place, "o", color=colour, clip_on=False, **marker)
    style(axes, plain(field["field"]) if axes.get_subplotspec().colspan.start == 0 else "", "")  # type: ignore[union-attr]
    axes.grid(axis="x", color=GRID, linewidth=0.9)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_yticks(range(len(values)), [f"{_short(one['value'])} ({one['images']:,})" for one in values])
    axes.xaxis.set_major_locator(MaxNLocator(3))


def _short(name: str) -> str:
    return plain(name if len(name) <= 18 else f"{name[:17]}…")
