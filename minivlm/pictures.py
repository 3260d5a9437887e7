"""Contact sheets: rows of a text and the images that belong to it, right ones framed green with a tick, wrong ones red
with a cross; and curves. Pillow only, with the font it brings along, and others of the system where it lacks a sign."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from minivlm.fonts import font, legible, length, write

INK, PALE, PAPER, EDGE = "#1f2328", "#6b7280", "#ffffff", "#d0d5dd"
GREEN, RED = "#1a9850", "#d7301f"
MARGIN, GAP, FRAME, BADGE = 20, 12, 4, 22  # pixels: around the sheet, between tiles, a frame's line, a tick's circle
TEXT_WIDTH, TEXT_ALONE = 220, 640  # of a row's text beside its images; of rows without any
FINE = 4  # ticks are drawn this much larger and reduced, which smooths their edges


@dataclass(frozen=True)
class Row:
    """One text and its images. marks: True right, False wrong, None unknown; notes: a line or two under each image."""

    text: str
    images: Sequence[Any]  # PIL images or (H, W, 3) uint8 arrays
    marks: Sequence[bool | None] = ()
    notes: Sequence[str] = ()
    detail: str = ""  # smaller, under the text


def sheet(rows: Sequence[Row], *, title: str = "", tile: int = 128, columns: int = 8) -> Image.Image:
    """Draw all rows on one sheet, text on the left. Each image fits into a square of `tile` pixels; a row of more than
    `columns` images goes on below. Where no row has a text, or none an image, the others take the whole width. Characters
    that no font has are written as their code points, and a last line says so."""
    texts = [title, *(text for row in rows for text in (row.text, row.detail, *row.notes))]
    escaped = any(legible(text).count("\\") > text.count("\\") for text in texts)
    rows, title = [spell_out(row) for row in rows], legible(title)
    columns = min(columns, max((len(row.images) for row in rows), default=1))
    cell, text_width = (tile + 2 * FRAME, TEXT_WIDTH) if columns else (0, TEXT_ALONE)
    left = MARGIN + (text_width + GAP if any(row.text for row in rows) else 0)
    heights = [row_height(row, cell, columns, text_width) for row in rows]
    width = left + columns * (cell + GAP) - GAP + MARGIN
    titles = wrap(title, 20, width - 2 * MARGIN)
    footnote = wrap(ESCAPED, 13, width - 2 * MARGIN) if escaped else []
    top = MARGIN + (text_height(titles, 20) + GAP if title else 0)
    size = width, top + sum(heights) + (len(rows) - 1) * 2 * GAP + text_height(footnote, 13) + MARGIN
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    draw_lines(draw, titles, MARGIN, 20, INK)
    for i, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if i:
            draw.line((MARGIN, top - GAP, size[0] - MARGIN, top - GAP), EDGE)
        draw_text(draw, row, top, cell, text_width)
        for j, image in enumerate(row.images):
            line, column = divmod(j, columns)
            corner = left + column * (cell + GAP), top + line * line_height(row, cell)
            draw_tile(page, image, corner, tile, row.marks[j] if row.marks else None, row.notes[j] if row.notes else "")
        top += height + 2 * GAP
    draw_lines(draw, footnote, size[1] - MARGIN - text_height(footnote, 13) + GAP // 2, 13, PALE)
    return page


ESCAPED = "Characters that no font of this system has are written as their code points, such as \\u732b."


def spell_out(row: Row) -> Row:
    notes = [legible(note) for note in row.notes]
    return replace(row, text=legible(row.text), notes=notes, detail=legible(row.detail))


def draw_text(draw: ImageDraw.ImageDraw, row: Row, top: int, cell: int, width: int) -> None:
    """The row's text beside its first line of images, centred on it if there is room."""
    lines, details = wrap(row.text, 17, width), wrap(row.detail, 13, width)
    height = text_height(lines, 17) + text_height(details, 13)
    y = draw_lines(draw, lines, top + max(0, (cell - height) // 2), 17, INK)
    draw_lines(draw, details, y, 13, PALE)


def draw_lines(draw: ImageDraw.ImageDraw, lines: Sequence[str], y: int, size: int, colour: str) -> int:
    """Draws downwards from y at the left margin; returns where the next line would stand."""
    for line in lines:
        write(draw, (MARGIN, y), line, size, colour)
        y += line_step(size)
    return y


def draw_tile(page: Image.Image, image: Any, corner: tuple[int, int], tile: int, mark: bool | None, note: str) -> None:
    draw = ImageDraw.Draw(page)
    image = fit(image, tile)
    x = corner[0] + FRAME + (tile - image.width) // 2
    y = corner[1] + FRAME + tile - image.height  # on the note
    page.paste(image, (x, y))
    colour, width = (EDGE, 1) if mark is None else (GREEN if mark else RED, FRAME)
    frame = (x - width, y - width, x + image.width + width - 1, y + image.height + width - 1)
    draw.rectangle(frame, outline=colour, width=width)
    if mark is not None:
        page.paste(colour, (frame[2] - BADGE + 5, frame[1] - 5), badge(BADGE, "disc"))
        page.paste("white", (frame[2] - BADGE + 5, frame[1] - 5), badge(BADGE, "tick" if mark else "cross"))
    for i, line in enumerate(note.split("\n")):
        shown = shorten(line, 13, tile + 2 * FRAME)
        middle = corner[0] + FRAME + tile // 2
        write(
            draw,
            (middle - length(shown, 13) / 2, corner[1] + tile + 2 * FRAME + 4 + i * line_step(13)),
            shown,
            13,
            PALE,
        )


def fit(image: Any, tile: int) -> Image.Image:
    """An image, PIL or (H, W, 3) uint8, as large as fits into a square. Small ones keep hard pixels, as a model gets them."""
    image = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    scale = tile / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    if scale >= 2:
        whole = -int(-scale // 1)
        image = image.resize((image.width * whole, image.height * whole), Image.Resampling.NEAREST)
        return image.resize(size, Image.Resampling.BOX)
    return image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)


def heat(image: Any, weights: Any, tile: int) -> Image.Image:
    """The image in grey, as large as `fit` makes it, and over it how much weight lies where: none, red, most of all yellow.

    weights (h, w) ≥ 0: a grid over the whole image.
    """
    image = fit(image, tile)
    grid = np.asarray(weights, dtype=np.float32)
    film = Image.fromarray(grid / max(grid.max(), 1e-12)).resize(image.size, Image.Resampling.BICUBIC)
    share = np.asarray(film).clip(0, 1)[..., None]  # (H, W, 1)
    glow = np.concatenate([np.full_like(share, 255), 235 * share**1.5, np.full_like(share, 30)], axis=-1)
    grey = 0.7 * np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((grey + 0.85 * share * (glow - grey)).round().astype(np.uint8))


CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#6b7280", "#e69f00", "#56b4e9")  # of Okabe & Ito 2008
PLOT = 520, 300  # pixels of a chart's inside


def chart(
    lines: Mapping[str, Mapping[int, float]], *, title: str, across: str, chance: float | None = None
) -> Image.Image:
    """Shares between 0 and 1 as curves, each with its name at its end. across: what the x are, at equal distances.

    chance: where a dashed line is drawn.
    """
    (width, height), left, top = PLOT, MARGIN + 44, MARGIN + 44
    page = Image.new("RGB", (left + width + TEXT_WIDTH, top + height + 60), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, font(20))
    places = sorted({x for line in lines.values() for x in line})
    step = (width - 2 * MARGIN) / max(1, len(places) - 1)
    at = lambda x, share: (left + MARGIN + step * places.index(x), top + height * (1 - share))
    for share in (0, 0.25, 0.5, 0.75, 1):
        _, y = at(places[0], share)
        draw.line((left, y, left + width, y), EDGE)
        draw.text((left - 8, y), f"{share:.0%}", PALE, font(13), anchor="rm")
    for x in places:
        draw.text((at(x, 0)[0], top + height + 8), str(x), PALE, font(13), anchor="ma")
    draw.text((left + width / 2, top + height + 28), across, PALE, font(13), anchor="ma")
    if chance is not None:
        _, y = at(places[0], chance)
        for x in range(left, left + width, 12):
            draw.line((x, y, x + 6, y), INK)
    curves = {name: [at(*point) for point in sorted(line.items())] for name, line in lines.items()}
    colours = dict(zip(curves, cycle(CURVES)))
    draw_curves(draw, curves, colours)
    ends = [(points[-1][1], name, colours[name]) for name, points in curves.items()]
    ends += [] if chance is None else [(at(places[0], chance)[1], "chance", INK)]
    write_names(draw, ends, left + width + 8)
    return page


def draw_curves(
    draw: ImageDraw.ImageDraw, curves: Mapping[str, Sequence[tuple[float, float]]], colours: Mapping[str, str]
) -> None:
    """Points joined by lines, the first curve on top."""
    for name, points in reversed(curves.items()):
        draw.line(points, colours[name], 3, joint="curve")
        for x, y in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colours[name])


def write_names(draw: ImageDraw.ImageDraw, ends: Sequence[tuple[float, str, str]], x: float) -> None:
    """y, name and colour of what ends there: the names from x on, moved down where one would lie on another."""
    free = 0.0  # y above which no name is written any more
    for y, name, colour in sorted(ends):
        draw.text((x, max(y, free)), name, colour, font(13), anchor="lm")
        free = max(y, free) + line_step(13)


@lru_cache
def badge(size: int, shape: str) -> Image.Image:
    """A mask of size×size pixels: a filled disc, or the strokes of a tick or a cross that lie on it."""
    s = size * FINE
    mask = Image.new("L", (s, s))
    draw = ImageDraw.Draw(mask)
    strokes = {
        "tick": [((0.27, 0.52), (0.44, 0.69), (0.74, 0.34))],
        "cross": [((0.32, 0.32), (0.68, 0.68)), ((0.68, 0.32), (0.32, 0.68))],
    }
    if shape == "disc":
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
    for stroke in strokes.get(shape, ()):
        draw.line([(x * s, y * s) for x, y in stroke], fill=255, width=round(0.11 * s), joint="curve")
    return mask.resize((size, size), Image.Resampling.LANCZOS)


def line_height(row: Row, cell: int) -> int:
    """Of one line of images: the tile, and its note."""
    return cell + GAP + text_height(max((note.split("\n") for note in row.notes), key=len, default=[]), 13)


def row_height(row: Row, cell: int, columns: int, text_width: int) -> int:
    lines = -(-len(row.images) // columns) or 1 if columns else 0
    text = text_height(wrap(row.text, 17, text_width), 17) + text_height(wrap(row.detail, 13, text_width), 13)
    return max(text, lines * line_height(row, cell) - GAP)


# Between these a line may be broken: signs of scripts without spaces, and signs that are written as numbers.
BREAKABLE = r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}"
PARTS = re.compile(rf"{BREAKABLE}|(?:(?!{BREAKABLE}).)+", re.DOTALL)


def wrap(text: str, size: int, width: int) -> list[str]:
    """Lines of words that fit into `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        for i, part in enumerate(PARTS.findall(word)):
            longer = f"{lines[-1]}{'' if i else ' '}{part}" if lines else ""
            if lines and length(longer, size) <= width:
                lines[-1] = longer
            else:
                lines.append(shorten(part, size, width))
    return lines


def shorten(text: str, size: int, width: int) -> str:
    """The text, or as much of its beginning as fits and an ellipsis."""
    while length(text, size) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def line_step(size: int) -> int:
    return round(size * 1.35)


def text_height(lines: Sequence[str], size: int) -> int:
    return len(lines) * line_step(size)
