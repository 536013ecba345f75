"""Radiographs of invented chests: what absorbs adds up, and film turns the sum into grey.

Coordinates run from −1 to 1, x from the picture's left (the patient's right) and y downwards. All planes are float32
(side, side); a plane of a structure lies between 0 and 1.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from clipdist.prepare.phantom_chest_findings import Anatomy, Finding, Study

Plane = npt.NDArray[Any]
Points = Sequence[tuple[float, float]]
FINER = 3  # times the side, for strokes
_SOFTEN = ImageFilter.GaussianBlur(0.5)
HEIGHTS = {"upper": -0.45, "mid": -0.12, "lower": 0.2}
SIZES = {"small": 0, "moderate": 1, "large": 2}
GRADES = {"mild": 0, "moderate": 1, "severe": 2}


def draw_radiograph(study: Study, view: str, side: int, seed: list[int]) -> npt.NDArray[np.uint8]:
    """uint8 [side, side]: the chest of `study` in the view PA, AP or LATERAL; the same for the same arguments."""
    film = _Film(study.anatomy, view, side, seed)
    if view == "LATERAL":
        _draw_lateral(film, study)
    else:
        _draw_frontal(film, study)
    return film.develop()


class _Film:
    """What the rays met, and the geometry of one picture."""

    def __init__(self, anatomy: Anatomy, view: str, side: int, seed: list[int]) -> None:
        self.anatomy, self.view, self.side, self.rng = anatomy, view, side, np.random.default_rng([*seed, 0])
        rng = self.exposure = np.random.default_rng([*seed, 1])  # apart, so that a finding changes nothing else
        axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
        # Patients never stand quite straight: turned and moved a little.
        angle = rng.normal(0, 0.02 if view == "PA" else 0.045)
        self.cos, self.sin, self.zoom = math.cos(angle), math.sin(angle), anatomy.zoom * rng.uniform(0.97, 1.03)
        self.moved = rng.normal(0, 0.03, 2)
        x, y = np.meshgrid(axis - self.moved[0], axis - self.moved[1])
        self.x: Plane = ((x * self.cos + y * self.sin) / self.zoom).astype(np.float32)
        self.y: Plane = ((y * self.cos - x * self.sin) / self.zoom).astype(np.float32)
        self.density: Plane = np.zeros((side, side), np.float32)

    def soft(self, inside: Plane, edge: float) -> Plane:
        """1 where `inside` is above `edge`, 0 below −`edge`, a ramp between."""
        return np.clip(0.5 + inside / (2 * edge), 0, 1)

    def ellipse(self, x: float, y: float, rx: float, ry: float, edge: float = 0.12, tilt: float = 0.0) -> Plane:
        dx, dy = self.x - x, self.y - y
        along, across = dx * math.cos(tilt) + dy * math.sin(tilt), dy * math.cos(tilt) - dx * math.sin(tilt)
        return self.soft(1 - np.hypot(along / rx, across / ry), edge)

    def blob(self, x: float, y: float, rx: float, ry: float) -> Plane:
        """A Gaussian hill of height 1."""
        return np.exp(-(((self.x - x) / rx) ** 2) - ((self.y - y) / ry) ** 2)

    def strokes(self, *strokes: tuple[Points, float, float]) -> Plane:
        """Polylines of (points, width, brightness), antialiased; where they cross the brighter one counts."""
        sheet = Image.new("L", (FINER * self.side, FINER * self.side))
        pen, scale = ImageDraw.Draw(sheet), FINER * self.side / 2
        for points, width, brightness in sorted(strokes, key=lambda stroke: stroke[2]):
            line = [
                (
                    ((x * self.cos - y * self.sin) * self.zoom + self.moved[0] + 1) * scale,
                    ((x * self.sin + y * self.cos) * self.zoom + self.moved[1] + 1) * scale,
                )
                for x, y in points
            ]
            pen.line(line, fill=round(255 * brightness), width=max(1, round(width * self.zoom * scale)), joint="curve")
        return np.asarray(sheet.reduce(FINER).filter(_SOFTEN), np.float32) / 255

    def noise(self, cells: int, rng: np.random.Generator | None = None) -> Plane:
        """A smooth field of zero mean and unit variance, `cells` across."""
        grid = (rng or self.rng).standard_normal((cells + 3, cells + 3), dtype=np.float32)
        up = _upsampling(self.side, cells + 3)
        field = up @ grid @ up.T
        return field / field.std()

    def develop(self) -> npt.NDArray[np.uint8]:
        rng = self.exposure
        density = self.density + 0.012 * self.noise(5, rng)
        density += 0.010 * rng.standard_normal(density.shape, dtype=np.float32)
        grey = 1 - np.exp(-np.clip(density, 0, None) * rng.uniform(1.45, 1.75))  # film grows dense ever more slowly
        grey = np.clip(grey / 0.86, 0, 1) ** rng.uniform(1.0, 1.3)
        picture = Image.fromarray((grey * 235 + 8).astype(np.uint8))
        marker = rng.uniform() < 0.8
        if marker and self.view != "LATERAL":
            _mark_left(picture)
        return np.asarray(picture)


@lru_cache(maxsize=16)
def _upsampling(side: int, cells: int) -> Plane:
    """(side, cells) weights of linear interpolation, smoothed."""
    position = np.linspace(0, cells - 1, side)
    weights = np.clip(1.5 - np.abs(position[:, None] - np.arange(cells)), 0, 1)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _mark_left(picture: Image.Image) -> None:
    """The technician's L in the corner at the patient's left."""
    pen, unit = ImageDraw.Draw(picture), picture.width / 32
    x, y = picture.width - 3.2 * unit, 1.6 * unit
    width = max(1, round(unit / 3))
    pen.line([(x, y), (x, y + 2 * unit), (x + 1.2 * unit, y + 2 * unit)], fill=235, width=width)


def _draw_frontal(film: _Film, study: Study) -> None:
    x, y, body = film.x, film.y, study.anatomy
    wide = body.width
    across = np.abs(x) / wide
    shoulders = np.clip((y + 1.0) / 0.5, 0, 1)
    outline = 0.66 + 0.28 * np.clip(1.4 - 1.1 * shoulders, 0, 1) ** 2 + 0.06 * y
    tissue = film.soft(outline - across, 0.03) * (0.5 + 0.10 * np.clip(1 - across, 0, 1))
    neck = film.soft(y + 1.0 + 0.9 * np.clip(0.55 - across, 0, None) - 0.25 * across, 0.05)
    film.density += tissue * np.maximum(neck, film.soft(0.22 - across, 0.04))

    lungs = {sign: _lung(film, study, sign) for sign in (-1, 1)}
    air = np.maximum(lungs[-1], lungs[1])
    film.density += 0.34 * film.soft(y - 0.5, 0.25) * film.soft(outline - across, 0.03)  # the abdomen
    film.density -= film.density * 0.72 * air
    spine = film.soft(0.085 - np.abs(x), 0.03)
    film.density += spine * (0.07 + 0.025 * np.sin(y * 38 + body.phase))
    _draw_mediastinum(film, study)
    _draw_bones(film, study)
    _draw_vessels(film, air, study)
    for finding in study.shown():
        _FRONTAL[finding.label](film, finding, lungs, study)


def _lung(film: _Film, study: Study, sign: int) -> Plane:
    """Where a lung holds air; `sign` −1 for the patient's right."""
    body = study.anatomy
    dx = (sign * film.x / body.width - 0.40) / 0.31
    dy = (film.y + 0.08) / (0.76 * body.height)
    round_part = 1 - (np.abs(dx) ** 2.4 + np.abs(dy) ** 3.0)
    dome = 0.50 * body.height - (0.06 if sign < 0 else 0.0) + 0.16 * (np.clip(np.abs(dx + 0.15), 0, 1.1) ** 2 - 0.5)
    if (lost := study.finding("Atelectasis")) and sign in _signs(lost.side):
        dome = dome - 0.07
    apex = np.clip(-film.y - 0.45, 0, 1) * 0.35  # lungs narrow towards the apex
    return film.soft(round_part - apex * np.abs(dx), 0.10) * film.soft(dome - film.y, 0.025)


def _draw_mediastinum(film: _Film, study: Study) -> None:
    body = study.anatomy
    wide = 0.115 * body.width
    if found := study.finding("Enlarged Cardiomediastinum"):
        wide *= 1.8 if found.certain else 1.35
    band = film.soft(wide + 0.05 * np.clip(-film.y - 0.5, 0, 1) - np.abs(film.x - 0.01), 0.035)
    shadow = 0.34 * band * film.soft(0.45 - film.y, 0.1)
    np.maximum(shadow, 0.34 * film.ellipse(wide - 0.005, -0.31, 0.085, 0.11, 0.2), out=shadow)  # aortic knob
    grown = 1.0 if film.view == "PA" else 1.10
    if found := study.finding("Cardiomegaly"):
        grown *= (1.30, 1.48, 1.70)[GRADES[found.grade]] if found.certain else 1.18
    heart = film.ellipse(0.10 + 0.10 * (grown - 1), 0.24, 0.265 * grown * body.heart, 0.26 * grown**0.4, 0.06, 0.45)
    np.maximum(shadow, 0.42 * heart, out=shadow)
    np.maximum(shadow, 0.38 * film.ellipse(-0.09 * grown, 0.24, 0.13 * grown, 0.21, 0.08), out=shadow)
    film.density += shadow * film.soft(0.47 * body.height - film.y, 0.03)  # it rests on the diaphragm


def _draw_bones(film: _Film, study: Study) -> None:
    body, wide = study.anatomy, study.anatomy.width
    across = np.abs(film.x) / wide
    chest = film.soft(0.76 - across, 0.02) * film.soft(across - 0.07, 0.03)
    broken = study.finding("Fracture")
    for number in range(9):
        level = (-0.80 + 0.155 * number) * body.height
        for sign in (-1, 1):
            half = film.soft(sign * film.x, 0.01) * chest
            shift = np.zeros_like(film.x)
            if broken and sign in _signs(broken.side) and broken.rib - 2 <= number <= broken.rib:
                beyond = film.soft(across - broken.place, 0.012)
                shift = 0.075 * beyond  # the outer part is displaced downwards, and overlaps
                gap = np.abs(across - broken.place)
                film.density += (
                    0.12
                    * half
                    * film.soft(0.045 - gap, 0.015)
                    * film.soft(0.045 - np.abs(film.y - level - 0.34 * across**1.6), 0.015)
                )
            back = level + 0.34 * across**1.6 + shift
            film.density += 0.095 * half * film.soft(0.024 - np.abs(film.y - back), 0.010)
            front = level + 0.42 - 0.36 * across + shift
            bar = film.soft(0.022 - np.abs(film.y - front), 0.010) * film.soft(0.55 - front, 0.05)
            film.density += 0.035 * half * bar
    tilt = 0.17 if film.view == "PA" else 0.07
    collar = [(0.08, -0.60), (0.32 * wide, -0.60 - 0.5 * tilt), (0.68 * wide, -0.62 - tilt)]
    film.density += 0.15 * film.strokes((collar, 0.05, 1), ([(-x, y) for x, y in collar], 0.05, 1))


def _draw_vessels(film: _Film, air: Plane, study: Study) -> None:
    rng = np.random.default_rng(study.anatomy.vessels)
    tree: list[tuple[Points, float, float]] = []
    for sign in (-1, 1):
        root = (sign * 0.17 * study.anatomy.width, -0.06)
        film.density += 0.16 * film.blob(*root, 0.08, 0.11)
        for _ in range(9):
            angle, length = rng.uniform(-1.3, 1.3), rng.uniform(0.25, 0.45)
            bend = angle + rng.normal(0, 0.35)
            middle = (root[0] + sign * length * 0.5 * math.cos(angle), root[1] + length * 0.7 * math.sin(angle))
            end = (middle[0] + sign * length * 0.5 * math.cos(bend), middle[1] + length * 0.8 * math.sin(bend))
            tree += [([root, middle], 0.026, 0.8), ([middle, end], 0.016, 0.5)]
    film.density += 0.15 * film.strokes(*tree) * air


def _signs(side: str) -> tuple[int, ...]:
    return {"right": (-1,), "left": (1,)}.get(side, (-1, 1))


def _amount(finding: Finding) -> float:
    """Doubtful findings are faint."""
    return 1.0 if finding.certain else 0.45


def _effusion(film: _Film, finding: Finding, lungs: dict[int, Plane], study: Study) -> None:
    level = (0.36, 0.14, -0.12)[SIZES[finding.size]]
    for sign in _signs(finding.side):
        dx = sign * film.x / study.anatomy.width
        surface = level + 0.02 - 0.30 * np.clip((dx - 0.36) / 0.33, 0, 1) ** 2  # it climbs along the chest wall
        fluid = film.soft(film.y - surface, 0.05) * film.soft(dx - 0.10, 0.03) * film.soft(0.71 - dx, 0.02)
        below = np.clip(lungs[sign] + 0.15 * film.soft(0.6 - film.y, 0.1), 0, 1)
        film.density += 0.48 * _amount(finding) * fluid * below


def _edema(film: _Film, finding: Finding, lungs: dict[int, Plane], study: Study) -> None:
    strength = (0.16, 0.24, 0.32)[GRADES[finding.grade]] * _amount(finding)
    texture = 1 + 0.22 * film.noise(9) + 0.14 * film.noise(22)
    for sign in (-1, 1):
        wings = film.blob(sign * 0.30 * study.anatomy.width, 0.0, 0.26, 0.42)
        film.density += strength * wings * texture * lungs[sign]
        x = sign * study.anatomy.width
        kerley = [([(x * 0.57, y), (x * 0.67, y + 0.01)], 0.012, 1.0) for y in (0.22, 0.275, 0.33, 0.385)]
        film.density += 0.07 * film.strokes(*kerley) * lungs[sign]


def _opacity(film: _Film, finding: Finding, lungs: dict[int, Plane], study: Study) -> None:
    """Pneumonia: fluffy patches. Consolidation: one dense patch with branching air in it."""
    dense = finding.label == "Consolidation"
    for sign in _signs(finding.side):
        x, y = sign * 0.40 * study.anatomy.width, HEIGHTS[finding.zone] * study.anatomy.height
        if dense:
            patch = film.ellipse(x, y, 0.21, 0.17, 0.25)
            bronchi = [([(x - sign * 0.16, y), (x + sign * 0.14, y + 0.18 * a)], 0.02, 1.0) for a in (-0.5, 0.1, 0.7)]
            patch -= 0.4 * film.strokes(*bronchi)
            film.density += 0.40 * _amount(finding) * np.clip(patch, 0, 1) * lungs[sign]
            continue
        for _ in range(6):
            dx, dy = film.rng.normal(0, 0.085, 2)
            film.density += 0.17 * _amount(finding) * film.blob(x + dx, y + dy, 0.085, 0.075) * lungs[sign]


def _atelectasis(film: _Film, finding: Finding, lungs: dict[int, Plane], study: Study) -> None:
    for sign in _signs(finding.side):
        for number in range(2 if finding.certain else 1):
            x, y = sign * 0.38 * study.anatomy.width, 0.27 - 0.10 * number
            slope = film.rng.normal(0, 0.03)
            film.density += (
                0.30 * _amount(finding) * film.strokes(([(x - 0.15, y - slope), (x + 0.15, y + slope)], 0.036, 1))
            )


def _pneumothorax(film: _Film, finding: Finding, lungs: dict[int, Plane], study: Study) -> None:
    inset = (0.10, 0.18, 0.30)[SIZES[finding.size]]
    for sign in _signs(finding.side):
        dx = (sign * film.x / study.anatomy.width - 0.36 + 0.5 * inset) / (0.32 - inset * 0.75)
        dy = (film.y - 0.05 - 0.6 * inset) / (0.72 - inset)
        edge = 1 - (np.abs(dx) ** 2.2 + np.abs(dy) ** 2.4)
        free = film.soft(-edge, 0.05) * lungs[sign] * film.soft(sign * film.x / study.anatomy.width - 0.18, 0.05)
        film.density -= film.density * 0.62 * free * _amount(finding)
        pleura = film.soft(0.05 - np.abs(edge), 0.05) * lungs[sign] * film.soft(dx - 0.2, 0.2)
        film.density += 0.15 * pleura * film.soft(0.3 - film.y, 0.1) * _amount(finding)


def _lesion(film: _Film, finding: Finding, lungs: dict[int, Plane], study: Study) -> None:
    radius = 0.018 + 0.024 * finding.centimetres
    for sign in _signs(finding.side):
        x, y = sign * 0.42 * study.anatomy.width, HEIGHTS[finding.zone] * study.anatomy.height - 0.03
        film.density += 0.36 * _amount(finding) * film.ellipse(x, y, radius, radius, 0.25)


def _devices(film: _Film, finding: Finding, lungs: dict[int, Plane], study: Study) -> None:
    wide = study.anatomy.width
    if finding.device == "pacemaker":
        box = np.maximum(np.abs(film.x - 0.50 * wide) / 0.11, np.abs(film.y + 0.50) / 0.085)
        film.density += 0.75 * film.soft(1 - box, 0.06)
        lead = [(0.44 * wide, -0.56), (0.18, -0.62), (-0.06, -0.3), (-0.02, 0.1), (0.2, 0.36)]
        film.density += 0.8 * film.strokes((lead, 0.016, 1))
    elif finding.device == "tube":
        tube = [([(x, -1.0), (x, -0.36)], 0.012, 1.0) for x in (-0.02, 0.02)]
        film.density += 0.7 * film.strokes(*tube)
    elif finding.device == "line":
        catheter = [(-0.42 * wide, -0.80), (-0.22, -0.62), (-0.10, -0.45), (-0.09, -0.02)]
        film.density += 0.8 * film.strokes((catheter, 0.016, 1))
    else:  # wires of a sternotomy
        film.density += 1.2 * film.strokes(
            *(
                ([(-0.035, y), (0.0, y + 0.04), (0.035, y), (0.0, y - 0.04), (-0.035, y)], 0.014, 1)
                for y in (-0.36, -0.19, -0.02, 0.15, 0.32)
            )
        )


def _drawn_already(film: _Film, finding: Finding, lungs: dict[int, Plane], study: Study) -> None:
    """Heart, mediastinum and ribs are drawn as they are found."""


_FRONTAL = {
    "Pleural Effusion": _effusion,
    "Edema": _edema,
    "Pneumonia": _opacity,
    "Consolidation": _opacity,
    "Atelectasis": _atelectasis,
    "Pneumothorax": _pneumothorax,
    "Lung Lesion": _lesion,
    "Support Devices": _devices,
    "Cardiomegaly": _drawn_already,
    "Enlarged Cardiomediastinum": _drawn_already,
    "Fracture": _drawn_already,
}


def _draw_lateral(film: _Film, study: Study) -> None:
    """From the patient's left: the breastbone at the picture's left, the spine at its right."""
    body = study.anatomy
    outline = film.soft(1 - (np.abs(film.x / 0.80) ** 3 + np.abs((film.y - 0.1) / 1.25) ** 3), 0.08)
    film.density += 0.56 * outline
    dome = 0.52 * body.height + 0.16 * ((film.x + 0.15) ** 2) + 0.10 * film.x
    lung = film.soft(1 - (np.abs((film.x - 0.0) / 0.62) ** 2.4 + np.abs((film.y + 0.02) / 0.80) ** 3), 0.1)
    lung = lung * film.soft(dome - film.y, 0.03)
    film.density += 0.30 * film.soft(film.y - dome, 0.05) * outline
    film.density -= film.density * 0.68 * lung
    spine = film.soft(0.12 - np.abs(film.x - 0.50 - 0.06 * np.sin(2 * film.y)), 0.04) * outline
    film.density += spine * (0.20 + 0.06 * np.sin(film.y * 26 + body.phase))
    film.density += 0.22 * film.strokes(([(-0.60, -0.55), (-0.66, 0.30)], 0.06, 1))  # the breastbone
    grown = 1.0
    if found := study.finding("Cardiomegaly"):
        grown = (1.2, 1.35, 1.5)[GRADES[found.grade]] if found.certain else 1.1
    film.density += 0.38 * film.ellipse(-0.26, 0.22, 0.24 * grown, 0.27 * grown, 0.12, 0.5)
    film.density += 0.16 * film.blob(0.02, -0.08, 0.12, 0.12)  # the hila
    if found := study.finding("Pleural Effusion"):
        level = (0.42, 0.26, 0.05)[SIZES[found.size]]
        fluid = film.soft(film.y - level + 0.25 * np.clip(film.x - 0.1, 0, 1), 0.05) * lung * film.soft(film.x, 0.08)
        film.density += 0.45 * _amount(found) * fluid
    for finding in study.shown():
        if finding.label in ("Pneumonia", "Consolidation", "Lung Lesion"):
            radius = 0.15 if finding.label != "Lung Lesion" else 0.018 + 0.024 * finding.centimetres
            place = (0.12, HEIGHTS[finding.zone] * body.height)
            film.density += 0.32 * _amount(finding) * film.ellipse(*place, radius, radius, 0.3) * lung
        elif finding.label == "Edema":
            haze = film.blob(0.02, 0.0, 0.4, 0.45) * (1 + 0.2 * film.noise(12))
            film.density += 0.18 * _amount(finding) * haze * lung
        elif finding.label == "Atelectasis":
            film.density += 0.25 * _amount(finding) * film.strokes(([(0.02, 0.34), (0.34, 0.30)], 0.034, 1))
        elif finding.label == "Support Devices" and finding.device == "pacemaker":
            film.density += 0.5 * film.strokes(([(-0.30, -0.7), (-0.05, -0.3), (-0.30, 0.34)], 0.016, 1))
