"""python -m minivlm.zoo: every architecture on one world. Its score, beside chance, against what it took.

    out/*/metrics.json, checkpoints ─┐
    docs/zoo.json, for the others ───┴→ a table, docs/zoo.png, and the figures between <!-- zoo --> and <!-- /zoo --> in pages

A run counts if it finished its recipe as it stands, on the world of shapes; several seeds of one are averaged.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle, product
from math import cos, dist, log, pi, sin
from pathlib import Path
from typing import Any

from PIL import Image

from minivlm.atomic_writing import write_atomically
from minivlm.command_line import Parser, check_sheet_name, write_sheet
from minivlm.errors import UserError, run_command_line
from minivlm.files import read_json
from minivlm.pictures import CURVES, EDGE, PALE
from minivlm.plots import SIZE, Box, Canvas
from minivlm.recipes import RECIPES
from minivlm.recipes.older_options import read_recipe
from minivlm.recipes.resuming import differences
from minivlm.run import Run, read_record

FREE = (
    "seed",
    "save_every",
    "keep",
    "micro_batch",
    "summary",
    "measured",
)  # what may differ from the recipe as it stands
MARKED = re.compile(r"(?<=<!-- zoo -->\n).*?(?=<!-- /zoo -->)", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """headline: the score's name in metrics.json. measures: the same in words. minutes: of training, one or from and to.
    score: the mean of the seeds, or each. trained: how many of the parameters learn."""

    headline: str
    measures: str
    minutes: tuple[float, ...]
    score: tuple[float, ...]
    chance: float
    seeds: int
    parameters: int
    trained: int


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m minivlm.zoo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="out", metavar="DIR", help="where the runs are (out)")
    parser.add_argument(
        "--figures", default="docs/zoo.json", metavar="FILE", help="of recipes without a run (docs/zoo.json)"
    )
    parser.add_argument("--save", default="zoo.png", metavar="FILE", help="where the plot is drawn (zoo.png)")
    parser.add_argument("--pages", nargs="+", default=[], metavar="FILE", help="whose figures are brought up to date")
    parser.add_argument("--record", action="store_true", help="write the figures of the runs into --figures")
    options = parser.parse_args(argv)
    check_sheet_name(options.save)
    if not Path(options.figures).exists():
        raise UserError(f"{options.figures} is missing: it stands in a checkout of minivlm, so run this there.")
    zoo = read_zoo(Path(options.figures))
    runs = measured(Path(options.out), zoo)
    zoo |= runs
    print(table(zoo, runs))
    write_sheet(draw(zoo), options.save)
    for page in map(Path, options.pages):
        write(page, with_figures(page.read_text(encoding="utf-8"), zoo))
    if options.record:
        rows = [f"  {json.dumps(name)}: {json.dumps(vars(entry), ensure_ascii=False)}" for name, entry in zoo.items()]
        write(Path(options.figures), "{\n" + ",\n".join(rows) + "\n}\n")


def write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"wrote {path}")


# ---- figures ---------------------------------------------------------------------------------------------------------


def read_zoo(path: Path) -> dict[str, Entry]:
    rows = {
        name: dict(row, minutes=tuple(row["minutes"]), score=tuple(row["score"]))
        for name, row in read_json(path).items()
    }
    return {name: Entry(**row) for name, row in rows.items()}


def measured(out: Path, known: dict[str, Entry]) -> dict[str, Entry]:
    """The entries of `known` whose recipes have finished runs in `out`, with the figures of these. Others are told of."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*/metrics.json")):
        checkpoints = Run(path.parent).all()
        record = {"scores": read_json(path), **(read_record(checkpoints[-1]) if checkpoints else {})}
        if why := unlike_its_recipe(record, known) if checkpoints else "it has no checkpoint, which tells its recipe":
            print(f"{path.parent} is left out: {why}", file=sys.stderr)
        else:
            found.setdefault(record["name"], []).append(record)
    return {name: entry_of(records, known[name]) for name, records in found.items()}


def unlike_its_recipe(record: dict[str, Any], known: dict[str, Entry]) -> str:
    """Why a run says nothing about its recipe as it stands; an empty string: it does."""
    if (name := record.get("name")) not in known:
        return f"there is no row for {name} in the figures"
    if (headline := known[name].headline) not in record["scores"]:
        return f"its metrics.json has no {headline!r}"
    if record.get("seconds") is None:
        return "an earlier version recorded no time"
    recipe = RECIPES[name]
    was = read_recipe(recipe, record["recipe"], "recipe")
    changed = {field: now for field, (_, now) in differences(recipe, was).items()}
    if record["step"] < recipe.steps:
        return f"it is at step {record['step']} of {recipe.steps}"
    named = [
        f"{field} = {value}" for field, value in changed.items() if field not in FREE and not field.endswith("_from")
    ]
    return f"it was trained with {', '.join(named)}" if named else ""


def entry_of(records: list[dict[str, Any]], known: Entry) -> Entry:
    scores = [record["scores"][known.headline] for record in records]
    minutes = sorted(max(1, round(record["seconds"] / 60)) for record in records)
    return replace(
        known,
        minutes=tuple(dict.fromkeys((minutes[0], minutes[-1]))),
        score=(round(sum(score["value"] for score in scores) / len(scores), 4),),
        chance=scores[0]["chance"],
        seeds=len(records),
        parameters=records[0]["parameters"],
        trained=records[0]["trained"],
    )


# ---- in words --------------------------------------------------------------------------------------------------------


def minutes_text(entry: Entry) -> str:
    return "–".join(f"{m:g}" for m in entry.minutes)


def score_text(entry: Entry) -> str:
    return f"{', '.join(map(percent, entry.score))} % ({percent(entry.chance)})"


def percent(share: float) -> str:
    return f"{round(100 * share, 1):g}"


def table(zoo: dict[str, Entry], runs: dict[str, Entry]) -> str:
    rows = [("recipe", "parameters", "trained", "minutes", "score (chance)", "", "")]
    for name, entry in zoo.items():
        where = f"{entry.seeds} run{'s' * (entry.seeds > 1)} here" if name in runs else "as documented"
        sizes = (f"{entry.parameters:,}", f"{entry.trained:,}")
        rows.append((name, *sizes, minutes_text(entry), score_text(entry), entry.measures, where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def with_figures(page: str, zoo: dict[str, Entry]) -> str:
    """The page with minutes and score of every row `name` between the marks as they are now; its words stay."""
    if not MARKED.search(page):
        raise UserError("a page of --pages has no table between <!-- zoo --> and <!-- /zoo -->.")

    def row(line: str) -> str:
        name = re.match(r"\| `([\w-]+)` ", line)
        if not name or name[1] not in zoo:
            return line
        entry = zoo[name[1]]
        figures = r"\| [\d–]+ \| (\S.*?) [\d., ]+ % \([\d.]+\) \|"
        return re.sub(figures, lambda m: f"| {minutes_text(entry)} | {m[1]} {score_text(entry)} |", line)

    return MARKED.sub(lambda m: "".join(map(row, m[0].splitlines(keepends=True))), page)


# ---- as a plot -------------------------------------------------------------------------------------------------------

PANEL, GAP, MARGIN, TOP, FOOT = (560, 420), 70, 56, 88, 108
DOT, STEM = 5, "#e9ecf1"  # a point's radius, the line from chance to score
SUBTITLE = "A dot is a score on held-out scenes, the bar below it is chance. The scale stretches towards 100 %."


def draw(zoo: dict[str, Entry]) -> Image.Image:
    """Two panels, score against minutes and against parameters: a dot for each recipe, a bar of its colour at its chance."""
    canvas = Canvas(MARGIN + 2 * PANEL[0] + GAP + 20, TOP + PANEL[1] + FOOT, scale=2)
    kinds = list(dict.fromkeys(entry.measures for entry in zoo.values()))
    colours = dict(zip(kinds, cycle(CURVES)))
    minutes = {name: sum(entry.minutes) / len(entry.minutes) for name, entry in zoo.items()}
    millions = {name: entry.parameters / 1e6 for name, entry in zoo.items()}
    canvas.text(MARGIN, 24, "Every architecture on one world of shapes: its score, and what guessing gets", size=17)
    canvas.text(MARGIN, 48, SUBTITLE, colour=PALE)
    panel(canvas, zoo, colours, minutes, MARGIN, "minutes of training", 5)
    panel(canvas, zoo, colours, millions, MARGIN + PANEL[0] + GAP, "million parameters", 0.5)
    legend(canvas, zoo, colours)
    return canvas.picture()


def risen(share: float, rest: float = 0.02) -> float:
    """How far up a score stands, from 0 to 1: scores differ in their errors, so each halving of these is a like step."""
    return log((1 + rest) / (1 - share + rest)) / log((1 + rest) / rest)


def panel(
    canvas: Canvas,
    zoo: dict[str, Entry],
    colours: dict[str, str],
    across: dict[str, float],
    left: int,
    title: str,
    step: float,
) -> None:
    (width, height), most = PANEL, max(across.values()) + step / 2
    at = lambda x, share: (left + width * x / most, TOP + height * (1 - risen(share)))
    for share in (0, 0.25, 0.5, 0.75, 0.9, 0.95, 1):
        canvas.line(*at(0, share), *at(most, share), colour=EDGE)
        canvas.text(left - 8, at(0, share)[1], f"{percent(share)} %", colour=PALE, anchor="rm")
    for i in range(int(most / step) + 1):
        canvas.text(at(i * step, 0)[0], TOP + height + 14, f"{i * step:g}", colour=PALE, anchor="mm")
    canvas.text(left + width / 2, TOP + height + 34, title, colour=PALE, anchor="mm")
    dots = {name: at(across[name], sum(e.score) / len(e.score)) for name, e in zoo.items()}
    for name, entry in zoo.items():
        (x, y), (_, low), colour = dots[name], at(0, entry.chance), colours[entry.measures]
        canvas.line(x, y, x, low, colour=STEM)
        canvas.line(x - 6, low, x + 6, low, colour=colour, width=2)
    boxes = labels(canvas, dots, (left, TOP - 16, left + width + 14, TOP + height))
    for name, (x, y) in dots.items():
        x0, y0, x1, y1 = boxes[name]
        nearest = min(max(x, x0 - 2), x1 + 2), min(max(y, y0), y1) if x0 < x < x1 else (y0 + y1) / 2
        if dist((x, y), nearest) > 2 * DOT:
            canvas.line(x, y, *nearest, colour=PALE, width=0.75)
        canvas.blank(x0, y0, x1, y1)
        canvas.text(x0, (y0 + y1) / 2, name)
    for name, (x, y) in dots.items():
        canvas.dot(x, y, DOT, colours[zoo[name].measures])


def labels(canvas: Canvas, dots: dict[str, tuple[float, float]], room: tuple[float, ...]) -> dict[str, Box]:
    """Where each name stands: as near to its dot as it lies on no other name and on no dot."""
    taken = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in dots.values()]
    found = {}
    for name, (x, y) in sorted(dots.items(), key=lambda dot: (dot[1][1], dot[1][0])):
        width = canvas.length(name)
        boxes = ((a, b - SIZE / 2, a + width, b + SIZE / 2) for a, b in places(x, y, width))
        inside = (b for b in boxes if b[0] > room[0] and b[1] > room[1] and b[2] < room[2] and b[3] < room[3])
        found[name] = next(b for b in inside if not any(overlap(b, other) for other in taken))
        taken.append(found[name])
    return found


def places(x: float, y: float, width: float) -> Iterator[tuple[float, float]]:
    """Where a name beside (x, y) may begin, the best first: right, left, above, below, then further and further away."""
    yield from ((x + DOT + 4, y), (x - DOT - 4 - width, y), (x - width / 2, y - 14), (x - width / 2, y + 14))
    for radius, turn in product(range(16, 400, 6), range(16)):
        angle = pi * turn / 8
        yield x + radius * cos(angle) - width / 2 * (1 - cos(angle)), y + radius * sin(angle)


def overlap(a: Box, b: Box, apart: float = 2) -> bool:
    return a[0] < b[2] + apart and b[0] < a[2] + apart and a[1] < b[3] + apart and b[1] < a[3] + apart


def legend(canvas: Canvas, zoo: dict[str, Entry], colours: dict[str, str]) -> None:
    """What each colour measures, with its chance."""
    y, x = TOP + PANEL[1] + 64, MARGIN
    for measures, colour in colours.items():
        chance = next(entry.chance for entry in zoo.values() if entry.measures == measures)
        text = f"{measures} (chance {percent(chance)} %)"
        if x + 16 + canvas.length(text) > MARGIN + 2 * PANEL[0] + GAP:
            x, y = MARGIN, y + 22
        canvas.dot(x + DOT, y, DOT, colour)
        canvas.text(x + 16, y, text, colour=PALE)
        x += 16 + canvas.length(text) + 28


if __name__ == "__main__":
    run_command_line(main)
