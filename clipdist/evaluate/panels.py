"""Pictures of what a model retrieves, as uint8 arrays (H, W, 3): for TensorBoard's `add_image` and for files.

Text is drawn with the DejaVu Sans that Matplotlib carries: it has Latin, Greek, Cyrillic, Arabic and Hebrew letters,
and draws boxes for the rest.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from math import ceil
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_INK, _MUTED, _LINE, _RIGHT, _RIGHT_FILL = "#24292f", "#6b737c", "#d9dde2", "#00664b", "#e3f4ee"
_GAP = 12
_FONT_SIZE = 14
_LINE_HEIGHT = 19
_SCORE_WIDTH = 52


def retrieval_panel(
    images: Sequence[np.ndarray],
    true_texts: Sequence[str],
    ranked: Sequence[Sequence[tuple[float, str, bool]]],
    *,
    thumbnail: int = 160,
    width: int = 1000,
    lines: int = 3,
) -> np.ndarray:
    """One row per image: the image, its own text, and the texts ranked for it, (score, text, right), best first.

    Right answers are green and carry a tick, so that colour is not needed to tell. Texts are cut after `lines` lines.
    Images are uint8, (H, W, 3), (H, W, 4) or (H, W), of any size.
    """
    if not len(images) == len(true_texts) == len(ranked):
        raise ValueError(
            f"{len(images)} images, {len(true_texts)} texts, {len(ranked)} rankings: expected equal numbers"
        )
    rows = []
    for image, truth, matches in zip(images, true_texts, ranked, strict=True):
        text_width = width - thumbnail - 3 * _GAP
        blocks = [_text_block("true", truth, text_width, lines, _MUTED, None)]
        for score, text, right in matches:
            mark = f"{score:.2f} ✓" if right else f"{score:.2f}"
            colours = (_RIGHT, _RIGHT_FILL) if right else (_INK, None)
            blocks.append(_text_block(mark, text, text_width, lines, *colours))
        row = Image.new("RGB", (width, max(thumbnail, sum(block.height for block in blocks)) + 2 * _GAP), "white")
        row.paste(_thumbnail(image, thumbnail), (_GAP, _GAP))
        top = _GAP
        for block in blocks:
            row.paste(block, (thumbnail + 2 * _GAP, top))
            top += block.height
        ImageDraw.Draw(row).line([(0, row.height - 1), (width, row.height - 1)], fill=_LINE)
        rows.append(row)
    return _stacked(rows, width)


def thumbnail_panel(
    texts: Sequence[str],
    ranked: Sequence[Sequence[tuple[float, np.ndarray, bool]]],
    *,
    thumbnail: int = 128,
    width: int = 1000,
    lines: int = 3,
) -> np.ndarray:
    """One row per text: the text, and below it the images ranked for it, (score, image, right), best first."""
    if len(texts) != len(ranked):
        raise ValueError(f"{len(texts)} texts, {len(ranked)} rankings: expected equal numbers")
    rows = []
    for text, matches in zip(texts, ranked, strict=True):
        heading = _text_block("", text, width - 2 * _GAP, lines, _INK, None)
        row = Image.new("RGB", (width, heading.height + thumbnail + _LINE_HEIGHT + 3 * _GAP), "white")
        row.paste(heading, (_GAP, _GAP))
        draw = ImageDraw.Draw(row)
        top = heading.height + _GAP
        for place, (score, image, right) in enumerate(matches):
            left = _GAP + place * (thumbnail + _GAP)
            if left + thumbnail > width:
                break
            row.paste(_thumbnail(image, thumbnail), (left, top))
            if right:
                draw.rectangle((left - 3, top - 3, left + thumbnail + 2, top + thumbnail + 2), outline=_RIGHT, width=3)
            mark = f"{score:.2f} ✓" if right else f"{score:.2f}"
            draw.text((left, top + thumbnail + 5), mark, fill=_RIGHT if right else _MUTED, font=sheet_font())
        draw.line([(0, row.height - 1), (width, row.height - 1)], fill=_LINE)
        rows.append(row)
    return _stacked(rows, width)


@cache
def sheet_font(size: int = _FONT_SIZE) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, as high as `size` pixels."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _text_block(mark: str, text: str, width: int, lines: int, colour: str, fill: str | None) -> Image.Image:
    """`mark` in a column of its own, then `text` wrapped, on a ground of colour `fill`."""
    left = 6 + (_SCORE_WIDTH if mark else 0)
    cut = wrapped(text, width - left - 6, lines)
    block = Image.new("RGB", (width, len(cut) * _LINE_HEIGHT + 6), fill or "white")
    draw = ImageDraw.Draw(block)
    draw.text((6, 3), mark, fill=colour, font=sheet_font())
    for place, line in enumerate(cut):
        draw.text((left, 3 + place * _LINE_HEIGHT), line, fill=colour, font=sheet_font())
    return block


def wrapped(text: str, width: int, lines: int, font: ImageFont.FreeTypeFont | None = None) -> list[str]:
    """At most `lines` lines no wider than `width` pixels; too long a word is broken, an ellipsis marks a cut."""
    font = font or sheet_font()
    found: list[str] = []
    line, words = "", text.split()[::-1]
    while words and len(found) < lines:
        word = words.pop()
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
        elif line:
            found.append(line)
            line = ""
            words.append(word)
        else:
            # Of a very long word, too, few lengths are measured.
            fits = bisect_right(range(1, len(word) + 1), width, key=lambda n: ceil(font.getlength(word[:n]))) or 1
            found.append(word[:fits])
            words += [word[fits:]] if word[fits:] else []
    if line and len(found) < lines:
        found.append(line)
        line = ""
    if words or line:
        last = found[-1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        found[-1] = f"{last.rstrip()}…"
    return found or [""]


def _thumbnail(image: np.ndarray, side: int) -> Image.Image:
    """The whole image, centred on a light square of `side` pixels; transparency shows white."""
    picture = Image.fromarray(np.ascontiguousarray(image)).convert("RGBA")
    scale = side / max(picture.size)
    picture = picture.resize([max(1, round(length * scale)) for length in picture.size], Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    square = Image.new("RGBA", (side, side), "#f3f4f6")
    ground = Image.new("RGBA", picture.size, "white")
    square.paste(Image.alpha_composite(ground, picture), ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.convert("RGB")


def _stacked(rows: Sequence[Image.Image], width: int) -> np.ndarray:
    if not rows:
        raise ValueError("nothing to show: expected at least one query")
    panel = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        panel.paste(row, (0, top))
        top += row.height
    return np.asarray(panel)
