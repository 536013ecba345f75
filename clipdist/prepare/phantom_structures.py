"""What is painted on a phantom's canvas: skin of each body site, the lesion's colours, and dermoscopic structures."""

import math
from collections.abc import Callable

import numpy as np
from PIL import ImageDraw

from clipdist.prepare.phantom_canvas import FIELD_MM, Canvas, Plane, smoothstep

# Per colour: melanin, blood, scatter opacity and the sRGB of that scatter.
PIGMENT: dict[str, tuple[float, float, float, tuple[int, int, int]]] = {
    "light brown": (0.55, 0.05, 0.0, (0, 0, 0)),
    "dark brown": (1.35, 0.05, 0.0, (0, 0, 0)),
    "black": (2.9, 0.1, 0.25, (24, 20, 22)),
    "blue-grey": (0.7, 0.0, 0.7, (88, 106, 136)),
    "red": (0.0, 1.05, 0.12, (196, 50, 48)),
    "pink": (-0.05, 0.42, 0.15, (226, 148, 150)),
    "purple": (0.35, 0.95, 0.45, (104, 44, 92)),
    "white": (-0.1, 0.0, 0.58, (238, 220, 208)),
    "yellow": (0.1, 0.05, 0.55, (226, 190, 112)),
}
WHITE = (242, 234, 226)


def draw_skin(canvas: Canvas) -> None:
    """Mottled skin with the relief of its site: furrows, follicles, friction ridges or a nail plate."""
    rng, site = canvas.rng, canvas.lesion.site
    canvas.melanin += 0.05 * canvas.noise(5) + 0.03 * canvas.noise(26)
    canvas.blood += 0.05 * canvas.noise(4) + 0.03 * canvas.noise(17) + 0.03
    if site in ("palm", "sole"):
        spacing = 0.62 if site == "palm" else 0.95
        turn = rng.uniform(0, np.pi)
        canvas.furrows = _stripes(canvas, turn, spacing, 2.0)  # 1 in the valleys, −1 on the crests
        canvas.shade -= 0.13 * smoothstep(canvas.furrows, 0.25, 0.95)
        pores = np.cos(_wave(canvas, turn + 1.3, 2 * np.pi / 1.1) + 3 * canvas.noise(9)) - canvas.furrows
        canvas.layers.append((0.35 * smoothstep(pores, 1.75, 1.98), WHITE))
        canvas.skin = canvas.skin * np.float32(1.06)  # ridged skin is paler on everyone
    elif site == "nail":
        _nail(canvas)
    else:
        turn = rng.uniform(0, np.pi)
        spacing, depth = {
            "face": (0.55, 0.02), "scalp": (0.6, 0.02), "chest": (0.5, 0.04), "back": (0.85, 0.07),
            "arm": (0.55, 0.06), "leg": (0.7, 0.07),
        }[site]  # fmt: skip
        for angle in (turn, turn + rng.uniform(0.9, 1.4)):
            lines = np.maximum(_stripes(canvas, angle, spacing, 3.0), 0.0)
            lines *= lines
            canvas.shade -= lines * lines * (depth + 0.55 * depth * canvas.noise(9))
        if site == "leg":  # dry skin: flakes between the furrows
            canvas.layers.append((0.35 * smoothstep(canvas.noise(40), 1.1, 2.2), WHITE))
    if site in ("face", "scalp"):
        spacing = 0.95 if site == "face" else 1.5
        canvas.follicles = smoothstep(_lattice(canvas, spacing, 2.2) + 0.5 * canvas.noise(16), 1.7, 2.7)
        canvas.blood += 0.06 * canvas.follicles


def _wave(canvas: Canvas, angle: float, k: float) -> Plane:
    """Phase in radians of a plane wave of `k` radians per mm towards `angle`."""
    return (k * math.cos(angle)) * canvas.x + (k * math.sin(angle)) * canvas.y


def _stripes(canvas: Canvas, angle: float, spacing: float, warp: float) -> Plane:
    """Parallel waves in −1 … 1, `spacing` mm apart, bent by smooth noise of `warp` radians."""
    return np.cos(_wave(canvas, angle, 2 * math.pi / spacing) + warp * canvas.noise(4) + 0.25 * warp * canvas.noise(13))


def _lattice(canvas: Canvas, spacing: float, warp: float) -> Plane:
    """Sum of three waves at 120°: 3 in the cells of a triangular lattice `spacing` mm apart, −1.5 … −1 on its web."""
    turn = canvas.rng.uniform(0, math.pi)
    k = 4 * math.pi / math.sqrt(3) / spacing
    first = _wave(canvas, turn, k) + warp * canvas.noise(7) + 0.45 * warp * canvas.noise(18)
    second = _wave(canvas, turn + 2 * math.pi / 3, k) + warp * canvas.noise(7) + 0.45 * warp * canvas.noise(18)
    return np.cos(first) + np.cos(second) + np.cos(first + second)


def _nail(canvas: Canvas) -> None:
    """A glossy plate with the fold of skin that it grows out of, below, and along both sides."""
    bend = 0.12 * canvas.y * canvas.noise(2)
    plate = smoothstep(np.float32(5.3) - np.abs(canvas.x + bend), 0.0, 0.35)
    plate = plate * smoothstep(np.float32(4.4) - canvas.y - 0.05 * canvas.x * canvas.x, 0.0, 0.35)
    shadow = 4 * plate * (1 - plate)
    pink, blush = np.array((250, 206, 192)), np.array((255, 244, 236))
    red, green, blue = (0.5 * canvas.skin + 0.5 * pink * canvas.clarity).tolist()
    canvas.ground.append((plate, (red, green, blue)))
    red, green, blue = (blush * canvas.clarity).tolist()
    moon = plate * canvas.blob(canvas.rng.uniform(-0.5, 0.5), 5.2, 2.4)  # the lunula
    canvas.ground.append((0.5 * moon, (red, green, blue)))
    canvas.shade *= 1 - 0.35 * shadow + 0.02 * plate * canvas.noise(60, 2)
    canvas.shade += 0.10 * plate * canvas.blob(canvas.rng.uniform(-2, 2), 0.0, 5.0)
    canvas.mask = canvas.mask * plate


def draw_body(canvas: Canvas) -> None:
    """The lesion's colours in their layout, its relief, and what the site takes away from it."""
    lesion, mask = canvas.lesion, canvas.mask
    first = PIGMENT[lesion.colours[0]]
    melanin = np.full_like(mask, first[0])
    blood = np.full_like(mask, first[1])
    layers = [(first[2] * mask, first[3])] if first[2] else []
    for place, name in enumerate(lesion.colours[1:], start=1):
        weight = _share(canvas, place)
        amount, red, scatter, tint = PIGMENT[name]
        melanin += weight * (amount - melanin)
        blood += weight * (red - blood)
        layers = [(alpha * (1 - weight), colour) for alpha, colour in layers]
        if scatter:
            layers.append((scatter * weight * mask, tint))
    texture = 1 + 0.14 * canvas.noise(8) + 0.09 * canvas.noise(22)
    canvas.melanin += melanin * texture * mask
    canvas.blood += blood * texture * mask
    canvas.layers += layers
    if canvas.follicles is not None:
        canvas.melanin *= 1 - 0.55 * canvas.follicles
    if lesion.relief != "flat":
        _relief(canvas, 0.13 if lesion.relief == "raised" else 0.30)


def _share(canvas: Canvas, place: int) -> Plane:
    """Where colour number `place` covers those before it, in 0 … 1."""
    lesion, rng, radius = canvas.lesion, canvas.rng, canvas.lesion.diameter_mm / 2
    if lesion.layout == "concentric":
        edge = (0.0, 0.62, 0.4, 0.25)[place]
        return 1 - smoothstep(canvas.rho + 0.05 * canvas.noise(9), edge - 0.08, edge + 0.12)
    if lesion.layout == "halves" and place == 1:
        angle = rng.uniform(0, 2 * np.pi)
        return smoothstep(_slope(canvas, angle) + 0.2 * canvas.noise(7), -0.12, 0.15)
    if lesion.layout == "patchy":
        level = (0.0, 0.05, 0.45, 0.6)[place]
        return smoothstep(canvas.noise(max(3, round(24 / radius))) + 0.4 * canvas.noise(14), level, level + 0.4)
    x, y = _inside(canvas, 0.55)
    hill = canvas.blob(x, y, 0.55 * radius) + 0.13 * canvas.noise(9)
    return smoothstep(hill, 0.4, 0.62)


def _slope(canvas: Canvas, angle: float) -> Plane:
    """Distance from the lesion's centre towards `angle`, in units of its radius."""
    centre = math.cos(angle) * canvas.centre[0] + math.sin(angle) * canvas.centre[1]
    return (_wave(canvas, angle, 1.0) - centre) * (2 / canvas.lesion.diameter_mm)


def _inside(canvas: Canvas, out: float) -> tuple[float, float]:
    """A place in mm about `out` of the way from the lesion's centre to its border, within the picture."""
    angle = canvas.rng.uniform(0, 2 * np.pi)
    if canvas.lesion.placing == "cut":  # the half that the picture still holds
        angle = math.atan2(-canvas.centre[1], -canvas.centre[0]) + canvas.rng.uniform(-0.8, 0.8)
    reach = out * canvas.lesion.diameter_mm / 2
    return canvas.centre[0] + reach * math.cos(angle), canvas.centre[1] + reach * math.sin(angle)


def _relief(canvas: Canvas, strength: float) -> None:
    """Light from one side on a dome: bright flank, dark flank, a narrow shadow beyond it and a soft highlight."""
    angle, radius = canvas.rng.uniform(0, 2 * np.pi), canvas.lesion.diameter_mm / 2
    slope = np.clip(_slope(canvas, angle), -1.3, 1.3)
    canvas.shade *= 1 + strength * slope * canvas.mask
    beyond = smoothstep(canvas.rho, 0.9, 1.02) * (1 - smoothstep(canvas.rho, 1.02, 1.3))
    canvas.shade *= 1 - strength * beyond * np.clip(-slope, 0, 1)
    x, y = canvas.centre[0] + 0.45 * radius * math.cos(angle), canvas.centre[1] + 0.45 * radius * math.sin(angle)
    canvas.layers.append((1.1 * strength * canvas.blob(x, y, 0.28 * radius) * canvas.mask, (255, 250, 246)))


def _network(canvas: Canvas) -> None:
    lattice = _lattice(canvas, canvas.rng.uniform(0.58, 0.72), 0.95) + 0.3 * canvas.noise(15)
    web = 1 - smoothstep(lattice, -1.1, 0.5)
    envelope = canvas.mask * (0.3 + 0.7 * smoothstep(canvas.rho, 0.1, 0.75))
    canvas.melanin += envelope * (0.85 * web - 0.2)


def _atypical_network(canvas: Canvas) -> None:
    lattice = _lattice(canvas, canvas.rng.uniform(0.95, 1.25), 1.6) - 0.6 * canvas.noise(6) + 0.35 * canvas.noise(17)
    patches = smoothstep(canvas.noise(4), -0.7, 0.4)
    canvas.melanin += canvas.mask * patches * (1.35 * (1 - smoothstep(lattice, -1.0, 0.5)) - 0.2)


def _discs(canvas: Canvas, count: int, low: float, high: float, inside: float = 0.5, blur: float = 0.0) -> Plane:
    """Round marks of radius `low` … `high` mm at random places in the lesion."""
    places = canvas.points(count, inside)
    radii = canvas.rng.uniform(low, high, (len(places), 2))
    radii[:, 1] = radii[:, 0] * canvas.rng.uniform(0.8, 1.25, len(places))

    def paint(pen: ImageDraw.ImageDraw, scale: float) -> None:
        for (x, y), (rx, ry) in zip((places + FIELD_MM / 2) * scale, radii * scale, strict=True):
            pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)

    return canvas.marks(paint, blur)


def _count(canvas: Canvas, low: float, high: float) -> int:
    """A number of marks that grows with the lesion's size: `low` … `high` for one 6 mm wide."""
    return max(4, round(canvas.rng.uniform(low, high) * (canvas.lesion.diameter_mm / 6) ** 1.5))


def _globules(canvas: Canvas) -> None:
    discs = _discs(canvas, _count(canvas, 22, 40), 0.15, 0.30, blur=0.04)
    canvas.melanin += 1.25 * discs


def _dots(canvas: Canvas) -> None:
    canvas.melanin += 2.2 * _discs(canvas, _count(canvas, 40, 75), 0.06, 0.10)


def _radial(canvas: Canvas, angles: np.ndarray, inner: float, outer: tuple[float, float], width: float) -> Plane:
    """Spokes across the border with a bulb at their tips."""
    rims = canvas.rim(angles)
    tips = rims * canvas.rng.uniform(*outer, len(angles))
    sway = canvas.rng.normal(0.0, 0.05, len(angles))

    def paint(pen: ImageDraw.ImageDraw, scale: float) -> None:
        for angle, rim, tip, bend in zip(angles, rims, tips, sway, strict=True):
            line = []
            for reach, turn in ((inner * rim, angle), (tip, angle + bend)):
                x, y = canvas.centre[0] + reach * np.cos(turn), canvas.centre[1] + reach * np.sin(turn)
                line.append(((x + FIELD_MM / 2) * scale, (y + FIELD_MM / 2) * scale))
            pen.line(line, fill=255, width=round(width * scale))
            (x, y), bulb = line[1], 0.75 * width * scale
            pen.ellipse((x - bulb, y - bulb, x + bulb, y + bulb), fill=255)

    return canvas.marks(paint, 0.07)


def _streaks(canvas: Canvas) -> None:
    start = canvas.rng.uniform(0, 2 * np.pi)
    angles = start + np.sort(canvas.rng.uniform(0, 3.6, int(canvas.rng.integers(12, 20))))
    canvas.melanin += 1.6 * _radial(canvas, angles, 0.7, (1.03, 1.22), 0.2)


def _starburst(canvas: Canvas) -> None:
    count = int(canvas.rng.integers(22, 34))
    angles = np.arange(count) * 2 * np.pi / count + canvas.rng.normal(0, 0.03, count)
    canvas.melanin += 1.5 * _radial(canvas, angles, 0.62, (1.12, 1.24), 0.2)


def _veil(canvas: Canvas) -> None:
    x, y = _inside(canvas, 0.3)
    hill = canvas.blob(x, y, 0.62 * canvas.lesion.diameter_mm / 2) + 0.12 * canvas.noise(8)
    alpha = canvas.mask * smoothstep(hill, 0.3, 0.75)
    canvas.layers.append((0.68 * alpha, (112, 130, 168)))
    canvas.layers.append((0.16 * alpha * smoothstep(canvas.noise(18), -0.5, 1.5), WHITE))


def _regression(canvas: Canvas) -> None:
    x, y = _inside(canvas, 0.5)
    hill = canvas.blob(x, y, 0.6 * canvas.lesion.diameter_mm / 2) + 0.15 * canvas.noise(9)
    scar = canvas.mask * smoothstep(hill, 0.35, 0.65)
    pepper = scar * _discs(canvas, _count(canvas, 60, 100), 0.05, 0.08)
    canvas.melanin *= 1 - 0.75 * scar
    canvas.layers.append((0.55 * scar, (228, 214, 208)))
    canvas.layers.append((0.75 * pepper, (96, 102, 118)))


def _central_white_patch(canvas: Canvas) -> None:
    patch = (1 - smoothstep(canvas.rho + 0.10 * canvas.noise(8), 0.28, 0.6)) * canvas.mask
    canvas.melanin *= 1 - 0.7 * patch
    canvas.layers.append((0.72 * patch, WHITE))


def _dotted_vessels(canvas: Canvas) -> None:
    canvas.blood += 1.7 * _discs(canvas, _count(canvas, 32, 60), 0.07, 0.12, inside=0.4)


def _branching_vessels(canvas: Canvas) -> None:
    rng, radius = canvas.rng, canvas.lesion.diameter_mm / 2
    stems = []
    for _ in range(int(rng.integers(3, 6))):
        x, y = _inside(canvas, 0.9)
        towards = np.arctan2(canvas.centre[1] - y, canvas.centre[0] - x) + rng.normal(0, 0.5)
        stems.append((x, y, towards, rng.uniform(0.15, 0.2), 0))

    def paint(pen: ImageDraw.ImageDraw, scale: float) -> None:
        todo = list(stems)
        while todo:
            x, y, angle, width, depth = todo.pop()
            line = [((x + FIELD_MM / 2) * scale, (y + FIELD_MM / 2) * scale)]
            for _ in range(int(rng.integers(5, 9))):
                angle += rng.normal(0, 0.35)
                x, y = x + 0.13 * radius * np.cos(angle), y + 0.13 * radius * np.sin(angle)
                line.append(((x + FIELD_MM / 2) * scale, (y + FIELD_MM / 2) * scale))
                if depth < 2 and rng.random() < 0.35:
                    todo.append((x, y, angle + rng.choice((-0.8, 0.8)), 0.62 * width, depth + 1))
            pen.line(line, fill=255, width=max(2, round(width * scale)), joint="curve")

    canvas.blood += 1.35 * canvas.marks(paint) * np.minimum(1.0, 2 * canvas.mask)


def _lacunae(canvas: Canvas) -> None:
    lakes = _discs(canvas, _count(canvas, 10, 18), 0.3, 0.6, inside=0.7, blur=0.08)
    canvas.blood += 1.1 * lakes
    canvas.melanin += 0.35 * lakes


def _milia(canvas: Canvas) -> None:
    cysts = _discs(canvas, _count(canvas, 9, 16), 0.13, 0.22, inside=0.7, blur=0.06)
    canvas.layers.append((0.9 * cysts, (252, 242, 210)))


def _comedo_openings(canvas: Canvas) -> None:
    plugs = _discs(canvas, _count(canvas, 7, 13), 0.2, 0.36, inside=0.7, blur=0.05)
    canvas.layers.append((0.78 * plugs, (74, 46, 26)))


def _scale(canvas: Canvas) -> None:
    flakes = smoothstep(canvas.noise(36) + 0.7 * canvas.noise(10), 0.2, 1.9)
    canvas.layers.append((0.68 * flakes * canvas.mask, (246, 236, 224)))


def _crust(canvas: Canvas) -> None:
    inner = 1 - smoothstep(canvas.rho, 0.45, 0.85)
    clumps = inner * smoothstep(canvas.noise(11) + 0.4 * canvas.noise(30), 0.0, 0.6)
    canvas.layers.append((0.85 * clumps, (178, 112, 38)))
    canvas.shade *= 1 - 0.10 * clumps * np.abs(canvas.noise(36))


def _ulcer(canvas: Canvas) -> None:
    x, y = _inside(canvas, 0.3)
    hill = canvas.blob(x, y, 0.45 * canvas.lesion.diameter_mm / 2) + 0.13 * canvas.noise(9) + 0.06 * canvas.noise(24)
    canvas.layers.append((0.5 * smoothstep(hill, 0.25, 0.45) * canvas.mask, (206, 150, 84)))
    raw = smoothstep(hill, 0.4, 0.62) * canvas.mask
    canvas.layers.append((0.85 * raw, (128, 24, 26)))
    canvas.layers.append((0.3 * raw * smoothstep(canvas.noise(22), 0.2, 1.6), (214, 120, 96)))


def _shiny_lines(canvas: Canvas) -> None:
    places = canvas.points(_count(canvas, 16, 26), 0.6)
    turn = canvas.rng.uniform(0, np.pi)
    lengths = canvas.rng.uniform(0.25, 0.55, len(places))
    turns = turn + np.pi / 2 * canvas.rng.integers(0, 2, len(places)) + canvas.rng.normal(0, 0.2, len(places))

    def paint(pen: ImageDraw.ImageDraw, scale: float) -> None:
        for (x, y), length, angle in zip(places + FIELD_MM / 2, lengths, turns, strict=True):
            dx, dy = length * np.cos(angle), length * np.sin(angle)
            ends = ((x - dx) * scale, (y - dy) * scale, (x + dx) * scale, (y + dy) * scale)
            pen.line(ends, fill=255, width=round(0.13 * scale))

    canvas.layers.append((0.62 * canvas.marks(paint, 0.04), (250, 238, 238)))


def _gyri(canvas: Canvas) -> None:
    sulci = 1 - smoothstep(np.abs(canvas.noise(9) + 0.25 * canvas.noise(24)), 0.05, 0.42)
    canvas.melanin += canvas.mask * (0.95 * sulci - 0.15)


def _halo(canvas: Canvas) -> None:
    ring = smoothstep(canvas.rho, 0.9, 1.05) * (1 - smoothstep(canvas.rho + 0.08 * canvas.noise(6), 1.55, 1.85))
    canvas.melanin -= 0.15 * ring
    canvas.layers.append((0.4 * ring, (248, 230, 216)))


def _ridges(canvas: Canvas) -> None:
    if canvas.furrows is not None:
        canvas.melanin += canvas.mask * (0.9 * smoothstep(-canvas.furrows, -0.3, 0.5) - 0.35)


STRUCTURE_PAINTERS: dict[str, Callable[[Canvas], None]] = {
    "network": _network,
    "atypical network": _atypical_network,
    "globules": _globules,
    "dots": _dots,
    "streaks": _streaks,
    "starburst": _starburst,
    "veil": _veil,
    "regression": _regression,
    "central white patch": _central_white_patch,
    "dotted vessels": _dotted_vessels,
    "branching vessels": _branching_vessels,
    "lacunae": _lacunae,
    "milia": _milia,
    "comedo openings": _comedo_openings,
    "scale": _scale,
    "crust": _crust,
    "ulcer": _ulcer,
    "shiny lines": _shiny_lines,
    "gyri": _gyri,
    "halo": _halo,
    "ridges": _ridges,
}
