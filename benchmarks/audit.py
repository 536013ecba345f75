"""How long does an audit take: seeing every image, and finding near-duplicates among 100,000 and a million? JSON.

python benchmarks/photographs.py --out data/benchmark-photographs --sides 512 --images 20000
python benchmarks/audit.py --set data/benchmark-photographs/512 --workers 2 --hashes 100000 1000000

The set is looked at with nothing kept from before, its files out of the page cache: reading, decoding at a fraction of
the size, hashes, thumbnails, quality and captions. Then duplicates are searched and confirmed, and all else is counted.
The drawn photographs are pieces of few scenes, 32 of each, so many of them are near-duplicates, which is the dear case.

Hashes are compared apart from images, whole and middle of each picture, in one process: of random windows of fields
whose amplitude falls with frequency as in photographs, since unlike random bits neighbouring bits of real hashes
depend on each other. For a sample of them every pair within the radius is looked for in the plain way, and must have
been found.
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.data.sets.duplicates import CANDIDATE_BITS, bit_counts, find_duplicates, near_pairs, telling
from clipdist.data.sets.survey import survey_set
from clipdist.evaluate.audit import audit_survey

FIELD, WINDOWS = 512, 4000  # pixels of a field's side, and pictures cut from each
CHECKED = 300


def forget(folder: Path) -> None:
    """Puts the files out of the page cache."""
    for path in folder.glob("*.tar*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure_set(folder: Path, workers: int) -> dict[str, Any]:
    """Seconds of each part, for the set, and what they come to for 100,000 images."""
    forget(folder)
    with tempfile.TemporaryDirectory() as state:
        began = time.perf_counter()
        survey = survey_set(folder, workers=workers, state=Path(state), again=True)
        seen = time.perf_counter() - began
        kept = sum(path.stat().st_size for path in Path(state).iterdir())
        began = time.perf_counter()
        found = find_duplicates(survey.samples["image"], survey.looks)
        searched = time.perf_counter() - began
        began = time.perf_counter()
        body = audit_survey(survey).body
        whole = time.perf_counter() - began
    images = len(survey.rows)
    return {
        "images": images,
        "mean_megapixels": round(float((survey.samples["width"] * survey.samples["height"]).mean()) / 1e6, 3),
        "unreadable": len(survey.bad),
        "workers": workers,
        "seconds_to_see": round(seen, 2),
        "images_per_second": round(images / seen, 1),
        "seconds_to_find_duplicates": round(searched, 2),
        "seconds_for_all_that_is_compared": round(whole, 2),
        "near_duplicate_pairs": len(found.pairs_P2),
        "faults": {name: one["count"] for name, one in body["quality"].items()},
        "bytes_kept_per_image": round(kept / images),
        "seconds_to_see_100000": round(1e5 * seen / images, 1),
    }


def field_hashes(count: int, seed: int = 0) -> np.ndarray:
    """uint64 [2, count]: difference hashes of windows of 1/f fields, and of their middles."""
    draw, hashes = np.random.default_rng(seed), []
    frequency = np.hypot(np.fft.fftfreq(FIELD)[:, None], np.fft.rfftfreq(FIELD)[None])
    frequency[0, 0] = np.inf
    for start in range(0, count, WINDOWS):
        spectrum = frequency ** -draw.uniform(1.0, 1.5) * np.exp(2j * np.pi * draw.random(frequency.shape))
        sums = np.pad(np.fft.irfft2(spectrum, (FIELD, FIELD)).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        number = min(WINDOWS, count - start)
        sides = draw.uniform(0.25, 0.6, (number, 2)) * FIELD
        corners = draw.random((number, 2)) * (FIELD - sides)
        hashes.append([window_hashes(sums, corners + cut * sides / 2, sides * (1 - cut)) for cut in (0.0, 0.08)])
    return np.concatenate(hashes, axis=1)


def window_hashes(sums: np.ndarray, corners: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """uint64 [n]: the hash of 8 × 9 means over each window, by a table of sums."""
    rows = np.rint(corners[:, :1] + sides[:, :1] * np.linspace(0, 1, 9)).astype(int)
    columns = np.rint(corners[:, 1:] + sides[:, 1:] * np.linspace(0, 1, 10)).astype(int)
    at = sums[rows[:, :, None], columns[:, None]]
    areas = np.diff(rows, axis=1)[:, :, None] * np.diff(columns, axis=1)[:, None]
    means = np.diff(np.diff(at, axis=1), axis=2) / areas
    bits = np.packbits((means[:, :, 1:] > means[:, :, :-1]).reshape(len(means), 64), axis=1)
    return np.ascontiguousarray(bits).view(">u8")[:, 0].astype(np.uint64)


def measure_hashes(count: int) -> dict[str, Any]:
    hashes = field_hashes(count).reshape(-1)
    hashes = hashes[telling(hashes)]
    crowded = np.zeros(len(hashes), bool)
    began, found = time.perf_counter(), 0
    sample = np.random.default_rng(1).choice(len(hashes), min(CHECKED, len(hashes)), replace=False)
    is_sampled = np.zeros(len(hashes), bool)
    is_sampled[sample] = True
    of_sample: set[tuple[int, int]] = set()
    for first, second in near_pairs(hashes, crowded, CANDIDATE_BITS):
        found += len(first)
        some = is_sampled[first] | is_sampled[second]
        of_sample |= set(zip(first[some].tolist(), second[some].tolist(), strict=True))
    seconds = time.perf_counter() - began
    plain = set()
    for row in sample:
        others = np.flatnonzero(bit_counts(hashes ^ hashes[row]) <= CANDIDATE_BITS)
        plain |= {(min(int(row), other), max(int(row), other)) for other in others.tolist() if other != row}
    return {
        "pictures": count,
        "hashes": len(hashes),
        "bits": CANDIDATE_BITS,
        "seconds": round(seconds, 2),
        "pairs": found,
        "cut_short": int(crowded.sum()),
        "pairs_of_sample": len(plain),
        "of_these_found": len(plain & of_sample),
        "too_many": len(of_sample - plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, help="a shard set; without one only hashes are compared")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hashes", type=int, nargs="*", default=[100_000, 1_000_000])
    args = parser.parse_args()
    load = [round(os.getloadavg()[0], 2)]
    body: dict[str, Any] = {"benchmark": "audit"}
    if args.set:
        body["set"] = measure_set(args.set, args.workers)
        print(body["set"], file=sys.stderr)
        load.append(round(os.getloadavg()[0], 2))
    body["hashes"] = []
    for count in args.hashes:
        body["hashes"].append(measure_hashes(count))
        print(body["hashes"][-1], file=sys.stderr)
        load.append(round(os.getloadavg()[0], 2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    machine = {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    print(json.dumps(body | machine | {"load_averages": load, "peak_gib": round(peak, 2)}, indent=1))


if __name__ == "__main__":
    main()
