"""`curves.png`: how a run went. Losses beside those of a model that knows nothing, validation scores, rates, norms, speed.

log.jsonl ──read_log──→ lines ──column──→ Curve ──→ Axes ──→ one picture; a smooth line over the pale values of each step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from minivlm.atomic_writing import write_atomically
from minivlm.pictures import CURVES
from minivlm.plots import Axes, Curve, draw_page
from minivlm.training_log import FACTS, read_log

STEP = "steps"
SPEED, MEMORY = "samples per second", "peak memory, GB"
PARTS = 6  # learning rates of more parts are told by the highest alone


def write(directory: Path, name: str, chances: Mapping[str, float]) -> None:
    """Draw the log of the run in `directory`, whose recipe is `name`, to curves.png. chances: losses by name."""
    lines = read_log(directory / "log.jsonl")
    page = draw_page(f"{name}: {lines[-1]['step'] + 1:,} steps" if lines else name, run_plots(lines, chances))
    write_atomically(directory / "curves.png", lambda path: page.save(path, format="png", compress_level=3))


def run_plots(lines: Sequence[dict], chances: Mapping[str, float]) -> list[Axes]:
    """The plots of one run."""
    names = loss_names(lines)
    if len(names) == 1:
        chances = {"loss": known} if (known := chances.get("loss", chances.get(names[0]))) else {}
        names = []
    losses = dict(zip(["loss", *names], cycle(CURVES)))
    parts = list(next((line["learning_rates"] for line in reversed(lines) if "learning_rates" in line), {}))
    rates = {f"learning_rates/{part}": part for part in parts} if len(parts) <= PARTS else {}
    rates = rates or {"learning_rate": "learning rate"}
    blue = CURVES[0]
    of = lambda key, name, colour=blue, **how: Curve(name, *column(lines, key), colour, **how)
    head = next((line["validated"] for line in reversed(lines) if line.get("validated")), "score")
    return [
        Axes("loss", STEP, [of(key, key, colour, chance=chances.get(key)) for key, colour in losses.items()]),
        Axes(f"validation: {head}", STEP, [of("validation", head, kind="dots")], share=True),
        Axes("learning rate", STEP, [of(k, n, c, kind="line") for (k, n), c in zip(rates.items(), cycle(CURVES))]),
        Axes("gradient norm, before clipping", STEP, [of("gradient_norm", "norm")], log=True),
        Axes(SPEED, STEP, [of("samples_per_second", "speed")]),
        Axes(MEMORY, STEP, [of("peak_memory", "memory", kind="line")]),
    ]


def compared_plots(runs: Mapping[str, Sequence[dict]], colours: Mapping[str, str]) -> list[Axes]:
    """The plots of several runs, whose lines and colours are given by name."""

    def plot(title: str, key: str, *, across: str = STEP, kind: str = "smooth", **how) -> Axes:
        curves = []
        for name, lines in runs.items():
            x, y = column(lines, key)
            curves.append(
                Curve(name, x if across == STEP else column(lines, "seconds")[1] / 60, y, colours[name], kind)
            )
        return Axes(title, across, curves, names=False, **how)

    return [
        plot("loss", "loss"),
        plot("validation score", "validation", kind="dots", share=True),
        plot("validation score", "validation", across="minutes of training", kind="dots", share=True),
        plot("learning rate", "learning_rate", kind="line"),
        plot("gradient norm, before clipping", "gradient_norm", log=True),
        plot(SPEED, "samples_per_second"),
    ]


def loss_names(lines: Sequence[dict]) -> list[str]:
    """Of the parts that the loss is the sum of."""
    return list(dict.fromkeys(key for line in lines for key in line if key not in FACTS))


def column(lines: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps done, values): NaN where a line has none. "a/b": b of the part a."""
    name, _, part = key.partition("/")
    values = [line.get(name) for line in lines]
    if part:
        values = [value.get(part) if isinstance(value, dict) else None for value in values]
    steps = np.array([line["step"] + 1 for line in lines], dtype=float)
    numbers = [v if isinstance(v, (int, float)) and not isinstance(v, bool) else np.nan for v in values]
    return steps, np.array(numbers, dtype=float) / (1e9 if key == "peak_memory" else 1)
