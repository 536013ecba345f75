"""How many images a second does `clipdist serve` answer, and how soon; does it stay well over many requests? JSON.

python benchmarks/service.py                     # dynamic batching against one image at a time, some four minutes
python benchmarks/service.py --soak 100000       # that many requests, one in four of them bad, and the server's memory

The server is the command in a process of its own, with an untrained model (speed does not depend on weights). Clients
are connections of this process that send one JPEG after another and wait for each answer. The two ways to serve take
turns. For comparison the model alone is timed, without any server, by passes of one image and of `--max-batch`.

Bad requests of a soak: no image, damaged images, a header that claims 50,000 × 50,000 pixels, forms that are none, too
large an upload, too long a text, unknown routes, connections cut in the middle of a body. Memory is the server's
resident set, sampled each second; "warm" is after a fifth of the requests.
"""

import argparse
import asyncio
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter

from clipdist.model.build import build_model, build_tokenizer
from clipdist.model.dual_encoder import ModelConfig
from clipdist.model.saved import load, save_model

CLASSES = ["nevus", "melanoma", "basal cell carcinoma", "keratosis", "dermatofibroma", "vascular lesion"]
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
}
WARM_UP_SECONDS = 3.0
BOUNDARY = "b0undary"


def make_model(folder: Path, tower: str, side: int) -> Path:
    image = {"name": tower, "side": side, "pretrained": False}
    text = {"name": "hf:bert", "pretrained": False, "tokenizer": "captions", "vocabulary": 100, "max_tokens": 16}
    config = TypeAdapter(ModelConfig).validate_python({"image": image, "text": text | {"options": TEXT}, "width": 256})
    tokenizer = build_tokenizer(config, CLASSES)
    save_model(folder / "model", build_model(config, tokenizer, seed=0), tokenizer, scores={}, about={})
    (folder / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    return folder / "model"


def jpegs(count: int, side: int) -> list[bytes]:
    """Fields of noise at several scales, of about the bits per pixel of photographs."""
    draw, made = np.random.default_rng(0), []
    for _ in range(count):
        layers = [draw.normal(0, 30, (side // scale, side // scale, 3)) for scale in (32, 8, 2)]
        pixels = sum(np.kron(layer, np.ones((side // len(layer), side // len(layer), 1))) for layer in layers)
        buffer = io.BytesIO()
        Image.fromarray((128 + np.asarray(pixels)).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        made.append(buffer.getvalue())
    return made


def model_alone(model: Path, sizes: list[int], threads: int) -> dict[str, float]:
    """Images a second through the image tower, by images in a pass."""
    torch.set_num_threads(threads)
    saved, found = load(model, "cpu"), {}
    for size in sizes:
        images = torch.zeros(size, 3, saved.model.image.side, saved.model.image.side, dtype=torch.uint8)
        with torch.inference_mode():
            saved.model.encode_image(images)
            began, passes = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - began) < 4:
                saved.model.encode_image(images)
                passes += 1
        found[str(size)] = round(passes * size / elapsed, 1)
    return found


@contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[int, psutil.Process]]:
    command = [sys.executable, "-m", "clipdist.cli", "serve", str(model), *options]
    command += ["--classes", str(model.parent / "classes.txt")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("then open "):
                yield int(line.split()[2].rstrip("/").rpartition(":")[2]), psutil.Process(process.pid)
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "the server did not end well"
    finally:
        process.kill()
        process.wait()


def form(name: str, data: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="a"\r\n\r\n'
    return head.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()


def request(path: str, body: bytes = b"", kind: str = "", length: int | None = None) -> bytes:
    method, kind = ("POST", kind or f"multipart/form-data; boundary={BOUNDARY}") if body else ("GET", "text/plain")
    size = len(body) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + body


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: bytes) -> tuple[int, bytes]:
    writer.write(sent)
    await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)


@dataclass
class Measured:
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    together: list[int] = field(default_factory=list)


async def client(port: int, images: list[bytes], begins: float, ends: float, found: Measured) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    number = 0
    while (began := time.perf_counter()) < ends:
        status, body = await exchange(reader, writer, images[number % len(images)])
        if began >= begins:
            found.seconds.append(time.perf_counter() - began)
            found.statuses[str(status)] += 1
            if status == 200:
                found.together.append(json.loads(body)["batched_with"])
        number += 1
    writer.close()


async def load_it(port: int, clients: int, seconds: float, images: list[bytes]) -> dict[str, Any]:
    found, now = Measured(), time.perf_counter()
    begins, ends = now + WARM_UP_SECONDS, now + WARM_UP_SECONDS + seconds
    await asyncio.gather(*(client(port, images[n:] + images[:n], begins, ends, found) for n in range(clients)))
    milliseconds = np.array(found.seconds) * 1000
    return {
        "images_per_second": round(len(milliseconds) / seconds, 1),
        **{f"p{p}_ms": round(float(np.percentile(milliseconds, p)), 1) for p in (50, 95, 99)},
        "max_ms": round(float(milliseconds.max()), 1),
        "mean_batch": round(float(np.mean(found.together)), 2),
        "failed": sum(count for status, count in found.statuses.items() if status != "200"),
    }


def throughput(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    images = [request("/api/image", form("image", data)) for data in jpegs(32, args.photo_side)]
    modes: dict[str, list[str]] = {
        "dynamic": ["--max-batch", str(args.max_batch), "--max-wait-ms", str(args.max_wait_ms)],
        "one_at_a_time": ["--max-batch", "1", "--max-wait-ms", "0"],
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
    for turn in range(args.repeats):
        for name in list(modes)[:: 1 if turn % 2 else -1]:
            with serving(model, *modes[name], "--threads", str(args.threads)) as (port, _):
                runs[name].append(asyncio.run(load_it(port, args.clients, args.seconds, images)))
            print(name, runs[name][-1], file=sys.stderr)
    speed = {name: statistics.median(run["images_per_second"] for run in some) for name, some in runs.items()}
    return {
        "clients": args.clients,
        "jpeg_bytes": round(statistics.mean(map(len, images))),
        "median_images_per_second": speed,
        "gain": round(speed["dynamic"] / speed["one_at_a_time"], 2),
        "worst_p99_ms": max(run["p99_ms"] for run in runs["dynamic"]),
        "failed": sum(run["failed"] for some in runs.values() for run in some),
        "model_alone_images_per_second": model_alone(model, [1, args.max_batch], args.threads),
        "runs": runs,
    }


def bad_requests(good: bytes) -> dict[str, tuple[bytes, int]]:
    """name -> (request, the status that it must get)."""
    damaged = bytearray(good)
    damaged[len(good) // 3 :] = bytes(len(good) // 3)
    header = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big") + b"\0\0\0\0IDAT" + bytes(4)
    text = json.dumps({"text": "a" * 100_000}).encode()
    return {
        "no image": (request("/api/image", form("image", b"hello")), 415),
        "cut short": (request("/api/image", form("image", good[: len(good) // 2])), 422),
        "damaged": (request("/api/image", form("image", bytes(damaged))), 422),
        "bomb": (request("/api/image", form("image", bomb)), 413),
        "no field": (request("/api/image", form("picture", good)), 422),
        "no form": (request("/api/image", b"--x", kind="multipart/form-data; boundary=y"), 400),
        "wrong type": (request("/api/image", b"x", kind="text/plain"), 415),
        "long text": (request("/api/text", text, kind="application/json"), 422),
        "no gallery": (request("/api/text", b'{"text": "a"}', kind="application/json"), 409),
        "unknown route": (request("/api/nothing"), 404),
    }


async def soak(port: int, server: psutil.Process, args: argparse.Namespace) -> dict[str, Any]:
    photos = jpegs(32, args.photo_side)
    images = [request("/api/image", form("image", data)) for data in photos]
    bad = bad_requests(photos[0])
    statuses, unexpected, left = Counter[str](), Counter[str](), iter(range(args.soak))
    sizes: list[tuple[int, float]] = []
    draw = np.random.default_rng(0)

    async def send() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in left:
            kind = str(draw.choice([*bad, "cut", "too large"])) if draw.random() < 0.25 else "good"
            if kind == "cut":
                writer.write(images[0][: len(images[0]) // 2])
                await writer.drain()
                statuses["cut by the client"] += 1
            elif kind == "too large":
                writer.write(request("/api/image", b"x" * 1000, length=10**9))
                status = int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])
                statuses[str(status)] += 1
                unexpected[f"too large: {status}"] += status not in (413, 503)
            else:
                sent, expected = bad.get(kind, (images[number % len(images)], 200))
                status, _ = await exchange(reader, writer, sent)
                statuses[str(status)] += 1
                unexpected[f"{kind}: {status}"] += status not in (expected, 503)
            if kind in ("cut", "too large"):
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()

    async def watch() -> None:
        while True:
            sizes.append((sum(statuses.values()), server.memory_info().rss / 2**20))
            await asyncio.sleep(1)

    began, watcher = time.perf_counter(), asyncio.create_task(watch())
    await asyncio.gather(*(send() for _ in range(args.clients)))
    elapsed = time.perf_counter() - began
    watcher.cancel()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    metrics = (await exchange(reader, writer, request("/metrics")))[1].decode()
    writer.close()
    warm = [size for done, size in sizes if done >= args.soak / 5]
    return {
        "requests": args.soak,
        "clients": args.clients,
        "seconds": round(elapsed, 1),
        "statuses": dict(sorted(statuses.items())),
        "unexpected": {name: count for name, count in unexpected.items() if count},
        "refused": {
            sample.labels["reason"]: int(sample.value)
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
            if sample.name == "clipdist_refused_total"
        },
        "rss_mib": {
            "at_start": round(sizes[0][1], 1),
            "warm": round(warm[0], 1),
            "most": round(max(warm), 1),
            "last": round(warm[-1], 1),
            "growth": round(max(warm) / warm[0] - 1, 4),
        },
        "rss_mib_over_requests": [[done, round(size, 1)] for done, size in sizes[:: max(1, len(sizes) // 40)]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--side", type=int, default=112, help="of the model's images")
    parser.add_argument("--photo-side", type=int, default=256, help="of the JPEGs sent; a multiple of 32")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run, after a warm-up of three")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--max-wait-ms", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the model")
    parser.add_argument("--soak", type=int, metavar="N", help="N mixed requests instead")
    args = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # as the server sets it; torch, loaded above, has read its default by now
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    load_before = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), args.tower, args.side)
        if args.soak:
            with serving(model, "--max-batch", str(args.max_batch), "--threads", str(args.threads)) as (port, server):
                measured = {"soak": asyncio.run(soak(port, server, args))}
        else:
            measured = throughput(args, model)
    machine = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "load_averages": [load_before, round(os.getloadavg()[0], 2)],
    }
    print(json.dumps({"benchmark": "service", "settings": vars(args)} | measured | machine, indent=1))


if __name__ == "__main__":
    main()
