"""How fast is ISIC 2024's HDF5 packed, beside a plain copy of the bytes in it? Seconds and ratios as JSON.

python benchmarks/isic.py --tiles 8000 --repeats 5 --folder /scratch

Draws 500 tiles of 131 pixels with the size that the published ones have on average (3 kB), and repeats them under other
names and patients, as Kaggle's table and train-image.hdf5. The copy is the plainest reader there is: h5py gives each
dataset's bytes, which go one after another into one file, and fsync. Packing is all that `shards/isic.py` does, in one
process, and as it does by default, in one more for each core, whose start counts: the table read, images located,
captions, the split, shards, indexes and checksums, fsync; each part is timed. In turn, in an order that changes from
round to round, each run in a process of its own (forked, so that imports are done); the file is put out of the page
cache before (`--warm` leaves it). On a machine that others use, compare seconds of processors with each other.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clipdist.data.sets.pack import pack_pairs
from clipdist.data.sets.recode import Check, ImageOptions
from clipdist.prepare.phantom_isic import PhantomOptions, write_isic_layout

# What takes long to import is imported in functions, as in `shards/isic.py`: processes that pack read this file again.
DRAWN = 500
FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}


def import_all() -> None:
    """In the first process, whose imports are not counted; those of the others are."""
    import clipdist.data.sets.tables
    import clipdist.prepare.isic
    import clipdist.prepare.splits
    import clipdist.prepare.units  # noqa: F401


def build(folder: Path, tiles: int, quality: int) -> Path:
    """A folder as Kaggle's."""
    import h5py
    import numpy as np
    import pandas as pd

    from clipdist.prepare.isic import KAGGLE

    drawn, raw = folder / "drawn", folder / "raw"
    write_isic_layout(drawn, PhantomOptions(min(DRAWN, tiles), "hdf5", 131, quality=quality))
    raw.mkdir()
    table = pd.read_csv(drawn / KAGGLE, dtype=str, keep_default_na=False)
    copies = -(-tiles // len(table))
    many = pd.concat([table.assign(patient_id=table["patient_id"] + f"_{copy}") for copy in range(copies)])[:tiles]
    names = [f"ISIC_{number:07d}" for number in range(tiles)]
    with h5py.File(drawn / "train-image.hdf5") as source, h5py.File(raw / "train-image.hdf5", "w") as file:
        images = [np.bytes_(source[name][()]) for name in table["isic_id"]]
        for number, name in enumerate(names):
            file.create_dataset(name, data=images[number % len(images)])
    many.assign(isic_id=names).to_csv(raw / KAGGLE, index=False)
    return raw


def copy_datasets(raw: Path, out: Path) -> dict[str, float]:
    import h5py

    with h5py.File(raw / "train-image.hdf5") as source, open(out / "all", "wb") as copy:
        for name in source:
            copy.write(source[name][()])
        copy.flush()
        os.fsync(copy.fileno())
    return {}


def copy_file(raw: Path, out: Path) -> dict[str, float]:
    subprocess.run(["cp", raw / "train-image.hdf5", out / "all"], check=True)
    subprocess.run(["sync", out / "all"], check=True)
    return {}


def pack(raw: Path, out: Path, check: Check, workers: int | None = 0) -> dict[str, float]:
    from clipdist.data.sets.tables import split_pairs
    from clipdist.prepare.isic import read_isic

    began = time.perf_counter()
    found = read_isic(raw, metadata=True)
    read = time.perf_counter()
    splits = split_pairs(found.pairs, FRACTIONS, 0, found.strata())
    split = time.perf_counter()
    pack_pairs(splits, out / "set", images=ImageOptions(check=check), workers=workers, quiet=True)
    return {"reading": read - began, "splitting": split - read, "writing": time.perf_counter() - split}


CONTENDERS: dict[str, tuple[Callable[..., dict[str, float]], tuple[Any, ...]]] = {
    "copy, dataset by dataset": (copy_datasets, ()),
    "cp of the file": (copy_file, ()),
    "packing, --check none": (pack, ("none",)),
    "packing, --check header": (pack, ("header",)),
    "packing, --check decode": (pack, ("decode",)),
    "packing by default: a process per core": (pack, ("decode", None)),
}


def forget(raw: Path) -> None:
    """Puts the file out of the page cache."""
    descriptor = os.open(raw / "train-image.hdf5", os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def timed(name: str, raw: Path, folder: Path) -> dict[str, float]:
    """Seconds on the clock and of the processors, of `CONTENDERS[name]` in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        process = context.Process(target=_answer, args=(there, name, raw, Path(out)))
        process.start()
        answer: dict[str, float] = here.recv()
        process.join()
    subprocess.run(["sync", "-f", folder], check=True)
    return answer


def _answer(pipe: Any, name: str, raw: Path, out: Path) -> None:
    work, arguments = CONTENDERS[name]
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)

    def used() -> float:
        return sum(one.ru_utime + one.ru_stime for one in map(resource.getrusage, kinds))

    before, began = used(), time.perf_counter()
    parts = work(raw, out, *arguments)
    pipe.send({"seconds": time.perf_counter() - began, "cpu_seconds": used() - before, **parts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=8000)
    parser.add_argument("--quality", type=int, default=60, help="of the JPEGs: 60 makes about 3 kB of a tile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the one for temporary files)")
    parser.add_argument("--warm", action="store_true", help="leave the file in the page cache")
    args = parser.parse_args()
    import_all()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        raw = build(folder, args.tiles, args.quality)
        subprocess.run(["sync", "-f", name], check=True)
        size = (raw / "train-image.hdf5").stat().st_size
        names = list(CONTENDERS)
        for repeat in range(args.repeats):
            turn = repeat % len(names)
            for contender in names[turn:] + names[:turn]:
                if not args.warm:
                    forget(raw)
                found[contender].append(timed(contender, raw, folder))

    def median(contender: str, key: str) -> float:
        return statistics.median(one[key] for one in found[contender])

    results = []
    for contender, runs in found.items():
        row: dict[str, Any] = {"contender": contender}
        row |= {key: round(median(contender, key), 3) for key in runs[0]}
        for key in ("seconds", "cpu_seconds"):
            row[f"{key}_of_copy"] = round(median(contender, key) / median(names[0], key), 2)
        row["microseconds_per_tile"] = round(1e6 * row["seconds"] / args.tiles, 1)
        results.append(row | {"all_seconds": [round(one["seconds"], 3) for one in runs]})
        print(
            f"{contender:38} {row['seconds']:7.2f} s {row['cpu_seconds']:7.2f} s of processors "
            f"{row['seconds_of_copy']:5.2f} {row['cpu_seconds_of_copy']:5.2f} of the copy",
            file=sys.stderr,
        )
    described = {
        "tiles": args.tiles,
        "bytes": size,
        "quality": args.quality,
        "repeats": args.repeats,
        "warm": args.warm,
    }
    machine = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("h5py", "numpy", "pandas", "pillow")},
        "load_at_end": os.getloadavg()[0],
    }
    print(json.dumps({"benchmark": "isic", **described, "results": results} | machine, indent=1))


if __name__ == "__main__":
    main()
