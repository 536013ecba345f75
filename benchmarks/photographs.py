"""Draws JPEGs that cost a decoder what photographs cost, with captions, and packs them: one shard set for each size.

python benchmarks/photographs.py --out data/benchmark-photographs --sides 256 512 1024 --images 8192 4096 2048

A scene is noise whose amplitude falls with frequency as in photographs, strong in some places and faint in others, over
gradients and a few sharp-edged shapes. Smaller images are scenes scaled down, as a camera's pictures are. Aspect
ratios are 1:1, 4:3 and 3:4; a side is the longer one. Equal arguments give equal bytes. The mean of bytes and of
bits per pixel, which at quality 90 is 1 to 1.6 for many photographs, is printed as JSON.
"""

import argparse
import io
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from clipdist.data.sets.writer import ShardSetWriter

LARGEST = 1024
PIECES = 32  # of one scene in the largest set
ASPECTS = [(1.0, 1.0), (1.0, 0.75), (0.75, 1.0)]  # width, height
QUALITY = 90
SAMPLES_PER_SHARD = 256
# Where captions take their words from; about as long as captions of photographs.
SUBJECTS = ["a dog", "two children", "an old bicycle", "a fishing boat", "the market", "a mountain lake", "a red tram"]
ACTIONS = ["standing", "resting", "seen from above", "half hidden", "moving fast", "lit from behind", "reflected"]
PLACES = ["by the river", "in a narrow street", "under tall trees", "near the harbour", "in the snow", "at the station"]
TIMES = ["in the morning", "at noon", "before a storm", "on a summer evening", "at night", "in thin fog"]


def spectral_noise(draw: np.random.Generator, side: int, exponent: float) -> np.ndarray:
    """float32 [side, side] of mean 0 and deviation 1; amplitude falls with the `exponent`-th power of frequency."""
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    spectrum = frequency**-exponent * np.exp(2j * np.pi * draw.random(frequency.shape))
    noise = np.fft.irfft2(spectrum, (side, side)).astype(np.float32)
    return noise / noise.std()


def scene(number: int, side: int = LARGEST) -> Image.Image:
    """An RGB picture, side × side; equal numbers give equal pictures."""
    draw = np.random.default_rng(number)
    brightness = spectral_noise(draw, side, draw.uniform(1.28, 1.63))
    warm, green = spectral_noise(draw, side, 1.7), spectral_noise(draw, side, 1.9)
    # Sharp here, out of focus there.
    focus = 1 / (1 + np.exp(-2 * spectral_noise(draw, side, 2.2)))
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
    slope = draw.uniform(-40, 40, 2)
    ground = draw.uniform(95, 150) + slope[0] * x + slope[1] * y + draw.uniform(30, 50) * brightness * focus
    pixels = np.stack([ground + 16 * warm, ground + 5 * green, ground - 16 * warm + 6 * green], -1)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    shapes, mask = Image.new("RGB", image.size), Image.new("L", image.size)
    on_shapes, on_mask = ImageDraw.Draw(shapes), ImageDraw.Draw(mask)
    for _ in range(int(draw.integers(6, 14))):
        centre, size = draw.uniform(0, side, 2), draw.uniform(0.03, 0.2, 2) * side
        box = (*(centre - size), *(centre + size))
        paint, cover = tuple(int(value) for value in draw.integers(20, 236, 3)), int(draw.integers(120, 230))
        for canvas, fill in ((on_shapes, paint), (on_mask, cover)):
            (canvas.ellipse if centre[0] < side / 2 else canvas.rectangle)(box, fill=fill)
    # A lens leaves no edge sharper than a pixel or so.
    return Image.composite(shapes, image, mask.filter(ImageFilter.GaussianBlur(0.8)))


drawn = lru_cache(maxsize=1)(scene)


def caption(number: int) -> str:
    draw = np.random.default_rng([1, number])
    parts = [words[int(draw.integers(len(words)))] for words in (SUBJECTS, ACTIONS, PLACES, TIMES)]
    return f"A photograph of {' '.join(parts)}, frame {number}."


def cut(number: int, side: int, count: int) -> list[tuple[bytes, int]]:
    """(JPEG, pixels) of pieces of one scene: cropped elsewhere, mirrored, in another aspect."""
    whole = drawn(number)
    made = []
    for variant in range(count):
        draw = np.random.default_rng([2, number, variant])
        wide, high = ASPECTS[(number + variant) % len(ASPECTS)]
        share = draw.uniform(0.85, 1.0) if side < LARGEST else 1.0
        width, height = LARGEST * share * wide, LARGEST * share * high
        x, y = draw.uniform(0, LARGEST - width), draw.uniform(0, LARGEST - height)
        size = (round(side * wide), round(side * high))
        image = whole.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
        if variant % 2:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY)
        made.append((buffer.getvalue(), size[0] * size[1]))
    return made


def pieces(task: tuple[int, dict[int, int]]) -> dict[int, list[tuple[bytes, int]]]:
    """side -> the pieces of one scene that its set takes."""
    number, counts = task
    return {side: cut(number, side, count) for side, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="one shard set is written into each of OUT/<side>")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--images", type=int, nargs="+", default=[8192, 4096, 2048], help="of each side")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if len(args.sides) != len(args.images):
        parser.error("--images: expected one number for each of --sides")
    totals = dict(zip(args.sides, args.images, strict=True))
    scenes = max(1, max(args.images) // PIECES)
    tasks = [
        (number, {side: total * (number + 1) // scenes - total * number // scenes for side, total in totals.items()})
        for number in range(scenes)
    ]
    count, size, pixels = Counter[int](), Counter[int](), Counter[int]()
    with ExitStack() as stack, ProcessPoolExecutor(args.workers) as pool:
        writers = {
            side: stack.enter_context(
                ShardSetWriter(args.out / str(side), samples_per_shard=SAMPLES_PER_SHARD, overwrite=True)
            )
            for side in args.sides
        }
        for made in pool.map(pieces, tasks):
            for side, images in made.items():
                for data, area in images:
                    text = caption(count[side])
                    writers[side].write("train", f"photo-{count[side]:06d}", data, "jpg", {"text": text})
                    count[side] += 1
                    size[side] += len(data)
                    pixels[side] += area
    described = {
        side: {
            "images": count[side],
            "mean_bytes": round(size[side] / count[side]),
            "mean_pixels": round(pixels[side] / count[side]),
            "bits_per_pixel": round(8 * size[side] / pixels[side], 3),
        }
        for side in args.sides
    }
    (args.out / "described.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(described, indent=1))


if __name__ == "__main__":
    main()
