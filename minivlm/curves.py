"""`curves.png`: what a run's log.jsonl tells, as curves; of several runs in one plot, a colour each.

Each panel is one number over the steps: pale as it was measured, dark smoothed. Scores of the validation split have a dot each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path

from PIL import Image

from minivlm.atomic_writing import write_atomically
from minivlm.canvas import Canvas
from minivlm.pictures import CURVES, EDGE, INK, PALE
from minivlm.training_log import read_log

PANEL, ACROSS, LEFT, TOP, GAP, FOOT = (330, 190), 3, 62, 78, 78, 72  # sizes in units of the page
NOT_DRAWN = ("step", "seconds", "peak_memory", "skipped", "validation", "validated", "learning_rates")
POINTS = 300  # of a curve, at most: more are averaged
SMOOTH = 0.05  # of a run's points, that a smoothed one looks back on

Log = Sequence[Mapping]  # lines of log.jsonl
Curve = list[tuple[float, float]]


def draw(logs: Mapping[str, Log], *, title: str = "") -> Image.Image:
    """logs: by the name of the run. Of one run a panel for each of its losses, of several one for the loss."""
    colours = dict(zip(logs, cycle(CURVES)))
    panels = [name for name in names(logs) if any(curve(log, name) for log in logs.values())]
    rows = math.ceil(max(1, len(panels)) / ACROSS)
    (width, height), legend = PANEL, 22 if len(logs) > 1 else 0
    page = Canvas(LEFT + ACROSS * width + (ACROSS - 1) * GAP + 24, TOP + legend + rows * (height + FOOT), scale=1)
    page.text(LEFT - 40, 26, title, size=17)
    x = LEFT - 40
    for name, colour in colours.items() if len(logs) > 1 else ():
        page.dot(x + 5, 54, 5, colour)
        page.text(x + 16, 54, name, colour=PALE)
        x += 40 + page.length(name)
    for i, name in enumerate(panels):
        corner = LEFT + i % ACROSS * (width + GAP), TOP + legend + i // ACROSS * (height + FOOT)
        curves = {run: curve(log, name) for run, log in logs.items()}
        panel(
            page,
            corner,
            title_of(logs, name),
            {run: c for run, c in curves.items() if c},
            colours,
            name == "validation",
        )
    return page.image()


def draw_curves(directory: Path) -> None:
    """Of the run in a directory, to its curves.png."""
    image = draw({directory.name: read_log(directory / "log.jsonl")}, title=f"{directory.name}: training")
    write_atomically(directory / "curves.png", lambda path: image.save(path, format="png"))


def names(logs: Mapping[str, Log]) -> list[str]:
    """Of the panels, the most telling first."""
    found = dict.fromkeys(name for log in logs.values() for line in log for name in line)
    first = ["loss", "validation"]
    last = ["learning_rate", "gradient_norm", "samples_per_second"]
    parts = [name for name in found if name not in (*first, *last, *NOT_DRAWN)] if len(logs) == 1 else []
    return [*first, *(parts if len(parts) > 1 else []), *last]


def title_of(logs: Mapping[str, Log], name: str) -> str:
    if name != "validation":
        return name.replace("_", " ")
    told = dict.fromkeys(line["validated"] for log in logs.values() for line in log if line.get("validated"))
    return f"{' or '.join(told)}, validation split".replace("→", " to ")  # which the font has not


def curve(log: Log, name: str) -> Curve:
    """(step, value), at most POINTS of them, each the mean of as many lines."""
    known = [(line["step"] + 1, line[name]) for line in log if isinstance(line.get(name), (int, float))]
    known = [(step, value) for step, value in known if math.isfinite(value)]
    n = math.ceil(len(known) / POINTS)
    parts = (known[i : i + n] for i in range(0, len(known), n or 1))
    return [tuple(sum(column) / len(part) for column in zip(*part, strict=True)) for part in parts]


def smoothed(points: Curve) -> Curve:
    """An exponential mean, without the pull of its start."""
    keep = 1 - 1 / max(1.0, SMOOTH * len(points))
    total, weight, found = 0.0, 0.0, []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        found.append((step, total / weight))
    return found


def panel(
    page: Canvas, corner: tuple[float, float], title: str, curves: Mapping[str, Curve], colours: Mapping, dots: bool
) -> None:
    (left, top), (width, height) = corner, PANEL
    values = [value for points in curves.values() for _, value in points]
    steps = max(step for points in curves.values() for step, _ in points)
    places = ticks(min(values), max(values))
    low, high = places[0], places[-1]
    at = lambda step, value: (left + width * step / steps, top + height * (high - value) / (high - low))
    page.text(left, top - 16, title, colour=INK)
    for value in places:
        page.line(*at(0, value), *at(steps, value), colour=EDGE)
        page.text(
            left - 8, at(0, value)[1], f"{value:.0%}" if dots and high <= 1 else f"{value:g}", colour=PALE, anchor="rm"
        )
    for step in ticks(0, steps, n=3):
        if step <= steps:
            page.text(at(step, low)[0], top + height + 14, f"{step:,g}", colour=PALE, anchor="mm")
    page.text(left + width / 2, top + height + 32, "steps", colour=PALE, anchor="mm")
    for run, points in curves.items():
        colour = colours[run]
        if dots:
            page.line(*(p for point in points for p in at(*point)), colour=colour, width=1.5)
            for point in points:
                page.dot(*at(*point), 3.5, colour)
            continue
        if len(curves) == 1:
            page.line(*(p for point in points for p in at(*point)), colour=pale(colour), width=1)
        dark = points if title == "learning rate" else smoothed(points)
        page.line(*(p for point in dark for p in at(*point)), colour=colour, width=1.75)


def pale(colour: str) -> str:
    """Three quarters of the way to white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - (255 - part) / 4):02x}" for part in parts)


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """About n round numbers from below `low` to above `high`."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = next(round_steps((high - low) / n))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def round_steps(least: float) -> Iterator[float]:
    """1, 2, 2.5 or 5 times a power of ten, from `least` upwards."""
    power = 10.0 ** math.floor(math.log10(least))
    yield from (power * k for k in (1, 2, 2.5, 5, 10) if power * k >= least * (1 - 1e-9))
