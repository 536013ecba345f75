"""How fast phantoms are drawn, encoded and written: images per second, by number of processes. JSON on standard output.

python benchmarks/phantom.py --images 2000 --side 224 --workers 1 2
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

from clipdist.prepare.phantom import VERSION, write_skincap_layout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts; all are written down")
    args = parser.parse_args()
    results = []
    for workers in args.workers:
        rates = []
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                write_skincap_layout(Path(folder) / "phantom", args.images, args.side, 0, workers)
                rates.append(args.images / (time.perf_counter() - began))
        results.append({"workers": workers, "images_per_second": max(rates), "all": rates})
    load = os.getloadavg()[0]
    machine = {"cores": os.cpu_count(), "platform": platform.platform(), "load_at_end": load}
    print(
        json.dumps({"benchmark": "phantom", "version": VERSION, **vars(args), "results": results} | machine, indent=1)
    )


if __name__ == "__main__":
    main()
