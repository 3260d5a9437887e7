"""Charts of pages as inline SVG: curves, and a score with its interval and its chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from minivlm.html import Markup, tag
from minivlm.plots import round_step

WIDTH, HEIGHT = 520, 240  # of a chart, in units of the SVG
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 34  # around its inside
COLOURS = 6  # line-0 to line-5 of html.css
POINTS = 300  # of a curve, at most
BAR = 160, 18

Line = Sequence[tuple[float, float]]


def curves(lines: Mapping[str, Line], *, title: str, across: str = "step") -> Markup:
    """Lines over one axis, with a legend. Values that are not finite are left out; a line with one point is a dot."""
    lines = {name: thinned([(x, y) for x, y in line if math.isfinite(y)]) for name, line in lines.items()}
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return Markup()
    xs, ys = zip(*(point for line in lines.values() for point in line), strict=True)
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6), ticks(min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-12)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    at_x = lambda x: LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / (x_high - x_low)
    at_y = lambda y: TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - y_low) / (y_high - y_low))
    parts = []
    for y in y_ticks:
        parts.append(tag("line", class_="edge", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{at_y(y):.1f}", y2=f"{at_y(y):.1f}"))
        parts.append(tag("text", number(y), x=LEFT - 6, y=f"{at_y(y) + 4:.1f}", text_anchor="end"))
    for x in (x for x in x_ticks if x_low <= x <= x_high):
        parts.append(tag("text", number(x), x=f"{at_x(x):.1f}", y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    parts.append(tag("text", across, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, text_anchor="middle"))
    for i, line in enumerate(lines.values()):
        places = [f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line]
        if len(places) == 1:
            x, y = places[0].split(",")
            parts.append(tag("circle", class_=f"line line-{i % COLOURS}", cx=x, cy=y, r=3))
        else:
            parts.append(tag("polyline", class_=f"line line-{i % COLOURS}", points=" ".join(places)))
    names = [tag("span", name, class_=f"line-{i % COLOURS}") for i, name in enumerate(lines)]
    drawn = tag("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}: {', '.join(lines)}")
    return tag("figure", tag("figcaption", title), drawn, tag("div", names, class_="legend") if names[1:] else None)


def thinned(line: Line) -> Line:
    """Of a long line the means of neighbouring points."""
    step = -(-len(line) // POINTS)
    parts = [line[i : i + step] for i in range(0, len(line), step)] if step > 1 else [[point] for point in line]
    return [tuple(sum(numbers) / len(part) for numbers in zip(*part, strict=True)) for part in parts]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers at equal distances, the first at or below `low` and the last at or above `high`."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = round_step((high - low) / most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}" if abs(value) < 1e4 else f"{value:,.0f}"


def bar(value: float, interval: tuple[float, float] | None, chance: float | None, *, highest: float = 1) -> Markup:
    """From 0 to `highest`: the value as a bar, its interval as a whisker, chance as a dashed line."""
    width, height = BAR
    at = lambda number: round(max(0.0, min(1.0, number / highest)) * (width - 2) + 1, 1) if highest > 0 else 1
    middle = height / 2
    parts = [tag("rect", class_="track", x=1, y=6, width=width - 2, height=6)]
    parts.append(tag("rect", class_="fill", x=1, y=5, width=round(at(value) - 1, 1), height=8))
    if interval is not None:
        low, high = map(at, interval)
        parts.append(tag("path", class_="ink", d=f"M{low} {middle}H{high}M{low} 4V{height - 4}M{high} 4V{height - 4}"))
    if chance is not None:
        parts.append(tag("line", class_="chance", x1=at(chance), x2=at(chance), y1=0, y2=height))
    return tag("svg", parts, width=width, height=height, viewBox=f"0 0 {width} {height}", aria_hidden="true")
