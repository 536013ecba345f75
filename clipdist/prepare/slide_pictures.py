"""What tiling chose, to be looked at: a slide with its kept tiles outlined beside its mask, and sheets of many."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SHOWN = 480  # pixels along the longer side of a thumbnail
KEPT, TISSUE, WHITE = (0, 140, 60), (90, 90, 90), (225, 235, 250)
PER_SHEET, PER_ROW, GAP, LINE = 12, 2, 10, 16


def draw_choice(
    overview: Image.Image,
    mask: npt.NDArray[np.bool_],
    white: npt.NDArray[np.bool_],
    kept: Sequence[tuple[float, float]],
    step: float,
    caption: str,
) -> Image.Image:
    """Left `overview` with a frame about each kept tile; right the mask: tissue grey, what counts as white pale blue.

    `kept` holds the tiles' upper left corners and `step` their side, in pixels of `overview`.
    """
    scale = min(1.0, SHOWN / max(overview.size))
    size = (max(1, round(overview.width * scale)), max(1, round(overview.height * scale)))
    colours = np.full((*mask.shape, 3), 255, np.uint8)
    colours[white] = WHITE
    colours[mask] = TISSUE
    left = overview.resize(size, Image.Resampling.BOX)
    right = Image.fromarray(colours).resize(size, Image.Resampling.BOX)
    for panel in (left, right):
        draw = ImageDraw.Draw(panel)
        for x, y in kept:
            corner = (x * scale, y * scale, (x + step) * scale - 1, (y + step) * scale - 1)
            draw.rectangle(corner, outline=KEPT, width=2)
    page = Image.new("RGB", (max(2 * size[0] + GAP, 7 * len(caption)), size[1] + LINE + 4), "white")
    ImageDraw.Draw(page).text((2, 2), caption, fill="black")
    page.paste(left, (0, LINE + 4))
    page.paste(right, (size[0] + GAP, LINE + 4))
    return page


def contact_sheets(pictures: Sequence[Path], folder: Path) -> list[Path]:
    """`slides-01.png`, … in `folder`: twelve of the pictures that `draw_choice` made on each, in order."""
    made = []
    for number in range(0, len(pictures), PER_SHEET):
        shown: list[Image.Image] = []
        for path in pictures[number : number + PER_SHEET]:
            with Image.open(path) as picture:
                shown.append(picture.convert("RGB"))
        rows = [shown[start : start + PER_ROW] for start in range(0, len(shown), PER_ROW)]
        heights = [max(picture.height for picture in row) + GAP for row in rows]
        width = max(picture.width for picture in shown) + GAP
        sheet = Image.new("RGB", (width * len(rows[0]), sum(heights)), "white")
        for place, row in enumerate(rows):
            for column, pair in enumerate(row):
                sheet.paste(pair, (column * width, sum(heights[:place])))
        made.append(folder / f"slides-{number // PER_SHEET + 1:02d}.png")
        sheet.save(made[-1])
    return made
