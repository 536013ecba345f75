"""Drawn landmarks: each seed a building of its own, each photograph of it another viewpoint, light and weather."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

OVERSAMPLING = 2
KINDS = ("tower", "dome", "bridge", "pyramid", "arch", "church")
# Stone, brick, plaster and metal, in sRGB.
WALLS = (
    (196, 178, 146), (158, 92, 70), (222, 214, 200), (120, 124, 130), (208, 160, 110), (150, 150, 120),
    (176, 110, 120), (100, 112, 140), (230, 200, 150), (128, 82, 56),
)  # fmt: skip
ROOFS = ((150, 60, 44), (70, 90, 80), (90, 150, 130), (60, 62, 72), (190, 150, 60), (110, 70, 90))
GROUNDS = ((96, 128, 70), (190, 170, 120), (130, 130, 128), (70, 110, 140))
Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Place:
    """What a landmark looks like, wherever it is photographed from. Lengths are in its own width."""

    kind: str
    wall: Colour
    roof: Colour
    ground: Colour
    height: float
    parts: int
    windows: int
    detail: int
    seed: int

    @staticmethod
    def of(seed: int) -> "Place":
        """Kinds take turns; all else is drawn."""
        rng = np.random.default_rng([seed, 11])

        def one(of: Sequence[Colour]) -> Colour:
            return of[int(rng.integers(len(of)))]

        return Place(
            kind=KINDS[seed % len(KINDS)],
            wall=one(WALLS),
            roof=one(ROOFS),
            ground=one(GROUNDS),
            height=float(rng.uniform(0.75, 1.35)),
            parts=int(rng.integers(2, 6)),
            windows=int(rng.integers(1, 5)),
            detail=int(rng.integers(0, 4)),
            seed=seed,
        )


def photograph(place: Place, rng: np.random.Generator, side: int = 128) -> Image.Image:
    """A picture with the longer side `side`, upright or across."""
    wide = bool(rng.random() < 0.6)
    width, height = (side, round(side * 0.75)) if wide else (round(side * 0.75), side)
    view = _View(width, height, rng)
    view.sky_and_ground(place.ground)
    _BUILDERS[place.kind](view, place)
    view.people_and_trees()
    return view.developed()


class _View:
    """A camera before a scene: x to the right and y up, in widths of the landmark, (0, 0) in the middle of its foot."""

    def __init__(self, width: int, height: int, rng: np.random.Generator) -> None:
        self.size, self.rng = (width, height), rng
        self.canvas = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING))
        self.pen = ImageDraw.Draw(self.canvas)
        self.scale = min(width, height) * OVERSAMPLING * rng.uniform(0.42, 0.66)
        self.foot = (
            width * OVERSAMPLING * rng.uniform(0.34, 0.66),
            height * OVERSAMPLING * rng.uniform(0.76, 0.92),
        )
        self.turn = rng.uniform(0.1, 0.9)  # the share of a building's width that its lit face takes
        self.lean = rng.normal(0, 0.03)
        self.light = rng.uniform(0.6, 1.15)
        self.warmth = rng.normal(0, 0.1)

    def at(self, x: float, y: float) -> Point:
        return self.foot[0] + (x + self.lean * y) * self.scale, self.foot[1] - y * self.scale

    def shape(self, points: Sequence[Point], colour: Colour, shade: float = 1.0) -> None:
        self.pen.polygon([self.at(*point) for point in points], fill=_lit(colour, shade))

    def box(self, left: float, bottom: float, right: float, top: float, colour: Colour) -> None:
        """Two faces of a block, the one in the light and the one that is not."""
        edge = left + (right - left) * self.turn
        self.shape([(left, bottom), (edge, bottom), (edge, top), (left, top)], colour)
        self.shape([(edge, bottom), (right, bottom), (right, top), (edge, top)], colour, 0.66)

    def oval(self, left: float, bottom: float, right: float, top: float, colour: Colour, start: int = 180) -> None:
        (x0, y0), (x1, y1) = self.at(left, top), self.at(right, bottom)
        self.pen.pieslice((min(x0, x1), y0, max(x0, x1), y1), start, start + 180, fill=_lit(colour, 1.0))

    def windows(self, left: float, bottom: float, right: float, top: float, columns: int, rows: int) -> None:
        edge = left + (right - left) * self.turn
        for low, high, shade in ((left, edge, 0.32), (edge, right, 0.22)):
            step, rise = (high - low) / columns, (top - bottom) / rows
            for number in range(columns * rows):
                x, y = low + step * (number % columns), bottom + rise * (number // columns)
                self.shape(
                    [(x + step * 0.3, y + rise * 0.2), (x + step * 0.7, y + rise * 0.2),
                     (x + step * 0.7, y + rise * 0.75), (x + step * 0.3, y + rise * 0.75)],
                    (90, 100, 120), shade * 3,
                )  # fmt: skip

    def sky_and_ground(self, ground: Colour) -> None:
        width, height = self.canvas.size
        horizon = self.foot[1] - self.rng.uniform(0.02, 0.14) * height
        top = np.array([[110, 150, 215], [170, 180, 195], [225, 150, 110], [70, 80, 130]])[self.rng.integers(4)]
        low = np.minimum(top + self.rng.uniform(20, 60), 250)
        share = np.clip(np.arange(height) / max(1, horizon), 0, 1)[:, None, None]
        sky = (top * (1 - share) + low * share).repeat(width, 1)
        self.canvas.paste(Image.fromarray(sky.astype(np.uint8)))
        for _ in range(int(self.rng.integers(0, 5))):
            x, y = self.rng.uniform(0, width), self.rng.uniform(0, horizon * 0.7)
            across, up = self.rng.uniform(0.06, 0.2) * width, self.rng.uniform(0.02, 0.06) * height
            self.pen.ellipse(
                (x - across, y - up, x + across, y + up), fill=tuple(np.minimum(low + 25, 255).astype(int))
            )
        hills = [(x, horizon - self.rng.uniform(0, 0.12) * height) for x in np.linspace(0, width, 7)]
        self.pen.polygon([(0, horizon + 2), *hills, (width, horizon + 2)], fill=_lit(ground, 0.75))
        self.pen.rectangle((0, horizon, width, height), fill=_lit(ground, self.rng.uniform(0.85, 1.1)))

    def people_and_trees(self) -> None:
        width, height = self.canvas.size
        for _ in range(int(self.rng.integers(0, 6))):
            x, size = self.rng.uniform(0, width), self.rng.uniform(0.05, 0.12) * height
            y = self.rng.uniform(0.88, 1.0) * height
            coat = tuple(self.rng.integers(20, 220, 3).tolist())
            self.pen.rectangle((x - size * 0.18, y - size * 0.8, x + size * 0.18, y), fill=coat)
            self.pen.ellipse((x - size * 0.14, y - size * 1.1, x + size * 0.14, y - size * 0.8), fill=(200, 160, 130))
        for _ in range(int(self.rng.integers(0, 3))):
            x, size = self.rng.choice([0.04, 0.96]) * width, self.rng.uniform(0.15, 0.35) * height
            self.pen.ellipse((x - size / 2, height - size * 1.3, x + size / 2, height - size * 0.2), fill=(50, 84, 46))

    def developed(self) -> Image.Image:
        """The picture at its size, in its light, with a lens's softness and a sensor's noise."""
        width, height = self.canvas.size
        turned = self.canvas.rotate(self.rng.normal(0, 1.5), Image.Resampling.BILINEAR)
        inner = (0.02 * width, 0.02 * height, 0.98 * width, 0.98 * height)
        small = turned.resize(self.size, Image.Resampling.BOX, inner)
        if self.rng.random() < 0.2:
            small = small.filter(ImageFilter.GaussianBlur(0.6))
        pixels = (
            np.asarray(small, np.float32) * self.light * np.array([1 + self.warmth, 1, 1 - self.warmth], np.float32)
        )
        pixels += self.rng.normal(0, 1.5, (*pixels.shape[:2], 1))
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _lit(colour: Colour, shade: float) -> Colour:
    red, green, blue = (min(255, round(value * shade)) for value in colour)
    return red, green, blue


def _tower(view: _View, place: Place) -> None:
    half, low = 0.28, 0.0
    for part in range(place.parts):
        high = place.height * 1.25 * (part + 1) / place.parts
        view.box(-half, low, half, high, place.wall)
        view.windows(-half, low, half, high, 1 + place.windows // 2, 1 + place.detail)
        half, low = half * 0.78, high
    view.shape([(-half * 1.3, low), (half * 1.3, low), (0, low + 0.35)], place.roof)
    if place.detail % 2:
        view.shape([(0, low + 0.3), (0.02, low + 0.3), (0.02, low + 0.55), (0, low + 0.55)], (60, 60, 60))
        view.shape([(0.02, low + 0.45), (0.02, low + 0.55), (0.2, low + 0.5)], (200, 40, 40))


def _dome(view: _View, place: Place) -> None:
    top = 0.4 * place.height
    view.box(-0.6, 0, 0.6, top, place.wall)
    view.windows(-0.6, 0, 0.6, top, place.windows + 1, 1 + place.detail % 2)
    view.box(-0.42, top, 0.42, top + 0.12, place.wall)
    view.oval(-0.42, top - 0.35, 0.42, top + 0.65, place.roof)
    view.shape([(-0.03, top + 0.6), (0.03, top + 0.6), (0, top + 0.9)], place.roof, 0.7)
    for number in range(place.parts // 2):
        x = 0.52 + 0.16 * number
        for sign in (-1, 1):
            view.shape(
                [(sign * x, 0), (sign * (x + 0.08), 0), (sign * (x + 0.08), top * 1.6), (sign * x, top * 1.6)],
                place.wall, 0.85,
            )  # fmt: skip


def _bridge(view: _View, place: Place) -> None:
    deck, reach = 0.34 * place.height, 0.7 + 0.5 * view.turn
    view.shape([(-reach, deck - 0.08), (reach, deck - 0.08), (reach, deck), (-reach, deck)], place.roof)
    for number in range(place.parts):
        x = reach * (2 * (number + 0.5) / place.parts - 1)
        view.box(x - 0.05, 0, x + 0.05, deck - 0.08, place.wall)
        if place.detail >= 2:  # hung from pylons
            view.box(x - 0.04, deck, x + 0.04, deck + 0.5 * place.height, place.wall)
            for sign in (-1, 1):
                end = (x + sign * reach / place.parts, deck)
                view.shape([(x, deck + 0.5 * place.height), (x, deck + 0.46 * place.height), end], place.roof, 0.8)
    if place.detail < 2:
        for number in range(place.parts - 1):
            left = reach * (2 * (number + 0.5) / place.parts - 1) + 0.05
            right = reach * (2 * (number + 1.5) / place.parts - 1) - 0.05
            view.oval(left, deck - 0.3, right, deck + 0.02, place.wall)


def _pyramid(view: _View, place: Place) -> None:
    for number in range(place.parts):
        half = 0.75 * (1 - number / (place.parts + 1))
        low, high = (place.height * 0.75 * at / place.parts for at in (number, number + 1))
        if place.detail % 2:  # in steps
            view.box(-half, low, half, high, place.wall)
        else:
            inner = 0.75 * (1 - (number + 1) / (place.parts + 1))
            edge = (2 * view.turn - 1) * 0.5
            wall = place.wall if number % 2 else place.roof
            view.shape([(-half, low), (half * edge, low), (inner * edge, high), (-inner, high)], wall)
            view.shape([(half * edge, low), (half, low), (inner, high), (inner * edge, high)], wall, 0.66)
    view.shape([(-0.06, 0), (0.06, 0), (0.06, 0.16), (-0.06, 0.16)], (40, 36, 34))


def _arch(view: _View, place: Place) -> None:
    top = 0.95 * place.height
    view.box(-0.6, 0, 0.6, top, place.wall)
    view.box(-0.66, top, 0.66, top + 0.12, place.roof)
    half = 0.5 / place.parts
    for number in range(place.parts - 1):
        x = (number - (place.parts - 2) / 2) * 1.1 / (place.parts - 1)
        high = top * (0.72 if number == (place.parts - 2) // 2 else 0.55)
        view.shape([(x - half, 0), (x + half, 0), (x + half, high - half), (x - half, high - half)], (150, 170, 200))
        view.oval(x - half, high - 2 * half, x + half, high, (150, 170, 200))
    view.windows(-0.6, top * 0.78, 0.6, top * 0.98, place.windows + 1, 1)


def _church(view: _View, place: Place) -> None:
    eaves = 0.45 * place.height
    view.box(-0.35, 0, 0.65, eaves, place.wall)
    view.windows(-0.35, 0, 0.65, eaves, place.windows, 1)
    view.shape([(-0.4, eaves), (0.7, eaves), (0.5, eaves + 0.3), (-0.2, eaves + 0.3)], place.roof)
    for number in range(1 + place.detail // 2):
        x = -0.5 + 0.9 * number
        view.box(x - 0.14, 0, x + 0.14, eaves * 2, place.wall)
        view.windows(x - 0.14, eaves, x + 0.14, eaves * 2, 1, place.parts - 1)
        if place.detail % 2:
            view.oval(x - 0.16, eaves * 2 - 0.2, x + 0.16, eaves * 2 + 0.24, place.roof)
        else:
            view.shape([(x - 0.17, eaves * 2), (x + 0.17, eaves * 2), (x, eaves * 2 + 0.45)], place.roof)


_BUILDERS: dict[str, Callable[[_View, Place], None]] = {
    "tower": _tower,
    "dome": _dome,
    "bridge": _bridge,
    "pyramid": _pyramid,
    "arch": _arch,
    "church": _church,
}
