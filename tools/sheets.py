"""Draw images with what a model says about them: contact sheets, and annotated copies."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

CELL, LINE, MARGIN = 192, 18, 8  # pixels
COLUMNS = 6
SMALLEST, LARGEST = 256, 1024  # sides of annotated copies
BLUE, GRAY, RED = (66, 133, 200), (220, 220, 220), (190, 30, 30)


@dataclass(frozen=True)
class Cell:
    """An image of a sheet, None if it cannot be shown, and the lines below it."""

    image: Image.Image | None
    lines: tuple[str, ...]
    is_error: bool = False


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def fitted(text: str, width: int, size: int = LINE - 5) -> str:
    """Return a text that is no wider than so many pixels, its end cut off."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "...") > width:
        text = text[: len(text) * 9 // 10]
    return text + "..."


def scaled(image: Image.Image, smallest: int, largest: int) -> Image.Image:
    """Return an image whose longer side is between the two; enlarged pixels stay sharp."""
    side = max(image.size)
    factor = min(max(side, smallest), largest) / side
    size = tuple(max(1, round(part * factor)) for part in image.size)
    return image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def thumbnail(image: Image.Image) -> Image.Image:
    """Shrink an image to what a cell shows, so that a sheet needs little memory."""
    image.thumbnail((CELL, CELL))
    return image


def contact_sheet(cells: Sequence[Cell], columns: int = COLUMNS) -> Image.Image:
    """Return a grid of images with their lines."""
    columns, lines = min(columns, len(cells)), max(len(cell.lines) for cell in cells)
    width, height = CELL + MARGIN, CELL + MARGIN + LINE * lines
    sheet = Image.new("RGB", (columns * width + MARGIN, -(-len(cells) // columns) * height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, cell in enumerate(cells):
        left, top = MARGIN + number % columns * width, MARGIN + number // columns * height
        if cell.image is None:
            draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=GRAY)
        else:
            shown = scaled(cell.image, CELL, CELL)
            sheet.paste(shown, (left + (CELL - shown.width) // 2, top + (CELL - shown.height) // 2))
        for row, text in enumerate(cell.lines):
            place = left, top + CELL + LINE * row
            draw.text(place, fitted(text, CELL), fill=RED if cell.is_error else "black", font=font(LINE - 5))
    return sheet


def annotated(image: Image.Image, top: Sequence[tuple[str, float]]) -> Image.Image:
    """Return an image with a bar for each class name and probability below it."""
    image = scaled(image, SMALLEST, LARGEST)
    width = max(image.width, SMALLEST)
    drawn = Image.new("RGB", (width, image.height + LINE * len(top) + MARGIN), "white")
    drawn.paste(image, ((width - image.width) // 2, 0))
    draw, room = ImageDraw.Draw(drawn), width - 2 * MARGIN - 60  # for the number at the end
    for row, (name, probability) in enumerate(top):
        y = image.height + MARGIN // 2 + LINE * row
        draw.rectangle((MARGIN, y + 1, MARGIN + room, y + LINE - 2), fill=GRAY)
        draw.rectangle((MARGIN, y + 1, MARGIN + round(room * probability), y + LINE - 2), fill=BLUE)
        draw.text((MARGIN + 3, y + 1), fitted(name, room - 6), fill="black", font=font(LINE - 5))
        number = f"{100 * probability:.1f} %"
        draw.text((width - MARGIN, y + 1), number, fill="black", font=font(LINE - 5), anchor="ra")
    return drawn
