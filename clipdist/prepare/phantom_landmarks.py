"""Drawn landmarks laid out as Google Landmarks v2 is published: tars, md5 files, tables, and faults like the real ones.

They let packing, training and the search for near-duplicates be tried without a download. `phantom.json` says which
copies were planted, of which kind.
"""

import csv
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageEnhance

from clipdist.errors import UserError
from clipdist.prepare.landmark_tables import id_text
from clipdist.prepare.phantom_places import Place, photograph

STAMP = "phantom.json"
VERSION = 1  # to be raised whenever the same seed gives other bytes
# Copies that the eye takes for the same picture, copies that only features find, and copies under another's label.
BY_LOOKS = ("copied", "recompressed", "resized", "brightened", "trimmed")
BY_FEATURES = ("zoomed",)
MISLABELLED = "mislabelled"
NAMES = {
    "tower": ("Tower of Ardún", "Watchtower of Meril", "Clock Tower (Osk)", "Pharos of Tellé"),
    "dome": ("Dome of Saint Élodie", "Great Hall of Varn", "Kuppel über Brück", "Old Observatory"),
    "bridge": ("Old Bridge", "Bridge of Sighs & Song", "Pont d'Orlune", "Harbour Bridge"),
    "pyramid": ("Pyramid of Ixal", "Step Temple", "Tomb of the 2nd King", "Ziggurat of Nör"),
    "arch": ("Arch of Victory, Lorn", "Aqueduct of Calda", "Porta Ñera", "City Gate"),
    "church": ("Church of Our Lady", "Abbey of Fenn", "Žižek Chapel", "Cathedral of Ostra"),
}


@dataclass
class _Photo:
    number: int
    landmark: int
    data: bytes
    url: str


@dataclass
class _Layout:
    photos: list[_Photo] = field(default_factory=list)
    planted: list[dict[str, str]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)


def write_landmarks_layout(folder: Path, landmarks: int = 24, *, side: int = 128, tars: int = 3, seed: int = 0) -> Path:
    """Makes `folder`, unless it is there: whole or not at all, and the same bytes for the same arguments.

    `landmarks` classes of 12 to 36 photographs, a quarter as many of 2 to 9; planted copies; three files that are no
    pictures; `tars` tars in `train/` with md5 files beside them, and rows for a tar more, which is not there. Raises
    `UserError` for fewer than two landmarks, and where `folder` holds something else.
    """
    if landmarks < 2 or side < 32 or tars < 1:
        raise UserError(
            f"phantom: found {landmarks} landmarks, side {side}, {tars} tars; expected at least 2, 32 and 1"
        )
    stamp = {"what": "synthetic landmarks", "version": VERSION, "landmarks": landmarks, "side": side, "tars": tars}
    stamp["seed"] = seed
    if folder.exists():
        if _stamp_of(folder) == stamp:
            return folder
        raise UserError(f"{folder}: is there already, and holds something else; choose another folder")
    layout = _drawn(landmarks, side, seed)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "train").mkdir(parents=True)
        _write(partial, layout, tars, np.random.default_rng([seed, 2]))
        body = {**stamp, "planted": layout.planted, "unreadable": layout.unreadable}
        (partial / STAMP).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _stamp_of(folder: Path) -> dict[str, Any]:
    try:
        body = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in body.items() if name not in ("planted", "unreadable")}


def _drawn(landmarks: int, side: int, seed: int) -> _Layout:
    """All photographs, copies and faults, in the order in which they are made."""
    rng = np.random.default_rng([seed, 1])
    layout = _Layout()
    numbers = iter(_distinct(rng, 64 * landmarks + 1000))
    small = -(-landmarks // 4)
    ids = (1 + np.sort(rng.choice(203_000, landmarks + small, replace=False))).tolist()
    pictures: list[tuple[int, int, Image.Image]] = []
    for place_number, landmark in enumerate(ids):
        place = Place.of(1000 * seed + place_number)
        held = NAMES[place.kind]
        layout.names[landmark] = held[place_number // len(NAMES) % len(held)]
        count = int(rng.integers(12, 37) if place_number < landmarks else rng.integers(2, 10))
        for photo in range(count):
            picture = photograph(place, np.random.default_rng([seed, place_number, photo]), side)
            number = next(numbers)
            layout.photos.append(_photo(number, landmark, _jpeg(picture, int(rng.integers(82, 96)))))
            if place_number < landmarks:
                pictures.append((number, landmark, picture))
    _plant(layout, pictures, numbers, rng, each=-(-landmarks // 3))
    broken = (layout.photos[0].data[: len(layout.photos[0].data) // 2], b"<html>404 Not Found</html>", b"")
    for data, landmark in zip(broken, (ids[0], ids[1], ids[0]), strict=True):
        number = next(numbers)
        layout.photos.append(_photo(number, landmark, data))
        layout.unreadable.append(id_text(number))
    return layout


def _plant(
    layout: _Layout,
    pictures: Sequence[tuple[int, int, Image.Image]],
    numbers: Any,
    rng: np.random.Generator,
    each: int,
) -> None:
    """`each` copies of every kind, of different pictures."""
    kinds = [kind for kind in (*BY_LOOKS, *BY_FEATURES) for _ in range(each)] + [MISLABELLED] * max(2, each // 3)
    landmarks = sorted({landmark for _, landmark, _ in pictures})
    data_of = {photo.number: photo.data for photo in layout.photos}
    for kind, chosen in zip(kinds, rng.permutation(len(pictures)).tolist(), strict=False):
        number, landmark, picture = pictures[chosen]
        copy = next(numbers)
        if kind == MISLABELLED:
            landmark = landmarks[(landmarks.index(landmark) + 1) % len(landmarks)]
        data = data_of[number] if kind == "copied" else _jpeg(_changed(picture, kind, rng), 60 + 10 * (chosen % 3))
        layout.photos.append(_photo(copy, landmark, data))
        layout.planted.append({"of": id_text(number), "copy": id_text(copy), "kind": kind})


def _changed(picture: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    width, height = picture.size
    if kind == "resized":
        return picture.resize((round(width * 0.75), round(height * 0.75)), Image.Resampling.LANCZOS)
    if kind == "brightened":
        return ImageEnhance.Brightness(picture).enhance(1.2)
    if kind in ("trimmed", "zoomed"):
        share = rng.uniform(0.02, 0.05) if kind == "trimmed" else rng.uniform(0.12, 0.2)
        left, top = rng.uniform(0, share, 2)
        box = (left * width, top * height, (left + 1 - share) * width, (top + 1 - share) * height)
        return picture.resize((width, height), Image.Resampling.BICUBIC, box)
    return picture  # recompressed, mislabelled


def _photo(number: int, landmark: int, data: bytes) -> _Photo:
    return _Photo(
        number, landmark, data, f"https://upload.example.org/commons/{number % 16:x}/Photo,_{number % 997}.jpg"
    )


def _distinct(rng: np.random.Generator, count: int) -> list[int]:
    return list(dict.fromkeys(rng.integers(0, 2**64, count, dtype=np.uint64).tolist()))


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _write(folder: Path, layout: _Layout, tars: int, rng: np.random.Generator) -> None:
    order = rng.permutation(len(layout.photos)).tolist()
    for tar in range(tars):
        path = folder / "train" / f"images_{tar:03d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
            for place in sorted(order[tar::tars], key=lambda place: layout.photos[place].number):
                name, data = id_text(layout.photos[place].number), layout.photos[place].data
                member = tarfile.TarInfo(f"{name[0]}/{name[1]}/{name[2]}/{name}.jpg")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
        md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        (folder / "train" / f"md5.images_{tar:03d}.txt").write_text(f"{md5}  {path.name}\n", encoding="utf-8")
    landmarks = list(layout.names)
    absent = [
        _photo(number, landmarks[number % len(landmarks)], b"")
        for number in _distinct(rng, -(-len(layout.photos) // tars))
    ]
    rows = [(*layout.photos, *absent)[at] for at in rng.permutation(len(layout.photos) + len(absent))]
    _table(folder / "train.csv", ("id", "url", "landmark_id"), [(id_text(r.number), r.url, r.landmark) for r in rows])
    told = [
        (id_text(r.number), r.url, f"Painter {r.number % 7}", "https://creativecommons.org/licenses/by/4.0/", "Drawn")
        for r in rows
    ]
    _table(folder / "train_attribution.csv", ("id", "url", "author", "license", "title"), told)
    wiki = "http://commons.wikimedia.org/wiki/Category:"
    categories = [
        (landmark, wiki + quote(name.replace(" ", "_"), safe="()")) for landmark, name in layout.names.items()
    ]
    _table(folder / "train_label_to_category.csv", ("landmark_id", "category"), categories)
    mislabelled = {one["copy"] for one in layout.planted if one["kind"] == MISLABELLED}
    clean = [
        (
            landmark,
            " ".join(
                id_text(r.number) for r in rows if r.landmark == landmark and id_text(r.number) not in mislabelled
            ),
        )
        for landmark in landmarks
    ]
    _table(folder / "train_clean.csv", ("landmark_id", "images"), clean)


def _table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
