"""A page to draw plots on, in units that do not depend on how fine it is drawn."""

from __future__ import annotations

from PIL import Image, ImageDraw

from minivlm.fonts import font
from minivlm.pictures import INK, PAPER

SIZE = 13  # of a label
FINE = 2  # drawn so much larger than the image, which smooths edges


class Canvas:
    """Draws in units of a page; the image has `scale` pixels for each."""

    def __init__(self, width: int, height: int, scale: int = 2):
        self.k = FINE * scale
        self.page = Image.new("RGB", (width * self.k, height * self.k), PAPER)
        self.pen = ImageDraw.Draw(self.page)

    def line(self, *points: float, colour: str, width: float = 1) -> None:
        self.pen.line([p * self.k for p in points], colour, round(width * self.k))

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        self.pen.ellipse([p * self.k for p in (x - radius, y - radius, x + radius, y + radius)], colour, PAPER, self.k)

    def blank(self, *box: float) -> None:
        self.pen.rectangle([p * self.k for p in box], PAPER)

    def text(self, x: float, y: float, text: str, *, colour: str = INK, size: int = SIZE, anchor: str = "lm") -> None:
        self.pen.text((x * self.k, y * self.k), text, colour, font(size * self.k), anchor=anchor)

    def length(self, text: str, size: int = SIZE) -> float:
        return font(size * self.k).getlength(text) / self.k

    def image(self) -> Image.Image:
        return self.page.resize((self.page.width // FINE, self.page.height // FINE), Image.Resampling.LANCZOS)
