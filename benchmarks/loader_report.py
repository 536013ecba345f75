"""What benchmarks/loader.py measured, as a Markdown table and a plot beside its JSON.

python benchmarks/loader_report.py benchmarks/results/NAME.json
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "clipdist": "#0b6e99",
    "cache": "#5fb3d4",
    "open_clip": "#d1495b",
    "webdataset": "#edae49",
    "litdata": "#8d6a9f",
    "streaming": "#6b9080",
}
LABELS = {"cache": "clipdist, decoded cache"}
RATIOS = [("clipdist", "open_clip"), ("clipdist", "floor"), ("cache", "open_clip")]
Cell = tuple[int, int, int]  # side, cores, workers


def medians(result: dict[str, Any], quantity: str) -> dict[Cell, dict[str, float]]:
    """cell -> contestant -> median; a contestant whose every run failed is absent. The floor of a cell is that of as
    many processes as its workers and cores allow."""
    found: dict[Cell, dict[str, float]] = {}
    floors: dict[tuple[int, int], float] = {}
    for record in result["rates"]:
        values = [run[quantity] for run in record["runs"] if quantity in run]
        if not values:
            continue
        side, cores, workers = record["side"], record["cores"], record["workers"]
        middle = statistics.median(values)
        if record["contestant"] == "floor":
            floors[side, min(cores, max(1, workers))] = middle
        else:
            found.setdefault((side, cores, workers), {})[record["contestant"]] = middle
    for (side, cores, workers), cell in found.items():
        processes = min(cores, max(1, workers))
        if (side, processes) in floors:
            per_core = quantity == "images_per_core_second"
            cell["floor"] = floors.get((side, 1), floors[side, processes]) if per_core else floors[side, processes]
    return dict(sorted(found.items()))


def spread(result: dict[str, Any]) -> float:
    """Largest (max − min) / median over all measurements."""
    widths = [0.0]
    for record in result["rates"]:
        values = [run["images_per_second"] for run in record["runs"] if "images_per_second" in run]
        if values:
            widths.append((max(values) - min(values)) / statistics.median(values))
    return max(widths)


def table(cells: dict[Cell, dict[str, float]], names: list[str]) -> list[str]:
    ratios = [pair for pair in RATIOS if any(set(pair) <= cell.keys() for cell in cells.values())]
    heads = ["JPEG", "cores", "workers", *names, *(f"{a} / {b}" for a, b in ratios)]
    lines = [f"| {' | '.join(heads)} |", "|" + "--:|" * len(heads)]
    for place, cell in cells.items():
        values = [f"{cell[name]:,.0f}" if name in cell else "" for name in names]
        quotients = [f"**{cell[a] / cell[b]:.2f}**" if a in cell and b in cell else "" for a, b in ratios]
        lines.append(f"| {' | '.join([*map(str, place), *values, *quotients])} |")
    return lines


def own_figures(result: dict[str, Any]) -> list[str]:
    """Sentences on resuming and memory."""
    lines = []
    if "resume" in result:
        resume = result["resume"]
        runs = [run["seconds"] for run in resume["runs"] if "seconds" in run]
        if runs:
            start, middle = (statistics.median(run[name] for run in runs) for name in ("start", "middle"))
            lines.append(
                f"First batch of {resume['samples']:,} samples, {resume['workers']} workers: {start:.2f} s at the "
                f"start of an epoch, {middle:.2f} s in its middle, ratio **{middle / start:.2f}** (medians of "
                f"{len(runs)})."
            )
    if "mib" in result.get("memory", {}):
        memory = result["memory"]
        first, last = memory["mib"][0], memory["mib"][-1]
        lines.append(
            f"Memory of {memory['processes']} processes after epoch 1 and epoch {len(memory['mib'])}: PSS "
            f"{first['pss']:.0f} and {last['pss']:.0f} MiB, ratio **{last['pss'] / first['pss']:.3f}**; RSS "
            f"{first['rss']:.0f} and {last['rss']:.0f} MiB, ratio **{last['rss'] / first['rss']:.3f}**."
        )
    return lines


def failures(result: dict[str, Any]) -> list[str]:
    lines = [f"- {name}: not measured: {reason}" for name, reason in result["not_available"].items()]
    seen = set()
    for record in result["rates"]:
        for run in record["runs"]:
            if "error" in run and (record["contestant"], run["error"]) not in seen:
                seen.add((record["contestant"], run["error"]))
                place = f"{record['side']} px, {record['cores']} cores, {record['workers']} workers"
                lines.append(f"- {record['contestant']}, {place}: {run['error']}")
    return lines


def page(result: dict[str, Any], plot: str) -> str:
    rates = medians(result, "images_per_second")
    per_core = medians(result, "images_per_core_second")
    measured = {name for cell in rates.values() for name in cell}
    names = [name for name in [*COLOURS, "floor"] if name in measured]
    machine, settings = result["machine"], result["settings"]
    described = "; ".join(
        f"{side} px: {facts['images']:,} images, mean {facts['mean_bytes']:,} bytes, {facts['bits_per_pixel']} bits "
        f"per pixel"
        for side, facts in result["data"].items()
    )
    packages: dict[str, dict[str, str]] = {name: found for name, found in result["versions"].items() if found}
    lines = [
        f"# Loader: images per second, {machine['cores']} CPU cores, {result['date']}",
        "",
        f"`benchmarks/loader.py`, batches of {settings['batch']}, side {settings['side']}, crops of "
        f"{settings['crop_area'][0]} to {settings['crop_area'][1]} of the area; medians of {settings['repetitions']} "
        f"repetitions in turn, of at least {settings['seconds']} s each; largest spread of one measurement "
        f"{100 * spread(result):.0f} % of its median. Drawn photographs, longer side as named, quality "
        f"{settings['jpeg_quality']}: {described}.",
        "",
        *(["**A smoke run: these figures mean nothing.**", ""] if settings["quick"] else []),
        f"![Images per second by contestant]({plot})",
        "",
        "`floor` is clipdist's decoder alone, on bytes in memory, one process for each core that the workers can use.",
        "",
        *table(rates, names),
        "",
        "Images per second of processor time, main process and workers together: what other work on the machine "
        "disturbs less. Here the floor is that of one core.",
        "",
        *table(per_core, names),
        "",
        *[line for sentence in own_figures(result) for line in (sentence, "")],
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; load "
        f"{machine['load_at_start']:.1f} before, {machine['load_at_end']:.1f} at the end; {machine['seconds']} s. "
        f"Python {machine['python']}.",
        "",
        "Versions: "
        + "; ".join(
            f"{name}: " + ", ".join(f"{package} {number}" for package, number in found.items())
            for name, found in packages.items()
        )
        + ".",
    ]
    if missing := failures(result):
        lines += ["", "Not measured:", "", *missing]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each side, a group of bars for each cell that all contestants share, the floor as a line above."""
    rates = medians(result, "images_per_second")
    shared = [(1, 1), (2, 2)]
    sides = sorted({side for side, _, _ in rates})
    figure, axes = plt.subplots(1, len(sides), figsize=(4.3 * len(sides), 4.4), squeeze=False)
    drawn: dict[str, Any] = {}
    for axis, side in zip(axes[0], sides, strict=True):
        groups = [(cores, workers) for cores, workers in shared if (side, cores, workers) in rates]
        for position, (cores, workers) in enumerate(groups):
            cell = rates[side, cores, workers]
            names = [name for name in COLOURS if name in cell]
            width = 0.86 / max(1, len(names))
            for number, name in enumerate(names):
                x = position - 0.43 + (number + 0.5) * width
                drawn[name] = axis.bar(x, cell[name], width * 0.92, color=COLOURS[name])
                text = f"{cell[name]:,.0f}"
                axis.annotate(text, (x, cell[name]), (0, 2), textcoords="offset points", ha="center", fontsize=7)
            if "floor" in cell:
                (drawn["floor"],) = axis.plot(
                    [position - 0.45, position + 0.45],
                    [cell["floor"]] * 2,
                    color="#333333",
                    linestyle="--",
                    linewidth=1.2,
                )
        axis.set_xticks(range(len(groups)), [f"{c} core{'s' * (c > 1)}, {w} worker{'s' * (w > 1)}" for c, w in groups])
        axis.set_title(f"JPEGs of {side} px", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", length=0)
        axis.margins(y=0.1)
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("images per second")
    labels = [{"floor": "decoder alone"}.get(name, LABELS.get(name, name)) for name in drawn]
    figure.legend(drawn.values(), labels, loc="lower center", ncols=len(drawn), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> None:
    path = Path(sys.argv[1])
    result = json.loads(path.read_text(encoding="utf-8"))
    plot = path.with_suffix(".png")
    draw(result, plot)
    path.with_suffix(".md").write_text(page(result, plot.name), encoding="utf-8")
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
