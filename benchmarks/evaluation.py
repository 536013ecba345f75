"""How long does scoring a gallery take, and how much memory? One line of JSON for each size.

python benchmarks/evaluation.py --sizes 20000 50000 100000 --width 512

Unit vectors of random images, and of texts that lie near them: both directions ranked exactly, over the whole gallery,
with 1,000 resamples. Each size is measured in a process of its own, whose peak memory is thus that of this size alone;
the features are made in it, and what they take is told beside. Time grows with images × texts, memory with images +
texts: what a larger gallery takes follows from these, and is told as `expected` for --expect rows.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

from clipdist.evaluate.retrieval import retrieval_scores


def measure(rows: int, width: int, bootstrap: int) -> dict[str, Any]:
    """Seconds and peak memory of one gallery of `rows` images and as many texts."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((rows, width), dtype=np.float32)
    text = image + rng.standard_normal((rows, width), dtype=np.float32) * 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
    scores = retrieval_scores(image, text, np.arange(rows), bootstrap=bootstrap)
    return {
        "rows": rows,
        "width": width,
        "bootstrap": bootstrap,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "features_mib": round(2 * rows * width * 4 / 2**20),
        "before_mib": round(before / 1024),
        "whole_matrix_mib": round(rows * rows * 4 / 2**20),
        "image_to_text_R@1": scores.image_to_text.recall[1].value,
    }


def expected(measured: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """By the largest size measured for the time, and by the two largest for the memory."""
    smaller, largest = measured[-2], measured[-1]
    slope = (largest["peak_mib"] - smaller["peak_mib"]) / (largest["rows"] - smaller["rows"])
    return {
        "rows": rows,
        "cpu_hours": round(largest["cpu_seconds"] * (rows / largest["rows"]) ** 2 / 3600, 2),
        "peak_gib": round((largest["peak_mib"] + slope * (rows - largest["rows"])) / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 50_000], help="rows of the gallery")
    parser.add_argument("--width", type=int, default=512, help="of the features")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples")
    parser.add_argument("--expect", type=int, default=1_000_000, help="rows to work out time and memory for")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.width, args.bootstrap)))
        return
    found = []
    for rows in args.sizes:
        words = [sys.executable, __file__, "--one", str(rows), "--width", str(args.width)]
        done = subprocess.run([*words, "--bootstrap", str(args.bootstrap)], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "load": [round(n, 2) for n in os.getloadavg()]}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    body: dict[str, Any] = {"measured": found, "machine": machine, "versions": versions}
    if len(found) > 1:
        body["expected"] = expected(found, args.expect)
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
