"""One contestant of benchmarks/loader.py: reads orders from standard input, measures, answers; JSON, one a line.

Run by the environment of the contestant: python benchmarks/peers/contestant.py NAME FOLDER. Each order is carried out
by a forked process of its own, so that it starts from the same state, with everything imported.

    {"do": "convert", "side": 512}    writes the set in the contestant's own format, if it has one
    {"do": "rate", "side": 512, "workers": 2, "cores": 2, "batch": 256, "seconds": 3}
    {"do": "resume", …}, {"do": "memory", …}    of clipdist alone

A rate counts batches that the main process received, from the moment when each worker has delivered its first.
"""

import argparse
import ctypes
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OWN = ("clipdist", "cache", "floor")
SIDE = 224
CROP_AREA = (0.8, 1.0)
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONTEXT = 77
PR_SET_PDEATHSIG = 1
Order = dict[str, Any]
Batches = Iterator[tuple[Any, Any]]  # (pixels [b, 3, 224, 224], token ids [b, T])


def clipdist_loader(order: Order, first_step: int = 0, cached: bool = False) -> tuple[Any, int]:
    """The training loader, built as training builds it, over a run without end; and the steps of an epoch."""
    from clipdist.config import RunConfig
    from clipdist.data.config import DataConfig
    from clipdist.data.images.decode import AugmentConfig
    from clipdist.data.loader import TrainLoader
    from clipdist.data.mixing import Mixture
    from clipdist.data.rows import TrainRows
    from clipdist.data.text import Tokenizer
    from clipdist.train.config import TrainConfig

    options = {"cache": "decoded", "cache_folder": str(Path(order["folder"]).parent / "cache")} if cached else {}
    crops = AugmentConfig(crop_area=CROP_AREA)
    data = DataConfig(set=str(order["folder"]), workers=order["workers"], augment=crops, **options)
    config = RunConfig(data=data, train=TrainConfig(global_batch=order["batch"], epochs=10_000))
    split = Mixture.open(data).training(data.train_split)
    plan = config.order(split)
    tokenizer = Tokenizer.load(order["tokenizer"], CONTEXT)
    more: dict[str, Any] = {}
    if cached:
        from clipdist.data.caching import open_cache

        more["cache"] = open_cache(data, split, tokenizer, SIDE)
    rows = TrainRows(split, plan, data, side=SIDE, resize="crop", tokenizer=tokenizer, **more)
    steps = plan.steps_per_epoch * config.train.epochs
    return TrainLoader(rows, rank=0, world_size=1, first_step=first_step, steps=steps), plan.steps_per_epoch


def clipdist_batches(order: Order) -> Batches:
    for batch in clipdist_loader(order)[0]:
        yield batch.images_b3HW, batch.token_ids_bT


def cache_fill(order: Order) -> dict[str, Any]:
    """The first epoch, which decodes. The set holds whole batches, so that afterwards everything is stored."""
    loader, steps = clipdist_loader(order, cached=True)
    for _ in itertools.islice(loader, steps):
        pass
    return {"stored": check_cache(loader)}


def check_cache(loader: Any) -> int:
    """Samples stored. Without this, a column named after the cache could be the decoder's speed."""
    cache = loader.rows.cache
    assert cache is not None, "the loader has no cache"
    stored, expected = int(cache.stored()), len(loader.rows.split)
    assert stored == expected, f"{stored} of {expected} samples are in the cache"
    return stored


def cache_batches(order: Order) -> Batches:
    loader, _ = clipdist_loader(order, cached=True)
    check_cache(loader)
    for batch in loader:
        yield batch.images_b3HW, batch.token_ids_bT


def resume(order: Order) -> dict[str, Any]:
    """Seconds from nothing to the first batch, at the start of an epoch and in its middle."""
    use_cores(order["cores"])
    _, steps = clipdist_loader(order)
    seconds = {}
    for name, step in (("start", 0), ("middle", steps // 2)):
        gc.collect()
        began = time.perf_counter()
        loader, _ = clipdist_loader(order, first_step=step)
        batch = next(iter(loader))
        seconds[name] = time.perf_counter() - began
        assert batch.step == step
    return {"seconds": seconds, "steps_per_epoch": steps}


def memory(order: Order) -> dict[str, Any]:
    """Proportional and resident set sizes of main process and workers, in MiB, after each epoch."""
    import psutil

    use_cores(order["cores"])
    loader, steps = clipdist_loader(order)
    sizes = []
    for number, batch in enumerate(loader, 1):
        del batch
        if number % steps == 0:
            gc.collect()
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            full = [process.memory_full_info() for process in family]
            sizes.append({"pss": sum(i.pss for i in full) / 2**20, "rss": sum(i.rss for i in full) / 2**20})
        if len(sizes) == order["epochs"]:
            break
    return {"mib": sizes, "processes": len(family)}


def floor_rate(order: Order) -> dict[str, Any]:
    """JPEGs per second decoded by clipdist's decoder at the scale it chooses, by one process for each core."""
    from clipdist.data.shards import ShardSet

    cores = use_cores(min(order["cores"], max(1, order["workers"])))
    split = ShardSet.open(order["folder"]).split("train")
    jobs = [decoding(split.read(number), number) for number in range(min(len(split), 512))]
    pipes = []
    for core in cores:
        source, sink = os.pipe()
        if not os.fork():
            os.sched_setaffinity(0, {core})
            os.write(sink, json.dumps(decode_for(jobs, order["seconds"])).encode())
            os._exit(0)
        pipes.append(source)
        os.close(sink)
    rates = [json.loads(os.read(source, 1000)) for source in pipes]
    processor = sum(rate["cpu"] for rate in rates) / len(rates)
    return {"images_per_second": sum(rate["wall"] for rate in rates), "images_per_core_second": processor}


def decoding(sample: Any, number: int) -> tuple[bytes, tuple[int, int]]:
    """A JPEG, and the height and width that training with a randomly drawn crop would have it decoded at."""
    import numpy as np

    from clipdist.data.images.augment import AugmentConfig, draw_choices
    from clipdist.data.images.decode import image_size
    from clipdist.data.images.geometry import place_crop, reduced, whole_pixels

    width, height = image_size(sample.image)
    augment = AugmentConfig(crop_area=CROP_AREA)
    choices = draw_choices(np.random.default_rng(number))
    box = place_crop(width, height, "crop", choices[:4], augment.crop_area, augment.crop_ratio)
    reduction = whole_pixels(box, width, height, SIDE, "crop").reduction
    return sample.image, (reduced(height, reduction), reduced(width, reduction))


def decode_for(jobs: list[tuple[bytes, tuple[int, int]]], seconds: float) -> dict[str, float]:
    from clipdist.data.images.decode import decode_rgb

    decode_rgb(jobs[0][0], 50_000_000, at_least=jobs[0][1])
    began, processor, count = time.perf_counter(), time.process_time(), 0
    for jpeg, at_least in itertools.cycle(jobs):
        decode_rgb(jpeg, 50_000_000, at_least=at_least)
        count += 1
        if time.perf_counter() - began > seconds:
            break
    return {"wall": count / (time.perf_counter() - began), "cpu": count / (time.process_time() - processor)}


def open_clip_batches(order: Order) -> Batches:
    """open_clip's own reader, training transforms and tokenizer, as its main program combines them."""
    import open_clip
    from open_clip.transform import image_transform
    from open_clip_train import data

    shards = sorted(str(path) for path in Path(order["folder"]).glob("train-*.tar"))
    args = argparse.Namespace(
        train_data="::".join(shards),
        train_num_samples=order["batch"] * 1_000_000,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=order["batch"],
        workers=order["workers"],
        world_size=1,
        seed=0,
    )
    transform = image_transform(SIDE, is_train=True, aug_cfg={"scale": CROP_AREA})
    loader = data.get_wds_dataset(args, transform, True, tokenizer=open_clip.get_tokenizer("ViT-B-32")).dataloader
    yield from loader


def torchvision_transform() -> Callable[[bytes], Any]:
    """What torchvision's own pages recommend for training: crop on uint8, then scale and normalise."""
    import io

    import torch
    from PIL import Image
    from torchvision.transforms import InterpolationMode, v2

    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(SIDE, scale=CROP_AREA, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, DEVIATION),
        ]
    )
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


def token_ids(order: Order) -> Callable[[str], Any]:
    """The tokenizer that clipdist uses in this benchmark, padded to 77."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(order["tokenizer"]) / "tokenizer.json"))
    tokenizer.enable_truncation(CONTEXT)
    tokenizer.enable_padding(length=CONTEXT)
    return lambda text: torch.tensor(tokenizer.encode(text).ids)


def webdataset_batches(order: Order) -> Batches:
    import webdataset

    pixels, tokens = torchvision_transform(), token_ids(order)
    shards = sorted(str(path) for path in Path(order["folder"]).glob("train-*.tar"))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=100, detshuffle=True, seed=0)
        .shuffle(1000)
        .to_tuple("jpg", "json")
        .map_tuple(pixels, lambda data: tokens(json.loads(data)["text"]))
        .batched(order["batch"], partial=False)
        .repeat()
    )
    yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=order["workers"])


def stored(order: Order) -> Iterator[dict[str, Any]]:
    """The samples of a clipdist set, read as any tar."""
    import webdataset

    for path in sorted(Path(order["folder"]).glob("train-*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            yield {"image": sample["jpg"], "text": json.loads(sample["json"])["text"]}


def litdata_convert(order: Order) -> dict[str, Any]:
    import litdata

    shutil.rmtree(own_folder(order), ignore_errors=True)
    samples = list(stored(order))
    litdata.optimize(
        fn=samples.__getitem__,
        inputs=list(range(len(samples))),
        output_dir=str(own_folder(order)),
        chunk_bytes="32MB",
        num_workers=1,
        start_method="fork",
    )
    return {"samples": len(samples)}


def litdata_batches(order: Order) -> Batches:
    import litdata

    pixels, tokens = torchvision_transform(), token_ids(order)

    class Pairs(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return pixels(sample["image"]), tokens(sample["text"])

    dataset = Pairs(str(own_folder(order)), shuffle=True, drop_last=True)
    loader = litdata.StreamingDataLoader(dataset, batch_size=order["batch"], num_workers=order["workers"])
    while True:
        yield from loader


def streaming_convert(order: Order) -> dict[str, Any]:
    from streaming import MDSWriter

    shutil.rmtree(own_folder(order), ignore_errors=True)
    columns = {"image": "bytes", "text": "str"}
    count = 0
    with MDSWriter(out=str(own_folder(order)), columns=columns, size_limit=32 << 20) as writer:
        for sample in stored(order):
            writer.write(sample)
            count += 1
    return {"samples": count}


def streaming_batches(order: Order) -> Batches:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    pixels, tokens = torchvision_transform(), token_ids(order)

    class Pairs(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return pixels(sample["image"]), tokens(sample["text"])

    dataset = Pairs(local=str(own_folder(order)), shuffle=True, batch_size=order["batch"])
    loader = DataLoader(dataset, batch_size=order["batch"], num_workers=order["workers"], drop_last=True)
    while True:
        yield from loader


def own_folder(order: Order) -> Path:
    return Path(order["folder"]).with_name(f"{Path(order['folder']).name}-{order['contestant']}")


def use_cores(count: int) -> list[int]:
    """Binds this process, with all its threads and later children, to the first `count` cores it may use."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    assert len(cores) == count, f"{count} cores asked for, {len(cores)} there"
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)
    return cores


def processor_seconds() -> float:
    import psutil

    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in family)


def rate(order: Order, make: Callable[[Order], Batches]) -> dict[str, Any]:
    use_cores(order["cores"])
    random.seed(0)
    # Workers deliver in turn: whole turns are counted, so that none is favoured by when the clock starts.
    turn = max(1, order["workers"])
    began = time.perf_counter()
    batches = iter(make(order))
    for _ in range(turn):
        pixels, tokens = next(batches)
    assert tuple(pixels.shape) == (order["batch"], 3, SIDE, SIDE), pixels.shape
    assert len(tokens) == order["batch"], tokens.shape
    started, processor = time.perf_counter(), processor_seconds()
    images, seconds = 0, 0.0
    while seconds < order["seconds"]:
        for _ in range(turn):
            pixels, tokens = next(batches)
            images += len(pixels)
        seconds = time.perf_counter() - started
    processor = processor_seconds() - processor
    return {
        "images_per_second": images / seconds,
        "images_per_core_second": images / processor,
        "images": images,
        "seconds": seconds,
        "first_batches_seconds": started - began,
        "dtype": str(pixels.dtype),
    }


BATCHES: dict[str, Callable[[Order], Batches]] = {
    "clipdist": clipdist_batches,
    "cache": cache_batches,
    "open_clip": open_clip_batches,
    "webdataset": webdataset_batches,
    "litdata": litdata_batches,
    "streaming": streaming_batches,
}
CONVERT = {"cache": cache_fill, "litdata": litdata_convert, "streaming": streaming_convert}
PACKAGES = {
    "clipdist": ["clipdist", "torch", "torchvision", "numpy", "pillow", "simplejpeg", "tokenizers", "transformers"],
    "open_clip": ["open_clip_torch", "webdataset", "torch", "torchvision", "pillow", "numpy"],
    "webdataset": ["webdataset", "torchvision"],
    "litdata": ["litdata", "torchvision", "numpy"],
    "streaming": ["mosaicml-streaming", "torchvision", "numpy", "tokenizers"],
}


def carry_out(order: Order) -> dict[str, Any]:
    if order["do"] == "convert":
        return CONVERT[order["contestant"]](order) if order["contestant"] in CONVERT else {}
    if order["do"] == "rate" and order["contestant"] == "floor":
        return floor_rate(order)
    if order["do"] == "rate":
        return rate(order, BATCHES[order["contestant"]])
    return {"resume": resume, "memory": memory}[order["do"]](order)


def in_a_fork(order: Order) -> dict[str, Any]:
    """Carries out an order in a process group of its own, which is gone afterwards."""
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        # It is to end with us also when we are killed; its workers end with it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(source)
        try:
            answer = carry_out(order)
        except BaseException as error:
            traceback.print_exc()
            # A worker's error carries its traceback, whose last line says what was wrong.
            text = str(error).strip()
            said = text.splitlines()[-1] if "Traceback" in text else " ".join(text.split())[:200]
            answer = {"error": f"{type(error).__name__}: {said}"}
        with os.fdopen(sink, "w") as file:
            json.dump(answer, file)
        # Workers of readers without end would be waited for.
        os.killpg(0, signal.SIGKILL)
    os.close(sink)
    with os.fdopen(source) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process died"}


def installed(name: str) -> dict[str, str]:
    found = {}
    for package in PACKAGES.get(name, []):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fingerprint() -> str:
    """Of clipdist's source: contestants that measured different code are not to be compared."""
    source = importlib.util.find_spec("clipdist")
    assert source is not None
    assert source.submodule_search_locations is not None
    hasher = hashlib.sha256()
    for path in sorted(Path(source.submodule_search_locations[0]).rglob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]


def preload(name: str) -> None:
    """Imports once what every order would import again."""
    import torch  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401

    if name in OWN:
        import clipdist.config
        import clipdist.train.trainer  # noqa: F401

        # Whatever a fork would import first, it is to import from the files of now.
        for module in ("caching", "images.augment", "images.geometry", "loader", "mixing", "rows", "text"):
            importlib.import_module(f"clipdist.data.{module}")
    elif name == "open_clip":
        import open_clip_train.data  # noqa: F401
    elif name in ("litdata", "streaming", "webdataset"):
        importlib.import_module(name)


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    # Answers go where standard output went; what libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        source = fingerprint() if name in OWN else ""
        preload(name)
        hello: dict[str, Any] = {"versions": installed(name), "source": source}
        if name in OWN:
            assert fingerprint() == source, "clipdist's source changed while it was imported"
    except Exception as error:
        traceback.print_exc()
        hello = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        order |= {"contestant": name, "folder": folder / str(order["side"]), "tokenizer": folder / "tokenizer"}
        print(json.dumps(in_a_fork(order)), file=answers, flush=True)


if __name__ == "__main__":
    main()
