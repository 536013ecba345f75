"""Progress that suits where it is shown: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(
    items: Iterable[T],
    *,
    total: int | None = None,
    unit: str = "item",
    description: str = "",
    quiet: bool = False,
    every_seconds: float = 10.0,
) -> Iterator[T]:
    """Yields `items` while reporting to standard error.

    On a terminal this is a bar. Elsewhere (a SLURM log, CI) it is one line every `every_seconds` and one at the
    end, because carriage returns make such files unreadable. `quiet` reports nothing: for ranks other than zero.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    if quiet:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, total=total, unit=unit, desc=description, dynamic_ncols=True)
    else:
        yield from _lines(items, total, unit, description, every_seconds)


def _lines(items: Iterable[T], total: int | None, unit: str, description: str, every_seconds: float) -> Iterator[T]:
    start = last = time.monotonic()
    count, told = 0, -1
    for item in items:
        yield item
        count += 1
        now = time.monotonic()
        if now - last >= every_seconds:
            last, told = now, count
            print(_line(count, total, unit, description, now - start), file=sys.stderr, flush=True)
    if count != told:
        print(_line(count, total, unit, description, time.monotonic() - start), file=sys.stderr, flush=True)


def _line(count: int, total: int | None, unit: str, description: str, seconds: float) -> str:
    share = f"{count:,}" if total is None else f"{count:,} of {total:,}"
    rate = count / seconds if seconds > 0 else 0.0
    plural = unit if total == 1 else f"{unit}es" if unit.endswith("ch") else f"{unit}s"
    return f"{description or 'progress'}: {share} {plural}, {rate:,.1f}/s, {seconds:.0f} s"
