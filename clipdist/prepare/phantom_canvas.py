"""The canvas of a dermoscopy phantom: planes of pigment, blood and scatter, and the outline of the lesion.

Melanin and haemoglobin darken the skin as absorbers do (Beer–Lambert: colour = skin · exp(−amount · absorption)),
which gives the passage from light brown to black and from pink to purple its natural course; scatter (scar, keratin,
pigment deep in the dermis) is blended over. Lengths are millimetres: a picture is 14 mm wide, its origin the centre.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from clipdist.prepare.phantom_lesion import Lesion

FIELD_MM = 14.0
Plane = npt.NDArray[Any]  # float32 (side, side); typed loosely, as NumPy's stubs call `plane * 0.5` float64

# sRGB of untouched skin for Fitzpatrick types I … VI under a dermatoscope's lamp.
SKIN = np.array(
    [(240, 205, 190), (229, 185, 165), (213, 162, 135), (184, 131, 102), (148, 101, 76), (108, 73, 57)], np.float32
)
MELANIN = np.array((0.42, 0.80, 1.10), np.float32)
BLOOD = np.array((0.10, 0.85, 0.72), np.float32)


@lru_cache(maxsize=256)
def _basis(side: int, cells: int) -> Plane:
    """(side, cells + 3) weights that upsample a grid of `cells` by a cubic B-spline, each row of unit length."""
    position = np.linspace(0.0, cells, side, endpoint=False)
    cell, t = position.astype(int), position % 1.0
    weights = np.zeros((side, cells + 3))
    pieces = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    for offset, piece in enumerate(pieces):
        weights[np.arange(side), cell + offset] = piece
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=8)
def _axis(side: int) -> Plane:
    return ((np.arange(side, dtype=np.float32) + 0.5) / side - 0.5) * np.float32(FIELD_MM)


def smoothstep(value: Plane, low: float, high: float) -> Plane:
    """0 below `low`, 1 above `high`, smooth between (Hermite)."""
    t = value - low
    t *= 1.0 / (high - low)
    np.clip(t, 0.0, 1.0, out=t)
    cubic = -2.0 * t  # in place from here on: these planes are the bulk of the drawing time
    cubic += 3.0
    cubic *= t
    cubic *= t
    return cubic


def blend(rgb: Plane, alpha: Plane, colour: Sequence[float]) -> None:
    """Lays `colour` over the (3, side, side) picture `rgb` in place, with opacity `alpha` in 0 … 1."""
    scratch = np.empty(rgb.shape[1:], np.float32)
    for channel, value in enumerate(colour):
        np.subtract(np.float32(value), rgb[channel], out=scratch)
        scratch *= alpha
        rgb[channel] += scratch


class Canvas:
    """The planes of one picture while it is drawn: absorbers, scatter layers, and the lesion's geometry."""

    def __init__(self, lesion: Lesion, rng: np.random.Generator, side: int) -> None:
        self.lesion, self.rng, self.side = lesion, rng, side
        self.x, self.y = _axis(side)[None, :], _axis(side)[:, None]
        self.melanin = np.zeros((side, side), np.float32)
        self.blood = np.zeros((side, side), np.float32)
        self.shade = np.ones((side, side), np.float32)
        self.ground: list[tuple[Plane, tuple[float, float, float]]] = []  # beneath the absorbers: a nail plate
        self.layers: list[tuple[Plane, tuple[float, float, float]]] = []
        self.furrows: Plane | None = None  # friction ridges of palm and sole, −1 … 1
        self.follicles: Plane | None = None  # openings on face and scalp, 0 … 1
        self.skin = SKIN[lesion.skin_tone - 1] * (1.0 + rng.normal(0.0, 0.025, 3).astype(np.float32))
        # Scatter is lit through the skin above it: on dark skin a scar is not paper white.
        self.clarity = 0.5 + 0.5 * float(self.skin.mean()) / 210.0
        self.centre, self.rho, self.mask = self._shape()

    def noise(self, cells: int, cells_y: int | None = None) -> Plane:
        """(side, side) smooth field of zero mean and unit variance, with `cells` cells across."""
        down, across = _basis(self.side, cells_y or cells), _basis(self.side, cells)
        grid = self.rng.standard_normal((down.shape[1], across.shape[1]), dtype=np.float32)
        return down @ grid @ across.T

    def blob(self, x: float, y: float, radius: float) -> Plane:
        """A Gaussian hill of height 1 around (x, y)."""
        return np.exp(-(((self.y - y) / radius) ** 2)) * np.exp(-(((self.x - x) / radius) ** 2))

    def marks(self, paint_marks: Callable[[ImageDraw.ImageDraw, float], None], blur: float = 0.0) -> Plane:
        """(side, side) in 0 … 1 of what `paint_marks(pen, pixels_per_mm)` draws in white on black, antialiased.

        The pen works on a picture of twice the side whose origin is its upper left corner; `blur` is in mm.
        """
        sheet = Image.new("L", (2 * self.side, 2 * self.side))
        paint_marks(ImageDraw.Draw(sheet), 2 * self.side / FIELD_MM)
        sheet = sheet.reduce(2)
        if blur:
            sheet = sheet.filter(ImageFilter.BoxBlur(blur * self.side / FIELD_MM))
        return np.asarray(sheet, np.float32) * np.float32(1 / 255)

    def points(self, count: int, inside: float = 0.5, reach: float = 1.0) -> npt.NDArray[np.float32]:
        """(n <= count, 2) places in mm within the lesion, where the mask exceeds `inside`."""
        radius = self.lesion.diameter_mm / 2 * 1.4 * reach
        tries = (self.rng.uniform(-radius, radius, (4 * count, 2)) + self.centre).astype(np.float32)
        tries = tries[np.abs(tries).max(axis=1) < FIELD_MM / 2 - 0.1]
        column, row = ((tries.T / FIELD_MM + 0.5) * self.side).astype(int)
        return tries[self.mask[row, column] > inside][:count]

    def rim(self, angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Distance in mm from the lesion's centre to its border along each of `angles`."""
        reach = np.linspace(0.3, 8.0, 60)
        x = self.centre[0] + reach * np.cos(angles)[:, None]
        y = self.centre[1] + reach * np.sin(angles)[:, None]
        column = np.clip((x / FIELD_MM + 0.5) * self.side, 0, self.side - 1).astype(int)
        row = np.clip((y / FIELD_MM + 0.5) * self.side, 0, self.side - 1).astype(int)
        outside = self.rho[row, column] > 1.0
        return reach[np.where(outside.any(axis=1), outside.argmax(axis=1), -1)]

    def develop(self) -> Plane:
        """(3, side, side) sRGB of the absorbers and the scatter laid over them."""
        rgb = np.empty((3, self.side, self.side), np.float32)
        scratch = np.empty_like(self.melanin)
        for channel in range(3):
            density = np.multiply(self.melanin, -MELANIN[channel], out=rgb[channel])
            density -= np.multiply(self.blood, BLOOD[channel], out=scratch)
            np.exp(density, out=density)
            density *= self.skin[channel] if not self.ground else 1.0
        if self.ground:
            bare = np.empty_like(rgb)
            bare[:] = self.skin[:, None, None]
            for alpha, colour in self.ground:
                blend(bare, alpha, colour)
            rgb *= bare
        for alpha, colour in self.layers:
            blend(rgb, alpha, [value * self.clarity for value in colour])
        rgb *= self.shade
        return rgb

    def _shape(self) -> tuple[tuple[float, float], Plane, Plane]:
        """Centre in mm, `rho` (1 on the border, 0 in the centre) and the lesion's opacity in 0 … 1."""
        lesion, rng = self.lesion, self.rng
        radius = lesion.diameter_mm / 2
        angle, direction = rng.uniform(0, 2 * np.pi, 2).tolist()
        to_edge = FIELD_MM / 2 / (1.0 if lesion.tube else max(abs(math.cos(direction)), abs(math.sin(direction))))
        away = {"central": rng.uniform(0, 0.6), "off-centre": rng.uniform(1.8, 2.6), "cut": to_edge - 0.3 * radius}
        centre = (away[lesion.placing] * math.cos(direction), away[lesion.placing] * math.sin(direction))
        stretch = {
            "round": rng.uniform(1.0, 1.06),
            "oval": rng.uniform(1.22, 1.35),
            "elongated": rng.uniform(1.65, 2.0),
        }
        aspect = math.sqrt(stretch[lesion.shape])
        wobble = (0.03, 0.13, 0.24)[lesion.asymmetry] * radius
        x = self.x - centre[0] + wobble * self.noise(3)
        y = self.y - centre[1] + wobble * self.noise(3)
        rough = {"regular": 0.02, "sharp": 0.03, "fading": 0.05, "notched": 0.08}[lesion.border] * radius
        x += rough * self.noise(11) + 0.4 * rough * self.noise(30)
        y += rough * self.noise(11) + 0.4 * rough * self.noise(30)
        if lesion.site == "nail":  # a band that grows out with the plate
            rho = np.abs(x) / (0.42 * radius)
        else:
            cos, sin = math.cos(angle), math.sin(angle)
            along, across = (cos * x + sin * y) / (radius * aspect), (cos * y - sin * x) / (radius / aspect)
            rho = np.sqrt(along * along + across * across)  # np.hypot takes several times as long
        if lesion.border == "notched":
            for turn in rng.uniform(0, 2 * np.pi, int(rng.integers(4, 8))).tolist():
                x0, y0 = centre[0] + 1.02 * radius * math.cos(turn), centre[1] + 1.02 * radius * math.sin(turn)
                rho += rng.uniform(0.35, 0.6) * self.blob(x0, y0, 0.16 * radius)
        soft = {"regular": 0.11, "sharp": 0.045, "fading": 0.36, "notched": 0.07}[lesion.border]
        return centre, rho, 1.0 - smoothstep(rho, 1.0 - 0.75 * soft, 1.0 + 1.25 * soft)
