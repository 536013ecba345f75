"""Stained tissue for tests: photographs that packages carry where these are installed, drawn tissue elsewhere."""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from clipdist.prepare.phantom_tissue import draw_tissue
from clipdist.prepare.stain import Picture


def packaged(package: str, inside: str) -> Picture | None:
    """A picture that an installed package carries, uint8 [H, W, 3]."""
    spec = importlib.util.find_spec(package)
    path = Path(str(spec.origin)).parent / inside if spec and spec.origin else None
    if path is None or not path.is_file():
        return None
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@cache
def ihc() -> Picture:
    """Colonic glands, haematoxylin and diaminobenzidine, 512 x 512 (scikit-image)."""
    found = packaged("skimage", "data/ihc.png")
    return draw_tissue("dcis", 0, 512) if found is None else found


@cache
def h_and_e() -> Picture:
    """Skin, haematoxylin and eosin, 240 x 240 (wsidicom-data, from OpenSlide's test slides)."""
    found = packaged("wsidicom_data", "data/test_tile.png")
    return draw_tissue("ilc", 0, 256) if found is None else found
