"""Draws dermoscopy phantoms: skin and lesion on a canvas, then hair, gel, ruler, pen and lamp over the picture."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from clipdist.prepare.phantom_canvas import FIELD_MM, Canvas, Plane, blend, smoothstep
from clipdist.prepare.phantom_lesion import STREAM_PIXELS, Lesion, generator, lesion_of
from clipdist.prepare.phantom_structures import STRUCTURE_PAINTERS, draw_body, draw_skin

HAIR = {"dark": (36, 26, 22), "fair": (142, 100, 56), "grey": (172, 170, 168)}
LAMP = {"neutral": (1.0, 1.0, 1.0), "warm": (1.05, 0.99, 0.85), "cool": (0.90, 0.99, 1.10)}
INK = (1.25, 1.35, 0.35)  # absorption of a violet skin marker


def draw(seed: int, index: int, side: int = 224) -> tuple[npt.NDArray[np.uint8], Lesion]:
    """Phantom `index` of the collection `seed` as uint8 (side, side, 3) sRGB, and the attributes it shows.

    A pure function of its arguments. The attributes do not depend on `side`.
    """
    lesion = lesion_of(seed, index)
    return paint(lesion, generator(seed, STREAM_PIXELS, index), side), lesion


def paint(lesion: Lesion, rng: np.random.Generator, side: int = 224) -> npt.NDArray[np.uint8]:
    """A picture of `lesion`, uint8 (side, side, 3); `rng` decides what the attributes leave open."""
    return paint_on(Canvas(lesion, rng, side))


def paint_on(canvas: Canvas) -> npt.NDArray[np.uint8]:
    """The picture that a fresh canvas becomes."""
    lesion, side = canvas.lesion, canvas.side
    draw_skin(canvas)
    draw_body(canvas)
    for structure in lesion.structures:
        STRUCTURE_PAINTERS[structure](canvas)
    rgb = canvas.develop()
    _lamp(canvas, rgb)
    if lesion.ink:
        _ink(canvas, rgb)
    if lesion.hairs != "none":
        _hairs(canvas, rgb)
    if lesion.bubbles:
        _bubbles(canvas, rgb)
    if lesion.glare:
        _glare(canvas, rgb)
    if lesion.ruler:
        _ruler(canvas, rgb)
    if lesion.tube:
        rgb *= 1 - smoothstep(np.sqrt(canvas.x * canvas.x + canvas.y * canvas.y), 6.7, 7.0)
    rgb += 1.3 * _grain(canvas)
    picture = np.empty((side, side, 3), np.uint8)
    for channel, plane in enumerate(np.clip(rgb, 0, 255, out=rgb)):
        picture[..., channel] = plane
    return _spoiled(picture) if lesion.unusable else picture


def _lamp(canvas: Canvas, rgb: Plane) -> None:
    """Tint of the lamp, a slope of brightness across the picture, and darker corners."""
    rng = canvas.rng
    tilt = (rng.uniform(-0.06, 0.06, 2) / (FIELD_MM / 2)).tolist()
    fall = rng.uniform(0.04, 0.16) / 98  # 98 mm² is the squared distance of the corners
    light = 1 + tilt[0] * canvas.x + tilt[1] * canvas.y - fall * (canvas.x * canvas.x + canvas.y * canvas.y)
    for channel, gain in enumerate(LAMP[canvas.lesion.light]):
        rgb[channel] *= light * np.float32(gain)


def _hairs(canvas: Canvas, rgb: Plane) -> None:
    """Curved tapering hairs, roughly combed in one direction, each with a faint shadow."""
    rng, lesion = canvas.rng, canvas.lesion
    count = int(rng.integers(5, 10) if lesion.hairs == "few" else rng.integers(20, 34))
    thick = 0.11 if lesion.site == "scalp" else 0.085
    angles = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.55, count)
    lengths = rng.uniform(4, 13, count)[:, None, None]
    time = np.linspace(0, 1, 12)[:, None]
    along = np.stack((np.cos(angles), np.sin(angles)), axis=1)[:, None, :]
    across = np.stack((-np.sin(angles), np.cos(angles)), axis=1)[:, None, :]
    bow = rng.normal(0, 0.22, (count, 1, 1)) * lengths
    spine = rng.uniform(-7.5, 7.5, (count, 1, 2)) + along * lengths * time + across * bow * 4 * time * (1 - time)
    half = across * thick * rng.uniform(0.55, 1.2, (count, 1, 1)) * (1 - 0.75 * time**2)
    outlines = np.concatenate((spine + half, (spine - half)[:, ::-1]), axis=1) + FIELD_MM / 2

    def paint_hairs(pen: ImageDraw.ImageDraw, scale: float) -> None:
        for outline in (outlines * scale).reshape(count, -1).tolist():
            pen.polygon(outline, fill=int(rng.integers(200, 256)))

    hairs = canvas.marks(paint_hairs)
    offset = max(1, canvas.side // 112)
    rgb *= 1 - 0.18 * np.roll(hairs, (offset, offset), (0, 1))
    blend(rgb, 0.92 * hairs, HAIR[lesion.hair_colour])


def _ruler(canvas: Canvas, rgb: Plane) -> None:
    """A millimetre scale along one edge, longer at every fifth line, on a slightly frosted strip."""
    rng = canvas.rng
    edge, inset, first = int(rng.integers(4)), rng.uniform(0.2, 0.7), rng.uniform(0, 1)

    def paint_ticks(pen: ImageDraw.ImageDraw, scale: float) -> None:
        for tick in range(15):
            at = (first + tick) * scale
            near, far = inset * scale, (inset + (1.25 if tick % 5 == 0 else 0.7)) * scale
            if edge >= 2:
                near, far = FIELD_MM * scale - near, FIELD_MM * scale - far
            line = ((at, near), (at, far)) if edge % 2 == 0 else ((near, at), (far, at))
            pen.line(line, fill=255, width=max(1, round(0.12 * scale)))

    depth = (canvas.y if edge % 2 == 0 else canvas.x) * np.float32(1 if edge < 2 else -1)
    strip = np.broadcast_to(smoothstep(-depth, FIELD_MM / 2 - inset - 1.6, FIELD_MM / 2 - inset - 1.5), rgb.shape[1:])
    blend(rgb, 0.25 * strip, (250, 250, 250))
    blend(rgb, 0.92 * canvas.marks(paint_ticks), (16, 16, 18))


def _bubbles(canvas: Canvas, rgb: Plane) -> None:
    """Air in the immersion gel: a dark rim, a bright one within it, and a point of light."""
    rng = canvas.rng
    count = int(rng.integers(6, 15))
    places = rng.uniform(-6.5, 6.5, (count, 2)) + FIELD_MM / 2
    radii = rng.uniform(0.18, 0.45, count) * rng.choice((1.0, 1.9), count, p=(0.75, 0.25))

    def rings(shrink: float, width: float, fill: bool = False) -> Plane:
        def paint_rings(pen: ImageDraw.ImageDraw, scale: float) -> None:
            for (x, y), radius in zip(places, radii * shrink, strict=True):
                shift = 0.45 * radius / shrink if fill else 0.0
                x0, y0 = x - shift, y - shift
                box = tuple(v * scale for v in (x0 - radius, y0 - radius, x0 + radius, y0 + radius))
                pen.ellipse(box, fill=255 if fill else None, outline=255, width=max(1, round(width * scale)))

        return canvas.marks(paint_rings)

    rgb *= 1 - 0.38 * rings(1.0, 0.07)
    blend(rgb, 0.5 * rings(0.86, 0.07), (255, 255, 255))
    blend(rgb, 0.85 * rings(0.2, 0.05, fill=True), (255, 255, 255))


def _ink(canvas: Canvas, rgb: Plane) -> None:
    """A violet pen stroke that runs beside the lesion, towards the middle of the picture where the lesion is cut."""
    rng, (x0, y0) = canvas.rng, canvas.centre
    turn = np.arctan2(-y0, -x0) + rng.uniform(-0.6, 0.6)
    angles = turn + np.linspace(-0.45, 0.45, 14)
    reach = np.minimum(canvas.lesion.diameter_mm / 2 * 1.35 + 0.5, 5.2 + float(np.hypot(x0, y0)))
    wave = reach * (1 + 0.03 * rng.standard_normal(14))
    line = np.stack((x0 + wave * np.cos(angles), y0 + wave * np.sin(angles)), axis=1) + FIELD_MM / 2

    def paint_stroke(pen: ImageDraw.ImageDraw, scale: float) -> None:
        pen.line((line * scale).ravel().tolist(), fill=255, width=round(0.55 * scale), joint="curve")

    stroke = canvas.marks(paint_stroke, 0.06) * (0.85 + 0.15 * canvas.noise(40))
    for channel in range(3):
        rgb[channel] *= np.exp(-np.float32(INK[channel]) * stroke)


def _glare(canvas: Canvas, rgb: Plane) -> None:
    """Specular patches where the glass does not touch the skin."""
    x, y = canvas.rng.uniform(-4.5, 4.5, 2)
    hill = canvas.blob(x, y, canvas.rng.uniform(1.6, 2.6))
    blend(rgb, 0.9 * hill * smoothstep(canvas.noise(16) + 0.5 * canvas.noise(40), -0.3, 1.2), (255, 255, 255))


@lru_cache(maxsize=4)
def _grain_sheet(side: int) -> Plane:
    return np.random.Generator(np.random.Philox(key=7)).standard_normal((2 * side, 2 * side), dtype=np.float32)


def _grain(canvas: Canvas) -> Plane:
    """Sensor noise of unit variance, cut at random from a fixed sheet: drawing it afresh would cost a tenth of all."""
    top, left = canvas.rng.integers(0, canvas.side, 2)
    return _grain_sheet(canvas.side)[top : top + canvas.side, left : left + canvas.side]


def _spoiled(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The picture far out of focus and overexposed."""
    side = picture.shape[0]
    small = Image.fromarray(picture).resize((max(1, side // 24),) * 2, Image.Resampling.BOX)
    blurred = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return np.clip(0.6 * blurred + 110, 0, 255).astype(np.uint8)
