"""A comparison of runs as text for a terminal, and as one HTML file with curves that opens without a network."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import clipdist
from clipdist.data.shards import write_atomically
from clipdist.evaluate import plots
from clipdist.evaluate.compare import Comparison, Difference, Measurement, Run
from clipdist.evaluate.estimates import CONFIDENCE, Estimate, aligned, cell

# key in metrics.jsonl: (title of the figure, what the axis says)
CURVES = {
    "train/loss": ("Training loss", "loss"),
    "val/loss": ("Validation loss", "loss"),
    "val/image_to_text/R@1": ("Validation, image → text", "R@1"),
    "val/text_to_image/R@1": ("Validation, text → image", "R@1"),
    "train/top1": ("Training accuracy", "top-1"),
    "val/top1": ("Validation accuracy", "top-1"),
    "val/balanced_accuracy": ("Validation, balanced accuracy", "balanced accuracy"),
    "train/lr": ("Learning rate", "learning rate"),
    "train/logit_scale": ("Scale of the logits", "scale"),
    "train/grad_norm": ("Gradient norm", "norm"),
    "perf/samples_per_second": ("Throughput", "samples per second"),
}
COLOURS = (plots.BLUE, plots.VERMILLION, plots.GREEN, plots.INK, plots.MUTED)
DASHES = ("-", "--", "-.", ":")
LONGEST = 60
SIGNIFICANT = 0.05


def shown_metric(name: str) -> str:
    """`image → text R@1` for `image_to_text/R@1`."""
    words = name.replace("_to_", " → ").replace("/", " ").replace("_", " ")
    return words.replace("auroc", "AUROC").replace("mean reciprocal rank", "MRR")


def summary(comparison: Comparison) -> str:
    """Tables in plain text."""
    blocks = ["\n".join(_measured(comparison, one)) for one in comparison.measurements]
    if comparison.tested:
        blocks.append(_tested(comparison))
    if comparison.refused:
        lines = [f"  {name}, {run}: {why}" for name, run, why in comparison.refused]
        blocks.append("\n".join(["not compared", *lines]))
    if not comparison.measurements:
        blocks.append("no evaluation to compare: run clipdist eval on each run's model, with the same options")
    for title, rows in _tables(comparison):
        head = [title, *(run.name for run in comparison.runs)]
        blocks.append("\n".join(aligned([head, *([key, *map(_short, row)] for key, row in rows.items())])))
    return "\n\n".join(blocks)


def _tables(comparison: Comparison) -> Iterator[tuple[str, dict[str, list[str]]]]:
    parts = {"settings": comparison.settings, "machine": comparison.environment, "data": comparison.data}
    yield from ((title, rows) for title, rows in parts.items() if rows)


def _measured(comparison: Comparison, one: Measurement) -> Iterator[str]:
    runs = [run.name for run in comparison.runs if any(run.name in row for row in one.scores.values())]
    head = [one.name, *runs]
    for run in runs[1:]:
        head += [f"{run} − {runs[0]}", "p", "p (Holm)"]
    rows = [head]
    for metric, scores in one.scores.items():
        row = [shown_metric(metric), *(_score(scores.get(run), metric) for run in runs)]
        for run in runs[1:]:
            row += _difference(one.differences.get((metric, run)))
        rows.append(row)
    yield from aligned(rows)
    yield one.about
    yield from one.notes


def _score(estimate: Estimate | None, metric: str) -> str:
    return "–" if estimate is None else cell(estimate, _form(metric))


def _form(metric: str) -> str:
    return ",.1f" if metric.endswith(("median_rank", "mean_rank")) else ".3f"


def _difference(one: Difference | None) -> list[str]:
    if one is None:
        return ["", "", ""]
    return [_signed(one.estimate), *("–" if p is None else _p(p) for p in (one.p, one.adjusted))]


def _signed(estimate: Estimate) -> str:
    return cell(estimate, "+.3f").replace("-", "−")


def _p(p: float) -> str:
    return f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def _tested(comparison: Comparison) -> str:
    found = sum(
        one.adjusted is not None and one.adjusted < SIGNIFICANT
        for many in comparison.measurements
        for one in many.differences.values()
    )
    return (
        f"{comparison.tested:,} comparisons with {comparison.runs[0].name}; {found:,} have an adjusted p below "
        f"{SIGNIFICANT:g}. Differences are of the same queries, with {CONFIDENCE:.0%} intervals from "
        f"{comparison.bootstrap:,} resamples of whole units, both models' outcomes together; p (Holm) is adjusted for "
        f"all {comparison.tested:,}."
    )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def write_page(comparison: Comparison, path: Path) -> Path:
    """Writes the HTML file whole or not at all, and returns its path."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    names = [run.name for run in comparison.runs]
    page = environment.get_template("compare.html.j2").render(
        names=names,
        folders=[str(run.folder) for run in comparison.runs],
        measurements=[_rows(comparison, one) for one in comparison.measurements],
        tested=_tested(comparison) if comparison.tested else "",
        refused=comparison.refused,
        curves=_curves(comparison.runs),
        other_batches=len({_global_batch(run.config) for run in comparison.runs}) > 1,
        tables=list(_tables(comparison)),
        version=clipdist.__version__,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())
    return path


def _rows(comparison: Comparison, one: Measurement) -> dict[str, Any]:
    runs = [run.name for run in comparison.runs if any(run.name in row for row in one.scores.values())]
    rows = []
    for metric, scores in one.scores.items():
        differences = []
        for run in runs[1:]:
            found = one.differences.get((metric, run))
            told = _difference(found)
            clear = found is not None and found.adjusted is not None and found.adjusted < SIGNIFICANT
            sign = "" if not clear or found is None else "up" if found.estimate.value > 0 else "down"
            differences.append({"cells": told, "sign": sign})
        shown = [_parts(_score(scores.get(run), metric)) for run in runs]
        rows.append({"metric": shown_metric(metric), "scores": shown, "differences": differences})
    return {"name": one.name, "about": one.about, "runs": runs, "rows": rows, "notes": one.notes}


def _parts(text: str) -> tuple[str, str]:
    """A score, and its interval."""
    value, _, interval = text.partition(" ")
    return value, interval


# Curves


def _curves(runs: Sequence[Run]) -> list[dict[str, str]]:
    found = []
    for key, (title, axis) in CURVES.items():
        light = overlay(runs, key, axis)
        if light is not None:
            encode = {"light": light, "dark": plots.dark(light)}
            images = {
                name: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for name, svg in encode.items()
            }
            found.append({"title": title, **images})
    return found


def overlay(runs: Sequence[Run], key: str, axis: str, *, form: plots.Form = "svg") -> bytes | None:
    """One line a run over steps, or over the samples seen where batches differ in size; None without numbers."""
    batches = [_global_batch(run.config) for run in runs]
    by_samples = None not in batches and len(set(batches)) > 1
    lines = []
    for run, batch in zip(runs, batches, strict=True):
        steps, values = plots.series(run.records, key)
        lines.append((plots.plain(run.name), steps * (batch or 1) if by_samples else steps, values))
    if not any(len(values) for _, _, values in lines):
        return None
    figure, axes = plots.new_figure()
    for number, (name, at, values) in enumerate(lines):
        if not len(values):
            continue
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        if key.startswith("val/"):
            marked = "o" if len(values) <= 60 else ""
            axes.plot(at, values, dash + marked, color=colour, linewidth=1.8, markersize=4.0, label=name)
        else:
            plots.noisy(axes, at, values, name, colour, dash)
    if not key.endswith(("loss", "lr")) or np.min([values.min() for _, _, values in lines if len(values)]) >= 0:
        axes.set_ylim(bottom=0)
    return plots.finish(figure, axes, form, axis, x="samples seen" if by_samples else "step")


def _global_batch(config: Mapping[str, Any]) -> int | None:
    value = (config.get("train") or {}).get("global_batch")
    return value if isinstance(value, int) else None
