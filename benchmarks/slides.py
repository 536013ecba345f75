"""How fast are slides cut into tiles, beside reading every tile at level 0 and resizing it? Seconds and ratios as JSON.

python benchmarks/slides.py --side 20000 --slides 2 --folder /scratch

Makes pyramids with levels 1, 4, 16 and 64 out of tissue (the packages scikit-image and wsidicom-data, where installed,
carry a photograph each of H&E and IHC; else it is drawn), then for each stride runs both ways on the same slides, in
turn, each in a process of its own, start included. The naive loop is the published description: each tile of the grid
is read at level 0, resized to 299, judged, and stored by Pillow as PNG if it is tissue; one process. It is given the
slide's Otsu threshold, so that both judge alike; `same_tiles` says whether they chose the same. `peak_mib` is the
largest resident set of any process of a run, interpreter and libraries included; on a machine that others use, compare
seconds of processors rather than those of the clock.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipdist.prepare.phantom_slides import mirrored, write_pyramid
from clipdist.prepare.phantom_tissue import draw_tissue
from clipdist.prepare.slide_reader import SlideReader
from clipdist.prepare.slides import SlideFile, TilingOptions, judge, tile_slides

PHOTOGRAPHS = {"he": ("wsidicom_data", "data/test_tile.png"), "ihc": ("skimage", "data/ihc.png")}


def tissue() -> dict[str, np.ndarray]:
    """Patches that join themselves at their edges, by name."""
    found = {}
    for name, (package, inside) in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        path = Path(str(spec.origin)).parent / inside if spec and spec.origin else None
        if path and path.is_file():
            with Image.open(path) as picture:
                found[name] = mirrored(np.asarray(picture.convert("RGB")))
    return found or {"drawn": draw_tissue("dcis", 0)}


def build(path: Path, patch: np.ndarray, side: int, seed: int) -> None:
    write_pyramid(path, patch, (side, side), seed=seed, factors=(1, 4, 16, 64))


def naive(slides: list[Path], thresholds: list[int], out: Path, options: TilingOptions) -> dict[str, list[list[int]]]:
    """The tiles that the published description keeps, [x, y] by slide."""
    kept = {}
    for slide, threshold in zip(slides, thresholds, strict=True):
        (out / slide.stem).mkdir(parents=True)
        kept[slide.stem] = []
        with SlideReader(slide) as reader:
            for y in range(0, reader.height - options.stride + 1, options.stride):
                for x in range(0, reader.width - options.stride + 1, options.stride):
                    whole = reader.region(x, y, 0, options.stride, options.stride)
                    tile = whole.resize((options.side, options.side), Image.Resampling.BICUBIC)
                    share, white = judge(tile, threshold, options.white_above)
                    if share >= options.min_tissue and white < options.max_white:
                        tile.save(out / slide.stem / f"{x:06d}_{y:06d}.png")
                        kept[slide.stem].append([x, y])
    return kept


def ours(slides: list[Path], out: Path, options: TilingOptions, workers: int) -> dict[str, Any]:
    files = [SlideFile(path.stem, path) for path in slides]
    summary = tile_slides(files, out, options, workers=workers, quiet=True)
    return {
        "kept": {slide.name: [[tile.x, tile.y] for tile in slide.tiles] for slide in summary.slides},
        "otsu": [slide.record["otsu"] for slide in summary.slides],
        "places": sum(slide.record["places"] for slide in summary.slides),
        "read": sum(slide.record["read"] for slide in summary.slides),
        "level": summary.slides[0].record["level"],
    }


def measured(work: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, float]]:
    """The answer of `work` in a process of its own; seconds on the clock and of the processors, peak MiB."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    began = time.perf_counter()
    process = context.Process(target=_answer, args=(there, work, arguments))
    process.start()
    answer, found = here.recv()
    process.join()
    return answer, {"seconds": round(time.perf_counter() - began, 2), **found}


def _answer(pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    answer = work(*arguments)
    used = [resource.getrusage(kind) for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = round(sum(one.ru_utime + one.ru_stime for one in used), 2)
    pipe.send((answer, {"cpu_seconds": cpu, "peak_mib": round(max(one.ru_maxrss for one in used) / 1024)}))


def compared(slides: list[Path], folder: Path, stride: int, workers: list[int]) -> list[dict[str, Any]]:
    """A row for each way of cutting `slides` at this stride."""
    options = TilingOptions(stride=stride)
    rows = []
    for count in workers:
        answer, found = measured(ours, slides, folder / f"{stride}-{count}", options, count)
        rows.append({"way": "clipdist", "processes": max(1, count), **found, **answer})
    kept, found = measured(naive, slides, rows[0]["otsu"], folder / f"{stride}-naive", options)
    places = rows[0]["places"]
    rows.append({"way": "naive", "processes": 1, **found, "kept": kept, "places": places, "read": places, "level": 0})
    for row in rows:
        row.pop("otsu", None)
        row.update(
            stride=stride,
            tiles=sum(map(len, kept.values())),
            same_tiles=row.pop("kept") == kept,
            times_naive=round(found["seconds"] / row["seconds"], 2),
            times_naive_cpu=round(found["cpu_seconds"] / row["cpu_seconds"], 2),
        )
        print(
            f"stride {stride:5} {row['way']:>9}, processes: {row['processes']} {row['seconds']:8.2f} s "
            f"({row['cpu_seconds']:.2f} s of processors) {row['times_naive']:6.2f} × {row['peak_mib']:5} MiB, same "
            f"tiles: {row['same_tiles']}",
            file=sys.stderr,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=20000, help="pixels along a slide")
    parser.add_argument("--slides", type=int, default=2)
    parser.add_argument("--strides", type=int, nargs="+", default=[1024, 2048, 3072])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="0: one process, the first one")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the one for temporary files)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, patches = Path(name), tissue()
        slides = []
        for number in range(args.slides):
            kind = list(patches)[number % len(patches)]
            path = folder / f"{kind}-{number}.svs"
            slides.append(path)
            # Elsewhere too: a process inherits the largest resident set of the one that started it.
            measured(build, path, patches[kind], args.side, number)
        sizes = [path.stat().st_size for path in slides]
        rows = [row for stride in args.strides for row in compared(slides, folder, stride, args.workers)]
    totals = {
        f"{way}, processes: {count}": round(
            sum(r["seconds"] for r in rows if (r["way"], r["processes"]) == (way, count)), 2
        )
        for way, count in {(row["way"], row["processes"]): None for row in rows}
    }
    described = {
        "seconds_of_all_strides": totals,
        "side": args.side,
        "slides": [path.stem for path in slides],
        "bytes": sizes,
        "levels": [1, 4, 16, 64],
    }
    machine = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("openslide-python", "openslide-bin", "pillow", "numpy")},
        "load_at_end": os.getloadavg()[0],
    }
    print(json.dumps({"benchmark": "slides", **described, "results": rows} | machine, indent=1))


if __name__ == "__main__":
    main()
