"""How many images a second does `clipdist embed` take in, beside the usual loop over a DataLoader, on the same cores?

python benchmarks/photographs.py --out data/benchmark-photographs --sides 512 --images 3072
python benchmarks/embedding.py --set data/benchmark-photographs/512 --towers timm:test_convnext:112 timm:test_vit:160

The usual loop is that of tools that embed image folders for retrieval: open_clip's evaluation transform on Pillow in
DataLoader workers, float32 batches to the tower, float16 rows kept and saved. Both read the same files, with the same
tower, in batches of the same size, in as many processes: the loop's workers, beside which its own process computes on
as many threads, and clipdist's processes of one thread each, with a thread that reads ahead. What starting takes is
left out: each is timed on two numbers of images, and the difference counts. They take turns; the least of the
repetitions' differences of seconds counts, and of processor seconds likewise, which a busy machine disturbs less.

Also measured: the same with --exact-pixels, and the cosines between features of reduced and exact pixels. Weights are
random. JSON on standard output.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

CONTESTANTS = ("loop", "clipdist", "clipdist_exact_pixels")
MICRO_BATCH = 64


def write_files(location: str, folder: Path, sizes: list[int]) -> None:
    """The set's images as files: the first n of them in a folder called n."""
    from clipdist.data.shards import ShardSet

    shard_set = ShardSet.open(location)
    splits = [shard_set.split(name) for name in shard_set.manifest.splits]
    samples = (split.read(number) for split in splits for number in range(len(split)))
    for number, sample in zip(range(max(sizes)), samples, strict=False):
        for size in sizes:
            if number < size:
                (folder / str(size)).mkdir(exist_ok=True)
                (folder / str(size) / f"{number:06d}.{sample.extension}").write_bytes(sample.image)


def write_model(tower: str, folder: Path) -> None:
    """A model folder with that tower and a small text tower, of random weights."""
    from clipdist.data.text import train_wordpiece
    from clipdist.model.build import build_model
    from clipdist.model.dual_encoder import ModelConfig
    from clipdist.model.saved import save_model
    from clipdist.model.towers import ImageTowerConfig, TextTowerConfig

    name, _, side = tower.rpartition(":")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = TextTowerConfig("hf:bert", pretrained=False, max_tokens=16, options=sizes)
    config = ModelConfig(image=ImageTowerConfig(name, side=int(side)), text=text, width=256)
    tokenizer = train_wordpiece(["a photograph of a dog", "a photograph of a tram"], 100, 16)
    save_model(folder, build_model(config, tokenizer, 0), tokenizer, scores={}, about={})


def run_loop(model: Path, images: Path, out: Path, processes: int) -> None:
    import open_clip
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    from clipdist.model.saved import load_dual_encoder

    saved = load_dual_encoder(model, "cpu")
    tower = saved.model.image
    transform = open_clip.image_transform(tower.side, is_train=False, mean=tower.mean, std=tower.std)
    paths = sorted(images.iterdir())

    class Files(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, number: int) -> torch.Tensor:
            with Image.open(paths[number]) as image:
                pixels: torch.Tensor = transform(image)
            return pixels

    torch.set_num_threads(processes)
    rows = []
    with torch.inference_mode():
        for images_b3HW in DataLoader(Files(), batch_size=MICRO_BATCH, num_workers=processes):
            features_bD = saved.model.image_projection(tower.model(images_b3HW))
            rows.append(torch.nn.functional.normalize(features_bD, dim=1).half().numpy())
    np.save(out, np.concatenate(rows))


def run_clipdist(model: Path, images: Path, out: Path, processes: int, exact_pixels: bool) -> None:
    from clipdist.publish.embed import EmbedOptions, embed

    options = EmbedOptions(exact_pixels=exact_pixels, micro_batch=MICRO_BATCH, device="cpu")
    embed(model, str(images), out, options=options, processes=processes)


def one_run(args: argparse.Namespace) -> None:
    """In a process of its own, so that each pays for its own start."""
    contestant, model, images, out = args.one
    if contestant == "loop":
        run_loop(Path(model), Path(images), Path(out), args.processes)
    else:
        run_clipdist(Path(model), Path(images), Path(out), args.processes, contestant.endswith("exact_pixels"))


def timed(contestant: str, model: Path, images: Path, out: Path, processes: int) -> tuple[float, float]:
    """(seconds, processor seconds of all its processes)."""
    shutil.rmtree(out, ignore_errors=True)
    out.with_suffix(".npy").unlink(missing_ok=True)
    target = out.with_suffix(".npy") if contestant == "loop" else out
    words = [sys.executable, __file__, "--processes", str(processes), "--one", contestant]
    words += [str(model), str(images), str(target)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(tower: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    model = folder / tower.replace(":", "-")
    write_model(tower, model)
    small, large = args.images
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(args.repetitions):
        for name in CONTESTANTS:
            less = timed(name, model, folder / str(small), folder / f"{name}-{small}", args.processes)
            more = timed(name, model, folder / str(large), folder / f"{name}-{large}", args.processes)
            spent[name].append((more[0] - less[0], more[1] - less[1]))
            print(tower, name, less, more, file=sys.stderr, flush=True)
    found: dict[str, Any] = {}
    for name, times in spent.items():
        wall, cpu = min(one[0] for one in times), min(one[1] for one in times)
        found[name] = {
            "images_per_second": round((large - small) / wall, 1),
            "images_per_processor_second": round((large - small) / cpu, 1),
        }
    for name in CONTESTANTS[1:]:
        for kind in found["loop"]:
            found[name][f"times_the_loop_{kind}"] = round(found[name][kind] / found["loop"][kind], 2)
    reduced, exact = (
        np.load(folder / f"{name}-{large}" / "image_features.npy").astype(np.float64) for name in CONTESTANTS[1:]
    )
    loop = np.load(folder / f"loop-{large}.npy").astype(np.float64)
    cosine = (reduced * exact).sum(axis=1)
    found["cosine_reduced_to_exact"] = {"mean": round(float(cosine.mean()), 5), "least": round(float(cosine.min()), 5)}
    found["cosine_exact_to_loop_mean"] = round(float((exact * loop).sum(axis=1).mean()), 5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="data/benchmark-photographs/512", help="shard set of JPEGs")
    parser.add_argument("--towers", nargs="+", default=["timm:test_convnext:112"], metavar="timm:NAME:SIDE")
    parser.add_argument("--images", type=int, nargs=2, default=[1024, 3072], help="in the two runs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--one", nargs=4, metavar="…", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one_run(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_files(args.set, folder, args.images)
        results = {tower: measure(tower, folder, args) for tower in args.towers}
    settings = {name: value for name, value in vars(args).items() if name not in ("one", "set")}
    packages = ("torch", "timm", "open_clip_torch", "pillow", "simplejpeg")
    versions = {name: version(name) for name in packages}
    body = {"settings": settings, "versions": versions, "load": os.getloadavg()[0], "results": results}
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
