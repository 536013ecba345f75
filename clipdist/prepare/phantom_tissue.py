"""Drawn tissue: patches in haematoxylin and eosin whose structures differ by diagnosis. Synthetic, of no medical use.

A patch is two maps of stain concentration, laid on white light by the Beer–Lambert law. It joins itself at its edges,
so that a slide of any size can be paved with it.
"""

import numpy as np
import numpy.typing as npt

from clipdist.prepare.stain import EOSIN, HAEMATOXYLIN

DIAGNOSES = {
    "idc": "INVASIVE DUCTAL CARCINOMA",
    "ilc": "INVASIVE LOBULAR CARCINOMA",
    "dcis": "DUCTAL CARCINOMA IN SITU, COMEDO TYPE WITH NECROSIS",
    "lcis": "LOBULAR CARCINOMA IN SITU",
}

Plane = npt.NDArray[np.float32]


def draw_tissue(diagnosis: str, seed: int, side: int = 1024) -> npt.NDArray[np.uint8]:
    """A patch for one of `DIAGNOSES`, uint8 [side, side, 3]; a function of its arguments alone. `side` >= 256.

    Invasive ductal: crowded clumps of large nuclei. Invasive lobular: small nuclei one after another in files. In situ:
    round ducts, filled with large nuclei about a pink centre (ductal) or with small even ones (lobular).
    """
    rng = np.random.default_rng([seed, list(DIAGNOSES).index(diagnosis)])
    h, e = np.full((side, side), 0.08, np.float32), _stroma(rng, side)
    ducts = max(2, (side // 256) ** 2 * 3 // 4)
    if diagnosis == "idc":
        for _ in range(3 * ducts):
            _clump(rng, h, e, radius=rng.uniform(45, 80), nucleus=(7, 12), pitch=17, necrosis=False)
    elif diagnosis == "ilc":
        for _ in range(10 * ducts):
            _file(rng, h, length=int(rng.integers(6, 16)))
    else:
        for _ in range(ducts):
            large = diagnosis == "dcis"
            radius = rng.uniform(90, 120)
            _clump(rng, h, e, radius=radius, nucleus=(7, 11) if large else (4, 5), pitch=18 if large else 12,
                   necrosis=large)  # fmt: skip
    for _ in range(6 * ducts):  # fibroblasts
        x, y = rng.uniform(0, side, 2)
        _disc(h, x, y, rng.uniform(3, 5), rng.uniform(0.5, 0.9), stretch=3)
    h *= rng.normal(1, 0.08, h.shape).astype(np.float32)
    density = h[..., None] * np.array(HAEMATOXYLIN, np.float32) + e[..., None] * np.array(EOSIN, np.float32)
    light = 245 * np.exp(-density) + rng.normal(0, 2, density.shape).astype(np.float32)
    return np.rint(light).clip(0, 255).astype(np.uint8)


def _stroma(rng: np.random.Generator, side: int) -> Plane:
    """Wavy pink fibres: noise stretched along one direction, periodic because it is made of whole waves."""
    frequency = np.fft.fftfreq(side) * side
    fy, fx = frequency[:, None], frequency[None, :]
    spread = np.exp(-((fx / (side / 60)) ** 2) - (fy / (side / 14)) ** 2)
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) * spread).real
    return (0.45 + 0.13 * noise / noise.std()).clip(0.05, None).astype(np.float32)


def _disc(plane: Plane, x: float, y: float, radius: float, value: float, stretch: float = 1.0) -> None:
    """Raises `plane` to `value` in a disc, or an ellipse lying across, that goes on at the opposite edge."""
    side, reach = len(plane), int(radius * stretch) + 2
    around = np.arange(-reach, reach + 1)
    rows, columns = (int(y) + around) % side, (int(x) + around) % side
    inside = np.hypot(around[None, :] / stretch, around[:, None]) <= radius
    block = np.ix_(rows, columns)
    plane[block] = np.where(inside, np.float32(value), plane[block])


def _clump(rng: np.random.Generator, h: Plane, e: Plane, *, radius: float, nucleus: tuple[float, float], pitch: float,
           necrosis: bool) -> None:  # fmt: skip
    """A round nest of nuclei about `pitch` pixels apart, in pale cytoplasm; with `necrosis` around a pink centre."""
    x, y = rng.uniform(0, len(h), 2)
    _disc(e, x, y, radius, 0.35)
    _disc(h, x, y, radius, 0.18)
    core = 0.45 * radius if necrosis else 0.0
    steps = np.arange(-radius, radius, pitch)
    for dx in steps:
        for dy in steps:
            px, py = np.array((dx, dy)) + rng.normal(0, pitch / 6, 2)
            if core + 6 < np.hypot(px, py) < radius - 8:
                _disc(h, x + px, y + py, rng.uniform(*nucleus), rng.uniform(0.9, 1.5))
    if necrosis:
        _disc(e, x, y, core, 0.95)
        _disc(h, x, y, core, 0.12)


def _file(rng: np.random.Generator, h: Plane, length: int) -> None:
    """Small nuclei one behind the other along a bent line."""
    x, y = rng.uniform(0, len(h), 2)
    angle = rng.uniform(-0.6, 0.6)
    for _ in range(length):
        _disc(h, x, y, rng.uniform(4, 6), rng.uniform(0.9, 1.3))
        angle += rng.normal(0, 0.15)
        x, y = x + 15 * np.cos(angle), y + 15 * np.sin(angle)
