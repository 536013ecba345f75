"""Small tars, as other tools write them."""

import io
import tarfile
from pathlib import Path
from typing import Any

import zstandard

from tests.unit.pictures import encoded, picture

PNG = encoded(picture(0))
JPEG = encoded(picture(1), "JPEG")
Members = list[tuple[str, bytes]]


def plain_tar(path: Path, members: Members, format: int = tarfile.PAX_FORMAT, folders: tuple[str, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name in folders:
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(*names: str) -> Members:
    return [member for name in names for member in ((f"{name}.png", PNG), (f"{name}.txt", f"text {name}".encode()))]


def frames(path: Path, parts: list[bytes], **options: Any) -> Path:
    """A `.tar.zst` of these frames."""
    path.write_bytes(b"".join(zstandard.ZstdCompressor(**options).compress(part) for part in parts))
    return path


def cut(tar: Path, *places: int) -> list[bytes]:
    data = tar.read_bytes()
    return [data[start:stop] for start, stop in zip((0, *places), (*places, len(data)), strict=True)]


def starts(tar: Path) -> list[int]:
    with tarfile.open(tar) as opened:
        return [member.offset for member in opened]
