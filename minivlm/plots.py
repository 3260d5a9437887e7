"""Plots with Pillow: a canvas whose edges are smooth, and axes with ticks, on which curves are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

import numpy as np
from PIL import Image, ImageDraw

from minivlm.fonts import font, legible, length, write
from minivlm.pictures import EDGE, INK, PALE, PAPER, shorten

FINE = 2  # drawn so much larger and reduced, which smooths edges
SIZE = 13  # of a label
MOST = 700  # points of a curve that are drawn; of more, the lowest and the highest of neighbours
SMOOTH = 40  # a smooth curve is a running mean over this part of all points
ROOM = (64, 44, 16, 50)  # units left of, above, right of and below what axes enclose
TOPS = (0.04, 0.2, 0.4, 1.0)  # of axes of shares
Box = tuple[float, float, float, float]


class Canvas:
    """Draws in units of a page on a picture that is FINE · scale times as large, and `scale` times as large in the end."""

    def __init__(self, width: int, height: int, scale: int = 1):
        self.k = FINE * scale
        self.page = Image.new("RGB", (width * self.k, height * self.k), PAPER)
        self.pen = ImageDraw.Draw(self.page)

    def line(self, *points: float, colour: str, width: float = 1) -> None:
        self.pen.line([p * self.k for p in points], colour, max(1, round(width * self.k)), joint="curve")

    def dashes(self, x0: float, x1: float, y: float, colour: str, dash: float = 5) -> None:
        for x in np.arange(x0, x1, 2 * dash):
            self.line(x, y, min(x + dash, x1), y, colour=colour)

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        self.pen.ellipse([p * self.k for p in (x - radius, y - radius, x + radius, y + radius)], colour, PAPER, self.k)

    def blank(self, *box: float) -> None:
        self.pen.rectangle([p * self.k for p in box], PAPER)

    def text(self, x: float, y: float, text: str, *, colour: str = INK, size: int = SIZE, anchor: str = "lm") -> None:
        self.pen.text((x * self.k, y * self.k), text, colour, font(size * self.k), anchor=anchor)

    def name(self, x: float, y: float, text: str, width: float, colour: str = INK, size: int = SIZE) -> float:
        """Text of a user in any script, cut at `width`, its middle at y; returns where it ends."""
        shown = shorten(legible(text), size * self.k, int(width * self.k))
        write(self.pen, (x * self.k, (y - size * 0.62) * self.k), shown, size * self.k, colour)
        return x + length(shown, size * self.k) / self.k

    def length(self, text: str, size: int = SIZE) -> float:
        return font(size * self.k).getlength(text) / self.k

    def picture(self) -> Image.Image:
        return self.page.resize((self.page.width // FINE, self.page.height // FINE), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Curve:
    """x and y of one length; what is not finite is left out. kind: "smooth", a running mean over the pale values; "line", the
    values joined; "dots", each marked as well. chance: where a dashed line of the same colour is drawn."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    kind: str = "smooth"
    chance: float | None = None

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        kept = np.isfinite(self.y) & np.isfinite(self.x)
        return self.x[kept], self.y[kept]


@dataclass(frozen=True)
class Axes:
    """One plot of a page. log: y in powers of ten; share: y is from 0 to one of TOPS, and told in percent."""

    title: str
    across: str
    curves: Sequence[Curve]
    log: bool = False
    share: bool = False
    names: bool = True  # beside the title, where there are several

    def draw(self, canvas: Canvas, box: Box) -> None:
        left, top, right, bottom = (
            edge + room for edge, room in zip(box, (ROOM[0], ROOM[1], -ROOM[2], -ROOM[3]), strict=True)
        )
        canvas.name(left, box[1] + 10, self.title, right - left, size=15)
        drawn = self.drawn()
        xs, (low, high) = np.concatenate([c.points()[0] for c in drawn]), self.limits(drawn)
        first, last = 0.0, float(xs.max()) or 1.0
        to_x = lambda x: left + (right - left) * (x - first) / (last - first)
        to_y = lambda y: bottom - (bottom - top) * (np.clip(self.scaled(y), low, high) - low) / (high - low)
        for tick, text in self.ticks(low, high):
            y = bottom - (bottom - top) * (tick - low) / (high - low)
            canvas.line(left, y, right, y, colour=EDGE)
            canvas.text(left - 8, y, text, colour=PALE, anchor="rm")
        for tick in steps_between(first, last, 6):
            canvas.text(to_x(tick), bottom + 14, f"{tick:,.10g}", colour=PALE, anchor="mm")
        canvas.text((left + right) / 2, bottom + 34, self.across, colour=PALE, anchor="mm")
        for curve in reversed(drawn):
            draw_curve(canvas, curve, to_x, to_y)
        for curve in drawn:
            if curve.chance is not None:
                canvas.dashes(left, right, float(to_y(curve.chance)), curve.colour)
        self.legend(canvas, drawn, left, right, box[1] + 30)

    def drawn(self) -> list[Curve]:
        """The curves that have points."""
        return [curve for curve in self.curves if len(curve.points()[0])]

    def legend(self, canvas: Canvas, drawn: Sequence[Curve], left: float, right: float, y: float) -> None:
        """The names of the curves, and what the dashed line is."""
        entries = [(c.name, c.colour) for c in drawn] if self.names and len(drawn) > 1 else []
        chances = [c for c in drawn if c.chance is not None]
        entries += [("dashed: chance", PALE if len(chances) > 1 else chances[0].colour)] if chances else []
        for name, colour in entries:
            if left < right - 20:
                left = canvas.name(left, y, name, right - left, colour) + 16

    def scaled(self, y):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log10(np.maximum(y, 1e-12)) if self.log else y

    def limits(self, drawn: Sequence[Curve]) -> tuple[float, float]:
        """Of y, once scaled: all that is smooth is inside, and of single points all but the highest."""
        if self.share:
            most = max(float(curve.points()[1].max()) for curve in drawn)
            return 0.0, next((high for high in TOPS if most <= high), 1.0)
        lows, highs = [], []
        for curve in drawn:
            _, y = curve.points()
            y = np.concatenate([y, [curve.chance]]) if curve.chance is not None else y
            smoothed = smooth(curve.points()[1]) if curve.kind == "smooth" else y
            lows.append(min(np.quantile(y, 0.005), smoothed.min(), y[-1]))
            highs.append(max(np.quantile(y, 0.98), smoothed.max(), y[-1]))
        low, high = float(self.scaled(min(lows))), float(self.scaled(max(highs)))
        if not self.log and 0 < low < 0.5 * high:
            low = 0.0  # a length that begins at 0 is read at sight
        room = 0.04 * (high - low) or abs(high) * 0.1 or 0.5
        return low - (room if low else 0), high + room

    def ticks(self, low: float, high: float) -> list[tuple[float, str]]:
        """Where, once scaled, and the text beside it."""
        if self.share:
            return [(high * s / 4, f"{high * s / 4:.0%}") for s in range(5)]
        if not self.log:
            return [(tick, number(tick)) for tick in steps_between(low, high, 5)]
        powers = range(floor(low), ceil(high) + 1)
        whole = [(float(p), number(10.0**p)) for p in powers if low <= p <= high]
        parts = [] if len(whole) > 2 else [(p + log10(m), number(m * 10.0**p)) for p in powers for m in (2, 5)]
        found = [*whole, *((at, text) for at, text in parts if low <= at <= high)]
        return found if len(found) > 1 else [(t, number(10.0**t)) for t in np.linspace(low, high, 3)]


def draw_curve(canvas: Canvas, curve: Curve, to_x, to_y) -> None:
    x, y = curve.points()
    at = lambda x, y: np.stack([to_x(x), to_y(y)], axis=1).ravel().tolist()
    if curve.kind == "smooth":
        canvas.line(*at(*thinned(x, y)), colour=paler(curve.colour), width=0.75)
        y = smooth(y)
    if len(x) > 1:
        canvas.line(*at(*thinned(x, y)), colour=curve.colour, width=2)
    for one, other in zip(to_x(x), to_y(y), strict=True) if curve.kind == "dots" or len(x) < 3 else ():
        canvas.dot(float(one), float(other), 3.5, curve.colour)


def smooth(y: np.ndarray) -> np.ndarray:
    """A running mean, over fewer points at both ends."""
    half = len(y) // (2 * SMOOTH)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    last, first = np.minimum(np.arange(len(y)) + half + 1, len(y)), np.maximum(np.arange(len(y)) - half, 0)
    return (sums[last] - sums[first]) / (last - first)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of many points the lowest and the highest of each group of neighbours."""
    if len(x) <= 2 * MOST:
        return x, y
    groups = np.array_split(np.arange(len(x)), MOST)
    kept = np.unique([(part[y[part].argmin()], part[y[part].argmax()]) for part in groups])
    return x[kept], y[kept]


def paler(colour: str) -> str:
    return "#" + "".join(f"{round(255 - 0.3 * (255 - int(colour[i : i + 2], 16))):02x}" for i in (1, 3, 5))


def round_step(least: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is no less than this positive number."""
    power = 10.0 ** floor(log10(least))
    return next(m * power for m in (1, 2, 5, 10, 20) if m * power >= least * (1 - 1e-9))


def steps_between(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    width = (high - low) / most
    if not (isfinite(width) and width > 0):
        return [low]
    step = round_step(width)
    return [i * step for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """As short as it is read: 0.003, 1,200, 2e-05."""
    value = 0.0 if abs(value) < 1e-15 else value
    return f"{value:,.10g}" if value == 0 or 1e-3 <= abs(value) < 1e7 else f"{value:.3g}"


def draw_page(
    title: str, plots: Sequence[Axes], *, names: Sequence[tuple[str, str]] = (), columns: int = 2
) -> Image.Image:
    """The plots that have something to show, on one picture. names: with their colours, of what all plots show."""
    plots = [plot for plot in plots if plot.drawn()]
    width, height, top = 600, 320, 56 + 24 * len(names)
    columns = max(1, min(columns, len(plots)))
    canvas = Canvas(columns * width + 24, top + ceil(len(plots) / columns) * height)
    canvas.name(ROOM[0], 28, title, columns * width - ROOM[0], size=19)
    for i, (name, colour) in enumerate(names):
        canvas.line(ROOM[0], 60 + 24 * i, ROOM[0] + 24, 60 + 24 * i, colour=colour, width=3)
        canvas.name(ROOM[0] + 34, 60 + 24 * i, name, columns * width - ROOM[0] - 34)
    for i, plot in enumerate(plots):
        row, column = divmod(i, columns)
        x, y = column * width, top + row * height
        plot.draw(canvas, (x, y, x + width, y + height))
    return canvas.picture()
