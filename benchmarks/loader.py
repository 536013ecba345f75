"""How fast images reach the training process, against other loaders and against the decoder alone, in one run.

benchmarks/peers/setup.sh
python benchmarks/loader.py                # draws and converts the sets first, when they are not there
python benchmarks/loader.py --quick        # smoke run

Every contestant reads the same JPEGs at the same side with crops of the same area, in batches of 256, in processes of
its own environment (peers/contestant.py). They take turns, A B C A B C …, so that what else the machine does meets all;
the median of the repetitions counts and all are written down. The page cache is warm for all. With --quick the figures
mean nothing: so short a time mostly counts what was prepared before the clock started.

    clipdist     its training loader: read, check, decode, crop, tokenise, batch (uint8; the device normalises)
    cache        the same with data.cache=decoded
    open_clip    its reader, transforms and tokenizer (float32, normalised by the loader, as it does)
    webdataset   webdataset and torchvision's v2 transforms, clipdist's tokenizer (float32, normalised)
    litdata, streaming     LitData and MosaicML Streaming on the same bytes in their own formats, the same transforms
    floor        clipdist's decoder alone on bytes in memory: one process for each core that the cell's workers can use

Then, of clipdist: seconds to the first batch in the middle of an epoch against its start, and memory over 20 epochs.
Writes OUT.json, OUT.md and OUT.png.
"""

import argparse
import datetime
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from clipdist.data.config import DataConfig
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shards import BadSample, ShardSet
from clipdist.data.text import captions_of, train_wordpiece
from clipdist.errors import UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CONTESTANTS = ["clipdist", "cache", "open_clip", "webdataset", "litdata", "streaming", "floor"]
OWN_ENVIRONMENT = {"open_clip", "litdata", "streaming"}
CONVERTS = {"litdata", "streaming", "cache"}
# (workers, cores): for these contestants less is measured, so that a run stays short.
CELLS = {name: {(1, 1), (2, 2)} for name in ("webdataset", "litdata", "streaming")} | {"floor": {(0, 1), (2, 2)}}
LONG, LONG_SAMPLES = "long", 65_536


class Contestant:
    """A process that carries out orders; `missing` says why there is none."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.missing, self.versions, self.source = name, "", {}, ""
        environment = HERE / "peers" / f".venv-{name}" if name in OWN_ENVIRONMENT else None
        python = environment / "bin" / "python" if environment else Path(sys.executable)
        if name == "cache" and "cache" not in {field.name for field in fields(DataConfig)}:
            self.missing = "this version of clipdist has no data.cache"
        elif not python.exists():
            self.missing = f"no environment; make it with benchmarks/peers/setup.sh {name}"
        if self.missing:
            return
        single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [python, HERE / "peers" / "contestant.py", name, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(folder / f"{name}.log", "w", encoding="utf-8"),  # noqa: SIM115
            text=True,
            env=os.environ | single | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        )
        hello = self._answer()
        self.versions, self.source = hello.get("versions", {}), hello.get("source", "")
        self.missing = hello.get("error", "")

    def carry_out(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"error": "the process died; see its log beside the data"}
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            answer["error"] = answer["error"].replace(str(ROOT), "…")
        return answer

    def close(self) -> None:
        if hasattr(self, "_process"):
            self._process.communicate()


def readable(folder: Path, names: Sequence[int | str]) -> bool:
    """Whether this version of clipdist reads what an earlier one may have packed."""
    try:
        return all(ShardSet.open(folder / str(side)).split("train").read(0).texts for side in names)
    except (UserError, BadSample):
        return False


def prepare(folder: Path, sides: list[int], images: list[int]) -> dict[str, Any]:
    """The sets, once; what they are."""
    described = folder / "described.json"
    found = json.loads(described.read_text()) if described.exists() else {}
    if [found.get(str(side), {}).get("images") for side in sides] != images or not readable(folder, sides):
        words = ["--out", folder, "--sides", *map(str, sides), "--images", *map(str, images)]
        subprocess.run([sys.executable, HERE / "photographs.py", *words], check=True, stdout=subprocess.DEVNULL)
        found = json.loads(described.read_text())
    split = ShardSet.open(folder / str(sides[0])).split("train")
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        train_wordpiece(captions_of(split), 8000, 77).save(folder / "tokenizer")
    if not (folder / LONG / "manifest.json").exists() or not readable(folder, [LONG]):
        thumbnail = Image.open(io.BytesIO(split.read(0).image)).resize((64, 64))
        buffer = io.BytesIO()
        thumbnail.save(buffer, "JPEG")
        with ShardSetWriter(folder / LONG, samples_per_shard=4096, overwrite=True) as writer:
            for number in range(LONG_SAMPLES):
                writer.write("train", f"{number:06d}", buffer.getvalue(), "jpg", {"text": f"number {number}"})
    return found


def convert(folder: Path, contestant: Contestant, args: argparse.Namespace) -> None:
    """Lets a contestant put the sets into its own format, once; a decoded cache itself knows what it holds already."""
    for side in args.sides:
        done = folder / f"{side}-{contestant.name}.converted"
        manifest = str((folder / str(side) / "manifest.json").stat().st_mtime_ns)
        if contestant.name == "cache" or not done.exists() or done.read_text() != manifest:
            answer = contestant.carry_out(do="convert", side=side, batch=args.batch, workers=max(args.workers))
            if "error" in answer:
                contestant.missing = answer["error"]
                return
            done.write_text(manifest)


def warm(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def measure_rates(contestants: list[Contestant], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each cell and contestant, with all its repetitions."""
    cells = list(itertools.product(args.sides, args.cores, args.workers))
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    for repetition in range(args.repetitions):
        for side, cores, workers in cells:
            for contestant in contestants:
                if (workers, cores) not in CELLS.get(contestant.name, {(workers, cores)}):
                    continue
                settings = {"side": side, "cores": cores, "workers": workers}
                order = {**settings, "batch": args.batch, "seconds": args.seconds}
                answer = contestant.carry_out(do="rate", **order)
                record = records.setdefault(
                    (side, cores, workers, contestant.name), {"contestant": contestant.name, **settings, "runs": []}
                )
                record["runs"].append(answer)
                shown = answer.get("error") or f"{answer['images_per_second']:8.0f} images/s"
                place = f"{side:5d} px, {cores} cores, {workers} workers"
                print(f"{repetition + 1}: {place}, {contestant.name:10s} {shown}", file=sys.stderr, flush=True)
    return list(records.values())


def measure_clipdist(contestant: Contestant, args: argparse.Namespace) -> dict[str, Any]:
    workers, cores = max(args.workers), max(args.cores)
    common = {"workers": workers, "cores": cores, "batch": args.batch}
    resumed = [contestant.carry_out(do="resume", side=LONG, **common) for _ in range(2 * args.repetitions - 1)]
    grown = contestant.carry_out(do="memory", side=min(args.sides), epochs=3 if args.quick else 20, **common)
    return {"resume": {**common, "samples": LONG_SAMPLES, "runs": resumed}, "memory": {**common, **grown}}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "benchmark-photographs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/loader_<cores>cores_<date>")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--images", type=int, nargs="+", default=[8192, 4096, 2048], help="of each side")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=2.0, help="each measurement lasts at least this")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small sets, one short repetition, two cells")
    args = parser.parse_args()
    if args.quick:
        args.images, args.batch, args.seconds, args.repetitions = [512] * len(args.sides), 64, 0.3, 1
        args.cores, args.workers = [max(args.cores)], [max(args.workers)]
        args.data = args.data.with_name(f"{args.data.name}-quick")
    if len(args.sides) != len(args.images):
        parser.error("--images: expected one number for each of --sides")
    args.data.mkdir(parents=True, exist_ok=True)
    about, began = machine(), time.perf_counter()
    data = prepare(args.data, args.sides, args.images)
    contestants = [Contestant(name, args.data) for name in args.contestants]
    sources = {contestant.source for contestant in contestants if contestant.source}
    if len(sources) > 1:
        raise SystemExit("clipdist's source changed while the contestants started; start again when nobody edits it")
    for contestant in contestants:
        if contestant.name in CONVERTS and not contestant.missing:
            convert(args.data, contestant, args)
    warm(args.data)
    prepared = time.perf_counter()
    there = [contestant for contestant in contestants if not contestant.missing]
    rates = measure_rates(there, args)
    own = next((measure_clipdist(contestant, args) for contestant in there if contestant.name == "clipdist"), {})
    for contestant in contestants:
        contestant.close()
    about |= {"load_at_end": os.getloadavg()[0], "seconds": round(time.perf_counter() - prepared)}
    settings = {name: getattr(args, name) for name in ("batch", "seconds", "repetitions", "quick")}
    result = {
        "benchmark": "loader",
        "date": datetime.date.today().isoformat(),
        "machine": about | {"preparing_seconds": round(prepared - began)},
        "settings": settings | {"side": 224, "crop_area": [0.8, 1.0], "jpeg_quality": 90},
        "data": data,
        "source": next(iter(sources), ""),
        "versions": {contestant.name: contestant.versions for contestant in there},
        "not_available": {contestant.name: contestant.missing for contestant in contestants if contestant.missing},
        "rates": rates,
        **own,
    }
    out = args.out or HERE / "results" / f"loader_{about['cores']}cores_{result['date']}"
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(out.name + ".json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    subprocess.run([sys.executable, HERE / "loader_report.py", path], check=True)


if __name__ == "__main__":
    main()
