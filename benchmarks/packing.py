"""How fast is packing images that stay as they are, beside copying the same files? Seconds, MB/s and ratios as JSON.

python benchmarks/packing.py --images 8000 --side 512 --repeats 3 --folder /scratch

Makes a folder of JPEGs with the sizes of photographs and a table of captions (fixed seed), then runs each contender on
these files, in turn, in an order that changes from round to round. Before each run the files are put out of the page
cache, and what the last run wrote is deleted and synced. Each run is a process of its own, start included, and counts
until its bytes are on the disk: `clipdist pack` does that by itself, the others are followed by `sync -f`. The table on
standard error gives medians; `of cp` is the speed as a share of that of `cp -r` (above 1: faster).
"""

import argparse
import csv
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

TAR_WRITER = """
import csv, sys, webdataset
source, table, out = sys.argv[1:]
writer = None
with open(table, newline="") as rows:
    for number, row in enumerate(csv.DictReader(rows)):
        if number % 1000 == 0:
            if writer:
                writer.close()
            writer = webdataset.TarWriter(f"{out}/train-{number // 1000:06d}.tar")
        with open(f"{source}/{row['image']}", "rb") as file:
            image = file.read()
        writer.write({"__key__": row["image"].removesuffix(".jpg"), "jpg": image, "json": {"text": row["text"]}})
writer.close()
"""


def photograph(draw: np.random.Generator, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: noise whose amplitude falls with frequency as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    noise = []
    for exponent in (1.3, 1.7, 1.9):
        spectrum = frequency**-exponent * np.exp(2j * np.pi * draw.random(frequency.shape))
        plane = np.fft.irfft2(spectrum, (side, side))
        noise.append(plane / plane.std())
    grey, warm, green = noise
    pixels = 128 + np.stack([45 * grey + 16 * warm, 45 * grey + 6 * green, 45 * grey - 16 * warm], -1)
    return pixels.clip(0, 255).astype(np.uint8)


def make_photographs(folder: Path, images: int, side: int) -> int:
    """Writes `images` JPEGs, a thousand to a folder, and `pairs.csv` beside them; the bytes of all."""
    draw, total = np.random.default_rng(0), 0
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "text"])
        for number in range(images):
            if number % 16 == 0:
                scene = photograph(draw, 2 * side)
            top, left = draw.integers(0, side, 2)
            height = int(side * draw.choice([0.75, 1.0]))
            crop = Image.fromarray(scene[top : top + height, left : left + side])
            buffer = io.BytesIO()
            crop.save(buffer, "JPEG", quality=90)
            name = f"{number // 1000:03d}/{number:06d}.jpg"
            (folder / "photographs" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "photographs" / name).write_bytes(buffer.getvalue())
            table.writerow([name, f"a photograph of hills, number {number}, taken in the morning"])
            total += buffer.tell()
    return total


def contenders(source: Path, table: Path) -> dict[str, list[str]]:
    """Command lines; `OUT` stands for the folder that each writes to."""
    python = [sys.executable, "-c", TAR_WRITER, str(source), str(table), "OUT"]
    commands = {
        "cp -r": ["cp", "-r", str(source), "OUT"],
        "tar cf": ["tar", "cf", "OUT/all.tar", "-C", str(source.parent), source.name],
        "webdataset TarWriter": python,
    }
    for check in ("none", "header", "decode"):
        for workers in (1, 2):
            words = ["pack", str(table), "--images", str(source), "--out", "OUT/set", "--check", check]
            name = f"clipdist pack --check {check} --workers {workers}"
            commands[name] = [sys.executable, "-m", "clipdist.cli", *words, "--workers", str(workers)]
    return commands


def forget(source: Path) -> None:
    """Puts the files out of the page cache, so that each run reads them from the disk."""
    for path in source.rglob("*.jpg"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(name: str, command: list[str], out: Path) -> float:
    """Seconds until everything is on the disk."""
    out.mkdir()
    words = [word.replace("OUT", str(out)) for word in command]
    began = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if not name.startswith("clipdist"):
        subprocess.run(["sync", "-f", str(out)], check=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    subprocess.run(["sync", "-f", str(out.parent)], check=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--side", type=int, default=512, help="longer side in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the one for temporary files)")
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = make_photographs(folder, args.images, args.side)
        subprocess.run(["sync", "-f", name], check=True)
        source, table = folder / "photographs", folder / "pairs.csv"
        commands = list(contenders(source, table).items())
        for repeat in range(args.repeats):
            turn = repeat * 4 % len(commands)
            for contender, command in commands[turn:] + commands[:turn]:
                if not args.warm:
                    forget(source)
                seconds.setdefault(contender, []).append(timed(contender, command, folder / "out"))
    copied = statistics.median(seconds["cp -r"])
    results = [
        {
            "contender": contender,
            "median_seconds": round(statistics.median(all_seconds), 3),
            "megabytes_per_second": round(size / 1e6 / statistics.median(all_seconds), 1),
            "of_cp": round(copied / statistics.median(all_seconds), 3),
            "all_seconds": [round(one, 3) for one in all_seconds],
        }
        for contender, all_seconds in ((name, seconds[name]) for name, _ in commands)
    ]
    for result in results:
        print(
            f"{result['contender']:40} {result['median_seconds']:8.2f} s {result['megabytes_per_second']:8.1f} MB/s "
            f"{result['of_cp']:6.2f} of cp",
            file=sys.stderr,
        )
    described = {"images": args.images, "side": args.side, "bytes": size, "repeats": args.repeats, "warm": args.warm}
    machine = {"cores": os.cpu_count(), "platform": platform.platform(), "load_at_end": os.getloadavg()[0]}
    print(json.dumps({"benchmark": "packing", **described, "results": results} | machine, indent=1))


if __name__ == "__main__":
    main()
