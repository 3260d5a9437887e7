"""The curves of a run, from its log.jsonl: whatever numbers its lines have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minivlm.html import Content, tag
from minivlm.html_charts import curves
from minivlm.training_log import read_log

ALONE = ("learning_rate", "gradient_norm", "skipped")  # numbers of a step that are no losses


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
    """Title → name of a line → its points. The losses of a step, which add up to "loss", share a chart; so do the numbers of a
    group, "validation" → {"accuracy": …}."""
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
    is_step = "loss" in line
    for key, value in line.items():
        if isinstance(value, Mapping):
            for name, some in value.items():
                some = some.get("value") if isinstance(some, Mapping) else some
                if is_number(some):
                    yield key.replace("_", " "), str(name), float(some)
        elif key != "step" and is_number(value):
            group = "loss" if is_step and key not in ALONE and not measured(key) else key.replace("_", " ")
            yield group, key, float(value)


def measured(key: str) -> bool:
    """Is it time, speed or memory rather than a loss?"""
    return any(word in key for word in ("second", "memory", "per_s", "samples", "tokens", "score", "time"))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
