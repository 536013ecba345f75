"""Lists runs: state, step, loss, speed, the last sign of life, how often they were started."""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

HEADINGS = ("run", "state", "step", "loss", "best", "pairs/s", "last sign", "starts", "lost steps", "job")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], help="runs, or folders of runs (runs)")


def run(args: argparse.Namespace) -> int:
    from clipdist.cluster.runs import read_runs

    rows = [HEADINGS]
    for run in read_runs(args.folders):
        since = "" if run.seconds_since is None else f"{ago(run.seconds_since)} ago"
        numbers = (number(run.loss, ".4f"), number(run.score, ".4f"), number(run.pairs_per_second, ",.0f"))
        rows.append(
            (run.name, run.state, f"{run.step:,}", *numbers, since, str(run.starts), str(run.lost_steps), run.job)
        )
    print(aligned(rows, left=(0, 1)))
    return 0


def aligned(rows: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """A table in columns; those of `left` begin on one line, the others, numbers, end on one."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        pairs = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(word.ljust(w) if n in left else word.rjust(w) for n, (word, w) in pairs).rstrip())
    return "\n".join(lines)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def ago(seconds: float) -> str:
    """Readable: 45 s, 12 min, 3 h, 2 d."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
