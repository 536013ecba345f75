"""Small shard sets for tests."""

import io
from pathlib import Path
from typing import Any

import zstandard

from clipdist.data.sets.writer import ShardSetWriter
from tests.unit.pictures import encoded, picture

PNG = encoded(picture(0))


def write_set(folder: Path, samples: int = 7, per_shard: int = 3, **options: Any) -> Path:
    """`samples` in the training split, two in the validation split."""
    options = {"license_text": "CC0-1.0", "command": ["a test"], **options}
    with ShardSetWriter(folder, samples_per_shard=per_shard, **options) as out:
        for number in range(samples):
            out.write(
                "train", f"s{number}", encoded(picture(number)), "png", {"text": f"caption {number}", "n": number}
            )
        for number in range(2):
            out.write("val", f"v{number}", PNG, "PNG", {"text": [f"één {number}", "zwei"]})
    return folder


def first_shard(folder: Path) -> Path:
    return next(path for path in sorted(folder.iterdir()) if ".tar" in path.name)


def plain_tar(shard: Path) -> io.BytesIO:
    data = shard.read_bytes()
    if shard.suffix == ".zst":
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
            data = reader.read()
    return io.BytesIO(data)
