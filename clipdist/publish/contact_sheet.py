"""What a search found, as one picture: for each query itself, and thumbnails with score, key and text below them."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from clipdist.evaluate.panels import sheet_font, wrapped

INK, MUTED, LINE, PAPER, GROUND = "#24292f", "#6b737c", "#d9dde2", "white", "#f3f4f6"
SIDE, GAP, COLUMNS, LINE_HEIGHT, TEXT_LINES, QUERY_SIDE = 176, 16, 5, 18, 3, 128

MOST_LETTERS = 1000
"""More never fit, and would take long to measure."""


@dataclass(frozen=True)
class Cell:
    """One hit; `picture` is None where the image could not be read."""

    rank: int
    score: float
    key: str
    text: str
    picture: Image.Image | None


@dataclass(frozen=True)
class Block:
    """One query with what was found for it; `picture` is that of an image query."""

    query: str
    cells: Sequence[Cell]
    picture: Image.Image | None = None


def contact_sheet(blocks: Sequence[Block], columns: int = COLUMNS) -> Image.Image:
    """RGB; blocks one below another. Letters that DejaVu Sans lacks are boxes."""
    columns = max(1, min(columns, max((len(block.cells) for block in blocks), default=1)))
    columns = max(columns, 3)  # so that a query of some length fits beside its picture
    width = GAP + columns * (SIDE + GAP)
    drawn = [_block(block, columns, width) for block in blocks]
    for later in drawn[1:]:
        ImageDraw.Draw(later).line((0, 0, width, 0), fill=LINE)
    sheet = Image.new("RGB", (width, sum(one.height for one in drawn)), PAPER)
    top = 0
    for one in drawn:
        sheet.paste(one, (0, top))
        top += one.height
    return sheet


def _block(block: Block, columns: int, width: int) -> Image.Image:
    heading = _heading(block, width)
    rows = [block.cells[start : start + columns] for start in range(0, len(block.cells), columns)]
    cell_height = SIDE + 6 + LINE_HEIGHT * (2 + TEXT_LINES) + GAP
    picture = Image.new("RGB", (width, heading.height + cell_height * len(rows)), PAPER)
    picture.paste(heading, (0, 0))
    for place, row in enumerate(rows):
        for column, cell in enumerate(row):
            left, top = GAP + column * (SIDE + GAP), heading.height + place * cell_height
            picture.paste(_cell(cell), (left, top))
    return picture


def _heading(block: Block, width: int) -> Image.Image:
    left = GAP + (QUERY_SIDE + GAP if block.picture else 0)
    lines = wrapped(block.query[:MOST_LETTERS], width - left - GAP, 4, sheet_font(18))
    height = max(GAP + 26 * len(lines), QUERY_SIDE + GAP if block.picture else 0) + GAP
    heading = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(heading)
    if block.picture:
        heading.paste(_squared(block.picture, QUERY_SIDE), (GAP, GAP))
    for place, line in enumerate(lines):
        draw.text((left, GAP + 26 * place), line, fill=INK, font=sheet_font(18))
    return heading


def _cell(cell: Cell) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE + 6 + LINE_HEIGHT * (2 + TEXT_LINES)), PAPER)
    draw, font = ImageDraw.Draw(picture), sheet_font(13)
    if cell.picture is None:
        draw.rectangle((0, 0, SIDE - 1, SIDE - 1), fill=GROUND, outline=LINE)
        for place, line in enumerate(("no image", "to be read")):
            draw.text((SIDE / 2, SIDE / 2 - 10 + 20 * place), line, fill=MUTED, font=font, anchor="mm")
    else:
        picture.paste(_squared(cell.picture, SIDE), (0, 0))
    key = wrapped(cell.key[:MOST_LETTERS], SIDE, 1, font)[0]
    lines = [(f"{cell.rank}    {cell.score:.3f}", INK), (key, MUTED)]
    lines += [(line, INK) for line in wrapped(cell.text[:MOST_LETTERS], SIDE, TEXT_LINES, font)]
    for place, (line, colour) in enumerate(lines):
        draw.text((0, SIDE + 6 + LINE_HEIGHT * place), line, fill=colour, font=font)
    return picture


def _squared(picture: Image.Image, side: int) -> Image.Image:
    """The whole picture in the middle of a light square."""
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    square = Image.new("RGB", (side, side), GROUND)
    square.paste(picture.resize(size, Image.Resampling.LANCZOS), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square
