"""How many images a second does `clipdist embed` take in, beside the usual loop over a DataLoader, on the same cores?

python benchmarks/photographs.py --out data/benchmark-photographs --sides 512 --images 2048
python benchmarks/embedding.py --set data/benchmark-photographs/512 --towers timm:test_convnext:112 timm:test_vit:160

The usual loop is that of tools that embed image folders for retrieval: open_clip's evaluation transform on Pillow in
DataLoader workers, float32 batches to the tower, float16 rows kept and saved. Both read the same files, with the same
tower, in batches of the same size, in as many processes: the loop's workers, beside which its own process computes on
as many threads, and clipdist's processes of one thread each, with a thread that reads ahead. With one process, which is
the default, both run within this one, warm, and take turns; more of clipdist's take some seconds to start, which count.
The least of the repetitions' seconds counts, and of processor seconds likewise, of all processes together: a busy
machine disturbs these less.

Also measured: the same with --exact-pixels, and the cosines between features of reduced and exact pixels. Weights are
random. JSON on standard output.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

CONTESTANTS = ("loop", "clipdist", "clipdist_exact_pixels")
MICRO_BATCH = 32


def write_files(location: str, folder: Path, count: int) -> None:
    """The set's first images as files."""
    from clipdist.data.shards import ShardSet

    shard_set = ShardSet.open(location)
    splits = [shard_set.split(name) for name in shard_set.manifest.splits]
    samples = (split.read(number) for split in splits for number in range(len(split)))
    folder.mkdir()
    for number, sample in zip(range(count), samples, strict=False):
        (folder / f"{number:06d}.{sample.extension}").write_bytes(sample.image)


def write_model(tower: str, folder: Path) -> None:
    """A model folder with that tower and a small text tower, of random weights."""
    from clipdist.data.text import train_wordpiece
    from clipdist.model.build import build_model
    from clipdist.model.dual_encoder import ModelConfig
    from clipdist.model.saved import save_model
    from clipdist.model.towers import ImageTowerConfig, TextTowerConfig

    name, _, side = tower.rpartition(":")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = TextTowerConfig(name="hf:bert", pretrained=False, max_tokens=16, options=sizes)
    config = ModelConfig(image=ImageTowerConfig(name=name, side=int(side)), text=text, width=256)
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


def timed(contestant: str, model: Path, images: Path, out: Path, processes: int) -> tuple[float, float]:
    """(seconds, processor seconds of all its processes)."""
    shutil.rmtree(out, ignore_errors=True)
    before, began = processor_seconds(), time.perf_counter()
    if contestant == "loop":
        out.mkdir()
        run_loop(model, images, out / "image_features.npy", processes)
    else:
        run_clipdist(model, images, out, processes, contestant.endswith("exact_pixels"))
    return time.perf_counter() - began, processor_seconds() - before


def processor_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(tower: str, images: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    model = folder / tower.replace(":", "-")
    write_model(tower, model)
    count = len(list(images.iterdir()))
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
    for repetition in range(args.repetitions + 1):
        for name in CONTESTANTS:
            seconds = timed(name, model, images, folder / name, args.processes)
            if repetition:  # the first one warms up
                spent[name].append(seconds)
            print(tower, name, seconds, file=sys.stderr, flush=True)
    found: dict[str, Any] = {"images": count}
    for name, times in spent.items():
        wall, cpu = min(one[0] for one in times), min(one[1] for one in times)
        found[name] = {
            "images_per_second": round(count / wall, 1),
            "images_per_processor_second": round(count / cpu, 1),
        }
    for name in CONTESTANTS[1:]:
        for kind in found["loop"]:
            found[name][f"times_the_loop_{kind}"] = round(found[name][kind] / found["loop"][kind], 2)
    loop, reduced, exact = (np.load(folder / name / "image_features.npy").astype(np.float64) for name in CONTESTANTS)
    cosine = (reduced * exact).sum(axis=1)
    found["cosine_reduced_to_exact"] = {"mean": round(float(cosine.mean()), 5), "least": round(float(cosine.min()), 5)}
    found["cosine_exact_to_loop_mean"] = round(float((exact * loop).sum(axis=1).mean()), 5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="data/benchmark-photographs/512", help="shard set of JPEGs")
    parser.add_argument("--towers", nargs="+", default=["timm:test_convnext:112"], metavar="timm:NAME:SIDE")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_files(args.set, folder / "images", args.images)
        results = {tower: measure(tower, folder / "images", folder, args) for tower in args.towers}
    settings = {name: value for name, value in vars(args).items() if name != "set"}
    packages = ("torch", "timm", "open_clip_torch", "pillow", "simplejpeg")
    versions = {name: version(name) for name in packages}
    body = {"settings": settings, "versions": versions, "load": os.getloadavg()[0], "results": results}
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
