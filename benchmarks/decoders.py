"""Which decoder and resizing turn a JPEG into 224 × 224 pixels fastest on one core, and how far from the exact pixels?

For photograph-like JPEGs of several sides: images per second and the mean absolute difference, in grey levels of 255,
from Pillow's full decode with antialiased bicubic; for clipdist's own loading also the share of it that is decoding.
JSON on standard output, or JSON and a Markdown table beside each other with --results. Decoders that are not installed
are left out: clipdist needs none but simplejpeg.

OMP_NUM_THREADS=1 VIPS_CONCURRENCY=1 python benchmarks/decoders.py --results benchmarks/results/NAME
"""

import argparse
import importlib
import importlib.metadata
import io
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFilter
from torch.nn import functional

from clipdist.data.images.augment import AugmentConfig
from clipdist.data.images.decode import load_for_training
from clipdist.data.images.header import read_header
from clipdist.data.images.jpeg import decode_reduced

SIDE = 224
MAX_PIXELS = 100_000_000
WHOLE = AugmentConfig(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))
MEAN, STD = torch.tensor([0.481, 0.458, 0.408])[:, None, None], torch.tensor([0.269, 0.261, 0.276])[:, None, None]

Load = Callable[[bytes], np.ndarray]


def photograph(side: int, seed: int) -> Image.Image:
    """Light and colour with the 1/f spectrum of photographs, hard-edged ellipses, a lens's blur, a camera's noise."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None] * side, np.fft.rfftfreq(side)[None] * side)
    frequency[0, 0] = 1

    def field(slope: float) -> np.ndarray:
        values = np.fft.irfft2(np.fft.rfft2(draw.standard_normal((side, side))) / frequency**slope, (side, side))
        return (values - values.mean()) / values.std()

    light = 128 + 38 * field(1.6) + 5 * field(1.0)
    pixels = np.stack([light + 14 * field(1.9) for _ in range(3)], axis=-1)
    y, x = np.mgrid[0:side, 0:side]
    for _ in range(14):
        (middle_x, middle_y), radius, shape = draw.random(2) * side, draw.uniform(0.03, 0.25), draw.uniform(0.4, 2.5)
        inside = np.hypot((x - middle_x) / shape, (y - middle_y) * shape) < radius * side
        pixels[inside] += draw.normal(0, 30, 3)
    sharp = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    blurred = np.asarray(sharp.filter(ImageFilter.GaussianBlur(0.6))) + draw.normal(0, 1.5, (side, side, 1))
    return Image.fromarray(np.rint(blurred.clip(0, 255)).astype(np.uint8))


def jpegs(side: int, images: int) -> list[bytes]:
    found = []
    for number in range(images):
        buffer = io.BytesIO()
        photograph(side, number).save(buffer, "JPEG", quality=85 + number % 6)
        found.append(buffer.getvalue())
    return found


# --- from bytes to uint8 [224, 224, 3], the whole picture ---


def pillow_full(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _torch_resize(pixels: np.ndarray) -> np.ndarray:
    image_13HW = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    return functional.interpolate(image_13HW, (SIDE, SIDE), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def pillow_draft(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (SIDE, SIDE))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def pillow_draft_torch(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (SIDE, SIDE))
    return _torch_resize(np.array(image))


def torchvision_full(data: bytes) -> np.ndarray:
    from torchvision.io import decode_jpeg

    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return (
        functional.interpolate(pixels[None], (SIDE, SIDE), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    )


def simplejpeg_scaled(data: bytes) -> np.ndarray:
    return _torch_resize(_reduced(data))


def simplejpeg_any_eighth(data: bytes) -> np.ndarray:
    return _torch_resize(simplejpeg.decode_jpeg(data, min_height=SIDE, min_width=SIDE))


def simplejpeg_approximate(data: bytes) -> np.ndarray:
    height, width = _reduced_size(data)
    options = {"fastdct": True, "fastupsample": True}
    return _torch_resize(simplejpeg.decode_jpeg(data, min_height=height, min_width=width, **options))


def clipdist_fast(data: bytes) -> np.ndarray:
    draw = np.random.Generator(np.random.Philox(0))
    return load_for_training(data, SIDE, "squash", MAX_PIXELS, WHOLE, draw)


def decoding_alone(data: bytes) -> np.ndarray:
    return _reduced(data)


def _reduction(data: bytes) -> int:
    header = read_header(data)
    assert header is not None
    return next(r for r in (8, 4, 2, 1) if header.width // r >= SIDE or r == 1)


def _reduced_size(data: bytes) -> tuple[int, int]:
    header = read_header(data)
    assert header is not None
    return -(-header.height // _reduction(data)), -(-header.width // _reduction(data))


def _reduced(data: bytes) -> np.ndarray:
    header = read_header(data)
    assert header is not None
    pixels = decode_reduced(data, header, _reduction(data))
    assert pixels is not None
    return pixels


def open_clip_pipeline(data: bytes) -> np.ndarray:
    """Full decode, resize, and the normalised float tensor that open_clip's workers make."""
    pixels = torch.from_numpy(pillow_full(data).copy()).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    (pixels - MEAN) / STD
    return (pixels * 255).permute(1, 2, 0).numpy()


def optional() -> dict[str, Load]:
    """Those of the decoders that clipdist does not need and that are installed here."""
    found: dict[str, Load] = {}
    with suppress(ImportError):
        cv2: Any = importlib.import_module("cv2")
        cv2.setNumThreads(0)
        found["simplejpeg 1/2ⁿ + cv2 cubic"] = lambda data: cv2.resize(
            _reduced(data), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC
        )
        found["simplejpeg 1/2ⁿ + cv2 area"] = lambda data: cv2.resize(
            _reduced(data), (SIDE, SIDE), interpolation=cv2.INTER_AREA
        )
    with suppress(ImportError):
        pyvips: Any = importlib.import_module("pyvips")
        pyvips.cache_set_max(0)
        found["pyvips thumbnail"] = lambda data: pyvips.Image.thumbnail_buffer(
            data, SIDE, height=SIDE, size="force"
        ).numpy()
    with suppress(ImportError):
        kornia: Any = importlib.import_module("kornia_rs")
        found["kornia-rs full"] = lambda data: np.asarray(
            kornia.imgproc.resize(kornia.io.decode_image_jpeg(data), (SIDE, SIDE), "bicubic")
        )
    return found


LOADS: dict[str, Load] = {
    "Pillow full + Pillow (exact)": pillow_full,
    "open_clip's transform": open_clip_pipeline,
    "Pillow draft + Pillow": pillow_draft,
    "Pillow draft + torch": pillow_draft_torch,
    "torchvision full + torch": torchvision_full,
    "simplejpeg n/8 + torch": simplejpeg_any_eighth,
    "simplejpeg 1/2ⁿ + torch": simplejpeg_scaled,
    "the same, fast DCT and upsampling": simplejpeg_approximate,
    "clipdist, with draws and crop": clipdist_fast,
    "decoding alone (floor)": decoding_alone,
}


def measure(load: Load, images: list[bytes], seconds: float) -> float:
    """Images per second: the fastest of several decodes of each image counts, for others may use the machine."""
    load(images[0])  # imports and first allocations
    fastest = [float("inf")] * len(images)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for number, data in enumerate(images):
            began = time.perf_counter()
            load(data)
            fastest[number] = min(fastest[number], time.perf_counter() - began)
    return len(images) / sum(fastest)


def difference(load: Load, images: list[bytes]) -> float | None:
    found = [np.asarray(load(data)) for data in images]
    if found[0].shape != (SIDE, SIDE, 3):
        return None
    exact = [pillow_full(data) for data in images]
    return float(np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(found, exact, strict=True)]))


def table(results: list[dict[str, Any]], sides: list[int]) -> str:
    head = "| from bytes to 224 × 224 | " + " | ".join(f"{side} px: images/s | difference" for side in sides) + " |"
    lines = [head, "|---|" + "---:|---:|" * len(sides)]
    for name in dict.fromkeys(result["decoder"] for result in results):
        row = [result for result in results if result["decoder"] == name]
        cells = [
            f"{result['images_per_second']:,.0f} | "
            + ("" if result["difference"] is None else f"{result['difference']:.2f}")
            for result in row
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--images", type=int, default=6, help="JPEGs of each side")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each decoder and side")
    parser.add_argument("--results", type=Path, help="write NAME.json and NAME.md instead of printing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results, sizes = [], {}
    for side in args.sides:
        images = jpegs(side, args.images)
        sizes[side] = {
            "kilobytes": sum(map(len, images)) / len(images) / 1000,
            "bits_per_pixel": sum(map(len, images)) * 8 / len(images) / side**2,
        }
        for name, load in (LOADS | optional()).items():
            rate = measure(load, images, args.seconds)
            results.append(
                {
                    "side": side,
                    "decoder": name,
                    "images_per_second": rate,
                    "difference": difference(load, images),
                }
            )
    packages = {}
    for name in ("pillow", "simplejpeg", "torch", "torchvision", "opencv-python-headless", "pyvips", "kornia-rs"):
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    machine = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "load_at_end": os.getloadavg()[0],
    }
    report = {"benchmark": "decoders", "images": sizes, "results": results, "packages": packages} | machine
    written = json.dumps(report, indent=1, ensure_ascii=False)
    if args.results is None:
        print(written)
        return
    args.results.with_suffix(".json").write_text(written + "\n", encoding="utf-8")
    args.results.with_suffix(".md").write_text(
        f"# Decoders, one core\n\n{table(results, args.sides)}\n\n"
        "The difference is the mean absolute one from the first row, in grey levels of 255. "
        f"{machine['platform']}, {machine['vector']}, load {machine['load_at_end']:.1f}; {packages}.\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
