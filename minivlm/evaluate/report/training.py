"""The curves of a run, from its log.jsonl: whatever numbers its lines have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minivlm.html import Content, tag
from minivlm.html_charts import curves
from minivlm.training_log import FACTS, read_log

# Of what is no loss, the titles that are not its name; none for what is nothing to draw.
GROUPS = {
    "step": "",
    "seconds": "",
    "validated": "",
    "peak_memory": "peak memory, GB",
    "gradient_norm": "gradient norm",
}


def training_section(directory: str) -> Content:
    log = Path(directory) / "log.jsonl"
    if not log.is_file():
        return tag("p", f"Left out: {directory} has no log.jsonl, so it is not the directory of a run.", class_="note")
    charts = charts_of(read_log(log))
    drawn = [curves(lines, title=title) for title, lines in charts.items()]
    return (
        tag("div", drawn, class_="curves") if charts else tag("p", f"Left out: {log} holds no numbers.", class_="note")
    )


def charts_of(log: list[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Title → name of a line → its points. The losses of a step, which add up to "loss", share a chart; so do the learning
    rates of parts."""
    charts: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in log:
        for group, name, value in numbers(line):
            charts.setdefault(group, {}).setdefault(name, []).append((line["step"], value))
    losses = charts.get("loss", {})
    if len(losses) == 2 and all(line == losses["loss"] for line in losses.values()):  # one, under its own name as well
        losses.pop("loss")
    return charts


def numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(group, name, value) of the numbers of a line that are finite."""
    for key, value in line.items():
        group = GROUPS.get(key, key.replace("_", " ")) if key in FACTS and key != "loss" else "loss"
        if isinstance(value, Mapping):
            yield from ((group, str(name), float(some)) for name, some in value.items() if is_number(some))
        elif is_number(value) and group:
            scale = 1e-9 if key == "peak_memory" else 1
            yield group, str(line.get("validated", key)) if key == "validation" else key, scale * value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
